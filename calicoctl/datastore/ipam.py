"""Assigns addresses to workloads, and releases them.

Each write is a compare-and-swap, with a limited number of attempts. For the order in which blocks and handles are
written, see handles.py. If a crash leaves a handle with a count that is too high, the count is corrected the next time
that the handle's addresses are read (`Ipam.held_by` and `Ipam.holding`).
"""

from __future__ import annotations

import random
from collections.abc import Collection, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Callable, TypeVar

from calicoctl.datastore import keys, recent_blocks
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
from calicoctl.datastore.handles import Handles, KnownHandle, counted, counts_of, read_blocks
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Pool
from calicoctl.datastore.store import (
    ATTEMPTS,
    Create,
    Entry,
    Store,
    Update,
    Write,
    create_if_missing,
    modify,
    pause,
)
from calicoctl.errors import AddressTaken, CalicoError, CompareFailed, Conflict, HandleExists, InvalidValue, KeyExists

if TYPE_CHECKING:
    from netaddr import IPAddress, IPNetwork

    from calicoctl.datastore.reserved import Network, Reserved

T = TypeVar("T")
H = TypeVar("H", bound=Hashable)

BLOCKS_AT_ONCE = 16
"""The maximum number of blocks in one commit. A full block has about 30 KiB; etcd accepts 1.5 MiB per request."""


@dataclass(frozen=True)
class Holding:
    """The addresses of a handle on this host, as they were read.

    `entry` is the handle's entry, with correct counts; None if the handle had no addresses on any host, and so was
    deleted. `held` maps each address on this host, as (IP version, number), to its owner. `blocks` are the entries of
    all valid blocks that the handle names; it is empty if `held` is empty. `invalid` maps the CIDR of each invalid
    block that the handle names to an error. Such a block may contain further addresses of the handle.
    """

    handle: str
    entry: Entry | None
    held: dict[tuple[int, int], Owner]
    blocks: list[Entry]
    invalid: dict[str, InvalidValue] = field(default_factory=dict)

    @cached_property
    def owners(self) -> dict[IPAddress, Owner]:
        """Each address on this host, and its owner. (This imports netaddr, which takes some milliseconds.)"""
        return {address_at(*place): owner for place, owner in self.held.items()}


# more than 400 lines: its methods call each other on the same blocks and handles, and half of the lines are docstrings
class Ipam:
    """Assigns and releases addresses on behalf of one host."""

    def __init__(self, store: Store, host: str) -> None:
        self.handles = Handles(store)
        self._store = store
        self._host = host

    def owner(self, address: IPAddress) -> Owner | None:
        """Return the owner of `address`, None if the address is free; raise InvalidValue for an invalid block."""
        block = self.block_of(address)
        return None if block is None else block.owner(int(address) % BLOCK_SIZE)

    def blocks(
        self,
        version: int,
        convert: Callable[[Block], T | None],
        wanted: Callable[[str], bool] = lambda name: True,
    ) -> tuple[list[T], list[InvalidValue]]:
        """Read all blocks of an IP version, in a few requests.

        Return `convert(block)` for each valid block, without None, and an error for each invalid block. Only what
        `convert` returns is kept, since all blocks together may be large. `wanted` is called with each block's name
        (the last part of its key). If it returns false, the block is ignored, even if it is invalid.
        """
        directory = keys.ipam_blocks(version)

        def read(entry: Entry) -> tuple[T | None, InvalidValue | None] | None:
            name, slash, _ = entry.key[len(directory) + 1 :].partition("/")
            if not wanted(name):
                return None
            try:
                if slash:
                    raise InvalidValue(f"{directory}/{name}", "it is a directory, where a key is expected")
                if entry.problem is not None:
                    raise InvalidValue(entry.key, entry.problem)
                block = Block.from_entry(entry)
                if block.key != entry.key:
                    raise InvalidValue(entry.key, "its name is not a block's CIDR")
                return convert(block), None
            except InvalidValue as error:
                return None, error

        found = self._store.collect(directory, read)
        invalid = {error.key: error for _, error in found if error is not None}
        return [item for item, _ in found if item is not None], list(invalid.values())

    def block_of(self, address: IPAddress) -> Block | None:
        """Return the block that contains `address`, None if there is no such block.

        Raises InvalidValue if the block is invalid.
        """
        entry = self._store.get(block_key(address))
        return None if entry is None else Block.from_entry(entry)

    @staticmethod
    def cidr_of(address: IPAddress) -> str:
        """Return the CIDR of the block that contains `address`, even if the block does not exist."""
        version, first, _ = place(address)
        return block_cidr(version, first)

    def used_in(self, networks: Iterable[IPNetwork]) -> dict[IPNetwork, list[IPAddress]]:
        """Return the sorted assigned addresses of each network; raise InvalidValue for an invalid block in one.

        The blocks are read once for all networks of an IP version.
        """
        found: dict[IPNetwork, list[IPAddress]] = {network: [] for network in networks}
        for version in sorted({network.version for network in found}):
            those = [network for network in found if network.version == version]
            for number in self._used([(version, network.first, network.last) for network in those]):
                for network in those:
                    if network.first <= number <= network.last:
                        found[network].append(address_at(version, number))
        return found

    def _used(self, ranges: list[tuple[int, int, int]]) -> list[int]:
        """Return the sorted assigned addresses in any of `ranges` (see `_range`), all of one IP version, as numbers."""

        def overlaps(name: str) -> bool:
            return any(map(partial(_overlaps, ranges), first_addresses(ranges[0][0], [name])))

        def used(block: Block) -> list[int]:
            numbers = (block.first + ordinal for ordinal, _ in block.held())
            return [number for number in numbers if any(low <= number <= high for _, low, high in ranges)]

        blocks, invalid = self.blocks(ranges[0][0], used, overlaps)
        for error in invalid:
            raise error
        return sorted(chain.from_iterable(blocks))

    def held_by(self, handle: str) -> dict[IPAddress, Owner] | None:
        """Return address -> owner for the addresses of `handle` on this host.

        An address is on the host that its owner's attribute "host" names; without this attribute, it counts as an
        address on this host. Returns None if there is no such handle, or if all its addresses are on other hosts.

        Wrong counts in the handle are corrected. If the handle has no addresses, it is deleted, and the result is
        empty. Because of these writes, the caller must hold the workload's lock. Raises InvalidValue if the handle or
        one of its blocks is invalid, and Conflict if other writers keep changing the handle.
        """
        holding = self.holding(handle, self.handles.read(handle))
        return None if holding is None else holding.owners

    def is_elsewhere(self, handle: str) -> bool:
        """Return whether a handle has addresses, and all of them are on other hosts.

        Unlike `held_by`, this changes nothing, so no lock need be held. Raises InvalidValue if the handle or one of
        its blocks is invalid.
        """
        entry = self.handles.read(handle)
        blocks, invalid = read_blocks(self._store, {} if entry is None else counts_of(entry))
        if invalid:
            raise next(iter(invalid.values()))
        owners = [owner for _, block in blocks for _, owner in block.held() if owner.handle == handle]
        return bool(owners) and not any(map(self._is_here, owners))

    def holding(self, handle: str, entry: Entry | None, partly: bool = False) -> Holding | None:
        """Return the addresses of `handle` on this host, and correct the handle's counts, as `held_by` does.

        `entry` is the handle's entry, which the caller has just read; None if there is no such handle. Then the result
        is None, as it is if all the handle's addresses are on other hosts. For the lock and the errors, see `held_by`.
        If `partly` is true, InvalidValue is not raised for an invalid block: its error is in `Holding.invalid`. If
        there is such a block, a Holding is returned even if no valid block has addresses of the handle on this host.
        """
        if entry is None:
            return None
        counts = counts_of(entry)
        held: dict[tuple[int, int], Owner] = {}
        blocks, invalid = read_blocks(self._store, counts)
        if invalid and not partly:
            raise next(iter(invalid.values()))
        actual = {cidr: counts[cidr] for cidr in invalid}
        for _, block in blocks:
            mine = {block.first + o: owner for o, owner in block.held() if owner.handle == handle}
            actual[block.cidr] = len(mine)
            held.update({(block.version, one): owner for one, owner in mine.items() if self._is_here(owner)})
        if counts != actual or not counts:
            entry = self.handles.recount(handle)
            if not any(actual.values()):
                return Holding(handle, entry, {}, [], invalid)
        entries = [block_entry for block_entry, _ in blocks] if held else []
        return Holding(handle, entry, held, entries, invalid) if held or invalid else None

    def _is_here(self, owner: Owner) -> bool:
        # two hosts may have namespaces with the same path, and so the same handle
        return bool(owner.secondary.get("host", self._host) == self._host)

    def repair_free_list(self, version: int, cidr: str) -> None:
        """Correct "unallocated", a block's list of its free addresses (see Block.free), if it is wrong.

        Raises NotFound if the block does not exist, InvalidValue if it is invalid, and Conflict if other writers keep
        changing it.
        """
        key = keys.ipam_block(version, cidr)

        def text_of(old: str) -> str | None:
            block = Block.from_entry(Entry(key, old, 0))
            return None if block.free_list_problem() is None else block.to_json()

        modify(self._store, key, f"block {cidr} no longer exists", text_of)

    def assign(self, address: IPAddress, owner: Owner, known: KnownHandle | None = None) -> None:
        """Assign `address` to `owner`, unless it is already assigned to `owner`.

        `known` is the owner's handle, if the caller has just read it, or assumes that it does not exist; None means
        that it is read. Raises HandleExists, and assigns nothing, if it is assumed not to exist, but exists, and the
        store is not atomic; AddressTaken if the address has another owner; CalicoError if its block has strict
        affinity, and the affinity is not to this host; InvalidValue if the block or the handle is invalid; and Conflict
        if other writers keep changing the block.
        """
        version, first, ordinal = place(address)
        with self._recount_on_failure(owner):
            if not self._allocate(version, first, owner, lambda other: other == ordinal, 1, True, known, exact=True):
                raise AddressTaken(f"IP {address} is already assigned")

    def auto_assign(
        self,
        count: int,
        pools: list[Pool],
        owner: Owner,
        reserved: Reserved | None = None,
        affine: Iterable[str] | None = None,
        known: KnownHandle | None = None,
        passed_over: Callable[[InvalidValue], object] = lambda error: None,
    ) -> list[IPAddress]:
        """Assign `count` free addresses to `owner`, or fewer if no more are free. Return them.

        The addresses are in `pools`, which are of one IP version. They are taken from these blocks, in this order:
        blocks with affinity to this host, the one that was used last before the others; new blocks, which get affinity
        to this host; other blocks, unless their affinity is strict. If `reserved` is not None, no address is assigned
        that is reserved, or that is in a network to which this host is connected; and no new block is created that
        overlaps such a network. No address of an invalid block is assigned; `passed_over` is called once for each
        invalid block, with the error.

        `affine` are the names (last parts of keys) of the blocks with affinity to this host, if the caller has just
        read them; if `affine` is None, they are read. `known` is the owner's handle, if the caller has just read it, or
        assumes that it does not exist; None means that it is read. Raises InvalidValue if the handle is invalid;
        HandleExists, and assigns nothing, if it is assumed not to exist, but exists, and the store is not atomic; and
        Conflict if other writers keep changing a block.
        """
        ranges = [_range(pool) for pool in pools]
        invalid: set[str] = set()
        found: list[IPAddress] = []
        with self._recount_on_failure(owner):
            recent = None if known is None else self._recent_block(ranges, known)
            if recent is not None and known is not None:
                known = replace(known, blocks=[*known.blocks, recent])
            networks = () if reserved is None else reserved.network.networks
            for version, first, claim in self._candidates(ranges, networks, affine, recent):

                def may_take(ordinal: int, version: int = version, first: int = first) -> bool:
                    is_in_pool = any(low <= first + ordinal <= high for _, low, high in ranges)
                    return is_in_pool and (reserved is None or reserved.is_free_for_any(version, first + ordinal))

                key = keys.ipam_block(version, block_cidr(version, first))
                if key in invalid or not any(map(may_take, range(BLOCK_SIZE))):
                    continue
                try:
                    found += self._allocate(version, first, owner, may_take, count - len(found), claim, known)
                    known = None if found else known  # this has changed the handle
                except InvalidValue as error:
                    if error.key != key:
                        raise
                    invalid.add(key)
                    passed_over(error)
                if len(found) >= count:
                    return found
        if owner.handle is not None:
            self.handles.recount(owner.handle)
        return found

    def transfer(self, address: IPAddress, holders: str, owner: Owner) -> None:
        """Assign `address` to `owner` instead of its present owner, whose handle must begin with the text `holders`.

        Does nothing if `owner` has the address already. Raises AddressTaken if the address is free, or if its owner's
        handle begins otherwise; InvalidValue if the block or a handle is invalid; and Conflict if other writers keep
        changing the block.
        """
        version, first, ordinal = place(address)
        cidr = block_cidr(version, first)
        key, handle = keys.ipam_block(version, cidr), str(owner.handle)
        with self._recount_on_failure(owner):
            for attempt in range(ATTEMPTS):
                entry = self._store.get(key)
                block = None if entry is None else Block.from_entry(entry)
                present = None if block is None else block.owner(ordinal)
                if present == owner:
                    return
                if entry is None or block is None or present is None or not (present.handle or "").startswith(holders):
                    raise AddressTaken(f"IP {address} was released, or given to another, meanwhile")
                before = str(present.handle)
                block.release(ordinal)
                block.allocate(ordinal, owner)
                (new, old), _ = self._store.read([keys.ipam_handle(handle), keys.ipam_handle(before)])
                # a handle may count too much for a moment, but never too little
                writes = [
                    counted(handle, new, {cidr: block.count(handle)}),
                    Update(entry, block.to_json()),
                    counted(before, old, {cidr: block.count(before)}),
                ]
                try:
                    self._store.commit([write for write in writes if write is not None])
                    return
                except (KeyExists, CompareFailed):
                    pause(attempt)
                    if not self._store.atomic:  # the block may be written, and the handles not
                        self.handles.recount(before)
        raise Conflict(f"block {cidr} keeps being modified concurrently; retry")

    def release(self, addresses: Iterable[IPAddress], holders: set[str | None] | None = None) -> list[IPAddress]:
        """Release `addresses`; return those that were not released, since they were not assigned.

        If `holders` is not None, it is a set of handles. Then only the addresses of these handles are released, and all
        other addresses are returned, too. The element None of the set stands for addresses without a handle.

        Raises InvalidValue for an invalid block, and Conflict if other writers keep changing a block.
        """
        by_block: dict[tuple[int, int], set[int]] = {}
        for address in addresses:
            version, first, ordinal = place(address)
            by_block.setdefault((version, first), set()).add(ordinal)
        missing: list[IPAddress] = []
        for (version, first), ordinals in by_block.items():
            released, handles = self._release_in_block(version, first, ordinals, holders)
            missing += [address_at(version, first + ordinal) for ordinal in sorted(ordinals - released)]
            for handle in handles:
                self.handles.recount(handle)
        return missing

    def release_held(self, holding: Holding, addresses: Collection[IPAddress]) -> None:
        """Release those of `addresses` that are in `holding`. If the handle has no other addresses, it is deleted.

        The caller must hold the workload's lock. Raises InvalidValue if a block or the handle is invalid, and Conflict
        if other writers keep changing a block or the handle.
        """
        writes: list[Write] = []
        counts: dict[str, int] = {}
        for entry in holding.blocks:
            block = Block.from_entry(entry)
            ours = [o for o, _ in block.held() if block.address(o) in holding.owners and block.address(o) in addresses]
            for ordinal in ours:
                block.release(ordinal)
            counts[block.cidr] = block.count(holding.handle)
            writes += [Update(entry, block.to_json())] if ours else []
        count = counted(holding.handle, holding.entry, counts)
        with suppress(KeyExists, CompareFailed):  # another writer has changed the handle or a block meanwhile
            if len(writes) <= BLOCKS_AT_ONCE:
                if writes:
                    self._store.commit([*writes, *([count] if count is not None else [])])
                return
        self.release(addresses, {holding.handle})
        self.handles.recount(holding.handle)  # the blocks may be written, and the handle not

    def release_by_handle(self, handle: str) -> list[IPAddress]:
        """Release all addresses of `handle` on this host; return them.

        If the handle has no addresses on other hosts, it is deleted. The caller must hold the workload's lock. Raises
        InvalidValue if a block or the handle is invalid, and Conflict if other writers keep changing one of them.
        """
        held = list(self.held_by(handle) or ())
        self.release(held, {handle})
        self.handles.recount(handle)
        return held

    def set_workload_name(self, handle: str, addresses: Iterable[IPAddress], name: str) -> None:
        """Set the attribute "workload_name" to `name` in the blocks that contain `addresses`.

        It is set for all addresses that `handle` has on this host in these blocks. Raises NotFound if one of the blocks
        does not exist, InvalidValue if one is invalid, and Conflict if other writers keep changing one.
        """
        for version, first in {place(address)[:2] for address in addresses}:
            key = keys.ipam_block(version, block_cidr(version, first))

            def renamed(text: str, key: str = key) -> str | None:
                block = Block.from_entry(Entry(key, text, 0))
                return block.to_json() if block.set_workload_name(handle, self._host, name) else None

            modify(self._store, key, f"etcd key {key} no longer exists", renamed)

    def workloads(self, name: str | None = None) -> set[tuple[str, str]]:
        """Return (orchestrator, workload id) of each workload with addresses on this host.

        Orchestrator, workload id and name are attributes of the addresses. An address is ignored if its handle is not
        `ORCHESTRATOR.ID`, or if its block is invalid. If `name` is not None, only workloads with that name are
        returned.
        """

        def workload(owner: Owner) -> tuple[str, str] | None:
            facts = owner.secondary
            named = (str(facts.get("orchestrator")), str(facts.get("workload")))
            is_wanted = name is None or facts.get("workload_name") == name
            return named if is_wanted and owner.handle == ".".join(named) else None

        return self._of_owners(workload)

    def interfaces(self) -> set[str]:
        """Return the names of the interfaces of all endpoints that have addresses on this host.

        The names come from the attributes of the addresses, so the endpoints need not be in the store. Invalid blocks
        are skipped.
        """

        def interface(owner: Owner) -> str:
            return EndpointId("", "", "", str(owner.secondary.get("endpoint"))).interface

        return self._of_owners(interface)

    def _of_owners(self, convert: Callable[[Owner], H | None]) -> set[H]:
        """Return `convert(owner)`, without None, for the owners of this host's addresses; skip invalid blocks.

        Owners without the attribute "host" are left out.
        """

        def converted(block: Block) -> set[H | None]:
            return {convert(owner) for _, owner in block.held() if owner.secondary.get("host") == self._host}

        found = {item for version in (4, 6) for some in self.blocks(version, converted)[0] for item in some}
        return {item for item in found if item is not None}

    def affinities(self) -> tuple[dict[tuple[int, str], set[str]], list[InvalidValue]]:
        """Read the keys of all affinities.

        Return, for the valid ones, (IP version, CIDR of the block) -> hosts with such a key; and, for each invalid one,
        an error. The blocks are not read: they may not exist, or may have affinity to another host.
        """
        found: dict[tuple[int, str], set[str]] = {}
        invalid = []
        for entry in self._store.tree(keys.IPAM_HOSTS):
            affinity = keys.parse_affinity(entry.key)
            if affinity is None:
                continue
            host, version, cidr = affinity
            if any(block_cidr(version, first) == cidr for first in first_addresses(version, [keys.last(entry.key)])):
                found.setdefault((version, cidr), set()).add(host)
            else:
                invalid.append(InvalidValue(entry.key, "its name is not a block's CIDR"))
        return found, invalid

    def repair_affinity(self, version: int, cidr: str) -> None:
        """Make the key of this host's affinity to the block `cidr` agree with the block.

        If the block has affinity to this host, the key is created if it is missing. If the block has no affinity to
        this host, or does not exist, the key is deleted. Raises InvalidValue for an invalid block.
        """
        entry = self._store.get(keys.ipam_block(version, cidr))
        if entry is not None and Block.from_entry(entry).affinity == f"host:{self._host}":
            create_if_missing(self._store, keys.ipam_affinity(self._host, version, cidr), "")
        else:
            self._delete_affinity(version, cidr)

    def release_affinities(self) -> bool:
        """Release this host's affinities to blocks, and delete their keys; return whether there were any.

        A block with affinity to this host is deleted if all its addresses are free. If one is assigned, the block stays
        without affinity. Raises InvalidValue if a block with a key of this host's affinity is invalid, and Conflict if
        other writers keep changing a block.
        """
        found = False
        for version in (4, 6):
            firsts = set(first_addresses(version, self._store.names(keys.ipam_affinities(self._host, version))))
            # another tool may have deleted the affinity's key alone
            firsts.update(self.blocks(version, lambda b: b.first if b.affinity == f"host:{self._host}" else None)[0])
            for first in sorted(firsts):
                cidr = block_cidr(version, first)
                self._release_affinity(keys.ipam_block(version, cidr))
                self._delete_affinity(version, cidr)
                found = True
        return found

    def _release_affinity(self, key: str) -> None:
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

    def _recent_block(self, ranges: list[tuple[int, int, int]], known: KnownHandle) -> Entry | None:
        """Return the entry of the block in which this host has last assigned an address; see recent_blocks.py.

        `ranges` are the pools: see `_range`. `known` is the handle for which an address is wanted: if it contains the
        block's entry, that is not read again. Returns None if no such block is known, if its key cannot be read,
        or if it overlaps none of `ranges`. The block may be invalid, or have no affinity to this host any more.
        """
        version = ranges[0][0] if ranges else 4
        key = recent_blocks.key(self._host, version)
        if key is not None and any(map(partial(_overlaps, ranges), first_addresses(version, [keys.last(key)]))):
            with suppress(InvalidValue):
                return known.block(key) or self._store.get(key)
        return None

    def _candidates(
        self,
        ranges: list[tuple[int, int, int]],
        networks: Iterable[Network],
        names: Iterable[str] | None,
        recent: Entry | None,
    ) -> Iterator[tuple[int, int, bool]]:
        """Yield (IP version, first address, `claim`) for the blocks from which to assign, in order of preference.

        `claim` says whether the block should be created if it is missing, and used only if it has affinity to this
        host. `ranges` are the pools, as (IP version, first address, last address). All addresses are numbers. New
        blocks that overlap `networks` are not yielded. `names` are the names (last parts of keys) of the blocks with
        affinity to this host, None to read them. `recent` is the entry of the block to yield first, None if there is
        none.
        """
        version = ranges[0][0] if ranges else 4
        wanted = partial(_overlaps, ranges)

        def affine() -> set[int]:
            return set(first_addresses(version, self._store.names(keys.ipam_affinities(self._host, version))))

        def existing() -> set[int]:
            return set(first_addresses(version, self._store.names(keys.ipam_blocks(version))))

        tried = set(first_addresses(version, [] if recent is None else [keys.last(recent.key)]))
        for first in tried:
            yield version, first, True
        ours = affine() if names is None else set(first_addresses(version, names))
        for first in sorted(filter(wanted, ours - tried)):
            yield version, first, True
        known = existing()
        # another command of this host may have claimed one concurrently: share it
        for first in sorted(filter(wanted, (affine() - ours - tried) & known)):
            yield version, first, True
        for low, high in _without(ranges, [network for network in networks if network.version == version]):
            for first in range(low, high + 1, BLOCK_SIZE):
                if first not in known:
                    yield version, first, True
        # read again: a block that was to be claimed, or has a stale affinity, may belong to another host now
        borrowed = list(filter(wanted, existing()))
        random.shuffle(borrowed)
        for first in borrowed:
            yield version, first, False

    def _allocate(
        self,
        version: int,
        first: int,
        owner: Owner,
        may_take: Callable[[int], bool],
        count: int,
        claim: bool,
        known: KnownHandle | None,
        exact: bool = False,
    ) -> list[IPAddress]:
        """Assign up to `count` free addresses of a block to `owner`; return them in ascending order.

        The block begins with the address `first` (a number). Only addresses are assigned for whose ordinals in the
        block `may_take` returns True.

        A block that does not exist is created with affinity to this host if `claim` is true. If `claim` is false, it is
        skipped, which means that the result is empty.

        A block without affinity to this host is skipped if `claim` is true, or if its affinity is strict. If `exact` is
        true, it is not skipped, but if its affinity is strict, CalicoError is raised. If `claim` is true, the key of
        this host's affinity to such a block is deleted, since it is wrong. If `exact` is true, addresses that `owner`
        already has are returned as well.

        `known` is the owner's handle, as the caller has just read or assumes it; None means that it is read. Raises
        InvalidValue if the block or the handle is invalid; HandleExists, and assigns nothing, if the handle is assumed
        not to exist, but exists, and the store is not atomic; and Conflict if other writers keep changing the block.
        """
        cidr = block_cidr(version, first)
        key = keys.ipam_block(version, cidr)
        handle = None if owner.handle is None else keys.ipam_handle(owner.handle)
        before: set[int] | None = set() if exact else None
        is_count_too_high = False
        for attempt in range(ATTEMPTS):
            counts: Entry | None = None
            if known is not None:
                entry, counts = known.block(key) or self._store.get(key), known.entry
            elif self._store.atomic and handle is not None:
                entry, counts = self._store.read([key, handle])[0]
            else:
                entry = self._store.get(key)
            if entry is not None:
                block = Block.from_entry(entry)
                if claim and block.affinity != f"host:{self._host}":
                    self._delete_affinity(version, cidr)
                    if not exact:
                        break
            elif claim:
                block = Block.empty(version, first, self._host)
            else:
                break
            mine = {ordinal for ordinal in block.held_by(owner) if may_take(ordinal)}
            before = mine if before is None else before
            # an earlier, unanswered write of this loop may have been applied: what is new and ours comes from it
            taken = sorted(mine - before)[:count]
            free = list(islice(filter(may_take, block.free()), count - len(taken)))
            if free and block.is_strict and block.affinity != f"host:{self._host}":
                if exact:
                    raise CalicoError(_strict_refusal(block, free[0]))
                free = []
            if free:
                count_write = None
                if owner.handle is not None and handle is not None:
                    if known is None and not self._store.atomic:
                        counts = self._store.get(handle)
                    count_write = counted(owner.handle, counts, {cidr: block.count(owner.handle) + len(free)})
                for ordinal in free:
                    block.allocate(ordinal, owner)
                write: Write = Create(key, block.to_json()) if entry is None else Update(entry, block.to_json())
                affinity = keys.ipam_affinity(self._host, version, cidr) if entry is None else None
                is_assumed = known is not None and known.is_assumed
                try:
                    written = self._write_with_count(write, count_write, is_assumed, affinity)
                except (KeyExists, CompareFailed):
                    is_count_too_high = count_write is not None and not self._store.atomic
                    known = None
                    pause(attempt)
                    continue
                # a block that does not exist cannot be written again before a count is decreased (handles.py)
                is_unsafe = entry is None and not self._store.atomic
                if handle is not None and is_unsafe and self._store.get(handle) != written:
                    self.handles.recount(str(owner.handle))  # another host with the same handle has decreased it
            if taken or free:
                if block.affinity == f"host:{self._host}":
                    recent_blocks.remember(self._host, version, keys.last(key))
                return [address_at(version, first + ordinal) for ordinal in sorted(taken + free)]
            break
        else:
            raise Conflict(f"block {cidr} keeps being modified concurrently; retry")
        if is_count_too_high:
            self.handles.recount(str(owner.handle))
        return []

    def _write_with_count(
        self, write: Write, count_write: Write | None, is_assumed: bool, affinity: str | None
    ) -> Entry | None:
        """Commit the write of a block and, before it, `count_write`, the write of a handle, if it is not None.

        Returns the entry of the handle or, if `count_write` is None, of the block. `is_assumed` says that the handle
        was not read, but is assumed not to exist. If it exists, HandleExists is raised in a store that is not atomic,
        and nothing is written. Raises what `commit` raises, too.

        `affinity` is the key of this host's affinity to the block, if that is to be created, too, unless it exists. It
        is written before the block, so that no block lacks it, and after the handle was found to be valid.
        """
        writes = [write] if count_write is None else [count_write, write]
        written = []
        if is_assumed and isinstance(count_write, Create) and not self._store.atomic:
            try:
                written = [self._store.create(count_write.key, count_write.value)]
            except KeyExists:
                raise HandleExists(count_write.key) from None
            writes = [write]
        if affinity is not None:
            create_if_missing(self._store, affinity, "")
        return [*written, *self._store.commit(writes)][0]

    @contextmanager
    def _recount_on_failure(self, owner: Owner) -> Iterator[None]:
        try:
            yield
        except HandleExists:  # nothing was written
            raise
        except BaseException:  # KeyboardInterrupt included; the count may be too high
            if owner.handle is not None:
                with suppress(CalicoError):
                    self.handles.recount(owner.handle)
            raise

    def _delete_affinity(self, version: int, cidr: str) -> None:
        entry = self._store.get(keys.ipam_affinity(self._host, version, cidr))
        if entry is not None:
            # if another command of this host has rewritten the key, that command also finds the affinity stale
            with suppress(CompareFailed):
                self._store.delete(entry)

    def _release_in_block(
        self, version: int, first: int, ordinals: set[int], holders: set[str | None] | None
    ) -> tuple[set[int], set[str]]:
        """Release the addresses with these ordinals in the block that begins with the address `first` (a number).

        If `holders` is not None, only the addresses of these handles are released; its element None stands for
        addresses without a handle. Return the released ordinals, and the handles whose counts may be too high now.
        """
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
                block.release(ordinal)
            writes: list[Write] = [Update(entry, block.to_json())]
            counts = self._counts_after(block, handles)
            try:
                self._store.commit([*writes, *counts] if self._store.atomic else writes)
            except KeyExists:
                pause(attempt)
                continue
            except CompareFailed as failed:
                if failed.maybe_applied:
                    released |= now
                pause(attempt)
                continue
            if not self._store.atomic:
                try:
                    self._store.commit(counts)
                except (KeyExists, CompareFailed):  # another writer has changed a handle meanwhile
                    return released | now, handles
            return released | now, set()
        raise Conflict(f"block {block_cidr(version, first)} keeps being modified concurrently; retry")

    def _counts_after(self, block: Block, handles: set[str]) -> list[Write]:
        """Read `handles`, and return the writes that set the count for `block` in each of them."""
        names = sorted(handles)
        entries = self._store.read([keys.ipam_handle(handle) for handle in names])[0]
        writes = [counted(handle, entry, {block.cidr: block.count(handle)}) for handle, entry in zip(names, entries)]
        return [write for write in writes if write is not None]


def _strict_refusal(block: Block, ordinal: int) -> str:
    """Return the error message for an address in a block whose affinity is strict, and not to this host."""
    whose = f"of {block.affinity.replace(':', ' ', 1)}" if block.affinity else "of no host"
    return (
        f"IP {block.address(ordinal)} is in the block {block.cidr} {whose}, which no other host takes addresses from "
        "(strict affinity)"
    )


def _overlaps(ranges: list[tuple[int, int, int]], first: int) -> bool:
    """Return whether the block that begins with the address `first` overlaps any of `ranges` (see `_range`)."""
    return any(low <= first + BLOCK_SIZE - 1 and first <= high for _, low, high in ranges)


def _range(pool: Pool) -> tuple[int, int, int]:
    """Return (IP version, first address, last address) of a pool, the addresses as numbers."""
    from netaddr.ip import IPNetwork

    network = IPNetwork(pool.cidr)
    return network.version, network.first, network.last


def _without(ranges: list[tuple[int, int, int]], networks: list[Network]) -> Iterator[tuple[int, int]]:
    """Yield the parts of `ranges` that are outside of `networks`, as (first address, last address), both numbers.

    All are of one IP version. Each part begins at a block's first address, even if its range begins later. A block that
    overlaps one of `networks` is left out as a whole.
    """
    for _, low, high in ranges:
        at = low - low % BLOCK_SIZE
        for network in sorted(networks, key=lambda network: network.first):
            if network.last >= at and network.first <= high:
                if network.first - network.first % BLOCK_SIZE > at:
                    yield at, network.first - network.first % BLOCK_SIZE - 1
                at = network.last - network.last % BLOCK_SIZE + BLOCK_SIZE
        if at <= high:
            yield at, high
