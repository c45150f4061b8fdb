"""Creates and removes the endpoints of Docker networks, with their veth pairs and addresses.

Each function can be repeated. The engine undoes what has failed by the calls of a removal. If neither this process nor
the engine does that, for example because both were killed, collection.py removes what is left.

A function that changes an endpoint holds the lock of its workload.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calicoctl.addresses import host_net, version_of
from calicoctl.clock import now
from calicoctl.datastore.keys import INTERFACE_PREFIX
from calicoctl.datastore.model import Endpoint
from calicoctl.errors import CalicoError, KeyExists, NamespaceError, NotFound
from calicoctl.felix.heartbeat import Identity
from calicoctl.workloads import libnetwork, mtu, netns, network_profiles
from calicoctl.workloads.libnetwork import LIBNETWORK
from calicoctl.workloads.locks import WorkloadLock
from calicoctl.workloads.wiring import ensure_guard

if TYPE_CHECKING:
    from netaddr import IPAddress

    from calicoctl.datastore.blocks import Owner
    from calicoctl.datastore.client import DatastoreClient
    from calicoctl.datastore.keys import EndpointId
    from calicoctl.plugins.networks import Network

PEER_PREFIX = "tmp"
"""The prefix of the name that the workload's end of a veth pair has until the engine moves it into the container."""


@dataclass(frozen=True)
class Attached:
    """The veth pair of an endpoint: `peer` is the name of the end that the engine moves into the container.

    `next_hops` are the gateways by IP version, and `pools` the CIDRs of all pools of these IP versions.
    """

    peer: str
    next_hops: dict[int, str]
    pools: list[str]


def mac_of(id: str) -> str:
    """Return the MAC of the endpoint `id`, if the user has not chosen one: a local one, with digits of the id."""
    return ":".join(["02", *(id[at : at + 2] for at in range(0, 10, 2))])


def peer_of(id: EndpointId) -> str:
    return PEER_PREFIX + id.endpoint[:11]


def create(
    datastore: DatastoreClient,
    id: str,
    network: Network,
    addresses: Sequence[IPAddress],
    mac: str,
    profiles: Sequence[str],
) -> None:
    """Create an endpoint in the store, and make it the owner of `addresses`, which were requested for it.

    It has the profiles from the beginning, unless others may be kept for its container (network_profiles.py). Raises
    CalicoError.
    """
    endpoint = Endpoint(libnetwork.endpoint_id(datastore.host, id), mac=mac)
    network_profiles.assign(datastore.host, endpoint, network.id, profiles)
    endpoint.name = endpoint.id.interface
    endpoint.extra[libnetwork.NETWORK] = {"id": network.id, "name": network.name}
    for address in addresses:
        endpoint.nets_of(address.version).append(host_net(address))
        endpoint.set_gateway(address.version, datastore.hosts.next_hop(address.version))
    with _locked(datastore, id):
        for address in addresses:
            datastore.ipam.transfer(
                address, libnetwork.requests_of(datastore.host), libnetwork.owner(datastore.host, id)
            )
        try:
            datastore.create_endpoint(endpoint)
        except KeyExists:  # the call is repeated
            datastore.modify_endpoint(endpoint.id, lambda stored: _become(stored, endpoint))


def _become(stored: Endpoint, wanted: Endpoint) -> bool:
    if stored.to_dict() == wanted.to_dict():
        return False
    stored.__dict__.update(wanted.__dict__)
    return True


def attach(datastore: DatastoreClient, id: str) -> Attached:
    """Create the veth pair of an endpoint, both ends on the host, and bring the host's end up.

    Its packets are dropped until the agent enforces its profiles. Raises NotFound if there is no such endpoint, and
    CalicoError.
    """
    with _locked(datastore, id):
        endpoint, entries, configured = datastore.read_for_interface(libnetwork.endpoint_id(datastore.host, id))
        if endpoint is None or endpoint.state != "active":
            raise NotFound(f"endpoint {id[:12]} does not exist, or has been removed")
        addresses = endpoint.addresses
        hops = {version_of(address): endpoint.gateway(version_of(address)) for address in addresses}
        next_hops = {version: hop for version, hop in hops.items() if hop is not None}
        pools = [pool for version in next_hops for pool in datastore.readable_pools(version, entries[version])[0]]
        size = mtu.of_interface(datastore, addresses, pools, next_hops, configured)
        name, peer = endpoint.id.interface, peer_of(endpoint.id)
        ensure_guard(datastore)
        netns.create_veth_here(name, peer, size, endpoint.mac or mac_of(id))  # perhaps after an interrupted call
        return Attached(peer, next_hops, [pool.cidr for pool in pools])


def detach(host: str, id: str) -> None:
    """Delete the veth pair of an endpoint, wherever its other end is. Raises CalicoError."""
    netns.delete_interface(libnetwork.endpoint_id(host, id).interface)


def deactivate(datastore: DatastoreClient, id: str) -> None:
    """Make an endpoint inactive, if it exists: its container has left it, and its addresses will be released."""

    def change(stored: Endpoint) -> bool:
        if stored.state == "inactive":
            return False
        stored.state, stored.inactive_since = "inactive", now()
        return True

    with _locked(datastore, id), suppress(NotFound):
        datastore.modify_endpoint(libnetwork.endpoint_id(datastore.host, id), change)


def release(datastore: DatastoreClient, address: IPAddress) -> None:
    """Release an address of a request, or of an endpoint of this host: then the endpoint and its pair are removed, too.

    Does nothing for an address that has another owner, or none. Another address of the endpoint stays assigned.
    """
    owner = datastore.ipam.owner(address)
    if owner is None or owner.secondary.get("host") != datastore.host or owner.handle is None:
        return
    if owner.handle.startswith(libnetwork.requests_of(datastore.host)):
        datastore.ipam.release([address], {owner.handle})
        return
    id = _endpoint_of(owner, datastore.host)
    if id is None:
        return
    with _locked(datastore, id):
        detach(datastore.host, id)
        datastore.remove_endpoint(libnetwork.endpoint_id(datastore.host, id))
        datastore.ipam.release([address], {owner.handle})


def is_left(datastore: DatastoreClient, address: IPAddress) -> bool:
    """Return whether an address is that of an endpoint of this host that has no interface in a container.

    The container of such an endpoint has left it, or is just about to get its interface. False if another machine's
    agent has this host's name, since the container may be there.
    """
    owner = datastore.ipam.owner(address)
    id = None if owner is None else _endpoint_of(owner, datastore.host)
    if id is None or is_of_another_machine(datastore):
        return False
    interface = netns.find_interface(libnetwork.endpoint_id(datastore.host, id).interface)
    return interface is None or not interface.peer_is_elsewhere


def is_of_another_machine(datastore: DatastoreClient) -> bool:
    """Return whether another machine's agent has this host's name."""
    status = datastore.statuses.of_host()
    return status is not None and Identity.of(status).is_other_machine(Identity.own())


def _endpoint_of(owner: Owner, host: str) -> str | None:
    """Return the id of the endpoint of a Docker network on `host` that owns an address; None if there is none."""
    id = str(owner.secondary.get("endpoint"))
    is_ours = owner.secondary.get("host") == host and libnetwork.is_id(id)
    return id if is_ours and owner.handle == libnetwork.workload(id).handle else None


def _locked(datastore: DatastoreClient, id: str) -> WorkloadLock:
    return WorkloadLock(datastore.host, LIBNETWORK, id)


def refuse_second(sandbox: str, id: EndpointId, network: str) -> None:
    """Raise CalicoError if the namespace at the path `sandbox` has the interface of another endpoint already.

    Does nothing if there is no namespace yet: the engine may create it after it has made all calls for a container.
    `network` is the name of the network that the container is to join.
    """
    with suppress(NamespaceError), netns.Namespace(sandbox, "the container") as namespace:
        for _, host_end in namespace.pairs():
            if host_end.name.startswith(INTERFACE_PREFIX) and host_end.name != id.interface:
                raise second_network(network)


def second_network(network: str) -> CalicoError:
    """Return the error for a container that is connected to Calico already, and is to join `network`."""
    # the engine keeps a running container in a network that it could not join, and tries that again at the next start
    return CalicoError(
        "the container is connected to Calico already, and can have no second interface of Calico's: which others it "
        "reaches is a matter of profiles, of which it can have several ('calicoctl container NAME profile append "
        f"PROFILE'). Stop it, and take it out of this network again: 'docker network disconnect {network} NAME'"
    )


def set_container(datastore: DatastoreClient, id: str, container: str, name: str) -> None:
    """Store the id and the name of the container of an endpoint, if the endpoint exists.

    If profiles are kept for the container, the endpoint gets them: see network_profiles.settle. Raises CalicoError.
    """

    def change(stored: Endpoint) -> bool:
        before: dict[str, Any] = stored.to_dict()
        network = stored.extra.get(libnetwork.NETWORK)
        if isinstance(network, dict) and libnetwork.is_id(network.get("id")):
            network_profiles.settle(datastore.host, stored, container, network["id"])
        stored.extra[libnetwork.CONTAINER] = container
        stored.workload_name = name or stored.workload_name
        return stored.to_dict() != before

    with _locked(datastore, id), suppress(NotFound):
        datastore.modify_endpoint(libnetwork.endpoint_id(datastore.host, id), change)
