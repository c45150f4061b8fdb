"""Which of etcd's APIs holds the data, by what they show, and how they are asked."""

from __future__ import annotations

import gc
import http.server
import json
import socket
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from calicoctl.datastore import backends, keys
from calicoctl.datastore.chosen import FRESH
from calicoctl.datastore.detection import Choice, Shown, decide
from calicoctl.datastore.settings import EtcdSettings
from calicoctl.errors import CalicoError, StoreError

NO_API = Shown(served=False)
DENIED = Shown(refused=StoreError("etcd does not permit this"))
V2, V3 = ("etcdv2", False), ("etcdv3", False)
V2_FROZEN, V3_FROZEN = ("etcdv2", True), ("etcdv3", True)


def ready(value: str | None) -> Shown:
    return Shown(ready=value)


def chosen(v3: Shown, v2: Shown) -> tuple[str, bool]:
    choice = decide(v3, v2, "http://a:1")
    assert choice.why
    return choice.api, choice.frozen


@pytest.mark.parametrize(
    ("v3", "v2", "api"),
    [
        ("true", None, V3),
        ("true", "false", V3),
        ("false", "true", V2),
        ("false", "false", V2_FROZEN),
        ("false", None, V3_FROZEN),
        (None, "true", V2),
        (None, "false", V2_FROZEN),
        (None, None, V3),
    ],
)
def test_ready_decides(v3: str | None, v2: str | None, api: tuple[str, bool]) -> None:
    assert chosen(ready(v3), ready(v2)) == api
    if v2 is None:  # a server without the v2 API is like one that has nothing there
        assert chosen(ready(v3), NO_API) == api
    if v3 is None and v2 is not None:
        assert chosen(NO_API, ready(v2)) == api


def test_current_data_in_both_apis_is_refused() -> None:
    with pytest.raises(StoreError, match=r"http://a:1 has current data .* in both .* Set DATASTORE_TYPE to etcdv3 or"):
        decide(ready("true"), ready("true"), "http://a:1")


def test_a_server_without_the_gateway_is_used_by_v2() -> None:
    assert chosen(NO_API, ready(None)) == V2
    with pytest.raises(StoreError, match=r"neither its v2 API nor .* --enable-grpc-gateway"):
        decide(NO_API, NO_API, "http://a:1")


def test_what_a_user_may_not_read_is_not_guessed() -> None:
    assert chosen(DENIED, ready("true")) == V2  # who used v2 before goes on
    assert chosen(ready("true"), DENIED) == V3
    for v2 in (ready(None), ready("false"), NO_API, DENIED):
        with pytest.raises(StoreError, match=r"^etcd does not permit this$"):
            decide(DENIED, v2, "http://a:1")
    for v3 in (ready(None), ready("false"), NO_API):
        with pytest.raises(StoreError, match=r"^etcd does not permit this; so .* set DATASTORE_TYPE"):
            decide(v3, DENIED, "http://a:1")


@pytest.mark.parametrize("v3", ["true", "false", None])
def test_another_calico_in_v3_is_refused_unless_the_data_is_in_v2(v3: str | None) -> None:
    there = replace(ready(v3), foreign=True)
    with pytest.raises(StoreError, match=r"another Calico in its v3 API .* use another etcd"):
        decide(there, NO_API, "http://a:1")
    if v3 != "true":
        assert chosen(there, ready("true")) == V2


@pytest.mark.parametrize(("v3", "v2"), [("True", None), (None, ""), ("true", "yes")])
def test_another_value_of_ready_is_named(v3: str | None, v2: str | None) -> None:
    with pytest.raises(CalicoError, match=r"/calico/v1/Ready has an invalid value: .* API, is neither true nor"):
        decide(ready(v3), ready(v2), "http://a:1")


class FakeEtcd(http.server.ThreadingHTTPServer):
    """A server that answers no request before all that are expected are there, each in a connection of its own."""

    daemon_threads = True

    def __init__(self, expected: int, v2: tuple[int, str], ready: str | None = "true") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.together = threading.Barrier(expected)
        self.v2 = v2
        self.v3 = ""
        self.show(ready)
        self.asked: list[str] = []

    def show(self, ready: str | None, foreign: bool = False) -> None:
        """Let v3 hold this value of Ready, and data of Calico 3 or not."""
        found = [{"key": base64(keys.READY), "value": base64(ready), "mod_revision": "6"}] if ready else []
        others = [{"key": base64(keys.OTHER_CALICO), "value": "", "mod_revision": "5"}] if foreign else []
        responses = [{"response_range": {"kvs": found}}, {"response_range": {"kvs": others, "count": len(others)}}]
        self.v3 = json.dumps({"header": {"revision": "7"}, "succeeded": True, "responses": responses})

    def settings(self, *others: int, **more: str) -> EtcdSettings:
        """Return the settings for this member, and for further ones at the ports `others`."""
        return EtcdSettings("http", tuple(("127.0.0.1", port) for port in (self.server_port, *others)), **more)


def base64(text: str) -> str:
    return b64encode(text.encode()).decode()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeEtcd

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(f"{self.path} {self.headers.get('Authorization')}")
        self.server.together.wait(20)
        status, body = self.server.v2 if self.path.startswith("/v2/") else (200, self.server.v3)
        if self.path == "/v3/auth/authenticate":
            body = '{"token": "a.1"}'
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_GET = do_POST = _answer

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def no_earlier_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may get the port of an earlier one, for which the process still knows which API was used."""
    monkeypatch.setattr(backends, "_latest", {})


@contextmanager
def fake(expected: int, v2: tuple[int, str], ready: str | None = "true") -> Iterator[FakeEtcd]:
    with FakeEtcd(expected, v2, ready) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


NOT_FOUND = (404, '{"errorCode":100,"message":"Key not found","cause":"/calico","index":3}')
NO_PAGE = (404, "404 page not found\n")


@pytest.mark.parametrize("v2", [NOT_FOUND, NO_PAGE])
def test_both_apis_are_asked_at_the_same_time_and_once(v2: tuple[int, str]) -> None:
    with fake(2, v2) as server:
        store = backends.connect(server.settings(), patience=0)
        assert (store.choice().api, store.choice().frozen, store.choice().revision) == (*V3, 6)
        assert sorted(path.partition("?")[0] for path in server.asked) == [
            "/v2/keys/calico/v1/Ready",
            "/v3/kv/txn None",
        ]
        # other clients in this process know it for a while
        assert backends.connect(server.settings(), patience=0).choice() == store.choice()
        assert len(server.asked) == 2


READY_IN_V2 = (
    200,
    '{"action":"get","node":{"key":"/calico/v1/Ready","value":"true","modifiedIndex":4,"createdIndex":4}}',
)


@pytest.mark.parametrize(("v2", "api"), [(READY_IN_V2, V2), (NO_PAGE, V3)])
@pytest.mark.parametrize("ready", [None, "false"])
def test_that_v2_is_not_served_counts_only_if_all_members_say_so(
    v2: tuple[int, str], api: tuple[str, bool], ready: str | None
) -> None:
    with fake(1, NO_PAGE, ready) as first, fake(1, v2) as second:
        store = backends.connect(first.settings(second.server_port), patience=0)
        assert (store.choice().api, store.choice().frozen) == (api if ready is None else (api[0], api == V3))
        if api == V2:  # and the backend finds the member that serves it
            assert store.current_choice().api == "etcdv2"
            entry = store.get(keys.READY)
            assert entry is not None and entry.value == "true"
        assert {path.partition("?")[0] for path in second.asked} == {"/v2/keys/calico/v1/Ready"}


def test_a_member_that_cannot_be_asked_may_serve_v2() -> None:
    """But where v3 has the data, this member is not even tried, nor are others."""
    with fake(1, NO_PAGE, None) as first, fake(1, (503, "no leader")) as second, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        for port, says in (
            (closed.getsockname()[1], "does not serve its v2 API; etcd cannot be reached at http://127.0.0.1:"),
            (second.server_port, "etcd cannot do what was asked: http://127.0.0.1:"),
        ):
            store = backends.connect(first.settings(port), patience=0)
            with pytest.raises(StoreError, match=f"{says}{port} .* set DATASTORE_TYPE"):
                store.choice()
    with fake(2, NO_PAGE) as first, fake(1, NO_PAGE) as second:
        assert backends.connect(first.settings(second.server_port), patience=0).choice().api == "etcdv3"
        assert (len(first.asked), len(second.asked)) == (2, 0)


@pytest.mark.parametrize("api", [None, "etcdv3"])
def test_a_client_looks_at_ready_first_if_the_last_look_would_not_last(
    monkeypatch: pytest.MonkeyPatch, api: str | None
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with fake(1, NOT_FOUND) as server:

        def looks(*pauses: float) -> int:
            """Return how often a new client looks at Ready if it writes after each of these pauses."""
            nonlocal now
            store, before = backends.connect(server.settings(api=api), patience=0), len(server.asked)
            for pause in pauses:
                now += pause
                store.put("/calico/x", "1")
            return len(server.asked) - before - len(pauses)

        assert looks(0) == (2 if api is None else 1), "at each API, if none is named"
        assert looks(backends.TAKEN_OVER - 0.1, FRESH - backends.TAKEN_OVER) == 0
        assert looks(0) == 1


def test_an_api_that_is_named_is_asked_for_nothing_but_before_a_write() -> None:
    with fake(1, (200, '{"node": {"key": "/calico/v1/Ready", "value": "true"}}')) as server:
        store = backends.connect(server.settings(api="etcdv3"), patience=0)
        assert store.choice().frozen is None and server.asked == []
        store.put("/calico/x", "1")
        store.put("/calico/x", "2")
        assert len(server.asked) == 3 and (store.choice().frozen, store.choice().revision) == (False, 6)


def test_the_way_back_to_v2_is_followed_although_v3_has_the_data_of_another_calico() -> None:
    ready = '{"action":"get","node":{"key":"/calico/v1/Ready","value":"%s","modifiedIndex":4}}'
    with fake(1, (200, ready % "false")) as server:
        store = backends.connect(server.settings(), patience=0)
        assert (store.current_choice().api, store.choice().frozen) == V3
        server.show("true", foreign=True)
        with pytest.raises(StoreError, match="another Calico"):
            store.current_choice()
        server.show("false", foreign=True)
        server.v2 = (200, ready % "true")
        assert (store.current_choice().api, store.choice().frozen) == V2


def test_an_api_that_is_not_served_any_more_or_is_closed_to_this_user_is_left() -> None:
    ready = '{"action":"get","node":{"key":"/calico/v1/Ready","value":"%s","modifiedIndex":4}}'
    with fake(1, (200, ready % "true"), ready=None) as server:
        store = backends.connect(server.settings(), patience=0)
        assert (store.current_choice().api, store.choice().frozen) == V2
        server.show("true")
        server.v2 = NO_PAGE
        assert (store.current_choice().api, store.choice().frozen) == V3
        server.v3 = '{"error": "etcdserver: permission denied", "code": 7, "message": "etcdserver: permission denied"}'
        with pytest.raises(StoreError, match="not permit"):
            store.current_choice()
        server.v2 = (200, ready % "true")
        assert (store.current_choice().api, store.choice().frozen) == V2


def test_a_choice_is_as_old_as_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ready may have changed while the answer was on its way."""
    now = 100.0

    def answer_late(self: backends.Backends, before: Choice | None) -> Choice:
        nonlocal now
        now += 3
        return Choice("etcdv2", False, "for a test")

    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr(backends.Backends, "_current", answer_late)
    assert backends.connect(EtcdSettings("http", (("127.0.0.1", 1),))).choice().at == 100


@pytest.mark.parametrize(
    ("v2", "api"),
    [
        ((200, '{"action":"get","node":{"key":"/calico/v1/Ready","value":"true","modifiedIndex":4}}'), V2),
        ((200, '{"action":"get","node":{"key":"/calico/v1/Ready","value":"false","modifiedIndex":4}}'), V2_FROZEN),
        (NOT_FOUND, V3),
        (
            (401, '{"errorCode":110,"message":"The request requires user authentication","index":0}'),
            r"does not let this user read .* set DATASTORE_TYPE",
        ),
        ((500, '{"errorCode":300,"message":"Raft Internal Error","index":0}'), "says: Raft Internal Error"),
        ((503, "no leader"), "says: 503"),
        ((200, '{"action":"get","node":{"key":"/calico/v1/Ready","dir":true}}'), "does not answer as etcd does"),
        ((200, "[" * 100000), "does not answer as etcd does"),
        ((302, "elsewhere"), "does not answer as etcd does: status 302"),
    ],
    ids=range(9),
)
def test_what_the_v2_api_answers(v2: tuple[int, str], api: tuple[str, bool] | str) -> None:
    gc.collect()  # or other tests' garbage might be collected, and its finalizers fail, at the limit of recursion
    with fake(2, v2, ready=None) as server:
        server.together = threading.Barrier(1)  # a failed request may be repeated
        store = backends.connect(server.settings(username="calico", password="hunter2"), patience=0)
        if isinstance(api, tuple):
            assert (store.choice().api, store.choice().frozen) == api
            assert store.choice().revision == (0 if api == V3 else 4)
        else:
            with pytest.raises(StoreError, match=api) as refused:
                store.choice()
            assert "hunter2" not in str(refused.value)
        basic = base64("calico:hunter2")
        assert {f"/v2/keys/calico/v1/Ready?quorum=true Basic {basic}"} == {
            path for path in server.asked if "/v2/" in path
        }
