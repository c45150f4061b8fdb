"""Which agent may report for a host, when agents on several machines share one store."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from calicoctl.datastore.chosen import ChosenStore
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.detection import Choice
from calicoctl.datastore.settings import V2, V3
from calicoctl.errors import CalicoError, StoreUnavailable
from calicoctl.felix import heartbeat
from calicoctl.felix.heartbeat import Heartbeat, Identity, claim
from tests.unit.memory_store import MemoryStore

KEY = "/calico/felix/v1/host/host1/status"
OLD = json.dumps({"time": "2016-01-01T00:00:00Z", "uptime": 1.0, "first_update": False})
MACHINE_ID = "d41d8cd98f00b204e9800998ecf8427e"


class Machine:
    """A machine, or one of its boots; what runs inside `with` runs there."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, id: str | None, boot: str) -> None:
        self.patch, self.id_file, self.boot_file = patch, folder / f"{id}.id", folder / f"{id}.{boot}"
        if id is not None:
            self.id_file.write_text(id + "\n")
        self.boot_file.write_text(boot + "\n")

    def __enter__(self) -> None:
        self.patch.setattr(heartbeat, "_MACHINE_ID", self.id_file)
        self.patch.setattr(heartbeat, "_BOOT_ID", self.boot_file)

    def __exit__(self, *_: object) -> None:
        pass


class World:
    """Some machines, and the store that they share; time passes only while somebody waits."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, modern: bool) -> None:
        self.store = MemoryStore(modern)
        self.patch, self.folder = patch, folder
        self.clock = 0.0
        self.meanwhile: list[Any] = []
        self.told: list[str] = []
        patch.setattr(heartbeat.time, "monotonic", lambda: self.clock)
        patch.setattr(heartbeat.time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.clock += seconds
        self.store.clock += seconds
        for do in self.meanwhile:
            do()

    def machine(self, id: str | None = MACHINE_ID, boot: str = "boot1") -> Machine:
        return Machine(self.patch, self.folder, id, boot)

    def client(self) -> DatastoreClient:
        return DatastoreClient(self.store.client(), "host1")

    def agent(self, machine: Machine) -> Heartbeat:
        with machine:
            return Heartbeat(self.client())

    def claim(self, machine: Machine, force: bool = False, own_agent_writes: bool = False) -> Any:
        with machine:
            return claim(self.client(), force, own_agent_writes, self.told.append)

    @property
    def value(self) -> dict[str, Any]:
        return dict(json.loads(self.store.entries[KEY].value))


@pytest.fixture(params=[False, True], ids=["v2", "v3"])
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    return World(monkeypatch, tmp_path, request.param)


def test_a_machine_is_identified_by_an_id_that_systemd_derives(world: World) -> None:
    with world.machine(MACHINE_ID):
        own = Identity.own()
    # as printed by systemd-id128 machine-id --app-specific=b42e1f915bde4911a361abec26e34313, of systemd 252
    assert own == Identity("4f16c68b00224e339629becb3f11d6f7", "boot1")


@pytest.mark.parametrize("id", ["", "uninitialized", "0" * 32, "3d12", None])
def test_a_machine_without_an_id_is_not_identified(world: World, id: str | None) -> None:
    with world.machine(id):
        assert Identity.own() == Identity(None, "boot1")


def test_a_heartbeat_is_one_request(world: World) -> None:
    agent = world.agent(world.machine())
    assert agent.beat({"uptime": 1}) is None
    requests = []
    for name in ("get", "create", "update", "tree"):
        real = getattr(world.store, name)
        world.patch.setattr(world.store, name, lambda *args, name=name, real=real: requests.append(name) or real(*args))
    assert agent.beat({"uptime": 2}) is None
    assert requests == ([] if world.store.leases else ["update"])
    assert (
        world.value["uptime"] == (1 if world.store.leases else 2)
        and len(world.value["machine"]) == 32
        and world.value["boot"] == "boot1"
    )
    assert MACHINE_ID not in world.store.entries[KEY].value


def test_an_expired_status_is_rewritten(world: World) -> None:
    agent = world.agent(world.machine())
    for uptime in range(4):
        assert agent.beat({"uptime": uptime}) is None
        del world.store.entries[KEY]
    assert agent.beat({"uptime": 9}) is None and world.value["uptime"] == 9


def test_an_agent_takes_on_what_its_predecessor_has_left(world: World) -> None:
    world.agent(world.machine()).beat({})
    successor = world.agent(world.machine())
    assert [successor.beat({}) for _ in range(3)] == [None] * 3


def test_of_two_indistinguishable_agents_one_yields(world: World) -> None:
    one, other = world.agent(world.machine()), world.agent(world.machine())
    outcome = [(one.beat({}), other.beat({})) for _ in range(5)][-1]
    assert [who is None for who in outcome].count(True) == 1
    assert [(one.beat({}), other.beat({})) for _ in range(5)] == [outcome] * 5


def test_a_status_that_is_gone_was_written_by_nobody_else(world: World) -> None:
    agent = world.agent(world.machine())
    assert agent.beat({}) is None
    entry = world.store.get(KEY)
    assert entry is not None
    world.store.put(KEY, entry.value)  # as a restored store has it
    assert agent.beat({}) is None
    world.store.remove_tree("/calico")
    assert agent.beat({}) is None
    assert world.store.get(KEY) is not None


def test_a_store_that_is_restored_and_then_emptied_and_claimed_is_no_other_agent(world: World) -> None:
    with world.machine():
        agent = Heartbeat(world.client())
        for uptime in (1.0, 2.0):
            assert agent.beat({"uptime": uptime}) is None
        entry = world.store.get(KEY)
        assert entry is not None
        world.store.put(KEY, entry.value)  # as a restored store has it
        assert agent.beat({"uptime": 3.0}) is None
        world.store.remove_tree("/calico")
        claim(world.client(), False, True, lambda text: None)  # `calicoctl node` registers the host anew
        assert agent.beat({"uptime": 4.0}) is None
        # but another agent that writes it, too, is one
        for _ in range(2):
            world.store.put(KEY, json.dumps({"uptime": 9.0, **Identity.own().to_dict()}))
            replaced = agent.beat({"uptime": 5.0})
        assert replaced == Identity.own()


def test_a_status_that_is_left_in_the_other_api_is_nobody_elses(world: World) -> None:
    stores = {V2: MemoryStore(), V3: MemoryStore(modern=True)}
    for number in range(50):  # so that no revision is the same in both
        stores[V3].put(f"/other/{number}", "")
    now = {"api": V2}
    moves = count()

    def current(before: Choice | None = None) -> Choice:
        return Choice(now["api"], frozen=False, why="the test says so", at=next(moves))

    datastore = DatastoreClient(ChosenStore(current, current, stores.__getitem__), "host1")
    with world.machine():
        agent = Heartbeat(datastore)
        for now["api"] in (V2, V3, V2, V3, V2):
            assert agent.beat({"uptime": 1.0}) is None, now
            assert stores[now["api"]].get(KEY) is not None
        for _ in range(2):
            stores[V2].put(KEY, json.dumps(Identity.own().to_dict()))
            replaced = agent.beat({"uptime": 1.0})
        assert replaced == Identity.own()


def test_an_agent_never_takes_the_name_back_from_another_machine_by_itself(world: World) -> None:
    mine, its = world.machine(), world.machine("a" * 32)
    agent, other = world.agent(mine), world.agent(its)
    agent.beat({})
    assert other.beat({}) is not None, "the name is in use"
    world.claim(its, force=True)
    assert agent.beat({}) is not None
    assert other.beat({"uptime": 7}) is None, "it was claimed for it"
    assert agent.beat({}) is not None and world.value["uptime"] == 7
    del world.store.entries[KEY]
    assert agent.beat({}) is not None, "the other machine may only be starting anew"
    assert KEY not in world.store.entries
    agent.end()
    world.claim(mine)
    assert agent.beat({"uptime": 8}) is None and world.value["uptime"] == 8
    assert other.beat({}) is not None


def test_an_agent_goes_on_when_one_that_names_no_machine_has_ended(world: World) -> None:
    agent = world.agent(world.machine())
    agent.beat({})
    for _ in range(2):
        world.store.put(KEY, OLD)
        assert agent.beat({}) == Identity(None, None)
        assert agent.beat({}) == Identity(None, None) and world.store.entries[KEY].value == OLD
        del world.store.entries[KEY]
        assert agent.beat({"uptime": 5}) is None and world.value["uptime"] == 5


def test_an_agent_removes_its_own_status_only(world: World) -> None:
    agent = world.agent(world.machine())
    agent.beat({})
    world.store.put(KEY, OLD)
    agent.end()
    assert world.store.entries[KEY].value == OLD
    successor = world.agent(world.machine("a" * 32))
    del world.store.entries[KEY]
    successor.beat({})
    successor.end()
    assert KEY not in world.store.entries


def test_a_store_that_is_away_takes_no_name_from_anybody(world: World) -> None:
    agent = world.agent(world.machine())
    agent.beat({})
    world.store.fault = lambda: "down"
    with pytest.raises(StoreUnavailable):
        agent.beat({})
    world.store.fault = lambda: None
    assert agent.beat({}) is None


# `calicoctl node`


def test_a_free_name_is_claimed(world: World) -> None:
    claimed = world.claim(world.machine())
    assert claimed == world.store.entries[KEY] and world.told == []
    assert world.claim(world.machine()) != claimed, "by this machine's own, once more"
    assert world.told == []


def test_another_machines_name_is_refused_at_once_and_nothing_written(world: World) -> None:
    world.agent(world.machine("a" * 32)).beat({})
    world.store.put("/calico/v1/host/host1/bird_ip", "192.0.2.9")
    before = dict(world.store.entries)
    for own_agent_writes in (False, True):
        with pytest.raises(CalicoError, match=r"Another machine, registered with 192\.0\.2\.9, reports for host host1"):
            world.claim(world.machine(), own_agent_writes=own_agent_writes)
    assert world.store.entries == before and world.clock == 0


@pytest.mark.parametrize(
    ("mine", "its"),
    [
        ((MACHINE_ID, "boot2"), (MACHINE_ID, "boot1")),
        ((None, "boot1"), (None, "boot1")),
        ((None, "boot1"), ("a" * 32, "boot1")),
        ((MACHINE_ID, "boot1"), (None, "boot2")),
        ((MACHINE_ID, "boot1"), None),
    ],
    ids=["rebooted", "no id here", "no id here, but there", "no id there", "an old agent"],
)
def test_node_waits_for_the_status_of_an_unknown_machine_to_expire(world: World, mine: Any, its: Any) -> None:
    def write() -> None:
        value = OLD
        if its is not None:
            with world.machine(*its):
                value = json.dumps({"uptime": 1, **Identity.own().to_dict()})
        world.store.client().put(KEY, value, heartbeat.TIME_TO_LIVE if world.store.leases else 90)

    write()
    world.meanwhile = [lambda: world.store.entries.pop(KEY, None) if world.clock >= 12 else None]
    assert world.claim(world.machine(*mine)) is not None
    assert world.clock == 12 and len(world.told) == 1

    write()
    world.meanwhile = []
    began = world.clock
    assert world.claim(world.machine(*mine)) is not None, "it is not renewed"
    assert world.clock - began == 30 and len(world.told) == 2

    write()
    began, before = world.clock, world.store.entries[KEY]
    here = world.machine(*mine)

    def renew() -> None:
        if world.clock >= began + 9:
            write()
            here.__enter__()

    world.meanwhile = [renew]
    with pytest.raises(CalicoError, match="reports for host host1"):
        world.claim(here)
    assert world.clock - began == 9
    assert world.store.entries[KEY].value == before.value


def test_node_does_not_take_an_agent_that_writes_nothing_for_a_dead_one(world: World) -> None:
    before_boot, here = world.machine(boot="boot1"), world.machine(boot="boot2")
    agent = world.agent(before_boot)
    agent.beat({"uptime": 1.0})
    world.meanwhile = [lambda: agent.beat({"uptime": world.clock}) if world.clock % 10 == 0 else None]
    with pytest.raises(CalicoError, match="Another boot, or a copy, of this machine reports for host host1"):
        world.claim(here)
    assert world.clock == (35 if world.store.leases else 10)
    assert world.value["boot"] == "boot1" and agent.beat({"uptime": 1.0}) is None


def test_what_lasts_of_a_status_is_written_at_once(world: World) -> None:
    agent = world.agent(world.machine())
    for number, first in enumerate([False, False, True, True]):
        before = world.store.revision
        agent.beat({"time": str(number), "uptime": number, "first_update": first})
        assert (world.store.revision == before) == (world.store.leases and number in (1, 3))
        assert world.value["first_update"] is first


def test_an_agent_says_when_what_hangs_on_its_status_may_be_lost(world: World) -> None:
    one, other = world.machine(), world.machine("a" * 32)
    agent = world.agent(one)
    begun = []

    def beat() -> None:
        agent.beat({"uptime": len(begun)})
        begun.append(agent.has_begun)

    beat(), beat()
    world.store.clock += 40
    beat(), beat()
    world.claim(other, force=True)
    assert agent.beat({}) is not None
    world.store.clock += 40
    world.claim(one)
    beat(), beat()
    world.store.fault = lambda: "down"
    with pytest.raises(StoreUnavailable):
        agent.beat({})
    world.store.fault = lambda: None
    beat()
    assert begun == [True, False, True, False, True, False, False]


def test_a_claimed_status_does_not_expire_once_the_agent_has_it(world: World) -> None:
    """It hung on the lease of the command, which has ended."""
    world.claim(world.machine())
    agent = world.agent(world.machine())
    for _ in range(5):
        assert agent.beat({}) is None
        world.store.clock += 10
        assert world.value


def test_this_hosts_own_agent_of_an_older_version_is_known_by_its_pid_file(world: World) -> None:
    world.store.put(KEY, OLD)
    assert world.claim(world.machine(), own_agent_writes=True) is None
    assert world.clock == 0 and world.store.entries[KEY].value == OLD


def test_a_boot_before_this_one_is_not_this_hosts_own_agent(world: World) -> None:
    world.agent(world.machine(boot="boot1")).beat({})
    world.claim(world.machine(boot="boot2"), own_agent_writes=True)
    assert world.clock == 30


def test_force_takes_over_and_waits_until_the_other_agent_has_noticed(world: World) -> None:
    other = world.agent(world.machine("a" * 32))
    other.beat({})
    noticed = []
    world.meanwhile = [lambda: noticed.append(other.beat({})) if world.clock == 10 else None]
    assert world.claim(world.machine(), force=True) is not None
    assert len(world.told) == 1 and world.clock >= 10
    assert noticed[0] is not None
    assert world.agent(world.machine()).beat({}) is None


def test_force_does_not_help_against_an_agent_that_does_not_look(world: World) -> None:
    world.store.put(KEY, OLD)
    world.meanwhile = [lambda: world.store.put(KEY, OLD) if world.clock == 10 else None]
    with pytest.raises(CalicoError, match="goes on reporting for host host1"):
        world.claim(world.machine(), force=True)
    assert world.store.entries[KEY].value == OLD
