"""Waits for changes in etcd's v2 API by long polls.

A request names a directory and `waitIndex`, the revision from which changes are wanted. etcd sends the headers of the
answer at once; they contain the store's current revision (`X-Etcd-Index`). Then etcd sends the first change in the
directory from `waitIndex` on, or waits for a change. etcd keeps the last 1,000 writes of all keys. If `waitIndex` is
older, etcd answers with error 401, and the caller must read the whole directory again.

So `waitIndex` must advance, even if nothing changes in the directory, but without missing a change:

* After a change, the next `waitIndex` is the revision after the change.
* If a request ends without a change, a change may have been sent, and be delayed in the network. So `waitIndex`
  advances only after two requests in succession, over different connections, without a change: to the revision after
  the first one's `X-Etcd-Index`.
* Waits are so short that fewer than ROOM writes happen during two requests.

Sources: https://github.com/etcd-io/etcd/blob/release-3.4/Documentation/v2/api.md ("Waiting for a change") and
server/etcdserver/api/v2store/event_history.go there.
"""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from calicoctl import answers
from calicoctl.datastore.store import Change, Entry
from calicoctl.errors import WatchExpired

if TYPE_CHECKING:
    import etcd

ROOM = 500
"""The number of writes by which `waitIndex` may lag behind. The rest of etcd's 1,000 is a reserve."""

SHORTEST = 0.1
"""The minimum wait for a change, in seconds. It allows for the retransmission of a lost packet."""

LARGEST = 64 * answers.MiB
"""The maximum size of an answer, in bytes. A change contains the key's old and new value."""


@dataclass(frozen=True)
class Progress:
    """The progress of a watch. `revision` is the `waitIndex` of the next request.

    `searched` is the `X-Etcd-Index` of the last answer or, if that answer contained a change, the revision of the
    change. `at` is the time of that answer (monotonic, seconds). `wait` is the result of `_wait` for the last
    request that ended without a change.
    """

    revision: int
    searched: int
    at: float
    wait: float = SHORTEST / 2

    @classmethod
    def begin(cls, revision: int) -> Progress:
        return cls(revision, revision - 1, time.monotonic())


def poll(
    client: etcd.Client, path: str, progress: Progress, longest: float, timeout: float
) -> tuple[list[Change], Progress]:
    """Send one request for a change below `path`, which is URL-quoted.

    Waits for the change for at most `longest` seconds, but for SHORTEST if `longest` is less. Returns a list of at most
    one change, and the new progress. The answer must begin within `timeout` seconds.

    Raises WatchExpired if the store's revision is lower than before, since the store was replaced or restored. Raises
    python-etcd's exceptions for errors of etcd or of the connection, and LookupError, RecursionError, TypeError or
    ValueError for an answer that is not etcd's.
    """
    import etcd
    import urllib3.exceptions

    url = f"{client.base_uri}{client.key_endpoint}{path}?wait=true&recursive=true&waitIndex={progress.revision}"
    try:
        with answers.bounded(LARGEST) as bounds:
            answer = client.http.request("GET", url, timeout=timeout, preload_content=False, redirect=False)
            try:
                if answer.status != 200:
                    _refuse(answer)
                now = time.monotonic()
                reached = int(answer.headers["x-etcd-index"])
                if reached + 1 < progress.revision:
                    # this is another store than the one that returned the revision, or it was restored from a copy
                    before = progress.revision - 1
                    raise WatchExpired(f"the store has reached {reached} only, where {before} had been reached before")
                wait = _wait(progress, reached, now)
                silent = answer.length_remaining != 0 and not bounds.wait(max(SHORTEST, min(wait, longest)))
                if silent:
                    searched_twice = min(progress.searched, reached)
                    return [], Progress(max(progress.revision, searched_twice + 1), reached, now, wait)
                body = answer.read()
            finally:
                answer.close()
    except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
        raise etcd.EtcdConnectionFailed(cause=error) from error
    if not body:
        raise etcd.EtcdConnectionFailed(cause=ConnectionError("the watch was ended"))
    changes, revision = _parse(json.loads(body))
    if revision < progress.revision:
        raise TypeError("a change from before the revision that was asked for")
    return changes, replace(progress, revision=revision + 1, searched=revision, at=time.monotonic())


def _wait(progress: Progress, reached: int, now: float) -> float:
    """Return for how many seconds to wait for a change, so that the next request lags behind by at most ROOM writes.

    `reached` is the revision in the headers of the current answer, which arrived at the time `now`. The result is at
    least SHORTEST, and otherwise at most twice the wait before.
    """
    written = max(0, reached - progress.searched)
    per_second = written / max(0.001, now - progress.at)
    room = (ROOM - written) / per_second if written else answers.LONGEST
    # writes that come in bursts may begin again at any time
    return max(SHORTEST, min(room, 2 * progress.wait))


def _parse(event: Any) -> tuple[list[Change], int]:
    """Return the changes (at most one) in an event of etcd, and the event's revision."""
    node = event["node"]
    revision = node["modifiedIndex"]
    key, value = node["key"], node.get("value", "")
    if not (isinstance(key, str) and isinstance(value, str) and isinstance(revision, int)):
        raise TypeError("a change of another shape")
    if node.get("dir") and event["action"] == "update":
        return [], revision  # only the directory's time to live has changed, not its keys
    if node.get("dir") or event["action"] in ("delete", "expire", "compareAndDelete"):
        return [Change(key, None)], revision
    return [Change(key, Entry(key, value, revision, node["createdIndex"]))], revision


def _refuse(answer: Any) -> None:
    """Raise python-etcd's exception for an answer whose HTTP status is not 200."""
    import etcd

    try:
        payload = {**json.loads(answer.data), "status": answer.status}
    except (TypeError, ValueError):
        payload = {"message": "Bad response", "cause": answer.data[:1000].decode(errors="replace")}
    etcd.EtcdError.handle(payload)
