"""Requests that change interfaces, addresses, routes and neighbour entries of the calling thread's network namespace.

Each function but `send` returns a request, for `send` to send to the kernel. pyroute2 needs ten times the time for
each, and its import alone takes a third of the time in which a command connects a workload.

Source: the kernel's uapi/linux/rtnetlink.h, if_link.h, if_addr.h, neighbour.h, veth.h and net_namespace.h.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import NamedTuple

from calicoctl import netlink
from calicoctl.addresses import BITS, FAMILIES, pack, version_of
from calicoctl.netlink import attribute

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO, _IFLA_NET_NS_FD = 1, 3, 4, 18, 28
_INFO_KIND, _INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_IFA_ADDRESS, _IFA_F_NODAD = 1, 0x02
_SCOPE_NOWHERE = 255
"""The scope with which routes of any scope are deleted."""


@dataclass(frozen=True)
class End:
    """An end of a veth pair that is to be created.

    If `mac` is None, the kernel chooses one. `namespace` is an open file descriptor of the network namespace for the
    end; None stands for that of the calling thread.
    """

    name: str
    mtu: int
    mac: str | None = None
    namespace: int | None = None


class Request(NamedTuple):
    """A message to the kernel: its type, its flags, besides those of every request, and its body."""

    kind: int
    flags: int
    body: bytes


def send(*requests: Request) -> None:
    """Send requests together, and wait for the answers; raise OSError for the first one that the kernel refuses.

    The kernel carries them out in their order, those after a refused one as well.
    """
    if requests:
        netlink.do_together(socket.NETLINK_ROUTE, requests)


def add_veth(end: End, peer: End) -> Request:
    """Create a veth pair. Both ends are down."""
    data = attribute(netlink.NESTED | _VETH_INFO_PEER, _link(0) + _described(peer))
    info = attribute(_INFO_KIND, b"veth") + attribute(netlink.NESTED | _INFO_DATA, data)
    body = _link(0) + _described(end) + attribute(netlink.NESTED | _IFLA_LINKINFO, info)
    return Request(netlink.RTM_NEWLINK, netlink.CREATE | netlink.EXCLUSIVE, body)


def set_up(index: int, up: bool = True) -> Request:
    """Bring an interface up or down."""
    return Request(netlink.RTM_NEWLINK, 0, _link(index, netlink.IFF_UP if up else 0, netlink.IFF_UP))


def set_mtu(index: int, mtu: int) -> Request:
    return Request(netlink.RTM_NEWLINK, 0, _link(index) + attribute(_IFLA_MTU, struct.pack("=I", mtu)))


def put_address(index: int, address: str, length: int) -> Request:
    """Add an address, with a prefix length, to an interface, or replace the same address.

    An IPv6 address can be used at once, without duplicate address detection.
    """
    return Request(netlink.RTM_NEWADDR, netlink.CREATE | netlink.REPLACE, _address(index, address, length))


def delete_address(index: int, address: str, length: int) -> Request:
    return Request(netlink.RTM_DELADDR, 0, _address(index, address, length))


def put_route(version: int, index: int, destination: str | None = None, gateway: str | None = None) -> Request:
    """Add a static route of an IP version through an interface to the main table, or replace the one to `destination`.

    The route leads to the address `destination`; to all addresses if that is None. `gateway` is the address of the next
    hop; without it, the destination is on the link.
    """
    scope = netlink.SCOPE_LINK if version == 4 and gateway is None else netlink.SCOPE_GLOBAL
    body = _route(version, index, destination, scope, netlink.UNICAST)
    if gateway is not None:
        body += attribute(netlink.RTA_GATEWAY, pack(gateway))
    return Request(netlink.RTM_NEWROUTE, netlink.CREATE | netlink.REPLACE, body)


def delete_route(version: int, index: int, destination: str | None = None) -> Request:
    """Delete the static route to the address `destination`, or the default route, through an interface."""
    return Request(netlink.RTM_DELROUTE, 0, _route(version, index, destination, _SCOPE_NOWHERE, 0))


def put_neighbour(index: int, address: str, mac: str) -> Request:
    """Add a permanent neighbour entry to an interface, or replace the one of this address."""
    body = _neighbour(index, address, netlink.NUD_PERMANENT) + attribute(netlink.NDA_LLADDR, _packed_mac(mac))
    return Request(netlink.RTM_NEWNEIGH, netlink.CREATE | netlink.REPLACE, body)


def delete_neighbour(index: int, address: str) -> Request:
    return Request(netlink.RTM_DELNEIGH, 0, _neighbour(index, address, 0))


def put_proxy(index: int, address: str) -> Request:
    """Add a proxy entry to an interface: the host answers there for this address, if proxy_ndp or proxy_arp is on."""
    body = _neighbour(index, address, 0, netlink.NTF_PROXY)
    return Request(netlink.RTM_NEWNEIGH, netlink.CREATE | netlink.REPLACE, body)


def delete_proxy(index: int, address: str) -> Request:
    return Request(netlink.RTM_DELNEIGH, 0, _neighbour(index, address, 0, netlink.NTF_PROXY))


def _link(index: int, flags: int = 0, change: int = 0) -> bytes:
    # struct ifinfomsg: family, padding, type, index, flags, mask of the flags that are set
    return struct.pack("=BBHiII", 0, 0, 0, index, flags, change)


def _described(end: End) -> bytes:
    found = attribute(_IFLA_IFNAME, end.name.encode() + b"\0") + attribute(_IFLA_MTU, struct.pack("=I", end.mtu))
    if end.mac is not None:
        found += attribute(_IFLA_ADDRESS, _packed_mac(end.mac))
    if end.namespace is not None:
        found += attribute(_IFLA_NET_NS_FD, struct.pack("=I", end.namespace))
    return found


def _address(index: int, address: str, length: int) -> bytes:
    packed = pack(address)
    version = version_of(address)
    # struct ifaddrmsg: family, length of the network, flags, scope, index
    flags = _IFA_F_NODAD if version == 6 else 0
    body = struct.pack("=4BI", FAMILIES[version], length, flags, netlink.SCOPE_GLOBAL, index)
    return body + attribute(netlink.IFA_LOCAL, packed) + attribute(_IFA_ADDRESS, packed)


def _route(version: int, index: int, destination: str | None, scope: int, kind: int) -> bytes:
    # struct rtmsg: family, length of destination and of source, tos, table, protocol, scope, type, flags
    length = 0 if destination is None else BITS[version]
    places = FAMILIES[version], length, 0, 0, netlink.TABLE_MAIN, netlink.PROTOCOL_STATIC, scope, kind, 0
    body = struct.pack("=8BI", *places) + attribute(netlink.RTA_OIF, struct.pack("=I", index))
    return body if destination is None else body + attribute(netlink.RTA_DST, pack(destination))


def _neighbour(index: int, address: str, state: int, flags: int = 0) -> bytes:
    # struct ndmsg: family, padding, interface, state, flags, type
    body = struct.pack("=BBHiHBB", FAMILIES[version_of(address)], 0, 0, index, state, flags, 0)
    return body + attribute(netlink.NDA_DST, pack(address))


def _packed_mac(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))
