"""What the client of the command server does when a server behaves badly, or does not fit."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator

import pytest

from calicoctl.cli import command_client


@pytest.fixture
def nobody_reads_errors() -> Iterator[None]:
    """Standard error is a pipe that nobody reads."""
    kept = os.dup(2)
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(reader)
    os.close(writer)
    yield
    os.dup2(kept, 2)
    os.close(kept)


def test_a_loss_that_cannot_be_told_is_a_failure_too(
    nobody_reads_errors: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_client, "SIGNALS", ())
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        theirs.settimeout(0)
        theirs.shutdown(socket.SHUT_WR)  # it ends without a status, but takes the command
        assert command_client._have_run(ours, ["profile", "show"]) == 1
        assert theirs.recv(1000).endswith(b"profile\0show")
    theirs.close()


def test_a_server_of_another_process_namespace_is_not_ours() -> None:
    class Foreign:
        """A connection to a server that has ended, or that this process's namespace does not have."""

        def getsockopt(self, *_: int) -> bytes:
            return bytes(12)

    with pytest.raises(OSError):
        command_client._is_ours(Foreign())  # type: ignore[arg-type]


def test_a_server_of_another_user_is_not_ours() -> None:
    class Foreign:
        def getsockopt(self, *_: int) -> bytes:
            return b"".join(number.to_bytes(4, sys.byteorder) for number in (os.getpid(), 1000, 1000))

    assert not command_client._is_ours(Foreign())  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["/dev/fd/63", "/dev/tty", "/proc/self/fd/3", "--file=/proc/thread-self/ns/net"])
def test_a_file_of_the_callers_process_is_read_by_it(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def listed(folder: object) -> list[str]:
        asked.append(folder)
        return []

    monkeypatch.setattr(command_client, "SIGNALS", ())
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "listdir", listed)
    monkeypatch.delenv(command_client.COLD, raising=False)
    monkeypatch.setattr(os, "isatty", lambda descriptor: False)
    with open(os.devnull) as nothing, open(os.devnull, "w", encoding="utf-8") as out:
        monkeypatch.setattr(sys, "stdin", nothing)
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", out)
        assert command_client.run(["batch", "lines"]) is None and asked
        asked.clear()
        assert command_client.run(["batch", path]) is None and not asked
        monkeypatch.setattr(os, "isatty", lambda descriptor: True)
        assert command_client.run(["batch"]) is None and not asked


def test_a_command_that_a_worker_would_read_in_part_is_not_sent() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, 32, 2 * command_client.LARGEST)  # SO_SNDBUFFORCE, as net.core.wmem_default
        with pytest.raises(OSError):
            command_client._have_run(ours, ["profile", "add", "x" * command_client.LARGEST])
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(1)
