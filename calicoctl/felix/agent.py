"""The agent's loop: what the store wants of this host, and what the kernel has, are kept the same.

Level-triggered: an event only says what to look at again; what to do follows from the snapshot of the store and from
what the kernel has. Order, so that no packet passes that policy denies: for an address that is new here, what
connections it had before; then the tables, in one transaction; then forwarding and routes; then the connections that a
change denies; last the report. See docs/agent.md.

Everything here happens in one thread. Others only wait (events.py), list (conntrack.py) and report (report.py); but
one, which looks after workloads (workload_keeper.py), changes the store and the workloads' interfaces, as a command
would, and another the host's own firewall and settings (dataplane/host.py).
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, Callable

from calicoctl import __version__
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.keys import HOSTS, EndpointId
from calicoctl.desired.snapshot import INACTIVE, LocalEndpoint, Snapshot
from calicoctl.errors import CalicoError, is_shortage
from calicoctl.felix import events, process, report, shortage, sources
from calicoctl.felix.dataplane import conntrack
from calicoctl.felix.dataplane.host import HostKeeper
from calicoctl.felix.dataplane.links import PREFIX, Link, list_links
from calicoctl.felix.dataplane.nft import Nft
from calicoctl.felix.dataplane.routes import Routes
from calicoctl.felix.dataplane.ruleset import Ruleset
from calicoctl.felix.dataplane.sysctls import HostSettings
from calicoctl.felix.local_etcd import LocalEtcd
from calicoctl.felix.metrics import Metrics
from calicoctl.felix.process import Options
from calicoctl.felix.report import Health, ReportFile, Status, StoreReporter
from calicoctl.felix.workload_keeper import WorkloadKeeper
from calicoctl.workloads import host_network
from calicoctl.workloads.upkeep import Action
from calicoctl.workloads.workload import DOCKER, workload_of

log = logging.getLogger("calico.felix")

TICK = 10.0
"""Seconds between two looks at what failed before."""

REVIEW_INTERVAL = 300.0
"""Seconds between two looks at all that the kernel has of every endpoint."""

NETWORK_PAUSE = 0.5
"""Seconds to wait for more changes of routes, at least, before their gateways are read anew."""

LOG_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
LOG_LEVELS |= {"critical": logging.CRITICAL, "none": logging.CRITICAL + 10}


def run(host: str, options: Options) -> None:
    """Be the host's agent until a signal comes. Raises CalicoError."""
    with process.only_one(host):
        process.log_to(options.log_dir)
        if options.local_etcd:
            LocalEtcd(host, options.log_dir or process.DEFAULT_LOG_DIR).supervise()
        Agent(DatastoreClient.from_environment, process.tell_ready, options).run()


@dataclass(frozen=True)
class Newcomer:
    """What is new to an endpoint: addresses, and the number of the question whether connections of them are left."""

    addresses: set[str]
    asked: int


class Agent:
    """The agent of one host. `run` returns when the process is asked to end."""

    def __init__(self, datastore: Callable[..., DatastoreClient], ready: Callable[[], None], options: Options):
        """`datastore` makes a client, one a thread, given the store's patience; see DatastoreClient.from_environment.

        `ready` is called when the first snapshot is in the kernel.
        """
        self._host = datastore().host
        self._events: events.Events[Any] = SimpleQueue()
        self._snapshot = Snapshot(self._host)
        self._unread: set[str] = set(datastore().followed())
        """Directories of the store that have not been read yet."""
        self._health = Health(self._host, __version__, asdict(options), frozenset(self._unread))
        self._ready = ready
        self._metrics = Metrics(self._health, options.metrics_port)
        self._reporter = StoreReporter(datastore(report.PATIENCE), self._health, self._events.put)
        self._file = ReportFile(process.report_file(self._host))
        self._nft = Nft()
        self._ruleset: Ruleset | None = None
        """What is in our tables; None while that is not known."""
        self._last = Ruleset()
        """What was in them when that was known last."""
        self._kernel_events = sources.KernelEvents(self._events)
        self._network_at: float | None = 0.0
        """When to read what this host has of its own; None while nothing of it may have changed."""
        self._network_pause = 0.0
        """Seconds for which to let changes of routes, of which there may be thousands, come together."""
        self._links: dict[str, Link] = {}
        self._unknown: set[str] = set()
        """Interfaces of ours that no record knew at the last tick: a command may be about to write it."""
        self._dirty: set[EndpointId] = set()
        """Local endpoints whose routes are to be looked at."""
        self._failed: set[EndpointId] = set()
        """Local endpoints that could not be programmed; tried again at the next tick."""
        self._newcomers: dict[EndpointId, Newcomer] = {}
        """Local endpoints that wait until nobody else's connections are left of addresses that are new to them."""
        self._admitted: set[EndpointId] = set()
        """Those that have waited long enough."""
        self._unsettled: dict[str, int] = {}
        """Addresses whose connections a change may deny, with the number of the listing that is to be looked at."""
        self._unlisted: set[str] = set()
        """Addresses whose connections could not be listed, or ended; tried again at the next tick."""
        self._readable: set[str] = set()
        """Profiles that exist and whose rules can be read."""
        self._released: set[str] = set()
        """Interfaces that an endpoint has given up."""
        self._lister = conntrack.Lister(self._events.put)
        self._keeper = WorkloadKeeper(datastore, self._events.put)
        self._host_keeper = HostKeeper(HostSettings(process.settings_file(self._host)), self._events.put)
        self._clean_up = True
        """Whether to look for what no endpoint wants."""
        self._unclean = False
        """Whether something of that could not be removed; tried again at the next tick."""
        self._retry_at = 0.0
        self._tick_at = 0.0
        self._review_at = time.monotonic() + REVIEW_INTERVAL
        self._stores = [(datastore(), directory) for directory in sorted(self._unread)]

    def run(self) -> None:
        """Start the threads, and keep the kernel like the store until a signal comes. Raises CalicoError."""
        from pyroute2.iproute.linux import IPRoute

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._stop)
        log.info("the agent of host %s starts, version %s, process %d", self._host, __version__, self._health.pid)
        # listen before reading, so that nothing falls between the two
        self._kernel_events.start()
        sources.FirewallEvents(self._events).start()
        self._lister.start()
        with IPRoute() as netlink:
            self._netlink = netlink
            self._routes = Routes(netlink)
            self._read_kernel(links=True)
            for datastore, directory in self._stores:
                sources.StoreEvents(datastore, directory, self._events).start()
            self._reporter.start()
            try:
                self._loop()
            finally:
                self._keeper.stop()
                self._host_keeper.end()
                self._note_last_acts()
                self._reporter.end()
        log.info("the agent ends; what it has set up stays")

    def _note_last_acts(self) -> None:
        """Note what has been done for workloads since the agent was asked to end."""
        with suppress(Empty):
            while True:
                event = self._events.get_nowait()
                if isinstance(event, Action):
                    self._handle(event)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._events.put(events.Stop())

    def _loop(self) -> None:
        told_ready = False
        while True:
            # in the round after the first update, so that the report has what is wrong with the host itself by then
            is_ready = self._health.first_update and not told_ready
            listings = []
            ends = False
            for event in self._wait(not is_ready):
                if isinstance(event, conntrack.Listed):
                    listings.append(event)  # judged by what the tables hold when all other events are taken in
                else:
                    ends = ends or isinstance(event, events.Stop)
                    self._handle(event)
            if ends:
                return
            now = time.monotonic()
            if now >= self._tick_at:
                self._tick_at = now + TICK
                self._tick()
            if self._network_at is not None and now >= self._network_at:
                self._read_network()
            if self._may_apply():
                try:
                    self._apply(now)
                    if listings:
                        for listing in listings:
                            self._judge(listing)
                        self._apply(now)  # those that have waited for that
                except Exception as error:
                    # what cannot be foreseen must not end the agent: it begins anew with what store and kernel say
                    log.debug("where it comes from", exc_info=True)
                    what = "waits" if is_shortage(error) else "had an internal error"
                    self._health.error(f"the agent {what} ({type(error).__name__}: {error})")
                    self._ruleset, self._retry_at = None, now + TICK
                    self._review()
            else:
                for listing in listings:
                    self._unlisted.update(listing.addresses)
            self._keeper.set_ready(self._may_apply())
            self._health.waiting_for = self._waiting_for()
            self._health.problems = self._snapshot.problems
            if self._events.empty() or self._file.is_due or is_ready:
                self._file.write(self._health)
            if is_ready:
                told_ready = True
                self._ready()  # now that the report can be read

    def _wait(self, patiently: bool) -> list[Any]:
        """Return the events that have come, all of a burst together; none when it is time for something.

        Unless `patiently`, return at once, also where none has come.
        """
        until = self._tick_at if patiently else 0.0
        if self._ruleset is None and self._retry_at and self._may_apply():
            until = min(until, self._retry_at)
        if self._network_at is not None:
            until = min(until, self._network_at)
        found: list[Any] = []
        try:
            found.append(self._events.get(timeout=max(0.0, until - time.monotonic())))
            while True:
                found.append(self._events.get_nowait())
        except Empty:
            return found

    def _may_apply(self) -> bool:
        """Tell whether the store is to be made use of: it has been read, is ready, and no other agent has this host."""
        return not self._unread and self._snapshot.ready and self._health.replaced is None

    def _waiting_for(self) -> str | None:
        if self._unread:
            return "the store to be read"
        return None if self._snapshot.ready else "the store to be ready (/calico/v1/Ready is not true)"

    # Events

    def _handle(self, event: Any) -> None:
        if isinstance(event, events.StoreChanged):
            self._snapshot.change(event.change)
        elif isinstance(event, events.StoreRead):
            self._store_read(event)
        elif isinstance(event, events.StoreFollowed):
            if self._health.watch.succeeded(event.directory) and self._health.first_update:
                log.info("the store can be followed again")
        elif isinstance(event, events.StoreAway):
            if self._health.watch.failed(event.directory, event.why, event.since):
                self._health.error(f"{event.why}; what is set up stays as it is")
            if not event.read and self._health.reads.failed(event.directory, event.why, event.since):
                self._reporter.beat_soon()  # at once: can it be written, then?
        elif isinstance(event, events.StoreWritten):
            self._health.writes.succeeded("statuses")
        elif isinstance(event, events.StoreNotWritten):
            if self._health.writes.failed("statuses", event.why, event.since):
                self._health.error(f"statuses cannot be written: {event.why}")
        elif isinstance(event, events.Replaced):
            self._replaced(event.why)
        elif isinstance(event, events.LinkChanged):
            self._link_changed(event)
        elif isinstance(event, events.RouteGone):
            index = self._routes.forget_route(event.address)
            if index is not None:
                log.warning("somebody else has removed, or replaced, the route to %s; it is set again", event.address)
                for link in self._links.values():
                    if link.index == index:
                        self._look_at(link.name)
        elif isinstance(event, events.AddressesChanged):
            self._network_at = 0.0
        elif isinstance(event, events.GatewaysChanged):
            if self._network_at is None:
                self._network_at = time.monotonic() + self._network_pause
        elif isinstance(event, events.LinksMissed):
            log.warning("events of the kernel were missed: looking at all interfaces")
            self._review()
        elif isinstance(event, events.TablesChanged):
            self._tables_changed(event.names)
        elif isinstance(event, Action):
            self._health.count(event)
            log.info("%s", event.text)
        elif isinstance(event, events.Failure):
            self._health.trouble(event)
        elif isinstance(event, events.ThreadDied):
            raise CalicoError(event.why)

    def _judge(self, listing: conntrack.Listed) -> None:
        """End the connections of a listing that policy denies, and admit the newcomers that have waited for it."""
        if self._ruleset is None:
            self._unlisted.update(listing.addresses)  # to be listed again when the tables are known again
            return
        why = self._end_denied_connections(listing)
        looked_at = [
            id
            for id, newcomer in self._newcomers.items()
            if newcomer.asked <= listing.asked and newcomer.addresses <= set(listing.addresses)
        ]
        for id in looked_at:
            if why is None:
                del self._newcomers[id]
                self._admitted.add(id)
        if why is not None:  # nobody may come in by a connection that somebody else had
            now = {id: self._snapshot.local[id] for id in looked_at if id in self._snapshot.local}
            self._set_statuses({id: Status("error", endpoint.index, why) for id, endpoint in now.items()})

    def _store_read(self, event: events.StoreRead) -> None:
        first = event.directory in self._unread
        self._unread.discard(event.directory)
        if not first:
            self._health.resyncs += 1
            log.info("read the store below %s anew", event.directory)
        if self._health.reads.succeeded(event.directory) and not first:
            self._reporter.read_again()
        self._snapshot.replace(event.directory, event.entries)
        if self._health.first_update and HOSTS.startswith(event.directory):
            self._keeper.resync(self._snapshot.addresses_listed())

    def _replaced(self, why: str | None) -> None:
        """Begin, for a reason, or end to leave records and kernel as they are, for they are another agent's matter."""
        self._health.replaced = why
        if why is not None:
            self._health.error(why)
            return
        log.info("this agent reports for host %s again", self._host)
        self._reporter.read_again()
        if self._health.first_update:
            self._keeper.resync(self._snapshot.addresses_listed())

    def _link_changed(self, event: events.LinkChanged) -> None:
        link = event.link
        for other in [other for other in self._links.values() if other.index == link.index and other.name != link.name]:
            log.warning("the interface %s is called %s now", other.name, link.name)
            del self._links[other.name]
            self._clean_up = True  # what leads to it must not stay
            self._look_at(other.name)
        if not link.name.startswith(PREFIX):
            self._handle(events.GatewaysChanged())  # routes that go with an interface are not told of one by one
            return
        before = self._links.get(link.name)
        if event.gone:
            if before is not None and before.index == link.index:
                del self._links[link.name]
            self._routes.forget(link.index)
        elif before == link:
            return
        else:
            self._links[link.name] = link
            if not link.up:
                self._routes.forget(link.index)
            self._follow_mac(before, link)
        self._look_at(link.name)

    def _follow_mac(self, before: Link | None, now: Link) -> None:
        """Have a workload told the new MAC of its next hop. The kernel has dropped the neighbour entries there."""
        endpoint = self._snapshot.owner(now.name)
        if endpoint and before and before.index == now.index and before.mac != now.mac:
            log.info("the interface %s has the MAC %s now", now.name, now.mac)
            self._routes.forget(now.index)
            self._keeper.enqueue(endpoint.id)

    def _tables_changed(self, names: frozenset[str]) -> None:
        # where notices were lost (the empty name), they may well have been those of our own changes
        if self._ruleset is not None and ("calico" in names or ("" in names and not self._tables_are_there())):
            log.warning("somebody else has changed our nftables tables; they are made anew")
            if self._may_apply():
                self._ruleset = None
            else:
                self._restore_tables()
        if names & {"filter", ""}:
            self._host_keeper.firewall_changed()

    def _restore_tables(self) -> None:
        """Make the tables anew as they were, while what the store has now must not be made use of."""
        try:
            self._ruleset = None
            self._nft.run(self._last.again())
            self._ruleset = self._last
        except CalicoError as error:
            self._health.error(str(error))

    def _tables_are_there(self) -> bool:
        try:
            return "drop" in self._nft.run("list chain inet calico inbound-forward")
        except CalicoError:
            return False

    def _look_at(self, interface: str) -> None:
        endpoint = self._snapshot.owner(interface)
        if endpoint is not None:
            self._dirty.add(endpoint.id)

    def _read_kernel(self, links: bool) -> None:
        """Learn what the kernel has of ours: routes and neighbours, and `links`, which takes longer."""
        self._network_at = 0.0
        if links:
            before, self._links = self._links, {link.name: link for link in list_links(self._netlink)}
            for name, link in self._links.items():
                self._follow_mac(before.get(name), link)
        self._routes.read(self._links.values())
        self._dirty |= set(self._snapshot.local)
        self._clean_up = True

    def _read_network(self) -> None:
        """Learn what this host has of its own, which no endpoint may have."""
        self._kernel_events.gateways_pending.clear()
        begin = time.monotonic()
        try:
            self._snapshot.set_network(host_network.read())
            self._network_at = None
        except Exception as error:  # of whatever kind: to end would leave the host without an agent
            self._network_at = begin + TICK
            why = str(error) if isinstance(error, CalicoError) else f"this host's addresses cannot be read: {error!r}"
            self._health.error(why)
        self._network_pause = max(NETWORK_PAUSE, 50 * (time.monotonic() - begin))

    def _tick(self) -> None:
        self._health.trouble(events.Failure(shortage.descriptors_lacking(), "descriptors"))
        self._dirty |= self._failed
        self._clean_up, self._unclean = self._clean_up or self._unclean, False
        number = self._lister.ask(self._unlisted)
        self._unsettled.update({address: number for address in self._unlisted if address in self._unsettled})
        self._unlisted = set()
        if self._ruleset is None and self._health.first_update and not self._may_apply():
            self._restore_tables()
        if self._health.first_update:
            self._note_unknown_interfaces(self._unknown)
        if time.monotonic() >= self._review_at:
            self._review(links=False)  # interfaces tell of themselves

    def _review(self, links: bool = True) -> None:
        """Look at all that the kernel has; if that fails, as a listing that something changes meanwhile may, again."""
        self._review_at = time.monotonic() + REVIEW_INTERVAL
        self._reporter.read_again()
        try:
            self._read_kernel(links)
        except Exception as error:  # the library's, of several kinds
            self._review_at = 0.0
            self._health.error(f"what the kernel has could not be listed ({type(error).__name__}: {error})")

    # Applying

    def _apply(self, now: float) -> None:
        """Bring the kernel to what the snapshot wants, as far as they may differ."""
        dirty = self._snapshot.take_dirty()
        self._hold_back(dirty.endpoints)
        self._dirty |= {id for id in dirty.endpoints if id.host == self._host}
        self._look_for_names(dirty.endpoints)
        self._released |= dirty.interfaces
        if dirty.settings:
            self._keeper.grace_time = self._snapshot.grace_time
            if self._health.first_update:
                self._host_keeper.set_ipv6(self._snapshot.ipv6_address is not None)
            logging.getLogger("calico").setLevel(LOG_LEVELS.get(self._snapshot.log_level, logging.INFO))
        self._note_readable(dirty.profiles)
        if self._ruleset is None and now < self._retry_at:
            return
        if self._ruleset is not None and not (dirty or self._dirty or self._clean_up):
            return
        anew = self._ruleset is None
        with self._metrics.apply_time.time():
            touched = self._apply_tables(dirty, now)
            if touched is None:
                return
            if anew:  # whatever was being looked at is looked at again
                touched |= self._unlisted.union(self._unsettled, *(one.addresses for one in self._newcomers.values()))
                self._unlisted = set()
            first = not self._health.first_update
            self._unsettled.update(dict.fromkeys(touched, 0))
            if first:
                self._end_denied_connections(conntrack.listed(touched))
                self._host_keeper.forward(self._snapshot.ipv6_address is not None)
            self._set_statuses(self._apply_routes(dirty.settings))
        if not first:
            self._unsettled.update(dict.fromkeys(touched, self._lister.ask(touched)))
        else:
            self._health.first_update = True
            self._keeper.start(self._snapshot.addresses_listed())
            self._host_keeper.check_firewall()
            self._host_keeper.start()
            self._reporter.beat_soon()
            self._note_unknown_interfaces()
            log.info("the first snapshot is in the kernel: %d endpoints of this host", len(self._snapshot.local))

    def _hold_back(self, changed: set[EndpointId]) -> None:
        """Note which addresses are new to endpoints: these wait. Put endpoints that have waited into `changed`.

        Somebody else may have had such an address, and left connections, whose packets would pass unasked. An endpoint
        that is new as a whole waits as a whole; for others, all but their new addresses is brought up to date.
        """
        if not self._health.first_update:  # all connections are looked at before any route is set
            return
        for id in [id for id in changed if id.host == self._host]:
            self._newcomers.pop(id, None)
            self._admitted.discard(id)
            endpoint = self._snapshot.local.get(id)
            new = set(endpoint.addresses if endpoint else ()).difference(self._last.addresses_of(id))
            if new:
                if self._ruleset is not None and not self._last.has(id):
                    changed.discard(id)
                self._newcomers[id] = Newcomer(new, self._lister.ask(new))
        changed |= self._admitted
        self._admitted.clear()

    def _withheld(self) -> dict[EndpointId, set[str]]:
        """Return the addresses that endpoints are not to make use of yet."""
        return {id: newcomer.addresses for id, newcomer in self._newcomers.items()}

    def _look_for_names(self, ids: set[EndpointId]) -> None:
        """Have those of this host's containers looked at whose record has lost their name, to an old tool perhaps."""
        for id in ids:
            endpoint = self._snapshot.endpoints.get(id) if id.host == self._host else None
            if endpoint is not None and endpoint.workload_name is None and workload_of(id)[0] == DOCKER:
                self._keeper.enqueue(id)

    def _note_readable(self, profiles: set[str]) -> None:
        """Look again at the endpoints of profiles that have become readable, or unreadable: their status says so."""
        now = {name for name in profiles if self._snapshot.is_readable(name)}
        flipped = (now - self._readable) | ((profiles - now) & self._readable)
        self._readable = (self._readable - profiles) | now
        if flipped:
            self._dirty |= {id for id, e in self._snapshot.local.items() if flipped.intersection(e.profiles)}

    def _apply_tables(self, dirty: Any, now: float) -> set[str] | None:
        """Bring our tables up to date; return the addresses that it may matter to; None when it failed."""
        update = None
        if self._ruleset is not None:
            ruleset, self._ruleset = self._ruleset, None
            try:
                update = ruleset.update(self._snapshot, dirty, self._withheld())
                if update.commands:
                    self._nft.run(update.commands)
                self._ruleset = ruleset
            except CalicoError as error:
                log.warning("%s; making all of our tables anew", error)
        if self._ruleset is None:
            ruleset = Ruleset()
            try:
                update = ruleset.load(self._snapshot, self._withheld())
                self._nft.run(update.commands)
                self._ruleset = ruleset
            except CalicoError as error:
                self._retry_at = now + TICK / 2
                self._health.trouble(events.Failure(str(error), "tables"))
                self._set_statuses({id: Status("error", e.index, str(error)) for id, e in self._snapshot.local.items()})
                self._dirty |= set(self._snapshot.local)
                return None
        self._retry_at = 0.0
        self._health.trouble(events.Failure(None, "tables"))
        assert self._ruleset is not None, "one of the two has been done"
        self._last = self._ruleset
        assert update is not None, "one of the two has been done"
        return update.touched

    def _apply_routes(self, all_of_them: bool) -> dict[EndpointId, Status | None]:
        """Set up, or take down, the interfaces of the endpoints that are to be looked at; return what came of it."""
        ids = self._dirty | set(self._snapshot.local) if all_of_them or self._clean_up else self._dirty
        ids -= self._newcomers.keys()
        self._dirty = set()
        unwanted = {self._links[name].index for name in self._unowned(self._released) if name in self._links}
        self._released = set()
        if self._clean_up:
            unowned = self._unowned(self._links)
            unwanted |= self._routes.indices() - {self._links[name].index for name in self._links.keys() - unowned}
            self._clean_up = False
        for index in unwanted:
            try:
                self._routes.clear(index)
            except CalicoError as error:
                self._unclean = True
                self._health.error(str(error))
        return {id: self._apply_endpoint(id) for id in ids}

    def _note_unknown_interfaces(self, before: set[str] | None = None) -> None:
        """Report the interfaces of ours that no record knows; with `before`, those that were among these already."""
        known = set()
        for id in self._snapshot.unusable:
            known |= {id.interface, self._snapshot.endpoints[id].name if id in self._snapshot.endpoints else ""}
        self._unknown = self._unowned(self._links) - known
        self._health.unknown_interfaces = sorted(self._unknown if before is None else self._unknown & before)

    def _unowned(self, interfaces: Iterable[str]) -> set[str]:
        """Return those interfaces that are no endpoint's."""
        return {name for name in interfaces if self._snapshot.owner(name) is None}

    def _apply_endpoint(self, id: EndpointId) -> Status | None:
        self._failed.discard(id)
        endpoint = self._snapshot.local.get(id)
        if endpoint is None:
            unusable = self._snapshot.unusable.get(id)
            if unusable is None:
                return None
            index, reason = unusable
            return Status("down" if reason == INACTIVE else "error", index, reason)
        status = self._apply_local(endpoint)
        return status if endpoint.conflict is None else Status("error", endpoint.index, endpoint.conflict)

    def _apply_local(self, endpoint: LocalEndpoint) -> Status:
        link = self._links.get(endpoint.interface)
        if link is None:
            self._keeper.enqueue(endpoint.id)
            return Status("down", endpoint.index, f"there is no interface {endpoint.interface}")
        if not link.up:
            return Status("down", endpoint.index, f"the interface {endpoint.interface} is down")
        try:
            self._routes.apply(endpoint, link, endpoint.ipv6_next_hop or self._snapshot.ipv6_address)
        except CalicoError as error:
            self._failed.add(endpoint.id)
            return Status("error", endpoint.index, str(error))
        unreadable = [name for name in endpoint.profiles if not self._snapshot.is_readable(name)]
        if unreadable:
            return Status("up", endpoint.index, f"profile {unreadable[0]} does not exist or cannot be read, and denies")
        return Status("up", endpoint.index)

    def _set_statuses(self, statuses: dict[EndpointId, Status | None]) -> None:
        changed: dict[EndpointId, Status | None] = {}
        for id, status in statuses.items():
            before = self._health.endpoints.get(id)
            record = self._snapshot.endpoints.get(id)
            if status is not None and record is not None:
                status = replace(status, workload_name=record.workload_name)
            if status == before:
                continue
            changed[id] = status
            if status is None:
                self._health.endpoints.pop(id, None)
                log.info("endpoint %s is gone", id.endpoint)
                self._keeper.enqueue(id, deleted=True)
                continue
            self._health.endpoints[id] = status
            if before is None or (before.status, before.reason) != (status.status, status.reason):
                text = f"endpoint {id.endpoint} of {id.orchestrator} {id.workload} is {status.status}"
                text += f": {status.reason}" if status.reason else ""
                if status.status == "error":
                    self._health.error(text)
                else:
                    log.info("%s", text)
        if changed:
            self._reporter.set(changed)

    def _end_denied_connections(self, listed: conntrack.Listed) -> str | None:
        """End those of the connections that policy denies; return why that could not be done, and is to be repeated."""
        assert self._ruleset is not None, "the caller makes sure"
        try:
            if listed.error is not None:
                raise CalicoError(listed.error)
            ended = conntrack.end_denied(listed, self._snapshot, self._ruleset.tagged)
        except CalicoError as error:
            self._health.error(str(error))
            self._unlisted.update(listed.addresses)
            return str(error)
        if ended:
            log.info("%d open connections that policy denies now have been ended", ended)
        self._settle(listed)
        return None

    def _settle(self, listed: conntrack.Listed) -> None:
        """Note that a listing has been looked at; when all have, packets of established connections need no look."""
        if not self._unsettled or self._ruleset is None:
            return
        for address in listed.addresses:
            if self._unsettled.get(address, listed.asked + 1) <= listed.asked:
                del self._unsettled[address]
        if not self._unsettled:
            try:
                self._nft.run(self._ruleset.settle())
            except CalicoError as error:
                log.warning("%s; making all of our tables anew", error)
                self._ruleset = None
