"""A worker of the command server: runs the commands of clients (command_client.py), one at a time.

While it runs a command, its environment, umask, working directory and standard streams are those of the client, and the
client's signals and end are handled as if they were its own. It serves only clients of root that have the same program,
namespaces, rights and settings as this process, so that the command does what it would do in the client's own process.
"""

from __future__ import annotations

import fcntl
import gc
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType

from calicoctl import environment, programs
from calicoctl.cli import command_client as client
from calicoctl.cli import main
from calicoctl.datastore import backends
from calicoctl.datastore.settings import EtcdSettings
from calicoctl.environment import DOCKER_TLS
from calicoctl.errors import CalicoError

IDLE, BUSY, OUTDATED = b"I", b"B", b"O"
"""What a worker tells the server: it waits for a client; it serves one; the program's files have changed."""

MOST = 1000
"""How many clients a worker serves. Then the server forks another: whatever a command leaves in memory goes with it."""

_NAMESPACES = ("mnt", "net", "pid", "user", "uts", "ipc", "cgroup")

_RIGHTS = ("Uid:", "Gid:", "CapPrm:", "CapEff:", "CapBnd:", "NoNewPrivs:", "Seccomp:")
"""The names of lines in /proc/PID/status. Root's groups give it no rights. Source: proc_pid_status(5)."""


def fingerprint() -> int:
    """Return a number that changes when a file of the program, or the folder of a library, is replaced."""
    found = []
    folders = [client.package()]
    for folder in folders:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False) and entry.name != "__pycache__":
                    folders.append(entry.path)
                elif entry.name.endswith(".py"):
                    status = entry.stat()
                    found.append((entry.path, status.st_mtime_ns, status.st_size))
    for folder in sys.path:
        with suppress(OSError):
            found.append((folder, os.stat(folder).st_mtime_ns, 0))
    return hash(tuple(sorted(found)))


class Worker:
    """Serves clients at a listening socket, one after another."""

    def __init__(self, listening: socket.socket, server: socket.socket, host: str, files: int) -> None:
        """`server` is the connection to the server. `files` was the `fingerprint` before the program was imported."""
        self._listening = listening
        self._server = server
        self._host = host
        self._files = files
        self._environment = dict(os.environ)
        self._settings = EtcdSettings.from_environment()
        self._surroundings = _surroundings(os.getpid())
        self._threshold = gc.get_threshold()
        self._null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._client: socket.socket | None = None
        """The connection to the client whose command runs."""
        self._interrupted = False

    def serve(self) -> None:
        """Serve clients; return when the server has ended, after MOST clients, or after an interrupted command.

        That may have been interrupted between the opening of a file and the note of its descriptor, such as that of a
        lock, which only the end of the process closes then.
        """
        signal.signal(signal.SIGIO, self._on_input)
        self._reset()
        for _ in range(MOST):
            self._server.send(IDLE)
            connection = self._next()
            if connection is None:
                return
            self._server.send(BUSY)
            with connection, suppress(OSError):  # the client has ended
                self._serve(connection)
            if self._interrupted:
                return

    def _next(self) -> socket.socket | None:
        """Wait for a client; return the connection to it, None if the server has ended."""
        while True:
            ready, _, _ = select.select([self._listening, self._server], [], [])
            if self._server in ready:
                return None
            with suppress(BlockingIOError):  # another worker was faster
                return self._listening.accept()[0]

    def _serve(self, connection: socket.socket) -> None:
        """Greet a client if it fits, and run its command. Raises OSError if the client has ended."""
        connection.settimeout(client.GREETING)
        package, *rest = connection.recv(client.LARGEST).split(client.SEPARATOR)
        if os.fsdecode(package) != client.package() or not rest:
            return
        program, *variables = rest
        theirs = dict(variable.partition(b"=")[::2] for variable in variables)
        is_cni = program == client.CNI.encode()
        if not self._fits(connection, theirs, is_cni):
            return
        if fingerprint() != self._files:
            self._server.send(OUTDATED)
            return
        connection.send(b"%d" % os.getpid())
        connection.settimeout(None)
        words, descriptors, _, _ = socket.recv_fds(connection, client.LARGEST, 4)
        if not words:
            return
        umask, errors, *arguments = words.split(client.SEPARATOR)
        try:
            self._become(theirs, int(umask, 8), errors.decode(), descriptors)
            self._client = connection
            fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(connection, fcntl.F_SETFL, os.O_ASYNC)  # SIGIO tells of the client's signals, and of its end
            self._on_input()
            if is_cni:
                status = _plugin()
            else:
                status = main.run(list(map(os.fsdecode, arguments)), f"in process {os.getpid()}, of the command server")
        except main.Interrupted as interrupted:  # before the command began, or after it was done
            interrupted.handled = True
            status = 128 + interrupted.number
        finally:
            self._client = None
            self._reset()
        answer(connection, status)

    def _fits(self, connection: socket.socket, theirs: Mapping[bytes, bytes], is_cni: bool) -> bool:
        """Return whether a client with the environment `theirs` may be served. Raises OSError if it has ended.

        `is_cni` says that it is the CNI plugin, for which the settings file comes first.
        """
        pid, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user != 0 or _surroundings(pid) != self._surroundings:
            return False
        if b"" in theirs:  # nobody can set it
            return False
        variables = {os.fsdecode(name): os.fsdecode(value) for name, value in theirs.items()}
        if not (variables.get(environment.PATH_VARIABLE) or "/").startswith("/"):
            return False
        try:
            environment.complete(variables, file_first=is_cni)
            if EtcdSettings.from_environment(variables) != self._settings:
                return False
        except CalicoError:
            return False
        names = ("DOCKER_HOST", *DOCKER_TLS)
        if any((variables.get(name) or "") != (self._environment.get(name) or "") for name in names):
            return False
        return (variables.get("HOSTNAME") or socket.gethostname()) == self._host

    def _become(self, theirs: Mapping[bytes, bytes], umask: int, errors: str, descriptors: list[int]) -> None:
        """Take over a client's environment and umask, and, from `descriptors`, its streams and working directory.

        `errors` is the error handler of its standard input.
        """
        os.environ.clear()
        os.environb.update(theirs)
        programs.look_in_system_folders()
        backends.check_choices()
        time.tzset()
        os.umask(umask)
        *streams, here = descriptors
        os.fchdir(here)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        for descriptor in descriptors:
            os.close(descriptor)
        _open_streams(errors)

    def _reset(self) -> None:
        """Undo `_become`, and what a command may have changed in this process."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in client.SIGNALS:
            signal.signal(number, _ignore)
        for number in range(3):
            os.dup2(self._null, number)
        _open_streams("strict")
        os.chdir("/")
        os.umask(0o077)
        os.environ.clear()
        os.environ.update(self._environment)
        gc.set_threshold(*self._threshold)

    def _on_input(self, number: int = 0, frame: FrameType | None = None) -> None:
        """Take the first signal that the client has received, or its end, which counts as SIGHUP.

        The others are ignored: the rollback must not be interrupted.
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


def answer(connection: socket.socket, status: int) -> None:
    """Send the exit status of its command to a client. Raises OSError if the client has ended.

    Signals of the client that nobody has taken are taken here: for any that is left when the connection is closed, the
    kernel reports a reset to the client, in place of the status.
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


def _open_streams(errors: str) -> None:
    sys.stdin = open(0, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


def _ignore(number: int, frame: FrameType | None) -> None:
    """Handle a signal for this process itself: the server tells when it is to end.

    Programs that a command runs do not inherit a handler, unlike SIG_IGN.
    """


def _surroundings(pid: int) -> tuple[object, ...]:
    """Return what a process sees and may do: its namespaces, its root, and its rights. Raises OSError."""
    process = Path(f"/proc/{pid}")
    root = (process / "root").stat()
    rights = [line for line in (process / "status").read_text().splitlines() if line.startswith(_RIGHTS)]
    return (*((process / "ns" / name).readlink() for name in _NAMESPACES), root.st_dev, root.st_ino, *rights)
