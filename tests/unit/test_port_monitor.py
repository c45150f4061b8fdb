"""A firewall that drops BGP or VXLAN is told from one that lets pass, and from silence."""

from __future__ import annotations

import pytest

from calicoctl.felix.dataplane import port_monitor
from calicoctl.felix.dataplane.nft import Count
from calicoctl.felix.dataplane.policy_manager import PolicyManager
from calicoctl.felix.dataplane.port_monitor import PAUSE, SILENT_CHECKS, PortMonitor
from calicoctl.felix.events import BgpChanged, Tick
from tests.unit.kernel import FakeNft
from tests.unit.snapshots import World


class PortWorld(World):
    """A monitor of tables that count packets to BGP."""

    def __init__(self) -> None:
        super().__init__()
        self.nft = FakeNft([])
        self.policy = PolicyManager(self.context, self.nft)  # type: ignore[arg-type]
        self.policy.on_event(BgpChanged(running=True))
        self.policy.apply()
        self.monitor = PortMonitor(self.context, self.policy, self.nft)  # type: ignore[arg-type]

    def check(self, **counted: int) -> str:
        """Let packets come, then check; return what fails."""
        for name, count in counted.items():
            name = name.replace("_", "-")
            self.nft.counted[name] = Count(self.nft.counted.get(name, Count()).packets + count)
        self.monitor.on_event(Tick())
        assert self.monitor.needs_apply
        self.monitor.apply()
        return "; ".join(failure["error"] for failure in self.health.failures.values())


def test_packets_that_arrive_and_never_get_through_are_a_failure_until_some_do() -> None:
    world = PortWorld()
    assert not world.check(bgp4_input=3), "the firewall may just be changed"
    text = world.check(bgp4_input=1)
    assert "BGP peers" in text and "'iptables -I INPUT -p tcp --dport 179 -j ACCEPT'" in text and "IPv6" not in text
    assert "IPv4 and IPv6" not in world.check(bgp6_input=1) and "'ip6tables" in world.check(bgp6_input=1)
    assert "IPv4" not in world.check(bgp4_input=2, bgp4_input_passed=1)
    assert not world.check(bgp6_input=1, bgp6_input_passed=1)


def test_packets_that_get_through_now_and_then_are_no_failure() -> None:
    world = PortWorld()
    for _ in range(5):
        world.check(vxlan4_input=3)
        assert not world.check(vxlan4_input=3, vxlan4_input_passed=1)
    world.check(vxlan4_input=3)
    assert "UDP port 4789" in world.check(vxlan4_input=3)


def test_packets_that_this_host_sends_are_a_failure_of_their_own() -> None:
    world = PortWorld()
    world.check(bgp4_output=1, bgp4_input=1, bgp4_input_passed=1)
    text = world.check(bgp4_output=1, bgp4_input=1, bgp4_input_passed=1)
    assert "what is sent to BGP peers" in text and "'iptables -I OUTPUT -p tcp --dport 179 -j ACCEPT'" in text
    assert "INPUT" not in text and "INPUT" in "".join(world.check(bgp4_output=1, bgp4_input=1) for _ in range(2))
    assert "OUTPUT" not in world.check(bgp4_output=1, bgp4_output_passed=1)


def test_a_failure_ends_when_nobody_tries_any_more() -> None:
    world = PortWorld()
    world.check(bgp4_input=1)
    assert world.check(bgp4_input=1)
    for _ in range(SILENT_CHECKS - 1):
        assert world.check()
    assert not world.check()


def test_it_looks_more_often_while_packets_seem_to_be_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(port_monitor.time, "monotonic", lambda: clock[0])
    world = PortWorld()
    assert not world.check(bgp4_input=1) and world.monitor.due_at == 1000.0 + PAUSE
    assert not world.monitor.needs_apply
    clock[0] += PAUSE
    assert world.monitor.needs_apply
    assert not world.check(bgp4_input=1, bgp4_input_passed=1) and world.monitor.due_at is None


def test_counters_that_begin_anew_are_no_packets_of_before() -> None:
    world = PortWorld()
    world.check(bgp4_input=100, bgp4_input_passed=100)
    world.nft.counted.clear()
    assert not world.check() and not world.check(bgp4_input=1)
    assert world.check(bgp4_input=1)


def test_nothing_is_counted_without_bgp_and_overlay() -> None:
    world = PortWorld()
    world.policy.on_event(BgpChanged(running=False))
    world.policy.apply()
    world.monitor.on_event(Tick())
    assert not world.monitor.needs_apply
