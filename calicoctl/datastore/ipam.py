"""Which address belongs to whom: blocks of 64 addresses, the hosts' affinity to them, and handles that name owners.

Every change of a key is a compare-and-swap on what was read, repeated a bounded number of times. The order of writes
is such that a cut at any point loses no address: a handle's count goes up before the block is written and down after
an address is given back, and it is counted anew from the blocks before it is changed.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from calicoctl.addresses import version_of
from calicoctl.datastore import keys
from calicoctl.datastore.blocks import (
    BLOCK_SIZE,
    Block,
    Owner,
    address_at,
    block_cidr,
    block_key,
    first_addresses,
    place,
)
from calicoctl.datastore.handles import Handles, counts_of
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Pool
from calicoctl.datastore.reserved import Network, Reserved
from calicoctl.datastore.store import ATTEMPTS, Entry, Store, create_if_missing, modify, pause
from calicoctl.errors import AddressTaken, CalicoError, CompareFailed, Conflict, InvalidValue, KeyExists

if TYPE_CHECKING:
    from netaddr import IPAddress, IPNetwork


class Ipam:
    """Takes and gives back addresses on behalf of one host."""

    def __init__(self, store: Store, host: str) -> None:
        self.handles = Handles(store)
        self._store = store
        self._host = host

    def owner(self, address: IPAddress) -> Owner | None:
        """Return who holds `address`, or None when it is free."""
        block = self.block_of(address)
        return None if block is None else block.owner(int(address) % BLOCK_SIZE)

    def blocks(self, version: int, network: IPNetwork | None = None) -> Iterator[Block]:
        """Yield the blocks of an IP version, or those with addresses of a network, one after the other.

        A /16 has a thousand blocks: they are never held all at a time. Raises InvalidValue for one that is not sound.
        """
        for first in sorted(first_addresses(self._store.names(keys.ipam_blocks(version)))):
            if network is None or (first <= network.last and first + BLOCK_SIZE > network.first):
                entry = self._store.get(keys.ipam_block(version, block_cidr(version, first)))
                if entry is not None:
                    yield Block.from_entry(entry)

    def all_blocks(self, version: int) -> Iterator[Block | InvalidValue]:
        """Yield the blocks of an IP version, and what is wrong with those that are not sound, one after the other."""
        for name in self._store.names(keys.ipam_blocks(version)):
            try:
                entry = self._store.get(f"{keys.ipam_blocks(version)}/{name}")
                if entry is not None:
                    block = Block.from_entry(entry)
                    if block.key != entry.key:
                        raise InvalidValue(entry.key, "its name is not a block's CIDR")
                    yield block
            except InvalidValue as problem:
                yield problem

    def block_of(self, address: IPAddress) -> Block | None:
        """Return the block that an address is in, None where there is none."""
        entry = self._store.get(block_key(address))
        return None if entry is None else Block.from_entry(entry)

    @staticmethod
    def cidr_of(address: IPAddress) -> str:
        """Return the CIDR of the block that an address belongs to, whether there is one or not."""
        version, first, _ = place(address)
        return block_cidr(version, first)

    def used_in(self, network: IPNetwork) -> list[IPAddress]:
        """Return the addresses of a network that somebody holds, in order."""
        return [
            block.address(ordinal)
            for block in self.blocks(network.version, network)
            for ordinal, _ in block.held()
            if network.first <= block.first + ordinal <= network.last
        ]

    def held_by(self, handle: str) -> dict[IPAddress, Owner] | None:
        """Return the addresses that `handle` holds on this host, or None when there is no such handle.

        Two hosts may have namespaces of the same path, and so the same handle; the attributes say whose an address is.

        A handle that a cut command has left with wrong counts is put right; so call this with the owner's lock held.
        """
        entry = self._store.get(keys.ipam_handle(handle))
        if entry is None:
            return None
        counts, actual = counts_of(entry), {}
        held: dict[IPAddress, Owner] = {}
        for cidr in counts:
            block_entry = self._store.get(keys.ipam_block(version_of(cidr), cidr))
            if block_entry is not None:
                block = Block.from_entry(block_entry)
                mine = {block.address(o): owner for o, owner in block.held() if owner.handle == handle}
                actual[cidr] = len(mine)
                held.update(
                    {a: owner for a, owner in mine.items() if owner.secondary.get("host", self._host) == self._host}
                )
        if counts != actual or not counts:
            self.handles.recount(handle)
            if not any(actual.values()):
                return {}
        return held or None

    def recount(self, handle: str, blocks: Iterable[str]) -> None:
        """Set a handle's counts to what is held, in the blocks that it names and in `blocks` (CIDRs)."""
        self.handles.recount(handle, {cidr: self.handles.held_in(handle, cidr) for cidr in blocks})

    def repair_free_list(self, version: int, cidr: str) -> None:
        """Make a block's list of free addresses exactly those that are not allocated."""
        key = keys.ipam_block(version, cidr)

        def text_of(old: str) -> str | None:
            block = Block.from_entry(Entry(key, old, 0))
            return None if block.free_list_problem() is None else block.to_json()

        modify(self._store, key, f"block {cidr} no longer exists", text_of)

    def assign(self, address: IPAddress, owner: Owner) -> None:
        """Give `address` to `owner`. An address that exactly this owner has already is left with it.

        Raises AddressTaken when somebody else has it, CalicoError when its block is another host's alone, Conflict
        when others change its block all the time.
        """
        version, first, ordinal = place(address)
        with self._counted_right(owner):
            if not self._take(version, first, owner, [ordinal], count=1, claim=True, exact=True):
                raise AddressTaken(f"IP {address} is already assigned")

    def auto_assign(
        self, count: int, pools: list[Pool], owner: Owner, reserved: Reserved | None = None
    ) -> list[IPAddress]:
        """Give `count` free addresses out of `pools` (of one IP version) to `owner`; return those that could be found.

        None is one that is `reserved`, or of a network that this host is connected to, and no block with addresses of
        such a network is claimed.

        First from blocks this host has affinity to, then from blocks nobody has, then from other hosts' blocks.
        """
        ranges = [_range(pool) for pool in pools]
        reserved = reserved or Reserved()
        found: list[IPAddress] = []
        with self._counted_right(owner):
            for version, first, claim in self._candidates(ranges, reserved.network.networks):
                ordinals = [o for o in range(BLOCK_SIZE) if any(low <= first + o <= high for _, low, high in ranges)]
                ordinals = [o for o in ordinals if reserved.is_free_for_any(version, first + o)]
                if not ordinals:
                    continue
                found += self._take(version, first, owner, ordinals, count - len(found), claim)
                if len(found) >= count:
                    return found
        if owner.handle is not None:
            self.handles.recount(owner.handle)
        return found

    def release(self, addresses: Iterable[IPAddress], holders: set[str | None] | None = None) -> list[IPAddress]:
        """Give addresses back; return those that were not assigned.

        With `holders`, give back only what one of these handles holds; what is somebody else's counts as not assigned.
        """
        by_block: dict[tuple[int, int], set[int]] = {}
        for address in addresses:
            version, first, ordinal = place(address)
            by_block.setdefault((version, first), set()).add(ordinal)
        missing: list[IPAddress] = []
        for (version, first), ordinals in by_block.items():
            released, handles = self._give_back(version, first, ordinals, holders)
            missing += [address_at(version, first + ordinal) for ordinal in sorted(ordinals - released)]
            for handle in handles:
                self.handles.recount(handle)
        return missing

    def release_by_handle(self, handle: str) -> list[IPAddress]:
        """Give back all that `handle` holds on this host, and drop it when nothing is left; return the addresses."""
        held = list(self.held_by(handle) or ())
        self.release(held, {handle})
        self.handles.recount(handle)
        return held

    def set_workload_name(self, handle: str, addresses: Iterable[IPAddress], name: str) -> None:
        """Note beside addresses that `handle` holds on this host what its workload is called."""
        for version, first in {place(address)[:2] for address in addresses}:
            key = keys.ipam_block(version, block_cidr(version, first))

            def renamed(text: str, key: str = key) -> str | None:
                block = Block.from_entry(Entry(key, text, 0))
                return block.to_json() if block.set_workload_name(handle, self._host, name) else None

            modify(self._store, key, f"etcd key {key} no longer exists", renamed)

    def workloads(self, name: str | None = None) -> set[tuple[str, str]]:
        """Return the workloads, as (orchestrator, id), that hold addresses on this host by a handle of their own.

        With a `name`, only those that were connected under it.
        """
        found = set()
        for _, owner in self._held():
            facts = owner.secondary
            named = (str(facts.get("orchestrator")), str(facts.get("workload")))
            is_wanted = name is None or facts.get("workload_name") == name
            if is_wanted and facts.get("host") == self._host and owner.handle == ".".join(named):
                found.add(named)
        return found

    def interfaces(self) -> set[str]:
        """Return the interfaces of this host's endpoints that hold addresses, whether they have a record or not."""
        owners = [owner.secondary for _, owner in self._held() if owner.secondary.get("host") == self._host]
        return {EndpointId("", "", "", str(facts.get("endpoint"))).interface for facts in owners}

    def _held(self) -> Iterator[tuple[IPAddress, Owner]]:
        """Give all addresses that are assigned, with their owners, out of all blocks that can be read."""
        for version in (4, 6):
            for block in self.all_blocks(version):
                if isinstance(block, Block):
                    yield from ((block.address(ordinal), owner) for ordinal, owner in block.held())

    def release_affinities(self) -> None:
        """Give up this host's claim to its blocks: those without addresses go, the others are nobody's then."""
        for version in (4, 6):
            for first in list(first_addresses(self._store.names(keys.ipam_affinities(self._host, version)))):
                cidr = block_cidr(version, first)
                self._disown(keys.ipam_block(version, cidr))
                self._drop_affinity(version, cidr)

    def _disown(self, key: str) -> None:
        for attempt in range(ATTEMPTS):
            entry = self._store.get(key)
            if entry is None:
                return
            block = Block.from_entry(entry)
            if block.affinity != f"host:{self._host}":
                return
            block.affinity = None
            try:
                if any(index is not None for index in block.allocations):
                    self._store.update(entry, block.to_json())
                else:
                    self._store.delete(entry)
                return
            except CompareFailed:
                pause(attempt)
        raise Conflict(f"etcd key {key} keeps being modified concurrently; retry")

    def _candidates(
        self, ranges: list[tuple[int, int, int]], networks: Iterable[Network]
    ) -> Iterator[tuple[int, int, bool]]:
        """Yield (version, first address, may be claimed) of the blocks to take addresses from, best first.

        No block that has addresses of one of the `networks` is to be claimed.
        """
        version = ranges[0][0] if ranges else 4

        def wanted(first: int) -> bool:
            return any(low <= first + BLOCK_SIZE - 1 and first <= high for _, low, high in ranges)

        def affine() -> set[int]:
            return set(first_addresses(self._store.names(keys.ipam_affinities(self._host, version))))

        def existing() -> set[int]:
            return set(first_addresses(self._store.names(keys.ipam_blocks(version))))

        ours = affine()
        for first in sorted(filter(wanted, ours)):
            yield version, first, True
        known = existing()
        # another command of this host may have claimed one meanwhile: one block will do for both
        for first in sorted(filter(wanted, (affine() - ours) & known)):
            yield version, first, True
        for low, high in _without(ranges, [network for network in networks if network.version == version]):
            for first in range(low, high + 1, BLOCK_SIZE):
                if first not in known:
                    yield version, first, True
        # all of them: one that was to be claimed, or that there is a stale affinity to, may be another host's
        borrowed = list(filter(wanted, existing()))
        random.shuffle(borrowed)
        for first in borrowed:
            yield version, first, False

    def _take(
        self, version: int, first: int, owner: Owner, ordinals: list[int], count: int, claim: bool, exact: bool = False
    ) -> list[IPAddress]:
        """Take up to `count` free addresses of a block, of these ordinals; return them, none when there are none.

        A block that does not exist is made, with this host's affinity, where `claim` is true. With `exact`, what this
        owner has already counts as taken, and a block of another host will do; else a block to claim that turns out to
        be another host's is left alone.
        """
        cidr = block_cidr(version, first)
        key = keys.ipam_block(version, cidr)
        before: set[int] | None = set() if exact else None
        for attempt in range(ATTEMPTS):
            entry = self._store.get(key)
            if entry is not None:
                block = Block.from_entry(entry)
                if claim and block.affinity != f"host:{self._host}":
                    self._drop_affinity(version, cidr)
                    if not exact:
                        break
            elif claim:
                create_if_missing(self._store, keys.ipam_affinity(self._host, version, cidr), "")
                block = Block.empty(version, first, self._host)
            else:
                break
            mine = {ordinal for ordinal in ordinals if block.owner(ordinal) == owner}
            before = mine if before is None else before
            # an earlier write of this loop may have been applied without an answer: what is new and ours is from it
            taken = sorted(mine - before)[:count]
            free = [ordinal for ordinal in block.free() if ordinal in ordinals][: count - len(taken)]
            if free and block.is_strict and block.affinity != f"host:{self._host}":
                if exact:
                    raise CalicoError(_strictly(block, free[0]))
                free = []
            if free:
                counted = None
                if owner.handle is not None:
                    counted = self.handles.recount(owner.handle, {cidr: block.count(owner.handle) + len(free)})
                for ordinal in free:
                    block.take(ordinal, owner)
                try:
                    if entry is None:
                        self._store.create(key, block.to_json())
                    else:
                        self._store.update(entry, block.to_json())
                except (KeyExists, CompareFailed):
                    pause(attempt)
                    continue
                if counted is not None and self._store.get(counted.key) != counted:
                    # another host with the same handle has counted it in the meantime, without this address
                    self.handles.recount(str(owner.handle))
            if taken or free:
                return [address_at(version, first + ordinal) for ordinal in sorted(taken + free)]
            break
        else:
            raise Conflict(f"block {cidr} keeps being modified concurrently; retry")
        return []

    @contextmanager
    def _counted_right(self, owner: Owner) -> Iterator[None]:
        """Put the owner's handle right when what is inside `with` fails: it may have been counted up already."""
        try:
            yield
        except BaseException:  # an interrupt, too
            if owner.handle is not None:
                with suppress(CalicoError):
                    self.handles.recount(owner.handle)
            raise

    def _drop_affinity(self, version: int, cidr: str) -> None:
        """Forget this host's affinity to a block that turned out to be another's."""
        entry = self._store.get(keys.ipam_affinity(self._host, version, cidr))
        if entry is not None:
            # written anew by another command of this host? that will find the same out
            with suppress(CompareFailed):
                self._store.delete(entry)

    def _give_back(
        self, version: int, first: int, ordinals: set[int], holders: set[str | None] | None
    ) -> tuple[set[int], set[str]]:
        """Free addresses of one block; return the ordinals that were freed and the handles that had held them."""
        key = keys.ipam_block(version, block_cidr(version, first))
        released: set[int] = set()
        handles: set[str] = set()
        for attempt in range(ATTEMPTS):
            entry = self._store.get(key)
            if entry is None:
                return released, handles
            block = Block.from_entry(entry)
            now = set()
            for ordinal, owner in block.held():
                if ordinal in ordinals and (holders is None or owner.handle in holders):
                    now.add(ordinal)
                    handles.update({owner.handle} - {None})  # type: ignore[arg-type]
            if not now:
                return released, handles
            for ordinal in now:
                block.give_back(ordinal)
            try:
                self._store.update(entry, block.to_json())
                return released | now, handles
            except CompareFailed as failed:
                if failed.maybe_applied:
                    released |= now
                pause(attempt)
        raise Conflict(f"block {block_cidr(version, first)} keeps being modified concurrently; retry")


def _strictly(block: Block, ordinal: int) -> str:
    """Return why another host than a block's cannot have an address of it."""
    whose = f"of {block.affinity.replace(':', ' ', 1)}" if block.affinity else "of no host"
    return (
        f"IP {block.address(ordinal)} is in the block {block.cidr} {whose}, which no other host takes addresses from "
        "(strict affinity)"
    )


def _range(pool: Pool) -> tuple[int, int, int]:
    """Return version, first and last address of a pool."""
    from netaddr.ip import IPNetwork

    network = IPNetwork(pool.cidr)
    return network.version, network.first, network.last


def _without(ranges: list[tuple[int, int, int]], networks: list[Network]) -> Iterator[tuple[int, int]]:
    """Yield ranges (first and last address) of whole blocks that hold those of `ranges`, but none of the networks."""
    for _, low, high in ranges:
        at = low - low % BLOCK_SIZE
        for network in sorted(networks, key=lambda network: network.first):
            if network.last >= at and network.first <= high:
                if network.first - network.first % BLOCK_SIZE > at:
                    yield at, network.first - network.first % BLOCK_SIZE - 1
                at = network.last - network.last % BLOCK_SIZE + BLOCK_SIZE
        if at <= high:
            yield at, high
