"""Removes one endpoint of this host by its id, for `calicoctl endpoint ID remove`.

This is for endpoints whose workload no longer exists, and which nothing else removes: those of other orchestrators,
such as the libnetwork plugin of 2015, and what is left of a workload. The endpoint of a workload that exists is
refused, since another command disconnects it: `calicoctl container remove` or `docker network disconnect`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from calicoctl.addresses import parse_address
from calicoctl.errors import CalicoError, DockerUnavailable, NotFound
from calicoctl.workloads import connected, docker_networks, netns
from calicoctl.workloads.addressing import paths_of
from calicoctl.workloads.connected import Connected
from calicoctl.workloads.libnetwork import LIBNETWORK
from calicoctl.workloads.locks import WorkloadLock
from calicoctl.workloads.upkeep import is_managed
from calicoctl.workloads.workload import (
    CNI,
    DOCKER,
    NAMESPACE,
    WorkloadState,
    find_state,
    has_processes,
    short_id,
    workload_of,
)

if TYPE_CHECKING:
    from netaddr import IPAddress

    from calicoctl.datastore.blocks import Owner
    from calicoctl.datastore.client import DatastoreClient
    from calicoctl.datastore.keys import EndpointId


def remove_endpoint(datastore: DatastoreClient, id: EndpointId) -> list[IPAddress]:
    """Remove an endpoint of this host, with its interface and addresses; return the addresses that were released.

    The endpoint may be invalid. Released are the workload's addresses that the endpoint lists, or that were assigned
    for it; and, of the addresses without a handle that it lists, those that no other endpoint lists. With the
    workload's last endpoint, all addresses of the workload on this host are released.

    Raises NotFound if there is no such endpoint. Raises CalicoError, and changes nothing, if the endpoint is on another
    host, or if its workload exists (see _refuse_existing). Raises CalicoError also if a step fails: then the steps
    before are not undone, and `ipam check` finds the addresses that are left.
    """
    if id.host != datastore.host:
        raise CalicoError(
            f"Endpoint {id.endpoint} is on {id.host}, not on this host ({datastore.host}). Run 'calicoctl endpoint "
            f"{id.endpoint} remove' there or, if that host is gone for good, 'calicoctl node remove "
            f"--hostname={id.host} --remove-endpoints'."
        )
    orchestrator, workload = workload_of(id)
    with WorkloadLock(datastore.host, orchestrator, workload) as lock:
        of_host = datastore.endpoint_ids()
        if id not in of_host:
            raise NotFound(f"Endpoint {id.endpoint} does not exist.")
        others = [other for other in of_host if other != id]
        handles = {f"{id.orchestrator}.{id.workload}", f"{orchestrator}.{workload}"}
        held: dict[IPAddress, Owner] = {}
        for handle in handles:
            held.update(datastore.ipam.held_by(handle) or {})
        _refuse_existing(datastore, id, held)

        endpoint = datastore.readable(id)
        listed = [] if endpoint is None else list(map(parse_address, endpoint.addresses))
        is_last = workload not in {other.workload for other in others if workload_of(other)[0] == orchestrator}
        its = [
            a for a, owner in held.items() if is_last or a in listed or owner.secondary.get("endpoint") == id.endpoint
        ]
        unowned = [
            a for a in listed if a not in held and set(datastore.endpoints_with(a, datastore.ipam.owner(a))) <= {id}
        ]
        datastore.check_endpoints_writable([id], f"{orchestrator}.{workload}")
        if is_managed(orchestrator, workload):
            lock.mark_in_progress()  # if this is interrupted, the agent removes the rest
        # the names of two interfaces may be equal, since they are derived from the beginning of the ids
        if id.is_valid and id.interface not in {other.interface for other in others}:
            netns.delete_interface(id.interface)
        # before the endpoint is removed: without it, nothing would say whose they are
        kept = datastore.ipam.release(unowned, {None})
        datastore.remove_endpoint(id)
        datastore.ipam.release(its, set(handles))
        if is_last:
            connected.forget(datastore.host, orchestrator, workload)
            lock.clear_all()
        lock.clear_mark()
    return sorted({*its, *unowned} - set(kept))


def _refuse_existing(datastore: DatastoreClient, id: EndpointId, held: dict[IPAddress, Owner]) -> None:
    """Raise CalicoError if the workload of an endpoint exists, or may exist; the error says what disconnects it.

    `held` are the workload's addresses on this host. For a container, running or not, and a namespace that this program
    may have connected, the error names `calicoctl container remove`. For an endpoint on a Docker network that a running
    container has, it names `docker network disconnect`; if the Docker Engine does not know the container, one whose
    interface leads to another namespace is refused as well. Workloads of other orchestrators are not looked for.
    """
    orchestrator, workload = workload_of(id)
    if orchestrator == LIBNETWORK:
        _refuse_on_docker_network(id)
    elif is_managed(orchestrator, workload):
        known = connected.get(datastore.host, orchestrator, workload)
        paths = [known.path if known is not None else None, *paths_of(held.values())]
        path = next((path for path in paths if isinstance(path, str) and path), "")
        called = path or "PATH" if orchestrator == NAMESPACE else short_id(workload)
        disconnect = f"'calicoctl container remove {called}'"
        try:
            state, _ = find_state(orchestrator, workload, known or Connected(path))
        except DockerUnavailable as error:
            raise CalicoError(f"{error} Without Docker, {disconnect} removes the endpoint.") from None
        is_kept = state in (WorkloadState.RUNNING, WorkloadState.STOPPED)
        if state is WorkloadState.GONE and orchestrator == DOCKER:
            is_kept = netns.find_interface(id.interface) is not None and has_processes(workload)
        elif orchestrator == CNI or (orchestrator == NAMESPACE and not path):
            # its namespace may exist, though no path leads to it: then its interface exists as well
            is_kept = is_kept or netns.find_interface(id.interface) is not None
        if is_kept:
            what = "namespace" if orchestrator == NAMESPACE else "container"
            raise CalicoError(
                f"Endpoint {id.endpoint} is that of a {what} that exists: disconnect it with {disconnect}."
            )


def _refuse_on_docker_network(id: EndpointId) -> None:
    try:
        connection = docker_networks.connection_with(id.endpoint)
    except DockerUnavailable as error:
        if netns.find_interface(id.interface) is None:  # then no container is connected by it
            return
        raise CalicoError(
            f"{error} Endpoint {id.endpoint} has its interface {id.interface}, so a container may be connected by it."
        ) from None
    if connection is not None:
        network, container = connection.network_name, connection.container_name
        raise CalicoError(
            f"Endpoint {id.endpoint} is that of {container} on the Docker network {network}: disconnect it with "
            f"'docker network disconnect {network} {container}'."
        )
    interface = netns.find_interface(id.interface)
    if interface is not None and interface.peer_is_elsewhere:
        raise CalicoError(
            f"Endpoint {id.endpoint} has its interface {id.interface} in a container, which the Docker Engine does not "
            "know: DOCKER_HOST may name another engine than the container's. End the container first."
        )
