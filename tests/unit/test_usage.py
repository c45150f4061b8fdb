"""The counts of pools' addresses."""

from __future__ import annotations

import json

from calicoctl.datastore.blocks import Block
from calicoctl.datastore.model import Pool
from calicoctl.datastore.store import Entry
from calicoctl.datastore.usage import Usage, counter, usages


def block(cidr: str, affinity: str | None, *hosts: str | None) -> Block:
    """A block whose first addresses are held on these hosts, None for an address whose host is not known."""
    attributes = [{"handle_id": None, "secondary": {} if host is None else {"host": host}} for host in hosts]
    allocations = [*range(len(hosts)), *[None] * (64 - len(hosts))]
    value = {"cidr": cidr, "affinity": affinity, "allocations": allocations, "attributes": attributes}
    return Block.from_entry(Entry(f"/blocks/{cidr.replace('/', '-')}", json.dumps(value), 1))


def test_used_free_and_borrowed_addresses_are_counted_by_pool() -> None:
    pools = [Pool("10.0.0.0/25"), Pool("10.0.1.0/26")]
    blocks = [
        block("10.0.0.0/26", "host:a", "a", "b", None),
        block("10.0.0.64/26", None, "a"),
        block("10.9.0.0/26", "host:a", "a", "b"),
    ]
    both = [Usage("10.0.0.0/25", 128, 4, 124, 1), Usage("10.0.1.0/26", 64, 0, 64, 0)]
    assert usages(pools, map(counter(pools), blocks[:2])) == both
    assert usages(pools, map(counter(pools), blocks)) == [*both, Usage(None, None, 2, None, 1)]
