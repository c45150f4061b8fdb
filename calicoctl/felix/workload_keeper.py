"""Keeps this host's workloads connected: decides from events which workload is reconciled, and when.

Events of the Docker Engine, of mounts, and of the agent only put a workload into the work queue (workqueue.py). Then
`upkeep.reconcile` determines what must be done for the workload, and does it, while it holds the workload's lock. After
that, a container that was started and is not connected is connected as its labels ask (labelling.py). Actions and
failures are reported to the agent's loop.

One thread, the keeper's thread, owns the queue and all state of this module. Worker threads reconcile, since they wait
for the store and for the Docker Engine. Each orchestrator has workers of its own, so a slow engine delays only its
containers.
"""

from __future__ import annotations

import heapq
import logging
import socket
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Callable

from calicoctl.datastore.keys import parse_endpoint
from calicoctl.desired.snapshot import GRACE_TIME
from calicoctl.errors import CalicoError, Conflict, DockerUnavailable, NamespaceError, StoreUnavailable, printable
from calicoctl.felix import events, sources
from calicoctl.felix.workqueue import WorkerPool, WorkQueue
from calicoctl.output import first_few
from calicoctl.workloads import connected, labelling, learning, locks, starting, upkeep
from calicoctl.workloads.labelling import LabelsRefused
from calicoctl.workloads.upkeep import Action, NotConnectedHere
from calicoctl.workloads.workload import (
    CNI,
    DOCKER,
    NAMESPACE,
    WorkloadState,
    container_pids,
    namespace_at,
    short_id,
    workload_of,
)

if TYPE_CHECKING:
    from calicoctl.datastore.client import DatastoreClient
    from calicoctl.datastore.keys import EndpointId

log = logging.getLogger("calico.felix")

INTERVAL = 10.0
"""Seconds between two searches for interrupted changes (see `_sweep`), and between two retries."""

LABELS_PAUSE = 60.0
"""The longest pause, in seconds, between two attempts to connect a container as its labels ask. The first pause is
INTERVAL, and each is twice as long as the one before.
"""

LOCK_PAUSE = 0.5
"""Seconds until a workload is retried if another process holds its lock, or after a first attempt that failed within
this time.
"""

STORE_PAUSE = 1.0
"""Seconds until the store is tried again after it was unavailable."""

COMPARE_PAUSE = 60.0
"""Seconds until a failed comparison with the engine's list of containers is retried."""

COMPARE_INTERVAL = 300.0
"""Seconds between two comparisons with the engine's list of containers. They find changes that no event has
reported.
"""

DELETED_PAUSE = 30.0
"""Seconds from the deletion of an endpoint until its workload is reconciled: another tool may recreate the endpoint."""

WORKERS = {DOCKER: 8, NAMESPACE: 4, CNI: 4}
"""How many workloads of each orchestrator are reconciled at a time."""

REATTACH_INTERVAL = 10.0
"""The minimum number of seconds between two re-attachments of a workload that repeatedly loses its interface."""

END_PATIENCE = 5.0
"""Seconds for which the agent's end waits for the workers. The next agent completes interrupted changes."""

NEVER = float("-inf")

Key = tuple[str, str]
"""A workload, as (orchestrator, workload id)."""


@dataclass(frozen=True)
class Resynced:
    """All workloads must be compared with the store.

    The reason is that the whole store was read, or that this agent reports for the host again. `expected` maps
    workloads to the number of addresses that their endpoints list.
    """

    expected: dict[Key, int]


@dataclass(frozen=True)
class EndpointChanged:
    """A workload must be reconciled because of its endpoint.

    If `deleted` is True, the endpoint was deleted in the store. If it is False, the endpoint's interface is missing or
    has a new MAC, or the endpoint of a container lacks the container's name.
    """

    key: Key
    deleted: bool


@dataclass(frozen=True)
class RetryLabels:
    """Containers that could not be connected as their labels ask may succeed now.

    `changed` are endpoints that have changed, of all hosts: containers that ask for one of their addresses may succeed,
    and a container that has one of these endpoints was connected by a command. If `changed` is None, all containers may
    succeed, for example since a pool or a profile has changed.
    """

    changed: frozenset[EndpointId] | None


@dataclass(frozen=True)
class Compared:
    """The result of `_compare_states` or of `_compare_places`, which workers run.

    `_compare_states` compares containers' endpoints with the engine's list of containers. `_compare_places` then
    compares the endpoints that match the list with the network namespaces of their containers.

    `keys` are the workloads that do not match, and must be reconciled. `connected` are the endpoints of running
    containers that match the list; `_compare_places` leaves it empty. `refused` are the listed containers that have
    endpoints on this host, although nobody has connected them here (see connected.py); it is None in the result of
    `_compare_places`, and after a failure. `unconnected` maps the ids of the listed containers that run, are not
    connected, and may ask to be, to whether they have the label; those without it may have environment variables that
    ask for it. `error` is the exception that ended the comparison, None if there was none.
    """

    keys: list[Key]
    connected: list[EndpointId]
    refused: frozenset[Key] | None = None
    unconnected: dict[str, bool] = field(default_factory=dict)
    error: Exception | None = None


@dataclass(frozen=True)
class WorkItem:
    """A workload to reconcile.

    `removed` says whether the engine has reported the removal of the container. If it has, there is no grace period.
    `labels` says whether the container, if it is not connected, is to be connected as its labels ask.

    The workload's state (WorkloadState) is not known yet; reconciling determines it. If it is MISSING, the grace period
    counts from `missing_since`; if it is GONE, from `gone_since` (NEVER: the period is over already). Both are times of
    the keeper's clock. `grace_time` is the duration of the grace period in seconds.
    """

    key: Key
    removed: bool
    labels: bool
    missing_since: float
    gone_since: float
    grace_time: float


@dataclass(frozen=True)
class WorkResult:
    """The result of reconciling a workload: the `actions` that were done, and how it ended.

    `error` is the exception that ended it early, None if there was none. `state` is the state of the workload, None if
    it was not determined. `kept_since` is when the workload's grace period began; None if the workload has none, or if
    the period is over. `seconds` is how long reconciling took. `unlabelled` says that the workload is a container that
    does not ask to be connected.
    """

    key: Key
    actions: list[Action]
    error: Exception | None
    state: WorkloadState | None
    kept_since: float | None
    seconds: float
    unlabelled: bool = False


@dataclass(frozen=True)
class StartedAgain:
    """A worker has tried, perhaps without success, to start the container `id`.

    The container's start had failed before, since it could not be connected.
    """

    id: str


@dataclass
class _Tracked:
    """What the keeper knows of one workload between two reconciliations. All times are those of the keeper's clock."""

    kept_since: float | None = None
    """When the grace period of a MISSING or GONE workload began; None if it has none."""
    unreachable_at: float = NEVER
    """When the last attempt failed to determine the workload's state, since the engine did not answer or the
    namespace's path could not be read; NEVER if it succeeded.
    """
    locked_since: float | None = None
    """Since when another process has held the workload's lock; None if none does."""
    reattached_at: float = NEVER
    """When the workload was last re-attached; NEVER if that is longer ago than REATTACH_INTERVAL."""
    removed: bool = False
    """Whether the engine has reported the removal of the container."""
    labels: bool = False
    """Whether the container is to be connected as its labels ask, since it was started."""
    labels_failed: bool = False
    """Whether it was reported that the container cannot be connected as its labels ask."""
    labels_pause: float = 0.0
    """The pause in seconds after the last failure to connect it as its labels ask; 0 if a retry may succeed soon."""
    labels_holder: EndpointId | None = None
    """The endpoint that has an address for which the labels ask; None if this is not why connecting it has failed."""
    failure: str | None = None
    """The failure that was reported last; "" for a first failure that is not reported yet; None if there is none."""


class Refused:
    """Workloads that have endpoints on this host, although nobody has connected them here (see connected.py).

    They are reported, but not attached. The report is one Failure about all of them.
    """

    def __init__(self, report: Callable[[Any], None]) -> None:
        self.keys: set[Key] = set()
        self._report = report
        self._text: str | None = None

    def replace(self, orchestrator: str, keys: Collection[Key]) -> None:
        """Replace the refused workloads of an orchestrator by `keys`.

        Emit one Failure about all refused workloads if its text has changed.
        """
        self.keys = {key for key in self.keys if key[0] != orchestrator} | {*keys}
        self.remove(())

    def remove(self, keys: Collection[Key]) -> None:
        """Remove `keys`, workloads that somebody has connected meanwhile, from the refused ones.

        Emit one Failure about all refused workloads if its text has changed; its `why` is None if none are left.
        """
        self.keys.difference_update(keys)
        text = None
        if self.keys:
            pronoun = "it is" if len(self.keys) == 1 else "they are"
            names = first_few(printable(short_id(id)[:64]) for _, id in heapq.nsmallest(4, self.keys))
            orchestrators = {orchestrator for orchestrator, _ in self.keys}
            advice = "'calicoctl container add' connects one"
            if orchestrators == {CNI}:
                advice = "Its runtime connects one when it starts it again"
            elif CNI in orchestrators:
                advice += ", but its runtime, when it starts it again, if its orchestrator is cni"
            text = (
                f"nobody has connected {len(self.keys)} of the workloads that have endpoints here, so {pronoun} not "
                f"attached: {names}. {advice}, 'calicoctl container remove' removes it"
            )
        if text != self._text:
            self._text = text
            self._report(events.Failure(text, "not connected"))


# more than 400 lines: all methods run in the keeper's thread and share its queue; what workers run is outside
class WorkloadKeeper:
    """Reconciles this host's workloads, and garbage-collects those that no longer exist."""

    def __init__(
        self,
        datastore: Callable[[], DatastoreClient],
        report: Callable[[Any], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`datastore` creates a client of the store, once for each thread.

        `report` is called with each Action, Failure, LabelsFailed and ThreadDied, by several threads. `clock` returns
        seconds.
        """
        self.inbox: events.Events[Any] = SimpleQueue()
        self.grace_time: float = GRACE_TIME
        """Seconds to keep endpoints and addresses of a workload that is MISSING or GONE, or whose state is unknown."""
        self._clock = clock
        self._datastore = datastore()
        self._report = report
        self._queue: WorkQueue[Key] = WorkQueue(WORKERS, group_of=lambda key: key[0])
        self._queue.pause(DOCKER)  # until the engine has listed its containers
        self._pool = WorkerPool(WORKERS, datastore, self.inbox.put)
        self._thread = threading.Thread(target=self._run, name="workload keeper", daemon=True)
        self._jobs: dict[Callable[[], None], float] = {self._sweep: NEVER}
        """Jobs that find workloads to reconcile, and when each is due."""
        self._expected: dict[Key, int] = {}
        """Workload -> the number of addresses that its endpoints list."""
        self._tracked: dict[Key, _Tracked] = {}
        self._swept_grace_time: float = self.grace_time
        self._namespaces: dict[Key, tuple[int, int] | None] = {}
        """Workload -> the namespace (device and inode) that was last found at its path, None if none was found.

        Containers of the Docker Engine are not included."""
        self._containers: dict[str, events.Container] | None = None
        """The engine's containers, by id, for the next comparison; if None, they are listed again."""
        self._refused = Refused(report)
        self._unlabelled: set[str] = set()
        """Ids of containers that do not ask to be connected. Labels and variables of a container never change."""
        self._starting: set[str] = set()
        """Ids of containers that a worker has the engine start."""
        self._engine_back: float | None = NEVER
        """When the engine last became available again, or last listed no container that has an endpoint.

        Until then, its list may have been incomplete. None while the engine is unavailable.
        """
        self._ready = True
        """Whether the store may be used: see `set_ready`."""
        self._store_retry_at = NEVER
        self._alive = True

    # For the agent's thread

    def start(self, expected: dict[Key, int]) -> None:
        """Start the threads, and reconcile the workloads that differ from the store. For `expected`, see Resynced."""
        self._expected = expected
        self._jobs[self._scan_store] = NEVER
        sources.EngineEvents(self.inbox).start()
        sources.MountEvents(self.inbox).start()
        self._pool.start()
        self._thread.start()

    def stop(self) -> None:
        """Start no more work. Wait until the work in progress has ended, for END_PATIENCE at most. Raises nothing."""
        self._alive = False
        self.inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(END_PATIENCE)

    def enqueue(self, id: EndpointId, deleted: bool = False) -> None:
        """Have the workload of an endpoint reconciled. For the reasons, and for `deleted`, see EndpointChanged."""
        self.inbox.put(EndpointChanged(workload_of(id), deleted))

    def retry_labels(self, changed: frozenset[EndpointId] | None) -> None:
        """Have the keeper retry to connect containers as their labels ask. For `changed`, see RetryLabels."""
        self.inbox.put(RetryLabels(changed))

    def set_ready(self, ready: bool) -> None:
        """Set whether the store may be used. While `ready` is False, no reconciliation of a workload is started."""
        if ready != self._ready:
            self._ready = ready
            self.inbox.put(None)

    def resync(self, expected: dict[Key, int]) -> None:
        """Have the keeper compare all workloads with the store. For the reasons, and for `expected`, see Resynced."""
        self.inbox.put(Resynced(expected))

    # The keeper's own thread

    def _run(self) -> None:
        while self._alive or self._queue.is_busy:
            self.process(self._wait())

    def process(self, items: list[Any]) -> None:
        """Handle items from the inbox, then pass due work to the workers. Raises nothing."""
        for item in items:
            self._guarded(partial(self._handle, item))
        if self._alive and self._ready and self._clock() >= self._store_retry_at:
            self._guarded(self._dispatch)

    def _guarded(self, step: Callable[[], None]) -> None:
        try:
            step()
        except StoreUnavailable as error:
            log.debug("%s; workloads are reconciled when the store is back", error)
            self._store_retry_at = self._clock() + STORE_PAUSE
        except Exception as error:
            log.debug("traceback", exc_info=True)
            self._report(events.Failure(f"the workload keeper failed ({type(error).__name__}: {error})"))

    def _wait(self) -> list[Any]:
        """Wait for items in the inbox until the next work is due. Return the items that have arrived."""
        until = self._clock() + INTERVAL
        if self._alive and self._ready:
            until = max(self._store_retry_at, min(until, self._queue.next_due(), *self._jobs.values()))
        found: list[Any] = []
        with suppress(Empty):
            found.append(self.inbox.get(timeout=max(0.0, until - self._clock())))
            while True:
                found.append(self.inbox.get_nowait())
        return found

    def _handle(self, item: Any) -> None:
        now = self._clock()
        if isinstance(item, WorkResult):
            self._on_result(item)
        elif isinstance(item, EndpointChanged) and item.deleted:
            self._refused.keys.discard(item.key)
            self._add(item.key, now + DELETED_PAUSE)
            self._retry_labels(now)
        elif isinstance(item, RetryLabels):
            self._retry_labels(now, item.changed)
        elif isinstance(item, EndpointChanged) and item.key[0] != DOCKER and not self._is_connected(item.key):
            if upkeep.is_managed(*item.key):  # the engine attaches those of Docker networks, and other tools theirs
                self._refused.keys.add(item.key)  # there may be many of them, so they take no worker's time
        elif isinstance(item, EndpointChanged):
            # a workload may remove its own interface again and again
            self._add(item.key, max(now, self._known(item.key).reattached_at + REATTACH_INTERVAL))
        elif isinstance(item, events.ContainerChanged):
            key = (DOCKER, item.id)
            if item.removed and upkeep.is_managed(*key):
                tracked = self._track(key)
                tracked.removed, tracked.kept_since = True, None
                self._unlabelled.discard(item.id)
            elif item.started:
                self._look_at_labels(key)
            self._add(key, now, last=False)
        elif isinstance(item, events.EngineListed):
            self._on_engine_listed(item, now)
        elif isinstance(item, events.EngineUnavailable):
            self._engine_back = None
            self._queue.pause(DOCKER)
            log.info("%s; containers' endpoints and addresses are kept", item.why)
        elif isinstance(item, events.MountsChanged):
            self._jobs[self._sweep] = now
        elif isinstance(item, Resynced):
            self._expected, self._containers = item.expected, None
            self._jobs |= {self._scan_store: now, self._compare_with_engine: now}
        elif isinstance(item, Compared):
            self._on_compared(item)
        elif isinstance(item, StartedAgain):
            self._starting.discard(item.id)
        elif isinstance(item, events.ThreadDied):
            self._report(item)

    def _on_engine_listed(self, item: events.EngineListed, now: float) -> None:
        if self._engine_back is None:
            log.info("the Docker Engine can be asked again")
        # an engine that knows none of our containers may have been started before its data directory was mounted
        if self._engine_back is None or not any((DOCKER, id) in self._expected for id in item.containers):
            self._engine_back = now
        self._queue.resume(DOCKER)
        self._unlabelled &= item.containers.keys()
        self._containers = item.containers
        self._jobs[self._compare_with_engine] = now

    def _dispatch(self) -> None:
        """Run the jobs that are due, and pass due workloads to the workers. Raises StoreUnavailable."""
        now = self._clock()
        for job, at in list(self._jobs.items()):
            if at > now:
                continue
            self._jobs[job] = now + INTERVAL  # the retry, should it fail
            try:
                job()
            except StoreUnavailable:
                self._jobs[job] = now
                raise
        for key in self._queue.take(now):
            self._pool.submit(key[0], partial(_reconcile, self._clock, self._work_item(key)))

    def _add(self, key: Key, at: float, last: bool | None = None) -> None:
        """Schedule a workload to be reconciled at the time `at`, even during its backoff after a failure.

        Workloads that are not managed (see upkeep.is_managed) are ignored. For `last`, see WorkQueue.add; the default
        is the result of `_is_last`.
        """
        if upkeep.is_managed(*key):
            self._queue.add(key, at, self._is_last(key) if last is None else last)

    def _add_after_backoff(self, key: Key, at: float, last: bool) -> None:
        """Schedule a workload to be reconciled at the time `at`, or at the end of its backoff if that is later.

        This is for workloads about which there is no new event. Workloads that are not managed (see upkeep.is_managed)
        are ignored. For `last`, see WorkQueue.add.
        """
        if upkeep.is_managed(*key):
            self._queue.add_after_backoff(key, at, last)

    def _look_at_labels(self, key: Key) -> bool:
        """Have a container connected as its labels ask when it is reconciled next, and return True.

        If it is not managed (see upkeep.is_managed), or is known not to ask for a connection, return False instead.
        """
        if not upkeep.is_managed(*key) or key[1] in self._unlabelled:
            return False
        self._track(key).labels = True
        return True

    def _retry_labels(self, now: float, changed: frozenset[EndpointId] | None = None) -> None:
        """Retry soon to connect the containers that could not be connected as their labels ask. See RetryLabels."""
        # soon: a command releases addresses just after it has deleted the endpoint
        workloads = {workload_of(id) for id in changed or () if id.host == self._datastore.host}
        for key, tracked in self._tracked.items():
            if not tracked.labels or tracked.failure is None:
                continue
            if changed is None or tracked.labels_holder in changed or key in workloads:
                tracked.labels_pause = 0.0
                self._add(key, now + LOCK_PAUSE)

    def _is_last(self, key: Key) -> bool:
        """Return whether a workload is reconciled after all others, which is so if nobody has connected it here."""
        # everybody who may write to the store can invent any number of such workloads
        return not self._is_connected(key)

    def _is_connected(self, key: Key) -> bool:
        """Return whether somebody has connected a workload here, as far as is known."""
        with suppress(CalicoError):  # which reconciling the workload reports
            return connected.get(self._datastore.host, *key) is not None
        return True

    def _track(self, key: Key) -> _Tracked:
        """Return the _Tracked of a workload, to change it. If there is none, it is created."""
        return self._tracked.setdefault(key, _Tracked())

    def _known(self, key: Key) -> _Tracked:
        """Return the _Tracked of a workload, only to read it. If there is none, an empty one is returned."""
        return self._tracked.get(key, _Tracked())

    # Jobs that find workloads to reconcile

    def _scan_store(self) -> None:
        """Compare workloads with the store, and enqueue those that do not match.

        These are workloads that hold more or fewer addresses in IPAM than their endpoints list, and namespaces and
        containers attached through CNI with an endpoint that is inactive, or misattached (see upkeep.misattached).
        Namespaces and such containers that have an endpoint, but that nobody has connected here (see connected.py), are
        reported as refused, and enqueued if their endpoint is active. If the scan succeeds, it is not repeated until
        the next resync. Raises StoreUnavailable.
        """
        now = self._clock()
        totals = self._datastore.ipam.handles.totals()
        for handle, total in totals.items():
            orchestrator, _, workload = handle.partition(".")
            if total != self._expected.get((orchestrator, workload), 0):
                self._add((orchestrator, workload), now)
        _learn_once(self._report, self._datastore.host, NAMESPACE, learning.learn_namespaces, self._datastore)
        known = {orchestrator: connected.every(self._datastore.host, orchestrator) for orchestrator in (NAMESPACE, CNI)}
        paths: dict[EndpointId, str] = {}
        refused: set[Key] = set()
        for endpoint in self._datastore.readable_endpoints(self._datastore.host)[0]:
            orchestrator, workload = key = workload_of(endpoint.id)
            if orchestrator not in known:
                continue
            if workload not in known[orchestrator]:
                refused.add(key)
                if endpoint.state == "active":
                    self._add(key, now, last=True)
            elif endpoint.state == "active":
                paths[endpoint.id] = known[orchestrator][workload].path
            else:
                self._add(key, now, last=False)
        for orchestrator in known:
            self._refused.replace(orchestrator, {key for key in refused if key[0] == orchestrator})
        for id in upkeep.misattached(paths):
            self._add(workload_of(id), now, last=False)
        del self._jobs[self._scan_store]

    def _compare_with_engine(self) -> None:
        """Have a worker compare containers' endpoints with the engine's list, unless the engine is unavailable."""
        if not self._queue.is_paused(DOCKER):  # else they are listed again when the engine is back
            self._pool.submit(DOCKER, partial(_compare_states, self._report, self._containers))
        self._containers = None
        self._jobs[self._compare_with_engine] = self._clock() + COMPARE_INTERVAL

    def _on_compared(self, item: Compared) -> None:
        now = self._clock()
        if item.refused is not None:
            self._refused.replace(DOCKER, item.refused)
        for key in item.keys:
            self._add(key, now)
        for id, labelled in item.unconnected.items():
            if self._look_at_labels((DOCKER, id)):
                self._add_after_backoff((DOCKER, id), now, last=not labelled)  # few of many may have variables
        if item.connected:
            self._pool.submit(DOCKER, partial(_compare_places, item.connected))
        if item.error is None:
            self._queue.retry_now(DOCKER, now)
        elif isinstance(item.error, StoreUnavailable):
            self._jobs[self._compare_with_engine] = now + STORE_PAUSE
        elif not self._queue.is_paused(DOCKER):
            self._jobs[self._compare_with_engine] = now + COMPARE_PAUSE
            raise item.error

    def _sweep(self) -> None:
        """Enqueue workloads whose last change was interrupted, and namespaces that have changed or do not exist.

        A namespace has changed if its path leads to another namespace than before. Also start containers that Docker's
        hook could not connect, remove stale locks, stop reporting refused workloads that somebody has connected
        meanwhile, apply a changed grace time, and drop state that is no longer needed.
        """
        now = self._clock()
        host = self._datastore.host
        known = {orchestrator: connected.every(host, orchestrator) for orchestrator in connected.ORCHESTRATORS}
        here = {(orchestrator, id) for orchestrator, ids in known.items() for id in ids}
        self._refused.remove(here)
        for orchestrator in connected.ORCHESTRATORS:
            locks.remove_stale(host, orchestrator)
            for id in locks.interrupted(host, orchestrator):
                if orchestrator == DOCKER:
                    self._look_at_labels((DOCKER, id))  # connecting it may have been interrupted
                self._add_after_backoff((orchestrator, id), now, (orchestrator, id) not in here)
        if not self._queue.is_paused(DOCKER):
            for id in set(starting.waiting(host)) - self._starting:
                self._starting.add(id)
                self._pool.submit(DOCKER, partial(_start_again, self._report, id))
        before, self._namespaces = self._namespaces, {}
        paths = {key: known[key[0]][key[1]].path for key in here if key[0] != DOCKER}
        for key, path in paths.items():
            try:
                seen = self._namespaces[key] = namespace_at(path)
            except NamespaceError:
                if key in before:
                    self._namespaces[key] = before[key]
                continue
            if seen != before.get(key, seen):
                self._add(key, now, last=False)
            elif seen is None:
                self._add_after_backoff(key, now, last=False)
        if self.grace_time != self._swept_grace_time:
            self._swept_grace_time = self.grace_time
            for key, tracked in self._tracked.items():
                if tracked.kept_since is not None:
                    self._add_after_backoff(key, tracked.kept_since + self.grace_time, key not in here)
        for tracked in self._tracked.values():
            if now >= tracked.reattached_at + REATTACH_INTERVAL:
                tracked.reattached_at = NEVER
        self._tracked = {key: tracked for key, tracked in self._tracked.items() if tracked != _Tracked()}

    # One workload

    def _work_item(self, key: Key) -> WorkItem:
        tracked = self._known(key)
        kept_since = self._clock() if tracked.kept_since is None else tracked.kept_since
        gone_since = max(tracked.unreachable_at, NEVER if tracked.kept_since is None else tracked.kept_since)
        if key[0] == DOCKER:
            gone_since = max(gone_since, NEVER if self._engine_back is None else self._engine_back)
        missing_since = max(tracked.unreachable_at, kept_since)
        return WorkItem(key, tracked.removed, tracked.labels, missing_since, gone_since, self.grace_time)

    def _on_result(self, result: WorkResult) -> None:
        """Report what was done for a workload, and enqueue the workload again if necessary. Raises StoreUnavailable."""
        key, now = result.key, self._clock()
        self._queue.done(key)
        tracked = self._track(key)
        for action in result.actions:
            if action.kind == upkeep.REATTACHED:
                tracked.reattached_at = now
            elif action.kind == upkeep.COLLECTED:
                self._retry_labels(now)  # with the addresses that were released
            self._report(action)
        if result.unlabelled:
            self._unlabelled.add(key[1])
        if result.kept_since is not None:
            tracked.kept_since = result.kept_since
            self._add(key, result.kept_since + self.grace_time)
        elif result.error is None or result.state in (WorkloadState.RUNNING, WorkloadState.STOPPED):
            tracked.kept_since = None
        if result.state is WorkloadState.MISSING:
            self._namespaces[key] = None  # so that a sweep notices when it is back, even with the same inode
        self._note_reachability(tracked, result, now)
        if isinstance(result.error, NotConnectedHere):
            self._refused.keys.add(key)
        if not isinstance(result.error, Conflict):
            tracked.locked_since = None
        elif tracked.locked_since is None:
            tracked.locked_since = now
        if tracked.locked_since is not None and now < tracked.locked_since + locks.PATIENCE:
            self._add(key, now + LOCK_PAUSE)
        elif isinstance(result.error, StoreUnavailable):
            self._add(key, now)
            raise result.error
        elif result.error is not None and not isinstance(result.error, NotConnectedHere):
            self._backoff(key, tracked, result.error, result.seconds)
        else:
            tracked.failure, tracked.labels_pause, tracked.labels_holder = None, 0.0, None
            if tracked.labels_failed:
                tracked.labels_failed = False
                self._report(events.LabelsFailed(key[1], "", None))
            if result.kept_since is None and key not in self._queue:
                tracked.removed = tracked.labels = False
        if tracked == _Tracked():
            del self._tracked[key]

    def _note_reachability(self, tracked: _Tracked, result: WorkResult, now: float) -> None:
        """Note in `tracked` whether the last attempt has determined the state of a workload.

        If the engine has answered for a container for which it did not answer before, also retry all other containers
        for which it has not answered.
        """
        if result.error is None or result.state is not None:
            was_unreachable, tracked.unreachable_at = tracked.unreachable_at > NEVER, NEVER
            if was_unreachable and result.key[0] == DOCKER:
                for key, other in self._tracked.items():
                    if key[0] == DOCKER and other.unreachable_at > NEVER and not self._queue.is_in_progress(key):
                        self._queue.reset_backoff(key)
                        self._add(key, now)
        elif isinstance(result.error, (DockerUnavailable, NamespaceError)):
            tracked.unreachable_at = now

    def _backoff(self, key: Key, tracked: _Tracked, error: Exception, seconds: float) -> None:
        """Schedule a retry of a workload after `error`, and report the error.

        The pause is INTERVAL, or `seconds` if that is longer. For a container that cannot be connected as its labels
        ask, it grows up to LABELS_PAUSE. `seconds` is how long the failed attempt took.

        An error is not reported again if it was the last one reported for the workload, nor if it is a
        DockerUnavailable while the engine is known to be unavailable. The first error of a workload is not reported if
        the attempt took less than LOCK_PAUSE: the pause is only LOCK_PAUSE then, and the retry may succeed.
        """
        pause = max(INTERVAL, seconds)
        if isinstance(error, DockerUnavailable) and self._queue.is_paused(DOCKER):  # which has been logged
            log.debug("%s", error)
        elif tracked.failure is None and seconds < LOCK_PAUSE:
            # the workload may just be ending: the failure is reported only if it occurs again
            tracked.failure = ""
            pause = LOCK_PAUSE
        else:
            if isinstance(error, LabelsRefused):
                tracked.labels_pause = min(LABELS_PAUSE, 2 * tracked.labels_pause or INTERVAL)
                tracked.labels_holder = error.holder
                pause = max(tracked.labels_pause, seconds)
            text = str(error) if isinstance(error, CalicoError) else f"{type(error).__name__}: {error}"
            if tracked.failure != text and isinstance(error, LabelsRefused):
                tracked.labels_failed = True
                self._report(events.LabelsFailed(key[1], error.name, text))
            elif tracked.failure != text:
                self._report(events.Failure(f"{key[0]} {printable(key[1][:64])}: {text}"))
            tracked.failure = text
        self._queue.back_off(key, self._clock() + pause, self._is_last(key))


def _learn_once(
    report: Callable[[Any], None], host: str, orchestrator: str, learn: Callable[..., None], *arguments: Any
) -> None:
    """Call `learn` with `arguments`: it finds the workloads that an older version of this program has connected here.

    `learn` is a function of learning.py, which notes when it has found all of an orchestrator on this host. Does
    nothing if that is noted already. If `learn` raises a CalicoError, a Failure is reported; if it returns, a Failure
    without `why`, which ends that report. StoreUnavailable and Conflict are not reported, but raised.
    """
    why = None
    try:
        if connected.is_learned(host, orchestrator):
            return
        learn(*arguments)
    except (StoreUnavailable, Conflict):
        raise
    except CalicoError as error:
        why = f"what an older version has connected cannot be learned, and is not re-attached: {error}"
    report(events.Failure(why, f"learning of {orchestrator}"))


# Run by workers


def _reconcile(clock: Callable[[], float], item: WorkItem, datastore: DatastoreClient) -> WorkResult:
    """Reconcile a workload. If `item.labels` is True, then connect the container as its labels ask.

    `clock` is the keeper's clock. Raises nothing: see WorkResult.error.
    """
    found: WorkloadState | None = None
    kept_since: float | None = None

    def may_collect(state: WorkloadState) -> bool:
        nonlocal found, kept_since
        found = state
        if state in (WorkloadState.MISSING, WorkloadState.GONE):
            since = item.missing_since if state is WorkloadState.MISSING else item.gone_since
            is_over = item.removed or clock() >= since + item.grace_time
            kept_since = None if is_over else since
        return kept_since is None

    started = clock()
    actions: list[Action] = []
    failure: Exception | None = None
    unlabelled = False
    try:
        for action in upkeep.reconcile(datastore, *item.key, may_collect, item.removed):
            actions.append(action)  # one by one, to have those done before a failure, too
        if item.removed:
            connected.forget_disconnected(datastore.host, item.key[1])
        elif item.labels:
            labelled = labelling.connect(datastore, item.key[1])
            unlabelled = not labelled.asks
            actions += filter(None, [labelled.action])
    except Exception as error:
        log.debug("traceback", exc_info=not isinstance(error, CalicoError))
        failure = error
    return WorkResult(item.key, actions, failure, found, kept_since, clock() - started, unlabelled)


def _compare_states(
    report: Callable[[Any], None], containers: dict[str, events.Container] | None, datastore: DatastoreClient
) -> Compared:
    """Compare the endpoints of this host's containers with `containers`, the engine's list of containers.

    If `containers` is None, request the list from the engine. Before the comparison, learn what an older version has
    connected (see `_learn_once`). Raises nothing: see Compared.error.
    """
    found: list[Key] = []
    running: list[EndpointId] = []
    refused: set[Key] = set()
    try:
        if containers is None:
            containers = sources.list_containers()
        modes = {id: container.network_mode for id, container in containers.items()}
        _learn_once(report, datastore.host, DOCKER, learning.learn_containers, datastore, modes)
        known = connected.every(datastore.host, DOCKER)
        found += [(DOCKER, id) for id in known if id not in containers]
        _forget_disconnected(datastore.host, containers, known)
        endpoints, unreadable = datastore.readable_endpoints(datastore.host)
        interfaces = {name for _, name in socket.if_nameindex()}
        for id in filter(None, (parse_endpoint(error.key) for error in unreadable)):
            if id.orchestrator == DOCKER and id.workload not in containers:
                found.append((DOCKER, id.workload))
        for endpoint in endpoints:
            if endpoint.id.orchestrator != DOCKER:
                continue
            container = containers.get(endpoint.id.workload)
            is_connected = endpoint.state == "active" and endpoint.id.interface in interfaces
            if (
                container is None
                or container.runs != is_connected
                or (container.name is not None and container.name != endpoint.workload_name)
            ):
                found.append((DOCKER, endpoint.id.workload))
            elif container.runs:
                running.append(endpoint.id)
            if container is not None and endpoint.id.workload not in known:
                refused.add((DOCKER, endpoint.id.workload))
        is_taken = {id for _, id in refused} | known.keys()
        unconnected = {
            id: container.labelled for id, container in containers.items() if container.may_ask and id not in is_taken
        }
    except Exception as error:
        return Compared([], [], error=error)
    return Compared(found, running, frozenset(refused), unconnected)


def _start_again(report: Callable[[Any], None], id: str, datastore: DatastoreClient) -> StartedAgain:
    """Start a container whose start had failed, since it could not be connected: see starting.start_again.

    `report` is called with what was done, if anything. A failure is only logged. Raises nothing.
    """
    try:
        action = starting.start_again(datastore, id)
        if action is not None:
            report(action)
    except StoreUnavailable as error:
        log.debug("%s; container %s is started when the store is back", error, short_id(id))
    except Exception as error:
        log.warning("container %s could not be started again: %s", short_id(id), printable(str(error)))
    return StartedAgain(id)


def _forget_disconnected(host: str, containers: Collection[str], known: Collection[str]) -> None:
    """Remove the files about containers that commands have disconnected (connected.py) if the containers are gone.

    `containers` is the engine's list, `known` are the connected containers. If the list has none of `known`, and none
    of those with such a file, nothing is removed: the engine may not have loaded its data yet. Raises CalicoError.
    """
    noted = connected.disconnected(host)
    if any(id in containers for id in (*noted, *known)):
        for id in noted.difference(containers):
            connected.forget_disconnected(host, id)


def _compare_places(running: list[EndpointId], datastore: DatastoreClient) -> Compared:
    """Find running containers that are not properly attached: see upkeep.misattached.

    `running` are the endpoints of running containers. Raises nothing: see Compared.error.
    """
    try:
        pids = container_pids(id.workload for id in running)
        paths = {id: f"/proc/{pids[id.workload]}/ns/net" for id in running if id.workload in pids}
        return Compared([workload_of(id) for id in upkeep.misattached(paths)], [])
    except Exception as error:
        return Compared([], [], error=error)
