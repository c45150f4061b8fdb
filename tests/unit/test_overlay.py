"""The overlay as one host is to see it: tunnels, and how the workloads of other hosts are reached."""

from __future__ import annotations

import pytest

from calicoctl.addresses import link_local
from calicoctl.datastore.reserved import HostNetwork, InterfaceAddress
from calicoctl.desired import overlay
from calicoctl.desired.overlay import Hop, Overlay, macs, tunnels
from tests.unit.snapshots import World

POOL, POOL6 = "10.65.0.0/16", "fd65::/64"


class OverlayWorld(World):
    """Three hosts with both IP versions: host1, this one, and host2 are in one network, host3 is in another."""

    def __init__(self) -> None:
        super().__init__()
        self.overlay = Overlay(self.snapshot)
        self.host(1, "172.18.0.1", "fd00:18::1")
        self.host(2, "172.18.0.2", "fd00:18::2")
        self.host(3, "172.19.0.3", "fd00:19::3")
        self.connect("172.18.0.1/24", "fd00:18::1/64")
        self.pool(POOL, "always")

    def host(self, number: int, ipv4: str = "", ipv6: str = "") -> None:
        for version, address in ((4, ipv4), (6, ipv6)):
            self.store.put(f"/calico/bgp/v1/host/host{number}/ip_addr_v{version}", address)

    def connect(self, *addresses: str) -> None:
        """Give this host addresses, with their networks, on eth0."""
        parts = [address.split("/") for address in addresses]
        found = [InterfaceAddress(address, address, int(length), "eth0") for address, length in parts]
        self.snapshot.set_network(HostNetwork.of(found))

    def pool(self, cidr: str, mode: str | None) -> None:
        version = 6 if ":" in cidr else 4
        value = {"cidr": cidr} if mode is None else {"cidr": cidr, "vxlan_mode": mode}
        self.store.put(f"/calico/v1/ipam/v{version}/pool/{cidr.replace('/', '-')}", value)

    def block(self, number: int, cidr: str, there: bool = True) -> None:
        version = 6 if ":" in cidr else 4
        key = f"/calico/ipam/v2/host/host{number}/ipv{version}/block/{cidr.replace('/', '-')}"
        self.store.put(key, "" if there else None)

    def update(self) -> bool:
        return self.overlay.update(self.snapshot.take_dirty())

    def routes(self) -> dict[str, str]:
        """Return the routes by CIDR in words: the name of the host at the other end, and how it is reached."""
        self.update()
        return {cidr: self.words(hop) for cidr, hop in self.overlay.routes().items()}

    def words(self, hop: Hop | None) -> str:
        if hop is None:
            return "blackhole"
        if hop.tunnel is None:
            return f"{self.snapshot.topology.users[hop.gateway]} directly on {hop.interface}"
        tunnel = tunnels(self.snapshot.topology)[hop.tunnel]
        (address,) = [address for mac, address in tunnel.peers.items() if link_local(mac) == hop.gateway]
        return f"{self.snapshot.topology.users[address]} by IPv{hop.tunnel}"


@pytest.fixture
def world() -> OverlayWorld:
    return OverlayWorld()


def test_macs_follow_from_the_address_and_are_all_different(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = [f"172.18.0.{number}" for number in range(1, 100)]
    found = macs(addresses)
    assert found == macs(reversed(addresses)) and len(set(found.values())) == len(addresses)
    assert all(int(mac[:2], 16) & 3 == 2 for mac in found.values()), "locally administered, unicast"
    assert found["172.18.0.1"] == macs(["172.18.0.1"])["172.18.0.1"], "whatever other hosts there are"
    monkeypatch.setattr(overlay, "_digest", lambda address, attempt: f"02:00:00:00:00:0{attempt}")
    assert macs(["b", "c", "a"]) == {"a": "02:00:00:00:00:00", "b": "02:00:00:00:00:01", "c": "02:00:00:00:00:02"}


def test_tunnels_are_over_ipv4_if_both_hosts_have_it(world: OverlayWorld) -> None:
    (tunnel,) = tunnels(world.snapshot.topology).values()
    assert (tunnel.version, tunnel.local) == (4, "172.18.0.1") and tunnel.mac not in tunnel.peers
    assert sorted(tunnel.peers.values()) == ["172.18.0.2", "172.19.0.3"]
    world.host(3, "", "fd00:19::3")
    both = tunnels(world.snapshot.topology)
    assert {version: list(tunnel.peers.values()) for version, tunnel in both.items()} == {
        4: ["172.18.0.2"],
        6: ["fd00:19::3"],
    }
    world.host(1, "", "fd00:18::1")
    (tunnel,) = tunnels(world.snapshot.topology).values()
    assert tunnel.version == 6 and sorted(tunnel.peers.values()) == ["fd00:18::2", "fd00:19::3"]
    world.host(1)
    assert tunnels(world.snapshot.topology) == {}, "a host without an address"


def test_both_ends_agree_on_the_macs(world: OverlayWorld) -> None:
    other = OverlayWorld()
    other.snapshot.topology.host = "host3"
    here, there = tunnels(world.snapshot.topology)[4], tunnels(other.snapshot.topology)[4]
    assert here.peers[there.mac] == "172.19.0.3" and there.peers[here.mac] == "172.18.0.1"


def test_blocks_of_other_hosts_are_reached_through_the_tunnel(world: OverlayWorld) -> None:
    world.pool(POOL6, "always")
    world.block(1, "10.65.0.0/26")
    world.block(2, "10.65.0.64/26")
    world.block(3, "10.65.0.128/26")
    world.block(3, "fd65::40/122")
    world.block(3, "10.66.0.0/26")
    assert world.routes() == {
        "10.65.0.0/26": "blackhole",
        "10.65.0.64/26": "host2 by IPv4",
        "10.65.0.128/26": "host3 by IPv4",
        "fd65::40/122": "host3 by IPv4",
    }
    world.host(3, "", "fd00:19::3")
    assert world.routes()["10.65.0.128/26"] == world.routes()["fd65::40/122"] == "host3 by IPv6"
    world.host(3)
    world.block(2, "10.65.0.64/26", there=False)
    assert world.routes() == {"10.65.0.0/26": "blackhole"}


def test_cross_subnet_is_told_by_the_networks_that_this_host_is_connected_to(world: OverlayWorld) -> None:
    world.pool(POOL, "cross-subnet")
    world.pool(POOL6, "cross-subnet")
    for number in (2, 3):
        world.block(number, f"10.65.0.{64 * number}/26")
        world.block(number, f"fd65::{number}00/122")
    assert world.routes() == {
        "10.65.0.128/26": "host2 directly on eth0",
        "10.65.0.192/26": "host3 by IPv4",
        "fd65::200/122": "host2 directly on eth0",
        "fd65::300/122": "host3 by IPv4",
    }
    world.connect("172.18.0.1/16", "fd00:18::1/128")
    assert world.routes()["fd65::200/122"] == "host2 by IPv4"
    world.connect("172.18.0.1/8")
    assert world.routes()["10.65.0.192/26"] == "host3 directly on eth0"


def test_plain_pools_have_no_routes_here(world: OverlayWorld) -> None:
    world.pool(POOL, None)
    world.block(1, "10.65.0.0/26")
    world.block(2, "10.65.0.64/26")
    assert world.routes() == {} and not world.overlay.is_needed
    assert world.overlay.is_plain("10.65.0.64/26") and not world.overlay.is_plain("10.66.0.0/26")


def test_borrowed_addresses_are_routed_one_by_one(world: OverlayWorld) -> None:
    world.block(1, "10.65.0.0/26")
    world.block(2, "10.65.0.64/26")
    world.routes()
    world.store.endpoint(1, "10.65.0.65", "10.65.0.5", "10.65.9.9", "10.66.0.1", host="host2")
    world.store.endpoint(2, "10.65.0.66", host="host3")
    assert world.routes() == {
        "10.65.0.0/26": "blackhole",
        "10.65.0.64/26": "host2 by IPv4",
        "10.65.0.5/32": "host2 by IPv4",
        "10.65.9.9/32": "host2 by IPv4",
        "10.65.0.66/32": "host3 by IPv4",
    }
    world.block(2, "10.65.9.0/26")
    assert "10.65.9.9/32" not in world.routes()
    world.store.endpoint(1, host="host2")
    world.store.endpoint(2, "10.65.0.66", host="host3", state="inactive")
    assert set(world.routes()) == {"10.65.0.0/26", "10.65.0.64/26", "10.65.9.0/26"}


def test_an_endpoint_of_this_host_precedes_one_with_the_same_borrowed_address(world: OverlayWorld) -> None:
    world.store.endpoint(1, "10.65.9.9", host="host2")
    assert "10.65.9.9/32" in world.routes()
    world.store.endpoint(2, "10.65.9.9")
    assert world.update() and "10.65.9.9/32" not in world.routes()
    world.store.endpoint(2)
    assert world.update() and "10.65.9.9/32" in world.routes()


def test_changes_of_endpoints_in_blocks_of_their_hosts_change_nothing(world: OverlayWorld) -> None:
    world.block(2, "10.65.0.64/26")
    assert world.update()
    world.store.endpoint(1, "10.65.0.65", host="host2")
    world.store.endpoint(2, "10.65.1.1")
    assert not world.update()
    world.store.endpoint(1, "10.65.1.65", host="host2")
    assert world.update() and not world.update()


@pytest.mark.parametrize("address", ["10.65.0.65/24", "10.65.0.65/32"])
def test_a_block_that_overlaps_this_hosts_network_is_not_routed_as_a_whole(world: OverlayWorld, address: str) -> None:
    world.connect("172.18.0.1/24", address)
    world.block(1, "10.65.0.0/26")
    world.block(2, "10.65.0.64/26")
    world.block(2, "10.65.1.0/26")
    world.store.endpoint(1, "10.65.0.66", "10.65.0.65", host="host2")
    own = {"10.65.0.0/26": "blackhole"} if address.endswith("/32") else {}
    assert world.routes() == {**own, "10.65.1.0/26": "host2 by IPv4", "10.65.0.66/32": "host2 by IPv4"}


def test_a_block_with_the_address_of_a_host_is_not_routed_as_a_whole(world: OverlayWorld) -> None:
    """The packets of the tunnel to that host would go through the tunnel."""
    world.host(3, "10.65.0.67")
    world.block(2, "10.65.0.64/26")
    assert world.routes() == {}
    world.store.endpoint(1, "10.65.0.67", "10.65.0.68", host="host2")
    assert world.routes() == {"10.65.0.68/32": "host2 by IPv4"}


def test_a_block_that_two_hosts_claim_is_this_hosts(world: OverlayWorld) -> None:
    world.block(2, "10.65.0.64/26")
    world.block(3, "10.65.0.64/26")
    assert world.routes() == {"10.65.0.64/26": "host2 by IPv4"}
    world.block(1, "10.65.0.64/26")
    world.store.endpoint(1, "10.65.0.65", host="host3")
    assert world.routes() == {"10.65.0.64/26": "blackhole", "10.65.0.65/32": "host3 by IPv4"}


@pytest.mark.parametrize("mode", ["always", "cross-subnet"])
def test_a_host_with_an_address_of_this_one_is_no_other_host(world: OverlayWorld, mode: str) -> None:
    world.pool(POOL, mode)
    world.connect("172.18.0.1/24", "172.18.0.2/24")
    world.block(2, "10.65.0.64/26")
    assert world.routes() == {}


def test_hosts_without_a_common_ip_version_are_named(world: OverlayWorld) -> None:
    world.host(1, "172.18.0.1")
    world.host(3, "", "fd00:19::3")
    world.block(3, "10.65.0.64/26")
    assert world.routes() == {} and world.overlay.out_of_reach() == ["host3"]
    world.host(3)
    world.update()
    assert world.overlay.out_of_reach() == [], "it is not registered"
