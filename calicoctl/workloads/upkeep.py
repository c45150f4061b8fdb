"""Reconciles a workload of this host with its state after restarts, removals, crashes and interrupted commands.

The agent and `ipam check --fix` use this module. Public functions that change something hold the workload's lock.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Callable

from calicoctl.addresses import host_net, parse_address, version_of
from calicoctl.clock import now
from calicoctl.errors import AddressTaken, CalicoError, Conflict
from calicoctl.output import quantity
from calicoctl.workloads import connected, locks, netns
from calicoctl.workloads.addressing import DEFAULT_INTERFACE, interfaces_of, owner_of, reserved_addresses
from calicoctl.workloads.locks import WorkloadLock
from calicoctl.workloads.wiring import WorkloadSession, reattach
from calicoctl.workloads.workload import (
    CNI,
    DOCKER,
    NAMESPACE,
    Workload,
    WorkloadState,
    endpoint_ids_of,
    endpoints_of,
    find_state,
    has_processes,
    is_attachable,
    short_id,
)

if TYPE_CHECKING:
    from netaddr import IPAddress

    from calicoctl.datastore.blocks import Owner
    from calicoctl.datastore.client import DatastoreClient
    from calicoctl.datastore.keys import EndpointId
    from calicoctl.datastore.model import Endpoint

REATTACHED, COLLECTED, CHANGED = "reattached", "collected", "changed"


@dataclass(frozen=True)
class Action:
    """A change that was made to a workload. `kind` is REATTACHED, COLLECTED or CHANGED; `text` is for the log."""

    kind: str
    text: str


class NotConnectedHere(CalicoError):
    """A workload has an endpoint in the store, but no file that says that it was connected here (connected.py)."""

    def __init__(self, id: str) -> None:
        super().__init__(f"nobody has connected {id} on this host")


def is_managed(orchestrator: str, workload: str) -> bool:
    """Return whether a workload can be reconciled; `workload` is its id.

    This is so for a container of the Docker Engine with a full id, for a container that was attached through CNI with a
    valid id, and for a namespace whose id is derived from a path, with `-` for `/`.
    """
    if orchestrator == DOCKER:
        return re.fullmatch("[0-9a-f]{64}", workload) is not None
    if orchestrator == CNI:
        return is_attachable(workload)
    return orchestrator == NAMESPACE and workload.startswith("-") and "\0" not in workload


def reconcile(
    datastore: DatastoreClient,
    orchestrator: str,
    id: str,
    may_collect: Callable[[WorkloadState], bool],
    removed: bool = False,
) -> Iterator[Action]:
    """Reconcile a workload's endpoints, interfaces and addresses with its state; yield each action after it is done.

    Does nothing for an id of an orchestrator that is not ours, or that is no valid id (see is_managed). What is done
    depends on the workload's state:

    * RUNNING: its interface is recreated if it is missing, and its endpoint becomes active.
    * STOPPED: its interfaces are deleted, and its endpoints become inactive.
    * MISSING (not where it was, but it may be back) or GONE (it no longer exists): if `may_collect` returns True, the
      workload is garbage-collected, that is, its endpoints, interfaces and addresses are removed. If `may_collect`
      returns False, its endpoints become inactive.

    A container that was attached through CNI is not changed if it is GONE, but its interface exists. Its namespace then
    exists, too: perhaps the kernel is just removing it, or its path is not visible to this process.

    `may_collect` is called with the state; its result has no effect if the workload is RUNNING or STOPPED. Addresses
    that no endpoint lists, which an interrupted command has left, are released if the workload is RUNNING or STOPPED,
    or has no endpoint.

    `removed` says that the engine has reported the removal of the container. If `removed` is False, and a container
    that is GONE, since the engine does not know it, still runs, under another engine, CalicoError is raised.

    Raises NotConnectedHere if the workload has no file that says that it was connected here (connected.py): for a
    container of the Docker Engine only if it runs without its interface, for others if they have an endpoint. Raises
    Conflict if another process holds the workload's lock, DockerUnavailable or NamespaceError if the workload's state
    cannot be determined, and CalicoError if a change fails.
    """
    if not is_managed(orchestrator, id) or not _has_anything(datastore, orchestrator, id):
        return
    with_handle = datastore.ipam.handles.exists(f"{orchestrator}.{id}")
    asked = _ask_engine(datastore, id) if orchestrator == DOCKER else None
    with WorkloadLock(datastore.host, orchestrator, id, patience=0) as lock:
        ids, held = _read(datastore, Workload(orchestrator, id, id))
        known = connected.get(datastore.host, orchestrator, id)
        path = known.path if known is not None else ""

        def current_state() -> tuple[WorkloadState, Workload]:
            if orchestrator != DOCKER:
                return find_state(orchestrator, id, known)
            if asked is None or asked.interfaces != _interfaces(ids):
                raise Conflict(f"container {short_id(id)} was changed by another process; retry")
            return asked.state, asked.workload

        if not ids:
            workload = Workload(orchestrator, id, id if orchestrator == CNI else path or id)
            yield from _release_leaked(datastore, workload, [], held)
            if known is not None and (lock.interrupted or _is_over(current_state()[0], may_collect)):
                connected.forget(datastore.host, orchestrator, id)
            lock.clear_all()
            if with_handle and not held and not datastore.ipam.handles.exists(workload.handle):
                yield Action(COLLECTED, f"{_called(workload)} had a handle that held nothing: removed")
            return
        if orchestrator != DOCKER and known is None:
            workload = Workload(orchestrator, id, id)
            if not any(netns.find_interface(endpoint.interface) for endpoint in ids):
                endpoints = endpoints_of(datastore, workload)
                yield from _set_inactive(datastore, workload, endpoints, WorkloadState.MISSING)
            raise NotConnectedHere(id)
        state, workload = current_state()
        if state is WorkloadState.GONE and not removed:
            if orchestrator == CNI and any(netns.find_interface(endpoint.interface) for endpoint in ids):
                return
            _refuse_other_engines(workload, ids)
        is_absent = state in (WorkloadState.MISSING, WorkloadState.GONE)
        if may_collect(state) and is_absent:
            yield _garbage_collect(datastore, workload, lock, ids, held)
            return
        endpoints = endpoints_of(datastore, workload)
        yield from _update_name(datastore, workload, endpoints, held)
        if is_absent:
            yield from _set_inactive(datastore, workload, endpoints, state)
        elif state is WorkloadState.STOPPED:
            lock.mark_in_progress()
            yield from _set_inactive(datastore, workload, endpoints, state)
            for endpoint in endpoints:
                netns.delete_interface(endpoint.id.interface)
            yield from _release_leaked(datastore, workload, endpoints, held)
        else:
            with netns.Namespace(workload.namespace_path(), workload.name) as namespace:
                yield from _reconcile_running(WorkloadSession(datastore, workload, lock, namespace), held)
        lock.clear_all()


@dataclass(frozen=True)
class _Asked:
    """The state of a container as the engine has told it, and the interfaces of its endpoints just before that."""

    state: WorkloadState
    workload: Workload
    interfaces: dict[str, int]


def _ask_engine(datastore: DatastoreClient, id: str) -> _Asked | None:
    """Ask the engine about a container that is connected on this host; return None for one that is not.

    The caller must not hold the container's lock. While a container is being started, the engine answers no question
    about it, and the start waits for Docker's hook (starting.py), which waits for the lock.
    """
    ids = endpoint_ids_of(datastore, Workload(DOCKER, id, id))
    if not ids and connected.get(datastore.host, DOCKER, id) is None:
        return None
    interfaces = _interfaces(ids)
    state, workload = find_state(DOCKER, id, None)
    return _Asked(state, workload, interfaces)


def _interfaces(ids: list[EndpointId]) -> dict[str, int]:
    """Return the indices of the endpoints' interfaces by their names; 0 for one that does not exist.

    A new interface does not get the index of a deleted one. So if two results differ, the workload was attached or
    detached between them.
    """
    found = {id.interface: netns.find_interface(id.interface) for id in ids}
    return {name: interface.index if interface is not None else 0 for name, interface in found.items()}


def _has_anything(datastore: DatastoreClient, orchestrator: str, id: str) -> bool:
    workload = Workload(orchestrator, id, id)
    return (
        locks.exists(datastore.host, orchestrator, id)
        or connected.get(datastore.host, orchestrator, id) is not None
        or bool(endpoint_ids_of(datastore, workload))
        or datastore.ipam.handles.exists(workload.handle)
    )


def _read(datastore: DatastoreClient, workload: Workload) -> tuple[list[EndpointId], dict[IPAddress, Owner]]:
    held = datastore.ipam.held_by(workload.handle) or {}
    return endpoint_ids_of(datastore, workload), {
        address: owner for address, owner in held.items() if owner.secondary.get("host") == datastore.host
    }


def _is_over(state: WorkloadState, may_collect: Callable[[WorkloadState], bool]) -> bool:
    """Return whether a workload is MISSING or GONE, and `may_collect` returns True for this state."""
    return may_collect(state) and state in (WorkloadState.MISSING, WorkloadState.GONE)


def _refuse_other_engines(workload: Workload, ids: list[EndpointId]) -> None:
    """Raise CalicoError if `workload`, which Docker does not know, is a container that runs under another engine.

    Whether it runs is checked only if the interface of any of its endpoints exists. `ids` are the endpoints' ids.
    """
    if (
        workload.orchestrator == DOCKER
        and any(netns.find_interface(id.interface) for id in ids)
        and has_processes(workload.id)
    ):
        raise CalicoError(
            f"Docker knows no container {short_id(workload.id)}, but it runs: is it another Docker Engine's? What "
            "belongs to it is kept"
        )


def misattached(paths: dict[EndpointId, str]) -> list[EndpointId]:
    """Return the ids of the endpoints whose interface exists, but does not lead into the right namespace.

    `paths` maps the ids of endpoints of this host to the paths of the right namespaces. An endpoint whose workload
    lacks a next hop's neighbour entry is returned, too (see netns.check_attachments). An endpoint is not returned if
    its interface does not exist, or if there is no namespace at its path.
    """
    # a namespace exists as long as a process is in it, even if its path was deleted or leads elsewhere
    sound = netns.check_attachments({id.interface: path for id, path in paths.items()})
    return [id for id in paths if sound.get(id.interface) is False]


def _reconcile_running(session: WorkloadSession, held: dict[IPAddress, Owner]) -> Iterator[Action]:
    """Reconcile a running workload: its interface, its endpoint's state and its neighbour entries; yield each action.

    `held` are the workload's addresses on this host. Those that the endpoint does not list are released. Raises
    NotConnectedHere if the interface is missing and the workload has no file (connected.py). Raises CalicoError if a
    change fails.
    """
    datastore, workload, endpoint = session.datastore, session.workload, session.only_endpoint()
    if session.namespace.is_own():
        raise CalicoError(f"{workload.name} cannot be connected: its network namespace is the host's own.")
    attached = session.attached_interface(also_down=True)
    if attached is not None and session.attached_interface() is None and session.lock.interrupted:
        attached = None  # an interrupted command has created it, and not set it up completely
    if attached is None:
        if session.known is None:
            raise NotConnectedHere(workload.id)
        reattach(session, endpoint)
        since = endpoint.inactive_since
        why = f"it runs again, was inactive since {since}" if since else "it had none"
        addresses = ", ".join(endpoint.addresses) or "no address"
        text = f"{_called(workload)} is re-attached: interface {endpoint.id.interface}, {addresses}; {why}"
        yield Action(REATTACHED, text)
    elif endpoint.state == "inactive":
        datastore.modify_endpoint(endpoint.id, _active)
        since = f", was inactive since {endpoint.inactive_since}" if endpoint.inactive_since else ""
        yield Action(CHANGED, f"{_called(workload)} is active: it is running{since}")
    if attached is not None and session.namespace.update_next_hops(attached, session.host_mac):
        yield Action(CHANGED, f"{_called(workload)} has a new neighbour entry of its next hop, {session.host_mac}")
    left = [host_net(address) for address in _unlisted([endpoint], held)]
    if attached is not None and left:
        versions = {version_of(net) for net in left} - {version_of(net) for net in endpoint.nets}
        session.namespace.unconfigure(attached, left, versions)
    yield from _release_leaked(datastore, workload, [endpoint], held)


def _update_name(
    datastore: DatastoreClient, workload: Workload, endpoints: list[Endpoint], held: dict[IPAddress, Owner]
) -> Iterator[Action]:
    """Write a container's current name into those of its endpoints and addresses' attributes that lack it.

    `endpoints` are the container's endpoints, `held` its addresses. Does nothing for a namespace.
    """
    name = workload.docker_name
    if not name:
        return

    def change(endpoint: Endpoint) -> bool:
        if endpoint.workload_name == name:
            return False
        endpoint.workload_name = name
        return True

    changed = [r for r in endpoints if r.workload_name != name and datastore.modify_endpoint(r.id, change)]
    others = [address for address, owner in held.items() if owner.secondary.get("workload_name") != name]
    datastore.ipam.set_workload_name(workload.handle, others, name)
    if changed:
        before = changed[0].workload_name
        text = f"was called {before} before" if before else "has its name in its endpoint again"
        yield Action(CHANGED, f"{_called(workload)} {text}")


def _active(endpoint: Endpoint) -> bool:
    endpoint.state, endpoint.inactive_since = "active", None
    return True


def _set_inactive(
    datastore: DatastoreClient, workload: Workload, endpoints: list[Endpoint], state: WorkloadState
) -> Iterator[Action]:
    """Set the active ones of a workload's `endpoints` to inactive. The action's text names the workload's `state`."""
    since = now()

    def change(endpoint: Endpoint) -> bool:
        if endpoint.state != "active":
            return False
        endpoint.state, endpoint.inactive_since = "inactive", since
        return True

    changed = [endpoint for endpoint in endpoints if datastore.modify_endpoint(endpoint.id, change)]
    if changed:
        yield Action(CHANGED, f"{_called(workload)} is inactive: it {state.value}")


def _garbage_collect(
    datastore: DatastoreClient,
    workload: Workload,
    lock: WorkloadLock,
    ids: list[EndpointId],
    held: dict[IPAddress, Owner],
) -> Action:
    """Remove the endpoints, interfaces and addresses of a workload that no longer exists.

    `ids` are the ids of its endpoints, `held` the addresses of its handle on this host. Addresses without a handle that
    an endpoint lists are not released; the action's text names them. The caller holds `lock`, the workload's lock.
    """
    datastore.check_endpoints_writable(ids, workload.handle)
    lock.mark_in_progress()
    endpoints = filter(None, map(datastore.readable, ids))
    listed = {address for endpoint in endpoints for address in endpoint.addresses}
    owners = {address: datastore.ipam.owner(parse_address(address)) for address in sorted(listed - set(map(str, held)))}
    kept = [address for address, owner in owners.items() if owner is not None and owner.handle is None]
    for name in {id.interface for id in ids} | interfaces_of(held.values()):
        netns.delete_interface(name)
    for id in ids:
        datastore.remove_endpoint(id)
    datastore.ipam.release(held, {workload.handle})
    connected.forget(datastore.host, workload.orchestrator, workload.id)
    lock.clear_all()
    text = f"{_called(workload)} no longer exists; removed {quantity(len(ids), 'endpoint')}"
    text += f", released {', '.join(map(str, sorted(held)))}" if held else ""
    if kept:
        have = "has" if len(kept) == 1 else "have"
        text += f"; kept {', '.join(kept)}, which {have} no handle: 'calicoctl ipam release' releases those not in use"
    return Action(COLLECTED, text)


def _release_leaked(
    datastore: DatastoreClient,
    workload: Workload,
    endpoints: list[Endpoint],
    held: dict[IPAddress, Owner],
) -> Iterator[Action]:
    """Release the addresses in `held` that no endpoint lists, and delete the veth pairs that were created for them.

    `endpoints` are all endpoints of the workload, and `held` the addresses of its handle on this host, with the owners
    from whose attributes the pairs' names are derived. The veth pairs of `endpoints` are not deleted. The caller holds
    the workload's lock.
    """
    left = _unlisted(endpoints, held)
    pairs = interfaces_of(left.values()) - {endpoint.id.interface for endpoint in endpoints}
    pairs = {name for name in pairs if netns.delete_interface(name)}
    datastore.ipam.release(left, {workload.handle})
    if left:
        text = f"{_called(workload)} had {', '.join(map(str, sorted(left)))} of an interrupted command"
        text += f", and the interface {', '.join(sorted(pairs))}" if pairs else ""
        yield Action(COLLECTED, f"{text}: released")


def _unlisted(endpoints: list[Endpoint], held: dict[IPAddress, Owner]) -> dict[IPAddress, Owner]:
    listed = {address for endpoint in endpoints for address in endpoint.addresses}
    return {address: owner for address, owner in held.items() if str(address) not in listed}


def _called(workload: Workload) -> str:
    if workload.orchestrator == DOCKER:
        name = f" ({workload.docker_name})" if workload.docker_name else ""
        return f"container {short_id(workload.id)}{name}"
    if workload.orchestrator == CNI:
        return f"CNI container {short_id(workload.id)}"
    return f"namespace {workload.name}"


# For `ipam check --fix`


def release_leaked(datastore: DatastoreClient, workload: Workload) -> list[Action]:
    """Release a workload's addresses on this host that no endpoint lists, and delete the veth pairs created for them.

    Returns the actions that were done. Raises CalicoError.
    """
    with WorkloadLock(datastore.host, workload.orchestrator, workload.id):
        return list(
            _release_leaked(datastore, workload, endpoints_of(datastore, workload), _read(datastore, workload)[1])
        )


def restore_address(datastore: DatastoreClient, id: EndpointId, address: str) -> bool:
    """Assign a free address to the workload whose endpoint lists it; return whether the address was assigned.

    `id` is the id of the endpoint, which must be on this host. Returns False if the address is assigned already, or if
    the endpoint does not list it any more. Raises CalicoError, in particular if the address is used by something else,
    such as this host or one of its gateways (Reserved.user).
    """
    from calicoctl.datastore.blocks import Owner

    why = reserved_addresses(datastore, version_of(address)).user(address)
    if why is not None:
        raise CalicoError(f"it is {why} now")
    with WorkloadLock(datastore.host, id.orchestrator, id.workload):
        known = connected.get(datastore.host, id.orchestrator, id.workload)
        workload = Workload(id.orchestrator, id.workload, id.workload, path=known.path or None if known else None)
        endpoint = next((endpoint for endpoint in endpoints_of(datastore, workload) if endpoint.id == id), None)
        if endpoint is None or address not in endpoint.addresses:
            return False
        workload = replace(workload, docker_name=endpoint.workload_name or "")
        owners = (datastore.ipam.held_by(workload.handle) or {}).values()
        if id.orchestrator == DOCKER and id.workload.startswith("-"):
            owner = Owner(None, {})  # connected by an old tool: its addresses have no handle
        else:
            owner = next(iter(owners), owner_of(workload, id, DEFAULT_INTERFACE))
        try:
            datastore.ipam.assign(parse_address(address), owner)
        except AddressTaken:
            return False
    return True
