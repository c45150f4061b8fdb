"""Through etcd's v3 API, the statuses of a host and its endpoints hang on a lease, which the agent keeps alive."""

from __future__ import annotations

import json

import pytest

from tests.system.agent import AgentHost
from tests.system.support import Etcd, b64, b64decode, wait_for

pytestmark = pytest.mark.api("etcdv3")

STATUSES = "/calico/felix/v1/host/host1"


def leases(etcd: Etcd) -> dict[str, str]:
    """Return the last part of the key of each status, and its lease."""
    found = etcd.v3("kv/range", {"key": b64(f"{STATUSES}/"), "range_end": b64(f"{STATUSES}0")}).get("kvs", [])
    return {b64decode(kv["key"]).decode().rpartition("/")[2]: kv.get("lease", "none") for kv in found}


def revision(etcd: Etcd) -> str:
    return etcd.v3("kv/range", {"key": b64("/calico")})["header"]["revision"]


def test_an_idle_agent_keeps_its_statuses_alive_and_writes_nothing(node: AgentHost) -> None:
    node.add_pair()
    node.sync()
    etcd, ids = node.etcd, {node.key(name).rpartition("/")[2] for name in ("a", "b")}
    wait_for(lambda: leases(etcd).keys() == {"status", *ids}, "statuses")
    (lease,) = set(leases(etcd).values())
    granted = int(etcd.v3("lease/timetolive", {"ID": lease})["grantedTTL"])
    before, written = revision(etcd), json.loads(etcd.get(f"{STATUSES}/status"))["time"]
    left = [granted]

    def is_renewed() -> bool:
        left.append(int(etcd.v3("lease/timetolive", {"ID": lease})["TTL"]))
        return left[-1] > left[-2]

    wait_for(is_renewed, f"the next heartbeat; seconds left were {left}", 13)
    assert granted == 30 and 15 < min(left) < 25 and revision(etcd) == before
    (here,) = json.loads(node.ctl("node", "show", "--output=json").out)
    assert here["agent"] == "up" and here["reported"] == written and here["endpoints"]["up"] == 2

    # as after an outage: all is written again, and hangs together again
    etcd.v3("lease/revoke", {"ID": lease})
    assert leases(etcd) == {}
    wait_for(lambda: leases(etcd).keys() == {"status", *ids}, "statuses")
    (lease,) = set(leases(etcd).values())

    # the next agent makes all statuses its own, also those that stay as they were
    node.ctl("node", "stop", "--force")
    assert leases(etcd) == dict.fromkeys(ids, lease)
    node.start_agent()
    wait_for(lambda: leases(etcd).keys() == {"status", *ids} and lease not in leases(etcd).values(), "statuses")
    assert len(set(leases(etcd).values())) == 1
