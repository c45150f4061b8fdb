"""Determines the MTU of workloads' interfaces: the MTU of the underlay, minus the headers of the overlay, if any.

The underlay is the network that carries packets between hosts. Its MTU is the MTU of the interface with this host's
registered address. The setting `MTU` (datastore/config.py) overrides the result.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calicoctl import netlink
from calicoctl.addresses import BITS, FAMILIES, version_of
from calicoctl.datastore import config, keys
from calicoctl.datastore.model import NEVER, Pool
from calicoctl.datastore.reserved import Network
from calicoctl.errors import CalicoError, StoreError

if TYPE_CHECKING:
    from calicoctl.datastore.client import DatastoreClient

DEFAULT = 1500
"""The MTU of Ethernet, used if the underlay's MTU is unknown."""

HEADER = {4: 50, 6: 70}
"""The bytes that VXLAN adds to a packet, by the IP version of the underlay: the outer IP header, and the headers of
UDP, VXLAN and the inner Ethernet frame. Source: RFC 7348, section 5."""

SMALLEST = 1280
"""The smallest MTU that IPv6 permits on a link. Source: RFC 8200, section 5."""

_SIOCGIFMTU = 0x8921
"""The ioctl that returns an interface's MTU. Source: netdevice(7)."""


@dataclass(frozen=True)
class Underlay:
    """The interface through which packets from an address of this host leave to other hosts, and its MTU.

    `is_present` says whether an interface has the address. `interface` is the index of that interface; None if no
    interface has the address, or if it is the loopback interface. `mtu` is the MTU of the interface or, if `interface`
    is None, of the default route's interface; DEFAULT if there is no default route, or if the interface was just
    deleted.
    """

    interface: int | None = None
    is_present: bool = False
    mtu: int = DEFAULT


def underlay(address: str) -> Underlay:
    """Read the underlay for one of this host's addresses (in canonical form) from the kernel. Raises CalicoError."""
    family = FAMILIES[version_of(address)]
    try:
        index = next((one.index for one in netlink.addresses() if one.address == address), None)
        loopback = socket.if_nametoindex("lo")
        if index in (None, loopback):
            defaults = sorted(netlink.routes(family, lengths=(0,)), key=lambda route: route.metric)
            outside = next((route.index for route in defaults if route.index not in (None, loopback)), None)
            return Underlay(None, index is not None, DEFAULT if outside is None else _mtu(outside))
        assert index is not None, "checked above"
        return Underlay(index, True, _mtu(index))
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise CalicoError(f"the MTU of this host's interfaces cannot be read: {why}") from None


def _mtu(index: int) -> int:
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("=16s16x", os.fsencode(socket.if_indextoname(index)))
        return int(struct.unpack_from("=i", fcntl.ioctl(any_socket, _SIOCGIFMTU, request), 16)[0])
    return DEFAULT  # the interface was just deleted


def in_overlay(mtu: int, version: int) -> int:
    """Return the MTU inside a tunnel over an underlay of this MTU and IP version; at least SMALLEST."""
    return max(SMALLEST, mtu - HEADER[version])


def configured(datastore: DatastoreClient) -> str | None:
    """Return the setting MTU; None if it is not set."""
    return datastore.setting(keys.config(config.MTU.name))


def of_interface(
    datastore: DatastoreClient,
    addresses: Iterable[str],
    pools: Iterable[Pool],
    next_hops: Mapping[int, str],
    configured: str | None,
) -> int:
    """Return the MTU of a new interface with these addresses: the setting or, by default, an MTU that fits them all.

    `pools` must contain the pools of the addresses; an address in no pool counts as not encapsulated. `next_hops` are
    this host's registered addresses by IP version, at least for the IP versions of the addresses. `configured` is the
    setting; an invalid one is ignored. Raises CalicoError if the store or the kernel cannot be read.
    """
    with suppress(CalicoError):  # the agent reports an invalid value
        config.MTU.check(configured or "")
        return int(configured or "")
    networks = [(Network.parse(pool.cidr), pool.vxlan) for pool in pools]
    modes = []
    for address in addresses:
        single = Network.of(address, BITS[version_of(address)])
        mode = next((mode for network, mode in networks if single in network), NEVER)
        modes.append((version_of(address), mode))
    own = dict(next_hops)
    if 4 not in own and any(mode != NEVER for _, mode in modes):
        try:
            own[4] = datastore.hosts.next_hop(4)
        except StoreError:
            raise
        except CalicoError:  # the host has no IPv4 address
            pass
    return of_addresses(modes, {version: underlay(address).mtu for version, address in own.items()})


def of_addresses(modes: Iterable[tuple[int, str]], underlays: Mapping[int, int]) -> int:
    """Return the largest MTU that fits all addresses of an interface.

    `modes` contains, for each address, its IP version and the VXLAN mode of its pool. `underlays` maps the IP versions
    of this host's underlays to their MTUs; tunnels use IPv4 if it is among them. The MTU of a missing underlay is
    assumed to be DEFAULT. If there are no addresses, the result is the smallest MTU of the underlays; if there are no
    underlays either, DEFAULT.
    """
    found = []
    for version, mode in modes:
        if mode == NEVER:
            found.append(underlays.get(version, DEFAULT))
        else:
            outer = 4 if 4 in underlays else 6
            found.append(in_overlay(underlays.get(outer, DEFAULT), outer))
    return min(found, default=min(underlays.values(), default=DEFAULT))
