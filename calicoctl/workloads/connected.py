"""Which workloads somebody has connected on this host: what etcd says of a workload does not make the agent wire it.

A workload that is connected has a file /var/lib/calico/HOST/workloads/ORCHESTRATOR/ID. wiring.py writes it, and it is
removed when the workload is disconnected or no longer exists; it outlives reboots, and the loss of etcd. A namespace's
file contains its path, which cannot be derived from its id; if the path leads through a process, it also says in which
boot, and when, that process was started. A container's file is empty.

A file beside these folders says that workloads which an older version has connected need not be learned any more.
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
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_ANOTHER_BOOT = "in another boot"


@dataclass(frozen=True)
class Connected:
    """A namespace's path, empty for a container; if it leads through a process, when that was started, else None.

    `started` is what process_started has returned: of a process of another boot, a text that it never returns.
    """

    path: str = ""
    started: str | None = None


def get(host: str, orchestrator: str, id: str) -> Connected | None:
    """Return what is known of a connected workload of a host, None if nobody has connected it. Raises CalicoError."""
    if orchestrator not in ORCHESTRATORS:
        return None
    content = state.read(host, _FOLDER, orchestrator, file_name(id))
    return None if content is None else _parsed(content)


def put(host: str, orchestrator: str, id: str, path: str = "", started: str | None = None) -> None:
    """Note that a workload is connected; for the arguments, see Connected. Raises CalicoError."""
    parts = [path, _boot(), started] if started else [path]
    content = os.fsencode("\0".join(parts))
    state.write(host, _FOLDER, orchestrator, file_name(id), content=content)


def forget(host: str, orchestrator: str, id: str) -> None:
    """Note that a workload is not connected any more. Raises CalicoError."""
    if orchestrator in ORCHESTRATORS:
        state.remove(host, _FOLDER, orchestrator, file_name(id))


def every(host: str, orchestrator: str) -> dict[str, Connected]:
    """Return all connected workloads of a host and an orchestrator, by id. Raises CalicoError."""
    contents = state.read_all(host, _FOLDER, orchestrator)
    found = {name: _parsed(content) for name, content in contents.items()}
    return {id_of(name, known.path): known for name, known in found.items()}


def is_learned(host: str, orchestrator: str) -> bool:
    """Return whether the workloads that an older version has connected have been learned. Raises CalicoError."""
    return state.read(host, _FOLDER, f"{orchestrator}.{_LEARNED}") is not None


def set_learned(host: str, *orchestrators: str) -> None:
    """Note that there is nothing to learn any more. Raises CalicoError."""
    for orchestrator in orchestrators or ORCHESTRATORS:
        state.write(host, _FOLDER, f"{orchestrator}.{_LEARNED}", content=b"")


def forget_all(host: str) -> None:
    """Note that a host's workloads are all disconnected. Raises CalicoError.

    That they have been learned stays: else whoever writes to etcd could have them connected again.
    """
    for orchestrator in ORCHESTRATORS:
        for name in state.read_all(host, _FOLDER, orchestrator):
            state.remove(host, _FOLDER, orchestrator, name)
        state.remove_empty(host, _FOLDER, orchestrator)


def file_name(id: str) -> str:
    """Return the name of a workload's files: its id, or a hash of one that is too long, or cannot be a file's name."""
    if len(os.fsencode(id)) <= 190 and not id.startswith(".") and not set(id) & {"/", "\0"}:
        return id
    return hashlib.sha256(os.fsencode(id)).hexdigest()


def id_of(name: str, path: str) -> str:
    """Return the workload's id from a file_name: of a namespace whose id is long, it is derived from its path."""
    return path.replace("/", "-") if path and not name.startswith("-") else name


def _parsed(content: bytes) -> Connected:
    path, *process = os.fsdecode(content).split("\0")
    if len(process) != 2:
        return Connected(path)
    boot, started = process
    return Connected(path, started if boot == _boot() else _ANOTHER_BOOT)


def _boot() -> str:
    """Return the id of the kernel's boot. Source: random(4)."""
    with suppress(OSError):
        return _BOOT_ID.read_text().strip()
    return ""
