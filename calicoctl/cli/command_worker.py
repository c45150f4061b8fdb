"""A worker of the command server: runs the commands of clients (command_client.py), one at a time.

While it runs a command, its environment, umask, scheduling priority, working directory and standard streams are those
of the client, and the client's signals and end are handled as if they were its own.
"""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType

from calicoctl import programs, sockets
from calicoctl.cli import command_client as client
from calicoctl.cli import main
from calicoctl.cli.command_fit import Hello
from calicoctl.datastore import backends

SENDING = 1.0
"""Seconds to wait for the command of a client that has been greeted. It sends this at once, unless it was stopped; then
it finds the connection closed when it continues, and runs the command in its own process."""

LONGEST = 1000
"""How many clients a worker serves. Then it ends, with whatever commands have left in its memory."""

THRESHOLD = 50_000
"""How many objects a command may create before Python looks for garbage in cycles. Most commands create fewer."""

GROWTH = 16 * 2**20
"""By how many bytes the memory of a worker may grow. Then it ends: of what a command has needed that reads thousands of
endpoints, Python returns a part only."""


class Worker:
    """Serves the clients that the server passes on, one after another."""

    def __init__(self, server: socket.socket) -> None:
        """`server` is the connection to the server, which passes clients on when the worker says that it waits."""
        self._server = server
        self._environment = dict(os.environb)
        self._priority = os.getpriority(os.PRIO_PROCESS, 0)
        self._null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._client: socket.socket | None = None
        """The connection to the client whose command runs."""
        self._interrupted = False

    def serve(self) -> None:
        """Serve clients; return when the server says so, after LONGEST clients, after an interrupted command, or when
        this process has grown by GROWTH.

        An interrupted command may have opened a file, such as a lock, and not stored its descriptor yet. Only the end
        of the process closes this file.
        """
        signal.signal(signal.SIGIO, self._on_input)
        self._reset()
        most = _resident() + GROWTH
        for _ in range(LONGEST):
            self._server.send(b"waiting")
            _, descriptors, _, _ = socket.recv_fds(self._server, 1, 1)
            if not descriptors:
                return
            with socket.socket(fileno=descriptors[0]) as connection, suppress(OSError):  # the client has ended
                self._serve(connection)
            self._reset()
            gc.collect(0)  # now, when nobody waits for it
            if self._interrupted or _resident() > most:
                return

    def _serve(self, connection: socket.socket) -> None:
        """Run the command of a client that has been greeted.

        Raises OSError if the client has ended, or sends no command within SENDING seconds. Raises RuntimeError if some
        of its file descriptors were not received, since this process has too many: only its end closes the others.
        """
        connection.settimeout(SENDING)
        hello = Hello(connection.recv(client.LARGEST))
        words, descriptors, _, _ = socket.recv_fds(connection, client.LARGEST, 4)
        connection.setblocking(True)
        if not words:
            return
        if len(descriptors) < 4:
            raise RuntimeError("too few file descriptors are free")
        umask, errors, *arguments = words.split(client.SEPARATOR)
        try:
            with suppress(OSError):  # it has ended, or this process may not take its priority
                os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, sockets.peer(connection)[0]))
            self._become(hello.variables, int(umask, 8), errors.decode(), descriptors)
            self._client = connection
            fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(connection, fcntl.F_SETFL, os.O_ASYNC)  # SIGIO tells of the client's signals, and of its end
            self._on_input()
            if hello.is_cni:
                status = _plugin()
            else:
                status = main.run(list(map(os.fsdecode, arguments)), f"in process {os.getpid()}, of the command server")
        except main.Interrupted as interrupted:  # before the command began, or after it was done
            interrupted.handled = True
            status = 128 + interrupted.number
        finally:
            self._client = None
            self._let_go()
        answer(connection, status)

    def _become(self, theirs: Mapping[bytes, bytes], umask: int, errors: str, descriptors: list[int]) -> None:
        """Take over a client's environment and umask, and, from `descriptors`, its streams and working directory.

        `errors` is the error handler of its standard input.
        """
        _change_environment(theirs)
        programs.look_in_system_folders()
        backends.begin_command()
        time.tzset()
        os.umask(umask)
        *streams, here = descriptors
        os.fchdir(here)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        for descriptor in descriptors:
            os.close(descriptor)
        _open_streams(errors)

    def _let_go(self) -> None:
        """Give back what others may see of the client: its streams, working directory and priority."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in client.SIGNALS:
            signal.signal(number, _ignore)
        for number in range(3):
            os.dup2(self._null, number)
        os.chdir("/")
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, self._priority)

    def _reset(self) -> None:
        """Undo `_become`, and what a command may have changed in this process."""
        self._let_go()
        _open_streams("strict")
        os.umask(0o077)
        _change_environment(self._environment)
        gc.set_threshold(THRESHOLD)

    def _on_input(self, number: int = 0, frame: FrameType | None = None) -> None:
        """Interrupt the command at the first signal that its client receives, or at the client's end (as SIGHUP).

        Raises main.Interrupted, at once or a moment later (see main.interrupt). Further signals are ignored: the
        rollback must not be interrupted.
        """
        if self._client is None or self._interrupted:
            return
        try:
            received = self._client.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        self._interrupted = True
        main.interrupt(received[0] if received else signal.SIGHUP, frame)


def _change_environment(wanted: Mapping[bytes, bytes]) -> None:
    """Make `wanted` the environment of this process. Only variables that differ are written: each takes some time."""
    for name in os.environb.keys() - wanted.keys():
        del os.environb[name]
    for name, value in wanted.items():
        if os.environb.get(name) != value:
            os.environb[name] = value


def answer(connection: socket.socket, status: int) -> None:
    """Send the exit status of its command to a client. Raises OSError if the client has ended.

    Then reads the client's signals that have not been read: if one were left when the connection is closed, the kernel
    would report a reset to the client, in place of the status.
    """
    connection.send(b"%d" % status)
    connection.shutdown(socket.SHUT_RD)
    while connection.recv(100):
        pass


def _plugin() -> int:
    """Run the CNI plugin; return its exit status."""
    from calicoctl.plugins import cni

    if main.is_debugged([]):
        print(f"The plugin runs in process {os.getpid()}, of the command server.", file=sys.stderr)
    return cni.main()


def _resident() -> int:
    """Return how much memory this process has, in bytes, without parts of files. Source: proc_pid_statm(5)."""
    _, resident, files, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - files) * os.sysconf("SC_PAGESIZE")


def _open_streams(errors: str) -> None:
    sys.stdin = open(0, encoding="utf-8", errors=errors, newline="\n", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


def _ignore(number: int, frame: FrameType | None) -> None:
    """Ignore a signal to this process itself: the server says when the worker is to end.

    Programs that a command runs do not inherit this handler, but would inherit SIG_IGN.
    """
