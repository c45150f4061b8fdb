"""Blocks of 64 addresses, and the owner of each address: plain data, converted from and to the JSON in the store.

Does not access the store: ipam.py reads and writes the blocks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from calicoctl.addresses import BITS, number_of, unpack, version_of
from calicoctl.datastore import keys
from calicoctl.datastore.model import load_object
from calicoctl.datastore.store import Entry
from calicoctl.errors import InvalidValue

if TYPE_CHECKING:
    from netaddr import IPAddress

BLOCK_SIZE = 64
"""The number of addresses in a block."""

_LENGTHS = {4: 26, 6: 122}
"""The prefix length of a block of each IP version."""


@dataclass
class Owner:
    """The owner of an address: `handle` is the id of its handle, None if it has none.

    `secondary` is its JSON object "secondary": host, workload and others, or whatever another tool has written there.
    """

    handle: str | None
    secondary: dict[str, Any]


@dataclass
class Block:
    """A block: 64 consecutive addresses of the IP version `version`. `first` is the first address, as a number.

    `allocations[i]` is None if the address `first + i` is free, else the index of its owner in `owners`. `affinity` is
    `host:NAME` or None. `owners` is the list "attributes" of the JSON: objects with the fields "handle_id" and
    "secondary" (see Owner). `extra` contains the other fields of the JSON.
    """

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
        """Parse a block; raise InvalidValue for an invalid key or value."""
        data = load_object(entry.value, entry.key)
        named = parse_name(keys.last(entry.key))
        if named is None:
            raise InvalidValue(entry.key, f"its name is not the CIDR of a block of {BLOCK_SIZE} addresses")
        if data.pop("cidr", None) != block_cidr(*named):
            raise InvalidValue(entry.key, "it does not have the CIDR of its key")
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
        return cls(*named, affinity, allocations, owners, data)

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
        return block_cidr(self.version, self.first)

    @property
    def key(self) -> str:
        return keys.ipam_block(self.version, self.cidr)

    def free(self) -> list[int]:
        """Return the ordinals (offsets from `first`) of the free addresses, in the order in which to assign them.

        The order is that of the list "unallocated" in `extra`, if there is one. Free addresses that are not in the list
        follow in ascending order. Source: `unallocated` in pycalico/block.py of libcalico 0.8.
        """
        # tools from 2016 on append a released address to this list, so that it is assigned last
        listed = self.extra.get("unallocated")
        ordinals = [ordinal for ordinal in listed if type(ordinal) is int] if isinstance(listed, list) else []
        free = {ordinal: None for ordinal in range(BLOCK_SIZE) if self.allocations[ordinal] is None}
        return list(dict.fromkeys([*(ordinal for ordinal in ordinals if ordinal in free), *free]))

    def free_list_problem(self) -> str | None:
        """Return what is wrong with the list "unallocated" in `extra` (see `free`), as a clause.

        Returns None if the list is missing, or has each free address once and nothing else.
        """
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
        """Whether only the host to which the block has affinity may assign addresses of the block."""
        return self.extra.get("strict_affinity") not in (None, False)

    def owner(self, ordinal: int) -> Owner | None:
        """Return the owner of the address `first + ordinal`, None if the address is free.

        What cannot be a handle (keys.is_handle) is left out of the result.
        """
        index = self.allocations[ordinal]
        if index is None:
            return None
        owner = self.owners[index]
        handle, secondary = owner.get("handle_id"), owner.get("secondary")
        return Owner(
            handle if isinstance(handle, str) and keys.is_handle(handle) else None,
            secondary if isinstance(secondary, dict) else {},
        )

    def held(self) -> Iterator[tuple[int, Owner]]:
        """Yield (offset from `first`, owner) for each assigned address."""
        for ordinal in range(BLOCK_SIZE):
            owner = self.owner(ordinal)
            if owner is not None:
                yield ordinal, owner

    def count(self, handle: str) -> int:
        return len(self._ordinals(index for index, owner in enumerate(self.owners) if owner.get("handle_id") == handle))

    def held_by(self, owner: Owner) -> list[int]:
        """Return the offsets from `first` of the addresses that are assigned to exactly this owner."""
        of_handle = (n for n, one in enumerate(self.owners) if owner.handle in (None, one.get("handle_id")))
        return [ordinal for ordinal in self._ordinals(of_handle) if self.owner(ordinal) == owner]

    def _ordinals(self, indices: Iterable[int]) -> list[int]:
        """Return the offsets from `first` of the addresses whose owners have one of these indices."""
        wanted = set(indices)
        return [ordinal for ordinal, index in enumerate(self.allocations) if index in wanted]

    def allocate(self, ordinal: int, owner: Owner) -> None:
        """Assign the free address `first + ordinal` to `owner`."""
        attributes = {"handle_id": owner.handle, "secondary": owner.secondary}
        if attributes not in self.owners:
            self.owners.append(attributes)
        self.allocations[ordinal] = self.owners.index(attributes)

    def release(self, ordinal: int) -> None:
        """Release the address `first + ordinal`, and remove the owners without addresses from `owners`."""
        self.allocations[ordinal] = None
        used = sorted({index for index in self.allocations if index is not None})
        self.owners = [self.owners[index] for index in used]
        self.allocations = [None if index is None else used.index(index) for index in self.allocations]

    def set_workload_name(self, handle: str, host: str, name: str) -> bool:
        """Set the attribute "workload_name" to `name` for each owner with this handle whose attribute "host" is `host`.

        Returns whether this has changed the attribute of any owner.
        """
        changed = False
        for attributes in self.owners:
            facts = attributes.get("secondary")
            if attributes.get("handle_id") == handle and isinstance(facts, dict) and facts.get("host") == host:
                changed = changed or facts.get("workload_name") != name
                facts["workload_name"] = name
        return changed

    def address(self, ordinal: int) -> IPAddress:
        return address_at(self.version, self.first + ordinal)


def address_at(version: int, value: int) -> IPAddress:
    from netaddr.ip import IPAddress

    return IPAddress(value, version)


def block_cidr(version: int, first: int) -> str:
    return f"{unpack(first.to_bytes(BITS[version] // 8, 'big'))}/{_LENGTHS[version]}"


def parse_name(name: str) -> tuple[int, int] | None:
    """Return (IP version, first address as a number) of the block with this name, None if no block can have it.

    A name is the last part of the key of a block or of a block's affinity, such as `192.168.0.0-26`.
    """
    address, _, length = keys.undashed(name).partition("/")
    version = version_of(address)
    try:
        number = number_of(address)
    except (OSError, ValueError):
        return None
    return (version, number - number % BLOCK_SIZE) if length == str(_LENGTHS[version]) else None


def place(address: IPAddress) -> tuple[int, int, int]:
    """Return (IP version, first address of its block as a number, offset in the block) of an address."""
    value = int(address)
    return address.version, value - value % BLOCK_SIZE, value % BLOCK_SIZE


def block_key(address: IPAddress) -> str:
    version, first, _ = place(address)
    return keys.ipam_block(version, block_cidr(version, first))


def first_addresses(version: int, names: Iterable[str]) -> Iterator[int]:
    """Yield the first address of each block in `names` (see `parse_name`), as a number.

    Names that are invalid, or of a block of the other IP version, are skipped.
    """
    for named in map(parse_name, names):
        if named is not None and named[0] == version:
            yield named[1]
