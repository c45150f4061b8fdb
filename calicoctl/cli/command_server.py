"""The command server of a host: `python -m calicoctl.cli.command_server [--commands-of=HOST]`.

It imports what commands need, and keeps workers (command_worker.py), which are forks of it: they share its memory, and
each runs the commands of clients (command_client.py), one at a time. This process runs no command and has no threads,
so it can be forked at any time.

The agent starts it with the name of the host; then it ends when its standard input does, with the agent. systemd starts
it without. It also ends on SIGTERM. When a file of the program has changed, it replaces itself by the new program.
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from calicoctl import programs, slim

slim.install()
programs.look_in_system_folders()

from calicoctl import environment, files  # noqa: E402
from calicoctl.cli import command_client as client  # noqa: E402
from calicoctl.cli.command_worker import IDLE, OUTDATED, Worker, fingerprint  # noqa: E402
from calicoctl.datastore.hosts import hostname  # noqa: E402
from calicoctl.datastore.settings import EtcdSettings  # noqa: E402
from calicoctl.errors import CalicoError  # noqa: E402

MODULE = "calicoctl.cli.command_server"

SPARE = 2
"""How many workers wait for a client at most. Another one is forked when none waits."""

MOST = 8
"""The maximum number of workers. While all of them are busy, commands run without the server."""

BACKLOG = 32
"""How many clients may wait for a worker. They wait for client.GREETING seconds at most."""

IMPORTED = (
    *(f"calicoctl.commands.{name}" for name in sorted(client.COMMANDS)),
    *("calicoctl.datastore.etcd2", "calicoctl.datastore.etcd3", "calicoctl.datastore.ipam"),
    *("calicoctl.workloads.wiring", "calicoctl.workloads.guard", "calicoctl.plugins.cni"),
    *("docker.api.client", "docker.utils", "pyroute2.iproute.linux"),
)
"""Modules that commands import when they need them."""


class Server:
    """Keeps workers that wait for clients."""

    def __init__(self, host: str, lifeline: int | None, program: int) -> None:
        """`lifeline` is a file descriptor at whose end the server ends, if it is not None.

        `program` was the `fingerprint` before the program was imported.
        """
        self._host = host
        self._lifeline = lifeline
        self._files = program
        self._workers: dict[socket.socket, bool] = {}
        """The connection to each worker -> whether it waits for a client."""
        self._starting: set[socket.socket] = set()
        """The connections to the workers that have said nothing yet."""
        self._ends = False
        self._path = files.RUN / host / client.SOCKET
        self._listening = self._listen()
        self._inode = self._path.stat().st_ino

    def run(self) -> bool:
        """Serve until the end; return whether the program's files have changed. Raises OSError."""
        gc.freeze()  # a collection would copy the memory that the workers share
        wake, signalled = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(signalled)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # which writes to `signalled`
        outdated = False
        while not (self._ends or outdated):
            self._keep_spare()
            sources: list[int | socket.socket] = [
                wake,
                *self._workers,
                *([] if self._lifeline is None else [self._lifeline]),
            ]
            for ready in select.select(sources, [], [])[0]:
                if isinstance(ready, socket.socket):
                    outdated |= OUTDATED in self._hear(ready)
                elif ready == self._lifeline:
                    self._ends = True
                else:
                    os.read(wake, 100)
                    _bury()
        with suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:  # not the next server's
                self._path.unlink()
        self._ends = True
        for connection in self._workers:
            connection.shutdown(socket.SHUT_WR)
        while self._workers:  # those that run a command complete it
            for ready in select.select(list(self._workers), [], [])[0]:
                self._hear(ready)
        _bury()
        return outdated

    def _listen(self) -> socket.socket:
        """Create the socket, which only root may use. One of a former server is replaced."""
        self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        new = self._path.with_suffix(f".{os.getpid()}")
        new.unlink(missing_ok=True)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        before = os.umask(0o177)
        try:
            listening.bind(str(new))
        finally:
            os.umask(before)
        listening.listen(BACKLOG)
        new.replace(self._path)
        return listening

    def _keep_spare(self) -> None:
        waiting = [connection for connection, waits in self._workers.items() if waits]
        if not waiting and len(self._workers) < MOST:
            self._fork()
        for connection in waiting[SPARE:]:
            connection.shutdown(socket.SHUT_WR)

    def _fork(self) -> None:
        ours, theirs = socket.socketpair()
        if os.fork() == 0:
            self._work(ours, theirs)
        theirs.close()
        self._workers[ours] = True
        self._starting.add(ours)

    def _work(self, ours: socket.socket, theirs: socket.socket) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for connection in (ours, *self._workers):
                connection.close()
            Worker(self._listening, theirs, self._host, self._files).serve()
            status = 0
        finally:
            os._exit(status)

    def _hear(self, worker: socket.socket) -> bytes:
        """Take what a worker says: whether it waits for a client. Return it; nothing if the worker has ended.

        Raises CalicoError if it ends before it could serve: the next one would, too.
        """
        said = worker.recv(100)
        if not said and worker in self._starting and not self._ends:
            raise CalicoError("A worker of the command server has ended before it could serve")
        self._starting.discard(worker)
        if said:
            self._workers[worker] = said[-1:] == IDLE
        else:
            worker.close()
            del self._workers[worker]
        return said

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._ends = True


def _bury() -> None:
    """Take the exit statuses of workers that have ended, so that nothing is left of them."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main() -> None:
    """Serve until the end. Raises CalicoError or OSError if that is not possible."""
    program = fingerprint()  # before the imports: a file that is replaced meanwhile makes it outdated
    environment.complete()
    lifeline = None
    if len(sys.argv) > 1:  # see felix/command_server.py
        os.environ["HOSTNAME"] = sys.argv[1].partition("=")[2]
        lifeline = os.dup(0)
    EtcdSettings.from_environment()  # for its error, which each worker would meet
    for name in IMPORTED:
        importlib.import_module(name)
    if Server(hostname(), lifeline, program).run():
        os.execv(sys.executable, [sys.executable, "-m", MODULE, *sys.argv[1:]])  # noqa: S606


if __name__ == "__main__":
    try:
        main()
    except (CalicoError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(1)
