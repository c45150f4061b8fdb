"""The thread that writes the host's status and those of its endpoints to the store."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest

from calicoctl.datastore import keys
from calicoctl.datastore.chosen import ChosenStore
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.detection import Choice
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.statuses import AgentStore, parse_agent_store
from calicoctl.errors import StoreError
from calicoctl.felix import heartbeat
from calicoctl.felix.health import Health, Status
from calicoctl.felix.heartbeat import Identity, claim
from calicoctl.felix.report import StoreReporter
from tests.unit.memory_store import Fault, MemoryStore

KEY = "/calico/felix/v1/host/host1/status"


def test_a_heartbeat_that_is_requested_while_one_is_sent_follows_at_once() -> None:
    store = MemoryStore()
    health = Health("host1", "1")
    reporter = StoreReporter(DatastoreClient(store, "host1"), health, lambda event: None)
    second = threading.Event()
    sent: list[Any] = []

    def fault() -> Fault:
        sent.append(KEY)
        if len(sent) == 1:  # what comes now is not in the heartbeat that is being sent
            health.first_update = True
            reporter.beat_soon()
        else:
            second.set()
        return None

    store.fault = fault
    reporter.start()
    try:
        assert second.wait(5), "long before the next one is due"
    finally:
        store.fault = lambda: None
        reporter.end()
    assert not reporter.is_alive()
    assert KEY not in store.entries, "the last thing that it does is to delete its status"


def test_a_heartbeat_that_fails_is_sent_again() -> None:
    store = MemoryStore()
    faults: list[Fault] = ["down"]
    reporter = StoreReporter(DatastoreClient(store, "host1"), Health("host1", "1"), lambda event: None)
    store.fault = lambda: faults.pop() if faults else None
    reporter.start()
    try:
        with store._changed:
            assert store._changed.wait_for(lambda: KEY in store.entries, 5)
            assert json.loads(store.entries[KEY].value)["first_update"] is False
    finally:
        reporter.end()


ID, OTHER, GONE = (EndpointId("host1", "docker", "w", name) for name in ("e1", "e2", "e3"))
UP, FAILED = Status("up", 3), Status("error", 4, "broken")


class Reported:
    """An agent's reporter, whose turns a test takes one by one."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.health = Health("host1", "1")
        self.health.first_update = True
        self.reporter = StoreReporter(DatastoreClient(store.client(), "host1"), self.health, lambda event: None)
        self.reporter.set({ID: UP, OTHER: FAILED})

    def turn(self) -> list[str]:
        """Beat, and write what is due; return the keys that were written."""
        revision = self.store.revision
        self.reporter._beaten = time.monotonic()
        self.reporter._beat()
        self.reporter._write_endpoints()
        return [change.key for at, change in self.store._history if at > revision and change.entry is not None]

    def statuses(self) -> dict[str, str]:
        found = self.store.tree("/calico/felix/v1/host/host1/workload")
        return {entry.key.rpartition("/")[2]: json.loads(entry.value)["status"] for entry in found}


def test_the_status_says_which_api_is_used_and_whether_it_is_frozen() -> None:
    backends = {"etcdv2": MemoryStore(), "etcdv3": MemoryStore(modern=True)}
    store = ChosenStore(lambda before: choice, lambda: choice, backends.__getitem__)
    reporter = StoreReporter(DatastoreClient(store, "host1"), Health("host1", "1"), lambda event: None)
    for api, frozen, pinned, interval in (
        ("etcdv2", False, False, heartbeat.INTERVAL),
        ("etcdv2", True, False, heartbeat.FROZEN_INTERVAL),
        ("etcdv3", False, True, heartbeat.INTERVAL),
    ):
        choice = Choice(api, frozen, "for a test", pinned=pinned)
        reporter._beat()
        found = parse_agent_store(backends[choice.api].entries[KEY].value)
        assert found == AgentStore(api, frozen, pinned)
        assert reporter._interval == interval
    for other in ("{}", '{"datastore": "etcdv3"}', "no JSON"):
        assert parse_agent_store(other) is None


@pytest.mark.parametrize("modern", [False, True], ids=["v2", "v3"])
def test_statuses_of_endpoints_live_as_long_as_the_hosts(modern: bool) -> None:
    store = MemoryStore(modern)
    store.put(keys.felix_endpoint(GONE), "{}")
    one = Reported(store)
    assert len(one.turn()) == 3 and one.statuses() == {"e1": "up", "e2": "error"}
    for _ in range(6):
        store.clock += 10
        assert one.turn() == ([] if modern else [KEY])
        one.reporter.resync()
    assert one.statuses() == {"e1": "up", "e2": "error"}
    one.reporter.set({OTHER: None})
    one.turn()
    assert one.statuses() == {"e1": "up"} and not one.reporter._hanging - {ID}

    store.clock += 40  # the agent could not reach the store
    assert one.statuses() == ({} if modern else {"e1": "up"})
    assert len(one.turn()) == (2 if modern else 1) and one.statuses() == {"e1": "up"}


def test_a_new_agent_does_not_let_statuses_expire_with_the_old_ones_lease() -> None:
    """That also holds for statuses without a lease, which came from a store without leases."""
    store = MemoryStore(modern=True)
    old = Reported(store)
    old.turn()
    store.put(keys.felix_endpoint(OTHER), FAILED.to_json())
    old.reporter._heartbeat.end()
    new = Reported(store)
    assert len(new.turn()) == 3
    for _ in range(5):
        store.clock += 10
        assert new.turn() == []
    assert new.statuses() == {"e1": "up", "e2": "error"}
    store.clock += 40  # it has died
    assert store.tree("") == []


def test_a_second_agent_of_the_host_makes_the_statuses_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore(modern=True)
    first = Reported(store)
    first.turn()
    own = Identity.own()
    monkeypatch.setattr(Identity, "own", lambda: Identity("another", "boot"))
    second = Reported(store)
    second.reporter.set({OTHER: None})
    monkeypatch.setattr(heartbeat, "YIELD_PATIENCE", 0.0)
    claim(DatastoreClient(store.client(), "host1"), True, False, lambda text: None)
    assert len(second.turn()) == 2
    first.reporter._beat()
    assert first.reporter._replaced_by == Identity("another", "boot")
    for _ in range(5):
        store.clock += 10
        second.turn()
        first.reporter._beat()
    assert second.statuses() == {"e1": "up"}, "the one that only the first has written has expired"

    monkeypatch.setattr(Identity, "own", lambda: own)
    claim(DatastoreClient(store.client(), "host1"), True, False, lambda text: None)
    assert len(first.turn()) == 3, "the other one is as this agent has written it, but hangs on the second's lease"


def test_many_statuses_hang_on_a_lease_after_few_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore(modern=True)
    many = {EndpointId("host1", "docker", "w", f"{number:x}"): UP for number in range(120)}

    def agent() -> Reported:
        reported = Reported(store)
        reported.reporter.set({**many, OTHER: None})
        store.requests = 0
        reported.turn()
        assert len(store._lease_of) == len(reported.statuses()) + 1 == 122
        assert len(set(store._lease_of.values())) == 1
        return reported

    agent()
    assert store.requests < 8
    agent().reporter.resync()
    assert store.requests < 10, "the one before has left the same statuses, but they hang on its lease"

    def refuse(self: MemoryStore, values: object, ttl: object) -> None:
        raise StoreError("too large")

    monkeypatch.setattr(MemoryStore, "put_all", refuse)
    agent()
    assert store.requests > 120, "they are tried one by one"
