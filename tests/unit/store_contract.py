"""What every store must do: the same tests run on the store in memory (unit) and on real ones (system).

A module that tests a store derives a class from StoreContract, with a fixture `backend`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Protocol

import pytest

from calicoctl.datastore.store import (
    Change,
    Create,
    Delete,
    Entry,
    Fence,
    FencedStore,
    Store,
    Update,
    Watch,
    each_below,
)
from calicoctl.errors import CalicoError, CompareFailed, Fenced, KeyExists, WatchExpired
from tests.unit.memory_store import Lost

KEY = "/calico/a/b"
READY = "/calico/ready"
ALWAYS = float("inf")


class Backend(Protocol):
    """A store under test, and what a test can do to it."""

    @property
    def store(self) -> FencedStore:
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


def everything(store: Store) -> dict[str, Entry]:
    """Return key -> entry for all keys except READY."""
    return {entry.key: entry for entry in store.tree("/calico") if entry.key != READY}


def collected(watch: Watch, count: int) -> list[Change]:
    """Return the next changes, in as many batches as they come in."""
    changes: list[Change] = []
    for _ in range(50):
        changes += next(watch)
        if len(changes) >= count:
            break
    return changes


def is_gone(key: str, change: Change) -> bool:
    """Return whether a change says that a key was deleted."""
    return change.entry is None and (key == change.key or (not change.alone and key.startswith(change.key + "/")))


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

    def test_what_is_below_a_directory_is_read_in_parts(self, store: Store) -> None:
        for key in ("/calico/a", "/calico/b/c", "/calico/d/e/f/g", "/calico/d/h/i", "/calico/d/h/j"):
            store.create(key, key)
        assert sorted(each_below(store, "/calico"), key=lambda entry: entry.key) == sorted(
            store.tree("/calico"), key=lambda entry: entry.key
        )

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

    def test_what_is_read_says_whether_it_expires(self, store: Store) -> None:
        store.create(KEY, "1", ttl=60)
        store.create("/calico/lasting", "1")
        ended = store.create("/calico/ended", "1", ttl=60)
        store.update(ended, "2")
        found = [
            store.tree("/calico"),
            store.list_for_watch("/calico")[0],
            [is_there(store), is_there(store, ended.key)],
        ]
        for entries in found:
            assert [entry.key for entry in entries if entry.expires] == [KEY]

    def test_put_writes_blindly(self, store: Store) -> None:
        store.put(KEY, "1")
        one = is_there(store)
        store.put(KEY, "2")
        assert now(store) == "2" and is_there(store).revision > one.revision

    def test_several_keys_are_put_at_once(self, backend: Backend) -> None:
        store = backend.store
        store.put_all({})
        one = store.create(KEY, "1")
        backend.lose_answer(Lost())
        store.put_all({KEY: "2", "/calico/c": "3"}, ttl=2)
        two, three = is_there(store), is_there(store, "/calico/c")
        assert (two.value, three.value) == ("2", "3") and two.revision > one.revision
        assert not store.atomic or two.revision == three.revision
        store.put_all({"/calico/c": "4"})
        backend.pass_time(4)
        assert [(entry.key, entry.value) for entry in store.tree("/calico")] == [("/calico/c", "4")]

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

    def test_entries_are_collected_as_they_are_converted(self, store: Store) -> None:
        assert store.collect("/calico", lambda entry: entry) == []
        written = [store.create(key, value) for key, value in ((KEY, "1"), ("/calico/x/y", "é"), ("/calico/xx", "2"))]
        assert sorted(store.collect("/calico", lambda entry: entry), key=str) == sorted(written, key=str)
        assert store.collect("/calico/x", lambda entry: entry.value) == ["é"]
        assert store.collect("/calico", lambda entry: entry.value if entry.key == KEY else None) == ["1"]
        keys = store.collect("/calico", lambda entry: entry.key, values=False)
        assert sorted(keys) == sorted(entry.key for entry in written)

        def refuse(entry: Entry) -> None:
            raise CalicoError(entry.key)

        with pytest.raises(CalicoError, match=KEY):
            store.collect("/calico/a", refuse)
        assert store.collect("/calico/x", lambda entry: entry.key) == ["/calico/x/y"]

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

    def test_a_touch_lets_a_key_live_on(self, backend: Backend) -> None:
        """With leases, it writes nothing, and keeps alive what this object has written last with that time to live."""
        store = backend.store
        revision = store.list_for_watch("/calico")[1]
        one, ours = store.create(KEY, "1", ttl=3), store.create("/calico/ours", "1", ttl=3)
        store.put("/calico/put", "1", ttl=3)
        backend.other.put("/calico/other", "1", ttl=3)
        backend.other.create("/calico/taken over", "1", ttl=3)
        store.put("/calico/taken over", "2", ttl=3)
        for number in range(3):
            backend.pass_time(1)
            now = store.touch(one, str(number), 3)
            assert store.get(KEY) == now and now.created == one.created
            assert (now == one) == store.leases and now.value == ("1" if store.leases else str(number))
            one = now
        backend.pass_time(1.5)
        left = {KEY} | ({ours.key, "/calico/put", "/calico/taken over"} if store.leases else set())
        assert {entry.key for entry in store.tree("/calico")} == left
        watch = store.watch("/calico", revision, 0.3)
        found = collected(watch, 7 if store.leases else 9)
        assert store.leases == (sum(change.key == KEY for change in found) == 1)
        backend.pass_time(5)
        assert store.tree("/calico") == []

    def test_a_touch_needs_the_entry_as_it_was_read(self, backend: Backend) -> None:
        store = backend.store
        one = store.create(KEY, "1", ttl=60)
        two = backend.other.update(one, "2", ttl=60)
        with pytest.raises(CompareFailed):
            store.touch(one, "3", 60)
        assert now(store) == "2"
        three = store.touch(two, "3", 60)
        assert (three.value, now(store)) == ("3", "3"), "it is not on a lease of ours"
        assert store.touch(three, "3", 60).value == "3"
        four = store.touch(three if store.leases else is_there(store), "4", 50)
        assert four.value == now(store) == "4", "it was on another lease"
        backend.other.delete(four)
        with pytest.raises(CompareFailed):
            store.touch(four, "5", 50)
        assert now(store) is None

    def test_a_touch_finds_out_that_the_key_has_expired(self, backend: Backend) -> None:
        store = backend.store
        one = store.create(KEY, "1", ttl=2)
        backend.pass_time(5)
        with pytest.raises(CompareFailed):
            store.touch(one, "2", 2)
        store.create("/calico/c", "1", ttl=2)
        with pytest.raises(CompareFailed):
            store.touch(one, "2", 2)
        one = store.create(KEY, "1", ttl=2)
        assert store.touch(one, "1", 2).key == KEY and store.exists("/calico/a")

    def test_several_keys_and_directories_are_read_at_once(self, store: Store) -> None:
        assert store.read([]) == ([], []) and store.read([KEY], ["/calico"]) == ([None], [[]])
        one, two, three = (store.create(key, "1") for key in (KEY, "/calico/x/y/z", "/calico/x/yy"))
        keys, directories = store.read([three.key, "/calico/y", KEY, KEY], ["/calico/x/y", "/calico/none", "/calico/x"])
        assert keys == [three, None, one, one]
        assert directories[:2] == [[two], []] and sorted(directories[2], key=str) == sorted([two, three], key=str)

    @pytest.mark.parametrize("path", ["../b", "a/../b", "./b", "/b", "b/"])
    def test_a_path_that_stands_for_another_key_reads_nothing(self, store: Store, path: str) -> None:
        for key in ("/calico/b", "/calico/x/b"):
            store.create(key, "1")
        assert store.get(f"/calico/x/{path}") is None
        assert store.names(f"/calico/x/{path}") == [] and not store.exists(f"/calico/x/{path}")

    def test_names_may_leave_some_out(self, store: Store) -> None:
        for name in ("b", "b.c", "b0/x", "d/e/f", "d/g", "e", "é"):
            store.put(f"/calico/a/{name}", "1")
        for but in ([], ["b"], ["d", "e"], ["b", "b.c", "b0", "d", "e", "é"], ["", "a", "b.", "z"]):
            assert sorted(store.names("/calico/a", but)) == sorted({"b", "b.c", "b0", "d", "e", "é"} - set(but))
        assert store.names("/calico/none", ["a"]) == []

    # Several writes at once

    def test_several_writes_are_made_at_once(self, store: Store) -> None:
        one, two, gone = (store.create(f"/calico/{name}", "1") for name in ("1", "2", "gone"))
        store.delete(gone)
        created, updated, *deleted = store.commit([Create(KEY, "1"), Update(one, "2"), Delete(two), Delete(gone)])
        assert store.tree("/calico") in ([updated, created], [created, updated]) and deleted == [two, gone]
        assert (created.key, created.value, updated.key, updated.value) == (KEY, "1", one.key, "2")
        assert updated.created == one.created and created.created == created.revision
        assert not store.atomic or created.revision == updated.revision
        same = store.commit([Update(updated, "2")])[0]
        assert same.revision > updated.revision and store.get(one.key) == same

    def test_of_several_writes_all_or_those_before_the_failure_are_made(self, backend: Backend) -> None:
        store = backend.store
        old = store.create("/calico/changed", "1")
        changed = store.update(old, "2")
        one = store.create("/calico/1", "1")
        for failing, error in (
            (Create(changed.key, "2"), KeyExists),
            (Update(old, "3"), CompareFailed),
            (Delete(old), CompareFailed),
            (Update(Entry("/calico/none", "1", 1), "3"), CompareFailed),
        ):
            with pytest.raises(error) as failed:
                store.commit([Create(KEY, "1"), Update(one, "2"), failing, Create("/calico/z", "1")])
            assert not getattr(failed.value, "maybe_applied", False)
            assert store.get(changed.key) == changed and store.get("/calico/z") is None
            now_one = is_there(store, one.key)
            assert (store.get(KEY) is None, now_one == one) == (store.atomic, store.atomic)
            if not store.atomic:
                store.delete(is_there(store))
                one = now_one

    @pytest.mark.parametrize("applied", [True, False])
    def test_lost_answers_of_several_writes_do_not_matter_without_another_writer(
        self, backend: Backend, applied: bool
    ) -> None:
        store = backend.store
        one, two, gone = (store.create(f"/calico/{name}", "1") for name in ("1", "2", "gone"))
        store.delete(gone)
        backend.lose_answer(Lost(applied))
        created, updated, *_ = store.commit([Create(KEY, "1"), Update(one, "2"), Delete(two), Delete(gone)])
        assert sorted(store.tree("/calico"), key=str) == sorted([updated, created], key=str)
        assert (created.value, updated.value) == ("1", "2")

    @pytest.mark.parametrize("applied", [True, False])
    def test_several_writes_that_were_lost_yield_to_another_writer(self, backend: Backend, applied: bool) -> None:
        store, other = backend.store, backend.other
        one, two = store.create(KEY, "1"), store.create("/calico/2", "1")
        backend.lose_answer(Lost(applied, lambda: other.update(is_there(other), "3")))
        with pytest.raises(CompareFailed) as failed:
            store.commit([Update(one, "2"), Update(two, "2")])
        assert failed.value.maybe_applied and now(store) == "3"
        assert now(store, two.key) == ("2" if store.atomic and applied else "1")
        backend.lose_answer(Lost(applied, lambda: other.put("/calico/new", "3")))
        with pytest.raises(KeyExists):
            store.commit([Create("/calico/new", "2"), Update(is_there(store), "4")])
        assert now(store, "/calico/new") == "3" and now(store) == ("4" if store.atomic and applied else "3")

    # Writes with a fence

    def test_a_write_whose_fence_has_changed_is_not_made(self, backend: Backend) -> None:
        """Whether the fence still holds is looked at late enough for that."""
        store = backend.store
        one, gone = store.create(KEY, "1"), store.create("/calico/gone", "1")
        store.delete(gone)
        store.fence = Fence(READY, 0, 0)
        one = store.update(one, "2")
        ready = store.create(READY, "true")
        store.fence = Fence(READY, ready.revision, 0)
        one = store.update(one, "3")
        store.put_all({"/calico/c/d": "1", "/calico/c/e": "1"})
        store.update(ready, "true")
        before = everything(store)
        for revision in (0, ready.revision):
            store.fence = Fence(READY, revision, 0)
            for write in (
                lambda: store.create("/calico/new", "1"),
                lambda: store.update(one, "4"),
                lambda: store.touch(one, "4", 60),
                lambda: store.delete(one),
                lambda: store.commit([Delete(gone), Create("/calico/new", "1"), Update(one, "4")]),
                lambda: store.put(KEY, "4"),
                lambda: store.put_all({"/calico/new": "1", KEY: "4"}),
                lambda: store.remove_tree("/calico/c"),
            ):
                with pytest.raises(Fenced, match="etcd key /calico/ready keeps being modified"):
                    write()
            assert everything(store) == before
        store.fence = None
        assert store.update(one, "4").value == "4"

    def test_only_an_atomic_store_looks_at_the_fence_of_each_write(self, backend: Backend) -> None:
        store = backend.store
        ready = store.create(READY, "true")
        store.fence = Fence(READY, ready.revision, ALWAYS)
        one = store.create(KEY, "1")
        store.delete(ready)
        if store.atomic:
            with pytest.raises(Fenced):
                store.update(one, "2")
        else:
            store.update(one, "2")

    @pytest.mark.parametrize("applied", [True, False])
    def test_a_write_that_is_sent_again_looks_at_the_fence(self, backend: Backend, applied: bool) -> None:
        """If it was applied already, it succeeds."""
        store, other = backend.store, backend.other
        store.create(READY, "true")
        one, two = store.create(KEY, "1"), store.create("/calico/2", "1")
        for write in (
            lambda: store.create("/calico/new", "2"),
            lambda: store.update(one, "2"),
            lambda: store.commit([Update(two, "2")]),
            lambda: store.delete(is_there(store)),
        ):
            store.fence = Fence(READY, is_there(store, READY).revision, ALWAYS)
            before = everything(store)
            backend.lose_answer(Lost(applied, lambda: other.update(is_there(other, READY), "false")))
            if applied:
                write()
            else:
                with pytest.raises(Fenced):
                    write()
            assert (everything(store) != before) == applied
        store.fence = Fence(READY, is_there(store, READY).revision, ALWAYS)
        backend.lose_answer(Lost(False))
        assert store.create("/calico/newer", "1").value == "1", "the fence holds"

    def test_another_writer_is_told_from_a_fence_that_has_changed(self, backend: Backend) -> None:
        store, other = backend.store, backend.other
        ready, one = store.create(READY, "true"), store.create(KEY, "1")
        store.fence = Fence(READY, ready.revision, ALWAYS)

        def meanwhile() -> None:
            other.update(ready, "false")
            store.fence, fence = None, store.fence  # the store in memory has one for all
            other.update(one, "3")
            store.fence = fence

        backend.lose_answer(Lost(False, meanwhile))
        with pytest.raises(CompareFailed) as failed:
            store.update(one, "2")
        assert failed.value.maybe_applied and now(store) == "3"

    def test_asking_whether_a_key_may_be_written_changes_nothing(self, store: Store) -> None:
        one = store.create(KEY, "1")
        before = store.list_for_watch("/calico")
        store.check_writable(KEY)
        store.check_writable("/calico/not/there", KEY, "/calico/not")
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
        one = store.create("/calico/v", "1")
        if store.atomic:  # there are no directories
            store.create("/calico/v/below", "1")
        entries, revision = store.list_for_watch("/calico")
        store.delete(one)
        store.remove_tree("/calico/t")
        expiring = store.create(KEY, "1", ttl=2)
        backend.pass_time(4)
        last = store.create("/calico/last", "1")
        held = {entry.key: entry for entry in entries}
        watch = store.watch("/calico", revision, 0.3)
        while last.key not in held:
            for change in next(watch):
                if change.entry is not None:
                    held[change.key] = change.entry
                else:
                    held = {key: entry for key, entry in held.items() if not is_gone(key, change)}
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
