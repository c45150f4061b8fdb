"""The server of the engine's calls, at real sockets: bounds, errors, and who may connect."""

from __future__ import annotations

import json
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from calicoctl import files
from calicoctl.datastore.client import DatastoreClient
from calicoctl.errors import CalicoError, Frozen, StoreUnavailable
from calicoctl.plugins import hook, stores
from calicoctl.plugins import server as module
from calicoctl.plugins.server import Listening, Server, servers
from calicoctl.plugins.stores import TooSlow, bounded
from tests.unit.memory_store import MemoryStore

release = threading.Event()


def refuse(request: dict[str, Any]) -> dict[str, Any]:
    raise CalicoError("no, since it is Tuesday")


def fail(request: dict[str, Any]) -> dict[str, Any]:
    raise LookupError("a secret")


def freeze(request: dict[str, Any]) -> dict[str, Any]:
    raise Frozen("the data is frozen")


def hang(request: dict[str, Any]) -> dict[str, Any]:
    release.wait(20)
    return {}


ROUTES = {
    "/Plugin.Activate": lambda request: {},
    "/NetworkDriver.EndpointOperInfo": lambda request: {"Value": {}},
    "/Echo": lambda request: {"got": request},
    "/Refuse": refuse,
    "/Freeze": freeze,
    "/Fail": fail,
    "/Hang": hang,
}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The path of a socket that is served. A request must arrive within 0.3 s, and be answered within 0.5 s."""
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    release.clear()
    (one,) = servers([Listening(tmp_path / "plugins/calico.sock", ROUTES, 0.5)], {})
    one.start()
    yield one.listening.path
    release.set()
    one.stop()
    assert not one.listening.path.exists()


def send(path: Path, data: bytes, pause: float = 0.0) -> bytes:
    """Send bytes, one after another if there is a `pause`; return all that is answered until the end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(10)
        client.connect(str(path))
        answer = b""
        try:
            if pause:
                for byte in data:
                    client.sendall(bytes([byte]))
                    time.sleep(pause)
            else:
                client.sendall(data)
            while part := client.recv(65536):
                answer += part
        except (BrokenPipeError, ConnectionResetError):
            pass
        return answer


def call(path: Path, route: str, body: bytes = b"{}", head: bytes = b"") -> tuple[int, dict[str, Any]]:
    data = f"POST {route} HTTP/1.1\r\nHost: \r\nContent-Length: {len(body)}\r\n".encode() + head + b"\r\n" + body
    answer = send(path, data)
    status, _, _ = answer.partition(b"\r\n")
    return int(status.split()[1]), json.loads(answer.partition(b"\r\n\r\n")[2])


def test_the_hook_is_served_unless_its_path_would_be_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(files, "RUN", Path(folder))
        host = "h" * (hook.LONGEST - len(f"{folder}//{hook.SOCKET}"))
        (one,) = servers(hook.listening(stores.Stores(host, {})), {})
        one.start()
        one.stop()
        one.server_close()
        assert hook.listening(stores.Stores(host + "h", {})) == []


def test_calls(path: Path) -> None:
    assert call(path, "/Echo", b'{"a": [1]}') == (200, {"got": {"a": [1]}})
    assert call(path, "/Plugin.Activate", b"") == (200, {})
    # as the engine repeats it after the process that served has been killed: it would end the start of a container
    assert call(path, "/NetworkDriver.EndpointOperInfo", b"") == (200, {"Value": {}})
    assert call(path, "/Echo", b" ") == (400, {"Err": "the body of the request is empty, and must be a JSON object"})
    assert call(path, "/Refuse") == (400, {"Err": "no, since it is Tuesday"})
    assert call(path, "/Freeze") == (400, {"Err": "the data is frozen", "Again": True})
    assert call(path, "/Other") == (400, {"Err": "there is no call /Other"})
    # what others have named may control a terminal
    assert call(path, "/\x1b") == (400, {"Err": "there is no call /\\x1b"})
    status, answer = call(path, "/Fail")
    assert status == 500 and "Internal error" in answer["Err"] and "secret" not in answer["Err"]
    for body in (b"[]", b"x", b"[" * 100_000, b"1", b"\xff"):
        assert call(path, "/Echo", body) == (400, {"Err": "a request must be a JSON object"})
    assert call(path, "/Echo", head=b"Transfer-Encoding: chunked\r\n")[0] == 400
    assert b" 501 " in send(path, b"GET /Echo HTTP/1.1\r\n\r\n")


def test_calls_are_bounded(path: Path) -> None:
    began = time.monotonic()
    status, answer = call(path, "/Hang")
    assert status == 400 and "has not answered within" in answer["Err"] and answer["Again"]
    assert send(path, b"POST /Echo HTTP/1.1\r\n") == b"", "the rest does not come"
    assert b"200" not in send(path, b"POST /Echo HTTP/1.1\r\nX: " + b"a" * 40, pause=0.02)
    assert b"200" not in send(path, b"POST /Echo HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")
    assert time.monotonic() - began < 8
    large = b'{"a": "' + b"a" * module.LARGEST + b'"}'
    assert b" 200 " not in send(path, b"POST /Echo HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(large) + large)
    assert b" 200 " not in send(path, b"POST /Echo HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n")
    assert call(path, "/Echo")[0] == 200, "all others are served"


def test_a_request_may_list_all_ports_of_a_container(path: Path) -> None:
    ports = [{"Proto": protocol, "Port": port} for protocol in (6, 17, 132) for port in range(1, 65536)]
    body = json.dumps({"Options": {"com.docker.network.endpoint.exposedports": ports}}, separators=(",", ":")).encode()
    assert call(path, "/NetworkDriver.EndpointOperInfo", body) == (200, {"Value": {}})


def test_works_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "BUSY", stores._running + 2)
    release.clear()
    for _ in range(2):
        with pytest.raises(TooSlow):
            bounded(0.01, lambda: release.wait(20))
    with pytest.raises(StoreUnavailable, match="calls are waiting"):
        bounded(0.1, lambda: None)
    assert bounded(1, lambda: 3, part=True) == 3, "what another work waits for is not refused"
    threading.Timer(0.1, release.set).start()
    assert bounded(20, lambda: 4) == 4, "it waits for its turn"
    stores.wait_idle(5)
    assert bounded(1, lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        bounded(1, lambda: 1 // 0)


def test_only_root_may_connect(path: Path, tmp_path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    # the socket of a process that was killed is replaced
    other = tmp_path / "plugins/other.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(other))
    (one,) = servers([Listening(other, ROUTES)], {})
    one.start()
    assert call(other, "/Echo")[0] == 200
    one.stop()
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    with pytest.raises(CalicoError, match="nobody else may write to it"):
        servers([Listening(open_folder / "a.sock", ROUTES)], {})


def test_a_socket_that_systemd_has_created(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    passed = socket.socket(socket.AF_UNIX)
    passed.bind(str(path))
    passed.listen()
    one = Server(Listening(path, ROUTES), passed)
    one.start()
    assert call(path, "/Echo")[0] == 200
    one.stop()
    assert path.exists(), "systemd goes on to listen at it"
    passed.close()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryStore]:
    """The store that all clients of a Stores have."""
    store = MemoryStore()
    monkeypatch.setattr(stores.Stores, "_open", lambda self: DatastoreClient(store, self.host))
    monkeypatch.setattr(stores, "ANSWER", 0.2)
    monkeypatch.setattr(stores, "REMOVAL", 0.2)
    release.clear()
    yield store
    release.set()


def unavailable() -> None:
    raise StoreUnavailable("no etcd")


@pytest.mark.parametrize("fails", [unavailable, lambda: release.wait(20)], ids=["refuses", "hangs"])
def test_after_a_failure_of_the_store_works_fail_at_once(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch, fails: Callable[[], object]
) -> None:
    one, tried = stores.Stores("host1", {}), []
    assert one.call(lambda datastore: 5) == 5
    monkeypatch.setattr(stores, "FRESH", 0.0)
    store.before_read = fails
    began = time.monotonic()
    for _ in range(5):
        with pytest.raises(StoreUnavailable):
            one.call(tried.append)
        assert not one.remove(tried.append)
    assert time.monotonic() - began < 1 and tried == []
    assert one.failed
    assert one.call(lambda datastore: 5, asks=False) == 5, "which needs no store"
    with pytest.raises(StoreUnavailable):
        one.call(tried.append)
    # after PAUSE, it is tried again
    store.before_read = lambda: None
    one._down_until = time.monotonic()
    assert one.call(lambda datastore: 6) == 6 and one.remove(tried.append) and len(tried) == 1


def test_before_the_first_call_a_store_that_starts_is_waited_for_longer(store: MemoryStore) -> None:
    one = stores.Stores("host1", {})
    store.before_read = lambda: release.wait(0.4)
    one.require(5)
    store.before_read = lambda: release.wait(20)
    one._answered = 0.0
    with pytest.raises(StoreUnavailable, match="does not answer within"):
        one.require()


def test_a_slow_work_fails_alone(store: MemoryStore) -> None:
    one = stores.Stores("host1", {})
    began = time.monotonic()
    assert not one.remove(lambda datastore: release.wait(20))
    assert time.monotonic() - began < 5 and one.failed
    requests = store.requests
    assert one.call(lambda datastore: 5) == 5, "the store answers"
    assert store.requests > requests, "which was asked"
    with pytest.raises(CalicoError, match="not of the store"):
        one.remove(lambda datastore: refuse_other())


def test_a_failure_that_is_late_does_not_count(store: MemoryStore) -> None:
    one = stores.Stores("host1", {})
    with pytest.raises(StoreUnavailable), one.client():
        time.sleep(0.01)
        assert one.call(lambda datastore: 5) == 5, "the store has answered since"
        raise StoreUnavailable("a timeout")
    assert one.call(lambda datastore: 6) == 6


def test_clients_are_kept_until_the_store_fails(store: MemoryStore) -> None:
    one = stores.Stores("host1", {})
    with one.client() as first:
        pass
    with one.client() as second:
        assert second is first
    with pytest.raises(StoreUnavailable), one.client():
        raise StoreUnavailable("no etcd")
    with one.client() as third:  # with the settings of now
        assert third is not first


def refuse_other() -> None:
    raise CalicoError("not of the store")


def test_the_failure_of_a_call_is_told(tmp_path: Path) -> None:
    failed = threading.Event()
    routes = {"/Hang": hang, "/Away": lambda request: unavailable(), "/Refuse": refuse}
    release.clear()
    (one,) = servers([Listening(tmp_path / "a/a.sock", routes, 0.2, failed.set, "no store")], {})
    one.start()
    try:
        assert call(one.listening.path, "/Refuse")[0] == 400 and not failed.is_set()
        assert call(one.listening.path, "/Away")[1]["Err"] == "no store: no etcd" and failed.is_set()
        failed.clear()
        assert call(one.listening.path, "/Hang")[1]["Err"].startswith("no store: ") and failed.is_set()
    finally:
        release.set()
        one.stop()


def test_all_calls_can_be_refused(tmp_path: Path) -> None:
    (one,) = servers([Listening(tmp_path / "a/a.sock", ROUTES, refusal="no, since another one does")], {})
    one.start()
    assert call(one.listening.path, "/Plugin.Activate", b"") == (400, {"Err": "no, since another one does"})
    one.stop()


def test_the_socket_of_another_process_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(path))
        theirs.listen()
        with pytest.raises(CalicoError, match="another process serves Docker networks already: it listens at"):
            servers([Listening(path, ROUTES)], {})
        assert list(tmp_path.iterdir()) == [path]
    for _ in range(2):  # one of ours is replaced
        (one,) = servers([Listening(path, ROUTES)], {})
        one.start()
        assert call(path, "/Echo")[0] == 200
        one.shutdown()


def test_the_end_waits_for_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = servers([Listening(tmp_path / "a/a.sock", ROUTES)], {})
    writing = threading.Event()
    answer = module._Handler._answer

    def slow(self: Any, status: int, value: dict[str, Any]) -> None:
        writing.set()
        time.sleep(0.3)
        answer(self, status, value)

    monkeypatch.setattr(module._Handler, "_answer", slow)
    one.start()
    got: list[int] = []
    client = threading.Thread(target=lambda: got.append(call(one.listening.path, "/Echo")[0]))
    client.start()
    assert writing.wait(5)
    one.stop()
    began = time.monotonic()
    module.wait_answered(5)
    assert 0.1 < time.monotonic() - began < 4 or got
    client.join(1)
    assert got == [200]
    assert module._answering == 0
