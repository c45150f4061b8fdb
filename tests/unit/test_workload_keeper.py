"""The workload keeper: which event makes it reconcile which workload, when, and what it does with the result.

The fakes are at `upkeep.reconcile`, the engine's list of containers, the worker threads, and the clock.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

import pytest

from calicoctl import state
from calicoctl.datastore import keys
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Endpoint
from calicoctl.errors import CalicoError, Conflict, DockerUnavailable, NamespaceError, StoreUnavailable
from calicoctl.felix import events, sources, workload_keeper
from calicoctl.felix.workload_keeper import WorkloadKeeper
from calicoctl.workloads import connected, labelling, learning, locks, upkeep
from calicoctl.workloads.labelling import Labelled, LabelsRefused
from calicoctl.workloads.locks import WorkloadLock
from calicoctl.workloads.upkeep import COLLECTED, REATTACHED, Action, NotConnectedHere
from calicoctl.workloads.workload import CNI, WorkloadState
from tests.unit.memory_store import MemoryStore

ONE, TWO = "1" * 64, "2" * 64
BLUE = "-var-run-netns-blue"


class InlinePool:
    """Takes tasks, and runs them when `run` is called, in the test's own thread."""

    def __init__(self, workers: object, resource: Callable[[], Any], report: Callable[[Any], None]) -> None:
        self._resource = resource
        self._report = report
        self.tasks: list[Callable[[Any], Any]] = []

    def submit(self, group: str, task: Callable[[Any], Any]) -> None:
        self.tasks.append(task)

    def run(self) -> None:
        tasks, self.tasks = self.tasks, []
        for task in tasks:
            self._report(task(self._resource()))


@dataclass
class Outcome:
    """What a reconciliation finds: the workload's state, what is done, and what fails after that."""

    state: WorkloadState | None = WorkloadState.RUNNING
    actions: list[Action] = field(default_factory=list)
    error: Exception | None = None
    seconds: float = 0.0


@dataclass
class Bench:
    """A keeper with fakes around it. `outcomes` are by workload's id; `reconciled` tells which were, in order."""

    keeper: WorkloadKeeper
    pool: InlinePool
    datastore: DatastoreClient
    now: float = 1000.0
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    reconciled: list[str] = field(default_factory=list)
    collected: list[str] = field(default_factory=list)
    reported: list[Any] = field(default_factory=list)
    containers: list[str] = field(default_factory=list)
    labels: dict[str, Labelled | Exception] = field(default_factory=dict)
    """By container's id, what its labels lead to; those of others do not ask for anything."""
    looked_at: list[str] = field(default_factory=list)
    """The containers whose labels were looked at."""

    def connect(self, _: object, id: str) -> Labelled:
        self.looked_at.append(id)
        found = self.labels.get(id, Labelled(False))
        if isinstance(found, Exception):
            raise found
        return found

    def reconcile(
        self, _: object, orchestrator: str, id: str, may_collect: Callable[[WorkloadState], bool], removed: bool
    ) -> Iterator[Action]:
        outcome = self.outcomes.get(id, Outcome())
        self.reconciled.append(id)
        self.now += outcome.seconds
        may = outcome.state is not None and may_collect(outcome.state)
        if may and outcome.state in (WorkloadState.MISSING, WorkloadState.GONE):
            self.collected.append(id)
        yield from outcome.actions
        if outcome.error is not None:
            raise outcome.error

    def take(self, *items: Any) -> list[str]:
        """Have the keeper handle events, and everything that is due then; return the ids that were reconciled."""
        before = len(self.reconciled)
        todo = list(items)
        for _ in range(10):
            while not self.keeper.inbox.empty():
                todo.append(self.keeper.inbox.get_nowait())
            self.keeper.process(todo)
            self.pool.run()
            todo = []
            if self.keeper.inbox.empty():
                break
        return self.reconciled[before:]

    def wait(self, seconds: float) -> list[str]:
        self.now += seconds
        return self.take()

    def failures(self) -> list[str]:
        return [item.why for item in self.reported if not isinstance(item, Action)]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    monkeypatch.setattr(locks, "DIRECTORY", tmp_path)
    monkeypatch.setattr(workload_keeper, "WorkerPool", InlinePool)
    connected.set_first("vm")
    connected.put("vm", "namespace", BLUE, "/proc/self/ns/net")
    datastore = DatastoreClient(MemoryStore(), "vm")
    reported: list[Any] = []
    keeper = WorkloadKeeper(lambda: datastore, reported.append, clock=lambda: made.now)
    made = Bench(keeper, keeper._pool, datastore, reported=reported)  # type: ignore[arg-type]
    monkeypatch.setattr(upkeep, "reconcile", made.reconcile)
    monkeypatch.setattr(upkeep, "misattached", lambda paths: [])
    monkeypatch.setattr(labelling, "connect", made.connect)
    monkeypatch.setattr(
        sources, "list_containers", lambda: {id: events.Container(True, None) for id in made.containers}
    )
    return made


def listed(*ids: str) -> events.EngineListed:
    return events.EngineListed({id: events.Container(True, None) for id in ids})


def changed(id: str, removed: bool = False) -> events.ContainerChanged:
    return events.ContainerChanged(id, removed)


def docker(id: str) -> EndpointId:
    return EndpointId("vm", "docker", id, "e" * 32)


def namespace(id: str) -> EndpointId:
    return EndpointId("vm", "namespace", id, "f" * 32)


def put_endpoint(bench: Bench, id: EndpointId) -> None:
    bench.datastore.create_endpoint(Endpoint(id))


def test_a_container_that_changes_is_reconciled(bench: Bench) -> None:
    assert bench.take(listed()) == []
    assert bench.take(changed(ONE)) == [ONE]
    assert bench.wait(600) == []


def test_workloads_of_other_orchestrators_are_ignored(bench: Bench) -> None:
    bench.take(listed())
    bench.keeper.enqueue(EndpointId("vm", "openstack", "vm1", "e" * 32))
    bench.keeper.enqueue(EndpointId("vm", "libnetwork", "e" * 64, "e" * 64))
    bench.keeper.enqueue(docker("no-id"))
    assert bench.take(changed("no-id")) == []
    assert bench.wait(600) == []
    assert bench.failures() == []


def test_containers_wait_until_the_engine_has_listed_them_and_namespaces_do_not(bench: Bench) -> None:
    bench.keeper.enqueue(docker(ONE))
    bench.keeper.enqueue(namespace(BLUE))
    assert bench.take() == [BLUE]
    assert bench.take(listed(ONE)) == [ONE]
    assert bench.take(events.EngineUnavailable("Docker cannot be reached"), changed(ONE)) == []
    assert bench.take(listed(ONE)) == [ONE]


def test_an_endpoint_without_interface_is_reconciled_but_not_again_and_again(bench: Bench) -> None:
    bench.outcomes[BLUE] = Outcome(actions=[Action(REATTACHED, "attached")])
    bench.keeper.enqueue(namespace(BLUE))
    assert bench.take() == [BLUE]
    assert bench.reported == [Action(REATTACHED, "attached")]
    bench.keeper.enqueue(namespace(BLUE))
    assert bench.wait(9.9) == []
    assert bench.wait(0.1) == [BLUE]


def test_a_deleted_endpoint_is_reconciled_after_a_while_since_a_tool_may_write_it_anew(bench: Bench) -> None:
    bench.keeper.enqueue(namespace(BLUE), deleted=True)
    assert bench.take() == []
    assert bench.wait(29.9) == []
    assert bench.wait(0.1) == [BLUE]


def test_a_missing_namespace_is_collected_when_the_grace_time_is_over(bench: Bench) -> None:
    bench.keeper.grace_time = 60.0
    bench.outcomes[BLUE] = Outcome(state=WorkloadState.MISSING)
    bench.keeper.enqueue(namespace(BLUE))
    assert bench.take() == [BLUE]
    bench.wait(59.0)
    assert bench.collected == []
    assert bench.wait(1.0) == [BLUE]
    assert bench.collected == [BLUE]
    connected.forget("vm", "namespace", BLUE)
    assert bench.wait(600) == []


def test_the_grace_time_of_a_namespace_that_came_back_counts_anew(bench: Bench) -> None:
    bench.outcomes[BLUE] = Outcome(state=WorkloadState.MISSING)
    bench.keeper.enqueue(namespace(BLUE))
    bench.take()
    bench.outcomes[BLUE] = Outcome(state=WorkloadState.RUNNING)
    bench.now += 50
    bench.keeper.enqueue(namespace(BLUE))
    bench.take()
    bench.outcomes[BLUE] = Outcome(state=WorkloadState.MISSING)
    bench.keeper.enqueue(namespace(BLUE))
    bench.take()
    bench.wait(59)
    assert bench.collected == []
    bench.wait(1)
    assert bench.collected == [BLUE]


def test_a_removed_container_is_collected_at_once(bench: Bench) -> None:
    bench.take(listed())
    bench.outcomes[ONE] = Outcome(state=WorkloadState.GONE)
    assert bench.take(changed(ONE, removed=True)) == [ONE]
    assert bench.collected == [ONE]


def test_a_container_unknown_to_an_engine_that_knows_another_of_ours_is_collected_at_once(bench: Bench) -> None:
    bench.take(workload_keeper.Resynced({("docker", TWO): 1}))
    bench.outcomes[ONE] = Outcome(state=WorkloadState.GONE)
    assert bench.take(listed(TWO), changed(ONE)) == [ONE]
    assert bench.collected == [ONE]


@pytest.mark.parametrize("away", [False, True])
def test_a_container_is_kept_for_the_grace_time_after_an_engine_starts_that_may_not_know_it_yet(
    bench: Bench, away: bool
) -> None:
    if away:
        bench.take(workload_keeper.Resynced({("docker", TWO): 1}), listed(TWO), events.EngineUnavailable("it restarts"))
    bench.outcomes[ONE] = Outcome(state=WorkloadState.GONE)
    assert bench.take(listed(TWO), changed(ONE)) == [ONE]
    assert bench.collected == []
    bench.wait(60)
    assert bench.collected == [ONE]


def add_endpoint(bench: Bench, id: str, state: str) -> None:
    endpoint_id = EndpointId("vm", "docker", id, "e" * 32)
    bench.datastore.create_endpoint(Endpoint(endpoint_id, state=state, workload_name="web"))


def test_containers_that_do_not_match_their_endpoints_are_reconciled(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "cali" + "e" * 11)])
    ids = [digit * 64 for digit in "123456"]
    runs, stopped, revived, renamed, unknown, nameless = ids
    for id in ids:
        add_endpoint(bench, id, "inactive" if id in (stopped, revived) else "active")
    bench.take(
        events.EngineListed(
            {
                runs: events.Container(True, "web"),
                stopped: events.Container(False, "web"),
                revived: events.Container(True, "web"),
                renamed: events.Container(True, "db"),
                nameless: events.Container(True, None),
            }
        )
    )
    assert bench.reconciled == [revived, renamed, unknown]


def test_containers_are_compared_with_a_new_list_from_time_to_time(bench: Bench) -> None:
    bench.take(listed())
    add_endpoint(bench, ONE, "inactive")
    bench.containers = [ONE]
    assert bench.wait(299) == []
    assert bench.wait(1) == [ONE]


def test_a_comparison_that_fails_is_reported_and_repeated_after_a_minute(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_list() -> None:
        raise DockerUnavailable("no list")

    bench.take(listed())
    monkeypatch.setattr(sources, "list_containers", no_list)
    bench.wait(300)
    assert bench.failures() == ["the workload keeper failed (DockerUnavailable: no list)"]
    bench.wait(59)
    assert len(bench.failures()) == 1
    bench.wait(1)
    assert len(bench.failures()) == 2


def test_a_comparison_that_succeeds_ends_the_backoff_of_containers(bench: Bench) -> None:
    bench.take(listed())
    bench.outcomes[ONE] = Outcome(state=None, error=DockerUnavailable("no answer"), seconds=1000.0)
    bench.take(changed(ONE))
    bench.outcomes = {}
    assert bench.take(workload_keeper.Resynced({})) == [ONE]


def test_a_shorter_grace_time_applies_to_what_is_kept_already(bench: Bench) -> None:
    bench.outcomes[BLUE] = Outcome(state=WorkloadState.MISSING)
    bench.keeper.enqueue(namespace(BLUE))
    bench.take()
    bench.keeper.grace_time = 20.0
    bench.wait(10)
    assert bench.collected == []
    bench.wait(10)
    assert bench.collected == [BLUE]


def test_a_locked_workload_is_retried_and_reported_only_after_the_lock_timeout(bench: Bench) -> None:
    bench.outcomes[BLUE] = Outcome(state=None, error=Conflict("locked"))
    bench.keeper.enqueue(namespace(BLUE))
    assert bench.take() == [BLUE]
    for _ in range(int(locks.PATIENCE / 0.5) - 1):
        assert bench.wait(0.5) == [BLUE]
    assert bench.failures() == []
    bench.wait(0.5)
    bench.wait(0.5)
    assert bench.failures() == [f"namespace {BLUE}: locked"]


def test_a_failure_is_retried_once_before_it_is_reported_and_reported_once(bench: Bench) -> None:
    bench.outcomes[BLUE] = Outcome(error=CalicoError("no such thing"))
    bench.keeper.enqueue(namespace(BLUE))
    bench.take()
    assert bench.failures() == []
    assert bench.wait(0.5) == [BLUE]
    assert bench.failures() == [f"namespace {BLUE}: no such thing"]
    assert bench.wait(9.0) == []
    assert bench.wait(1.0) == [BLUE]
    assert len(bench.failures()) == 1
    bench.outcomes[BLUE] = Outcome()
    assert bench.wait(10.0) == [BLUE]
    assert bench.wait(600) == []


def test_a_failure_that_took_long_is_reported_at_once_and_retried_after_as_long(bench: Bench) -> None:
    bench.outcomes[BLUE] = Outcome(error=ValueError("odd"), seconds=30.0)
    bench.keeper.enqueue(namespace(BLUE))
    bench.take()
    assert bench.failures() == [f"namespace {BLUE}: ValueError: odd"]
    assert bench.wait(29.0) == []
    assert bench.wait(1.0) == [BLUE]


def test_an_event_cuts_a_backoff_short(bench: Bench) -> None:
    bench.outcomes[BLUE] = Outcome(error=CalicoError("no"), seconds=1.0)
    bench.keeper.enqueue(namespace(BLUE))
    bench.take()
    bench.keeper.enqueue(namespace(BLUE))
    assert bench.take() == [BLUE]


def test_what_was_done_before_a_failure_is_reported(bench: Bench) -> None:
    bench.outcomes[BLUE] = Outcome(actions=[Action(COLLECTED, "released")], error=CalicoError("then that"))
    bench.keeper.enqueue(namespace(BLUE))
    bench.take()
    assert bench.reported == [Action(COLLECTED, "released")]


def test_an_unavailable_store_holds_up_everything_for_a_second(bench: Bench) -> None:
    bench.outcomes[BLUE] = Outcome(state=None, error=StoreUnavailable("no etcd"))
    bench.keeper.enqueue(namespace(BLUE))
    assert bench.take() == [BLUE]
    connected.put("vm", "namespace", "-x", "/proc/self/ns/net")
    bench.keeper.enqueue(namespace("-x"))
    assert bench.wait(0.9) == []
    del bench.outcomes[BLUE]
    assert sorted(bench.wait(0.1)) == [BLUE, "-x"]
    assert bench.failures() == []


def test_nothing_is_started_while_the_store_may_not_be_used(bench: Bench) -> None:
    bench.keeper.set_ready(False)
    bench.keeper.enqueue(namespace(BLUE))
    assert bench.take() == []
    bench.keeper.set_ready(True)
    assert bench.take() == [BLUE]


def test_when_the_engine_answers_about_one_container_others_it_did_not_answer_about_are_retried(bench: Bench) -> None:
    bench.take(listed())
    for id in (ONE, TWO):
        bench.outcomes[id] = Outcome(state=None, error=DockerUnavailable("no answer"), seconds=20.0)
    assert bench.take(changed(ONE), changed(TWO)) == [ONE, TWO]
    bench.outcomes = {}
    assert bench.take(changed(ONE)) == [ONE, TWO]


def test_a_workload_whose_state_was_not_known_is_kept_for_the_grace_time_after_that(bench: Bench) -> None:
    bench.outcomes[BLUE] = Outcome(state=None, error=NamespaceError("cannot be read"), seconds=1.0)
    bench.keeper.enqueue(namespace(BLUE))
    bench.take()
    bench.outcomes[BLUE] = Outcome(state=WorkloadState.GONE)
    assert bench.wait(10) == [BLUE]
    assert bench.collected == []
    assert bench.wait(50) == [BLUE]
    assert bench.collected == [BLUE]


def test_a_resync_reconciles_workloads_whose_addresses_do_not_match_their_endpoints(bench: Bench) -> None:
    for handle, count in {f"namespace.{BLUE}": 2, "namespace.-fits": 1, "other.x": 1}.items():
        bench.datastore.set(keys.ipam_handle(handle), json.dumps({"id": handle, "block": {"10.0.0.0/26": count}}))
    assert bench.take(workload_keeper.Resynced({("namespace", BLUE): 1, ("namespace", "-fits"): 1})) == [BLUE]


def test_an_interrupted_change_is_found_by_a_sweep(bench: Bench) -> None:
    bench.take()
    with WorkloadLock("vm", "namespace", BLUE) as lock:
        lock.mark_in_progress()
    assert bench.wait(9.0) == []
    assert bench.wait(1.0) == [BLUE]


def test_a_namespace_with_a_damaged_file_is_reconciled_which_reports_it(bench: Bench) -> None:
    state.path("vm", "workloads", "namespace", BLUE).write_bytes(b"")
    bench.keeper.enqueue(namespace(BLUE))
    assert bench.take() == [BLUE] and bench.failures() == []


def test_a_namespace_whose_path_comes_back_is_reconciled_when_something_is_mounted(
    bench: Bench, tmp_path: Path
) -> None:
    path = tmp_path / "blue"
    id = str(path).replace("/", "-")
    connected.put("vm", "namespace", id, str(path))
    bench.outcomes[id] = Outcome(state=WorkloadState.MISSING)
    assert bench.take() == [id], "nothing is at its path"
    bench.outcomes = {}
    path.symlink_to("/proc/self/ns/net")
    assert bench.take(events.MountsChanged()) == [id]
    assert bench.take(events.MountsChanged()) == []
    bench.outcomes[id] = Outcome(state=WorkloadState.MISSING)
    bench.keeper.enqueue(namespace(id))
    assert bench.take() == [id]
    bench.outcomes = {}
    assert bench.take(events.MountsChanged()) == [id], "it was missing meanwhile, though it looks as before"


def test_a_container_attached_through_cni_is_reconciled_when_its_namespace_changes(
    bench: Bench, tmp_path: Path
) -> None:
    path = tmp_path / "netns-1"
    path.symlink_to("/proc/self/ns/net")
    connected.put("vm", "cni", "c1", str(path), "1:2", network="net1", interface="eth0")
    put_endpoint(bench, EndpointId("vm", "cni", "c1", "1" * 32))
    put_endpoint(bench, EndpointId("vm", "cni", "other", "2" * 32))
    bench.take(workload_keeper.Resynced({}))
    (said,) = bench.failures()
    assert "connected 1 of the workloads" in said and "not attached: other." in said
    assert bench.take(events.MountsChanged()) == []
    path.unlink()
    assert bench.take(events.MountsChanged()) == ["c1"]
    bench.keeper.enqueue(EndpointId("vm", "cni", "c1", "1" * 32))
    assert bench.take() == ["c1"]


def test_a_namespace_that_nobody_has_connected_is_reported_and_costs_little_of_a_workers_time(bench: Bench) -> None:
    bench.outcomes["-a"] = Outcome(state=None, error=NotConnectedHere("-a"))
    put_endpoint(bench, namespace("-a"))
    put_endpoint(bench, namespace(BLUE))
    bench.keeper.enqueue(namespace("-a"))
    assert bench.take(workload_keeper.Resynced({})) == ["-a"], "once, to become inactive"
    bench.keeper.enqueue(namespace("-a"))
    bench.keeper.enqueue(namespace("-b"))
    assert bench.wait(10) == []
    one, two = bench.failures()
    assert "connected 1 of the workloads" in one and "not attached: -a." in one
    assert "connected 2 of the workloads" in two and "not attached: -a, -b." in two
    connected.put("vm", "namespace", "-a", "/proc/self/ns/net")
    bench.keeper.enqueue(namespace("-b"), deleted=True)
    bench.wait(10)
    assert bench.failures()[2:] == [None]


def test_a_container_that_nobody_has_connected_is_reported_and_not_retried(bench: Bench) -> None:
    bench.outcomes[ONE] = Outcome(error=NotConnectedHere(ONE))
    put_endpoint(bench, docker(ONE))
    bench.containers = [ONE]
    assert bench.take(listed(ONE)) == [ONE], "it has no interface"
    (said,) = bench.failures()
    assert f"connected 1 of the workloads that have endpoints here, so it is not attached: {ONE[:12]}." in said
    assert bench.wait(100) == []


def test_containers_that_exist_only_in_the_store_are_reconciled_after_all_others(bench: Bench) -> None:
    connected.put("vm", "docker", ONE)
    connected.put("vm", "docker", TWO)
    bench.containers = [ONE, TWO]
    invented = {f"{number:064x}" for number in range(200)}
    for id in invented:
        put_endpoint(bench, docker(id))
        bench.outcomes[id] = Outcome(WorkloadState.GONE)
    assert set(bench.take(listed(ONE, TWO))) < invented
    bench.outcomes[ONE] = Outcome(None, error=CalicoError("it is just ending"))
    for id in (*invented, ONE):
        bench.keeper.enqueue(docker(id))
    some = bench.take(changed(TWO))
    assert {ONE, TWO} <= set(some[:8])
    assert some.count(ONE) == 1 and len(bench.reconciled) < len(invented)
    assert bench.wait(1)[0] == ONE, "its retry does not wait for them either"
    for _ in range(10):
        bench.take()
    assert set(bench.reconciled) == {*invented, ONE, TWO}
    bench.collected.clear()
    bench.wait(700)
    for _ in range(10):
        bench.take()
    assert set(bench.collected) == invented, "they are collected when the grace time is over"


def test_containers_that_were_removed_while_no_agent_ran_are_reconciled_even_without_endpoints(bench: Bench) -> None:
    connected.put("vm", "docker", ONE)
    connected.put("vm", "docker", TWO)
    assert bench.take(listed(TWO)) == [ONE]


def test_what_cannot_be_learned_is_reported_once_and_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for orchestrator in connected.ORCHESTRATORS:
        state.remove("vm", "workloads", f"{orchestrator}.learned")

    def full(*_: object) -> None:
        raise CalicoError("there is no space")

    monkeypatch.setattr(learning, "learn_containers", full)
    bench.take(listed(ONE))
    (said,) = bench.failures()
    assert said is not None and said.endswith("cannot be learned, and is not re-attached: there is no space")
    bench.take(workload_keeper.Resynced({}))
    learnt: list[dict[str, str]] = []
    monkeypatch.setattr(learning, "learn_containers", lambda _, modes: learnt.append(modes))
    bench.containers = [ONE]
    bench.wait(300)
    assert learnt == [{ONE: ""}] and bench.failures()[-1] is None


def test_the_end_of_a_source_is_reported_to_the_agent(bench: Bench) -> None:
    failed = events.ThreadDied("following the mounts failed")
    bench.take(failed)
    assert bench.reported == [failed]


def test_an_internal_error_is_reported_and_does_not_end_the_keeper(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(host: str, orchestrator: str) -> None:
        raise KeyError("odd")

    monkeypatch.setattr(locks, "remove_stale", broken)
    bench.keeper.enqueue(namespace(BLUE))
    bench.take()
    assert bench.failures() == ["the workload keeper failed (KeyError: 'odd')"]


def test_what_is_connected_is_read_once_and_not_once_more_for_each_workload(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, invented = [f"-{n}" for n in range(20)], [f"-invented{n}" for n in range(20)]
    for id in here:
        connected.put("vm", "namespace", id, f"/none/{id}")
    for id in (*invented, *here):
        put_endpoint(bench, namespace(id))
        with WorkloadLock("vm", "namespace", id) as lock:
            lock.mark_in_progress()
    asked: list[object] = []
    monkeypatch.setattr(connected, "get", lambda *names: asked.append(names))
    order = bench.take(workload_keeper.Resynced({}))
    assert {*order[:20]} == {*here} and {*order[20:]} >= {*invented}, "what was connected here goes first"
    assert bench.failures()[-1].startswith("nobody has connected 20 of the workloads") and asked == []


def test_what_connects_a_refused_workload_depends_on_its_kind() -> None:
    said: list[events.Failure] = []
    refused = workload_keeper.Refused(said.append)
    refused.replace(CNI, [(CNI, "c1")])
    assert "'calicoctl container add'" not in str(said[-1].why) and "Its runtime connects one" in str(said[-1].why)
    refused.replace("namespace", [("namespace", BLUE)])
    assert "'calicoctl container add' connects one, but its runtime" in str(said[-1].why)
    refused.replace(CNI, [])
    assert "runtime" not in str(said[-1].why)


# Labels


def started(id: str) -> events.ContainerChanged:
    return events.ContainerChanged(id, removed=False, started=True)


def labels_failed(bench: Bench) -> list[str | None]:
    return [item.why for item in bench.reported if isinstance(item, events.LabelsFailed)]


def test_the_labels_of_a_container_that_starts_are_looked_at_once(bench: Bench) -> None:
    bench.take(listed())
    action = Action(upkeep.CHANGED, "connected")
    bench.labels[ONE] = Labelled(True, action)
    assert bench.take(started(ONE)) == [ONE]
    assert bench.looked_at == [ONE] and bench.reported == [action]
    bench.take(changed(ONE))
    assert bench.looked_at == [ONE], "it was renamed, say"
    bench.take(started(ONE))
    assert bench.looked_at == [ONE, ONE]


def test_containers_without_labels_are_looked_at_once(bench: Bench) -> None:
    bench.take(listed())
    for _ in range(3):
        bench.take(started(ONE))
    assert bench.looked_at == [ONE]
    bench.take(changed(ONE, removed=True), started(TWO))
    assert bench.looked_at == [ONE, TWO]
    assert bench.keeper._unlabelled == {TWO}, "what is gone is forgotten"


def test_running_containers_that_may_have_labels_and_are_not_connected_are_found_in_the_list(bench: Bench) -> None:
    ids = [f"{number:064x}" for number in range(7)]
    labelled, none, bridge, stopped, connected_here, stored, disconnected = ids
    connected.put("vm", "docker", connected_here)
    add_endpoint(bench, stored, "active")
    bench.labels[labelled] = Labelled(True)
    containers = {id: events.Container(True, None, "none", labelled=True) for id in ids}
    containers[none] = events.Container(True, None, "none")
    containers[bridge] = events.Container(True, None, "bridge")
    containers[stopped] = events.Container(False, None, "none", labelled=True)
    bench.take(events.EngineListed(containers))
    assert bench.looked_at == [labelled, disconnected, none], "those without the label come last"


def test_what_cannot_be_connected_is_reported_once_and_retried(bench: Bench) -> None:
    bench.take(listed())
    bench.labels[ONE] = LabelsRefused("web", "IP 192.168.0.1 is already assigned")
    bench.take(started(ONE))
    assert bench.reported == [], "it may just be ending"
    bench.wait(0.5)
    assert bench.reported == [events.LabelsFailed(ONE, "web", "IP 192.168.0.1 is already assigned")]
    bench.wait(10)
    assert len(bench.looked_at) == 3 and len(bench.reported) == 1
    bench.labels[ONE] = LabelsRefused("web", "There is no such profile")
    bench.wait(20)
    assert labels_failed(bench)[1:] == ["There is no such profile"]
    bench.labels[ONE] = Labelled(True, Action(upkeep.CHANGED, "connected"))
    bench.wait(40)
    assert labels_failed(bench)[2:] == [None]
    assert bench.wait(600) == [] and len(bench.looked_at) == 5


def test_the_pauses_between_retries_grow_until_the_labels_may_succeed(bench: Bench) -> None:
    bench.take(listed())
    bench.labels[ONE] = LabelsRefused("web", "no")
    bench.take(started(ONE))
    bench.wait(0.5)
    for pause in (10, 20, 40, 60, 60):
        assert bench.wait(pause - 0.1) == [] and bench.wait(0.1) == [ONE], pause
    bench.keeper.retry_labels(None)
    bench.take()
    assert bench.wait(0.5) == [ONE] and bench.wait(9.9) == [] and bench.wait(0.1) == [ONE]
    assert len(labels_failed(bench)) == 1


def test_a_container_waits_for_the_endpoint_that_has_its_address(bench: Bench) -> None:
    holder = EndpointId("other", "docker", TWO, "1" * 32)
    bench.take(listed())
    bench.labels = {ONE: LabelsRefused("web", "taken", holder), TWO: LabelsRefused("db", "no such pool")}
    bench.take(started(ONE), started(TWO))
    bench.wait(0.5)
    for changed, retried in ((docker("3" * 64), []), (holder, [ONE]), (docker(TWO), [TWO])):
        bench.keeper.retry_labels(frozenset([changed]))
        bench.take()
        assert bench.wait(0.5) == retried


@pytest.mark.parametrize("how", ["policy", "an endpoint is deleted", "a container is collected"])
def test_a_container_that_failed_is_retried_as_soon_as_it_may_succeed(bench: Bench, how: str) -> None:
    bench.take(listed())
    bench.labels[ONE] = LabelsRefused("web", "no")
    bench.take(started(ONE))
    bench.wait(0.5)
    before = len(bench.looked_at)
    assert bench.wait(1.0) == []
    bench.labels[ONE] = Labelled(True)
    if how == "policy":
        bench.keeper.retry_labels(None)
    elif how == "an endpoint is deleted":
        bench.keeper.enqueue(docker(TWO), deleted=True)
    else:
        bench.outcomes[TWO] = Outcome(WorkloadState.GONE, [Action(COLLECTED, "released")])
        bench.take(changed(TWO, removed=True))
    bench.take()
    bench.wait(0.5)
    assert len(bench.looked_at) == before + 1


def test_a_failure_ends_with_its_container(bench: Bench) -> None:
    bench.take(listed())
    bench.labels[ONE] = LabelsRefused("web", "no")
    bench.take(started(ONE))
    bench.wait(0.5)
    connected.set_disconnected("vm", ONE, "then")
    bench.take(changed(ONE, removed=True))
    assert labels_failed(bench) == ["no", None] and connected.disconnected("vm") == set()
    assert bench.wait(600) == []


def test_labels_wait_for_the_store(bench: Bench) -> None:
    bench.take(listed())
    bench.labels[ONE] = StoreUnavailable("etcd is away")
    bench.take(started(ONE))
    bench.labels[ONE] = Labelled(True)
    bench.wait(1.0)
    assert bench.looked_at == [ONE, ONE] and bench.reported == []


def test_a_container_whose_first_connection_was_interrupted_is_looked_at(bench: Bench) -> None:
    bench.take(listed())
    with WorkloadLock("vm", "docker", ONE) as lock:
        lock.mark_in_progress()
    bench.wait(10)
    assert bench.looked_at == [ONE]


def test_what_commands_have_disconnected_is_forgotten_with_containers_that_are_gone(bench: Bench) -> None:
    for id in (ONE, TWO):
        connected.set_disconnected("vm", id, "then")
    bench.take(listed("3" * 64))
    assert connected.disconnected("vm") == {ONE, TWO}, "the engine may not have loaded its data yet"
    bench.take(listed(ONE))
    assert connected.disconnected("vm") == {ONE}
