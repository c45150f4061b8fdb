"""Snapshots of the store for tests. Entries are written as JSON, as they are in etcd."""

from __future__ import annotations

import json
from typing import Any

from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.store import Change, Entry
from calicoctl.desired.snapshot import Snapshot
from calicoctl.felix.dataplane.manager import Context
from calicoctl.felix.health import Health, Status
from calicoctl.felix.report import EndpointStatuses

HOST = "host1"


def endpoint_id(number: int, host: str = HOST) -> EndpointId:
    return EndpointId(host, "docker", f"w{number}", f"e{number}")


class Store:
    """Writes entries into a snapshot, as the watch of etcd does."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.revision = 0

    def change(self, key: str, value: Any) -> Change:
        """Return the change of a key to a value; None means that the key is deleted."""
        self.revision += 1
        text = value if isinstance(value, str) else json.dumps(value)
        return Change(key, None if value is None else Entry(key, text, self.revision, self.revision))

    def put(self, key: str, value: Any) -> None:
        self.snapshot.change(self.change(key, value))

    def endpoint_change(self, number: int, *addresses: str, host: str = HOST, **fields: Any) -> Change:
        """Return the change of an endpoint; without addresses and fields, its deletion."""
        id = endpoint_id(number, host)
        key = f"/calico/v1/host/{id.host}/workload/{id.orchestrator}/{id.workload}/endpoint/{id.endpoint}"
        record = {
            "name": f"cali{number}",
            "mac": f"02:00:00:00:00:{number:02x}",
            "state": "active",
            "workload_name": "web",
            "profile_ids": ["web"],
            "ipv4_nets": [f"{address}/32" for address in addresses if ":" not in address],
            "ipv6_nets": [f"{address}/128" for address in addresses if ":" in address],
            **fields,
        }
        return self.change(key, record if addresses or fields else None)

    def endpoint(self, number: int, *addresses: str, host: str = HOST, **fields: Any) -> None:
        self.snapshot.change(self.endpoint_change(number, *addresses, host=host, **fields))

    def profile_changes(self, name: str, *inbound: Any, tags: Any = ()) -> list[Change]:
        rules = {"id": name, "inbound_rules": list(inbound), "outbound_rules": [{"action": "allow"}]}
        below = f"/calico/v1/policy/profile/{name}"
        return [self.change(f"{below}/rules", rules), self.change(f"{below}/tags", list(tags))]

    def profile(self, name: str, *inbound: Any, tags: Any = ()) -> None:
        """Write a profile; by default, it allows no inbound and all outbound traffic."""
        for change in self.profile_changes(name, *inbound, tags=tags):
            self.snapshot.change(change)


def in_pools(snapshot: Snapshot) -> Snapshot:
    """Return the snapshot, changed so that every address counts as in a pool."""
    for everything in ("0.0.0.0/0", "::/0"):
        snapshot.admission.set_pool(everything, everything)
    return snapshot


class World:
    """A snapshot in which every address is in a pool, and the context that managers share."""

    def __init__(self) -> None:
        self.snapshot = in_pools(Snapshot(HOST))
        self.store = Store(self.snapshot)
        self.health = Health(HOST, "1")
        self.reported: list[dict[EndpointId, Status | None]] = []
        self.removed: list[EndpointId] = []
        statuses = EndpointStatuses(self.snapshot, self.health, self.reported.append, self.removed.append)
        self.context = Context(self.snapshot, self.health, statuses)

    def status(self, number: int) -> tuple[str, str | None] | None:
        """Publish the statuses that were set; return an endpoint's status and reason, None if it has no status."""
        self.context.statuses.publish()
        status = self.health.endpoints.get(endpoint_id(number))
        return None if status is None else (status.status, status.reason)
