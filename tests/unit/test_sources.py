"""The events of the store, from a store in memory, and the translation of the Docker Engine's events."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

import pytest

from calicoctl import netlink
from calicoctl.addresses import FAMILIES, pack, version_of
from calicoctl.datastore import keys
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.detection import Choice
from calicoctl.datastore.store import Change, Entry
from calicoctl.errors import StoreUnavailable
from calicoctl.felix import sources
from calicoctl.felix.events import ContainerChanged, StoreChanged, StorePending, StoreRead, WatchFailed, WatchRecovered
from calicoctl.felix.sources import StoreEvents, container_changed
from tests.unit.memory_store import HISTORY, MemoryStore
from tests.unit.waiting import wait_for

ID = "ab" * 32


def test_events_of_old_and_of_current_engines() -> None:
    """From API version 1.52 on, the fields beside `Actor` that older ones have, too, are missing."""
    current = {"Type": "container", "Action": "start", "Actor": {"ID": ID, "Attributes": {}}, "scope": "local"}
    renamed = {**current, "Action": "rename", "Actor": {"ID": ID, "Attributes": {"name": "b", "oldName": "/a"}}}
    assert container_changed(renamed) == ContainerChanged(ID, removed=False)
    older = {**current, "Action": "destroy", "status": "destroy", "id": ID, "from": "busybox"}
    assert container_changed(current) == ContainerChanged(ID, removed=False, started=True)
    assert container_changed(older) == ContainerChanged(ID, removed=True)


class End(BaseException):
    """Ends the thread that follows a store."""


class Followed:
    """A store whose directory /calico a thread follows, and the events that it emits."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.queue: SimpleQueue[Any] = SimpleQueue()
        self.emitted: list[Any] = []
        self.source = StoreEvents(DatastoreClient(self.store, "h"), "/calico", self.queue)
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def _follow(self) -> None:
        with suppress(End):
            self.source.follow()

    def next(self) -> Any:
        while not self.emitted:
            event = self.queue.get(timeout=10)
            self.emitted += event.take() if isinstance(event, StorePending) else [event]
        return self.emitted.pop(0)

    def fail(self, error: BaseException) -> None:
        def before_read() -> None:
            raise error

        self.store.before_read = before_read

    def work(self) -> None:
        self.store.before_read = lambda: None


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Followed]:
    monkeypatch.setattr(sources, "LONG_POLL", 0.02)
    monkeypatch.setattr(sources, "LONGEST_PAUSE", 0.01)
    followed = Followed()
    yield followed
    followed.fail(End())
    followed.thread.join(10)
    assert not followed.thread.is_alive()


def test_a_directory_is_read_then_every_change_below_it_is_emitted(followed: Followed) -> None:
    one = followed.store.create("/calico/a", "1")
    followed.thread.start()
    assert followed.next() == StoreRead("/calico", [one])
    assert followed.next() == WatchRecovered("/calico")
    followed.store.create("/elsewhere", "1")
    two = followed.store.update(one, "2")
    assert followed.next() == StoreChanged(Change("/calico/a", two))
    followed.store.delete(two)
    assert followed.next() == StoreChanged(Change("/calico/a", None))


def test_a_directory_is_read_again_when_the_watch_has_expired(followed: Followed) -> None:
    followed.thread.start()
    assert followed.next() == StoreRead("/calico", [])
    assert followed.next() == WatchRecovered("/calico")

    def miss_changes() -> None:
        followed.work()
        for number in range(HISTORY + 1):
            followed.store.put("/calico/a", str(number))

    followed.store.before_read = miss_changes
    read = followed.next()
    assert isinstance(read, StoreRead) and [entry.value for entry in read.entries] == [str(HISTORY)]
    last = followed.store.create("/calico/b", "1")
    assert followed.next() == StoreChanged(Change("/calico/b", last)), "an expired watch is no failure"


def test_a_directory_that_was_too_large_is_read_again_when_something_right_in_it_has_changed(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "REREAD_INTERVAL", 0.1)
    read = followed.store.list_for_watch
    unread = Entry("/calico/a", "", 0, 0, "it is too large")
    answers = [[unread], [unread]]

    def list_for_watch(directory: str) -> tuple[list[Entry], int]:
        entries, revision = read(directory)
        return (answers.pop() if answers else entries), revision

    monkeypatch.setattr(followed.store, "list_for_watch", list_for_watch)
    followed.thread.start()
    assert followed.next() == StoreRead("/calico", [unread])
    assert followed.next() == WatchRecovered("/calico")
    for key, again in (("/calico/a/deep/b", None), ("/calico/a/b", [unread])):
        entry = followed.store.create(key, "1")
        assert followed.next() == StoreChanged(Change(key, entry))
        if again:
            assert followed.next() == StoreRead("/calico", again)
    answers.append([unread])
    followed.store.delete(gone := followed.store.tree("/calico/a/deep")[0])
    assert followed.next() == StoreChanged(Change(gone.key, None))
    assert followed.next() == StoreRead("/calico", [unread]), "in v3, keys at any depth fill a directory"
    followed.store.remove_tree("/calico/a")
    while isinstance(event := followed.next(), StoreChanged):
        assert event.change.entry is None
    assert event == StoreRead("/calico", [])


def test_re_reads_are_spread_by_the_number_of_hosts() -> None:
    def spread(hosts: int) -> float:
        keys = [f"/calico/v1/host/h{number % hosts}/workload/docker/{number}" for number in range(3 * hosts)]
        return sources.spread_of_reads([Entry(key, "", 1) for key in ("/calico/v1/Ready", *keys)])

    assert spread(1) <= 0.1, "a host alone does not wait noticeably"
    assert spread(20) == 20 * spread(1)
    assert spread(1000) == spread(2000) == sources.LONGEST_SPREAD


def test_a_host_that_missed_changes_spreads_its_read_one_that_starts_does_not(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    monkeypatch.setattr(sources.random, "uniform", lambda low, high: limits.append(high) or 0.0)
    for number in range(30):
        followed.store.create(f"/calico/v1/host/h{number}/bird_ip", "")
    followed.thread.start()
    assert [type(followed.next()) for _ in range(2)] == [StoreRead, WatchRecovered]
    assert limits == []

    def miss_changes() -> None:
        followed.work()
        for number in range(HISTORY + 1):
            followed.store.put("/calico/a", str(number))

    followed.store.before_read = miss_changes
    assert isinstance(followed.next(), StoreRead)
    assert 30 * sources.SPREAD_PER_HOST in limits


@pytest.mark.parametrize("error", [StoreUnavailable("it is away"), RuntimeError("a defect")])
def test_a_directory_is_read_again_when_the_store_is_back(followed: Followed, error: Exception) -> None:
    followed.thread.start()
    assert [type(followed.next()) for _ in range(2)] == [StoreRead, WatchRecovered]
    followed.fail(error)
    away = followed.next()
    assert isinstance(away, WatchFailed) and str(error) in away.why and not away.read
    entry = followed.store.create("/calico/a", "1")  # another host can reach it
    followed.work()
    assert followed.next() == StoreRead("/calico", [entry])
    assert followed.next() == WatchRecovered("/calico")
    assert followed.queue.empty()


@pytest.mark.parametrize("read", [True, False], ids=["read", "watched"])
@pytest.mark.parametrize(("directory", "kept"), [(keys.BGP, True), (keys.IPAM_HOSTS, True), ("/calico/v1", False)])
def test_an_empty_directory_of_a_store_that_has_lost_its_data_is_not_believed(
    followed: Followed, monkeypatch: pytest.MonkeyPatch, directory: str, kept: bool, read: bool
) -> None:
    """As when etcd is started without its v2 API, where the data was. Where Ready belongs, its absence says enough."""
    client = DatastoreClient(followed.store, "h")
    ready = [7]
    monkeypatch.setattr(client, "choice", lambda: Choice("etcdv3", False, "", revision=ready[0]))
    followed.source = StoreEvents(client, directory, followed.queue)
    first = [followed.store.create(f"{directory}/a", "1")] if read else []
    followed.thread.start()
    assert followed.next() == StoreRead(directory, first)
    assert followed.next() == WatchRecovered(directory)
    if not read:
        one = followed.store.create(f"{directory}/a", "1")
        assert followed.next() == StoreChanged(Change(one.key, one))
    followed.fail(StoreUnavailable("it is away"))
    assert isinstance(followed.next(), WatchFailed)
    followed.store.remove_tree(directory)
    ready[0] = 0
    reads: list[None] = []
    followed.store.before_read = lambda: reads.append(None)
    if kept:
        wait_for(lambda: len(reads) > 5)
        assert followed.queue.empty()
        ready[0] = 9
    assert followed.next() == StoreRead(directory, [])


@pytest.mark.parametrize(
    ("cidr", "flags", "table", "replaces"),
    [
        ("10.65.0.0/26", netlink.REPLACE, netlink.TABLE_MAIN, True),
        ("fd65::40/122", netlink.REPLACE | netlink.CREATE, netlink.TABLE_MAIN, True),
        ("10.65.0.0/26", netlink.CREATE, netlink.TABLE_MAIN, False),
        ("10.65.0.0/26", netlink.REPLACE, 255, False),
        ("0.0.0.0/0", netlink.REPLACE, netlink.TABLE_MAIN, True),
    ],
)
def test_routes_that_replace_others(cidr: str, flags: int, table: int, replaces: bool) -> None:
    address, length = cidr.split("/")
    family = FAMILIES[version_of(address)]
    body = struct.pack("=8BI", family, int(length), 0, 0, table, 4, 0, netlink.UNICAST, 0)
    body += netlink.attribute(netlink.RTA_OIF, struct.pack("=I", 2))
    if length != "0":
        body += netlink.attribute(netlink.RTA_DST, pack(address))
    message = netlink.message(netlink.RTM_NEWROUTE, flags, 0, body)
    assert sources._destination(message) == cidr
    assert sources._replaces(netlink.RTM_NEWROUTE, message) is replaces
    assert not sources._replaces(netlink.RTM_DELROUTE, message)
