"""The backend for etcd's v3 API: what it asks for, and what it makes of answers that a real etcd seldom gives."""

from __future__ import annotations

import json
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Collection, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, Callable

import pytest

from calicoctl import answers
from calicoctl.datastore import etcd3, etcd3_http, etcd3_json, etcd3_watch, members
from calicoctl.datastore.etcd3 import Etcd3Store
from calicoctl.datastore.etcd3_http import Connection
from calicoctl.datastore.settings import EtcdSettings
from calicoctl.datastore.store import Change, Create, Delete, Entry, Update
from calicoctl.errors import CompareFailed, KeyExists, StoreError, StoreUnavailable, WatchExpired
from tests.unit.rogue_server import OK, Client, Server, answer, serving
from tests.unit.waiting import wait_for

REVISION = 5
KEPT = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = KEPT + b"Transfer-Encoding: chunked\r\n\r\n"


def encoded(text: str | bytes) -> str:
    return b64encode(text.encode() if isinstance(text, str) else text).decode()


def kv(key: str | bytes, value: str | bytes = "", revision: int = 3) -> dict[str, Any]:
    number = str(revision)
    return {"key": encoded(key), "value": encoded(value), "mod_revision": number, "create_revision": number}


def reply(body: dict[str, Any], status: int = 200) -> bytes:
    head = b"HTTP/1.1 %d X\r\nConnection: close\r\n" % status
    return answer(json.dumps({"header": {"revision": str(REVISION)}, **body}).encode(), head)


def refusal(code: int, message: str, status: int = 400) -> bytes:
    return reply({"error": message, "message": message, "code": code}, status)


class Gateway:
    """Answers reads of ranges, alone and in transactions, as etcd does, and says of writes that they were applied.

    `asked` has all requests: (path, body).
    """

    def __init__(self, kvs: dict[bytes, bytes] | None = None) -> None:
        self.kvs = kvs or {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.instead: list[bytes] = []
        """Whole answers for the next requests."""

    def __call__(self, client: Client, line: str) -> None:
        path, body = line.split()[1], json.loads(client.body or b"{}")
        self.asked.append((path, body))
        if self.instead:
            client.send(self.instead.pop(0))
        elif path == "/v3/kv/range":
            client.send(reply(self._range(body)))
        else:
            reads = [self._range(read) for operation in body.get("success", ()) for read in operation.values()]
            client.send(reply({"succeeded": True, "responses": [{"response_range": read} for read in reads]}))

    def _range(self, asked: dict[str, Any]) -> dict[str, Any]:
        start, end = b64decode(asked["key"]), b64decode(asked.get("range_end", ""))
        found = sorted(key for key in self.kvs if (start <= key < end if end else key == start))
        limit = int(asked.get("limit", "0")) or len(found)
        kvs = [kv(key, b"" if asked.get("keys_only") else self.kvs[key]) for key in found[:limit]]
        return {"header": {"revision": str(REVISION)}, "kvs": kvs, "more": len(found) > limit}

    def ranges(self) -> list[dict[str, Any]]:
        """Return the reads that were asked for alone."""
        return [body for path, body in self.asked if path == "/v3/kv/range"]


def store_of(server: Server, patience: float = 0.0, **options: Any) -> Etcd3Store:
    user = {"username": "calico", "password": "hunter2"} if "authorize" in options else {}
    return Etcd3Store(EtcdSettings("http", (("127.0.0.1", server.port),), **user), patience, **options)


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


@pytest.fixture
def server(gateway: Gateway) -> Iterator[Server]:
    with serving(gateway) as server:
        yield server


@pytest.fixture
def store(server: Server) -> Etcd3Store:
    return store_of(server)


# Directories


def test_a_long_list_is_read_in_pages_at_one_revision(gateway: Gateway, store: Etcd3Store) -> None:
    gateway.kvs = {b"/calico/%04d" % number: b"%d" % number for number in range(2500)}
    gateway.kvs |= {b"/calico": b"", b"/calico0": b"", b"/calicoa/b": b""}
    entries, revision = store.list_for_watch("/calico")
    assert [entry.value for entry in entries] == [str(number) for number in range(2500)]
    assert entries[0] == Entry("/calico/0000", "0", 3, 3) and revision == REVISION + 1
    assert [(asked["limit"], asked.get("revision")) for asked in gateway.ranges()] == [
        ("1000", None),
        ("1000", str(REVISION)),
        ("1000", str(REVISION)),
    ]


def test_what_is_too_large_is_read_in_smaller_pages_or_left_out_and_named(
    gateway: Gateway, store: Etcd3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd3_http, "LARGEST", 20_000)
    gateway.kvs = {b"/calico/%03d" % number: b"x" * 400 for number in range(100)}
    gateway.kvs[b"/calico/050"] = b"x" * 40_000
    entries, _ = store.list_for_watch("/calico")
    assert [entry.key for entry in entries] == [f"/calico/{number:03}" for number in range(100)]
    assert {entry.key: entry.problem for entry in entries if entry.problem} == {"/calico/050": etcd3.TOO_LARGE}
    assert [entry.key for entry in store.tree("/calico")] == [entry.key for entry in entries if not entry.problem]
    assert len(gateway.asked) < 100


def test_a_list_whose_revision_is_forgotten_meanwhile_is_read_again(gateway: Gateway, store: Etcd3Store) -> None:
    gateway.kvs = {b"/calico/%04d" % number: b"" for number in range(1500)}
    first, forgotten = [kv("/calico/0000")], refusal(11, "etcdserver: mvcc: required revision has been compacted")
    gateway.instead = [reply({"kvs": first, "more": True}), forgotten]
    assert len(store.tree("/calico")) == 1500
    limits = [asked["limit"] for asked in gateway.ranges()]
    assert limits == ["1000", "1000", "10000"], "whoever compacts all the time prevents no read of one page"
    gateway.instead = [reply({"kvs": first, "more": True}), forgotten] * etcd3.ATTEMPTS
    with pytest.raises(StoreUnavailable, match="try again later"):
        store.tree("/calico")
    assert not gateway.instead


def test_what_is_collected_is_read_in_pages_as_large_as_the_values_allow(gateway: Gateway, store: Etcd3Store) -> None:
    """So neither memory nor the number of requests grows with what is stored."""
    gateway.kvs = {b"/calico/%05d" % number: b"1" for number in range(10_000)}
    found = store.collect("/calico", lambda entry: entry.key if entry.key < "/calico/00003" else None)
    assert found == ["/calico/00000", "/calico/00001", "/calico/00002"]
    assert [int(asked["limit"]) for asked in gateway.ranges()] == [128 * 2**number for number in range(7)]
    assert {asked.get("revision") for asked in gateway.ranges()[1:]} == {str(REVISION)}
    gateway.asked.clear()
    assert len(store.collect("/calico", lambda entry: entry.key, values=False)) == 10_000
    assert [asked["limit"] for asked in gateway.ranges()] == ["1000", "2000", "4000", "8000"]
    assert all(asked["keys_only"] for asked in gateway.ranges())
    gateway.asked.clear()
    gateway.kvs = {b"/calico/%03d" % number: b"x" * 30_000 for number in range(400)}
    assert len(store.collect("/calico", lambda entry: entry.key)) == 400
    assert [asked["limit"] for asked in gateway.ranges()] == ["128", *["52"] * 6]


def test_what_cannot_be_read_is_collected_with_its_problem(
    gateway: Gateway, store: Etcd3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd3_http, "LARGEST", 20_000)
    gateway.kvs = {b"/calico/a": b"1", b"/calico/b": b"{\xff}", b"/calico/c": b"x" * 40_000, b"/calico/\xff": b"2"}
    found = store.collect("/calico", lambda entry: (entry.key, entry.value, entry.problem))
    assert found == [
        ("/calico/a", "1", None),
        ("/calico/b", "{\N{REPLACEMENT CHARACTER}}", None),
        ("/calico/c", "", etcd3.TOO_LARGE),
        ("/calico/\\xff", "", "its key is not UTF-8, and not read"),
    ]


def test_what_is_collected_is_read_again_if_its_revision_is_forgotten(gateway: Gateway, store: Etcd3Store) -> None:
    gateway.kvs = {b"/calico/%04d" % number: b"" for number in range(200)}
    first, forgotten = [kv("/calico/0000")], refusal(11, "etcdserver: mvcc: required revision has been compacted")
    gateway.instead = [reply({"kvs": first, "more": True}), forgotten]
    assert len(store.collect("/calico", lambda entry: entry.key)) == 200
    assert [asked["limit"] for asked in gateway.ranges()] == ["128", "256", "1280"]
    gateway.instead = [reply({"kvs": first, "more": True}), forgotten] * etcd3.ATTEMPTS
    with pytest.raises(StoreUnavailable, match="try again later"):
        store.collect("/calico", lambda entry: entry.key)


def test_what_is_not_utf8_is_named_and_does_not_hide_the_rest(gateway: Gateway, store: Etcd3Store) -> None:
    gateway.kvs = {b"/calico/a": b"1", b"/calico/b": b"{\xff}", b"/calico/\xff": b"2", "/calico/é".encode(): b""}
    entries, _ = store.list_for_watch("/calico")
    problems = {entry.key: (entry.value, entry.problem) for entry in entries}
    assert problems == {
        "/calico/a": ("1", None),
        "/calico/b": ("", "its value is not UTF-8, and not read"),
        "/calico/é": ("", None),
        "/calico/\\xff": ("", "its key is not UTF-8, and not read"),
    }
    assert {entry.key: entry.value for entry in store.tree("/calico")} == {
        "/calico/a": "1",
        "/calico/b": "{\N{REPLACEMENT CHARACTER}}",
        "/calico/é": "",
    }
    assert sorted(store.names("/calico")) == ["a", "b", "é"]
    found = store.get("/calico/b")
    assert found is not None and found.value == "{\N{REPLACEMENT CHARACTER}}", "so it can be deleted"
    assert store.read(["/calico/b"], ["/calico"]) == ([found], [store.tree("/calico")])


def test_a_list_without_an_end_is_given_up(
    gateway: Gateway, store: Etcd3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd3, "MOST_KEYS", 1000)
    gateway.kvs = {b"/calico/%04d" % number: b"" for number in range(2001)}
    for read in (store.tree, store.names):
        with pytest.raises(StoreError, match="more than 1000 keys below /calico, and they are not read"):
            read("/calico")
    assert len(gateway.asked) == 4


def test_what_fills_a_directory_does_not_hide_the_others(
    gateway: Gateway, store: Etcd3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd3, "LARGEST_READ", 60_000)
    monkeypatch.setattr(etcd3, "PAGE", 10)
    good = {f"/calico/{name}/é/{number:02}": "1" * 50 for name in ("b", "x", "x0") for number in range(30)}
    gateway.kvs = {key.encode(): value.encode() for key, value in good.items()}
    gateway.kvs |= {b"/calico/big": b"x" * 50_000, b"/calico/small": b"x", b"/calico/x.a": b"1"}
    gateway.kvs |= {b"/calico/w/%04d" % number: b"x" * 500 for number in range(1000)}
    entries, revision = store.list_for_watch("/calico")
    problems = {entry.key: entry.problem for entry in entries if entry.is_unread_directory}
    assert problems == {"/calico/big": etcd3.TOO_FULL, "/calico/w": etcd3.TOO_FULL} and revision == REVISION + 1
    others = {entry.key: entry.value for entry in entries if entry.problem is None}
    assert others == {**good, "/calico/small": "x", "/calico/x.a": "1"}
    assert {entry.key: entry.value for entry in store.tree("/calico")} == others
    assert len(gateway.asked) < 2 * 30, "what is below a name that is left out is skipped"


@pytest.mark.parametrize("read", ["tree", "names", "list_for_watch"])
def test_pages_that_never_end_are_given_up(read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(etcd3, "time", SimpleNamespace(monotonic=lambda: now))
    asked = 0

    def serve(client: Client, line: str) -> None:
        nonlocal asked, now
        now, asked = now + 3, asked + 1
        page = {"header": {"revision": "5"}, "kvs": [kv(f"/calico/{asked:09}")], "more": True}
        client.send(reply(page if line.split()[1] == "/v3/kv/range" else {"responses": [{"response_range": page}]}))

    with serving(serve) as server, pytest.raises(StoreUnavailable, match="takes more than 120 s to say what is below"):
        getattr(store_of(server), read)("/calico")
    assert asked == 1 + etcd3.LONGEST_READ // 3


def test_names_that_take_all_memory_are_not_read(
    gateway: Gateway, store: Etcd3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd3, "LARGEST_READ", 10_000)
    gateway.kvs = {b"/calico/%s/%d" % (name * 4000, number): b"" for name in (b"x", b"y") for number in range(1500)}
    assert store.names("/calico") == ["x" * 4000, "y" * 4000]
    gateway.kvs[b"/calico/" + b"z" * 4000] = b""
    with pytest.raises(StoreError, match="the names in /calico are too long"):
        store.names("/calico")


def test_what_is_too_large_for_one_answer_is_read_one_by_one(
    gateway: Gateway, store: Etcd3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd3_http, "LARGEST", 20_000)
    gateway.kvs = {b"/calico/%02d" % number: b"x" * 400 for number in range(50)} | {b"/k": b"1"}
    (one,), (tree,) = store.read(["/k"], ["/calico"])
    assert one is not None and one.value == "1" and len(tree) == 50


def test_names_skip_what_is_below_them(gateway: Gateway, store: Etcd3Store) -> None:
    gateway.kvs = {b"/calico/%d/%04d" % (host, number): b"" for host in range(3) for number in range(2000)}
    gateway.kvs |= {b"/calico/1": b"", b"/calico/1.a": b"", b"/calico/10": b""}
    assert store.names("/calico") == ["0", "1", "1.a", "10", "2"]
    assert len(gateway.asked) == 4
    gateway.asked.clear()
    assert store.names("/calico", ["0", "1", "2", "none"]) == ["1.a", "10"]
    assert len(gateway.asked) == 1 and "/v3/kv/txn" in gateway.asked[0]
    assert store.names("/calico", ["1.a", "10"]) == ["0", "1", "2"]


def test_names_that_are_too_long_for_one_answer_are_read_in_several(
    gateway: Gateway, store: Etcd3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd3_http, "LARGEST", 20_000)
    names = [f"{number:02}{'x' * 3000}" for number in range(40)]
    gateway.kvs = {f"/calico/{name}".encode(): b"" for name in names}
    assert store.names("/calico") == names
    assert store.names("/calico", names[::2]) == names[1::2]


@pytest.mark.parametrize("text", ["9" * 25, "-1", "", "1e3", 5, None, ["1"]])
def test_what_is_no_revision_is_an_error(text: object) -> None:
    with pytest.raises(TypeError, match="x is no number"):
        etcd3_json.number({"x": text}, "x")


# Refusals


REFUSALS = {
    "does not permit this user to use /k: a role": (7, "etcdserver: permission denied"),
    "asks for a user: set ETCD_USERNAME": (3, "etcdserver: user name is empty"),
    "asks for a user": (16, "etcdserver: invalid auth token"),
    "has no space left, and takes no writes: compact": (8, "etcdserver: mvcc: database space exceeded"),
    "refuses the value of /k: it is too large": (3, "etcdserver: request is too large"),
    "the value of /k: it is too large": (8, "grpc: received message larger than max (2700018 vs. 2097152)"),
    "with --client-cert-auth, its own certificate": (14, "connection error: authentication handshake failed: EOF"),
    "refuses a request about /k: etcdserver: corrupt": (15, "etcdserver: corrupt cluster"),
}


@pytest.mark.parametrize("text", REFUSALS)
def test_a_refusal_is_one_clear_line_and_nothing_is_sent_again(gateway: Gateway, server: Server, text: str) -> None:
    store = store_of(server, patience=20)
    for write in (lambda: store.put("/k", "1"), lambda: store.create("/k", "1"), lambda: store.check_writable("/k")):
        gateway.asked.clear()
        gateway.instead = [refusal(*REFUSALS[text])]
        with pytest.raises(StoreError) as raised:
            write()
        assert text in str(raised.value) and "\n" not in str(raised.value)
        assert not isinstance(raised.value, StoreUnavailable) and len(gateway.asked) == 1


def test_a_server_without_the_api_is_named(gateway: Gateway, store: Etcd3Store) -> None:
    gateway.instead = [answer(b"404 page not found\n", b"HTTP/1.1 404 Not Found\r\n")]
    with pytest.raises(StoreError, match="does not serve its v3 API over HTTP"):
        store.get("/k")


def test_an_answer_that_says_nothing_is_described(gateway: Gateway, store: Etcd3Store) -> None:
    for body, head, what in (
        (b"", OK, "the answer is empty"),
        (b" \n", OK, "the answer is empty"),
        (b"", b"HTTP/1.1 302 Found\r\nConnection: close\r\n", "status 302"),
    ):
        gateway.instead = [answer(body, head)]
        with pytest.raises(StoreError, match=f"does not answer as etcd does: {what}$"):
            store.get("/k")


@pytest.mark.parametrize(
    "busy",
    [
        refusal(14, "etcdserver: no leader", 503),
        refusal(2, "context deadline exceeded", 500),
        refusal(4, "etcdserver: request timed out", 504),
        refusal(8, "etcdserver: too many requests", 429),
        answer(b"<html>Bad Gateway</html>", b"HTTP/1.1 502 Bad Gateway\r\n"),
    ],
)
def test_of_any_other_error_the_outcome_is_unknown(
    gateway: Gateway, server: Server, busy: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members.time, "sleep", lambda seconds: None)
    store = store_of(server, patience=20)
    gateway.instead = [busy]
    assert store.create("/k", "1") == Entry("/k", "1", REVISION, REVISION)
    # it may have been applied: then the key has our value
    found = [{"response_range": {"kvs": [kv("/k", "1")]}}]
    gateway.instead = [busy, reply({"responses": found})]
    assert store.create("/k", "1") == Entry("/k", "1", 3, 3)
    gateway.instead = [reply({"responses": found})]
    with pytest.raises(KeyExists):
        store.create("/k", "1")


def failed(*kvs: dict[str, Any] | None) -> bytes:
    """Return the answer to a transaction that was not applied, with what its keys hold."""
    return reply({"responses": [{"response_range": {"kvs": [kv] if kv else []}} for kv in kvs]})


def test_values_of_ours_do_not_count_unless_all_are_there(gateway: Gateway, server: Server) -> None:
    """All writes are applied, or none: if one was not, what looks like ours was written by others."""
    store, old = store_of(server, patience=20), Entry("/b", "1", 3)
    writes = [Create("/a", "1"), Update(old, "2"), Delete(Entry("/c", "1", 3))]
    lost = refusal(14, "etcdserver: no leader", 503)
    gateway.instead = [lost, failed(kv("/a", "1", 7), kv("/b", "2", 7), None)]
    assert [(entry.key, entry.revision) for entry in store.commit(writes)] == [("/a", 7), ("/b", 7), ("/c", 3)]
    gateway.instead = [lost, failed(kv("/a", "1", 7), kv("/b", "1", 3), None)]
    with pytest.raises(KeyExists):
        store.commit(writes)
    gateway.instead = [lost, failed(None, kv("/b", "2", 7), None)]
    with pytest.raises(CompareFailed) as raised:
        store.commit(writes)
    assert raised.value.maybe_applied
    gateway.asked.clear()
    gateway.instead = [lost, failed(None, kv("/b", "1", 3), None)]
    assert [entry.revision for entry in store.commit(writes)] == [REVISION, REVISION, 3]
    assert [len(body["success"]) for _, body in gateway.asked] == [3, 3, 2], "what is deleted already is left out"
    gateway.instead = [failed(None, kv("/b", "1", 3), kv("/c", "1", 3))]
    with pytest.raises(StoreError, match="does not answer as etcd does"):
        store.commit(writes)


# Leases


def test_a_put_takes_one_request_while_the_lease_has_half_of_its_time_left(
    gateway: Gateway, store: Etcd3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(action: Callable[[], object]) -> list[str]:
        gateway.asked.clear()
        action()
        return [path.rpartition("/")[2] for path, _ in gateway.asked]

    now = 1000.0
    monkeypatch.setattr(etcd3.time, "monotonic", lambda: now)
    alive = reply({"result": {"header": {}, "ID": "11", "TTL": "30"}})
    gateway.instead = [reply({"ID": "11"})]
    assert asked(lambda: store.put("/k", "1", ttl=30)) == ["grant", "txn"]
    now += 15
    assert asked(lambda: store.put("/k", "2", ttl=30)) == ["txn"]
    assert gateway.asked[0][1]["success"][0]["request_put"]["lease"] == "11"
    assert asked(lambda: store.put_all({"/k": "2"}, ttl=30)) == ["txn"]
    now += 1
    gateway.instead = [alive]
    assert asked(lambda: store.put_all({"/k": "3"}, ttl=30)) == ["keepalive", "txn"]
    assert asked(lambda: store.put("/k", "4", ttl=30)) == ["txn"]
    gateway.instead = [alive]
    assert asked(lambda: store.create("/n", "5", ttl=30)) == ["keepalive", "txn"], "what must live as long as it says"
    gateway.instead = [refusal(5, "etcdserver: requested lease not found", 404), reply({"ID": "12"})]
    assert asked(lambda: store.put("/k", "6", ttl=30)) == ["txn", "grant", "txn"], "it has expired all the same"


def test_a_lease_that_has_expired_is_granted_anew(gateway: Gateway, store: Etcd3Store) -> None:
    granted, dead = reply({"ID": "11", "TTL": "30"}), reply({"result": {"header": {}, "ID": "11"}})
    alive = reply({"result": {"header": {}, "ID": "12", "TTL": "30"}})
    gateway.instead = [granted, refusal(5, "etcdserver: requested lease not found", 404), reply({"ID": "12"})]
    store.put("/k", "1", ttl=30)
    gateway.instead = [alive]
    entry = store.create("/k", "1", ttl=30)
    gateway.instead = [alive, reply({"kvs": [{**kv("/k", "1", REVISION), "lease": "12"}]})]
    assert store.touch(entry, "2", 30) == entry
    gateway.instead = [alive, reply({"kvs": [{**kv("/k", "1", REVISION), "lease": "13"}]}), alive]
    assert store.touch(entry, "2", 30).value == "2", "another program has attached it to its own lease"
    gateway.instead = [dead, reply({"ID": "14"}), failed(None)]
    with pytest.raises(CompareFailed):
        store.touch(entry, "2", 30)
    assert [path.rpartition("/")[2] for path, _ in gateway.asked] == [
        *("grant", "txn", "grant", "txn"),
        *("keepalive", "txn"),
        *("keepalive", "range"),
        *("keepalive", "range", "keepalive", "txn"),
        *("keepalive", "grant", "txn"),
    ]
    gone = refusal(5, "etcdserver: requested lease not found", 404)
    gateway.instead = [*[gone, reply({"ID": "15"})] * (etcd3.ATTEMPTS - 1), gone]
    with pytest.raises(StoreUnavailable, match="ends leases of 30 s"):
        store.put("/k", "1", ttl=30)
    assert not gateway.instead
    gateway.instead = [reply({"ID": "16"})]
    entry = store.create("/k", "1", ttl=30)
    error = {"grpc_code": 14, "http_code": 503, "message": "etcdserver: no leader", "http_status": "X"}
    gateway.instead = [reply({"error": error})]
    with pytest.raises(StoreUnavailable, match="no leader"):
        store.touch(entry, "2", 30)


# Tokens

NEW = "just issued"


def tokens_of(*texts: str) -> tuple[list[list[str]], etcd3_http.Authorize]:
    """Return a function that returns these tokens, the last one from then on, and the refused tokens of its calls."""
    calls: list[list[str]] = []

    def authorize(connection: Connection, refused: Collection[str]) -> tuple[str | None, bool]:
        token = texts[min(len(calls), len(texts) - 1)]
        calls.append(list(refused))
        return token, token == NEW

    return calls, authorize


def test_a_token_is_renewed_unseen(gateway: Gateway, server: Server) -> None:
    refused, authorize = tokens_of("one", "two", "three", NEW)
    store = store_of(server, authorize=authorize)
    expired = refusal(16, "etcdserver: invalid auth token", 401)
    gateway.instead = [expired] * 3
    assert store.get("/k") is None and refused == [[], ["one"], ["one", "two"], ["one", "two", "three"]]
    assert len(gateway.asked) == 4
    gateway.instead = [refusal(7, "etcdserver: permission denied", 403)]
    with pytest.raises(StoreError, match="does not permit"):
        store.get("/k")
    gateway.instead = [expired] * 2
    with pytest.raises(StoreError) as raised:
        store.get("/k")
    text = str(raised.value)
    assert "has refused the token of user 'calico', also a new one (etcdserver: invalid auth token)" in text
    assert "ETCD_" not in text and NEW not in text
    assert refused[4:] == [[NEW]] and not gateway.instead


def test_the_token_of_a_watch_is_renewed_unseen(short: None) -> None:
    reason = "rpc error: code = Unauthenticated desc = etcdserver: invalid auth token"
    canceled = result(created=True, canceled=True, cancel_reason=reason)
    change = result(events=[{"kv": kv("/calico/a", "1", 6)}])
    openings = [[canceled], [canceled], [CREATED, change]]

    class Watches(Stream):
        def __call__(self, client: Client, line: str) -> None:
            if "/v3/watch" in line:
                self.messages = openings.pop(0)
            super().__call__(client, line)

    refused, authorize = tokens_of("one", "two", NEW)
    with serving(Watches()) as server:
        watch = store_of(server, authorize=authorize).watch("/calico", 6, 20)
        assert [change.entry.value for change in next(watch)] == ["1"]
        watch.close()
    assert refused == [[], ["one"], ["one", "two"]] and openings == []


# Connections


def test_a_connection_is_kept_and_one_that_the_server_has_closed_is_replaced_without_doubt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A write over a dead connection would be in doubt."""
    kept = answer(json.dumps({"header": {"revision": "5"}}).encode(), KEPT)
    again = threading.Event()

    def serve(client: Client, line: str) -> None:
        client.send(kept)
        if not again.wait(10):
            client.hold()

    with serving(serve) as server:
        store = store_of(server)
        store.put("/k", "1")
        again.set()
        wait_for(lambda: server.sent, "the end of the connection")
        store.put("/k", "1")
        assert len(server.requests) == 2


# Watches


class Stream(Gateway):
    """Answers a watch with messages, each of which may come in pieces; then it stays open, until the client goes."""

    def __init__(self, *messages: dict[str, Any] | bytes, ends: bool = False) -> None:
        super().__init__()
        self.messages: Iterable[dict[str, Any] | bytes] = messages
        self.ends = ends

    def __call__(self, client: Client, line: str) -> None:
        if "/v3/watch" not in line:
            super().__call__(client, line)
            return
        self.asked.append(("/v3/watch", json.loads(client.body)))
        client.send(CHUNKED)
        for message in self.messages:
            text = message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n"
            client.send(b"%x\r\n%s\r\n" % (len(text), text))
        if not self.ends:
            client.hold()


def result(revision: int = REVISION, **fields: Any) -> dict[str, Any]:
    return {"result": {"header": {"revision": str(revision)}, **fields}}


CREATED = result(created=True)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((etcd3_http, "READ_TIMEOUT"), (etcd3_watch, "READ_TIMEOUT"), (etcd3, "WATCH_PATIENCE")):
        monkeypatch.setattr(module, name, 0.2)


def test_changes_come_as_they_are_made_whatever_pieces_they_come_in(short: None) -> None:
    puts = [{"kv": kv(f"/calico/{number}", "é", 6 + number)} for number in range(3)]
    delete = {"type": "DELETE", "kv": {"key": encoded("/calico/0"), "mod_revision": "9"}}
    text = json.dumps(result(8, events=puts)).encode() + b"\n" + json.dumps(result(9, events=[delete])).encode() + b"\n"
    stream = Stream(CREATED, text[:100], text[100:101], text[101:-5], text[-5:])
    with serving(stream) as server:
        watch = store_of(server).watch("/calico", 6, 0.3)
        assert [change.entry for change in next(watch)] == [
            Entry(f"/calico/{number}", "é", 6 + number, 6 + number) for number in range(3)
        ]
        (change,) = next(watch)
        assert change == Change("/calico/0", None) and change.alone
        assert next(watch) == next(watch) == [], "the end of a chunk is no message that begins"
        watch.close()
        wait_for(lambda: len(server.sent) == len(server.requests), "the end of its connection")
    assert all(body["count_only"] for body in stream.ranges()), "somebody may have filled any key"
    paths = [path for path, _ in stream.asked]
    assert paths == ["/v3/kv/range", "/v3/watch", "/v3/kv/range", "/v3/kv/range"], (
        "a member that lags behind would look like a store that was set back"
    )


def test_a_message_that_has_begun_to_arrive_with_another_one_has_as_much_time_as_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = b"".join(json.dumps(result(n, events=[{"kv": kv("/calico/a", "1", n)}])).encode() + b"\n" for n in (8, 9))
    late, asked = 0.0, threading.Event()

    def messages() -> Iterator[dict[str, Any] | bytes]:
        yield CREATED
        yield text[:-20]
        asked.wait(10)
        yield text[-20:]

    stream = Stream()
    stream.messages = messages()
    monkeypatch.setattr(answers, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + late))
    with serving(stream) as server:
        watch = store_of(server).watch("/calico", 6, 10)
        assert next(watch)[0].entry == Entry("/calico/a", "1", 8, 8)
        late = 100.0  # whoever follows the changes was busy
        threading.Timer(0.1, asked.set).start()
        assert next(watch)[0].entry == Entry("/calico/a", "1", 9, 9)
        watch.close()


def test_what_is_not_utf8_in_a_change_is_named(short: None) -> None:
    puts = [{"kv": kv(b"/calico/\xff", "1", 6)}, {"kv": kv("/calico/a", b"\xff", 6)}]
    delete = {"type": "DELETE", "kv": {"key": encoded(b"/calico/\xff"), "mod_revision": "7"}}
    with serving(Stream(CREATED, result(7, events=[*puts, delete]))) as server:
        changes = next(store_of(server).watch("/calico", 6, 0.3))
    assert [(change.key, change.entry and change.entry.problem) for change in changes] == [
        ("/calico/\\xff", "its key is not UTF-8, and not read"),
        ("/calico/a", "its value is not UTF-8, and not read"),
        ("/calico/\\xff", None),
    ]


def test_a_watch_goes_on_at_another_member_from_what_it_has_seen(short: None) -> None:
    """Fragments may end within a revision; a message without changes says that there are none up to its revision."""
    event = {"kv": kv("/calico/a", "1", 7)}
    for messages, revision in (
        ([CREATED], 6),
        ([CREATED, result(8, events=[event])], 8),
        ([CREATED, result(8, events=[event], fragment=True)], 7),
        ([CREATED, result(8, events=[event]), result(20)], 21),
    ):
        no_leader = {"error": {"grpc_code": 14, "message": "etcdserver: no leader"}}
        good = Stream(result(30, created=True), result(30, events=[{"kv": kv("/calico/b", "2", 30)}]))
        with serving(Stream(*messages, no_leader, ends=True)) as bad, serving(good) as other:
            store = Etcd3Store(EtcdSettings("http", (("127.0.0.1", bad.port), ("127.0.0.1", other.port))), 0)
            watch = store.watch("/calico", 6, 20)
            found = [change.key for _ in range(len(messages) > 1) for change in next(watch)]
            found += [change.key for change in next(watch)]
            assert found[-1] == "/calico/b"
        assert [body["create_request"]["start_revision"] for path, body in good.asked if "watch" in path] == [
            str(revision)
        ]


def test_after_a_watch_has_expired_the_next_one_is_open_before_all_is_read_again(short: None) -> None:
    """Somebody compacts all the time: what was written since a read is forgotten before a watch asks for it."""
    compacted = Stream(CREATED, result(0, canceled=True, compact_revision="16"))
    with serving(compacted) as server:
        store = store_of(server)
        with pytest.raises(WatchExpired):
            next(store.watch("/calico", store.list_for_watch("/calico")[1], 20))
        compacted.asked.clear()
        compacted.messages = [result(20, created=True), result(21, events=[{"kv": kv("/calico/a", "1", 21)}])]
        for _ in range(2):
            watch = store.watch("/calico", store.list_for_watch("/calico")[1], 20)
        assert [change.key for change in next(watch)] == ["/calico/a"]
        assert [path for path, _ in compacted.asked] == ["/v3/watch", "/v3/kv/range"] * 2
        assert {body["create_request"]["start_revision"] for path, body in compacted.asked if "watch" in path} == {"0"}
        watch.close()
        compacted.instead = [refusal(7, "etcdserver: permission denied", 403)]
        with pytest.raises(StoreError, match="does not permit"):
            store.list_for_watch("/calico")
        wait_for(lambda: len(server.sent) == len(server.requests), "the end of all its connections")


def test_of_many_messages_in_one_chunk_one_is_kept_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "PART", 1000)
    number = 2000
    text = b"".join(
        json.dumps(result(n, events=[{"kv": kv("/calico/a", "1", n)}])).encode() + b"\n" for n in range(6, 6 + number)
    )
    streams: list[etcd3_http.Stream] = []
    stream = Connection.stream
    monkeypatch.setattr(Connection, "stream", lambda *arguments: streams.append(one := stream(*arguments)) or one)
    with serving(Stream(CREATED, text)) as server:
        watch = store_of(server).watch("/calico", 6, 10)
        for n in range(6, 6 + number):
            (change,) = next(watch)
            assert change.entry == Entry("/calico/a", "1", n, n) and len(streams[0]._lines._rest) <= 1000
        watch.close()


ENDS: dict[str, tuple[type[Exception], str, list[Any]]] = {
    "compacted": (WatchExpired, "forgotten", [CREATED, result(0, canceled=True, compact_revision="16")]),
    "compacted at once": (WatchExpired, "forgotten", [result(created=True, canceled=True, compact_revision="16")]),
    "set back": (WatchExpired, "reached 4 only, where 5", [result(4, created=True)]),
    "forbidden": (StoreError, "does not permit", [result(created=True, canceled=True)]),
    "forbidden, and told": (
        StoreError,
        "does not permit",
        [result(created=True, canceled=True, cancel_reason="code = PermissionDenied desc = permission denied")],
    ),
    "without a user": (
        StoreError,
        "asks for a user",
        [result(created=True, canceled=True, cancel_reason="code = Unauthenticated desc = invalid auth token")],
    ),
    "refused": (
        StoreError,
        "not let /calico be watched: why",
        [result(created=True, canceled=True, cancel_reason="why")],
    ),
    "ended": (
        WatchExpired,
        "stopped",
        [CREATED, {"error": {"grpc_code": 14, "message": "etcdserver: server stopped"}}],
    ),
    "cut off": (WatchExpired, "cut short", [CREATED]),
    "no watch": (StoreError, "does not answer as etcd does", [result()]),
    "no JSON": (StoreError, "does not answer as etcd does", [CREATED, b"{\n"]),
    "no result": (StoreError, "does not answer as etcd does", [CREATED, b'{"result": []}\n']),
    "an old change": (StoreError, "before the revision", [CREATED, result(events=[{"kv": kv("/calico/a", "1", 5)}])]),
    "no event": (StoreError, "does not answer as etcd does", [CREATED, result(events=[1])]),
}


@pytest.mark.parametrize("what", ENDS)
def test_a_watch_that_cannot_go_on_says_why(what: str, short: None) -> None:
    error, text, messages = ENDS[what]
    with serving(Stream(*messages, ends=True)) as server:
        with pytest.raises(StoreError, match=text) as raised:
            next(store_of(server).watch("/calico", 6, 20))
        assert type(raised.value) is error


def test_a_watch_that_says_nothing_at_all_is_given_up(short: None) -> None:
    with serving(Stream()) as server, pytest.raises(StoreUnavailable, match="timed out"):
        next(store_of(server).watch("/calico", 6, 20))


def test_a_message_is_bounded_in_time_and_in_size(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd3_watch, "LARGEST", 2**16)
    attacks: dict[str, Callable[[Client], None]] = {
        "drips": lambda client: client.drip(b'5\r\n{"re"\r\n1\r\ns\r\n' + b"1\r\nu\r\n" * 100),
        "floods": lambda client: client.flood(b"4000\r\n" + b" " * 0x4000 + b"\r\n"),
        "a chunk without an end": lambda client: client.flood(b"fffffffffff\r\n" + b" " * 0x4000),
        "a chunk's length without an end": lambda client: client.flood(b"0" * 1000),
        "a chunk of a negative length": lambda client: client.flood(b"-5\r\n"),
    }
    for attack in attacks.values():

        class Attack(Stream):
            def __call__(self, client: Client, line: str, attack: Callable[[Client], None] = attack) -> None:
                if "/v3/watch" not in line:
                    super().__call__(client, line)
                    return
                text = json.dumps(CREATED).encode() + b"\n"
                client.send(CHUNKED + b"%x\r\n%s\r\n" % (len(text), text))
                attack(client)

        with serving(Attack()) as server, pytest.raises(StoreError):
            next(store_of(server).watch("/calico", 6, 20))
