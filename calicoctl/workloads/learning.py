"""Finds the workloads that an older version of this program connected on this host, and writes their files.

The files say which workloads are connected (connected.py); the older version did not write them. The agent uses this
module once for each orchestrator: until the file ORCHESTRATOR.learned exists.

A workload is wired if it has an endpoint whose interface exists on this host and leads into the workload's namespace.
A workload that is wired counts as connected. A container need not be wired, since a reboot removes its interface: it
also counts as connected if it has an endpoint, was created with --net=none, and has an address in IPAM on this host.
The paths of namespaces are not read from the store, where others may have written them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from calicoctl.workloads import connected, locks, netns
from calicoctl.workloads.locks import WorkloadLock
from calicoctl.workloads.workload import DOCKER, NAMESPACE, container_pids, process_started, workload_of

if TYPE_CHECKING:
    from calicoctl.datastore.client import DatastoreClient
    from calicoctl.datastore.keys import EndpointId

_NAMED = Path("/run/netns")
"""The directory of `ip netns`."""


def learn_namespaces(datastore: DatastoreClient) -> None:
    """Write the files of the namespaces that are wired, and then the file `namespace.learned`. Raises CalicoError.

    Only the namespaces in /run/netns, and those whose paths an older version stored in lock files, are checked.
    """
    host = datastore.host
    # the tool of 2015 has kept no paths
    names = [path.name for path in _NAMED.iterdir()] if _NAMED.exists() else []
    named = [f"{prefix}/netns/{name}" for prefix in ("/run", "/var/run") for name in names]
    paths = {path.replace("/", "-"): path for path in named} | locks.paths_of_older_version(host, NAMESPACE)
    ids = [id for id in _endpoints(datastore, NAMESPACE) if id.workload in paths]
    for id in _wired({id: paths[id.workload] for id in ids}):
        _learn(host, NAMESPACE, id.workload, paths[id.workload])
    connected.set_learned(host, NAMESPACE)


def learn_containers(datastore: DatastoreClient, network_modes: dict[str, str]) -> None:
    """Write the files of the containers that count as connected, and then the file `docker.learned`.

    `network_modes` maps the ids of all containers of the engine to their values of `docker run --net`. If the store has
    endpoints of containers, but none of a container in `network_modes`, the engine may not have loaded its data yet.
    Then `docker.learned` is not written, and the caller must call this function again later. Raises CalicoError.
    """
    host = datastore.host
    endpoints = _endpoints(datastore, DOCKER)
    known = [id for id in endpoints if id.workload in network_modes]
    ours = {workload for orchestrator, workload in datastore.ipam.workloads() if orchestrator == DOCKER}
    found = {id.workload for id in known if network_modes[id.workload] == "none" and id.workload in ours}
    pids = container_pids(id.workload for id in known if id.workload not in found)
    paths = {id: f"/proc/{pids[id.workload]}/ns/net" for id in known if id.workload in pids}
    found |= {id.workload for id in _wired(paths)}
    for workload in sorted(found):
        _learn(host, DOCKER, workload, "")
    if known or not endpoints:
        connected.set_learned(host, DOCKER)


def _endpoints(datastore: DatastoreClient, orchestrator: str) -> list[EndpointId]:
    ids = datastore.endpoint_ids()
    return [id for id in ids if id.is_valid and workload_of(id)[0] == orchestrator]


def _wired(paths: dict[EndpointId, str]) -> Iterable[EndpointId]:
    lead = netns.check_attachments({id.interface: path for id, path in paths.items()}, next_hops=False)
    return [id for id in paths if lead.get(id.interface)]


def _learn(host: str, orchestrator: str, workload: str, path: str) -> None:
    with WorkloadLock(host, orchestrator, workload):  # on leaving, it removes the file of the older version
        if connected.get(host, orchestrator, workload) is None:
            connected.put(host, orchestrator, workload, path, process_started(path))
