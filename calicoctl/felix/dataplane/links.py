"""Reads network interfaces of this host from the kernel, above all the host ends of endpoints' veth pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from calicoctl.datastore.keys import INTERFACE_PREFIX
from calicoctl.netlink import all_interfaces, interface_of


@dataclass(frozen=True)
class Link:
    """A network interface of this host. `up` is the flag IFF_UP; `mac` is "" if the interface has no MAC."""

    name: str
    index: int
    up: bool
    mac: str = ""


def link_of(body: bytes) -> Link:
    """Decode a message of the kernel about an interface; `body` is the message without its header."""
    found = interface_of(body)
    return Link(found.name, found.index, found.up, found.mac)


def list_links() -> Iterator[Link]:
    """Yield the `cali…` interfaces of this host. Raises OSError."""
    every = (Link(one.name, one.index, one.up, one.mac) for one in all_interfaces())
    return (link for link in every if link.name.startswith(INTERFACE_PREFIX))
