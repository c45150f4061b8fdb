"""Finds workloads by a container's name or id, or by a namespace's path, and determines their state.

There are three kinds of workloads: containers of the Docker Engine, network namespaces that a user connects by their
path, and containers that another runtime attaches through CNI (plugins/cni.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calicoctl import engine, proc
from calicoctl.addresses import parse_address
from calicoctl.errors import (
    CalicoError,
    DockerUnavailable,
    NamespaceError,
    NoSuchContainer,
    NotFound,
)
from calicoctl.workloads import connected, labels, locks
from calicoctl.workloads.connected import Connected

if TYPE_CHECKING:
    from calicoctl.datastore.client import DatastoreClient
    from calicoctl.datastore.keys import EndpointId
    from calicoctl.datastore.model import Endpoint

DOCKER, NAMESPACE, CNI = connected.ORCHESTRATORS

STANDARD_NETWORKS = ("bridge", "host", "none")
"""The Docker networks that every engine has."""

_LONGEST_TIME = 64
"""The maximum length of a time from the engine, in characters. It is stored in a file."""

_RUN, _VAR_RUN = "/run/", "/var/run/"
"""Two paths of the same directory on most hosts. A namespace may be named by either path."""


@dataclass(frozen=True)
class Workload:
    """A container or a namespace that is connected to the network, or is to be connected.

    `orchestrator` is DOCKER for a container of the Docker Engine, NAMESPACE for a namespace, and CNI for a container
    that was attached through CNI. `id` identifies the workload in the store: the container's id, or the namespace's
    path with `-` for `/`. `name` stands for the workload in messages, usually as the user typed it. `path` is the
    namespace's path, None for a container of the Docker Engine.

    For a container, `docker_name` is its name in Docker, or the one that a CNI runtime has given; empty if it is not
    known.

    For a container of the Docker Engine, `pid` is the id of its first process (None if it does not run), and
    `network_mode` the value of `docker run --net`, such as `none` or `container:NAME`. `docker_networks` are the names
    of the Docker networks that it is in, but for STANDARD_NETWORKS. If the container has labels that ask for a
    connection (labels.py), `started_at` is when it was started, as the engine says. If the engine does not answer,
    `started_at` is empty. In all other cases, it is None.

    For a container that was attached through CNI, `network` is the name of the CNI network, and `interface` the name
    that the interface has, or is to have, inside the container.
    """

    orchestrator: str
    id: str
    name: str
    path: str | None = None
    docker_name: str = ""
    pid: int | None = None
    network_mode: str = ""
    docker_networks: tuple[str, ...] = ()
    started_at: str | None = None
    network: str = ""
    interface: str = ""

    @property
    def handle(self) -> str:
        return f"{self.orchestrator}.{self.id}"

    @property
    def stored_as(self) -> list[tuple[str, str]]:
        """The places where the workload's endpoints may be in the store, as (orchestrator, id), the likeliest first.

        An old tool has stored the endpoints of namespaces under DOCKER.
        """
        orchestrators = [self.orchestrator, DOCKER] if self.orchestrator == NAMESPACE else [self.orchestrator]
        return [(orchestrator, self.id) for orchestrator in orchestrators]

    @property
    def other_spelling(self) -> Workload | None:
        """The same namespace as a workload with the other spelling of its path: /run for /var/run, or the reverse.

        None for a container, for a path that begins with neither, or if /run and /var/run are different directories.
        """
        other = _other_spelling(self.path or "") if self.orchestrator == NAMESPACE else None
        return None if other is None else replace(self, id=other.replace("/", "-"), path=other)

    def namespace_path(self) -> str:
        """Return the path of the workload's network namespace.

        Raises CalicoError for a container that does not run, or that shares the network of the host or of another
        container.
        """
        if self.path is not None:
            return self.path
        if self.pid is None:
            raise CalicoError(f"{self.name} is not running. Start it with 'docker start {self.name}'.")
        if self.network_mode == "host":
            raise CalicoError(
                f"{self.name} cannot be connected: it runs in the host's network (--net=host). Run it with --net=none."
            )
        if self.network_mode.startswith("container:"):
            owner = self.network_mode.partition(":")[2]
            raise CalicoError(
                f"{self.name} cannot be connected: it shares the network of container {owner}. Connect that one."
            )
        return f"/proc/{self.pid}/ns/net"


class WorkloadState(Enum):
    """The state of a workload. The values complete the sentence `the workload …`."""

    RUNNING = "is running"
    STOPPED = "has stopped"
    MISSING = "is missing"
    """No namespace is at the workload's path now, but one may be there later."""
    GONE = "no longer exists"


def find_state(orchestrator: str, id: str, known: Connected | None) -> tuple[WorkloadState, Workload]:
    """Return the state of a workload of this host, and a Workload with its current name and process.

    `known` is the content of the workload's file, None if there is none; it is not used for a container of the Docker
    Engine. A container that was attached through CNI is GONE if its path does not lead to the namespace that it was
    attached in: no runtime uses the path for this container again without another attachment. Raises DockerUnavailable
    or NamespaceError if the state cannot be determined.
    """
    if orchestrator == DOCKER:
        try:
            workload = find(id)
        except NoSuchContainer:
            return WorkloadState.GONE, Workload(DOCKER, id, id)
        return (WorkloadState.STOPPED if workload.pid is None else WorkloadState.RUNNING), workload
    path, started = (known.path, known.started) if known is not None else ("", None)
    if orchestrator == CNI:
        is_there = started is not None and namespace_identity(path) == started
        workload = attached_container(id, known)
        return (WorkloadState.RUNNING if is_there else WorkloadState.GONE), workload
    workload = Workload(NAMESPACE, id, path, path=path)
    now = process_started(path)
    if namespace_at(path) is not None and started == now:
        return WorkloadState.RUNNING, workload
    of_process = started is not None or now is not None or re.match("/proc/(?!1/)[0-9]+/", path)
    return (WorkloadState.GONE if of_process else WorkloadState.MISSING), workload


def namespace_at(path: str) -> tuple[int, int] | None:
    """Return the identity of the network namespace at a path: its device number and its inode number.

    Returns None if there is no network namespace at the path. Raises NamespaceError if the path cannot be read.
    """
    try:
        here, there = os.stat("/proc/self/ns/net"), os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ProcessLookupError):
        return None
    except (OSError, ValueError) as error:
        raise NamespaceError(f"{path} cannot be read: {error}") from None
    return (there.st_dev, there.st_ino) if there.st_dev == here.st_dev else None


def namespace_identity(path: str) -> str | None:
    """Return a text that identifies the network namespace at a path until the next boot; None if there is none.

    The text consists of the device number and the inode number of the namespace, which another namespace may get later,
    and of a time: if the path leads through a process, the process's start time; otherwise, when the inode was created,
    which stays the same while the namespace is mounted. Raises NamespaceError if the path cannot be read.
    """
    found = namespace_at(path)
    if found is None:
        return None
    since = process_started(path)
    if since is None:
        try:
            since = str(os.stat(path).st_mtime_ns)
        except OSError:  # it was unmounted just now
            return None
    return f"{found[0]}:{found[1]}:{since}"


def is_attachable(id: str) -> bool:
    """Return whether `id` can be the id of a container that is attached through CNI.

    It is a part of a key in etcd and the name of a file, so its length is limited. Source of the pattern: CNI's
    SPEC.md, "Parameters", CNI_CONTAINERID.
    """
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,189}", id, re.ASCII) is not None


def attached_container(id: str, known: Connected | None, name: str = "") -> Workload:
    """Return a container that was attached through CNI. `known` is the content of its file, None if it has none.

    `name` stands for it in messages; by default, it is the id.
    """
    if known is None:
        return Workload(CNI, id, name or id)
    return Workload(CNI, id, name or id, path=known.path, network=known.network, interface=known.interface)


def process_started(path: str) -> str | None:
    """Return the start time of the process or thread through which a path leads: clock ticks since boot, as text.

    A path such as /proc/PID/ns/net leads through a process; later, it may lead through another process, since process
    ids are reused. Symbolic links are followed. Returns None if the path does not exist; if it leads through no
    process; if it leads through /proc/1, /proc/self or /proc/thread-self; or if it leads through more than 40 symbolic
    links. Raises NamespaceError if the path cannot be read. Source: namespaces(7).
    """
    place, left, links = Path("/"), [*reversed(Path(path).parts[1:])], 0
    try:
        while left:
            place = place.parent if left[-1] == ".." else place / left[-1]
            left.pop()
            if str(place) in ("/proc/1", "/proc/self", "/proc/thread-self"):
                return None  # these always lead to the host's own files
            if re.fullmatch("/proc/[0-9]+", str(place)):
                thread = place.joinpath(*reversed(left[-2:]))
                return proc.start_time(thread if thread.parent.name == "task" else place)
            if not place.is_symlink():
                continue
            target = place.readlink()
            if re.fullmatch(r"net:\[[0-9]+\]", str(target)):  # /proc under another name
                return proc.start_time(place.parent.parent)
            links += 1
            if links > 40:  # as many as the kernel would follow
                return None
            place = Path("/") if target.is_absolute() else place.parent
            left += reversed([part for part in target.parts if part != "/"])
    except (FileNotFoundError, NotADirectoryError, ProcessLookupError):
        return None
    except (OSError, ValueError) as error:
        raise NamespaceError(f"{path} cannot be read: {error}") from None
    return None


def find(name: str) -> Workload:
    """Return the workload that a user calls `name`.

    If `name` is an absolute path, the workload is the namespace at this path, even if the path does not exist; a path
    below /run/netns is converted to one below /var/run/netns. Any other name is looked up in Docker as a container's
    name or id. Raises NoSuchContainer or DockerUnavailable if this fails, and CalicoError if the name is invalid.
    """
    check_workload_name(name)
    if name.startswith("/"):
        path = _normal_path(name)
        if path.startswith(f"{_RUN}netns/"):
            path = _other_spelling(path) or path
        return Workload(NAMESPACE, path.replace("/", "-"), name, path=path)
    return of_container(_inspect(name), name)


def of_container(container: dict[str, Any], name: str) -> Workload:
    """Return the workload of a container from its description by engine.inspect. `name` is its name in messages."""
    state = container["State"]
    mode = container["HostConfig"]["NetworkMode"]
    if mode.startswith("container:"):
        mode = "container:" + _name_of(mode.partition(":")[2])
    return Workload(
        DOCKER,
        container["Id"],
        name,
        docker_name=container["Name"].lstrip("/"),
        pid=state["Pid"] if state["Running"] and state["Pid"] else None,
        network_mode=mode,
        docker_networks=_networks_of(container),
        started_at=str(state.get("StartedAt"))[:_LONGEST_TIME] if labels.is_labelled(container) else None,
    )


def _networks_of(container: dict[str, Any]) -> tuple[str, ...]:
    settings = container.get("NetworkSettings")
    networks = settings.get("Networks") if isinstance(settings, dict) else None
    names = networks if isinstance(networks, dict) else {}
    return tuple(name for name in names if name not in STANDARD_NETWORKS)


def check_workload_name(name: str) -> None:
    """Raise CalicoError if `name` can be neither the name or id of a container, nor an absolute path of a namespace."""
    if name.startswith("/"):
        if _normal_path(name) == "/":
            raise CalicoError(f"'{name}' is not the path of a network namespace")
    elif not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name, re.ASCII):
        raise CalicoError(
            f"'{name}' is neither a Docker container's name or id, nor the absolute path of a network namespace"
        )


def _normal_path(path: str) -> str:
    return "/" + os.path.normpath(path).lstrip("/")


def _other_spelling(path: str) -> str | None:
    """Return, for a path below /run, the same path below /var/run, and the reverse.

    Returns None for a path that is below neither, or if /run and /var/run are different directories.
    """
    for prefix, other in ((_RUN, _VAR_RUN), (_VAR_RUN, _RUN)):
        if path.startswith(prefix):
            return other + path[len(prefix) :] if os.path.realpath(_VAR_RUN) == os.path.realpath(_RUN) else None
    return None


def find_connected(name: str, datastore: DatastoreClient) -> tuple[Workload, list[Endpoint]]:
    """Return the workload that a user calls `name`, and its endpoints on this host, which may be none.

    The workload is that of `find_known`, with one exception: if a namespace has no endpoint, but has one under the
    other spelling of its path, it is the workload with the other spelling. Raises what `find_known` raises, and
    InvalidValue if one of the endpoints is invalid.
    """
    workload = find_known(name, datastore)
    endpoints = endpoints_of(datastore, workload)
    twin = None if endpoints else workload.other_spelling
    others = [] if twin is None else endpoints_of(datastore, twin)
    return (twin, others) if twin is not None and others else (workload, endpoints)


def find_known(name: str, datastore: DatastoreClient) -> Workload:
    """Return the workload that a user calls `name`, even if Docker does not know it any more, or does not answer.

    If `find` returns a workload, this is the result. Whether a namespace is stored under the other spelling of its path
    is not checked, so nothing is read from the store for a namespace: `disconnect` and WorkloadSession (wiring.py) find
    that out themselves.

    If `find` raises NoSuchContainer or DockerUnavailable, containers whose ids begin with `name` are searched in the
    store. If there are none, containers whose name is `name` are searched in the store and in the marks of interrupted
    changes on this host. After NoSuchContainer, those that Docker knows by their id are left out of this search: they
    have another name now. In both searches, containers that were attached through CNI are found, too. If no container
    is found, the exception of `find` is raised. If several are found, CalicoError is raised.
    """
    try:
        return find(name)
    except (NoSuchContainer, DockerUnavailable) as error:
        is_gone = isinstance(error, NoSuchContainer)
        ids = _stored_by_id(name, datastore)
        attached = {id for id in datastore.workload_ids(CNI) if id == name or (id.startswith(name) and len(name) >= 4)}
        if not ids and not attached:
            # a container whose first change was interrupted has its name in the mark alone
            ids = set(datastore.workloads_named(DOCKER, name)) | locks.interrupted_named(datastore.host, DOCKER, name)
            if is_gone:
                ids = {id for id in ids if not _exists(id)}  # a container that exists has another name now
            attached = {*datastore.workloads_named(CNI, name)}
        if not ids and not attached:
            raise
    if len(ids | attached) > 1:
        raise ambiguous(name, [(id, datastore.host) for id in ids | attached])
    if attached:
        id = attached.pop()
        return attached_container(id, connected.get(datastore.host, CNI, id), name)
    return Workload(DOCKER, ids.pop(), name, started_at=None if is_gone else "")


def ambiguous(name: str, containers: list[tuple[str, str]]) -> CalicoError:
    """Return the error for a name that matches several containers. `containers` are pairs (id, host)."""
    lengths = (length for length in range(12, 65) if len({id[:length] for id, _ in containers}) == len(containers))
    length = next(lengths, 64)
    some = ", ".join(f"{id[:length]} on {host}" for id, host in sorted(containers, key=lambda one: one[::-1]))
    return CalicoError(f"{name} can be several containers ({some}): say which by its id.")


def _stored_by_id(prefix: str, datastore: DatastoreClient) -> set[str]:
    """Return the ids that begin with `prefix` of containers that have an endpoint on this host.

    If there are none, returns the ids that begin with `prefix` of containers on any host that have an IPAM handle.
    Returns an empty set if `prefix` does not consist of 4 to 64 hexadecimal digits.
    """
    if not re.fullmatch(r"[0-9a-f]{4,64}", prefix):
        return set()
    handle = f"{DOCKER}."
    found = {id for id in datastore.workload_ids(DOCKER) if id.startswith(prefix)}
    return found or {h[len(handle) :] for h in datastore.ipam.handles.names() if h.startswith(handle + prefix)}


def _exists(id: str) -> bool:
    try:
        _inspect(id)
    except NoSuchContainer:
        return False
    return True


def not_connected(name: str) -> NotFound:
    """Return the error for a workload that has no endpoint."""
    return NotFound(f"{name} is not connected to Calico. Connect it with 'calicoctl container add {name} ipv4'.")


def refuse_other_path(workload: Workload, *paths: object) -> None:
    """Raise CalicoError if `workload` is a namespace whose path is known, and any of `paths` is not its path.

    `paths` are the paths that are stored for the workload's id; None and empty strings in `paths` are ignored. Two
    namespaces may have the same id, for example those at the paths `/a-b` and `/a/b`. Nothing is raised for a container
    that was attached through CNI: its id does not depend on a path.
    """
    for path in paths:
        if _is_namespace_at_path(workload) and path not in (None, "", workload.path):
            raise CalicoError(f"{workload.name} has the same id as {path}, which is connected already: rename one.")


def refuse_others_endpoint(datastore: DatastoreClient, workload: Workload, endpoint: Endpoint) -> None:
    """Raise CalicoError if `workload` is a namespace, and `endpoint` belongs to another namespace with the same id.

    This is so if the attributes of the endpoint's first address contain another path.
    """
    if _is_namespace_at_path(workload) and endpoint.addresses:
        owner = datastore.ipam.owner(parse_address(endpoint.addresses[0]))
        if owner is not None and owner.handle == workload.handle:
            refuse_other_path(workload, owner.secondary.get("namespace"))


def _is_namespace_at_path(workload: Workload) -> bool:
    return workload.orchestrator == NAMESPACE and workload.path is not None


def workload_of(id: EndpointId) -> tuple[str, str]:
    """Return the orchestrator and the id of the workload of the endpoint with this id.

    For a namespace, the orchestrator is NAMESPACE, even if an old tool has stored the endpoint under DOCKER.
    """
    is_path = id.orchestrator == DOCKER and id.workload.startswith("-")
    return (NAMESPACE if is_path else id.orchestrator), id.workload


def endpoint_ids_of(datastore: DatastoreClient, workload: Workload) -> list[EndpointId]:
    """Return the ids of a workload's endpoints on this host, including invalid endpoints.

    If a namespace has no endpoints under NAMESPACE, the ids of those that an old tool has stored under DOCKER are
    returned.
    """
    found = datastore.workload_endpoint_ids(workload.orchestrator, workload.id)
    if not found and workload.orchestrator == NAMESPACE:
        found = datastore.workload_endpoint_ids(DOCKER, workload.id)
    return found


def endpoints_of(datastore: DatastoreClient, workload: Workload) -> list[Endpoint]:
    """Return a workload's endpoints on this host. Raises InvalidValue if one of them is invalid.

    If a namespace has no endpoints under NAMESPACE, those that an old tool has stored under DOCKER are returned.
    """
    found = datastore.workload_endpoints(workload.orchestrator, workload.id)
    if not found and workload.orchestrator == NAMESPACE:
        found = datastore.workload_endpoints(DOCKER, workload.id)
    return found


def _name_of(id: str) -> str:
    try:
        return str(_inspect(id)["Name"]).lstrip("/")
    except CalicoError:
        return id


def _inspect(name: str) -> dict[str, Any]:
    """Return the result of engine.inspect, the Docker Engine's description of a container.

    Raises NoSuchContainer or DockerUnavailable. If there is a namespace /var/run/netns/`name`, the text of the error
    suggests this path.
    """
    try:
        return engine.inspect(name)
    except (NoSuchContainer, DockerUnavailable) as error:
        path = f"/var/run/netns/{name}"
        if not os.path.exists(path):
            raise
        sentence = str(error).rstrip(".")
        raise type(error)(f"{sentence}. There is a network namespace of that name: did you mean {path}?") from None


def called(endpoint: Endpoint) -> str:
    """Return the display name of an endpoint's workload: the workload's name or, if that is not known, its short id."""
    return endpoint.workload_name or short_id(endpoint.id.workload)


def short_id(id: str) -> str:
    """Return the first 12 digits of a hexadecimal id, such as a container's; return an id of another kind unchanged."""
    return id[:12] if re.fullmatch("[0-9a-f]+", id) else id


def has_processes(id: str) -> bool:
    """Return whether the container with this id runs under any engine.

    This is so if the name of any process's control group contains the id: Docker, podman and Kubernetes name a
    container's control group after the id. Source: cgroups(7), /proc/PID/cgroup.
    """
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if id in (process / "cgroup").read_text(errors="replace"):
                return True
    return False


def container_pids(ids: Iterable[str]) -> dict[str, int]:
    """Return the process ids of the first processes of containers, by container id.

    Containers that do not run, or do not exist, are left out. So is a container for which the engine does not answer;
    if this happens for a second container, DockerUnavailable is raised.
    """
    found: dict[str, int] = {}
    failures = 0
    for id in ids:
        try:
            pid = find(id).pid
        except NoSuchContainer:  # it was just removed
            continue
        except DockerUnavailable:
            failures += 1
            if failures > 1:
                raise
            continue
        if pid is not None:
            found[id] = pid
    return found
