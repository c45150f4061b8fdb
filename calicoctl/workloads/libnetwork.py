"""Endpoints of Docker networks, which the engine has the process in plugins/ make: their names in the store.

Which container has which endpoint is in docker_networks.py.

Such an endpoint is the engine's: it is made when a container joins a network, and removed when the container leaves it
or stops. Its orchestrator is LIBNETWORK, and both its workload and its endpoint id are the id that the engine has given
it. The owner of its addresses has the handle `libnetwork.ENDPOINT`. Between two calls of the engine, an address that
was requested, but not used yet, has an owner with a handle of its own, `libnetwork.request.HOST.UUID`.

Its value in the store has two fields more than other endpoints: NETWORK, an object with the `id` and the `name` of the
Docker network, and CONTAINER, the id of the container, as soon as that is known.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from calicoctl import state
from calicoctl.datastore.keys import EndpointId
from calicoctl.workloads.workload import Workload

if TYPE_CHECKING:
    from calicoctl.datastore.blocks import Owner

LIBNETWORK = "libnetwork"
NETWORK, CONTAINER = "docker_network", "docker_container"

NETWORKS = "networks"
"""The folder, among the files of a host, with a file for each of its Docker networks: see plugins/networks.py."""

ENGINE = "networks.engine"
"""The file, among the files of a host, with the id of the Docker Engine that has these networks."""


def is_id(value: object) -> bool:
    """Return whether a JSON value can be the engine's id of a network, an endpoint or a container."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def endpoint_id(host: str, id: str) -> EndpointId:
    """Return the EndpointId of the endpoint to which the engine has given the id `id`."""
    return EndpointId(host, LIBNETWORK, id, id)


def workload(id: str, name: str = "") -> Workload:
    """Return the workload that the endpoint `id` belongs to. `name` is the container's name, empty if it is unknown."""
    return Workload(LIBNETWORK, id, name or id, docker_name=name)


def is_ours(id: EndpointId) -> bool:
    """Return whether an endpoint in the store was made by the process in plugins/; if not, an old plugin may have."""
    return id.orchestrator == LIBNETWORK and id.workload == id.endpoint and is_id(id.endpoint)


def owner(host: str, id: str) -> Owner:
    """Return the Owner of the addresses of the endpoint `id`."""
    from calicoctl.datastore.blocks import Owner

    facts = {"host": host, "orchestrator": LIBNETWORK, "workload": id, "endpoint": id, "namespace": None}
    return Owner(workload(id).handle, facts)


def requests_of(host: str) -> str:
    """Return the beginning of the handles of all requests for addresses on a host."""
    return f"{LIBNETWORK}.request.{host}."


def request_owner(host: str) -> Owner:
    """Return an Owner, with a handle of its own, of an address that was requested and has no endpoint yet."""
    import uuid  # with platform, which most commands do not need

    from calicoctl.datastore.blocks import Owner

    id = uuid.uuid4().hex
    return Owner(f"{requests_of(host)}{id}", {"host": host, "orchestrator": LIBNETWORK, "request": id})


def forget_networks(host: str) -> None:
    """Remove the files of a host's Docker networks, and ENGINE. Raises CalicoError."""
    for id in state.read_all(host, NETWORKS):
        state.remove(host, NETWORKS, id)
    state.remove(host, ENGINE)
    state.remove_empty(host, NETWORKS)
