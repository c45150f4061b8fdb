"""When the host's own network is read, and what becomes of a reading that fails."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from calicoctl.datastore.reserved import HostNetwork
from calicoctl.errors import CalicoError
from calicoctl.felix import network_monitor
from calicoctl.felix.dataplane.links import Link
from calicoctl.felix.events import AddressesChanged, GatewaysChanged, LinkChanged, TablesChanged
from calicoctl.felix.network_monitor import BACKOFF, PAUSE, NetworkMonitor
from tests.unit.snapshots import World


class MonitorWorld(World):
    """A monitor that has read once; each reading takes no time, unless a test says how long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.clock, self.takes, self.readings, self.announced = 1000.0, 0.0, 0, 0
        self.error: Exception | None = None
        monkeypatch.setattr(network_monitor.time, "monotonic", lambda: self.clock)
        monkeypatch.setattr(network_monitor.host_network, "read", self._read)
        self.monitor = NetworkMonitor(self.snapshot, self.health, self._announce)
        self.monitor.read_if_due()

    def _announce(self) -> None:
        assert self.announced == self.readings, "changes are announced again from before the reading"
        self.announced += 1

    def _read(self, others: Collection[str], inside: Collection[str]) -> HostNetwork:
        self.readings += 1
        self.others, self.inside = others, inside
        self.clock += self.takes
        if self.error is not None:
            raise self.error
        return HostNetwork(macs={"eth0": frozenset(["02:00:00:00:00:01"])})


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> MonitorWorld:
    return MonitorWorld(monkeypatch)


def test_it_reads_once_at_the_start_and_then_when_something_has_changed(world: MonitorWorld) -> None:
    world.clock += 1000
    world.monitor.on_event(TablesChanged(frozenset(["filter"])))
    world.monitor.on_event(LinkChanged(Link("cali1", 11, True)))
    world.monitor.read_if_due()
    assert world.readings == world.announced == 1 and world.monitor.due_at is None
    world.monitor.on_event(AddressesChanged())
    world.monitor.read_if_due()
    assert world.readings == 2
    world.monitor.resync()
    world.monitor.read_if_due()
    assert world.readings == 3


def test_it_reads_at_once_how_a_new_host_or_peer_is_reached(world: MonitorWorld) -> None:
    world.store.put("/calico/bgp/v1/host/host1/ip_addr_v4", "172.18.0.11")
    world.store.put("/calico/bgp/v1/host/host2/ip_addr_v4", "172.18.0.12")
    world.store.put("/calico/bgp/v1/global/peer_v4/172.18.0.99", {"ip": "172.18.0.99", "as_num": "64512"})
    world.monitor.read_if_due()
    assert world.readings == 2 and world.others == {"172.18.0.12", "172.18.0.99"}
    world.store.put("/calico/bgp/v1/host/host2/as_num", "64513")
    world.monitor.read_if_due()
    assert world.readings == 2
    for host, block in (("host1", "192.168.0.0-26"), ("host2", "192.168.0.64-26")):
        world.store.put(f"/calico/ipam/v2/host/{host}/ipv4/block/{block}", "")
    world.monitor.read_if_due()
    assert world.readings == 3 and world.inside == {"192.168.0.64"}


def test_it_reads_at_once_the_new_mac_of_an_interface_to_other_hosts(world: MonitorWorld) -> None:
    world.monitor.on_event(LinkChanged(Link("eth0", 2, True, "02:00:00:00:00:01")))
    world.monitor.on_event(LinkChanged(Link("eth1", 3, True, "02:00:00:00:00:02")))
    world.monitor.read_if_due()
    assert world.readings == 1
    world.monitor.on_event(LinkChanged(Link("eth0", 2, True, "02:00:00:00:00:09")))
    world.monitor.read_if_due()
    assert world.readings == 2


@pytest.mark.parametrize("event", [GatewaysChanged(), LinkChanged(Link("eth1", 2, False))])
def test_changes_of_routes_are_read_together(world: MonitorWorld, event: object) -> None:
    world.monitor.on_event(event)
    assert world.monitor.due_at == world.clock + PAUSE
    world.clock += PAUSE / 2
    world.monitor.on_event(event)
    world.monitor.read_if_due()
    assert world.readings == 1
    world.clock += PAUSE / 2
    world.monitor.read_if_due()
    assert world.readings == 2


def test_the_longer_a_reading_takes_the_later_is_the_next(world: MonitorWorld) -> None:
    world.takes = 0.2
    world.monitor.resync()
    world.monitor.read_if_due()
    world.monitor.on_event(GatewaysChanged())
    assert world.monitor.due_at == pytest.approx(world.clock + 10)


def test_a_failure_is_reported_and_retried_after_the_backoff(world: MonitorWorld) -> None:
    for error, text in ((CalicoError("no netlink"), "no netlink"), (OSError("a defect"), "cannot be read: OSError")):
        world.error = error
        world.monitor.resync()
        world.monitor.read_if_due()
        assert text in str(world.health.last_error) and world.monitor.due_at == world.clock + BACKOFF
    world.error = None
    world.clock += BACKOFF
    world.monitor.read_if_due()
    assert world.monitor.due_at is None
