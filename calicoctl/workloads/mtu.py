"""Determines the MTU of workloads' interfaces.

The underlay is the network that carries packets between hosts. Its MTU is the MTU of the interface that has this host's
registered address. For addresses in pools without VXLAN, a workload's interface has the MTU of the underlay; for
addresses in pools with VXLAN, the bytes that VXLAN adds to a packet are subtracted. If the setting `MTU`
(datastore/config.py) is valid, its value is used instead.
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
    """The interface that has an address of this host, through which packets leave to other hosts, and its MTU.

    `is_present` says whether any interface has the address. `interface` is the index of the interface that has it; None
    if none has it, or if it is the loopback interface. `mtu` is the MTU of that interface or, if `interface` is None,
    the MTU of the default route's interface. `mtu` is DEFAULT if there is no default route either, or if the interface
    was deleted before its MTU was read.
    """

    interface: int | None = None
    is_present: bool = False
    mtu: int = DEFAULT


def underlay(address: str) -> Underlay:
    """Read from the kernel the underlay of `address`, an address of this host in canonical form. Raises CalicoError."""
    family = FAMILIES[version_of(address)]
    try:
        index = next((one.index for one in netlink.addresses(family=family) if one.address == address), None)
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
    """Return the MTU inside a VXLAN tunnel; at least SMALLEST.

    `mtu` is the MTU of the underlay, and `version` the IP version of the tunnel's outer packets.
    """
    return max(SMALLEST, mtu - HEADER[version])


def configured(datastore: DatastoreClient) -> str | None:
    """Return the value of the setting MTU, which may be invalid; None if it is not set."""
    return datastore.setting(keys.config(config.MTU.name))


def of_interface(
    datastore: DatastoreClient,
    addresses: Iterable[str],
    pools: Iterable[Pool],
    next_hops: Mapping[int, str],
    configured: str | None,
) -> int:
    """Return the MTU for a workload's interface with these `addresses`.

    `configured` is the value of the setting MTU. If it is valid, it is returned. If it is None or invalid, the largest
    MTU is returned that all of the addresses permit (see of_addresses).

    `pools` must contain the pools of the addresses; packets of an address in no pool count as not encapsulated.
    `next_hops` are this host's registered addresses by IP version, at least for the IP versions of the addresses.
    Raises CalicoError if the store or the kernel cannot be read.
    """
    with suppress(CalicoError):  # the agent reports an invalid value
        config.MTU.check(configured or "")
        return int(configured or "")
    from calicoctl.datastore.reserved import Network  # 'container remove' does without it

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
    """Return the largest MTU that all addresses of an interface permit.

    `modes` contains, for each address, its IP version and the VXLAN mode of its pool. `underlays` maps the IP versions
    of this host's underlays to the MTUs of the underlays. If the mode is NEVER, an address permits the MTU of the
    underlay of its own IP version. With any other mode, it permits the MTU inside a tunnel (see in_overlay), which uses
    the IPv4 underlay if there is one, and the IPv6 underlay if not. The MTU of an underlay that is needed, but not in
    `underlays`, is assumed to be DEFAULT.

    If `modes` is empty, the result is the smallest MTU in `underlays`; if both are empty, DEFAULT.
    """
    found = []
    for version, mode in modes:
        if mode == NEVER:
            found.append(underlays.get(version, DEFAULT))
        else:
            outer = 4 if 4 in underlays else 6
            found.append(in_overlay(underlays.get(outer, DEFAULT), outer))
    return min(found, default=min(underlays.values(), default=DEFAULT))
