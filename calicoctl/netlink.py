"""Netlink's constants, and a small client for requests that pyroute2 does not support, or for which it is too slow.

Source: the kernel's uapi/linux/netlink.h and rtnetlink.h.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from calicoctl.addresses import BITS, FAMILIES, pack, version_of

REQUEST, ACK, DUMP = 0x1, 0x4, 0x300
REPLACE, EXCLUSIVE, CREATE = 0x100, 0x200, 0x400

NESTED = 0x8000

ERROR, _DONE = 2, 3
_KIND = 0x3FFF
"""The mask of an attribute's type, without flags."""

RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR, RTM_NEWROUTE, RTM_DELROUTE = 16, 17, 20, 21, 24, 25
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
_RTM_GETLINK, _RTM_GETADDR, _RTM_GETROUTE, _RTM_GETNEIGHTBL, _RTM_GETNSID, _RTM_GETNEXTHOP = 18, 22, 26, 66, 90, 106
_RTM_F_FIB_MATCH = 0x2000
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_MASTER, _IFLA_LINKINFO = 1, 3, 4, 5, 10, 18
_IFLA_STATS64 = 23
_IFLA_EXT_MASK, _IFLA_LINK_NETNSID, _IFLA_PERM_ADDRESS = 29, 37, 54
_IFLA_INFO_KIND, _RTEXT_FILTER_SKIP_STATS, _ARPHRD_ETHER = 1, 8, 1
_NDTA_THRESH3, _NDTA_STATS = 4, 7
_NETNSA_NSID, _NETNSA_FD = 1, 3
NDA_DST, NDA_LLADDR, _NDA_IFINDEX = 1, 2, 8
NUD_NOARP, NUD_PERMANENT = 0x40, 0x80
NTF_SELF, NTF_PROXY = 0x02, 0x08
_IFA_ADDRESS, IFA_LOCAL, _IFA_BROADCAST = 1, 2, 4
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC, _RTA_MULTIPATH, RTA_VIA = 1, 4, 5, 6, 7, 9, 18
_RTA_TABLE = 15
_NHA_OIF, _NHA_GATEWAY = 5, 6
TABLE_MAIN = 254
SCOPE_GLOBAL, SCOPE_LINK = 0, 253
IFF_UP, _IFF_LOWER_UP = 0x1, 0x10000
LOOPBACK_INDEX = 1
"""The index of the loopback interface in every namespace. Source: LOOPBACK_IFINDEX in the kernel's net/flow.h."""
UNICAST, LOCAL, BLACKHOLE = 1, 2, 6
"""Types of routes: to other hosts or networks, to addresses of this host, and to drop packets silently."""
PROTOCOL_KERNEL, PROTOCOL_STATIC, PROTOCOL_RA = 2, 4, 9
"""Protocols of routes: set by the kernel itself, static, and learned from router advertisements (RA)."""
PROTOCOL_BIRD = 12
OUR_PROTOCOL, OVERLAY_PROTOCOL = 80, 81
"""The protocols of the agent's routes: to endpoints of this host, and to other hosts' blocks in pools with VXLAN."""
OUR_PROTOCOLS = (OUR_PROTOCOL, OVERLAY_PROTOCOL)
SOL_NETLINK, _NETLINK_GET_STRICT_CHK = 270, 12
NETLINK_NETFILTER = 12
SO_RCVBUFFORCE = 33
"""The socket option that sets the size of the receive buffer regardless of net.core.rmem_max. Source: socket(7)."""

_TIMEOUT = 60.0
"""Seconds to wait for an answer of the kernel."""


def message(kind: int, flags: int, number: int, body: bytes) -> bytes:
    """Return a message of type `kind`: a header of 16 bytes, and `body`.

    `number` is the message's sequence number. The kernel's answer to the message has the same number.
    """
    return struct.pack("=IHHII", 16 + len(body), kind, flags, number, 0) + body


def attribute(kind: int, value: bytes) -> bytes:
    """Return an attribute of type `kind`, padded to a multiple of four bytes."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


_LINK_LOCAL = attribute(RTA_DST, socket.inet_pton(socket.AF_INET6, "fe80::"))


def attributes(data: bytes) -> dict[int, bytes]:
    """Return the values of the consecutive attributes in `data`, by type.

    `data` may also be the value of an attribute that consists of nested attributes.
    """
    found = {}
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        found[kind & _KIND] = data[at + 4 : at + length]
        at += max(4, (length + 3) & ~3)
    return found


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (type, message) for each message in a datagram. The message includes its header of 16 bytes."""
    at = 0
    while at + 16 <= len(data):
        length, kind = struct.unpack_from("=IH", data, at)
        yield kind, data[at : at + length]
        at += max(16, (length + 3) & ~3)


def refusal(message: bytes) -> tuple[int, int]:
    """Decode the kernel's answer `message` (with its header), which has the type ERROR.

    Returns the sequence number of the request that it answers, and the errno; 0 if the request succeeded.
    """
    return struct.unpack_from("=I", message, 8)[0], -struct.unpack_from("=i", message, 16)[0]


def dump(
    protocol: int,
    kind: int,
    body: bytes,
    strict: bool = False,
    most: int | None = None,
    containing: re.Pattern[bytes] | None = None,
) -> Iterator[bytes]:
    """Send a dump request of type `kind`; yield the answers, without their headers. Raises OSError.

    `protocol` is the netlink family, such as NETLINK_ROUTE. With `strict`, kernels since 4.20 send only answers that
    match the fields of `body`; older kernels ignore this. If there are more than `most` answers (None: no limit),
    OSError with the code E2BIG is raised after the first `most`. With `containing`, only answers in which this
    pattern is found are yielded, and counted.
    """
    count = 0
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as netlink:
        netlink.settimeout(_TIMEOUT)
        if strict:
            with suppress(OSError):
                netlink.setsockopt(SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
        netlink.bind((0, 0))
        netlink.send(message(kind, REQUEST | DUMP, 0, body))
        while True:
            data = netlink.recv(2**18)
            if containing is not None and not containing.search(data) and not _may_end(data):
                continue  # searched one by one, many answers take much longer
            for type, answer in messages(data):
                if type == _DONE and len(answer) >= 20 and (code := -struct.unpack_from("=i", answer, 16)[0]) > 0:
                    raise OSError(code, os.strerror(code))
                if type == _DONE:
                    return
                if type == ERROR:
                    code = refusal(answer)[1]
                    raise OSError(code, os.strerror(code))
                if containing is None or containing.search(answer):
                    count += 1
                    if most is not None and count > most:
                        raise OSError(errno.E2BIG, f"it has more than {most} of what is to be read")
                    yield answer[16:]


def _may_end(data: bytes) -> bool:
    """Return whether a datagram may end a dump: it begins with an error, or ends like the message DONE.

    That message consists of its header and a number. Source: netlink_dump_done() in the kernel's netlink/af_netlink.c.
    """
    return struct.unpack_from("=H", data, 4)[0] == ERROR or data[-20:-14] == struct.pack("=IH", 20, _DONE)


@dataclass(frozen=True)
class Route:
    """A route to the network `destination`/`length`; `destination` is None for a default route.

    `index` is the index of the outgoing interface, and `gateway` the address of the gateway; for a multipath route,
    those of its first next hop. `source` is the preferred source address. These three are None if the route does not
    have them. `index` and `gateway` are also None if the route refers to a nexthop object, and the sysctl
    net.ipv4.nexthop_compat_mode is 0 (the default is 1). `kind` is the route's type, such as UNICAST.
    """

    destination: str | None
    length: int
    protocol: int
    metric: int = 0
    index: int | None = None
    gateway: str | None = None
    source: str | None = None
    kind: int = UNICAST


def routes(
    family: int,
    lengths: Collection[int] = range(129),
    protocol: int | None = None,
    index: int | None = None,
    most: int | None = None,
) -> Iterator[Route]:
    """Yield the routes of the main table whose prefix length is in `lengths`. Raises OSError.

    With `protocol`, only routes of this protocol are yielded; with `index`, only routes with this Route.index. For
    `most`, see dump.
    """
    # pyroute2 takes a hundred times as long, and its get_default_routes() may miss routes if there are many others
    # struct rtmsg: family, length of destination and of source, tos, table, protocol, scope, type, flags
    request = struct.pack("=8BI", family, 0, 0, 0, 0, 0, 0, 0, 0)
    if index is not None:
        request += attribute(RTA_OIF, struct.pack("=I", index))
    for body in dump(socket.NETLINK_ROUTE, _RTM_GETROUTE, request, strict=index is not None, most=most):
        if body[4] == TABLE_MAIN and body[1] in lengths and protocol in (None, body[5]):
            route = _route(family, body)
            if index in (None, route.index):  # kernels before 4.20 do not filter
                yield route


def _route(family: int, body: bytes) -> Route:
    found = attributes(body[12:])
    if _RTA_MULTIPATH in found:
        # struct rtnexthop: length, flags, hops, index; then attributes
        length, _, _, index = struct.unpack_from("=HBBi", found[_RTA_MULTIPATH])
        found |= attributes(found[_RTA_MULTIPATH][8:length]) | {RTA_OIF: struct.pack("=i", index)}

    def address(kind: int) -> str | None:
        return socket.inet_ntop(family, found[kind]) if kind in found else None

    def number(kind: int) -> int | None:
        return int(struct.unpack("=I", found[kind])[0]) if kind in found else None

    return Route(
        destination=address(RTA_DST),
        length=body[1],
        protocol=body[5],
        metric=number(RTA_PRIORITY) or 0,
        index=number(RTA_OIF),
        gateway=_gateway(family, found),
        source=address(RTA_PREFSRC),
        kind=body[7],
    )


@dataclass(frozen=True)
class Neighbour:
    """An entry of the neighbour table for the interface with the index `index`: a permanent entry, or a proxy entry.

    `mac` is None if the entry has no MAC, as a proxy entry has none.
    """

    index: int
    address: str
    mac: str | None


def neighbours(
    family: int, proxies: bool = False, index: int | None = None, most: int | None = None
) -> Iterator[Neighbour]:
    """Yield the permanent entries of the neighbour table; with `proxies`, its proxy entries instead. Raises OSError.

    With `index`, only entries for the interface with this index are yielded. For `most`, see dump. Source:
    neigh_dump_info() in the kernel's net/core/neighbour.c.
    """
    # struct ndmsg: family, padding, interface, state, flags, type
    body = struct.pack("=BBHiHBB", family, 0, 0, 0, 0, NTF_PROXY if proxies else 0, 0)
    if index is not None:
        body += attribute(_NDA_IFINDEX, struct.pack("=I", index))
    for answer in dump(socket.NETLINK_ROUTE, RTM_GETNEIGH, body, most=most):
        on, state = struct.unpack_from("=iH", answer, 4)
        if answer[0] != family or index not in (None, on) or not (proxies or state & NUD_PERMANENT):
            continue
        found = attributes(answer[12:])
        if NDA_DST in found:
            mac = found[NDA_LLADDR].hex(":") if NDA_LLADDR in found else None
            yield Neighbour(on, socket.inet_ntop(family, found[NDA_DST]), mac)


@dataclass(frozen=True)
class NeighbourLimit:
    """The maximum number of non-permanent entries in a neighbour table, `limit`.

    `overflows` is how often, since boot, the table was too full for a new entry.
    """

    limit: int
    overflows: int


def neighbour_limit(family: int) -> NeighbourLimit:
    """Return the limit (gc_thresh3) and the overflows of the neighbour table of an address family. Raises OSError.

    All network namespaces share this table. Source: struct ndt_stats in the kernel's uapi/linux/neighbour.h; its last
    field, table_fulls, counts the overflows.
    """
    for body in dump(socket.NETLINK_ROUTE, _RTM_GETNEIGHTBL, struct.pack("=BBH", family, 0, 0)):
        found = attributes(body[4:])
        if body[0] == family and _NDTA_THRESH3 in found:  # other messages are about one interface each
            stats = found.get(_NDTA_STATS, b"")
            overflows = struct.unpack_from("=Q", stats, 80)[0] if len(stats) >= 88 else 0
            return NeighbourLimit(struct.unpack("=I", found[_NDTA_THRESH3])[0], overflows)
    raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))


@dataclass(frozen=True)
class Address:
    """An address of the interface with the index `index`, and the network that is reached through this interface.

    `length` is the network's prefix length, and `network` an address in the network: on a point-to-point link, the
    peer's address; on any other link, `address` itself. `broadcast` is None if the interface has no broadcast address.
    """

    family: int
    address: str
    network: str
    length: int
    scope: int
    index: int
    broadcast: str | None = None


def addresses(most: int | None = None, link_local: bool = True, family: int = socket.AF_UNSPEC) -> Iterator[Address]:
    """Yield the addresses of all interfaces, including interfaces that are down. Raises OSError.

    `family` is AF_INET, AF_INET6, or AF_UNSPEC for both. Without `link_local`, IPv6 addresses that are valid on a link
    only are left out. OSError is also raised if there are more than `most` addresses (None: no limit); see `dump`.
    """
    # struct ifaddrmsg: family, length of the network, flags, scope, index
    for body in dump(socket.NETLINK_ROUTE, _RTM_GETADDR, struct.pack("=4BI", family, 0, 0, 0, 0), most=most):
        family, length, _, scope, index = struct.unpack_from("=4BI", body)
        if not link_local and family == socket.AF_INET6 and scope == SCOPE_LINK:
            continue  # every workload's interface has one
        found = attributes(body[8:])
        texts = {
            kind: socket.inet_ntop(family, found[kind])
            for kind in (_IFA_ADDRESS, IFA_LOCAL, _IFA_BROADCAST)
            if kind in found and family in (socket.AF_INET, socket.AF_INET6)
        }
        own = texts.get(IFA_LOCAL, texts.get(_IFA_ADDRESS))
        if own is not None:
            network = texts.get(_IFA_ADDRESS, own)
            yield Address(family, own, network, length, scope, index, texts.get(_IFA_BROADCAST))


class Paths(NamedTuple):
    """A route with all its next hops. `hops` are pairs of a gateway (None if on-link) and an interface's index.

    `destination` is an address of 4 or 16 bytes, or empty for a default route; `length` is the prefix length. `hops` is
    empty if the route refers to a nexthop object, and the sysctl net.ipv4.nexthop_compat_mode is 0 (the default is 1).
    """

    destination: bytes
    length: int
    protocol: int
    hops: tuple[tuple[str | None, int], ...]


def paths(family: int, type: int, but: Collection[int] = (), of_links: bool = True) -> Iterator[Paths]:
    """Yield the routes of a type, such as UNICAST, in all tables, except routes of the protocols in `but`.

    Without `of_links`, two kinds of routes of the kernel are left out, of which every workload's interface has one:
    those of type LOCAL to single addresses, and those to the network of IPv6 link-local addresses. Raises OSError.
    """
    single = 32 if family == socket.AF_INET else 128
    request = struct.pack("=8BI", family, 0, 0, 0, 0, 0, 0, type, 0)
    known: dict[bytes, tuple[tuple[str | None, int], ...]] = {}  # thousands of routes have few next hops
    for body in dump(socket.NETLINK_ROUTE, _RTM_GETROUTE, request, strict=True):
        if body[7] != type or body[5] in but:
            continue
        is_of_link = (type == LOCAL and body[1] == single) or _LINK_LOCAL in body
        if not of_links and body[5] == PROTOCOL_KERNEL and is_of_link:
            continue
        destination, at = b"", 12
        while at + 4 <= len(body):
            length, kind = struct.unpack_from("=HH", body, at)
            if kind == RTA_DST:
                destination = body[at + 4 : at + length]
            elif kind != _RTA_TABLE:
                break
            at += max(4, (length + 3) & ~3)
        rest = body[at:]
        if rest not in known:
            known[rest] = tuple(_hops(family, attributes(rest)))
        yield Paths(destination, body[1], body[5], known[rest])


def _hops(family: int, found: dict[int, bytes]) -> Iterator[tuple[str | None, int]]:
    several = found.get(_RTA_MULTIPATH, b"")
    at = 0
    while at + 8 <= len(several):
        # struct rtnexthop: length, flags, hops, index; then attributes
        length, _, _, index = struct.unpack_from("=HBBi", several, at)
        yield _gateway(family, attributes(several[at + 8 : at + length])), index
        at += max(8, (length + 3) & ~3)
    if not several and RTA_OIF in found:
        yield _gateway(family, found), struct.unpack("=i", found[RTA_OIF])[0]


def _gateway(family: int, found: dict[int, bytes]) -> str | None:
    if RTA_VIA in found:  # a gateway of the other IP version
        return socket.inet_ntop(struct.unpack_from("=H", found[RTA_VIA])[0], found[RTA_VIA][2:])
    return socket.inet_ntop(family, found[RTA_GATEWAY]) if RTA_GATEWAY in found else None


def interfaces_to(addresses: Iterable[str], default: bool = True) -> dict[str, frozenset[int]]:
    """Return, for each of `addresses`, the indices of the interfaces through which the kernel sends packets to it.

    There are several if the route to the address is a multipath route. The set is empty if there is no route to the
    address, or if `default` is False and there is only a default route. Raises OSError.
    """
    found = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.settimeout(_TIMEOUT)
        netlink.bind((0, 0))
        for address in addresses:
            # the route, with all next hops; if it names a nexthop object instead, the next hop that is chosen
            length, hops = _route_to(netlink, address, _RTM_F_FIB_MATCH)
            if length is not None and not hops:
                _, hops = _route_to(netlink, address, 0)
            found[address] = frozenset(index for _, index in hops) if default or length else frozenset()
    return found


def _route_to(netlink: socket.socket, address: str, flags: int) -> tuple[int | None, list[tuple[str | None, int]]]:
    """Return the prefix length and the next hops of the route to an address; (None, []) if there is no route.

    With _RTM_F_FIB_MATCH in `flags`, this is the route in the routing table, with all its next hops; without it, a
    route to this address alone, with the one next hop that the kernel chooses.
    """
    version = version_of(address)
    body = struct.pack("=8BI", FAMILIES[version], BITS[version], 0, 0, 0, 0, 0, 0, flags)
    netlink.send(message(_RTM_GETROUTE, REQUEST, 0, body + attribute(RTA_DST, pack(address))))
    for kind, answer in messages(netlink.recv(2**16)):
        if kind == RTM_NEWROUTE:
            return answer[17], list(_hops(FAMILIES[version], attributes(answer[28:])))
    return None, []  # an error: there is no route


@dataclass(frozen=True)
class Interface:
    """A network interface, as seen in its own namespace.

    `mac` is "" if the interface has no MAC. `up` is the administrative state. `carrier` is whether it is up and has a
    carrier: a veth has one while both ends are up. For a veth, `peer_index` is the index that the other end has in its
    own namespace. `peer_namespace` is the id of that namespace in the namespace of this end (IFLA_LINK_NETNSID); None
    if both ends are in the same one. `kind` is the kernel's name for the interface's type, such as `veth` or `bridge`;
    None for hardware and for lo.
    """

    name: str
    index: int
    mac: str
    up: bool
    peer_index: int | None = None
    kind: str | None = None
    mtu: int = 0
    peer_namespace: int | None = None
    carrier: bool = False

    @property
    def is_loopback(self) -> bool:
        return self.index == LOOPBACK_INDEX

    @property
    def peer_is_elsewhere(self) -> bool:
        """Whether the other end of a veth is in another namespace."""
        return self.peer_namespace is not None


def all_interfaces(most: int | None = None) -> Iterator[Interface]:
    """Yield the interfaces of the calling thread's network namespace.

    Raises OSError, also if there are more than `most` (None: no limit); see `dump`.
    """
    # pyroute2 keeps 30 KB for each until all are read
    request = struct.pack("=BBHiII", 0, 0, 0, 0, 0, 0)
    request += attribute(_IFLA_EXT_MASK, struct.pack("=I", _RTEXT_FILTER_SKIP_STATS))
    return map(interface_of, dump(socket.NETLINK_ROUTE, _RTM_GETLINK, request, most=most))


class Traffic(NamedTuple):
    """What an interface has received and sent since it was created."""

    received_packets: int
    sent_packets: int
    received_bytes: int
    sent_bytes: int


def traffic() -> dict[str, Traffic]:
    """Return the traffic of each interface, by name. Raises OSError.

    Source: struct rtnl_link_stats64 in the kernel's uapi/linux/if_link.h.
    """
    found = {}
    for body in dump(socket.NETLINK_ROUTE, _RTM_GETLINK, struct.pack("=BBHiII", 0, 0, 0, 0, 0, 0)):
        link = attributes(body[16:])
        if _IFLA_STATS64 in link:
            found[_name_of(link[_IFLA_IFNAME])] = Traffic(*struct.unpack_from("=4Q", link[_IFLA_STATS64]))
    return found


def interface_at(index: int) -> Interface | None:
    """Return the interface with this index; None if there is none. Raises OSError."""
    try:
        return interface_of(_link(index)) if index > 0 else None
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        return None


def interface_of(body: bytes) -> Interface:
    """Decode a message about an interface (RTM_NEWLINK, RTM_DELLINK). `body` is the message without its header."""
    # struct ifinfomsg: family, padding, type, index, flags, change
    index, flags = struct.unpack_from("=iI", body, 4)
    found = attributes(body[16:])
    kind = attributes(found.get(_IFLA_LINKINFO, b"")).get(_IFLA_INFO_KIND)

    def number(kind: int) -> int | None:
        return int(struct.unpack("=i", found[kind])[0]) if kind in found else None

    return Interface(
        name=_name_of(found.get(_IFLA_IFNAME, b"")),
        index=index,
        mac=found.get(_IFLA_ADDRESS, b"").hex(":"),
        up=flags & IFF_UP != 0,
        peer_index=number(_IFLA_LINK),
        kind=None if kind is None else _kind_of(kind),
        mtu=number(_IFLA_MTU) or 0,
        peer_namespace=number(_IFLA_LINK_NETNSID),
        carrier=flags & _IFF_LOWER_UP != 0,
    )


@dataclass(frozen=True)
class Device:
    """A network interface.

    `kind` is the kernel's name for the interface's type, such as `bridge`; empty for hardware. `macs` are the current
    MAC of the interface and its permanent MAC, if it has one; empty if the interface is not an Ethernet interface.
    """

    name: str
    kind: str
    macs: frozenset[str]


def device(index: int) -> Device:
    """Return the interface with this index. Raises OSError, also if there is none."""
    return _device(_link(index))


def _link(index: int) -> bytes:
    """Return the kernel's message, without its header, about the interface with this index.

    Raises OSError, with the code ENODEV if there is none.
    """
    # struct ifinfomsg: family, padding, type, index, flags, change
    request = struct.pack("=BBHiII", 0, 0, 0, index, 0, 0)
    request += attribute(_IFLA_EXT_MASK, struct.pack("=I", _RTEXT_FILTER_SKIP_STATS))
    return _ask(_RTM_GETLINK, request)


def namespace_id(namespace: int) -> int | None:
    """Return the id that this process's network namespace uses for another one; None if it has no id for that one.

    `namespace` is an open file descriptor of the other namespace. Raises OSError.
    """
    # struct rtgenmsg: family, padding
    body = _ask(_RTM_GETNSID, bytes(4) + attribute(_NETNSA_FD, struct.pack("=I", namespace)))
    found = int(struct.unpack("=i", attributes(body[4:])[_NETNSA_NSID])[0])
    return found if found >= 0 else None


def _ask(kind: int, body: bytes) -> bytes:
    """Send a request that has one answer; return the answer without its header. Raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.settimeout(_TIMEOUT)
        netlink.bind((0, 0))
        netlink.send(message(kind, REQUEST, 0, body))
        type, answer = next(messages(netlink.recv(2**16)))
        if type == ERROR:
            code = refusal(answer)[1]
            raise OSError(code, os.strerror(code))
        return answer[16:]


def delete_link(index: int) -> None:
    """Delete the interface with this index; return when there is none any more. Raises OSError, also if there was none.

    The kernel answers only when nothing in it refers to the interface any more, 15 ms later or more. A thread waits for
    this answer. Source: netdev_run_todo() in the kernel's net/core/dev.c.
    """
    answered = threading.Event()
    failures: list[OSError] = []

    def delete() -> None:
        try:
            do(socket.NETLINK_ROUTE, RTM_DELLINK, 0, struct.pack("=BBHiII", 0, 0, 0, index, 0, 0))
        except OSError as error:
            failures.append(error)
        finally:
            answered.set()

    threading.Thread(target=delete, name=f"deleting interface {index}", daemon=True).start()
    while not answered.wait(0.0005):
        with suppress(OSError):
            if interface_at(index) is None:
                return
    if failures:
        raise failures[0]


def devices_below(master: int) -> list[Device]:
    """Return the member interfaces of the bond, team or bridge with the index `master`. Raises OSError."""
    request = struct.pack("=BBHiII", 0, 0, 0, 0, 0, 0) + attribute(_IFLA_MASTER, struct.pack("=I", master))
    found = []
    for body in dump(socket.NETLINK_ROUTE, _RTM_GETLINK, request):
        # kernels before 4.6 do not filter
        if attributes(body[16:]).get(_IFLA_MASTER) == struct.pack("=I", master):
            found.append(_device(body))
    return found


def _device(body: bytes) -> Device:
    found = attributes(body[16:])
    kind = attributes(found.get(_IFLA_LINKINFO, b"")).get(_IFLA_INFO_KIND, b"")
    is_ethernet = struct.unpack_from("=H", body, 2)[0] == _ARPHRD_ETHER
    macs = {found.get(_IFLA_ADDRESS, b""), found.get(_IFLA_PERM_ADDRESS, b"")} if is_ethernet else ()
    return Device(
        _name_of(found.get(_IFLA_IFNAME, b"")),
        _kind_of(kind),
        frozenset(mac.hex(":") for mac in macs if len(mac) == 6 and any(mac)),
    )


def _name_of(name: bytes) -> str:
    """Decode an interface's name; bytes that are not UTF-8 become lone surrogates, as in socket.if_nameindex()."""
    return name.rstrip(b"\0").decode(errors="surrogateescape")


def _kind_of(kind: bytes) -> str:
    return kind.rstrip(b"\0").decode(errors="replace")


def next_hops() -> Iterator[tuple[str, int]]:
    """Yield (gateway, interface's index) for each nexthop object (`ip nexthop`) that has a gateway.

    Raises OSError, in particular on kernels without nexthop objects (before 5.3).
    """
    # struct nhmsg: family, scope, protocol, reserved, flags
    for body in dump(socket.NETLINK_ROUTE, _RTM_GETNEXTHOP, struct.pack("=4BI", 0, 0, 0, 0, 0)):
        found = attributes(body[8:])
        if _NHA_GATEWAY in found and _NHA_OIF in found:
            yield socket.inet_ntop(body[0], found[_NHA_GATEWAY]), struct.unpack("=i", found[_NHA_OIF])[0]


def do(protocol: int, kind: int, flags: int, body: bytes) -> None:
    """Send a request that changes something, and wait for the answer; raise OSError if the kernel refuses the request.

    `protocol` is the netlink family, and `kind` the type of the message. REQUEST and ACK are added to `flags`.
    """
    do_together(protocol, [(kind, flags, body)])


def do_together(protocol: int, requests: Sequence[tuple[int, int, bytes]]) -> None:
    """Do what `do` does for several requests, each as (kind, flags, body), which are sent together.

    Raises the OSError for the first one that the kernel refuses. It carries out those after it as well.
    """
    codes: dict[int, int] = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as netlink:
        netlink.settimeout(_TIMEOUT)
        netlink.bind((0, 0))
        netlink.send(
            b"".join(
                message(kind, REQUEST | ACK | flags, number, body)
                for number, (kind, flags, body) in enumerate(requests)
            )
        )
        while len(codes) < len(requests):
            codes.update(refusal(answer) for type, answer in messages(netlink.recv(2**16)) if type == ERROR)
    for number in sorted(codes):
        if codes[number]:
            raise OSError(codes[number], os.strerror(codes[number]))
