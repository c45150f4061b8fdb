"""Answers Docker's hook (workloads/oci_hook.py): connects containers that are being started, as their labels ask."""

from __future__ import annotations

import logging
import os
from typing import Any

from calicoctl import files
from calicoctl.errors import one_line
from calicoctl.plugins.server import Listening, Route
from calicoctl.plugins.stores import Stores
from calicoctl.workloads import oci_hook, starting
from calicoctl.workloads.workload import short_id

log = logging.getLogger("calico.plugins")

SOCKET = "hook.sock"
"""The name of the socket, in /run/calico/HOST."""

SECONDS = oci_hook.SECONDS + oci_hook.KILL_AFTER
"""The maximum number of seconds that a call takes. The hook waits for less, and then reports the timeout itself."""


LONGEST = 90
"""The maximum length of the socket's path, in bytes. The kernel's is 107, also for its name while it is created."""


def listening(stores: Stores) -> list[Listening]:
    """Return a list with the hook's socket. If the host's name is too long for its path, log that, and return [].

    Then the hook starts a new process for each container.
    """
    path = files.RUN / stores.host / SOCKET
    if len(os.fsencode(path)) > LONGEST:
        log.warning("the name of this host is too long for %s: Docker's hook is not served", path)
        return []
    return [Listening(path, routes(stores), SECONDS)]


def routes(stores: Stores) -> dict[str, Route]:
    """Return the functions that answer the hook's calls, by the path in the request."""

    def connect(state: dict[str, Any]) -> dict[str, Any]:
        # a container whose labels are those of its image needs no store
        ignored = stores.call(lambda datastore: starting.connect(datastore, state), asks=False)
        if ignored:
            log.info("container %s: %s", short_id(str(state["id"])), one_line("; ".join(ignored)))
        return {}

    return {"/connect": connect}
