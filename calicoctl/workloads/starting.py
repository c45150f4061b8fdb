"""Connects a container that is being started, as its labels ask, before its first instruction: for Docker's hook.

The engine cannot be asked about a container that it is starting: it would not answer before the container runs. So what
the engine would say is read from its files. As a program, this module is what oci_hook.py runs if no process serves
the hook: it reads the container's state (OCI) from standard input, and writes one sentence to standard error if it
fails.

If the store is away, the container does not start, and the engine does not try again. So the agent starts it when the
store is back, if the container's restart policy says so: oci_hook.py writes a file for each such container.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from calicoctl import engine, environment, files
from calicoctl.clock import now
from calicoctl.datastore.client import DatastoreClient
from calicoctl.errors import CalicoError, Conflict, NoSuchContainer, StoreUnavailable, one_line
from calicoctl.workloads import docker_hook, labelling, labels, oci_hook, wiring
from calicoctl.workloads.upkeep import CHANGED, Action
from calicoctl.workloads.workload import DOCKER, Workload, short_id

LARGEST = 32 << 20
"""The maximum size of a file of the engine, in bytes."""

PATIENCE = 3.0
"""Seconds for which requests to the store are retried, and for which a lock is waited for."""


def connect(datastore: DatastoreClient, state: dict[str, Any]) -> None:
    """Connect the container whose state (OCI) is `state`, as its labels ask; a container with an endpoint gets it back.

    Does nothing if the container's own labels do not ask for it. Raises StoreUnavailable or Conflict if a later attempt
    may succeed, and any other CalicoError after a rollback.
    """
    id, pid = state.get("id"), state.get("pid")
    if not isinstance(id, str) or not re.fullmatch("[0-9a-f]{64}", id) or type(pid) is not int or pid <= 0:
        raise CalicoError("the runtime has not said which container it is, and which process")
    settings = docker_hook.settings()
    if settings is None:
        raise CalicoError("the hook is removed")
    root = Path(settings.data_root)
    folder = root / "containers" / id
    container = _read(folder / "config.v2.json")
    host_config = container["HostConfig"] = _read(folder / "hostconfig.json")
    wanted = labels.wanted(container, _image_of(container, root))
    if not wanted.addresses:
        return
    name = str(container.get("Name") or id).lstrip("/")
    mode = str(host_config.get("NetworkMode") or "")
    workload = Workload(DOCKER, id, name, docker_name=name, pid=pid, network_mode=mode, started_at=now())
    wiring.connect_starting(datastore, workload, *labelling.checked(wanted), wanted.profiles, PATIENCE)


def _image_of(container: dict[str, Any], root: Path) -> dict[str, Any]:
    """Return what the engine would say about a container's image: `Config`. Raises CalicoError if it is not known."""
    algorithm, _, digest = str(container.get("Image")).partition(":")
    if re.fullmatch("[a-z0-9]+", algorithm) and re.fullmatch("[0-9a-f]+", digest):
        for path in root.glob(f"image/*/imagedb/content/{algorithm}/{digest}"):
            return {"Config": _read(path).get("config")}
    raise CalicoError(
        "its image was removed, or is not where Docker keeps images, so it is unknown whether the labels are the "
        "image's own"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(LARGEST))
    except (OSError, ValueError, RecursionError) as error:
        raise CalicoError(f"{path}, a file of Docker, cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise CalicoError(f"{path}, a file of Docker, is not what was expected")
    return found


# Containers that the agent starts


def waiting(host: str) -> list[str]:
    """Return the ids of the containers that did not start, and may start now."""
    with suppress(FileNotFoundError):
        names = [path.name for path in (files.RUN / host).iterdir()]
        ids = [name[len(oci_hook.START_AGAIN) :] for name in names if name.startswith(oci_hook.START_AGAIN)]
        return [id for id in ids if re.fullmatch("[0-9a-f]{64}", id)]
    return []


def start_again(datastore: DatastoreClient, id: str) -> Action | None:
    """Have the engine start a container from `waiting`; return what was done.

    Does nothing if it runs or does not exist, if its start has failed for another reason than that it could not be
    connected, or if its restart policy does not say that it is to be started. Raises StoreUnavailable if the store is
    still away; and DockerUnavailable.
    """
    datastore.hosts.is_registered()  # asks the store
    with suppress(NoSuchContainer):
        container = engine.inspect(id)
        # before it is started: if that fails, the hook writes the file again
        (files.RUN / datastore.host / f"{oci_hook.START_AGAIN}{id}").unlink(missing_ok=True)
        if not _is_to_start(container):
            return None
        engine.start(id)
        name = container["Name"].lstrip("/")
        return Action(CHANGED, f"container {short_id(id)} ({name}) is started, which had failed: etcd was away")
    (files.RUN / datastore.host / f"{oci_hook.START_AGAIN}{id}").unlink(missing_ok=True)
    return None


def _is_to_start(container: dict[str, Any]) -> bool:
    policy = container["HostConfig"].get("RestartPolicy") or {}
    if container["State"]["Running"] or oci_hook.PREFIX not in str(container["State"].get("Error")):
        return False
    # Source: ShouldRestart in the engine's restartmanager/restartmanager.go
    most = policy.get("MaximumRetryCount") or 0
    may_retry = not most or container.get("RestartCount", 0) < most
    return policy.get("Name") in ("always", "unless-stopped") or (policy.get("Name") == "on-failure" and may_retry)


# The program


def main() -> NoReturn:
    """Connect the container whose state is on standard input, and end this process: see oci_hook.py."""
    signal.signal(signal.SIGTERM, _give_up)
    try:
        settings = docker_hook.settings()
        if settings is not None:
            os.environ.update({**settings.variables, "HOSTNAME": settings.host})
        environment.complete()
        state = json.loads(sys.stdin.buffer.read(oci_hook.LARGEST))
        connect(DatastoreClient.from_environment(PATIENCE), state)
    except (StoreUnavailable, Conflict) as error:
        _end(str(error), oci_hook.TEMPORARY)
    except CalicoError as error:
        _end(str(error), 1)
    except Exception as error:
        _end(f"internal error ({type(error).__name__}: {error})", 1)
    sys.exit(0)


def _end(why: str, status: int) -> NoReturn:
    print(f"{oci_hook.PREFIX}{one_line(why).rstrip('.')}.", file=sys.stderr)
    sys.exit(status)


def _give_up(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the rollback must not be interrupted
    raise StoreUnavailable(f"it was not connected within {oci_hook.SECONDS:.0f} s, since etcd is slow or away")
