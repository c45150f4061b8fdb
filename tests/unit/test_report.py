"""The thread that writes the host's status and those of its endpoints to the store."""

from __future__ import annotations

import json
import threading
from typing import Any

from calicoctl.datastore.client import DatastoreClient
from calicoctl.felix.health import Health
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
