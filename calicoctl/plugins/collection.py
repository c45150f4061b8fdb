"""Removes what the engine's calls have not removed: endpoints, addresses, veth pairs and networks that are not in use.

It also has the engine start the containers that were refused meanwhile: see restarting.py.

Something is left when the engine, this process, or the host was killed, or when etcd did not answer. What is in use is
what the engine says. So nothing is removed while it does not answer, or while it starts; and only what it has not known
for GRACE seconds, since it makes and removes an endpoint in several calls. What has its interface in a container is in
use, whatever the engine says: the wrong one may have been asked. The files of networks, and the profiles that are kept
for containers, are removed only if it is the engine that had these networks before. Nothing is removed, either, while
another machine's agent has this host's name.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from calicoctl import engine, state
from calicoctl.datastore.keys import INTERFACE_PREFIX
from calicoctl.errors import CalicoError, DockerUnavailable, InvalidValue, NotFound
from calicoctl.plugins import restarting
from calicoctl.plugins.endpoints import PEER_PREFIX, is_of_another_machine
from calicoctl.plugins.engine_events import EngineEvents
from calicoctl.plugins.networks import Networks
from calicoctl.plugins.stores import Stores
from calicoctl.workloads import libnetwork, locks, netns, network_profiles, wiring
from calicoctl.workloads.docker_networks import DRIVER
from calicoctl.workloads.libnetwork import LIBNETWORK

if TYPE_CHECKING:
    from calicoctl.datastore.client import DatastoreClient
    from calicoctl.plugins.network_driver import NetworkDriver

log = logging.getLogger("calico.plugins")

INTERVAL = 60.0
"""Seconds between two calls of Collection.look, if nothing has happened that may leave something."""

GRACE = 15.0
"""Seconds for which something must be unknown to the engine before it is removed; a call takes fewer."""

REQUEST_GRACE = 60.0
"""GRACE, in seconds, for an address that was requested, and has no endpoint yet."""

PAUSE = 5.0
"""Seconds between a call of Collection.look that has failed and the next one."""

SHORTEST = 1.0
"""The minimum number of seconds between two calls of Collection.look: each makes a dozen requests."""


@dataclass(frozen=True)
class Leftover:
    """Something that may be left. `text` names it, and `remove` removes it.

    `remove` is to be called when every search in the last `grace` seconds has found it.
    """

    text: str
    remove: Callable[[], object]
    grace: float = GRACE


class Collection:
    """Searches for what is left, and removes it, in a thread of its own."""

    def __init__(self, stores: Stores, known: Networks, events: EngineEvents, driver: NetworkDriver) -> None:
        self._stores = stores
        self._networks = known
        self._events = events
        self._driver = driver
        self._since: dict[str, float] = {}
        """Text of a Leftover -> the time (monotonic) since which every call of `look` has found it."""
        self._foreign: set[str] = set()
        """Handles whose addresses are on other hosts."""
        self._refused = True
        """Whether starts of containers may have failed because the store, or this process, was away, or frozen."""
        self._said: dict[str, str] = {}
        """What a warning is about -> the warning that was logged last."""

    def start(self) -> None:
        threading.Thread(target=self._run, name="collecting what is left", daemon=True).start()

    def _run(self) -> None:
        while True:
            self._stores.happened.clear()
            if self._stores.failed:
                self._refused, self._stores.failed = True, False
            if self.try_to_look():
                time.sleep(SHORTEST)  # whatever happens meanwhile
                self._stores.happened.wait(GRACE / 2 if self._since else PAUSE if self._refused else INTERVAL)
            else:
                time.sleep(PAUSE)  # the store or the engine is away, and announces its return to nobody

    def try_to_look(self) -> bool:
        """Do what `look` does; return False, and log the reason, if it fails."""
        try:
            self.look()
        except CalicoError as error:
            if isinstance(error, DockerUnavailable):
                self._since.clear()
            self._warn("look", f"it cannot be seen what is left of Docker networks: {error}")
            return False
        except Exception:  # of whatever kind: nothing else would look again
            log.exception("looking for what is left failed")
            return False
        self._said.pop("look", None)
        return True

    def _warn(self, subject: str, text: str) -> None:
        """Log a warning, unless the last one about this subject had the same text."""
        if self._said.get(subject) != text:
            log.warning("%s", text)
            self._said[subject] = text

    def look(self) -> None:
        """Search for what may be left, and remove what has been found for its `grace` seconds. Raises CalicoError.

        Also stores what the engine says of its networks and their containers, and starts containers that were refused
        (restarting.py), unless the data is frozen. A removal that fails is logged, and raises nothing. Does nothing
        while another machine's agent has this host's name.
        """
        # before the engine is asked, so that what is made meanwhile counts as known
        with self._stores.client() as datastore:
            if is_of_another_machine(datastore):
                self._since.clear()
                return
            found = list(self._stored(datastore))
            may_start = self._refused and not datastore.is_frozen()
        locks.remove_stale(self._stores.host, LIBNETWORK)
        joined = self._driver.joined()
        known = self._networks.all()
        kept = network_profiles.every(self._stores.host)
        networks = {one["Id"]: one for one in engine.networks() if one["Driver"] == DRIVER}
        for network in networks.values():
            self._events.learn(network)
        used: set[str] = set()
        for id in networks:
            for container, endpoint in engine.network(id)["Containers"].items():
                used.add(endpoint["EndpointID"])
                if libnetwork.is_id(container):
                    self._events.connect(container, endpoint)
        self._driver.forget(joined - used)
        left = [leftover for id, leftover in found if id not in used]
        if self._is_engine_of(known.keys(), networks.keys()):
            left += [
                Leftover(f"network {network.name or id[:12]}", partial(self._networks.remove, id))
                for id, network in known.items()
                if id not in networks
            ]
            containers = {container["Id"] for container in engine.containers()} if kept else set()
            left += [
                Leftover(
                    f"the file with the profiles of container {container[:12]} in network {network[:12]}",
                    partial(network_profiles.forget, self._stores.host, container, network),
                )
                for container, network in kept
                if container not in containers or network not in networks
            ]
        now = time.monotonic()
        self._since = {leftover.text: self._since.get(leftover.text, now) for leftover in left}
        for leftover in left:
            if now - self._since[leftover.text] >= leftover.grace:
                self._remove(leftover)
        self._said = {subject: text for subject, text in self._said.items() if subject in self._since}
        if may_start:
            restarting.start_refused(networks.keys())
            self._refused = self._stores.failed

    def _is_engine_of(self, known: Set[str], listed: Set[str]) -> bool:
        """Return whether the engine, which has the networks `listed`, is the one that has made the networks `known`.

        DOCKER_HOST may name another engine. Both sets are ids. It is the one if the sets have an element in common:
        then its id is stored. Otherwise, it is the one if it has the stored id. Raises CalicoError.
        """
        id = str(engine.info().get("ID") or "")
        if not known.isdisjoint(listed):
            state.write(self._stores.host, libnetwork.ENGINE, content=id.encode())
            return True
        return bool(id) and state.read(self._stores.host, libnetwork.ENGINE) == id.encode()

    def _remove(self, leftover: Leftover) -> None:
        try:
            leftover.remove()
            log.warning("%s was left, and is removed: the Docker Engine does not know it", leftover.text)
            del self._since[leftover.text]
        except NotFound:
            del self._since[leftover.text]
        except CalicoError as error:
            self._warn(leftover.text, f"{leftover.text} is left, and cannot be removed: {error}")

    def _stored(self, datastore: DatastoreClient) -> Iterator[tuple[str, Leftover]]:
        """Yield (endpoint id, Leftover) for what exists of this host's endpoints that have no interface in a container.

        The id is empty for an address that was requested and has no endpoint yet, and for a veth pair without an
        endpoint.
        """
        ids = {id.endpoint for id in datastore.endpoint_ids() if libnetwork.is_ours(id)}
        interfaces = {libnetwork.endpoint_id(datastore.host, id).interface for id in ids}
        ids |= {id for id in locks.interrupted(datastore.host, LIBNETWORK) if libnetwork.is_id(id)}
        requests = libnetwork.requests_of(datastore.host)
        handles = {handle for handle in datastore.ipam.handles.names() if handle.startswith(f"{LIBNETWORK}.")}
        self._foreign &= handles
        for handle in sorted(handles - self._foreign):
            id = handle[len(LIBNETWORK) + 1 :]
            if id in ids or not (libnetwork.is_id(id) or handle.startswith(requests)):
                continue
            with suppress(InvalidValue):
                if datastore.ipam.is_elsewhere(handle):
                    self._foreign.add(handle)
                elif libnetwork.is_id(id):
                    ids.add(id)
                else:
                    release = partial(self._release, handle)
                    yield "", Leftover(f"the address of {handle}", release, REQUEST_GRACE)
        present = {interface.name: interface for interface in netns.interfaces()}
        for id in sorted(ids):
            interface = present.get(libnetwork.endpoint_id(datastore.host, id).interface)
            if interface is not None and interface.peer_is_elsewhere:
                continue
            yield id, Leftover(f"endpoint {id[:12]}", partial(self._disconnect, id))
        for name in sorted(present):
            # the engine moves the other end into the container, or has moved it back
            peer = PEER_PREFIX + name[len(INTERFACE_PREFIX) :]
            if name.startswith(INTERFACE_PREFIX) and peer in present and name not in interfaces:
                yield "", Leftover(f"interface {name}", partial(netns.delete_interface, name))

    def _disconnect(self, id: str) -> None:
        self._stores.call(lambda datastore: wiring.disconnect(datastore, libnetwork.workload(id)))

    def _release(self, handle: str) -> None:
        self._stores.call(lambda datastore: datastore.ipam.release_by_handle(handle))
