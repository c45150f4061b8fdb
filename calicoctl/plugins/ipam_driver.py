"""The IPAM driver `calico-ipam` of Docker networks: pools, and the addresses of endpoints.

A pool's id says all of it, so nothing is kept of a pool: `ipv4` and `ipv6` stand for all pools of that IP version, and
a CIDR for itself.

Source: libnetwork's docs/ipam.md and ipams/remote/api/api.go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calicoctl.addresses import BITS, parse_pool_cidr
from calicoctl.datastore.handles import KnownHandle
from calicoctl.errors import AddressTaken, CalicoError
from calicoctl.plugins import endpoints, requests
from calicoctl.plugins.server import Route
from calicoctl.plugins.stores import Stores
from calicoctl.workloads import libnetwork
from calicoctl.workloads.addressing import AddressRequest, Terms, assign

if TYPE_CHECKING:
    from netaddr import IPAddress

    from calicoctl.datastore.client import DatastoreClient

SPACE = "calico"
"""The address space of all pools. A pool in another space is of another IPAM driver."""

_GATEWAY = "com.docker.network.gateway"
_TYPE = "RequestAddressType"
_EVERY = {4: "0.0.0.0/0", 6: "::/0"}
"""What the engine is told to be a pool if the network has no subnet: it only checks that addresses are inside."""


class IpamDriver:
    """Answers the calls of an IPAM driver."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._in_use: set[IPAddress] = set()
        """The addresses that this process has assigned, and that the engine has not released since."""

    def routes(self) -> dict[str, Route]:
        return {
            "/Plugin.Activate": lambda request: {"Implements": ["IpamDriver"]},
            "/IpamDriver.GetCapabilities": lambda request: {"RequiresMACAddress": False},
            "/IpamDriver.GetDefaultAddressSpaces": lambda request: {
                "LocalDefaultAddressSpace": SPACE,
                "GlobalDefaultAddressSpace": SPACE,
            },
            "/IpamDriver.RequestPool": self.request_pool,
            "/IpamDriver.ReleasePool": lambda request: {},
            "/IpamDriver.RequestAddress": self.request_address,
            "/IpamDriver.ReleaseAddress": self.release_address,
        }

    def request_pool(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the pool for a subnet or, without a subnet, for an IP version. Raises CalicoError if there is none."""
        version = 6 if request.get("V6") is True else 4
        pool, part = requests.text(request, "Pool"), requests.text(request, "SubPool")
        subnet = str(parse_pool_cidr(pool)) if pool else None
        wanted = str(parse_pool_cidr(part)) if part else subnet
        asked = AddressRequest(version, subnet=wanted)
        if wanted is not None and parse_pool_cidr(wanted).version != version:
            raise CalicoError(f"{wanted} is not an IPv{version} subnet")

        def check(datastore: DatastoreClient) -> None:
            datastore.hosts.next_hop(version)
            asked.pools(datastore)

        self._stores.call(check)
        return {
            "PoolID": wanted or f"ipv{version}",
            "Pool": subnet or _EVERY[version],
            "Data": {_GATEWAY: _EVERY[version]},  # else, the engine would request an address for a gateway
        }

    def request_address(self, request: dict[str, Any]) -> dict[str, Any]:
        """Assign an address to an owner of its own, until an endpoint is created with it.

        If the address that is asked for is that of an endpoint of this host without an interface in a container, this
        endpoint is removed first, unless this process has assigned the address to it. Raises CalicoError, for example
        if no address is free.
        """
        if requests.fields(request, "Options").get(_TYPE) == _GATEWAY:
            raise CalicoError("a Calico network has no gateway but the containers' own hosts: omit --gateway")
        asked = _request_of(requests.text(request, "PoolID"), requests.address(request, "Address"))

        def assigned(datastore: DatastoreClient) -> IPAddress:
            owner = libnetwork.request_owner(datastore.host)
            return assign(datastore, owner, asked, Terms.read(datastore, asked), KnownHandle(None))

        def taken(datastore: DatastoreClient) -> IPAddress:
            try:
                return assigned(datastore)
            except AddressTaken:
                if asked.address is None or asked.address in self._in_use:
                    raise
                if not endpoints.is_left(datastore, asked.address):
                    raise
            # etcd was away when its container left, or at the host's end: it may be this one, which is started again
            endpoints.release(datastore, asked.address)
            return assigned(datastore)

        address = self._stores.call(taken)
        self._in_use.add(address)
        return {"Address": f"{address}/{BITS[asked.version]}", "Data": {}}

    def release_address(self, request: dict[str, Any]) -> dict[str, Any]:
        """Release the address of a request or of an endpoint of this host, with the rest of the endpoint.

        For any other address, nothing is done: the engine also releases what no network has had.
        """
        address = requests.address(request, "Address")
        if address is None:
            raise CalicoError("Address is missing")
        self._stores.remove(lambda datastore: endpoints.release(datastore, address))
        self._in_use.discard(address)
        return {}


def _request_of(pool: str, address: IPAddress | None) -> AddressRequest:
    """Return the request for `address` or, if that is None, for any address of the pool with the id `pool`."""
    if address is not None:
        any_other = "omit --ip" if address.version == 4 else "omit --ip6"
        return AddressRequest(address.version, address=address, any_other=any_other)
    if pool in ("ipv4", "ipv6"):
        return AddressRequest(int(pool[-1]))
    network = parse_pool_cidr(pool)
    return AddressRequest(network.version, subnet=str(network))
