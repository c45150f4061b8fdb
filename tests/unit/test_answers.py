"""Answers of etcd, and of a man in the middle, that take for ever, never end, or have another shape than etcd's."""

from __future__ import annotations

import gzip
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Callable

import pytest

from calicoctl import answers
from calicoctl.datastore import etcd2, etcd2_watch, etcd3, etcd3_http, etcd3_watch
from calicoctl.datastore.etcd2 import Etcd2Store
from calicoctl.datastore.etcd3 import Etcd3Store
from calicoctl.datastore.settings import EtcdSettings
from calicoctl.datastore.store import Entry, Store
from calicoctl.errors import CalicoError, StoreError, StoreUnavailable
from tests.unit.rogue_server import OK, Answer, Client, Server, answer, serving

KEY = "/calico/v1/Ready"
TIMEOUT = 0.3
"""The timeout in seconds in tests of servers whose answers must be given up."""
LONG_TIMEOUT = 1.5
"""The timeout in seconds in tests that need both: an answer that is given up, and one that comes in time."""
PATIENT = 30.0
"""The timeout in seconds in tests of answers that come at once, however long a busy machine takes for that."""
SOON = 10.0
"""Seconds within which a request has failed, after some timeouts; what drips would go on for longer."""
SIZE = 2**16
KERNEL = 2**24
"""Bytes that the kernel buffers, at most, between a server and a client that does not read."""

NODE = {"key": KEY, "value": "true", "modifiedIndex": 3, "createdIndex": 3}
GET = json.dumps({"action": "get", "node": NODE}).encode()
KV = {"key": "L2NhbGljby92MS9SZWFkeQ==", "value": "dHJ1ZQ==", "mod_revision": "3", "create_revision": "3"}
GET3 = json.dumps({"header": {"revision": "5"}, "kvs": [KV], "count": "1"}).encode()
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"

REQUESTS: dict[str, Callable[[Store], object]] = {
    "get": lambda store: store.get(KEY),
    "list": lambda store: store.list_for_watch("/calico"),
    "collect": lambda store: store.collect("/calico", lambda entry: entry),
    "names": lambda store: store.names("/calico"),
    "exists": lambda store: store.exists("/calico"),
    "version": lambda store: store.version(),
    "watch": lambda store: next(iter(store.watch("/calico", 4, 0.1))),
    "read": lambda store: store.read([KEY], ["/calico/v1"]),
    "create": lambda store: store.create(KEY, "true"),
    "update": lambda store: store.update(Entry(KEY, "", 1), "true"),
    "delete": lambda store: store.delete(Entry(KEY, "", 1)),
    "put": lambda store: store.put(KEY, "true"),
    "lease": lambda store: store.put(KEY, "true", ttl=30),
}


def sends(data: bytes) -> Answer:
    return lambda client, line: client.send(data)


def drips(before: bytes, data: bytes) -> Answer:
    def answers(client: Client, line: str) -> None:
        client.send(before)
        client.drip(data)

    return answers


def floods(before: bytes, data: bytes) -> Answer:
    def answers(client: Client, line: str) -> None:
        client.send(before)
        client.flood(data)

    return answers


DRIPS = {
    "the status": drips(b"", answer(GET)),
    "a header": drips(OK, b"X-A: " + b"a" * 1000),
    "the body": drips(OK + b"Content-Length: 1000\r\n\r\n", GET.ljust(1000)),
    "a body until the connection ends": drips(OK + b"\r\n", GET.ljust(1000)),
    "the length of a chunk": drips(CHUNKED, b"0" * 1000),
    "the trailer": drips(CHUNKED + b"%x\r\n%s\r\n0\r\n" % (len(GET), GET), b"X-A: a\r\n" * 100),
}

FLOODS = {
    "a header": floods(OK, b"X-A: " + b"a" * SIZE),
    "headers": floods(OK, b"X-A: a\r\n" * 1000),
    "interim answers": floods(b"", b"HTTP/1.1 100 Continue\r\nX-A: a\r\n\r\n" * 100),
    "the body": floods(OK + b"\r\n", b" " * SIZE),
    "a body of the length that it says": floods(OK + b"Content-Length: 99999999999\r\n\r\n", b" " * SIZE),
    "the length of a chunk": floods(CHUNKED, b"0" * SIZE),
    "a chunk": floods(CHUNKED + b"fffffffffff\r\n", b" " * SIZE),
    "chunks": floods(CHUNKED, b"1\r\n \r\n" * 1000),
    "the trailer": floods(CHUNKED + b"%x\r\n%s\r\n0\r\n" % (len(GET), GET), b"X-A: a\r\n" * 1000),
}


@dataclass
class Outcome:
    """How a request has ended: its result or its error, after how many seconds, and the server."""

    result: object
    seconds: float
    server: Server


_TIMEOUTS = (
    *((etcd2, "READ_TIMEOUT"), (etcd2, "QUORUM_TIMEOUT"), (etcd2, "WATCH_PATIENCE")),
    *((etcd3, "QUORUM_TIMEOUT"), (etcd3, "WATCH_PATIENCE")),
    *((etcd3_http, "READ_TIMEOUT"), (etcd3_watch, "READ_TIMEOUT")),
)
_SIZES = (
    *((etcd2, "LARGEST_VALUE"), (etcd2, "LARGEST_DIRECTORY"), (etcd2_watch, "LARGEST")),
    *((etcd3_http, "LARGEST"), (etcd3_watch, "LARGEST")),
)


SetTimeouts = Callable[[float], None]


@pytest.fixture(autouse=True)
def set_timeouts(monkeypatch: pytest.MonkeyPatch) -> SetTimeouts:
    """All timeouts are TIMEOUT until the returned function is called, with other seconds."""

    def set_all(seconds: float) -> None:
        for module, name in _TIMEOUTS:
            monkeypatch.setattr(module, name, seconds)

    set_all(TIMEOUT)
    return set_all


@pytest.fixture
def patient(set_timeouts: SetTimeouts) -> None:
    set_timeouts(PATIENT)


@pytest.fixture(autouse=True)
def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in _SIZES:
        monkeypatch.setattr(module, name, SIZE)


MakeStore = Callable[[EtcdSettings, float], Store]


@pytest.fixture(params=[Etcd2Store, Etcd3Store])
def make(request: pytest.FixtureRequest) -> MakeStore:
    """The class of the store that is tested."""
    return request.param  # type: ignore[no-any-return]


def store_at(*servers: Server, make: MakeStore = Etcd2Store, patience: float = 0.0) -> Store:
    return make(EtcdSettings("http", tuple(("127.0.0.1", server.port) for server in servers)), patience)


def outcomes(
    attacks: dict[str, Answer], request: Callable[[Store], object], make: MakeStore = Etcd2Store
) -> dict[str, Outcome]:
    """Return how a request to a server of each kind ends. All are asked at the same time."""

    def ask(attack: Answer) -> Outcome:
        with serving(attack) as server:
            began = time.monotonic()
            try:
                result = request(store_at(server, make=make))
            except CalicoError as error:
                result = error
            seconds = time.monotonic() - began
        return Outcome(result, seconds, server)

    with ThreadPoolExecutor(len(attacks)) as pool:
        return dict(zip(attacks, pool.map(ask, attacks.values())))


@pytest.mark.parametrize("request_", REQUESTS)
def test_an_answer_that_drips_is_given_up(request_: str, make: MakeStore) -> None:
    for what, outcome in outcomes(DRIPS, REQUESTS[request_], make).items():
        assert isinstance(outcome.result, CalicoError), (what, outcome)
        assert outcome.seconds < SOON, (what, outcome)


@pytest.mark.parametrize("request_", REQUESTS)
def test_an_answer_without_an_end_is_not_read_to_it(request_: str, make: MakeStore) -> None:
    for what, outcome in outcomes(FLOODS, REQUESTS[request_], make).items():
        assert isinstance(outcome.result, CalicoError), (what, outcome)
        assert all(sent < SIZE + KERNEL for sent in outcome.server.sent), (what, outcome.server.sent)


def test_the_error_says_what_was_wrong(make: MakeStore, set_timeouts: SetTimeouts) -> None:
    with serving(DRIPS["the body"]) as server, pytest.raises(StoreUnavailable, match="timed out"):
        store_at(server, make=make).get(KEY)
    set_timeouts(PATIENT)
    with serving(FLOODS["the body"]) as server, pytest.raises(StoreUnavailable, match="larger than 64 KiB"):
        store_at(server, make=make).get(KEY)


@pytest.mark.parametrize(
    ("attack", "timeout"),
    [
        (DRIPS["the body"], LONG_TIMEOUT),
        (FLOODS["the body"], PATIENT),
        (DRIPS["the status"], LONG_TIMEOUT),
        (FLOODS["headers"], PATIENT),
    ],
)
def test_a_member_that_drips_or_floods_has_failed_and_the_next_one_is_asked(
    attack: Answer, timeout: float, make: MakeStore, set_timeouts: SetTimeouts
) -> None:
    set_timeouts(timeout)
    proper_answer = answer(GET if make is Etcd2Store else GET3)
    with serving(attack) as rogue, serving(sends(proper_answer)) as proper:
        store = store_at(rogue, proper, make=make, patience=20)
        assert store.get(KEY) == store.get(KEY) == Entry(KEY, "true", 3, 3)
        keys = [line for line in rogue.requests if "/v2/" in line or "/v3/" in line]
        assert len(keys) == 1, "it is asked last from then on"


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, gzip", "x-made-up"])
@pytest.mark.parametrize("request_", ["get", "list", "names", "version", "watch"])
def test_an_encoded_answer_is_not_decoded(request_: str, encoding: str, make: MakeStore) -> None:
    head = OK + b"Content-Encoding: %s\r\n" % encoding.encode()
    bomb = answer(gzip.compress(b" " * 2**20), head)
    with serving(sends(bomb)) as server, pytest.raises(StoreError, match="encoded"):
        REQUESTS[request_](store_at(server, make=make))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(status: int, make: MakeStore) -> None:
    def redirect(client: Client, line: str) -> None:
        head = b"HTTP/1.1 %d Elsewhere\r\nLocation: http://127.0.0.1:%d/\r\n" % (status, other.port)
        client.send(answer(b"", head))

    with serving(sends(answer(GET))) as other:
        for name, outcome in {name: outcomes({"": redirect}, ask, make)[""] for name, ask in REQUESTS.items()}.items():
            assert isinstance(outcome.result, CalicoError), (name, outcome)
        assert other.requests == []


DEEP = b"[" * 30_000
SHAPES = {
    "a list": b"[]",
    "a number": b"5",
    "a text": b'"x"',
    "null": b"null",
    "nothing": b"{}",
    "a list as the node": b'{"action": "get", "node": []}',
    "a text as the node": b'{"action": "get", "node": "x"}',
    "null as the node": b'{"action": "get", "node": null}',
    "a text as nodes": b'{"action": "get", "node": {"key": "/calico", "dir": true, "nodes": "xyz"}}',
    "an object as nodes": b'{"action": "get", "node": {"key": "/calico", "dir": true, "nodes": {"a": 1}}}',
    "numbers as nodes": b'{"action": "get", "node": {"key": "/calico", "dir": true, "nodes": [1, 2]}}',
    "a number as the key": GET.replace(json.dumps(KEY).encode(), b"5"),
    "a list as the value": GET.replace(b'"true"', b"[1]"),
    "a text as the revision": GET.replace(b"3", b'"3"'),
    "a list as the action": GET.replace(b'"get"', b"[]").replace(b"3", b"null"),
    "an infinite revision": GET.replace(b"3", b"1e999"),
    "nested too deeply": b'{"action": "get", "node": ' + DEEP,
    "nested and whole": DEEP + b"]" * len(DEEP),
    "half of it": GET[:30],
    "no UTF-8": GET.replace(b"true", b"\xff\xfe"),
    "a key without its value": b'{"action": "get", "node": {"key": "/calico/v1/Ready"}}',
}


SHAPES3 = {
    **{what: body for what, body in SHAPES.items() if "node" not in what},
    "a list as the header": GET3.replace(b'{"revision": "5"}', b"[]"),
    "no header": GET3.replace(b"header", b"other"),
    "a number as the revision": GET3.replace(b'"5"', b"5"),
    "a revision without an end": GET3.replace(b'"5"', b'"%s"' % (b"9" * 30_000)),
    "a revision that is negative": GET3.replace(b'"5"', b'"-5"'),
    "another key": GET3.replace(b"L2Nh", b"L3Nh"),
    "a key that is no base64": GET3.replace(b"L2Nh", b"L2N"),
    "a number as the key": GET3.replace(b'"L2NhbGljby92MS9SZWFkeQ=="', b"5"),
    "a list as the value": GET3.replace(b'"dHJ1ZQ=="', b"[1]"),
    "an object as kvs": GET3.replace(b"[", b'{"a": ').replace(b"]", b"}"),
    "numbers as kvs": b'{"header": {"revision": "5"}, "kvs": [1, 2]}',
    "more, and nothing": b'{"header": {"revision": "5"}, "more": true}',
    "an error that is a list": b'{"error": [], "message": {}, "code": "x"}',
    "an error that is no error": b'{"error": {"grpc_code": "x"}}',
    "numbers as responses": b'{"header": {"revision": "5"}, "responses": [1]}',
    "other responses": b'{"header": {"revision": "5"}, "responses": [{"response_put": {}}]}',
    "responses that are a text": b'{"header": {"revision": "5"}, "responses": "x"}',
}


@pytest.mark.parametrize("status", [200, 404, 500])
@pytest.mark.parametrize("request_", REQUESTS)
def test_an_answer_of_another_shape_is_an_ordinary_error(request_: str, status: int, make: MakeStore) -> None:
    """Or it is taken for what etcd answers to other requests, which does no harm."""
    head = OK.replace(b"200", b"%d" % status)
    shapes = SHAPES if make is Etcd2Store else SHAPES3
    attacks = {what: sends(answer(body, head)) for what, body in shapes.items()}
    for what, outcome in outcomes(attacks, REQUESTS[request_], make).items():
        if not isinstance(outcome.result, CalicoError):
            json.dumps(outcome.result, default=vars)
            assert outcome.seconds < SOON, (what, outcome)


MANY = "[],{}," * 500 + "[]"
"""The items of a list whose lists take 25 times as many bytes of memory as they have in an answer."""


@pytest.mark.parametrize("status", [200, 404])
@pytest.mark.parametrize("request_", REQUESTS)
def test_an_answer_with_more_elements_than_bytes_of_memory_is_not_parsed(
    request_: str, status: int, make: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []
    before = json.loads
    monkeypatch.setattr(json, "loads", lambda text, **how: parsed.append(text) or before(text, **how))
    monkeypatch.setattr(answers, "ELEMENTS", 1000)
    head, get = OK.replace(b"200", b"%d" % status), GET if make is Etcd2Store else GET3
    if status == 404:
        get = b'{"errorCode": 100, "message": "Key not found", "error": "x", "code": 5}'
    many = get[:-1] + b', "x": [%s]}\n' % MANY.encode()
    (outcome,) = outcomes({"": sends(answer(many, head))}, REQUESTS[request_], make).values()
    assert isinstance(outcome.result, CalicoError), outcome
    assert not any(len(text) > len(MANY) for text in parsed)


def test_commas_and_brackets_in_a_value_are_no_elements(make: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "ELEMENTS", 1000)
    many = f'\\"{MANY}"'
    node = json.dumps({"action": "get", "node": {**NODE, "value": many}})
    kvs = json.dumps({"header": {"revision": "5"}, "kvs": [KV], "x": many})
    with serving(sends(answer((node if make is Etcd2Store else kvs).encode()))) as server:
        entry = store_at(server, make=make).get(KEY)
    assert entry is not None and entry.value == (many if make is Etcd2Store else "true")


def test_a_large_answer_that_comes_slowly_is_read(monkeypatch: pytest.MonkeyPatch, set_timeouts: SetTimeouts) -> None:
    """It takes longer than the timeout, which is for its beginning."""
    set_timeouts(LONG_TIMEOUT)
    monkeypatch.setattr(etcd2, "LARGEST_DIRECTORY", 2**22)
    nodes = [{**NODE, "key": f"/calico/{n}", "value": "x" * 1000} for n in range(1000)]
    whole = answer(json.dumps({"action": "get", "node": {"key": "/calico", "dir": True, "nodes": nodes}}).encode())

    def slowly(client: Client, line: str) -> None:
        for start in range(0, len(whole), len(whole) // 12):
            client.send(whole[start : start + len(whole) // 12])
            time.sleep(LONG_TIMEOUT / 10)  # the drip is what is tested

    with serving(slowly) as server:
        began = time.monotonic()
        entries, _ = store_at(server).list_for_watch("/calico")
        assert len(entries) == 1000 and time.monotonic() - began > LONG_TIMEOUT
    monkeypatch.setattr(answers, "LONGEST", TIMEOUT)
    with serving(slowly) as server, pytest.raises(StoreUnavailable):
        store_at(server).list_for_watch("/calico")


def test_a_wait_for_changes_is_as_long_as_it_is_quiet(set_timeouts: SetTimeouts) -> None:
    """Only the beginning of its answer is bounded: the change comes when it comes."""
    set_timeouts(LONG_TIMEOUT)
    event = b'{"action": "set", "node": %s}\n' % json.dumps({**NODE, "modifiedIndex": 6}).encode()
    began = time.monotonic()
    late = began + 1.5 * LONG_TIMEOUT

    def changes_late(client: Client, line: str) -> None:
        if "wait=true" not in line:
            client.send(answer(b'{"errorCode": 100, "message": "Key not found"}', OK.replace(b"200", b"404")))
            return
        client.send(CHUNKED)
        if not server.ended.wait(max(0.0, late - time.monotonic())):
            client.send(b"%x\r\n%s\r\n0\r\n\r\n" % (len(event), event))

    with serving(changes_late) as server:
        (change,) = next(iter(store_at(server).watch("/calico", 6, 60)))
        assert change.key == KEY and time.monotonic() > late
