"""The store in memory, for what a real one cannot be made to do at a given moment: conflicts and lost answers.

It is the one test double of the store. store_contract.py holds it against the real ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from threading import Condition
from typing import Callable, Union

from calicoctl.datastore.members import Verdict, created, deleted, updated
from calicoctl.datastore.store import Change, Entry, Store
from calicoctl.errors import CompareFailed, KeyExists, StoreUnavailable, WatchExpired

HISTORY = 1000
"""How many changes a watch can go back, as many as etcd's v2 API keeps."""


@dataclass(frozen=True)
class Lost:
    """The answer of the next write is lost. `meanwhile` is called before its writer looks what became of it."""

    applied: bool = True
    meanwhile: Callable[[], object] = lambda: None


Fault = Union[str, Lost, None]


class MemoryStore:
    """Implements the Store protocol. Time passes only when a test adds to `clock`, in seconds.

    `fault` is called before each create, update and delete, and returns what goes wrong with it:

    * None: nothing;
    * "conflict": another writer changes the key right before;
    * "lost": it is applied, but its answer is lost, and another writer changes the key right after;
    * a Lost;
    * "down": the store cannot be reached.

    `before_read` is called before each read and each batch of a watch, and may raise what goes wrong with it.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.revision = 0
        self.clock = 0.0
        self.fault: Callable[[], Fault] = lambda: None
        self.before_read: Callable[[], None] = lambda: None
        self._expiry: dict[str, float] = {}
        self._history: deque[tuple[int, Change]] = deque(maxlen=HISTORY)
        self._changed = Condition()

    def get(self, key: str) -> Entry | None:
        self.before_read()
        return self._now(key)

    def tree(self, directory: str) -> list[Entry]:
        self.before_read()
        self._expire()
        return [entry for key, entry in sorted(self.entries.items()) if key.startswith(directory + "/")]

    def names(self, directory: str) -> list[str]:
        return sorted({entry.key[len(directory) + 1 :].partition("/")[0] for entry in self.tree(directory)})

    def exists(self, directory: str) -> bool:
        return bool(self.tree(directory))

    def create(self, key: str, value: str, ttl: int | None = None) -> Entry:
        def apply() -> Entry:
            if self._now(key) is not None:
                raise KeyExists(f"etcd key {key} exists already")
            return self._put(key, value, ttl)

        return self._write(key, apply, created(key, value))

    def update(self, entry: Entry, value: str, ttl: int | None = None) -> Entry:
        def apply() -> Entry:
            now = self._now(entry.key)
            if now is None or now.revision != entry.revision:
                raise CompareFailed(entry.key)
            return self._put(entry.key, value, ttl, now.created)

        return self._write(entry.key, apply, updated(entry, value))

    def delete(self, entry: Entry) -> None:
        def apply() -> Entry:
            now = self._now(entry.key)
            if now is not None:
                if now.revision != entry.revision:
                    raise CompareFailed(entry.key)
                self._remove(entry.key)
            return entry

        self._write(entry.key, apply, deleted(entry))

    def remove_tree(self, directory: str) -> None:
        for key in [key for key in self.entries if (key + "/").startswith(directory + "/")]:
            self._remove(key)

    def check_writable(self, key: str) -> None:
        """Everybody may write everything here."""

    def put(self, key: str, value: str) -> None:
        self._put(key, value)

    def version(self) -> str:
        return "0.0"

    def list_for_watch(self, directory: str) -> tuple[list[Entry], int]:
        return self.tree(directory), self.revision + 1

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
        """Apply a conditional write, with what goes wrong."""
        fault = self.fault()
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
        return apply()

    def _reformat(self, key: str) -> None:
        """Write other JSON of the same meaning, as another writer that changes something else in the value."""
        if key in self.entries:
            self._put(key, self.entries[key].value + " ", created=self.entries[key].created)

    def _put(self, key: str, value: str, ttl: int | None = None, created: int | None = None) -> Entry:
        with self._changed:
            self.revision += 1
            entry = self.entries[key] = Entry(key, value, self.revision, self.revision if created is None else created)
            self._expiry.pop(key, None)
            if ttl is not None:
                self._expiry[key] = self.clock + ttl
            self._history.append((self.revision, Change(key, entry)))
            self._changed.notify_all()
        return entry

    def _remove(self, key: str) -> None:
        with self._changed:
            self.revision += 1
            del self.entries[key]
            self._expiry.pop(key, None)
            self._history.append((self.revision, Change(key, None)))
            self._changed.notify_all()

    def _now(self, key: str) -> Entry | None:
        self._expire()
        return self.entries.get(key)

    def _expire(self) -> None:
        for key in [key for key, end in self._expiry.items() if end <= self.clock]:
            self._remove(key)


def memory_store() -> Store:
    """Return a new MemoryStore; the types say that it is a Store."""
    return MemoryStore()
