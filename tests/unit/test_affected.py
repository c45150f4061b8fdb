"""No change denies a connection that was allowed unless it says that connections of one of the two ends are affected.

What is not affected is not listed, and goes on. The policies and changes are random, and the verdict is that by which
connections are ended.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from calicoctl.addresses import link_local, version_of
from calicoctl.desired.snapshot import Snapshot
from calicoctl.felix.dataplane.conntrack_manager import allowed
from calicoctl.felix.dataplane.ruleset import Ruleset
from calicoctl.policy.verdict import Packet
from tests.unit.kernel import parties_of
from tests.unit.snapshots import HOST, Store, in_pools

LOCAL, REMOTE = (1, 2), (3, 4)
"""The numbers of endpoints of this host, and of another."""
NUMBERS = (*LOCAL, *REMOTE)
PROFILES, TAGS = ("p1", "p2", "p3"), ("web", "db")
OWN, OTHER_HOST = "192.0.2.2", "172.18.0.12"
ENDPOINTS = [f"192.168.0.{number}" for number in NUMBERS] + [f"fd00::{number}" for number in NUMBERS]
ADDRESSES = [*ENDPOINTS, OWN, OTHER_HOST, "198.51.100.1", *(link_local(f"02:00:00:00:00:0{n}") for n in LOCAL)]
PACKETS = [
    Packet(source, destination, 6, 4000, port)
    for source in ADDRESSES
    for destination in ADDRESSES
    for port in (80, 90)
    if source != destination and version_of(source) == version_of(destination)
]

rules = st.fixed_dictionaries(
    {"action": st.sampled_from(["allow", "deny", "log"])},
    optional={
        "src_tag": st.sampled_from(TAGS),
        "dst_tag": st.sampled_from(TAGS),
        "src_net": st.sampled_from(["192.168.0.0/30", "fd00::/126", "0.0.0.0/0"]),
        "dst_ports": st.just(["70:80"]),
        "protocol": st.just("tcp"),
    },
).map(lambda rule: rule if "dst_ports" not in rule else {**rule, "protocol": "tcp"})
lists = st.lists(rules, max_size=3)
contents = st.fixed_dictionaries({"inbound_rules": lists, "outbound_rules": lists})


@st.composite
def changes(draw: st.DrawFn) -> tuple[str, Any]:
    """Return a key of the store and its new value, None if the key is deleted."""
    kind = draw(st.sampled_from(["endpoint"] * 4 + ["rules"] * 2 + ["tags"] * 3 + ["action", "host", "pool"]))
    profile = draw(st.sampled_from(PROFILES))
    value: Any
    if kind == "endpoint":
        number = draw(st.sampled_from(NUMBERS))
        host = HOST if number in LOCAL else "elsewhere"
        key = f"/calico/v1/host/{host}/workload/docker/w{number}/endpoint/e{number}"
        addresses = draw(st.lists(st.sampled_from(ENDPOINTS), max_size=3, unique=True))
        value = {
            "name": f"cali{number}",
            "mac": f"02:00:00:00:00:0{number}",
            "state": draw(st.sampled_from(["active", "active", "active", "inactive"])),
            "profile_ids": draw(st.lists(st.sampled_from(PROFILES), max_size=3, unique=True)),
            "ipv4_nets": [f"{address}/32" for address in addresses if ":" not in address],
            "ipv6_nets": [f"{address}/128" for address in addresses if ":" in address],
        }
    elif kind == "rules":
        key, value = f"/calico/v1/policy/profile/{profile}/rules", draw(contents | st.just("broken"))
    elif kind == "tags":
        tags = draw(st.lists(st.sampled_from(TAGS), unique=True))
        key, value = f"/calico/v1/policy/profile/{profile}/tags", tags
    elif kind == "action":
        key = f"/calico/v1/host/{HOST}/config/DefaultEndpointToHostAction"
        value = draw(st.sampled_from(["DROP", "RETURN"]))
    elif kind == "host":
        key, value = "/calico/bgp/v1/host/elsewhere/ip_addr_v4", OTHER_HOST
    else:
        key, value = "/calico/v1/ipam/v4/pool/192.168.0.0-16", {"cidr": "192.168.0.0/16"}
    return key, None if draw(st.integers(0, 4)) == 0 else value


def start() -> Iterator[tuple[str, Any]]:
    """Return changes after which there are endpoints, and profiles that name tags."""
    for number in NUMBERS:
        host = HOST if number in LOCAL else "elsewhere"
        profile = PROFILES[number % 2]
        record = {"name": f"cali{number}", "mac": f"02:00:00:00:00:0{number}", "state": "active"}
        nets = {"ipv4_nets": [f"192.168.0.{number}/32"], "ipv6_nets": [f"fd00::{number}/128"]}
        key = f"/calico/v1/host/{host}/workload/docker/w{number}/endpoint/e{number}"
        yield key, {**record, **nets, "profile_ids": [profile]}
    for profile in PROFILES:
        allow, deny = {"action": "allow", "src_tag": "web"}, {"action": "deny", "src_tag": "db"}
        value = {"inbound_rules": [deny, allow], "outbound_rules": [{"action": "allow"}]}
        yield f"/calico/v1/policy/profile/{profile}/rules", value
        yield f"/calico/v1/policy/profile/{profile}/tags", ["web"]


@given(rounds=st.lists(st.lists(changes(), min_size=1, max_size=3), min_size=1, max_size=6))
def test_what_a_change_denies_is_affected_by_it(rounds: list[list[tuple[str, Any]]]) -> None:
    snapshot, ruleset = in_pools(Snapshot(HOST)), Ruleset()
    store = Store(snapshot)

    def allowed_packets() -> set[Packet]:
        return {packet for packet in PACKETS if allowed(packet, snapshot, ruleset.tag_contains, (OWN,))}

    for key, value in start():
        store.put(key, value)
    ruleset.load(snapshot)
    snapshot.take_dirty()
    for round in rounds:
        before = allowed_packets()
        for key, value in round:
            store.put(key, value)
        affected = ruleset.update(snapshot, snapshot.take_dirty()).affected
        for packet in before - allowed_packets():
            assert parties_of(packet) & affected, f"{packet} is denied by {json.dumps(round)}"
