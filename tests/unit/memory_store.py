"""A store in memory, for what a real one cannot be made to do at a given moment: conflicts and lost answers.

`tests/system/test_store.py` holds it against the real one.
"""

from __future__ import annotations

from typing import Callable

from calicoctl.datastore.store import Entry
from calicoctl.errors import CompareFailed, KeyExists, StoreUnavailable


class MemoryStore:
    """Implements the Store protocol. `trouble` is asked before each write: None, "conflict", "lost" or "down".

    A lost write is applied, and then somebody else's change comes on top of it, so its writer cannot know. Nothing
    expires by itself: a test that wants that removes the entry.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.index = 0
        self.trouble: Callable[[], str | None] = lambda: None

    def get(self, key: str) -> Entry | None:
        return self.entries.get(key)

    def tree(self, directory: str) -> list[Entry]:
        return [entry for key, entry in sorted(self.entries.items()) if key.startswith(directory + "/")]

    def snapshot(self, directory: str) -> tuple[list[Entry], int]:
        return self.tree(directory), self.index + 1

    def names(self, directory: str) -> list[str]:
        below = [key[len(directory) + 1 :] for key in self.entries if key.startswith(directory + "/")]
        return sorted({name.partition("/")[0] for name in below})

    def create(self, key: str, value: str, ttl: int | None = None) -> Entry:
        self._maybe_fail(key)
        if key in self.entries:
            raise KeyExists(key)
        return self._put(key, value)

    def update(self, entry: Entry, value: str, ttl: int | None = None) -> Entry:
        trouble = self._maybe_fail(entry.key)
        now = self.entries.get(entry.key)
        if now is None or now.index != entry.index:
            raise CompareFailed(entry.key)
        written = self._put(entry.key, value)
        if trouble == "lost":
            self._put(entry.key, value)
            raise CompareFailed(entry.key, maybe_applied=True)
        return written

    def delete(self, entry: Entry) -> None:
        self._maybe_fail(entry.key)
        now = self.entries.get(entry.key)
        if now is not None:
            if now.index != entry.index:
                raise CompareFailed(entry.key)
            del self.entries[entry.key]

    def prune(self, directory: str) -> None:
        pass

    def remove_tree(self, directory: str) -> None:
        self.entries = {key: entry for key, entry in self.entries.items() if not key.startswith(directory + "/")}

    def check_writable(self, key: str) -> None:
        """Everybody may write everything here."""

    def put(self, key: str, value: str) -> None:
        self._put(key, value)

    def _put(self, key: str, value: str) -> Entry:
        self.index += 1
        self.entries[key] = Entry(key, value, self.index)
        return self.entries[key]

    def _maybe_fail(self, key: str) -> str | None:
        trouble = self.trouble()
        if trouble == "down":
            raise StoreUnavailable("etcd cannot be reached")
        if trouble == "conflict" and key in self.entries:
            self._put(key, self.entries[key].value)  # somebody else writes the same key at this moment
        return trouble
