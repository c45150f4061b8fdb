"""The agent's loop: the order in which the data planes are applied, and when nothing may be applied at all."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.reserved import HostNetwork, InterfaceAddress, Servers
from calicoctl.datastore.store import Change, Entry
from calicoctl.desired.snapshot import Snapshot
from calicoctl.errors import CalicoError
from calicoctl.felix import agent as module
from calicoctl.felix import events, network_monitor, process
from calicoctl.felix.agent import RESYNC_INTERVAL, TICK, Agent, Drivers
from calicoctl.felix.dataplane import connection_limit
from calicoctl.felix.dataplane.conntrack import Connection
from calicoctl.felix.dataplane.manager import Manager
from calicoctl.felix.dataplane.policy_manager import BACKOFF
from calicoctl.felix.pending import PendingChanges
from calicoctl.felix.process import Options
from calicoctl.policy.verdict import Packet
from calicoctl.workloads.upkeep import REATTACHED, Action
from tests.unit.kernel import FakeBgp, FakeConntrack, FakeNft, FakeRoutes, FakeVxlan
from tests.unit.memory_store import MemoryStore
from tests.unit.snapshots import HOST, Store, endpoint_id, in_pools

A, B, OUTSIDE = "192.168.0.1", "192.168.0.2", "198.51.100.1"
ALLOW = {"action": "allow"}
READY = "/calico/v1/Ready"


class Recorder:
    """Stands for a part of the agent that is a thread: notes the methods that are called, and their last arguments."""

    def __init__(self, journal: list[str], name: str) -> None:
        self.journal, self.name = journal, name
        self.last: dict[str, tuple[Any, ...]] = {}

    def __getattr__(self, method: str) -> Callable[..., None]:
        def note(*arguments: Any, **_: Any) -> None:
            self.journal.append(f"{self.name} {method}")
            self.last[method] = arguments

        return note


class OtherDataplane(Manager):
    """A data plane that may be added: it is applied when the policy is."""

    def __init__(self, journal: list[str]) -> None:
        self.journal = journal
        self.events: list[Any] = []
        self.error: Exception | None = None

    def on_event(self, event: Any) -> None:
        self.events.append(event)

    def resync(self) -> None:
        self.journal.append("other resync")

    @property
    def needs_apply(self) -> bool:
        return False

    def apply(self) -> None:
        self.journal.append("other")
        if self.error is not None:
            error, self.error = self.error, None
            raise error


class AgentWorld:
    """An agent on a kernel in memory, whose time passes only when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.clock = 1000.0
        self.journal: list[str] = []
        (folder / HOST).mkdir()
        monkeypatch.setattr(process, "DIRECTORY", folder)
        monkeypatch.setattr(module.time, "monotonic", lambda: self.clock)
        self.network = HostNetwork()
        monkeypatch.setattr(network_monitor.host_network, "read", lambda *_: self.network)
        self.keeper, self.host = Recorder(self.journal, "keeper"), Recorder(self.journal, "host")
        monkeypatch.setattr(module, "WorkloadKeeper", lambda *_: self.keeper)
        monkeypatch.setattr(module, "HostReconciler", lambda *_: self.host)
        self.report = Recorder(self.journal, "report")
        monkeypatch.setattr(module, "StoreReporter", lambda *_: self.report)
        self.nft, self.routes = FakeNft(self.journal), FakeRoutes(self.journal)
        self.conntrack = FakeConntrack(self.journal)
        self.queue: events.Events[Any] = SimpleQueue()
        self.is_ready = 0
        self.agent = Agent(
            lambda *_: DatastoreClient(MemoryStore(), HOST),  # type: ignore[arg-type]
            Drivers(self.nft, self.routes, self.conntrack, FakeVxlan(), FakeBgp(self.queue.put)),  # type: ignore[arg-type]
            self.queue,
            self.ready,
            Options(),
        )
        in_pools(self.agent._snapshot)
        self.routes.add_link("cali1", 11)
        for manager in self.agent._managers:
            manager.resync()
        self.store = Store(Snapshot(HOST))
        """Only makes changes: the agent has a snapshot of its own."""

    def ready(self) -> None:
        self.is_ready += 1

    def step(self, *changes: Any) -> list[str]:
        """Run rounds of the loop with changes of the store, and other events, until it would wait; return the journal.

        Listings that are requested are not answered.
        """
        self.journal.clear()
        for change in changes:
            self.queue.put(events.StoreChanged(change) if isinstance(change, Change) else change)
        self.queue.put(None)  # a round at least
        while not self.queue.empty():
            assert self.agent.step()
        return [entry for entry in self.journal if entry not in ("keeper set_ready", "read routes")]

    def answer(self) -> list[str]:
        """Answer the requests for listings."""
        listing = self.conntrack.answer()
        return ["list", *self.step(listing)]

    def start(self, *changes: Change) -> list[str]:
        """Let the initial sync arrive: the store is ready, has a profile and one endpoint."""
        entries = [self.store.change(READY, "true"), *self.store.profile_changes("web", ALLOW)]
        entries += [self.store.endpoint_change(1, A), *changes]
        read = [events.StoreRead("/calico/v1", [change.entry for change in entries if change.entry is not None])]
        return self.step(*read, events.StoreRead("/calico/bgp/v1", []), events.StoreRead("/calico/ipam/v2/host", []))

    def status(self, number: int) -> tuple[str, str | None] | None:
        status = self.agent._health.endpoints.get(endpoint_id(number))
        return None if status is None else (status.status, status.reason)


def connection(source: str, destination: str) -> Connection:
    return Connection(Packet(source, destination, 6, 4000, 80), b"")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[AgentWorld]:
    """An agent that has not read the store yet."""
    level = logging.getLogger("calico").level
    yield AgentWorld(monkeypatch, tmp_path)
    logging.getLogger("calico").setLevel(level)


@pytest.fixture
def world(fresh: AgentWorld) -> AgentWorld:
    """An agent after its first update."""
    fresh.start()
    fresh.step()
    return fresh


def test_at_the_start_the_host_forwards_when_policy_is_there_and_denied_connections_are_ended(
    fresh: AgentWorld,
) -> None:
    fresh.conntrack.connections = [connection(A, B), connection(OUTSIDE, A)]
    journal = fresh.start(*fresh.store.profile_changes("web"))
    assert journal == [
        "nft",
        "list",
        f"end {OUTSIDE}",
        "nft",  # the fast path
        "host forward",
        "nft",  # the limit of connections
        "route cali1",
        "report set",
        "keeper start",
        "host check_firewall",
        "host start",
        "report beat_soon",
    ]
    assert fresh.nft.has_fast_path() and fresh.status(1) == ("up", None)
    assert fresh.is_ready == 0, "the report has the host's own failures before the agent says that it is ready"
    fresh.step()
    fresh.step()
    assert fresh.is_ready == 1


def test_changes_that_wait_are_taken_once_in_a_round_and_applied_together(world: AgentWorld) -> None:
    pending = PendingChanges("/calico/v1", world.queue.put)
    pending.put([world.store.endpoint_change(1, A, profile_ids=["closed"])])
    pending.put([world.store.endpoint_change(1, A), world.store.endpoint_change(2, B)])
    handle = world.agent._handle

    def handle_and_change(event: Any) -> None:
        handle(event)
        if isinstance(event, events.StoreChanged) and len(seen) < 4:
            pending.put([event.change])  # the store changes while the agent works
        seen.append(event)

    seen: list[Any] = []
    world.agent._handle = handle_and_change  # type: ignore[method-assign]
    assert world.agent.step()
    assert len(seen) == 2 and len(world.agent._snapshot.local) == 2
    assert world.agent.step()
    assert len(seen) == 4


def test_nothing_is_programmed_before_the_whole_store_has_been_read_and_is_ready(fresh: AgentWorld) -> None:
    entries = [*fresh.store.profile_changes("web"), fresh.store.endpoint_change(1, A)]
    changes = [change.entry for change in entries if change.entry is not None]
    assert fresh.step(events.StoreRead("/calico/v1", changes)) == []
    assert fresh.agent._health.waiting_for == "the store to be read"
    assert fresh.step(events.StoreRead("/calico/bgp/v1", []), events.StoreRead("/calico/ipam/v2/host", [])) == []
    assert "Ready" in str(fresh.agent._health.waiting_for)
    assert fresh.step(fresh.store.change(READY, "true"))[:3] == ["report beat_soon", "nft", "list"]
    assert fresh.agent._health.waiting_for is None


@pytest.mark.parametrize(
    ("directory", "large"),
    [
        ("/calico/v1", "/calico/v1/policy"),
        ("/calico/v1", "/calico/v1/policy/profile"),
        ("/calico/v1", f"/calico/v1/host/{HOST}"),
        ("/calico/v1", "/calico/v1/ipam"),
        ("/calico/bgp/v1", "/calico/bgp/v1/host"),
        ("/calico/ipam/v2/host", f"/calico/ipam/v2/host/{HOST}"),
    ],
)
def test_an_agent_that_starts_does_not_take_for_deleted_what_it_cannot_read(
    fresh: AgentWorld, directory: str, large: str
) -> None:
    ready = fresh.store.change(READY, "true").entry
    assert ready is not None

    def read(*unread: str) -> list[events.StoreRead]:
        found = {"/calico/v1": [ready], "/calico/bgp/v1": [], "/calico/ipam/v2/host": []}
        found[directory] += [Entry(key, "", 0, 0, "it is too large") for key in unread]
        return [events.StoreRead(*one) for one in found.items()]

    assert fresh.step(*read(large, "/calico/v1/policy/profile/web")) == []
    assert str(fresh.agent._health.waiting_for).startswith(large)
    assert "nft" in fresh.step(*read("/calico/v1/policy/profile/web", "/calico/v1/host/host2")), "what concerns a part"
    assert fresh.agent._health.waiting_for is None
    fresh.step(*read(large))
    assert fresh.agent._health.waiting_for is None, "an agent that runs keeps what it has read last"


def test_a_change_of_policy_is_followed_by_routes_then_connections_then_the_report(world: AgentWorld) -> None:
    changes = world.store.profile_changes("web")
    changes.append(world.store.endpoint_change(1, A, mac="02:00:00:00:00:77"))
    assert world.step(*changes) == ["nft", "route cali1", f"request {A} fe80::ff:fe00:77", "report set"]
    assert not world.nft.has_fast_path()
    world.conntrack.connections = [connection(OUTSIDE, A)]
    assert world.answer() == ["list", f"end {OUTSIDE}", "nft"] and world.nft.has_fast_path()


def test_a_new_address_is_verified_before_the_tables_and_routes_have_it(world: AgentWorld) -> None:
    world.routes.add_link("cali2", 12)
    world.conntrack.connections = [connection(OUTSIDE, B)]
    change = world.store.endpoint_change(2, B, profile_ids=["closed"])
    link = events.LinkChanged(world.routes.links["cali2"])
    assert world.step(*world.store.profile_changes("closed"), link, change) == [f"request {B}"]
    assert B not in str(world.nft.objects) and world.status(2) is None and 12 not in world.routes.routes
    journal = world.answer()
    assert journal[:3] == ["list", f"end {OUTSIDE}", "nft"] and journal[3] == "route cali2"
    assert journal[-1] == "report set" and world.status(2) == ("up", None)


def test_an_address_that_cannot_be_verified_is_reported_as_an_error(world: AgentWorld) -> None:
    world.step(world.store.endpoint_change(2, B))
    world.conntrack.error = "no memory"
    assert world.answer()[-1] == "report set" and world.status(2) == ("error", "no memory")


def test_a_shortage_of_descriptors_is_reported_at_the_tick(world: AgentWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shortage, "descriptors_lacking", lambda: "the agent cannot open files")
    world.clock += TICK
    world.step()
    assert world.agent._health.failures["descriptors"]["error"] == "the agent cannot open files"


def test_nothing_is_routed_while_the_tables_cannot_be_programmed(world: AgentWorld) -> None:
    world.nft.refusals = 3
    change = world.store.endpoint_change(1, A, mac="02:00:00:00:00:77")
    assert world.step(change) == ["nft refused", "nft refused", "report set"]
    status = world.status(1)
    assert status is not None and status[0] == "error" and "refused" in str(status[1])
    assert world.step(world.store.endpoint_change(1, A, profile_ids=[])) == [], "it waits for the backoff"
    world.clock += BACKOFF
    assert world.agent._next_at() <= world.clock
    assert world.step() == ["nft refused", "report set"]
    world.clock += BACKOFF
    journal = world.step()
    assert journal[:2] == ["nft", "route cali1"] and world.status(1) == ("up", None)


def test_while_the_store_is_not_ready_everything_stays_and_lost_tables_are_restored(world: AgentWorld) -> None:
    before = {name: object for name, object in world.nft.objects.items() if connection_limit.TABLE not in name}
    deny = world.store.profile_changes("web")
    frozen = world.store.change(READY, "false")
    assert world.step(frozen, *deny, world.store.endpoint_change(1)) == ["report beat_soon"]
    world.nft.flush_ruleset()
    assert world.step(events.TablesChanged(frozenset(["calico"]))) == ["nft"]
    changed = {name for name in before if world.nft.objects[name] != before[name]}
    assert {name.split()[-1] for name in changed} <= {
        "outbound-forward",
        "inbound-forward",
        "outbound-to-host",
        "to-host",
    }
    assert not world.nft.has_fast_path(), "connections may have begun while there were no tables"
    assert world.routes.routes == {11: (A,)}
    journal = world.step(world.store.change(READY, "true"))
    assert journal[:4] == ["report beat_soon", "host set_ipv6", "nft", "clear 11"] and world.status(1) is None


def test_an_agent_that_is_replaced_changes_nothing_until_it_has_the_host_again(world: AgentWorld) -> None:
    deny = world.store.profile_changes("web")
    assert world.step(events.Replaced("Another machine reports"), *deny) == []
    assert world.agent._health.replaced == "Another machine reports" and world.agent._health.last_error
    assert world.step(events.Replaced(None))[:3] == ["report resync", "keeper resync", "nft"]
    assert world.nft.chain("inbound/web") == []


def test_what_keeps_the_host_from_its_store_is_taken_back_before_the_store_is_read(fresh: AgentWorld) -> None:
    fresh.routes.routes = {11: (A, B)}
    fresh.step()
    assert fresh.routes.routes == {11: (A, B)}
    fresh.step(events.ServersChanged(Servers(frozenset([B]))))
    assert fresh.routes.routes == {11: (A,)}
    error = fresh.agent._health.last_error
    assert error is not None and f"the route to {B} led to an endpoint, but that is a member" in error["error"]
    fresh.start(fresh.store.endpoint_change(2, B))
    assert fresh.routes.routes == {11: (A,)} and str(fresh.status(2)).startswith(f"('error', 'its address {B} is")


def test_a_member_that_is_known_later_is_taken_from_an_endpoint_without_the_store(world: AgentWorld) -> None:
    world.step(events.WatchFailed("/calico/v1", "no answer", ""), events.ServersChanged(Servers(frozenset([A]))))
    assert world.routes.routes.get(11, ()) == ()
    status = world.status(1)
    assert status is not None and status[0] == "error" and "a member of the etcd" in str(status[1])


def test_listings_that_arrive_while_the_store_is_not_ready_are_requested_again(world: AgentWorld) -> None:
    world.step(*world.store.profile_changes("web"))
    assert world.conntrack.requests
    world.step(world.store.change(READY, "false"))
    world.answer()
    assert not world.nft.has_fast_path()
    world.clock += TICK
    assert [entry for entry in world.step() if entry.startswith("request")] != []
    world.step(world.store.change(READY, "true"))
    world.answer()
    assert world.nft.has_fast_path()


def test_a_data_plane_that_is_added_is_applied_after_policy_and_before_connections(world: AgentWorld) -> None:
    other = OtherDataplane(world.journal)
    world.agent._forwarding.append(other)
    assert world.step(*world.store.profile_changes("web"))[:2] == ["nft", "other"]
    assert world.journal[2].startswith("request")
    world.nft.refusals = 2
    world.step(*world.store.profile_changes("web", ALLOW))
    assert isinstance(other.events[-1], events.PolicyFailed) and "other" not in world.journal


def test_an_internal_error_has_everything_resynced_and_reloaded(world: AgentWorld) -> None:
    other = OtherDataplane(world.journal)
    world.agent._forwarding.append(other)
    other.error = RuntimeError("an internal error")
    journal = world.step(*world.store.profile_changes("web"))
    assert journal[:2] == ["nft", "other"] and "other resync" in journal and world.routes.listings == 2
    assert "an internal error" in str(world.agent._health.last_error)
    assert not [entry for entry in world.journal if entry.startswith("request")]
    world.clock += TICK
    journal = world.step()
    assert [entry for entry in journal if entry in ("nft", "route cali1", "other")] == ["nft", "route cali1", "other"]
    assert "delete table" in world.nft.transactions[-1] and not world.nft.has_fast_path()
    world.answer()
    assert world.nft.has_fast_path()


def test_an_event_that_cannot_be_handled_does_not_end_the_agent(world: AgentWorld) -> None:
    world.step(events.LinkChanged(None, deleted=False))  # type: ignore[arg-type]
    assert "had an internal error with an event, LinkChanged" in str(world.agent._health.last_error)
    assert "LinkChanged" not in world.agent._health.failures
    world.clock += TICK
    assert "report resync" in world.step(), "the kernel is read again"
    world.step(events.StoreChanged(None))  # type: ignore[arg-type]
    assert "calicoctl node restart" in world.agent._health.failures["StoreChanged"]["error"], "it lasts"


@pytest.mark.parametrize(
    ("error", "is_crash"), [(RuntimeError("an internal error"), True), (CalicoError("a port is in use"), False)]
)
def test_an_agent_logs_why_it_ends(
    error: Exception, is_crash: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(process, "DIRECTORY", tmp_path)
    monkeypatch.setattr(process, "log_to", lambda _: None)
    caplog.set_level(logging.INFO, "calico")
    monkeypatch.setattr(module, "_run", fail)
    with pytest.raises(type(error)):
        module.run(HOST, Options())
    assert "the agent ends" in caplog.text and str(error) in caplog.text
    with pytest.raises(type(error)):
        module.run(HOST, Options())
    assert ("the agent before" in caplog.text) == is_crash, "as if it could not have logged why"


def test_lost_events_of_the_kernel_are_followed_by_a_resync(world: AgentWorld) -> None:
    world.routes.add_link("cali1", 21)
    world.network = HostNetwork.of([InterfaceAddress(B, B, 32, "eth0")])
    world.clock += RESYNC_INTERVAL - TICK
    assert {"route cali1", "report resync"} <= set(world.step(events.KernelEventsLost()))
    assert world.routes.routes == {21: (A,)} and B in world.agent._snapshot.network.in_use
    world.clock += TICK
    assert "report resync" not in world.step(), "the interval begins again"


def test_a_resync_comes_from_time_to_time_and_is_retried_when_it_fails(
    world: AgentWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(links: Any) -> None:
        raise CalicoError("the listing was interrupted")

    world.clock += RESYNC_INTERVAL
    monkeypatch.setattr(world.routes, "read", fail)
    world.step()
    assert "the listing was interrupted" in str(world.agent._health.last_error)
    monkeypatch.undo()
    world.clock += TICK
    monkeypatch.setattr(module.time, "monotonic", lambda: world.clock)
    world.routes.routes[99] = (B,)
    assert "clear 99" in world.step()


def test_the_report_has_what_the_threads_say(world: AgentWorld) -> None:
    health = world.agent._health
    world.step(events.WatchFailed("/calico/v1", "no etcd answers", "2026-01-01T00:00:00Z"))
    assert health.store.watch.works is False and "report beat_soon" in world.journal
    assert "no etcd answers; the kernel is left as it is" in str(health.last_error)
    world.step(events.WritesFailed("etcd is full", "2026-01-01T00:00:00Z"))
    assert health.store.writes.error == "etcd is full" and "etcd is full" in str(health.last_error)
    world.step(events.WritesRecovered(), events.WatchRecovered("/calico/v1"))
    assert health.store.writes.works
    world.step(events.StoreRead("/calico/v1", []))
    assert health.resyncs == 1 and {"keeper resync", "report resync"} <= set(world.journal)
    world.step(Action(REATTACHED, "it has its interface back"), events.Failure("no iptables", "the host's firewall"))
    assert health.reattached == 1 and health.failures["the host's firewall"]["error"] == "no iptables"
    with pytest.raises(CalicoError, match="a thread failed"):
        world.step(events.ThreadDied("a thread failed"))


def test_an_address_that_the_host_gets_is_taken_from_an_endpoint(world: AgentWorld) -> None:
    world.network = HostNetwork.of([InterfaceAddress(A, A, 32, "eth0")])
    journal = world.step(events.AddressesChanged())
    assert journal[:2] == ["nft", "route cali1"] and world.routes.routes == {11: ()}
    assert world.status(1) == ("error", f"its address {A} is this host's own address (on eth0)")


def test_the_settings_reach_the_keeper_the_host_and_the_log(world: AgentWorld) -> None:
    assert world.host.last["forward"] == (False,)
    world.step(
        world.store.change("/calico/bgp/v1/host/host1/ip_addr_v6", "2001:db8::2"),
        world.store.change("/calico/v1/config/GraceTime", "7"),
        world.store.change("/calico/v1/config/LogSeverityScreen", "Error"),
    )
    assert world.host.last["set_ipv6"] == (True,) and world.keeper.grace_time == 7
    assert logging.getLogger("calico").level == logging.ERROR
    assert world.routes.next_hops == {11: "2001:db8::2"}


def test_the_keeper_may_use_the_store_when_the_agent_may(world: AgentWorld) -> None:
    assert world.keeper.last["set_ready"] == (True,)
    world.step(world.store.change(READY, "false"))
    assert world.keeper.last["set_ready"] == (False,)


def test_the_report_is_in_a_file(world: AgentWorld) -> None:
    world.step(world.store.change("/calico/v1/policy/profile/web/tags", "nonsense"))
    report = json.loads(process.report_file(HOST).read_text())
    assert report["first_update"] and report["endpoints"]["up"] == 1
    assert [problem["key"] for problem in report["problems"]] == ["/calico/v1/policy/profile/web/tags"]


def test_the_macs_of_the_host_are_published_while_it_is_registered(world: AgentWorld) -> None:
    key, mac = f"/calico/bgp/v1/host/{HOST}/macs", "02:00:00:00:00:11"
    world.start()
    world.network = HostNetwork(macs={"eth0": frozenset([mac])})
    assert "report publish_macs" not in world.step(events.AddressesChanged()), "it is not registered"
    world.step(world.store.change(f"/calico/bgp/v1/host/{HOST}/ip_addr_v4", "172.18.0.11"))
    assert world.report.last["publish_macs"] == (frozenset([mac]),)
    assert "report publish_macs" not in world.step(world.store.change(key, [mac.upper()])), "the store has them"
    assert "report publish_macs" in world.step(world.store.change(key, [])), "another program has changed them"


def test_a_host_that_was_removed_from_elsewhere_says_so(world: AgentWorld) -> None:
    def troubles() -> list[str]:
        failures = json.loads(process.report_file(HOST).read_text())["troubles"]
        return [failure["error"] for failure in failures if failure["subject"] == "registration"]

    key = f"/calico/bgp/v1/host/{HOST}/ip_addr_v4"
    world.step(world.store.change(key, "172.18.0.11"))
    assert troubles() == []
    world.step(world.store.change(key, None))
    assert troubles()[0].startswith(f"host {HOST} is not registered any more")
    world.step(world.store.change(key, "172.18.0.11"))
    world.step(events.StoreRead("/calico/bgp/v1", []))  # it was cut off when it was removed
    assert troubles()[0].startswith(f"host {HOST} is not registered any more")
    world.step(world.store.change(key, "172.18.0.11"))
    assert troubles() == []


def test_a_peer_of_an_ip_version_that_the_host_is_not_registered_for_is_a_problem(world: AgentWorld) -> None:
    def troubles() -> list[str]:
        failures = json.loads(process.report_file(HOST).read_text())["troubles"]
        return [failure["error"] for failure in failures if failure["subject"] == "bgp peers of IPv6"]

    of_host, peer = f"/calico/bgp/v1/host/{HOST}", {"ip": "fd00:18::fe", "as_num": "64512"}
    world.step(world.store.change(f"{of_host}/peer_v6/fd00:18::fe", peer))
    assert troubles() == [], "that the host is not registered is said already"
    world.step(world.store.change(f"{of_host}/ip_addr_v4", "172.18.0.11"))
    assert troubles() == [
        "there is no session with BGP peer fd00:18::fe, since this host has no IPv6 address: register it with "
        "'calicoctl node --ip6=ADDRESS', and its other options"
    ]
    world.step(world.store.change(f"{of_host}/ip_addr_v6", "fd00:18::11"))
    assert troubles() == []


def test_the_loop_waits_for_what_is_due_first(world: AgentWorld) -> None:
    assert world.agent._next_at() == world.agent._tick_at == world.clock + TICK
    world.step(events.GatewaysChanged())
    assert world.agent._next_at() == world.clock + network_monitor.PAUSE
    assert world.agent._wait(world.clock) == []
    world.queue.put(1)
    world.queue.put(2)
    assert world.agent._wait(world.clock + 60) == [1, 2]


def test_changes_of_the_hosts_firewall_are_passed_on(world: AgentWorld) -> None:
    assert world.step(events.TablesChanged(frozenset(["filter"]))) == ["host firewall_changed"]
    assert world.step(events.TablesChanged(frozenset(["other"]))) == []


def test_the_loop_ends_when_it_is_asked_to_and_counts_what_came_before(world: AgentWorld) -> None:
    world.queue.put(events.Stop())
    world.queue.put(Action(REATTACHED, "it has its interface back"))
    assert not world.agent.step() and world.agent._health.reattached == 1


def test_removed_endpoints_have_their_workloads_checked(world: AgentWorld) -> None:
    assert "keeper enqueue" in world.step(world.store.endpoint_change(1))
    assert isinstance(endpoint_id(1), EndpointId)
