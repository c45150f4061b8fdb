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
"""The field of a host's status that says how the host's agent uses the store: see AgentStore."""


@dataclass(frozen=True)
class AgentStore:
    """How an agent uses the store.

    `api` is the API that the agent uses (V2 or V3). `frozen` says whether the agent has noticed that the data is
    frozen. `pinned` says whether the agent's environment names the API: then the agent cannot follow the data to the
    other API.
    """

    api: str
    frozen: bool
    pinned: bool


def agent_store(choice: Choice) -> dict[str, object]:
    """Return the fields of a host's status that say how the host's agent uses the store."""
    return {_STORE: {"api": choice.api, "frozen": bool(choice.frozen), "pinned": choice.pinned}}


def parse_agent_store(status: str) -> AgentStore | None:
    """Return what a host's status (JSON text) says of how the host's agent uses the store.

    Returns None if the status is invalid or says nothing of it, as the statuses of older versions do.
    """
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
        """Whether the statuses that an agent writes with the same `ttl` share a lease, and so expire together."""
        return self._store.leases

    def of_host(self) -> Entry | None:
        """Return this host's status, the heartbeat of its agent; None if the status has expired or does not exist."""
        return self._store.get(keys.felix_status(self.host))

    def of_old_agent(self) -> bool:
        """Return whether the agent on this host is Felix of 2015, whose status has neither `machine` nor `boot`.

        Returns False if this host's status is missing or invalid.
        """
        status = self.of_host()
        try:
            return status is not None and not load_object(status.value, status.key).keys() & {"machine", "boot"}
        except InvalidValue:
            return False

    def write_host(self, status: dict[str, object], ttl: int, before: Entry | None) -> Entry:
        """Write this host's status; return its entry. The status expires `ttl` seconds from now.

        `before` is the entry to replace. If it is None, there must be no status yet. Raises KeyExists or CompareFailed
        if the status was written or has expired since `before` was read.
        """
        if before is None:
            return self._store.create(keys.felix_status(self.host), json.dumps(status), ttl)
        return self._store.update(before, json.dumps(status), ttl)

    def renew_host(self, status: dict[str, object], ttl: int, before: Entry) -> Entry:
        """Renew this host's status, so that it expires `ttl` seconds from now; return its current entry.

        `before` is the status's entry, as it was last read or written. In a store with leases, only the lease is
        renewed, and with it all keys on the lease. In other stores, `status` is written. Raises CompareFailed if the
        status was written by another program, or has expired, since `before`.
        """
        return self._store.touch(before, json.dumps(status), ttl)

    def remove_host(self, before: Entry) -> None:
        """Delete this host's status, unless it was written since `before` was read."""
        with suppress(CompareFailed):
            self._store.delete(before)

    def report_endpoint(self, id: EndpointId, status: str | None, ttl: int | None = None) -> None:
        """Write the status (JSON text) of an endpoint of this host, or delete it if `status` is None.

        In a store with leases, the endpoint's status expires together with the host's status, if both have the same
        `ttl` (in seconds). In other stores, `ttl` is ignored, and the endpoint's status does not expire; but readers
        ignore it if the host has no status.
        """
        if status is not None:
            self._store.put(keys.felix_endpoint(id), status, ttl if self._store.leases else None)
        else:
            set_value(self._store, keys.felix_endpoint(id), None)

    def report_endpoints(self, statuses: Mapping[EndpointId, str], ttl: int) -> None:
        """Write the statuses (JSON texts) of at most store.MOST_AT_ONCE endpoints of this host.

        `ttl`: see `report_endpoint`.
        """
        values = {keys.felix_endpoint(id): status for id, status in statuses.items()}
        self._store.put_all(values, ttl if self._store.leases else None)

    def of_endpoints(self) -> dict[EndpointId, str]:
        """Return endpoint -> status (JSON text) for this host's endpoints."""
        entries = self._store.tree(keys.felix_host(self.host))
        found = ((keys.parse_felix_endpoint(entry.key), entry.value) for entry in entries)
        return {id: value for id, value in found if id is not None}

    def of_endpoint(self, id: EndpointId) -> dict[str, Any] | None:
        """Return the fields of an endpoint's status, None if the status is missing or invalid."""
        key = keys.felix_endpoint(id)
        entry = self._store.get(key)
        try:
            return None if entry is None else load_object(entry.value, key)
        except InvalidValue:
            return None
