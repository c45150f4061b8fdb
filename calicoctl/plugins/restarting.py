"""Starts containers that did not start since etcd was away, when it is back.

The engine starts containers with a restart policy when it starts itself, but not again if their network refuses them.
At boot, and always with `calicoctl node --local-etcd`, that is before etcd answers.
"""

from __future__ import annotations

import logging
from collections.abc import Set
from contextlib import suppress

from calicoctl import engine
from calicoctl.errors import CalicoError, NoSuchContainer
from calicoctl.workloads import docker_networks
from calicoctl.workloads.workload import short_id

log = logging.getLogger("calico.plugins")

UNAVAILABLE = "Calico cannot reach etcd"
"""How the error of a call begins that has failed since the store was away. The engine keeps it with the container."""


def start_refused(networks: Set[str]) -> None:
    """Start the containers in `networks` (ids) that did not start because of UNAVAILABLE, if their policy says so.

    Raises DockerUnavailable if the engine does not list them.
    """
    for listed in engine.containers():
        mine = any(one.network in networks for one in docker_networks.connections_of(listed))
        if listed["State"] == "running" or not mine:
            continue
        with suppress(NoSuchContainer):
            container = engine.inspect(listed["Id"])
            if not engine.is_to_start(container, UNAVAILABLE):
                continue
            name = f"container {short_id(container['Id'])} ({container['Name'].lstrip('/')})"
            try:
                engine.start(container["Id"])
                log.warning("%s is started, which had failed: etcd was away", name)
            except CalicoError as error:
                log.warning("%s does not start: %s", name, error)
