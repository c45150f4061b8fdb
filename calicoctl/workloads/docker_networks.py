"""Finds which container has which endpoint on a Docker network.

The Docker Engine gives each connection of a running container to a network an id. A network driver of Calico's, this
program's or the plugin of 2015, stores the connection as an endpoint with this id, of the orchestrator LIBNETWORK.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from calicoctl import engine
from calicoctl.workloads.workload import short_id

LIBNETWORK = "libnetwork"
"""The orchestrator of endpoints on Docker networks."""


@dataclass(frozen=True)
class Connection:
    """A container's connection to a Docker network.

    `container` and `network` are ids, `container_name` and `network_name` the names. `endpoint` is the id of the
    connection, which is that of its endpoint in the store. It is empty if the container does not run.
    """

    container: str
    container_name: str
    network: str
    network_name: str
    endpoint: str


def connections() -> list[Connection]:
    """Return the connections of all containers, to networks of any driver. Raises DockerUnavailable.

    What the engine describes in an unexpected shape is left out.
    """
    return [connection for container in engine.containers() for connection in _connections_of(container)]


def connection_with(endpoint: str) -> Connection | None:
    """Return the connection of a running container with the id `endpoint`; None if there is none.

    Raises DockerUnavailable.
    """
    return next((connection for connection in connections() if connection.endpoint == endpoint), None)


def _connections_of(container: dict[str, Any]) -> list[Connection]:
    """Return the connections of a container, as `engine.containers` describes it."""
    names = container.get("Names") or [short_id(container["Id"])]
    settings = container.get("NetworkSettings")
    networks = settings.get("Networks") if isinstance(settings, dict) else None
    found = []
    for network_name, facts in networks.items() if isinstance(networks, dict) else ():
        network, endpoint = (_id_in(facts, field) for field in ("NetworkID", "EndpointID"))
        found.append(Connection(container["Id"], names[0].lstrip("/"), network, network_name, endpoint))
    return found


def _id_in(facts: Any, field: str) -> str:
    id = facts.get(field) if isinstance(facts, dict) else None
    return str(id) if engine.is_id(id) else ""
