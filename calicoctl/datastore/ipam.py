"""Which address belongs to whom: blocks of 64 addresses, the hosts' affinity to them, and handles that name owners.

Every change of a key is a compare-and-swap on what was read, repeated a bounded number of times. The order of writes
is such that a cut at any point loses no address: a handle's count goes up before the block is written and down after
an address is given back, and it is counted anew from the blocks before it is changed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from calicoctl.addresses import version_of
from calicoctl.datastore import keys
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Pool, load_object
from calicoctl.datastore.reserved import Network, Reserved
from calicoctl.datastore.store import ATTEMPTS, Entry, Store, create_if_missing, modify, pause
from calicoctl.errors import AddressTaken, CalicoError, CompareFailed, Conflict, InvalidValue, KeyExists

if TYPE_CHECKING:
    from netaddr import IPAddress, IPNetwork

BLOCK_SIZE = 64
"""Addresses in a block: a /26 in IPv4, a /122 in IPv6."""


@dataclass
class Owner:
    """Who holds an address: a handle, or None, and free-form facts about the owner (`secondary` in the store)."""

    handle: str | None
    secondary: dict[str, Any]


@dataclass
class Block:
    """64 addresses from `first` on. `allocations[i]` is None or an index into `owners`."""

    version: int
    first: int
    affinity: str | None
    allocations: list[int | None]
    owners: list[dict[str, Any]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def empty(cls, version: int, first: int, host: str) -> Block:
        return cls(version, first, f"host:{host}", [None] * BLOCK_SIZE)

    @classmethod
    def from_entry(cls, entry: Entry) -> Block:
        """Read a block's key; raise InvalidValue when block or key are not well formed."""
        from calicoctl.addresses import parse_cidr

        data = load_object(entry.value, entry.key)
        try:
            cidr = parse_cidr(keys.undashed(keys.last(entry.key)))
        except CalicoError:
            raise InvalidValue(entry.key, "its name is not a block's CIDR") from None
        if cidr.size != BLOCK_SIZE or data.pop("cidr", None) != str(cidr):
            raise InvalidValue(entry.key, f"it is not a block of {BLOCK_SIZE} addresses with the CIDR of its key")
        affinity, allocations, owners = (data.pop(name, None) for name in ("affinity", "allocations", "attributes"))
        if not (affinity is None or isinstance(affinity, str)):
            raise InvalidValue(entry.key, '"affinity" should be a string or null')
        if not isinstance(owners, list) or not all(isinstance(owner, dict) for owner in owners):
            raise InvalidValue(entry.key, '"attributes" should be a list of objects')
        if (
            not isinstance(allocations, list)
            or len(allocations) != BLOCK_SIZE
            or not all(index is None or (type(index) is int and 0 <= index < len(owners)) for index in allocations)
        ):
            raise InvalidValue(entry.key, f'"allocations" should be {BLOCK_SIZE} nulls or indices of "attributes"')
        return cls(cidr.version, cidr.first, affinity, allocations, owners, data)

    def to_json(self) -> str:
        free = {} if self.extra.get("unallocated") is None else {"unallocated": self.free()}
        return json.dumps(
            {
                "cidr": self.cidr,
                "affinity": self.affinity,
                "allocations": self.allocations,
                "attributes": self.owners,
                **self.extra,
                **free,
            }
        )

    @property
    def cidr(self) -> str:
        return _cidr(self.version, self.first)

    @property
    def key(self) -> str:
        return keys.ipam_block(self.version, self.cidr)

    def free(self) -> list[int]:
        """Return the ordinals that are free, in the order in which they are to be given out.

        Tools from 2016 on keep that order in the block, as "unallocated", and rely on it; an address that was given
        back comes last. Where that list and the allocations differ, the allocations are right. Source: `unallocated`
        in pycalico/block.py of libcalico 0.8.
        """
        listed = self.extra.get("unallocated")
        ordinals = [ordinal for ordinal in listed if type(ordinal) is int] if isinstance(listed, list) else []
        free = {ordinal: None for ordinal in range(BLOCK_SIZE) if self.allocations[ordinal] is None}
        return list(dict.fromkeys([*(ordinal for ordinal in ordinals if ordinal in free), *free]))

    def free_list_problem(self) -> str | None:
        """Return what is wrong with the list of free addresses that tools from 2016 on rely on, None for nothing."""
        listed, free = self.extra.get("unallocated"), self.free()
        if listed is None or listed == free:
            return None
        if not isinstance(listed, list) or not all(type(ordinal) is int for ordinal in listed):
            return 'its "unallocated" is no list of numbers'
        wrong, missing = sorted(set(listed) - set(free)), sorted(set(free) - set(listed))
        if wrong:
            return f'its "unallocated" lists {wrong[0]}, which is not free'
        return f'its "unallocated" lacks {missing[0]}, which is free' if missing else 'its "unallocated" repeats itself'

    @property
    def is_strict(self) -> bool:
        """Tell whether no host but the one with affinity may take addresses from it."""
        return self.extra.get("strict_affinity") not in (None, False)

    def owner(self, ordinal: int) -> Owner | None:
        """Return who holds the address `first + ordinal`, or None when it is free."""
        index = self.allocations[ordinal]
        if index is None:
            return None
        owner = self.owners[index]
        handle, secondary = owner.get("handle_id"), owner.get("secondary")
        return Owner(
            handle if isinstance(handle, str) else None,
            secondary if isinstance(secondary, dict) else {},
        )

    def held(self) -> Iterator[tuple[int, Owner]]:
        """Yield the ordinals that are taken, with their owners."""
        for ordinal in range(BLOCK_SIZE):
            owner = self.owner(ordinal)
            if owner is not None:
                yield ordinal, owner

    def count(self, handle: str) -> int:
        return sum(owner.handle == handle for _, owner in self.held())

    def take(self, ordinal: int, owner: Owner) -> None:
        """Give a free address to `owner`."""
        attributes = {"handle_id": owner.handle, "secondary": owner.secondary}
        if attributes not in self.owners:
            self.owners.append(attributes)
        self.allocations[ordinal] = self.owners.index(attributes)

    def give_back(self, ordinal: int) -> None:
        """Free an address; drop the attributes that nobody uses then."""
        self.allocations[ordinal] = None
        used = sorted({index for index in self.allocations if index is not None})
        self.owners = [self.owners[index] for index in used]
        self.allocations = [None if index is None else used.index(index) for index in self.allocations]

    def set_workload_name(self, handle: str, host: str, name: str) -> bool:
        """Note what the workload is called whose handle on a host this is; tell whether it was called otherwise."""
        changed = False
        for attributes in self.owners:
            facts = attributes.get("secondary")
            if attributes.get("handle_id") == handle and isinstance(facts, dict) and facts.get("host") == host:
                changed = changed or facts.get("workload_name") != name
                facts["workload_name"] = name
        return changed

    def address(self, ordinal: int) -> IPAddress:
        return _address(self.version, self.first + ordinal)


class Ipam:
    """Takes and gives back addresses on behalf of one host."""

    def __init__(self, store: Store, host: str) -> None:
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
        for first in sorted(_firsts(self._store.names(keys.ipam_blocks(version)))):
            if network is None or (first <= network.last and first + BLOCK_SIZE > network.first):
                entry = self._store.get(keys.ipam_block(version, _cidr(version, first)))
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
        entry = self._store.get(_block_key(address))
        return None if entry is None else Block.from_entry(entry)

    @staticmethod
    def cidr_of(address: IPAddress) -> str:
        """Return the CIDR of the block that an address belongs to, whether there is one or not."""
        version, first, _ = _place(address)
        return _cidr(version, first)

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
        counts, actual = _handle_counts(entry), {}
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
            self._recount(handle)
            if not any(actual.values()):
                return {}
        return held or None

    def knows(self, handle: str) -> bool:
        """Tell whether there is such a handle."""
        return self._store.get(keys.ipam_handle(handle)) is not None

    def handles(self) -> list[str]:
        """Return all handles, of all hosts."""
        return self._store.names(keys.ipam_handles())

    def handle_counts(self) -> tuple[dict[str, dict[str, int]], list[InvalidValue]]:
        """Return what handles say they hold, how many addresses by block, and what is wrong with those not sound."""
        counts: dict[str, dict[str, int]] = {}
        problems: list[InvalidValue] = []
        for entry in self._store.tree(keys.ipam_handles()):
            try:
                if "/" in entry.key[len(keys.ipam_handles()) + 1 :]:
                    raise InvalidValue(entry.key, "it is below a folder, where no handle is")
                counts[keys.last(entry.key)] = _handle_counts(entry)
            except InvalidValue as problem:
                problems.append(problem)
        return counts, problems

    def handle_totals(self) -> dict[str, int | None]:
        """Return how many addresses all handles say they hold; None for one that cannot be read."""
        counts, problems = self.handle_counts()
        totals: dict[str, int | None] = {handle: sum(blocks.values()) for handle, blocks in counts.items()}
        return {**totals, **{keys.last(problem.key): None for problem in problems}}

    def recount(self, handle: str, blocks: Iterable[str]) -> None:
        """Make a handle's counts equal to what is held: in the blocks it names, and in these (their CIDRs)."""
        self._recount(handle, {cidr: self._count(handle, cidr) for cidr in blocks})

    def mend_free_list(self, version: int, cidr: str) -> None:
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
        version, first, ordinal = _place(address)
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
            self._recount(owner.handle)
        return found

    def release(self, addresses: Iterable[IPAddress], holders: set[str | None] | None = None) -> list[IPAddress]:
        """Give addresses back; return those that were not assigned.

        With `holders`, give back only what one of these handles holds; what is somebody else's counts as not assigned.
        """
        by_block: dict[tuple[int, int], set[int]] = {}
        for address in addresses:
            version, first, ordinal = _place(address)
            by_block.setdefault((version, first), set()).add(ordinal)
        missing: list[IPAddress] = []
        for (version, first), ordinals in by_block.items():
            released, handles = self._give_back(version, first, ordinals, holders)
            missing += [_address(version, first + ordinal) for ordinal in sorted(ordinals - released)]
            for handle in handles:
                self._recount(handle)
        return missing

    def release_by_handle(self, handle: str) -> list[IPAddress]:
        """Give back all that `handle` holds on this host, and drop it when nothing is left; return the addresses."""
        held = list(self.held_by(handle) or ())
        self.release(held, {handle})
        self._recount(handle)
        return held

    def set_workload_name(self, handle: str, addresses: Iterable[IPAddress], name: str) -> None:
        """Note beside addresses that `handle` holds on this host what its workload is called."""
        for version, first in {_place(address)[:2] for address in addresses}:
            key = keys.ipam_block(version, _cidr(version, first))

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
            for first in list(_firsts(self._store.names(keys.ipam_affinities(self._host, version)))):
                cidr = _cidr(version, first)
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
            return set(_firsts(self._store.names(keys.ipam_affinities(self._host, version))))

        def existing() -> set[int]:
            return set(_firsts(self._store.names(keys.ipam_blocks(version))))

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
        cidr = _cidr(version, first)
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
                    counted = self._recount(owner.handle, {cidr: block.count(owner.handle) + len(free)})
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
                    self._recount(str(owner.handle))
            if taken or free:
                return [_address(version, first + ordinal) for ordinal in sorted(taken + free)]
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
                    self._recount(owner.handle)
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
        key = keys.ipam_block(version, _cidr(version, first))
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
        raise Conflict(f"block {_cidr(version, first)} keeps being modified concurrently; retry")

    def _recount(self, handle: str, planned: dict[str, int] | None = None) -> Entry | None:
        """Make a handle's counts equal to what the blocks it names hold, or to what is `planned` for some of them.

        `planned` maps a block's CIDR to the count it is about to have. A handle that counts nothing is removed. Returns
        the handle as it stands in the store now.
        """
        key = keys.ipam_handle(handle)
        for attempt in range(ATTEMPTS):
            entry = self._store.get(key)
            data = load_object(entry.value, key) if entry is not None else {"id": handle}
            counts = _handle_counts(entry) if entry is not None else {}
            actual = {}
            for cidr in {**counts, **(planned or {})}:
                count = planned[cidr] if planned and cidr in planned else self._count(handle, cidr)
                if count:
                    actual[cidr] = count
            value = json.dumps({**data, "block": actual})
            try:
                if entry is None:
                    return self._store.create(key, value) if actual else None
                if not actual:
                    self._store.delete(entry)
                    return None
                return entry if actual == counts else self._store.update(entry, value)
            except (KeyExists, CompareFailed):
                pause(attempt)
        raise Conflict(f"IPAM handle {handle} keeps being modified concurrently; retry")

    def _count(self, handle: str, cidr: str) -> int:
        entry = self._store.get(keys.ipam_block(version_of(cidr), cidr))
        return 0 if entry is None else Block.from_entry(entry).count(handle)


def _strictly(block: Block, ordinal: int) -> str:
    """Return why another host than a block's cannot have an address of it."""
    whose = f"of {block.affinity.replace(':', ' ', 1)}" if block.affinity else "of no host"
    return (
        f"IP {block.address(ordinal)} is in the block {block.cidr} {whose}, which no other host takes addresses from "
        "(strict affinity)"
    )


def _handle_counts(entry: Entry) -> dict[str, int]:
    counts = load_object(entry.value, entry.key).get("block")
    if not isinstance(counts, dict) or not all(type(count) is int for count in counts.values()):
        raise InvalidValue(entry.key, '"block" should be an object of numbers')
    return counts


def _address(version: int, value: int) -> IPAddress:
    from netaddr.ip import IPAddress

    return IPAddress(value, version)


def _cidr(version: int, first: int) -> str:
    return f"{_address(version, first)}/{122 if version == 6 else 26}"


def _place(address: IPAddress) -> tuple[int, int, int]:
    """Return the version, the first address and the ordinal: where an address is in its block."""
    value = int(address)
    return address.version, value - value % BLOCK_SIZE, value % BLOCK_SIZE


def _block_key(address: IPAddress) -> str:
    version, first, _ = _place(address)
    return keys.ipam_block(version, _cidr(version, first))


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


def _firsts(names: Iterable[str]) -> Iterator[int]:
    """Yield the first addresses of the blocks whose names these are; pass over what is no block's name."""
    from calicoctl.addresses import parse_cidr

    for name in names:
        try:
            network = parse_cidr(keys.undashed(name))
        except CalicoError:
            continue
        if network.size == BLOCK_SIZE:
            yield network.first
