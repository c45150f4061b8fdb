"""Decides which networks can be new pools."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from calicoctl.addresses import check_unicast
from calicoctl.errors import CalicoError

if TYPE_CHECKING:
    from netaddr import IPNetwork


def check_new(networks: list[IPNetwork], ipip: bool) -> None:
    """Raise CalicoError if one of `networks` cannot be a new pool, for example because it overlaps another of them.

    `ipip` says whether the pools are to have the option --ipip. Overlaps with existing pools are not checked here.
    """
    from calicoctl.datastore.blocks import BLOCK_SIZE

    for network in networks:
        if network.size < BLOCK_SIZE:
            raise CalicoError(
                f"{network} is smaller than a block of {BLOCK_SIZE} addresses: the smallest pool is a /26, or a /122 "
                "in IPv6"
            )
        check_unicast(network)
        if ipip and network.version == 6:
            raise CalicoError(f"--ipip is for IPv4 alone, and {network} is IPv6")
    for number, network in enumerate(networks):
        refuse_overlap(network, networks[:number])


def refuse_overlap(network: IPNetwork, others: Iterable[IPNetwork]) -> None:
    """Raise CalicoError if a new pool overlaps one of `others`, unless it is the same."""
    for other in others:
        if network != other and (network in other or other in network):
            raise CalicoError(f"{network} overlaps with {other}; nothing is added.")
