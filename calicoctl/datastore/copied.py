"""A read-only copy of a directory of the store, for callers that would otherwise send many requests.

If the store is atomic, the whole copy is of one revision.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from typing import Callable, TypeVar

from calicoctl.datastore.store import Entry, Store

T = TypeVar("T")


class CopiedStore:
    """A copy of a directory, with the reading methods of `Store`. The methods raise no exceptions.

    `unread` has an entry for each key or directory that could not be read (see `Entry.problem`). The methods find no
    data at these keys, or below them.
    """

    def __init__(self, store: Store, directory: str) -> None:
        """Read all keys below `directory`. Raises StoreError."""
        entries = sorted(store.list_for_watch(directory)[0], key=lambda entry: entry.key)
        self.unread = [entry for entry in entries if entry.problem is not None]
        self._entries = [entry for entry in entries if entry.problem is None]
        self._keys = [entry.key for entry in self._entries]

    def get(self, key: str) -> Entry | None:
        place = bisect_left(self._keys, key)
        return self._entries[place] if self._keys[place : place + 1] == [key] else None

    def read(
        self, keys: Sequence[str], directories: Sequence[str] = ()
    ) -> tuple[list[Entry | None], list[list[Entry]]]:
        return list(map(self.get, keys)), list(map(self.tree, directories))

    def tree(self, directory: str) -> list[Entry]:
        # in ASCII, "0" is the character after the slash
        return self._entries[bisect_left(self._keys, directory + "/") : bisect_left(self._keys, directory + "0")]

    def collect(self, directory: str, convert: Callable[[Entry], T | None], values: bool = True) -> list[T]:
        return [item for item in map(convert, self.tree(directory)) if item is not None]

    def names(self, directory: str, but: Collection[str] = ()) -> list[str]:
        names = {entry.key[len(directory) + 1 :].partition("/")[0] for entry in self.tree(directory)}
        return sorted(names.difference(but))

    def exists(self, directory: str) -> bool:
        return bool(self.tree(directory))
