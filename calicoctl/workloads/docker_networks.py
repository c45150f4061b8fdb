"""Finds which container has which endpoint in a Docker network.

The Docker Engine gives each connection of a running container to a network an id. A network driver of Calico's, this
program's or the plugin of 2015, stores the connection as an endpoint with this id, of the orchestrator LIBNETWORK: see
libnetwork.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from calicoctl import engine
from calicoctl.workloads import libnetwork
from calicoctl.workloads.workload import Workload, short_id

if TYPE_CHECKING:
    from calicoctl.datastore.model import Endpoint

DRIVER = "calico"
"""The name of the network driver, which is the name of its socket."""

OPTION = "calico.profile"
"""The option of a network, or of an endpoint, with the names of profiles, separated by commas."""


@dataclass(frozen=True)
class Connection:
    """A container's connection to a Docker network.

    `container` and `network` are ids, `container_name` and `network_name` the names. `endpoint` is the id of the
    connection, which is that of its endpoint in the store. It is empty if the container does not run. `option` is the
    value of OPTION for this connection, None if there is none.
    """

    container: str
    container_name: str
    network: str
    network_name: str
    endpoint: str
    option: str | None = None


def connections() -> list[Connection]:
    """Return the connections of all containers, to networks of any driver. Raises DockerUnavailable.

    For what the engine describes in an unexpected shape, see `connections_of`.
    """
    return [connection for container in engine.containers() for connection in connections_of(container)]


def connection_with(endpoint: str) -> Connection | None:
    """Return the connection of a running container with the id `endpoint`; None if there is none.

    Raises DockerUnavailable.
    """
    return next((connection for connection in connections() if connection.endpoint == endpoint), None)


def connection_in(container: dict[str, Any], network: str) -> Connection | None:
    """Return a container's connection to a network, None if there is none.

    `container` is the result of engine.inspect, and `network` the network's id.
    """
    return next((one for one in connections_of(container) if one.network == network), None)


def connection_of(endpoint: Endpoint) -> Connection | None:
    """Return the connection that an endpoint is stored for; None if the process in plugins/ has not made the endpoint.

    If the endpoint does not say which container it belongs to, the engine is asked. Then the result is also None if no
    running container has the endpoint, and DockerUnavailable may be raised.
    """
    network = endpoint.extra.get(libnetwork.NETWORK)
    if not libnetwork.is_ours(endpoint.id) or not isinstance(network, dict) or not libnetwork.is_id(network.get("id")):
        return None
    container = endpoint.extra.get(libnetwork.CONTAINER)
    if not libnetwork.is_id(container):  # the engine has not reported it yet
        return connection_with(endpoint.id.endpoint)
    name = endpoint.workload_name or short_id(str(container))
    return Connection(str(container), name, network["id"], str(network.get("name")), endpoint.id.endpoint)


def of_workload(workload: Workload) -> list[Connection]:
    """Return the connections of a container to the Docker networks with Calico's driver.

    The container need not run. For a workload without a network of Docker's, the result is empty. Raises
    NoSuchContainer or DockerUnavailable.
    """
    return _of_calico(connections_of(engine.inspect(workload.id))) if workload.docker_networks else []


def _of_calico(found: list[Connection]) -> list[Connection]:
    """Return those of `found` whose network has Calico's driver, with the network's id and name.

    A connection without an option of its own gets the network's. Raises DockerUnavailable.
    """
    ours = [network for network in engine.networks() if network["Driver"] == DRIVER and libnetwork.is_id(network["Id"])]
    result = []
    for one in found:
        # a container that has never been started has no id of its network, but what the user calls it
        called = (one.network,) if one.network else (one.network_name,)
        network = next((n for n in ours if n["Id"] in called or (not one.network and n["Name"] in called)), None)
        if network is not None:
            option = one.option if one.option is not None else _text_in(network.get("Options"), OPTION)
            result.append(replace(one, network=network["Id"], network_name=network["Name"], option=option))
    return result


def connections_of(container: dict[str, Any]) -> list[Connection]:
    """Return the connections of a container, as `engine.containers` or `engine.inspect` describes it.

    An id in an unexpected shape counts as an empty text, and an option as None. If the networks themselves are in an
    unexpected shape, the result is empty.
    """
    names = container.get("Names") or [container.get("Name") or short_id(container["Id"])]
    settings = container.get("NetworkSettings")
    networks = settings.get("Networks") if isinstance(settings, dict) else None
    found = []
    for network_name, facts in networks.items() if isinstance(networks, dict) else ():
        network, endpoint = (_id_in(facts, field) for field in ("NetworkID", "EndpointID"))
        option = _text_in(facts.get("DriverOpts") if isinstance(facts, dict) else None, OPTION)
        found.append(Connection(container["Id"], names[0].lstrip("/"), network, network_name, endpoint, option))
    return found


def _id_in(facts: Any, field: str) -> str:
    id = facts.get(field) if isinstance(facts, dict) else None
    return str(id) if libnetwork.is_id(id) else ""


def _text_in(facts: Any, field: str) -> str | None:
    text = facts.get(field) if isinstance(facts, dict) else None
    return text if isinstance(text, str) else None
