"""Decides which clients a command server serves: those whose commands would do the same in their own processes.

They are root's, and have the same program, namespaces, root directory, rights and settings as the server.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from contextlib import suppress
from typing import Optional

from calicoctl import environment, sockets
from calicoctl.cli import command_client as client
from calicoctl.datastore.settings import EtcdSettings
from calicoctl.errors import CalicoError

_NAMESPACES = ("mnt", "net", "pid", "user", "uts", "ipc", "cgroup")

_RIGHTS = ("Uid:", "Gid:", "CapPrm:", "CapEff:", "CapBnd:", "NoNewPrivs:", "Seccomp:")
"""The lines of /proc/PID/status that are compared. Supplementary groups, which give root no rights, are not compared.
Source: proc_pid_status(5)."""


_Status = Optional[tuple[int, int]]
"""When a file or folder was changed, in nanoseconds, and its size in bytes; None if it is missing."""


TICK = 10**8
"""Nanoseconds within which a folder may change twice without getting another time of change: for that, filesystems use
a clock of the kernel that advances every 10 ms or less."""


class Hello:
    """The first message of a client: the folder of its program, which program it is, and its environment."""

    def __init__(self, message: bytes) -> None:
        self.package, *rest = message.split(client.SEPARATOR)
        program, *variables = rest or [b""]
        self.is_cni = program == client.CNI.encode()
        self.variables = dict(variable.partition(b"=")[::2] for variable in variables)


class ProgramFiles:
    """The files of the program, and the folders of libraries, as they were when this object was created."""

    def __init__(self) -> None:
        self._folders: dict[str, _Status] = {}
        """The folders of the program. Their status also changes with files that are none of the program's."""
        self._files: dict[str, _Status] = {}
        """The files of the program, and the folders of libraries."""
        self._package = ""
        self._read()

    def are_replaced(self) -> bool:
        """Return whether a file of the program was changed, added or removed, or a folder of libraries changed.

        A file that is removed meanwhile counts as missing, as does a link that leads nowhere, such as an editor's lock.
        """
        known = (self._folders, self._files)
        if _package() == self._package and all(
            _status(path) == status for one in known for path, status in one.items()
        ):
            return False
        before = self._package, self._folders, self._files
        self._read()
        if self._files == before[2]:
            return False
        self._package, self._folders, self._files = before
        return True

    def _read(self) -> None:
        self._folders, self._files = {}, {folder: _status(folder) for folder in sys.path}
        self._package = _package()
        folders = [self._package]
        for folder in folders:
            self._folders[folder] = _settled(folder)  # before its files: one that is added meanwhile changes it
            with suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False) and entry.name != "__pycache__":
                        folders.append(entry.path)
                    elif entry.name.endswith(".py") and (status := _status(entry.path)) is not None:
                        self._files[entry.path] = status


def _package() -> str:
    """Return the folder of the program, empty if it is gone."""
    try:
        return client.package()
    except OSError:
        return ""


def _settled(folder: str) -> _Status:
    """Return the status of a folder, None if a further change might not change it, since the last was a moment ago."""
    status = _status(folder)
    return None if status is None or abs(time.time_ns() - status[0]) < TICK else status


def _status(path: str) -> _Status:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


class Fit:
    """What the clients of this process must have in common with it."""

    def __init__(self, host: str) -> None:
        """`host` is the name of this host. Raises CalicoError for invalid settings, and OSError."""
        self._host = host
        self._engine = environment.engine_of(os.environ)
        self._settings = EtcdSettings.from_environment()
        self._surroundings = _surroundings(os.getpid())

    def suits(self, connection: socket.socket, hello: Hello) -> bool:
        """Return whether a client may be served. Raises OSError if it has ended."""
        pid, user = sockets.peer(connection)
        if user != 0 or os.fsdecode(hello.package) != client.package() or _surroundings(pid) != self._surroundings:
            return False
        if b"" in hello.variables:  # nobody can set it
            return False
        variables = {os.fsdecode(name): os.fsdecode(value) for name, value in hello.variables.items()}
        if not (variables.get(environment.PATH_VARIABLE) or "/").startswith("/"):
            return False
        try:
            environment.complete(variables, file_first=hello.is_cni)
            if EtcdSettings.from_environment(variables) != self._settings:
                return False
        except CalicoError:
            return False
        if environment.engine_of(variables) != self._engine:
            return False
        return (variables.get("HOSTNAME") or socket.gethostname()) == self._host


def _surroundings(pid: int) -> tuple[object, ...]:
    """Return what a process sees and may do: its namespaces, its root, and its rights. Raises OSError."""
    root = os.stat(f"/proc/{pid}/root")
    with open(f"/proc/{pid}/status") as status:
        rights = [line for line in status if line.startswith(_RIGHTS)]
    return (*(os.readlink(f"/proc/{pid}/ns/{name}") for name in _NAMESPACES), root.st_dev, root.st_ino, *rights)
