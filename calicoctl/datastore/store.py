"""The interface that each backend implements (`Store`), and writes by compare-and-swap on top of it.

Depends on no backend, and on nothing that is specific to Calico. backends.py chooses the backend.
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
    """A key and its value. `revision` is the revision of its last write, which a compare-and-swap compares. (etcd's v2
    API calls it modifiedIndex.)

    `created` is the revision of the write that created the key. `update` does not change it; a create after a delete
    sets a later one. If a key is overwritten blindly (by `put`, or by another program), etcd's v2 API counts that as a
    creation, and its v3 API does not. So `created` may only be used to decide which of two conflicting objects is the
    older one (endpoints that claim the same address, pools that overlap): this program writes these by `create` and
    `update` only. Nothing may break if a blind overwrite reverses their order.

    `problem` is the reason if the key, or the keys below it, could not be read, else None. Only `list_for_watch`
    returns entries with a problem.
    """

    key: str
    value: str
    revision: int
    created: int = 0
    problem: str | None = None


@dataclass(frozen=True)
class Change:
    """A key was written (`entry`). If `entry` is None, it was deleted or has expired, with all keys below it."""

    key: str
    entry: Entry | None


class Watch(Protocol):
    """The changes below a directory, in order and without a gap: an iterator of batches.

    If nothing changes for the `seconds` that were passed to `Store.watch`, it yields an empty batch, but only after a
    majority of the cluster has answered: a member that is partitioned from the others sees no changes at all.

    `next` blocks until there is a batch. It raises StoreError if the store cannot be watched. It raises WatchExpired if
    changes may have been missed: because the store no longer keeps them, because it was restored from a copy, or
    because the connection was lost, after which another store may answer. A watch that has raised an exception is
    closed: read all entries again, and open a new watch from their revision.
    """

    def __iter__(self) -> Iterator[list[Change]]: ...

    def __next__(self) -> list[Change]: ...

    def close(self) -> None:
        """Close the connection of the watch."""


class Store(Protocol):
    """Keys with text values, ordered by a revision that grows with each write of any key.

    Keys are paths, such as `/calico/v1/Ready`. A directory is a common prefix of keys, up to a slash, and exists only
    while there are such keys. Reads are linearizable: they see all writes that were answered before.

    If the answer to `create`, `update` or `delete` is lost, the key is read before the write is sent again, so that the
    write is not applied twice. If another writer has changed the key meanwhile, KeyExists or CompareFailed is raised.
    `put` and `remove_tree` are sent again without a read.

    Every method raises StoreUnavailable if no member of the store answers, and StoreError if the store refuses the
    request. Stores that have directories raise InvalidValue for a directory where a key is expected. For a key where a
    directory is expected, they may do so.
    """

    def get(self, key: str) -> Entry | None:
        """Return the entry of `key`, None if there is no such key."""

    def tree(self, directory: str) -> list[Entry]:
        """Return all entries below `directory`, at any depth, except what cannot be read (see `Entry.problem`)."""

    def names(self, directory: str) -> list[str]:
        """Return the first part after `directory` of each key below it, without duplicates.

        For `/a/b`, `/a/x/y` and `/a/x/z` below `/a`, these are `b` and `x`. Values are not kept in memory. A store that
        has directories (etcd's v2 API) may also return the name of an empty one: do not conclude from a name that there
        are keys below it.
        """

    def exists(self, directory: str) -> bool:
        """Return whether there is any key below `directory`."""

    def create(self, key: str, value: str, ttl: int | None = None) -> Entry:
        """Write `key`, which must not exist; raise KeyExists if it does.

        With `ttl`, the key expires after that many seconds unless it is updated. Without `ttl`, it never expires.
        """

    def update(self, entry: Entry, value: str, ttl: int | None = None) -> Entry:
        """Write a new value over `entry`; raise CompareFailed if it was changed or deleted since `entry` was read.

        With `ttl`, the key expires that many seconds from now. Without `ttl`, it never expires, even if it had an
        expiry before.
        """

    def delete(self, entry: Entry) -> None:
        """Delete `entry`; do nothing if it is deleted already; raise CompareFailed if it was changed since the read."""

    def remove_tree(self, directory: str) -> None:
        """Delete all keys below `directory`, and the key `directory` itself; do nothing if there are none."""

    def put(self, key: str, value: str) -> None:
        """Write `key` blindly, whatever its value is. It never expires."""

    def check_writable(self, key: str) -> None:
        """Raise StoreError if this user may not write `key`. Changes nothing."""

    def version(self) -> str:
        """Return the version of the server."""

    def list_for_watch(self, directory: str) -> tuple[list[Entry], int]:
        """Return all entries below `directory`, and the revision from which to watch later changes.

        If the directory is too large for one answer, its parts are read one after another. A watch from the revision
        then yields all changes that were made meanwhile. What cannot be read has an entry with a `problem`.
        """

    def watch(self, directory: str, revision: int, seconds: float) -> Watch:
        """Return a watch of the changes below `directory` from `revision` on, that one included.

        No request is sent until `next` is called for the first time. If nothing changes for `seconds`, the watch yields
        an empty batch.
        """


def create_if_missing(store: Store, key: str, value: str) -> bool:
    """Write `key` unless it exists; return whether it was written."""
    try:
        store.create(key, value)
    except KeyExists:
        return False
    return True


def set_value(store: Store, key: str, value: str | None) -> None:
    """Set `key` to `value`, whatever its value was; None deletes it. Writes nothing if the value is the same.

    Raises Conflict if other writers keep changing the key.
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

    `change` returns None if there is nothing to change. Returns whether this call changed the value; also True if an
    earlier attempt without an answer may have changed it. Raises NotFound with the message `missing` if there is no
    such key, and Conflict if other writers keep changing it.
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
