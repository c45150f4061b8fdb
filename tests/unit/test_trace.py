"""What `profile trace` says of packets between hosts: where each step happens, and what stands in the way."""

from __future__ import annotations

import json
from typing import Any

import pytest

from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.reserved import HostNetwork, Network
from calicoctl.diagnose.trace import Trace, trace
from calicoctl.errors import CalicoError
from calicoctl.workloads import host_network
from tests.unit.memory_store import MemoryStore

ALLOW: list[Any] = [{"action": "allow"}]
HOSTS = {"host1": "172.18.0.11", "host2": "172.18.0.12", "host3": "172.19.0.13"}
A, B, C = "192.168.0.1", "192.168.1.1", "192.168.2.1"
"""Addresses of workloads on host1, host2 and host3."""


class World:
    """Three hosts with a workload each, all with a profile that lets everything pass."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.revisions: dict[str, int] = {}
        self.pool()
        self.put("/calico/v1/policy/profile/open/tags", ["open"])
        self.put("/calico/v1/policy/profile/open/rules", {"inbound_rules": ALLOW, "outbound_rules": ALLOW})
        for (host, ip), address in zip(HOSTS.items(), (A, B, C)):
            self.put(f"/calico/bgp/v1/host/{host}/ip_addr_v4", ip)
            self.put(f"/calico/v1/host/{host}/bird_ip", ip)
            self.put(f"/calico/felix/v1/host/{host}/status", {"first_update": True})
            self.put(f"/calico/ipam/v2/host/{host}/ipv4/block/{address[:-1]}0-26", "")
            self.endpoint(host, address)

    def put(self, key: str, value: Any) -> int:
        text = value if isinstance(value, str) else json.dumps(value)
        before = self.store.get(key)
        entry = self.store.create(key, text) if before is None else self.store.update(before, text)
        return entry.revision

    def delete(self, key: str) -> None:
        entry = self.store.get(key)
        assert entry is not None
        self.store.delete(entry)

    def pool(self, **options: Any) -> None:
        self.put("/calico/v1/ipam/v4/pool/192.168.0.0-16", {"cidr": "192.168.0.0/16", **options})

    def endpoint(self, host: str, address: str, status: str = "up", **fields: Any) -> None:
        number = host[-1]
        key = f"{host}/workload/namespace/-var-run-netns-w{number}/endpoint/{number * 32}"
        record = {
            "state": "active",
            "name": f"cali{number}",
            "mac": f"02:00:00:00:00:0{number}",
            "profile_ids": ["open"],
            "ipv4_nets": [f"{address}/32"],
            **fields,
        }
        revision = self.put(f"/calico/v1/host/{key}", record)
        reason = {"reason": "no such interface"} if status != "up" else {}
        self.put(f"/calico/felix/v1/host/{key}", {"status": status, "index": revision, **reason})

    def trace(self, source: str, destination: str) -> Trace:
        return trace(DatastoreClient(self.store, "host1"), source, destination, "icmp", None)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """The world as host1 sees it, which is connected to 172.18.0.0/24."""
    network = HostNetwork(networks=(Network.of("172.18.0.0", 24, "eth0"),))
    monkeypatch.setattr(host_network, "read", lambda: network)
    monkeypatch.setattr(host_network, "own_addresses", lambda: {HOSTS["host1"], "10.9.9.1"})
    monkeypatch.setattr("calicoctl.diagnose.trace.is_routed", lambda address, pool: True)
    monkeypatch.setenv("DOCKER_HOST", "unix:///run/nowhere.sock")
    return World()


def problems(found: Trace) -> list[tuple[str, str, bool]]:
    return [(obstacle.host, obstacle.problem, obstacle.stops) for obstacle in found.obstacles]


def test_each_step_says_on_which_host_it_happens(world: World) -> None:
    found = world.trace("/var/run/netns/w1", "/var/run/netns/w2")
    assert [(decision.direction, decision.host) for decision in found.decisions] == [
        ("outbound", "host1"),
        ("inbound", "host2"),
    ]
    assert found.passes and problems(found) == []
    shown = found.to_dict()
    assert (shown["from"]["host"], shown["to"]["host"], shown["passes"]) == ("host1", "host2", True)
    assert shown["route"] == {
        "from_host": "host1",
        "to_host": "host2",
        "kind": "plain",
        "destination": "192.168.1.0/26",
        "via": "172.18.0.12",
        "pool": "192.168.0.0/16",
        "by": "bgp",
        "is_near": True,
    }
    there = world.trace(B, C).route
    assert there is not None and (there.from_host, there.to_host) == ("host2", "host3")


@pytest.mark.parametrize(
    ("mode", "source", "destination", "kind"),
    [
        ("never", A, B, "plain"),
        ("always", A, B, "vxlan"),
        ("cross-subnet", A, B, "plain"),
        ("cross-subnet", A, C, "vxlan"),
        ("cross-subnet", C, A, "vxlan"),
        ("cross-subnet", B, C, "plain or vxlan"),
    ],
)
def test_the_route_is_plain_or_a_tunnel_by_the_pool_and_the_networks(
    world: World, mode: str, source: str, destination: str, kind: str
) -> None:
    world.pool(vxlan_mode=mode)
    route = world.trace(source, destination).route
    assert route is not None and route.kind == kind


def test_an_address_outside_of_its_hosts_blocks_is_announced_singly(world: World) -> None:
    world.endpoint("host2", "192.168.0.9")
    route = world.trace(A, "192.168.0.9").route
    assert route is not None and (route.to_host, route.destination) == ("host2", "192.168.0.9/32")


def test_places_are_found_on_every_host(world: World) -> None:
    world.endpoint("host3", C, workload_name="web")
    for name in ("/var/run/netns/w3", "web", "3" * 32, "3" * 8, C):
        assert world.trace(A, name).destination.host == "host3", name
    host = world.trace("host2", A)
    assert (host.source.address, host.source.host, host.source.endpoint) == ("172.18.0.12", "host2", None)
    assert world.trace(A, "172.18.0.12").destination.host == "host2"
    assert world.trace(A, "10.9.9.1").destination.host == "host1", "an address of which the store knows nothing"
    assert world.trace(A, "203.0.113.1").destination.host is None
    key = "/calico/v1/host/host2/workload/namespace/-var-run-netns-w3/endpoint/" + "4" * 32
    world.put(key, {"mac": "02:00:00:00:00:04", "ipv4_nets": ["192.168.1.4/32"]})
    with pytest.raises(CalicoError, match=r"several hosts \(host2, host3\)"):
        world.trace(A, "/var/run/netns/w3")
    with pytest.raises(CalicoError, match="nowhere"):
        world.trace(A, "nowhere")


def test_a_host_reaches_workloads_without_rules_and_the_reverse_needs_outbound_ones(world: World) -> None:
    world.put("/calico/v1/policy/profile/open/rules", {"inbound_rules": [], "outbound_rules": ALLOW})
    assert not world.trace(A, B).allowed
    (decision,) = world.trace("host1", B).decisions
    assert (decision.allowed, decision.host, decision.why) == (True, "host2", "from host host1 everything passes")
    assert [decision.host for decision in world.trace(A, "host2").decisions] == ["host1"]
    assert not world.trace("10.9.9.1", B).allowed, "an address that the host is not registered with"
    assert world.trace("10.9.9.1", A).allowed


def test_masquerade_is_told_and_a_missing_one_is_as_well(world: World) -> None:
    outside = "203.0.113.1"
    assert problems(world.trace(A, outside)) == [
        ("host1", f"no pool masquerades {A}, so the network outside must have a route to it", False)
    ]
    world.pool(masquerade=True)
    found = world.trace(A, outside)
    assert (found.sent_from, problems(found)) == ("172.18.0.11", [])
    assert world.trace(A, B).sent_from is None, "never between pools"


def test_addresses_of_pools_that_no_endpoint_has(world: World) -> None:
    unused = "no endpoint has {}, and packets to unused addresses of its block {} are dropped"
    for host, address, block in (("host1", A, "192.168.0.0/26"), ("host2", B, "192.168.1.0/26")):
        found = world.trace(A, f"{address}0")
        assert problems(found) == [(host, unused.format(f"{address}0", block), True)] and not found.passes
    found = world.trace(A, "192.168.99.1")
    assert found.passes and "192.168.99.1 of pool 192.168.0.0/16, and no host announces it" in problems(found)[0][1]
    world.put("/calico/ipam/v2/host/host3/ipv4/block/172.18.0.64-26", "")
    world.put("/calico/v1/ipam/v4/pool/172.18.0.0-24", {"cidr": "172.18.0.0/24"})
    (found_problem,) = problems(world.trace(A, "172.18.0.70"))
    assert found_problem[0] == "host3" and not found_problem[2], "it may be a machine of host1's network"


def test_only_peers_reach_bgp(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: dict[str, Any] = {}
    monkeypatch.setattr("calicoctl.diagnose.trace.process.report", reports.get)
    client = DatastoreClient(world.store, "host1")
    ((host, problem, stops),) = problems(trace(client, A, "host2", "tcp", 179))
    assert (host, stops) == ("host2", False) and problem.startswith("if BIRD runs for its agent, only its BGP peers")
    assert not problems(trace(client, A, "host2", "tcp", 180)) and not problems(trace(client, A, "host2", "udp", 179))
    assert not problems(trace(client, A, "host1", "tcp", 179)), "no BIRD runs there"
    reports["host1"] = {"bird": {"listens": True}}
    found = trace(client, A, "host1", "tcp", 179)
    assert not found.passes and f"{A} is none of them" in problems(found)[0][1]
    world.put(f"/calico/bgp/v1/host/host1/peer_v4/{A}", {"ip": A, "as_num": "64512"})
    assert trace(client, A, "host1", "tcp", 179).passes


@pytest.mark.parametrize("option", [{}, {"vxlan_mode": "always"}])
def test_a_host_that_is_not_registered_cannot_be_reached(world: World, option: dict) -> None:
    world.pool(**option)
    world.delete("/calico/bgp/v1/host/host2/ip_addr_v4")
    world.delete("/calico/v1/host/host2/bird_ip")
    found = world.trace(A, B)
    assert found.allowed and not found.passes
    assert ("host2", "it is not registered, so no other host has a route to it", True) in problems(found)


def test_an_address_in_no_pool_is_accepted_by_no_other_host(world: World) -> None:
    world.endpoint("host2", "10.7.7.7")
    found = world.trace(A, "10.7.7.7")
    (problem,) = problems(found)
    assert problem[0] == "host2" and problem[1].startswith("10.7.7.7 is in no pool") and not found.passes
    # the answers of a workload, too, have to find their way
    assert not world.trace("10.7.7.7", A).passes


def test_agents_that_are_down_are_a_note_and_endpoints_in_error_stop_packets(world: World) -> None:
    world.endpoint("host2", B, "error")
    found = world.trace(A, B)
    assert problems(found) == [("host2", f"endpoint {'2' * 32} is error: no such interface", True)]
    assert not found.passes and found.allowed
    world.endpoint("host2", B)
    world.put(f"/calico/felix/v1/host/host2/workload/namespace/-var-run-netns-w2/endpoint/{'2' * 32}", "{}")
    assert problems(world.trace(A, B)) == [("host2", f"its agent has not set up endpoint {'2' * 32} yet", False)]
    world.delete("/calico/felix/v1/host/host2/status")
    found = world.trace(A, B)
    ((host, problem, stops),) = problems(found)
    assert (host, problem.partition(":")[0], stops) == ("host2", "its agent is down", False) and found.passes


def peer(world: World, ip: str, host: str | None = None) -> None:
    where = "global" if host is None else f"host/{host}"
    world.put(f"/calico/bgp/v1/{where}/peer_v4/{ip}", {"ip": ip, "as_num": "64512"})


def test_without_the_mesh_hosts_need_peers_in_common(world: World) -> None:
    world.put("/calico/bgp/v1/global/node_mesh", {"enabled": False})
    found = world.trace(A, B)
    assert not found.passes and [problem[0] for problem in problems(found)] == ["host1", "host2"]
    assert "mesh is off, and it has no IPv4 peer" in problems(found)[0][1]
    peer(world, "172.18.0.254", "host1")
    assert [problem[0] for problem in problems(world.trace(A, B))] == ["host2"]
    peer(world, "172.18.0.253", "host2")
    found = world.trace(A, B)
    ((host, problem, stops),) = problems(found)
    assert (host, stops) == ("host1", False) and problem.endswith("172.18.0.254 and 172.18.0.253 must exchange routes")
    peer(world, "172.18.0.254", "host2")
    assert problems(world.trace(A, B)) == []
    assert not world.trace(A, C).passes
    peer(world, "172.18.0.250")
    assert world.trace(A, C).passes, "a global peer is everybody's"


def test_hosts_that_peer_with_each_other_need_no_mesh_and_tunnels_need_no_bgp(world: World) -> None:
    world.put("/calico/bgp/v1/global/node_mesh", {"enabled": False})
    peer(world, HOSTS["host2"], "host1")
    assert not world.trace(A, B).passes, "one side alone makes no session"
    peer(world, HOSTS["host1"], "host2")
    assert problems(world.trace(A, B)) == []
    assert not world.trace(A, C).passes
    for mode in ("cross-subnet", "always"):
        world.pool(vxlan_mode=mode)
        assert problems(world.trace(A, C)) == problems(world.trace(B, A)) == []


def test_a_router_between_hosts_must_know_plain_pools(world: World) -> None:
    ((host, problem, stops),) = problems(world.trace(A, C))
    assert host == "host1" and "a router is between it and host3" in problem and not stops
    assert problems(world.trace(B, C)) == [], "host1 does not know the networks of the others"


def test_this_hosts_kernel_is_asked_for_the_route(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calicoctl.diagnose.trace.is_routed", lambda address, pool: address != B)
    expected = [("host1", f"its kernel has no route to {B}: see what 'calicoctl status' says of BGP", True)]
    assert problems(world.trace(A, B)) == problems(world.trace(B, A)) == expected
    assert not world.trace(A, B).passes
    assert problems(world.trace(B, C)) == [], "the kernels of other hosts cannot be read"
    world.pool(vxlan_mode="always")
    assert problems(world.trace(A, B))[0][1].endswith("'calicoctl status' says")
    world.delete("/calico/bgp/v1/host/host2/ip_addr_v4")
    world.delete("/calico/v1/host/host2/bird_ip")
    assert len(problems(world.trace(A, B))) == 1, "where the store has the reason"


def test_hosts_without_a_common_ip_version_have_no_tunnel(world: World) -> None:
    world.put("/calico/bgp/v1/host/host2/ip_addr_v4", "")
    world.put("/calico/v1/host/host2/bird_ip", "")
    world.put("/calico/bgp/v1/host/host2/ip_addr_v6", "fd00:18::12")
    assert problems(world.trace(A, B))[0][1].startswith("it is registered without an IPv4 address")
    world.pool(vxlan_mode="always")
    assert not world.trace(A, B).passes
    world.put("/calico/bgp/v1/host/host1/ip_addr_v6", "fd00:18::11")
    found = world.trace(A, B)
    assert found.passes and found.route is not None and found.route.via == "fd00:18::12"
