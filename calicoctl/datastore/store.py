"""The interface that each backend implements (`Store`), and writes by compare-and-swap on top of it.

Depends on no backend, and on nothing that is specific to Calico. backends.py chooses the backend.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Callable, Protocol, Union

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

    `problem` is the reason if the key, or the keys below it, could not be read, else None. Only `list_for_watch` and
    watches return entries with a problem.
    """

    key: str
    value: str
    revision: int
    created: int = 0
    problem: str | None = None


@dataclass(frozen=True)
class Change:
    """A key was written (`entry`). If `entry` is None, it was deleted or has expired, with all keys below it.

    But if `alone` is true, the keys below it were not deleted: in a store without directories, there may be such keys.
    """

    key: str
    entry: Entry | None
    alone: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Create:
    """A write for `Store.commit`: create `key`, as `Store.create` does."""

    key: str
    value: str


@dataclass(frozen=True)
class Update:
    """A write for `Store.commit`: write `value` over `entry`, as `Store.update` does. The value may be the same."""

    entry: Entry
    value: str

    @property
    def key(self) -> str:
        return self.entry.key


@dataclass(frozen=True)
class Delete:
    """A write for `Store.commit`: delete `entry`, as `Store.delete` does, which does nothing if it is gone already."""

    entry: Entry

    @property
    def key(self) -> str:
        return self.entry.key


Write = Union[Create, Update, Delete]

MOST_AT_ONCE = 100
"""The most keys and directories of one `Store.read`, and the most writes of one `Store.commit`. etcd's v3 API takes 128
operations in a transaction by default."""


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
    `put`, `put_all` and `remove_tree` are sent again without a read.

    Some stores have leases (`leases`): all keys that one Store object has written last with the same `ttl` hang on one
    lease, and live as long as it does. Each such write, and `touch`, keeps the lease alive. So `touch` for one of the
    keys keeps the others alive, too. When it is not called in time, they all expire together. A write without `ttl`, or
    by another Store object, takes a key off the lease. Without leases, each key has an expiry of its own.

    Every method raises StoreUnavailable if no member of the store answers, and StoreError if the store refuses the
    request. Stores that have directories raise InvalidValue for a directory where a key is expected. For a key where a
    directory is expected, they may do so.
    """

    @property
    def atomic(self) -> bool:
        """Whether `commit` writes all or nothing, and `read` reads all at one revision, each in one request."""

    @property
    def leases(self) -> bool:
        """Whether keys with a `ttl` hang on leases, see above; then a key that is only kept alive is not written."""

    def get(self, key: str) -> Entry | None:
        """Return the entry of `key`, None if there is no such key."""

    def tree(self, directory: str) -> list[Entry]:
        """Return all entries below `directory`, at any depth, except what cannot be read (see `Entry.problem`)."""

    def read(
        self, keys: Sequence[str], directories: Sequence[str] = ()
    ) -> tuple[list[Entry | None], list[list[Entry]]]:
        """Return what `get` returns for each of `keys`, and what `tree` returns for each of `directories`.

        An atomic store reads all in one request, at one revision; the directories should be small. Other stores read
        one after another, in this order. There are at most MOST_AT_ONCE keys and directories.
        """

    def names(self, directory: str, but: Collection[str] = ()) -> list[str]:
        """Return the first part after `directory` of each key below it, without duplicates, and without those in `but`.

        For `/a/b`, `/a/x/y` and `/a/x/z` below `/a`, these are `b` and `x`. Values are not kept in memory. A store that
        has directories (etcd's v2 API) may also return the name of an empty one: do not conclude from a name that there
        are keys below it. A store that has none may have to read all keys below `directory`; but if few names are not
        in `but`, it reads few keys.
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

    def commit(self, writes: Sequence[Write]) -> list[Entry]:
        """Make some writes of different keys, at most MOST_AT_ONCE; return each one's entry, for a Delete its own.

        Raises KeyExists or CompareFailed for the first write whose condition is not met. An atomic store has written
        nothing then. Other stores make the writes one after another, in this order, and those before the failed one
        stay written: choose an order in which that is safe. The same holds if the process is killed, or if another
        exception is raised.

        If an answer is lost, an atomic store sends the writes again. If they then fail, it reads the keys: if all are
        as the writes leave them, they were applied; else it raises KeyExists, or CompareFailed with `maybe_applied`.
        """

    def touch(self, entry: Entry, value: str, ttl: int) -> Entry:
        """Have the key of `entry` expire `ttl` seconds from now; return its entry after that.

        If the key hangs on this object's lease of that `ttl`, the lease is kept alive, and nothing is written: `value`
        is not used. Otherwise, `value` is written as by `update`. In both cases, raises CompareFailed if the key was
        changed or deleted, or has expired, since `entry` was read.
        """

    def remove_tree(self, directory: str) -> None:
        """Delete all keys below `directory`, and the key `directory` itself; do nothing if there are none."""

    def put(self, key: str, value: str, ttl: int | None = None) -> None:
        """Write `key` blindly, whatever its value is. `ttl`: see `update`."""

    def put_all(self, values: Mapping[str, str], ttl: int | None = None) -> None:
        """Write some keys blindly, at most MOST_AT_ONCE, as `put` does; an atomic store writes them all at once."""

    def check_writable(self, *keys: str) -> None:
        """Raise StoreError if this user may not write one of `keys`. Changes nothing."""

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


def read_all(store: Store, keys: Collection[str]) -> dict[str, Entry]:
    """Return the entries of those of some keys that exist, by key, in the order of `keys`; any number of them."""
    found: dict[str, Entry] = {}
    wanted = list(keys)
    for start in range(0, len(wanted), MOST_AT_ONCE):
        entries = store.read(wanted[start : start + MOST_AT_ONCE])[0]
        found.update({entry.key: entry for entry in entries if entry is not None})
    return found


def create_if_missing(store: Store, key: str, value: str) -> bool:
    """Write `key` unless it exists; return whether it was written."""
    try:
        store.create(key, value)
    except KeyExists:
        return False
    return True


def create_missing(store: Store, values: Mapping[str, str]) -> bool:
    """Write those of some keys that do not exist, in this order; return whether any was written."""
    if not store.atomic:
        written = [create_if_missing(store, key, value) for key, value in values.items()]
        return any(written)
    missing = dict(values)
    for _ in range(ATTEMPTS):
        try:
            store.commit([Create(key, value) for key, value in missing.items()])
            return True
        except KeyExists:
            pass
        found = store.read(list(values))[0]
        missing = {key: values[key] for key, entry in zip(values, found) if entry is None}
        if not missing:
            return False
    raise _contended(next(iter(missing)))


def write_in_order(store: Store, writes: Sequence[Write]) -> list[Entry]:
    """Make some writes one after another: `commit` of a store that is not atomic."""
    entries = []
    for write in writes:
        if isinstance(write, Create):
            entries.append(store.create(write.key, write.value))
        elif isinstance(write, Update):
            entries.append(store.update(write.entry, write.value))
        else:
            store.delete(write.entry)
            entries.append(write.entry)
    return entries


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


def modify(
    store: Store, key: str, missing: str, change: Callable[[str], str | None], known: Entry | None = None
) -> bool:
    """Change a value by compare-and-swap: read it, let `change` compute the new one, write it; retry on a conflict.

    `known` is the key's entry, if it was just read. `change` returns None if there is nothing to change. Returns
    whether this call changed the value; also True if an earlier attempt without an answer may have changed it. Raises
    NotFound with the message `missing` if there is no such key, and Conflict if other writers keep changing it.
    """
    done = False
    for attempt in range(ATTEMPTS):
        entry, known = known or store.get(key), None
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
