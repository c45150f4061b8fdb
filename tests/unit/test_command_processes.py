"""The command server's own process: when it ends, and when its program is outdated."""

from __future__ import annotations

import os
import resource
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Callable

import pytest

from calicoctl import files
from calicoctl.cli import command_client, command_server
from calicoctl.cli.command_fit import ProgramFiles
from calicoctl.cli.command_server import Server
from calicoctl.errors import CalicoError


def test_a_worker_that_ends_before_it_could_serve_is_not_replaced_at_once() -> None:
    ours, theirs = socket.socketpair()
    server = Server.__new__(Server)
    server._workers, server._starting, server._ends = {ours: True}, {ours}, False
    theirs.close()
    with pytest.raises(CalicoError, match="before it could serve"):
        server._hear(ours)
    server._ends = True
    server._hear(ours)
    assert not server._workers


def test_a_file_that_is_replaced_during_the_imports_makes_the_server_outdated(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    class Files(ProgramFiles):
        def __init__(self) -> None:
            steps.append("files")

    class Stopped(Server):
        def __init__(self, host: str, lifeline: int | None, program: ProgramFiles) -> None:
            assert isinstance(program, Files)

        def run(self) -> bool:
            return False

    monkeypatch.setattr(command_server, "ProgramFiles", Files)
    monkeypatch.setattr(command_server, "Server", Stopped)
    monkeypatch.setattr("sys.argv", ["command_server"])
    monkeypatch.setenv("CALICO_ENV_FILE", "/dev/null")
    monkeypatch.setattr("importlib.import_module", lambda name: steps.append(name))
    command_server.main()
    assert steps == ["files", *command_server.IMPORTED]


def test_another_worker_is_forked_for_a_client_that_waits_once_no_command_has_been_completed_for_some_time() -> None:
    worker, client = socket.socketpair()
    with worker, client:
        server = Server.__new__(Server)
        server._workers, server._starting, server._ends = {worker: False, client: False}, set(), False
        server._queue = deque([(100.0, client)])
        server._progress = 50.0
        assert server._more_at() == 100.0 + command_server.PATIENCE
        client.send(b"waiting")
        server._hear(worker)
        server._workers[worker] = False
        assert server._more_at() == server._progress + command_server.PATIENCE


@pytest.mark.parametrize("are_settled", [False, True])
def test_every_change_of_the_programs_files_is_noticed_and_none_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, are_settled: bool
) -> None:
    package, libraries = tmp_path / "calicoctl", tmp_path / "libraries"
    module, other = package / "commands" / "module.py", package / "commands" / "other.py"
    module.parent.mkdir(parents=True)
    libraries.mkdir()
    monkeypatch.setattr(command_client, "package", lambda: str(package))
    monkeypatch.setattr("sys.path", [str(libraries)])

    def noticed(change: Callable[[], object]) -> bool:
        module.write_text("before")
        for path in (module, package, module.parent)[: 3 if are_settled else 1]:
            os.utime(path, (0, 0))
        known = ProgramFiles()
        assert not known.are_replaced()
        change()
        return known.are_replaced() and known.are_replaced()

    assert noticed(lambda: module.write_text("after"))
    assert noticed(lambda: os.utime(module, (0, 1)))
    assert noticed(module.unlink)
    assert noticed(lambda: other.touch())
    assert noticed(lambda: other.replace(module))
    assert noticed(lambda: (package / "new").mkdir() or (package / "new" / "module.py").touch())
    assert noticed(lambda: (libraries / "library").mkdir())
    assert noticed(lambda: libraries.replace(tmp_path / "gone"))
    assert noticed(lambda: monkeypatch.setattr(command_client, "package", lambda: str(tmp_path / "new")))
    monkeypatch.setattr(command_client, "package", lambda: str(package))
    assert not noticed(lambda: (package / "commands" / "__pycache__").mkdir())
    lock = package / "commands" / ".#module.py"
    assert not noticed(lambda: lock.symlink_to("user@host.1")), "an editor's lock"

    known = ProgramFiles()
    lock.unlink()
    assert not known.are_replaced()
    module.write_text("after")
    assert known.are_replaced()


def test_a_server_without_a_free_file_descriptor_lives_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "RUN", tmp_path)
    server = Server.__new__(Server)
    server._path = tmp_path / "host1" / command_client.SOCKET
    server._new, server._queue, server._starting, server._ends = set(), deque(), set(), False
    worker, other = socket.socketpair()
    with server._listen() as listening, worker, other, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        server._listening, server._workers = listening, {worker: False}
        client.connect(str(server._path))
        with no_more_files():
            server._accept()
            assert server._step([listening]) == [listening], "no worker can be forked"
        server._accept()
        assert len(server._new) == 1
        server._new.pop().close()
        with no_more_files(), pytest.raises(OSError, match="Too many open files"):
            server._workers = {}
            server._step([listening])


def test_a_worker_that_has_ended_is_reaped_at_the_next_event() -> None:
    """Its signal may have been missed."""
    server = Server.__new__(Server)
    server._queue, server._starting, server._ends = deque(), set(), True
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    worker, client = socket.socketpair()
    with worker, client:
        server._workers = {worker: False}
        client.send(b"waiting")
        server._step([])
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, 0)


def test_a_host_may_have_a_long_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "RUN", tmp_path)
    server = Server.__new__(Server)
    server._path = tmp_path / ("h" * 253) / command_client.SOCKET
    with server._listen() as listening, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        command_client.connect(client, str(server._path.parent))
        listening.accept()[0].close()
    assert [path.name for path in server._path.parent.iterdir()] == [command_client.SOCKET]
    assert server._path.stat().st_mode & 0o777 == 0o600


@contextmanager
def no_more_files() -> Iterator[None]:
    """Inside `with`, this process can open no more files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
