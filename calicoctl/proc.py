"""Reads facts about processes from /proc: start time, state, arguments and sockets. Also waits for a process to end.

The kernel reuses process ids. Only the id and the start time together identify a process.
"""

from __future__ import annotations

import os
import select
from contextlib import suppress
from pathlib import Path

START_TIME, STATE = 19, 0
"""Indices of fields in /proc/PID/stat, counted from 0 at the field after the command's name. Source: proc(5)."""


def start_time(process: Path) -> str:
    """Return the start time of a process or thread: clock ticks since boot, as decimal text.

    `process` is its directory, /proc/PID or /proc/PID/task/TID. Raises OSError if the directory does not exist.
    """
    return _stat(process)[START_TIME]


def running_since(pid: int) -> str | None:
    """Return the start time of a process (see `start_time`); None if the process has ended, or is a zombie."""
    try:
        fields = _stat(Path(f"/proc/{pid}"))
    except OSError:
        return None
    return None if fields[STATE] in "ZX" else fields[START_TIME]


def is_suspended(pid: int) -> bool:
    """Return whether a process is stopped by a signal, such as SIGSTOP, or by a debugger; False if it has ended."""
    try:
        return _stat(Path(f"/proc/{pid}"))[STATE] in "Tt"
    except OSError:
        return False


def _stat(process: Path) -> list[str]:
    # the command's name, in parentheses, may contain any character
    return (process / "stat").read_text(errors="replace").rpartition(")")[2].split()


def arguments(pid: int) -> list[str]:
    """Return the command line of a process, empty for a zombie. Raises OSError if the process does not exist."""
    return strings(pid, "cmdline")


def strings(pid: int, name: str) -> list[str]:
    """Return the zero-terminated strings in the file /proc/PID/`name`. Raises OSError."""
    return [os.fsdecode(part) for part in Path(f"/proc/{pid}/{name}").read_bytes().split(b"\0")[:-1]]


def sockets(pid: int) -> set[str]:
    """Return the inodes of a process's sockets as decimal texts; an empty set if they cannot be read."""
    found = set()
    with suppress(OSError):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                target = str(fd.readlink())
                if target.startswith("socket:["):
                    found.add(target[8:-1])
    return found


def udp_holder(port: int) -> str | None:
    """Describe a process that holds a UDP port of this network namespace; return None if no process holds it.

    If the process cannot be found, for example because it is in another PID namespace, only its user id is included.
    Source: proc_pid_net(5).
    """
    users = {}
    for name in ("udp", "udp6"):
        with suppress(OSError), open(f"/proc/self/net/{name}") as table:
            for words in map(str.split, table):
                if len(words) > 9 and words[1].endswith(f":{port:04X}"):
                    users[words[9]] = words[7]
    if not users:
        return None
    for process in Path("/proc").glob("[0-9]*"):
        held = users.keys() & sockets(int(process.name))
        if held:
            with suppress(OSError):
                command = (process / "comm").read_text(errors="replace").rstrip("\n")
                return f"process {process.name} ({command!a}) of user {users[held.pop()]}"
    return f"a process of user {next(iter(users.values()))}"


def await_end(pid: int, seconds: float | None = None) -> bool:
    """Wait until a process, with all its threads, has ended, and return True.

    Returns False if it has not ended after `seconds`; with None, there is no time limit.
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
