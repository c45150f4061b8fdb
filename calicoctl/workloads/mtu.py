"""Determines the MTU of workloads' interfaces: the underlay's, less the header of an overlay; reads the host's links.

The underlay is what carries packets between hosts. Its MTU is that of the interface with the address that this host is
registered with. Where the MTU is used: wiring.py for the veth pairs, felix/dataplane/vxlan_manager.py for the devices
of the overlay. The setting `MTU` (datastore/config.py) overrides it; that is decided there.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from calicoctl import netlink
from calicoctl.addresses import FAMILIES, version_of
from calicoctl.datastore.model import NEVER
from calicoctl.errors import CalicoError

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

    `is_present` says whether the host has the address. `interface` is the index of the interface that has it, None if
    that is the loopback interface: then packets may leave through any. `mtu` is that of the interface, else of the one
    of the default route, else DEFAULT.
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
