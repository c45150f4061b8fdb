"""The store that a backend is chosen for: when that happens, and what is refused while its data is frozen."""

from __future__ import annotations

import pytest

from calicoctl.datastore import chosen, keys
from calicoctl.datastore.chosen import ChosenStore
from calicoctl.datastore.detection import Choice
from calicoctl.datastore.hosts import Hosts
from calicoctl.datastore.store import Create, Delete, Update
from calicoctl.errors import Frozen, StoreError, WatchExpired
from tests.unit.memory_store import MemoryStore

STATUS = keys.felix_status("host1")
TAGS = keys.profile_tags("web")


class World:
    """Two backends, and what decides between them."""

    def __init__(self, api: str = "etcdv3", frozen: bool | None = False) -> None:
        self.backends = {"etcdv2": MemoryStore(), "etcdv3": MemoryStore()}
        self.api, self.frozen = api, frozen
        self.asked: list[Choice | None] = []
        self.latest: Choice | None = None
        self.store = self.client()

    def client(self) -> ChosenStore:
        return ChosenStore(self._choose, lambda: self.latest, self.backends.__getitem__)

    def _choose(self, before: Choice | None) -> Choice:
        self.asked.append(before)
        if self.api == "":
            raise StoreError("it is not known")
        unknown = before is None and self.frozen is None
        choice = Choice(self.api, None if unknown else bool(self.frozen), "for a test")
        self.latest = self.latest if choice.frozen else choice
        return choice

    def refuses(self, call) -> None:
        before = [store.tree("/calico") for store in self.backends.values()]
        with pytest.raises(Frozen, match=r"Nothing can be changed: .*/calico/v1/Ready is false"):
            call()
        assert [store.tree("/calico") for store in self.backends.values()] == before


def test_the_backend_is_chosen_at_the_first_request_and_only_then() -> None:
    world = World()
    assert world.asked == []
    assert world.store.get(TAGS) is None
    world.store.create(TAGS, "[]")
    world.store.put(STATUS, "{}")
    assert world.asked == [None]
    assert [entry.key for entry in world.backends["etcdv3"].tree("/calico")] == [STATUS, TAGS]
    assert world.backends["etcdv2"].tree("/calico") == []


def test_a_failed_choice_is_made_again() -> None:
    world = World(api="")
    for _ in range(2):
        with pytest.raises(StoreError, match="it is not known"):
            world.store.get(TAGS)
    world.api = "etcdv2"
    assert world.store.get(TAGS) is None
    assert world.asked == [None, None, None]


def test_nothing_but_statuses_is_changed_while_the_data_is_frozen() -> None:
    world = World()
    entry = world.store.create(TAGS, "[]")
    world.frozen = True
    store = world.store = world.client()
    assert store.get(TAGS) == entry and store.exists(keys.PROFILES) and store.names(keys.PROFILES) == ["web"]
    assert store.version() == world.backends["etcdv3"].version() and store.atomic == world.backends["etcdv3"].atomic
    assert store.tree("/calico") == store.list_for_watch("/calico")[0] == store.read((), ["/calico"])[1][0] == [entry]
    world.refuses(lambda: store.create(keys.READY, "true"))
    world.refuses(lambda: store.update(entry, "x"))
    world.refuses(lambda: store.delete(entry))
    world.refuses(lambda: store.put(TAGS, "x"))
    world.refuses(lambda: store.remove_tree(keys.PROFILES))
    world.refuses(lambda: store.touch(entry, "x", 30))
    world.refuses(lambda: store.check_writable(TAGS))
    for write in (Create("/calico/x", "x"), Update(entry, "x"), Delete(entry)):
        world.refuses(lambda write=write: store.commit([Create(STATUS, "{}"), write]))
    status = store.touch(store.update(store.create(STATUS, "{}", 30), "{1}", 30), "{2}", 30)
    store.delete(status)
    store.commit([Create(STATUS, "{}")])
    store.remove_tree(keys.felix_host("host1"))
    assert store.tree("/calico") == [entry]


def test_whether_it_is_frozen_is_only_asked_for_before_a_write_and_again_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    world = World(frozen=None)
    world.store.get(TAGS)
    assert world.asked == [None]
    world.frozen = False
    world.store.put(TAGS, "[]")
    assert len(world.asked) == 2
    world.frozen = True
    now += chosen.FRESH
    world.store.put(TAGS, "[1]")  # a command goes on as it has begun
    assert len(world.asked) == 2
    now += 0.1
    world.refuses(lambda: world.store.put(TAGS, "[2]"))
    world.frozen = False
    world.store.put(TAGS, "[2]")  # at once
    assert len(world.asked) == 4


def test_registering_a_host_creates_ready_and_never_changes_it() -> None:
    store = MemoryStore()
    for value in ("true", "false"):
        Hosts(store, "host1").register("192.0.2.2", None, None)
        entry = store.get(keys.READY)
        assert entry is not None and entry.value == value
        store.put(keys.READY, "false")


def test_a_store_that_has_moved_is_followed() -> None:
    world = World("etcdv2", frozen=True)
    world.store.put(STATUS, "{}")
    world.api, world.frozen = "etcdv3", False
    world.store.put(STATUS, "{1}")
    world.store.put(TAGS, "[]")
    assert [entry.value for entry in world.backends["etcdv3"].tree("/calico")] == ["{1}", "[]"]
    assert [entry.value for entry in world.backends["etcdv2"].tree("/calico")] == ["{}"]


def test_all_clients_of_a_process_follow_one_that_has_noticed_that_the_data_has_moved() -> None:
    world = World("etcdv2")
    reader, watcher = world.client(), world.client()
    assert reader.get(TAGS) is None
    world.backends["etcdv2"].put(TAGS, "[]")
    watch = watcher.watch("/calico", watcher.list_for_watch("/calico")[1], 0)
    world.frozen = True
    world.store.put(STATUS, "{}")  # the heartbeat; this API is frozen, so nobody leaves it
    assert [change.key for change in next(watch)] == [STATUS] and reader.get(TAGS) is not None
    world.api, world.frozen = "etcdv3", False
    assert reader.get(TAGS) is not None
    world.store.put(STATUS, "{}")
    assert reader.get(TAGS) is None and reader.get(STATUS) is not None
    with pytest.raises(WatchExpired, match="the data has moved"):
        next(watch)
    entries, revision = watcher.list_for_watch("/calico")
    assert [entry.key for entry in entries] == [STATUS]
    watch = watcher.watch("/calico", revision, 0)
    world.store.put(TAGS, "[]")
    assert [change.key for change in next(watch)] == [TAGS]
    watch.close()
