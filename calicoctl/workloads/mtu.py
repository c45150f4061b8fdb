"""Determines the MTU of workloads' interfaces: the underlay's, less the header of an overlay; reads the host's links.

The underlay is what carries packets between hosts. Its MTU is that of the interface with the address that this host is
registered with. Where the MTU is used: wiring.py for the veth pairs, felix/dataplane/vxlan_manager.py for the devices
of the overlay. The setting `MTU` (datastore/config.py) overrides it.
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
"""The MTU where the interface is unknown: that of Ethernet."""

HEADER = {4: 50, 6: 70}
"""The bytes that VXLAN adds to a packet, by the IP version of the underlay: the outer IP header, and those of UDP (8
bytes), VXLAN (8) and the inner Ethernet frame (14). Source: RFC 7348, section 5."""

SMALLEST = 1280
"""The smallest MTU of a link with IPv6, which tunnels need. Source: RFC 8200, section 5."""

_SIOCGIFMTU = 0x8921
"""The ioctl that returns an interface's MTU. Source: netdevice(7)."""


@dataclass(frozen=True)
class Underlay:
    """Where packets from one address of this host to other hosts leave.

    `is_present` says whether the host has the address. `interface` is the index of the interface that has the address,
    None if no interface has it, or the loopback interface: then packets may leave through any. `mtu` is the MTU of that
    interface. If `interface` is None, it is the MTU of the default route's interface; without a default route, DEFAULT.
    """

    interface: int | None = None
    is_present: bool = False
    mtu: int = DEFAULT


def underlay(address: str) -> Underlay:
    """Read from the kernel the underlay of a canonical address. Raises CalicoError."""
    family = FAMILIES[version_of(address)]
    try:
        index = next((one.index for one in netlink.addresses() if one.address == address), None)
        loopback = socket.if_nametoindex("lo")
        if index in (None, loopback):
            defaults = sorted(netlink.routes(family, lengths=(0,)), key=lambda route: route.metric)
            outside = next((route.index for route in defaults if route.index is not None), None)
            return Underlay(None, index is not None, DEFAULT if outside is None else _mtu(outside))
        assert index is not None, "checked above"
        return Underlay(index, True, _mtu(index))
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise CalicoError(f"the MTU of this host's interfaces cannot be read: {why}") from None


def _mtu(index: int) -> int:
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("=16s16x", socket.if_indextoname(index).encode())
        return int(struct.unpack_from("=i", fcntl.ioctl(any_socket, _SIOCGIFMTU, request), 16)[0])
    return DEFAULT  # it was just deleted


def in_overlay(mtu: int, version: int) -> int:
    """Return the MTU inside a tunnel over an underlay of this MTU and IP version."""
    return max(SMALLEST, mtu - HEADER[version])


def of_interface(
    datastore: DatastoreClient, addresses: Iterable[str], pools: Iterable[Pool], next_hops: Mapping[int, str]
) -> int:
    """Return the MTU of a new interface with these addresses: the configured one, else the one that fits all of them.

    `pools` must contain the addresses' pools; `next_hops` are this host's registered addresses by IP version, those of
    the addresses at least. Reads one key of the store, or two. Raises CalicoError.
    """
    configured = datastore.setting(keys.config(config.MTU.name))
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
        except CalicoError:  # the host has none
            pass
    return of_addresses(modes, {version: underlay(address).mtu for version, address in own.items()})


def of_addresses(modes: Iterable[tuple[int, str]], underlays: Mapping[int, int]) -> int:
    """Return the MTU of an interface with addresses in these pools: (IP version, mode of VXLAN) each.

    `underlays` are the MTUs of the underlays that this host has, by IP version. Tunnels use IPv4 if the host has it.
    """
    found = []
    for version, mode in modes:
        if mode == NEVER:
            found.append(underlays.get(version, DEFAULT))
        else:
            outer = 4 if 4 in underlays else 6
            found.append(in_overlay(underlays.get(outer, DEFAULT), outer))
    return min(found, default=min(underlays.values(), default=DEFAULT))
