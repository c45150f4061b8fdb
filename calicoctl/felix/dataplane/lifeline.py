"""Takes back what an earlier agent has given to endpoints although this host needs it: the way to etcd, above all.

While it runs, the agent gives nothing of that to endpoints (desired/admission.py). But a host whose store cannot be
reached because of a route to an endpoint would never read in the store that the route is wrong. So this works without
the store: by what the kernel has, and what this host needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from calicoctl.addresses import pack
from calicoctl.datastore.reserved import HostNetwork
from calicoctl.errors import CalicoError

if TYPE_CHECKING:
    from calicoctl.felix.dataplane.nft import Nft
    from calicoctl.felix.dataplane.routes import Routes


def take_back_routes(network: HostNetwork, routes: Routes) -> Iterator[str]:
    """Remove the agent's routes that lead to endpoints, but to addresses that this host needs.

    Yields a sentence for each route. The driver must have read the routes before.
    """
    for index, address in list(routes.routed()):
        why = network.has(address)
        if why is not None:
            try:
                routes.remove_route(index, address)
                yield f"the route to {address} led to an endpoint, but that is {why}; it was removed"
            except CalicoError as error:
                yield str(error)


def let_members_pass(network: HostNetwork, nft: Nft) -> Iterator[str]:
    """Remove the members of etcd from the maps with the addresses of endpoints, whose packets are dropped or checked.

    Yields a sentence for each member that was in there.
    """
    for name, size in (("owners4", 4), ("owners6", 16)):
        members = {pack(address): address for address in network.servers.members if len(pack(address)) == size}
        if not members:
            continue
        try:
            found = members.keys() & set(nft.keys("calico", name))
        except OSError:  # there is no such table
            continue
        for address in sorted(map(members.__getitem__, found)):
            try:
                nft.run(f"delete element inet calico {name} {{ {address} }}\n")
                yield f"packets from {address}, a member of etcd, were taken for those of an endpoint; they pass again"
            except CalicoError as error:
                yield str(error)
