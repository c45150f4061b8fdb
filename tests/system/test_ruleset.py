"""Changes of the tables, as real transactions: each is accepted, and together they come to what a fresh start gives."""

from __future__ import annotations

import json

from calicoctl.datastore.store import Change, Entry
from calicoctl.desired.snapshot import Dirty, Snapshot
from calicoctl.felix.dataplane import drops
from calicoctl.felix.dataplane.nft import Nft
from calicoctl.felix.dataplane.ruleset import Ruleset, remove_commands
from tests.random_changes import check_random_updates
from tests.system.support import tables
from tests.unit.snapshots import in_pools


def test_any_order_of_changes_comes_to_what_a_fresh_start_gives() -> None:
    nft = Nft()
    try:
        check_random_updates(nft, tables, seeds=12, updates=60)
    finally:
        nft.run(remove_commands())


def test_tables_without_a_log_of_dropped_packets_are_accepted() -> None:
    def put(key: str, value: object) -> None:
        snapshot.change(Change(key, Entry(key, json.dumps(value), 1, 1)))

    nft = Nft()
    assert drops.why_not_logged(nft) is None
    assert "calico-trial" not in nft.run("list tables"), "nothing is left"
    snapshot, ruleset = in_pools(Snapshot("h")), Ruleset(logs=False)
    record = {"name": "cali1", "mac": "02:00:00:00:00:01", "profile_ids": ["p", "gone"]}
    put("/calico/v1/host/h/workload/docker/1/endpoint/1", {**record, "ipv4_nets": ["192.168.0.1/32"]})
    put("/calico/v1/policy/profile/p/tags", [])
    rules = "/calico/v1/policy/profile/p/rules"
    put(rules, {"inbound_rules": [{"action": "deny", "protocol": "udp"}]})
    try:
        nft.run(ruleset.load(snapshot).commands)
        snapshot.take_dirty()
        put(rules, {"inbound_rules": [{"action": "deny", "protocol": "tcp"}]})
        nft.run(ruleset.update(snapshot, snapshot.take_dirty()).commands)
        nft.run(ruleset.recreate())
        listed = nft.run("list ruleset")
        assert "jhash" not in listed and " group " not in listed
        assert "tcp drop" in nft.run("list chain inet calico inbound/p")
    finally:
        nft.run(remove_commands())


def test_an_endpoint_may_get_what_another_has_not_given_up_yet() -> None:
    """One endpoint's change is held back, because of a new address, and another gets its interface meanwhile."""

    def put(number: int, **values: object) -> None:
        key = f"/calico/v1/host/h/workload/docker/{number}/endpoint/{number}"
        record = {"mac": f"02:00:00:00:00:0{number}", "profile_ids": ["p"], **values}
        snapshot.change(Change(key, Entry(key, json.dumps(record), 1, 1)))

    nft = Nft()
    snapshot, ruleset = in_pools(Snapshot("h")), Ruleset()
    put(1, name="cali1", ipv4_nets=["192.168.0.1/32"])
    put(2, name="cali2", ipv4_nets=["192.168.0.2/32"])
    try:
        nft.run(ruleset.load(snapshot).commands)
        snapshot.take_dirty()
        put(1, name="cali3", ipv4_nets=["192.168.0.1/32", "192.168.0.3/32"])
        put(2, name="cali1", ipv4_nets=["192.168.0.2/32"])
        one, two = sorted(snapshot.take_dirty().endpoints, key=lambda id: id.endpoint)
        nft.run(ruleset.update(snapshot, Dirty({two})).commands)
        nft.run(ruleset.update(snapshot, Dirty({one})).commands)
        changed = tables()
        nft.run(ruleset.recreate())
        assert changed == tables()
        nft.run(Ruleset().load(snapshot).commands)
        assert changed == tables()
        assert "cali1" in str(changed) and "cali2" not in str(changed)
    finally:
        nft.run(remove_commands())
