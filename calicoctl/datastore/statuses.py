"""The reports of a host's agent in the store: its heartbeat, and the status of each endpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from calicoctl.datastore import keys
from calicoctl.datastore.detection import Choice
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import load_object
from calicoctl.datastore.store import Entry, Store, set_value
from calicoctl.errors import CompareFailed, InvalidValue

_STORE = "datastore"
"""The field of a host's status that says which API of etcd its agent uses."""


@dataclass(frozen=True)
class AgentStore:
    """How an agent uses the store: by which API (V2 or V3); whether the agent has noticed that the data is frozen; and
    whether its environment names the API, so that it cannot follow the data to the other one.
    """

    api: str
    frozen: bool
    pinned: bool


def agent_store(choice: Choice) -> dict[str, object]:
    """Return the fields of a host's status that say how its agent uses the store."""
    return {_STORE: {"api": choice.api, "frozen": bool(choice.frozen), "pinned": choice.pinned}}


def parse_agent_store(status: str) -> AgentStore | None:
    """Return what a host's status (JSON text) says of the store, None if it says nothing: agents of older versions."""
    with suppress(InvalidValue):
        found = load_object(status, "").get(_STORE)
        if isinstance(found, dict) and isinstance(found.get("api"), str):
            return AgentStore(found["api"], found.get("frozen") is True, found.get("pinned") is True)
    return None


class Statuses:
    """Reads and writes the statuses of one host and of its endpoints."""

    def __init__(self, store: Store, host: str) -> None:
        self.host = host
        self._store = store

    @property
    def hang_together(self) -> bool:
        """Whether the statuses that an agent writes with the same `ttl` share a lease; see Store."""
        return self._store.leases

    def of_host(self) -> Entry | None:
        """Return this host's status, the heartbeat of its agent; None if it has expired or was deleted."""
        return self._store.get(keys.felix_status(self.host))

    def of_old_agent(self) -> bool:
        """Return whether Felix of 2015 runs on this host. Its status has neither `machine` nor `boot`.

        Returns False if the status is missing or invalid.
        """
        status = self.of_host()
        try:
            return status is not None and not load_object(status.value, status.key).keys() & {"machine", "boot"}
        except InvalidValue:
            return False

    def write_host(self, status: dict[str, object], ttl: int, before: Entry | None) -> Entry:
        """Replace this host's status, read as `before`, or create it if `before` is None. `ttl` is in seconds.

        Raises KeyExists or CompareFailed if the status was written or has expired since `before` was read.
        """
        if before is None:
            return self._store.create(keys.felix_status(self.host), json.dumps(status), ttl)
        return self._store.update(before, json.dumps(status), ttl)

    def renew_host(self, status: dict[str, object], ttl: int, before: Entry) -> Entry:
        """Renew this host's status, written as `before`, for `ttl` seconds from now; return its current entry.

        A store with leases only renews the lease, and so all keys on it. Other stores write `status`. Raises
        CompareFailed if the status was written or has expired since `before`.
        """
        return self._store.touch(before, json.dumps(status), ttl)

    def remove_host(self, before: Entry) -> None:
        """Delete this host's status, unless it was written since `before` was read."""
        with suppress(CompareFailed):
            self._store.delete(before)

    def report_endpoint(self, id: EndpointId, status: str | None, ttl: int | None = None) -> None:
        """Write the status (JSON text) of an endpoint of this host; None deletes it.

        In a store with leases, the status expires together with the host's status, if that has the same `ttl`. In other
        stores, it does not expire, but readers ignore it if there is no host's status.
        """
        if status is not None:
            self._store.put(keys.felix_endpoint(id), status, ttl if self._store.leases else None)
        else:
            set_value(self._store, keys.felix_endpoint(id), None)

    def report_endpoints(self, statuses: Mapping[EndpointId, str], ttl: int) -> None:
        """Write the statuses of at most MOST_AT_ONCE endpoints of this host; see report_endpoint."""
        values = {keys.felix_endpoint(id): status for id, status in statuses.items()}
        self._store.put_all(values, ttl if self._store.leases else None)

    def of_endpoints(self) -> dict[EndpointId, str]:
        """Return endpoint -> status (JSON text) for this host's endpoints."""
        entries = self._store.tree(keys.felix_host(self.host))
        found = ((keys.parse_felix_endpoint(entry.key), entry.value) for entry in entries)
        return {id: value for id, value in found if id is not None}

    def of_endpoint(self, id: EndpointId) -> dict[str, Any] | None:
        """Return the status of an endpoint, None if the status is missing or invalid."""
        key = keys.felix_endpoint(id)
        entry = self._store.get(key)
        try:
            return None if entry is None else load_object(entry.value, key)
        except InvalidValue:
            return None
