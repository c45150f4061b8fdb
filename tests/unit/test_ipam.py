"""IPAM under any sequence of calls, with conflicts and lost answers: blocks well formed, handles exact, one owner."""

from __future__ import annotations

import ipaddress
import itertools
import json
import threading
from collections.abc import Sequence
from functools import partial
from typing import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from netaddr import IPAddress, IPNetwork

from calicoctl import limits
from calicoctl.datastore import handles, ipam
from calicoctl.datastore.blocks import Block, Owner, block_cidr, parse_name
from calicoctl.datastore.handles import KnownHandle
from calicoctl.datastore.ipam import Ipam
from calicoctl.datastore.model import Pool
from calicoctl.datastore.reserved import HostNetwork, InterfaceAddress, Reserved
from calicoctl.datastore.store import Entry
from calicoctl.errors import AddressTaken, CalicoError, HandleExists, InvalidValue, StoreUnavailable
from tests.unit.memory_store import Fault, Lost, MemoryStore

HOSTS = ("host1", "host2", "host3")
POOLS = {4: [Pool("10.0.0.0/25"), Pool("10.0.1.32/27")], 6: [Pool("fd00::/121")]}
OUTSIDE_BLOCKS = ("10.0.1.0", "10.0.1.31")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (handles, ipam):
        monkeypatch.setattr(module, "pause", lambda attempt: None)


def raw_allocations(store: MemoryStore) -> dict[str, dict]:
    """Read all blocks without the code under test, checking that each is well formed: address -> attributes."""
    found = {}
    for key, entry in store.entries.items():
        if "/assignment/" not in key:
            continue
        block = json.loads(entry.value)
        network = ipaddress.ip_network(block["cidr"])
        assert network.num_addresses == len(block["allocations"]) == 64
        assert key.rpartition("/")[2] == str(network).replace("/", "-")
        assert block["affinity"] in {f"host:{host}" for host in HOSTS}
        used = {index for index in block["allocations"] if index is not None}
        assert used == set(range(len(block["attributes"])))
        for ordinal, index in enumerate(block["allocations"]):
            if index is not None:
                found[str(network[ordinal])] = block["attributes"][index]
    return found


def raw_handles(store: MemoryStore) -> dict[str, dict[str, int]]:
    prefix = "/calico/ipam/v2/handle/"
    return {
        key[len(prefix) :]: json.loads(e.value)["block"] for key, e in store.entries.items() if key.startswith(prefix)
    }


def addresses_in(version: int) -> st.SearchStrategy[IPAddress]:
    starts = {4: ["10.0.0.0", "10.0.1.32"], 6: ["fd00::"]}[version]
    return st.builds(lambda start, n: IPAddress(start) + n, st.sampled_from(starts), st.integers(0, 31))


ANY_ADDRESS = addresses_in(4) | addresses_in(6)
HANDLES = st.sampled_from(["h1", "h2", "h3", None])
FAULTS = st.lists(st.sampled_from([None, None, None, "conflict", "lost"]), max_size=6)


class IpamMachine(RuleBasedStateMachine):
    """Three hosts assign and release; `model` is what must be: address -> handle."""

    modern = False

    @initialize()
    def start(self) -> None:
        self.store = MemoryStore(self.modern)
        self.hosts = {host: Ipam(self.store, host) for host in HOSTS}
        self.model: dict[str, str | None] = {}
        self.calls = 0

    def fault(self, sequence: list[str | None]) -> None:
        left = list(sequence)
        self.store.fault = lambda: left.pop() if left else None

    def owner(self, handle: str | None) -> Owner:
        self.calls += 1
        return Owner(handle, {"endpoint": str(self.calls)})

    @rule(host=st.sampled_from(HOSTS), address=ANY_ADDRESS, handle=HANDLES, fault=FAULTS)
    def assign(self, host: str, address: IPAddress, handle: str | None, fault: list) -> None:
        self.fault(fault)
        try:
            self.hosts[host].assign(address, self.owner(handle))
        except AddressTaken:
            assert str(address) in self.model
        else:
            assert str(address) not in self.model
            self.model[str(address)] = handle

    @rule(
        host=st.sampled_from(HOSTS),
        address=ANY_ADDRESS,
        holders=st.sampled_from(["h", "h1", "h2"]),
        handle=st.sampled_from(["h1", "h2", "h3"]),
        fault=FAULTS,
    )
    def transfer(self, host: str, address: IPAddress, holders: str, handle: str, fault: list) -> None:
        self.fault(fault)
        before = self.model.get(str(address))
        try:
            self.hosts[host].transfer(address, holders, self.owner(handle))
        except AddressTaken:
            assert before is None or not before.startswith(holders)
        else:
            assert before is not None and before.startswith(holders)
            self.model[str(address)] = handle

    @rule(
        host=st.sampled_from(HOSTS),
        count=st.integers(1, 70),
        version=st.sampled_from([4, 6]),
        handle=HANDLES,
        fault=FAULTS,
    )
    def auto_assign(self, host: str, count: int, version: int, handle: str | None, fault: list) -> None:
        self.fault(fault)
        found = self.hosts[host].auto_assign(count, POOLS[version], self.owner(handle))
        assert len(set(found)) == len(found)
        networks = [ipaddress.ip_network(pool.cidr) for pool in POOLS[version]]
        assert all(any(ipaddress.ip_address(str(a)) in network for network in networks) for a in found)
        assert not {str(address) for address in found} & set(self.model), "an address got a second owner"
        free = sum(n.num_addresses for n in networks) - sum(
            any(ipaddress.ip_address(a) in network for network in networks) for a in self.model
        )
        assert len(found) == min(count, free), "free addresses were not found"
        self.model.update({str(address): handle for address in found})

    @rule(host=st.sampled_from(HOSTS), addresses=st.lists(ANY_ADDRESS, max_size=20), fault=FAULTS)
    def release(self, host: str, addresses: list[IPAddress], fault: list) -> None:
        self.fault(fault)
        missing = self.hosts[host].release(addresses)
        assert {str(a) for a in missing} == {str(a) for a in addresses} - set(self.model)
        for address in addresses:
            self.model.pop(str(address), None)

    @rule(host=st.sampled_from(HOSTS), addresses=st.lists(ANY_ADDRESS, max_size=20), handle=HANDLES)
    def release_only_if_held(self, host: str, addresses: list[IPAddress], handle: str | None) -> None:
        self.fault([])
        self.hosts[host].release(addresses, {handle})
        for address in addresses:
            if str(address) in self.model and self.model[str(address)] == handle:
                del self.model[str(address)]

    @rule(host=st.sampled_from(HOSTS), handle=st.sampled_from(["h1", "h2", "h3"]), fault=FAULTS)
    def release_by_handle(self, host: str, handle: str, fault: list) -> None:
        self.fault(fault)
        released = self.hosts[host].release_by_handle(handle)
        assert {str(a) for a in released} == {a for a, other in self.model.items() if other == handle}
        self.model = {a: other for a, other in self.model.items() if other != handle}

    @rule(
        host=st.sampled_from(HOSTS),
        handle=st.sampled_from(["h1", "h2", "h3"]),
        another=st.tuples(st.sampled_from(HOSTS), ANY_ADDRESS, HANDLES) | st.none(),
        fault=FAULTS,
    )
    def release_held(self, host: str, handle: str, another: tuple | None, fault: list) -> None:
        """Another host may assign an address after the handle was read, also with the same handle."""
        self.fault([])
        holding = self.hosts[host].holding(handle, self.hosts[host].handles.read(handle))
        if another is not None:
            self.assign(*another, [])
        if holding is not None:
            self.fault(fault)
            self.hosts[host].release_held(holding, holding.owners)
            left = set(raw_allocations(self.store))
            assert not left & set(map(str, holding.owners))
            for address in holding.owners:
                self.model.pop(str(address))

    @rule(host=st.sampled_from(HOSTS), after=st.integers(0, 4), handle=HANDLES, version=st.sampled_from([4, 6]))
    def cut_off(self, host: str, after: int, handle: str | None, version: int) -> None:
        """etcd goes away in the middle of an assignment; the next one with the handle puts its counts right."""
        left = [None] * after
        self.store.fault = lambda: left.pop() if left else "down"
        owner = self.owner(handle)
        try:
            found = self.hosts[host].auto_assign(1, POOLS[version], owner)
        except StoreUnavailable:
            found = [
                IPAddress(a)
                for a, attributes in raw_allocations(self.store).items()
                if attributes["secondary"] == owner.secondary
            ]
        self.model.update({str(address): handle for address in found})
        self.fault([])
        if handle is not None and not self.modern:
            self.hosts[host].held_by(handle)

    @rule(handle=st.sampled_from(["h1", "h2", "h3"]))
    def held_by(self, handle: str) -> None:
        held = self.hosts["host1"].held_by(handle)
        mine = {a for a, other in self.model.items() if other == handle}
        assert {str(a) for a in held or ()} == mine
        assert (held is None) == (not mine)

    @invariant()
    def store_says_what_the_model_says(self) -> None:
        if not hasattr(self, "store"):
            return
        allocations = raw_allocations(self.store)
        assert {a: attributes["handle_id"] for a, attributes in allocations.items()} == self.model
        counts: dict[str, dict[str, int]] = {}
        for address, handle in self.model.items():
            if handle is not None:
                length = 122 if ":" in address else 26
                block = str(ipaddress.ip_network(f"{address}/{length}", strict=False))
                counts.setdefault(handle, {})
                counts[handle][block] = counts[handle].get(block, 0) + 1
        assert raw_handles(self.store) == counts


class ModernIpamMachine(IpamMachine):
    """The same with a store that is atomic: when it goes away, counts are right at once."""

    modern = True


for machine in (IpamMachine, ModernIpamMachine):
    machine.TestCase.settings = settings(stateful_step_count=25, suppress_health_check=list(HealthCheck))
TestIpam = IpamMachine.TestCase
TestModernIpam = ModernIpamMachine.TestCase


@pytest.mark.parametrize(("modern", "limits"), [(False, (6, 4, 4, 4)), (True, (3, 2, 3, 3))], ids=["v2", "v3"])
def test_a_change_takes_few_requests(modern: bool, limits: tuple[int, ...]) -> None:
    store = MemoryStore(modern)
    one, two, three = IPAddress("10.0.0.1"), IPAddress("10.0.0.2"), IPAddress("fd00::1")
    ipam, owner = Ipam(store, "host1"), Owner("h1", {})
    made = []

    def held() -> tuple:
        holding = ipam.holding("h1", ipam.handles.read("h1"))
        return holding, holding.owners

    for change in (
        lambda: ipam.assign(one, owner),
        lambda: ipam.assign(two, owner),
        lambda: ipam.release([one], {"h1"}),
        lambda: ipam.release_held(*held()),
    ):
        store.requests = 0
        change()
        made.append(store.requests)
    assert tuple(made) == limits
    assert raw_allocations(store) == {} == raw_handles(store)
    ipam.assign(one, Owner("h2", {}))
    store.requests = 0
    ipam.transfer(one, "h2", owner)
    assert store.requests == (3 if modern else 6)
    store.requests = 0
    ipam.transfer(one, "h2", owner)  # it has it already
    assert store.requests == 1
    ipam.assign(three, owner)
    store.requests = 0
    ipam.release_held(*held())
    assert store.requests == (3 if modern else 6) and raw_handles(store) == {}


def test_a_hosts_first_addresses_are_the_lowest_of_a_block_it_claims() -> None:
    store = MemoryStore()
    pools = [Pool("10.0.0.0/24")]
    first = Ipam(store, "host1").auto_assign(2, pools, Owner("h1", {}))
    second = Ipam(store, "host2").auto_assign(1, pools, Owner("h2", {}))
    assert [str(a) for a in first + second] == ["10.0.0.0", "10.0.0.1", "10.0.0.64"]
    assert "/calico/ipam/v2/host/host1/ipv4/block/10.0.0.0-26" in store.entries
    assert "/calico/ipam/v2/host/host2/ipv4/block/10.0.0.64-26" in store.entries


def test_a_given_address_makes_its_block_with_affinity_to_this_host() -> None:
    store = MemoryStore()
    Ipam(store, "host1").assign(IPAddress("192.168.0.1"), Owner("h1", {"node": "vm"}))
    block = json.loads(store.entries["/calico/ipam/v2/assignment/ipv4/block/192.168.0.0-26"].value)
    assert block == {
        "cidr": "192.168.0.0/26",
        "affinity": "host:host1",
        "allocations": [None, 0] + [None] * 62,
        "attributes": [{"handle_id": "h1", "secondary": {"node": "vm"}}],
    }
    assert json.loads(store.entries["/calico/ipam/v2/handle/h1"].value) == {"id": "h1", "block": {"192.168.0.0/26": 1}}


def test_when_the_pool_is_used_up_addresses_are_borrowed_and_then_there_are_none() -> None:
    store = MemoryStore()
    pools = [Pool("10.0.0.0/26")]
    assert len(Ipam(store, "host1").auto_assign(60, pools, Owner("h1", {}))) == 60
    assert len(Ipam(store, "host2").auto_assign(10, pools, Owner("h2", {}))) == 4
    assert Ipam(store, "host2").auto_assign(1, pools, Owner("h3", {})) == []
    assert raw_handles(store) == {"h1": {"10.0.0.0/26": 60}, "h2": {"10.0.0.0/26": 4}}
    assert not [key for key in store.entries if "/host/host2/" in key], "affinity to another host's block was kept"


def test_finding_a_free_block_in_a_large_pool_takes_few_requests() -> None:
    store = MemoryStore()
    for second in range(40):
        Ipam(store, "host1").assign(IPAddress(f"10.0.{second}.0"), Owner(None, {}))
    for key in [key for key in store.entries if "/ipam/v2/host/" in key]:
        del store.entries[key]
    requests = []
    original = store.get
    store.get = lambda key: requests.append(key) or original(key)  # type: ignore[method-assign]
    assert len(Ipam(store, "host2").auto_assign(1, [Pool("10.0.0.0/8")], Owner("h", {}))) == 1
    assert len(requests) < 5


@pytest.mark.parametrize("modern", [False, True])
def test_the_block_that_was_used_last_is_asked_first(modern: bool) -> None:
    """So the number of requests does not grow with the host's full blocks."""
    store = MemoryStore(modern)
    ipam, owner, known = Ipam(store, "host1"), Owner("docker.new", {}), KnownHandle(None)
    first = ipam.auto_assign(2 * 64, POOLS[4], Owner("docker.old", {}))
    assert ipam.auto_assign(1, POOLS[4], owner, known=known) == [IPAddress("10.0.1.32")]
    ipam.release([first[0], IPAddress("10.0.1.32")])
    store.requests = 0
    assert ipam.auto_assign(1, POOLS[4], owner, known=known) == [IPAddress("10.0.1.32")]
    assert store.requests == (2 if modern else 3), "one read, and the writes"
    assert ipam.auto_assign(1, POOLS[4][:1], Owner("docker.c", {}), known=known) == [first[0]], "another pool"


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("block", [None, "host:host2", "invalid"])
def test_a_block_that_was_used_last_and_is_not_the_hosts_any_more_is_not_used(modern: bool, block: str | None) -> None:
    store = MemoryStore(modern)
    ipam, known = Ipam(store, "host1"), KnownHandle(None)
    ipam.assign(IPAddress("10.0.0.70"), Owner(None, {}))
    key, affinity = "/calico/ipam/v2/assignment/ipv4/block/10.0.0.64-26", "/calico/ipam/v2/host/host1"
    store.remove_tree(key)
    store.remove_tree(affinity)
    if block is not None:
        store.create(key, Block(4, 0x0A000040, block, [None] * 64).to_json() if ":" in block else "[]")
    (address,) = ipam.auto_assign(1, POOLS[4], Owner("docker.new", {}), known=known)
    assert address == IPAddress("10.0.0.0"), "of a block of its own"


def test_unknown_fields_of_a_block_are_kept() -> None:
    store = MemoryStore()
    ipam = Ipam(store, "host1")
    ipam.assign(IPAddress("10.0.0.1"), Owner("h1", {}))
    key = "/calico/ipam/v2/assignment/ipv4/block/10.0.0.0-26"
    store._put(key, json.dumps({**json.loads(store.entries[key].value), "strict": True}))
    ipam.assign(IPAddress("10.0.0.2"), Owner("h1", {}))
    assert json.loads(store.entries[key].value)["strict"] is True


KEY = "/calico/ipam/v2/assignment/ipv4/block/10.0.0.0-26"


def put_block(store: MemoryStore, **fields: object) -> None:
    """Write the block 10.0.0.0/26 of host1, with the fields that tools from 2016 on keep in it."""
    block = {**GOOD_BLOCK, "affinity": "host:host1", "unallocated": list(range(64)), "strict_affinity": False}
    store._put(KEY, json.dumps({**block, **fields}))
    store._put("/calico/ipam/v2/host/host1/ipv4/block/10.0.0.0-26", "")


def test_the_list_of_free_addresses_is_kept_and_followed() -> None:
    store = MemoryStore()
    order = [7, 3, *(n for n in range(64) if n not in (3, 7))]
    put_block(store, unallocated=order)
    ipam, pools = Ipam(store, "host1"), [Pool("10.0.0.0/26")]

    def free() -> list[int]:
        block = json.loads(store.entries[KEY].value)
        assert block["strict_affinity"] is False
        assert {n for n, a in enumerate(block["allocations"]) if a is None} == set(block["unallocated"])
        return list(block["unallocated"])

    assert ipam.auto_assign(1, pools, Owner("h1", {})) == [IPAddress("10.0.0.7")]
    assert free() == order[1:]
    ipam.assign(IPAddress("10.0.0.9"), Owner("h1", {}))
    assert free() == [n for n in order[1:] if n != 9]
    ipam.release([IPAddress("10.0.0.7")])
    assert free() == [*(n for n in order[1:] if n != 9), 7]
    assert [str(a) for a in ipam.auto_assign(2, pools, Owner("h1", {}))] == ["10.0.0.0", "10.0.0.3"]
    assert free() == [*(n for n in order[3:] if n != 9), 7]


@pytest.mark.parametrize(
    ("listed", "problem"),
    [
        (list(range(1, 64)), None),
        (list(range(63, 0, -1)), None),
        (list(range(64)), "lists 0, which is not free"),
        ([*range(1, 64), 99], "lists 99, which is not free"),
        (list(range(2, 64)), "lacks 1, which is free"),
        ([*range(1, 64), 5], "repeats"),
        ([*range(1, 64), "x"], "no list of numbers"),
        ({}, "no list of numbers"),
    ],
)
def test_a_wrong_list_of_free_addresses_assigns_nothing_twice_and_is_repaired(listed: object, problem: str) -> None:
    store = MemoryStore()
    taken = {"allocations": [0] + [None] * 63, "attributes": [{"handle_id": "h0", "secondary": {}}]}
    put_block(store, unallocated=listed, **taken)
    ipam = Ipam(store, "host1")
    block = Block.from_entry(store.entries[KEY])
    assert (block.free_list_problem() or "no problem").find(problem or "no problem") >= 0
    before = store.entries[KEY]
    ipam.repair_free_list(4, "10.0.0.0/26")
    assert (store.entries[KEY] == before) == (problem is None)
    assert sorted(json.loads(store.entries[KEY].value)["unallocated"]) == list(range(1, 64))
    store._put(KEY, before.value)
    assert len(ipam.auto_assign(63, [Pool("10.0.0.0/26")], Owner("h1", {}))) == 63
    assert json.loads(store.entries[KEY].value)["unallocated"] == []


@pytest.mark.parametrize("affinity", ["host:host1", None])
def test_from_a_block_with_strict_affinity_no_other_host_takes_an_address(affinity: str | None) -> None:
    store = MemoryStore()
    put_block(store, strict_affinity=True, affinity=affinity)
    other, pools = Ipam(store, "host2"), [Pool("10.0.0.0/26")]
    before = store.entries[KEY]
    assert other.auto_assign(1, pools, Owner("h2", {})) == []
    with pytest.raises(CalicoError, match=r"IP 10\.0\.0\.5 is in the block 10\.0\.0\.0/26 of .*\(strict affinity\)"):
        other.assign(IPAddress("10.0.0.5"), Owner("h2", {}))
    assert store.entries[KEY] == before and raw_handles(store) == {}
    if affinity is not None:
        assert len(Ipam(store, "host1").auto_assign(1, pools, Owner("h1", {}))) == 1
        other.release([IPAddress("10.0.0.0")])
        assert json.loads(store.entries[KEY].value)["unallocated"] == [*range(1, 64), 0]


HOME = HostNetwork.of(
    [InterfaceAddress("10.0.0.10", "10.0.0.10", 24, "eth0"), InterfaceAddress("fd00::5", "fd00::5", 123, "eth0")],
    [("10.0.2.1", "eth0")],
)


def test_an_automatic_address_keeps_out_of_what_the_host_is_connected_to() -> None:
    store = MemoryStore()
    ipam, pools, reserved = Ipam(store, "host1"), [Pool("10.0.0.0/16")], Reserved(HOME, {"10.0.1.1": "host2"})
    found = ipam.auto_assign(100, pools, Owner("h1", {}), reserved)
    numbers = [*range(0x0A000100, 0x0A000140), *range(0x0A000140, 0x0A000180)]
    assert [int(a) for a in found] == [n for n in numbers if n != 0x0A000101][:100]
    # a block that a given address has made is made use of outside of the network alone
    ipam.assign(IPAddress("fd00::1"), Owner("h2", {}))
    found = ipam.auto_assign(64, [Pool("fd00::/122")], Owner("h2", {}), reserved)
    assert [int(a) & 63 for a in found] == list(range(32, 64))
    assert not [a for a in raw_allocations(store) if a.startswith("10.0.0.") or a in ("10.0.1.1", "10.0.2.1")]


def test_no_block_with_addresses_of_a_connected_network_is_claimed_or_looked_for_one_by_one() -> None:
    store = MemoryStore()
    ipam, pools = Ipam(store, "host1"), [Pool("fd00::/64"), Pool("fd01::/120")]
    for length, first in ((64, "fd01::"), (65, "fd00::8000:0:0:0"), (122, "fd00::40"), (127, "fd00::40")):
        store.entries.clear()
        network = HostNetwork.of([InterfaceAddress("fd00::1", "fd00::1", length, "eth0")])
        (found,) = ipam.auto_assign(1, pools, Owner("h1", {}), Reserved(network))
        assert found == IPAddress(first)
    everything = HostNetwork.of([InterfaceAddress("fd00::1", "fd00::1", 8, "eth0")])
    assert ipam.auto_assign(1, pools, Owner("h1", {}), Reserved(everything)) == []
    assert len(raw_allocations(store)) == 1, "borrows none, either"


GOOD_BLOCK = {
    "cidr": "10.0.0.0/26",
    "affinity": None,
    "allocations": [None] * 64,
    "attributes": [],
}


@pytest.mark.parametrize(
    "change",
    [
        {"cidr": "10.0.0.64/26"},
        {"cidr": None},
        {"allocations": [None] * 63},
        {"allocations": [0] + [None] * 63},
        {"allocations": [True] + [None] * 63},
        {"allocations": None},
        {"attributes": {}},
        {"attributes": [1]},
        {"affinity": 7},
    ],
    ids=str,
)
def test_a_block_that_is_not_well_formed_is_refused_by_name(change: dict) -> None:
    store = MemoryStore()
    key = "/calico/ipam/v2/assignment/ipv4/block/10.0.0.0-26"
    Block.from_entry(store._put(key, json.dumps(GOOD_BLOCK)))
    entry = store._put(key, json.dumps({**GOOD_BLOCK, **change}))
    with pytest.raises(InvalidValue, match=key):
        Block.from_entry(entry)


@pytest.mark.parametrize("fault", ["conflict", "lost"])
def test_a_second_address_for_the_same_owner_is_another_one_whatever_goes_wrong(fault: str) -> None:
    store = MemoryStore()
    ipam, owner, pools = Ipam(store, "host1"), Owner("h1", {"endpoint": "e"}), [Pool("10.0.0.0/26")]
    assert [str(a) for a in ipam.auto_assign(1, pools, owner)] == ["10.0.0.0"]
    left = [fault, fault]
    store.fault = lambda: left.pop() if left else None
    assert [str(a) for a in ipam.auto_assign(1, pools, owner)] == ["10.0.0.1"]
    assert raw_handles(store) == {"h1": {"10.0.0.0/26": 2}}


def test_a_stale_affinity_hides_no_free_address() -> None:
    """To a block that is another host's; it could not be removed, as somebody else wrote it at that moment."""
    store = MemoryStore()
    pools = [Pool("10.0.0.0/26")]
    assert len(Ipam(store, "host1").auto_assign(1, pools, Owner("h1", {}))) == 1
    store._put("/calico/ipam/v2/host/host2/ipv4/block/10.0.0.0-26", "")
    left = ["conflict"]
    store.fault = lambda: left.pop() if left else None
    assert len(Ipam(store, "host2").auto_assign(1, pools, Owner("h2", {}))) == 1


@pytest.mark.parametrize("modern", [False, True], ids=["v2", "v3"])
def test_a_block_that_another_host_uses_up_meanwhile_is_not_counted(modern: bool) -> None:
    store = MemoryStore(modern)
    ipam, other, pools = Ipam(store, "host1"), Ipam(store.client(), "host2"), [Pool("10.0.0.0/25")]
    ipam.auto_assign(63, pools, Owner("h0", {}))
    before = iter([] if modern else ["the count"])

    def fault() -> Fault:
        if next(before, None):
            return None
        store.fault = lambda: None
        return Lost(False, lambda: other.assign(IPAddress("10.0.0.63"), Owner("h2", {})))

    store.fault = fault
    assert ipam.auto_assign(1, pools, Owner("h1", {})) == [IPAddress("10.0.0.64")]
    assert raw_handles(store) == {"h0": {"10.0.0.0/26": 63}, "h1": {"10.0.0.64/26": 1}, "h2": {"10.0.0.0/26": 1}}


@pytest.mark.parametrize("modern", [False, True], ids=["v2", "v3"])
def test_what_was_read_of_a_handle_may_be_outdated(modern: bool) -> None:
    store = MemoryStore(modern)
    ipam = Ipam(store, "host1")
    for last, entry in ((1, None), (2, None), (3, store.get("/calico/ipam/v2/handle/h1"))):
        ipam.assign(IPAddress(f"10.0.0.{last}"), Owner("h1", {}), KnownHandle(entry))
    assert raw_handles(store) == {"h1": {"10.0.0.0/26": 3}}


def recount(ipam: Ipam) -> None:
    ipam.handles.recount("h1")


def release(ipam: Ipam) -> None:
    ipam.release([IPAddress("10.0.0.3")], {"h1"})


def release_held(ipam: Ipam) -> None:
    holding = ipam.holding("h1", ipam.handles.read("h1"))
    ipam.release_held(holding, [IPAddress("10.0.0.3")])


@pytest.mark.parametrize("modern", [False, True], ids=["v2", "v3"])
@pytest.mark.parametrize("other", [recount, release, release_held])
def test_two_hosts_share_a_handle_whatever_the_order_of_their_requests(
    other: Callable[[Ipam], None], modern: bool
) -> None:
    """One host assigns an address, and the other lowers the count, or finds it too high, since the block comes last."""
    for order in itertools.product((0, 1), repeat=8):
        if sum(order) not in range(3, 6):
            continue
        store = MemoryStore(modern)
        one, two = Ipam(store, "host1"), Ipam(store.client(), "host2")
        one.assign(IPAddress("10.0.0.1"), Owner("other", {}))
        if other is not recount:
            two.assign(IPAddress("10.0.0.3"), Owner("h1", {}))
        in_order(store, [partial(one.assign, IPAddress("10.0.0.2"), Owner("h1", {})), partial(other, two)], order)
        assert raw_handles(store) == {"other": {"10.0.0.0/26": 1}, "h1": {"10.0.0.0/26": 1}}, order
        assert set(raw_allocations(store)) == {"10.0.0.1", "10.0.0.2"}, order


def in_order(store: MemoryStore, tasks: list[Callable[[], object]], order: tuple[int, ...]) -> None:
    """Run tasks in threads, whose requests take turns in this order; when it ends, the tasks end one after another."""
    turn = threading.Condition()
    left = list(order)
    running = set(range(len(tasks)))
    busy: set[int] = set()

    def wait() -> None:
        number = int(threading.current_thread().name)
        with turn:
            busy.discard(number)  # its request before is done
            turn.notify_all()
            assert turn.wait_for(lambda: not busy and number == (left[0] if left else min(running)), 60)
            busy.add(number)
            del left[:1]

    def fault() -> Fault:
        wait()
        return None

    def run(number: int) -> None:
        try:
            tasks[number]()
        finally:
            with turn:
                running.discard(number)
                busy.discard(number)
                left[:] = [one for one in left if one != number]
                turn.notify_all()

    store.before_read, store.fault = wait, fault
    threads = [threading.Thread(target=run, args=(number,), name=str(number)) for number in running]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.before_read, store.fault = lambda: None, lambda: None


def test_a_handle_that_is_wrongly_assumed_not_to_exist_is_left_alone() -> None:
    store = MemoryStore()
    ipam, assumed = Ipam(store, "host1"), handles.KnownHandle(None, is_assumed=True)
    ipam.assign(IPAddress("10.0.0.1"), Owner("h1", {}), assumed)
    before = dict(store.entries)
    with pytest.raises(HandleExists):
        ipam.assign(IPAddress("10.0.0.2"), Owner("h1", {}), assumed)
    with pytest.raises(HandleExists):
        ipam.auto_assign(1, [Pool("10.0.0.0/24")], Owner("h1", {}), known=assumed)
    assert store.entries == before
    # a lost answer is no reason to take it for another's
    faults = iter([Lost()])
    store.fault = lambda: next(faults, None)
    ipam.assign(IPAddress("10.0.0.3"), Owner("h2", {}), assumed)
    assert raw_handles(store) == {"h1": {"10.0.0.0/26": 1}, "h2": {"10.0.0.0/26": 1}}


@pytest.mark.parametrize(
    ("modern", "known", "error"),
    [
        (False, KnownHandle(None, is_assumed=True), HandleExists),
        (False, None, InvalidValue),
        (True, None, InvalidValue),
    ],
)
def test_no_block_is_claimed_for_an_invalid_handle(
    modern: bool, known: KnownHandle | None, error: type[Exception]
) -> None:
    store = MemoryStore(modern)
    store.put("/calico/ipam/v2/handle/h1", "gar bage")
    before = dict(store.entries)
    with pytest.raises(error):
        Ipam(store, "host1").auto_assign(1, POOLS[4], Owner("h1", {}), known=known)
    assert store.entries == before


def test_blocks_that_were_read_with_the_handle_are_not_read_again() -> None:
    for modern in (False, True):
        store = MemoryStore(modern)
        ipam = Ipam(store, "host1")
        ipam.assign(IPAddress("10.0.0.1"), Owner("h1", {}))
        holding = ipam.holding("h1", ipam.handles.read("h1"))
        assert holding is not None
        known = handles.KnownHandle(holding.entry, holding.blocks)
        store.requests = 0
        ipam.assign(IPAddress("10.0.0.2"), Owner("h1", {}), known)
        assert store.requests == (1 if modern else 2)
        ipam.assign(IPAddress("10.0.0.3"), Owner("h1", {}), known)  # it is outdated
        assert raw_handles(store) == {"h1": {"10.0.0.0/26": 3}}


def test_a_count_of_nothing_is_removed() -> None:
    store = MemoryStore()
    ipam = Ipam(store, "host1")
    ipam.assign(IPAddress("10.0.0.1"), Owner("h1", {}))
    store.put("/calico/ipam/v2/handle/h1", json.dumps({"id": "h1", "block": {"10.0.0.0/26": 1, "10.0.0.64/26": 0}}))
    ipam.handles.recount("h1")
    assert raw_handles(store) == {"h1": {"10.0.0.0/26": 1}}


class Unreadable(MemoryStore):
    """A store that refuses to read one key, as the backend for etcd's v2 API does if the key is a directory."""

    key = ""

    def get(self, key: str) -> Entry | None:
        if key == self.key:
            raise InvalidValue(key, "it is a directory")
        return super().get(key)

    def read(self, keys: Sequence[str], directories: Sequence[str] = ()) -> tuple[list, list]:
        if self.key in keys:
            raise InvalidValue(self.key, "it is a directory")
        return super().read(keys, directories)


def damage(store: Unreadable, how: str) -> None:
    """Make the block KEY invalid, and check that it is."""
    if how == "a directory":
        store.key = KEY
    elif how == "too large":
        store._put(KEY, json.dumps({**json.loads(store.entries[KEY].value), "x": "x" * limits.VALUE}))
    else:
        store._put(KEY, how)


@pytest.mark.parametrize("modern", [False, True], ids=["v2", "v3"])
@pytest.mark.parametrize("how", ["a directory", "too large", "{}", "x"])
@pytest.mark.parametrize("host", ["host1", "host2"])
def test_an_automatic_address_passes_over_an_invalid_block(host: str, how: str, modern: bool) -> None:
    store = Unreadable(modern)
    Ipam(store, "host1").assign(IPAddress("10.0.0.1"), Owner("h1", {}))
    damage(store, how)
    before = dict(store.entries)
    ipam, warned = Ipam(store, host), []
    pools = [Pool("10.0.0.0/25")]
    assert ipam.auto_assign(1, pools, Owner("h2", {}), passed_over=warned.append) == [IPAddress("10.0.0.64")]
    assert len(ipam.auto_assign(63, pools, Owner("h2", {}))) == 63
    assert raw_handles(store)["h2"] == {"10.0.0.64/26": 64}
    full = dict(store.entries)
    assert ipam.auto_assign(1, pools, Owner("h3", {}), passed_over=warned.append) == []
    assert [error.key for error in warned] == [KEY] * (2 if host == "host1" else 1), "each time that it was met, once"
    with pytest.raises(InvalidValue, match=KEY):
        ipam.assign(IPAddress("10.0.0.5"), Owner("h3", {}))
    assert store.entries == full and full.items() >= before.items()


@pytest.mark.parametrize("modern", [False, True], ids=["v2", "v3"])
def test_an_invalid_handle_is_no_reason_to_pass_over_a_block(modern: bool) -> None:
    store = MemoryStore(modern)
    store._put("/calico/ipam/v2/handle/h1", "x")
    warned: list[InvalidValue] = []
    with pytest.raises(InvalidValue, match="handle/h1"):
        Ipam(store, "host1").auto_assign(1, POOLS[4], Owner("h1", {}), passed_over=warned.append)
    assert not warned and raw_allocations(store) == {}


@pytest.mark.parametrize("modern", [False, True], ids=["v2", "v3"])
@pytest.mark.parametrize("how", ["a directory", "too large", "{}", "x"])
@pytest.mark.parametrize("ends", ["mended", "deleted"])
def test_what_a_handle_has_in_an_invalid_block_is_released_once_that_is_mended(
    ends: str, how: str, modern: bool
) -> None:
    store = Unreadable(modern)
    ipam = Ipam(store, "host1")
    for address, handle in (("10.0.0.1", "h1"), ("10.0.0.2", "h0"), ("10.0.0.65", "h1"), ("10.0.0.66", "h0")):
        ipam.assign(IPAddress(address), Owner(handle, {}))
    good = store.entries[KEY].value
    damage(store, how)
    with pytest.raises(InvalidValue, match=KEY):
        ipam.held_by("h1")
    for held in ([IPAddress("10.0.0.65")], []):
        holding = ipam.holding("h1", ipam.handles.read("h1"), partly=True)
        assert holding is not None and list(holding.owners) == held
        assert {cidr: error.key for cidr, error in holding.invalid.items()} == {"10.0.0.0/26": KEY}
        ipam.release_held(holding, holding.owners)
        ipam.handles.recount("h1")
        assert raw_handles(store)["h1"] == {"10.0.0.0/26": 1}, "it still names the block"
    store.key = ""
    if ends == "mended":
        store._put(KEY, good)
    else:
        del store.entries[KEY]
    holding = ipam.holding("h1", ipam.handles.read("h1"), partly=True)
    assert holding is not None and not holding.invalid
    ipam.release_held(holding, holding.owners)
    assert "h1" not in raw_handles(store)
    assert list(raw_allocations(store)) == (["10.0.0.2"] if ends == "mended" else []) + ["10.0.0.66"]


@pytest.mark.parametrize("modern", [False, True], ids=["v2", "v3"])
def test_all_blocks_are_read_in_a_few_requests_however_many_there_are(modern: bool) -> None:
    store = MemoryStore(modern)
    ipam = Ipam(store, "host1")
    facts = {"host": "host1", "orchestrator": "docker", "workload": "w", "endpoint": "e" * 32}
    for number in range(300):
        address = IPAddress(int(IPAddress("10.0.0.0")) + 64 * number + 5)
        ipam.assign(address, Owner("docker.w", {**facts, "workload_name": f"name{number}"}))
    ipam.assign(IPAddress("10.1.0.1"), Owner("docker.v", {**facts, "host": "host2", "workload": "v"}))
    for read, expected, most in (
        (
            lambda: ipam.used_in([IPNetwork("10.0.1.0/24"), IPNetwork("10.0.2.0/26")]),
            {
                IPNetwork("10.0.1.0/24"): [IPAddress(f"10.0.1.{n}") for n in (5, 69, 133, 197)],
                IPNetwork("10.0.2.0/26"): [IPAddress("10.0.2.5")],
            },
            1,
        ),
        (lambda: ipam.workloads(), {("docker", "w")}, 2),
        (lambda: ipam.workloads("name299"), {("docker", "w")}, 2),
        (lambda: ipam.interfaces(), {"cali" + "e" * 11}, 2),
        (lambda: ipam.blocks(6, lambda block: block), ([], []), 1),
    ):
        store.requests = 0
        assert read() == expected and store.requests <= most


@pytest.mark.parametrize("modern", [False, True], ids=["v2", "v3"])
def test_blocks_that_cannot_be_read_are_named_and_do_not_hide_the_others(modern: bool) -> None:
    store = MemoryStore(modern)
    ipam = Ipam(store, "host1")
    ipam.assign(IPAddress("10.0.0.1"), Owner("docker.w", {"host": "host1", "orchestrator": "docker", "workload": "w"}))
    blocks = "/calico/ipam/v2/assignment/ipv4/block"
    for name in ("10.0.0.64-26", "nonsense", "10.0.0.128-26/x", "10.0.0.128-26/y"):
        store.put(f"{blocks}/{name}", "{}")
    store.put(f"{blocks}/10.0.0.1-26", store.entries[f"{blocks}/10.0.0.0-26"].value)
    valid, invalid = ipam.blocks(4, lambda block: block.cidr)
    assert valid == ["10.0.0.0/26"]
    names = ("10.0.0.1-26", "10.0.0.128-26", "10.0.0.64-26", "nonsense")
    assert sorted(error.key for error in invalid) == [f"{blocks}/{name}" for name in names]
    assert ipam.workloads() == {("docker", "w")}
    store.remove_tree(f"{blocks}/10.0.0.1-26")
    used = IPNetwork("10.0.0.0/26")
    assert ipam.used_in([used]) == {used: [IPAddress("10.0.0.1")]}, "invalid blocks elsewhere do not matter"
    with pytest.raises(InvalidValue, match=r"10\.0\.0\.64-26"):
        ipam.used_in([used, IPNetwork("10.0.0.64/26")])


def test_a_handle_that_names_blocks_without_end_is_invalid_before_any_is_read() -> None:
    store = MemoryStore()
    blocks = {f"10.{number >> 8}.{number & 255}.0/26": 1 for number in range(limits.BLOCKS + 1)}
    store.put("/calico/ipam/v2/handle/h", json.dumps({"id": "h", "block": blocks}))
    ipam_of = Ipam(store, "host1")
    with pytest.raises(InvalidValue, match="a handle can have 1000 blocks"):
        ipam_of.assign(IPAddress("10.0.0.1"), Owner("h", {}))
    assert not any("/assignment/" in key for key in store.entries)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("10.0.0.64-26", (4, 0x0A000040)),
        ("10.0.0.70-26", (4, 0x0A000040)),
        ("fd00--1:40-122", None),
        ("fd00::40-122", (6, 0xFD << 120 | 0x40)),
        ("::ffff:10.0.0.64-122", (6, 0xFFFF0A000040)),
        *((name, None) for name in ("", "-", "10.0.0.64", "10.0.0.64-", "10.0.0.64-24", "10.0.0.64-122", "10.0.64-26")),
        *(
            (name, None)
            for name in ("10.0.0.064-26", "10.0.0.64-٢٦", "10.0.0.\udc80-26", "10.0.0.0\0-26", "fd00::%1-122")
        ),
        ("fd00::40-" + "1" * 5000, None),
    ],
)
def test_the_name_of_a_block(name: str, expected: tuple[int, int] | None) -> None:
    assert parse_name(name) == expected
    if expected is not None:
        network = IPNetwork(block_cidr(*expected))
        assert (network.version, network.first, network.size) == (*expected, 64)
        assert str(network) == block_cidr(*expected)


def test_an_affinity_in_the_wrong_place_is_passed_over() -> None:
    store = MemoryStore(modern=True)
    wrong = "/calico/ipam/v2/host/host1/ipv4/block/fd00::40-122"
    store.create(wrong, "")
    ipam = Ipam(store, "host1")
    assert ipam.auto_assign(1, [Pool("10.0.0.0/24")], Owner("h1", {})) == [IPAddress("10.0.0.0")]
    assert ipam.release_affinities()
    assert [key for key in store.entries if "/host/host1/" in key] == [wrong]
