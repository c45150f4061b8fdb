"""Failover between the members of a cluster, and retries of requests without an answer. Used by all backends.

`Members` has one connection to each member; the backend defines the connection's class. A connection raises NotSent,
Unanswered or ConnectionLost if a request gets no answer. After NotSent, the next member is asked. If a write may have
been applied, `Members.write` reads its key, and a verdict (`created`, `updated` or `deleted`) decides whether the write
is sent again.
"""

from __future__ import annotations

import random
import re
import time
from typing import Callable, Generic, TypeVar

from calicoctl.datastore.settings import DEFAULT_MEMBERS, EtcdSettings, Member
from calicoctl.datastore.store import Entry
from calicoctl.errors import CompareFailed, Fenced, KeyExists, StoreUnavailable

T = TypeVar("T")
C = TypeVar("C")

Verdict = Callable[["Entry | None"], "Entry | None"]
"""A function that decides whether a write of unknown outcome was applied. Its argument is the key's current entry, None
if there is no such key. It returns the written entry if the write was applied, None if it was not. It raises KeyExists
or CompareFailed if another writer has changed the key, so that the outcome stays unknown."""


class RequestFailed(Exception):
    """A request got no answer. The text contains the member's URL and the reason.

    `garbled` says that the server may speak another protocol.
    """

    def __init__(self, why: str, garbled: bool = False) -> None:
        super().__init__(why)
        self.garbled = garbled


class NotSent(RequestFailed):
    """The request did not reach the member, so it was not applied."""


class Unanswered(RequestFailed):
    """The outcome of the request is unknown, for example because of a timeout, or because there is no leader."""


class ConnectionLost(Unanswered):
    """The connection was lost before the answer arrived."""


class Deadline:
    """The time, `seconds` from now, until which a request is retried."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def backoff(self, failure: Unanswered) -> None:
        """Wait for a random time before the next attempt; raise StoreUnavailable if the deadline has passed."""
        if time.monotonic() > self._end:
            raise StoreUnavailable(f"etcd cannot do what was asked: {failure}; try again later")
        time.sleep(random.uniform(0.1, 0.3))


class Members(Generic[C]):
    """The members of one cluster, with a connection (of the backend's type C) to each."""

    def __init__(self, settings: EtcdSettings, connect: Callable[[Member], C], patience: float) -> None:
        """`connect` creates a connection, and sends no request.

        For `patience` seconds, a request is retried while the members that can be reached do not answer, for example
        during a leader election.
        """
        self._settings = settings
        self._connect = connect
        self._patience = patience
        self._order = list(settings.members)
        self._connections: dict[Member, C] = {}
        self._answered: set[Member] = set()

    def ask(self, send: Callable[[C], T]) -> T:
        """Send a request to the first member that can be reached, and return its answer.

        A member that fails is moved to the end of the order. A member that speaks another protocol is skipped. Raises
        Unanswered if the outcome is unknown, StoreUnavailable if no member is left to ask, and any other exception of
        `send`.
        """
        reasons: list[str] = []
        mismatches = 0
        for member in tuple(self._order):
            try:
                answer = send(self._connection(member))
            except RequestFailed as failure:
                self._ask_last(member)
                mismatch = self._mismatch(member, failure)
                if mismatch is not None:
                    reasons.append(f"{self._settings.url(member)}: {mismatch}")
                    mismatches += 1
                elif isinstance(failure, NotSent):
                    reasons.append(str(failure))
                else:
                    raise
            else:
                self._answered.add(member)
                return answer
        if mismatches == len(reasons):
            raise StoreUnavailable(f"etcd cannot be used at {'; '.join(reasons)}")
        hint = self._settings.local_etcd_hint("one", "it", self._settings.members == DEFAULT_MEMBERS)
        raise StoreUnavailable(
            f"etcd cannot be reached at {', '.join(reasons)}: start it, or say with ETCD_AUTHORITY or ETCD_ENDPOINTS "
            f"where it is{f'; {hint}' if hint else ''}"
        )

    def retry(self, send: Callable[[C], T]) -> T:
        """Send an idempotent request until it is answered; raise StoreUnavailable after `patience` seconds."""
        return self.resend(lambda connection, doubtful: send(connection))

    def resend(self, send: Callable[[C, bool], T]) -> T:
        """Send a request that is idempotent, or cannot be applied twice, until it is answered; return the answer.

        The second argument of `send` says whether an earlier attempt may have been applied. Raises StoreUnavailable
        after `patience` seconds.
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

        The second argument of `send`: see `resend`. `send` raises KeyExists, CompareFailed or Fenced if a condition of
        the write is not met. After an attempt without an answer, `verdict` decides from the entry that `read` returns
        whether the write was applied. Raises KeyExists, CompareFailed or Fenced if the write was not applied, or if
        this stays unknown, and StoreUnavailable if there is no answer for `patience` seconds.
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
        """Return a text about the other protocol that a member speaks, None if this is not the cause of `failure`."""
        if member in self._answered or not failure.garbled:
            return None
        from calicoctl.datastore import probe

        return probe.mismatch(self._settings.scheme, *member)


def created(key: str, value: str) -> Verdict:
    """Return the verdict for a `create`: applied if the key has `value`, not applied if there is no such key."""

    def verdict(now: Entry | None) -> Entry | None:
        if now is not None and now.value != value:
            raise KeyExists(f"etcd key {key} exists already")
        return now

    return verdict


def updated(entry: Entry, value: str) -> Verdict:
    """Return the verdict for an `update`: not applied if `entry` is unchanged, applied if the key has `value`."""

    def verdict(now: Entry | None) -> Entry | None:
        if now is not None and now.revision == entry.revision:
            return None
        if now is not None and now.value == value:
            return now
        raise CompareFailed(entry.key, maybe_applied=True)

    return verdict


def deleted(entry: Entry) -> Verdict:
    """Return the verdict for a `delete`: not applied if `entry` is unchanged, applied if there is no such key."""

    def verdict(now: Entry | None) -> Entry | None:
        if now is None:
            return entry
        if now.revision == entry.revision:
            return None
        raise CompareFailed(entry.key, maybe_applied=True)

    return verdict


def why(cause: BaseException) -> str:
    """Return a short text about why a member could not be reached."""
    text = str(cause)
    for words in ("Connection refused", "timed out", "No route to host", "Network is unreachable"):
        if words in text:
            return words.lower()
    if "resol" in text or "Name or service" in text:
        return "unknown host name"
    text = re.sub(r"\(_ssl\.c:\d+\)", "", text)
    return text.rpartition(": ")[2].strip("()'\" ,") or type(cause).__name__
