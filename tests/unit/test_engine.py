"""Answers of the Docker Engine, and of a man in the middle: what is read of them, and what is not."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Callable

import pytest

from calicoctl import engine
from calicoctl.errors import CalicoError, DockerUnavailable
from calicoctl.felix import sources
from calicoctl.felix.events import ContainerChanged, EngineListed, EngineUnavailable
from calicoctl.felix.sources import EngineEvents
from calicoctl.workloads import workload
from tests.unit.rogue_server import Answer, Client, Server, answer, serving

ID = "ab" * 32
TIMEOUT, SIZE = 1, 2**16
KERNEL = 2**22
"""Bytes that the kernel buffers, at most, between a server and a client that does not read."""

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
LISTED = {"Id": ID, "Names": ["/web"], "State": "running"}
CONTAINER = {
    "Id": ID,
    "Name": "/web",
    "State": {"Running": True, "Pid": 42},
    "HostConfig": {"NetworkMode": "none"},
}

REQUESTS: dict[str, Callable[[], object]] = {
    "info": engine.info,
    "containers": lambda: [(one["Id"], one["State"], one.get("Names")) for one in engine.containers()],
    "container": lambda: workload.find("web"),
    "networks": lambda: engine.forwards(ipv6=True),
    "events": lambda: followed(),
}


def followed() -> None:
    with engine.followed(0) as (_, changes):
        next(changes)


@contextmanager
def an_engine(answers: Answer, path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """An engine that names its version properly, and then answers otherwise."""

    def all_answers(client: Client, line: str) -> None:
        if line == "GET /_ping":
            client.send(answer(b"OK", HEAD + b"Api-Version: 1.45\r\n"))
        else:
            answers(client, line)

    monkeypatch.setenv("DOCKER_HOST", f"unix://{path}/docker.sock")
    with serving(all_answers, f"{path}/docker.sock") as server:
        yield server
    (path / "docker.sock").unlink()


@pytest.fixture(autouse=True)
def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "TIMEOUT", TIMEOUT)
    for name in ("LARGEST", "LARGEST_EVENT"):
        monkeypatch.setattr(engine, name, SIZE)


def proper(client: Client, line: str) -> None:
    answers = {"/json": [LISTED], "/info": {"ServerVersion": "27.0"}, "/networks": [], "/web/json": CONTAINER}
    client.send(answer(json.dumps(next(b for a, b in reversed(answers.items()) if a in line)).encode(), HEAD))


def test_proper_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with an_engine(proper, tmp_path, monkeypatch):
        assert engine.containers() == [LISTED] and engine.info() == {"ServerVersion": "27.0"}
        found = workload.find("web")
        assert (found.id, found.pid, found.network_mode, found.docker_name) == (ID, 42, "none", "web")


def test_the_version_is_asked_once_and_again_after_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after the engine was replaced by an older one, which refuses requests of a newer version of its API."""
    version, lines = "1.45", []

    def answers(client: Client, line: str) -> None:
        lines.append(line)
        if line == "GET /_ping":
            client.send(answer(b"OK", HEAD + f"Api-Version: {version}\r\n".encode()))
        elif f"/v{version}/" in line:
            proper(client, line)
        else:
            client.send(
                answer(b'{"message": "client version is too new"}', HEAD.replace(b"200 OK", b"400 Bad Request"))
            )

    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    with serving(answers, f"{tmp_path}/docker.sock"):
        assert engine.info() == engine.info()
        assert lines == ["GET /_ping", "GET /v1.45/info", "GET /v1.45/info"]
        version = "1.44"
        with pytest.raises(DockerUnavailable, match="too new"):
            engine.info()
        assert engine.info() and lines[3:] == ["GET /v1.45/info", "GET /_ping", "GET /v1.44/info"]


def drips(client: Client, line: str) -> None:
    client.send(HEAD + b"Content-Length: 1000\r\n")
    client.drip(b"X-A: " + b"a" * 1000)


@pytest.mark.parametrize("request_", ["containers", "events"])
def test_an_answer_that_drips_is_given_up(request_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with an_engine(drips, tmp_path, monkeypatch):
        began = time.monotonic()
        with pytest.raises(DockerUnavailable, match="does not answer like a Docker Engine"):
            REQUESTS[request_]()
        assert time.monotonic() - began < 5 * TIMEOUT


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize(
    ("before", "data"),
    [
        (HEAD, b"X-A: a\r\n" * 1000),
        (HEAD + b"\r\n", b" " * SIZE),
        (CHUNKED, b"1\r\n \r\n" * 1000),
        (CHUNKED + b"fffffffffff\r\n", b" " * SIZE),
        (CHUNKED, b"0" * SIZE),
    ],
)
def test_an_answer_without_an_end_is_not_read_to_it(
    request_: str, before: bytes, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def floods(client: Client, line: str) -> None:
        client.send(before)
        client.flood(data)

    with an_engine(floods, tmp_path, monkeypatch) as server:
        with pytest.raises((CalicoError, StopIteration)):
            REQUESTS[request_]()
        server.join()
        assert all(sent < SIZE + KERNEL for sent in server.sent)


@pytest.mark.parametrize("request_", REQUESTS)
def test_no_redirect_is_followed_and_nothing_decoded(
    request_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    answers = [
        answer(b"", HEAD.replace(b"200 OK", b"302 Found") + b"Location: /elsewhere\r\n"),
        answer(gzip.compress(b" " * 2**20), HEAD + b"Content-Encoding: gzip\r\n"),
    ]
    for wrong in answers:

        def respond(client: Client, line: str, wrong: bytes = wrong) -> None:
            asked.append(line)
            client.send(wrong)

        with an_engine(respond, tmp_path, monkeypatch), pytest.raises(DockerUnavailable):
            REQUESTS[request_]()
    assert len(asked) >= 2 and not any("elsewhere" in line for line in asked)


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"{}",
        b"5",
        b"null",
        b'"x"',
        b"[1, null]",
        b"[[]]",
        b"[{}]",
        b'[{"Id": 5, "State": "running", "Names": "x"}]',
        b'[{"Id": "../../etc", "State": "running", "Names": []}]',
        b'[{"Id": "ab", "State": {}, "Names": []}]',
        b'[{"Id": "ab", "State": "running", "Names": [5]}]',
        json.dumps({**CONTAINER, "State": {"Running": True, "Pid": "1/../2"}}).encode(),
        json.dumps({**CONTAINER, "State": {"Running": "yes", "Pid": 1}}).encode(),
        json.dumps({**CONTAINER, "State": []}).encode(),
        json.dumps({**CONTAINER, "Id": "../x"}).encode(),
        json.dumps({**CONTAINER, "Name": None}).encode(),
        json.dumps({**CONTAINER, "HostConfig": {"NetworkMode": 5}}).encode(),
        b"[" * 30_000,
        b"\xff\xfe" * 20_000,
        b"",
    ],
)
@pytest.mark.parametrize("status", [b"200 OK", b"500 Broken"])
def test_an_answer_of_another_shape_is_an_ordinary_error(
    request_: str, body: bytes, status: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a proper answer that says little."""
    head = HEAD.replace(b"200 OK", status)
    with an_engine(lambda client, line: client.send(answer(body, head)), tmp_path, monkeypatch):
        try:
            result = REQUESTS[request_]()
        except (DockerUnavailable, StopIteration):
            return
        assert (request_, result) in [("info", {}), ("containers", []), ("networks", False)] or b"Id" in body


class End(BaseException):
    """Ends the thread that follows an engine."""


class Followed:
    """The agent's queue, and the thread that follows an engine."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[Any] = SimpleQueue()
        self.ended = False
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def _follow(self) -> None:
        with suppress(End):
            EngineEvents(self).follow()  # type: ignore[arg-type]

    def put(self, event: Any) -> None:
        if self.ended:
            raise End
        self.queue.put(event)

    def next(self) -> Any:
        return self.queue.get(timeout=10)


@contextmanager
def following() -> Iterator[Followed]:
    """The thread ends with its next event, when the engine has ended."""
    agent = Followed()
    try:
        yield agent
    finally:
        agent.ended = True


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(id: Any = ID, action: str = "start") -> bytes:
    return json.dumps({"Type": "container", "Action": action, "Actor": {"ID": id}}).encode() + b"\n"


def test_events_of_any_shape_and_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long quiet ends nothing, whatever makes no sense is passed over, and an event may come in parts."""

    def respond(client: Client, line: str) -> None:
        if "/events" not in line:
            proper(client, line)
            return
        client.send(CHUNKED + chunk(b"\n[]\n5\nnull\n" + event(5) + event("../x") + event(action="exec")))
        if server.ended.wait(2.5 * TIMEOUT):
            return
        for part in (event()[:10], event()[10:] + event(action="destroy")):
            client.send(chunk(part))
        client.hold()

    with an_engine(respond, tmp_path, monkeypatch) as server, following() as agent:
        assert isinstance(agent.next(), EngineListed)
        started, removed = ContainerChanged(ID, removed=False, started=True), ContainerChanged(ID, removed=True)
        assert [agent.next(), agent.next()] == [started, removed]
        assert len([line for line in server.requests if "/events" in line]) == 1


def test_a_flood_of_events_is_replaced_by_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "FLOOD", 100)
    monkeypatch.setattr(sources, "FLOOD_PERIOD", 1.0)

    def respond(client: Client, line: str) -> None:
        if "/events" in line:
            client.send(CHUNKED)
            client.flood(chunk(event()))
        else:
            proper(client, line)

    with an_engine(respond, tmp_path, monkeypatch), following() as agent:
        began = time.monotonic()
        taken = []
        while sum(isinstance(one, EngineListed) for one in taken) < 3:
            taken.append(agent.next())
        assert time.monotonic() - began > 1, "it waits before it lists again"
        assert len(taken) == 203 and not any(isinstance(one, EngineUnavailable) for one in taken)
