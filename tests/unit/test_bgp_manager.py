"""BIRD under the agent: what it is told and when, and what is reported of it. BIRD itself is a fake."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

import pytest

from calicoctl import files, proc
from calicoctl.datastore.reserved import HostNetwork, InterfaceAddress
from calicoctl.errors import CalicoError
from calicoctl.felix.bgp import manager, passwords
from calicoctl.felix.bgp.bird import UP, Refused, Session
from calicoctl.felix.bgp.config import Config, Family, Neighbour, has_turns, text
from calicoctl.felix.bgp.instance import NotReady
from calicoctl.felix.bgp.manager import BgpManager, BgpThread
from calicoctl.felix.bgp.passwords import Passwords
from calicoctl.felix.daemon import NotServing
from calicoctl.felix.events import (
    BGP,
    BGP_CONFIGURATION,
    BGP_PASSWORDS,
    AddressesChanged,
    BgpChanged,
    BirdRouteLost,
    Failure,
    KernelEventsLost,
)
from tests.unit.kernel import FakeBgp
from tests.unit.snapshots import HOST, World
from tests.unit.waiting import PATIENCE, wait_for

OWN = "172.18.0.11"
SESSION = Session("mesh4_172_18_0_12", "mesh", "172.18.0.12", "64511", UP, "2026-11-26 04:50:49")


class FakeInstance:
    """BIRD as a process, as Instance shows it. `wrong` is what BIRD refuses, `refusal` why it may not run here."""

    directory = Path("/run/calico/host1/bird")

    def __init__(self) -> None:
        self.running: int | None = None
        self.lost: int | None = None
        """One that no pid file names."""
        self.next_pid = 100
        self.file: str | None = None
        """The configuration of its last run in this boot."""
        self.told: list[str | None] = []
        """The texts that it was started or configured with."""
        self.wrong = "no text has this"
        self.refusal: str | None = None
        self.other: str | None = None
        """Why another BIRD must not run beside it."""
        self.recovers = self.dies = self.dies_when_ready = False
        self.answers = True
        self.found: list[Session] = []
        self.removed = self.woken = self.rescans = 0
        self.socket = Path("/proc/self/stat")
        """One that exists."""

    def pid(self) -> int | None:
        return self.running

    def recognise(self) -> bool:
        self.running = self.running or self.lost
        return self.running is not None

    def start(self, text: str | None) -> bool:
        if self.dies:
            raise NotServing("BIRD does not serve")
        if self.refusal is not None:
            raise CalicoError(self.refusal)
        refused = text is not None and self.wrong in text
        if text is not None and not refused:
            self.file = text
        if self.file is None:
            raise Refused("it is wrong in line 1 of conf.new", 1) if refused else NotReady("no configuration")
        self.told.append(self.file)
        self.running, self.next_pid = self.next_pid, self.next_pid + 1
        if refused:
            raise Refused("it is wrong in line 1 of conf.new", 1)
        if self.dies_when_ready:
            self.running = None
        return self.recovers

    def configure(self, text: str) -> None:
        if not self.answers:
            raise CalicoError("BIRD does not answer within 5 s")
        if self.wrong in text:
            number = next(n for n, line in enumerate(text.splitlines(), 1) if self.wrong in line)
            raise Refused(f"it is wrong in line {number} of conf.new", number)
        self.file = text
        self.told.append(text)

    def sessions(self) -> list[Session]:
        if not self.answers:
            raise CalicoError("BIRD does not answer within 5 s")
        return self.found

    def holds_port(self) -> bool:
        return bool(self.found)

    def refuse_other_bird(self) -> None:
        if self.other is not None:
            raise CalicoError(self.other)

    def rescan(self) -> None:
        self.rescans += 1

    def wake(self) -> None:
        self.woken += 1

    def has_turns(self) -> bool:
        return has_turns(self.file or "")

    def control(self) -> Path:
        return self.socket

    def stop(self) -> None:
        self.running = None

    def remove(self, warn: Callable[[str], None]) -> bool:
        self.removed += 1
        was, self.running = self.running is not None, None
        return was


class Bird:
    """A BgpThread whose rounds a test runs itself, and the events that it emits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.instance = FakeInstance()
        self.events: list[Any] = []
        self.passwords = Passwords()
        monkeypatch.setattr(passwords, "read", lambda before=None: self.passwords)
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.thread = BgpThread(self.instance, True, self.events.append)  # type: ignore[arg-type]

    def step(self, wanted: Config | None) -> str | None:
        """Run a round; return why it failed, if it has."""
        try:
            self.thread.round(wanted)
        except CalicoError as error:
            return str(error)
        return None

    @property
    def state(self) -> BgpChanged:
        return self.thread._state

    def failures(self, subject: str) -> list[str | None]:
        return [event.why for event in self.events if isinstance(event, Failure) and event.subject == subject]


@pytest.fixture
def bird(monkeypatch: pytest.MonkeyPatch) -> Bird:
    return Bird(monkeypatch)


def configuration(router_id: str = OWN) -> Config:
    return Config(router_id, "64511", 30, "none", ())


def test_it_is_started_with_what_is_wanted_and_told_only_what_is_new(bird: Bird) -> None:
    assert bird.step(None) is None and bird.instance.told == []
    one, other = configuration(), configuration("172.18.0.12")
    for wanted in (one, one, other, other, configuration("172.18.0.12"), one):
        bird.step(wanted)
    assert [(text or "").count(f"router id {OWN};") for text in bird.instance.told] == [1, 0, 1]
    assert bird.state.pid == 100 and bird.state.restarts == 0


def test_one_that_runs_is_adopted_and_told_its_configuration_once(bird: Bird) -> None:
    bird.instance.running = 77
    bird.step(None)
    assert bird.state.pid == 77 and bird.instance.told == []
    bird.step(configuration())
    bird.step(configuration())
    assert len(bird.instance.told) == 1 and bird.state.pid == 77, "it may have another than its file says"


def test_an_earlier_versions_bird_gets_its_turns_at_its_next_start_since_they_reset_sessions(bird: Bird) -> None:
    def with_peers(*addresses: str) -> Config:
        peers = tuple(Neighbour("mesh", address, "64511") for address in addresses)
        return replace(configuration(), families=(Family(4, OWN, True, neighbours=peers),))

    bird.instance.running = 77
    bird.instance.file = text(with_peers("172.18.0.12"), Passwords(), bird.instance.directory, turns=False)
    for peers in (("172.18.0.12",), ("172.18.0.12", "172.18.0.13")):
        bird.step(with_peers(*peers))
        assert not has_turns(bird.instance.file) and len(bird.instance.told) == len(peers)
    bird.instance.running = None
    for _ in range(2):
        bird.step(with_peers("172.18.0.12"))
    assert bird.state.pid == 100 and has_turns(bird.instance.file) and len(bird.instance.told) == 3, "once"


def test_one_that_no_file_names_is_adopted_as_well(bird: Bird) -> None:
    bird.instance.lost, bird.instance.refusal = 77, "another BIRD runs here"
    for _ in range(2):
        assert bird.step(configuration()) is None
    assert bird.state.pid == 77 and len(bird.instance.told) == 1


def test_one_that_can_be_told_nothing_is_ended_and_started_again(bird: Bird) -> None:
    bird.instance.running, bird.instance.socket = 50, Path("/run/gone/ctl")
    bird.step(None)
    assert bird.state.pid == 50, "there is no configuration to start another one with"
    bird.step(configuration())
    assert bird.state.pid == 100 and len(bird.instance.told) == 1


def test_one_that_ended_while_the_store_is_away_is_started_with_what_it_had(bird: Bird) -> None:
    bird.instance.file, bird.instance.recovers = "from before", True
    bird.step(None)
    assert bird.instance.told == ["from before"] and bird.state.restarts == 1


def test_one_that_ends_is_started_again_with_pauses(bird: Bird) -> None:
    wanted = configuration()
    bird.step(wanted)
    bird.now += 60
    bird.instance.running = None
    assert bird.step(wanted) is None and bird.instance.running == 101, "at once, after a long life"
    for pause in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30):
        bird.instance.running = None
        assert "started again in a moment" in str(bird.step(wanted))
        bird.now += pause - 0.01
        assert bird.step(wanted) is not None and bird.instance.running is None
        bird.now += 0.02
        assert bird.step(wanted) is None and bird.instance.running is not None
    assert bird.state.restarts == 12
    bird.now += 60
    bird.instance.running = None
    assert bird.step(wanted) is None and bird.instance.running is not None


def test_where_it_may_not_run_it_is_tried_again_later(bird: Bird) -> None:
    bird.instance.refusal = "another BIRD runs here"
    assert bird.step(configuration()) == "another BIRD runs here"
    bird.instance.refusal = None
    assert bird.step(None) == "another BIRD runs here"
    bird.now += 29
    assert bird.step(configuration()) == "another BIRD runs here" and bird.instance.told == []
    bird.now += 2
    assert bird.step(configuration()) is None and bird.instance.running is not None


@pytest.mark.parametrize(
    ("dies", "why"),
    [
        ("dies", "BIRD does not serve"),
        ("dies_when_ready", "BIRD has ended, and is started again in a moment"),
    ],
)
def test_one_that_ends_while_it_is_started_is_started_again_with_pauses(bird: Bird, dies: str, why: str) -> None:
    wanted = configuration()
    setattr(bird.instance, dies, True)
    for pause in (0.1, 0.2, 0.4):
        assert bird.step(wanted) == why
        setattr(bird.instance, dies, False)
        bird.now += pause - 0.01
        assert bird.step(wanted) == why
        setattr(bird.instance, dies, True)
        bird.now += 0.02
    setattr(bird.instance, dies, False)
    assert bird.step(wanted) is None and bird.state.pid == bird.instance.running is not None


def test_a_file_that_cannot_be_written_is_named(bird: Bird, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(text: str | None) -> bool:
        files.replace(Path("/dev/full/conf"), b"", 0o600)
        return False

    monkeypatch.setattr(bird.instance, "start", start)
    with pytest.raises(OSError):
        bird.thread.round(configuration())
    assert bird.step(configuration()) == "/dev/full/.conf.new: Not a directory"


def test_what_is_refused_is_reported_and_not_tried_again(bird: Bird) -> None:
    bird.step(configuration())
    bird.instance.wrong = "172.18.0.66"
    for _ in range(3):
        assert bird.step(configuration("172.18.0.66")) is None
    (why,) = [why for why in bird.failures(BGP_CONFIGURATION) if why is not None]
    assert why == (
        "BIRD refuses a new configuration, and keeps the one before: it is wrong in line 4 of conf.new: "
        "router id 172.18.0.66;"
    )
    assert bird.state.refusals == 1 and len(bird.instance.told) == 1
    bird.step(configuration())
    assert bird.failures(BGP_CONFIGURATION)[-1] is None and len(bird.instance.told) == 1, "it has that one still"
    bird.step(configuration("172.18.0.66"))
    bird.step(configuration("172.18.0.67"))
    assert bird.failures(BGP_CONFIGURATION)[-1] is None and bird.state.refusals == 2


def test_one_that_ends_with_a_configuration_that_it_refused_goes_on_with_the_one_before(bird: Bird) -> None:
    bird.step(configuration())
    bird.instance.wrong = "172.18.0.66"
    bird.step(configuration("172.18.0.66"))
    bird.now += 60
    bird.instance.running = None
    bird.step(configuration("172.18.0.66"))
    assert bird.instance.running == 101 and bird.failures(BGP_CONFIGURATION)[-1] is not None
    bird.step(configuration())
    assert bird.failures(BGP_CONFIGURATION)[-1] is None


def test_a_first_configuration_that_is_refused_leaves_it_unstarted(bird: Bird) -> None:
    bird.instance.wrong = "router id"
    assert bird.step(configuration()) == "BIRD does not run" and bird.state.refusals == 1
    assert bird.failures(BGP_CONFIGURATION)[-1] is not None
    bird.instance.wrong = "no text has this"
    bird.step(configuration("172.18.0.12"))
    assert bird.instance.running is not None and bird.failures(BGP_CONFIGURATION)[-1] is None


def test_no_password_is_in_a_refusal(bird: Bird) -> None:
    from calicoctl.felix.bgp.config import Family, Neighbour

    family = Family(4, OWN, True, neighbours=(Neighbour("mesh", "172.18.0.12", "64511"),))
    bird.step(configuration())
    bird.passwords = Passwords({}, "hunter2")
    bird.instance.wrong = "neighbor 172.18.0.12"
    bird.step(Config(OWN, "64511", 30, "none", (family,)))
    shown = 'neighbor 172.18.0.12 as 64511; connect delay time 6; password "…";'
    assert shown in str(bird.failures(BGP_CONFIGURATION)[-1])


def test_passwords_reach_it_when_they_change_and_not_while_they_are_unknown(bird: Bird) -> None:
    from calicoctl.felix.bgp.config import Family, Neighbour

    wanted = Config(OWN, "64511", 30, "none", (Family(4, OWN, neighbours=(Neighbour("mesh", "172.18.0.12", "1"),)),))
    bird.passwords = Passwords(known=False, problem="the file is readable for all")
    bird.step(wanted)
    assert bird.instance.running is None and bird.failures(BGP_PASSWORDS)[-1] == "the file is readable for all"
    for password in ("one", "one", "two"):
        bird.passwords = Passwords({}, password)
        bird.step(wanted)
    assert bird.failures(BGP_PASSWORDS)[-1] is None
    assert [text.count('password "one"') for text in bird.instance.told if text] == [1, 0]


def test_sessions_are_looked_at_often_while_one_is_down(bird: Bird) -> None:
    bird.step(configuration())
    assert not bird.state.running
    bird.instance.found = [SESSION, Session("mesh4_172_18_0_13", "mesh", "172.18.0.13", "64511", "Connect", "x")]
    bird.now += 10
    bird.step(configuration())
    assert bird.state.running and bird.state.sessions == tuple(bird.instance.found)
    bird.instance.found = [SESSION]
    bird.now += 0.9
    bird.step(configuration())
    assert len(bird.state.sessions) == 2
    bird.now += 0.2
    bird.step(configuration())
    assert bird.state.sessions == (SESSION,)
    bird.instance.found = []
    bird.now += 9
    bird.step(configuration())
    assert bird.state.sessions == (SESSION,), "all are up"
    bird.step(configuration("172.18.0.12"))
    assert bird.state.sessions == (), "at once after a change"


def test_one_that_does_not_answer_is_reported_and_its_sessions_are_kept(bird: Bird) -> None:
    bird.instance.found = [SESSION]
    bird.step(configuration())
    bird.instance.answers = False
    bird.now += 11
    assert bird.step(configuration()) == "BIRD does not answer within 5 s"
    assert bird.state.running and bird.state.sessions == (SESSION,)
    bird.instance.answers = True
    bird.now += 2
    assert bird.step(configuration()) is None


def test_another_one_that_is_started_beside_it_is_reported(bird: Bird) -> None:
    bird.step(configuration())
    bird.instance.other = "another BIRD runs here"
    bird.now += 11
    assert [bird.step(configuration()) for _ in range(2)] == ["another BIRD runs here"] * 2
    bird.step(configuration("172.18.0.12"))
    assert len(bird.instance.told) == 2, "ours goes on"
    bird.instance.other = None
    bird.now += 11
    assert bird.step(configuration("172.18.0.12")) is None
    bird.instance.found = [Session("mesh4_172_18_0_13", "mesh", "172.18.0.13", "64511", "Connect", "x")]
    bird.instance.other = "another BIRD runs here"
    bird.now += 11
    assert bird.step(configuration()) == "another BIRD runs here", "also while a session is down"


def test_routes_are_compared_soon_after_one_is_lost_and_not_too_often(bird: Bird) -> None:
    def rescans(after: float) -> int:
        bird.now += after
        bird.step(configuration())
        return bird.instance.rescans

    assert rescans(0) == rescans(30) == 0
    for _ in range(1000):
        bird.thread.rescan()
    assert [rescans(0.05), rescans(0.06), rescans(30)] == [0, 1, 1]
    bird.thread.rescan()
    assert rescans(0.2) == 2
    bird.thread.rescan()
    assert [rescans(0.5), rescans(0.6)] == [2, 3], "no more than one in a second"


def test_one_that_is_suspended_is_reported(bird: Bird, monkeypatch: pytest.MonkeyPatch) -> None:
    suspended = [True]
    monkeypatch.setattr(proc, "is_suspended", lambda pid: suspended[0])
    bird.step(configuration())
    bird.instance.found = [SESSION]
    bird.now += 1
    assert "BIRD (process 100) is suspended" in (bird.step(configuration()) or "") and bird.state.sessions == ()
    suspended[0] = False
    assert bird.step(configuration()) is None and bird.state.sessions == (SESSION,)


def test_passwords_that_become_known_start_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found, instance, events = [Passwords(known=False, problem="refused")], FakeInstance(), []
    monkeypatch.setattr(passwords, "read", lambda before=None: found[0])
    monkeypatch.setattr(manager, "PASSWORDS_POLL", 0.05)
    thread = BgpThread(instance, True, events.append)  # type: ignore[arg-type]
    thread.want(configuration())
    thread.start_once()
    wait_for(lambda: Failure("refused", BGP_PASSWORDS) in events and events[-1] == BgpChanged(settled=True))
    found[0] = Passwords()
    wait_for(lambda: len(instance.told) == 1)


# The thread


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def test_the_thread_tells_what_has_changed_and_notices_the_end_at_once(
    monkeypatch: pytest.MonkeyPatch, sleeper: subprocess.Popen[bytes]
) -> None:
    monkeypatch.setattr(passwords, "read", lambda before=None: before or Passwords())
    monkeypatch.setattr(manager, "PASSWORDS_POLL", 600.0)
    monkeypatch.setattr(manager, "LONG_POLL", 600.0)
    instance, events = FakeInstance(), []
    instance.running = sleeper.pid
    thread = BgpThread(instance, True, events.append)  # type: ignore[arg-type]
    thread.start_once()
    thread.start_once()
    wait_for(lambda: BgpChanged(pid=sleeper.pid) in events)
    thread.want(configuration())
    wait_for(lambda: BgpChanged(settled=True, pid=sleeper.pid) in events)
    assert len(instance.told) == 1 and len(events) == 2, "no event says what is known"
    instance.running = None
    instance.refusal = "it may not run"
    sleeper.kill()
    wait_for(lambda: events[-1] == BgpChanged(settled=True))
    assert Failure("BGP: it may not run", BGP) in events


def test_news_in_the_log_wake_bird_and_have_its_sessions_looked_at(
    monkeypatch: pytest.MonkeyPatch, sleeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    monkeypatch.setattr(passwords, "read", lambda before=None: before or Passwords())
    monkeypatch.setattr(manager, "PASSWORDS_POLL", 600.0)
    monkeypatch.setattr(manager, "LONG_POLL", 600.0)
    instance, events = FakeInstance(), []
    instance.directory, instance.running, instance.found = tmp_path, sleeper.pid, [SESSION]
    thread = BgpThread(instance, True, events.append)  # type: ignore[arg-type]
    thread.start_once()
    wait_for(lambda: events and events[-1].sessions == (SESSION,))
    assert instance.woken == 0
    instance.found = [SESSION, SESSION]
    (tmp_path / "log").write_text("State changed to up\n")
    wait_for(lambda: events[-1].sessions == (SESSION, SESSION))
    assert instance.woken > 0


def test_without_bgp_the_thread_ends_what_runs_and_itself() -> None:
    instance, events = FakeInstance(), []
    instance.running = os.getpid()
    thread = BgpThread(instance, False, events.append)  # type: ignore[arg-type]
    thread.start_once()
    thread.join(PATIENCE)
    assert not thread.is_alive() and instance.removed == 1 and events == [BgpChanged(settled=True)]


# The manager


class ManagerWorld(World):
    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self.bgp = FakeBgp(enabled=enabled)
        self.manager = BgpManager(self.context, self.bgp)  # type: ignore[arg-type]
        self.store.put("/calico/v1/ipam/v4/pool/192.168.0.0-16", {"cidr": "192.168.0.0/16"})
        self.store.put(f"/calico/bgp/v1/host/{HOST}/ip_addr_v4", OWN)
        self.store.put(f"/calico/ipam/v2/host/{HOST}/ipv4/block/192.168.1.0-26", "")
        self.connect(OWN)
        self.apply()

    def connect(self, *addresses: str) -> None:
        self.snapshot.set_network(HostNetwork.of([InterfaceAddress(one, one, 24, "eth0") for one in addresses]))

    def apply(self) -> None:
        self.manager.on_event(self.snapshot.take_dirty())
        if self.manager.needs_apply:
            self.manager.apply()
        assert not self.manager.needs_apply


def test_a_configuration_is_handed_over_when_it_is_another() -> None:
    world = ManagerWorld()
    assert [one.families[0].blocks for one in world.bgp.wanted] == [("192.168.1.0/26",)]
    world.apply()
    world.store.endpoint(1, "192.168.1.1")
    world.store.endpoint(2, "192.168.2.2", host="host2")
    world.store.profile("web")
    world.apply()
    assert len(world.bgp.wanted) == 1
    world.store.endpoint(1, "192.168.2.9")
    world.apply()
    assert len(world.bgp.wanted) == 2 and world.bgp.wanted[1].families[0].addresses == ("192.168.2.9",)
    world.store.put("/calico/bgp/v1/host/host2/ip_addr_v4", "172.18.0.12")
    world.apply()
    assert len(world.bgp.wanted) == 3
    world.store.put("/calico/v1/ipam/v4/pool/192.168.0.0-16", None)
    world.apply()
    assert world.bgp.wanted[3].families[0].blocks == ()


def test_an_address_that_is_away_for_a_moment_changes_nothing() -> None:
    world = ManagerWorld()
    world.connect()
    world.apply()
    world.connect(OWN)
    world.apply()
    assert len(world.bgp.wanted) == 1 and world.bgp.wanted[0].families[0].is_here


def test_a_block_that_is_not_announced_whole_is_in_the_log_once(caplog: pytest.LogCaptureFixture) -> None:
    world = ManagerWorld()
    with caplog.at_level(logging.WARNING, "calico.felix"):
        world.connect(OWN, "192.168.1.9")
        world.apply()
        world.store.endpoint(1, "192.168.1.1")
        world.apply()
    (line,) = caplog.messages
    assert line.startswith("block 192.168.1.0/26 overlaps 192.168.1.0/24, which this host is connected to")
    assert world.bgp.wanted[-1].families[0].addresses == ("192.168.1.1",)


def test_what_is_known_of_bird_is_in_the_report() -> None:
    world = ManagerWorld()
    event = BgpChanged(settled=True, pid=5, running=True, sessions=(SESSION,))
    world.manager.on_event(event)
    assert world.health.bgp == event


def test_the_agents_start_waits_until_bird_has_been_dealt_with(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    world = ManagerWorld()
    world.manager.on_event(BgpChanged(pid=5))
    assert not world.manager.is_settled and world.manager.due_at == 1000.0 + manager.SETTLING
    world.manager.on_event(BgpChanged(settled=True))
    assert world.manager.is_settled and world.manager.due_at is None
    slow = ManagerWorld()
    now[0] += manager.SETTLING + 1
    assert slow.manager.is_settled and slow.manager.due_at is None, "or the loop would not rest"


@pytest.mark.parametrize("event", [BirdRouteLost(), AddressesChanged(), KernelEventsLost()])
def test_what_may_have_taken_routes_away_has_them_compared(event: object) -> None:
    world = ManagerWorld()
    world.manager.on_event(event)
    assert world.bgp.rescans == 1


def test_without_bgp_no_configuration_is_handed_over() -> None:
    world = ManagerWorld(enabled=False)
    world.manager.resync()
    assert world.bgp.wanted == [] and world.bgp.started
