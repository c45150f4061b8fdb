"""A proxy before etcd, for both of its APIs, that gives answers etcd would not give on demand: late ones, refusals,
nonsense. It also counts the requests."""

from __future__ import annotations

import base64
import contextlib
import http.client
import http.server
import json
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Callable

from tests.unit.memory_store import Lost


@dataclass(frozen=True)
class Answer:
    """An answer in place of etcd's."""

    status: int
    body: str
    index: str | None = "5000"


@dataclass
class Proxy:
    """What a test sees of the proxy, and tells it to do."""

    etcd_port: int
    port: int = 0
    instead: Answer | None = None
    """What every reading request is answered with."""
    answered: int = 0
    """How many requests have been answered so."""
    refused: str | None = None
    """The part of a key that tells which writes are refused; all others go through to etcd."""
    asked: list[str] = field(default_factory=list)
    """The paths of all requests, in order."""
    lost: Lost | None = None
    """What happens to the next write, whose connection is closed without an answer."""
    before_write: Callable[[], object] | None = None
    """Called while the next write is held back."""
    together: threading.Barrier | None = None
    """Where writes to workloads are held back until so many are: once, see `meet`."""
    before_watch: Callable[[], object] = lambda: None
    """Called while each request for changes through the v2 API is held back."""
    hold: threading.Event = field(default_factory=threading.Event)
    """When set, the next watch is `held` back until `passed`; the headers of its answer get through, its body does not
    until `mended`."""
    held: threading.Event = field(default_factory=threading.Event)
    passed: threading.Event = field(default_factory=threading.Event)
    mended: threading.Event = field(default_factory=threading.Event)

    def meet(self, count: int) -> None:
        """Hold the next writes to workloads back until there are `count` at the same time, for 20 seconds at most."""

        def met() -> None:
            self.together = None

        self.together = threading.Barrier(count, met, 20)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: Proxy

    def log_message(self, *arguments: object) -> None:
        pass

    def _pass_on(self) -> None:
        proxy = self.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        proxy.asked.append(self.path)
        if proxy.instead is not None and (
            self.command == "GET" or (self.path.startswith(("/v3/kv/", "/v3/watch")) and not _written(json.loads(body)))
        ):
            self._answer(proxy.instead)
            proxy.answered += 1
            return
        v3 = self.path.startswith("/v3/")
        written = _written(json.loads(body)) if v3 else [self.path] if self.command != "GET" else []
        if proxy.refused is not None and any(proxy.refused in key for key in written):
            v2_error = '{"errorCode":110,"message":"The request requires user authentication"}'
            v3_error = '{"error":"etcdserver: permission denied","message":"etcdserver: permission denied","code":7}'
            self._answer(Answer(403, v3_error, None) if v3 else Answer(401, v2_error))
            return
        self.close_connection = True
        if written and proxy.before_write is not None:
            act, proxy.before_write = proxy.before_write, None
            act()
        together = proxy.together
        if together is not None and any("/workload/" in key for key in written):
            with contextlib.suppress(threading.BrokenBarrierError):
                together.wait()
        lost = proxy.lost if written else None
        if lost is not None:
            proxy.lost = None
            if not lost.applied:
                lost.meanwhile()
                return
        hold = "wait=true" in self.path and "/calico/v1?" in self.path and proxy.hold.is_set()
        if hold:
            proxy.hold.clear()
            proxy.held.set()
            proxy.passed.wait(60)
        if "wait=true" in self.path:
            proxy.before_watch()
        etcd = http.client.HTTPConnection("127.0.0.1", proxy.etcd_port, timeout=60)
        with contextlib.closing(etcd), contextlib.suppress(OSError, http.client.HTTPException):
            passed = ("Content-Type", "Authorization", "Grpc-Metadata-hasleader")
            kept = {name: self.headers[name] for name in passed if name in self.headers}
            etcd.request(self.command, self.path, body, kept)
            answer = etcd.getresponse()
            if lost is not None:
                lost.meanwhile()
                return
            self.send_response(answer.status)
            for name in ("Content-Type", "X-Etcd-Index"):
                if answer.getheader(name):
                    self.send_header(name, answer.getheader(name))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.flush()
            if hold:
                proxy.mended.wait(60)
            while part := answer.read1(2**16):
                self.wfile.write(part)

    do_GET = do_PUT = do_POST = do_DELETE = _pass_on

    def _answer(self, answer: Answer) -> None:
        body = answer.body.encode()
        self.send_response(answer.status)
        if answer.index is not None:
            self.send_header("X-Etcd-Index", answer.index)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _written(request: dict) -> list[str]:
    """Return the keys that a request of the v3 API writes or deletes, if its condition is met."""
    operations = [operation for part in request.get("success", ()) for operation in part.items()]
    puts = [body for kind, body in operations if kind != "request_range"]
    if "value" in request:
        puts.append(request)
    return [base64.b64decode(put["key"]).decode() for put in puts]


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 100


@contextlib.contextmanager
def proxy_before(etcd_port: int) -> Iterator[Proxy]:
    """A proxy on a free port of loopback."""
    proxy = Proxy(etcd_port)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy}))
    proxy.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.passed.set()
        proxy.mended.set()
        server.shutdown()
        server.server_close()
