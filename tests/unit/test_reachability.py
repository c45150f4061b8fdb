"""Who may reach whom: the same as `profile trace` says about any packet, and in words."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calicoctl.commands import map as map_command
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.reserved import HostNetwork
from calicoctl.desired import snapshot
from calicoctl.diagnose import reachability
from calicoctl.diagnose.enforcement import Enforcement
from calicoctl.diagnose.network_map import NetworkMap
from calicoctl.diagnose.reachability import OTHERS, Joint, Node, Reachability
from calicoctl.diagnose.trace import trace
from calicoctl.errors import CalicoError
from calicoctl.output import print_data
from calicoctl.policy.rules import PROTOCOLS
from calicoctl.policy.verdict import Packet
from calicoctl.workloads import host_network
from tests.unit.memory_store import MemoryStore

HOSTS = {"host1": ("192.0.2.1", "2001:db8::1"), "host2": ("192.0.2.2", ""), "host3": ("", "")}
PROFILES = ("a", "b", "c")
PORTS = (0, 22, 23, 53, 54, 79, 80, 81, 82, 442, 443, 65535)


class World:
    """A store with hosts, a pool of each IP version, and what a test adds."""

    def __init__(self, masquerade: bool = False) -> None:
        self.store = MemoryStore()
        for host, (ipv4, ipv6) in HOSTS.items():
            self.put(f"/calico/bgp/v1/host/{host}/ip_addr_v4", ipv4)
            self.put(f"/calico/bgp/v1/host/{host}/ip_addr_v6", ipv6)
        more = {"masquerade": True} if masquerade else {}
        self.put("/calico/v1/ipam/v4/pool/10.65.0.0-16", {"cidr": "10.65.0.0/16", **more})
        self.put("/calico/v1/ipam/v6/pool/fd00::-64", {"cidr": "fd00::/64", **more})

    def put(self, key: str, value: Any) -> None:
        self.store.create(key, value if isinstance(value, str) else json.dumps(value))

    def profile(self, name: str, inbound: Any, outbound: Any = ({"action": "allow"},), tags: Any = ()) -> None:
        rules = {"id": name, "inbound_rules": list(inbound), "outbound_rules": list(outbound)}
        self.put(f"/calico/v1/policy/profile/{name}/rules", rules)
        self.put(f"/calico/v1/policy/profile/{name}/tags", list(tags))

    def endpoint(self, number: int, *addresses: str, host: str = "host1", **fields: Any) -> None:
        record = {
            "name": f"cali{number}",
            "mac": f"02:00:00:00:00:{number:02x}",
            "workload_name": f"w{number}",
            "ipv4_nets": [f"{address}/32" for address in addresses if ":" not in address],
            "ipv6_nets": [f"{address}/128" for address in addresses if ":" in address],
            **fields,
        }
        self.put(f"/calico/v1/host/{host}/workload/docker/w{number}/endpoint/{number:032x}", record)

    @property
    def datastore(self) -> DatastoreClient:
        return DatastoreClient(self.store, "host1")

    def map(self) -> NetworkMap:
        return NetworkMap(Enforcement(self.datastore))

    def as_json(self) -> dict[str, Any]:
        """Return what `calicoctl map --output=json` prints."""
        with redirect_stdout(StringIO()) as printed:
            print_data(self.map().to_dict(), "json")
        shown: dict[str, Any] = json.loads(printed.getvalue())
        return shown

    def allowed(self, source: str, destination: str) -> str:
        found = self.map()
        nodes = {node.name: node for node in found.reach.nodes}
        return found.allowed(nodes[source], nodes[destination])


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_network, "read", HostNetwork)
    monkeypatch.setattr(host_network, "own_addresses", set)
    monkeypatch.setattr("calicoctl.diagnose.trace.is_routed", lambda address, pool: True)


def sides(side: str) -> dict[str, st.SearchStrategy[Any]]:
    nets = ["10.65.0.0/31", "10.0.0.0/8", "192.0.2.0/24", "fd00::/127", "2001:db8::/32"]
    return {f"{side}_tag": st.sampled_from(["t", "u"]), f"{side}_net": st.sampled_from(nets)}


SIDES = {**sides("src"), **sides("dst")}
ACTION = {"action": st.sampled_from(["allow", "allow", "deny", "log"])}
SOME_PORTS = st.lists(st.sampled_from([22, 53, 80, "79:81", "443:65535", "0:80"]), min_size=1, max_size=2)
RULE = st.one_of(
    st.fixed_dictionaries(ACTION, optional={**SIDES, "ip_version": st.sampled_from([4, 6])}),
    st.fixed_dictionaries(
        {**ACTION, "protocol": st.sampled_from(["tcp", "udp", "sctp", 6])},
        optional={**SIDES, "dst_ports": SOME_PORTS, "src_ports": st.just([40000])},
    ),
    st.fixed_dictionaries({**ACTION, "protocol": st.sampled_from(["icmp", "icmpv6", 47])}, optional=SIDES),
    st.fixed_dictionaries(
        {**ACTION, "protocol": st.sampled_from(["icmp", "icmpv6"]), "icmp_type": st.sampled_from([8, 128, 133])},
        optional={**SIDES, "icmp_code": st.sampled_from([0, 1])},
    ),
    st.just({"action": "perhaps"}),  # a profile with this rule denies everything
)
RULES = st.lists(RULE, max_size=3)
ADDRESSES = ("10.65.0.{}", "10.65.1.{}", "172.20.0.{}", "fd00::{}", "fd01::{}")
ENDPOINT = st.fixed_dictionaries(
    {
        "host": st.sampled_from(sorted(HOSTS)),
        "profile_ids": st.lists(st.sampled_from([*PROFILES, "missing"]), unique=True, max_size=3),
        "addresses": st.lists(st.sampled_from(ADDRESSES), unique=True, max_size=3),
        "state": st.sampled_from(["active", "active", "active", "inactive"]),
    }
)
WORLD = st.fixed_dictionaries(
    {
        "masquerade": st.booleans(),
        "profiles": st.tuples(*[st.tuples(RULES, RULES, st.lists(st.sampled_from(["t", "u"]), unique=True))] * 3),
        "endpoints": st.lists(ENDPOINT, min_size=1, max_size=4),
        "action": st.sampled_from(["RETURN", "DROP", ""]),
        "services": st.sampled_from(["allow", "drop", ""]),
    }
)


def made(drawn: dict[str, Any]) -> World:
    world = World(drawn["masquerade"])
    for name, (inbound, outbound, tags) in zip(PROFILES, drawn["profiles"]):
        world.profile(name, inbound, outbound, tags)
    for number, fields in enumerate(drawn["endpoints"], start=1):
        addresses = [form.format(number) for form in fields["addresses"]]
        world.endpoint(number, *addresses, **{name: fields[name] for name in ("host", "profile_ids", "state")})
    if drawn["action"]:
        world.put("/calico/v1/host/host1/config/DefaultEndpointToHostAction", drawn["action"])
    if drawn["services"]:
        world.put("/calico/v1/config/EndpointToHostServices", drawn["services"])
    return world


def pairs(reach: Reachability) -> list[tuple[Node, Node]]:
    """Return the pairs that are evaluated: at least one is an endpoint, and they are not the same one."""
    return [
        (one, other)
        for one in reach.nodes
        for other in reach.nodes
        if one.endpoint != other.endpoint and (one.endpoint or other.endpoint)
    ]


def joint(joints: list[Joint], protocol: int, number: int) -> Joint:
    own = [one for one in joints if one.protocol == protocol] or [one for one in joints if one.protocol == OTHERS]
    assert [one.first for one in own] == [0, *(one.last + 1 for one in own[:-1])] and own[-1].last == 65535
    return next(one for one in own if one.first <= number <= one.last)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(WORLD, st.sampled_from(["tcp", "udp", "icmp", "icmpv6"]), st.sampled_from(PORTS))
def test_the_map_says_what_trace_says(drawn: dict[str, Any], protocol: str, port: int) -> None:
    world = made(drawn)
    reach = world.map().reach
    for source, destination in pairs(reach):
        for version, joints in reach.pair(source, destination).items():
            if {"icmp": 4, "icmpv6": 6}.get(protocol, version) != version:
                continue
            number = {"icmp": 8 * 256, "icmpv6": 128 * 256}.get(protocol, port)
            found = joint(joints, PROTOCOLS[protocol], number)
            for here in (a for a in source.addresses if (":" in a) == (version == 6)):
                for there in (a for a in destination.addresses if (":" in a) == (version == 6)):
                    said = trace(world.datastore, here, there, protocol, port)
                    assert found.allowed == said.allowed, (source, destination, said)
                    rulings = [ruling for ruling in (found.outbound, found.inbound) if ruling is not None]
                    verdicts = [ruling.verdict and (ruling.verdict.profile, ruling.verdict.rule) for ruling in rulings]
                    assert [verdict or (None, None) for verdict in verdicts] == [
                        (decision.profile, decision.rule) for decision in said.decisions
                    ]
                    assert [ruling.allowed for ruling in rulings] == [decision.allowed for decision in said.decisions]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(WORLD, st.sampled_from([0, 47, 99, 132, 136, 255]), st.sampled_from(PORTS), st.integers(0, 255))
def test_the_map_says_what_is_enforced_for_other_protocols_and_icmp_types(
    drawn: dict[str, Any], protocol: int, port: int, kind: int
) -> None:
    world = made(drawn)
    enforcement = Enforcement(world.datastore)
    reach = Reachability(enforcement)
    for source, destination in pairs(reach):
        for version, joints in reach.pair(source, destination).items():
            here, there = source.place(version), destination.place(version)
            ports = (40000, port) if protocol in (132, 136) else (None, None)
            icmp = 1 if version == 4 else 58
            packets = [
                (Packet(here.address, there.address, protocol, *ports), port if ports[1] is not None else 0),
                (Packet(here.address, there.address, icmp, icmp_type=kind, icmp_code=port % 3), 256 * kind + port % 3),
            ]
            for packet, number in packets:
                found = joint(joints, packet.protocol, number)
                if source.endpoint is not None:
                    assert found.outbound == enforcement.outbound(source.endpoint, there, packet)
                    if source.host != destination.host:
                        packet = enforcement.as_sent(source.host, packet)
                if destination.endpoint is not None:
                    assert found.inbound == enforcement.inbound(here, destination.endpoint, packet)


ALLOW: dict[str, Any] = {"action": "allow"}
TCP: dict[str, Any] = {"action": "allow", "protocol": "tcp"}


@pytest.mark.parametrize(
    ("inbound", "said"),
    [
        ([], "-"),
        ([ALLOW], "all"),
        ([TCP], "tcp"),
        ([{**TCP, "dst_ports": [443, 80, "8000:8010"]}], "tcp 80, 443, 8000-8010"),
        ([{**TCP, "dst_ports": [80]}, {**TCP, "dst_ports": [81]}], "tcp 80-81"),
        ([{**TCP, "dst_ports": [80]}, {"action": "allow", "protocol": "icmp"}], "tcp 80; icmp"),
        ([{**TCP, "action": "deny", "dst_ports": [22]}, TCP], "tcp except 22"),
        ([{**TCP, "action": "deny", "dst_ports": [22]}, ALLOW], "all except tcp 22"),
        ([{**TCP, "action": "deny"}, ALLOW], "all except tcp"),
        ([{"action": "allow", "protocol": "icmp", "icmp_type": 8}], "icmp type 8"),
        ([{"action": "allow", "protocol": "icmp", "icmp_type": 3, "icmp_code": 4}], "icmp type 3 code 4"),
        ([{"action": "deny", "protocol": "icmp", "icmp_type": 5}, {"action": "allow", "protocol": "icmp"}],
         "icmp except type 5"),
        ([{"action": "allow", "protocol": 47}, {"action": "allow", "protocol": "udp"}], "udp; protocol 47"),
        ([{**TCP, "src_tag": "other"}], "-"),
        ([{**TCP, "src_tag": "t"}], "tcp"),
        ([{**TCP, "src_net": "10.65.0.2/32"}], "-"),
        ([{**TCP, "src_ports": [1000]}], "-"),
    ],
)  # fmt: skip
def test_what_passes_is_said_in_few_words(inbound: Any, said: str) -> None:
    world = World()
    world.profile("in", inbound)
    world.profile("out", [], tags=["t"])
    world.endpoint(1, "10.65.0.1", profile_ids=["out"])
    world.endpoint(2, "10.65.0.2", profile_ids=["in"])
    assert world.allowed("w1", "w2") == said


def test_ip_versions_are_told_apart_only_where_they_differ() -> None:
    world = World()
    ping = [{"action": "allow", "protocol": "icmp"}, {"action": "allow", "protocol": "icmpv6"}]
    world.profile("ping", [*ping, {**TCP, "src_net": "fd00::/64"}])
    world.profile("both", [*ping, TCP])
    world.endpoint(1, "10.65.0.1", "fd00::1", profile_ids=["both"])
    world.endpoint(2, "10.65.0.2", "fd00::2", profile_ids=["ping"])
    world.endpoint(3, "fd00::3", profile_ids=["both"])
    assert world.allowed("w2", "w1") == "tcp; icmp"
    assert world.allowed("w1", "w2") == "IPv4: icmp | IPv6: tcp; icmpv6"
    assert world.allowed("w3", "w1") == "tcp; icmpv6"


def test_endpoints_that_rules_cannot_tell_apart_are_a_group() -> None:
    world = World()
    world.profile("web", [{**TCP, "src_net": "10.65.0.1/32"}], tags=["web"])
    world.profile("unused", [{**TCP, "src_net": "10.65.0.2/32"}])
    for number in (1, 2, 3):
        world.endpoint(number, f"10.65.0.{number}", profile_ids=["web"])
    world.endpoint(4, "10.65.0.4", host="host2", profile_ids=["web"])
    world.endpoint(5, "10.65.0.5", profile_ids=["web"], state="inactive")
    world.endpoint(6, "10.65.0.6", "10.65.0.1", profile_ids=[])
    members = [[node.name for node in group.members] for group in world.map().reach.groups]
    assert members == [["w1"], ["w2", "w3", "w4"], ["w5"], ["w6"], ["w6"], ["host1"], ["host2"]]


def test_where_packets_are_masqueraded_the_host_counts() -> None:
    world = World(masquerade=True)
    world.profile("web", [{**TCP, "src_net": "192.0.2.1/32"}])
    world.endpoint(1, "10.65.0.1", profile_ids=["web"])
    world.endpoint(2, "172.20.0.2", host="host2", profile_ids=["web"])
    world.endpoint(3, "172.20.0.3", profile_ids=["web"])
    world.endpoint(4, "10.65.0.4", host="host2", profile_ids=["web"])
    found = world.map()
    nodes = {node.name: node for node in found.reach.nodes}
    pairs = [("w1", "w2"), ("w1", "w3"), ("w2", "w3"), ("w4", "w2"), ("w4", "w3")]
    assert [found.allowed(nodes[a], nodes[b]) for a, b in pairs] == ["tcp", "-", "-", "-", "-"]


def test_hosts_reach_workloads_and_workloads_reach_hosts_as_their_settings_say() -> None:
    world = World()
    world.profile("closed", [], [])
    world.profile("open", [])
    world.endpoint(1, "10.65.0.1", profile_ids=["closed"])
    world.endpoint(2, "10.65.0.2", host="host2", profile_ids=["open"])
    world.put("/calico/v1/host/host2/config/DefaultEndpointToHostAction", "DROP")
    assert [world.allowed(host, "w1") for host in ("host1", "host2")] == ["all", "all"]
    assert [world.allowed("w1", host) for host in ("host1", "host2")] == ["udp 53", "-"]
    assert [world.allowed("w2", host) for host in ("host1", "host2")] == ["all", "udp 53"]


def test_the_json_names_the_rules_that_decide() -> None:
    world = World()
    world.profile("web", [{"action": "deny", "src_tag": "t"}, {**TCP, "dst_ports": [80]}], tags=["web"])
    world.endpoint(1, "10.65.0.1", profile_ids=["web"])
    world.endpoint(2, "10.65.0.2", profile_ids=["web"], state="inactive")
    world.endpoint(3, "10.65.0.3", profile_ids=["web", "missing"])
    world.put("/calico/v1/policy/profile/broken/rules", "{")
    shown = world.as_json()
    assert shown["endpoints"][0] == {
        "host": "host1",
        "orchestrator": "docker",
        "workload": "w1",
        "workload_name": "w1",
        "endpoint": f"{1:032x}",
        "addresses": ["10.65.0.1"],
        "profiles": ["web"],
        "tags": ["web"],
        "problem": None,
        "group": 0,
    }
    assert [one["problem"] for one in shown["endpoints"]] == [None, "it is inactive", None]
    assert shown["hosts"][0] == {"host": "host1", "addresses": ["192.0.2.1", "2001:db8::1"], "group": 3}

    def decided(source: int, destination: int, end: str) -> list[tuple[Any, ...]]:
        pair = shown["pairs"][shown["reach"][source][destination]]
        parts = shown["decisions"][pair["ipv4"][end]]
        return [(p["protocol"], p["first"], p["last"], shown["rulings"][p["ruling"]]["why"]) for p in parts]

    assert shown["reach"][0][0] is None, "it has one member"
    assert decided(2, 0, "outbound") == [(None, 0, 65535, "rule 1 of profile web: allow")]
    nothing = "no rule of its profiles matches"
    assert decided(2, 0, "inbound") == [
        (6, 0, 79, nothing),
        (6, 80, 80, "rule 2 of profile web: allow tcp to ports 80"),
        (6, 81, 65535, nothing),
        (None, 0, 65535, nothing),
    ]
    missing = "profile missing does not exist, or its rules cannot be read"
    assert decided(0, 2, "inbound")[-1] == (None, 0, 65535, missing)
    assert decided(1, 0, "outbound") == [(None, 0, 65535, "the endpoint is not set up")]
    assert shown["own_hosts"][0]["host_group"] == 3
    own = shown["pairs"][shown["own_hosts"][0]["to_host"]]
    assert own["allowed"] == "all" and own["ipv6"] is None
    assert [problem["key"] for problem in shown["problems"]] == ["/calico/v1/policy/profile/broken/rules"]


def test_problems_are_named_wherever_the_map_is_made() -> None:
    world = World()
    world.put("/calico/v1/policy/profile/broken/rules", "{")
    world.put("/calico/v1/host/elsewhere/workload/docker/w1/endpoint/1", "{")
    world.endpoint(2, "10.65.0.2", "172.20.0.2", host="host2")
    world.endpoint(3, "10.65.0.3", state="inactive")
    found = NetworkMap(Enforcement(DatastoreClient(world.store, "laptop")))
    assert [key for key, _ in found.problems()] == [
        "/calico/v1/host/elsewhere/workload/docker/w1/endpoint/1",
        f"/calico/v1/host/host2/workload/docker/w2/endpoint/{2:032x}",
        "/calico/v1/policy/profile/broken/rules",
    ]
    assert found.problems()[1][1] == "its address 172.20.0.2 is in no pool"
    assert found.legend()[0][3] == "no profile (not set up: it is inactive)"


def test_profiles_are_read_once_and_not_for_each_host(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.profile("web", [{**TCP, "src_tag": "web"}], tags=["web"])
    for number, host in enumerate(HOSTS, start=1):
        world.endpoint(number, f"10.65.0.{number}", host=host, profile_ids=["web"])
    load_tags = Mock(side_effect=snapshot.load_tags)
    monkeypatch.setattr(snapshot, "load_tags", load_tags)
    assert world.as_json()["pairs"]
    assert load_tags.call_count <= 2, "once for each of its two keys"


def test_rules_that_cannot_match_an_address_are_not_asked_about_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a profile with a rule for each of many tags takes time for each rule, and not for each pair of rules."""
    world = World()
    world.profile("big", [{**TCP, "dst_ports": [2 * n + 1], "src_tag": f"t{n}"} for n in range(40)])
    for number in range(40):
        world.profile(f"p{number}", [ALLOW], tags=[f"t{number}"])
        world.endpoint(number + 1, f"10.65.0.{number + 1}", profile_ids=["big", f"p{number}"])
    counted = Mock(side_effect=reachability.decide)
    monkeypatch.setattr(reachability, "decide", counted)
    assert world.allowed("w3", "w5") == "all"
    world.map().to_dict()
    assert counted.call_count < 40 * 10


def test_equal_parts_of_decisions_are_in_memory_once() -> None:
    """A map of a thousand groups has ten thousand decisions, of which most parts are equal."""
    world = World()
    world.profile("big", [{**TCP, "dst_ports": [2 * n + 1], "src_tag": f"t{n}"} for n in range(10)])
    for number in range(10):
        world.profile(f"p{number}", [ALLOW], tags=[f"t{number}"])
        world.endpoint(number + 1, f"10.65.0.{number + 1}", profile_ids=["big", f"p{number}"])
    reach = world.map().reach
    answers = [reach.inbound(one, other, 4) for one in reach.endpoints for other in reach.endpoints]
    columns = [column for decisions in answers if decisions is not None for _, column in decisions]
    for found in (columns, [part for column in columns for part in column]):
        assert len(set(map(id, found))) == len(set(found)) < len(found)


def test_a_matrix_that_would_take_minutes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calicoctl.commands.map._network", World().map)
    monkeypatch.setattr("calicoctl.commands.map.MOST_GROUPS", {None: 1, "json": 1, "yaml": 1})
    for form in ("json", "yaml", "text"):
        with pytest.raises(CalicoError, match=r"tells 2 groups .* apart, .* 'calicoctl map map\.html'"):
            map_command.prepare(["map", f"--output={form}"])()


def test_a_network_without_endpoints_has_a_map() -> None:
    found = World().map()
    assert World().as_json()["reach"] == [[None] * 2] * 2
    assert found.table()[1][-1] == ["own host", "", "", ""]


def test_endpoints_of_one_host_may_have_the_same_name() -> None:
    """A name is not an id: a workload may have several endpoints, and the ids of workloads are shortened."""
    world = World()
    for number in (2, 1):
        world.endpoint(number, f"10.65.0.{number}", workload_name="web")
    assert [(node.name, node.addresses) for node in world.map().reach.endpoints] == [
        ("web", ("10.65.0.1",)),
        ("web", ("10.65.0.2",)),
    ]
