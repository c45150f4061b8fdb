"""The backend for etcd's v3 API on real servers: users and limits, and members that hang, die or have no quorum."""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from pathlib import Path
from urllib.error import HTTPError

import pytest

from calicoctl.datastore.etcd3 import PAGE, Etcd3Store
from calicoctl.datastore.etcd3_http import Authorize, Connection
from calicoctl.datastore.settings import EtcdSettings
from calicoctl.datastore.store import Change, Create, Delete, Entry, Update, Watch
from calicoctl.errors import StoreError, StoreUnavailable, WatchExpired
from tests.system.agent import A4, B4, AgentHost
from tests.system.support import Etcd, Host, wait_for
from tests.system.test_cluster import cluster_of, running
from tests.system.traffic import PATIENT, ping

pytestmark = pytest.mark.api("etcdv3")

KEY = "/calico/a/b"
WATCH = 1.0
"""Seconds of quiet until a watch asks whether its member has a quorum."""


def store_of(*servers: Etcd, patience: float = 20, authorize: Authorize | None = None) -> Etcd3Store:
    members = tuple(("127.0.0.1", server.port) for server in servers)
    user = None if authorize is None else "user"
    return Etcd3Store(EtcdSettings("http", members, username=user, password=user), patience, authorize)


def encoded(text: str) -> str:
    return b64encode(text.encode()).decode()


@pytest.fixture
def alone(bare_host: Host, tmp_path: Path) -> Iterator[Etcd]:
    """An etcd whose quota is small."""
    etcd = Etcd(tmp_path / "etcd")
    etcd.start(None, "--quota-backend-bytes=4000000")
    etcd.await_ready()
    yield etcd
    etcd.stop(9)


def as_user(name: str, first: str | None = None) -> Authorize:
    """Return what gets tokens of a user; `first` is the one it has, whether or not etcd knows it."""
    known = [first] if first else []

    def authorize(connection: Connection, refused: Collection[str]) -> tuple[str, bool]:
        if set(known) & set(refused):
            known.clear()
        is_new = not known
        if not known:
            connection.token = None  # etcd refuses a log-in with a bad one
            user = {"name": name, "password": f"{name}'s"}
            known.append(str(connection.exchange("POST", "/v3/auth/authenticate", user)["token"]))
        return known[0], is_new

    return authorize


def test_a_role_for_calico_alone_suffices(alone: Etcd) -> None:
    store_of(alone).put("/elsewhere", "1")
    for user, permission in (("root", None), ("writer", "READWRITE"), ("reader", "READ"), ("stranger", None)):
        alone.v3("auth/user/add", {"name": user, "password": f"{user}'s"})
        alone.v3("auth/role/add", {"name": user})
        alone.v3("auth/user/grant", {"user": user, "role": user})
        if permission is not None:
            below = {"key": encoded("/calico/"), "range_end": encoded("/calico0"), "permType": permission}
            alone.v3("auth/role/grant", {"name": user, "perm": below})
    alone.v3("auth/enable", {})

    writer = store_of(alone, authorize=as_user("writer"))
    one, two = writer.commit([Create(KEY, "1"), Create("/calico/x/y", "1")])
    revision = writer.list_for_watch("/calico")[1]
    with closing(writer.watch("/calico", revision, WATCH)) as watch:
        one = writer.update(one, "2")
        writer.put("/calico/x/z", "1")
        live = writer.touch(writer.create("/calico/live", "1", ttl=60), "1", 60)
        assert [change.entry for _ in range(3) for change in next(watch)][::2] == [one, live]
        assert next(watch) == []
    assert writer.read([KEY, "/calico/none"], ["/calico/x"])[0] == [one, None]
    assert sorted(writer.names("/calico")) == ["a", "live", "x"] and writer.exists("/calico")
    writer.check_writable(KEY)
    assert writer.version().startswith("3.")
    writer.commit([Update(one, "3"), Delete(two)])
    writer.remove_tree("/calico/x")
    assert [entry.key for entry in writer.tree("/calico")] == [KEY, "/calico/live"]
    with pytest.raises(StoreError, match="does not permit this user to use /elsewhere"):
        writer.get("/elsewhere")

    reader = store_of(alone, authorize=as_user("reader", "of before etcd was restarted"))
    assert len(reader.tree("/calico")) == 2
    before = reader.list_for_watch("/calico")
    for write in (
        lambda: reader.check_writable(KEY),
        lambda: reader.put(KEY, "4"),
        lambda: reader.delete(before[0][0]),
    ):
        with pytest.raises(StoreError, match=f"does not permit this user to use {KEY}"):
            write()
    assert reader.list_for_watch("/calico") == before
    # a token that etcd does not know any more is renewed for a watch as well
    with closing(store_of(alone, authorize=as_user("reader", "old")).watch("/calico", before[1], WATCH)) as watch:
        assert next(watch) == []

    stranger = store_of(alone, authorize=as_user("stranger"))
    with pytest.raises(StoreError, match="does not permit this user to use /calico"):
        next(stranger.watch("/calico", before[1], WATCH))
    with pytest.raises(StoreError, match="asks for a user: set ETCD_USERNAME"):
        store_of(alone).get(KEY)
    with pytest.raises(StoreError, match="has refused the token of user 'user', also a new one"):
        store_of(alone, authorize=lambda connection, refused: ("wrong", True)).get(KEY)


def test_a_store_at_its_limits_says_so_and_can_still_be_read_and_emptied(alone: Etcd) -> None:
    store = store_of(alone)
    for size in (1_700_000, 2_500_000):
        with pytest.raises(StoreError, match=f"refuses the value of {KEY}: it is too large for one request"):
            store.create(KEY, "x" * size)
    assert not store.exists("/calico")
    one = store.create(KEY, "1")
    with pytest.raises(StoreError, match="has no space left, and takes no writes: compact"):
        for number in range(20):
            store.put(f"/calico/large/{number}", "x" * 500_000)
    for write in (lambda: store.update(one, "2"), lambda: store.check_writable(KEY)):
        with pytest.raises(StoreError, match="has no space left"):
            write()
    assert store.get(KEY) == one
    store.delete(one)
    store.remove_tree("/calico/large")
    assert store.tree("/calico") == []


def test_a_quota_that_is_used_up_stops_no_traffic_and_all_goes_on_after_it(alone: Etcd) -> None:
    host = AgentHost(alone)
    host.start_agent()
    host.add_pair()
    host.sync()
    with pytest.raises(HTTPError):
        for number in range(20):
            alone.put(f"/elsewhere/{number}", "x" * 500_000)
    space = "/var/run/netns/a"
    for words in (("profile", "add", "db"), ("container", space, "ip", "add", "ipv4"), ("container", "remove", space)):
        said = host.ctl(*words, status=1)
        assert "has no space left, and takes no writes: compact" in said.err and said.err.count("\n") == 1
    assert ping("a", B4, patience=PATIENT)
    host.check_consistent()
    alone.delete("/elsewhere")
    alone.v3("kv/compaction", {"revision": store_of(alone).list_for_watch("/calico")[1] - 1})
    alone.v3("maintenance/defragment", {})
    (alarm,) = alone.v3("maintenance/alarm", {"action": "GET"})["alarms"]
    alone.v3("maintenance/alarm", {**alarm, "action": "DEACTIVATE"})
    host.ctl("container", "remove", space)
    host.ctl("container", "add", space, A4)
    host.set_profiles("a", "web")
    host.sync()
    assert ping("a", B4, patience=PATIENT)
    assert "Problems:   none" in host.ctl("status").out


def test_a_long_list_is_read_in_pages_and_removed_at_once(bare_host: Host) -> None:
    store, count = store_of(bare_host.etcd), 2 * PAGE + 100
    bare_host.etcd.v3("kv/deleterange", {"key": "AA==", "range_end": "AA=="})  # everything
    revision = store.list_for_watch("/calico")[1]
    for begin in range(0, count, 100):
        store.commit([Create(f"/calico/l/{number:04}/x", str(number)) for number in range(begin, begin + 100)])
    entries, after = store.list_for_watch("/calico")
    assert [entry.value for entry in entries] == [str(number) for number in range(count)]
    assert len(store.names("/calico/l")) == count
    watch = store.watch("/calico", revision, WATCH)
    found: list[Change] = []
    while len(found) < count:
        found += next(watch)
    assert [change.entry for change in found] == entries
    store.remove_tree("/calico/l")
    gone = next(watch)
    assert len(gone) == count and {change.entry for change in gone} == {None}
    watch.close()
    assert after == found[-1].entry.revision + 1 and not store.exists("/calico")


def test_a_watch_that_was_too_slow_for_what_is_forgotten_expires(own_etcd: Etcd) -> None:
    """What it has not taken yet, and etcd has no room for, is compacted."""
    store, other = store_of(own_etcd), store_of(own_etcd)
    with closing(store.watch("/calico", store.list_for_watch("/calico")[1], WATCH)) as watch:
        await_change(watch, other.create(KEY, "1"), 5)
        for _ in range(400):
            other.put("/calico/large", "x" * 100_000)
        own_etcd.v3("kv/compaction", {"revision": str(other.list_for_watch("/calico")[1] - 1)})
        with pytest.raises(WatchExpired, match="forgotten"):
            for _ in range(400):
                next(watch)


# Clusters


HOME = Path("/run/calico-tests/cluster3")


@pytest.fixture
def members(bare_host: Host) -> Iterator[list[Etcd]]:
    """Three members, which tell each watch every second up to which revision there are no changes."""
    servers = [Etcd(HOME / f"m{number}", f"m{number}") for number in range(3)]
    with running(servers, "--experimental-watch-progress-notify-interval=1s"):
        yield servers


def await_change(watch: Watch, entry: Entry, seconds: float) -> None:
    """Wait for a change of a watch; fail if another one comes, or if it takes longer than `seconds`."""
    end = time.monotonic() + seconds
    while not (changes := next(watch)):
        assert time.monotonic() < end, "the change does not come"
    assert changes == [Change(entry.key, entry)]


def test_members_that_hang_die_or_have_no_quorum(members: list[Etcd]) -> None:
    first, second, third = members
    store, other = store_of(*members), store_of(second, third)
    watch = store.watch("/calico", store.list_for_watch("/calico")[1], WATCH)
    await_change(watch, other.create(KEY, "0"), 5)

    # what is quiet for long does not fall behind what etcd forgets
    other.put("/elsewhere", "1")
    reached = other.list_for_watch("/calico")[1] - 1
    assert next(watch) == next(watch) == next(watch) == []
    first.v3("kv/compaction", {"revision": str(reached)})

    # one hangs: commands and the watch go on with the others, and nothing is read anew
    first.process.send_signal(19)
    began = time.monotonic()
    one = other.update(is_there(other), "1")
    await_change(watch, one, 10)
    assert store.get(KEY) == one
    two = store.update(one, "2")
    await_change(watch, two, 5)
    assert time.monotonic() - began < 15
    first.process.send_signal(18)

    # the one that is watched dies: all must be read anew, from another one
    wait_for(lambda: not follows(first), "the end of the watch of the one that had hung")
    watched = next(server for server in members if follows(server))
    watched.stop(9)
    with pytest.raises(WatchExpired, match="cut short"):
        for _ in range(5):
            next(watch)
    entries, revision = store.list_for_watch("/calico")
    assert entries == [two]
    watch = store.watch("/calico", revision, WATCH)
    three = store.update(two, "3")
    await_change(watch, three, 5)

    # without a quorum, everything fails, soon, and nothing is lost
    rest = [server for server in members if server is not watched]
    next(server for server in rest if not follows(server)).stop(9)
    impatient = store_of(*members, patience=1)
    wait_for(lambda: fails(impatient.list_for_watch, "/calico"), "the loss of the quorum")
    for attempt in (lambda: impatient.update(three, "4"), lambda: next(impatient.watch("/calico", revision, WATCH))):
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            attempt()
        assert time.monotonic() - began < 15
    with pytest.raises((StoreUnavailable, WatchExpired)):
        for _ in range(10):
            next(watch)
    for server in members:
        if server.process is None:
            server.start(cluster_of(members))
    assert store.list_for_watch("/calico")[0] in ([three], [Entry(KEY, "4", three.revision + 1, three.created)])


def is_there(store: Etcd3Store) -> Entry:
    entry = store.get(KEY)
    assert entry is not None
    return entry


def follows(server: Etcd) -> bool:
    """Return whether a member has a watch."""
    import urllib.request

    with urllib.request.urlopen(f"{server.url}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    (line,) = [line for line in lines if line.startswith("etcd_debugging_mvcc_watcher_total ")]
    return float(line.split()[1]) > 0


def fails(attempt: Callable[..., object], *arguments: object) -> bool:
    try:
        attempt(*arguments)
    except StoreUnavailable:
        return True
    return False
