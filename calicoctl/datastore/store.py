"""The interface of the store (`Store`), which each backend implements, and writes by compare-and-swap on top of it.

Depends on no backend, and on nothing of Calico's. backends.py picks the backend.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Callable, Protocol

from calicoctl.errors import CompareFailed, Conflict, KeyExists, NotFound

ATTEMPTS = 200
"""How often a compare-and-swap is tried before it fails with Conflict."""


@dataclass(frozen=True)
class Entry:
    """A key and its value. `revision` is that of its last write, which a compare-and-swap compares (etcd's v2 API calls
    it modifiedIndex).

    `created` is the revision of the write that created the key: `update` keeps it, a create after a delete gives a
    later one. Where a key is overwritten blindly (by `put`, or by another program), etcd's v2 API counts that as a
    creation, and its v3 API does not. So `created` may only decide which of two rivals was first, both of which this
    program makes by `create` and changes by `update` (endpoints that claim the same address, pools that overlap), and
    nothing may break when a blind overwrite reverses that order.
    """

    key: str
    value: str
    revision: int
    created: int = 0


@dataclass(frozen=True)
class Change:
    """A key was written (`entry`); or it was deleted or has expired, with all keys below it (`entry` is None)."""

    key: str
    entry: Entry | None


class Watch(Protocol):
    """The changes below a directory, in order and without a gap: an iterator of batches.

    A batch is empty when nothing has changed, at the latest after the time that the watch was opened with. A majority
    of the cluster confirms an empty batch, since a member that is partitioned from the others would report nothing
    either.

    `next` blocks until there is a batch. `next` raises WatchExpired when changes may have been missed: the store no
    longer keeps them, or was restored from a copy, or the connection was lost, after which another store may answer;
    and StoreError when the store cannot be watched. A watch that has raised is closed: take a new snapshot, and open
    another one from there.
    """

    def __iter__(self) -> Iterator[list[Change]]: ...

    def __next__(self) -> list[Change]: ...

    def close(self) -> None:
        """Release what the watch holds open."""


class Store(Protocol):
    """Keys with text values, ordered by a revision that grows with each write of any key.

    Keys are paths, such as `/calico/v1/Ready`; a directory is what keys that begin with it and a slash have in common,
    and exists only through them. Reads return the outcome of all writes that were answered before (linearizable). After
    a write whose answer was lost, the key is read until the outcome is known; no write is applied twice.

    Every method raises StoreUnavailable when no member of the store answers, StoreError when the store refuses, and
    InvalidValue for a directory where a key is expected or the other way round, on stores that can tell.
    """

    def get(self, key: str) -> Entry | None:
        """Return the entry of `key`, None if there is no such key."""

    def tree(self, directory: str) -> list[Entry]:
        """Return all entries below `directory`, at any depth."""

    def names(self, directory: str) -> list[str]:
        """Return the next part of all keys below `directory`, each once: `b` and `x` of `/a/b`, `/a/x/y` and `/a/x/z`.

        Values are not held in memory. A store with directories of its own (etcd's v2 API) may also return the name of
        one that is empty: do not conclude from a name that there is anything below it.
        """

    def exists(self, directory: str) -> bool:
        """Return whether there is any key below `directory`."""

    def create(self, key: str, value: str, ttl: int | None = None) -> Entry:
        """Write `key`, which must not exist; raise KeyExists when it does.

        With `ttl`, the key expires after so many seconds unless it is updated; without, never.
        """

    def update(self, entry: Entry, value: str, ttl: int | None = None) -> Entry:
        """Write a new value over `entry`, as it was read; raise CompareFailed when it was changed or deleted since.

        With `ttl`, the key expires after so many seconds from now; without, never, whatever held before.
        """

    def delete(self, entry: Entry) -> None:
        """Delete `entry`, as it was read; do nothing when it is gone; raise CompareFailed when it has changed since."""

    def remove_tree(self, directory: str) -> None:
        """Delete all keys below `directory`, and the key of that name."""

    def put(self, key: str, value: str) -> None:
        """Write `key` blindly, whatever it holds. It never expires."""

    def check_writable(self, key: str) -> None:
        """Raise StoreError if this user may not write `key`. Changes nothing."""

    def version(self) -> str:
        """Return the version of the server."""

    def list_for_watch(self, directory: str) -> tuple[list[Entry], int]:
        """Return all entries below `directory` at one moment, and the revision to watch from for later changes."""

    def watch(self, directory: str, revision: int, seconds: float) -> Watch:
        """Return a watch of the changes below `directory` from `revision` on. Nothing is sent before the first batch.

        `seconds` is how long nothing may change before the watch yields an empty batch.
        """


def create_if_missing(store: Store, key: str, value: str) -> bool:
    """Write `key` unless it exists; return whether it was written."""
    try:
        store.create(key, value)
    except KeyExists:
        return False
    return True


def set_value(store: Store, key: str, value: str | None) -> None:
    """Set `key` to `value`, or delete it for None, whatever it holds. Writes nothing where that is so already.

    Raises Conflict when other writers change the key all the time.
    """
    for attempt in range(ATTEMPTS):
        entry = store.get(key)
        try:
            if entry is None and value is not None:
                store.create(key, value)
            elif entry is not None and value is None:
                store.delete(entry)
            elif entry is not None and value is not None and entry.value != value:
                store.update(entry, value)
            return
        except (KeyExists, CompareFailed):
            pause(attempt)
    raise _contended(key)


def modify(store: Store, key: str, missing: str, change: Callable[[str], str | None]) -> bool:
    """Change a value by compare-and-swap: read it, let `change` compute the new one, write it; retry on a conflict.

    `change` returns None if there is nothing to change. Returns whether this call changed the value. Raises NotFound
    with the message `missing` when there is no such key, Conflict when other writers change it all the time.
    """
    done = False
    for attempt in range(ATTEMPTS):
        entry = store.get(key)
        if entry is None:
            raise NotFound(missing)
        value = change(entry.value)
        if value is None:
            return done
        try:
            store.update(entry, value)
            return True
        except CompareFailed as failed:
            done = done or failed.maybe_applied
            pause(attempt)
    raise _contended(key)


def pause(attempt: int) -> None:
    """Back off after a conflict: sleep a random time, longer after more attempts, so that every writer gets a turn."""
    time.sleep(random.uniform(0, min(0.2, 0.004 * (attempt + 1))))


def _contended(key: str) -> Conflict:
    return Conflict(f"etcd key {key} keeps being modified concurrently; retry")
