"""Answers Docker's hook (workloads/oci_hook.py): connects containers that are being started, as their labels ask."""

from __future__ import annotations

from typing import Any

from calicoctl.errors import Conflict, StoreUnavailable
from calicoctl.plugins.server import Route
from calicoctl.plugins.stores import Stores
from calicoctl.workloads import oci_hook, starting

SOCKET = "hook.sock"
"""The name of the socket, in /run/calico/HOST."""

SECONDS = oci_hook.SECONDS + oci_hook.KILL_AFTER
"""The maximum number of seconds that a call takes. The hook waits for less, and then says so itself."""


def routes(stores: Stores) -> dict[str, Route]:
    """Return the calls of the hook, by path.

    An answer with `Again` says that the container may be connected later. Other failures raise CalicoError.
    """

    def connect(state: dict[str, Any]) -> dict[str, Any]:
        try:
            stores.call(lambda datastore: starting.connect(datastore, state))
        except (StoreUnavailable, Conflict) as error:
            return {"Err": str(error), "Again": True}
        return {}

    return {"/connect": connect}
