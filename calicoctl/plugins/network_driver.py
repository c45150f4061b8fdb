"""The network driver `calico` of Docker networks: networks, and the endpoints of containers.

The calls come in the order that /Plugin.Activate, CreateNetwork, CreateEndpoint, Join, ProgramExternalConnectivity;
RevokeExternalConnectivity, Leave, DeleteEndpoint, DeleteNetwork have here. No call asks the engine anything: while it
waits for an answer, or starts, it may not answer itself.

Source: libnetwork's docs/remote.md and drivers/remote/api/api.go.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from calicoctl.addresses import BITS, version_of
from calicoctl.errors import CalicoError
from calicoctl.plugins import endpoints, networks, requests
from calicoctl.plugins.ipam_driver import SPACE
from calicoctl.plugins.networks import Networks
from calicoctl.plugins.server import Route
from calicoctl.plugins.stores import Stores
from calicoctl.workloads import libnetwork
from calicoctl.workloads.docker_networks import DRIVER, OPTION

if TYPE_CHECKING:
    from calicoctl.datastore.client import DatastoreClient
    from calicoctl.plugins.endpoints import Attached

_PORTS = "com.docker.network.portmap"
_NEXT_HOP, _ON_LINK = 0, 1
"""The types of routes. Source: libnetwork's types/types.go."""


class NetworkDriver:
    """Answers the calls of a network driver."""

    def __init__(self, stores: Stores, known: Networks) -> None:
        self._stores = stores
        self._networks = known
        self._lock = threading.Lock()
        self._joined: dict[str, str] = {}
        """Path of a container's namespace -> the id of the endpoint that it was joined to."""

    def routes(self) -> dict[str, Route]:
        return {
            "/Plugin.Activate": lambda request: {"Implements": ["NetworkDriver"]},
            "/NetworkDriver.GetCapabilities": lambda request: {"Scope": "local", "ConnectivityScope": "global"},
            "/NetworkDriver.CreateNetwork": self.create_network,
            "/NetworkDriver.DeleteNetwork": self.delete_network,
            "/NetworkDriver.CreateEndpoint": self.create_endpoint,
            "/NetworkDriver.EndpointOperInfo": lambda request: {"Value": {}},
            "/NetworkDriver.Join": self.join,
            "/NetworkDriver.ProgramExternalConnectivity": lambda request: {},
            "/NetworkDriver.RevokeExternalConnectivity": lambda request: {},
            "/NetworkDriver.Leave": self.leave,
            "/NetworkDriver.DeleteEndpoint": self.delete_endpoint,
            "/NetworkDriver.DiscoverNew": lambda request: {},
            "/NetworkDriver.DiscoverDelete": lambda request: {},
        }

    def create_network(self, request: dict[str, Any]) -> dict[str, Any]:
        requests.id(request, "NetworkID")
        for field in ("IPv4Data", "IPv6Data"):
            pools = request.get(field) or []
            if not isinstance(pools, list) or not all(isinstance(pool, dict) for pool in pools):
                raise CalicoError(f"{field} is not a list of objects")
            for pool in pools:
                if pool.get("AddressSpace") != SPACE:
                    raise CalicoError(
                        f"a network with --driver={DRIVER} has its addresses from Calico's pools: create it with "
                        "--ipam-driver=calico-ipam, too"
                    )
                if pool.get("AuxAddresses"):
                    raise CalicoError(
                        "a Calico network has no --aux-address: what no container may have is left out of the pools"
                    )
        self._networks.put(networks.of_request(request))
        return {}

    def delete_network(self, request: dict[str, Any]) -> dict[str, Any]:
        self._networks.remove(requests.id(request, "NetworkID"))
        return {}

    def create_endpoint(self, request: dict[str, Any]) -> dict[str, Any]:
        id = requests.id(request, "EndpointID")
        options = requests.fields(request, "Options")
        if options.get(_PORTS):
            raise CalicoError(
                "-p and -P have no effect in a Calico network, whose containers have addresses that are reached "
                "directly: omit them, and allow the port in a profile"
            )
        interface = requests.fields(request, "Interface")
        given = requests.mac(interface, "MacAddress")
        found = (requests.address(interface, "Address", 4), requests.address(interface, "AddressIPv6", 6))
        addresses = [address for address in found if address is not None]
        if not addresses:
            raise CalicoError("the endpoint has no address")
        network = self._networks.named(requests.id(request, "NetworkID"))
        profiles = networks.profiles_of(network, options.get(OPTION))
        by_option = OPTION in options or network.profiles is not None
        mac = given or endpoints.mac_of(id)

        def create(datastore: DatastoreClient) -> None:
            if by_option:
                for profile in profiles:
                    datastore.require_profile(profile)
            else:
                networks.ensure_profile(datastore, self._networks, network)
            endpoints.create(datastore, id, network, addresses, mac, profiles)

        self._stores.call(create)
        return {"Interface": {} if given else {"MacAddress": mac}}

    def join(self, request: dict[str, Any]) -> dict[str, Any]:
        network = self._networks.get(requests.id(request, "NetworkID"))
        id, sandbox = requests.id(request, "EndpointID"), requests.sandbox(request)
        name = (network.name if network is not None else None) or "NETWORK"
        with self._lock:
            if self._joined.setdefault(sandbox, id) != id:
                raise endpoints.second_network(name)
        try:
            endpoints.refuse_second(sandbox, libnetwork.endpoint_id(self._stores.host, id), name)
            attached = self._stores.call(lambda datastore: endpoints.attach(datastore, id))
        except BaseException:
            self.forget({id})
            raise
        return _joined(attached, internal=network is not None and network.internal)

    def leave(self, request: dict[str, Any]) -> dict[str, Any]:
        id = requests.id(request, "EndpointID")
        self.forget({id})
        endpoints.detach(self._stores.host, id)
        return {}

    def delete_endpoint(self, request: dict[str, Any]) -> dict[str, Any]:
        id = requests.id(request, "EndpointID")
        self.forget({id})
        endpoints.detach(self._stores.host, id)
        self._stores.remove(lambda datastore: endpoints.deactivate(datastore, id))
        return {}

    def joined(self) -> set[str]:
        """Return the ids of the endpoints that a container has joined since this process started, and has not left."""
        with self._lock:
            return set(self._joined.values())

    def forget(self, gone: set[str]) -> None:
        """Forget that containers have joined the endpoints with the ids in `gone`."""
        with self._lock:
            self._joined = {sandbox: id for sandbox, id in self._joined.items() if id not in gone}


def _joined(attached: Attached, internal: bool) -> dict[str, Any]:
    """Return the answer to Join: the interface, the container's gateways, and its routes to the pools.

    The routes are for a container whose default route is that of another network, and for an internal network: with
    `internal`, the gateways are empty.
    """
    hops = attached.next_hops
    on_link = [{"Destination": f"{hop}/{BITS[version]}", "RouteType": _ON_LINK} for version, hop in hops.items()]
    to_pools = [
        {"Destination": cidr, "RouteType": _NEXT_HOP, "NextHop": hops[version_of(cidr)]} for cidr in attached.pools
    ]
    return {
        "InterfaceName": {"SrcName": attached.peer, "DstPrefix": "eth"},
        "Gateway": "" if internal else hops.get(4, ""),
        "GatewayIPv6": "" if internal else hops.get(6, ""),
        "StaticRoutes": on_link + to_pools,
        "DisableGatewayService": True,
    }
