"""Connects workloads to the network, and disconnects them: address, veth pair and endpoint, as one transaction.

If connecting a workload or adding an address fails, the completed steps are undone in reverse order. The steps of a
removal are not undone: the removal can be repeated. A process that is killed cannot undo its steps. So that the next
command for the same workload finds what the killed process has left, the steps have this order:

* The address is assigned first. Its attributes contain the endpoint id, from which the name of the veth pair is
  derived.
* The veth pair is created next. Its host end is brought up when everything else of the pair is configured: while the
  host end is down, the pair is incomplete.
* The endpoint is written to etcd last. On disconnecting, the endpoint is removed before its addresses are released.
  Only addresses without a handle are released before the endpoint is removed, since their owner is known only from the
  endpoint.

A function that changes a workload holds the workload's lock from its first read until it returns.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Callable, Iterator

from calicoctl.addresses import host_net, parse_address, version_of
from calicoctl.datastore import keys
from calicoctl.datastore.handles import KnownHandle
from calicoctl.datastore.keys import INTERFACE_PREFIX, EndpointId
from calicoctl.datastore.model import Endpoint
from calicoctl.errors import AddressTaken, CalicoError, Conflict, HandleExists, InvalidValue, NotFound
from calicoctl.workloads import connected, guard, mtu, netns
from calicoctl.workloads.addressing import (
    DEFAULT_INTERFACE,
    AddressRequest,
    Terms,
    assign,
    endpoint_of,
    interfaces_of,
    is_interface_name,
    owner_of,
    owner_text,
    paths_of,
    reserved_addresses,
    usable,
)
from calicoctl.workloads.locks import WorkloadLock
from calicoctl.workloads.workload import (
    CNI,
    Workload,
    namespace_identity,
    not_connected,
    process_started,
    refuse_other_path,
    short_id,
)

if TYPE_CHECKING:
    from netaddr import IPAddress

    from calicoctl.datastore.blocks import Owner
    from calicoctl.datastore.client import DatastoreClient, StoredWorkload
    from calicoctl.datastore.ipam import Holding
    from calicoctl.datastore.reserved import Reserved
    from calicoctl.datastore.store import Entry
    from calicoctl.netlink import Interface


@dataclass(frozen=True)
class Attachment:
    """The result of connecting a workload: the endpoint's id, an address, and the interface inside the workload.

    `address` is the address of the endpoint that satisfies the (first) request. `interface` and `mac` are the name and
    the MAC of the interface; `mac` is None if the endpoint contains none. `existed` says that the workload was
    connected already, and that nothing was changed. `others` are the further addresses of a new connection, and
    `next_hops` its gateways by IP version.
    """

    id: EndpointId
    address: IPAddress
    interface: str
    mac: str | None
    existed: bool = False
    others: tuple[IPAddress, ...] = ()
    next_hops: Mapping[int, str] = field(default_factory=dict)


def connect(
    datastore: DatastoreClient,
    workload: Workload,
    request: AddressRequest,
    interface: str | None = None,
    exist_ok: bool = False,
) -> Attachment:
    """Connect a workload, or re-attach a workload that has lost its interface. Raises CalicoError, after a rollback.

    `interface` is the name that the interface gets inside the workload; None means its previous name or, if that is not
    known, DEFAULT_INTERFACE.

    If the workload is connected already, CalicoError is raised. With `exist_ok`, its Attachment is returned instead if
    it has an address that satisfies the request, and its interface has the name `interface` (None: any name).

    If the workload's path is that of a process, such as /proc/PID/ns/net, and another process has the process id now,
    the endpoint of the earlier process is removed first, with its interface and addresses.
    """
    with WorkloadSession.enter(datastore, workload) as session:
        session.clear_after_another_process()
        if session.endpoint is None:
            return _connect_new(session, [request], interface or DEFAULT_INTERFACE)
        attached = session.attached_interface()
        if attached is None:
            again = reattach(session, session.endpoint, request, interface)
            assert again is not None, "an address was requested"
            return again
        session.remember()
        address = next(filter(request.fits, map(parse_address, session.endpoint.addresses)), None)
        if exist_ok and address is not None and interface in (None, attached):
            return Attachment(session.endpoint.id, address, attached, session.endpoint.mac, existed=True)
        raise CalicoError(
            f"{workload.name} has already been configured with Calico Networking. It has "
            f"{', '.join(session.endpoint.addresses) or 'no address'} on {attached}."
        )


def connect_started(
    datastore: DatastoreClient,
    workload: Workload,
    requests: Sequence[AddressRequest],
    interface: str | None,
    profiles: Sequence[str],
) -> Attachment | None:
    """Connect a container that was just started, with an address for each of `requests`, and with these profiles.

    `interface` is the name of the interface inside the container; None means DEFAULT_INTERFACE. Returns None, and
    changes nothing, if the container is connected already, or if a command has disconnected it since it was started
    (connected.py). Does not wait for the workload's lock. Raises NotFound if a profile does not exist,
    Conflict if another process holds the lock, and any other CalicoError after a rollback.
    """
    with WorkloadSession.enter(datastore, workload, patience=0) as session:
        if session.endpoint is not None:
            return None
        if connected.is_disconnected(datastore.host, workload.id, workload.started_at or ""):
            return None
        return _connect_as_asked(session, requests, interface, profiles)


def connect_starting(
    datastore: DatastoreClient,
    workload: Workload,
    requests: Sequence[AddressRequest],
    interface: str | None,
    profiles: Sequence[str],
    patience: float,
) -> bool:
    """Connect a container that is being started, before its first instruction.

    If the container has an endpoint, its interface is recreated, unless it exists. A container without an endpoint gets
    an address for each of `requests`, these profiles, and an interface with the name `interface` (None:
    DEFAULT_INTERFACE). Returns True; but without an endpoint and `requests`, nothing is changed, and False is returned.
    `patience` is for how many seconds to wait for the workload's lock. Raises NotFound if a profile does not exist,
    Conflict if another process keeps the lock, and any other CalicoError after a rollback.
    """
    with WorkloadSession.enter(datastore, workload, patience=patience) as session:
        if session.endpoint is None:
            if not requests:
                return False
            _connect_as_asked(session, requests, interface, profiles)
        elif session.attached_interface() is None:
            if session.known is None:
                raise CalicoError(
                    f"{workload.name} has an endpoint in etcd, and nobody has connected it on this host. 'calicoctl "
                    f"container remove {short_id(workload.id)}' removes it"
                )
            reattach(session, session.endpoint)
    return True


def _connect_as_asked(
    session: WorkloadSession, requests: Sequence[AddressRequest], interface: str | None, profiles: Sequence[str]
) -> Attachment:
    for profile in profiles:
        session.datastore.require_profile(profile)
    return _connect_new(session, requests, interface or DEFAULT_INTERFACE, profiles)


def connect_container(
    datastore: DatastoreClient,
    workload: Workload,
    requests: Sequence[AddressRequest],
    profiles: Sequence[str] | None,
    mac: str | None = None,
) -> Attachment:
    """Connect a container for its CNI runtime, with an address for each of `requests`, and with these profiles.

    If `profiles` is None, the container gets the profile that has the network's name. If this does not exist, it is
    created just before the endpoint, and a rollback keeps it: another container may have it then. `mac` is the MAC of
    the interface; if it is None, the kernel chooses one.

    If the container was connected before, but not in its namespace of now, it is disconnected first; also if it was
    connected in this namespace, to the same network, and has lost its interface. Raises CalicoError if it is connected
    in this namespace already, even if it has lost the interface that it has in another network; NotFound if a profile
    does not exist; and any other CalicoError after a rollback.
    """
    with WorkloadSession.enter(datastore, workload) as session:
        attached = session.attached_interface(also_down=True)
        known = session.known
        # the agent will re-attach it, and detaching it from the other network must be left to the runtime
        if attached is None and known is not None and known.started == namespace_identity(workload.path or ""):
            is_other = (known.network, known.interface) != (workload.network, workload.interface)
            attached = known.interface if is_other else None
        if session.endpoint is not None and attached is not None:
            raise CalicoError(
                f"container {workload.name} has {', '.join(session.endpoint.addresses) or 'no address'} on {attached} "
                "already: it can be in one Calico network, and profiles say with whom it may talk"
            )
        for profile in profiles or ():
            datastore.require_profile(profile)
        if session.endpoint is not None:
            session.disconnect()
        is_new = profiles is None and not datastore.profile_exists(workload.network)
        return _connect_new(
            session,
            requests,
            workload.interface,
            [workload.network] if profiles is None else profiles,
            new_profile=workload.network if is_new else "",
            mac=mac,
        )


def verify(
    datastore: DatastoreClient, workload: Workload, nets: Collection[str], mac: str, default_routes: Collection[int]
) -> None:
    """Raise CalicoError unless a container that was attached through CNI is attached as it was.

    `nets` are addresses that it should have, as `address/32` or `address/128`, and `mac` is the MAC that its interface
    should have; an empty `mac` stands for any. Compared are the store, and the container's namespace: there, the
    interface must be up, have the addresses and the endpoint's MAC, and have a default route of each IP version in
    `default_routes`.
    """

    def differs(how: str) -> CalicoError:
        return CalicoError(f"container {workload.name} {how}")

    with WorkloadSession.enter(datastore, workload) as session:
        name, endpoint = workload.interface, session.endpoint
        if endpoint is None:
            raise differs("has no endpoint in the store")
        if not set(nets) <= set(endpoint.nets):
            found = ", ".join(endpoint.nets) or "no address"
            raise differs(f"should have {', '.join(nets) or 'no address'}, and its endpoint has {found}")
        if session.attached_interface() != name:
            raise differs(f"has lost its interface {name}")
        interface = session.namespace.interface(name)
        if interface is None or not interface.up:
            raise differs(f"has its interface {name} down")
        for wanted in filter(None, (mac, endpoint.mac)):  # packets with another than the endpoint's are dropped
            if wanted.lower() != interface.mac.lower():
                raise differs(f"should have the MAC {wanted}, and its interface {name} has {interface.mac}")
        for net in nets:
            if parse_address(net.partition("/")[0]) not in session.held:
                raise differs(f"has {net}, which is not assigned to it")
            if not session.namespace.has_address(name, net):
                raise differs(f"lacks {net} on its interface {name}")
        for version in sorted(default_routes):
            if not session.namespace.has_default_route(name, version):
                raise differs(f"has no IPv{version} default route through its interface {name}")


def _connect_new(
    session: WorkloadSession,
    requests: Sequence[AddressRequest],
    interface: str,
    profiles: Sequence[str] = (),
    new_profile: str = "",
    mac: str | None = None,
) -> Attachment:
    """Connect a workload that has no endpoint, with an address for each of `requests`; there must be at least one.

    `interface` is the name of the interface inside the workload. The endpoint has the profiles from the beginning, so
    no packet passes before they apply. `new_profile` is the one of `profiles` that is created just before the endpoint;
    empty if none is. `mac` is the MAC of the interface; if it is None, the kernel chooses one.
    """
    datastore, workload = session.datastore, session.workload
    terms = [Terms.read(datastore, request) for request in requests]
    next_hops = {request.version: one.next_hop for request, one in zip(requests, terms)}
    session.remove_incomplete_pairs()
    session.remove_orphans()
    session.refuse_other_endpoint()
    for version in next_hops:
        session.refuse_default_route(version)
    session.refuse_interface(interface)

    with _rollback_on_failure(session) as undo:
        undo(session.lock.clear_all)
        session.remember(undo)
        undo(datastore.ipam.release_by_handle, workload.handle)
        try:
            addresses, id = _assign_all(session, requests, interface, terms)
        except HandleExists:  # another host's namespace has it, or an interrupted command that has left no trace here
            session.read_handle()
            session.remove_incomplete_pairs()
            addresses, id = _assign_all(session, requests, interface, terms)

        pools = [pool for one in terms for pool in one.pools]
        size = mtu.of_interface(datastore, map(str, addresses), pools, next_hops, terms[0].mtu)
        nets = [host_net(address) for address in addresses]
        mac = _attach(session, id.interface, interface, nets, next_hops, mac, size, undo)

        endpoint = Endpoint(id, name=id.interface, mac=mac, workload_name=workload.docker_name or None)
        endpoint.profile_ids = list(profiles)
        for net in nets:
            endpoint.nets_of(version_of(net)).append(net)
        for version, next_hop in next_hops.items():
            endpoint.set_gateway(version, next_hop)
        if new_profile:
            datastore.create_profile(new_profile)
        undo(datastore.remove_endpoint, id)
        datastore.create_endpoint(endpoint)
        session.lock.clear_all()  # what an interrupted command has left was adopted or removed
    return Attachment(id, addresses[0], interface, mac, others=tuple(addresses[1:]), next_hops=next_hops)


def _assign_all(
    session: WorkloadSession, requests: Sequence[AddressRequest], interface: str, terms: Sequence[Terms]
) -> tuple[list[IPAddress], EndpointId]:
    """Assign an address for each of `requests` to one endpoint, and return the addresses and the endpoint's id.

    Addresses that an interrupted command has assigned are used first: see _adopt. `terms` has an item for each of
    `requests`, and `interface` is the interface's name inside the workload. Raises what `assign` raises.
    """
    found, id = _adopt(session, requests, interface, [one.reserved for one in terms])
    owner = owner_of(session.workload, id, interface)
    # certain addresses first: one of them might be assigned to a request for any address otherwise
    for number in sorted(range(len(requests)), key=lambda number: requests[number].address is None):
        if number not in found:
            found[number] = assign(session.datastore, owner, requests[number], terms[number], session.handle)
            # what was read before has been changed by this
            session.handle, terms = None, [replace(one, affine=None) for one in terms]
    return [found[number] for number in range(len(requests))], id


def reattach(
    session: WorkloadSession, endpoint: Endpoint, request: AddressRequest | None = None, interface: str | None = None
) -> Attachment | None:
    """Recreate the interface of a workload whose endpoint is in etcd, with the same addresses, MAC and name.

    The interface's name inside the workload is the one in the attributes of the workload's addresses. If they contain
    none, the name is `interface` or, if that is None, DEFAULT_INTERFACE.

    Returns an Attachment with the endpoint's first address that satisfies `request` (None: any address). If the
    endpoint has no addresses, one that satisfies `request` is assigned to it. If it has none and `request` is None, the
    interface is recreated without an address, and None is returned.

    Raises CalicoError if the endpoint has addresses, but none satisfies `request`; if `interface` is not the name in
    the attributes; or if a step fails, after a rollback.
    """
    datastore, workload = session.datastore, session.workload
    addresses = [parse_address(address) for address in endpoint.addresses]
    address = next((address for address in addresses if request is None or request.fits(address)), None)
    if address is None and addresses:
        raise CalicoError(
            f"{workload.name} has lost its interface, and its address is {', '.join(endpoint.addresses)}. Run "
            f"'calicoctl container add {workload.name} {endpoint.addresses[0]}' to "
            f"re-attach it, then 'calicoctl container {workload.name} ip add' for another address."
        )
    if request is not None and address is not None:
        _refuse_in_use(session, address)
    known = [owner.secondary.get("interface") for owner in session.held.values()]
    before = next((name for name in known if is_interface_name(name)), None)
    if before is not None and interface not in (None, before):
        raise CalicoError(f"{workload.name} can only be re-attached with its interface {before}, not {interface}.")
    interface = before or interface or DEFAULT_INTERFACE
    versions = {version_of(net) for net in endpoint.nets}
    if request is not None and not addresses:
        versions = {request.version}
    next_hops = {version: _next_hop(datastore, endpoint, version) for version in versions}
    terms = None
    if request is not None and not addresses:
        terms = Terms.read(datastore, request, next_hops[request.version])
        pools = terms.pools
    else:
        pools = [pool for version in versions for pool in datastore.readable_pools(version)[0]]
    session.remove_remains(endpoint)
    for version in next_hops:
        session.refuse_default_route(version)
    session.refuse_other_endpoint()
    session.refuse_interface(interface)

    with _rollback_on_failure(session) as undo:
        session.remember(undo)
        nets = list(endpoint.nets)
        if address is None and request is not None and terms is not None:
            # its last address was removed before it lost its interface
            undo(_release_unlisted, datastore, workload, endpoint)
            owner = owner_of(workload, endpoint.id, interface)
            address = assign(datastore, owner, request, terms, session.handle)
            nets.append(host_net(address))
        for own in addresses:
            if own not in session.held:
                _reassign(session, own, owner_of(workload, endpoint.id, interface), undo)
        configured = mtu.configured(datastore) if terms is None else terms.mtu
        size = mtu.of_interface(datastore, [net.partition("/")[0] for net in nets], pools, next_hops, configured)
        mac = _attach(session, endpoint.id.interface, interface, nets, next_hops, endpoint.mac, size, undo)

        def update(stored: Endpoint) -> bool:
            old = stored.to_dict()
            stored.state, stored.name, stored.mac = "active", endpoint.id.interface, mac
            stored.inactive_since = None
            stored.workload_name = workload.docker_name or stored.workload_name
            for version, next_hop in next_hops.items():
                stored.set_gateway(version, next_hop)
            if not stored.nets and address is not None:
                stored.nets_of(address.version).extend(nets)
            return stored.to_dict() != old

        datastore.modify_endpoint(endpoint.id, update)  # reads it again: it may be gone, and need no change
    return None if address is None else Attachment(endpoint.id, address, interface, mac)


def disconnect(datastore: DatastoreClient, workload: Workload) -> None:
    """Remove a workload's endpoints, interfaces and addresses. Raises NotFound if there is nothing to remove.

    If a namespace's endpoint is stored under the other spelling of its path (/run for /var/run, or the reverse),
    Workload.other_spelling is disconnected.

    NotFound is raised, too, if `workload` has a network, and the container was attached to another network through CNI,
    or with another interface. The container or namespace need not exist any more. If a container with labels runs, they
    connect it again only after its next start (connected.py). Raises CalicoError if a step fails: then what was removed
    before stays removed, and a further call removes the rest. Raises CalicoError also, and removes nothing, if the
    workload is a namespace, and what is connected under its id belongs to a namespace with another path.

    If a block that the workload's handle names is invalid, the block is not changed, and the handle is kept. Everything
    else is removed, and then CalicoError is raised.
    """
    twin = workload.other_spelling
    with WorkloadLock(datastore.host, workload.orchestrator, workload.id) as lock:
        stored = datastore.read_workload(workload.handle, _places(datastore.host, workload))
        if twin is None or not _is_stored_otherwise(workload, stored):
            _disconnect(datastore, workload, lock, stored)
            return
    with WorkloadLock(datastore.host, twin.orchestrator, twin.id) as lock:
        _disconnect(datastore, twin, lock, datastore.read_workload(twin.handle, twin.stored_as))


def _disconnect(datastore: DatastoreClient, workload: Workload, lock: WorkloadLock, stored: StoredWorkload) -> None:
    """Do what `disconnect` does. The caller holds `lock`, the workload's lock, and has read `stored` since."""
    holding = datastore.ipam.holding(workload.handle, stored.handle, partly=True)
    known = connected.get(datastore.host, workload.orchestrator, workload.id)
    owners = [] if holding is None else list(holding.held.values())
    refuse_other_path(workload, *([known.path] if known is not None else paths_of(owners)))
    attachment = (workload.network, workload.interface)
    if workload.network and known is not None and (known.network, known.interface) != attachment:
        raise NotFound(f"{workload.name} is not attached to {workload.network} through {workload.interface}.")
    if not stored.endpoints and holding is None:
        _forget(datastore, workload, lock)
        raise NotFound(f"{workload.name} is not connected to Calico.")
    if workload.started_at or (workload.started_at == "" and known is not None and known.labelled):
        connected.set_disconnected(datastore.host, workload.id, workload.started_at)
    holding = _clear(datastore, workload, lock, stored.endpoints, holding)
    if holding is not None and holding.invalid:
        raise CalicoError(
            f"{workload.name} is removed, but for its addresses in the block {', '.join(holding.invalid)}: "
            f"{'; '.join(map(str, holding.invalid.values()))}, then run 'calicoctl container remove "
            f"{workload.path or short_id(workload.id)}' again."
        )


def _places(host: str, workload: Workload) -> list[tuple[str, str]]:
    """Return the places of a workload's endpoints in the store, as (orchestrator, workload id), the likeliest first.

    Older programs may have stored a namespace's endpoint elsewhere (Workload.stored_as), and under the other spelling
    of its path (Workload.other_spelling). On a host that no older program has used, the endpoint can only be in the
    first place.
    """
    if connected.is_first(host):
        return workload.stored_as[:1]
    twin = workload.other_spelling
    return workload.stored_as + (twin.stored_as if twin is not None else [])


def _is_stored_otherwise(workload: Workload, stored: StoredWorkload) -> bool:
    """Return whether endpoints that were read from _places are those of Workload.other_spelling."""
    return {id.workload for id in stored.endpoints} - {workload.id} != set()


def _clear(
    datastore: DatastoreClient,
    workload: Workload,
    lock: WorkloadLock,
    endpoints: dict[EndpointId, Entry],
    holding: Holding | None,
) -> Holding | None:
    """Remove a workload's `endpoints`, their interfaces and addresses, and the addresses of its handle, `holding`.

    `holding` is None if the handle holds no addresses on this host. The caller holds `lock`, the workload's lock, and
    has read `endpoints` and `holding` since it acquired the lock. Returns the addresses of the handle: `holding`, or
    what was found after the handle was corrected, since it did not name the block of an address of an endpoint.
    """
    held = {} if holding is None else holding.held
    invalid = {} if holding is None else holding.invalid
    datastore.check_endpoints_writable(endpoints, workload.handle)
    lock.mark_in_progress()
    for name in {id.interface for id in endpoints} | interfaces_of(held.values()):
        netns.delete_interface(name)
    listed = {address for id, entry in endpoints.items() for address in _listed(id, entry)}
    named = {keys.undashed(keys.last(entry.key)) for entry in ([] if holding is None else holding.blocks)}
    unnamed = {datastore.ipam.cidr_of(address) for address in listed} - named - set(invalid)
    if unnamed:  # an old tool has connected the workload, or the handle was deleted, as an error may have advised
        handle = datastore.ipam.handles.recount(workload.handle, unnamed)
        holding = datastore.ipam.holding(workload.handle, handle, partly=True)
        held, invalid = ({}, {}) if holding is None else (holding.held, holding.invalid)
    # addresses of old tools have no handle: without the endpoints, their owner would be unknown
    others = [address for address in listed if (address.version, int(address)) not in held]
    datastore.ipam.release([a for a in others if datastore.ipam.cidr_of(a) not in invalid], {None})
    datastore.remove_workloads(endpoints)
    if holding is not None:
        datastore.ipam.release_held(holding, holding.owners)
    _forget(datastore, workload, lock)
    return holding


def _listed(id: EndpointId, entry: Entry) -> list[IPAddress]:
    with suppress(InvalidValue):
        return list(map(parse_address, Endpoint.from_json(id, entry.value, entry.key).addresses))
    return []


def _forget(datastore: DatastoreClient, workload: Workload, lock: WorkloadLock) -> None:
    connected.forget(datastore.host, workload.orchestrator, workload.id)
    lock.clear_all()


def add_address(
    datastore: DatastoreClient, workload: Workload, request: AddressRequest, interface: str | None
) -> tuple[IPAddress, bool]:
    """Add an address to a connected workload; return the address, and whether it was added.

    If the endpoint lists the requested address already, the address is not added, but only configured in the kernel
    again. If the added address is the workload's first of its IP version, the next hop and the default route of this
    version are added, too. If the MTU of the interface is too large for the address, it is lowered.

    Raises CalicoError, after a rollback. Raises CalicoError also if the name of the workload's interface is not
    `interface` (None: any name).
    """
    with WorkloadSession.enter(datastore, workload) as session:
        workload = session.workload
        endpoint, attached = session.connected(interface)
        session.remember()
        version = request.version
        terms = Terms.read(datastore, request)
        nets = endpoint.nets_of(version)
        if request.address is not None and host_net(request.address) in nets:
            session.namespace.configure(attached, [host_net(request.address)], {}, session.host_mac)
            return request.address, False
        next_hops = {} if nets else {version: terms.next_hop}
        if next_hops:
            session.refuse_default_route(version, but_through=attached)

        with _rollback_on_failure(session) as undo:
            owner = owner_of(workload, endpoint.id, attached)
            left = [a for a in session.held if host_net(a) not in endpoint.nets and usable(request, a, terms.reserved)]
            undo(_release_unlisted, datastore, workload, endpoint)
            # an interrupted command has left it
            address = left[0] if left else assign(datastore, owner, request, terms, session.handle)

            net = host_net(address)
            if version == 6 and session.namespace.ipv6_is_off(attached):
                undo(session.namespace.disable_ipv6, attached)
            undo(session.namespace.restore_loopback, session.loopback)
            undo(session.namespace.unconfigure, attached, [net], next_hops)
            session.namespace.configure(attached, [net], next_hops, session.host_mac)
            hops = {version: terms.next_hop}
            size = mtu.of_interface(datastore, [str(address)], terms.pools, hops, terms.mtu)
            before = session.mtu(attached)
            if before > size:
                undo(session.set_mtu, attached, before)
                session.set_mtu(attached, size)

            def add(stored: Endpoint) -> bool:
                if net in stored.nets_of(version):
                    return False
                stored.nets_of(version).append(net)
                if next_hops:
                    stored.set_gateway(version, terms.next_hop)
                return True

            undo(datastore.modify_endpoint, endpoint.id, _without(net))
            datastore.modify_endpoint(endpoint.id, add, session.entry)
        return address, True


def remove_address(datastore: DatastoreClient, workload: Workload, address: IPAddress, interface: str | None) -> None:
    """Remove an address from a workload, which need not run. Raises NotFound if the workload does not have the address.

    If the address is the workload's last of its IP version, the next hop and the default route of this version are
    removed, too. Raises CalicoError if a step fails: then the steps before are not undone, and the call can be
    repeated. Raises CalicoError also if the name of the workload's interface is not `interface` (None: any name).
    """
    with WorkloadSession.enter(datastore, workload, must_run=False) as session:
        workload = session.workload
        endpoint = session.only_endpoint()
        net = host_net(address)
        if net not in endpoint.nets and address not in session.held:
            raise NotFound(f"IP {address} is not assigned to {workload.name}.")
        attached = session.attached_interface()
        if attached is not None:
            session.refuse_other_interface(attached, interface)
        others = [other for other in endpoint.nets_of(address.version) if other != net]
        if address not in session.held:
            session.correct_handle(address)

        datastore.check_endpoints_writable([endpoint.id], workload.handle)
        session.lock.mark_in_progress()
        if address not in session.held:
            # assigned by an old tool, without a handle: only the endpoint names its owner, so it is released first
            datastore.ipam.release([address], {None})
        datastore.modify_endpoint(endpoint.id, _without(net), session.entry)
        if attached is not None:
            session.namespace.unconfigure(attached, [net], [] if others else [address.version])
        if session.holding is not None:
            datastore.ipam.release_held(session.holding, [address])
        session.lock.clear_mark()


def _without(net: str) -> Callable[[Endpoint], bool]:
    """Return a function for modify_endpoint that removes `net`, such as `address/32`, from an endpoint.

    If the endpoint has no other net of the same IP version, the function also removes the next hop of this version.
    """

    def change(endpoint: Endpoint) -> bool:
        version = version_of(net)
        if net not in endpoint.nets_of(version):
            return False
        endpoint.nets_of(version).remove(net)
        if not endpoint.nets_of(version):
            endpoint.set_gateway(version, None)
        return True

    return change


class WorkloadSession:
    """A locked workload with its open namespace, if it has one, and its state in the store and in the kernel.

    `endpoint` is the workload's endpoint, None if it has none. `held` maps the addresses of the workload's handle on
    this host to their owners, and `holding` is the result of Ipam.holding that contains them, which may be None.
    `handle` is the handle as it was read, None if it was changed since. `known` is the result of connected.get.
    `host_mac` is the MAC of the host end of the veth pair: HOST_MAC until `attached_interface` has read it from the
    kernel.
    """

    def __init__(
        self,
        datastore: DatastoreClient,
        workload: Workload,
        lock: WorkloadLock,
        namespace: netns.Namespace | None,
    ) -> None:
        self.datastore = datastore
        self.workload = workload
        self.lock = lock
        self.host_mac = netns.HOST_MAC
        self._namespace = namespace
        self.known = connected.get(datastore.host, workload.orchestrator, workload.id)
        # else, an interrupted command may have assigned addresses
        is_new = self.known is None and not lock.interrupted
        stored = datastore.read_workload(workload.handle, _places(datastore.host, workload), is_new)
        self.stored_otherwise = _is_stored_otherwise(workload, stored)
        self._entries = {} if self.stored_otherwise else stored.endpoints
        endpoints = [Endpoint.from_json(id, entry.value, entry.key) for id, entry in self._entries.items()]
        if len(endpoints) > 1:
            raise CalicoError(
                f"{workload.name} has {len(endpoints)} endpoints, where this command knows one: "
                + ", ".join(endpoint.id.endpoint for endpoint in endpoints)
            )
        self.endpoint = endpoints[0] if endpoints else None
        if self.endpoint is not None and not self.endpoint.id.is_valid:
            raise CalicoError(
                f"the id of {workload.name}'s endpoint, {self.endpoint.id.endpoint!r}, is not hexadecimal. Run "
                f"'calicoctl container remove {workload.name}' and connect it again."
            )
        self._set_handle(stored.handle, is_assumed=not stored.is_handle_read)
        self._seen: netns.Inspection | None = None

    @classmethod
    @contextmanager
    def enter(
        cls, datastore: DatastoreClient, workload: Workload, must_run: bool = True, patience: float | None = None
    ) -> Iterator[WorkloadSession]:
        """Lock the workload, open its namespace, and read its state from the store and the kernel. Raises CalicoError.

        If `must_run` is False, the workload need not have a namespace. For `patience`, see WorkloadLock. If a
        namespace's endpoint is stored under the other spelling of its path, the session is for the workload
        Workload.other_spelling.
        """
        with ExitStack() as stack:
            lock = stack.enter_context(WorkloadLock(datastore.host, workload.orchestrator, workload.id, patience))
            namespace = None
            try:
                namespace = stack.enter_context(netns.Namespace(workload.namespace_path(), workload.name))
            except CalicoError:
                if must_run:
                    raise
            if namespace is not None and namespace.is_own():
                raise CalicoError(f"{workload.name} cannot be connected: its network namespace is the host's own.")
            session = cls(datastore, workload, lock, namespace)
            twin = workload.other_spelling
            if session.stored_otherwise and twin is not None:
                lock = stack.enter_context(WorkloadLock(datastore.host, twin.orchestrator, twin.id))
                session = cls(datastore, twin, lock, namespace)
            yield session

    def read_handle(self) -> None:
        """Read the workload's handle, and set `held`, `holding` and `handle`. Raises CalicoError."""
        self._set_handle(self.datastore.ipam.handles.read(self.workload.handle))

    def correct_handle(self, address: IPAddress) -> None:
        """Have the workload's handle name the block of `address`, if it should, and read it. Raises CalicoError."""
        ipam = self.datastore.ipam
        self._set_handle(ipam.handles.recount(self.workload.handle, [ipam.cidr_of(address)]))

    def _set_handle(self, entry: Entry | None, is_assumed: bool = False) -> None:
        """Set `held`, `holding` and `handle`. `entry` is the handle's entry; for `is_assumed`, see KnownHandle."""
        workload, holding = self.workload, self.datastore.ipam.holding(self.workload.handle, entry)
        self.holding: Holding | None = holding
        self.held = {} if holding is None else holding.owners
        self.handle: KnownHandle | None = KnownHandle(entry, is_assumed=is_assumed)
        if holding is not None:
            self.handle = KnownHandle(holding.entry, holding.blocks)
        refuse_other_path(workload, *([self.known.path] if self.known is not None else paths_of(self.held.values())))

    @property
    def entry(self) -> Entry | None:
        return next(iter(self._entries.values()), None)

    @property
    def namespace(self) -> netns.Namespace:
        assert self._namespace is not None, "only a workload with a namespace is attached"
        return self._namespace

    @property
    def loopback(self) -> netns.Loopback:
        return self._inspection.loopback

    @property
    def _inspection(self) -> netns.Inspection:
        """What the namespace contains, which is read when it is first needed, and again after `refresh`."""
        if self._seen is None:
            self._seen = netns.Inspection() if self._namespace is None else self._namespace.inspect()
        return self._seen

    def refresh(self) -> None:
        """Have the namespace read again when it is needed, since it has changed."""
        self._seen = None

    def attached_interface(self, also_down: bool = False) -> str | None:
        """Return the name of the interface inside the workload that is the endpoint's veth; None if there is none.

        With `also_down`, an interface whose host end is down counts, too. `host_mac` is set to the MAC of the host end.
        """
        host_end = netns.find_interface(self.endpoint.id.interface) if self.endpoint is not None else None
        if host_end is None or not (host_end.up or also_down):
            return None
        self.host_mac = host_end.mac
        own = self._namespace.own_end(host_end) if self._namespace is not None else None
        return None if own is None else own.name

    def mtu(self, attached: str) -> int:
        """Return the MTU of the interface inside the workload with the name `attached`; 0 if there is none."""
        interface = self.namespace.interface(attached)
        return interface.mtu if interface is not None else 0

    def set_mtu(self, attached: str, size: int) -> None:
        """Set the MTU of both ends of the workload's veth pair. `attached` is the name of the end in the workload."""
        self.namespace.set_mtu(attached, size)
        netns.set_mtu(self.only_endpoint().id.interface, size)

    def _pairs(self) -> list[tuple[Interface, Interface]]:
        return [] if self._namespace is None else self._namespace.pairs_of(self._inspection.interfaces)

    def only_endpoint(self) -> Endpoint:
        """Return the workload's endpoint; raise NotFound if it has none."""
        if self.endpoint is None:
            raise not_connected(self.workload.name)
        return self.endpoint

    def connected(self, interface: str | None) -> tuple[Endpoint, str]:
        """Return the endpoint, and the name of its interface inside the workload.

        Raises CalicoError if the endpoint or the interface is missing, or if the name is not `interface` (None: any
        name).
        """
        endpoint, attached = self.only_endpoint(), self.attached_interface()
        if attached is None:
            raise CalicoError(
                f"{self.workload.name} has lost its interface. Re-attach it with 'calicoctl container "
                f"add {self.workload.name} {(endpoint.addresses or ['ipv4'])[0]}'."
            )
        self.refuse_other_interface(attached, interface)
        return endpoint, attached

    def remove_incomplete_pairs(self) -> None:
        """Delete the veth pairs that an interrupted command has created for this workload, which has no endpoint.

        Their names are derived from the attributes of the addresses in `held`.
        """
        for name in interfaces_of(self.held.values()):
            self._delete(name)

    def remove_orphans(self) -> None:
        """Delete the workload's veth pairs whose endpoints are no longer in the store, for example after a restore.

        A pair whose host end is down is not deleted.
        """
        for _, host_end in self._pairs():
            # a pair whose host end is down may belong to another command in progress
            if (
                host_end.name.startswith(INTERFACE_PREFIX)
                and host_end.up
                and not self.datastore.knows_interface(host_end.name)
            ):
                self._delete(host_end.name)

    def remove_remains(self, endpoint: Endpoint) -> None:
        """Delete what is left of the veth pair of an endpoint: an incomplete pair, or one whose host end was renamed.

        Raises Conflict if `attached_interface` finds a complete pair now.
        """
        if self.attached_interface() is not None:  # its old name was restored just now
            raise Conflict(f"{self.workload.name} has its interface back; retry")
        names = [host_end.name for own, host_end in self._pairs() if own.mac == endpoint.mac]
        renamed = [name for name in names if not name.startswith(INTERFACE_PREFIX)]  # others belong to other endpoints
        for name in (endpoint.id.interface, *renamed):
            self._delete(name)

    def _delete(self, name: str) -> None:
        """Delete an interface of the host, if it exists.

        If the store cannot be written, CalicoError is raised, and the interface is not deleted.
        """
        if netns.find_interface(name) is not None:
            ids = [self.endpoint.id] if self.endpoint is not None else []
            self.datastore.check_endpoints_writable(ids, self.workload.handle)
            netns.delete_interface(name)
            self.refresh()

    def clear_after_another_process(self) -> None:
        """Disconnect the workload if its path leads through another process now than when the workload was connected.

        If the earlier process is not known, the process of now counts as another one. In both cases, the workload stays
        connected if its veth pair still leads into the namespace at the path.
        """
        if self.endpoint is None:
            return
        now = process_started(self.workload.path or "")
        is_another = now not in (None, self.known and self.known.started)
        if is_another and self.attached_interface(also_down=True) is None:
            self.disconnect()

    def disconnect(self) -> None:
        """Remove the workload's endpoint, its interface and its addresses. Raises CalicoError if a step fails."""
        _clear(self.datastore, self.workload, self.lock, self._entries, self.holding)
        self._entries, self.endpoint, self.known = {}, None, None
        self.held, self.holding, self.handle = {}, None, None
        self.refresh()

    def remember(self, undo: Callable[..., object] | None = None) -> None:
        """Write the workload's file, which says that it is connected on this host (connected.py). Raises CalicoError.

        If `undo`, from _rollback_on_failure, is given, a rollback removes the file, unless it existed before.
        """
        workload, path = self.workload, self.workload.path or ""
        key = (self.datastore.host, workload.orchestrator, workload.id)
        if undo is not None and self.known is None:
            undo(connected.forget, *key)
        # a container's namespace is open, but may have lost its path
        started = namespace_identity(path) or "gone" if workload.orchestrator == CNI else process_started(path)
        is_labelled = workload.started_at is not None
        connected.put(*key, path, started, is_labelled, workload.network, workload.interface)

    def refuse_other_endpoint(self) -> None:
        """Raise CalicoError if a veth pair with a host end `cali…` leads into the workload's namespace.

        The namespace is then connected as another workload, for example under another path.
        """
        for interface, host_end in self._pairs():
            if host_end.name.startswith(INTERFACE_PREFIX):
                raise CalicoError(
                    f"{self.workload.name} has already been configured with Calico Networking: its interface "
                    f"{interface.name} is that of the endpoint with {host_end.name}."
                )

    def has_default_route(self, version: int, interface: str) -> bool:
        """Return whether the workload has a default route of an IP version through its interface `interface`."""
        return self._inspection.default_routes.get(version, "").endswith(f"dev {interface}")

    def refuse_default_route(self, version: int, but_through: str | None = None) -> None:
        route = self._inspection.default_routes.get(version)
        if route is not None and not (but_through and self.has_default_route(version, but_through)):
            is_cni = self.workload.orchestrator == CNI
            advice = "Leave out its other network" if is_cni else "Run the container with --net=none"
            raise CalicoError(
                f"{self.workload.name} has an IPv{version} default route already ({route}), and Calico's cannot be set "
                f"beside it. {advice}."
            )

    def refuse_interface(self, name: str) -> None:
        if any(one.name == name for one in self._inspection.interfaces):
            advice = " Choose another name with --interface" if self.workload.orchestrator != CNI else ""
            advice += " or with the label calico.interface" if self.workload.started_at is not None else ""
            raise CalicoError(f"{self.workload.name} has an interface {name} already.{advice and advice + '.'}")

    def refuse_other_interface(self, attached: str, wanted: str | None) -> None:
        if wanted not in (None, attached):
            raise CalicoError(f"{self.workload.name} is connected through its interface {attached}, not {wanted}.")


@contextmanager
def _rollback_on_failure(session: WorkloadSession) -> Iterator[Callable[..., object]]:
    """Yield a function that registers an undo: a function and its arguments, called if the body of `with` fails.

    Undos are called in reverse order. An undo may be registered before its step: it must be harmless if the step was
    not done. If an undo raises CalicoError, the others are still called; if the body failed with a CalicoError, the
    error that is raised at the end names the failures of the undos, too.

    Inside `with`, the workload has the mark of a change in progress (locks.py). The mark stays if an undo has failed.
    """
    failures: list[str] = []

    def attempt(function: Callable[..., object], *arguments: object) -> None:
        try:
            function(*arguments)
        except CalicoError as error:
            failures.append(str(error))

    session.lock.mark_in_progress(session.workload.docker_name)
    try:
        with ExitStack() as stack:
            yield lambda function, *arguments: stack.callback(attempt, function, *arguments)
            stack.pop_all()
    except CalicoError as error:
        if failures:
            others = "; ".join(failure for failure in dict.fromkeys(failures) if failure != str(error))
            raise CalicoError(
                f"{str(error).rstrip('.')}. Not all of it could be undone{others and f' ({others})'}: run 'calicoctl "
                f"container remove {session.workload.name}' when that works again."
            ) from error
        raise
    finally:
        if failures:
            session.lock.mark_in_progress(session.workload.docker_name)  # an undo may have removed the mark
        else:
            session.lock.clear_mark()


def _attach(
    session: WorkloadSession,
    name: str,
    interface: str,
    nets: list[str],
    next_hops: dict[int, str],
    mac: str | None,
    size: int,
    undo: Callable[..., object],
) -> str:
    """Create a veth pair and configure both ends, the end on the host last; return the MAC of the workload's end.

    Until the agent programs its policy, the workload's packets are dropped: see `ensure_guard`.

    `name` is the name of the host end, `interface` that of the workload's end. `nets` are the addresses of the
    workload's end, as `address/32` or `address/128`, and `next_hops` the gateways by IP version. `mac` is the MAC of
    the workload's end; if it is None, the kernel chooses one. `size` is the MTU of both ends. `undo` is from
    _rollback_on_failure.
    """
    if netns.find_interface(name) is not None:
        raise CalicoError(f"this host has an interface {name} already, of another endpoint; try again")
    ensure_guard(session.datastore)
    undo(netns.delete_interface, name)
    netns.create_veth(name, session.namespace, interface, size, mac)
    undo(session.namespace.restore_loopback, session.loopback)
    mac = session.namespace.configure(interface, nets, next_hops, netns.HOST_MAC)
    netns.set_up(name)
    return mac


def ensure_guard(datastore: DatastoreClient) -> None:
    """Create the nftables tables of guard.py, unless these or the agent's exist. Raises CalicoError.

    They drop all packets of workloads until the agent programs its policy. They are not created if Felix of 2015, which
    has rules of its own, runs on this host.
    """
    with guard.kept() as tables:
        if not tables.exists() and not _has_old_felix(datastore):
            tables.create()


def _has_old_felix(datastore: DatastoreClient) -> bool:
    if not datastore.statuses.of_old_agent():
        return False
    # others may write to the store, so it does not suffice; chains that Felix has left drop packets as well
    from calicoctl import iptables  # imports subprocess, which most commands do not need

    return any("felix-FORWARD" in chains for chains in iptables.old_felix_chains().values())


def _adopt(
    session: WorkloadSession, requests: Sequence[AddressRequest], interface: str, reserved: Sequence[Reserved]
) -> tuple[dict[int, IPAddress], EndpointId]:
    """Keep the addresses that an interrupted command has assigned for one endpoint, and release the workload's others.

    An address can be kept if it can be used for one of `requests` (see usable), and if its attributes are those that a
    new address would get: among others, the interface's name `interface`. All addresses that are kept have the same
    endpoint id in their attributes. `reserved` has an item for each of `requests`.

    Returns the addresses that are kept, by the position of the request that each satisfies, and their endpoint id. If
    no address can be kept, the endpoint id is a new one.
    """
    workload = session.workload
    kept: dict[int, IPAddress] = {}
    kept_id = EndpointId(session.datastore.host, workload.orchestrator, workload.id, _new_endpoint())
    for address, owner in session.held.items():
        id = EndpointId(session.datastore.host, workload.orchestrator, workload.id, endpoint_of(owner) or "")
        is_its_own = id.endpoint and _is_like(owner, owner_of(workload, id, interface))
        unmet = (number for number in range(len(requests)) if number not in kept)
        number = next((n for n in unmet if usable(requests[n], address, reserved[n])), None)
        if is_its_own and number is not None and (not kept or id == kept_id):
            kept[number], kept_id = address, id
        else:
            session.datastore.ipam.release([address], {workload.handle})
            session.handle = None
    return kept, kept_id


def _is_like(owner: Owner, other: Owner) -> bool:
    # the container's name may have changed
    facts, others = ({**one.secondary, "workload_name": None} for one in (owner, other))
    return owner.handle == other.handle and facts == others


def _refuse_in_use(session: WorkloadSession, address: IPAddress) -> None:
    """Raise AddressTaken if an address that the workload's endpoint lists is now used by something else.

    This may be this host, one of its gateways, or another host, for example (Reserved.user).
    """
    why = reserved_addresses(session.datastore, address.version).user(str(address))
    if why is not None:
        raise AddressTaken(
            f"{session.workload.name}'s address {address} is {why} now. Run 'calicoctl container remove "
            f"{session.workload.name}' and connect it again."
        )


def _release_unlisted(datastore: DatastoreClient, workload: Workload, endpoint: Endpoint) -> None:
    held = datastore.ipam.held_by(workload.handle) or {}
    datastore.ipam.release([a for a in held if host_net(a) not in endpoint.nets], {workload.handle})


def _next_hop(datastore: DatastoreClient, endpoint: Endpoint, version: int) -> str:
    """Return the next hop of an IP version: this host's registered address or, if there is none, that in the endpoint.

    Raises CalicoError if the endpoint has none either.
    """
    try:
        return datastore.hosts.next_hop(version)
    except CalicoError:
        before = endpoint.gateway(version)
        if before is None:
            raise
        return str(parse_address(before))


def _reassign(session: WorkloadSession, address: IPAddress, owner: Owner, undo: Callable[..., object]) -> None:
    """Assign an address that the workload's endpoint lists to `owner` again, if the address is free.

    Does nothing if the address is assigned without a handle. Raises AddressTaken if it is assigned to another handle,
    or if it is free in IPAM, but used by something else (see _refuse_in_use). `undo` is from _rollback_on_failure.
    """
    ipam = session.datastore.ipam
    holder = ipam.owner(address)
    if holder is None:
        _refuse_in_use(session, address)
        undo(ipam.release, [address], {owner.handle})
        ipam.assign(address, owner)
    elif holder.handle is not None:
        raise AddressTaken(
            f"{session.workload.name}'s address {address} has been given to another{owner_text(holder)}. Run "
            f"'calicoctl container remove {session.workload.name}' and connect it again."
        )


def _new_endpoint() -> str:
    import uuid  # with platform, which most commands do not need

    # a host end is named by the first digits: those of a real version 1 are from the time, so two could be the same
    return uuid.UUID(bytes=os.urandom(16), version=1).hex
