"""The network between the hosts, key by key."""

from __future__ import annotations

import pytest

from calicoctl.desired.snapshot import Snapshot
from tests.unit.snapshots import Store

BGP, IPAM = "/calico/bgp/v1", "/calico/ipam/v2/host"


@pytest.fixture
def store() -> Store:
    return Store(Snapshot("host1"))


def test_hosts_and_their_addresses(store: Store) -> None:
    topology = store.snapshot.topology
    store.put(f"{BGP}/host/host1/ip_addr_v4", "172.18.0.11")
    store.put(f"{BGP}/host/host1/ip_addr_v6", "fd00:18:0::11")
    store.put(f"{BGP}/host/host2/ip_addr_v4", "")
    store.put(f"{BGP}/host/host2/ip_addr_v6", "fd00:18::12")
    store.put("/calico/v1/host/old/bird_ip", "172.18.0.13")
    assert (topology.own(4), topology.own(6)) == ("172.18.0.11", "fd00:18::11")
    assert (topology.address("host2", 4), topology.address("host2", 6)) == (None, "fd00:18::12")
    assert topology.hosts() == {"host1", "host2"}, "a host with bird_ip alone has no BGP address"
    assert topology.users["172.18.0.13"] == "old"
    store.put(f"{BGP}/host/host2/ip_addr_v6", "not one")
    assert topology.hosts() == {"host1"} and f"{BGP}/host/host2/ip_addr_v6" in store.snapshot.problems
    store.put(f"{BGP}/host/host2", None)
    assert store.snapshot.problems == {}


def test_blocks(store: Store) -> None:
    topology = store.snapshot.topology
    store.put(f"{IPAM}/host1/ipv4/block/192.168.1.0-26", "")
    store.put(f"{IPAM}/host1/ipv6/block/fd80::40-122", "")
    store.put(f"{IPAM}/host2/ipv4/block/192.168.1.64-26", "")
    assert {host: set(blocks) for host, blocks in topology.blocks.items()} == {
        "host1": {"192.168.1.0/26", "fd80::40/122"},
        "host2": {"192.168.1.64/26"},
    }
    found = topology.block_of("host1", "192.168.1.63")
    assert found is not None and found.cidr == "192.168.1.0/26"
    assert topology.block_of("host1", "192.168.1.64") is None and topology.block_of("host1", "fd80::7f") is not None
    for name in ("192.168.1.0-33", "192.168.1.0", "192.168.0.0-17", "192.168.1.5-26", "fe80::-122", "x-26"):
        store.put(f"{IPAM}/host1/ipv4/block/{name}", "")
        assert f"{IPAM}/host1/ipv4/block/{name}" in store.snapshot.problems
        store.put(f"{IPAM}/host1/ipv4/block/{name}", None)
    store.put(f"{IPAM}/host2", None)
    assert set(topology.blocks) == {"host1"} and store.snapshot.problems == {}


def test_bgp_settings(store: Store) -> None:
    topology = store.snapshot.topology
    assert (topology.as_num("host1"), topology.mesh, topology.hold_time) == ("64511", True, 30)
    store.put(f"{BGP}/global/as_num", "64600")
    store.put(f"{BGP}/host/host2/as_num", "1.1")
    store.put(f"{BGP}/global/node_mesh", {"enabled": False})
    store.put(f"{BGP}/global/HoldTime", "9")
    store.put(f"{BGP}/global/loglevel", "info")
    assert (topology.as_num("host1"), topology.as_num("host2")) == ("64600", "65537")
    assert (topology.mesh, topology.hold_time, topology.log_level) == (False, 9, "info")
    store.put(f"{BGP}/host/host1/loglevel", "debug")
    store.put(f"{BGP}/host/host2/loglevel", "none")
    assert topology.log_level == "debug", "this host's own goes first"
    store.put(f"{BGP}/host/host1/loglevel", None)
    assert topology.log_level == "info"
    invalid = {"global/as_num": "0", "global/node_mesh": "on", "global/HoldTime": "2", "global/loglevel": "loud"}
    for key, value in invalid.items():
        store.put(f"{BGP}/{key}", value)
        assert f"{BGP}/{key}" in store.snapshot.problems
    assert (topology.as_num("host1"), topology.mesh, topology.hold_time) == ("64511", True, 30)
    assert topology.log_level == "none"


def test_peers_are_the_global_ones_and_those_of_this_host(store: Store) -> None:
    topology = store.snapshot.topology
    for place in ("global/peer_v4/172.18.0.254", "host/host1/peer_v6/fd00:18::fe", "host/host2/peer_v4/10.0.0.1"):
        store.put(f"{BGP}/{place}", {"ip": place.rpartition("/")[2], "as_num": "64512"})
    assert {peer.ip for peer in topology.peers.values()} == {"172.18.0.254", "fd00:18::fe"}
    store.put(f"{BGP}/global/peer_v4/172.18.0.254", {"ip": "224.0.0.1", "as_num": "64512"})
    assert {peer.ip for peer in topology.peers.values()} == {"fd00:18::fe"} and len(store.snapshot.problems) == 1
    store.put(f"{BGP}/global/peer_v4/172.18.0.254", {"ip": "172.18.0.254", "as_num": 64512.0})
    assert len(topology.peers) == 1 and len(store.snapshot.problems) == 1, "it is not 64512 times 65536"
    assert topology.peers_without_session(6) == [], "the host is not registered"
    store.put(f"{BGP}/host/host1/ip_addr_v4", "172.18.0.11")
    assert topology.peers_without_session(6) == ["fd00:18::fe"], "a global peer may be for other hosts"
    assert topology.own_peers() == []
    for place in ("global", "host/host1"):
        store.put(f"{BGP}/{place}/peer_v4/172.18.0.11", {"ip": "172.18.0.11", "as_num": "64512"})
        assert topology.own_peers() == ([] if place == "global" else ["172.18.0.11"])
        assert topology.peers_without_session(4) == []
    store.put(f"{BGP}/host/host1/peer_v4/172.18.0.11", None)
    store.put(f"{BGP}/global/peer_v4/172.18.0.11", None)
    store.put(f"{BGP}/host/host1/peer_v4/172.18.0.1", {"ip": "172.18.0.1", "as_num": "64512"})
    store.put(f"{BGP}/host/host1/ip_addr_v6", "fd00:18::11")
    store.put(f"{BGP}/host/host1/ip_addr_v4", None)
    assert topology.peers_without_session(4) == ["172.18.0.1"]


def test_an_invalid_address_is_called_what_it_is(store: Store) -> None:
    for place, what in (("global/peer_v4/127.0.0.1", "a BGP peer"), ("host/host2/ip_addr_v4", "a host")):
        store.put(f"{BGP}/{place}", {"ip": "127.0.0.1", "as_num": "64512"} if "peer" in place else "127.0.0.1")
        assert f"127.0.0.1 is not an address that {what} can have" in store.snapshot.problems[f"{BGP}/{place}"]


def test_macs(store: Store) -> None:
    topology = store.snapshot.topology
    store.put(f"{BGP}/host/host2/macs", ["02:00:00:00:00:0A"])
    assert topology.macs == {"host2": frozenset({"02:00:00:00:00:0a"})}
    store.put(f"{BGP}/host/host2/macs", ["x drop"])
    assert topology.macs == {} and len(store.snapshot.problems) == 1


def test_what_changes_the_network_is_marked(store: Store) -> None:
    for key, value in (
        (f"{BGP}/host/host2/ip_addr_v4", "172.18.0.12"),
        (f"{IPAM}/host2/ipv4/block/192.168.1.0-26", ""),
        (f"{BGP}/global/node_mesh", {"enabled": False}),
    ):
        store.snapshot.take_dirty()
        store.put(key, value)
        dirty = store.snapshot.take_dirty()
        assert dirty.topology and not dirty.settings
    store.put(f"{BGP}/host/host1/ip_addr_v6", "fd00:18::11")
    assert store.snapshot.take_dirty().settings, "whether this host forwards IPv6 follows from it"
