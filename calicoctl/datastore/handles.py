"""IPAM handles. A workload's handle contains, for each block, the number of the workload's addresses in the block.

If a handle and a block disagree, the block is right. In an atomic store, a count and the block are written in one
transaction. In other stores, a count is increased before addresses are assigned in the block, and decreased after
addresses were released there. So a handle always names all blocks with addresses of the workload.

Two hosts may share a handle. While one of them is between the two writes, the other may find the count too high, and
decrease it. So in a store that is not atomic, a count that is too high is decreased only after the block was written
again, unchanged: then the first host's write of the block fails, and it begins again with the count.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from calicoctl import limits
from calicoctl.addresses import version_of
from calicoctl.datastore import keys
from calicoctl.datastore.blocks import Block
from calicoctl.datastore.model import load_object
from calicoctl.datastore.store import ATTEMPTS, Create, Delete, Entry, Store, Update, Write, pause, read_all
from calicoctl.errors import CompareFailed, Conflict, InvalidValue, KeyExists


@dataclass(frozen=True)
class KnownHandle:
    """A handle, as a caller has just read it: its entry, None if it does not exist, and the entries of its blocks.

    `blocks` need not be complete. If `is_assumed` is true, the handle was not read, but is assumed not to exist.
    """

    entry: Entry | None
    blocks: Collection[Entry] = ()
    is_assumed: bool = False

    def block(self, key: str) -> Entry | None:
        """Return the entry of the block with this key, None if it is not in `blocks`."""
        return next((entry for entry in self.blocks if entry.key == key), None)


class Handles:
    """Reads and corrects handles in the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def exists(self, handle: str) -> bool:
        return self.read(handle) is not None

    def read(self, handle: str) -> Entry | None:
        """Return the entry of a handle, None if there is no such handle."""
        return self._store.get(keys.ipam_handle(handle))

    def names(self) -> list[str]:
        return self._store.names(keys.ipam_handles())

    def counts(self) -> tuple[dict[str, dict[str, int]], list[InvalidValue]]:
        """Read all handles.

        Return, for the valid ones, handle -> CIDR of a block -> number of the handle's addresses in the block; and, for
        each invalid one, an error.
        """
        counts: dict[str, dict[str, int]] = {}
        invalid: list[InvalidValue] = []
        for entry in self._store.tree(keys.ipam_handles()):
            try:
                counts[handle_of(entry)] = counts_of(entry)
            except InvalidValue as error:
                invalid.append(error)
        return counts, invalid

    def totals(self) -> dict[str, int | None]:
        """Return handle -> number of its addresses in all blocks together, None if the handle is invalid."""
        counts, invalid = self.counts()
        totals: dict[str, int | None] = {handle: sum(blocks.values()) for handle, blocks in counts.items()}
        return {**totals, **{keys.last(error.key): None for error in invalid}}

    def recount(self, handle: str, others: Collection[str] = ()) -> Entry | None:
        """Correct the counts of a handle. Return the corrected entry, None if the handle does not exist (any more).

        The handle's addresses are counted in each block that the handle names, and in the blocks `others` (CIDRs); but
        the count of an invalid block does not change. A handle without addresses is deleted, and a missing handle with
        addresses is created.

        Raises Conflict if other writers keep changing the handle or a block, and InvalidValue if the handle is invalid.
        """
        key = keys.ipam_handle(handle)
        for attempt in range(ATTEMPTS):
            entry = self._store.get(key)
            counts = counts_of(entry) if entry is not None else {}
            blocks, invalid = read_blocks(self._store, list(dict.fromkeys([*counts, *others])))
            actual = dict.fromkeys(counts, 0)
            actual.update({block.cidr: block.count(handle) for _, block in blocks})
            actual.update({cidr: counts[cidr] for cidr in invalid if cidr in counts})
            if entry is not None and counts and actual == counts and all(counts.values()):
                return entry
            try:
                if not self._store.atomic:
                    for block_entry, block in blocks:
                        if actual[block.cidr] < counts.get(block.cidr, 0):
                            self._store.update(block_entry, block_entry.value)
                write = counted(handle, entry, actual)
                written = self._store.commit([write]) if write is not None else []
                return None if isinstance(write, Delete) or not written else written[0]
            except (KeyExists, CompareFailed):
                pause(attempt)
        raise Conflict(f"IPAM handle {handle} keeps being modified concurrently; retry")


def read_blocks(store: Store, cidrs: Collection[str]) -> tuple[list[tuple[Entry, Block]], dict[str, InvalidValue]]:
    """Read the blocks `cidrs`. Return (entry, block) for each valid block, and CIDR -> error for the invalid blocks.

    Blocks that do not exist are left out.
    """
    by_key = {keys.ipam_block(version_of(cidr), cidr): cidr for cidr in cidrs}
    invalid: dict[str, InvalidValue] = {}
    entries: dict[str, Entry] = {}
    try:
        entries = read_all(store, by_key)
    except InvalidValue:  # which says nothing of the others
        for key, cidr in by_key.items():
            try:
                entries.update(read_all(store, [key]))
            except InvalidValue as error:
                invalid[cidr] = error
    blocks = []
    for key, entry in entries.items():
        try:
            blocks.append((entry, Block.from_entry(entry)))
        except InvalidValue as error:
            invalid[by_key[key]] = error
    return blocks, invalid


def counted(handle: str, entry: Entry | None, counts: Mapping[str, int]) -> Write | None:
    """Return the write that sets counts in a handle: the number of addresses for each block in `counts`, by CIDR.

    The counts of other blocks do not change. If no addresses are left, the write deletes the handle. `entry` is the
    handle's current entry, None if the handle does not exist: then the write creates the handle, or None is returned
    if all counts are 0. Raises InvalidValue if `entry` is invalid.
    """
    key = keys.ipam_handle(handle)
    data = {"id": handle} if entry is None else load_object(entry.value, key)
    merged = {**({} if entry is None else counts_of(entry)), **counts}
    actual = {cidr: count for cidr, count in merged.items() if count}
    value = json.dumps({**data, "block": actual})
    if entry is None:
        return Create(key, value) if actual else None
    # written even if unchanged: then a host that has read the handle, and an older state of the block, cannot delete it
    return Update(entry, value) if actual else Delete(entry)


def handle_of(entry: Entry) -> str:
    """Return the name of the handle whose entry this is. Raise InvalidValue if its key is in a subdirectory."""
    if "/" in entry.key[len(keys.ipam_handles()) + 1 :]:
        raise InvalidValue(entry.key, "it is in a subdirectory, where no handle can be")
    return keys.last(entry.key)


def counts_of(entry: Entry) -> dict[str, int]:
    """Parse the entry of a handle; return CIDR of a block -> number of addresses.

    Raises InvalidValue if the entry is invalid.
    """
    counts = load_object(entry.value, entry.key).get("block")
    if not isinstance(counts, dict) or not all(type(count) is int for count in counts.values()):
        raise InvalidValue(entry.key, '"block" should be an object of numbers')
    if len(counts) > limits.BLOCKS:
        raise InvalidValue(entry.key, f"a handle can have {limits.BLOCKS} blocks, and this would have {len(counts)}")
    return counts
