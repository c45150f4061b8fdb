"""Renders the nftables rules about other hosts: who may send from which address, and who may reach BGP and VXLAN.

* **Senders.** The maps `owners4` and `owners6` map the addresses of endpoints and hosts to verdicts for packets that
  this host receives from outside. A packet from an address of an endpoint of this host is dropped. A packet from an
  address of another host, or of one of its endpoints, is checked in the chain of that host: see `_sender_chain`. If
  endpoints of several hosts have the address, only the incoming interface is checked: see `_by_interface`. Packets from
  this host's own addresses are dropped: by the kernel in IPv4, by the last rule of `from-outside` in IPv6. Packets from
  all other addresses pass.
* **Ports.** While our BIRD listens, only BGP peers can reach TCP port 179 of this host. Only registered hosts can reach
  our VXLAN device: see Ports.
* **Translated packets.** This host may translate the source of a packet to its own address, for example the source of a
  packet from a container on Docker's bridge. Such a packet is dropped if its destination is a workload of another host:
  that host would treat it like a packet of this host itself.

A wrong rule could cut off a whole network, so a check is rendered only if it is certain to be right. The MACs of
another host are checked only on interfaces on which a packet with one of these MACs has arrived; the set `proven/…` of
that host contains these interfaces. The incoming interface is checked only if the routes to all other hosts are known.

Like ruleset.py, this module renders only what has changed since the last call, and does not access the kernel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calicoctl.addresses import BITS, number_of, version_of
from calicoctl.datastore.keys import INTERFACE_PREFIX
from calicoctl.datastore.model import NEVER
from calicoctl.felix.dataplane.changes import Change, spelled
from calicoctl.felix.dataplane.vxlan import DEVICES, PORT, VNI

if TYPE_CHECKING:
    from calicoctl.desired.snapshot import Dirty, Snapshot

BGP_PORT = 179

COUNTERS = {
    (protocol, hook, version): (f"{protocol}{version}-{hook}", f"{protocol}{version}-{hook}-passed")
    for protocol in ("bgp", "vxlan")
    for hook in ("input", "output")
    for version in (4, 6)
}
"""(protocol, hook, IP version) -> the names of two counters. The first counts packets from ("input") or to ("output")
BGP peers or other hosts, the second those of them that the host's own firewall has let pass.
"""

_SPELLABLE = re.compile(r"[^\s\"*\\\x00-\x1f\x7f\ud800-\udfff]+")
"""Matches the names of interfaces that can be written in nftables commands without escapes. A name that is not UTF-8
contains surrogates, and cannot be written at all.
"""

_IS_OUR_VXLAN = f"udp dport {PORT} @th,96,24 {VNI}"
"""Matches VXLAN with our VNI: bits 32 to 55 of its header, which follows 64 bits of UDP. Source: RFC 7348."""

SKELETON = (
    "".join(f"add counter inet calico {name}\n" for pair in COUNTERS.values() for name in pair)
    + """
add map inet calico owners4 { type ipv4_addr : verdict; }
add map inet calico owners6 { type ipv6_addr : verdict; }
add set inet calico hosts4 { type ipv4_addr; }
add set inet calico hosts6 { type ipv6_addr; }
add set inet calico peers4 { type ipv4_addr; }
add set inet calico peers6 { type ipv6_addr; }
add set inet calico pools4 { type ipv4_addr; flags interval; }
add set inet calico pools6 { type ipv6_addr; flags interval; }
add set inet calico host-macs { type ether_addr; }
add set inet calico fabric { type ifname; }

add chain inet calico not-its-host
add rule inet calico not-its-host ip6 saddr @hosts6 icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
add rule inet calico not-its-host tcp dport BGP counter drop
add rule inet calico not-its-host tcp sport BGP counter drop
add rule inet calico not-its-host ip saddr @hosts4 fib daddr type local meta l4proto tcp accept
add rule inet calico not-its-host ip saddr @hosts4 ip daddr != @pools4 meta l4proto tcp accept
add rule inet calico not-its-host ip saddr @hosts4 fib daddr type local udp dport 53 accept
add rule inet calico not-its-host ip6 saddr @hosts6 fib daddr type local meta l4proto tcp accept
add rule inet calico not-its-host ip6 saddr @hosts6 ip6 daddr != @pools6 meta l4proto tcp accept
add rule inet calico not-its-host ip6 saddr @hosts6 fib daddr type local udp dport 53 accept
add rule inet calico not-its-host udp dport VXLAN counter drop
add rule inet calico not-its-host ip saddr @hosts4 fib daddr type local udp sport { 53, 123 } accept
add rule inet calico not-its-host ip saddr @hosts4 icmp type ERRORS4 accept
add rule inet calico not-its-host ip6 saddr @hosts6 fib daddr type local udp sport { 53, 123 } accept
add rule inet calico not-its-host ip6 saddr @hosts6 icmpv6 type ERRORS6 accept
add rule inet calico not-its-host counter drop

add chain inet calico by-interface

add chain inet calico from-outside
add rule inet calico from-outside iifname "lo" accept
add rule inet calico from-outside ip saddr vmap @owners4
add rule inet calico from-outside ip6 saddr vmap @owners6
add rule inet calico from-outside ip6 saddr != fe80::/10 ip6 daddr != ff00::/8 fib saddr type local drop

add chain inet calico bgp-port
add rule inet calico bgp-port iifname "lo" accept
add rule inet calico bgp-port ip saddr @peers4 counter name bgp4-input accept
add rule inet calico bgp-port ip6 saddr @peers6 counter name bgp6-input accept
add rule inet calico bgp-port counter drop

add chain inet calico vxlan-port
add rule inet calico vxlan-port iifname "PREFIX*" drop
add rule inet calico vxlan-port ip saddr @hosts4 counter name vxlan4-input accept
add rule inet calico vxlan-port ip6 saddr @hosts6 counter name vxlan6-input accept
add rule inet calico vxlan-port counter drop
""".replace("PREFIX", INTERFACE_PREFIX)
    .replace("BGP", str(BGP_PORT))
    .replace("VXLAN", str(PORT))
    .replace("ERRORS4", "{ destination-unreachable, time-exceeded, parameter-problem }")
    .replace("ERRORS6", "{ destination-unreachable, packet-too-big, time-exceeded, parameter-problem }")
)
"""The commands that create what this module needs on every host: counters, empty sets and maps, and chains.

The chain `not-its-host` drops packets that do not seem to come from the host to which their source address belongs. The
exceptions are:

* packets that a host with a new MAC needs to publish the MAC in the store, if etcd runs on another host or is reached
  through one. To open a TCP connection with a forged address, a machine must also answer ARP for the address. BGP is
  dropped nevertheless, since it trusts addresses. That takes two rules: nftables 1.0.6 merges two adjacent `!=` of
  ports into one comparison;
* answers of DNS and NTP to this host itself (but no VXLAN, whatever port it comes from), and errors of ICMP. Anybody
  who may write to the store can register a host with the address of a server or gateway of this host, and other MACs.
"""

BASE_CHAINS = {
    "ports": "{ type filter hook input priority filter - 12; policy accept; }",
    "input-passed": "{ type filter hook input priority filter + 20; policy accept; }",
    "output-sent": "{ type filter hook output priority filter - 12; policy accept; }",
    "output-passed": "{ type filter hook output priority filter + 20; policy accept; }",
    "vxlan-forward": "{ type filter hook forward priority filter - 12; policy accept; }",
    "translated": "{ type filter hook postrouting priority srcnat + 10; policy accept; }",
}
"""Base chains that exist only while they are needed, since each costs some time for every packet."""

FROM_HOST = tuple(
    f"{family} saddr @hosts{version} {family} daddr @pools{version} oifname @interfaces accept"
    for version, family in ((4, "ip"), (6, "ip6"))
)
"""The rules of the chain `inbound-forward` that accept packets from another host itself to workloads, like packets of
this host itself. `verdict.is_from_host` decides the same.
"""


Moved = tuple[str, tuple[str, ...], tuple[str, ...]]
"""The host of an endpoint, and the endpoint's addresses before and after a change."""


@dataclass(frozen=True)
class Ports:
    """The state of BGP and VXLAN on this host, which determines whether the rules protect their ports.

    Only BGP peers can reach the port of BGP while it is protected, and only registered hosts the port of VXLAN.

    `bgp` says whether BIRD listens on the port of BGP, which is protected then. `vxlan` are the IP versions of the
    underlay for which the agent's VXLAN device exists, and `up` are those for which the device is up. `blocked` says
    that devices are needed, but none could be created.

    The port of VXLAN is protected while a device exists. Without a device, it is protected if a pool has an overlay,
    this host is registered, and `blocked` is False: if `blocked` is True, VXLAN packets with our VNI may belong to
    another program. While a device is not up, a process of any user may hold the port. So while the port is protected,
    all VXLAN packets with our VNI are dropped over each IP version whose device is not up.
    """

    bgp: bool = False
    vxlan: frozenset[int] = frozenset()
    up: frozenset[int] = frozenset()
    blocked: bool = False


class HostRules:
    """The contents of the agent's tables that are about other hosts, with the data from which they are computed."""

    def __init__(self) -> None:
        self._claims: dict[str, tuple[str, ...]] = {}
        """Address -> the names of the hosts whose endpoints have it, sorted. A host with two such endpoints is listed
        twice.
        """
        self._verdicts: dict[str, str] = {}
        """Address -> the verdict in the map `owners4` or `owners6`."""
        self._users: dict[str, str] = {}
        """Address -> the name of the registered host that has it; "" for other addresses in HostNetwork.in_use."""
        self._spared: set[str] = set()
        """Addresses from which packets pass even if endpoints of other hosts have them: see Admission.spared."""
        self._named: dict[str, int] = {}
        """Host -> how many addresses its endpoints have. Each other host in `_named` or `_registered` has a chain."""
        self._registered: frozenset[str] = frozenset()
        self._dynamic: dict[str, str] = {}
        """Name of a set to which packets add elements -> the type of the set, in nftables' syntax."""

    def update(
        self, snapshot: Snapshot, dirty: Dirty, moved: Iterable[Moved], ports: Ports, change: Change
    ) -> set[str]:
        """Add to `change` what has changed in the rules, sets and maps of this module since the last call.

        `dirty` says what has changed in `snapshot`. `moved` contains the endpoints, of all hosts, whose addresses have
        changed. Returns the addresses whose open connections may be denied by the new rules.
        """
        doubtful, unsure_hosts = self._update_claims(moved)
        affected: set[str] = set()
        if dirty.topology:
            now = dict.fromkeys(snapshot.network.in_use, "") | snapshot.topology.users
            before = self._users
            doubtful |= {address for address in now.keys() | before if now.get(address) != before.get(address)}
            gone = {address for address, host in before.items() if host and not now.get(address)}
            affected |= gone
            self._users = now
            unsure_hosts |= self._registered
            self._registered = frozenset(snapshot.topology.users.values()) - {snapshot.host}
            unsure_hosts |= self._registered
            _update_sets(snapshot, change)
        if dirty.topology or dirty.pools:
            spared = snapshot.admission.spared()
            doubtful |= spared ^ self._spared
            if dirty.pools:
                doubtful |= self._claims.keys()
            self._spared = spared
        if dirty.pools:
            affected |= {address for address, host in snapshot.topology.users.items() if host != snapshot.host}
        if dirty.topology or dirty.pools:
            change.set_chain("by-interface", _by_interface(snapshot))
            _update_base_chains(snapshot, ports, change)
        for address in doubtful:
            self._update_owner(address, snapshot, change)
        for host in unsure_hosts:
            self._update_chain(host, snapshot, change)
        return affected

    def create_sets(self, change: Change) -> None:
        """Add to `change` the creation of the sets `proven/…`. Packets, not this program, add their elements."""
        for name, type in self._dynamic.items():
            change.create_set(name, type)

    def proofs(self, keys: Callable[[str], Collection[bytes]]) -> str:
        """Return commands that add the elements of the sets `proven/…` to newly loaded tables.

        Packets have added these elements to the old tables, and would have to add them again after a reload. `keys` is
        called with the name of each set. It returns the keys of the elements in the old table, or raises OSError if the
        old table has no such set; then the set is skipped.
        """
        commands = []
        for name in self._dynamic:
            with suppress(OSError):  # the old tables have no such set
                for interface in (key.rstrip(b"\0").decode(errors="replace") for key in keys(name)):
                    if _SPELLABLE.fullmatch(interface):
                        commands.append(f"add element inet calico {name} {{ {_quoted([interface])} }}\n")
        return "".join(commands)

    def _update_claims(self, moved: Iterable[Moved]) -> tuple[set[str], set[str]]:
        """Update `_claims` and `_named` for the endpoints in `moved`.

        Returns the former and the new addresses of these endpoints, and the names of their hosts.
        """
        addresses: set[str] = set()
        hosts: set[str] = set()
        for host, before, now in moved:
            for address in before:
                rest = list(self._claims[address])
                rest.remove(host)
                self._claims[address] = tuple(rest)
                if not rest:
                    del self._claims[address]
            for address in now:
                self._claims[address] = tuple(sorted((*self._claims.get(address, ()), host)))
            addresses.update(before, now)
            hosts.add(host)
            self._named[host] = self._named.get(host, 0) + len(now) - len(before)
            if not self._named[host]:
                del self._named[host]
        return addresses, hosts

    def _update_owner(self, address: str, snapshot: Snapshot, change: Change) -> None:
        """Update the verdict for packets whose source is `address`.

        If a host is registered with the address, the verdict depends on that host. If none is, and the address is in
        HostNetwork.in_use, the packets pass. In all other cases, the verdict depends on the hosts whose endpoints have
        the address. Endpoints of other hosts are ignored if the address is in no pool, since a container on a bridge of
        this host may have the address. Packets from an address in `_spared` pass, unless only endpoints of this host
        have it.
        """
        own = snapshot.host
        hosts = sorted(set(self._claims.get(address, ())))
        if hosts not in ([], [own]) and not snapshot.admission.is_in_pool(address):
            hosts = [host for host in hosts if host == own]
        user = self._users.get(address)
        verdict = None
        if user is not None:  # this host's own addresses are checked by the kernel, or by the last rule of from-outside
            verdict = f"goto {_chain(user)}" if user not in ("", own) else None
        elif hosts == [own]:
            verdict = "drop"
        elif address in self._spared:
            verdict = None
        elif len(hosts) == 1:
            verdict = f"goto {_chain(hosts[0])}"
        elif hosts:  # the address moves between hosts, or one of the endpoints is obsolete
            verdict = "goto by-interface"
        before = self._verdicts.pop(address, None)
        where = ("inet", f"owners{version_of(address)}")
        if before is not None and before != verdict:
            change.remove(where, f"{address} : {before}")
        if verdict is not None:
            self._verdicts[address] = verdict
            if before != verdict:
                change.add(where, f"{address} : {verdict}")

    def _update_chain(self, host: str, snapshot: Snapshot, change: Change) -> None:
        needed = host != snapshot.host and (host in self._registered or host in self._named)
        rules = _sender_chain(host, snapshot) if needed else None
        change.set_chain(_chain(host), rules)
        proven = _proven(host)
        if rules is not None and len(rules) > 1 and proven not in self._dynamic:
            self._dynamic[proven] = "ifname; size 256; flags dynamic"
            change.create_set(proven, self._dynamic[proven])
        elif (rules is None or len(rules) == 1) and proven in self._dynamic:
            del self._dynamic[proven]
            change.delete_set(proven)


def _chain(host: str) -> str:
    return f"host/{spelled(host)}"


def _proven(host: str) -> str:
    return f"proven/{spelled(host)}"


def _sender_chain(host: str, snapshot: Snapshot) -> tuple[str, ...]:
    """Return the rules for packets from the addresses of `host`, which is another host, and of its endpoints.

    If this host and `host` are connected to the same network, the rules check the source MAC, but only on interfaces on
    which a packet with a MAC of `host` has arrived before. In all other cases, for example if there are routers between
    the two hosts, the rules check only the incoming interface. They also check only the interface if
    `snapshot.check_senders` is not "mac", or if routes may come from a BGP peer that is no host.
    """
    network, topology = snapshot.network, snapshot.topology
    rules = []
    # clouds and bridges over WLAN replace MACs, so MACs are not checked before one was seen; a third host that forwards
    # packets of the other host has a MAC in @host-macs, too
    macs = ", ".join(sorted(topology.macs.get(host, ())))
    # without the mesh, routes may come from a BGP peer that is a router: then packets may pass through that router even
    # if the hosts are connected to the same network
    is_direct = topology.mesh or all(topology.users.get(peer.ip) for peer in topology.peers.values())
    is_direct = is_direct and snapshot.check_senders == "mac"
    for version in (4, 6):
        address = topology.address(host, version)
        if address is None or not macs or not is_direct:
            continue
        number = number_of(address)
        connected = {one.interface for one in network.networks if one.has(version, number)}
        shared = list(filter(_SPELLABLE.fullmatch, connected & network.reached.get(address, frozenset())))
        if shared:
            names = _quoted(shared)
            of_version = f"meta nfproto ipv{version} iifname"
            rules.append(
                f"{of_version} {{ {names} }} ether saddr {{ {macs} }} add @{_proven(host)} {{ iifname }} accept"
            )
            rules.append(f"{of_version} @{_proven(host)} ether saddr != @host-macs goto not-its-host")
    return (*rules, "goto by-interface")


def _by_interface(snapshot: Snapshot) -> tuple[str, ...]:
    """Return the rules that check the incoming interface of packets from addresses of other hosts and their endpoints.

    Packets are accepted on the interfaces on which packets of other hosts may arrive (see `_fabric`). On any other
    interface, packets with a source MAC of another host are accepted, unless the interface is a bridge, since
    containers are connected to bridges. All other packets go to the chain `not-its-host`.

    Packets of an IP version are checked only if this host has a route to each other host that has an address of that
    version. Returns () if that holds for neither version, or if `snapshot.check_senders` is "off".
    """
    network = snapshot.network
    others = {address for address, host in snapshot.topology.users.items() if host != snapshot.host}
    known = []
    for version in (4, 6):
        ways = [network.reached.get(address, frozenset()) for address in others if version_of(address) == version]
        if ways and all(way and all(map(_SPELLABLE.fullmatch, way)) for way in ways):
            known.append(version)
    if not known or snapshot.check_senders == "off":
        return ()
    of_version = f"meta nfproto ipv{known[0]} " if len(known) == 1 else ""
    return (
        "iifname @fabric accept",
        'meta iifkind != "bridge" ether saddr @host-macs accept',
        f"{of_version}goto not-its-host",
    )


def _update_sets(snapshot: Snapshot, change: Change) -> None:
    topology = snapshot.topology
    others = {host for host in topology.users.values() if host != snapshot.host}
    for version in BITS:
        for name, addresses in (("hosts", topology.users), ("peers", topology.may_reach_bgp())):
            chosen = (address for address in addresses if version_of(address) == version)
            change.replace(("inet", f"{name}{version}"), chosen)
    change.replace(("inet", "host-macs"), (mac for host in others for mac in topology.macs.get(host, ())))
    interfaces = filter(_SPELLABLE.fullmatch, _fabric(snapshot))
    change.replace(("inet", "fabric"), (_quoted([interface]) for interface in interfaces))


def _fabric(snapshot: Snapshot) -> set[str]:
    """Return the names of the interfaces on which packets of other hosts may arrive.

    These are the overlay's devices, the interfaces of the routes to other hosts and to routers, and all other
    interfaces with an address, since a packet may arrive on another interface than that of the route back to its
    sender. A bridge connects containers, so it is left out, unless a route to another host or to a router leads through
    it, or its network contains this host's registered address.
    """
    network = snapshot.network
    own = [(version, number_of(address)) for version in BITS if (address := snapshot.topology.own(version)) is not None]
    registered = {one.interface for one in network.networks if any(one.has(*address) for address in own)}
    return registered.union(DEVICES.values(), network.macs, network.routed, *network.reached.values())


def _update_base_chains(snapshot: Snapshot, held: Ports, change: Change) -> None:
    topology = snapshot.topology
    has_own = topology.own(4) is not None or topology.own(6) is not None
    is_needed = has_own and not held.blocked
    vxlan = bool(held.vxlan) or (is_needed and any(pool.vxlan != NEVER for pool in snapshot.pools.values()))
    ports, forward, translated = [], [], []
    counted = {}
    if held.bgp:
        ports.append(f"tcp dport {BGP_PORT} goto bgp-port")
        counted["bgp"] = f"tcp dport {BGP_PORT}", "peers"
    if vxlan:
        # VXLAN to other addresses of this host is dropped: it may be a workload's packet whose source another host has
        # translated to its own address
        ports += [
            f"{_IS_OUR_VXLAN} {family} daddr {own} goto vxlan-port"
            for version, family in ((4, "ip"), (6, "ip6"))
            if version in held.up and (own := topology.own(version)) is not None
        ]
        ports.append(f"{_IS_OUR_VXLAN} counter drop")
        counted["vxlan"] = _IS_OUR_VXLAN, "hosts"
    has_others = any(host != snapshot.host for host in topology.users.values())
    for version, family in ((4, "ip"), (6, "ip6")):
        if vxlan:
            forward.append(
                f"{_IS_OUR_VXLAN} {family} daddr @hosts{version} {family} saddr != @hosts{version} counter drop"
            )
        if has_others:
            translated += _translated(version, family, vxlan, snapshot)
    for name, rules in (
        ("ports", ports),
        ("vxlan-forward", forward),
        ("translated", translated),
        ("input-passed", _counting(counted, "input", "saddr", passed=True)),
        ("output-sent", _counting(counted, "output", "daddr", passed=False)),
        ("output-passed", _counting(counted, "output", "daddr", passed=True)),
    ):
        change.set_chain(name, tuple(rules) or None)


def _translated(version: int, family: str, vxlan: bool, snapshot: Snapshot) -> list[str]:
    """Return the rules that drop packets of an IP version whose source was translated to the address of a host.

    Packets to pools are dropped and, if `vxlan` is True, VXLAN packets with our VNI. `vxlan` says whether the port of
    VXLAN is protected: see Ports. `family` is the IP version in nftables' syntax, "ip" or "ip6".
    """
    # packets of the host itself have no incoming interface; packets to endpoints of this host were checked before
    match = f'ct status snat ct direction original iif != 0 oifname != "{INTERFACE_PREFIX}*"'
    match += f" {family} saddr @hosts{version}"
    rules = []
    if vxlan:
        # the destination does not matter, since a router may translate it to a host's address. In packets that the
        # device itself has encapsulated, the incoming interface is the device
        rules.append(f"{match} iifname != {{ {_quoted(DEVICES.values())} }} {_IS_OUR_VXLAN} counter drop")
    # a pool may overlap a network of this host. Packets to workloads in there have a host or a BGP peer as next hop;
    # packets with another next hop are for other machines, and pass
    network = snapshot.network
    doubtful = {one for pool in snapshot.pools.values() for one in network.overlapping(pool.cidr)}
    for one in sorted(doubtful, key=lambda one: (one.version, one.first, one.length, one.interface)):
        if one.version == version and _SPELLABLE.fullmatch(one.interface):
            by_none = " ".join(f"rt {family} nexthop != @{name}{version}" for name in ("hosts", "peers"))
            rules.append(f'{family} daddr {one.cidr} oifname "{one.interface}" {by_none} accept')
    others = " ".join(f"{family} daddr != @{name}{version}" for name in ("hosts", "peers"))
    return [*rules, f"{match} {family} daddr @pools{version} {others} counter drop"]


def _counting(counted: dict[str, tuple[str, str]], hook: str, other: str, passed: bool) -> list[str]:
    """Return the rules that count packets at the hook `hook`, "input" or "output".

    `counted` maps a protocol of COUNTERS to a pair: the match for the protocol's packets, and the name (without IP
    version) of a set of addresses. A packet is counted if its field `other`, "saddr" or "daddr", is an address in that
    set. If `passed` is False, the rules use the first of the two counters in COUNTERS; if it is True, the second.
    """
    return [
        f"{match} {family} {other} @{hosts}{version} counter name {COUNTERS[protocol, hook, version][passed]}"
        for protocol, (match, hosts) in counted.items()
        for version, family in ((4, "ip"), (6, "ip6"))
    ]


def _quoted(interfaces: Collection[str]) -> str:
    return ", ".join(f'"{interface}"' for interface in sorted(interfaces))
