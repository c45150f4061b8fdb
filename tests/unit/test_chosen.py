"""The store that a backend is chosen for: when that happens, and what is refused while its data is frozen."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from calicoctl.datastore import chosen, keys
from calicoctl.datastore.chosen import ChosenStore
from calicoctl.datastore.detection import Choice
from calicoctl.datastore.hosts import Hosts
from calicoctl.datastore.store import Change, Create, Delete, Fence, Update
from calicoctl.errors import Fenced, Frozen, StoreError, WatchExpired
from tests.unit.memory_store import Lost, MemoryStore

STATUS = keys.felix_status("host1")
TAGS = keys.profile_tags("web")


class World:
    """Two backends, and what decides between them."""

    def __init__(self, api: str = "etcdv3", frozen: bool | None = False) -> None:
        self.backends = {"etcdv2": MemoryStore(), "etcdv3": MemoryStore(modern=True)}
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
        ready = self.backends[self.api].get(keys.READY)
        revision = 0 if ready is None else ready.revision
        choice = Choice(self.api, None if unknown else bool(self.frozen), "for a test", revision=revision)
        self.latest = self.latest if choice.frozen else choice
        return choice

    def set_ready(self, value: str, api: str | None = None) -> None:
        """Write Ready, as a move does, so that the choices which were made before are outdated."""
        store = self.backends[self.api]
        store.fence, fence = None, store.fence
        store.put(keys.READY, value)
        store.fence = fence
        self.api, self.frozen = api or self.api, value == "false" and api is None

    def lose(self, *lost: Lost) -> None:
        """Lose the answers of the next writes."""
        left = list(lost)
        self.backends[self.api].fault = lambda: left.pop(0) if left else None

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


def test_a_write_is_refused_if_the_data_was_frozen_after_ready_was_read() -> None:
    world = World()
    store = world.store
    world.set_ready("true")
    entry = store.create(TAGS, "[]")
    for write in (
        lambda: store.create("/calico/x", "x"),
        lambda: store.update(entry, "x"),
        lambda: store.delete(entry),
        lambda: store.commit([Delete(entry), Create("/calico/x", "x")]),
        lambda: store.touch(entry, "x", 30),
        lambda: store.put(TAGS, "x"),
        lambda: store.put_all({TAGS: "x"}),
        lambda: store.remove_tree(keys.PROFILES),
    ):
        world.set_ready("true")
        store.current_choice()
        world.set_ready("false")
        asked = len(world.asked)
        store.put(STATUS, "{}")
        assert len(world.asked) == asked, "a status is written whatever Ready is"
        world.refuses(write)
    world.set_ready("true")
    assert store.update(entry, "x").value == "x"


@pytest.mark.parametrize("api", ["etcdv2", "etcdv3"])
def test_a_write_that_is_sent_again_is_refused_if_the_data_was_frozen_meanwhile(api: str) -> None:
    world = World(api)
    world.set_ready("true")
    entry = world.store.create(TAGS, "[]")
    writes = (lambda: world.store.update(entry, "x"), lambda: world.store.commit([Update(entry, "x")]))
    for write in writes:
        world.lose(Lost(False, lambda: world.set_ready("false")))
        with pytest.raises(Frozen):
            write()
        world.set_ready("true")
        world.store.current_choice()
        assert world.store.get(TAGS) == entry
    world.lose(Lost(True, lambda: world.set_ready("false")))
    assert world.store.update(entry, "x") == world.store.get(TAGS), "it was made before"


def test_in_v2_a_write_that_is_held_up_for_long_looks_at_ready_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    world = World("etcdv2")
    world.set_ready("true")
    world.store.create(TAGS, "[]")

    def hold_up() -> None:
        nonlocal now
        now += seconds
        world.set_ready("false")

    world.backends["etcdv2"].fault = hold_up
    seconds = chosen.FRESH - 1
    world.store.create("/calico/1", "1")
    assert world.asked == [None]
    world.set_ready("true")
    world.store.current_choice()
    seconds = chosen.FRESH + 1
    with pytest.raises(Frozen):
        world.store.create("/calico/2", "1")
    assert world.store.get("/calico/2") is None


@pytest.mark.parametrize("api", ["etcdv2", "etcdv3"])
def test_a_write_goes_on_where_the_data_is_when_ready_has_changed(api: str) -> None:
    world = World(api)
    other = {"etcdv2": "etcdv3", "etcdv3": "etcdv2"}[api]
    store = world.store
    store.create(keys.READY, "true")
    one = store.create("/calico/1", "1")
    two = world.backends[other].create("/calico/2", "1")
    world.lose(Lost(False, lambda: world.set_ready("true")))
    one = store.update(one, "2")
    assert store.get(one.key) == one
    for write in (lambda: store.create("/calico/3", "3"), lambda: store.commit([Create("/calico/4", "4")])):
        world.lose(Lost(False, lambda: world.set_ready("true")))
        write()
    world.lose(Lost(False, lambda: world.set_ready("false", other)))
    store.create("/calico/5", "5")
    assert {entry.key: entry.value for entry in world.backends[other].tree("/calico")} == {
        two.key: "1",
        "/calico/5": "5",
    }
    found = {entry.key: entry.value for entry in world.backends[api].tree("/calico")}
    assert found == {"/calico/1": "2", "/calico/3": "3", "/calico/4": "4", keys.READY: "false"}


def test_of_several_writes_none_is_made_twice() -> None:
    world = World("etcdv2")
    world.set_ready("true")
    writes = [Create(f"/calico/{number}", "1") for number in range(3)]
    faults = [None, Lost(False, lambda: world.set_ready("true"))]
    world.backends["etcdv2"].fault = lambda: faults.pop(0) if faults else None
    assert [entry.key for entry in world.store.commit(writes)] == [write.key for write in writes]


def test_what_was_removed_before_the_data_was_frozen_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A removal whose answer is lost is sent again."""
    world = World()
    world.set_ready("true")
    remove = MemoryStore.remove_tree

    def removed_and_frozen(backend: MemoryStore, directory: str) -> None:
        remove(backend, directory)
        world.set_ready("false")
        backend.fence = Fence(keys.READY, 0, 0)
        remove(backend, directory)

    monkeypatch.setattr(MemoryStore, "remove_tree", removed_and_frozen)
    world.store.create(TAGS, "[]")
    world.store.remove_tree(keys.PROFILES)
    assert [entry.key for entry in world.backends["etcdv3"].tree("/calico")] == [keys.READY]


def test_a_write_is_given_up_if_ready_keeps_changing() -> None:
    world = World()
    choose = world.store._choose

    def outdated(before: Choice | None) -> Choice:
        choice = choose(before)
        world.set_ready("true")
        return choice

    with pytest.raises(Fenced, match="etcd key /calico/v1/Ready keeps being modified concurrently; retry"):
        ChosenStore(outdated, lambda: None, world.backends.__getitem__).create(TAGS, "[]")
    assert len(world.asked) == chosen.ATTEMPTS


def test_registering_a_host_creates_ready_and_never_changes_it() -> None:
    world = World()
    Hosts(world.store, "host1").register("192.0.2.2", None, None)
    assert world.store.get(keys.READY).value == "true"  # type: ignore[union-attr]
    assert len(world.asked) == 2, "Ready was none before"
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


def watch_of(*changes: Change) -> Generator[list[Change], None, None]:
    yield list(changes)


def test_what_was_deleted_after_it_had_moved_is_not_taken_for_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a client that has not seen yet that it has moved."""
    world = World("etcdv2")
    old, new = world.backends["etcdv2"], world.backends["etcdv3"]
    old.put(TAGS, "[]")
    (entry,), revision = world.store.list_for_watch(keys.POLICY_AND_HOSTS)
    assert entry.key == TAGS
    new.put(TAGS, "[]")
    old.remove_tree("/calico")
    world.api = "etcdv3"
    # what etcd's v2 API reports
    monkeypatch.setattr(old, "watch", lambda *_: watch_of(Change("/calico", None)))
    with pytest.raises(WatchExpired, match="all below /calico/v1 was deleted at once"):
        next(world.store.watch(keys.POLICY_AND_HOSTS, revision, 0))
    assert world.store.list_for_watch(keys.POLICY_AND_HOSTS) == (new.tree("/calico"), new.revision + 1)


def test_a_watch_is_of_the_api_that_its_revision_is_from() -> None:
    world = World("etcdv2")
    world.backends["etcdv2"].put(TAGS, "[]")
    watcher = world.client()
    revision = watcher.list_for_watch("/calico")[1]
    world.api = "etcdv3"
    world.store.current_choice()  # another client notices it before the first request of the watch
    for number in range(5):
        world.store.put(TAGS, str(number))
    with pytest.raises(WatchExpired, match="the data has moved"):
        next(watcher.watch("/calico", revision, 0))


def test_a_part_of_what_is_watched_may_be_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World("etcdv2")
    gone = [Change("/calico/v1/host", None), Change("/calico/v1", None, alone=True)]
    monkeypatch.setattr(world.backends["etcdv2"], "watch", lambda *_: watch_of(*gone))
    assert next(world.store.watch("/calico/v1", 1, 0)) == gone
