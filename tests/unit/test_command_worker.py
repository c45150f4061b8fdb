"""What a worker of the command server does with its client's signals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from unittest.mock import patch

import pytest

from calicoctl.cli import command_client, command_worker, main
from calicoctl.cli.command_worker import Worker, answer


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in command_client.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_only_the_first_signal_interrupts_so_that_the_rollback_is_completed() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        worker = Worker.__new__(Worker)
        worker._client, worker._interrupted = ours, False
        theirs.send(bytes([signal.SIGINT]))
        with pytest.raises(main.Interrupted) as interrupted:
            worker._on_input()
        interrupted.value.handled = True
        assert interrupted.value.number == signal.SIGINT
        theirs.send(bytes([signal.SIGTERM]))
        worker._on_input()
    worker._on_input()  # its client has ended
    ours.close()


def test_the_status_reaches_a_client_whose_later_signals_nobody_took() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        theirs.send(bytes([signal.SIGHUP]))
        with ours:
            answer(ours, 130)
        assert theirs.recv(100) == b"130"


def test_a_client_that_is_stopped_before_it_sends_its_command_holds_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_worker, "SENDING", 0.01)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.send(b"/program\0calicoctl")
        with pytest.raises(OSError, match="timed out"):
            Worker.__new__(Worker)._serve(ours)


def test_a_worker_that_cannot_receive_all_of_a_clients_files_ends() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.send(b"/program\0calicoctl")
        socket.send_fds(theirs, [b"22\0strict\0status"], [0, 1])
        with pytest.raises(RuntimeError, match="descriptors"):
            Worker.__new__(Worker)._serve(ours)


def test_the_environment_becomes_the_wanted_one_for_programs_too() -> None:
    with patch.dict(os.environ):
        os.environ.update({"KEPT": "as it is", "CHANGED": "before", "GONE": "x"})
        wanted = {b"PATH": os.environb[b"PATH"], b"KEPT": b"as it is", b"CHANGED": b"after", b"NEW": b"\xff"}
        command_worker._change_environment(wanted)
        assert dict(os.environb) == wanted
        seen = set(subprocess.run(["env", "-0"], stdout=subprocess.PIPE, check=True).stdout.split(b"\0"))
        assert {name + b"=" + value for name, value in wanted.items()} <= seen
        assert not {b"CHANGED=before", b"GONE=x"} & seen


def test_a_worker_that_has_grown_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, the commands that read most would say how much memory the server takes from then on."""
    held: list[bytes] = []
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)  # each client is received by itself
    worker = Worker.__new__(Worker)
    worker._server, worker._interrupted = ours, False
    monkeypatch.setattr(command_worker.signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(worker, "_reset", lambda: None)
    grown = 4 * command_worker.GROWTH  # so much that no memory of before serves for it, nor what is freed meanwhile
    monkeypatch.setattr(worker, "_serve", lambda connection: held.append(b"x" * (len(held) * grown)))
    with ours, theirs:
        ours.settimeout(5)
        for _ in range(3):
            socket.send_fds(theirs, [b"C"], [theirs.fileno()])
        worker.serve()
        assert len(held) == 2 and [theirs.recv(100) for _ in held] == [b"waiting"] * 2
