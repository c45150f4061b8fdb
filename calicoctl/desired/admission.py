"""Decides which addresses this host's endpoints may use. An address that the host itself needs is refused.

Anybody who may write to the store can list any address in an endpoint. There are four objections to an address:

* This host needs the address: see `HostNetwork.has`.
* A host is registered with the address: policy treats packets from the address as packets of that host.
* The address is in no pool.
* A DNS server of this host uses the address.

An address with one of the first two objections is always refused, and so is an address with both of the last two. An
address with only one of the last two objections is refused if it was not admitted before.

An address is admitted from the moment that its endpoint may use it until the endpoint does not list it any more. When
the agent starts, the caller passes the addresses that were admitted before the start to `adopt`: those that the kernel
routes to the endpoint's interface, and those in the file of felix/kept_addresses.py.
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
    """Decides which addresses endpoints may use, from this host's network, the pools, and the registered hosts."""

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
        """Set the CIDR of the pool whose key in the store is `key`. If `cidr` is None, remove the pool."""
        before = self._pools.pop(key, None)
        if cidr is not None:
            self._pools[key] = Network.parse(cidr)
        if before != self._pools.get(key):
            self._in_pools, self._changed = None, True

    def take_changed(self) -> bool:
        """Return whether the networks of the pools have changed since the last call of this method."""
        changed, self._changed = self._changed, False
        return changed

    def is_in_pool(self, address: str) -> bool:
        if self._in_pools is None:
            self._in_pools = Networks(self._pools.values())
        return self._in_pools.has(version_of(address), number_of(address))

    def spared(self) -> set[str]:
        """Return the addresses whose packets this host never treats as packets of another host's endpoint.

        That holds even if such an endpoint lists the address. The addresses are those of this host's DNS servers, and
        those of BGP peers that are in no pool.
        """
        peers = {peer.ip for peer in self._topology.peers.values()}
        return {*self.network.servers.dns, *(peer for peer in peers if not self.is_in_pool(peer))}

    def objection(self, interface: str, address: str) -> tuple[str, bool] | None:
        """Return the objection to an address of the endpoint with this interface, None if there is no objection.

        The objection is (reason, whether the address is refused because of it).
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

        The field `conflict` of the result names the refused addresses, with the reasons. The field `warning` names the
        addresses that stay despite an objection, with the reasons.
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
        """Return the addresses that an endpoint contributes to the tags of its profiles.

        For an endpoint of this host, these are its valid addresses that are not refused. For an endpoint of another
        host, these are all its valid addresses.
        """
        addresses = usable_addresses(endpoint)
        if endpoint.id.host != self._topology.host:
            return addresses
        objections = {address: self.objection(endpoint.name, address) for address in addresses}
        return tuple(address for address, said in objections.items() if said is None or not said[1])

    # What endpoints already have

    def exceptions(self) -> frozenset[Use]:
        """Return the admitted addresses that would be refused if they were not admitted yet.

        These are the addresses in no pool, and those of DNS servers.
        """
        dns = self.network.servers.dns
        return frozenset(use for use in self._admitted if use[1] in dns or not self.is_in_pool(use[1]))

    def adopt(self, uses: Iterable[Use]) -> None:
        """Mark `uses` as admitted: addresses that endpoints have used since before the agent's start."""
        self._admitted.update(uses)

    def admit(self, endpoints: Iterable[Endpoint]) -> None:
        """Mark as admitted the addresses of these endpoints, all of this host, that are not refused now."""
        for endpoint in endpoints:
            self._admitted.update((endpoint.name, address) for address in self.addresses_of(endpoint))

    def forget(self, before: Endpoint | None, now: Endpoint | None) -> None:
        """Remove the admission of the addresses that an endpoint has lost by a change.

        If the change gives it another interface, these are all its addresses. `before` is the endpoint before the
        change, None if it did not exist. `now` is the endpoint after the change, None if it was deleted.
        """
        self._admitted -= _uses(before) - _uses(now)

    def retain(self, endpoints: Collection[Endpoint]) -> None:
        """Remove the admission of all addresses that none of these endpoints lists."""
        self._admitted &= set().union(*map(_uses, endpoints))


def pool_of_key(key: str) -> str | None:
    """Return the CIDR in the key of a pool, None if the key contains no valid CIDR."""
    from calicoctl.addresses import parse_cidr
    from calicoctl.errors import CalicoError

    address, _, length = key.rpartition("/")[2].rpartition("-")
    with suppress(CalicoError):
        return str(parse_cidr(f"{address}/{length}"))
    return None


def _uses(endpoint: Endpoint | None) -> set[Use]:
    return set() if endpoint is None else {(endpoint.name, address) for address in usable_addresses(endpoint)}
