"""The snapshot, key by key: an invalid value affects only the object that its key names."""

from __future__ import annotations

import dataclasses
import json
import random

from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.reserved import HostNetwork, InterfaceAddress
from calicoctl.datastore.store import Change, Entry
from calicoctl.desired.snapshot import Snapshot
from tests.unit.snapshots import in_pools

FOLDER = "/calico/v1/host/h/workload/docker"
RECORD = {"state": "active", "mac": "02:00:00:00:00:01", "profile_ids": ["web"], "ipv4_nets": ["192.168.0.1/32"]}


def entry(key: str, value: object, revision: int = 1, created: int = 1) -> Entry:
    return Entry(key, value if isinstance(value, str) else json.dumps(value), revision, created)


def endpoint_entry(which: str, revision: int = 1, created: int = 1, **fields: object) -> Entry:
    return entry(f"{FOLDER}/{which}/endpoint/{which}", {**RECORD, "name": f"cali{which}", **fields}, revision, created)


def id_of(name: str) -> EndpointId:
    return EndpointId("h", "docker", name, name)


def snapshot_of(*entries: Entry) -> Snapshot:
    snapshot = in_pools(Snapshot("h"))
    snapshot.replace("/calico/v1", entries)
    return snapshot


def test_why_an_endpoint_is_refused_is_kept_up_to_date() -> None:
    shared = ["192.168.0.9/32"]
    snapshot = snapshot_of(*(endpoint_entry(name, created=int(name), ipv4_nets=shared) for name in "123"))
    assert "endpoint 1 already" in snapshot.unusable[id_of("3")][1]
    snapshot.change(Change(f"{FOLDER}/1/endpoint/1", None))
    assert set(snapshot.local) == {id_of("2")}
    assert "endpoint 2 already" in snapshot.unusable[id_of("3")][1]


def test_replacing_marks_what_differs_alone() -> None:
    one, two = endpoint_entry("1"), endpoint_entry("2", ipv4_nets=["192.168.0.2/32"])
    profile = entry("/calico/v1/policy/profile/web/tags", ["web"])
    snapshot = snapshot_of(one, two, profile)
    snapshot.take_dirty()
    snapshot.replace("/calico/v1", [one, two, profile])
    assert not snapshot.take_dirty()
    snapshot.replace("/calico/v1", [one, endpoint_entry("2", 7, ipv4_nets=["192.168.0.3/32"])])
    dirty = snapshot.take_dirty()
    assert dirty.endpoints == {id_of("2")} and dirty.profiles == {"web"} and not dirty.pools
    assert snapshot.local[id_of("2")].addresses == ("192.168.0.3",)
    assert snapshot.profiles == {}


def test_a_directory_that_goes_takes_all_along() -> None:
    snapshot = snapshot_of(endpoint_entry("1"), endpoint_entry("2", ipv4_nets=[]), entry("/calico/v1/Ready", "true"))
    snapshot.change(Change(f"{FOLDER}/1", None, alone=True))  # a key, not the directory
    assert len(snapshot.endpoints) == 2
    snapshot.change(Change(f"{FOLDER}/1", None))
    assert set(snapshot.local) == {id_of("2")} and snapshot.ready
    snapshot.change(Change("/calico", None))
    assert not snapshot.local and not snapshot.ready


def test_of_two_that_claim_the_same_the_older_has_it_whatever_the_order_of_events() -> None:
    def outcome(snapshot: Snapshot) -> set[str]:
        return {id.endpoint for id in snapshot.local}

    shared = ["192.168.0.1/32"]
    entries = [
        endpoint_entry("1", created=5, ipv4_nets=shared),
        endpoint_entry("2", created=3, ipv4_nets=[*shared, "192.168.0.2/32"]),
        endpoint_entry("3", created=7, ipv4_nets=["192.168.0.2/32"]),
        endpoint_entry("4", created=9, ipv4_nets=["192.168.0.4/32"], name="cali3"),
    ]
    chance = random.Random(1)
    for _ in range(50):
        snapshot = in_pools(Snapshot("h"))
        now: dict[str, Entry] = {}
        for index in range(30):
            chosen = chance.choice(entries)
            if chance.random() < 0.3:
                now.pop(chosen.key, None)
                snapshot.change(Change(chosen.key, None))
            else:
                # written anew, so it may be younger than another now
                created = chance.choice([chosen.created, 100 + index])
                now[chosen.key] = Entry(chosen.key, chosen.value, index, created)
                snapshot.change(Change(chosen.key, now[chosen.key]))
            assert outcome(snapshot) == outcome(snapshot_of(*now.values()))
            assert set(snapshot.local) | set(snapshot.unusable) == {id for id in snapshot.endpoints if id.host == "h"}


def test_an_address_that_a_host_uses_is_taken_from_an_endpoint_for_as_long() -> None:
    both = ["192.168.0.1/32", "192.168.0.10/32"]
    snapshot = snapshot_of(endpoint_entry("1", ipv4_nets=both), endpoint_entry("2", ipv4_nets=["192.168.0.2/32"]))
    snapshot.take_dirty()

    def now(name: str = "1") -> tuple[tuple[str, ...], str | None]:
        return snapshot.local[id_of(name)].addresses, snapshot.local[id_of(name)].conflict

    own = HostNetwork.of([InterfaceAddress("192.168.0.10", "192.168.0.10", 24, "eth0")], [("10.9.9.9", "eth0")])
    snapshot.set_network(own)
    why = "its address 192.168.0.10 is this host's own address (on eth0)"
    assert now() == (("192.168.0.1",), why) and snapshot.take_dirty().endpoints == {id_of("1")}
    assert snapshot.owner("192.168.0.10") is None and snapshot.owner("192.168.0.1") is snapshot.local[id_of("1")]
    snapshot.set_network(dataclasses.replace(own, in_use={**own.in_use, "10.9.9.8": "a gateway"}))
    assert snapshot.take_dirty().endpoints == set(), "that matters to no endpoint"
    snapshot.set_network(HostNetwork())
    assert now() == (("192.168.0.1", "192.168.0.10"), None) and snapshot.take_dirty().endpoints == {id_of("1")}
    # registered hosts; an old tool writes bird_ip alone
    for key, text in (
        ("/calico/bgp/v1/host/h2/ip_addr_v4", "192.168.0.2"),
        ("/calico/v1/host/h2/bird_ip", "192.168.0.2"),
        ("/calico/bgp/v1/host/h/ip_addr_v4", "192.168.0.1"),
    ):
        snapshot.change(Change(key, entry(key, text)))
    assert now("2") == ((), "its address 192.168.0.2 is that of host h2")
    assert now() == (("192.168.0.10",), "its address 192.168.0.1 is this host's own address (it is registered with it)")
    snapshot.change(Change("/calico/bgp/v1/host/h2", None))
    assert now("2")[1] is not None, "its other key says so still"
    key = "/calico/v1/host/h2/bird_ip"
    snapshot.change(Change(key, entry(key, "no address", 2)))
    assert now("2") == (("192.168.0.2",), None) and key in snapshot.problems
    snapshot.change(Change("/calico/bgp/v1/host/h", None))
    assert now() == (("192.168.0.1", "192.168.0.10"), None)


def test_problems_come_and_go_with_their_keys() -> None:
    key = "/calico/v1/policy/profile/web/rules"
    snapshot = snapshot_of(entry(key, "{"), entry("/calico/v1/policy/profile/web/tags", "3"))
    assert set(snapshot.problems) == {key, "/calico/v1/policy/profile/web/tags"}
    assert not snapshot.has_valid_rules("web")
    snapshot.change(Change("/calico/v1/policy/profile/web/tags", entry("x", [])))
    assert set(snapshot.problems) == {key}
    snapshot.change(Change(key, entry(key, {"inbound_rules": []})))
    assert snapshot.problems == {} and snapshot.has_valid_rules("web")


def test_tags_stay_as_last_read() -> None:
    tags, record = "/calico/v1/policy/profile/web/tags", f"{FOLDER}/1/endpoint/1"
    snapshot = snapshot_of(endpoint_entry("1"), entry(tags, ["evil"]))
    snapshot.change(Change(tags, entry(tags, "{not json", 2)))
    snapshot.change(Change(record, entry(record, {**RECORD, "name": "cali1", "mac": "no MAC"}, 3)))
    assert snapshot.profiles["web"].tags == ("evil",) and snapshot.endpoints[id_of("1")].nets == ["192.168.0.1/32"]
    assert set(snapshot.problems) >= {tags, record} and not snapshot.local, "but it is not connected"
    snapshot.change(Change(record, None))
    snapshot.change(Change(tags, None))
    assert not snapshot.endpoints and not snapshot.profiles


def test_an_unknown_action_for_packets_to_the_host_closes() -> None:
    key = "/calico/v1/host/h/config/DefaultEndpointToHostAction"
    snapshot = snapshot_of(entry(key, "allow"))
    assert snapshot.host_action == "DROP" and key in snapshot.problems
    snapshot.change(Change(key, entry(key, "accept")))
    assert snapshot.host_action == "ACCEPT" and not snapshot.problems
    snapshot.change(Change(key, None))
    assert snapshot.host_action == "RETURN"


def test_services_of_the_host_are_open_unless_the_setting_is_anything_but_allow() -> None:
    key = "/calico/v1/config/EndpointToHostServices"
    snapshot = snapshot_of(entry(key, "drop"))
    assert not snapshot.host_services and not snapshot.problems
    snapshot.change(Change(key, entry(key, "closed")))
    assert not snapshot.host_services and key in snapshot.problems
    snapshot.change(Change(key, entry(key, "allow")))
    assert snapshot.host_services
    snapshot.change(Change(key, entry(key, "drop")))
    snapshot.change(Change(key, None))
    assert snapshot.host_services and not snapshot.problems


def test_a_state_that_is_not_known_does_not_count_as_active() -> None:
    snapshot = snapshot_of(endpoint_entry("1", state="paused"), endpoint_entry("2", ipv4_nets=["192.168.0.2/32"]))
    assert set(snapshot.local) == {id_of("2")}
    assert "'paused'" in snapshot.unusable[id_of("1")][1]


def test_the_grace_time_is_a_number_of_seconds() -> None:
    key = "/calico/v1/config/GraceTime"
    snapshot = snapshot_of(entry(key, "5"))
    assert snapshot.grace_time == 5
    snapshot.change(Change(key, entry(key, "soon")))
    assert snapshot.grace_time == 60
    assert "'soon'" in snapshot.problems[key]
    snapshot.change(Change(key, entry(key, "0")))
    assert (snapshot.grace_time, snapshot.problems) == (0, {})
    snapshot.change(Change(key, None))
    assert snapshot.grace_time == 60


def test_the_mtu_is_a_number_of_bytes() -> None:
    key = "/calico/v1/config/MTU"
    snapshot = snapshot_of(entry(key, "1400"))
    assert snapshot.mtu == 1400 and snapshot.take_dirty().settings
    snapshot.change(Change(key, entry(key, "900")))
    assert snapshot.mtu is None and "from 1280 to 65535" in snapshot.problems[key]
    snapshot.change(Change(key, None))
    assert (snapshot.mtu, snapshot.problems) == (None, {})


def test_an_endpoint_with_a_link_local_address_is_refused() -> None:
    snapshot = snapshot_of(endpoint_entry("1", ipv4_nets=["169.254.169.254/32"]), endpoint_entry("2"))
    assert set(snapshot.local) == {id_of("2")}
    assert "169.254.169.254 is not an address" in snapshot.unusable[id_of("1")][1]
