"""What every store must do: the same tests run on the store in memory (unit) and on real ones (system).

A module that tests a store derives a class from StoreContract, with a fixture `backend`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Protocol

import pytest

from calicoctl.datastore.store import Change, Entry, Store, Watch
from calicoctl.errors import CompareFailed, KeyExists, WatchExpired
from tests.unit.memory_store import Lost

KEY = "/calico/a/b"


class Backend(Protocol):
    """A store under test, and what a test can do to it."""

    @property
    def store(self) -> Store:
        """The store under test."""

    @property
    def other(self) -> Store:
        """The same data, through a client of its own that gets all answers: what another writer does."""

    def lose_answer(self, lost: Lost) -> None:
        """Lose the answer of the next write of `store`."""

    def pass_time(self, seconds: float) -> None:
        """Let time pass, for keys to expire."""

    def forget_history(self) -> None:
        """Make the store forget the changes up to now."""


def now(store: Store, key: str = KEY) -> str | None:
    entry = store.get(key)
    return None if entry is None else entry.value


def is_there(store: Store, key: str = KEY) -> Entry:
    entry = store.get(key)
    assert entry is not None
    return entry


def collected(watch: Watch, count: int) -> list[Change]:
    """Return the next changes, in as many batches as they come in."""
    changes: list[Change] = []
    for _ in range(50):
        changes += next(watch)
        if len(changes) >= count:
            break
    return changes


class StoreContract:
    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        raise NotImplementedError

    @pytest.fixture
    def store(self, backend: Backend) -> Store:
        return backend.store

    def test_a_key_is_created_once(self, store: Store) -> None:
        assert store.get(KEY) is None
        one = store.create(KEY, "1")
        assert (one.key, one.value) == (KEY, "1") and store.get(KEY) == one
        with pytest.raises(KeyExists):
            store.create(KEY, "1")
        assert store.get(KEY) == one

    def test_an_update_needs_the_entry_as_it_was_read(self, store: Store) -> None:
        one = store.create(KEY, "1")
        two = store.update(one, "2")
        assert (two.key, two.value) == (KEY, "2") and two.revision > one.revision and store.get(KEY) == two
        with pytest.raises(CompareFailed) as failed:
            store.update(one, "3")
        assert not failed.value.maybe_applied and store.get(KEY) == two
        store.delete(two)
        with pytest.raises(CompareFailed):
            store.update(two, "3")
        assert store.get(KEY) is None

    def test_a_delete_needs_the_entry_as_it_was_read(self, store: Store) -> None:
        one = store.create(KEY, "1")
        two = store.update(one, "2")
        with pytest.raises(CompareFailed):
            store.delete(one)
        assert store.get(KEY) == two
        store.delete(two)
        assert store.get(KEY) is None
        store.delete(two)
        store.create(KEY, "2")
        with pytest.raises(CompareFailed):
            store.delete(two)

    def test_put_writes_blindly(self, store: Store) -> None:
        store.put(KEY, "1")
        one = is_there(store)
        store.put(KEY, "2")
        assert now(store) == "2" and is_there(store).revision > one.revision

    def test_tree_names_and_exists_go_by_whole_parts_of_keys(self, store: Store) -> None:
        assert store.tree("/calico") == [] and store.names("/calico") == [] and not store.exists("/calico")
        odd = "/calico/a/c d?e#f%41:-é"
        for key, value in {KEY: "1", odd: 'ü "key":"/x" \\', "/calico/x/y/z": "", "/calico/x/y/zz": "2"}.items():
            assert store.create(key, value) == store.get(key)
        found = {entry.key: entry.value for entry in store.tree("/calico")}
        assert found == {KEY: "1", odd: 'ü "key":"/x" \\', "/calico/x/y/z": "", "/calico/x/y/zz": "2"}
        assert sorted(store.names("/calico")) == ["a", "x"]
        assert sorted(store.names("/calico/a")) == sorted(["b", odd.rpartition("/")[2]])
        assert sorted(store.names("/calico/x/y")) == ["z", "zz"]
        assert store.exists("/calico") and store.exists("/calico/x") and store.exists("/calico/x/y")
        for absent in ("/calico/x/yy", "/cal", "/calico/b"):
            assert store.tree(absent) == [] and store.names(absent) == [] and not store.exists(absent)

    def test_what_was_deleted_does_not_exist(self, store: Store) -> None:
        one, two = store.create("/calico/x/y/z", "1"), store.create("/calico/x/v", "2")
        store.delete(one)
        assert store.exists("/calico/x") and not store.exists("/calico/x/y")
        store.delete(two)
        assert not store.exists("/calico/x") and not store.exists("/calico")

    def test_a_tree_is_removed_and_nothing_beside_it(self, store: Store) -> None:
        for key in (KEY, "/calico/a/x/y", "/calico/aa", "/calico/c"):
            store.create(key, "1")
        store.remove_tree("/calico/a")
        store.remove_tree("/calico/c")
        store.remove_tree("/calico/nothing")
        assert [entry.key for entry in store.tree("/calico")] == ["/calico/aa"]

    def test_created_is_the_index_of_the_write_that_created_the_key(self, store: Store) -> None:
        other = store.create("/calico/o", "1")
        one = store.create(KEY, "1")
        assert other.created == other.revision < one.created == one.revision
        two = store.update(store.update(one, "2"), "3")
        assert two.created == one.created < two.revision
        assert is_there(store) == two == store.tree("/calico/a")[0]
        store.delete(two)
        assert store.create(KEY, "1").created > two.revision

    def test_a_key_with_a_time_to_live_expires(self, backend: Backend) -> None:
        store = backend.store
        store.create(KEY, "1", ttl=2)
        kept = store.create("/calico/kept", "1", ttl=2)
        renewed = store.create("/calico/renewed", "1", ttl=2)
        overwritten = store.create("/calico/overwritten", "1", ttl=2)
        kept = store.update(kept, "2")
        renewed = store.update(renewed, "2", ttl=60)
        store.put(overwritten.key, "2")
        assert now(store) == "1"
        backend.pass_time(4)
        assert now(store) is None and not store.exists("/calico/a")
        assert {entry.key: entry.value for entry in store.tree("/calico")} == {
            "/calico/kept": "2",
            "/calico/renewed": "2",
            "/calico/overwritten": "2",
        }
        with pytest.raises(CompareFailed):
            store.update(Entry(KEY, "1", 1), "2", ttl=2)
        assert store.create(KEY, "3").value == "3"

    def test_asking_whether_a_key_may_be_written_changes_nothing(self, store: Store) -> None:
        one = store.create(KEY, "1")
        before = store.list_for_watch("/calico")
        store.check_writable(KEY)
        store.check_writable("/calico/not/there")
        assert store.get(KEY) == one and store.get("/calico/not/there") is None
        assert store.list_for_watch("/calico") == before

    def test_the_server_has_a_version(self, store: Store) -> None:
        assert store.version()[0].isdigit()

    # Watches

    def test_a_watch_reports_what_follows_a_snapshot(self, store: Store) -> None:
        one = store.create(KEY, "1")
        entries, revision = store.list_for_watch("/calico")
        assert entries == [one]
        two = store.update(one, "2")
        store.put("/elsewhere", "1")
        other = store.create("/calico/c", "1")
        store.delete(two)
        watch = store.watch("/calico", revision, 0.3)
        assert collected(watch, 3) == [Change(KEY, two), Change(other.key, other), Change(KEY, None)]
        store.remove_tree("/elsewhere")

    def test_a_watch_wakes_up_at_a_change(self, backend: Backend) -> None:
        revision = backend.store.list_for_watch("/calico")[1]
        found: list[Change] = []
        waiting = threading.Thread(target=lambda: found.extend(next(backend.store.watch("/calico", revision, 30))))
        waiting.start()
        entry = backend.other.create(KEY, "1")
        waiting.join(20)
        assert not waiting.is_alive() and found == [Change(KEY, entry)]

    def test_changes_of_a_watch_lead_to_what_the_store_holds(self, backend: Backend) -> None:
        store = backend.store
        for key in ("/calico/t/a", "/calico/t/b/c", "/calico/tt", "/calico/u"):
            store.create(key, "1")
        entries, revision = store.list_for_watch("/calico")
        store.remove_tree("/calico/t")
        expiring = store.create(KEY, "1", ttl=2)
        backend.pass_time(4)
        last = store.create("/calico/last", "1")
        held = {entry.key: entry for entry in entries}
        watch = store.watch("/calico", revision, 0.3)
        while last.key not in held:
            for change in next(watch):
                held = {key: e for key, e in held.items() if not (key + "/").startswith(change.key + "/")}
                if change.entry is not None:
                    held[change.key] = change.entry
        assert sorted(held.values(), key=str) == sorted(store.tree("/calico"), key=str)
        assert expiring.key not in held and "/calico/tt" in held

    def test_a_quiet_watch_yields_empty_batches_and_keeps_up_with_the_store(self, backend: Backend) -> None:
        """It does not fall behind the history that changes elsewhere fill."""
        watch = backend.store.watch("/calico", backend.store.list_for_watch("/calico")[1], 0.3)
        for _ in range(2):
            for number in range(700):
                backend.other.put("/elsewhere", str(number))
            assert next(watch) == []
        entry = backend.store.create(KEY, "1")
        assert collected(watch, 1) == [Change(KEY, entry)]
        watch.close()
        backend.store.remove_tree("/elsewhere")

    def test_a_watch_from_before_the_stores_history_expires(self, backend: Backend) -> None:
        revision = backend.store.list_for_watch("/calico")[1]
        backend.store.create(KEY, "1")
        backend.forget_history()
        with pytest.raises(WatchExpired):
            next(backend.store.watch("/calico", revision, 0.3))

    def test_a_watch_from_a_later_index_than_the_stores_expires(self, store: Store) -> None:
        """The store was restored from a copy."""
        revision = store.list_for_watch("/calico")[1]
        with pytest.raises(WatchExpired):
            next(store.watch("/calico", revision + 1000, 0.3))

    # Writes whose answer is lost

    @pytest.mark.parametrize("applied", [True, False])
    def test_lost_answers_do_not_matter_without_another_writer(self, backend: Backend, applied: bool) -> None:
        store = backend.store
        backend.lose_answer(Lost(applied))
        one = store.create(KEY, "1")
        assert store.get(KEY) == one and one.value == "1"
        backend.lose_answer(Lost(applied))
        two = store.update(one, "2")
        assert store.get(KEY) == two and two.value == "2"
        backend.lose_answer(Lost(applied))
        store.delete(two)
        assert store.get(KEY) is None

    @pytest.mark.parametrize("applied", [True, False])
    def test_a_create_that_was_lost_yields_to_another_writer(self, backend: Backend, applied: bool) -> None:
        backend.lose_answer(Lost(applied, lambda: backend.other.put(KEY, "2")))
        with pytest.raises(KeyExists):
            backend.store.create(KEY, "1")
        assert now(backend.store) == "2"

    @pytest.mark.parametrize("applied", [True, False])
    def test_an_update_that_was_lost_yields_to_another_writer(self, backend: Backend, applied: bool) -> None:
        one = backend.store.create(KEY, "1")
        backend.lose_answer(Lost(applied, lambda: backend.other.update(is_there(backend.other), "3")))
        with pytest.raises(CompareFailed) as failed:
            backend.store.update(one, "2")
        assert failed.value.maybe_applied and now(backend.store) == "3"

    @pytest.mark.parametrize("applied", [True, False])
    def test_a_delete_that_was_lost_yields_to_another_writer(self, backend: Backend, applied: bool) -> None:
        one = backend.store.create(KEY, "1")
        backend.lose_answer(Lost(applied, lambda: backend.other.put(KEY, "2")))
        with pytest.raises(CompareFailed) as failed:
            backend.store.delete(one)
        assert failed.value.maybe_applied and now(backend.store) == "2"
