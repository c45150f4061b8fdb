"""Counts the used, free and borrowed addresses of pools."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calicoctl.datastore.blocks import Block
from calicoctl.datastore.model import Pool

if TYPE_CHECKING:
    from netaddr import IPNetwork


@dataclass
class Usage:
    """The numbers of addresses of a pool. `pool` is the pool's CIDR, `addresses` the number of its addresses.

    Each address is either `used` or `free`. `borrowed` counts those used addresses that a host has taken from a block
    with affinity to another host. In the Usage of the addresses outside of all pools, `pool`, `addresses` and `free`
    are None.
    """

    pool: str | None
    addresses: int | None
    used: int
    free: int | None
    borrowed: int


def usages(pools: Iterable[Pool], blocks: Iterable[Block]) -> list[Usage]:
    """Return the Usage of each pool. If addresses outside of all pools are used, the Usage of these addresses follows.

    `pools` and `blocks` are all pools and all blocks of one IP version.
    """
    from netaddr.ip import IPNetwork

    networks = [IPNetwork(pool.cidr) for pool in pools]
    used: dict[IPNetwork | None, int] = dict.fromkeys([*networks, None], 0)
    borrowed = dict(used)
    for block in blocks:
        for ordinal, owner in block.held():
            address = block.address(ordinal)
            network = next((network for network in networks if address in network), None)
            used[network] += 1
            host = owner.secondary.get("host")
            borrowed[network] += host is not None and block.affinity not in (None, f"host:{host}")
    found = [Usage(str(n), n.size, used[n], n.size - used[n], borrowed[n]) for n in networks]
    if used[None]:
        found.append(Usage(None, None, used[None], None, borrowed[None]))
    return found
