"""The backends for etcd's two APIs do what every store must do, and the one for the v2 API what is its own business.

What is the business of the one for the v3 API alone is in test_etcd3.py.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from calicoctl.datastore import keys
from calicoctl.datastore.backends import PATIENCE, Backends
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.etcd2 import Etcd2Store
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Endpoint
from calicoctl.datastore.settings import EtcdSettings
from calicoctl.datastore.store import FencedStore
from calicoctl.errors import InvalidValue
from tests.system.proxy import Proxy, proxy_before
from tests.system.support import Etcd, Host
from tests.unit.memory_store import Lost
from tests.unit.store_contract import Backend, StoreContract

ID = EndpointId("host1", "docker", "w1", "e1")


def settings(port: int) -> EtcdSettings:
    return EtcdSettings("http", (("127.0.0.1", port),))


def backend_of(port: int, api: str = "etcdv2") -> FencedStore:
    """Return a backend itself, which asks etcd for nothing but what it is told."""
    return Backends(settings(port)).open(api)


class EtcdBackend:
    """A store that is reached through a proxy."""

    api = "etcdv2"

    def __init__(self, etcd: Etcd, proxy: Proxy) -> None:
        self.etcd = etcd
        self.proxy = proxy
        self.store = backend_of(proxy.port, self.api)
        self.other = backend_of(etcd.port, self.api)

    def lose_answer(self, lost: Lost) -> None:
        self.proxy.lost = lost

    def pass_time(self, seconds: float) -> None:
        time.sleep(seconds)  # what is awaited may also be that nothing expires

    def forget_history(self) -> None:
        for number in range(1100):  # etcd's v2 API keeps 1,000 changes
            self.other.put("/elsewhere", str(number))


@pytest.fixture
def backend(bare_host: Host) -> Iterator[EtcdBackend]:
    bare_host.etcd.delete("/elsewhere")
    with proxy_before(bare_host.etcd.port) as proxy:
        yield EtcdBackend(bare_host.etcd, proxy)


@pytest.mark.api("etcdv2")
class TestEtcd2Store(StoreContract):
    @pytest.fixture
    def backend(self, backend: EtcdBackend) -> Backend:
        return backend


class Etcd3Backend(EtcdBackend):
    api = "etcdv3"

    def forget_history(self) -> None:
        self.other.put("/elsewhere", "1")  # the last change is kept
        reached = self.etcd.v3("kv/range", {"key": "AA=="})["header"]["revision"]
        self.etcd.v3("kv/compaction", {"revision": reached})


@pytest.mark.api("etcdv3")
class TestEtcd3Store(StoreContract):
    @pytest.fixture
    def backend(self, bare_host: Host) -> Iterator[Backend]:
        bare_host.etcd.v3("kv/deleterange", {"key": "AA==", "range_end": "AA=="})  # everything
        with proxy_before(bare_host.etcd.port) as proxy:
            yield Etcd3Backend(bare_host.etcd, proxy)


def directories(etcd: Etcd) -> set[str]:
    """Return all directories below /calico."""
    found, nodes = set(), [etcd._request("GET", "/calico", "?recursive=true")["node"]]
    while nodes:
        node = nodes.pop()
        if node.get("dir"):
            found.add(node["key"])
            nodes += node.get("nodes", [])
    return found


@pytest.mark.api("etcdv2")
def test_an_endpoint_takes_the_directories_of_its_workload_along(bare_host: Host) -> None:
    client = DatastoreClient(backend_of(bare_host.etcd.port), "host1")
    other = EndpointId("host1", "docker", "w2", "e2")
    for id in (ID, other):
        client.create_endpoint(Endpoint(id))
        client.statuses.report_endpoint(id, "{}")
    client.set(keys.pool(4, "10.0.0.0/8"), "{}")
    before = directories(bare_host.etcd)
    for id in (ID, other):
        client.remove_endpoint(id)
        gone = {keys.endpoints("host1", "docker", id.workload), keys.workload("host1", "docker", id.workload)}
        assert before - directories(bare_host.etcd) == gone
        before -= gone
    client.statuses.report_endpoint(ID, None)
    reports = "/calico/felix/v1/host/host1/workload"
    assert before - directories(bare_host.etcd) == {f"{reports}/docker/w1/endpoint", f"{reports}/docker/w1"}
    client.statuses.report_endpoint(other, None)
    client.unset(keys.pool(4, "10.0.0.0/8"))
    after = directories(bare_host.etcd)
    assert reports in after and f"{reports}/docker" not in after
    assert {keys.workloads("host1", "docker"), keys.pools(4)} <= after, "programs of 2015 expect these"


@pytest.mark.api("etcdv2")
def test_what_a_crash_leaves_of_a_delete_counts_as_nothing(bare_host: Host) -> None:
    """It may happen between the delete of a key and that of its directories."""
    store = Etcd2Store(settings(bare_host.etcd.port), PATIENCE)  # without the latter
    client = DatastoreClient(store, "host1")
    client.create_endpoint(Endpoint(ID))
    client.remove_endpoint(ID)
    assert keys.endpoints("host1", "docker", "w1") in directories(bare_host.etcd)
    assert not client.hosts.is_registered() and not store.exists("/calico") and store.tree("/calico") == []
    assert client.workload_ids("docker") == [] and client.workload_endpoint_ids("docker", "w1") == []
    assert client.workload_endpoints("docker", "w1") == [] and client.endpoint_ids() == []
    client.create_endpoint(Endpoint(ID))
    assert client.workload_ids("docker") == ["w1"]


@pytest.mark.api("etcdv2")
def test_a_directory_is_no_key_nor_a_key_a_directory(bare_host: Host) -> None:
    store = backend_of(bare_host.etcd.port)
    store.create("/calico/a/b", "1")
    for read in (store.names, store.exists):
        with pytest.raises(InvalidValue, match="/calico/a/b"):
            read("/calico/a/b")
    with pytest.raises(InvalidValue, match="/calico/a "):
        store.get("/calico/a")


@pytest.mark.api("etcdv2")
def test_what_is_written_elsewhere_costs_a_watch_little_and_hides_nothing(
    bare_host: Host, backend: EtcdBackend
) -> None:
    """etcd forgets 1,000 writes in some three seconds here, and all changes of ours come, each once."""
    store, other = backend.store, backend.other
    began, seconds, per_second, threads = time.monotonic(), 7.0, 300, 4
    written = [0] * threads

    def write_elsewhere(which: int) -> None:
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        with closing(http.client.HTTPConnection("127.0.0.1", bare_host.etcd.port)) as connection:
            while time.monotonic() < began + seconds:
                connection.request("PUT", f"/v2/keys/elsewhere/{which}", "value=1", form)
                connection.getresponse().read()
                written[which] += 1
                time.sleep(max(0.0, began + written[which] * threads / per_second - time.monotonic()))

    def write_ours() -> None:
        for number in range(3):
            time.sleep(seconds / 4)
            other.put(f"/calico/{number}", "1")
        other.put("/calico/last", "1")

    revision = store.list_for_watch("/calico")[1]
    writers = [threading.Thread(target=write_elsewhere, args=(which,)) for which in range(threads)]
    writers.append(threading.Thread(target=write_ours))
    for writer in writers:
        writer.start()
    watch = store.watch("/calico", revision, 4.0)
    found: list[str] = []
    while time.monotonic() < began + seconds or "/calico/last" not in found:
        found += [change.key for change in next(watch)]
    for writer in writers:
        writer.join()
    assert found == ["/calico/0", "/calico/1", "/calico/2", "/calico/last"]
    assert sum(written) > 1100, "else nothing is forgotten"
    assert len(watches(backend.proxy)) < 5 * seconds
    other.remove_tree("/elsewhere")


def watches(proxy: Proxy) -> list[str]:
    """Return the paths of all requests for changes."""
    return [path for path in proxy.asked if "wait=true" in path]


@pytest.mark.api("etcdv2")
def test_changes_need_no_request_each_however_far_etcd_is(backend: EtcdBackend) -> None:
    """Four changes are written while a request is on its way; all of them come, in order, each once."""
    store, changes = backend.store, 100
    written: list[str] = []

    def write(number: int) -> None:
        for _ in range(min(number, changes - len(written))):
            written.append(f"/calico/{len(written)}")
            backend.other.put(written[-1], "1")

    revision = store.list_for_watch("/calico")[1]
    backend.proxy.before_watch = lambda: write(4)
    found: list[str] = []
    with closing(store.watch("/calico", revision, 4.0)) as watch:
        while len(found) < changes:
            if found == written:
                write(1)
            found += [change.key for change in next(watch)]
    assert found == written
    assert len(watches(backend.proxy)) < changes / 2
