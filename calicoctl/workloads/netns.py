"""Reads and configures network namespaces and veth pairs, with their addresses, routes and neighbour entries.

Does not use the store.

A namespace is entered only in a short-lived thread that is started for that purpose; the main thread never leaves the
host's namespace.

Public functions and methods raise NamespaceError if the kernel refuses an operation, except for Namespace.run and
`inspect`, which do not convert errors.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Callable, TypeVar

from calicoctl import rtnetlink
from calicoctl.addresses import BITS, FAMILIES, canonical, version_of
from calicoctl.errors import CalicoError, NamespaceError
from calicoctl.netlink import (
    LOOPBACK_INDEX,
    PROTOCOL_STATIC,
    Interface,
    addresses,
    all_interfaces,
    delete_link,
    interface_at,
    namespace_id,
    neighbours,
    routes,
)

T = TypeVar("T")

_NS_GET_NSTYPE = 0xB703
"""The ioctl that returns the type of a namespace. Source: ioctl_ns(2)."""

CLONE_NEWNET = 0x40000000
"""The type of network namespaces. Source: clone(2)."""

# udev would change a random MAC (MACAddressPolicy in systemd.link(5)) after the workload has learned it
HOST_MAC = "ee:ee:ee:ee:ee:ee"
"""The MAC of the host end of every veth pair, as in other Calico tools since 2016."""

# duplicate address detection would delay the use of the address; the workload is no router for this host
HOST_END_IPV6 = {"accept_dad": "0", "accept_ra": "0"}
"""IPv6 sysctls that are set on the host end of every veth pair before it is brought up. Source: the kernel's
Documentation/networking/ip-sysctl.rst."""

# processes in a namespace may add as many as memory allows; reading so many takes a quarter of a second
MOST = 20_000
"""The maximum number of routes or neighbour entries that are read from a namespace; more are an error."""


@dataclass(frozen=True)
class Loopback:
    """Whether a namespace's loopback interface is up, and whether IPv6 is enabled on it."""

    up: bool
    ipv6: bool


@dataclass
class Inspection:
    """The interfaces of a namespace, its default routes, and the state of its loopback interface.

    `default_routes` maps an IP version to the first default route of this version, as text such as
    `via ADDRESS dev INTERFACE`. A version without a default route is left out.
    """

    interfaces: list[Interface] = field(default_factory=list)
    default_routes: dict[int, str] = field(default_factory=dict)
    loopback: Loopback = Loopback(up=True, ipv6=True)


class Namespace:
    """An open network namespace. It stays the same even if its path is later deleted, or leads to another namespace."""

    def __init__(self, path: str, name: str) -> None:
        """Open the namespace at `path`. `name` stands for it in messages. Raises NamespaceError."""
        self.name = name
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise NamespaceError(f"{name}: its network namespace {path} cannot be opened: {error.strerror}") from None
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode) or fcntl.ioctl(self._fd, _NS_GET_NSTYPE) != CLONE_NEWNET:
                raise OSError
        except OSError:
            os.close(self._fd)
            raise NamespaceError(f"{path} is not a network namespace") from None

    def __enter__(self) -> Namespace:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def fileno(self) -> int:
        return self._fd

    def is_own(self) -> bool:
        """Return whether this is the namespace of this process, which is the host's namespace."""
        here, there = os.stat("/proc/self/ns/net"), os.fstat(self._fd)
        return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)

    def run(self, work: Callable[[], T]) -> T:
        """Call `work` in a thread that has entered this namespace; return what `work` returns.

        In the thread, /proc/sys/net contains the sysctls of this namespace. An exception of `work` is raised again in
        the calling thread.
        """
        outcome: dict[str, Any] = {}
        wanted = True
        begin, done = threading.Event(), threading.Event()

        def body() -> None:
            begin.wait()
            if not wanted:
                return
            try:
                _enter(self._fd)
                outcome["result"] = work()
            except BaseException as error:
                outcome["error"] = error
            finally:
                done.set()

        try:
            threading.Thread(target=body, name=f"namespace of {self.name}").start()
            begin.set()
            done.wait()  # an interrupted join() counts the thread as ended (bugs.python.org/issue45274)
        except BaseException:
            if begin.is_set():
                done.wait()  # the thread must be done before its work is rolled back
            wanted = False
            begin.set()
            raise
        if "error" in outcome:
            raise outcome["error"]
        return outcome["result"]  # type: ignore[no-any-return]

    def inspect(self) -> Inspection:
        """Return the interfaces and default routes of this namespace, and the state of its loopback interface."""
        with _explained(f"{self.name}: reading its interfaces and routes"):
            return self.run(inspect)

    def interface(self, name: str) -> Interface | None:
        """Return the interface of this namespace with this name; None if there is none."""
        with _explained(f"{self.name}: reading its interface {name}"):
            return self.run(lambda: _named(name))

    def has_address(self, interface: str, net: str) -> bool:
        """Return whether an interface of this namespace has an address, given as `address/32` or `address/128`."""
        address, _, length = net.partition("/")

        def work() -> bool:
            index = _index(interface)
            wanted = (index, canonical(address), int(length))
            return any((one.index, one.address, one.length) == wanted for one in addresses(most=MOST))

        with _explained(f"{self.name}: reading the addresses of {interface}"):
            return self.run(work)

    def has_default_route(self, interface: str, version: int) -> bool:
        """Return whether this namespace has a default route of an IP version through one of its interfaces."""

        def work() -> bool:
            return any(routes(FAMILIES[version], lengths=(0,), index=_index(interface), most=MOST))

        with _explained(f"{self.name}: reading the routes through {interface}"):
            return self.run(work)

    def own_end(self, host_end: Interface) -> Interface | None:
        """Return the other end of the veth `host_end`, an interface of the host.

        Returns None if the other end is not in this namespace, if `host_end` is not a veth, or if it was deleted.
        """
        # indices alone prove nothing: processes in the namespace may choose them
        with _explained("reading this host's interfaces"):
            link = interface_at(host_end.index)
            if link is None or not _leads_to(link, self._fd):
                return None
        with _explained(f"{self.name}: reading its interfaces"):
            own = self.run(lambda: interface_at(host_end.peer_index or 0))
        return own if own is not None and (own.kind, own.peer_index) == ("veth", host_end.index) else None

    def pairs(self) -> list[tuple[Interface, Interface]]:
        """Return the veth pairs with one end in this namespace and the other on the host.

        Each is a pair (end in this namespace, end on the host).
        """
        with _explained(f"{self.name}: reading its interfaces"):
            own = self.run(lambda: list(all_interfaces(MOST)))
        return self.pairs_of(own)

    def pairs_of(self, interfaces: Iterable[Interface]) -> list[tuple[Interface, Interface]]:
        """Do what `pairs` does, for some interfaces of this namespace, which the caller has read."""
        # the host has an interface for each workload: those of the namespace are fewer
        peers = [one.peer_index for one in interfaces if one.kind == "veth"]
        with _explained("reading this host's interfaces"):
            ends = [interface_at(index) for index in peers if index is not None]
        pairs = [(self.own_end(end), end) for end in ends if end is not None]
        return [(own, host_end) for own, host_end in pairs if own is not None]

    def ipv6_is_off(self, interface: str) -> bool:
        """Return whether the sysctls of this namespace disable IPv6 on an interface."""
        with _explained(f"{self.name}: reading whether IPv6 is disabled on {interface}"):
            return self.run(lambda: _read_sysctl(f"net/ipv6/conf/{interface}/disable_ipv6")) == "1"

    def disable_ipv6(self, interface: str) -> None:
        with _explained(f"{self.name}: disabling IPv6 on {interface}"):
            self.run(lambda: _write_sysctl(f"net/ipv6/conf/{interface}/disable_ipv6", "1"))

    def restore_loopback(self, before: Loopback) -> None:
        """Restore the state `before` of the loopback interface: the state that it had before `configure` was called."""

        def work() -> None:
            if not before.ipv6:
                _write_sysctl("net/ipv6/conf/lo/disable_ipv6", "1")
            if not before.up:
                rtnetlink.send(rtnetlink.set_up(LOOPBACK_INDEX, False))

        with _explained(f"{self.name}: removing what was configured on lo"):
            self.run(work)

    def configure(self, interface: str, nets: list[str], next_hops: dict[int, str], host_mac: str) -> str:
        """Bring `interface` up, and add addresses and default routes to it; return its MAC. Idempotent.

        `nets` are the addresses, as `address/32` or `address/128`. `next_hops` are the gateways of the default routes,
        by IP version. For each gateway, an on-link route and a permanent neighbour entry with the MAC `host_mac` are
        added. The loopback interface is brought up, too. If `nets` contains an IPv6 address, IPv6 is enabled on
        `interface` and on the loopback interface.
        """

        def work() -> str:
            index = _index(interface)
            if any(version_of(net) == 6 for net in nets):
                # Docker disables IPv6 on every interface of a container
                for name in ("lo", interface):
                    _write_sysctl(f"net/ipv6/conf/{name}/disable_ipv6", "0")
            requests = [rtnetlink.set_up(LOOPBACK_INDEX), rtnetlink.set_up(index)]
            for net in nets:
                address, _, length = net.partition("/")
                requests.append(rtnetlink.put_address(index, address, int(length)))
            for version, next_hop in next_hops.items():
                requests.append(rtnetlink.put_route(version, index, next_hop))
                requests.append(rtnetlink.put_route(version, index, gateway=next_hop))
                requests.append(rtnetlink.put_neighbour(index, next_hop, host_mac))
            rtnetlink.send(*requests)
            unknown = _missing_next_hops(index, host_mac, FAMILIES.keys() - next_hops.keys())
            rtnetlink.send(*(rtnetlink.put_neighbour(index, hop, host_mac) for hop in unknown))
            found = interface_at(index)
            return "" if found is None else found.mac

        with _explained(f"{self.name}: configuring {interface}"):
            return self.run(work)

    def set_mtu(self, interface: str, mtu: int) -> None:
        with _explained(f"{self.name}: setting the MTU of {interface}"):
            self.run(lambda: rtnetlink.send(rtnetlink.set_mtu(_index(interface), mtu)))

    def update_next_hops(self, interface: str, host_mac: str) -> bool:
        """Add or change neighbour entries, so that each next hop of `interface` has a permanent one with `host_mac`.

        The next hops are the gateways of the default routes through the interface. Returns whether any entry was added
        or changed. If so, the loopback interface is brought up, too. If an IPv6 entry was added or changed, IPv6 is
        enabled on the loopback interface.
        """

        def work() -> bool:
            index = _index(interface)
            unknown = _missing_next_hops(index, host_mac)
            if not unknown:
                return False
            # the loopback interface: for workloads that an older version has connected
            neighbours = [rtnetlink.put_neighbour(index, hop, host_mac) for hop in unknown]
            rtnetlink.send(*neighbours, rtnetlink.set_up(LOOPBACK_INDEX))
            if any(version_of(address) == 6 for address in unknown):
                _write_sysctl("net/ipv6/conf/lo/disable_ipv6", "0")
            return True

        with _explained(f"{self.name}: updating {interface}"):
            return self.run(work)

    def has_next_hops(self, index: int, mac: str) -> bool:
        """Return whether each next hop of an interface has a permanent neighbour entry with this MAC.

        `index` is the interface's index. The next hops are the gateways of the default routes through the interface.
        """
        with _explained(f"{self.name}: reading its next hops"):
            return not self.run(lambda: _missing_next_hops(index, mac))

    def unconfigure(self, interface: str, nets: list[str], versions: Collection[int]) -> None:
        """Remove the addresses `nets` from `interface`, and its routes of the IP versions `versions`. Idempotent.

        The routes that are removed are the static default routes and host routes through the interface. The neighbour
        entries of the routes' gateways are removed, too. The interface stays up.
        """

        def work() -> None:
            index = _index(interface)
            for version in versions:
                lengths = (0, BITS[version])
                for route in list(routes(FAMILIES[version], lengths, PROTOCOL_STATIC, index, MOST)):
                    if route.gateway:  # before the route, which names the gateway
                        with _ignoring(errno.ENOENT):
                            rtnetlink.send(rtnetlink.delete_neighbour(index, route.gateway))
                    with _ignoring(errno.ESRCH):
                        rtnetlink.send(rtnetlink.delete_route(version, index, route.destination))
            for net in nets:
                address, _, length = net.partition("/")
                with _ignoring(errno.EADDRNOTAVAIL):
                    rtnetlink.send(rtnetlink.delete_address(index, address, int(length)))

        with _explained(f"{self.name}: removing what was configured on {interface}"):
            self.run(work)


def create_veth(name: str, namespace: Namespace, interface: str, mtu: int, mac: str | None = None) -> None:
    """Create a veth pair: one end, `name`, on the host, and the other, `interface`, in `namespace`. Both ends are down.

    `mac` is the MAC of the end in the namespace; None lets the kernel choose one. The MAC of the end on the host is
    HOST_MAC. If NamespaceError is raised, no pair was created.
    """
    with _explained(f"{namespace.name}: creating the veth pair {name} and {interface}"):
        peer = rtnetlink.End(interface, mtu, mac, namespace.fileno())
        rtnetlink.send(rtnetlink.add_veth(rtnetlink.End(name, mtu, HOST_MAC), peer))


def create_veth_here(name: str, peer: str, mtu: int, mac: str) -> None:
    """Create a veth pair with both ends on the host: `name`, which is up, and `peer`, which is down.

    An interface `name` that exists is replaced. `mac` is the MAC of `peer`; the MAC of the other end is HOST_MAC. If
    NamespaceError is raised, there is no such pair.
    """
    with _explained(f"creating the veth pair {name} and {peer}"):
        _delete(name)
        rtnetlink.send(rtnetlink.add_veth(rtnetlink.End(name, mtu, HOST_MAC), rtnetlink.End(peer, mtu, mac)))
        try:
            _set_up(name)
        except BaseException:
            _delete(name)
            raise


def set_up(name: str) -> None:
    """Set the sysctls HOST_END_IPV6 on the host end of a veth pair, and bring it up."""
    with _explained(f"bringing interface {name} up"):
        _set_up(name)


def _set_up(name: str) -> None:
    with suppress(FileNotFoundError):  # a kernel without IPv6
        for setting, value in HOST_END_IPV6.items():
            _write_sysctl(f"net/ipv6/conf/{name}/{setting}", value)
    rtnetlink.send(rtnetlink.set_up(_index(name)))


def set_mtu(name: str, mtu: int) -> None:
    """Set the MTU of an interface of the host."""
    with _explained(f"setting the MTU of interface {name}"):
        rtnetlink.send(rtnetlink.set_mtu(_index(name), mtu))


def find_interface(name: str) -> Interface | None:
    """Return the interface of the host with this name; None if there is none."""
    with _explained(f"reading interface {name}"):
        return _named(name)


def interfaces() -> list[Interface]:
    """Return the interfaces of the host."""
    with _explained("reading this host's interfaces"):
        return list(all_interfaces())


def check_attachments(namespaces: Mapping[str, str], next_hops: bool = True) -> dict[str, bool]:
    """Return, by interface name, whether interfaces of the host lead into the right namespaces.

    `namespaces` maps the name of each interface to the path of its namespace. The result for an interface is True if
    the other end of the veth pair is in this namespace and, with `next_hops`, each next hop of the other end has a
    permanent neighbour entry with the MAC of the host end. An interface is left out if it does not exist, or if its
    namespace does not exist or cannot be read.
    """
    found = {}
    with _explained("reading this host's interfaces"):
        for link in [link for link in all_interfaces() if link.name in namespaces]:
            with suppress(NamespaceError), Namespace(namespaces[link.name], link.name) as namespace:
                found[link.name] = _leads_to(link, namespace.fileno()) and (
                    not next_hops or namespace.has_next_hops(link.peer_index or 0, link.mac)
                )
    return found


def delete_interface(name: str) -> bool:
    """Delete an interface of the host; return whether it existed. The other end of a veth is deleted with it."""
    with _explained(f"deleting interface {name}"):
        return _delete(name)


def _delete(name: str) -> bool:
    index = _find(name)
    if index is None:
        return False
    with _ignoring(errno.ENODEV):
        delete_link(index)
    return True


def inspect() -> Inspection:
    """Return the interfaces and default routes of a namespace, and the state of its loopback interface.

    The calling thread must have entered the namespace. If a default route has neither a gateway nor an interface, its
    text is `of another kind`.
    """
    found = Inspection(list(all_interfaces(MOST)))
    links = {link.index: link for link in found.interfaces}
    for version, family in FAMILIES.items():
        route = next(routes(family, lengths=(0,), most=MOST), None)
        if route is not None:
            where = [f"via {route.gateway}"] if route.gateway else []
            where += [f"dev {links[route.index].name if route.index in links else route.index}"] if route.index else []
            found.default_routes[version] = " ".join(where) or "of another kind"
    up = LOOPBACK_INDEX in links and links[LOOPBACK_INDEX].up
    found.loopback = Loopback(up, ipv6=True)
    with suppress(FileNotFoundError):  # a kernel without IPv6
        found.loopback = Loopback(up, _read_sysctl("net/ipv6/conf/lo/disable_ipv6") == "0")
    return found


def _leads_to(link: Interface, namespace: int) -> bool:
    """Return whether the other end of the interface `link` of the host is in a namespace.

    `namespace` is an open file descriptor of the namespace.
    """
    id = link.peer_namespace
    return id is not None and namespace_id(namespace) == id


def _enter(namespace: int) -> None:
    """Move the calling thread into a network namespace, given as an open file descriptor. Raises OSError."""
    import ctypes

    if _libc().setns(namespace, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@cache
def _libc() -> Any:
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


def _named(name: str) -> Interface | None:
    index = _find(name)
    return None if index is None else interface_at(index)


def _index(name: str) -> int:
    index = _find(name)
    if index is None:
        raise CalicoError(f"there is no interface {name}")
    return index


def _find(name: str) -> int | None:
    try:
        return socket.if_nametoindex(name)  # pyroute2 cannot look up a name that is not UTF-8
    except OSError:
        return None


def _missing_next_hops(index: int, mac: str, versions: Collection[int] = (4, 6)) -> set[str]:
    """Return the gateways of an interface's default routes that have no permanent neighbour entry with this MAC.

    `versions` are the IP versions of the routes. A gateway of another version than its route is left out.
    """
    found: set[str] = set()
    for version in versions:
        family = FAMILIES[version]
        hops = {route.gateway for route in routes(family, lengths=(0,), index=index, most=MOST)} - {None}
        if hops:
            hops -= {entry.address for entry in neighbours(family, index=index, most=MOST) if entry.mac == mac}
        found |= {hop for hop in hops if hop is not None and version_of(hop) == version}
    return found


def _read_sysctl(path: str) -> str:
    with open(f"/proc/sys/{path}") as file:
        return file.read().strip()


def _write_sysctl(path: str, value: str) -> None:
    with open(f"/proc/sys/{path}", "w") as file:
        file.write(value)


@contextmanager
def _ignoring(*codes: int) -> Iterator[None]:
    """Suppress OSErrors with one of these errno codes in the body of `with`."""
    try:
        yield
    except OSError as error:
        if error.errno not in codes:
            raise


@contextmanager
def _explained(doing: str) -> Iterator[None]:
    """Convert kernel errors and CalicoErrors from the body of `with` into NamespaceErrors.

    The text of a NamespaceError begins with `doing`, which says what failed.
    """
    try:
        yield
    except OSError as error:
        raise NamespaceError(f"{doing} failed: {error.strerror or error}") from error
    except CalicoError as error:
        raise NamespaceError(f"{doing} failed: {error}") from error
