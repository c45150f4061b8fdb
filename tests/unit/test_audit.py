"""What `ipam check` finds about blocks and the hosts that announce them, and what it repairs."""

from __future__ import annotations

import json

import pytest

from calicoctl.addresses import parse_address
from calicoctl.datastore.blocks import Block, Owner
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.copied import CopiedStore
from calicoctl.diagnose import audit
from calicoctl.workloads import libnetwork
from tests.unit.memory_store import MemoryStore

CIDR = "192.168.0.0/26"
BLOCK = "/calico/ipam/v2/assignment/ipv4/block/192.168.0.0-26"


def affinity(host: str) -> str:
    return f"/calico/ipam/v2/host/{host}/ipv4/block/192.168.0.0-26"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """Two registered hosts; host1 has one block."""
    monkeypatch.setattr(audit, "RECHECK_DELAY", 0)
    store = MemoryStore()
    for host, address in (("host1", "192.0.2.1"), ("host2", "192.0.2.2")):
        store.create(f"/calico/bgp/v1/host/{host}/ip_addr_v4", address)
    store.create(affinity("host1"), "")
    store.create(BLOCK, Block.empty(4, 0xC0A80000, "host1").to_json())
    return store


def check(store: MemoryStore, fix: bool = True) -> list[str]:
    """Return the problems of the block, each with whether it is fixable; with `fix`, repair them."""
    findings = audit.check(DatastoreClient(store, "host2"))[0]
    if fix:
        assert [audit.repair(finding) for finding in findings if finding.fix] == [None] * len(findings)
    assert {(finding.kind, finding.subject) for finding in findings} <= {("block", CIDR)}
    return [finding.problem for finding in findings]


def delete(store: MemoryStore, key: str) -> None:
    entry = store.get(key)
    assert entry is not None
    store.delete(entry)


def test_a_host_without_the_key_of_its_affinity_gets_it(store: MemoryStore) -> None:
    assert check(store) == []
    delete(store, affinity("host1"))
    (problem,) = check(store)
    assert problem.endswith("so host1 does not announce it")
    assert store.get(affinity("host1")) is not None and check(store) == []


@pytest.mark.parametrize("whose", ["host1", None])
def test_an_affinity_to_a_block_of_another_host_or_of_none_is_deleted(store: MemoryStore, whose: str | None) -> None:
    delete(store, affinity("host1"))
    entry = store.get(BLOCK)
    assert entry is not None
    block = Block.from_entry(entry)
    block.affinity = f"host:{whose}" if whose else None
    block.allocate(5, Owner("docker.x", {}))  # not an empty one, which might be deleted
    store.update(entry, block.to_json())
    store.create("/calico/ipam/v2/handle/docker.x", json.dumps({"id": "docker.x", "block": {CIDR: 1}}))
    store.create(affinity("host2"), "")
    if whose:
        store.create(affinity("host1"), "")
    findings = [finding for finding in audit.check(DatastoreClient(store, "host1"))[0] if finding.kind == "block"]
    (problem,) = findings
    assert problem.problem.startswith("host host2 has affinity to it, but the block ")
    assert audit.repair(problem) is None
    assert store.get(affinity("host2")) is None and (store.get(affinity("host1")) is not None) == bool(whose)


def test_an_affinity_to_no_block_is_deleted(store: MemoryStore) -> None:
    delete(store, BLOCK)
    assert check(store) == ["host host1 has affinity to it, but the block does not exist"]
    assert store.get(affinity("host1")) is None and check(store) == []


@pytest.mark.parametrize("missing", [None, BLOCK, affinity("host1")])
def test_what_a_host_that_is_gone_has_left_is_released(store: MemoryStore, missing: str | None) -> None:
    delete(store, "/calico/bgp/v1/host/host1/ip_addr_v4")
    if missing:
        delete(store, missing)
    assert check(store) == ["it has affinity to host host1, which is not registered"]
    assert store.get(affinity("host1")) is store.get(BLOCK) is None and check(store) == []


@pytest.mark.parametrize("key", ["/calico/felix/v1/host/host1/status", "/calico/v1/host/host1/workload/a/b/endpoint/c"])
def test_nothing_is_released_of_a_host_that_may_be_alive(store: MemoryStore, key: str) -> None:
    delete(store, "/calico/bgp/v1/host/host1/ip_addr_v4")
    store.create(key, "{}")
    (finding,) = [one for one in audit.check(DatastoreClient(store, "host2"))[0] if one.kind == "block"]
    assert finding.fix is None and "--hostname=host1" in (audit.repair(finding) or "")
    # nor when it has come back since
    delete(store, key)
    (finding,) = [one for one in audit.check(DatastoreClient(store, "host2"))[0] if one.kind == "block"]
    store.create(key, "{}")
    assert audit.repair(finding) == "it was modified concurrently: check again"
    assert store.get(BLOCK) is not None


def test_a_key_that_names_no_block_is_told(store: MemoryStore) -> None:
    store.create("/calico/ipam/v2/host/host1/ipv4/block/192.168.0.0-25", "")
    (finding,), _ = audit.check(DatastoreClient(store, "host2"))
    assert (finding.kind, finding.subject[-14:]) == ("unreadable", "192.168.0.0-25")


def test_all_is_read_once_for_each_of_the_two_checks(store: MemoryStore) -> None:
    store.requests = 0
    assert check(store) == [] and store.requests == 1
    for version, first in ((4, 0xC0A80040), (4, 0xC0A80080), (6, 2**127)):
        block = Block.empty(version, first, "host1")
        store.create(block.key, block.to_json())
    store.requests = 0
    assert len(audit.check(DatastoreClient(store, "host2"))[0]) == 3 and store.requests == 2


def test_a_host_that_is_gone_is_asked_about_once_however_many_blocks_it_has_left(store: MemoryStore) -> None:
    delete(store, "/calico/bgp/v1/host/host1/ip_addr_v4")

    def count() -> tuple[int, int]:
        """Return how many requests a check takes, and then the repairs, but for one to delete each block."""
        store.requests = 0
        findings = audit.check(DatastoreClient(store, "host2"))[0]
        asked, store.requests = store.requests, 0
        assert {audit.repair(finding) for finding in findings} == {None}
        return asked, store.requests

    def add(*numbers: int) -> None:
        for number in numbers:
            block = Block.empty(4, 0xC0A80000 + 64 * number, "host1")
            store.create(block.key, block.to_json())

    add(1)
    few, repairs_of_few = count()
    assert not store.names("/calico/ipam/v2/assignment/ipv4/block")
    add(*range(22))
    many, repairs_of_many = count()
    assert not store.names("/calico/ipam/v2/assignment/ipv4/block")
    assert many == few and (repairs_of_many - repairs_of_few) / 20 <= 3, "each block is read, and deleted"


def test_a_copy_of_the_store_reads_like_the_store() -> None:
    store = MemoryStore()
    for key in ("/calico/a", "/calico/a/b", "/calico/a/b/c", "/calico/a.b", "/calico/a/d/e", "/calico/é/f", "/calicos"):
        store.create(key, "")
    copy = CopiedStore(store.tree("/calico"))
    for directory in ("/calico", "/calico/a", "/calico/a/b", "/calico/a/d", "/calico/z", "/calico/é"):
        assert copy.tree(directory) == store.tree(directory) and copy.names(directory) == store.names(directory)
        assert copy.names(directory, ["a", "b"]) == store.names(directory, ["a", "b"])
        assert copy.exists(directory) == store.exists(directory) and copy.get(directory) == store.get(directory)
    assert copy.read(["/calico/a", "/calico/0", "/calico/~"], ["/calico/a"]) == store.read(
        ["/calico/a", "/calico/0", "/calico/~"], ["/calico/a"]
    )


def test_what_docker_has_left_is_released_without_a_command(store: MemoryStore) -> None:
    datastore = DatastoreClient(store, "host1")
    datastore.ipam.assign(parse_address("192.168.0.7"), libnetwork.request_owner("host1"))
    (finding,), _ = audit.check(datastore)
    assert (finding.kind, finding.subject, finding.fix) == ("address", "192.168.0.7", None)
    assert finding.advice.startswith("the process for Docker networks on host1 releases it within about two minutes")
