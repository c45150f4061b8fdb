"""Handles: for each workload, the number of its addresses in each block. So the addresses are found in a few reads.

If a handle's counts differ from the blocks, the blocks are right. A count is increased before its block is written, and
decreased afterwards. So even after a crash, a handle names every block with an address of the handle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from calicoctl.addresses import version_of
from calicoctl.datastore import keys
from calicoctl.datastore.blocks import Block
from calicoctl.datastore.model import load_object
from calicoctl.datastore.store import ATTEMPTS, Entry, Store, pause
from calicoctl.errors import CompareFailed, Conflict, InvalidValue, KeyExists


class Handles:
    """The handles of all hosts."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def exists(self, handle: str) -> bool:
        return self._store.get(keys.ipam_handle(handle)) is not None

    def names(self) -> list[str]:
        return self._store.names(keys.ipam_handles())

    def counts(self) -> tuple[dict[str, dict[str, int]], list[InvalidValue]]:
        """Return handle -> CIDR of a block -> number of addresses, and an error for each invalid handle."""
        counts: dict[str, dict[str, int]] = {}
        invalid: list[InvalidValue] = []
        for entry in self._store.tree(keys.ipam_handles()):
            try:
                if "/" in entry.key[len(keys.ipam_handles()) + 1 :]:
                    raise InvalidValue(entry.key, "it is in a subdirectory, where no handle can be")
                counts[keys.last(entry.key)] = counts_of(entry)
            except InvalidValue as error:
                invalid.append(error)
        return counts, invalid

    def totals(self) -> dict[str, int | None]:
        """Return handle -> number of addresses in all blocks, None for an invalid handle."""
        counts, invalid = self.counts()
        totals: dict[str, int | None] = {handle: sum(blocks.values()) for handle, blocks in counts.items()}
        return {**totals, **{keys.last(error.key): None for error in invalid}}

    def held_in(self, handle: str, cidr: str) -> int:
        """Return how many addresses of the block `cidr` are assigned to `handle`.

        They are counted in the block itself, not taken from the handle.
        """
        entry = self._store.get(keys.ipam_block(version_of(cidr), cidr))
        return 0 if entry is None else Block.from_entry(entry).count(handle)

    def recount(self, handle: str, planned: Mapping[str, int] | None = None) -> Entry | None:
        """Correct a handle's counts, by counting the handle's addresses in each block that the handle names.

        `planned` maps CIDRs of blocks to the counts that are right once the caller has written the blocks: they are
        used as they are. A handle without addresses is deleted. Returns the handle's entry after the change, None if
        there is no handle any more. Raises Conflict if other writers keep changing the handle, and InvalidValue if the
        handle or a block is invalid.
        """
        planned = planned or {}
        key = keys.ipam_handle(handle)
        for attempt in range(ATTEMPTS):
            entry = self._store.get(key)
            data = load_object(entry.value, key) if entry is not None else {"id": handle}
            counts = counts_of(entry) if entry is not None else {}
            actual = {}
            for cidr in {**counts, **planned}:
                count = planned[cidr] if cidr in planned else self.held_in(handle, cidr)
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


def counts_of(entry: Entry) -> dict[str, int]:
    """Parse the entry of a handle: return CIDR of a block -> number of addresses. Raises InvalidValue."""
    counts = load_object(entry.value, entry.key).get("block")
    if not isinstance(counts, dict) or not all(type(count) is int for count in counts.values()):
        raise InvalidValue(entry.key, '"block" should be an object of numbers')
    return counts
