"""Endpoints: drives routes, neighbour entries and sysctls of this host's `cali…` interfaces to the desired state.

Reports the status of each endpoint, and garbage-collects routes and neighbour entries of interfaces that belong to no
endpoint. workload_keeper.py manages the interfaces themselves, and everything inside workloads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from calicoctl.datastore.keys import INTERFACE_PREFIX
from calicoctl.desired.admission import Use
from calicoctl.desired.local_endpoint import LocalEndpoint
from calicoctl.desired.snapshot import INACTIVE, Dirty
from calicoctl.errors import CalicoError
from calicoctl.felix import kept_addresses
from calicoctl.felix.dataplane.lifeline import take_back_routes
from calicoctl.felix.dataplane.links import Link
from calicoctl.felix.dataplane.manager import Context, Manager
from calicoctl.felix.events import Failure, KernelEventsLost, LinkChanged, PolicyFailed, RouteLost, Tick
from calicoctl.felix.health import Status
from calicoctl.workloads.workload import DOCKER, workload_of

if TYPE_CHECKING:
    from calicoctl.datastore.keys import EndpointId
    from calicoctl.felix.dataplane.routes import Routes

log = logging.getLogger("calico.felix")


class EndpointManager(Manager):
    """Programs routes, neighbour entries and sysctls for this host's endpoints.

    An endpoint is left as it is in the kernel while it has pending addresses: see PendingAddresses.
    """

    def __init__(self, context: Context, routes: Routes, check_workload: Callable[[EndpointId], None]) -> None:
        """`check_workload` requests that the WorkloadKeeper reconciles an endpoint's workload.

        It returns at once, without waiting for that.
        """
        self._context = context
        self._snapshot = context.snapshot
        self._routes = routes
        self._check_workload = check_workload
        self._links: dict[str, Link] = {}
        self._links_stale = True
        self._dirty: set[EndpointId] = set()
        self._failed: set[EndpointId] = set()
        """Endpoints that could not be programmed. They are retried at the next Tick."""
        self._released: set[str] = set()
        """Interfaces that may no longer belong to the endpoint to which they belonged before."""
        self._everything = True
        """Whether all endpoints are dirty, and the interfaces that belong to no endpoint must be garbage-collected."""
        self._collection_failed = False
        """Whether garbage collection has failed, so that it must be repeated at the next Tick."""
        self._readable: set[str] = set()
        """Profiles that exist and have valid rules."""
        self._kept: frozenset[Use] | None = None
        """The content of the file of kept_addresses.py; None if the file must be written again."""
        self._unknown: set[str] = set()
        """Interfaces without an endpoint at the last Tick. They are reported only if they still have none at the next
        Tick, since a command may be about to write the endpoint.
        """

    def on_event(self, event: Any) -> None:
        if isinstance(event, Dirty):
            self._on_snapshot_changed(event)
        elif isinstance(event, LinkChanged):
            self._on_link_changed(event)
        elif isinstance(event, RouteLost):
            self._on_route_lost(event)
        elif isinstance(event, KernelEventsLost):
            self._links_stale = True
        elif isinstance(event, PolicyFailed):
            for id, endpoint in self._snapshot.local.items():
                self._context.statuses.set(id, Status("error", endpoint.revision, event.why))
            self._dirty |= set(self._snapshot.local)
        elif isinstance(event, Tick):
            self._dirty |= self._failed
            self._everything, self._collection_failed = self._everything or self._collection_failed, False
            if self._context.health.first_update:
                self._report_unknown_interfaces(self._unknown)

    def resync(self) -> None:
        """Have the driver read the agent's routes and neighbour entries from the kernel.

        The `cali…` interfaces themselves are read only by the first call, and by the first call after KernelEventsLost.
        Before the first update of the kernel, also mark as admitted the addresses that endpoints have used under an
        earlier agent: see Admission.adopt. Raises CalicoError.
        """
        if self._links_stale:
            before, self._links = self._links, {link.name: link for link in self._routes.list_links()}
            self._links_stale = False
            for name, link in self._links.items():
                self._follow_mac(before.get(name), link)
        self._routes.read(self._links.values())
        self._everything = True
        if not self._context.health.first_update:  # the kernel remembers what endpoints had before this agent
            names = {link.index: link.name for link in self._links.values()}
            self._snapshot.admission.adopt((names[i], a) for i, a in self._routes.routed() if i in names)
            try:
                self._snapshot.admission.adopt(kept_addresses.read(self._snapshot.host))
            except CalicoError as error:
                self._context.health.error(str(error))

    def restore(self) -> None:
        """Remove each of the agent's routes to endpoints if its destination is an address that this host itself needs.

        For details, see lifeline.take_back_routes. Each removal, and each failure, is reported as an error.
        """
        for said in take_back_routes(self._snapshot.network, self._routes):
            self._context.health.error(said)

    @property
    def needs_apply(self) -> bool:
        return bool(self._dirty or self._released or self._everything)

    def apply(self) -> None:
        if self._everything:
            self._dirty |= set(self._snapshot.local)
        self._dirty -= self._context.pending.keys()
        self._collect_unowned()
        for id in list(self._dirty):
            self._context.statuses.set(id, self._apply_endpoint(id))
            self._dirty.discard(id)
        if not self._context.health.first_update:
            self._report_unknown_interfaces()
        if self._kept is None:
            self._keep()

    def _keep(self) -> None:
        """Write the addresses that Admission.exceptions returns to the file of kept_addresses.py.

        Report a Failure if the file cannot be written, and the end of the Failure if it can be written again.
        """
        kept = self._snapshot.admission.exceptions()
        why = None
        try:
            kept_addresses.write(self._snapshot.host, kept)
            self._kept = kept
        except CalicoError as error:
            why = str(error)
        self._context.health.record(Failure(why, "kept addresses"))

    # Marking

    def _on_snapshot_changed(self, dirty: Dirty) -> None:
        local = {id for id in dirty.endpoints if id.host == self._snapshot.host}
        self._dirty |= local
        self._released |= dirty.interfaces
        if dirty.pools or dirty.topology or (local and self._kept):
            self._kept = None
        self._everything = self._everything or dirty.settings  # the next hop of IPv6 is one of them
        for id in local:
            endpoint = self._snapshot.endpoints.get(id)
            if endpoint is not None and endpoint.workload_name is None and workload_of(id)[0] == DOCKER:
                self._check_workload(id)  # an old tool, which does not know that field, may have written the endpoint
        # the status of an endpoint names a profile without valid rules
        readable = {name for name in dirty.profiles if self._snapshot.has_valid_rules(name)}
        flipped = (readable - self._readable) | ((dirty.profiles - readable) & self._readable)
        self._readable = (self._readable - dirty.profiles) | readable
        if flipped:
            self._dirty |= {id for id, e in self._snapshot.local.items() if flipped.intersection(e.profiles)}

    def _on_link_changed(self, event: LinkChanged) -> None:
        link = event.link
        for other in [other for other in self._links.values() if other.index == link.index and other.name != link.name]:
            log.warning("interface %s was renamed to %s", other.name, link.name)
            del self._links[other.name]
            self._everything = True  # the routes to it must be removed
        if not link.name.startswith(INTERFACE_PREFIX):
            return
        before = self._links.get(link.name)
        if event.deleted:
            if before is not None and before.index == link.index:
                del self._links[link.name]
            self._routes.forget(link.index)
        elif before == link:
            return
        else:
            self._links[link.name] = link
            if not link.up:
                self._routes.forget(link.index)
            elif before is not None and before.carrier != link.carrier:
                self._routes.forget_proxies(link.index)  # the kernel may have dropped them
            self._follow_mac(before, link)
        self._mark_owner(link.name)

    def _on_route_lost(self, event: RouteLost) -> None:
        index = self._routes.forget_route(event.address)
        if index is not None:
            log.warning("another process has removed, or replaced, the route to %s; restoring it", event.address)
            for link in self._links.values():
                if link.index == index:
                    self._mark_owner(link.name)

    def _follow_mac(self, before: Link | None, now: Link) -> None:
        """If the MAC of an endpoint's interface has changed, have the endpoint's workload reconciled.

        The workload has a neighbour entry for its next hop, and the entry must contain the new MAC. Also remove the
        interface from the driver's cache, since the kernel has dropped its neighbour entries. `before` and `now` are
        the former and the present state of the interface. `before` is None if the interface was not known before. If
        the index has changed, too, the interface was created again, and nothing is done.
        """
        endpoint = self._snapshot.owner(now.name)
        if endpoint and before and before.index == now.index and before.mac != now.mac:
            log.info("interface %s has the MAC %s now", now.name, now.mac)
            self._routes.forget(now.index)  # the kernel has dropped the neighbour entries
            self._check_workload(endpoint.id)

    def _mark_owner(self, interface: str) -> None:
        endpoint = self._snapshot.owner(interface)
        if endpoint is not None:
            self._dirty.add(endpoint.id)

    # Applying

    def _collect_unowned(self) -> None:
        """Remove the agent's routes and neighbour entries from interfaces that belong to no endpoint.

        If `_everything` is False, only the interfaces in `_released` are examined.
        """
        unwanted = {self._links[name].index for name in self._unowned(self._released) if name in self._links}
        self._released = set()
        if self._everything:
            owned = self._links.keys() - self._unowned(self._links)
            unwanted |= self._routes.indices() - {self._links[name].index for name in owned}
            self._everything = False
        for index in unwanted:
            try:
                self._routes.clear(index)
            except CalicoError as error:
                self._collection_failed = True
                self._context.health.error(str(error))

    def _unowned(self, interfaces: Iterable[str]) -> set[str]:
        return {name for name in interfaces if self._snapshot.owner(name) is None}

    def _apply_endpoint(self, id: EndpointId) -> Status | None:
        self._failed.discard(id)
        endpoint = self._snapshot.local.get(id)
        if endpoint is None:
            unusable = self._snapshot.unusable.get(id)
            if unusable is None:
                return None
            revision, reason = unusable
            return Status("down" if reason == INACTIVE else "error", revision, reason)
        status = self._program(endpoint)
        if endpoint.conflict is not None:
            return Status("error", endpoint.revision, endpoint.conflict)
        if endpoint.warning is not None and status.reason is None:
            return Status(status.status, endpoint.revision, endpoint.warning)
        return status

    def _program(self, endpoint: LocalEndpoint) -> Status:
        link = self._links.get(endpoint.interface)
        if link is None:
            self._check_workload(endpoint.id)
            return Status("down", endpoint.revision, f"there is no interface {endpoint.interface}")
        if not link.up:
            return Status("down", endpoint.revision, f"the interface {endpoint.interface} is down")
        try:
            self._routes.apply(endpoint, link, endpoint.ipv6_next_hop or self._snapshot.topology.own(6))
        except CalicoError as error:
            self._failed.add(endpoint.id)
            return Status("error", endpoint.revision, str(error))
        unreadable = [name for name in endpoint.profiles if not self._snapshot.has_valid_rules(name)]
        if unreadable:
            return Status(
                "up", endpoint.revision, f"profile {unreadable[0]} does not exist or cannot be read, and denies"
            )
        return Status("up", endpoint.revision)

    def _report_unknown_interfaces(self, before: set[str] | None = None) -> None:
        """Report the `cali…` interfaces that belong to no endpoint in the store.

        Interfaces of endpoints that are not programmed, since they are invalid, inactive or in conflict with another
        (Snapshot.unusable), are not reported. If `before` is not None, only interfaces in `before` are reported.
        """
        known = set()
        for id in self._snapshot.unusable:
            known |= {id.interface, self._snapshot.endpoints[id].name if id in self._snapshot.endpoints else ""}
        self._unknown = self._unowned(self._links) - known
        self._context.health.unknown_interfaces = sorted(self._unknown if before is None else self._unknown & before)
