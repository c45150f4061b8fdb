"""The command server of a host: `python -m calicoctl.cli.command_server [--commands-of=HOST]`.

It imports what commands need, and keeps workers (command_worker.py), which are forks of it: they share its memory, and
each runs the commands of clients (command_client.py), one at a time. This process greets the clients, and passes them
on to workers. It runs no command and has no threads, so it can be forked at any time.

The agent starts it with the name of the host; then it ends when its standard input does, with the agent. systemd starts
it without the name. It also ends on SIGTERM. When a file of the program has changed, it replaces itself by the new
program.
"""

from __future__ import annotations

import gc
import importlib
import math
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from calicoctl import programs, slim

slim.install()
programs.look_in_system_folders()

from calicoctl import environment, files, sockets  # noqa: E402
from calicoctl.cli import command_client as client  # noqa: E402
from calicoctl.cli.command_fit import Fit, Hello, ProgramFiles  # noqa: E402
from calicoctl.cli.command_worker import Worker  # noqa: E402
from calicoctl.datastore.hosts import hostname  # noqa: E402
from calicoctl.errors import CalicoError  # noqa: E402
from calicoctl.felix import process  # noqa: E402

MODULE = "calicoctl.cli.command_server"

SPARE = 2
"""How many workers wait for a client at most."""

MOST = 32
"""The maximum number of workers. While all of them are busy, commands run without the server."""

PATIENCE = 0.05
"""Seconds in which no worker completes a command until another worker is forked for a client that waits.

Most commands are done by then. While workers complete commands, more of them would not be faster: so many clients at
once, for example, keep all processors busy.
"""

SHORTAGE = 0.01
"""Seconds to wait when a client cannot be accepted, since nothing tells when it can. A client waits no longer than
client.GREETING."""

BACKLOG = 128
"""How many clients may wait at a time: for the greeting (client.GREETING seconds at most) or, then, for a worker."""

IMPORTED = (
    *(f"calicoctl.commands.{name}" for name in sorted(client.COMMANDS)),
    *("calicoctl.datastore.etcd2", "calicoctl.datastore.etcd3", "calicoctl.datastore.ipam"),
    *("calicoctl.workloads.wiring", "calicoctl.workloads.host_network", "calicoctl.workloads.servers"),
    *("calicoctl.plugins.cni", "docker.api.client", "docker.utils", "netaddr.ip", "uuid"),
)
"""Modules that commands import when they need them, and that the server imports when it starts."""


class Server:
    """Greets clients that suit (see Fit), and passes them on to workers, in the order in which they were greeted."""

    def __init__(self, host: str, lifeline: int | None, program: ProgramFiles) -> None:
        """`host` is the name of this host. The server ends when the file descriptor `lifeline` reaches its end.

        If `lifeline` is None, only signals end the server. `program` was created before the program was imported.
        Raises CalicoError for invalid settings, and OSError.
        """
        self._lifeline = lifeline
        self._files = program
        self._fit = Fit(host)
        self._new: set[socket.socket] = set()
        """The connections to clients that have not been greeted."""
        self._queue: deque[tuple[float, socket.socket]] = deque()
        """The connections to greeted clients that wait for a worker, each with the time (monotonic) of its greeting."""
        self._workers: dict[socket.socket, bool] = {}
        """The connection to each worker -> whether it waits for a client."""
        self._starting: set[socket.socket] = set()
        """The connections to the workers that have said nothing yet."""
        self._progress = 0.0
        """When a worker was ready for a client last (monotonic)."""
        self._ends = False
        """Whether no more clients are greeted."""
        self._is_told = False
        """Whether a signal has told this server to end."""
        self._outdated = False
        self._path = files.RUN / host / client.SOCKET
        self._listening = self._listen()
        self._inode = self._path.stat().st_ino

    def run(self) -> bool:
        """Serve until SIGTERM, SIGINT, the end of the lifeline, or a change of the program's files.

        Clients that have been greeted by then are still served. Returns whether the new program is to be run: the files
        have changed, and neither a signal nor the end of the lifeline has told this server to end, then or later.
        Raises OSError, and CalicoError if a new worker cannot serve.
        """
        gc.freeze()  # a collection would copy the memory that the workers share
        wake, signalled = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(signalled)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # which writes to `signalled`
        lifeline = [] if self._lifeline is None else [self._lifeline]
        while not (self._ends or self._outdated):
            listening = [self._listening] if self._accepts_more() else []
            ready = self._step([wake, *listening, *lifeline, *self._new])
            if wake in ready:
                os.read(wake, 100)
            if self._listening in ready:
                self._accept()
            clients = [connection for connection in self._new if connection in ready]
            if clients:
                self._outdated = self._files.are_replaced()
                for connection in clients:
                    self._greet(connection)
            self._ends = self._ends or self._lifeline in ready
        with suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:  # not the next server's
                self._path.unlink()
                # `node remove` has left the folder if this server was there much longer than the agent
                process.remove_directory(self._path.parent.name)
        self._ends = True
        for connection in (self._listening, *self._new):
            connection.close()
        while self._queue or not all(self._workers.values()):
            self._step([])
        self._dismiss(0)
        while self._workers:
            self._step([])
        _bury()
        return self._outdated and not (self._is_told or self._is_without_agent())

    def _is_without_agent(self) -> bool:
        """Return whether the lifeline has reached its end. The next agent has a server of its own."""
        return self._lifeline is not None and bool(select.select([self._lifeline], [], [], 0)[0])

    def _step(self, sources: list[int | socket.socket]) -> list[int | socket.socket]:
        """Pass clients on, fork a worker if it is time, and wait; return those of `sources` that can be read.

        The wait ends when one of `sources` or a worker can be read, or when another worker is to be forked. Then the
        workers that have ended are reaped.
        """
        self._pass_on()
        more_at = self._more_at()
        if more_at is not None and more_at <= time.monotonic():
            try:
                self._fork()
            except OSError:  # too many processes or file descriptors
                if not self._workers:
                    raise
            more_at = None
        patience = None if more_at is None else max(0.0, more_at - time.monotonic())
        ready = select.select([*sources, *self._workers], [], [], patience)[0]
        for one in ready:
            if one in self._workers:
                self._hear(one)
        _bury()  # at any event: a worker of the program that this one replaced may have ended without a signal to it
        return [one for one in ready if one in sources]

    def _pass_on(self) -> None:
        """Pass waiting clients on to waiting workers; then let all but SPARE of the waiting workers end."""
        waiting = [worker for worker, waits in self._workers.items() if waits]
        while self._queue and waiting:
            worker = waiting.pop()
            self._workers[worker] = False
            with suppress(OSError):  # the worker was killed, as `_hear` will find
                socket.send_fds(worker, [b"C"], [self._queue[0][1].fileno()])
                self._queue.popleft()[1].close()
        self._dismiss(SPARE)

    def _more_at(self) -> float | None:
        """Return when another worker is to be forked (monotonic; -inf: now); None if no more are needed, or allowed."""
        if self._starting or any(self._workers.values()) or len(self._workers) >= MOST:
            return None
        if len(self._workers) < SPARE and not self._ends:
            return -math.inf
        return max(self._queue[0][0], self._progress) + PATIENCE if self._queue else None

    def _dismiss(self, most: int) -> None:
        """Let all but `most` of the waiting workers end."""
        waiting = [worker for worker, waits in self._workers.items() if waits]
        for worker in waiting[most:]:
            self._workers[worker] = False
            with suppress(OSError):  # it was killed
                worker.shutdown(socket.SHUT_WR)

    def _accepts_more(self) -> bool:
        """Return whether a further client may be accepted: each takes a file descriptor, and `select` has a limit."""
        return len(self._new) + len(self._queue) < BACKLOG

    def _accept(self) -> None:
        try:
            while self._accepts_more():
                connection = self._listening.accept()[0]
                connection.setblocking(False)
                self._new.add(connection)
        except BlockingIOError:  # no more
            pass
        except OSError:  # no file descriptor is free; until one is, `select` would return at once, again and again
            time.sleep(SHORTAGE)

    def _greet(self, connection: socket.socket) -> None:
        """Greet a client, and let it wait for a worker; close the connection if it cannot be served.

        That is so if it does not suit, if all of MOST workers are busy, or if the program's files have changed.
        """
        self._new.discard(connection)
        with suppress(OSError):  # it has ended
            is_full = len(self._workers) >= MOST and not any(self._workers.values())
            hello = Hello(connection.recv(client.LARGEST, socket.MSG_PEEK))  # which the worker reads, too
            if not (self._outdated or is_full) and self._fit.suits(connection, hello):
                connection.send(b"welcome")
                self._queue.append((time.monotonic(), connection))
                return
        connection.close()

    def _listen(self) -> socket.socket:
        """Create the socket, which only root may use. One of a former server is replaced."""
        return sockets.listen(self._path, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK, BACKLOG)

    def _fork(self) -> None:
        ours, theirs = socket.socketpair()
        if os.fork() == 0:
            self._work(ours, theirs)
        theirs.close()
        self._workers[ours] = False
        self._starting.add(ours)

    def _work(self, ours: socket.socket, theirs: socket.socket) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            clients = (connection for _, connection in self._queue)
            for connection in (ours, self._listening, *self._workers, *self._new, *clients):
                connection.close()
            Worker(theirs).serve()
            status = 0
        finally:
            os._exit(status)

    def _hear(self, worker: socket.socket) -> None:
        """Receive that a worker waits for a client, or that it has ended, and note this.

        Raises CalicoError if the worker has ended before it could serve, since the next one would, too.
        """
        try:
            said = worker.recv(100)
        except OSError:  # it was killed
            said = b""
        if not said and worker in self._starting and not self._ends:
            raise CalicoError("A worker of the command server has ended before it could serve")
        self._starting.discard(worker)
        if said:
            self._workers[worker] = True
            self._progress = time.monotonic()
        else:
            worker.close()
            del self._workers[worker]

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._ends = self._is_told = True


def _bury() -> None:
    """Reap the workers that have ended, so that no zombies are left."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main() -> None:
    """Serve until `Server.run` returns; then return, or run the new program if the program's files have changed.

    Raises CalicoError or OSError if the server cannot serve.
    """
    program = ProgramFiles()  # before the imports: a file that is replaced meanwhile makes it outdated
    environment.complete()
    lifeline = None
    if len(sys.argv) > 1:  # see felix/command_server.py
        os.environ["HOSTNAME"] = sys.argv[1].partition("=")[2]
        lifeline = os.dup(0)
    for name in IMPORTED:
        importlib.import_module(name)
    if Server(hostname(), lifeline, program).run():
        os.execv(sys.executable, [sys.executable, "-I", "-m", MODULE, *sys.argv[1:]])  # noqa: S606


if __name__ == "__main__":
    try:
        main()
    except (CalicoError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(1)
