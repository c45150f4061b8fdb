"""What a host tells of the others, and what is left of a host that dies: in the store, and in the others' kernels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.fabric import FabricHost, fabric
from tests.system.support import Etcd, Host, wait_for

ADDRESSES = ("192.168.0.1", "192.168.1.1", "192.168.2.1")


@pytest.fixture
def three(bare_host: Host, tmp_path: Path) -> Iterator[list[FabricHost]]:
    """Three hosts, the last one behind a router, with a workload each, which may all reach each other."""
    etcd = Etcd(tmp_path / "etcd")
    etcd.start(None, f"--listen-client-urls=http://0.0.0.0:{etcd.port}", f"--advertise-client-urls={etcd.url}")
    etcd.await_ready()
    with fabric(etcd, 0, 0, 1) as hosts:
        for host in hosts:
            host.start_agent()
        hosts[0].ctl("profile", "add", "web")
        hosts[0].ctl("config", "bgp", "HoldTime", "3")
        for host, address in zip(hosts, ADDRESSES):
            host.add("w", address)
            host.set_profiles("w", "web")
        yield hosts
    etcd.stop(9)


def trace(host: FabricHost, *words: str) -> dict:
    return json.loads(host.ctl("profile", "trace", *words, "--output=json", status=None).out)


def notes(found: dict) -> list[tuple[str, bool]]:
    return [(obstacle["host"], obstacle["stops"]) for obstacle in found["obstacles"]]


def routed(host: FabricHost) -> set[str]:
    return {route["dst"] for route in host.routes("proto", "bird")}


def shown(host: FabricHost) -> dict[str, tuple[str, int, int]]:
    """Return for each host its agent's state, and its number of endpoints that are up, and whose state is unknown."""
    hosts = json.loads(host.ctl("node", "show", "--output=json").out)
    return {one["name"]: (one["agent"], one["endpoints"]["up"], one["endpoints"]["unknown"]) for one in hosts}


def test_what_is_told_of_other_hosts_and_what_is_left_of_one_that_dies(three: list[FabricHost]) -> None:
    one, two, far = three
    mine, next_door, beyond = ADDRESSES
    wait_for(lambda: one.reaches("w", next_door) and beyond[:-1] + "0/26" in routed(one), one.log(), 20)
    wait_for(lambda: shown(far) == dict.fromkeys(("host11", "host12", "host13"), ("up", 1, 0)), far.log())

    # traces, which the packets confirm
    found = trace(one, mine, next_door, "icmp")
    assert found["passes"] and notes(found) == [] and [d["host"] for d in found["decisions"]] == ["host11", "host12"]
    found = trace(one, mine, beyond, "icmp")
    assert notes(found) == [("host11", False)] and not one.reaches("w", beyond), "the router knows no pools"
    one.ctl("pool", "add", "192.168.0.0/16", "--vxlan=cross-subnet")
    wait_for(lambda: one.reaches("w", beyond), far.log(), 10)
    routes = [trace(one, mine, address, "icmp")["route"]["kind"] for address in (next_door, beyond)]
    assert routes == ["plain", "vxlan"] and notes(trace(one, mine, beyond, "icmp")) == []
    text = one.ctl("profile", "trace", "host13", mine, "icmp").out
    assert text.splitlines()[0].startswith("From host13 to host11: by a plain route, or through VXLAN") or (
        text.splitlines()[0] == "From host13 to host11: through VXLAN to 192.168.0.0/26 via 172.18.0.11"
    )
    one.ctl("pool", "add", "192.168.0.0/16")
    wait_for(lambda: next_door[:-1] + "0/26" in routed(one), one.log(), 10)

    # a host dies
    two.unplug()
    two.end()
    said = one.ctl("node", "remove", "--hostname=host12", "--remove-endpoints", status=1).err
    assert "registered with 172.18.0.12" in said and "so the host is not gone" in said
    wait_for(lambda: next_door[:-1] + "0/26" not in routed(one), one.log(), 20)
    assert ("host11", True) in notes(trace(one, mine, next_door, "icmp"))
    assert (
        "its kernel has no route to 192.168.1.1" in one.ctl("profile", "trace", mine, next_door, "icmp", status=1).err
    )
    one.etcd.delete("/calico/felix/v1/host/host12/status")  # as etcd does after 30 s
    assert shown(one)["host12"] == ("down", 0, 1)
    assert "has 1 endpoint." in one.ctl("node", "remove", "--hostname=host12", status=1).err
    one.ctl("node", "remove", "--hostname=host12", "--remove-endpoints")
    assert not [key for key in one.etcd.tree("/calico") if "host12" in key]
    assert one.ctl("ipam", "check").err == ""
    for host in (one, far):
        wait_for(lambda host=host: len(host.status()["bgp_sessions"]) == 2, host.log(), 20)
        assert next_door[:-1] + "0/26" not in routed(host)

    # another one dies, and somebody removes its keys by hand
    far.unplug()
    far.end()
    for key in ("/calico/felix/v1/host/host13", "/calico/bgp/v1/host/host13", "/calico/v1/host/host13"):
        one.etcd.delete(key)
    wait_for(lambda: one.status()["bgp_sessions"] == [] and not any("192.168.2." in r for r in routed(one)), "", 20)
    checked = json.loads(one.ctl("ipam", "check", "--fix", "--output=json", status=1).out)
    assert [(found["kind"], found["fixed"]) for found in checked] == [("address", False), ("block", True)]
    one.ctl("node", "remove", "--hostname=host13")
    assert one.ctl("ipam", "check").err == "" and not [key for key in one.etcd.tree("/calico") if "host13" in key]
    assert list(shown(one)) == ["host11"]
