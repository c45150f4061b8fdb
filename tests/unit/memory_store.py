"""A store in memory, which tests can make fail in ways in which a real store cannot be made to fail.

It is the only test double of the store. Tests in store_contract.py run against it and against real stores.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Condition
from typing import Callable, TypeVar, Union

from calicoctl.datastore.members import Verdict, created, deleted, updated
from calicoctl.datastore.store import (
    Change,
    Create,
    Delete,
    Entry,
    Fence,
    Keep,
    Store,
    Update,
    Write,
    itself,
    write_in_order,
)
from calicoctl.errors import CompareFailed, Fenced, KeyExists, StoreUnavailable, WatchExpired

T = TypeVar("T")

HISTORY = 1000
"""How many changes a watch can go back, as many as in etcd's v2 API."""


@dataclass(frozen=True)
class Lost:
    """The answer of the next write is lost; `applied` says whether the write is applied.

    `meanwhile` is called before the writer reads the key again.
    """

    applied: bool = True
    meanwhile: Callable[[], object] = lambda: None


Fault = Union[str, Lost, None]


class MemoryStore:
    """Implements the protocol FencedStore. Time passes only when a test adds to `clock`, in seconds.

    With `modern`, the store is atomic and has leases, like etcd's v3 API. `requests` counts the requests that a server
    would receive.

    `fault` is called before each create, update, delete, touch and atomic commit, and returns how this write fails:

    * None: the write does not fail.
    * "conflict": another writer changes the key immediately before.
    * "lost": the write is applied, but its answer is lost, and another writer changes the key immediately after.
    * A Lost: the answer is lost as described there.
    * "down": the store cannot be reached.

    `before_read` is called before each read and each batch of a watch, and may raise an exception.
    """

    def __init__(self, modern: bool = False) -> None:
        self.atomic = self.leases = modern
        self.fence: Fence | None = None
        self.requests = 0
        self.entries: dict[str, Entry] = {}
        self.revision = 0
        self.clock = 0.0
        self.fault: Callable[[], Fault] = lambda: None
        self.before_read: Callable[[], None] = lambda: None
        self._expiry: dict[str, float] = {}
        self._lease_of: dict[str, tuple[MemoryStore, int]] = {}
        """Key -> its lease: the client that has granted the lease, and its `ttl`."""
        self._history: deque[tuple[int, Change]] = deque(maxlen=HISTORY)
        self._changed = Condition()

    def client(self) -> MemoryStore:
        """Return another client of the same data, with the same fence and leases of its own."""
        other = MemoryStore()
        other.__dict__ = self.__dict__
        return other

    def get(self, key: str) -> Entry | None:
        self._begin_read()
        return self._now(key)

    def read(
        self, keys: Sequence[str], directories: Sequence[str] = ()
    ) -> tuple[list[Entry | None], list[list[Entry]]]:
        if not self.atomic:
            return [self.get(key) for key in keys], [self.tree(directory) for directory in directories]
        self._begin_read()
        return [self._now(key) for key in keys], [self._below(directory) for directory in directories]

    def tree(self, directory: str) -> list[Entry]:
        self._begin_read()
        return self._below(directory)

    def collect(self, directory: str, convert: Callable[[Entry], T | None], values: bool = True) -> list[T]:
        entries = self.tree(directory)
        if self.atomic and not values:
            entries = [replace(entry, value="") for entry in entries]
        return [item for item in map(convert, entries) if item is not None]

    def _begin_read(self) -> None:
        self.before_read()
        self.requests += 1

    def _below(self, directory: str) -> list[Entry]:
        self._expire()
        return [entry for key, entry in sorted(self.entries.items()) if key.startswith(directory + "/")]

    def names(self, directory: str, but: Collection[str] = ()) -> list[str]:
        names = {entry.key[len(directory) + 1 :].partition("/")[0] for entry in self.tree(directory)}
        return sorted(names.difference(but))

    def exists(self, directory: str) -> bool:
        return bool(self.tree(directory))

    def create(self, key: str, value: str, ttl: int | None = None) -> Entry:
        def apply() -> Entry:
            self._check(Create(key, value))
            return self._put(key, value, ttl)

        return self._write(key, apply, created(key, value))

    def update(self, entry: Entry, value: str, ttl: int | None = None) -> Entry:
        def apply() -> Entry:
            self._check(Update(entry, value))
            return self._put(entry.key, value, ttl, entry.created)

        return self._write(entry.key, apply, updated(entry, value))

    def touch(self, entry: Entry, value: str, ttl: int) -> Entry:
        def apply() -> Entry:
            self._check(Update(entry, value))
            self._keep_alive(ttl)
            return entry

        if self._lease_of.get(entry.key) != (self, ttl):
            return self.update(entry, value, ttl)
        return self._write(entry.key, apply, lambda now: None)  # idempotent

    def delete(self, entry: Entry) -> None:
        def apply() -> Entry:
            self._check(Delete(entry))
            return self._apply(Delete(entry))

        self._write(entry.key, apply, deleted(entry))

    def commit(self, writes: Sequence[Write]) -> list[Entry]:
        if not self.atomic:
            return write_in_order(self, writes)
        done: list[Entry] = []

        def apply() -> Entry:
            for write in writes:
                self._check(write)
            before, done[:] = self.revision, []
            for write in writes:
                self.revision = before  # all get the same one
                done.append(self._apply(write))
            self.revision = before + 1
            return done[0]

        def verdict(_: Entry | None) -> Entry | None:
            if done and all(self._is_done(write) for write in writes):
                return done[0]
            for write in writes:
                try:
                    self._check(write)
                except CompareFailed:
                    raise CompareFailed(key_of(write), maybe_applied=True) from None
            return None

        existing = [key for key in map(key_of, writes) if key in self.entries]
        self._write((existing or [key_of(writes[0])])[0], apply, verdict)
        return done

    def _check(self, write: Write) -> None:
        """Raise KeyExists or CompareFailed unless the condition of a write holds."""
        now = self._now(key_of(write))
        if isinstance(write, Create):
            if now is not None:
                raise KeyExists(f"etcd key {write.key} exists already")
        elif now is None:
            if isinstance(write, Update):
                raise CompareFailed(write.entry.key)
        elif now.revision != write.entry.revision:
            raise CompareFailed(write.entry.key)

    def _apply(self, write: Write) -> Entry:
        if isinstance(write, Create):
            return self._put(write.key, write.value)
        if isinstance(write, Update):
            return self._put(write.entry.key, write.value, created=write.entry.created)
        if self._now(write.entry.key) is not None:
            self._remove(write.entry.key)
        return write.entry

    def _is_done(self, write: Write) -> bool:
        now = self._now(key_of(write))
        return now is None if isinstance(write, Delete) else now is not None and now.value == write.value

    def remove_tree(self, directory: str) -> None:
        self._check_fence()
        for key in [key for key in self.entries if (key + "/").startswith(directory + "/")]:
            self._remove(key)

    def check_writable(self, *keys: str) -> None:
        """Does nothing: every key is writable."""

    def put(self, key: str, value: str, ttl: int | None = None) -> None:
        self.requests += 1
        self._check_fence()
        self._put(key, value, ttl)

    def put_all(self, values: Mapping[str, str], ttl: int | None = None) -> None:
        self.requests += 1 if self.atomic else len(values)
        self._check_fence()
        before = self.revision
        for key, value in values.items():
            self.revision = before if self.atomic else self.revision
            self._put(key, value, ttl)

    def version(self) -> str:
        return "0.0"

    def list_for_watch(self, directory: str, keep: Keep = itself) -> tuple[list[Entry], int]:
        return [kept for kept in map(keep, self.tree(directory)) if kept is not None], self.revision + 1

    def watch(self, directory: str, revision: int, seconds: float) -> Generator[list[Change], None, None]:
        def batch() -> list[Change]:
            return [c for i, c in self._history if i >= revision and (c.key + "/").startswith(directory + "/")]

        while True:
            self.before_read()
            self._expire()
            with self._changed:
                if revision > self.revision + 1 or (self._history and revision < self._history[0][0]):
                    raise WatchExpired(f"the store does not have the changes from {revision} on")
                self._changed.wait_for(batch, seconds)
                changes, revision = batch(), self.revision + 1
            yield changes

    def _write(self, key: str, apply: Callable[[], Entry], verdict: Verdict) -> Entry:
        """Apply a conditional write, with the failure that `fault` returns."""
        self.requests += 1
        fault = self.fault()
        self._check_fence()
        if fault == "down":
            raise StoreUnavailable("etcd cannot be reached")
        if fault == "conflict" and key in self.entries:
            self._put(key, self.entries[key].value, created=self.entries[key].created)
        if fault == "lost":
            fault = Lost(meanwhile=lambda: self._reformat(key))
        if isinstance(fault, Lost):
            if fault.applied:
                apply()
            fault.meanwhile()
            applied = verdict(self._now(key))
            if applied is not None:
                return applied
            self._check_fence(again=True)
        return apply()

    def _check_fence(self, again: bool = False) -> None:
        """Raise Fenced if the fence has changed, and the store looks at it. `again`: a write is sent again."""
        if self.fence is not None and (self.atomic or again or time.monotonic() > self.fence.until):
            now = self._now(self.fence.key)
            if self.fence.revision != (0 if now is None else now.revision):
                raise Fenced(self.fence.key)

    def _reformat(self, key: str) -> None:
        """Write other JSON with the same meaning, as a writer does that changes another part of the value."""
        if key in self.entries:
            self._put(key, self.entries[key].value + " ", created=self.entries[key].created)

    def _put(self, key: str, value: str, ttl: int | None = None, created: int | None = None) -> Entry:
        with self._changed:
            self.revision += 1
            created = self.revision if created is None else created
            entry = self.entries[key] = Entry(key, value, self.revision, created, expires=ttl is not None)
            self._expiry.pop(key, None)
            self._lease_of.pop(key, None)
            if ttl is not None:
                self._expiry[key] = self.clock + ttl
                if self.leases:
                    self._lease_of[key] = (self, ttl)
                    self._keep_alive(ttl)
            self._history.append((self.revision, Change(key, entry)))
            self._changed.notify_all()
        return entry

    def _remove(self, key: str) -> None:
        with self._changed:
            self.revision += 1
            del self.entries[key]
            self._expiry.pop(key, None)
            self._lease_of.pop(key, None)
            self._history.append((self.revision, Change(key, None, alone=True)))
            self._changed.notify_all()

    def _keep_alive(self, ttl: int) -> None:
        """Renew the lease with this `ttl` of this client."""
        for key in [key for key, lease in self._lease_of.items() if lease == (self, ttl)]:
            self._expiry[key] = self.clock + ttl

    def _now(self, key: str) -> Entry | None:
        self._expire()
        return self.entries.get(key)

    def _expire(self) -> None:
        for key in [key for key, end in self._expiry.items() if end <= self.clock]:
            if key in self.entries:  # else a test has deleted it
                self._remove(key)


def key_of(write: Write) -> str:
    return write.key if isinstance(write, Create) else write.entry.key


def memory_store() -> Store:
    """Return a new MemoryStore, with the type Store."""
    return MemoryStore()
