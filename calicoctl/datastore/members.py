"""Failover between the members of a cluster, and retries of requests without an answer. Used by all backends.

`Members` has one connection to each member; the backend defines the connection's class. A connection raises NotSent,
Unanswered or ConnectionLost if a request gets no answer. After NotSent, the next member is asked; also after NotServed,
since members may serve different APIs during a rolling restart or upgrade. If a write may have been applied,
`Members.write` reads the key that was to be written, and a verdict (`created`, `updated` or `deleted`) decides whether
the write is sent again.

A member that has kept a request waiting is asked last by the caller's next commands, too: see slow_members.py.
"""

from __future__ import annotations

import random
import re
import time
from typing import Callable, Generic, TypeVar

from calicoctl.datastore import slow_members
from calicoctl.datastore.settings import DEFAULT_MEMBERS, EtcdSettings, Member
from calicoctl.datastore.store import Entry
from calicoctl.errors import CompareFailed, Fenced, KeyExists, NoSuchApi, StoreUnavailable

SLOW = 1.0
"""Seconds. A member at which a request fails after a longer time has kept its caller waiting: see slow_members.py."""

T = TypeVar("T")
C = TypeVar("C")

Verdict = Callable[["Entry | None"], "Entry | None"]
"""A function that decides whether a write of unknown outcome was applied. Its argument is the key's current entry, None
if there is no such key. It returns the written entry if the write was applied, None if it was not. It raises KeyExists
or CompareFailed if another writer has changed the key, so that the outcome stays unknown."""


class RequestFailed(Exception):
    """A request got no answer. The exception's text contains the member's URL and the reason.

    If `garbled` is true, the reason may be that the server speaks another protocol.
    """

    def __init__(self, why: str, garbled: bool = False) -> None:
        super().__init__(why)
        self.garbled = garbled


class NotSent(RequestFailed):
    """The request did not reach the member, so the member has not applied it."""


class NotServed(NotSent):
    """The member does not serve the API of the request. Another member may serve it."""


class Unanswered(RequestFailed):
    """The outcome of the request is unknown, for example because of a timeout, or because there is no leader."""


class ConnectionLost(Unanswered):
    """The connection was lost before the answer arrived."""


class Deadline:
    """The time until which a request is retried: `seconds` from now."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def backoff(self, failure: Unanswered) -> None:
        """Wait for a random time before the next attempt; raise StoreUnavailable if the deadline has passed.

        `failure` says why the last attempt failed. It is named in the text of StoreUnavailable.
        """
        if time.monotonic() > self._end:
            raise StoreUnavailable(f"etcd cannot do what was asked: {failure}; try again later")
        time.sleep(random.uniform(0.1, 0.3))


class Members(Generic[C]):
    """The members of one cluster, with a connection (of the backend's type C) to each."""

    def __init__(self, settings: EtcdSettings, connect: Callable[[Member], C], patience: float) -> None:
        """`connect` returns a connection to a member, without sending a request.

        If the members can be reached, but do not answer (for example during a leader election), a request is retried
        for `patience` seconds.
        """
        self._settings = settings
        self._connect = connect
        self._patience = patience
        self._order = slow_members.last(settings.members)
        self._connections: dict[Member, C] = {}
        self._answered: set[Member] = set()

    def recall_slow(self) -> None:
        """Ask those members last that another command has found slow since: see slow_members.py."""
        self._order = slow_members.last(self._order)

    def ask(self, send: Callable[[C], T]) -> T:
        """Call `send` with the connection to the first member that can be reached, and return what it returns.

        If `send` raises NotSent, or if the member turns out to speak another protocol, the next member is asked. If
        `send` raises Unanswered, the outcome is unknown, and no other member is asked: Unanswered is raised. A member
        that has not answered is moved to the end of the order in which members are asked.

        Raises NoSuchApi if no member serves the API, StoreUnavailable if no member is left to ask for another reason,
        and any other exception of `send`.
        """
        unserved: list[str] = []
        reasons: list[str] = []
        mismatches = 0
        for member in tuple(self._order):
            began = time.monotonic()
            try:
                answer = send(self._connection(member))
            except RequestFailed as failure:
                self._ask_last(member)
                waited = 0 if isinstance(failure, ConnectionLost) else time.monotonic() - began  # it may be a watch's
                if waited >= SLOW and len(self._order) > 1:
                    slow_members.remember(member)
                mismatch = self._mismatch(member, failure)
                if isinstance(failure, NotServed):
                    unserved.append(str(failure))
                elif mismatch is not None:
                    reasons.append(f"{self._settings.url(member)}: {mismatch}")
                    mismatches += 1
                elif isinstance(failure, NotSent):
                    reasons.append(str(failure))
                else:
                    raise
            else:
                self._answered.add(member)
                return answer
        if unserved and not reasons:
            raise NoSuchApi(unserved[0])
        if unserved:  # one of the others may serve it
            raise StoreUnavailable(f"{'; '.join(unserved)}; etcd cannot be reached at {', '.join(reasons)}")
        if mismatches == len(reasons):
            raise StoreUnavailable(f"etcd cannot be used at {'; '.join(reasons)}")
        hint = self._settings.local_etcd_hint("one", "it", self._settings.members == DEFAULT_MEMBERS)
        raise StoreUnavailable(
            f"etcd cannot be reached at {', '.join(reasons)}: start it, or say with ETCD_AUTHORITY or ETCD_ENDPOINTS "
            f"where it is{f'; {hint}' if hint else ''}"
        )

    def retry(self, send: Callable[[C], T]) -> T:
        """Send an idempotent request, again and again, until it is answered; return the answer.

        Raises NoSuchApi if no member serves the API, and StoreUnavailable if no member can be reached, or if none has
        answered within the `patience` that the constructor was given.
        """
        return self.resend(lambda connection, doubtful: send(connection))

    def resend(self, send: Callable[[C, bool], T]) -> T:
        """Send a request, again and again, until it is answered; return the answer.

        The request must be one that changes nothing when it is applied for the second time. The second argument of
        `send` says whether an earlier attempt may have been applied. Raises what `retry` raises.
        """
        deadline = Deadline(self._patience)
        doubtful = False

        def attempt(connection: C) -> T:
            return send(connection, doubtful)

        while True:
            try:
                return self.ask(attempt)
            except Unanswered as failure:
                doubtful = True
                deadline.backoff(failure)

    def write(self, send: Callable[[C, bool], Entry], read: Callable[[], Entry | None], verdict: Verdict) -> Entry:
        """Send a conditional write until its outcome is known; return the written entry.

        The second argument of `send` says whether an earlier attempt may have been applied. `send` raises KeyExists,
        CompareFailed or Fenced if a condition of the write is not met. After an attempt without an answer, `verdict`
        decides whether the write was applied, from the entry that `read` returns. Raises KeyExists, CompareFailed or
        Fenced if a condition of the write was not met, or if it stays unknown whether the write was applied; and what
        `retry` raises.
        """
        deadline = Deadline(self._patience)
        doubtful = False

        def attempt(connection: C) -> Entry:
            return send(connection, doubtful)

        while True:
            try:
                return self.ask(attempt)
            except (KeyExists, CompareFailed, Fenced):
                if not doubtful:
                    raise
                applied = verdict(read())
                if applied is None:
                    raise
                return applied
            except Unanswered as failure:
                doubtful = True
                deadline.backoff(failure)
                applied = verdict(read())
                if applied is not None:
                    return applied

    def _connection(self, member: Member) -> C:
        if member not in self._connections:
            self._connections[member] = self._connect(member)
        return self._connections[member]

    def _ask_last(self, member: Member) -> None:
        self._order.remove(member)
        self._order.append(member)

    def _mismatch(self, member: Member, failure: RequestFailed) -> str | None:
        """Return a text about the other protocol that a member speaks, None if `failure` has another cause."""
        if member in self._answered or not failure.garbled:
            return None
        from calicoctl.datastore import probe

        return probe.mismatch(self._settings.scheme, *member)


def created(key: str, value: str) -> Verdict:
    """Return the verdict for a `create`: applied if the key has `value`, not applied if the key does not exist.

    In any other case, the verdict raises KeyExists.
    """

    def verdict(now: Entry | None) -> Entry | None:
        if now is not None and now.value != value:
            raise KeyExists(f"etcd key {key} exists already")
        return now

    return verdict


def updated(entry: Entry, value: str) -> Verdict:
    """Return the verdict for an `update`: not applied if `entry` is unchanged, applied if the key now has `value`.

    In any other case, the verdict raises CompareFailed.
    """

    def verdict(now: Entry | None) -> Entry | None:
        if now is not None and now.revision == entry.revision:
            return None
        if now is not None and now.value == value:
            return now
        raise CompareFailed(entry.key, maybe_applied=True)

    return verdict


def deleted(entry: Entry) -> Verdict:
    """Return the verdict for a `delete`: not applied if `entry` is unchanged, applied if the key does not exist.

    In any other case, the verdict raises CompareFailed.
    """

    def verdict(now: Entry | None) -> Entry | None:
        if now is None:
            return entry
        if now.revision == entry.revision:
            return None
        raise CompareFailed(entry.key, maybe_applied=True)

    return verdict


def why(cause: BaseException) -> str:
    """Return a short text, from the exception `cause`, about why a member could not be reached."""
    text = str(cause)
    for words in ("Connection refused", "timed out", "No route to host", "Network is unreachable"):
        if words in text:
            return words.lower()
    if "resol" in text or "Name or service" in text:
        return "unknown host name"
    text = re.sub(r"\[SSL: \w+\] |\(_ssl\.c:\d+\)", "", text)
    return text.rpartition(": ")[2].strip("()'\" ,") or type(cause).__name__
