"""Members whose names cannot be resolved: they are reached at the addresses that the names had last."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import urllib3

from calicoctl import state
from calicoctl.datastore import last_known
from calicoctl.datastore.hosts import hostname

NAME = "etcd.invalid"


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.headers["Host"].encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_a_connection_falls_back_to_what_is_known(port: int) -> None:
    manager = urllib3.PoolManager(retries=False)
    manager.pool_classes_by_scheme = last_known.pools()
    with pytest.raises(urllib3.exceptions.NameResolutionError):
        manager.request("GET", f"http://{NAME}:{port}/")
    last_known.remember({NAME: {"127.0.0.9", "127.0.0.1"}, "other": ["192.0.2.1"]})
    assert last_known.addresses(NAME) == ["127.0.0.1", "127.0.0.9"]
    assert manager.request("GET", f"http://{NAME}:{port}/").data.decode() == f"{NAME}:{port}", "the name is kept"
    last_known.remember({NAME: ["127.0.0.9"]})
    with pytest.raises(urllib3.exceptions.NameResolutionError):
        urllib3.PoolManager(retries=False).request("GET", f"http://{NAME}:{port}/")
    last_known.forget(hostname())
    assert last_known.addresses(NAME) == []


def test_a_plain_socket_falls_back_to_what_is_known(port: int) -> None:
    with pytest.raises(OSError, match="Name or service not known"):
        last_known.connect(NAME, port, 5)
    last_known.remember({NAME: {"127.0.0.9", "127.0.0.1"}})
    with last_known.connect(NAME, port, 5) as found:
        assert found.getpeername() == ("127.0.0.1", port) and found.gettimeout() == 5
    last_known.remember({NAME: {"127.0.0.9"}})
    with pytest.raises(OSError, match="Name or service not known"):
        last_known.connect(NAME, port, 5)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"etcd.invalid": ["x", 1, "192.0.2.1"]}', b"\xff"])
def test_a_damaged_file_is_not_believed(content: bytes) -> None:
    state.write(hostname(), "members", content=content)
    assert last_known.addresses(NAME) == (["192.0.2.1"] if b"192" in content else [])
