"""Connects a container that is being started, as its labels ask, before its first instruction: for Docker's hook.

The engine cannot be asked about a container that it is starting: it would not answer before the container runs. So what
the engine would say is read from its files. As a program, this module is what oci_hook.py runs if no process serves
the hook: it reads the container's state (OCI) from standard input, and writes one sentence to standard error if it
fails. Labels that are ignored are told by the system's log.

If the store is away, or if an address is still that of a container that was just removed, the container does not start,
and the engine does not try again. So the agent starts it when that may succeed, if the container's restart policy says
so: oci_hook.py writes a file for each such container.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import syslog
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Callable, NoReturn

from calicoctl import engine, environment, files
from calicoctl.clock import now
from calicoctl.datastore.chosen import FROZEN
from calicoctl.datastore.client import DatastoreClient
from calicoctl.errors import (
    AddressTaken,
    CalicoError,
    Conflict,
    DockerUnavailable,
    Frozen,
    NoSuchContainer,
    NoSuchImage,
    StoreUnavailable,
    one_line,
)
from calicoctl.workloads import connected, docker_hook, labelling, labels, oci_hook, wiring
from calicoctl.workloads.addressing import AddressRequest
from calicoctl.workloads.upkeep import CHANGED, Action
from calicoctl.workloads.workload import DOCKER, Workload, short_id

if TYPE_CHECKING:
    from calicoctl.datastore.blocks import Owner

LARGEST = 32 << 20
"""The maximum size of a file of the engine, in bytes."""

PATIENCE = 3.0
"""Seconds for which requests to the store are retried, and for which a lock, or an address, is waited for."""

PAUSE = 0.1
"""Seconds between two attempts to get the address of a container that was just removed.

The agent releases it within moments. A watch would cost more than the few attempts do: see etcd2_watch.py.
"""


def connect(datastore: DatastoreClient, state: dict[str, Any]) -> tuple[str, ...]:
    """Connect the container whose state (OCI) is `state`, as its labels ask; re-attach it if it has an endpoint.

    Returns sentences about labels that are ignored: see Wanted. Does nothing if the container's own labels do not ask
    for it, or if it has no endpoint here, and its image was removed: then the agent reports that it is unknown whether
    the labels are the image's own. Raises StoreUnavailable or Conflict if a later attempt may succeed, and any other
    CalicoError after a rollback.
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
    name = str(container.get("Name") or id).lstrip("/")
    mode = str(host_config.get("NetworkMode") or "")
    workload = Workload(DOCKER, id, name, docker_name=name, pid=pid, network_mode=mode, started_at=now())
    try:
        wanted = labels.wanted(container, _image_of(container, root))
        requests, interface = labelling.checked(wanted)
    except CalicoError as error:
        # what is recorded wins, whatever the labels are
        known = connected.get(datastore.host, DOCKER, id) is not None
        if known and wiring.connect_starting(datastore, workload, (), None, (), PATIENCE):
            return ()
        if isinstance(error, NoSuchImage):
            return ()
        raise
    if requests:
        give_up = time.monotonic() + PATIENCE
        while True:
            try:
                wiring.connect_starting(datastore, workload, requests, interface, wanted.profiles, PATIENCE)
                break
            except AddressTaken as error:
                holders = _holders(datastore, requests)
                if not all(_is_removed(owner, datastore.host, root) for owner in holders):
                    raise
                if time.monotonic() > give_up:
                    if not holders:
                        raise
                    raise Conflict(f"{error} Its container was removed, and it is not released yet") from None
            time.sleep(PAUSE)
    return wanted.ignored


def _holders(datastore: DatastoreClient, requests: Iterable[AddressRequest]) -> list[Owner]:
    """Return the owners of the addresses that `requests` name, but for addresses that are not assigned."""
    owners = (datastore.ipam.owner(request.address) for request in requests if request.address is not None)
    return [owner for owner in owners if owner is not None]


def _is_removed(owner: Owner, host: str, root: Path) -> bool:
    """Return whether an address's owner is a container of this host that Docker does not have any more.

    Then the agent releases the address. `root` is the engine's data directory.
    """
    facts = owner.secondary
    id = facts.get("workload")
    if (facts.get("host"), facts.get("orchestrator")) != (host, DOCKER) or not isinstance(id, str):
        return False
    return re.fullmatch("[0-9a-f]{64}", id) is not None and not (root / "containers" / id).exists()


def _image_of(container: dict[str, Any], root: Path) -> dict[str, Any]:
    """Return what the engine would say about a container's image: `Config`.

    `container` is the object in the container's file config.v2.json, `root` the engine's data directory. Raises
    NoSuchImage if the image was removed, and CalicoError if it is unknown what the engine would say.
    """
    algorithm, _, digest = str(container.get("Image")).partition(":")
    if re.fullmatch("[a-z0-9]+", algorithm) and re.fullmatch("[0-9a-f]+", digest):
        for path in root.glob(f"image/*/imagedb/content/{algorithm}/{digest}"):
            return {"Config": _config_of_image(path)}
    raise NoSuchImage(
        "its image was removed, or is not where Docker keeps images, so it is unknown whether the labels are the "
        "image's own"
    )


def _config_of_image(path: Path) -> dict[str, Any]:
    """Return the configuration in an image's file. Raises CalicoError if the engine may read something else in it.

    Whoever has built the image has written this file. The engine takes `labels` for `Labels`, adds up objects that are
    there twice, and replaces invalid characters. Labels that only the engine sees would count as the container's.
    Source: Go's encoding/json, Unmarshal.
    """
    try:
        image = _read(path, _unique)
        _refuse_other_spellings(image, "config")
        config = image.get("config")
        if isinstance(config, dict):
            _refuse_other_spellings(config, "Labels", "Env")
            json.dumps([config.get("Labels"), config.get("Env")], ensure_ascii=False).encode()
    except ValueError as error:
        raise CalicoError(
            f"its image has an unusual configuration ({error}), so it is unknown whether the labels are the image's own"
        ) from None
    return config if isinstance(config, dict) else {}


def _refuse_other_spellings(found: dict[str, Any], *names: str) -> None:
    # casefold: also U+017F and U+212A, which the engine takes for s and k
    known = {name.casefold(): name for name in names}
    other = next((key for key in found if known.get(key.casefold(), key) != key), None)
    if other is not None:
        raise ValueError(f"it has {other!a} instead of {known[other.casefold()]}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Twice("it has a name twice")
    return found


class _Twice(ValueError):
    """An object has a name twice."""


def _read(path: Path, made_of: Callable[[list[tuple[str, Any]]], dict[str, Any]] = dict) -> dict[str, Any]:
    """Return the JSON object in a file of the engine. `made_of` makes each object in it of its pairs (name, value).

    Raises CalicoError, and _Twice if `made_of` does.
    """
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(LARGEST), object_pairs_hook=made_of)
    except _Twice:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CalicoError(f"{path}, a file of Docker, cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise CalicoError(f"{path}, a file of Docker, is not what was expected")
    return found


# Containers that the agent starts


def waiting(host: str) -> list[str]:
    """Return the ids of the containers that the hook kept from starting, and that `start_again` is to be called for."""
    with suppress(FileNotFoundError):
        names = [path.name for path in (files.RUN / host).iterdir()]
        ids = [name[len(oci_hook.START_AGAIN) :] for name in names if name.startswith(oci_hook.START_AGAIN)]
        return [id for id in ids if re.fullmatch("[0-9a-f]{64}", id)]
    return []


def start_again(datastore: DatastoreClient, id: str) -> Action | None:
    """Have the engine start a container from `waiting`; return what was done, None if it was not started.

    It is not started, and no longer in `waiting`, if it runs or does not exist, if its start has failed for another
    reason than that it could not be connected, or if its restart policy does not say that it is to be started. It is
    not started, but still in `waiting`, if an address that its labels name is assigned to another workload. Raises
    StoreUnavailable if the store is still away, or its data frozen; and DockerUnavailable, also if the engine fails to
    start it.
    """
    datastore.hosts.is_registered()  # asks the store
    if datastore.is_frozen():
        raise StoreUnavailable(FROZEN)
    note = files.RUN / datastore.host / f"{oci_hook.START_AGAIN}{id}"
    try:
        container = engine.inspect(id)
        if not engine.is_to_start(container, re.compile(oci_hook.PREFIX)):
            note.unlink(missing_ok=True)
            return None
        if _lacks_address(datastore, container):
            return None
        written = note.stat().st_mtime_ns
        try:
            engine.start(id)
        except DockerUnavailable:
            engine.info()  # raises if it has died: then it is to try again
            if note.stat().st_mtime_ns == written:  # not written anew by the hook: it is of no use to try again
                note.unlink()
            raise
    except NoSuchContainer:
        note.unlink(missing_ok=True)
        return None
    note.unlink(missing_ok=True)
    name = container["Name"].lstrip("/")
    return Action(CHANGED, f"container {short_id(id)} ({name}) is started, which had failed before")


def _lacks_address(datastore: DatastoreClient, container: dict[str, Any]) -> bool:
    """Return whether a container has no endpoint, and its labels name an address that another workload has."""
    if datastore.workload_endpoint_ids(DOCKER, container["Id"]):
        return False
    with suppress(CalicoError):
        requests, _ = labelling.checked(labels.wanted(container, {}))
        return bool(_holders(datastore, requests))
    return False


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
        ignored = connect(DatastoreClient.from_environment(PATIENCE), state)
        if ignored:  # Docker shows nothing of a hook that succeeds
            syslog.openlog("calicoctl", facility=syslog.LOG_DAEMON)
            syslog.syslog(f"container {short_id(str(state['id']))}: {one_line('; '.join(ignored))}")
    except (StoreUnavailable, Conflict, Frozen) as error:
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
    seconds = f"{oci_hook.PROCESS_SECONDS:.0f} s"
    raise StoreUnavailable(f"it was not connected within {seconds}, since etcd or this host is slow")
