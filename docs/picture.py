"""Makes the picture of a map, docs/map.png: `make docs-picture`.

The network in it is invented, and lives in a store in memory. Needs Chromium, and writes no file but the picture.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calicoctl.datastore.client import DatastoreClient
from calicoctl.diagnose.enforcement import Enforcement
from calicoctl.diagnose.network_map import NetworkMap
from calicoctl.diagnose.network_page import page
from calicoctl.policy.rules import parse
from tests.system.browser import chromium
from tests.unit.memory_store import MemoryStore

HOSTS = ("host1", "host2", "host3")

PROFILES: dict[str, list[str]] = {
    "web": ["allow from tag web", "allow tcp to ports 443", "allow icmp"],
    "api": ["allow tcp from tag web to ports 8080"],
    "db": ["deny from tag guest", "allow tcp from tag api to ports 5432"],
    "guest": [],
}
"""The inbound rules of each profile, which has its own name as tag. Outbound, each allows everything."""

WORKLOADS = {
    "web1": ("host1", ["web"]),
    "web2": ("host2", ["web"]),
    "api": ("host2", ["api"]),
    "db": ("host3", ["db"]),
    "guest": ("host1", ["guest"]),
}
"""The host and the profiles of each workload."""

CHOSEN = "[aria-label^='guest to db:']"
"""The cell of the matrix whose rules are shown."""

MADE = "2026-11-27T17:31:40Z"

WIDTH, HEIGHT, SCALE = 1140, 436, 1.5
"""The window, in the units of CSS, and how many pixels each of these has. GitHub shows a README some 840 units wide."""


def network() -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of the network."""
    for number, host in enumerate(HOSTS, 11):
        yield f"/calico/bgp/v1/host/{host}/ip_addr_v4", f"192.0.2.{number}"
    yield "/calico/v1/ipam/v4/pool/10.65.0.0-16", {"cidr": "10.65.0.0/16"}
    for name, inbound in PROFILES.items():
        rules = {"inbound_rules": [rule(text) for text in inbound], "outbound_rules": [rule("allow")]}
        yield f"/calico/v1/policy/profile/{name}/tags", [name]
        yield f"/calico/v1/policy/profile/{name}/rules", {"id": name, **rules}
    for number, (name, (host, profiles)) in enumerate(WORKLOADS.items(), 1):
        record = {
            "state": "active",
            "name": f"cali{number}",
            "mac": f"02:00:00:00:00:{number:02x}",
            "workload_name": name,
            "profile_ids": profiles,
            "ipv4_nets": [f"10.65.{host[-1]}.{number}/32"],
            "ipv6_nets": [],
        }
        yield f"/calico/v1/host/{host}/workload/docker/{number:064x}/endpoint/{number:032x}", record


def rule(text: str) -> dict[str, Any]:
    return parse(text.split()).to_dict()


def drops() -> Iterator[dict[str, Any]]:
    """Yield packets that were dropped lately, as `calicoctl drops --output=json` has them."""
    for name, address, why in (
        ("db", "10.65.3.4", "profile db, inbound rule 1: deny from tag guest"),
        ("api", "10.65.2.3", "no rule matched"),
    ):
        yield {
            "time": MADE,
            "from": {"name": "guest", "address": "10.65.1.5"},
            "to": {"name": name, "address": address},
            "protocol": "tcp",
            "port": 5432,
            "icmp_type": None,
            "direction": "inbound",
            "why": why,
            "count": 3,
        }


def main(picture: Path) -> None:
    """Write the picture, a PNG."""
    store = MemoryStore()
    for key, value in network():
        store.create(key, value if isinstance(value, str) else json.dumps(value))
    made = page(NetworkMap(Enforcement(DatastoreClient(store, "host3"))), MADE, drops())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "map.html"
        file.write_bytes(made)
        with chromium(Path(folder) / "profile") as browser:
            browser.open(file)
            window = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": SCALE, "mobile": False}
            browser.call("Emulation.setDeviceMetricsOverride", **window)
            light = [{"name": "prefers-color-scheme", "value": "light"}]
            browser.call("Emulation.setEmulatedMedia", features=light)
            browser.call("Emulation.setScrollbarsHidden", hidden=True)
            browser.click("#hosts")
            browser.click(CHOSEN)
            browser.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
            browser.screenshot(picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_name("map.png"))
