"""Devices and routes of the overlay follow the snapshot and the kernel, and go only when nobody needs them."""

from __future__ import annotations

from typing import Any

import pytest

from calicoctl.felix.dataplane import vxlan_manager
from calicoctl.felix.dataplane.links import Link
from calicoctl.felix.dataplane.vxlan import Route
from calicoctl.felix.dataplane.vxlan_manager import GIVE_UP_AFTER, LINGER, POLL, VxlanManager
from calicoctl.felix.events import (
    AddressesChanged,
    KernelEventsLost,
    LinkChanged,
    OverlayBlocked,
    OverlayRouteLost,
    Tick,
)
from calicoctl.workloads.mtu import Underlay
from tests.unit.kernel import FakeVxlan
from tests.unit.test_overlay import POOL, OverlayWorld

OWN, OTHER = "10.65.0.0/26", "10.65.0.64/26"


class ManagerWorld(OverlayWorld):
    """The three hosts of OverlayWorld, a block of this one and of host2, and a clock that stands still."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.now = 1000.0
        monkeypatch.setattr(vxlan_manager.time, "monotonic", lambda: self.now)
        self.vxlan = FakeVxlan()
        self.vxlan.underlays["172.18.0.1"] = Underlay(2, True, 1500)
        self.vxlan.underlays["fd00:18::1"] = Underlay(2, True, 9000)
        self.manager = VxlanManager(self.context, self.vxlan)  # type: ignore[arg-type]
        self.block(1, OWN)
        self.block(2, OTHER)
        self.manager.resync()
        self.apply()

    def apply(self) -> bool:
        """Do what a round of the agent's loop does; return whether the manager had anything to do."""
        self.manager.on_event(self.snapshot.take_dirty())
        needed = self.manager.needs_apply
        if needed:
            self.manager.apply()
        return needed

    def event(self, event: Any) -> bool:
        self.manager.on_event(event)
        return self.apply()

    def pass_time(self, seconds: float) -> bool:
        self.now += seconds
        return self.apply()

    @property
    def cidrs(self) -> set[str]:
        return {route.cidr for route in self.vxlan.kernel}

    @property
    def failure(self) -> str | None:
        failure = self.health.failures.get("overlay")
        return None if failure is None else failure["error"]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> ManagerWorld:
    return ManagerWorld(monkeypatch)


def test_the_device_and_the_routes_are_programmed(world: ManagerWorld) -> None:
    ((tunnel, parent, mtu),) = world.vxlan.devices.values()
    assert (tunnel.local, parent, mtu) == ("172.18.0.1", 2, 1450)
    (other,) = [route for route in world.vxlan.kernel if route.cidr == OTHER]
    assert (other.index, other.source) == (40, "172.18.0.1") and Route(OWN) in world.vxlan.kernel
    assert world.failure is None and not world.apply(), "nothing is left to do"


def test_the_source_is_left_to_the_kernel_if_the_host_lacks_its_address(world: ManagerWorld) -> None:
    world.vxlan.underlays["172.18.0.1"] = Underlay(None, False, 1500)
    world.event(AddressesChanged())
    (other,) = [route for route in world.vxlan.kernel if route.cidr == OTHER]
    assert other.source is None and world.vxlan.devices[4][1] is None
    assert "registered with 172.18.0.1, which none of its interfaces has" in str(world.failure)
    world.vxlan.underlays["172.18.0.1"] = Underlay(2, True, 1500)
    world.event(AddressesChanged())
    assert world.failure is None


def test_it_is_told_when_no_device_can_be_created(world: ManagerWorld) -> None:
    told: list[Any] = []
    world.manager = VxlanManager(world.context, world.vxlan, told.append)  # type: ignore[arg-type]
    world.apply()
    assert not told
    world.vxlan.refuses.add(4)
    world.vxlan.devices.clear()
    world.event(KernelEventsLost())
    world.event(Tick())
    assert told == [OverlayBlocked(True)]
    world.vxlan.refuses.clear()
    world.event(Tick())
    assert told == [OverlayBlocked(True), OverlayBlocked(False)]


def test_hosts_in_the_same_network_are_reached_directly(world: ManagerWorld) -> None:
    world.pool(POOL, "cross-subnet")
    world.apply()
    assert world.vxlan.kernel == {Route(OWN), Route(OTHER, 2, "172.18.0.2", "172.18.0.1")}
    world.vxlan.interfaces.clear()
    world.event(AddressesChanged())
    assert world.cidrs == {OWN}, "the interface was just removed"


@pytest.mark.parametrize(
    "event",
    [
        LinkChanged(Link("vxlan.calico", 99, False), deleted=True),
        LinkChanged(Link("uplink", 2, True)),
        OverlayRouteLost(OTHER),
        AddressesChanged(),
    ],
)
def test_what_is_lost_is_restored(world: ManagerWorld, event: Any) -> None:
    world.vxlan.kernel.clear()
    world.vxlan.devices.clear()
    assert world.event(event) and world.cidrs == {OWN, OTHER} and world.vxlan.devices


@pytest.mark.parametrize("event", [LinkChanged(Link("veth7", 77, True)), OverlayRouteLost("10.0.0.0/8"), Tick()])
def test_other_events_change_nothing(world: ManagerWorld, event: Any) -> None:
    assert not world.event(event) and world.vxlan.reads == 1


@pytest.mark.parametrize(("interface", "is_read"), [("cali1", False), ("uplink", True)])
def test_the_kernel_is_not_read_for_the_changes_of_endpoints(
    world: ManagerWorld, interface: str, is_read: bool
) -> None:
    """The agent calls `apply` of all managers, also if only another one needs it."""
    world.manager.apply()
    before = world.vxlan.underlay_reads
    world.manager.on_event(LinkChanged(Link(interface, 77, True)))
    assert not world.manager.needs_apply
    world.manager.apply()
    assert (world.vxlan.underlay_reads > before) == is_read


def test_what_is_not_desired_is_removed(world: ManagerWorld) -> None:
    world.vxlan.kernel.add(Route("10.99.0.0/26", 40, "fe80::9"))
    world.block(2, OTHER, there=False)
    world.manager.resync()
    world.apply()
    assert world.cidrs == {OWN}


def test_a_device_of_an_ip_version_that_no_host_needs_is_removed(world: ManagerWorld) -> None:
    world.host(2, "", "fd00:18::2")
    world.apply()
    assert set(world.vxlan.devices) == {4, 6} and world.vxlan.devices[6][2] == 9000 - 70
    world.host(2, "172.18.0.2")
    world.apply()
    assert set(world.vxlan.devices) == {4} and world.cidrs == {OWN, OTHER}


def test_going_back_to_a_plain_pool_waits_for_the_routes_of_bird(world: ManagerWorld) -> None:
    world.pool(POOL, None)
    world.apply()
    assert world.cidrs == {OWN, OTHER} and world.vxlan.devices
    assert world.manager.due_at == world.now + POLL
    world.vxlan.bird = {OTHER}
    world.pass_time(POLL)
    assert world.cidrs == {OWN}
    world.vxlan.bird = {OWN, OTHER}
    world.pass_time(POLL)
    assert world.cidrs == set() and world.vxlan.devices, "others may still send"
    assert world.manager.due_at == 1000 + LINGER
    world.pass_time(LINGER)
    assert not world.vxlan.devices and world.manager.due_at is None


def test_going_back_to_a_plain_pool_does_not_wait_for_bird_forever(world: ManagerWorld) -> None:
    world.pool(POOL, None)
    world.apply()
    world.pass_time(GIVE_UP_AFTER - 0.1)
    assert world.cidrs == {OWN, OTHER}
    world.pass_time(0.2)
    assert world.cidrs == set() and world.vxlan.devices


def test_a_pool_that_returns_to_the_overlay_keeps_its_device(world: ManagerWorld) -> None:
    world.pool(POOL, None)
    world.apply()
    world.pass_time(1)
    world.pool(POOL, "always")
    world.apply()
    world.pass_time(2 * LINGER)
    assert world.cidrs == {OWN, OTHER} and world.vxlan.devices and world.manager.due_at is None


def test_the_routes_of_a_removed_pool_go_at_once(world: ManagerWorld) -> None:
    world.store.put(f"/calico/v1/ipam/v4/pool/{POOL.replace('/', '-')}", None)
    world.apply()
    assert world.cidrs == set()


def test_what_fails_is_reported_and_retried_at_the_tick(world: ManagerWorld) -> None:
    world.block(3, "10.65.1.0/26")
    world.vxlan.refuses = {OTHER}
    world.apply()
    assert world.cidrs == {OWN, "10.65.1.0/26"} and "refused a route" in str(world.failure)
    world.vxlan.refuses = set()
    assert not world.apply() and world.event(Tick())
    assert world.cidrs == {OWN, OTHER, "10.65.1.0/26"} and world.failure is None


def test_a_foreign_interface_is_reported_and_blocks_only_what_needs_it(world: ManagerWorld) -> None:
    world.pool(POOL, "cross-subnet")
    world.block(3, "10.65.1.0/26")
    world.vxlan.devices.clear()
    world.vxlan.refuses = {4}
    world.event(AddressesChanged())
    assert "not the agent's" in str(world.failure) and world.cidrs == {OWN, OTHER}
    world.vxlan.refuses = set()
    world.event(Tick())
    assert "10.65.1.0/26" in world.cidrs and world.failure is None


def test_an_mtu_that_is_too_small_is_reported(world: ManagerWorld) -> None:
    world.vxlan.underlays["172.18.0.1"] = Underlay(2, True, 1300)
    world.event(AddressesChanged())
    assert "172.18.0.1 is 1300, and must be 1330" in str(world.failure)


def test_hosts_out_of_reach_are_reported(world: ManagerWorld) -> None:
    world.host(1, "172.18.0.1")
    world.host(2, "", "fd00:18::2")
    world.apply()
    assert "host2" in str(world.failure) and world.cidrs == {OWN}
    world.host(1, "172.18.0.1", "fd00:18::1")
    world.apply()
    assert world.failure is None and world.cidrs == {OWN, OTHER}


def test_the_mtu_is_reported_and_followed(world: ManagerWorld) -> None:
    underlay = {"ipv4": 1500, "ipv6": 9000}
    assert world.health.mtu == {"underlay": underlay, "overlay": 1450, "configured": None}
    world.store.put("/calico/v1/config/MTU", "1400")
    world.apply()
    assert world.health.mtu["configured"] == 1400 and world.vxlan.devices[4][2] == 1400
    world.store.put("/calico/v1/config/MTU", "9000")
    world.apply()
    assert world.vxlan.devices[4][2] == 1450, "no more than fits into the underlay"
    world.pool(POOL, None)
    world.apply()
    assert world.health.mtu == {"underlay": underlay, "overlay": None, "configured": 9000}
