"""Looks after workloads: those that start again, stop, are removed, and what commands that were cut short have left.

A thread of its own, since it waits: for locks, for the Docker Engine, for the store. What tells of a workload, the
engine's events, a namespace's name that comes or goes, an interface that an endpoint lacks, only makes it look; what
is to be done follows from what it finds then, under the workload's lock (upkeep.py). The agent's loop is told.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Callable

from calicoctl import locks, upkeep
from calicoctl.errors import CalicoError, Conflict, DockerUnavailable, NamespaceError, StoreUnavailable
from calicoctl.felix import events
from calicoctl.snapshot import GRACE_TIME
from calicoctl.workload import DOCKER, NAMESPACE, Standing, container_pids, namespace_at, workload_of

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

GONE_PAUSE = 30.0
"""Seconds from the removal of an endpoint to a look at what it may have left: another tool may write it anew."""

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
    """A workload's endpoint has no interface, or, with `gone`, has gone from the store."""

    key: Key
    gone: bool


class Keeper(threading.Thread):
    """Keeps this host's workloads connected, and forgets those that are no more."""

    def __init__(self, datastore: DatastoreClient, tell: Callable[[Any], None]) -> None:
        """`tell` takes what was done (Act), and what could not be (Trouble)."""
        super().__init__(name="looking after workloads", daemon=True)
        self.inbox: events.Events[Any] = SimpleQueue()
        self.grace_time: float = GRACE_TIME
        """Seconds for which to keep what belongs to a workload that is away, or could not be asked about."""
        self.ready = True
        """Whether the store may be made use of."""
        self._datastore = datastore
        self._tell = tell
        self._expected: dict[Key, int] | None = None
        self._due: dict[Key, float] = {}
        """When to look at which workloads."""
        self._kept: dict[Key, float] = {}
        """Since when workloads have been away, or could not be asked about."""
        self._removed: set[Key] = set()
        """Containers of whose removal the engine has told."""
        self._healed: dict[Key, float] = {}
        self._troubles: dict[Key, str] = {}
        """Workloads that something failed for, and what was told of that."""
        self._paths: dict[str, str] = {}
        self._namespaces: dict[str, tuple[int, int] | None] = {}
        """What was last seen at the paths of namespaces, by workload."""
        self._containers: dict[str, bool] | None = None
        """A list of the engine's, not looked at yet: which containers there are, and whether they run."""
        self._engine_away = False
        self._engine_back = float("-inf")
        self._sweep_at = 0.0
        self._rest_until = 0.0
        self._alive = True

    def look_at(self, id: EndpointId, gone: bool = False) -> None:
        """Have the workload of an endpoint looked at that has no interface, or has `gone` from the store."""
        key = workload_of(id)
        if upkeep.is_looked_after(*key):
            self.inbox.put(Look(key, gone))

    def compare(self, expected: dict[Key, int]) -> None:
        """Have all workloads compared with the store, which has been read as a whole; see Compare."""
        self.inbox.put(Compare(expected))

    def begin(self, expected: dict[Key, int]) -> None:
        """Start, and compare all workloads with the store; see Compare. The engine will list its containers."""
        self._expected = expected
        events.EngineEvents(self.inbox).start()
        events.MountEvents(self.inbox).start()
        self.start()

    def end(self) -> None:
        """End, when what is being done is done; wait for that, but not for long."""
        self._alive = False
        self.inbox.put(None)
        if self.is_alive():
            self.join(END_PATIENCE)

    def run(self) -> None:
        while self._alive:
            for item in self._wait():
                self._take(item)
            if not self.ready or time.monotonic() < self._rest_until:
                continue
            try:
                self._go_round()
            except StoreUnavailable as error:
                log.debug("%s; workloads are looked at when it is back", error)
                self._rest_until = time.monotonic() + STORE_PAUSE
            except Exception as error:  # to end would leave the host's containers alone
                log.debug("where it comes from", exc_info=True)
                self._tell(events.Trouble(f"looking after workloads failed ({type(error).__name__}: {error})"))
                self._rest_until = time.monotonic() + INTERVAL

    def _wait(self) -> list[Any]:
        """Return what has come; nothing when it is time for something."""
        until = min([self._sweep_at, *self._due.values()]) if self.ready else time.monotonic() + INTERVAL
        until = max(until, self._rest_until)
        found: list[Any] = []
        with suppress(Empty):
            found.append(self.inbox.get(timeout=max(0.0, until - time.monotonic())))
            while True:
                found.append(self.inbox.get_nowait())
        return found

    def _take(self, item: Any) -> None:
        now = time.monotonic()
        if isinstance(item, Look) and item.gone:
            self._look(item.key, now + GONE_PAUSE)
        elif isinstance(item, Look):
            # a workload may take its interface away again and again
            self._look(item.key, max(now, self._healed.get(item.key, float("-inf")) + REST))
        elif isinstance(item, events.ContainerChanged):
            key = (DOCKER, item.id)
            if item.removed and upkeep.is_looked_after(*key):
                self._removed.add(key)
                self._kept.pop(key, None)
            self._look(key, now)
        elif isinstance(item, events.EngineListed):
            if self._engine_away:
                self._engine_away, self._engine_back = False, now
                log.info("the Docker Engine can be asked again")
            self._containers = item.containers
        elif isinstance(item, events.EngineAway):
            self._engine_away = True
            log.info("%s; what belongs to containers is kept", item.why)
        elif isinstance(item, events.MountsChanged):
            self._sweep_at = now
        elif isinstance(item, Compare):
            self._expected = item.expected
            with suppress(DockerUnavailable):  # it will list them when it is back
                self._containers = events.list_containers()
        elif isinstance(item, events.Failed):
            self._tell(item)

    def _look(self, key: Key, at: float) -> None:
        if upkeep.is_looked_after(*key):
            self._due[key] = min(at, self._due.get(key, at))

    def _go_round(self) -> None:
        now = time.monotonic()
        if self._expected is not None:
            self._scan(self._expected)
            self._expected = None
        if self._containers is not None:
            self._compare(self._containers)
            self._containers = None
        if now >= self._sweep_at:
            self._sweep_at = now + INTERVAL
            self._sweep()
        engine_answers = True
        due = [key for key, at in self._due.items() if at <= now]
        # an engine that hangs keeps nobody waiting but its containers
        for key in sorted(due, key=lambda key: (key[0] == DOCKER, self._due[key])):
            if not self._alive:
                return
            if key[0] == DOCKER and not engine_answers:
                self._put_off(key)
                continue
            try:
                self._look_after(key)
            except DockerUnavailable as error:
                engine_answers = False
                log.debug("%s", error)
                self._put_off(key)
            except StoreUnavailable:
                raise
            except Exception:
                self._put_off(key)  # and the others have their turn
                raise

    # What is to be looked at

    def _scan(self, expected: dict[Key, int]) -> None:
        """Find what may be wrong in the store when the agent starts: nobody has told of it."""
        now = time.monotonic()
        totals = self._datastore.ipam.handle_totals()
        for handle, total in totals.items():
            orchestrator, _, workload = handle.partition(".")
            if total != expected.get((orchestrator, workload), 0):
                self._look((orchestrator, workload), now)
        remembered = locks.names(self._datastore.host, NAMESPACE, {})
        connected = {}
        for endpoint in self._datastore.readable_endpoints(self._datastore.host)[0]:
            orchestrator, workload = workload_of(endpoint.id)
            if orchestrator != NAMESPACE:
                continue
            if endpoint.state == "active" and workload in remembered:
                connected[endpoint.id] = remembered[workload]
            else:
                self._look((NAMESPACE, workload), now)
        self._look_at_misplaced(connected)

    def _compare(self, containers: dict[str, bool]) -> None:
        """Look at the endpoints of this host that do not go together with what the engine lists."""
        now = time.monotonic()
        interfaces = {name for _, name in socket.if_nameindex()}
        connected = []
        for endpoint in self._datastore.readable_endpoints(self._datastore.host)[0]:
            if endpoint.id.orchestrator != DOCKER:
                continue
            runs = containers.get(endpoint.id.workload)
            is_connected = endpoint.state == "active" and endpoint.id.interface in interfaces
            if runs is None or runs != is_connected:
                self._look((DOCKER, endpoint.id.workload), now)
            elif runs:
                connected.append(endpoint.id)
        with suppress(DockerUnavailable):  # it will list them anew when it is back
            pids = container_pids(id.workload for id in connected)
            self._look_at_misplaced(
                {id: f"/proc/{pids[id.workload]}/ns/net" for id in connected if id.workload in pids}
            )
        for key in self._due:
            if key[0] == DOCKER:
                self._due[key] = now

    def _look_at_misplaced(self, paths: dict[EndpointId, str]) -> None:
        """Look at those endpoints whose interface is not in their namespace, whose path is given for each."""
        for id in upkeep.misplaced(paths):
            self._look(workload_of(id), time.monotonic())

    def _sweep(self) -> None:
        """Find changes that were cut short, and namespaces that have come or gone."""
        now = time.monotonic()
        host = self._datastore.host
        for orchestrator in (DOCKER, NAMESPACE):
            locks.clear(host, orchestrator)
            for id in locks.cut(host, orchestrator):
                self._look((orchestrator, id), now)
        self._paths = locks.names(host, NAMESPACE, self._paths)
        before, self._namespaces = self._namespaces, {}
        for id, path in self._paths.items():
            try:
                seen = self._namespaces[id] = namespace_at(path)
            except NamespaceError:
                continue
            if seen != before.get(id, seen) or seen is None:
                self._look((NAMESPACE, id), now)
        for key, since in self._kept.items():
            self._look(key, since + self.grace_time)  # which may have become shorter
        self._healed = {key: at for key, at in self._healed.items() if now < at + REST}

    # One workload

    def _look_after(self, key: Key) -> None:
        """Look at a workload now, and note when to do so again. Raises DockerUnavailable and StoreUnavailable."""
        kept = False

        def may_forget(standing: Standing) -> bool:
            nonlocal kept
            kept = not self._is_over(key, standing)
            return not kept

        try:
            acts = upkeep.look_after(self._datastore, *key, may_forget, key in self._removed)
        except Conflict:
            self._due[key] = time.monotonic() + LOCK_PAUSE
            return
        except (DockerUnavailable, NamespaceError) as error:
            self._kept.setdefault(key, time.monotonic())
            if isinstance(error, DockerUnavailable):
                raise
            self._fail(key, error)
            return
        except StoreUnavailable:
            raise
        except CalicoError as error:
            self._fail(key, error)
            return
        del self._due[key]
        if kept:
            self._due[key] = self._kept[key] + self.grace_time
        else:
            self._kept.pop(key, None)
            self._removed.discard(key)
        self._troubles.pop(key, None)
        for act in acts:
            if act.kind == upkeep.HEALED:
                self._healed[key] = time.monotonic()
            self._tell(act)

    def _fail(self, key: Key, error: CalicoError) -> None:
        """Try again what could not be done for a workload, soon; tell of it once, when it fails again.

        The first time, the workload may just have ended.
        """
        told = self._troubles.get(key)
        if told is None:
            self._troubles[key] = ""
            self._due[key] = time.monotonic() + LOCK_PAUSE
            return
        if told != str(error):
            self._tell(events.Trouble(f"{key[0]} {key[1][:64]}: {error}"))
        self._troubles[key] = str(error)
        self._put_off(key)

    def _put_off(self, key: Key) -> None:
        self._due[key] = time.monotonic() + INTERVAL

    def _is_over(self, key: Key, standing: Standing) -> bool:
        """Tell whether the time is over for which a workload that is away or gone is kept.

        One that the engine itself says is gone is not kept at all, unless it could not be asked before.
        """
        now = time.monotonic()
        if key in self._removed:
            return True
        if standing is Standing.AWAY or (key[0] == DOCKER and self._engine_away):
            since = self._kept.setdefault(key, now)
        else:
            since = self._kept.get(key, self._engine_back if key[0] == DOCKER else float("-inf"))
        self._kept[key] = since
        return now >= since + self.grace_time
