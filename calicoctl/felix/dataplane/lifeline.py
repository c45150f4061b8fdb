"""Removes routes and map elements of an earlier agent that keep this host from reaching its store.

A running agent does not let endpoints use an address that this host needs (desired/admission.py). But an earlier agent
may have programmed such an address. If it is the address of a member of etcd, the present agent may be unable to read
the store. So this module does not need the store: it compares the state of the kernel with the addresses that this host
needs.
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
    """Remove each of the agent's routes to endpoints if its destination is an address that this host itself needs.

    Yields a sentence for each such route: that the route was removed, or why it could not be removed. `routes.read`
    must have been called before.
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
    """Remove the overlay's routes to networks that contain an address without which this host cannot reach etcd.

    Yields a sentence for each removed route, and a sentence with the kernel's error if the kernel refuses to remove a
    route. `vxlan.read` must have been called before.
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
    """Delete the addresses that this host needs to reach etcd from the maps `owners4` and `owners6`.

    If such an address is in a map, our tables drop or check all packets from it (host_rules.py). Yields a sentence for
    each address that was in a map: that it was deleted, or why it could not be deleted.
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
