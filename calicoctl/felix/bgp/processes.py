"""Finds the BIRD processes of this network namespace, and determines which of them an agent has started.

Every user can start a process with the name `bird` and with any arguments. So a process counts as a BIRD only if it has
the right to change the routes of this network namespace. A BIRD is ours only if it also runs as root or as the user
`bird`, and if its arguments name the folder of a host that exists and belongs to root. Any other BIRD is foreign.
"""

from __future__ import annotations

import os
import pwd
import re
import stat
from contextlib import suppress
from pathlib import Path

from calicoctl import proc
from calicoctl.datastore.hosts import check_hostname
from calicoctl.errors import CalicoError
from calicoctl.workloads.locks import DIRECTORY

USER = "bird"

ROOT = 0
"""The user ID of root, who owns a host's folder below /run/calico."""

_PROGRAMS = ("bird", "bird6")
_CAP_NET_ADMIN = 12
"""The number of the capability. Source: linux/capability.h."""


def birds() -> dict[int, str]:
    """Return, for each BIRD of this network namespace, its process ID and the host whose agent has started it.

    The host is "" if the BIRD is foreign.
    """
    found, users = {}, _users()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, ValueError):  # it has ended meanwhile
                if is_bird(entry) and proc.running_since(int(entry.name)) is not None:
                    trusted = users >= set(_status(entry, "Uid"))
                    found[int(entry.name)] = host_of(proc.arguments(int(entry.name))) if trusted else ""
    return found


def is_bird(process: Path) -> bool:
    """Return whether a process is a BIRD that may change routes in this network namespace.

    `process` is the directory /proc/PID. Raises OSError or ValueError if its files cannot be read, for example because
    the process has ended.
    """
    # through a link, every user can start a setuid program, such as su, under the name `bird`, and its process has all
    # capabilities; so the program's file must have BIRD's name as well, and must not be setuid. If the package is
    # upgraded while BIRD runs, the target of /proc/PID/exe is still a file of that name
    return (
        (process / "comm").read_text().strip() in _PROGRAMS
        and (process / "exe").readlink().name.startswith(_PROGRAMS)
        and not (process / "exe").stat().st_mode & stat.S_ISUID
        and _is_in_our(process, "net")
        # in a user namespace of its own, a process may have all capabilities, but not over this network namespace
        and _is_in_our(process, "user")
        and bool(int(_status(process, "CapEff")[0], 16) & 1 << _CAP_NET_ADMIN)
    )


def host_of(arguments: list[str]) -> str:
    """Return the name of the host whose agent starts BIRD with these arguments.

    Return "" if the arguments name no host's folder, or if there is no such folder that belongs to root.
    """
    for option, path in zip(arguments, arguments[1:]):
        match = re.fullmatch(f"{re.escape(str(DIRECTORY))}/([^/]+)/bird/conf", path)
        if option == "-c" and match is not None:
            with suppress(CalicoError, OSError):
                found = os.lstat(DIRECTORY / check_hostname(match[1]))
                return match[1] if stat.S_ISDIR(found.st_mode) and found.st_uid == ROOT else ""
    return ""


def _users() -> set[str]:
    """Return the IDs (decimal text) of the users that BIRD may run as: root and, if it exists, the user `bird`."""
    users = {str(ROOT)}
    with suppress(KeyError):
        users.add(str(pwd.getpwnam(USER).pw_uid))
    return users


def _is_in_our(process: Path, kind: str) -> bool:
    """Return whether a process is in the same namespace as this process. `kind` is "net" or "user"."""
    return (process / "ns" / kind).stat().st_ino == os.stat(f"/proc/self/ns/{kind}").st_ino


def _status(process: Path, field: str) -> list[str]:
    """Return the words of a field of /proc/PID/status. Raise OSError or, if there is no such field, ValueError."""
    for line in (process / "status").read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return value.split()
    raise ValueError(f"{process} has no {field}")
