"""Decides which addresses this host's endpoints may use. An address that the host itself needs is refused.

Anybody who may write to the store can list any address in an endpoint. There are four objections to an address:

* This host needs the address: see `HostNetwork.has`.
* A host is registered with the address: policy treats packets from the address as packets of that host.
* The address is in no pool.
* A DNS server of this host uses the address.

An address with one of the first two objections is always refused. An address with one of the last two objections is
refused if it is new to the endpoint. An address with both of these is always refused.

An address is not new to an endpoint if it was admitted before. When the agent starts, the caller passes the admitted
addresses to `adopt`: those that the kernel routes to the endpoint's interface, and those in the file of
felix/kept_addresses.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from contextlib import suppress

from calicoctl.addresses import number_of, version_of
from calicoctl.datastore.model import Endpoint
from calicoctl.datastore.reserved import DNS_SERVER, HostNetwork, Network, Networks, Reserved
from calicoctl.desired.local_endpoint import LocalEndpoint, usable_addresses
from calicoctl.desired.topology import Topology

Use = tuple[str, str]
"""An address that an endpoint of this host uses: (name of the endpoint's interface, address)."""


class Admission:
    """Decides about addresses, given this host's network, the pools, and the registered hosts."""

    def __init__(self, topology: Topology) -> None:
        self.network = HostNetwork()
        self._topology = topology
        self._pools: dict[str, Network] = {}
        """Key of a pool -> its network. If the value of the key is invalid, the network comes from the key itself."""
        self._in_pools: Networks | None = None
        """The networks of `_pools`; None if they must be computed again."""
        self._changed = False
        self._admitted: set[Use] = set()

    @property
    def reserved(self) -> Reserved:
        return Reserved(self.network, self._topology.users, self._topology.host)

    def set_pool(self, key: str, cidr: str | None) -> None:
        """Set the CIDR of the pool with the store's key `key`. With None, remove the pool."""
        before = self._pools.pop(key, None)
        if cidr is not None:
            self._pools[key] = Network.parse(cidr)
        if before != self._pools.get(key):
            self._in_pools, self._changed = None, True

    def take_changed(self) -> bool:
        """Return whether the networks of pools have changed since the last call."""
        changed, self._changed = self._changed, False
        return changed

    def is_in_pool(self, address: str) -> bool:
        if self._in_pools is None:
            self._in_pools = Networks(self._pools.values())
        return self._in_pools.has(version_of(address), number_of(address))

    def spared(self) -> set[str]:
        """Return the addresses from which packets pass even if endpoints of other hosts have them.

        These are the DNS servers of this host, and the BGP peers that are in no pool.
        """
        peers = {peer.ip for peer in self._topology.peers.values()}
        return {*self.network.servers.dns, *(peer for peer in peers if not self.is_in_pool(peer))}

    def objection(self, interface: str, address: str) -> tuple[str, bool] | None:
        """Return the objection to an address of the endpoint with this interface, or None if there is none.

        The objection is a tuple: the reason, and whether the address is refused because of it.
        """
        user = self.reserved.user(address)
        if user is not None:
            return user, True
        stays = (interface, address) in self._admitted
        in_pool = self.is_in_pool(address)
        if address in self.network.servers.dns:
            return DNS_SERVER, not (stays and in_pool)
        return None if in_pool else ("in no pool", not stays)

    def decide(self, candidate: LocalEndpoint) -> LocalEndpoint:
        """Return an endpoint without its refused addresses.

        The field `conflict` of the result names the refused addresses, and `warning` the addresses that stay despite an
        objection; each with the reason.
        """
        found = {address: self.objection(candidate.interface, address) for address in candidate.addresses}
        if not any(found.values()):
            return candidate
        refused = [f"its address {a} is {said[0]}" for a, said in found.items() if said is not None and said[1]]
        kept = [f"its address {a} is {said[0]}, but stays" for a, said in found.items() if said and not said[1]]
        return dataclasses.replace(
            candidate,
            addresses=tuple(address for address, said in found.items() if said is None or not said[1]),
            conflict="; ".join(refused) or None,
            warning="; ".join(kept) or None,
        )

    def addresses_of(self, endpoint: Endpoint) -> tuple[str, ...]:
        """Return the addresses that an endpoint contributes to tags.

        Refused addresses of this host's endpoints are left out. Endpoints of other hosts contribute all their
        addresses.
        """
        addresses = usable_addresses(endpoint)
        if endpoint.id.host != self._topology.host:
            return addresses
        objections = {address: self.objection(endpoint.name, address) for address in addresses}
        return tuple(address for address, said in objections.items() if said is None or not said[1])

    # What endpoints already have

    def exceptions(self) -> frozenset[Use]:
        """Return the admitted addresses that would be refused as new: those in no pool, or of a DNS server."""
        dns = self.network.servers.dns
        return frozenset(use for use in self._admitted if use[1] in dns or not self.is_in_pool(use[1]))

    def adopt(self, uses: Iterable[Use]) -> None:
        """Mark addresses as admitted: those that endpoints have used since before the agent's start."""
        self._admitted.update(uses)

    def admit(self, endpoints: Iterable[Endpoint]) -> None:
        """Mark as admitted the addresses that these endpoints of this host may use now."""
        for endpoint in endpoints:
            self._admitted.update((endpoint.name, address) for address in self.addresses_of(endpoint))

    def forget(self, before: Endpoint | None, now: Endpoint | None) -> None:
        """Remove the admission of the addresses that an endpoint listed `before`, but does not list `now`.

        None stands for an endpoint that does not exist.
        """
        self._admitted -= _uses(before) - _uses(now)

    def retain(self, endpoints: Collection[Endpoint]) -> None:
        """Remove the admission of all addresses that none of these endpoints lists."""
        self._admitted &= set().union(*map(_uses, endpoints))


def pool_of_key(key: str) -> str | None:
    """Return the CIDR in the key of a pool, or None if the key contains no valid CIDR."""
    from calicoctl.addresses import parse_cidr
    from calicoctl.errors import CalicoError

    address, _, length = key.rpartition("/")[2].rpartition("-")
    with suppress(CalicoError):
        return str(parse_cidr(f"{address}/{length}"))
    return None


def _uses(endpoint: Endpoint | None) -> set[Use]:
    return set() if endpoint is None else {(endpoint.name, address) for address in usable_addresses(endpoint)}
