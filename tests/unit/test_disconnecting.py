"""Disconnecting many workloads side by side: the order of what is reported, failures, and interrupts."""

from __future__ import annotations

import threading
from typing import Callable

import pytest

from calicoctl.datastore.client import DatastoreClient
from calicoctl.errors import CalicoError, NotFound
from calicoctl.workloads import disconnecting, wiring
from calicoctl.workloads.workload import Workload
from tests.unit.memory_store import MemoryStore

WORKLOADS = {("docker", str(number)) for number in range(9)}


class Work:
    """Disconnects the workloads 0 to 8, three at a time; `disconnect` says what happens to each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[str] = []
        self.reported: list[str] = []
        self.report: Callable[[str], object] = self.reported.append
        self.disconnect: Callable[[str], object] = lambda id: None
        monkeypatch.setattr(wiring, "disconnect", self._disconnect)

    def _disconnect(self, client: DatastoreClient, workload: Workload) -> None:
        self.begun.append(workload.id)
        self.disconnect(workload.id)

    def run(self) -> None:
        clients = [DatastoreClient(MemoryStore(), "host1") for _ in range(3)]
        disconnecting.disconnect_all(clients, WORKLOADS, lambda id: self.report(id))


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    return Work(monkeypatch)


def test_as_many_as_there_are_clients_are_disconnected_at_a_time_and_reported_in_order(work: Work) -> None:
    together = threading.Barrier(3)
    last_first = {id: threading.Event() for id in "012"}

    def disconnect(id: str) -> None:
        together.wait(30)
        if id in "01":
            assert last_first[str(int(id) + 1)].wait(30)
        if id in "012":
            assert work.reported == []
            last_first[id].set()

    work.disconnect = disconnect
    work.run()
    assert work.reported == sorted(work.begun) == list("012345678")


def test_what_is_gone_already_is_not_reported(work: Work) -> None:
    def disconnect(id: str) -> None:
        if id in "17":
            raise NotFound("gone")

    work.disconnect = disconnect
    work.run()
    assert work.reported == list("0234568")
    disconnecting.disconnect_all([], set(), work.report)


def test_after_a_failure_none_is_begun_and_the_first_error_is_raised(work: Work) -> None:
    together, failed = threading.Barrier(3), threading.Event()

    def disconnect(id: str) -> None:
        together.wait(30)
        if id == "2":
            failed.set()
            raise CalicoError("two")
        assert failed.wait(30)
        if id == "1":
            raise CalicoError("one")

    work.disconnect = disconnect
    with pytest.raises(CalicoError, match="one"):
        work.run()
    assert sorted(work.begun) == list("012") and work.reported == ["0"]


@pytest.mark.parametrize("hangs", [False, True])
def test_an_interrupt_lets_those_that_were_begun_be_completed(
    work: Work, hangs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If they do not end, the process does."""
    monkeypatch.setattr(disconnecting, "PATIENCE", 0.1 if hangs else 30)
    together, waited_for, end = threading.Barrier(3), threading.Event(), threading.Event()
    join = threading.Thread.join

    def joined(thread: threading.Thread, timeout: float | None = None) -> None:
        waited_for.set()
        join(thread, timeout)

    def disconnect(id: str) -> None:
        if id in "012":
            together.wait(30)
        if id != "0":
            assert (end if hangs else waited_for).wait(30)

    def report(id: str) -> None:
        work.reported.append(id)
        if id == "0":
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", joined)
    work.disconnect, work.report = disconnect, report
    with pytest.raises(KeyboardInterrupt):
        work.run()
    assert {"0", "1", "2"} <= set(work.begun) <= {"0", "1", "2", "3"}
    assert work.reported == (["0"] if hangs else sorted(work.begun))
    end.set()
