"""The driver of the overlay: programs VXLAN devices, their FDB and neighbour entries, and the overlay's routes.

The overlay's routes have a protocol number of their own, 81 (`ip route show proto 81`). The agent's devices are
recognised by name, kind and VNI. Any other interface is left as it is, even if it has the name of one of these devices.
On its devices, the agent deletes FDB and neighbour entries that it has not set.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calicoctl import netlink, proc, rtnetlink
from calicoctl.addresses import FAMILIES, link_local, pack, version_of
from calicoctl.desired.overlay import Tunnel
from calicoctl.errors import CalicoError
from calicoctl.felix.dataplane import sysctls
from calicoctl.workloads.mtu import Underlay, underlay

if TYPE_CHECKING:
    from pyroute2.iproute.linux import IPRoute

DEVICES = {4: "vxlan.calico", 6: "vxlan-v6.calico"}
"""The devices' names, by the IP version of the underlay: a device can use only one version. Calico 3 uses the same
names.
"""
VNI = 4095
"""The VNI of our devices. It is below 4096, since Docker Swarm uses VNIs from 4096 on, and the kernel refuses a second
device with the same VNI and port. Source: vxlanIDStart in libnetwork's drivers/overlay/ovmanager.
"""
PORT = 4789
"""The UDP port of VXLAN. Source: RFC 7348."""

_DUMMY_ADDRESS = "192.0.0.8"
"""An address that no host uses, for devices that must have an address. Source: RFC 7600, section 4.8."""

_METRIC = {4: 0, 6: 1}
"""IP version -> the smallest metric, so that our routes precede BIRD's, which have 32. In IPv6, 0 means 1024."""
_ANY_SCOPE = 255
"""In a request to delete a route: matches any scope. Source: fib_table_delete() in the kernel's net/ipv4/fib_trie.c."""


@dataclass(frozen=True)
class Route:
    """A route of the overlay to a CIDR. If `index` and `gateway` are None, it is a blackhole route.

    `index` is the index of the interface. `source` is the source address of this host's own packets; if it is None, the
    kernel chooses one.
    """

    cidr: str
    index: int | None = None
    gateway: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Device:
    """The state of a VXLAN device in the kernel.

    `learning` says whether the kernel learns FDB entries (MAC -> underlay address) from received packets. `local` is
    the source address of the packets that the device sends in the underlay, None if it is not set. `parent` is the
    index of the interface through which the device sends these packets, None if it is not set.
    """

    index: int
    up: bool
    mac: str
    mtu: int
    vni: int
    port: int
    learning: bool
    local: str | None
    parent: int | None


class Vxlan:
    """The agent's VXLAN devices, their entries, and the overlay's routes.

    They are cached: `read` fills the cache, and the methods that change the kernel update it. `states`,
    `routed_by_bird`, `underlay` and `index_of` do not use the cache, but read from the kernel. Methods
    raise CalicoError if the kernel refuses a request; `index_of` then returns None.
    """

    def __init__(self, netlink: IPRoute) -> None:
        self._netlink = netlink
        self.routes: set[Route] = set()
        """The overlay's routes."""
        self._devices: dict[int, Device] = {}
        self._fdb: dict[int, set[tuple[str, str]]] = {}
        """IP version of the underlay -> the FDB entries of its device, as (MAC, underlay address)."""
        self._neighbours: dict[int, set[tuple[str, str]]] = {}
        """IP version of the underlay -> the permanent neighbour entries of its device, as (address, MAC)."""

    def read(self) -> None:
        """Read the devices, their entries, and the overlay's routes into the cache."""
        self._devices = self._find_devices()
        with _explained("the overlay's routes and entries cannot be read"):
            self.routes = set(_routes())
            entries = list(_fdb_entries()) if self._devices else []
            neighbours = list(netlink.neighbours(socket.AF_INET6)) if self._devices else []
        for version, device in self._devices.items():
            self._fdb[version] = {(mac, address) for index, mac, address in entries if index == device.index}
            self._neighbours[version] = {
                (one.address, one.mac) for one in neighbours if one.index == device.index and one.mac is not None
            }

    def states(self) -> dict[int, bool]:
        """Read from the kernel which devices of ours exist: IP version of the underlay -> whether the device is up."""
        return {version: device.up for version, device in self._find_devices().items()}

    def index(self, version: int) -> int | None:
        """Return the index of our device for an underlay of this IP version, or None if the device does not exist."""
        device = self._devices.get(version)
        return None if device is None else device.index

    def versions(self) -> set[int]:
        """Return the IP versions of the underlays for which a device of ours exists."""
        return set(self._devices)

    def apply_device(self, tunnel: Tunnel, parent: int | None, mtu: int) -> None:
        """Create or correct the device of a tunnel, bring it up, and set its entries for the tunnel's peers.

        `parent` is the index of the interface through which the device sends its packets, None for any. Raises
        CalicoError if the kernel refuses, or if an interface that is not ours has the device's name.
        """
        name = DEVICES[tunnel.version]
        device = self._devices.get(tunnel.version)
        if device is None:
            found = self._find(name)
            if found is not None:
                what = f"it has the VNI {found.vni}" if isinstance(found, Device) else f"it is of the kind '{found}'"
                raise CalicoError(
                    f"the interface {name} is not the agent's ({what}): rename or remove it; until then, hosts do not "
                    "reach each other's workloads in pools with an overlay"
                )
        elif not self._fits(device, tunnel, parent):
            self._remove(tunnel.version, device)
            device = None
        if device is None:
            device = self._create(name, tunnel, parent, mtu)
        with _explained(f"the kernel refused to configure {name}"):
            if device.mac != tunnel.mac:
                self._netlink.link("set", index=device.index, address=tunnel.mac)
            if device.mtu != mtu:
                self._netlink.link("set", index=device.index, mtu=mtu)
            for path, value in _settings(name).items():
                sysctls.write(path, value)
            _add_address(device.index)
            if not device.up:
                self._bring_up(name, device)
        if (device.mac, device.mtu, device.up) != (tunnel.mac, mtu, True):
            self._reread(tunnel.version, name)
            self._neighbours[tunnel.version] = set()  # with a new MAC, the kernel deletes them
        self._apply_peers(tunnel, device.index)

    def remove_device(self, version: int) -> None:
        """Remove our device for an underlay of this IP version, if the device exists."""
        device = self._devices.get(version)
        if device is not None:
            self._remove(version, device)

    def apply_routes(self, desired: Iterable[Route]) -> None:
        """Make `desired` the routes of the overlay: add or replace these routes, and remove all others.

        `desired` contains at most one route for each CIDR. A route is replaced without a gap, unless the kernel has
        several overlay routes to the CIDR. If the kernel refuses some routes, the others are programmed, and then
        CalicoError is raised.
        """
        routes = {route.cidr: route for route in desired}
        have: dict[str, set[Route]] = defaultdict(set)
        for route in self.routes:
            have[route.cidr].add(route)
        failures = []
        for cidr in sorted(have.keys() | routes.keys()):
            try:
                if cidr not in routes:
                    self._delete(cidr, have[cidr])
                elif have[cidr] != {routes[cidr]}:
                    self._put(routes[cidr], have[cidr])
            except CalicoError as error:
                failures.append(str(error))
        if failures:
            more = f" (and {len(failures) - 1} more)" if failures[1:] else ""
            raise CalicoError(failures[0] + more)

    def underlay(self, address: str) -> Underlay:
        """Return the interface that has an address of this host, and its MTU: see Underlay. Raises CalicoError."""
        return underlay(address)

    def index_of(self, interface: str) -> int | None:
        """Return the index of an interface, or None if no interface has the name."""
        with suppress(OSError):
            return socket.if_nametoindex(interface)
        return None

    def routed_by_bird(self) -> set[str]:
        """Return the CIDRs to which BIRD has a route in the kernel, blackhole routes included."""
        with _explained("BIRD's routes cannot be read"):
            return {
                f"{route.destination}/{route.length}"
                for family in FAMILIES.values()
                for route in netlink.routes(family, protocol=netlink.PROTOCOL_BIRD)
                if route.kind in (netlink.UNICAST, netlink.BLACKHOLE)
            }

    # Devices

    def _find_devices(self) -> dict[int, Device]:
        found = {version: self._find(name) for version, name in DEVICES.items()}
        return {version: one for version, one in found.items() if isinstance(one, Device) and one.vni == VNI}

    def _bring_up(self, name: str, device: Device) -> None:
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            self._netlink.link("set", index=device.index, state="up")
        except NetlinkError as error:
            if error.code != errno.EADDRINUSE:
                raise
            holder = proc.port_holder("udp", PORT) or "another program"
            raise CalicoError(
                f"the overlay is down: {name} needs UDP port {PORT}, which {holder} holds: end that one (ss -ulnp "
                f"'sport = {PORT}'), and the agent brings {name} up within 10 seconds"
            ) from None

    def _find(self, name: str) -> Device | str | None:
        """Return the VXLAN device with this name, whatever its VNI, or None if no interface has the name.

        If the interface is no VXLAN device, return its kind, such as "bridge"; "unknown" if it has no kind.
        """
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            with _explained(f"interface {name} cannot be read"):
                try:
                    link = self._netlink.link("get", ifname=name)[0]
                except NetlinkError as error:
                    if error.code == errno.ENODEV:
                        return None
                    raise
        except IndexError:
            return None
        info = link.get_attr("IFLA_LINKINFO")
        kind = None if info is None else info.get_attr("IFLA_INFO_KIND")
        if kind != "vxlan":
            return kind or "unknown"
        data = info.get_attr("IFLA_INFO_DATA")
        return Device(
            link["index"],
            link["flags"] & netlink.IFF_UP != 0,
            link.get_attr("IFLA_ADDRESS"),
            link.get_attr("IFLA_MTU"),
            data.get_attr("IFLA_VXLAN_ID"),
            data.get_attr("IFLA_VXLAN_PORT"),
            bool(data.get_attr("IFLA_VXLAN_LEARNING")),
            data.get_attr("IFLA_VXLAN_LOCAL") or data.get_attr("IFLA_VXLAN_LOCAL6"),
            data.get_attr("IFLA_VXLAN_LINK") or None,
        )

    def _reread(self, version: int, name: str) -> Device:
        device = self._find(name)
        if not isinstance(device, Device):
            raise CalicoError(f"{name} was removed while it was set up")
        self._devices[version] = device
        return device

    def _create(self, name: str, tunnel: Tunnel, parent: int | None, mtu: int) -> Device:
        fields = {"address": tunnel.mac, "mtu": mtu, "vxlan_id": VNI, "vxlan_port": PORT}
        with _explained(f"the kernel refused to create {name}, with the VNI {VNI} on port {PORT}"):
            self._netlink.link("add", ifname=name, kind="vxlan", **fields, **_changeable(tunnel, parent))
        self._fdb[tunnel.version], self._neighbours[tunnel.version] = set(), set()
        return self._reread(tunnel.version, name)

    def _fits(self, device: Device, tunnel: Tunnel, parent: int | None) -> bool:
        """Correct the settings of a device that the kernel can change in place.

        Returns False if the device does not fit the tunnel after that, so that it must be created again.
        """
        from pyroute2.netlink.exceptions import NetlinkError

        if device.port != PORT:
            return False
        if (device.local, device.parent, device.learning) == (tunnel.local, parent, False):
            return True
        if device.local is None or version_of(device.local) != tunnel.version or (device.parent and parent is None):
            return False
        try:
            self._netlink.link("set", index=device.index, kind="vxlan", **_changeable(tunnel, parent))
        except NetlinkError:  # this kernel cannot change it
            return False
        now = self._reread(tunnel.version, DEVICES[tunnel.version])
        return (now.local, now.parent, now.learning) == (tunnel.local, parent, False)

    def _remove(self, version: int, device: Device) -> None:
        with _explained(f"the kernel refused to remove {DEVICES[version]}", errno.ENODEV):
            self._netlink.link("del", index=device.index)
        del self._devices[version]
        self.routes = {route for route in self.routes if route.index != device.index}  # gone with the device

    def _apply_peers(self, tunnel: Tunnel, index: int) -> None:
        """Set the FDB and neighbour entries of a device to those of the tunnel's peers. Delete all others."""
        fdb, neighbours = self._fdb[tunnel.version], self._neighbours[tunnel.version]
        desired = {(mac, address) for mac, address in tunnel.peers.items()}
        resolved = {(link_local(mac), mac) for mac in tunnel.peers}
        for mac, address in desired - fdb:
            _change_fdb(index, mac, address, add=True)
        for address, mac in resolved - neighbours:
            _change_neighbour(index, address, mac)
        # entries with the same key (the MAC, or the neighbour's address) were replaced above: do not delete those
        for mac, address in fdb - desired:
            if mac not in tunnel.peers:
                _change_fdb(index, mac, address, add=False)
        for address, _ in neighbours - resolved:
            if address not in dict(resolved):
                _change_neighbour(index, address, None)
        self._fdb[tunnel.version], self._neighbours[tunnel.version] = desired, resolved

    # Routes

    def _put(self, route: Route, before: set[Route]) -> None:
        """Add a route. It replaces the routes in `before`, the overlay's present routes to the same CIDR.

        If `before` is empty, the overlay has no route to the CIDR yet. Routes of other programs to the CIDR stay.
        """
        if len(before) > 1:  # the kernel would replace only one of them
            self._delete(route.cidr, before)
            before = set()
        flags = netlink.CREATE | (netlink.REPLACE if before else 0)
        with _explained(f"the kernel refused a route to {route.cidr}", errno.EEXIST):
            netlink.do(socket.NETLINK_ROUTE, netlink.RTM_NEWROUTE, flags, _message(route))
        self.routes = (self.routes - before) | {route}

    def _delete(self, cidr: str, routes: set[Route]) -> None:
        with _explained(f"the kernel refused to remove the route to {cidr}", errno.ESRCH, errno.ENOENT):
            for _ in routes:  # each request deletes one of them
                netlink.do(socket.NETLINK_ROUTE, netlink.RTM_DELROUTE, 0, _to(cidr, 0, _ANY_SCOPE))
        self.routes -= routes


def _changeable(tunnel: Tunnel, parent: int | None) -> dict[str, Any]:
    """Return, as pyroute2's fields, the desired values of those settings of a device that can be changed in place."""
    local = {"vxlan_local" if tunnel.version == 4 else "vxlan_local6": tunnel.local}
    return {**local, **({} if parent is None else {"vxlan_link": parent}), "vxlan_learning": 0}


def _settings(name: str) -> dict[str, str]:
    """Return the desired sysctls of a device: values by path below /proc/sys/net.

    Source: fib_validate_source() in the kernel's net/ipv4/fib_frontend.c; Documentation/networking/ip-sysctl.rst.
    """
    # IPv6 must be enabled, since the gateways of the routes are link-local addresses of the peers
    settings = {"disable_ipv6": "0", "accept_dad": "0", "accept_ra": "0"}
    return {
        # the check of the reverse path must be loose: packets that another host itself sends through the tunnel have
        # that host's underlay address as source, and the route back to that address does not lead through the tunnel.
        # The kernel uses the larger of this value and the one for all interfaces, hence 2 and not 0. Our nftables
        # tables check senders
        f"ipv4/conf/{name}/rp_filter": "2",
        **{f"ipv6/conf/{name}/{setting}": value for setting, value in settings.items()},
    }


def _add_address(index: int) -> None:
    """Add the dummy address to a device, unless the device has it already.

    Without an IPv4 address, even the loose check of the reverse path drops packets. Source: see `_settings`.
    """
    body = struct.pack("=4BI", socket.AF_INET, 32, 0, netlink.SCOPE_LINK, index)
    body += netlink.attribute(netlink.IFA_LOCAL, pack(_DUMMY_ADDRESS))
    with suppress(FileExistsError):
        netlink.do(socket.NETLINK_ROUTE, netlink.RTM_NEWADDR, netlink.CREATE | netlink.EXCLUSIVE, body)


def _routes() -> Iterator[Route]:
    for family in FAMILIES.values():
        for route in netlink.routes(family, protocol=netlink.OVERLAY_PROTOCOL):
            if route.destination is not None:
                cidr = f"{route.destination}/{route.length}"
                if route.kind == netlink.BLACKHOLE:
                    yield Route(cidr)
                else:
                    yield Route(cidr, route.index, route.gateway, route.source)


def _to(cidr: str, kind: int, scope: int = netlink.SCOPE_GLOBAL) -> bytes:
    """Return the first part of a request about the overlay's route to a CIDR.

    `kind` is the type of the route, 0 for any. Source: the kernel's uapi/linux/rtnetlink.h.
    """
    address, _, length = cidr.partition("/")
    version = version_of(address)
    fixed = (0, 0, netlink.TABLE_MAIN, netlink.OVERLAY_PROTOCOL, scope, kind)
    body = struct.pack("=8BI", FAMILIES[version], int(length), *fixed, 0)
    body += netlink.attribute(netlink.RTA_DST, pack(address))
    return body + netlink.attribute(netlink.RTA_PRIORITY, struct.pack("=I", _METRIC[version]))


def _message(route: Route) -> bytes:
    """Return the request to add or replace a route."""
    version = version_of(route.cidr)
    body = _to(route.cidr, netlink.BLACKHOLE if route.index is None else netlink.UNICAST)
    if route.index is not None:
        body += netlink.attribute(netlink.RTA_OIF, struct.pack("=I", route.index))
    if route.gateway is not None and version_of(route.gateway) != version:
        via = struct.pack("=H", FAMILIES[version_of(route.gateway)]) + pack(route.gateway)
        body += netlink.attribute(netlink.RTA_VIA, via)
    elif route.gateway is not None:
        body += netlink.attribute(netlink.RTA_GATEWAY, pack(route.gateway))
    if route.source is not None:
        body += netlink.attribute(netlink.RTA_PREFSRC, pack(route.source))
    return body


def _fdb_entries() -> Iterator[tuple[int, str, str]]:
    """Yield (index of the interface, MAC, underlay address) for each FDB entry that leads to an underlay address."""
    request = struct.pack("=BBHiHBB", socket.AF_BRIDGE, 0, 0, 0, 0, 0, 0)
    for body in netlink.dump(socket.NETLINK_ROUTE, netlink.RTM_GETNEIGH, request):
        found = netlink.attributes(body[12:])
        if netlink.NDA_DST in found and netlink.NDA_LLADDR in found:
            packed = found[netlink.NDA_DST]
            index = struct.unpack_from("=i", body, 4)[0]
            family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
            yield index, found[netlink.NDA_LLADDR].hex(":"), socket.inet_ntop(family, packed)


def _change_fdb(index: int, mac: str, address: str, add: bool) -> None:
    """Set a device's FDB entry, by which frames for `mac` are sent to the underlay address `address`.

    If `add` is False, remove the entry.
    """
    body = struct.pack(
        "=BBHiHBB",
        *(socket.AF_BRIDGE, 0, 0, index),
        *(netlink.NUD_NOARP | netlink.NUD_PERMANENT, netlink.NTF_SELF, 0),
    )
    body += netlink.attribute(netlink.NDA_LLADDR, bytes.fromhex(mac.replace(":", "")))
    body += netlink.attribute(netlink.NDA_DST, pack(address))
    with _explained(f"the kernel refused to change the tunnel to {address}", *(() if add else (errno.ENOENT,))):
        kind, flags = (netlink.RTM_NEWNEIGH, netlink.CREATE | netlink.REPLACE) if add else (netlink.RTM_DELNEIGH, 0)
        netlink.do(socket.NETLINK_ROUTE, kind, flags, body)


def _change_neighbour(index: int, address: str, mac: str | None) -> None:
    """Set a device's permanent IPv6 neighbour entry for `address` to `mac`. If `mac` is None, remove the entry."""
    with _explained(f"the kernel refused to change the neighbour {address}", *(() if mac else (errno.ENOENT,))):
        if mac is None:
            rtnetlink.send(rtnetlink.delete_neighbour(index, address))
        else:
            rtnetlink.send(rtnetlink.put_neighbour(index, address, mac))


@contextmanager
def _explained(what: str, *ignored: int) -> Iterator[None]:
    """Replace an error of the kernel, raised inside `with`, by a CalicoError whose text begins with `what`.

    Errors with the codes (errno) in `ignored` are suppressed.
    """
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        yield
    except (NetlinkError, OSError) as error:
        code = int(error.code if isinstance(error, NetlinkError) else error.errno or 0)
        if code not in ignored:
            raise CalicoError(f"{what}: {os.strerror(code)}") from None
