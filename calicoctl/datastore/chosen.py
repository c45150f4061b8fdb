"""The store that commands and agents use: it forwards requests to the backend that was chosen.

There is a backend for each API of etcd; a choice (detection.Choice) says which API is used. While the key Ready is
`false`, the data is frozen, since it is perhaps being moved from one API to the other. Writes then raise Frozen, except
for the statuses that agents report, which are not moved. Ready is read before each write, unless a read less than FRESH
seconds ago showed that the data is not frozen. If Ready is not `true`, and DATASTORE_TYPE does not name an API, the
backend is chosen again. A new choice applies to all clients in this process, and ends their watches at the other
backend.

Ready may change between its read and the write, so it is also the fence (see store.Fence) of every write that is
refused while the data is frozen. If the fence has changed, the backend is chosen again, and the write is made there.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import closing
from typing import Callable, Optional, TypeVar

from calicoctl.datastore import keys
from calicoctl.datastore.detection import Choice
from calicoctl.datastore.store import Change, Entry, Fence, FencedStore, Keep, Write, itself, write_in_order
from calicoctl.errors import Fenced, Frozen, WatchExpired

T = TypeVar("T")

Found = tuple[list[Optional[Entry]], list[list[Entry]]]
"""What Store.read returns."""

FRESH = 5.0
"""Seconds after which Ready is read again before a write. A tool that freezes the data must wait longer than this
before it moves the data."""

ATTEMPTS = 5
"""The maximum number of attempts of a write while Ready keeps changing, before it fails with Fenced."""

FROZEN = "etcd's data is frozen"
"""What is in the text of each Frozen that a ChosenStore raises."""

_STATUSES = keys.FELIX_HOSTS + "/"


class ChosenStore:
    """Implements `Store`, by calls of the chosen backend. Not thread-safe."""

    def __init__(
        self,
        choose: Callable[[Optional[Choice]], Choice],
        latest: Callable[[], Optional[Choice]],
        open: Callable[[str], FencedStore],
        choose_and_read: Callable[[Sequence[str], Sequence[str]], Optional[tuple[Choice, Found]]] = lambda *_: None,
    ) -> None:
        """Sends no request. `open` returns the backend for an API (settings.V2 or V3).

        `choose` returns the API to use. Its argument is the previous choice, which it checks again, or None if there is
        none yet. It raises StoreError or InvalidValue if no API may be used. `latest` returns the last choice of any
        client in this process, None if there is none; it sends no request. `choose_and_read` returns a choice, and what
        Store.read returns, by one request for both; None if that is not possible.
        """
        self._choose = choose
        self._latest = latest
        self._open = open
        self._choose_and_read = choose_and_read
        self._choice: Choice | None = None
        self._listed: str | None = None
        """The API of the last `list_for_watch`: a watch from the revision that it has returned must be there."""

    def choice(self) -> Choice:
        """Return the choice of the API that this store uses. If there is none yet, choose first.

        If another client in this process has chosen the other API since, this store uses that one, too.

        Raises StoreError or InvalidValue if no API may be used.
        """
        latest = self._latest()
        if self._choice is None:
            self._choice = self._choose(None)
        elif latest is not None and latest.at > self._choice.at and latest.api != self._choice.api:
            self._choice = latest
        return self._choice

    def current_choice(self) -> Choice:
        """Check by a request which API is to be used now, and whether its data is frozen; return the new choice.

        Raises StoreError or InvalidValue if no API may be used.
        """
        self._choice = self._choose(self.choice())
        return self._choice

    @property
    def _store(self) -> FencedStore:
        return self._open(self.choice().api)

    def _write(self, written: Sequence[str], write: Callable[[FencedStore], T]) -> T:
        """Call `write` with the backend for a write to the keys `written`, and return what it returns.

        If `write` raises Fenced, since Ready has changed, the API is chosen again, and `write` is called again: at most
        ATTEMPTS times in all. Raises what `_writable` and `write` raise.
        """
        for _ in range(ATTEMPTS - 1):
            try:
                return write(self._writable(*written))
            except Fenced:
                self.current_choice()
        return write(self._writable(*written))

    def _writable(self, *written: str) -> FencedStore:
        """Return the backend for a write to the keys `written`, after setting its `fence` for this write.

        If all of the keys are agents' statuses, the fence is None. If not, raises Frozen if the data is frozen. Raises
        StoreError or InvalidValue if no API may be used.
        """
        choice = self.choice()
        if choice.frozen is not False or time.monotonic() - choice.at > FRESH:
            choice = self.current_choice()
        store, is_moved = self._open(choice.api), not all(key.startswith(_STATUSES) for key in written)
        store.fence = Fence(keys.READY, choice.revision, choice.at + FRESH) if is_moved else None
        if choice.frozen and is_moved:
            raise Frozen(
                f"Nothing can be changed: {FROZEN}, since {keys.READY} is false. If 'calicoctl "
                "datastore migrate' is moving the data, that ends by itself; if not, see 'calicoctl datastore show'"
            )
        return store

    @property
    def atomic(self) -> bool:
        # without a request, so that `read` can be the first: whoever writes asks again after a choice
        latest = self._latest() if self._choice is None else None
        return self._open((latest or self.choice()).api).atomic

    @property
    def leases(self) -> bool:
        return self._store.leases

    def get(self, key: str) -> Entry | None:
        return self._store.get(key)

    def tree(self, directory: str) -> list[Entry]:
        return self._store.tree(directory)

    def collect(self, directory: str, convert: Callable[[Entry], T | None], values: bool = True) -> list[T]:
        return self._store.collect(directory, convert, values)

    def read(self, keys: Sequence[str], directories: Sequence[str] = ()) -> Found:
        if self._choice is None:
            chosen = self._choose_and_read(keys, directories)
            if chosen is not None:
                self._choice, found = chosen
                return found
        return self._store.read(keys, directories)

    def names(self, directory: str, but: Collection[str] = ()) -> list[str]:
        return self._store.names(directory, but)

    def exists(self, directory: str) -> bool:
        return self._store.exists(directory)

    def create(self, key: str, value: str, ttl: int | None = None) -> Entry:
        return self._write([key], lambda store: store.create(key, value, ttl))

    def update(self, entry: Entry, value: str, ttl: int | None = None) -> Entry:
        return self._write([entry.key], lambda store: store.update(entry, value, ttl))

    def delete(self, entry: Entry) -> None:
        self._write([entry.key], lambda store: store.delete(entry))

    def commit(self, writes: Sequence[Write]) -> list[Entry]:
        written = [write.key for write in writes]
        if not self._writable(*written).atomic:
            return write_in_order(self, writes)  # each has its own fence, and is made again by itself
        return self._write(written, lambda store: store.commit(writes))

    def touch(self, entry: Entry, value: str, ttl: int) -> Entry:
        return self._write([entry.key], lambda store: store.touch(entry, value, ttl))

    def remove_tree(self, directory: str) -> None:
        def remove(store: FencedStore) -> None:
            try:
                store.remove_tree(directory)
            except Fenced:
                if store.exists(directory):  # else an attempt without an answer has removed all
                    raise

        self._write([directory], remove)

    def put(self, key: str, value: str, ttl: int | None = None) -> None:
        self._write([key], lambda store: store.put(key, value, ttl))

    def put_all(self, values: Mapping[str, str], ttl: int | None = None) -> None:
        self._write(list(values), lambda store: store.put_all(values, ttl))

    def check_writable(self, *keys: str) -> None:
        self._writable(*keys).check_writable(*keys)

    def version(self) -> str:
        return self._store.version()

    def list_for_watch(self, directory: str, keep: Keep = itself) -> tuple[list[Entry], int]:
        while True:
            api = self.choice().api
            found = self._open(api).list_for_watch(directory, keep)
            if not found[0]:
                self.current_choice()  # perhaps the data has moved, and was deleted here
            if self.choice().api == api:
                self._listed = api
                return found

    def watch(self, directory: str, revision: int, seconds: float) -> Generator[list[Change], None, None]:
        api = self._listed or self.choice().api
        with closing(self._open(api).watch(directory, revision, seconds)) as watch:
            for changes in watch:
                if self.choice().api != api:
                    raise WatchExpired("the data has moved to etcd's other API")
                if any(_is_of_all(change, directory) for change in changes):
                    raise WatchExpired(f"all below {directory} was deleted at once")  # perhaps after it has moved
                yield changes


def _is_of_all(change: Change, directory: str) -> bool:
    """Return whether a change is the deletion of all keys below a directory."""
    return change.entry is None and not change.alone and (directory + "/").startswith(change.key + "/")
