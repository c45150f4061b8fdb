"""Starts containers that did not start since etcd, or this process, was away, or etcd's data was frozen, afterwards.

The engine starts containers with a restart policy when it starts itself, but not again if their network refuses them.
At boot, and always with `calicoctl node --local-etcd`, that is before etcd answers; with `--libnetwork`, also before
this process runs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Set
from contextlib import suppress

from calicoctl import engine
from calicoctl.datastore.chosen import FROZEN
from calicoctl.errors import CalicoError, NoSuchContainer
from calicoctl.workloads import docker_networks
from calicoctl.workloads.workload import short_id

log = logging.getLogger("calico.plugins")

UNAVAILABLE = "Calico cannot reach etcd"
"""How the error of a call begins that has failed since the store was away. The engine keeps it with the container."""

_REFUSED = re.compile(rf'{UNAVAILABLE}|{FROZEN}|(/|%2F)calico(-ipam)?\.sock\b|plugin "calico(-ipam)?" not found')
"""What is in the error of a start that is tried again: the store was away, or frozen, or the engine could not call."""


def start_refused(networks: Set[str]) -> None:
    """Start the containers in `networks` (ids) whose start has failed as _REFUSED says.

    Only those are started whose restart policy says that the engine starts them when it starts itself. A container that
    does not start is logged. Raises DockerUnavailable if the engine does not list or describe the containers.
    """
    for listed in engine.containers():
        mine = any(one.network in networks for one in docker_networks.connections_of(listed))
        if listed["State"] == "running" or not mine:
            continue
        with suppress(NoSuchContainer):
            container = engine.inspect(listed["Id"])
            if not engine.is_to_start(container, _REFUSED):
                continue
            name = f"container {short_id(container['Id'])} ({container['Name'].lstrip('/')})"
            try:
                engine.start(container["Id"])
                log.warning("%s is started, which had failed: etcd or this process was away, or the data frozen", name)
            except CalicoError as error:
                log.warning("%s does not start: %s", name, error)
