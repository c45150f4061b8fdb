"""The reconciling of the host as a whole: what fails is emitted once, and retried; so is the end of a failure."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import Any

import pytest

from calicoctl.errors import CalicoError
from calicoctl.felix.dataplane import host as module
from calicoctl.felix.dataplane.host import FIREWALL_INTERVAL, INTERVAL, HostReconciler
from calicoctl.felix.events import Failure


class Settings:
    """Stands for the sysctls of the host."""

    def __init__(self) -> None:
        self.forwarded: list[bool] = []
        self.ipv6_requested = threading.Event()
        self.error: Exception | None = None

    def forward(self, ipv6: bool) -> None:
        self.forwarded.append(ipv6)
        if ipv6:
            self.ipv6_requested.set()
        if self.error is not None:
            raise self.error


class HostWorld:
    """A host whose firewall is checked by nothing but `checks`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = 1000.0
        self.checks: SimpleQueue[None] = SimpleQueue()
        self.sends_events = True
        self.error: Exception | None = None
        self.settings = Settings()
        self.failures: SimpleQueue[Failure] = SimpleQueue()
        monkeypatch.setattr(module.docker_firewall, "sends_events", lambda: self.sends_events)
        monkeypatch.setattr(module.docker_firewall, "ensure", self._ensure)
        self.host = HostReconciler(self.settings, self.failures.put)  # type: ignore[arg-type]

    def _ensure(self) -> list[str]:
        self.checks.put(None)
        if self.error is not None:
            raise self.error
        return []

    def emitted(self) -> list[tuple[Any, Any]]:
        found = []
        while not self.failures.empty():
            failure = self.failures.get()
            found.append((failure.subject, failure.why))
        return found


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> HostWorld:
    return HostWorld(monkeypatch)


def test_a_failure_and_its_end_are_emitted_once(world: HostWorld) -> None:
    world.settings.error = CalicoError("read-only")
    world.host.forward(True)
    world.host.forward(True)
    assert world.emitted() == [("what the host forwards", "read-only")]
    world.settings.error = None
    world.host.forward(True)
    world.host.forward(True)
    assert world.emitted() == [("what the host forwards", None)] and world.settings.forwarded == [True] * 4


def test_an_internal_error_is_a_failure_as_well(world: HostWorld) -> None:
    world.error = KeyError("x")
    world.host.check_firewall()
    assert world.emitted() == [("the host's firewall", "the host's firewall cannot be reconciled: KeyError('x')")]


def test_a_firewall_is_polled_only_if_it_sends_no_events_or_failed(
    world: HostWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.time, "monotonic", lambda: world.clock)
    world.host.check_firewall()
    assert world.host._firewall_at == float("inf")
    world.sends_events = False
    world.host.check_firewall()
    assert world.host._firewall_at == world.clock + FIREWALL_INTERVAL
    world.error = CalicoError("iptables is locked")
    world.host.check_firewall()
    assert world.host._firewall_at == world.clock + INTERVAL


def test_the_thread_does_what_is_requested_and_ends(world: HostWorld) -> None:
    world.host.forward(False)
    world.host.check_firewall()
    world.checks.get_nowait()
    world.host.start()
    world.host.set_ipv6(True)
    assert world.settings.ipv6_requested.wait(10)
    assert world.checks.empty()
    world.host.firewall_changed()
    world.checks.get(timeout=10)
    world.host.end()
    assert not world.host.is_alive()
