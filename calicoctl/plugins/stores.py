"""Clients of the store for calls that run at the same time, and a bound for the time that work may take.

A client and its connections are kept for later calls. After a failure of the store, the kept clients are discarded, and
the settings of the store are read anew: `calicoctl node --local-etcd` may have changed them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any, Callable, TypeVar

from calicoctl import environment
from calicoctl.datastore import backends
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.settings import EtcdSettings
from calicoctl.errors import CalicoError, StoreError, StoreUnavailable

T = TypeVar("T")

PATIENCE = 2.0
"""Seconds for which a request is retried while the cluster cannot serve it; see backends.PATIENCE."""

KEPT = 8
"""The maximum number of clients that are kept."""

BUSY = 64
"""The maximum number of works that run at the same time, including those for which nobody waits any more."""

REMOVAL = 1.0
"""The maximum number of seconds for which a removal waits for the store."""

PAUSE = 5.0
"""Seconds for which removals do not try the store after it has failed."""

_running = 0
_idle = threading.Condition()


class TooSlow(StoreUnavailable):
    """A work took longer than it may. It goes on, and its outcome is unknown."""


def bounded(seconds: float, work: Callable[[], T]) -> T:
    """Call `work` in a thread, and return its result. An exception of `work` is raised again.

    Raises TooSlow if `work` takes longer than `seconds`, and StoreUnavailable if BUSY works run for as long.
    """
    global _running
    give_up = time.monotonic() + seconds
    with _idle:
        if not _idle.wait_for(lambda: _running < BUSY, seconds):
            raise StoreUnavailable(f"{BUSY} calls are waiting for an answer already; try again later")
        _running += 1
    outcome: SimpleQueue[tuple[BaseException | None, Any]] = SimpleQueue()

    def body() -> None:
        try:
            outcome.put((None, work()))
        except BaseException as error:
            outcome.put((error, None))
        finally:
            _end()

    try:
        threading.Thread(target=body, name="call", daemon=True).start()
    except RuntimeError:
        _end()
        raise StoreUnavailable("no thread can be started for this call; try again later") from None
    try:
        error, result = outcome.get(timeout=max(0.0, give_up - time.monotonic()))
    except Empty:
        raise TooSlow(f"etcd, or this host, has not answered within {seconds:.0f} s; try again later") from None
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def _end() -> None:
    global _running
    with _idle:
        _running -= 1
        _idle.notify_all()


def wait_idle(seconds: float) -> None:
    """Wait until no work runs, at most `seconds`."""
    with _idle:
        _idle.wait_for(lambda: _running == 0, seconds)


class Stores:
    """Clients of the store on behalf of one host. Thread-safe.

    `failed` is set when the store has failed, or a work was too slow: then something may have been left behind.
    """

    def __init__(self, host: str, variables: Mapping[str, str]) -> None:
        """`variables` is the environment of this process, without the variables of the settings file."""
        self.host = host
        self.failed = threading.Event()
        self._variables = dict(variables)
        self._kept: list[DatastoreClient] = []
        self._down_until = 0.0

    @contextmanager
    def client(self) -> Iterator[DatastoreClient]:
        """Yield a client that nobody else uses inside `with`. Raises CalicoError if the settings are invalid."""
        try:
            datastore = self._kept.pop()
        except IndexError:
            datastore = self._open()
        try:
            yield datastore
        except StoreError:
            self._kept.clear()
            self.failed.set()
            raise
        except CalicoError:
            self._keep(datastore)
            raise
        self._keep(datastore)

    def _keep(self, datastore: DatastoreClient) -> None:
        if len(self._kept) < KEPT:
            self._kept.append(datastore)

    def _open(self) -> DatastoreClient:
        variables = dict(self._variables)
        environment.complete(variables)
        settings = EtcdSettings.from_environment(variables)
        members = tuple(name for name, _ in settings.members)
        return DatastoreClient(backends.connect(settings, PATIENCE), self.host, members)

    def call(self, work: Callable[[DatastoreClient], T]) -> T:
        """Return `work(client)`."""
        with self.client() as datastore:
            return work(datastore)

    def remove(self, work: Callable[[DatastoreClient], object]) -> None:
        """Call `work(client)`, which removes something. Return if the store does not answer, or is too slow.

        Then `failed` is set, and collection.py removes it later. After that, `work` is not called for PAUSE seconds.
        Raises the other exceptions of `work`.
        """
        if time.monotonic() < self._down_until:
            self.failed.set()
            return
        try:
            bounded(REMOVAL, lambda: self.call(work))
        except StoreError:
            self.failed.set()
            self._down_until = time.monotonic() + PAUSE
