"""The store in memory does what every store must do, and the helpers for compare-and-swap do with it what they say."""

from __future__ import annotations

import pytest

from calicoctl.datastore import store as store_module
from calicoctl.datastore.store import FencedStore, Store, create_if_missing, create_missing, modify, set_value
from calicoctl.errors import Conflict, NotFound
from tests.unit.memory_store import HISTORY, Fault, Lost, MemoryStore, memory_store
from tests.unit.store_contract import Backend, StoreContract


class MemoryBackend:
    def __init__(self, modern: bool) -> None:
        self.memory = MemoryStore(modern)
        self.another = self.memory.client()

    @property
    def store(self) -> FencedStore:
        return self.memory

    @property
    def other(self) -> Store:
        return self.another

    def lose_answer(self, lost: Lost) -> None:
        def once() -> Fault:
            self.memory.fault = lambda: None
            return lost

        self.memory.fault = once

    def pass_time(self, seconds: float) -> None:
        self.memory.clock += seconds

    def forget_history(self) -> None:
        for number in range(HISTORY + 1):
            self.memory.put("/elsewhere", str(number))


class TestMemoryStore(StoreContract):
    @pytest.fixture(params=[False, True], ids=["v2", "v3"])
    def backend(self, request: pytest.FixtureRequest) -> Backend:
        return MemoryBackend(request.param)


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "pause", lambda attempt: None)


def faulty(*faults: Fault) -> MemoryStore:
    """A store whose key `/k` holds 1, where these go wrong with the next writes."""
    store = MemoryStore()
    store.create("/k", "1")
    left = list(faults)
    store.fault = lambda: left.pop(0) if left else None
    return store


def test_a_key_is_created_only_where_it_is_missing() -> None:
    store = memory_store()
    assert create_if_missing(store, "/k", "1") and not create_if_missing(store, "/k", "2")
    assert [entry.value for entry in store.tree("")] == ["1"]


@pytest.mark.parametrize("modern", [False, True])
def test_those_of_some_keys_are_created_that_are_missing(modern: bool) -> None:
    store, values = MemoryStore(modern), {"/a": "1", "/b": "2"}
    assert create_missing(store, values) and store.requests == (1 if modern else 2)
    before, store.requests = store.tree(""), 0
    assert not create_missing(store, values) and store.requests == 2
    assert store.tree("") == before
    store.delete(before[0])
    assert create_missing(store, values)
    assert {entry.key: entry.value for entry in store.tree("")} == values and store.get("/b") == before[1]


def test_a_value_is_set_in_spite_of_other_writers() -> None:
    store = faulty("conflict", Lost(meanwhile=lambda: store.put("/k", "3")))
    set_value(store, "/k", "2")
    assert [entry.value for entry in store.tree("")] == ["2"]
    before = store.revision
    set_value(store, "/k", "2")
    assert store.revision == before, "nothing was to be written"
    store.fault = iter(["conflict", None]).__next__
    set_value(store, "/k", None)
    assert store.tree("") == []


def test_a_change_is_computed_anew_from_what_another_writer_wrote() -> None:
    store = faulty(Lost(False, lambda: store.put("/k", "5")))
    assert modify(store, "/k", "none", lambda old: old + "x")
    assert [entry.value for entry in store.tree("")] == ["5x"]
    assert not modify(store, "/k", "none", lambda old: None)
    with pytest.raises(NotFound, match="none"):
        modify(store, "/nothing", "none", lambda old: old)


def test_a_change_whose_answer_was_lost_counts_as_made() -> None:
    """Another writer changed the key on top of it, and found nothing left to do."""
    store = faulty(Lost(True, lambda: store.put("/k", "2 ")))
    assert modify(store, "/k", "none", lambda old: None if old.startswith("2") else "2")


def test_endless_concurrent_writes_are_a_conflict() -> None:
    store = faulty()
    store.fault = lambda: "conflict"
    for attempt in (lambda: set_value(store, "/k", "2"), lambda: modify(store, "/k", "none", lambda old: "2")):
        with pytest.raises(Conflict):
            attempt()
