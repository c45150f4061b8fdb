"""Random changes of the store, for tests that compare what many small changes come to with a fresh start."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from calicoctl.datastore.reserved import HostNetwork, Network
from calicoctl.datastore.store import Change, Entry
from calicoctl.desired.snapshot import Snapshot
from calicoctl.felix.dataplane.nft import Nft
from calicoctl.felix.dataplane.ruleset import Ruleset
from tests.unit.kernel import FakeNft

NETWORK = HostNetwork(
    {"172.18.0.1": "a gateway"},
    networks=(Network.of("172.18.0.0", 24, "eth0"), Network.of("fd00:18::", 64, "eth0")),
    reached={f"172.18.0.{number}": frozenset(["eth0"]) for number in range(9)},
)
"""The network of the host `h`."""

TAGS = ("web", "db", "a-b.c_d", "weird tag; drop")


def random_change(chance: random.Random, revision: int) -> Change:
    """Write or remove an endpoint, a profile's tags or rules, a pool, a setting, or what is known of a host."""
    kind = chance.randrange(14)
    number = chance.randrange(6)
    profile = f"p{number}" if number else "un safe"
    value: object
    if kind < 4:
        host = "h" if number < 4 else "elsewhere"
        key = f"/calico/v1/host/{host}/workload/docker/{number}/endpoint/{number}"
        value = {
            "name": f"cali{chance.choice([number, 'x', 'y'])}",
            "mac": f"02:00:00:00:00:0{chance.randrange(3)}",
            "profile_ids": chance.sample(["p1", "p2", "p3", "un safe"], chance.randrange(4)),
            "ipv4_nets": [f"192.168.0.{n}/32" for n in chance.sample(range(number, number + 3), chance.randrange(3))],
            "ipv6_nets": [f"fd00::{n}/128" for n in chance.sample(range(number, number + 3), chance.randrange(3))],
            "state": chance.choice(["active", "active", "active", "inactive"]),
        }
    elif kind < 6:
        key, value = f"/calico/v1/policy/profile/{profile}/tags", chance.sample(TAGS, chance.randrange(4))
    elif kind < 8:
        rules = [
            {"action": chance.choice(["allow", "deny", "log"]), "src_tag": chance.choice(TAGS[:3])}
            for _ in range(chance.randrange(3))
        ]
        ports = [{"protocol": "tcp", "dst_ports": [80, "70:90", 91]}, {"dst_net": "::/0", "dst_tag": "db"}]
        key, value = f"/calico/v1/policy/profile/{profile}/rules", {"inbound_rules": rules, "outbound_rules": ports}
        value = chance.choice([value, value, value, "broken"])
    elif kind < 9:
        cidr = chance.choice(["10.0.0.0/8", "10.1.0.0/16", "192.168.0.0/16", "fd00::/64"])
        key = f"/calico/v1/ipam/v{6 if ':' in cidr else 4}/pool/{cidr.replace('/', '-')}"
        vxlan = chance.choice(["never", "cross-subnet"])
        value = {"cidr": cidr, "masquerade": chance.random() < 0.5, "vxlan_mode": vxlan}
    elif kind < 12:
        host = chance.choice(["h", "elsewhere", 'a " host'])
        below = f"/calico/bgp/v1/host/{host}"
        numbers = chance.sample(range(1, 4), chance.randrange(3))
        key, value = chance.choice(
            [
                (f"{below}/ip_addr_v4", f"172.18.0.{chance.randrange(9)}"),
                (f"{below}/ip_addr_v4", "192.168.0.4"),
                (f"{below}/ip_addr_v6", f"fd00:18::{chance.randrange(9)}"),
                (f"{below}/macs", [f"02:00:00:00:00:0{number}" for number in numbers]),
            ]
        )
        if isinstance(value, str):
            return Change(key, Entry(key, value, revision, revision) if chance.random() < 0.75 else None)
    elif kind < 13:
        key, value = "/calico/bgp/v1/global/node_mesh", {"enabled": chance.random() < 0.5}
        if chance.random() < 0.5:
            key, value = "/calico/bgp/v1/global/peer_v4/172.18.0.8", {"ip": "172.18.0.8", "as_num": "64512"}
    else:
        key = "/calico/v1/host/h/config/DefaultEndpointToHostAction"
        return Change(key, Entry(key, chance.choice(["DROP", "ACCEPT", "RETURN"]), revision, revision))
    if chance.random() < 0.25:
        return Change(key, None)
    return Change(key, Entry(key, json.dumps(value), revision, revision))


def check_random_updates(nft: Nft | FakeNft, tables: Callable[[], object], seeds: int, updates: int) -> None:
    """Check that the commands of many updates come to what those of a fresh load of the same snapshot give.

    `nft` runs the commands, and `tables` returns what there is then. Each seed stands for another row of updates.
    """
    for seed in range(seeds):
        chance = random.Random(seed)
        snapshot, ruleset = Snapshot("h"), Ruleset()
        snapshot.set_network(NETWORK)
        nft.run(ruleset.load(snapshot).commands)
        for index in range(updates):
            for _ in range(chance.choice([1, 1, 1, 5])):
                snapshot.change(random_change(chance, index))
            nft.run(ruleset.update(snapshot, snapshot.take_dirty()).commands)
        nft.run(ruleset.restore_established_fast_path())
        changed = tables()
        nft.run(ruleset.recreate() + ruleset.restore_established_fast_path())
        assert changed == tables(), f"seed {seed}, recreated"
        fresh = Ruleset()
        nft.run(fresh.load(snapshot).commands + fresh.restore_established_fast_path())
        assert changed == tables(), f"seed {seed}"
