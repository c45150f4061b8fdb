"""The server of the engine's calls, at real sockets: bounds, errors, and who may connect."""

from __future__ import annotations

import json
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from calicoctl.errors import CalicoError, StoreUnavailable
from calicoctl.plugins import server as module
from calicoctl.plugins import stores
from calicoctl.plugins.server import Listening, Server, servers
from calicoctl.plugins.stores import TooSlow, bounded

release = threading.Event()


def refuse(request: dict[str, Any]) -> dict[str, Any]:
    raise CalicoError("no, since it is Tuesday")


def fail(request: dict[str, Any]) -> dict[str, Any]:
    raise LookupError("a secret")


def hang(request: dict[str, Any]) -> dict[str, Any]:
    release.wait(20)
    return {}


ROUTES = {"/Echo": lambda request: {"got": request}, "/Refuse": refuse, "/Fail": fail, "/Hang": hang}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The path of a socket that is served. A request must arrive within 0.3 s, and be answered within 0.5 s."""
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    release.clear()
    (one,) = servers([Listening(tmp_path / "plugins/calico.sock", ROUTES, 0.5)])
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


def test_calls(path: Path) -> None:
    assert call(path, "/Echo", b'{"a": [1]}') == (200, {"got": {"a": [1]}})
    assert call(path, "/Echo", b"") == (200, {"got": {}})  # Plugin.Activate has no body
    assert call(path, "/Refuse") == (400, {"Err": "no, since it is Tuesday"})
    assert call(path, "/Other") == (400, {"Err": "there is no call /Other"})
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


def test_works_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "BUSY", stores._running + 2)
    release.clear()
    for _ in range(2):
        with pytest.raises(TooSlow):
            bounded(0.01, lambda: release.wait(20))
    with pytest.raises(StoreUnavailable, match="calls are waiting"):
        bounded(0.1, lambda: None)
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
    (one,) = servers([Listening(other, ROUTES)])
    one.start()
    assert call(other, "/Echo")[0] == 200
    one.stop()
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    with pytest.raises(CalicoError, match="nobody else may write to it"):
        servers([Listening(open_folder / "a.sock", ROUTES)])


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


def test_removals_do_not_wait_for_a_store_that_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "REMOVAL", 0.1)
    one = stores.Stores("host1", {})
    asked = []

    def unavailable(datastore: Any) -> None:
        asked.append(datastore)
        raise StoreUnavailable("no etcd")

    for _ in range(3):
        one.remove(unavailable)
    assert len(asked) == 1 and one.failed.is_set()
    monkeypatch.setattr(stores, "PAUSE", 0.0)
    one._down_until = 0.0
    began = time.monotonic()
    one.remove(lambda datastore: time.sleep(1))
    assert time.monotonic() - began < 0.9
    one.remove(asked.append)
    assert len(asked) == 2
    with pytest.raises(CalicoError, match="not of the store"):
        one.remove(lambda datastore: refuse_other())
    # the settings are read anew after a failure, and clients are kept otherwise
    with one.client() as first:
        pass
    with one.client() as second:
        assert second is first
    with pytest.raises(StoreUnavailable), one.client():
        raise StoreUnavailable("no etcd")
    with one.client() as third:
        assert third is not first


def refuse_other() -> None:
    raise CalicoError("not of the store")
