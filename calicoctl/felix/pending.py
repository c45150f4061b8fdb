"""Holds the changes of one directory of the store until the agent's loop takes them.

While the agent is busy, only the last change of each key is held. A read of the whole directory replaces all changes
before it. The loop takes all held changes at once, so it only sees states that the store has had: it never applies a
change without the changes that were made before it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial

from calicoctl.datastore import keys
from calicoctl.datastore.store import Change, Entry
from calicoctl.felix.events import StoreChanged, StorePending, StoreRead

MOST_KEYS, MOST_CHARACTERS = 50_000, 2**24
"""If changes of so many keys wait, or keys and values of so many characters, `put` waits until they are taken. The
agent interprets so many ordinary changes in about a second, and as many characters of rules in three.
"""


class PendingChanges:
    """Holds changes from the thread that follows a directory, and emits one event for all of them. Thread-safe."""

    def __init__(self, directory: str, emit: Callable[[StorePending], None]) -> None:
        """`emit` puts an event into the queue of the agent's loop. The loop then calls `take` of the event."""
        self._directory = directory
        self._emit = emit
        self._taken = threading.Condition()
        self._number = 0
        """The number of the last event. Earlier events have nothing to take."""
        self._is_taken = True
        """Whether the last event was taken."""
        self._read: StoreRead | None = None
        self._changes: dict[tuple[str, bool], Change] = {}
        """(Key, whether it is a deletion with all keys below) -> its last change; in the order of the changes."""
        self._characters = 0

    def put_read(self, entries: list[Entry]) -> None:
        """Replace all held changes by `entries`, the result of a read of the whole directory."""
        with self._taken:
            self._clear()
            self._read = StoreRead(self._directory, entries)
            self._announce()  # an event of its own: it must not come before a failure that was emitted before it

    def put(self, changes: list[Change]) -> None:
        """Add changes that the store has delivered together, in their order. The loop takes them together, too.

        If the held changes have reached MOST_KEYS or MOST_CHARACTERS, wait until the loop has taken them. `changes` are
        then added as a whole, even if they alone exceed these limits.
        """
        with self._taken:
            while len(self._changes) >= MOST_KEYS or self._characters >= MOST_CHARACTERS:
                self._taken.wait()
            for change in changes:
                slot = (change.key, _is_of_directory(change))
                before = self._changes.pop(slot, None)
                self._characters += _characters(change) - (0 if before is None else _characters(before))
                self._changes[slot] = change
            if changes and self._is_taken:
                self._announce()

    def _take(self, number: int) -> list[StoreRead | StoreChanged]:
        with self._taken:
            if number != self._number:
                return []
            changes = _remaining(self._changes.values())
            found: list[StoreRead | StoreChanged] = [] if self._read is None else [self._read]
            found += map(StoreChanged, changes)
            self._clear()
            self._is_taken = True
            self._taken.notify_all()
        return found

    def _announce(self) -> None:
        self._number += 1
        self._is_taken = False
        self._emit(StorePending(partial(self._take, self._number)))

    def _clear(self) -> None:
        self._read = None
        self._changes = {}
        self._characters = 0


def _is_of_directory(change: Change) -> bool:
    return change.entry is None and not change.alone


def _characters(change: Change) -> int:
    return len(change.key) + (0 if change.entry is None else len(change.entry.value))


def _remaining(changes: Iterable[Change]) -> list[Change]:
    """Return the changes, in order, without those that a later deletion of a directory makes irrelevant.

    The deletion of a directory deletes its key and all keys below it, so earlier changes of these keys are left out.
    """
    remaining: list[Change] = []
    deleted: set[str] = set()
    for change in reversed(list(changes)):
        if deleted and not deleted.isdisjoint((change.key, *keys.directories(change.key))):
            continue
        remaining.append(change)
        if _is_of_directory(change):
            deleted.add(change.key)
    remaining.reverse()
    return remaining
