"""Stores, in files, which workloads are connected on this host. The agent creates interfaces only for these workloads.

A connected workload has a file /var/lib/calico/HOST/workloads/ORCHESTRATOR/ID (see file_name). The file is removed when
the workload is disconnected or no longer exists. It survives reboots, and the loss of etcd's data. A namespace's file
contains the namespace's path. If the path leads through a process, as /proc/PID/ns/net does, the file also contains the
id of the boot and the process's start time. A container's file is empty.

The empty file ORCHESTRATOR.learned, beside the directory ORCHESTRATOR, says that learning.py has already searched for
the workloads of this orchestrator that an older version of this program had connected.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from calicoctl import state

ORCHESTRATORS = ("docker", "namespace")
"""The orchestrators whose workloads this program connects."""

_FOLDER = "workloads"
_LEARNED = "learned"
# Source: random(4)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_ANOTHER_BOOT = "in another boot"


@dataclass(frozen=True)
class Connected:
    """The content of a connected workload's file. `path` is the namespace's path, empty for a container.

    `started` is what process_started returned for the path when the file was written: the start time of the process
    that the path leads through, or None if it leads through no process. If a start time was written before the last
    reboot, `started` is a text that process_started never returns.
    """

    path: str = ""
    started: str | None = None


def get(host: str, orchestrator: str, id: str) -> Connected | None:
    """Return the content of a connected workload's file; None if the workload is not connected on the host.

    `id` is the workload's id. For an orchestrator that is not in ORCHESTRATORS, None is returned. Raises CalicoError if
    the file cannot be read.
    """
    if orchestrator not in ORCHESTRATORS:
        return None
    content = state.read(host, _FOLDER, orchestrator, file_name(id))
    return None if content is None else _parsed(content)


def put(host: str, orchestrator: str, id: str, path: str = "", started: str | None = None) -> None:
    """Write a workload's file: from then on, the workload counts as connected. Raises CalicoError.

    For `path` and `started`, see Connected.
    """
    parts = [path, _boot(), started] if started else [path]
    content = os.fsencode("\0".join(parts))
    state.write(host, _FOLDER, orchestrator, file_name(id), content=content)


def forget(host: str, orchestrator: str, id: str) -> None:
    """Remove a workload's file, if any: from then on, the workload does not count as connected. Raises CalicoError."""
    if orchestrator in ORCHESTRATORS:
        state.remove(host, _FOLDER, orchestrator, file_name(id))


def every(host: str, orchestrator: str) -> dict[str, Connected]:
    """Return the contents of the files of an orchestrator's connected workloads, by the workloads' ids.

    Raises CalicoError.
    """
    contents = state.read_all(host, _FOLDER, orchestrator)
    found = {name: _parsed(content) for name, content in contents.items()}
    return {id_of(name, known.path): known for name, known in found.items()}


def is_learned(host: str, orchestrator: str) -> bool:
    """Return whether the file ORCHESTRATOR.learned exists. Raises CalicoError."""
    return state.read(host, _FOLDER, f"{orchestrator}.{_LEARNED}") is not None


def set_learned(host: str, *orchestrators: str) -> None:
    """Create the file ORCHESTRATOR.learned for each of `orchestrators`, or for all if none is given.

    Raises CalicoError.
    """
    for orchestrator in orchestrators or ORCHESTRATORS:
        state.write(host, _FOLDER, f"{orchestrator}.{_LEARNED}", content=b"")


def forget_all(host: str) -> None:
    """Remove the files of all workloads of a host, but not the files ORCHESTRATOR.learned. Raises CalicoError."""
    # ORCHESTRATOR.learned stays: without it, learning.py would search again, and trust endpoints that others can write
    for orchestrator in ORCHESTRATORS:
        for name in state.read_all(host, _FOLDER, orchestrator):
            state.remove(host, _FOLDER, orchestrator, name)
        state.remove_empty(host, _FOLDER, orchestrator)


def file_name(id: str) -> str:
    """Return the name of the file of the workload with this id: the id, or the id's SHA-256 as hexadecimal digits.

    The SHA-256 is used if the id is longer than 190 bytes, begins with a dot, or contains a slash or a NUL.
    """
    if len(os.fsencode(id)) <= 190 and not id.startswith(".") and not set(id) & {"/", "\0"}:
        return id
    return hashlib.sha256(os.fsencode(id)).hexdigest()


def id_of(name: str, path: str) -> str:
    """Return the id of the workload whose file has this name: the reverse of file_name.

    `path` is the namespace's path, empty for a container. A namespace's id is its path with each slash replaced by a
    dash, so it begins with a dash. If a namespace's file name does not, it is the SHA-256 of the id, and the id is
    computed from `path`. A container's file name is always its id.
    """
    return path.replace("/", "-") if path and not name.startswith("-") else name


def _parsed(content: bytes) -> Connected:
    path, *process = os.fsdecode(content).split("\0")
    if len(process) != 2:
        return Connected(path)
    boot, started = process
    return Connected(path, started if boot == _boot() else _ANOTHER_BOOT)


def _boot() -> str:
    with suppress(OSError):
        return _BOOT_ID.read_text().strip()
    return ""
