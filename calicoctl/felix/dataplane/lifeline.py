"""Removes routes and map elements of an earlier agent that keep this host from reaching its store.

A running agent refuses endpoints the addresses that this host needs (desired/admission.py). But if an earlier agent has
programmed such an address, above all one of a member of etcd, the agent may be unable to read the store. So this module
does not need the store: it compares the state of the kernel with the addresses that this host needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from calicoctl.addresses import number_of, pack, version_of
from calicoctl.datastore.reserved import DNS_SERVER, HostNetwork, Network
from calicoctl.errors import CalicoError

if TYPE_CHECKING:
    from calicoctl.felix.dataplane.nft import Nft
    from calicoctl.felix.dataplane.routes import Routes
    from calicoctl.felix.dataplane.vxlan import Vxlan


def take_back_routes(network: HostNetwork, routes: Routes) -> Iterator[str]:
    """Remove the agent's route to an endpoint if its destination is an address that this host needs.

    Yields a sentence for each such route: that it was removed, or why it could not be removed. The driver `routes` must
    have read the routes before.
    """
    for index, address in list(routes.routed()):
        why = network.has(address) or (DNS_SERVER if address in network.servers.vital else None)
        if why is not None:
            try:
                routes.remove_route(index, address)
                yield f"the route to {address} led to an endpoint, but that is {why}; it was removed"
            except CalicoError as error:
                yield str(error)


def take_back_blocks(network: HostNetwork, vxlan: Vxlan) -> Iterator[str]:
    """Remove the overlay's routes to networks that contain an address that this host needs to reach etcd.

    Yields a sentence for each removed route, and a sentence if the kernel has refused to remove a route. The driver
    `vxlan` must have read the routes before.
    """
    covering = {}
    for route in vxlan.routes:
        block = Network.parse(route.cidr)
        inside = [a for a in sorted(network.servers.vital) if block.has(version_of(a), number_of(a))]
        if inside:
            covering[route] = inside[0]
    if not covering:
        return
    try:
        vxlan.apply_routes(vxlan.routes - covering.keys())
    except CalicoError as error:
        yield str(error)
    for route, address in covering.items():
        if route not in vxlan.routes:
            yield f"the route to {route.cidr} kept packets from {address}, on the way to etcd; it was removed"


def let_members_pass(network: HostNetwork, nft: Nft) -> Iterator[str]:
    """Remove the addresses that this host needs to reach etcd from the maps `owners4` and `owners6` (host_rules.py).

    Our tables drop or check packets from the addresses in these maps. Yields a sentence for each address that was in a
    map: that it was removed, or why it could not be removed.
    """
    for name, size in (("owners4", 4), ("owners6", 16)):
        members = {pack(address): address for address in network.servers.vital if len(pack(address)) == size}
        if not members:
            continue
        try:
            found = members.keys() & set(nft.keys("calico", name))
        except OSError:  # there is no such table
            continue
        for address in sorted(map(members.__getitem__, found)):
            try:
                nft.run(f"delete element inet calico {name} {{ {address} }}\n")
                yield f"packets from {address}, on the way to etcd, were taken for an endpoint's; they pass again"
            except CalicoError as error:
                yield str(error)
