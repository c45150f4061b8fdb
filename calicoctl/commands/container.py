"""Connect containers to the network, and change their addresses and profiles.

Usage:
  calicoctl container add <CONTAINER> <IP> [--interface=<INTERFACE>]
      [--wait=<SECONDS>] [--exist-ok] [--output=<FORMAT>]
  calicoctl container remove <CONTAINERS>...
  calicoctl container <CONTAINER> ip (add|remove) <IP>
      [--interface=<INTERFACE>]
  calicoctl container <CONTAINER> endpoint show [--no-trunc]
      [--output=<FORMAT>]
  calicoctl container <CONTAINER> profile show [--output=<FORMAT>]
  calicoctl container <CONTAINER> profile (append|remove|set) [<PROFILES>...]

Options:
  <CONTAINER>            a Docker container's name, id or unique part of the
                         id's beginning, or the absolute path of a network
                         namespace (/proc/1234/ns/net, /var/run/netns/blue)
  <IP>                   an IPv4 or IPv6 address out of a pool; ipv4 or ipv6
                         for any free one of that version; or the CIDR of a
                         pool for any free one of that pool
  --interface=<INTERFACE>
                         the name of the interface in the container; default:
                         eth1
  --wait=<SECONDS>       wait until this host's agent has set up the endpoint;
                         fail when that takes longer; default: do not wait
  --exist-ok             exit with 0 if the container already has the address
                         and interface
  --no-trunc             show everything on a terminal, however wide it is
  -o, --output=<FORMAT>  json or yaml: of `add`, an object with address,
                         interface, mac, host, orchestrator, workload,
                         endpoint and host_interface; of `show`, an array of
                         the container's endpoints with their fields as in
                         etcd; default: text

The container runs on this host. It should have no other default route: run it
with --net=none. `add`, `remove` and `ip` must be run as root. Profiles are
evaluated in the order of the list; `set` without profiles clears it.
A container in a Docker network with the driver calico is connected by Docker:
`add`, `remove` and `ip` refuse it. `endpoint show` and `profile` work for it;
`profile` must be run as root to change its profiles, which are kept for its
next starts in the same network, and it need not run.

Examples:
  sudo calicoctl container add workload 192.168.0.1
  calicoctl container workload profile append PROFILE
"""

from __future__ import annotations

import re
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from calicoctl.commands.endpoint import (
    Unconnected,
    change_profiles,
    display_order,
    profile_names,
    show_endpoints,
    show_profiles,
    unconnected,
)
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Endpoint
from calicoctl.errors import CalicoError, DockerUnavailable, NoSuchContainer, NotFound, about, for_each, printable
from calicoctl.grammar import Prepared, parse, require_root
from calicoctl.output import data_format, print_data
from calicoctl.workloads import docker_networks, network_profiles
from calicoctl.workloads.docker_networks import Connection
from calicoctl.workloads.workload import (
    CNI,
    Workload,
    check_workload_name,
    endpoint_ids_of,
    find,
    find_connected,
    find_known,
    not_connected,
    refuse_others_endpoint,
)

if TYPE_CHECKING:
    from netaddr import IPAddress

    from calicoctl.workloads.addressing import AddressRequest

_OTHER_ADDRESS = (
    "for another address, disconnect it with 'docker network disconnect NETWORK CONTAINER', and connect it again with "
    "'docker network connect --ip=IP NETWORK CONTAINER'"
)


def prepare(argv: list[str]) -> Prepared:
    arguments = parse(str(__doc__), argv)
    if not (arguments["profile"] or arguments["endpoint"]):
        require_root()
    for name in arguments["<CONTAINERS>"] or [arguments["<CONTAINER>"]]:
        check_workload_name(name)
    if arguments["profile"]:
        return partial(_profile, arguments, profile_names(arguments))
    if arguments["endpoint"]:
        return partial(_endpoint_show, arguments)
    if arguments["remove"] and not arguments["ip"]:
        return partial(_remove, list(dict.fromkeys(arguments["<CONTAINERS>"])))
    request, interface = _request_and_interface(arguments)
    if arguments["ip"] and arguments["remove"]:
        if request.address is None:
            raise CalicoError("say which IP address to remove: 'ipv4', 'ipv6' and a CIDR name none")
        return partial(_ip_remove, arguments["<CONTAINER>"], request.address, interface)
    if arguments["ip"]:
        return partial(_ip_add, arguments["<CONTAINER>"], request, interface)
    return partial(_add, arguments, request, interface, _seconds(arguments["--wait"]))


def _add(arguments: dict[str, Any], request: AddressRequest, interface: str | None, patience: float | None) -> None:
    from calicoctl.workloads import wiring

    form = data_format(arguments)
    datastore = DatastoreClient.from_environment()
    workload = _find(arguments["<CONTAINER>"], datastore)
    _refuse_in_docker_network(datastore, workload, "to connect it otherwise, run it with --net=none")
    made = wiring.connect(datastore, workload, request, interface, arguments["--exist-ok"])
    if form:
        print_data(
            {
                "address": str(made.address),
                "interface": made.interface,
                "mac": made.mac,
                **asdict(made.id),
                "host_interface": made.id.interface,
            },
            form,
        )
    elif made.existed:
        print(f"{workload.name} has IP {made.address} on {printable(str(made.interface))} already.")
    else:
        print(f"IP {made.address} added to {workload.name}")
    sys.stdout.flush()
    if patience is not None:
        _await_agent(datastore, workload.name, made.id, patience)


def _find(name: str, datastore: DatastoreClient) -> Workload:
    """Return the workload that is to be connected, or to get an address. Raises CalicoError, as `find` does.

    The error of a container that was attached through CNI says so.
    """
    try:
        return find(name)
    except (NoSuchContainer, DockerUnavailable):
        orchestrator = None
        with suppress(CalicoError):
            orchestrator = find_known(name, datastore).orchestrator
        if orchestrator == CNI:
            raise CalicoError(
                f"{name} was attached through CNI: only its runtime can connect it, and choose its addresses"
            ) from None
        raise


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text, re.ASCII):
        raise CalicoError(f"--wait={text}: it must be a number of seconds, such as 10 or 0.5")
    return float(text)


def _await_agent(datastore: DatastoreClient, name: str, id: EndpointId, patience: float) -> None:
    """Wait at most `patience` seconds until this host's agent reports that the endpoint is up.

    If the first report that is read says so, it may be an old one. So the endpoint is then written to etcd again,
    unchanged, and the agent's next report is awaited. Raises CalicoError, with the reason, if the agent does not report
    in time that the endpoint is up, or if the workload is disconnected meanwhile. `name` is the workload's name in
    these errors.
    """
    from calicoctl.felix import process

    give_up = time.monotonic() + patience
    said: dict[str, Any] | None = None
    asked = False
    while True:
        revision = datastore.endpoint_revision(id)
        if revision is None:
            raise CalicoError(f"{name} was disconnected concurrently.")
        said = datastore.statuses.of_endpoint(id)
        current = said is not None and said.get("index") == revision
        if current and said is not None and said.get("status") == "up":
            if asked:
                return
            # the status may be about the previous interface of a reconnected container, or from an agent that has died
            datastore.touch_endpoint(id)
            current = False
        asked = True
        if time.monotonic() > give_up:
            break
        time.sleep(0.02)  # a poll is one small read of etcd; a watch would need a read as well, to begin with
    if said is not None and current:
        why = f"this host's agent reports that it is {said.get('status')}: {said.get('reason')}"
    elif process.running(datastore.host):
        why = "this host's agent has not set it up yet"
    else:
        why = "the agent of this host is not running. Start it with 'calicoctl node'"
    raise CalicoError(f"{name} stays connected, but after {patience:g} s {why}.")


def _remove(names: list[str]) -> None:
    from calicoctl.workloads import wiring

    datastore = DatastoreClient.from_environment()

    def remove(name: str) -> None:
        workload = find_known(name, datastore)
        _refuse_in_docker_network(
            datastore, workload, "disconnect it with 'docker network disconnect NETWORK CONTAINER'"
        )
        wiring.disconnect(datastore, workload)
        print(f"Removed Calico from {workload.name}")

    for_each(names, remove)


def _ip_add(name: str, request: AddressRequest, interface: str | None) -> None:
    from calicoctl.workloads import wiring

    datastore = DatastoreClient.from_environment()
    workload = _find(name, datastore)
    _refuse_in_docker_network(datastore, workload, _OTHER_ADDRESS)
    address, is_new = wiring.add_address(datastore, workload, request, interface)
    print(f"IP {address} added to {workload.name}" if is_new else f"{workload.name} has IP {address} already.")


def _ip_remove(name: str, address: IPAddress, interface: str | None) -> None:
    from calicoctl.workloads import wiring

    datastore = DatastoreClient.from_environment()
    workload = find_known(name, datastore)
    _refuse_in_docker_network(datastore, workload, _OTHER_ADDRESS)
    wiring.remove_address(datastore, workload, address, interface)
    print(f"IP {address} removed from {workload.name}")


def _request_and_interface(arguments: dict[str, Any]) -> tuple[AddressRequest, str | None]:
    """Return the address request (from <IP>), and the value of --interface (None if absent). Raises CalicoError."""
    from calicoctl.workloads import addressing

    interface = arguments["--interface"]
    if interface is not None:
        with about("--interface"):
            addressing.check_interface_name(interface)
    return addressing.AddressRequest.parse(arguments["<IP>"]), interface


def _endpoint_show(arguments: dict[str, Any]) -> None:
    datastore = DatastoreClient.from_environment()
    workload, endpoints = find_connected(arguments["<CONTAINER>"], datastore)
    failed: list[Unconnected] = []
    connections = [] if endpoints else docker_networks.of_workload(workload)
    if connections:
        endpoints = [network_profiles.current(datastore, connection) for connection in connections]
        endpoints = [endpoint for endpoint in endpoints if endpoint.id.endpoint]
        if not endpoints:
            raise NotFound(
                f"{workload.name} is in the Docker network {connections[0].network_name}, and has no endpoint there, "
                "since it is not running."
            )
    else:
        try:
            endpoints = _checked(datastore, workload, endpoints)
        except NotFound:
            failed = unconnected(datastore.host, workload.id)
            if not failed:
                raise
    show_endpoints(datastore, endpoints, arguments, failed)


def _profile(arguments: dict[str, Any], profiles: list[str]) -> None:
    name = arguments["<CONTAINER>"]
    datastore = DatastoreClient.from_environment()
    workload, endpoints = find_connected(name, datastore)
    connections = [] if endpoints else docker_networks.of_workload(workload)
    if connections:
        endpoints = [network_profiles.current(datastore, connection) for connection in connections]
    else:
        endpoints = _checked(datastore, workload, endpoints)
    if len(endpoints) > 1:
        ids = ", ".join(endpoint.id.endpoint for endpoint in endpoints)
        raise CalicoError(f"{name} has several endpoints ({ids}): use 'calicoctl endpoint ENDPOINT_ID profile'.")
    if arguments["show"]:
        show_profiles(endpoints[0], data_format(arguments))
    else:
        change_profiles(datastore, endpoints[0], name, arguments, profiles, next(iter(connections), None))


def _docker_networks(datastore: DatastoreClient, workload: Workload) -> list[Connection]:
    """Return the connections of a container to Docker networks with Calico's driver.

    The result is empty if the container was connected by `container add` or by its labels.
    """
    connections = docker_networks.of_workload(workload)
    return [] if connections and endpoint_ids_of(datastore, workload) else connections


def _refuse_in_docker_network(datastore: DatastoreClient, workload: Workload, advice: str) -> None:
    """Raise CalicoError if Docker connects a container, in a network with Calico's driver.

    `advice` says what to do instead; `NETWORK CONTAINER` in it is replaced with the names.
    """
    for connection in _docker_networks(datastore, workload):
        names = f"{connection.network_name} {connection.container_name}"
        raise CalicoError(
            f"{workload.name} is connected by Docker, to its network {connection.network_name}: "
            f"{advice.replace('NETWORK CONTAINER', names)}."
        )


def _checked(datastore: DatastoreClient, workload: Workload, endpoints: list[Endpoint]) -> list[Endpoint]:
    """Return the endpoints of a workload in display order (see `display_order`).

    Raises NotFound if there is none, and CalicoError if one belongs to another namespace, with the same id.
    """
    for endpoint in endpoints:
        refuse_others_endpoint(datastore, workload, endpoint)
    if not endpoints:
        raise not_connected(workload.name)
    return sorted(endpoints, key=display_order)
