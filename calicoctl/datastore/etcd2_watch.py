"""Waiting for changes in etcd's v2 API by long polls, however much is written elsewhere in the same etcd.

A request names a directory and the revision from which changes are wanted (`waitIndex`). etcd sends the headers of its
answer at once: they contain the revision that the store has reached (`X-Etcd-Index`). Then etcd searches its last 1,000
writes, of any key, for the first change in the directory from `waitIndex` on. It sends this change or, if there is
none, waits for one. If it no longer has all writes from `waitIndex` on, it answers with error 401, and the caller must
read the whole directory again.

So a request must not lag behind by 1,000 writes. But no change may be lost, or delivered twice:

* After a change, the next request asks from the revision after the change, so the change is delivered once. No earlier
  change is lost, since etcd sends the first one.
* A request is silent if its wait ends without a change. That shows that there is no change from `waitIndex` up to the
  revision in the headers, unless a change was sent and is delayed in the network. So silence counts only when a second
  request, over another connection, was silent about the same revisions: the next request asks from the revision after
  the one in the headers of the last request but one.
* What is written while a request waits is later than the revision in its headers, so later requests ask for it again.

Hence a request lags behind by all that is written during the two requests before it. The revisions in the headers show
how many writes that is per second, and the wait is chosen so that the lag stays below ROOM. In a quiet store, a wait
lasts as long as the caller wants.

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
"""Writes by which a request may lag behind; the rest of the 1,000 is for writes while the request is on its way."""

SHORTEST = 0.1
"""Seconds that a request waits at least, so that a lost packet of its answer can be sent again meanwhile."""

LARGEST = 64 * answers.MiB
"""The largest answer, in bytes: a change contains the key's value twice, as it was and as it is."""


@dataclass(frozen=True)
class Progress:
    """How far a watch has come: changes from `revision` on are not known yet.

    `searched` is the revision up to which etcd had searched when the last request was answered, at the time `at`
    (monotonic, seconds): the one in the headers or, if there was a change, that of the change. `wait` is the wait of
    the last silent request, in seconds, as `_wait` chose it.
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
    """Wait by one request for a change below `path`, for at most `longest` seconds, but at least SHORTEST.

    Returns the change (a list of one or, if there was none, an empty list) and the new progress. The answer's headers
    must begin to arrive within `timeout` seconds. Raises WatchExpired if the store's revision is lower than it was:
    then it is another store, or was restored from a copy. Raises python-etcd's exceptions for errors of etcd or of the
    connection, and LookupError, TypeError or ValueError for an answer that is not etcd's.
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
    """Return for how many seconds a request may wait. Its headers arrived at `now`, with the revision `reached`.

    The next request will ask for changes after `progress.searched`, so it must be sent before ROOM writes have followed
    that revision.
    """
    written = max(0, reached - progress.searched)
    per_second = written / max(0.001, now - progress.at)
    room = (ROOM - written) / per_second if written else answers.LONGEST
    # writes that come in bursts may begin again at any time
    return max(SHORTEST, min(room, 2 * progress.wait))


def _parse(event: Any) -> tuple[list[Change], int]:
    """Return the changes (at most one) that an event of etcd stands for, and the revision of the event."""
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
