"""Waits for changes in etcd's v2 API: over a stream, so that a change costs no request.

A request names a directory and `waitIndex`, the revision from which changes are wanted. etcd sends the headers of the
answer at once; they contain the store's current revision (`X-Etcd-Index`). Then etcd sends the first change in the
directory from `waitIndex` on, or waits for a change. With `stream=true`, the changes that follow are sent, too, but
only if the first one is later than `X-Etcd-Index`: after a change from its history, etcd sends nothing more. So the
next request has no `waitIndex`: this stream has every change after its own `X-Etcd-Index`. While etcd and the network
hold these back, the changes up to there are requested one by one, from history. Their number does not grow meanwhile.

etcd keeps the last 1,000 writes of all keys. If `waitIndex` is older, etcd answers with error 401, and the caller must
read the whole directory again. If 100 changes wait for a client that does not read, etcd ends the stream. A lost
connection would not be noticed. So a stream ends after a time without a change, and `waitIndex` of the next one must
advance, even if nothing changes in the directory, but without missing a change:

* After a change, the next `waitIndex` is the revision after the change.
* If a request ends without a change, a change may have been sent, and be delayed in the network. So `waitIndex`
  advances only after two requests in succession, over different connections, without a change: to the revision after
  the first one's `X-Etcd-Index`.
* Waits are so short that fewer than ROOM writes happen during two requests.

Sources: https://github.com/etcd-io/etcd/blob/release-3.4/Documentation/v2/api.md ("Waiting for a change"), and
etcdserver/api/v2store/watcher_hub.go, watcher.go and event_history.go there.
"""

from __future__ import annotations

import http.client
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
    """The progress of a watch. `revision` is the first revision whose changes may not all have been received.

    `searched` is the last revision that the last request knew of: the `X-Etcd-Index` of its answer or, if that
    contained a change, the revision of the change. `at` is the time when it was received (monotonic, seconds). `wait`
    is for how many seconds the last request that ended without a change was to wait (see `_wait`).
    """

    revision: int
    searched: int
    at: float
    wait: float = SHORTEST / 2

    @classmethod
    def begin(cls, revision: int) -> Progress:
        return cls(revision, revision - 1, time.monotonic())


class OpenWatch:
    """A watch of the changes below a directory, at one member at a time."""

    def __init__(self, revision: int) -> None:
        """The watch begins at `revision`. No request is sent yet."""
        self.progress = Progress.begin(revision)
        self._client: etcd.Client | None = None
        self._stream: _Request | None = None
        self._after_history = False
        """Whether the last change was from etcd's history, and ended the stream."""

    def changes(self, client: etcd.Client, path: str, longest: float, timeout: float) -> list[Change]:
        """Wait for a change below `path`, which is URL-quoted, at the member of `client`.

        Waits for at most `longest` seconds, but for SHORTEST if `longest` is less. Returns a list of at most one
        change; an empty list may be returned before that time. An answer must begin within `timeout` seconds. After an
        exception, the watch can go on, also at another member.

        Raises WatchExpired if the store's revision is lower than before, since the store was replaced or restored.
        Raises python-etcd's exceptions for errors of etcd or of the connection, and LookupError, RecursionError,
        TypeError or ValueError for an answer that is not etcd's.
        """
        import etcd
        import urllib3.exceptions

        if client is not self._client:
            self.close()
            self._client = client
        try:
            return self._next(client, path, longest, timeout)
        except BaseException as error:
            self.close()
            if isinstance(error, (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError)):
                raise etcd.EtcdConnectionFailed(cause=error) from error
            raise

    def close(self) -> None:
        """Close the connection of the watch."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _next(self, client: etcd.Client, path: str, longest: float, timeout: float) -> list[Change]:
        stream = self._stream
        if stream is None:
            first = None if self._after_history else self.progress.revision
            stream = self._stream = _Request(client, path, self.progress, timeout, first, stream=True)
            self._after_history = False
        if self.progress.revision >= stream.first:
            return self._receive(stream, longest)
        request = _Request(client, path, self.progress, timeout, self.progress.revision)
        try:
            changes = self._receive(request, longest)
        finally:
            request.close()
        if self.progress.revision > stream.first:  # this change comes over the stream, too
            self.progress = replace(self.progress, revision=stream.first, searched=stream.first - 1)
            return []
        return changes

    def _receive(self, request: _Request, longest: float) -> list[Change]:
        """Wait for a change in the answer to `request`, advance `progress`, and return a list of at most one change.

        If no change comes in time (see OpenWatch.changes), the stream is closed.
        """
        progress = self.progress
        event = request.next(max(SHORTEST, min(request.wait, longest)))
        if event is None:
            self.close()
            searched_twice = min(progress.searched, request.reached)
            revision = max(progress.revision, searched_twice + 1)
            self.progress = Progress(revision, request.reached, request.at, request.wait)
            return []
        changes, revision = event
        if revision < progress.revision:
            raise TypeError("a change from before the revision that was asked for")
        if request is self._stream and revision <= request.reached:
            self.close()
            self._after_history = True
        request.has_reached(revision, progress)
        self.progress = replace(progress, revision=revision + 1, searched=revision, at=request.at)
        return changes


class _Request:
    """A request for changes whose answer has begun.

    `first` is the revision from which the answer contains changes. `reached` is the store's revision, as far as it is
    known, since the time `at` (monotonic, seconds). `wait` is for how many seconds to wait for a change (see `_wait`).
    """

    def __init__(
        self,
        client: etcd.Client,
        path: str,
        progress: Progress,
        timeout: float,
        first: int | None,
        stream: bool = False,
    ) -> None:
        """If `first` is None, the changes that follow the store's current revision are requested.

        Raises what OpenWatch.changes raises, and the exceptions of sockets and of HTTP.
        """
        url = f"{client.base_uri}{client.key_endpoint}{path}?wait=true&recursive=true"
        url += "&stream=true" if stream else ""
        url += "" if first is None else f"&waitIndex={first}"
        with answers.bounded(LARGEST) as bounds:
            self._answer = client.http.request("GET", url, timeout=timeout, preload_content=False, redirect=False)
            try:
                if self._answer.status != 200:
                    _refuse(self._answer)
                reached = int(self._answer.headers["x-etcd-index"])
                if reached + 1 < progress.revision:
                    # this is another store than the one that returned the revision, or it was restored from a copy
                    before = progress.revision - 1
                    raise WatchExpired(f"the store has reached {reached} only, where {before} had been reached before")
                self._lines = answers.Lines(bounds, timeout)
            except BaseException:
                self._answer.close()
                raise
        self._is_stream = stream
        self.first = reached + 1 if first is None else first
        self.has_reached(reached, progress)

    def has_reached(self, reached: int, progress: Progress) -> None:
        """Note that the store's revision is now `reached`. `progress` is what the watch had reached before."""
        self.reached = reached
        self.at = time.monotonic()
        self.wait = _wait(progress, reached, self.at)

    def next(self, seconds: float) -> tuple[list[Change], int] | None:
        """Return the next event of etcd, as `_parse` does; None if none begins within `seconds`."""
        line = self._lines.next(seconds)
        if line is not None and not self._is_stream:
            self._answer.drain_conn()  # so that the next request can use the connection
        return None if line is None else _parse(answers.parsed(line))

    def close(self) -> None:
        """Close the connection, unless the next request can use it."""
        self._answer.close()


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
        payload = {**answers.parsed(answer.data), "status": answer.status}
    except (TypeError, ValueError):
        payload = {"message": "Bad response", "cause": answer.data[:1000].decode(errors="replace")}
    etcd.EtcdError.handle(payload)
