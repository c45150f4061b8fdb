"""Determines which profiles the endpoints of a container in a Docker network have.

These are the usual ones, those of the network, unless a command has set others. A container gets a new endpoint at each
start. So profiles that a command sets belong to the container and the network: they are kept in a file of this host,
/var/lib/calico/HOST/networks.profiles/CONTAINER.NETWORK (the ids of both), which contains a JSON list of their
names, and are given to the container's next endpoints as well. The file is removed when the container or the network
no longer exists.

When an endpoint is made, the container that it is for is not known yet: the engine reports it afterwards. So in a
network for which any profiles are kept, a new endpoint has no profiles at first, so that no packet passes, and its
field PENDING contains the usual ones. `settle` gives it its profiles when the container is known.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Callable

from calicoctl import engine, state
from calicoctl.datastore.model import Endpoint, load_strings
from calicoctl.errors import CalicoError, InvalidValue, NotFound, about
from calicoctl.limits import PROFILES
from calicoctl.policy.rules import check_name
from calicoctl.workloads import docker_networks, libnetwork
from calicoctl.workloads.libnetwork import LIBNETWORK
from calicoctl.workloads.locks import WorkloadLock

if TYPE_CHECKING:
    from calicoctl.datastore.client import DatastoreClient
    from calicoctl.workloads.docker_networks import Connection

OPTION = docker_networks.OPTION

PENDING = "docker_profiles"
"""The field of an endpoint whose container is not known yet, with its usual profiles."""

_FOLDER = "networks.profiles"


def parse_option(value: object) -> tuple[str, ...]:
    """Return the names in the option OPTION of a network or an endpoint. Raises CalicoError if the value is invalid."""
    with about(OPTION):
        if not isinstance(value, str) or not value.strip():
            raise CalicoError("it must be the name of a profile, or several with commas")
        names = tuple(dict.fromkeys(check_name(name.strip(), "profile") for name in value.split(",")))
        if len(names) > PROFILES:
            raise CalicoError(f"there can be {PROFILES} profiles, and these are {len(names)}")
        return names


def named_after(network: str) -> str:
    """Return the name of the profile of a network without the option: the network's own name.

    Raises CalicoError if a profile cannot have this name.
    """
    try:
        return check_name(network, "profile")
    except CalicoError as error:
        raise CalicoError(
            f"the network's profile would have its name, but {error}. Create the network with -o {OPTION}=NAME"
        ) from None


def kept(host: str, container: str, network: str) -> list[str] | None:
    """Return the profiles that a command has set for a container in a network; None if none has.

    `container` and `network` are ids. Raises CalicoError if the file cannot be read.
    """
    content = state.read(host, _FOLDER, _file_name(container, network))
    if content is None:
        return None
    path = state.path(host, _FOLDER, _file_name(container, network))
    try:
        return load_strings(content.decode(), str(path))
    except (UnicodeDecodeError, InvalidValue):
        raise CalicoError(
            f"{path} has no list of profiles: delete it, and set the container's profiles again"
        ) from None


def keep(host: str, container: str, network: str, profiles: Sequence[str]) -> None:
    """Keep `profiles` for the next endpoints of a container in a network. Raises CalicoError."""
    content = json.dumps(list(profiles)).encode()
    state.write(host, _FOLDER, _file_name(container, network), content=content)


def every(host: str) -> list[tuple[str, str]]:
    """Return (container, network), both ids, for which profiles are kept. Raises CalicoError.

    Files with other names, which nothing of ours has written, are left out.
    """
    parts = [name.partition(".") for name in state.read_all(host, _FOLDER)]
    return [(one, other) for one, _, other in parts if libnetwork.is_id(one) and libnetwork.is_id(other)]


def containers_with(host: str, profile: str) -> list[str]:
    """Return the ids of the containers for which a profile is kept, without those whose file cannot be read.

    Only root may read the files; for other users, the result is empty.
    """
    found = set()
    with suppress(CalicoError):
        for container, network in every(host):
            with suppress(CalicoError):
                if profile in (kept(host, container, network) or ()):
                    found.add(container)
    return sorted(found)


def forget(host: str, container: str, network: str) -> None:
    """Remove the profiles that are kept for a container in a network (ids), if any. Raises CalicoError."""
    state.remove(host, _FOLDER, _file_name(container, network))


def forget_network(host: str, network: str) -> None:
    """Remove the profiles that are kept for all containers in a network. Raises CalicoError."""
    for container, other in every(host):
        if other == network:
            forget(host, container, network)


def forget_all(host: str) -> None:
    """Remove all profiles that are kept on a host, and what else is in their folder. Raises CalicoError."""
    for name in state.read_all(host, _FOLDER):
        state.remove(host, _FOLDER, name)
    state.remove_empty(host, _FOLDER)


def _file_name(container: str, network: str) -> str:
    assert libnetwork.is_id(container) and libnetwork.is_id(network), "both are parts of a path"
    return f"{container}.{network}"


def assign(host: str, endpoint: Endpoint, network: str, usual: Sequence[str]) -> None:
    """Set the profiles in `endpoint`, a new one: `usual` or, if any are kept for a container in its network, none yet.

    In the latter case, its field PENDING contains `usual`, until `settle` is called. `network` is the network's id.
    Writes nothing to the store. Raises CalicoError.
    """
    if any(other == network for _, other in every(host)):
        endpoint.profile_ids, endpoint.extra[PENDING] = [], list(usual)
    else:
        endpoint.profile_ids = list(usual)


def settle(host: str, endpoint: Endpoint, container: str, network: str) -> None:
    """Set the profiles in `endpoint`, now that its container is known, and remove its field PENDING.

    They are those that are kept for the container in the network (both ids) or, if there are none, the usual ones. They
    do not change if the container was known before, or if a command has set profiles meanwhile. Writes nothing to the
    store. Raises CalicoError.
    """
    is_new = endpoint.extra.get(libnetwork.CONTAINER) != container
    usual = endpoint.extra.pop(PENDING, None)
    own = kept(host, container, network) if is_new or usual is not None else None
    if usual is not None and endpoint.profile_ids:
        return  # a command on another host has set them meanwhile
    if own is not None:
        endpoint.profile_ids = own
    elif isinstance(usual, list):
        endpoint.profile_ids = [name for name in usual if isinstance(name, str)]


# For commands


def refuse_pending(endpoint: Endpoint) -> None:
    """Raise CalicoError if an endpoint's profiles are not known, since its container is not known yet."""
    if PENDING in endpoint.extra:
        raise CalicoError(
            f"the profiles of endpoint {endpoint.id.endpoint[:12]} are not known yet, since the process for Docker "
            f"networks on {endpoint.id.host} has not stored whose it is: try again in a moment"
        )


def current(datastore: DatastoreClient, connection: Connection) -> Endpoint:
    """Return the endpoint of a container in a Docker network or, if it has none, one with the profiles of its next one.

    In the latter case, the id of the endpoint is empty. Raises CalicoError.
    """
    found = (
        datastore.readable(libnetwork.endpoint_id(datastore.host, connection.endpoint)) if connection.endpoint else None
    )
    return found if found is not None else _next(datastore, connection)


def _next(datastore: DatastoreClient, connection: Connection) -> Endpoint:
    endpoint = Endpoint(libnetwork.endpoint_id(datastore.host, ""), state="inactive", name="")
    own = kept(datastore.host, connection.container, connection.network)
    if own is None and connection.option is not None:
        own = list(parse_option(connection.option))
    endpoint.profile_ids = [named_after(connection.network_name)] if own is None else own
    endpoint.workload_name = connection.container_name
    return endpoint


def modify(datastore: DatastoreClient, connection: Connection, change: Callable[[Endpoint], bool]) -> bool:
    """Change the profiles of a container in a Docker network: of its endpoint, if it runs, and of its next ones.

    `change` changes `profile_ids` of an endpoint, and returns whether anything changed; this function returns the same.
    `change` may be called several times. Raises CalicoError.
    """
    host, container, network = datastore.host, connection.container, connection.network
    done: Endpoint | None = None
    changed = False

    def apply(stored: Endpoint) -> bool:
        nonlocal done, changed
        was_pending = PENDING in stored.extra
        settle(host, stored, container, network)
        changed = change(stored)
        done = stored
        return changed or was_pending

    with WorkloadLock(host, LIBNETWORK, container):
        if connection.endpoint:
            try:
                datastore.modify_endpoint(libnetwork.endpoint_id(host, connection.endpoint), apply)
            except NotFound:  # the container has just stopped
                done = None
        if done is None:
            done = _next(datastore, connection)
            changed = change(done)
            done.check_size()
        profiles = list(done.profile_ids)
        keep(host, container, network, profiles)
        # the container may have been started since, before the file was written
        again = docker_networks.connection_in(engine.inspect(container), network)
        if again is not None and again.endpoint not in ("", connection.endpoint):

            def repeat(stored: Endpoint) -> bool:
                stored.extra.pop(PENDING, None)
                stored.profile_ids = profiles
                return True

            with suppress(NotFound):  # the container has stopped again
                datastore.modify_endpoint(libnetwork.endpoint_id(host, again.endpoint), repeat)
        return changed
