"""Stores, in files, which workloads are connected on this host. The agent creates interfaces only for these workloads.

A connected workload has a file /var/lib/calico/HOST/workloads/ORCHESTRATOR/ID (see file_name). The file is removed when
the workload is disconnected or no longer exists. It survives reboots, and the loss of etcd's data. A namespace's file
contains the namespace's path. If the path leads through a process, as /proc/PID/ns/net does, the file also contains the
id of the boot and the process's start time. A Docker container's file is empty, or says that the container has labels
that ask for a connection (labels.py). The file of a container that was attached through CNI contains the path of its
namespace, the id of the boot, what identifies the namespace (Connected.started), the name of the CNI network, and the
name of the interface.

The file docker.disconnected/ID says that a command has disconnected a container that has labels (labels.py), and
contains when the container had been started (`State.StartedAt` of the Docker Engine), or "until" and the time of the
command if the engine did not answer. Until the container is started again, its labels do not connect it. The file is
removed when the container no longer exists.

The file ORCHESTRATOR.learned, beside the directory ORCHESTRATOR, says that learning.py has already searched for the
workloads of this orchestrator that an older version of this program had connected, or need not search: the host was not
registered before. In the second case, the file contains "first"; otherwise, it is empty.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from calicoctl import state
from calicoctl.clock import now
from calicoctl.errors import CalicoError

ORCHESTRATORS = ("docker", "namespace", "cni")
"""The orchestrators whose workloads this program connects."""

_OLDER = ("docker", "namespace")
"""The orchestrators whose workloads also older versions connected, which wrote no files."""

_FOLDER = "workloads"
_LEARNED = "learned"
_FIRST = b"first"
_DISCONNECTED = "docker.disconnected"
# Source: random(4)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_LABELLED = "labelled"
_UNTIL = "until "
_ANOTHER_BOOT = "in another boot"


@dataclass(frozen=True)
class Connected:
    """The content of a connected workload's file. `path` is the namespace's path, empty for a Docker container.

    For a namespace, `started` is what process_started returned for the path when the file was written: the start time
    of the process that the path leads through, or None if it leads through no process. For a container that was
    attached through CNI, it is what namespace_identity returned. If it was written before the last reboot, `started` is
    a text that neither function returns. `labelled` says whether the container has labels that ask for a connection.

    `network` and `interface` are the name of the CNI network and the name of the interface inside the container, empty
    for a workload that was not attached through CNI.
    """

    path: str = ""
    started: str | None = None
    labelled: bool = False
    network: str = ""
    interface: str = ""


def get(host: str, orchestrator: str, id: str) -> Connected | None:
    """Return the content of a connected workload's file; None if the workload is not connected on the host.

    `id` is the workload's id. For an orchestrator that is not in ORCHESTRATORS, None is returned. Raises CalicoError if
    the file cannot be read, or if that of a namespace contains no path.
    """
    if orchestrator not in ORCHESTRATORS:
        return None
    content = state.read(host, _FOLDER, orchestrator, file_name(id))
    if content is None:
        return None
    known = _parsed(content)
    # without a path, the namespace would seem to be missing, and what belongs to it would be garbage-collected
    if orchestrator == "namespace" and not known.path.startswith("/"):
        file = state.path(host, _FOLDER, orchestrator, file_name(id))
        raise CalicoError(f"{file} is damaged: delete it, and run 'calicoctl container add' for its namespace")
    return known


def put(
    host: str,
    orchestrator: str,
    id: str,
    path: str = "",
    started: str | None = None,
    labelled: bool = False,
    network: str = "",
    interface: str = "",
) -> None:
    """Write a workload's file: from then on, the workload counts as connected. Raises CalicoError.

    For the parameters, see Connected. With `network`, `started` must not be None.
    """
    parts = [path, _boot(), started] if started else [path, _LABELLED] if labelled else [path]
    parts += [network, interface] if network else []
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
    return {id_of(name, known.path) if orchestrator == "namespace" else name: known for name, known in found.items()}


def set_disconnected(host: str, id: str, started_at: str) -> None:
    """Store that a command has disconnected a container with labels, which was started at `started_at`.

    An empty `started_at` says that this time is unknown: then `is_disconnected` returns True for any start until now.
    Raises CalicoError.
    """
    content = started_at or f"{_UNTIL}{now()}"
    state.write(host, _FOLDER, _DISCONNECTED, file_name(id), content=os.fsencode(content))


def is_disconnected(host: str, id: str, started_at: str) -> bool:
    """Return whether a command has disconnected a container since it was started at `started_at`. Raises CalicoError.

    `started_at` is in UTC, as the Docker Engine writes it.
    """
    content = state.read(host, _FOLDER, _DISCONNECTED, file_name(id))
    if content is None:
        return False
    noted = os.fsdecode(content)
    # which time is earlier is asked only if it must be: the clock may have been set meanwhile
    return noted == started_at or (noted.startswith(_UNTIL) and started_at <= noted[len(_UNTIL) :])


def disconnected(host: str) -> set[str]:
    """Return the ids of the containers for which `set_disconnected` was called. Raises CalicoError."""
    return set(state.read_all(host, _FOLDER, _DISCONNECTED))


def forget_disconnected(host: str, id: str) -> None:
    """Revert `set_disconnected`, since a container no longer exists. Raises CalicoError."""
    state.remove(host, _FOLDER, _DISCONNECTED, file_name(id))


def is_learned(host: str, orchestrator: str) -> bool:
    """Return whether the file ORCHESTRATOR.learned exists. Raises CalicoError."""
    return state.read(host, _FOLDER, f"{orchestrator}.{_LEARNED}") is not None


def set_learned(host: str, orchestrator: str) -> None:
    """Create the file ORCHESTRATOR.learned, without content. Raises CalicoError."""
    state.write(host, _FOLDER, f"{orchestrator}.{_LEARNED}", content=b"")


def set_first(host: str) -> None:
    """Create the files ORCHESTRATOR.learned of a host on which nobody has connected a workload. Raises CalicoError."""
    for orchestrator in _OLDER:
        state.write(host, _FOLDER, f"{orchestrator}.{_LEARNED}", content=_FIRST)


def is_first(host: str) -> bool:
    """Return whether nobody had connected a workload on the host before this version did. Raises CalicoError."""
    return state.read(host, _FOLDER, f"namespace.{_LEARNED}") == _FIRST


def forget_all(host: str) -> None:
    """Remove the files of all workloads of a host. The files ORCHESTRATOR.learned stay, but without content.

    Raises CalicoError.
    """
    # ORCHESTRATOR.learned stays: without it, learning.py would search again, and trust endpoints that others can write
    for orchestrator in _OLDER:
        if is_learned(host, orchestrator):
            set_learned(host, orchestrator)  # an older program may be used next
    for folder in (*ORCHESTRATORS, _DISCONNECTED):
        for name in state.read_all(host, _FOLDER, folder):
            state.remove(host, _FOLDER, folder, name)
        state.remove_empty(host, _FOLDER, folder)


def file_name(id: str) -> str:
    """Return the name of the file of the workload with this id: the id, or the id's SHA-256 as hexadecimal digits.

    The SHA-256 is used if the id is longer than 190 bytes, begins with a dot, or contains a slash or a NUL.
    """
    if len(os.fsencode(id)) <= 190 and not id.startswith(".") and not set(id) & {"/", "\0"}:
        return id
    return hashlib.sha256(os.fsencode(id)).hexdigest()


def id_of(name: str, path: str) -> str:
    """Return the id of the namespace whose file has this name: the reverse of file_name.

    `path` is the namespace's path. A namespace's id is its path with each slash replaced by a dash, so it begins with a
    dash. If a namespace's file name does not, it is the SHA-256 of the id, and the id is computed from `path`. The name
    of a container's file is always the container's id.
    """
    return path.replace("/", "-") if path and not name.startswith("-") else name


def _parsed(content: bytes) -> Connected:
    path, *others = os.fsdecode(content).split("\0")
    if len(others) not in (2, 4):
        return Connected(path, labelled=others == [_LABELLED])
    boot, started, *cni = others
    return Connected(path, started if boot == _boot() else _ANOTHER_BOOT, False, *cni)


def _boot() -> str:
    with suppress(OSError):
        return _BOOT_ID.read_text().strip()
    return ""
