"""Looks after workloads: those that start again, stop, are removed, and what commands that were cut short have left.

What tells of a workload, the engine's events, a namespace's name that comes or goes, an interface that an endpoint
lacks, only makes it be looked at; what is to be done follows from what is found then, under the workload's lock
(upkeep.py). The agent's loop is told.

One thread decides what is looked at and when. The looking is done by a few others, since they wait: for the store, for
the Docker Engine. An engine that hangs, or does so for one container, keeps no namespace waiting.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Callable

from calicoctl.datastore.keys import parse_endpoint
from calicoctl.desired.snapshot import GRACE_TIME
from calicoctl.errors import CalicoError, Conflict, DockerUnavailable, NamespaceError, StoreUnavailable, printable
from calicoctl.felix import events, sources
from calicoctl.workloads import locks, upkeep
from calicoctl.workloads.upkeep import Action
from calicoctl.workloads.workload import DOCKER, NAMESPACE, WorkloadState, container_pids, namespace_at, workload_of

if TYPE_CHECKING:
    from calicoctl.datastore.client import DatastoreClient
    from calicoctl.datastore.keys import EndpointId

log = logging.getLogger("calico.felix")

INTERVAL = 10.0
"""Seconds between two looks at what nothing tells of: changes that were cut short, and what failed before."""

LOCK_PAUSE = 0.5
"""Seconds until a workload that somebody else is changing is looked at again."""

STORE_PAUSE = 1.0
"""Seconds until the store, which could not be asked, is asked again."""

COMPARE_PAUSE = 60.0
"""Seconds until containers are compared with the engine's list again, when that failed."""

COMPARE_INTERVAL = 300.0
"""Seconds between two comparisons: a connection that has died silently brings no event."""

GONE_PAUSE = 30.0
"""Seconds from the removal of an endpoint to a look at what it may have left: another tool may write it anew."""

LANES = {DOCKER: 8, NAMESPACE: 1}
"""How many workloads of an orchestrator are looked at at a time."""

REST = 10.0
"""Seconds from a workload's getting its interface back to the next time, if it only has lost it again."""

END_PATIENCE = 5.0
"""Seconds that what is being done may take when the agent ends; what is cut short then is found by the next agent."""

Key = tuple[str, str]
"""A workload: its orchestrator and its id."""


@dataclass(frozen=True)
class Compare:
    """The store has been read as a whole: compare what workloads hold with what is `expected`.

    That is how many addresses their endpoints list.
    """

    expected: dict[Key, int]


@dataclass(frozen=True)
class Look:
    """A workload's endpoint has no interface, or one that has changed, or, with `gone`, has gone from the store."""

    key: Key
    gone: bool


@dataclass(frozen=True)
class Compared:
    """These containers' endpoints do not go together with what the engine says; or it could not be found out.

    `connected` are those that seem to, whose interfaces may be elsewhere than in the containers.
    """

    keys: list[Key]
    connected: list[EndpointId]
    error: Exception | None = None


@dataclass(frozen=True)
class Order:
    """A workload to look after, and since when it is `away`, or `gone`, if it is; `removed`: the engine said so."""

    key: Key
    removed: bool
    away_since: float
    gone_since: float


@dataclass(frozen=True)
class Looked:
    """A workload has been looked after: what was done, or why it could not be.

    `state` is what has become of it, None where that could not be found out; `kept_since` since when it is kept
    although it is away or gone; `taken` the seconds it took.
    """

    key: Key
    acts: list[Action]
    error: Exception | None
    state: WorkloadState | None
    kept_since: float | None
    taken: float


class _Lane(threading.Thread):
    """Does one task after the other, each given a client of the store, and passes on what comes of it."""

    def __init__(self, datastore: DatastoreClient, tasks: SimpleQueue[Any], tell: Callable[[Any], None]) -> None:
        super().__init__(name="looking at workloads", daemon=True)
        self._datastore = datastore
        self._tasks = tasks
        self._tell = tell

    def run(self) -> None:
        while True:
            self._tell(self._tasks.get()(self._datastore))


class Keeper(threading.Thread):
    """Keeps this host's workloads connected, and forgets those that are no more."""

    def __init__(self, datastore: Callable[[], DatastoreClient], tell: Callable[[Any], None]) -> None:
        """`datastore` makes a client for each thread; `tell` takes each Action that was done, and each Trouble."""
        super().__init__(name="looking after workloads", daemon=True)
        self.inbox: events.Events[Any] = SimpleQueue()
        self.grace_time: float = GRACE_TIME
        """Seconds for which to keep what belongs to a workload that is away, or could not be asked about."""
        self._ready = True
        """Whether the store may be made use of."""
        self._datastore = datastore()
        self._tell = tell
        self._tasks: dict[str, SimpleQueue[Any]] = {orchestrator: SimpleQueue() for orchestrator in LANES}
        self._lanes = [
            _Lane(datastore(), self._tasks[orchestrator], self.inbox.put)
            for orchestrator, count in LANES.items()
            for _ in range(count)
        ]
        self._jobs: dict[Callable[[], None], float] = {self._sweep: 0.0}
        """When to look for what is to be looked at, and how."""
        self._expected: dict[Key, int] = {}
        self._due: dict[Key, float] = {}
        """When to look at which workloads."""
        self._busy: set[Key] = set()
        """Those that are being looked at."""
        self._kept: dict[Key, float] = {}
        """Since when workloads that are away or gone are kept."""
        self._unasked: dict[Key, float] = {}
        """When it could not be found out last what has become of a workload."""
        self._put_off: dict[Key, float] = {}
        """Workloads that something failed for, and when to try again unless something new is told of them."""
        self._locked: dict[Key, float] = {}
        """Since when somebody else has been changing workloads that are to be looked at."""
        self._removed: set[Key] = set()
        """Containers of whose removal the engine has told."""
        self._healed: dict[Key, float] = {}
        self._troubles: dict[Key, str] = {}
        """Workloads that something failed for, and what was told of that."""
        self._swept_for: float = self.grace_time
        self._namespaces: dict[str, tuple[int, int] | None] = {}
        """What was last seen at the paths of namespaces, by workload."""
        self._containers: dict[str, events.Container] | None = None
        """The engine's last list of its containers, by id. None: it is to be asked."""
        self._engine_away: bool | None = None
        """Whether the engine cannot be asked; None: it has not told of its containers yet."""
        self._engine_back = float("-inf")
        """Since when the engine can be asked; long ago, unless containers may have been unknown to it before."""
        self._rest_until = 0.0
        self._alive = True

    def look_at(self, id: EndpointId, gone: bool = False) -> None:
        """Have the workload of an endpoint looked at: its interface or name is missing or changed, or it has `gone`."""
        key = workload_of(id)
        if upkeep.is_managed(*key):
            self.inbox.put(Look(key, gone))

    def set_ready(self, ready: bool) -> None:
        """Say whether the store may be made use of."""
        if ready != self._ready:
            self._ready = ready
            self.inbox.put(None)

    def compare(self, expected: dict[Key, int]) -> None:
        """Have all workloads compared with the store, which has been read as a whole; see Compare."""
        self.inbox.put(Compare(expected))

    def begin(self, expected: dict[Key, int]) -> None:
        """Start, and compare all workloads with the store; see Compare. The engine will list its containers."""
        self._expected = expected
        self._jobs[self._scan] = 0.0
        sources.EngineEvents(self.inbox).start()
        sources.MountEvents(self.inbox).start()
        for lane in self._lanes:
            lane.start()
        self.start()

    def end(self) -> None:
        """End, when what is being done is done; wait for that, but not for long."""
        self._alive = False
        self.inbox.put(None)
        if self.is_alive():
            self.join(END_PATIENCE)

    def run(self) -> None:
        while self._alive or self._busy:
            for item in self._wait():
                self._safely(partial(self._take, item))
            if self._alive and self._ready and time.monotonic() >= self._rest_until:
                self._safely(self._go_round)

    def _safely(self, work: Callable[[], None]) -> None:
        """Do something; whatever fails, go on: to end would leave the host's containers alone."""
        try:
            work()
        except StoreUnavailable as error:
            log.debug("%s; workloads are looked at when it is back", error)
            self._rest_until = time.monotonic() + STORE_PAUSE
        except Exception as error:
            log.debug("where it comes from", exc_info=True)
            self._tell(events.Failure(f"looking after workloads failed ({type(error).__name__}: {error})"))

    def _wait(self) -> list[Any]:
        """Return what has come; nothing when it is time for something."""
        until = time.monotonic() + INTERVAL
        if self._alive and self._ready:
            startable = (at for key, at in self._due.items() if self._has_lane(key))
            until = max(self._rest_until, min(until, *self._jobs.values(), *startable))
        found: list[Any] = []
        with suppress(Empty):
            found.append(self.inbox.get(timeout=max(0.0, until - time.monotonic())))
            while True:
                found.append(self.inbox.get_nowait())
        return found

    def _take(self, item: Any) -> None:
        now = time.monotonic()
        if isinstance(item, Looked):
            self._looked(item)
        elif isinstance(item, Look) and item.gone:
            self._look(item.key, now + GONE_PAUSE)
        elif isinstance(item, Look):
            # a workload may take its interface away again and again
            self._look(item.key, max(now, self._healed.get(item.key, float("-inf")) + REST))
        elif isinstance(item, events.ContainerChanged):
            key = (DOCKER, item.id)
            if item.removed and upkeep.is_managed(*key):
                self._removed.add(key)
                self._kept.pop(key, None)
            self._look(key, now)
        elif isinstance(item, events.EngineListed):
            if self._engine_away:
                log.info("the Docker Engine can be asked again")
            # one that knows none of ours may have been started before its data was there
            if self._engine_away or not any((DOCKER, id) in self._expected for id in item.containers):
                self._engine_back = now
            self._engine_away = False
            self._containers = item.containers
            self._jobs[self._compare] = now
        elif isinstance(item, events.EngineAway):
            self._engine_away = True
            log.info("%s; what belongs to containers is kept", item.why)
        elif isinstance(item, events.MountsChanged):
            self._jobs[self._sweep] = now
        elif isinstance(item, Compare):
            self._expected, self._containers = item.expected, None
            self._jobs |= {self._scan: now, self._compare: now}
        elif isinstance(item, Compared):
            self._compared(item)
        elif isinstance(item, events.ThreadDied):
            self._tell(item)

    def _look(self, key: Key, at: float) -> None:
        """Have a workload looked at, since something new was told of it."""
        if upkeep.is_managed(*key):
            self._due[key] = min(at, self._due.get(key, at))

    def _look_again(self, key: Key, at: float) -> None:
        """Have a workload looked at, but not before it is to be tried again."""
        self._look(key, max(at, self._put_off.get(key, at)))

    def _go_round(self) -> None:
        """Do what it is time for. Raises StoreUnavailable."""
        now = time.monotonic()
        for job, at in list(self._jobs.items()):
            if at > now:
                continue
            self._jobs[job] = now + INTERVAL  # again then, should it fail
            try:
                job()
            except StoreUnavailable:
                self._jobs[job] = now
                raise
        # those that failed before do not keep others waiting
        for key, at in sorted(self._due.items(), key=lambda item: (item[0] in self._put_off, item[1])):
            if at <= now and self._has_lane(key):
                del self._due[key]
                self._busy.add(key)
                self._tasks[key[0]].put(partial(self._look_after, self._order(key)))

    def _has_lane(self, key: Key) -> bool:
        """Tell whether a workload can be looked at now: not while it is already, or as many as may be are.

        Nor does it make sense to ask an engine that is away; when it is there, it lists all containers.
        """
        if key in self._busy or (key[0] == DOCKER and self._engine_away is not False):
            return False
        return sum(busy[0] == key[0] for busy in self._busy) < LANES[key[0]]

    # What is to be looked at

    def _scan(self) -> None:
        """Find what may be wrong in the store when the agent starts: nobody has told of it."""
        now = time.monotonic()
        totals = self._datastore.ipam.handle_totals()
        for handle, total in totals.items():
            orchestrator, _, workload = handle.partition(".")
            if total != self._expected.get((orchestrator, workload), 0):
                self._look((orchestrator, workload), now)
        remembered = locks.remembered(self._datastore.host, NAMESPACE)
        connected = {}
        for endpoint in self._datastore.readable_endpoints(self._datastore.host)[0]:
            orchestrator, workload = workload_of(endpoint.id)
            if orchestrator != NAMESPACE:
                continue
            if endpoint.state == "active" and workload in remembered:
                connected[endpoint.id] = remembered[workload]
            else:
                self._look((NAMESPACE, workload), now)
        for id in upkeep.misattached(connected):
            self._look(workload_of(id), now)
        del self._jobs[self._scan]

    def _compare(self) -> None:
        """Have the endpoints of this host's containers compared with what the engine says."""
        if self._engine_away is False:  # else it will list them anew
            self._tasks[DOCKER].put(partial(_compare, self._containers))
        self._containers = None
        self._jobs[self._compare] = time.monotonic() + COMPARE_INTERVAL

    def _compared(self, item: Compared) -> None:
        now = time.monotonic()
        for key in item.keys:
            self._look(key, now)
        if item.connected:
            self._tasks[DOCKER].put(partial(_compare_places, item.connected))
        if item.error is None:
            for key in self._due:
                if key[0] == DOCKER and key in self._put_off:
                    self._due[key] = now
        elif isinstance(item.error, StoreUnavailable):
            self._jobs[self._compare] = now + STORE_PAUSE
        elif not self._engine_away:
            self._jobs[self._compare] = now + COMPARE_PAUSE
            raise item.error

    def _sweep(self) -> None:
        """Find changes that were cut short, and namespaces that have come or gone."""
        now = time.monotonic()
        host = self._datastore.host
        for orchestrator in (DOCKER, NAMESPACE):
            locks.remove_stale(host, orchestrator)
            for id in locks.interrupted(host, orchestrator):
                self._look_again((orchestrator, id), now)
        before, self._namespaces = self._namespaces, {}
        for id, path in locks.remembered(host, NAMESPACE).items():
            try:
                seen = self._namespaces[id] = namespace_at(path)
            except NamespaceError:
                if id in before:
                    self._namespaces[id] = before[id]
                continue
            if seen != before.get(id, seen):
                self._look((NAMESPACE, id), now)
            elif seen is None:
                self._look_again((NAMESPACE, id), now)
        if self.grace_time != self._swept_for:
            self._swept_for = self.grace_time
            for key, since in self._kept.items():
                self._look_again(key, since + self.grace_time)
        self._healed = {key: at for key, at in self._healed.items() if now < at + REST}

    # One workload

    def _order(self, key: Key) -> Order:
        """Return what is to be known to look after a workload.

        One that the engine itself says is gone is not kept at all, unless it could not be asked before.
        """
        now = time.monotonic()
        unasked = self._unasked.get(key, float("-inf"))
        gone_since = max(unasked, self._kept.get(key, float("-inf")))
        if key[0] == DOCKER:
            gone_since = max(gone_since, self._engine_back)
        return Order(key, key in self._removed, max(unasked, self._kept.get(key, now)), gone_since)

    def _look_after(self, order: Order, datastore: DatastoreClient) -> Looked:
        """Look after a workload; for a lane."""
        found: WorkloadState | None = None
        kept_since: float | None = None

        def may_collect(state: WorkloadState) -> bool:
            nonlocal found, kept_since
            found = state
            if state in (WorkloadState.MISSING, WorkloadState.GONE):
                since = order.away_since if state is WorkloadState.MISSING else order.gone_since
                is_over = order.removed or time.monotonic() >= since + self.grace_time
                kept_since = None if is_over else since
            return kept_since is None

        started = time.monotonic()
        acts: list[Action] = []
        failure: Exception | None = None
        try:
            for act in upkeep.reconcile(datastore, *order.key, may_collect, order.removed):
                acts.append(act)  # one by one: also those before something fails
        except Exception as error:
            log.debug("where it comes from", exc_info=not isinstance(error, CalicoError))
            failure = error
        return Looked(order.key, acts, failure, found, kept_since, time.monotonic() - started)

    def _looked(self, item: Looked) -> None:
        """Note when to look at a workload again, and tell what was done."""
        key, now = item.key, time.monotonic()
        self._busy.discard(key)
        self._put_off.pop(key, None)
        for act in item.acts:
            if act.kind == upkeep.REATTACHED:
                self._healed[key] = now
            self._tell(act)
        if item.kept_since is not None:
            self._kept[key] = item.kept_since
            self._look(key, item.kept_since + self.grace_time)
        elif item.error is None or item.state in (WorkloadState.RUNNING, WorkloadState.STOPPED):
            self._kept.pop(key, None)
        if item.state is WorkloadState.MISSING:
            self._namespaces[key[1]] = None  # so that its coming back is seen, be it with the number that it had
        if item.error is None or item.state is not None:
            if self._unasked.pop(key, None) is not None and key[0] == DOCKER:
                self._try_others(now)
        elif isinstance(item.error, (DockerUnavailable, NamespaceError)):
            self._unasked[key] = now
        if not isinstance(item.error, Conflict):
            self._locked.pop(key, None)
        if isinstance(item.error, Conflict) and now < self._locked.setdefault(key, now) + locks.PATIENCE:
            self._look(key, now + LOCK_PAUSE)
        elif isinstance(item.error, StoreUnavailable):
            self._look(key, now)
            raise item.error
        elif item.error is not None:
            self._fail(key, item.error, item.taken)
        else:
            self._troubles.pop(key, None)
            if item.kept_since is None and key not in self._due:
                self._removed.discard(key)

    def _try_others(self, now: float) -> None:
        """Look at the containers that could not be asked about: for one of them, the engine has answered now."""
        for key in self._unasked:
            if key[0] == DOCKER and key not in self._busy:
                self._put_off.pop(key, None)
                self._look(key, now)

    def _fail(self, key: Key, error: Exception, taken: float) -> None:
        """Try again later what could not be done for a workload, the later the longer it took; tell of it once.

        What fails at once may be because the workload has just ended: it is tried again before it is told of.
        """
        pause = max(INTERVAL, taken)
        told = self._troubles.get(key)
        if isinstance(error, DockerUnavailable) and self._engine_away:  # which was told of
            log.debug("%s", error)
        elif told is None and taken < LOCK_PAUSE:
            self._troubles[key] = ""
            pause = LOCK_PAUSE
        else:
            text = str(error) if isinstance(error, CalicoError) else f"{type(error).__name__}: {error}"
            if told != text:
                self._tell(events.Failure(f"{key[0]} {printable(key[1][:64])}: {text}"))
            self._troubles[key] = text
        self._put_off[key] = time.monotonic() + pause
        self._look(key, self._put_off[key])


def _compare(containers: dict[str, events.Container] | None, datastore: DatastoreClient) -> Compared:
    """Compare the endpoints of this host's containers with the engine's list, or with a new one; for a lane."""
    found: list[Key] = []
    connected: list[EndpointId] = []
    try:
        endpoints, unreadable = datastore.readable_endpoints(datastore.host)
        if containers is None:
            containers = sources.list_containers()
        interfaces = {name for _, name in socket.if_nameindex()}
        for id in filter(None, (parse_endpoint(problem.key) for problem in unreadable)):
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
                connected.append(endpoint.id)
    except Exception as error:
        return Compared([], [], error)
    return Compared(found, connected)


def _compare_places(connected: list[EndpointId], datastore: DatastoreClient) -> Compared:
    """Find, of containers that run and have their interfaces, those whose are not inside, or not sound; for a lane."""
    try:
        pids = container_pids(id.workload for id in connected)
        paths = {id: f"/proc/{pids[id.workload]}/ns/net" for id in connected if id.workload in pids}
        return Compared([workload_of(id) for id in upkeep.misattached(paths)], [])
    except Exception as error:
        return Compared([], [], error)
