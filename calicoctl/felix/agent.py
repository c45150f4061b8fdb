"""The agent's loop: receives events, and has the managers drive the kernel to the desired state.

An event only marks what is dirty (the loop is level-triggered). The managers compute from the snapshot of the store,
and from the state of the kernel, what must be done. The order in which they are applied is a security property: see
`_apply`, and docs/agent.md.

This module runs in one thread. Other threads wait for changes (sources.py), list connections (dataplane/conntrack.py),
run BIRD (bgp/manager.py), write to the store (report.py), reconcile workloads (workload_keeper.py), and reconcile the
host's own settings and firewall (dataplane/host.py).
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

from calicoctl import __version__, proc
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.keys import HOSTS, READY
from calicoctl.desired.snapshot import Dirty, Snapshot
from calicoctl.errors import CalicoError, is_shortage
from calicoctl.felix import command_server, events, process, report, shortage, sources
from calicoctl.felix.bgp.instance import Instance
from calicoctl.felix.bgp.manager import BgpManager, BgpThread
from calicoctl.felix.dataplane.connection_limit import ConnectionLimit
from calicoctl.felix.dataplane.conntrack import Conntrack
from calicoctl.felix.dataplane.conntrack_manager import ConntrackManager
from calicoctl.felix.dataplane.drops_manager import DropsManager
from calicoctl.felix.dataplane.endpoint_manager import EndpointManager
from calicoctl.felix.dataplane.host import HostReconciler
from calicoctl.felix.dataplane.manager import Context, Manager
from calicoctl.felix.dataplane.nft import Nft
from calicoctl.felix.dataplane.packet_log import PacketLog
from calicoctl.felix.dataplane.policy_manager import PolicyManager
from calicoctl.felix.dataplane.port_monitor import PortMonitor
from calicoctl.felix.dataplane.routes import Routes
from calicoctl.felix.dataplane.sysctls import HostSettings
from calicoctl.felix.dataplane.vxlan import Vxlan
from calicoctl.felix.dataplane.vxlan_manager import VxlanManager
from calicoctl.felix.drop_log import DropLog, DropServer
from calicoctl.felix.health import Health
from calicoctl.felix.local_etcd import LocalEtcd
from calicoctl.felix.metrics import Metrics
from calicoctl.felix.network_monitor import NetworkMonitor
from calicoctl.felix.plugin_process import PluginProcess
from calicoctl.felix.process import Options
from calicoctl.felix.report import EndpointStatuses, ReportFile, StoreReporter
from calicoctl.felix.workload_keeper import WorkloadKeeper
from calicoctl.output import first_few
from calicoctl.workloads.upkeep import Action

log = logging.getLogger("calico.felix")

TICK = 10.0
"""Seconds between two retries of operations that failed."""

RESYNC_INTERVAL = 300.0
"""Seconds between two resyncs of the managers with the kernel."""

SERVERS_PATIENCE = 3.0
"""The maximum number of seconds for which the agent's start waits until the names of etcd's members are resolved."""

LOG_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
LOG_LEVELS |= {"critical": logging.CRITICAL, "none": logging.CRITICAL + 10}


PRIORITY = -5
"""The scheduling priority of the agent and of what it starts, as nice(1) counts it: what a busy host runs besides, many
commands for example, must not make policy late."""


def run(host: str, options: Options) -> None:
    """Run the host's agent in this process until it receives SIGTERM, SIGINT or SIGHUP. Log why it ends.

    Raises CalicoError if the agent cannot start (for example, because another agent runs), if a thread that the agent
    needs has died, or if an operation raises OSError. Any other exception of `Agent.run` is raised unchanged.
    """
    with process.only_one(host) as killed:
        process.log_to(options.log_dir)
        if killed is not None:
            log.info("the agent before (process %s) was killed, or crashed", killed)
        try:
            _run(host, options)
        except CalicoError as error:
            log.critical("the agent ends: %s", error)
            raise
        except BaseException:
            log.critical("the agent ends of an internal error", exc_info=True)
            raise


def _run(host: str, options: Options) -> None:
    from pyroute2.iproute.linux import IPRoute

    with suppress(PermissionError):  # in a container, for example
        os.setpriority(os.PRIO_PROCESS, 0, min(PRIORITY, os.getpriority(os.PRIO_PROCESS, 0)))
    if options.local_etcd:
        LocalEtcd(host, options.log_dir or process.DEFAULT_LOG_DIR).supervise()
    if options.libnetwork:
        PluginProcess(host, options.log_dir or process.DEFAULT_LOG_DIR).supervise()
    command_server.supervise(host)
    queue: events.Events[Any] = SimpleQueue()
    with IPRoute() as netlink:
        conntrack = Conntrack(queue.put)
        agent = Agent(
            partial(DatastoreClient.from_environment, shared=False),  # for several threads
            Drivers(
                Nft(),
                Routes(netlink),
                conntrack,
                Vxlan(netlink),
                BgpThread(Instance(host), options.bgp, queue.put),
            ),
            queue,
            proc.notify_ready,
            options,
        )
        conntrack.start()
        agent.run()


def _pending(event: Any) -> list[Any]:
    """Return a list of the event alone; if it is a StorePending, take and return the changes that wait instead."""
    return event.take() if isinstance(event, events.StorePending) else [event]


@dataclass(frozen=True)
class Drivers:
    """The drivers through which the managers read and change the kernel and BIRD."""

    nft: Nft
    routes: Routes
    conntrack: Conntrack
    vxlan: Vxlan
    bgp: BgpThread


# more than 400 lines: the loop, with one short method for each kind of event
class Agent:
    """The agent of one host. `run` is its loop."""

    def __init__(
        self,
        datastore: Callable[..., DatastoreClient],
        drivers: Drivers,
        queue: events.Events[Any],
        ready: Callable[[], None],
        options: Options,
    ):
        """`datastore` creates a client of the store, for use by one thread.

        The argument of `datastore`, if any, is how many seconds to wait for the store. The drivers put their events
        into `queue`. `ready` is called once, when the first snapshot is in the kernel and BIRD is settled (see
        BgpManager.is_settled). Raises CalicoError if `datastore` does.
        """
        client = datastore()
        self._datastore = datastore
        self._events = queue
        self._snapshot = Snapshot(client.host)
        self._unread: set[str] = set(client.followed())
        """Directories of the store that have not been read yet."""
        self._health = Health(client.host, __version__, asdict(options), frozenset(self._unread))
        self._health.users = self._snapshot.topology.users
        self._ready: Callable[[], None] | None = ready
        self._reporter = StoreReporter(datastore(report.PATIENCE), self._health, queue.put)
        self._file = ReportFile(process.report_file(client.host))
        self._kernel_events = sources.KernelEvents(queue)
        self._network = NetworkMonitor(self._snapshot, self._health, self._kernel_events.gateways_pending.clear)
        self._keeper = WorkloadKeeper(datastore, queue.put)
        self._host = HostReconciler(HostSettings(process.settings_file(client.host)), queue.put)
        self._statuses = EndpointStatuses(
            self._snapshot, self._health, self._reporter.set, lambda id: self._keeper.enqueue(id, deleted=True)
        )
        context = Context(self._snapshot, self._health, self._statuses)
        self._policy = PolicyManager(context, drivers.nft, drivers.vxlan.states)
        self._drops = DropLog()
        drops = DropsManager(context, drivers.nft, self._drops)
        self._metrics = Metrics(self._health, options.metrics_port, drops.counted)
        self._bgp = BgpManager(context, drivers.bgp)
        self._forwarding: list[Manager] = [
            ConnectionLimit(context, drivers.nft),
            EndpointManager(context, drivers.routes, self._keeper.enqueue),
            VxlanManager(context, drivers.vxlan, queue.put),
            self._bgp,
            PortMonitor(context, self._policy, drivers.nft),
            drops,
            # a new manager goes here
        ]
        """The managers that make the host forward packets. They are applied only while policy is in the kernel."""
        self._conntrack = ConntrackManager(context, self._policy, drivers.conntrack)
        self._tick_at = 0.0
        self._resync_at = time.monotonic() + RESYNC_INTERVAL

    @property
    def _managers(self) -> list[Manager]:
        return [self._policy, *self._forwarding, self._conntrack]

    def run(self) -> None:
        """Start the threads, and reconcile until SIGTERM, SIGINT or SIGHUP is received.

        Then have the threads that change workloads, the host or the store end, and remove this host's status from the
        store; what is in the kernel stays. Raises CalicoError if a thread that the agent needs has died. Exceptions of
        the managers' first resync are raised unchanged.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._stop)
        log.info("agent of host %s starts, version %s, process %d", self._snapshot.host, __version__, self._health.pid)
        # listen before reading, so that no change is lost between the two
        self._kernel_events.start()
        sources.FirewallEvents(self._events).start()
        PacketLog(self._events.put).start()
        DropServer(self._snapshot.host, self._drops).start()
        servers = sources.ServerEvents(self._datastore().members, self._events)
        servers.start()
        for manager in self._managers:
            manager.resync()
        servers.known.wait(SERVERS_PATIENCE)
        for directory in sorted(self._unread):
            sources.StoreEvents(self._datastore(), directory, self._events).start()
        self._reporter.start()
        try:
            while self.step():
                pass
        finally:
            self._keeper.stop()
            self._host.end()
            self._count_last_actions()
            self._reporter.end()
        log.info("agent ends; its tables, routes and settings stay")

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._events.put(events.Stop())

    def _count_last_actions(self) -> None:
        """Count the actions of the WorkloadKeeper that are still in the queue when the loop has ended."""
        with suppress(Empty):
            while True:
                event = self._events.get_nowait()
                if isinstance(event, Action):
                    self._handle(event)

    def step(self) -> bool:
        """Wait until events arrive or work is due, then run one round of the loop. Return False if the agent must end.

        Raises CalicoError if a thread that the agent needs has died.
        """
        # ready is called in the round after the first update, so that the report has the host's own failures by then
        is_ready = self._ready is not None and self._health.first_update and self._bgp.is_settled
        found = self._wait(0.0 if is_ready else self._next_at())
        for event in chain.from_iterable(map(_pending, found)):
            if isinstance(event, events.ThreadDied):
                raise CalicoError(event.why)
            try:
                self._handle(event)
            except Exception as error:
                self._on_unusable(event, error)
        if any(isinstance(event, events.Stop) for event in found):
            return False
        self._reconcile()
        self._keeper.set_ready(self._may_apply())
        self._health.waiting_for = self._waiting_for()
        self._health.problems, self._health.skipped = self._snapshot.problems, self._snapshot.skipped
        self._health.unread = self._snapshot.unread
        if self._events.empty() or self._file.is_due or is_ready:
            self._file.write(self._health, at_once=is_ready)
        if is_ready and self._ready is not None:
            self._ready()  # now that the report can be read
            self._ready = None
        return True

    def _next_at(self) -> float:
        """Return the time (monotonic) at which the next round begins at the latest, even if no event arrives."""
        due = [self._tick_at]
        if self._policy.retry_at is not None and self._may_apply():
            due.append(self._policy.retry_at)
        due += [source.due_at for source in (self._network, self._file) if source.due_at is not None]
        if self._may_apply():
            due += [manager.due_at for manager in self._forwarding if manager.due_at is not None]
        return min(due)

    def _wait(self, until: float) -> list[Any]:
        """Wait until an event arrives, or until the time `until` (monotonic).

        Return all events that have arrived; an empty list if none has arrived by the time `until`.
        """
        found: list[Any] = []
        with suppress(Empty):
            found.append(self._events.get(timeout=max(0.0, until - time.monotonic())))
            for _ in range(self._events.qsize()):
                found.append(self._events.get_nowait())
        return found

    def _may_apply(self) -> bool:
        """Return whether the kernel may be driven to the snapshot.

        That is so if the whole store has been read, the store is ready, and no other agent reports for this host.
        Before the first update, directories that are too large must not hide what this host needs (Snapshot.lacking):
        it would be taken for deleted.
        """
        return self._waiting_for() is None and self._health.replaced is None

    def _waiting_for(self) -> str | None:
        if self._unread:
            return "the store to be read"
        if not self._snapshot.ready:
            return "the store to be ready (/calico/v1/Ready is not true)"
        if not self._health.first_update and self._snapshot.lacking is not None:
            return f"{self._snapshot.lacking}, which is too large to be read"
        return None

    # Events

    def _handle(self, event: Any) -> None:
        if isinstance(event, events.StoreChanged):
            self._snapshot.change(event.change)
            if event.change.key == READY:
                self._reporter.beat_soon()  # which asks whether the data is frozen, and reports that
        elif isinstance(event, events.StoreRead):
            self._on_store_read(event)
        elif isinstance(event, events.WatchRecovered):
            if self._health.store.watch.succeeded(event.directory) and self._health.first_update:
                log.info("the watch of the store works again")
        elif isinstance(event, events.WatchFailed):
            self._on_watch_failed(event)
        elif isinstance(event, events.WritesRecovered):
            self._health.store.writes.succeeded("statuses")
        elif isinstance(event, events.WritesFailed):
            if self._health.store.writes.failed("statuses", event.why, event.since):
                self._health.error(f"statuses cannot be written: {event.why}")
        elif isinstance(event, events.Replaced):
            self._on_replaced(event.why)
        elif isinstance(event, Action):
            self._health.count(event)
            log.info("%s", event.text)
        elif isinstance(event, events.Failure):
            self._health.record(event)
        elif isinstance(event, events.LabelsFailed):
            self._health.record_labels(event)
        else:
            self._on_kernel_event(event)

    def _on_unusable(self, event: Any, error: Exception) -> None:
        """Continue after the handling of `event` has raised `error`: report the error, and resync with the kernel soon.

        If the event was a change of the store, the snapshot may be wrong from now on, so the failure is reported until
        the agent is restarted.
        """
        log.debug("traceback:", exc_info=error)
        what = type(event).__name__
        why = f"the agent had an internal error with an event, {what} ({type(error).__name__}: {error})"
        of_store = isinstance(event, (events.StoreChanged, events.StoreRead))
        advice = "; 'calicoctl node restart' has the store read again"
        self._health.record(events.Failure(why + advice, what) if of_store else events.Failure(why))
        self._resync_at = 0.0
        for manager in self._managers:
            manager.on_event(events.KernelEventsLost())

    def _on_kernel_event(self, event: Any) -> None:
        self._network.on_event(event)
        for manager in self._managers:
            manager.on_event(event)
        if isinstance(event, events.KernelEventsLost):
            log.warning("events of the kernel were lost; resyncing")
            self._resync()
        elif isinstance(event, events.TablesChanged) and event.names & {"filter", ""}:
            self._host.firewall_changed()

    def _on_store_read(self, event: events.StoreRead) -> None:
        first = event.directory in self._unread
        self._unread.discard(event.directory)
        if not first:
            self._health.resyncs += 1
            log.info("resynced with the store below %s", event.directory)
        if self._health.store.reads.succeeded(event.directory) and not first:
            self._reporter.resync()
        self._snapshot.replace(event.directory, event.entries)
        if self._health.first_update and HOSTS.startswith(event.directory):
            self._keeper.resync(self._snapshot.addresses_listed())

    def _on_watch_failed(self, event: events.WatchFailed) -> None:
        if self._health.store.watch.failed(event.directory, event.why, event.since):
            self._health.error(f"{event.why}; the kernel is left as it is")
        if not event.read and self._health.store.reads.failed(event.directory, event.why, event.since):
            self._reporter.beat_soon()  # to find out at once whether it can be written

    def _on_replaced(self, why: str | None) -> None:
        """Stop changing endpoints and the kernel, since another agent reports for this host.

        `why` is a sentence about the other agent. If `why` is None, this agent reports for this host again, and
        resumes.
        """
        self._health.replaced = why
        if why is not None:
            self._health.error(why)
            return
        log.info("this agent reports for host %s again", self._snapshot.host)
        self._reporter.resync()
        if self._health.first_update:
            self._keeper.resync(self._snapshot.addresses_listed())

    def _tick(self) -> None:
        self._tick_at = time.monotonic() + TICK
        self._health.record(events.Failure(shortage.descriptors_lacking(), "descriptors"))
        self._metrics.serve()
        for manager in self._managers:
            manager.on_event(events.Tick())
        if time.monotonic() >= self._resync_at:
            self._resync()

    def _resync(self) -> None:
        """Have the managers, the NetworkMonitor and the StoreReporter read again what they have read before.

        The managers read the state of the kernel, the NetworkMonitor the host's addresses and routes, and the
        StoreReporter the statuses in the store. If a manager fails, the resync is repeated at the next tick.
        """
        self._resync_at = time.monotonic() + RESYNC_INTERVAL
        self._reporter.resync()
        self._network.resync()
        try:
            for manager in self._managers:
                manager.resync()
        except Exception as error:  # the library's, of several kinds
            self._resync_at = 0.0
            self._health.error(f"resync with the kernel failed ({type(error).__name__}: {error})")

    # Applying

    def _reconcile(self) -> None:
        """Do the tick (see TICK) and read the host's network if these are due, then drive the kernel to the snapshot.

        While the snapshot must not be applied (see _may_apply), have the managers repair what they can without it (see
        Manager.restore) instead. Raises nothing: after an exception, which may be an internal error, the managers
        resync with the kernel.
        """
        try:
            if time.monotonic() >= self._tick_at:
                self._tick()
            self._network.read_if_due()
            if not self._may_apply():
                self._conntrack.discard_listings()
                for manager in self._managers:
                    manager.restore()
                return
            self._apply()
            if self._conntrack.verify_listings():
                self._statuses.publish()
                self._apply()  # the endpoints whose addresses are no longer pending
        except Exception as error:
            # an internal error must not end the agent: it starts over, from the state of the store and of the kernel
            log.debug("traceback:", exc_info=True)
            what = "waits" if is_shortage(error) else "had an internal error"
            self._health.error(f"the agent {what} ({type(error).__name__}: {error})")
            self._policy.invalidate(TICK)
            for manager in self._managers:
                manager.on_event(events.KernelEventsLost())
            self._resync()

    def _apply(self) -> None:
        """Drive the kernel to the snapshot, in five steps.

        The steps are: 1. make addresses that are new to an endpoint pending; 2. program policy; 3. program routes, and
        whatever else makes the host forward; 4. have open connections checked, to end those that policy denies now;
        5. publish the statuses of endpoints. At the agent's start, step 4 comes before step 3.

        Steps 2 to 5 are skipped if no manager has anything to apply, and while the PolicyManager waits after a failure.
        If step 2 fails, only step 5 follows.
        The order of the steps ensures that packets which policy denies never pass: see docs/agent.md.
        """
        dirty = self._snapshot.take_dirty()
        # 1. addresses that are new to an endpoint are pending until their denied connections have been ended
        self._conntrack.defer_new_addresses(dirty)
        for manager in self._managers:
            manager.on_event(dirty)
        self._apply_settings(dirty)
        if self._health.labels_failed and dirty:
            any_may_succeed = dirty.pools or dirty.profiles or dirty.topology
            self._keeper.retry_labels(None if any_may_succeed else frozenset(dirty.endpoints))
        if dirty.topology:
            self._publish_macs()
            self._check_registration()
            self._check_peers()
        if self._policy.is_backing_off or not any(manager.needs_apply for manager in self._managers):
            return
        starting = not self._health.first_update
        with self._metrics.apply_time.time():
            # 2. policy, in one nftables transaction
            self._policy.apply()
            if not self._policy.in_sync:
                for manager in self._managers:
                    manager.on_event(events.PolicyFailed(str(self._policy.error)))
                self._statuses.publish()
                return
            self._conntrack.mark_unverified()
            if starting:  # step 4 comes first, before the host is made to forward
                self._conntrack.verify_now()
                self._host.forward(self._snapshot.topology.own(6) is not None)
            # 3. routes, and whatever else makes the host forward
            for manager in self._forwarding:
                manager.apply()
            # 4. open connections: they are listed, and those that policy denies now are ended later
            self._conntrack.apply()
            # 5. the report
            self._statuses.publish()
        if starting:
            self._on_first_update()

    def _publish_macs(self) -> None:
        """Have the source MACs of this host's packets to other hosts written to the store.

        Do nothing if the store has the same MACs already, or if this host is not registered.
        """
        macs = frozenset().union(*self._snapshot.network.macs.values())
        topology = self._snapshot.topology
        if self._snapshot.host in topology.hosts() and topology.macs.get(self._snapshot.host) != macs:
            self._reporter.publish_macs(macs)

    def _check_registration(self) -> None:
        """Report a failure while this host is not registered. A command on another host may have removed it."""
        host, why = self._snapshot.host, None
        if self._snapshot.ready and host not in self._snapshot.topology.hosts():
            why = (
                f"host {host} is not registered any more, and no other host has a route to it: register it with "
                "'calicoctl node', or remove what is left with 'calicoctl node remove'"
            )
        self._health.record(events.Failure(why, "registration"))

    def _check_peers(self) -> None:
        """Report a failure while no session is possible with some of the BGP peers that are set for this host alone.

        These are peers of an IP version for which this host has no registered address, and peers whose address is one
        of this host's.
        """
        for version, option in ((4, "--ip"), (6, "--ip6")):
            peers, why = self._snapshot.topology.peers_without_session(version), None
            if peers:
                why = (
                    f"there is no session with BGP peer {first_few(peers)}, since this host has no "
                    f"IPv{version} address: register it with 'calicoctl node {option}=ADDRESS', and its other options"
                )
            self._health.record(events.Failure(why, f"bgp peers of IPv{version}"))
        peers, why = self._snapshot.topology.own_peers(), None
        if peers:
            why = (
                f"BGP peer {first_few(peers)} is this host itself, so there is no session with it: remove it with "
                f"'calicoctl node bgp peer remove {peers[0]}'"
            )
        self._health.record(events.Failure(why, "bgp peers that are this host"))

    def _apply_settings(self, dirty: Dirty) -> None:
        if dirty.settings:
            self._keeper.grace_time = self._snapshot.grace_time
            if self._health.first_update:
                self._host.set_ipv6(self._snapshot.topology.own(6) is not None)
            logging.getLogger("calico").setLevel(LOG_LEVELS.get(self._snapshot.log_level, logging.INFO))

    def _on_first_update(self) -> None:
        """Record that the first snapshot is in the kernel, and start the threads that must not start before."""
        self._health.first_update = True
        self._keeper.start(self._snapshot.addresses_listed())
        self._host.check_firewall()
        self._host.start()
        self._reporter.beat_soon()
        log.info("the first snapshot is in the kernel: %d endpoints of this host", len(self._snapshot.local))
