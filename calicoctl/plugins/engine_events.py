"""Follows the Docker Engine's events, for what its calls do not say: the names of networks, and whose an endpoint is.

This runs in threads of its own. No call waits for the engine: it may not answer while it waits for a call. The names
of networks, for which calls wait, are read in one thread, and the containers of endpoints in another, since the engine
takes long to say which ones a large network has.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from calicoctl import engine
from calicoctl.errors import CalicoError, DockerUnavailable
from calicoctl.plugins import endpoints, networks
from calicoctl.plugins.networks import Networks
from calicoctl.plugins.stores import Stores
from calicoctl.workloads.docker_networks import DRIVER
from calicoctl.workloads.libnetwork import is_id

log = logging.getLogger("calico.plugins")

PAUSE = 0.5
"""Seconds until the engine is asked again after it has not answered, or has ended its events.

Nothing says when it listens again: its socket may exist before that, and after its end.
"""


class EngineEvents:
    """Follows the networks of the engine, and stores what their events say."""

    def __init__(self, stores: Stores, known: Networks) -> None:
        self._stores = stores
        self._networks = known
        self._joined: dict[str, set[str]] = {}
        """The id of a network -> the ids of containers that have joined it, whose endpoints are to be asked for."""
        self._changed = threading.Condition()

    def start(self) -> None:
        threading.Thread(target=self._run, name="following Docker's networks", daemon=True).start()
        threading.Thread(target=self._ask, name="asking whose endpoints are", daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                if engine.may_be_there():
                    self.follow()
            except DockerUnavailable as error:
                log.debug("%s", error)
            except Exception:  # of whatever kind: nothing else would follow the events again
                log.exception("following Docker's networks failed")
            time.sleep(PAUSE)

    def follow(self) -> None:
        """Read all networks, and then their events, until the engine ends these. Raises DockerUnavailable."""
        with engine.followed_networks(int(time.time())) as (listed, events):
            for network in listed:
                self.learn(network)
            self._stores.happened.set()  # the engine may have been killed meanwhile
            for event in events:
                self.on_event(event)

    def on_event(self, event: Any) -> None:
        """Process an event of a network with Calico's driver; ignore any other JSON value.

        For a new network, its name is stored. For a container that was connected to a network, `ask` is called later.
        """
        actor = event.get("Actor") if isinstance(event, dict) else None
        facts = actor.get("Attributes") if isinstance(actor, dict) else None
        if not isinstance(actor, dict) or not isinstance(facts, dict) or facts.get("type") != DRIVER:
            return
        id, name = actor.get("ID"), facts.get("name")
        if not is_id(id) or not isinstance(name, str):
            return
        if event.get("Action") == "create":
            self.name(str(id), name)
        elif event.get("Action") == "connect" and is_id(facts.get("container")):
            with self._changed:
                self._joined.setdefault(str(id), set()).add(str(facts["container"]))
                self._changed.notify_all()

    def _ask(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._joined)
            try:
                self.ask()
            except Exception:  # of whatever kind: nothing else would ask
                log.exception("asking for the containers in Docker's networks failed")

    def ask(self) -> None:
        """Ask the engine for the endpoints of the containers that have joined a network, and store whose they are."""
        with self._changed:
            joined, self._joined = self._joined, {}
        for network, containers in joined.items():
            with suppress(DockerUnavailable):  # the network may just have been removed
                endpoints_of = engine.network(network)["Containers"]
                for container in containers & endpoints_of.keys():
                    self.connect(container, endpoints_of[container])

    def learn(self, listed: Mapping[str, Any]) -> None:
        """Store a network as the engine lists it, and its name; do nothing if its driver is not Calico's."""
        if listed["Driver"] != DRIVER or not is_id(listed["Id"]):
            return
        if self._networks.get(listed["Id"]) is None:  # its file was lost before this process started
            options = listed.get("Options")
            with suppress(CalicoError):
                self._networks.put(
                    networks.described(listed["Id"], options if isinstance(options, dict) else {}, listed["Internal"])
                )
        self.name(listed["Id"], listed["Name"])

    def name(self, id: str, name: str) -> None:
        """Set the name of a network, if Networks has it, and create its profile (networks.ensure_profile).

        `id` is the network's id. A failure is logged.
        """
        try:
            network = self._networks.rename(id, name)
            if network is not None and not network.has_profile and network.profiles is None:
                self._stores.call(lambda datastore: networks.ensure_profile(datastore, self._networks, network))
        except CalicoError as error:  # an endpoint in the network will need it, and try again
            log.warning("network %s: %s", name, error)

    def connect(self, container: str, endpoint: Mapping[str, Any]) -> None:
        """Store which container an endpoint belongs to. `endpoint` is a value in `Containers` of engine.network.

        `container` is the container's id. A failure is logged.
        """
        id, name = endpoint["EndpointID"], endpoint["Name"]
        if not is_id(id):
            return
        try:
            self._stores.call(lambda datastore: endpoints.set_container(datastore, id, container, name))
        except CalicoError as error:  # collection.py does it later
            log.warning("endpoint %s: %s", id[:12], error)
