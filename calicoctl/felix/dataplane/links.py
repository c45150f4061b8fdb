"""The host's ends of the endpoints' veth pairs, as the kernel describes them. Changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calicoctl.datastore.keys import INTERFACE_PREFIX
from calicoctl.netlink import IFF_UP

if TYPE_CHECKING:
    from pyroute2.iproute.linux import IPRoute


@dataclass(frozen=True)
class Link:
    """A network interface of this host."""

    name: str
    index: int
    up: bool
    mac: str = ""


def link_of(message: Any) -> Link:
    """Return the interface that one of pyroute2's link messages describes."""
    return Link(
        message.get_attr("IFLA_IFNAME") or "",
        message["index"],
        message["flags"] & IFF_UP != 0,
        message.get_attr("IFLA_ADDRESS") or "",
    )


def list_links(netlink: IPRoute) -> list[Link]:
    """Return the `cali…` interfaces of this host. Raises what pyroute2 raises."""
    return [link for link in map(link_of, netlink.get_links()) if link.name.startswith(INTERFACE_PREFIX)]
