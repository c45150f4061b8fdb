"""The snapshots with which endpoints of other hosts are evaluated: those of these hosts' agents, and no larger."""

from __future__ import annotations

import json
from typing import Any

import pytest

from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.store import Entry
from calicoctl.desired.snapshot import Snapshot
from calicoctl.diagnose.enforcement import Enforcement
from tests.unit.memory_store import MemoryStore

ENDPOINT = {"name": "cali1", "mac": "02:00:00:00:00:01", "profile_ids": ["web"], "ipv4_nets": ["10.65.0.1/32"]}


def store(hosts: int, profiles: int = 1) -> MemoryStore:
    """Return a store with two endpoints on each host, host0 and so on, of which the second one is in conflict."""
    made = MemoryStore()
    values: dict[str, Any] = {
        "/calico/v1/Ready": "true",
        "/calico/v1/config/EndpointToHostServices": "drop",
        "/calico/v1/ipam/v4/pool/10.65.0.0-16": {"cidr": "10.65.0.0/16"},
        "/calico/bgp/v1/global/as_num": "64513",
        "/calico/bgp/v1/global/node_mesh": {"enabled": False},
        "/calico/bgp/v1/global/peer_v4/192.0.2.9": {"ip": "192.0.2.9", "as_num": "64512"},
        "/calico/bgp/v1/host/host1/peer_v4/192.0.2.8": {"ip": "192.0.2.8", "as_num": "64512"},
        "/calico/bgp/v1/host/host1/as_num": "64514",
        "/calico/bgp/v1/host/host1/macs": ["02:00:00:00:00:aa"],
        "/calico/v1/host/host1/config/DefaultEndpointToHostAction": "DROP",
        "/calico/v1/host/host1/workload/docker/broken/endpoint/ff": "no JSON",
        "/calico/v1/host/host2/bird_ip": "192.0.2.102",
    }
    for number in range(profiles):
        values[f"/calico/v1/policy/profile/web{number}/tags"] = ["web"]
        values[f"/calico/v1/policy/profile/web{number}/rules"] = {"id": f"web{number}"}
    for number in range(hosts):
        host = f"host{number}"
        values[f"/calico/bgp/v1/host/{host}/ip_addr_v4"] = f"10.0.{number // 256}.{number % 256}"
        values[f"/calico/ipam/v2/host/{host}/ipv4/block/10.65.{number}.0-26"] = ""
        for endpoint in ("01", "02"):
            values[f"/calico/v1/host/{host}/workload/docker/w/endpoint/{endpoint}"] = ENDPOINT
    for key, value in values.items():
        made.create(key, value if isinstance(value, str) else json.dumps(value))
    return made


def test_the_snapshot_for_a_host_is_that_of_its_agent() -> None:
    datastore = DatastoreClient(store(3), "host0")
    enforcement = Enforcement(datastore)
    for host in ("host0", "host1", "host2", "unknown"):
        agents = Snapshot(host)
        for directory in datastore.followed():
            agents.replace(directory, datastore.list_for_watch(directory)[0])
        ours = enforcement.seen_by(host)
        for name in ("endpoints", "local", "unusable", "pools", "host_action", "host_services"):
            assert getattr(ours, name) == getattr(agents, name), (host, name)
        for name in ("users", "blocks", "macs", "as_nums", "default_as_num", "mesh", "peers"):
            assert getattr(ours.topology, name) == getattr(agents.topology, name), (host, name)
        assert ours.topology.own(4) == agents.topology.own(4) and ours.topology.hosts() == agents.topology.hosts()
        assert {**enforcement.seen_by("host0").problems, **ours.problems}.items() >= agents.problems.items()
    assert enforcement.seen_by("host0").profiles == agents.profiles


def test_a_further_host_costs_what_it_has_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, a map of a thousand hosts would take an hour, and all memory."""
    interpreted: list[str] = []
    interpret = Snapshot._set

    def counted(self: Snapshot, key: str, entry: Entry | None) -> None:
        interpreted.append(key)
        interpret(self, key, entry)

    monkeypatch.setattr(Snapshot, "_set", counted)
    counts = []
    for hosts, profiles in ((5, 1), (50, 40)):
        enforcement = Enforcement(DatastoreClient(store(hosts, profiles), "host0"))
        interpreted.clear()
        enforcement.seen_by("host3")
        counts.append(len(interpreted))
    assert counts[0] == counts[1] < 10
