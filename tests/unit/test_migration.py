"""Moving the data from v2 to v3 and back: each step, on stores in memory."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Callable

import pytest

from calicoctl.datastore import keys, migration_run
from calicoctl.datastore.detection import Shown, decide
from calicoctl.datastore.migration import move
from calicoctl.datastore.migration_after import finish, roll_back
from calicoctl.datastore.migration_run import Run
from calicoctl.datastore.migration_state import Moved, State
from calicoctl.datastore.settings import V2, V3
from calicoctl.datastore.store import Delete, Entry, Write
from calicoctl.errors import CalicoError, CompareFailed, NoSuchApi, StoreError, StoreUnavailable
from tests.unit.memory_store import Fault, MemoryStore

TAGS, RULES = keys.profile_tags("web"), keys.profile_rules("web")
STATUS = keys.felix_status("host1")
READY = keys.READY


class Killed(BaseException):
    """The process is gone: nothing more is written."""


class World:
    """An etcd with two APIs; data is in v2."""

    def __init__(self) -> None:
        self.v2, self.v3 = MemoryStore(), MemoryStore(modern=True)
        for key, value in ((READY, "true"), (TAGS, "[]"), (RULES, "{}")):
            self.v2.put(key, value)
        self.told: list[str] = []

    def run(self) -> Run:
        return Run("http://etcd", lambda: (self.v2, self.v3), self.told.append)

    def move(self) -> Moved:
        return move(self.run())

    def agent(self, store: MemoryStore, host: str = "host1", **fields: object) -> None:
        """Report as an agent does."""
        api = V2 if store is self.v2 else V3
        value = {"datastore": {"api": api, "frozen": store.entries[READY].value == "false", "pinned": False, **fields}}
        store.put(keys.felix_status(host), json.dumps(value), 30)

    def used(self) -> tuple[str, bool | None]:
        """Return which API commands use, and whether its data is frozen."""
        shown = []
        for store in (self.v3, self.v2):
            entry = store.entries.get(READY)
            shown.append(Shown(ready=None if entry is None else entry.value))
        choice = decide(*shown, "http://etcd")
        return choice.version, choice.frozen

    def is_live(self) -> bool:
        """Return whether v3's Ready is true."""
        ready = self.v3.entries.get(READY)
        return ready is not None and ready.value == "true"

    def data(self, store: MemoryStore) -> dict[str, str]:
        own = (keys.COPIED_REVISION,)
        return {e.key: e.value for e in store.tree("/calico") if "/felix/" not in e.key and e.key not in own}

    def refuses(self, says: str, act: Callable[[], object] | None = None) -> None:
        """Moving is refused, and nothing is changed."""
        before = self.v2.revision, self.v3.revision
        with pytest.raises(CalicoError, match=says):
            (act or self.move)()
        assert (self.v2.revision, self.v3.revision) == before


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    for name in ("SETTLE", "AGENTS_PATIENCE", "POLL"):
        monkeypatch.setattr(migration_run, name, 0.0)
    return World()


def test_all_data_moves_but_for_what_agents_report(world: World) -> None:
    world.v2.put("/calico/v1/passing", "1", 30)
    world.v2.put(keys.FELIX_HOSTS + "/gone/workload/docker/w/endpoint/e", "{}")
    before = world.data(world.v2)
    moved = world.move()
    assert moved.text.startswith("2 keys have moved: etcd's v3 API is in use.") and moved.problems == ()
    assert world.used() == ("v3", False)
    assert world.data(world.v3) == {TAGS: "[]", RULES: "{}", READY: "true"}
    assert world.data(world.v2) == {**before, READY: "false"}
    assert world.told[0] == "Freezing etcd's v2 API" and "Copying: 2 of 2 keys" in world.told
    assert world.move().text.startswith("The data is in etcd's v3 API already.")


def test_a_target_that_is_not_our_own_copy_is_refused(world: World) -> None:
    world.v3.put("/calico/v1/policy/profile/other/tags", "[]")
    world.refuses("v3 API has data already, which is not from here .for example /calico/v1/policy/profile/other/tags")
    world.v3.remove_tree(keys.PROFILES)
    world.v3.put(TAGS, "[]", 30)
    world.refuses(f"v3 API has data already, which is not from here .for example {TAGS}")
    world.v3.put(READY, "false")
    world.refuses("v3 API has data already, which is not from here ./calico/v1/Ready is false")
    world.v3.put(keys.OTHER_CALICO + "/node", "{}")
    world.refuses("the data of another Calico in its v3 API")


def test_the_state_says_what_there_is_to_do() -> None:
    def ready(value: str | None) -> Entry | None:
        return None if value is None else Entry(READY, value, 1)

    for v2, v3, note, step, advice in (
        ("true", None, None, None, None),
        ("true", "false", "copying", None, None),
        ("false", None, "copying", "copying", "--rollback' ends it"),
        ("false", "false", "copying", "copying", "--rollback' ends it"),
        ("false", "false", "rolling back", "rolling back", "--rollback' goes on"),
        ("false", "true", None, None, "'calicoctl datastore migrate --finish'"),
        ("false", "true", "finishing", None, "'calicoctl datastore migrate --finish' goes on"),
        (None, "true", "finishing", None, "'calicoctl datastore migrate --finish' goes on"),
        ("false", "false", "finishing", None, "set it to true when the data is complete"),
        (None, "true", None, None, None),
        ("false", None, None, None, "set it to true when the data is complete"),
        (None, "false", None, None, "set it to true when the data is complete"),
        (None, "false", "copying", None, "start it with --enable-v2 (3.4 or 3.5), and repeat"),
        (None, "false", "rolling back", None, "start it with --enable-v2 (3.4 or 3.5), and repeat"),
        (None, None, None, None, None),
    ):
        entry = None if note is None else Entry(keys.UNUSED_COPY, json.dumps({"state": note}), 1)
        state = State(ready(v2), ready(v3), entry)
        assert state.step == step
        assert state.advice is advice or (advice is not None and advice in str(state.advice)), (v2, v3, note)


def test_data_that_somebody_else_has_frozen_stays_so(world: World) -> None:
    world.v2.put(READY, "false")
    for act in (world.move, lambda: roll_back(world.run(), False)):
        world.refuses("v2 API is frozen ./calico/v1/Ready is false., and not by this command", act)


def test_without_data_or_with_data_in_both_nothing_moves(world: World) -> None:
    world.v3.put(READY, "true")
    acts = (world.move, lambda: roll_back(world.run(), True), lambda: finish(world.run(), True))
    for act in acts:
        world.refuses("Ready is true in both APIs", act)
    empty = World()
    empty.v2.remove_tree("/calico")
    empty.refuses("There is no data to move")
    empty.refuses("There is no data to go back to", lambda: roll_back(empty.run(), True))
    empty.refuses("has not moved to etcd's v3 API: nothing is deleted", lambda: finish(empty.run(), True))


def test_an_unfinished_copy_is_not_taken_for_data_when_v2_is_not_served_any_more(world: World) -> None:
    kill_after_first_write(world)
    with pytest.raises(Killed):
        world.move()
    world.v2.fault = world.v3.fault = lambda: None

    def unserved() -> None:
        raise NoSuchApi("etcd does not serve its v2 API")

    world.v2.before_read = unserved
    says = "start it with --enable-v2 .3.4 or 3.5., and repeat 'calicoctl datastore migrate'"
    for act in (world.move, lambda: roll_back(world.run(), True), lambda: finish(world.run(), True)):
        world.refuses(says, act)


def test_agents_that_cannot_follow_are_named(world: World) -> None:
    world.agent(world.v2)
    world.agent(world.v2, "pinned2", pinned=True)
    world.agent(world.v2, "pinned1", pinned=True)
    world.refuses("The agents of pinned1, pinned2 have DATASTORE_TYPE in their environment")
    for name in ("old2", "old1"):
        world.v2.put(keys.felix_status(name), '{"uptime": 1}', 30)
    world.refuses("The agents of old1, old2 are of an older version, or of 2015")
    world.v2.clock += 40
    assert len(world.v2.tree("/calico")) == 3
    world.v3.put(READY, "false")
    world.agent(world.v3, "there", pinned=True)
    world.v3.entries.pop(READY)
    world.refuses("The agents of there have DATASTORE_TYPE")


def test_what_may_not_be_written_is_refused_before_anything_is_frozen(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.v2.put("/calico/ipam/v2/x", "{}")
    tried: list[str] = []

    def check_writable(*keys: str) -> None:
        tried.extend(keys)
        raise StoreError("not permitted")

    monkeypatch.setattr(world.v3, "check_writable", check_writable)
    world.refuses("not permitted")
    assert "/calico/ipam/v2/x" in tried and {TAGS, RULES} & set(tried)


def test_what_cannot_be_copied_is_refused_before_anything_is_frozen(world: World) -> None:
    world.v2.put("/calico/v1/large", "x" * 1_500_000)
    world.refuses("/calico/v1/large cannot be copied: it has")


def test_agents_that_do_not_notice_keep_v2_in_use(world: World) -> None:
    world.agent(world.v2)
    with pytest.raises(CalicoError, match="The agents of host1 do not say that they have noticed"):
        world.move()
    assert world.used() == ("v2", False) and "etcd's v2 API is in use again" in world.told
    assert world.data(world.v3).keys() == {keys.UNUSED_COPY, READY} and world.v3.entries[READY].value == "false"


def noticed(world: World) -> Callable[[], Fault]:
    """Return what has host1's agent notice the freeze, and the end of it, at once."""

    def fault() -> Fault:
        if world.v2.entries[READY].value == "false" and STATUS in world.v2.entries:
            world.agent(world.v2)
        return None

    return fault


def in_pauses(monkeypatch: pytest.MonkeyPatch, act: Callable[[float], None]) -> None:
    """Have `act` called in place of each pause, while agents are waited for, which is for 10 s."""
    monkeypatch.setattr(migration_run, "AGENTS_PATIENCE", 10.0)
    monkeypatch.setattr("time.sleep", act)


def test_agents_are_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.agent(world.v2)
    waits: list[str] = []

    def sleep(seconds: float) -> None:
        waits.append(world.told[-1])
        if world.used() == ("v3", False):
            world.agent(world.v3)
        elif len(waits) == 3:
            world.agent(world.v2)

    in_pauses(monkeypatch, sleep)
    assert world.move().problems == ()
    notice = "Waiting for commands and agents to notice"  # the last wait is for commands
    assert waits == [f"{notice}: host1"] * 3 + [notice, "Waiting for agents to use etcd's v3 API: host1"]


def test_agents_that_are_not_seen_in_v3_are_named(world: World) -> None:
    world.agent(world.v2)
    world.v3.fault = noticed(world)
    world.v2.before_read = lambda: noticed(world)() and None
    assert world.move().problems == (
        "The agents of host1 are not seen in etcd's v3 API yet: see 'calicoctl status' there",
    )


def once(act: Callable[[], object], when: Callable[[], bool]) -> Callable[[], None]:
    """Return a function that calls `act` when `when` is true for the first time."""
    left = [act]

    def call() -> None:
        if left and when():
            left.pop()()

    return call


def test_what_is_written_while_it_is_copied_is_copied_too(world: World) -> None:
    def write() -> None:
        world.v2.put(TAGS, '["new"]')
        world.v2.put("/calico/v1/late", "1")
        world.v2.remove_tree(keys.PROFILES + "/web/rules")

    world.v2.before_read = once(write, lambda: TAGS in world.v3.entries)
    assert world.move().problems == ()
    assert world.data(world.v3) == {TAGS: '["new"]', "/calico/v1/late": "1", READY: "true"}


def test_a_store_that_never_rests_is_not_moved(world: World) -> None:
    counts = iter(range(1000))
    world.v2.before_read = lambda: world.v2.put("/calico/v1/count", str(next(counts))) and None
    with pytest.raises(CalicoError, match=r"Old programs keep writing .* \(1 changed \(/calico/v1/count\)\)"):
        world.move()
    assert world.used() == ("v2", False)


def test_an_old_program_that_sets_ready_to_true_ends_the_move(world: World) -> None:
    world.v2.before_read = once(lambda: world.v2.put(READY, "true"), lambda: world.v2.entries[READY].value == "false")
    with pytest.raises(CalicoError, match="Another program has written /calico/v1/Ready in etcd's v2 API"):
        world.move()
    assert world.used() == ("v2", False)


@pytest.mark.parametrize("back", [False, True])
def test_an_old_program_that_sets_ready_to_true_ends_the_wait_for_agents(world: World, back: bool) -> None:
    """Agents would not say any more that the data is frozen."""
    if back:
        world.move()
    world.agent(world.v3 if back else world.v2)

    def is_frozen() -> bool:
        return world.v2.entries[READY].value == "false" and not world.is_live()

    world.v2.before_read = once(lambda: world.v2.put(READY, "true"), is_frozen)
    with pytest.raises(CalicoError, match="Another program has written /calico/v1/Ready in etcd's v2 API"):
        roll_back(world.run(), False) if back else world.move()
    assert world.used() == ("v2", False)


def test_what_old_programs_write_after_the_copy_is_reported(world: World) -> None:
    def write() -> None:
        world.v2.put(READY, "true")
        world.v2.put("/calico/v1/late", "1")
        world.v2.remove_tree(keys.PROFILES)

    world.v2.before_read = once(write, world.is_live)
    first, second = world.move().problems
    assert "An old program has set /calico/v1/Ready to true in etcd's v2 API" in first
    assert second.endswith(f"1 new (/calico/v1/late); 2 deleted ({RULES}, {TAGS})")
    assert world.used() == ("v3", False)
    world.v2.put("/calico/v1/later", "1")
    (again,) = world.move().problems
    assert again.endswith("2 new (/calico/v1/late, /calico/v1/later)")
    world.refuses("Old programs have written .* Nothing is deleted", lambda: finish(world.run(), False))
    finish(world.run(), True)
    assert world.v2.entries == {}


LATE = "1 new (/calico/v1/late)"


def written_late(world: World) -> str:
    """What `--finish` refuses to lose."""
    with pytest.raises(CalicoError, match=r"Old programs have written .* Nothing is deleted") as refused:
        finish(world.run(), False)
    return str(refused.value)


def test_what_was_written_before_ready_was_set_again_by_hand_is_not_deleted(world: World) -> None:
    world.move()
    world.v2.put(READY, "true")
    world.v2.put("/calico/v1/late", "1")
    world.refuses("Ready is true in both APIs", lambda: finish(world.run(), True))
    world.v2.put(READY, "false")
    assert LATE in written_late(world)
    world.v2.entries.pop(READY)
    assert LATE in written_late(world), "and nothing else"


def test_what_was_written_before_the_way_back_was_undone_is_not_deleted(world: World) -> None:
    world.move()
    world.v2.put("/calico/v1/late", "1")
    world.agent(world.v3)
    with pytest.raises(CalicoError, match="The agents of host1 do not say that they have noticed"):
        roll_back(world.run(), True)
    assert world.used() == ("v3", False)
    assert LATE in written_late(world)


@pytest.mark.parametrize(
    "note",
    [
        '{"state": "rolling back"}',
        '{"state": "rolling back", "copied": 5}',
        '["rolling back"]',
        '"rolling back"',
        'no JSON: "rolling back"',
    ],
)
def test_a_note_without_the_revision_is_accepted(world: World, note: str) -> None:
    """Another version has written it."""
    world.move()
    world.v3.remove_tree(keys.COPIED_REVISION)
    world.v3.put(READY, "false")
    world.v3.put(keys.UNUSED_COPY, note)
    assert world.move().text.startswith("The interrupted way back to v2 is undone")
    assert world.used() == ("v3", False) and keys.COPIED_REVISION not in world.v3.entries


@pytest.mark.parametrize("value", [None, "", "x"])
def test_without_the_revision_nothing_in_v2_counts_as_moved(world: World, value: str | None) -> None:
    """Both APIs were used beside each other, and somebody has set Ready to false in v2; or has changed the revision."""
    world.v3.put(READY, "true")
    world.v2.put(READY, "false")
    world.v3.put(TAGS, "[]")
    if value is not None:
        world.v3.put(keys.COPIED_REVISION, value)
    (problem,) = world.move().problems
    assert "was not moved by this command" in problem and problem.endswith(f"1 new ({RULES})")
    world.refuses("was not moved by this command.* Nothing is deleted", lambda: finish(world.run(), False))
    world.v3.put(RULES, "{}")
    assert world.move().problems == ()
    finish(world.run(), False)
    assert world.v2.entries == {}


def test_what_cannot_be_read_in_v3_prevents_a_move_and_no_way_back(world: World) -> None:
    world.move()
    world.v3.entries["/calico/v1/x"] = Entry("/calico/v1/x", "", 99, 99, problem="its value is not UTF-8")
    world.refuses(r"would be lost: 1 new ./calico/v1/x", lambda: roll_back(world.run(), False))
    roll_back(world.run(), True)
    assert world.used() == ("v2", False)
    world.refuses("/calico/v1/x in etcd's v3 API cannot be copied or compared: its value is not UTF-8. Delete it first")


def test_the_revision_is_kept_as_long_as_v2_has_the_data(world: World) -> None:
    world.move()
    revision = world.v2.entries[READY].revision
    assert world.v3.entries[keys.COPIED_REVISION].value == str(revision)
    assert world.v3.entries[keys.COPIED_REVISION].revision == world.v3.entries[READY].revision, "in one transaction"
    roll_back(world.run(), False)
    assert keys.COPIED_REVISION not in world.v3.entries
    world.v3.put(keys.COPIED_REVISION, "1")  # an earlier version leaves it there
    world.move()
    assert int(world.v3.entries[keys.COPIED_REVISION].value) > revision
    finish(world.run(), False)
    assert keys.COPIED_REVISION not in world.v3.entries
    world.v3.put(keys.COPIED_REVISION, "1")  # the process was killed after it had deleted the data
    finish(world.run(), False)
    assert keys.COPIED_REVISION not in world.v3.entries


def test_another_run_that_takes_over_is_not_disturbed(world: World) -> None:
    """The first one fails, and leaves Ready alone."""
    runs: list[Moved] = []
    world.v2.before_read = once(lambda: runs.append(world.move()), lambda: TAGS in world.v3.entries)
    with pytest.raises(CalicoError, match="Another 'calicoctl datastore migrate' has taken over"):
        world.move()
    assert len(runs) == 1 and world.used() == ("v3", False)
    assert "etcd's v2 API is in use again" not in world.told


def test_a_run_that_was_taken_over_leaves_the_data_frozen(world: World) -> None:
    """For the other one, which goes on."""
    other = world.run()

    def take_over() -> None:
        other.take_note(other.state(), "copying")

    world.v2.before_read = once(take_over, lambda: world.v2.entries[READY].value == "false")
    with pytest.raises(CalicoError, match="Another 'calicoctl datastore migrate' has taken over"):
        world.move()
    assert world.used() == ("v2", True) and TAGS not in world.v3.entries


def test_what_is_on_its_way_when_it_is_interrupted_does_not_take_v3_into_use(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, late = world.v3.commit, []

    def interrupted(writes: Sequence[Write]) -> list[Entry]:
        if any(isinstance(write, Delete) for write in writes):
            late.append(writes)
            raise KeyboardInterrupt
        return commit(writes)

    monkeypatch.setattr(world.v3, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        world.move()
    assert world.used() == ("v2", False)
    with pytest.raises(CompareFailed):
        commit(late[0])
    assert world.used() == ("v2", False)


@pytest.mark.parametrize(
    ("status", "says"),
    [
        ('{"datastore": {"api": "etcdv2", "frozen": false}}', "The agents of new do not say that they have noticed"),
        ('{"uptime": 1}', "The agents of new are of an older version"),
        (
            '{"datastore": {"api": "etcdv2", "frozen": true, "pinned": true}}',
            "The agents of new have DATASTORE_TYPE in their environment",
        ),
    ],
)
def test_an_agent_that_is_started_while_the_data_is_copied_is_waited_for(world: World, status: str, says: str) -> None:
    world.v2.before_read = once(
        lambda: world.v2.put(keys.felix_status("new"), status, 30), lambda: TAGS in world.v3.entries
    )
    with pytest.raises(CalicoError, match=says):
        world.move()
    assert world.used() == ("v2", False)


@pytest.mark.parametrize("ready", ["false", "true"])
def test_who_was_taken_over_says_so_at_once(world: World, monkeypatch: pytest.MonkeyPatch, ready: str) -> None:
    """And blames neither an agent, which has no reason to notice a freeze any more, nor an old program."""
    monkeypatch.setattr(migration_run, "AGENTS_PATIENCE", 30.0)
    if ready == "true":
        world.agent(world.v2)

    def take_over() -> None:
        world.v3.put(keys.UNUSED_COPY, '{"state": "copying", "run": "another"}')
        world.v2.put(READY, ready)

    world.v2.before_read = once(take_over, lambda: world.v2.entries[READY].value == "false")
    with pytest.raises(StoreError, match="Another 'calicoctl datastore migrate' has taken over"):
        world.move()
    assert world.v2.entries[READY].value == ready


def test_on_the_way_back_only_what_agents_say_since_then_counts(world: World) -> None:
    world.move()
    world.agent(world.v2)  # the last status before the agent has gone over to v3
    world.agent(world.v3)
    with pytest.raises(CalicoError, match="The agents of host1 do not say that they have noticed"):
        roll_back(world.run(), False)
    assert world.used() == ("v3", False)


def test_another_program_that_writes_to_the_target_ends_the_move(world: World) -> None:
    world.v3.before_read = once(lambda: world.v3.put("/calico/v1/x", "1"), lambda: TAGS in world.v3.entries)
    with pytest.raises(CalicoError, match="Another program writes to etcd's v3 API below /calico: 1 new"):
        world.move()
    assert world.used() == ("v2", False)


def writes_of(run: Callable[[World], object]) -> int:
    """Return how many writes a run makes."""
    world, count = prepared(run), []

    def fault() -> Fault:
        count.append(1)
        return None

    world.v2.fault = world.v3.fault = fault
    run(world)
    return len(count)


def prepared(run: Callable[[World], object]) -> World:
    world = World()
    for number in range(250):
        world.v2.put(f"/calico/v1/many/{number}", str(number))
    if run is not forward:
        world.move()
    return world


def forward(world: World) -> object:
    return world.move()


def back(world: World) -> object:
    return roll_back(world.run(), False)


@pytest.mark.parametrize("run", [forward, back])
@pytest.mark.parametrize("fault", ["before", "lost", "down"])
@pytest.mark.parametrize("repeat", [forward, back])
def test_whatever_ends_it_the_data_is_in_use_or_it_can_be_repeated(
    world: World, run: Callable[[World], object], fault: str, repeat: Callable[[World], object]
) -> None:
    """`before`: it is killed before a write; `lost`: after it; `down`: etcd is gone for good at that moment."""
    total = writes_of(run)
    assert total == (7 if run is forward else 2)
    for number in range(total):
        attempt = prepared(run)
        before = attempt.data(attempt.v2)
        count = iter(range(1000))

        def strike(attempt: World = attempt, count=count, number: int = number) -> Fault:  # type: ignore[no-untyped-def]
            at = next(count)
            if at >= number and fault == "down":
                return "down"
            if at > number or (at == number and fault == "before"):
                raise Killed
            if at == number:
                attempt.v2.fault = attempt.v3.fault = dead
                return None
            return None

        def dead() -> Fault:
            raise Killed

        attempt.v2.fault = attempt.v3.fault = strike
        with pytest.raises((Killed, StoreUnavailable)):
            run(attempt)
            raise Killed
        attempt.v2.fault = attempt.v3.fault = lambda: None
        assert attempt.used() in (("v2", False), ("v2", True), ("v3", False)), number
        assert (keys.COPIED_REVISION in attempt.v3.entries) == (attempt.used()[0] == "v3"), number
        repeat(attempt)
        assert (keys.COPIED_REVISION in attempt.v3.entries) == (repeat is forward), number
        assert attempt.used() == (("v3", False) if repeat is forward else ("v2", False)), number
        used = attempt.v3 if repeat is forward else attempt.v2
        assert attempt.data(used) == {**before, READY: "true"}, number


def test_an_interrupt_takes_v2_into_use_again(world: World) -> None:
    """At whichever write it comes, whether that was applied or not, before v3 is in use."""
    for number in range(writes_of(forward)):
        for applied in (True, False):
            attempt = prepared(forward)
            count = iter(range(1000))

            def strike(count=count, number: int = number, applied: bool = applied) -> Fault:  # type: ignore[no-untyped-def]
                if next(count) == number + applied:
                    raise KeyboardInterrupt
                return None

            attempt.v2.fault = attempt.v3.fault = strike
            with pytest.raises(KeyboardInterrupt):
                attempt.move()
                raise KeyboardInterrupt
            assert attempt.used() == ("v3" if attempt.is_live() else "v2", False)
    assert attempt.used() == ("v2", False), "the last write is the one that takes v3 into use"


def test_going_back_refuses_to_lose_what_was_written_to_v3(world: World) -> None:
    world.move()
    world.v3.put("/calico/v1/new", "1")
    world.refuses(r"would be lost: 1 new \(/calico/v1/new\)", lambda: roll_back(world.run(), False))
    assert roll_back(world.run(), True).text == "etcd's v2 API is in use again."
    assert world.used() == ("v2", False) and "/calico/v1/new" not in world.v2.entries
    assert roll_back(world.run(), False).text == "etcd's v2 API is in use."
    world.v2.put("/calico/v1/other", "1")
    world.move()
    assert world.data(world.v3) == {TAGS: "[]", RULES: "{}", "/calico/v1/other": "1", READY: "true"}


@pytest.mark.parametrize("interrupted", [False, True])
def test_what_old_programs_have_created_in_v2_is_not_lost_by_going_back(world: World, interrupted: bool) -> None:
    world.move()
    world.v2.put("/calico/v1/late", "1")
    if interrupted:
        kill_after_first_write(world)
        with pytest.raises(Killed):
            roll_back(world.run(), False)
        world.v2.fault = world.v3.fault = lambda: None
        assert world.used() == ("v2", True)
    roll_back(world.run(), False)
    assert world.used() == ("v2", False) and {TAGS, RULES, "/calico/v1/late"} <= world.v2.entries.keys()


def test_what_was_deleted_in_v3_is_not_restored_by_going_back(world: World) -> None:
    world.move()
    world.v2.put("/calico/v1/late", "1")
    world.v3.remove_tree(RULES)
    world.refuses(rf"would be lost: 1 deleted \({RULES}\)", lambda: roll_back(world.run(), False))


def test_what_is_written_to_v3_while_it_is_frozen_takes_it_into_use_again(world: World) -> None:
    world.move()
    world.v3.before_read = once(
        lambda: world.v3.put("/calico/v1/new", "1"), lambda: world.v3.entries[READY].value == "false"
    )
    with pytest.raises(CalicoError, match="would be lost"):
        roll_back(world.run(), False)
    assert world.used() == ("v3", False) and world.v3.entries["/calico/v1/new"].value == "1"
    assert keys.UNUSED_COPY not in world.v3.entries


def kill_after_first_write(world: World) -> None:
    def killed() -> Fault:
        raise Killed

    def strike() -> Fault:
        world.v2.fault = world.v3.fault = killed
        return None

    world.v3.fault = strike


def test_an_interrupted_way_back_is_undone_by_a_move_without_a_copy(world: World) -> None:
    world.move()
    world.v3.put("/calico/v1/new", "1")
    kill_after_first_write(world)
    with pytest.raises(Killed):
        roll_back(world.run(), True)
    world.v2.fault = world.v3.fault = lambda: None
    assert world.used() == ("v2", True)
    assert world.move().text == "The interrupted way back to v2 is undone: etcd's v3 API is in use again."
    assert world.v3.entries["/calico/v1/new"].value == "1" and keys.UNUSED_COPY not in world.v3.entries


def test_the_data_in_v2_is_deleted_when_no_agent_uses_it(world: World) -> None:
    world.refuses("has not moved", lambda: finish(world.run(), False))
    world.move()
    world.agent(world.v2)
    world.refuses("The agents of host1 use etcd's v2 API", lambda: finish(world.run(), False))
    world.v2.clock += 40
    assert finish(world.run(), False).text == "3 keys are deleted from etcd's v2 API."
    assert world.v2.entries == {} and world.used() == ("v3", False)
    assert finish(world.run(), False).text == "etcd's v2 API has no data."
    world.refuses("There is no data to go back to", lambda: roll_back(world.run(), True))


def test_agents_that_stay_in_v2_are_named_and_keep_its_data(world: World) -> None:
    """Also if their hosts have a status in v3, from before they were started again."""
    world.v2.before_read = once(lambda: world.agent(world.v2, "early", pinned=True), world.is_live)
    (problem,) = world.move().problems
    assert problem.startswith("The agents of early stay in etcd's v2 API")
    world.agent(world.v2, "late", pinned=True)
    world.v2.put(keys.felix_status("old"), '{"uptime": 1}', 30)
    for host in ("late", "old"):
        world.agent(world.v3, host)
    (problem,) = world.move().problems
    assert problem.startswith("The agents of early, late, old stay in etcd's v2 API")
    world.refuses("The agents of early, late, old use etcd's v2 API", lambda: finish(world.run(), True))


def test_after_the_end_v2_need_not_be_served(world: World) -> None:
    def unserved() -> None:
        raise NoSuchApi("etcd does not serve its v2 API")

    world.v2.before_read = unserved
    world.refuses("does not serve its v2 API")
    world.v2.before_read = lambda: None
    world.move()
    world.v2.before_read = unserved
    assert world.move().text.startswith("The data is in etcd's v3 API already.")
    assert finish(world.run(), False).text == "etcd does not serve its v2 API any more."
    world.refuses("There is no data to go back to", lambda: roll_back(world.run(), True))


def test_v2_is_in_use_again_if_v3_has_no_space_left(world: World) -> None:
    """Then v3 takes no write at all."""
    count = iter(range(100))

    def full() -> Fault:
        if next(count) > 0:
            raise StoreError("etcd has no space left")
        return None

    world.v3.fault = full
    with pytest.raises(StoreError, match="no space left"):
        world.move()
    assert world.used() == ("v2", False)


def at(world: World, number: int, act: Callable[[], object]) -> None:
    """Have `act` done at the read with this number, counted over both APIs from now on."""
    count, left = iter(range(10_000)), [act]

    def read() -> None:
        if next(count) >= number and left:
            left.pop()()

    world.v2.before_read = world.v3.before_read = read


def outcome(act: Callable[[], Moved]) -> str:
    try:
        return act().text
    except CalicoError as error:
        return str(error)


OPTIONS: dict[str, Callable[[Run], Moved]] = {
    "migrate": move,
    "rollback": lambda run: roll_back(run, True),
    "finish": lambda run: finish(run, True),
}


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("one", OPTIONS)
@pytest.mark.parametrize("other", OPTIONS)
def test_two_commands_at_once_never_lose_the_data(world: World, one: str, other: str, moved: bool) -> None:
    """The other one runs as a whole at each read of the first one."""
    for number in range(60):
        attempt = World()
        if moved:
            attempt.move()
        said: list[str] = []

        def run(attempt: World = attempt, said: list[str] = said) -> None:
            said.append(outcome(lambda: OPTIONS[other](attempt.run())))

        at(attempt, number, run)
        said.append(outcome(lambda attempt=attempt: OPTIONS[one](attempt.run())))  # type: ignore[misc]
        if len(said) == 1:
            assert number > 0
            break
        attempt.v2.before_read = attempt.v3.before_read = lambda: None
        version, frozen = attempt.used()  # refuses if both are in use
        assert not frozen, (number, said)
        assert attempt.data(attempt.v3 if version == "v3" else attempt.v2) == {TAGS: "[]", RULES: "{}", READY: "true"}
    else:
        raise AssertionError("there are more reads")


def move_on(world: World, number: int, other: str) -> list[str]:
    """Have the data move on at the first read from this number on at which v3 is in use, as `at` does.

    `other` is the command that does it; after a way back, the data in v2 changes. The result is empty when it is done.
    """
    count, left = iter(range(10_000)), [other]

    def read() -> None:
        if next(count) >= number and left and world.is_live():
            OPTIONS[left.pop()](world.run())
            if other == "rollback":
                world.v2.put(TAGS, '["new"]')

    world.v2.before_read = world.v3.before_read = read
    return left


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("other", ["rollback", "finish"])
def test_a_move_that_was_stopped_reports_nothing_that_is_so_no_more(world: World, other: str, again: bool) -> None:
    reports = set()
    for number in range(60):
        attempt = World()
        if again:  # then it only says that the data has moved already
            attempt.move()
        left = move_on(attempt, number, other)
        try:
            moved = attempt.move()
        except CalicoError as error:
            reports.add(str(error))
            continue
        assert moved.problems == () and attempt.used() == ("v3", False), (number, moved)
        if left:
            break
    else:
        raise AssertionError("there are more reads")
    (report,) = reports
    assert "another command has written /calico/v1/Ready there since" in report


def test_a_way_back_that_was_stopped_does_not_report_that_v2_is_in_use_when_it_is_no_more(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.move()
    world.agent(world.v2)

    def sleep(seconds: float) -> None:
        if world.used() == ("v2", False):
            world.v2.clock += 40
            world.move()
        elif STATUS in world.v2.entries:
            world.agent(world.v2)

    in_pauses(monkeypatch, sleep)
    with pytest.raises(CalicoError, match="another command has written /calico/v1/Ready there since"):
        roll_back(world.run(), False)
    assert world.used() == ("v3", False)


@pytest.mark.parametrize("one", OPTIONS)
@pytest.mark.parametrize("other", OPTIONS)
@pytest.mark.parametrize("third", OPTIONS)
def test_commands_that_interrupt_each_other_never_lose_the_data(
    world: World, one: str, other: str, third: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one begins at a read of the first one, is stopped at a read of its own, and goes on afterwards."""
    for first in range(0, 24, 2):
        for second in range(0, 24, 3):
            attempt = World()
            attempt.move()
            said = interleaved(attempt, [OPTIONS[one], OPTIONS[other], OPTIONS[third]], [first, second])
            version, _ = attempt.used()
            data = attempt.data(attempt.v3 if version == "v3" else attempt.v2)
            assert {TAGS, RULES} <= data.keys(), (first, second, said)


def interleaved(world: World, acts: list[Callable[[Run], Moved]], stops: list[int]) -> list[str]:
    """Run several commands; each is stopped at one of its reads (`stops`) until the first one has ended.

    While one is stopped, the next one begins.
    """
    turns = [threading.Event() for _ in acts]
    stopped = [threading.Event() for _ in acts]
    said = [""] * len(acts)

    def run(number: int) -> None:
        count = iter(range(10_000))

        def read() -> None:
            if number < len(stops) and next(count) == stops[number]:
                stopped[number].set()
                turns[number].wait()

        v2, v3 = Watched(world.v2, read), Watched(world.v3, read)
        said[number] = outcome(lambda: acts[number](Run("http://etcd", lambda: (v2, v3), lambda text: None)))  # type: ignore[arg-type,return-value]
        stopped[number].set()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(acts))]
    for thread, reached in zip(threads, stopped):
        thread.start()
        reached.wait()
    for thread, turn in zip(threads, turns):
        turn.set()
        thread.join()
    return said


class Watched:
    """A store whose reads and writes call a function before."""

    def __init__(self, store: MemoryStore, before: Callable[[], None]) -> None:
        self._store = store
        self._before = before

    def __getattr__(self, name: str) -> object:
        self._before()
        return getattr(self._store, name)


def test_a_way_back_ends_when_a_move_takes_v3_into_use_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.move()
    monkeypatch.setattr(migration_run, "SETTLE", 0.001)
    said: list[Moved] = []
    monkeypatch.setattr("time.sleep", lambda seconds: said.append(world.move()))
    with pytest.raises(StoreError, match="Another 'calicoctl datastore migrate' has taken over"):
        roll_back(world.run(), False)
    assert said[0].text.startswith("The interrupted way back to v2 is undone")
    assert world.used() == ("v3", False) and "etcd's v3 API is in use again" not in world.told


def test_a_way_back_is_no_more_when_the_deletion_begins(world: World) -> None:
    world.move()

    def killed(directory: str) -> None:
        raise Killed

    remove, world.v2.remove_tree = world.v2.remove_tree, killed  # type: ignore[method-assign]
    with pytest.raises(Killed):
        finish(world.run(), False)
    world.refuses("There is no way back to etcd's v2 API.*--finish' goes on", lambda: roll_back(world.run(), True))
    assert world.move().text.endswith("--finish' goes on.")
    world.v3.put(READY, "false")
    for act in OPTIONS.values():
        world.refuses("Ready is not true in v3", lambda act=act: act(world.run()))
    world.v3.put(READY, "true")
    world.v2.remove_tree = remove  # type: ignore[method-assign]
    assert finish(world.run(), False).text == "3 keys are deleted from etcd's v2 API."
    assert world.data(world.v3) == {TAGS: "[]", RULES: "{}", READY: "true"}
    assert keys.COPIED_REVISION not in world.v3.entries and world.v2.entries == {}


def test_data_is_not_deleted_when_v2_is_in_use_again_after_the_wait(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.move()
    world.agent(world.v2)

    def sleep(seconds: float) -> None:
        world.v2.clock += 40
        if world.used() == ("v3", False):
            roll_back(world.run(), False)

    in_pauses(monkeypatch, sleep)
    with pytest.raises(CalicoError, match="The data has not moved to etcd's v3 API: nothing is deleted"):
        finish(world.run(), False)
    assert world.used() == ("v2", False) and world.data(world.v2) == {TAGS: "[]", RULES: "{}", READY: "true"}


def test_a_move_that_still_waits_does_not_undo_a_way_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.agent(world.v2)

    def sleep(seconds: float) -> None:
        if world.used() == ("v3", False):
            world.v2.clock += 40
            roll_back(world.run(), False)
        elif STATUS in world.v2.entries:
            world.agent(world.v2)

    in_pauses(monkeypatch, sleep)
    with pytest.raises(CalicoError, match="another command has written /calico/v1/Ready there since"):
        world.move()
    assert world.used() == ("v2", False)


def test_an_agent_that_died_shortly_before_is_not_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.agent(world.v2)
    waits: list[str] = []

    def sleep(seconds: float) -> None:
        waits.append(world.told[-1])
        world.v2.clock += 20

    in_pauses(monkeypatch, sleep)
    assert world.move().problems == ()
    notice = "Waiting for commands and agents to notice"
    assert set(waits[:-1]) == {f"{notice}: host1"} and waits[-1] == notice


def test_keys_of_another_calico_leave_the_way_back_open(world: World) -> None:
    world.move()
    world.v3.put(keys.OTHER_CALICO + "/node", "{}")
    world.refuses("the data of another Calico in its v3 API")
    world.refuses("the data of another Calico in its v3 API", lambda: finish(world.run(), True))
    roll_back(world.run(), False)
    assert world.used() == ("v2", False)
    world.v3.put(keys.UNUSED_COPY, '{"state": "copying"}')
    world.v2.put(READY, "false")
    assert "The interrupted move is undone" in roll_back(world.run(), False).text
    assert world.used() == ("v2", False)


@pytest.mark.parametrize("value", ["", "yes"])
def test_a_ready_that_is_neither_true_nor_false_is_refused(world: World, value: str) -> None:
    world.move()
    world.v2.put(READY, value)
    for act in OPTIONS.values():
        world.refuses(f"'{value}', in etcd's v2 API, is neither true nor false", lambda act=act: act(world.run()))
