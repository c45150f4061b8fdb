"""The store as commands and agents use it: one of two backends, chosen at the first request, and never written frozen.

While the data moves from one API of etcd to the other, both stores are frozen: what is written then could be lost. So
this store refuses to be changed while the key Ready is `false`, except for the statuses that agents report, which do
not move. It reads that key before a write, unless it has done so moments ago. When Ready is not true any more, the data
may have moved, and the backend is chosen again: an agent notices it by its heartbeat. From then on, all clients in this
process use the other backend, and watches end, so that everything is read anew there.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import closing
from typing import Callable, Optional

from calicoctl.datastore import keys
from calicoctl.datastore.detection import Choice
from calicoctl.datastore.store import Change, Create, Entry, Store, Write
from calicoctl.errors import Frozen, WatchExpired

FRESH = 5.0
"""Seconds for which a store that was not frozen is written to without another look. A command that has begun to write
normally ends within that time. What freezes a store has to wait for longer before it relies on that."""

_STATUSES = keys.FELIX_HOSTS + "/"


class ChosenStore:
    """`Store` by the backend that was chosen. Not thread-safe."""

    def __init__(
        self,
        choose: Callable[[Optional[Choice]], Choice],
        latest: Callable[[], Optional[Choice]],
        open: Callable[[str], Store],
    ) -> None:
        """Sends nothing. `open` returns the backend for an API, the same one each time.

        `choose` gets None or, when it must be known whether the store is frozen, the choice so far, and returns the
        current one. It raises StoreError if none may be used, and is called again for the next request. `latest`
        returns the last choice that any client has made in this process; it sends nothing.
        """
        self._choose = choose
        self._latest = latest
        self._open = open
        self._choice: Choice | None = None

    def choice(self) -> Choice:
        """Return which backend is used, and why. Raises StoreError."""
        latest = self._latest()
        if self._choice is None:
            self._choice = self._choose(None)
        elif latest is not None and latest.at > self._choice.at and latest.api != self._choice.api:
            self._choice = latest
        return self._choice

    @property
    def _store(self) -> Store:
        return self._open(self.choice().api)

    def _writable(self, *written: str) -> Store:
        """Return the store to write to some keys; raise Frozen if that is not allowed now."""
        choice = self.choice()
        if choice.frozen is not False or time.monotonic() - choice.at > FRESH:
            choice = self._choice = self._choose(choice)
        if choice.frozen and not all(key.startswith(_STATUSES) for key in written):
            raise Frozen(
                f"Nothing can be changed: etcd's data is frozen, since {keys.READY} is false. An administrator sets "
                "that before data is moved or restored, and sets it to true afterwards"
            )
        return self._open(choice.api)

    @property
    def atomic(self) -> bool:
        return self._store.atomic

    @property
    def leases(self) -> bool:
        return self._store.leases

    def get(self, key: str) -> Entry | None:
        return self._store.get(key)

    def tree(self, directory: str) -> list[Entry]:
        return self._store.tree(directory)

    def read(
        self, keys: Sequence[str], directories: Sequence[str] = ()
    ) -> tuple[list[Entry | None], list[list[Entry]]]:
        return self._store.read(keys, directories)

    def names(self, directory: str, but: Collection[str] = ()) -> list[str]:
        return self._store.names(directory, but)

    def exists(self, directory: str) -> bool:
        return self._store.exists(directory)

    def create(self, key: str, value: str, ttl: int | None = None) -> Entry:
        return self._writable(key).create(key, value, ttl)

    def update(self, entry: Entry, value: str, ttl: int | None = None) -> Entry:
        return self._writable(entry.key).update(entry, value, ttl)

    def delete(self, entry: Entry) -> None:
        self._writable(entry.key).delete(entry)

    def commit(self, writes: Sequence[Write]) -> list[Entry]:
        written = [write.key if isinstance(write, Create) else write.entry.key for write in writes]
        return self._writable(*written).commit(writes)

    def touch(self, entry: Entry, value: str, ttl: int) -> Entry:
        return self._writable(entry.key).touch(entry, value, ttl)

    def remove_tree(self, directory: str) -> None:
        self._writable(directory).remove_tree(directory)

    def put(self, key: str, value: str, ttl: int | None = None) -> None:
        self._writable(key).put(key, value, ttl)

    def put_all(self, values: Mapping[str, str], ttl: int | None = None) -> None:
        self._writable(*values).put_all(values, ttl)

    def check_writable(self, *keys: str) -> None:
        self._writable(*keys).check_writable(*keys)

    def version(self) -> str:
        return self._store.version()

    def list_for_watch(self, directory: str) -> tuple[list[Entry], int]:
        return self._store.list_for_watch(directory)

    def watch(self, directory: str, revision: int, seconds: float) -> Generator[list[Change], None, None]:
        api = self.choice().api
        with closing(self._open(api).watch(directory, revision, seconds)) as watch:
            for changes in watch:
                if self.choice().api != api:
                    raise WatchExpired("the data has moved to etcd's other API")
                yield changes
