"""The store in memory that unit tests use does what etcd does."""

from __future__ import annotations

from typing import Callable

import pytest

from calicoctl.datastore.store import EtcdSettings, EtcdStore, Store
from calicoctl.errors import CompareFailed, KeyExists
from tests.system.support import Host
from tests.unit.memory_store import MemoryStore


@pytest.fixture(params=["etcd", "memory"])
def store(request: pytest.FixtureRequest, bare_host: Host) -> Store:
    if request.param == "memory":
        return MemoryStore()
    return EtcdStore(EtcdSettings("http", (("127.0.0.1", bare_host.etcd.port),)))


def raises(error: type[Exception], call: Callable, *arguments: object) -> None:
    with pytest.raises(error):
        call(*arguments)


def test_contract(store: Store) -> None:
    assert store.get("/calico/a") is None
    assert store.tree("/calico") == [] and store.names("/calico") == []
    one = store.create("/calico/a/b", "1")
    assert (one.key, one.value) == ("/calico/a/b", "1")
    raises(KeyExists, store.create, "/calico/a/b", "2")
    assert store.get("/calico/a/b") == one
    two = store.update(one, "2")
    assert two.index > one.index and two.value == "2"
    raises(CompareFailed, store.update, one, "3")
    raises(CompareFailed, store.delete, one)
    odd = store.create("/calico/a/c d?e#f%41:-é", "ü")
    assert store.get(odd.key) == odd
    store.create("/calico/x/y/z", "")
    assert {entry.key: entry.value for entry in store.tree("/calico")} == {
        "/calico/a/b": "2",
        odd.key: "ü",
        "/calico/x/y/z": "",
    }
    assert sorted(store.names("/calico")) == ["a", "x"]
    for key in ("/calico/a/b", "/calico/not/there"):
        store.check_writable(key)
    assert store.get("/calico/a/b") == two and store.get("/calico/not/there") is None
    store.delete(two)
    store.delete(two)
    assert store.get("/calico/a/b") is None
    raises(CompareFailed, store.update, two, "3")
    store.prune("/calico/x/y")
    assert store.get("/calico/x/y/z") is not None
    store.prune("/calico/nothing")
