"""Routes between hosts, by BGP: real BIRDs on several hosts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.fabric import FabricHost, fabric
from tests.system.support import Etcd, wait_for


@pytest.fixture
def two(open_etcd: Etcd) -> Iterator[list[FabricHost]]:
    """Two hosts on one network, with running agents."""
    with fabric(open_etcd, 0, 0) as hosts:
        for host in hosts:
            host.start_agent()
        yield hosts


def learned(host: FabricHost, version: int = 4) -> dict[str, str | None]:
    """Return the destinations of the routes that a host has by BGP, each with its gateway, None for a blackhole."""
    return {route["dst"]: route.get("gateway") for route in host.routes("proto", "bird", version=version)}


def test_workloads_of_two_hosts_reach_each_other(two: list[FabricHost]) -> None:
    one, other = two
    one.add("a", "192.168.0.1", "fd80:24e2:f998:72d6::1")
    other.add("b", "192.168.1.1", "fd80:24e2:f998:72d6::41")
    for host, namespace in ((one, "a"), (other, "b")):
        if host is one:
            host.ctl("profile", "add", "web")
        host.set_profiles(namespace, "web")
    wait_for(lambda: one.reaches("a", "192.168.1.1", 1), "the route", 10)
    wait_for(lambda: one.reaches("a", "fd80:24e2:f998:72d6::41", 1), "the route", 10)
    assert learned(one) == {"192.168.0.0/26": None, "192.168.1.0/26": other.ip}
