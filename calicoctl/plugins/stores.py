"""Clients of the store for calls that run at the same time, and a bound for the time that work may take.

A client and its connections are kept for later calls. After a failure of the store, the kept clients are discarded, and
the settings of the store are read anew: `calicoctl node --local-etcd` may have changed them.

The engine makes its calls one after another when it starts, and waits for each. So only one of them waits for a store
that is away: after a failure, calls fail at once for PAUSE seconds.
"""

from __future__ import annotations

import math
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
"""The maximum number of functions that `bounded` runs at the same time, even if nobody waits for them any more."""

ANSWER = 1.0
"""Seconds within which the store must answer a small request before a call relies on it."""

FRESH = 0.2
"""Seconds for which an answer of the store counts as a sign that it still answers."""

REMOVAL = 1.0
"""The maximum number of seconds that a removal takes."""

PAUSE = 5.0
"""Seconds for which calls do not try the store after it has failed."""

_running = 0
_idle = threading.Condition()


class TooSlow(StoreUnavailable):
    """A function that `bounded` runs took too long. It goes on, and its outcome is unknown."""


def bounded(seconds: float, work: Callable[[], T], part: bool = False) -> T:
    """Call `work` in a thread, and return its result. An exception of `work` is raised again.

    With `part`, which is for a caller that `bounded` itself runs, `work` begins at once, however many others run.

    Raises TooSlow if `work` takes longer than `seconds`, and goes on; and StoreUnavailable, without calling it, if BUSY
    others run for as long, or if no thread can be started.
    """
    global _running
    give_up = time.monotonic() + seconds
    with _idle:
        if not part and not _idle.wait_for(lambda: _running < BUSY, seconds):
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
    """Wait until `bounded` runs no function any more, at most `seconds`."""
    with _idle:
        _idle.wait_for(lambda: _running == 0, seconds)


class Stores:
    """Clients of the store on behalf of one host. Thread-safe.

    `failed` becomes true when the store has failed, or a call was too slow: then something may have been left behind.
    `happened` is set then, and also after other events that may have left something, such as a restart of the engine.
    """

    def __init__(self, host: str, variables: Mapping[str, str]) -> None:
        """`variables` is the environment of this process, without the variables of the settings file."""
        self.host = host
        self.failed = False
        self.happened = threading.Event()
        self._variables = dict(variables)
        self._kept: list[DatastoreClient] = []
        self._answered = -math.inf
        """The time (monotonic) of the last answer of the store."""
        self._down_until = -math.inf

    def note_failure(self) -> None:
        """Set `failed` and `happened`."""
        self.failed = True
        self.happened.set()

    @contextmanager
    def client(self, asks: bool = True) -> Iterator[DatastoreClient]:
        """Yield a client that nobody else uses inside `with`. `asks` says that the body makes a request in any case.

        So if the body succeeds with `asks`, the store counts as answering. A StoreError of the body is noted as a
        failure (note_failure), and raised again. Raises CalicoError if the settings are invalid.
        """
        began = time.monotonic()
        try:
            datastore = self._kept.pop()
        except IndexError:
            datastore = self._open()
        try:
            yield datastore
        except StoreError as error:
            self._kept.clear()
            self.note_failure()
            if isinstance(error, StoreUnavailable) and self._answered < began:
                self._pause()
            raise
        except CalicoError:
            self._keep(datastore)
            raise
        if asks:
            self._answered, self._down_until = time.monotonic(), -math.inf
        self._keep(datastore)

    def _pause(self) -> None:
        self._answered, self._down_until = -math.inf, time.monotonic() + PAUSE

    def _keep(self, datastore: DatastoreClient) -> None:
        if len(self._kept) < KEPT:
            self._kept.append(datastore)

    def _open(self) -> DatastoreClient:
        variables = dict(self._variables)
        environment.complete(variables)
        settings = EtcdSettings.from_environment(variables)
        members = tuple(name for name, _ in settings.members)
        return DatastoreClient(backends.connect(settings, PATIENCE), self.host, members)

    def require(self, seconds: float | None = None) -> None:
        """Raise StoreUnavailable if the store has failed within the last PAUSE seconds, or does not answer now.

        `seconds` is how long an answer is waited for, by default ANSWER.
        """
        seconds = ANSWER if seconds is None else seconds
        if time.monotonic() < self._down_until:
            self.note_failure()
            raise StoreUnavailable("etcd did not answer a moment ago; try again in a few seconds")
        if time.monotonic() - self._answered < FRESH:
            return
        try:
            bounded(seconds, self._ask, part=True)
        except TooSlow:
            self.note_failure()
            self._pause()
            raise StoreUnavailable(f"etcd does not answer within {seconds:g} s; try again later") from None

    def _ask(self) -> None:
        with self.client() as datastore:
            datastore.hosts.is_registered()

    def call(self, work: Callable[[DatastoreClient], T], asks: bool = True) -> T:
        """Return `work(client)`. Raises StoreUnavailable, before `work` is called, as `require` does.

        If `asks` is false, `work` may do without the store, and is called in any case.
        """
        if asks:
            self.require()
        return self._with_client(work, asks)

    def _with_client(self, work: Callable[[DatastoreClient], T], asks: bool = True) -> T:
        with self.client(asks) as datastore:
            return work(datastore)

    def remove(self, work: Callable[[DatastoreClient], object]) -> bool:
        """Call `work(client)`, which removes something. Return False after a StoreError, or after REMOVAL seconds.

        Then `failed` is true, and collection.py removes later what is left. Otherwise, returns True. Raises the other
        exceptions of `work`.
        """
        try:
            self.require()
            bounded(REMOVAL, lambda: self._with_client(work), part=True)
        except StoreError:
            self.note_failure()
            self._answered = -math.inf  # whether it answers at all is asked before the next work
            return False
        return True
