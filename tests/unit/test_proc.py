"""Start times, arguments and the end of processes, from proc(5)."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from calicoctl import proc


def test_a_process_is_identified_by_its_start_time() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        since = proc.running_since(child.pid)
        assert since is not None
        assert since == proc.start_time(Path(f"/proc/{child.pid}")) == proc.running_since(child.pid)
        assert int(since) >= int(proc.running_since(os.getpid()) or 0)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert proc.running_since(child.pid) is None, "a zombie does not run"
    assert proc.running_since(child.pid) is None
    with pytest.raises(FileNotFoundError):
        proc.start_time(Path(f"/proc/{child.pid}"))


def test_a_process_that_is_suspended_is_recognised() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        assert not proc.is_suspended(child.pid)
        child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)
        assert proc.is_suspended(child.pid)
        child.kill()
    assert not proc.is_suspended(child.pid)


def test_the_name_of_a_command_may_contain_anything(tmp_path: Path) -> None:
    odd = tmp_path / "a) Z (b"
    odd.symlink_to("/bin/sleep")
    with subprocess.Popen([str(odd), "60"]) as child:
        assert proc.running_since(child.pid) is not None
        child.kill()


def test_arguments_and_environment_are_read() -> None:
    with subprocess.Popen(["sleep", "61"], env={"A": "ä b"}) as child:
        while not proc.arguments(child.pid):  # a moment after it was started, there are none yet
            assert child.poll() is None
        assert proc.arguments(child.pid) == ["sleep", "61"]
        assert proc.strings(child.pid, "environ") == ["A=ä b"]
        child.kill()


def test_waiting_for_the_end_of_a_process() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        assert not proc.await_end(child.pid, 0.01)
        child.kill()
        assert proc.await_end(child.pid, 10)
    assert proc.await_end(child.pid), "it has ended already"


@pytest.mark.parametrize("protocol, kind", [("udp", socket.SOCK_DGRAM), ("tcp", socket.SOCK_STREAM)])
def test_who_holds_a_port_is_found(protocol: str, kind: socket.SocketKind) -> None:
    with socket.socket(socket.AF_INET, kind) as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        if protocol == "tcp":
            held.listen()
        found = str(proc.port_holder(protocol, port))
        assert found.startswith(f"process {os.getpid()} ('") and found.endswith(f" of user {os.getuid()}")
    assert proc.port_holder(protocol, port) is None


def test_who_listens_at_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        with pytest.raises(ConnectionRefusedError):
            proc.listener(path)
        server.listen()
        assert proc.listener(path) == os.getpid()


def test_whether_a_process_listens_at_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))
        assert not proc.is_listened_at(path)
        one.listen()
        assert proc.is_listened_at(path) and not proc.is_listened_at(tmp_path / "b.sock")
        path.rename(tmp_path / "b.sock")
        assert proc.is_listened_at(path) and not proc.is_listened_at(tmp_path / "b.sock")
    assert not proc.is_listened_at(path)


def test_a_user_with_many_open_files_is_not_searched_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proc, "MOST_FILES", 100)
    looked = []
    readlink = os.readlink
    monkeypatch.setattr(os, "readlink", lambda path: looked.append(path) or readlink(path))
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(os.devnull)) for _ in range(200)]
        held = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        assert held.fileno() > files[0].fileno()
        found = proc.port_holder("tcp", held.getsockname()[1])
    assert str(found).endswith(f" of user {os.getuid()}")
    assert len(looked) <= 100
