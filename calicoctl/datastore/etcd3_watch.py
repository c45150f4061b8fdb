"""A watch in etcd's v3 API: a stream from one member, with the changes below a directory.

A watch begins at a revision. The first message says that the watch was created, and contains the member's revision.
Each further message contains the changes of one revision or more, in order. Special cases:

* If the changes were compacted, or the watch is refused, a message says `canceled`. The stream stays open, but no
  message follows.
* If the store was restored from a backup, its revision may be lower than the revision at which the watch begins. Then
  no message follows the first one. So the revision in the first message is compared with that at which the watch
  begins. The revision of a member that lags behind the others may be too low as well. To exclude this, the caller must
  make a linearizable read at the member before it opens a watch there.
* A large message is sent in fragments. Until the last fragment has arrived, the changes of a revision may be
  incomplete.
* A member that hangs sends nothing. Etcd3Store.watch detects this.
* A message without changes contains a revision, and says that there are no further changes up to this revision. If
  nothing changes, etcd sends such a message every ten minutes. So a later watch, at another member, need not begin at
  an old revision, which may have been compacted.

Sources: https://github.com/etcd-io/etcd/blob/release-3.4/Documentation/learning/api.md ("Watch API") and
etcdserver/api/v3rpc/watch.go there.
"""

from __future__ import annotations

import time
from typing import Any

from calicoctl import answers
from calicoctl.datastore import etcd3_json
from calicoctl.datastore.etcd3_http import PERMISSION_DENIED, READ_TIMEOUT, UNAUTHENTICATED, Connection, ErrorAnswer
from calicoctl.datastore.members import Unanswered
from calicoctl.datastore.store import Change
from calicoctl.errors import StoreError, WatchExpired

LARGEST = 64 * answers.MiB
"""The maximum size of a message, in bytes. etcd splits messages of more than 1.5 MiB, but not a single change."""


class OpenWatch:
    """A watch at one member.

    `revision` is the first revision whose changes may not all have been received. A watch that replaces this one must
    begin there.
    """

    def __init__(self, connection: Connection, directory: str, revision: int = 0) -> None:
        """Open a watch of the changes below `directory`, and wait for the first message.

        The watch begins at `revision` or, if this is 0, at the revision that follows the member's current one.

        Raises WatchExpired if the changes from `revision` on were compacted, or if the store has not even reached the
        revision before `revision`, since it was restored from a backup. Raises ErrorAnswer or StoreError if the watch
        is refused; AttributeError, LookupError, TypeError or ValueError for an unexpected message; and what
        Connection.post raises.
        """
        self.connection = connection
        self.revision = revision
        self._directory = directory
        start, end = etcd3_json.below(directory)
        request = {
            "key": etcd3_json.base64(start),
            "range_end": etcd3_json.base64(end),
            "start_revision": str(revision),
            "progress_notify": True,
            "fragment": True,
        }

        def opened() -> None:  # etcd refuses the token of a watch in the first message
            self._stream = connection.stream("/v3/watch", {"create_request": request}, LARGEST)
            try:
                self._await_created()
            except BaseException:
                self.close()
                raise

        connection.with_token(opened)

    def changes(self, seconds: float) -> list[Change]:
        """Wait for a message with changes, and return its changes.

        If no such message begins within `seconds`, return an empty list. Raises what `__init__` raises. After an
        exception, the watch must be closed.
        """
        end = time.monotonic() + seconds
        changes: list[Change] | None = []
        while changes == []:  # a message without changes is forgotten before the next one is read
            changes = self._next(end - time.monotonic())
        return changes or []

    def close(self) -> None:
        """Close the connection of the watch."""
        self._stream.close()

    def _await_created(self) -> None:
        message = self._stream.next(READ_TIMEOUT)
        if message is None:
            raise Unanswered(f"{self.connection.url} did not answer (timed out)")
        if not message.get("created"):
            raise TypeError("something else than a watch")
        self._refuse_canceled(message)
        reached = etcd3_json.revision(message)
        if reached + 1 < self.revision:
            # this is another store than the one that returned the revision, or it was restored from a copy
            before = self.revision - 1
            raise WatchExpired(f"the store has reached {reached} only, where {before} had been reached before")
        self.revision = self.revision or reached + 1

    def _next(self, seconds: float) -> list[Change] | None:
        """Read the next message, advance `revision`, and return the message's changes, of which there may be none.

        If no message begins within `seconds`, return None.
        """
        message = self._stream.next(seconds)
        if message is None:
            return None
        self._refuse_canceled(message)
        events = message.get("events", [])
        if not events:
            self.revision = max(self.revision, etcd3_json.revision(message) + 1)
            return []
        changes = [etcd3_json.change(event) for event in events]
        last = etcd3_json.number(events[-1]["kv"], "mod_revision")
        if last < self.revision:
            raise TypeError("a change from before the revision that was asked for")
        self.revision = last if message.get("fragment") else last + 1
        return changes

    def _refuse_canceled(self, message: dict[str, Any]) -> None:
        if not message.get("canceled"):
            return
        url = self.connection.url
        if "compact_revision" in message:
            raise WatchExpired(f"etcd at {url} has forgotten the changes that are asked for")
        reason = str(message.get("cancel_reason", ""))
        if not reason or "permission denied" in reason:
            raise ErrorAnswer(PERMISSION_DENIED, reason)
        if any(text in reason for text in ("auth token", "auth store", "user name is empty")):
            raise ErrorAnswer(UNAUTHENTICATED, reason)
        raise StoreError(f"etcd at {url} does not let {self._directory} be watched: {' '.join(reason.split())[:120]}")
