"""The Docker networks of this host whose driver is Calico's: their names, their options and their profiles.

Each network has a file, /var/lib/calico/HOST/networks/ID, which survives reboots: the engine starts containers before
it can be asked anything. No call of the engine contains a network's name. It comes from the engine's events and lists,
which engine_events.py reads.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from calicoctl import state
from calicoctl.errors import CalicoError
from calicoctl.workloads import libnetwork, network_profiles
from calicoctl.workloads.docker_networks import OPTION
from calicoctl.workloads.libnetwork import NETWORKS
from calicoctl.workloads.network_profiles import named_after, parse_option

if TYPE_CHECKING:
    from calicoctl.datastore.client import DatastoreClient

NAME_PATIENCE = 3.0
"""Seconds for which an endpoint waits until the name of its network is known."""

_GENERIC = "com.docker.network.generic"
_INTERNAL = "com.docker.network.internal"


@dataclass(frozen=True)
class Network:
    """A Docker network. `name` is None as long as it is unknown.

    `internal` says that its containers reach other workloads only. `profiles` are the names in the option OPTION, None
    if the network does not have this option. `has_profile` says that the profile with the network's name has been
    created, or existed: it is created only once.
    """

    id: str
    name: str | None = None
    internal: bool = False
    profiles: tuple[str, ...] | None = None
    has_profile: bool = False


def described(id: str, options: Mapping[str, Any], internal: bool) -> Network:
    """Return a network of unknown name from the options that its creator has given. Raises CalicoError."""
    for name in options:
        if name.startswith("calico.") and name != OPTION:
            raise CalicoError(f"there is no option {name}; a Calico network has the option {OPTION}")
    profiles = parse_option(options[OPTION]) if OPTION in options else None
    return Network(id, internal=internal, profiles=profiles)


def of_request(request: Mapping[str, Any]) -> Network:
    """Return the network that a call of CreateNetwork describes. Raises CalicoError for invalid options.

    Source: libnetwork's netlabel/labels.go.
    """
    options = request.get("Options") or {}
    if not isinstance(options, dict):
        raise CalicoError("Options is not an object")
    generic = options.get(_GENERIC) or {}
    if not isinstance(generic, dict):
        raise CalicoError(f"{_GENERIC} is not an object")
    return described(str(request.get("NetworkID")), generic, options.get(_INTERNAL) is True)


class Networks:
    """The networks of this host. Thread-safe."""

    def __init__(self, host: str) -> None:
        """Read the networks' files. Raises CalicoError."""
        self._host = host
        self._changed = threading.Condition()
        self._networks = {}
        for id, content in state.read_all(host, NETWORKS).items():
            network = _parsed(id, content)
            if network is not None:
                self._networks[id] = network

    def all(self) -> dict[str, Network]:
        """Return all networks, by id."""
        with self._changed:
            return dict(self._networks)

    def get(self, id: str) -> Network | None:
        with self._changed:
            return self._networks.get(id)

    def put(self, network: Network) -> None:
        """Add or replace a network, and write its file, also if that was removed. Raises CalicoError."""
        with self._changed:
            content = {name: value for name, value in asdict(network).items() if name != "id"}
            state.write(self._host, NETWORKS, network.id, content=json.dumps(content).encode())
            if self._networks.get(network.id) != network:
                self._networks[network.id] = network
                self._changed.notify_all()

    def rename(self, id: str, name: str) -> Network | None:
        """Set the name of the network `id`; return the network, None if there is no such one. Raises CalicoError."""
        with self._changed:
            network = self._networks.get(id)
            if network is not None:
                if network.name != name:
                    network = replace(network, name=name, has_profile=False)
                self.put(network)
            return network

    def set_has_profile(self, id: str) -> None:
        """Note that the profile with a network's name exists, unless the network was removed. Raises CalicoError."""
        with self._changed:
            network = self._networks.get(id)
            if network is not None:
                self.put(replace(network, has_profile=True))

    def remove(self, id: str) -> None:
        """Remove a network, its file, and the profiles that are kept for containers in it. Raises CalicoError."""
        with self._changed:
            state.remove(self._host, NETWORKS, id)
            self._networks.pop(id, None)
        network_profiles.forget_network(self._host, id)

    def named(self, id: str) -> Network:
        """Return the network with this id, as soon as its profiles are known.

        Raises CalicoError if there is no such network, or if its name does not become known within NAME_PATIENCE.
        """
        give_up = time.monotonic() + NAME_PATIENCE
        with self._changed:
            while True:
                network = self._networks.get(id)
                if network is not None and (network.name is not None or network.profiles is not None):
                    return network
                left = give_up - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
        if network is None:
            raise CalicoError(f"network {id[:12]} is not known to Calico on this host: remove it and create it again")
        raise CalicoError(
            f"the name of network {id[:12]} is not known yet, since the Docker Engine has not reported it; try again"
        )


def profiles_of(network: Network, option: object = None) -> list[str]:
    """Return the names of the profiles of a new endpoint in a network whose profiles are known.

    `option` is the value of the endpoint's own option OPTION, None if it has none. Without it, they are those of the
    network's option; without that, too, the profile with the network's name. Raises CalicoError if the option is
    invalid, or if the network's name cannot be the name of a profile.
    """
    if option is not None:
        return list(parse_option(option))
    if network.profiles is not None:
        return list(network.profiles)
    assert network.name is not None, "see Networks.named"
    return [named_after(network.name)]


def ensure_profile(datastore: DatastoreClient, known: Networks, network: Network) -> None:
    """Create the profile with the network's name, with the default rules, if it is missing. Raises CalicoError.

    Does nothing if the network has other profiles, or if that was done before: then the user may have deleted it.
    """
    if network.has_profile or network.profiles is not None or network.name is None:
        return
    datastore.create_profile(*profiles_of(network))
    known.set_has_profile(network.id)


def _parsed(id: str, content: bytes) -> Network | None:
    """Return the network in a file; None if the file is invalid: then engine_events.py learns it from the engine."""
    with suppress(ValueError, TypeError, AttributeError):
        value = json.loads(content)
        profiles = value.get("profiles")
        if libnetwork.is_id(id) and (profiles is None or all(isinstance(name, str) for name in profiles)):
            return Network(
                id,
                value.get("name") if isinstance(value.get("name"), str) else None,
                value.get("internal") is True,
                None if profiles is None else tuple(profiles),
                value.get("has_profile") is True,
            )
    return None
