"""Reads network interfaces of this host from the kernel, above all the host ends of endpoints' veth pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calicoctl.datastore.keys import INTERFACE_PREFIX
from calicoctl.netlink import IFF_UP, name_of

if TYPE_CHECKING:
    from pyroute2.iproute.linux import IPRoute


@dataclass(frozen=True)
class Link:
    """A network interface of this host. `up` is the flag IFF_UP; `mac` is "" if the interface has no MAC."""

    name: str
    index: int
    up: bool
    mac: str = ""


def link_of(message: Any) -> Link:
    """Convert a link message of pyroute2 into a Link."""
    return Link(
        name_of(message.get_attr("IFLA_IFNAME")),
        message["index"],
        message["flags"] & IFF_UP != 0,
        message.get_attr("IFLA_ADDRESS") or "",
    )


def list_links(netlink: IPRoute) -> list[Link]:
    """Return the `cali…` interfaces of this host. Raises pyroute2's exceptions."""
    return [link for link in map(link_of, netlink.get_links()) if link.name.startswith(INTERFACE_PREFIX)]
