"""Reads facts about processes from /proc: start time, state, arguments and sockets. Also waits for a
process to end, and says when this one is ready.

The kernel reuses process ids. Only the id and the start time together identify a process.
"""

from __future__ import annotations

import itertools
import os
import select
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from calicoctl.sockets import connect, peer

START_TIME, STATE = 19, 0
"""Indices of fields in /proc/PID/stat, counted from 0 at the field after the command's name. Source: proc(5)."""

_ACCEPTS = 0x10000
"""The flag of Unix sockets that listen: __SO_ACCEPTCON. Source: the kernel's include/uapi/linux/net.h."""

MOST_FILES = 5_000
"""How many open files `port_holder` looks at, which takes 0.2 s. A user may have millions, which would take minutes."""


def start_time(process: Path) -> str:
    """Return the start time of a process or thread: clock ticks since boot, as decimal text.

    `process` is its directory, /proc/PID or /proc/PID/task/TID. Raises OSError if the directory does not exist.
    """
    return _stat(process)[START_TIME]


def running_since(pid: int) -> str | None:
    """Return the start time of a process (see `start_time`); None if it has ended, even if it is still a zombie."""
    try:
        fields = _stat(Path(f"/proc/{pid}"))
    except OSError:
        return None
    return None if fields[STATE] in "ZX" else fields[START_TIME]


def is_suspended(pid: int) -> bool:
    """Return whether a signal, such as SIGSTOP, or a debugger has stopped a process; False if the process has ended."""
    try:
        return _stat(Path(f"/proc/{pid}"))[STATE] in "Tt"
    except OSError:
        return False


def _stat(process: Path) -> list[str]:
    # the command's name, in parentheses, may contain any character
    return (process / "stat").read_text(errors="replace").rpartition(")")[2].split()


def arguments(pid: int) -> list[str]:
    """Return the words of a process's command line, none for a zombie. Raises OSError if the process does not exist."""
    return strings(pid, "cmdline")


def strings(pid: int, name: str) -> list[str]:
    """Return the zero-terminated strings in a process's file /proc/PID/`name`, such as `environ`. Raises OSError."""
    return [os.fsdecode(part) for part in Path(f"/proc/{pid}/{name}").read_bytes().split(b"\0")[:-1]]


def sockets(pid: int) -> set[str]:
    """Return the inode numbers of a process's open sockets, as decimal text; an empty set if they cannot be read."""
    links = _open_files(Path(f"/proc/{pid}"))
    return {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}


def _open_files(process: Path) -> Iterator[str]:
    """Yield where the links in /proc/PID/fd lead, "" for a link that cannot be read. `process` is /proc/PID.

    Nothing is yielded if the directory cannot be read.
    """
    with suppress(OSError), os.scandir(process / "fd") as files:
        for file in files:
            link = ""
            with suppress(OSError):
                link = str(Path(file.path).readlink())
            yield link


def is_listened_at(path: Path) -> bool:
    """Return whether a process in this network namespace listens at a Unix socket that was created at `path`.

    The socket's file may have been renamed, removed or replaced since then. Source: proc_pid_net(5).
    """
    with suppress(OSError), open("/proc/self/net/unix", errors="replace") as table:
        next(table, None)  # the titles
        for words in map(str.split, table):
            if len(words) > 7 and int(words[3], 16) & _ACCEPTS and words[7] == str(path):
                return True
    return False


def listener(path: str) -> int:
    """Return the id of the process that listens at a Unix socket; for a socket of systemd's, that is systemd.

    Raises OSError if nothing accepts connections there.
    """
    with connect(Path(path), socket.SOCK_STREAM) as probe:
        return peer(probe)[0]


def notify_ready() -> None:
    """Notify systemd, or the command that started this process, that this process is ready. See sd_notify(3)."""
    import sdnotify

    sdnotify.SystemdNotifier().notify("READY=1")


def port_holder(protocol: str, port: int) -> str | None:
    """Return a description of a process that has bound a port in this process's network namespace.

    `protocol` is "udp" or "tcp". The description contains the process's id, its command and the user id. It contains
    only the user id if the process cannot be found, for example because it is in another PID namespace, or the user has
    more than MOST_FILES open files. Returns None if no process has bound the port. Source: proc_pid_net(5).
    """
    users = {}
    for name in (protocol, f"{protocol}6"):
        with suppress(OSError), open(f"/proc/self/net/{name}") as table:
            for words in map(str.split, table):
                # a connection that is closed has no inode
                if len(words) > 9 and words[1].endswith(f":{port:04X}") and words[9] != "0":
                    users[f"socket:[{words[9]}]"] = words[7]
    if not users:
        return None
    processes = sorted(Path("/proc").glob("[0-9]*"), key=lambda process: _owner(process) not in users.values())
    links = ((process, link) for process in processes for link in _open_files(process))
    for process, link in itertools.islice(links, MOST_FILES):
        if link in users:
            with suppress(OSError):
                command = (process / "comm").read_text(errors="replace").rstrip("\n")
                return f"process {process.name} ({command!a}) of user {users[link]}"
    return f"a process of user {next(iter(users.values()))}"


def _owner(process: Path) -> str | None:
    """Return the user id of a process, as decimal text; None if it has ended."""
    with suppress(OSError):
        return str(process.stat().st_uid)
    return None


def await_end(pid: int, seconds: float | None = None) -> bool:
    """Wait until a process and all its threads have ended; return True then.

    Returns False if the process has not ended after `seconds`. If `seconds` is None, the wait has no limit.
    """
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(None if seconds is None else seconds * 1000))
    finally:
        os.close(fd)
