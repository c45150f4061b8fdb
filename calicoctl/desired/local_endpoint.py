"""An endpoint of this host as the data plane needs it: with valid values only, in canonical form.

Also validates the addresses that endpoints of all hosts contribute to tags.
"""

from __future__ import annotations

import re
import socket
from contextlib import suppress
from dataclasses import dataclass

from calicoctl.addresses import BITS, FAMILIES, is_unicast, link_local, unpack, version_of
from calicoctl.datastore.keys import INTERFACE_PREFIX, EndpointId
from calicoctl.datastore.model import Endpoint
from calicoctl.errors import CalicoError

_INTERFACE = re.compile(INTERFACE_PREFIX + r"[A-Za-z0-9_.-]{1,11}", re.ASCII)


@dataclass(frozen=True)
class LocalEndpoint:
    """An active endpoint of this host, with valid values. `revision` is the endpoint's revision in the store.

    `ipv6_next_hop` is the workload's next hop in IPv6, None if the store names none. `addresses` are the addresses that
    the workload may use. `conflict` names the addresses of the endpoint that were refused, with the reasons, and is
    None if there are none. `warning` names those of `addresses` that stay despite an objection, with the reasons, and
    is None if there are none. For both, see admission.py.
    """

    id: EndpointId
    revision: int
    interface: str
    mac: str
    addresses: tuple[str, ...]
    profiles: tuple[str, ...]
    ipv6_next_hop: str | None
    conflict: str | None = None
    warning: str | None = None

    @property
    def link_local(self) -> str:
        return link_local(self.mac)

    @property
    def sources(self) -> tuple[str, ...]:
        """All addresses from which the workload may send packets: `addresses` and `link_local`."""
        return (*self.addresses, self.link_local)

    def addresses_of(self, version: int) -> list[str]:
        return [address for address in self.addresses if version_of(address) == version]


def validated(endpoint: Endpoint, revision: int) -> LocalEndpoint:
    """Return an endpoint of this host as a LocalEndpoint. Raise CalicoError if one of its values is invalid."""
    if not _INTERFACE.fullmatch(endpoint.name):
        raise CalicoError(f"its interface {endpoint.name!r} is not a name of ours (cali and up to 11 characters)")
    if endpoint.mac is None:
        raise CalicoError("it has no MAC")
    addresses = []
    for version in (4, 6):
        for net in endpoint.nets_of(version):
            address, _, length = net.partition("/")
            if int(length) != (32 if version == 4 else 128):
                raise CalicoError(f"its {net} is not a single address")
            addresses.append(checked_address(address, version))
    next_hop = None if endpoint.ipv6_gateway is None else checked_address(endpoint.ipv6_gateway, 6)
    return LocalEndpoint(
        endpoint.id,
        revision,
        endpoint.name,
        endpoint.mac.lower(),
        tuple(dict.fromkeys(addresses)),
        tuple(endpoint.profile_ids),
        next_hop,
    )


def usable_addresses(endpoint: Endpoint) -> tuple[str, ...]:
    """Return the valid addresses of an endpoint of any host, in canonical form.

    Invalid addresses, and nets with more than one address, are left out.
    """
    found: dict[str, None] = {}
    for version, length in BITS.items():
        for net in endpoint.nets_of(version):
            address, _, prefix = net.partition("/")
            with suppress(CalicoError):
                if prefix == str(length):
                    found[checked_address(address, version)] = None
    return tuple(found)


def checked_address(address: str, version: int, whose: str = "an endpoint") -> str:
    """Return an address in canonical form. Raise CalicoError if it is not a unicast address of the IP version.

    In the text of that error, `whose` names the owner of the address.
    """
    try:
        packed = socket.inet_pton(FAMILIES[version], address)
    except (OSError, ValueError):
        raise CalicoError(f"'{address}' is not an IPv{version} address") from None
    if not is_unicast(packed):
        raise CalicoError(f"{address} is not an address that {whose} can have")
    return unpack(packed)
