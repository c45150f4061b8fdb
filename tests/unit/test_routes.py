"""Which blocks and addresses a host announces, and what others' routes must leave alone."""

from __future__ import annotations

import pytest

from calicoctl.datastore.reserved import HostNetwork, InterfaceAddress, Network, Servers
from calicoctl.desired.routes import Announced, Guarded, Surroundings, announced, guarded
from calicoctl.desired.snapshot import Snapshot
from tests.unit.snapshots import HOST, Store

IPAM = "/calico/ipam/v2/host"
HOME = InterfaceAddress("172.18.0.11", "172.18.0.11", 24, "eth0")


@pytest.fixture
def store() -> Store:
    made = Store(Snapshot(HOST))
    made.put("/calico/v1/ipam/v4/pool/192.168.0.0-16", {"cidr": "192.168.0.0/16"})
    made.put("/calico/v1/ipam/v6/pool/fd80::-64", {"cidr": "fd80::/64"})
    made.put(f"/calico/bgp/v1/host/{HOST}/ip_addr_v4", "172.18.0.11")
    for host, block in ((HOST, "192.168.1.64-26"), (HOST, "192.168.1.0-26"), ("host2", "192.168.2.0-26")):
        made.put(f"{IPAM}/{host}/ipv4/block/{block}", "")
    made.put(f"{IPAM}/{HOST}/ipv6/block/fd80::40-122", "")
    made.snapshot.set_network(HostNetwork.of([HOME], [("172.18.0.1", "eth0")]))
    return made


def with_network(store: Store, *addresses: InterfaceAddress, **more) -> Snapshot:  # type: ignore[no-untyped-def]
    store.snapshot.set_network(HostNetwork.of([HOME, *addresses], **more))
    return store.snapshot


def test_own_blocks_are_announced_whole_and_borrowed_addresses_singly(store: Store) -> None:
    store.endpoint(1, "192.168.1.1", "fd80::41")
    store.endpoint(2, "192.168.2.9", "192.168.2.7", "fd80::9")
    store.endpoint(3, "10.0.0.1", "192.168.1.70")
    store.endpoint(4, "192.168.2.8", host="host2")
    assert announced(store.snapshot, 4) == Announced(
        ("192.168.1.0/26", "192.168.1.64/26"), ("192.168.2.7", "192.168.2.9")
    )
    assert announced(store.snapshot, 6) == Announced(("fd80::40/122",), ("fd80::9",))


def test_an_endpoint_that_is_not_active_has_no_route(store: Store) -> None:
    store.endpoint(2, "192.168.2.7", state="inactive")
    assert announced(store.snapshot, 4).addresses == ()


def test_only_pools_without_an_overlay_count(store: Store) -> None:
    store.endpoint(2, "192.168.2.7")
    store.put("/calico/v1/ipam/v4/pool/192.168.0.0-16", {"cidr": "192.168.0.0/16", "vxlan_mode": "cross-subnet"})
    assert announced(store.snapshot, 4) == Announced()
    assert announced(store.snapshot, 6).blocks == ("fd80::40/122",)
    store.put("/calico/v1/ipam/v4/pool/192.168.0.0-16", None)
    assert announced(store.snapshot, 4) == Announced()


def test_a_block_that_is_larger_than_its_pool_is_announced_by_its_addresses(store: Store) -> None:
    store.put("/calico/v1/ipam/v4/pool/192.168.0.0-16", {"cidr": "192.168.1.0/28"})
    store.endpoint(1, "192.168.1.1", "192.168.1.20")
    assert announced(store.snapshot, 4) == Announced((), ("192.168.1.1",))


def split(snapshot: Snapshot) -> dict[str, str]:
    """Return the blocks that are not announced whole, after checking that their addresses are announced."""
    found = announced(snapshot, 4)
    assert set(found.blocks) | {block for block, _ in found.split} == {"192.168.1.0/26", "192.168.1.64/26"}
    assert found.addresses == (("192.168.1.1",) if "192.168.1.0/26" in dict(found.split) else ())
    return dict(found.split)


@pytest.mark.parametrize(
    ("address", "length"), [("192.168.1.30", 24), ("192.168.1.30", 26), ("192.168.1.17", 28), ("192.168.0.1", 16)]
)
def test_a_block_that_overlaps_a_connected_network(store: Store, address: str, length: int) -> None:
    store.endpoint(1, "192.168.1.1")
    found = split(with_network(store, InterfaceAddress(address, address, length, "eth1")))
    assert "which this host is connected to" in found["192.168.1.0/26"]
    assert ("192.168.1.64/26" in found) == (length <= 24)


def test_a_block_with_an_address_of_the_hosts(store: Store) -> None:
    store.endpoint(1, "192.168.1.1")
    assert split(store.snapshot) == {}
    found = split(with_network(store, InterfaceAddress("192.168.1.30", "192.168.1.30", 32, "lo")))
    assert found == {"192.168.1.0/26": "192.168.1.30, this host's own address"}
    found = split(with_network(store, gateways=[("192.168.1.63", "eth0")]))
    assert found == {"192.168.1.0/26": "192.168.1.63, a gateway of this host"}
    found = split(with_network(store, local=[("192.168.1.32", 28)]))
    assert list(found) == ["192.168.1.0/26"]
    with_network(store)
    store.put("/calico/bgp/v1/host/host9/ip_addr_v4", "192.168.1.0")
    assert split(store.snapshot) == {"192.168.1.0/26": "192.168.1.0, the address of host host9"}


@pytest.mark.parametrize(
    ("route", "overlaps"),
    [
        (("192.168.1.0", 24), True),
        (("192.168.1.0", 26), True),
        (("192.168.1.9", 32), True),
        (("192.168.0.0", 17), True),
        (("192.168.0.0", 16), False),  # the pool itself
        (("192.0.0.0", 8), False),  # and what is around it
        (("192.168.1.128", 25), False),
    ],
)
def test_a_block_that_overlaps_a_route(store: Store, route: tuple[str, int], overlaps: bool) -> None:
    store.endpoint(1, "192.168.1.1")
    assert ("192.168.1.0/26" in split(with_network(store, routes=[route]))) == overlaps


def test_what_a_routing_daemon_has_learned_is_no_overlap(store: Store) -> None:
    """It would come and go with the block's own route."""
    assert split(with_network(store, learned=[("192.168.1.9", "eth0")])) == {}
    assert store.snapshot.network.has("192.168.1.9") is not None, "but no workload may have the address"


def test_others_routes_leave_alone_what_this_host_needs(store: Store) -> None:
    assert guarded(store.snapshot, 4) == Guarded()
    store.put("/calico/bgp/v1/host/host2/ip_addr_v4", "192.168.7.1")
    snapshot = with_network(
        store,
        InterfaceAddress("192.168.9.1", "192.168.9.1", 24, "eth1"),
        InterfaceAddress("10.0.0.1", "10.0.0.1", 8, "eth2"),
        InterfaceAddress("fd80::5", "fd80::5", 120, "eth1"),
        gateways=[("192.168.8.1", "eth0"), ("192.168.8.2", "cali1")],
    )
    assert guarded(snapshot, 4) == Guarded(("192.168.9.0/24",), ("192.168.7.1", "192.168.8.1", "192.168.9.1"))
    assert guarded(snapshot, 6) == Guarded(("fd80::/120",), ("fd80::5",))


def test_a_block_with_a_server_of_this_host_is_announced_by_single_addresses(store: Store) -> None:
    store.endpoint(1, "192.168.1.1", "192.168.1.70")
    servers = Servers(frozenset(["192.168.1.9", "192.168.2.9"]), frozenset(["192.168.1.99", "192.168.2.99"]))
    store.snapshot.set_network(HostNetwork.of([HOME]).with_servers(servers))
    found = announced(store.snapshot, 4)
    assert (found.blocks, found.addresses) == ((), ("192.168.1.1", "192.168.1.70"))
    assert [why for _, why in found.split] == [
        "192.168.1.9, a member of the etcd that this host uses",
        "192.168.1.99, a DNS server of this host",
    ]
    # routes of other hosts must not lead to a member; a DNS server may well be a workload of theirs
    assert guarded(store.snapshot, 4).addresses == ("192.168.1.9", "192.168.2.9")
    around = Surroundings(store.snapshot, 4)
    assert around.vital(Network.parse("192.168.2.0/26")) is not None
    assert around.vital(Network.parse("192.168.2.64/26")) is None
