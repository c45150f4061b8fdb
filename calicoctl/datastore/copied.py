"""A read-only copy of a part of the store, for callers that would otherwise send many requests."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from typing import Callable, TypeVar

from calicoctl.datastore.store import Entry

T = TypeVar("T")


class CopiedStore:
    """Entries that were read before, with the reading methods of `Store`. These raise only what `convert` raises.

    `unread` has an entry for each key or directory that could not be read (see `Entry.problem`). The methods find no
    data at these keys, or below them.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        ordered = sorted(entries, key=lambda entry: entry.key)
        self.unread = [entry for entry in ordered if entry.problem is not None]
        self._entries = [entry for entry in ordered if entry.problem is None]
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
