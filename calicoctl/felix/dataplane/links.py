"""Reads network interfaces of this host from the kernel, above all the host ends of endpoints' veth pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from calicoctl.datastore.keys import INTERFACE_PREFIX
from calicoctl.netlink import Interface, all_interfaces, interface_of


@dataclass(frozen=True)
class Link:
    """A network interface of this host. `up` is the flag IFF_UP; `mac` is "" if the interface has no MAC.

    `carrier` is the flag IFF_LOWER_UP: a veth has a carrier while both ends are up.
    """

    name: str
    index: int
    up: bool
    mac: str = ""
    carrier: bool = True


def link_of(body: bytes) -> Link:
    """Decode a message of the kernel about an interface; `body` is the message without its header."""
    return _link(interface_of(body))


def list_links() -> Iterator[Link]:
    """Yield the `cali…` interfaces of this host. Raises OSError."""
    return (_link(one) for one in all_interfaces() if one.name.startswith(INTERFACE_PREFIX))


def _link(interface: Interface) -> Link:
    return Link(interface.name, interface.index, interface.up, interface.mac, interface.carrier)
