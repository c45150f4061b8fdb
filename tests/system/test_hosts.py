"""Several hosts: who reaches whom, and what happens when hosts come, change and go."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.fabric import FabricHost, fabric
from tests.system.support import Etcd, Host, run


@pytest.fixture
def open_etcd(bare_host: Host, tmp_path: Path) -> Iterator[Etcd]:
    """An etcd that listens on all addresses."""
    etcd = Etcd(tmp_path / "etcd")
    urls = (f"--listen-client-urls=http://0.0.0.0:{etcd.port}", f"--advertise-client-urls={etcd.url}")
    etcd.start(None, *urls)
    etcd.await_ready()
    yield etcd
    etcd.stop(9)


@pytest.fixture
def two(open_etcd: Etcd) -> Iterator[list[FabricHost]]:
    """Two hosts on one network, with running agents."""
    with fabric(open_etcd, 0, 0) as hosts:
        for host in hosts:
            host.start_agent()
        yield hosts


def test_policy_holds_across_hosts(two: list[FabricHost]) -> None:
    one, other = two
    one.add("a", "192.168.0.1")
    other.add("b", "192.168.1.1")
    run("ip", "-n", one.namespace, "route", "replace", "192.168.1.1/32", "via", other.ip)
    run("ip", "-n", other.namespace, "route", "replace", "192.168.0.1/32", "via", one.ip)
    one.ctl("profile", "add", "web")
    one.set_profiles("a", "web")
    assert not one.reaches("a", "192.168.1.1")
    other.set_profiles("b", "web")
    assert one.reaches("a", "192.168.1.1", 3)
