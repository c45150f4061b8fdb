"""The interface of all backends (`Store`), and functions for writes by compare-and-swap."""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Callable, Optional, Protocol, TypeVar, Union

from calicoctl.errors import CompareFailed, Conflict, InvalidValue, KeyExists, NotFound

T = TypeVar("T")

ATTEMPTS = 200
"""The maximum number of attempts at a compare-and-swap. If all of them fail, Conflict is raised."""


@dataclass(frozen=True)
class Entry:
    """A key and its value.

    `revision` is the revision of the last write, which a compare-and-swap compares (modifiedIndex in etcd's v2 API).
    `created` is the revision of the write that created the key. In etcd's v2 API, `put` and blind writes of other
    programs change `created`, so it may only be used to order conflicting objects, such as overlapping pools.

    `problem` is None if the key was read. If the key, or all keys below it, could not be read, `problem` is the reason.
    Only `collect`, `list_for_watch` and watches use entries with a problem.

    `expires` says whether the key has a time to live. It is not set reliably in the entries that writes return.
    """

    key: str
    value: str
    revision: int
    created: int = 0
    problem: str | None = None
    expires: bool = field(default=False, compare=False)

    @property
    def is_unread_directory(self) -> bool:
        """Whether the entry stands for a directory of which nothing could be read: its `revision` is 0.

        Any other entry with a `problem` stands for its key alone.
        """
        return self.problem is not None and self.revision == 0


Keep = Callable[[Entry], Optional[Entry]]
"""A function that is called with an entry, and returns the entry to keep in its place, None to keep nothing."""


def itself(entry: Entry) -> Entry:
    """Return the entry itself."""
    return entry


@dataclass(frozen=True)
class Change:
    """A change of a key: `entry` is the new entry, None if the key was deleted or has expired.

    `alone` matters only if `entry` is None. If it is false, all keys below the key were deleted, too. If it is true,
    they were not.
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
    """A write for `Store.commit`: write `value` over `entry`, as `Store.update` does."""

    entry: Entry
    value: str

    @property
    def key(self) -> str:
        return self.entry.key


@dataclass(frozen=True)
class Delete:
    """A write for `Store.commit`: delete `entry`, as `Store.delete` does."""

    entry: Entry

    @property
    def key(self) -> str:
        return self.entry.key


Write = Union[Create, Update, Delete]

MOST_AT_ONCE = 100
"""The maximum number of keys and directories per `Store.read`, and of writes per `Store.commit`. By default, etcd's v3
API accepts 128 operations per transaction."""


class Watch(Protocol):
    """An iterator over the changes below a directory, in order and without gaps, in batches.

    `next` blocks until there is a batch. If nothing changes for the `seconds` passed to `Store.watch`, `next` returns
    an empty batch: then a majority of the cluster has confirmed that the member is not partitioned from the others.
    `next` raises StoreError if the store cannot be watched, and WatchExpired if changes may have been missed. After an
    exception, the watch is closed: the caller must read all entries again, and open a new watch from their revision.
    """

    def __iter__(self) -> Iterator[list[Change]]: ...

    def __next__(self) -> list[Change]: ...

    def close(self) -> None:
        """Close the connection of the watch."""


class Store(Protocol):
    """Keys with text values. The store has a revision that grows with each write of any key.

    Keys are paths, such as `/calico/v1/Ready`. A directory is a common prefix of keys, up to a slash. Reads are
    linearizable: they see all writes that were answered before.

    If an answer is lost, the request is sent again. A conditional write (`create`, `update`, `delete`, `commit`) is not
    applied twice: the key shows whether the first attempt was applied. If another writer has changed the key meanwhile,
    KeyExists or CompareFailed is raised.

    In stores with leases (`leases`), all keys that one Store object has last written with the same `ttl` are attached
    to one lease. Each such write, and `touch`, renews the lease, and so the expiry of all its keys; but `put` and
    `put_all` do so only if the lease was last renewed more than half of `ttl` ago. A write without `ttl`, or by another
    Store object, detaches a key from the lease. In stores without leases, each key has an expiry of its own.

    Every method raises StoreUnavailable if no member of the store answers, and StoreError if the store refuses the
    request. Stores with directories (etcd's v2 API) may raise InvalidValue if a directory is passed as a key, or a key
    as a directory.
    """

    @property
    def atomic(self) -> bool:
        """Whether `commit` applies all of its writes or none, and `read` reads everything at one revision."""

    @property
    def leases(self) -> bool:
        """Whether keys with a `ttl` are attached to leases; see Store."""

    def get(self, key: str) -> Entry | None:
        """Return the entry of `key`, None if there is no such key."""

    def tree(self, directory: str) -> list[Entry]:
        """Return all entries below `directory`, except those that cannot be read (see `Entry.problem`)."""

    def collect(self, directory: str, convert: Callable[[Entry], T | None], values: bool = True) -> list[T]:
        """Return `convert(entry)` for each entry below `directory`, without None, in any order.

        Unlike `tree`, this keeps in memory only what `convert` returns, and few entries at a time, so it is for
        directories that may be large. A key or directory that cannot be read is an entry with a `problem`. If `values`
        is false, the entries may have an empty `value`, since a store may read the keys alone.

        A read that fails is repeated from the beginning, so `convert` must have no side effects. If `convert` raises a
        CalicoError, `collect` raises it.
        """

    def read(
        self, keys: Sequence[str], directories: Sequence[str] = ()
    ) -> tuple[list[Entry | None], list[list[Entry]]]:
        """Return what `get` returns for each of `keys`, and what `tree` returns for each of `directories`.

        An atomic store reads everything in one request, at one revision, unless the answer is too large for that. Other
        stores read one after another, in this order. There are at most MOST_AT_ONCE keys and directories.
        """

    def names(self, directory: str, but: Collection[str] = ()) -> list[str]:
        """Return the first part after `directory` of each key below it, without duplicates, and without those in `but`.

        For the keys `/a/b`, `/a/x/y` and `/a/x/z`, the names below `/a` are `b` and `x`. A store with directories
        (etcd's v2 API) may also return the name of an empty directory.
        """

    def exists(self, directory: str) -> bool:
        """Return whether there is any key below `directory`."""

    def create(self, key: str, value: str, ttl: int | None = None) -> Entry:
        """Create `key`, and return its entry; raise KeyExists if the key exists.

        With `ttl`, the key expires after that many seconds unless it is updated. Without `ttl`, it never expires.
        """

    def update(self, entry: Entry, value: str, ttl: int | None = None) -> Entry:
        """Write a new value over `entry`, and return the new entry.

        Raises CompareFailed if the key was changed or deleted since `entry` was read. With `ttl`, the key expires that
        many seconds from now. Without `ttl`, it never expires.
        """

    def delete(self, entry: Entry) -> None:
        """Delete `entry`, if it still exists; raise CompareFailed if the key was changed since `entry` was read."""

    def commit(self, writes: Sequence[Write]) -> list[Entry]:
        """Apply at most MOST_AT_ONCE writes of different keys. Return an entry for each: for a Delete, the deleted one.

        Raises KeyExists or CompareFailed for the first write whose condition is not met. Then an atomic store has
        applied no write. Other stores apply the writes one after another, in this order, and the writes before the
        failed one remain applied. So the order of the writes must be safe even if the process ends between two of them.

        If an answer was lost, and another writer has changed a key since, the writes may have been applied before that.
        Then the attribute `maybe_applied` of the CompareFailed is true.
        """

    def touch(self, entry: Entry, value: str, ttl: int) -> Entry:
        """Set the expiry of the key of `entry` to `ttl` seconds from now; return the key's current entry.

        If the key is attached to this object's lease for `ttl`, the lease is renewed, and nothing is written.
        Otherwise, `value` is written as by `update`. Raises CompareFailed if the key was changed or deleted, or has
        expired, since `entry` was read.
        """

    def remove_tree(self, directory: str) -> None:
        """Delete all keys below `directory`, and the key `directory` itself; do nothing if there are none."""

    def put(self, key: str, value: str, ttl: int | None = None) -> None:
        """Write `key` blindly, whatever its value is.

        With `ttl`, the key expires that many seconds from now. Without `ttl`, it never expires. In a store with leases,
        the lease is not always renewed, so the key may expire after only half of `ttl`.
        """

    def put_all(self, values: Mapping[str, str], ttl: int | None = None) -> None:
        """Write at most MOST_AT_ONCE keys blindly, as `put` does; an atomic store writes them in one transaction."""

    def check_writable(self, *keys: str) -> None:
        """Raise StoreError unless etcd permits writes to all of `keys`. Changes nothing."""

    def version(self) -> str:
        """Return the version of the etcd server."""

    def list_for_watch(self, directory: str, keep: Keep = itself) -> tuple[list[Entry], int]:
        """Return `keep(entry)` for each entry below `directory`, without None, and where to begin a watch: a revision.

        A watch from this revision on yields all changes that the entries do not contain yet, and perhaps some that they
        contain already. A key or directory that cannot be read is an entry with a `problem`. `keep` is called while the
        answer arrives, so memory is needed only for what it returns. It may be called for an entry more than once.
        """

    def watch(self, directory: str, revision: int, seconds: float) -> Watch:
        """Return a watch of the changes below `directory` from `revision` on, including `revision`.

        No request is sent before the first `next`. If nothing changes for `seconds`, the watch yields an empty batch.
        """


@dataclass(frozen=True)
class Fence:
    """A condition of writes of other keys: the revision of `key` is still `revision`, 0 if the key did not exist.

    `until` is the time (monotonic, seconds) until which a store that is not atomic may rely on this without a request.
    """

    key: str
    revision: int
    until: float


class FencedStore(Store, Protocol):
    """A store whose writes have the condition `fence`, if it is not None. They raise Fenced if it is not met.

    An atomic store checks the condition in the same transaction. Other stores read the key of the fence immediately
    before a write that is sent again, or that is sent after `Fence.until`.

    A conditional write succeeds if it was applied before the fence changed, even if the answer was lost. After Fenced,
    it is not applied by an atomic store. In other stores, an attempt without an answer may be applied later. Of a blind
    write (`put`, `put_all`, `remove_tree`) that raises Fenced, such an attempt may have been applied.
    """

    fence: Fence | None


def read_all(store: Store, keys: Collection[str]) -> dict[str, Entry]:
    """Return key -> entry for those of `keys` that exist, in the order of `keys`. There may be any number of keys."""
    found: dict[str, Entry] = {}
    wanted = list(keys)
    for start in range(0, len(wanted), MOST_AT_ONCE):
        entries = store.read(wanted[start : start + MOST_AT_ONCE])[0]
        found.update({entry.key: entry for entry in entries if entry is not None})
    return found


def each_below(store: Store, directory: str, levels: int = 2) -> Iterator[Entry]:
    """Yield the entries below a directory, except those that cannot be read (see `Entry.problem`).

    They are read in parts, so that they are not all in memory at once: one part for each subdirectory that is `levels`
    below the directory. So they are not of one revision.
    """
    for name in store.names(directory):
        path = f"{directory}/{name}"
        with suppress(InvalidValue):  # a directory, which is no key in etcd's v2 API
            entry = store.get(path)
            if entry is not None:
                yield entry
        below = each_below(store, path, levels - 1) if levels > 1 else store.tree(path)
        with suppress(InvalidValue):  # a key, which is no directory in etcd's v2 API
            yield from (entry for entry in below if entry.key != path)


def create_if_missing(store: Store, key: str, value: str) -> bool:
    """Write `key` unless it exists; return whether it was written."""
    try:
        store.create(key, value)
    except KeyExists:
        return False
    return True


def create_missing(store: Store, values: Mapping[str, str]) -> bool:
    """Write those keys of `values` that do not exist, in this order; return whether any was written.

    Raises Conflict if other writers keep creating and deleting the keys.
    """
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
    """Implements `Store.commit` for a store that is not atomic."""
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


def set_value(store: Store, key: str, value: str | None) -> str | None:
    """Set `key` to `value`, or delete it if `value` is None; return the value before, None if there was none.

    If the key has this value already, nothing is written. Raises Conflict if other writers keep changing the key.
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
            return None if entry is None else entry.value
        except (KeyExists, CompareFailed):
            pause(attempt)
    raise _contended(key)


def modify(
    store: Store, key: str, missing: str, change: Callable[[str], str | None], known: Entry | None = None
) -> bool:
    """Change the value of `key` by compare-and-swap: `change` computes the new value from the current value.

    `known` is the key's entry, if the caller has just read it. `change` is called again if another writer has changed
    the key meanwhile. If `change` returns None, nothing is written. Returns True if the value was changed, or may have
    been changed by an attempt without an answer. Raises NotFound with the message `missing` if the key does not exist,
    and Conflict if other writers keep changing the key.
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
    """Sleep for at most 0.2 s after a conflict with another writer: at random, the longer, the higher `attempt` is."""
    time.sleep(random.uniform(0, min(0.2, 0.004 * (attempt + 1))))


def _contended(key: str) -> Conflict:
    return Conflict(f"etcd key {key} keeps being modified concurrently; retry")
