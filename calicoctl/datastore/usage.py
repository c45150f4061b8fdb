"""Counts the used, free and borrowed addresses of pools."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Callable, Optional

from calicoctl.datastore.blocks import Block
from calicoctl.datastore.model import Pool


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


Counts = dict[Optional[str], tuple[int, int]]
"""Pool's CIDR, None for the addresses outside of all pools -> numbers of used and of borrowed addresses (see Usage)."""


def counter(pools: Iterable[Pool]) -> Callable[[Block], Counts]:
    """Return a function that counts the used and the borrowed addresses of a block by pool.

    Its result lacks the pools of which no address in the block is used. `pools` are all pools of one IP version.
    """
    from netaddr.ip import IPNetwork

    networks = [(pool.cidr, IPNetwork(pool.cidr)) for pool in pools]

    def count(block: Block) -> Counts:
        found: Counts = {}
        for ordinal, owner in block.held():
            number = block.first + ordinal
            pool = next((cidr for cidr, network in networks if network.first <= number <= network.last), None)
            used, borrowed = found.get(pool, (0, 0))
            host = owner.secondary.get("host")
            found[pool] = used + 1, borrowed + (host is not None and block.affinity not in (None, f"host:{host}"))
        return found

    return count


def usages(pools: Iterable[Pool], counts: Iterable[Counts]) -> list[Usage]:
    """Return the Usage of each pool. If addresses outside of all pools are used, the Usage of these addresses follows.

    `pools` are all pools of one IP version, and `counts` the Counts of all blocks of that version.
    """
    from netaddr.ip import IPNetwork

    used: Counter[str | None] = Counter()
    borrowed: Counter[str | None] = Counter()
    for block in counts:
        for cidr, (of_used, of_borrowed) in block.items():
            used[cidr] += of_used
            borrowed[cidr] += of_borrowed
    found = []
    for pool in pools:
        size = IPNetwork(pool.cidr).size
        found.append(Usage(pool.cidr, size, used[pool.cidr], size - used[pool.cidr], borrowed[pool.cidr]))
    if used[None]:
        found.append(Usage(None, None, used[None], None, borrowed[None]))
    return found
