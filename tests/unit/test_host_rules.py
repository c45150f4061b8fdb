"""What the tables say about other hosts: senders, the ports of BGP and VXLAN, and translated packets."""

from __future__ import annotations

from calicoctl.datastore.reserved import HostNetwork, Network, Servers
from calicoctl.felix.dataplane.host_rules import BASE_CHAINS, Ports
from calicoctl.policy.verdict import either_party
from tests.unit.test_ruleset import Tables

A, B, C, B6 = "192.168.0.1", "192.168.1.1", "192.168.2.1", "fd80::1"
ONE, TWO, THREE = "172.18.0.11", "172.18.0.12", "172.19.0.13"
MAC, OTHER_MAC = "02:00:00:00:00:12", "02:00:00:00:00:99"
ETH0 = frozenset(["eth0"])
SHARED = (Network.of("172.18.0.0", 24, "eth0"), Network.of("172.20.0.0", 24, "docker0"))


class Hosts(Tables):
    """The tables of host1; host2 is in the same network, host3 behind a router."""

    def __init__(self) -> None:
        super().__init__()
        self.register("host1", ONE)
        self.register("host2", TWO, MAC)
        self.register("host3", THREE, OTHER_MAC)
        self.connect(TWO, THREE)
        self.store.put("/calico/v1/ipam/v4/pool/192.168.0.0-16", {"cidr": "192.168.0.0/16"})
        self.update()

    def register(self, host: str, address: str, *macs: str) -> None:
        self.store.put(f"/calico/bgp/v1/host/{host}/ip_addr_v{6 if ':' in address else 4}", address)
        if macs:
            self.store.put(f"/calico/bgp/v1/host/{host}/macs", list(macs))

    def connect(self, *reached: str, networks: tuple[Network, ...] = SHARED) -> None:
        self.snapshot.set_network(
            HostNetwork({"172.18.0.1": "a gateway"}, networks=networks, reached=dict.fromkeys(reached, ETH0))
        )

    def update_with(self, ports: Ports) -> set[str]:
        dirty = self.snapshot.take_dirty()
        dirty.topology = True
        update = self.ruleset.update(self.snapshot, dirty, None, ports)
        self.nft.run(update.commands)
        return {party.address for party in update.affected}

    def owner(self, address: str) -> str | None:
        elements = self.nft.set(f"owners{6 if ':' in address else 4}")
        found = dict(element.split(" : ") for element in elements)
        return found.get(address)


def test_who_has_an_address_decides_what_becomes_of_packets_from_it() -> None:
    tables = Hosts()
    tables.store.endpoint(1, A)
    tables.store.endpoint(2, B, B6, host="host2")
    tables.store.endpoint(3, C, host="old")
    tables.update()
    assert tables.owner(A) == "drop" and tables.owner(B) == tables.owner(B6) == "goto host/host2"
    assert tables.owner(C) == "goto host/old" and tables.nft.chain("host/old") == ["goto by-interface"]
    assert tables.owner(TWO) == "goto host/host2" and tables.owner(ONE) is None, "the kernel looks after that"
    tables.store.endpoint(2, host="host2")
    tables.store.endpoint(3, host="old")
    tables.update()
    assert tables.owner(B) is tables.owner(C) is None and "chain inet calico host/old" not in tables.nft.objects


def test_an_address_that_moves_is_never_two_elements_of_a_map() -> None:
    tables = Hosts()
    tables.store.endpoint(1, B)
    tables.store.endpoint(2, B, host="host2")
    tables.update()
    assert tables.owner(B) == "goto by-interface", "both records are there for a while"
    tables.store.endpoint(2, host="host2")
    tables.update()
    assert tables.owner(B) == "drop"
    tables.store.endpoint(1)
    tables.store.endpoint(2, B, host="host2")
    tables.update()
    assert tables.owner(B) == "goto host/host2"


def test_addresses_that_this_host_needs_are_nobodys_endpoint() -> None:
    tables = Hosts()
    tables.store.endpoint(2, "172.18.0.1", THREE, host="host2")
    tables.update()
    assert tables.owner("172.18.0.1") is None, "that is the gateway of this host"
    assert tables.owner(THREE) == "goto host/host3"
    tables.snapshot.set_network(HostNetwork())
    tables.update()
    assert tables.owner("172.18.0.1") == "goto host/host2"


def test_packets_of_servers_are_dropped_whatever_records_say_by_nobody() -> None:
    tables = Hosts()
    member, dns, peer, workload = "10.0.0.1", "10.0.0.2", "10.0.0.3", "192.168.0.99"
    tables.snapshot.set_network(HostNetwork().with_servers(Servers(frozenset([member]), frozenset([dns, workload]))))
    tables.store.put(f"/calico/bgp/v1/global/peer_v4/{peer}", {"ip": peer, "as_num": "64512"})
    tables.store.endpoint(1, A, member, dns, peer, "10.0.0.9", state="inactive")
    tables.store.endpoint(2, member, dns, peer, host="host2")
    tables.update()
    assert tables.owner(A) == "drop"
    assert [tables.owner(address) for address in (member, dns)] == [None, None]
    tables.snapshot.admission.set_pool("0.0.0.0/0", None)  # the one that every address is in
    tables.store.put("/calico/v1/ipam/v4/pool/10.9.0.0-16", {"cidr": "10.9.0.0/16"})
    tables.store.endpoint(1, A, peer, "10.0.0.7", state="inactive", name="cali9")
    tables.update()
    assert [tables.owner(address) for address in (A, peer, "10.0.0.7")] == ["drop", None, None]


def test_an_address_in_no_pool_is_no_endpoint_of_another_host() -> None:
    tables = Hosts()
    tables.snapshot.admission.set_pool("0.0.0.0/0", None)  # the one that every address is in
    bridged = "172.30.0.2"
    tables.store.endpoint(2, B, bridged, host="host2")
    tables.update()
    assert (tables.owner(B), tables.owner(bridged)) == ("goto host/host2", None)
    tables.store.put("/calico/v1/ipam/v4/pool/172.30.0.0-16", {"cidr": "172.30.0.0/16"})
    tables.store.endpoint(1, bridged)
    tables.update()
    assert tables.owner(bridged) == "goto by-interface"
    tables.store.put("/calico/v1/ipam/v4/pool/172.30.0.0-16", None)
    tables.update()
    assert tables.owner(bridged) == "drop", "an endpoint of this host keeps it"


def test_macs_count_in_a_common_network_and_interfaces_everywhere() -> None:
    tables = Hosts()
    learn, enforce, last = tables.nft.chain("host/host2")
    assert learn == (
        f'meta nfproto ipv4 iifname {{ "eth0" }} ether saddr {{ {MAC} }} add @proven/host2 {{ iifname }} accept'
    )
    assert enforce == "meta nfproto ipv4 iifname @proven/host2 ether saddr != @host-macs goto not-its-host"
    assert last == "goto by-interface" and tables.nft.chain("host/host3") == [last]
    assert tables.nft.set("host-macs") == [MAC, OTHER_MAC]
    assert tables.nft.set("fabric") == ['"eth0"', '"vxlan-v6.calico"', '"vxlan.calico"']
    assert tables.nft.chain("by-interface")[-1] == "meta nfproto ipv4 goto not-its-host", "no host has IPv6"


def test_packets_may_come_from_wherever_a_router_may_be() -> None:
    tables = Hosts()
    reached = dict.fromkeys((TWO, THREE), frozenset(["eth1"]))
    routed, macs = frozenset(["br2", "odd *"]), {"eth3": frozenset([MAC])}
    tables.snapshot.set_network(HostNetwork(networks=SHARED, reached=reached, routed=routed, macs=macs))
    tables.update()
    expected = ['"br2"', '"eth0"', '"eth1"', '"eth3"', '"vxlan-v6.calico"', '"vxlan.calico"']
    assert tables.nft.set("fabric") == expected, "eth0 has the registered address; docker0, without a router, is none"


def test_a_host_with_a_new_mac_may_announce_it_but_opens_no_session_of_bgp() -> None:
    rules = Hosts().nft.chain("not-its-host")
    spared = rules.index("ip saddr @hosts4 fib daddr type local meta l4proto tcp accept")
    assert "ip saddr @hosts4 ip daddr != @pools4 meta l4proto tcp accept" in rules, "it may route to etcd"
    assert {"tcp dport 179 counter drop", "tcp sport 179 counter drop"} <= {*rules[:spared]}


def test_what_is_not_known_passes() -> None:
    tables = Hosts()
    tables.connect(TWO)  # there is no route to host3
    tables.update()
    assert tables.nft.chain("by-interface") == []
    tables.connect(TWO, THREE, networks=())
    tables.update()
    assert tables.nft.chain("host/host2") == ["goto by-interface"] and tables.nft.chain("by-interface")
    assert "set inet calico proven/host2" not in tables.nft.objects
    tables.connect(TWO, THREE)
    tables.store.put("/calico/bgp/v1/host/host2/macs", None)
    tables.update()
    assert tables.nft.chain("host/host2") == ["goto by-interface"], "an old host"


def test_checks_can_be_switched_off() -> None:
    tables, key = Hosts(), "/calico/v1/config/CheckSenders"
    tables.store.endpoint(1, A)
    tables.store.put(key, "interface")
    tables.update()
    assert tables.nft.chain("host/host2") == ["goto by-interface"] and tables.nft.chain("by-interface")
    tables.store.put(key, "off")
    tables.update()
    assert tables.nft.chain("by-interface") == [] and tables.owner(A) == "drop", (
        "that needs no knowledge of the network"
    )
    tables.store.put(key, "nonsense")
    tables.update()
    assert len(tables.nft.chain("host/host2")) == 3 and "mac, interface, off" in tables.snapshot.problems[key]
    tables.store.put(key, None)
    tables.update()
    assert len(tables.nft.chain("host/host2")) == 3 and not tables.snapshot.problems


def test_macs_do_not_count_where_routes_may_lead_through_a_router_of_the_network() -> None:
    tables = Hosts()
    tables.store.put("/calico/bgp/v1/global/node_mesh", {"enabled": False})
    tables.update()
    assert len(tables.nft.chain("host/host2")) == 3
    tables.store.put("/calico/bgp/v1/global/peer_v4/172.18.0.99", {"ip": "172.18.0.99", "as_num": "64512"})
    tables.update()
    assert tables.nft.chain("host/host2") == ["goto by-interface"]
    tables.store.put("/calico/bgp/v1/global/node_mesh", {"enabled": True})
    tables.update()
    assert len(tables.nft.chain("host/host2")) == 3


def test_only_peers_reach_bgp_while_our_bird_holds_the_port() -> None:
    tables = Hosts()
    assert "chain inet calico ports" not in tables.nft.objects
    tables.store.put("/calico/bgp/v1/host/host1/peer_v4/172.18.0.99", {"ip": "172.18.0.99", "as_num": "64512"})
    tables.update_with(Ports(bgp=True))
    assert tables.nft.chain("ports") == ["tcp dport 179 goto bgp-port"] and tables.nft.chain("input-passed")
    assert tables.nft.set("peers4") == [TWO, "172.18.0.99", THREE]
    tables.store.put("/calico/bgp/v1/global/node_mesh", {"enabled": False})
    tables.update_with(Ports(bgp=True))
    assert tables.nft.set("peers4") == ["172.18.0.99"]
    tables.update_with(Ports())
    assert "chain inet calico ports" not in tables.nft.objects
    assert "chain inet calico input-passed" not in tables.nft.objects


def test_vxlan_is_guarded_while_a_pool_or_a_device_needs_it() -> None:
    tables, key = Hosts(), "/calico/v1/ipam/v4/pool/192.168.0.0-16"
    assert "chain inet calico vxlan-forward" not in tables.nft.objects
    tables.store.put(key, {"cidr": "192.168.0.0/16", "vxlan_mode": "always"})
    tables.update()
    assert tables.nft.chain("ports") == ["udp dport 4789 @th,96,24 4095 counter drop"], "another may hold the port"
    tables.update_with(Ports(vxlan=frozenset([4]), up=frozenset([6])))
    assert tables.nft.chain("ports") == ["udp dport 4789 @th,96,24 4095 counter drop"]
    tables.update_with(Ports(vxlan=frozenset([4]), up=frozenset([4])))
    assert tables.nft.chain("ports") == [
        f"udp dport 4789 @th,96,24 4095 ip daddr {ONE} goto vxlan-port",
        "udp dport 4789 @th,96,24 4095 counter drop",
    ], "what comes to another address was not sent by a device"
    assert [rule for rule in tables.nft.chain("translated") if "udp dport 4789 @th,96,24 4095 counter drop" in rule]
    assert len(tables.nft.chain("vxlan-forward")) == 2 and tables.nft.set("hosts4") == [ONE, TWO, THREE]
    tables.update_with(Ports(blocked=True))
    assert "chain inet calico ports" not in tables.nft.objects, "it is another program's"
    tables.store.put(key, {"cidr": "192.168.0.0/16"})
    tables.update_with(Ports(vxlan=frozenset([4])))
    assert tables.nft.chain("ports") and tables.nft.chain("vxlan-forward")
    tables.update_with(Ports())
    assert "chain inet calico vxlan-forward" not in tables.nft.objects


def test_connections_of_a_host_that_is_gone_or_of_a_pool_are_verified() -> None:
    tables = Hosts()
    tables.nft.run(tables.ruleset.restore_established_fast_path())
    tables.store.put("/calico/bgp/v1/host/host2/ip_addr_v4", None)
    assert tables.update()[1] == either_party([TWO])
    assert tables.nft.set("hosts4") == [ONE, THREE] and "chain inet calico host/host2" not in tables.nft.objects
    tables.store.put("/calico/v1/ipam/v4/pool/192.168.0.0-16", None)
    assert tables.update()[1] == either_party([THREE])
    tables.register("host2", TWO)
    assert tables.update()[1] == set(), "a new host denies nothing"


def test_containers_reach_the_machines_of_a_network_that_a_pool_overlaps() -> None:
    tables = Hosts()
    (judged, _) = tables.nft.chain("translated")
    assert judged.endswith("ip daddr @pools4 ip daddr != @hosts4 ip daddr != @peers4 counter drop")
    tables.store.put("/calico/v1/ipam/v4/pool/172.18.0.0-17", {"cidr": "172.18.0.0/17"})
    tables.update()
    near = 'ip daddr 172.18.0.0/24 oifname "eth0" rt ip nexthop != @hosts4 rt ip nexthop != @peers4 accept'
    assert tables.nft.chain("translated")[:2] == [near, judged]
    tables.store.put("/calico/v1/ipam/v4/pool/172.18.0.0-17", None)
    tables.update()
    assert near not in tables.nft.chain("translated")


def test_one_host_alone_pays_for_nothing() -> None:
    tables = Tables()
    tables.store.put("/calico/bgp/v1/host/host1/ip_addr_v4", ONE)
    tables.update()
    for name in BASE_CHAINS:
        assert f"chain inet calico {name}" not in tables.nft.objects
    tables.store.put("/calico/bgp/v1/host/host2/ip_addr_v4", TWO)
    tables.update()
    assert "ct status snat" in tables.nft.chain("translated")[0]


def test_odd_names_of_hosts_and_interfaces_reach_no_command() -> None:
    tables = Hosts()
    tables.register('a " ; drop', "172.18.0.14", "02:00:00:00:00:14")
    odd = frozenset(['e"; drop', "et*"])
    reached = dict.fromkeys([TWO, THREE, "172.18.0.14"], odd)
    networks = tuple(Network.of("172.18.0.0", 24, name) for name in sorted(odd))
    tables.snapshot.set_network(HostNetwork(networks=networks, reached=reached))
    commands, _ = tables.update()
    assert "; drop" not in commands and "et*" not in commands
    assert tables.nft.chain("by-interface") == [], "it cannot name the interfaces, so it lets pass"
