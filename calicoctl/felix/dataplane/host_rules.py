"""Renders what nftables enforces between hosts: who may send from which address, and who may reach BGP and VXLAN.

* **Senders.** The maps `owners4` and `owners6` have the addresses of all endpoints and hosts. A packet from outside
  with the address of an endpoint of this host is dropped. One with the address of another host, or of one of its
  endpoints, is checked in the chain of that host: see `_sender_chain`. All other addresses are nobody's, and pass.
* **Ports.** Only BGP peers reach TCP port 179 of this host while our BIRD holds it, and only registered hosts reach our
  VXLAN.
* **Translated packets.** What this host forwards from its own address, such as packets of a container on Docker's
  bridge, reaches no workload of another host: that host would take it for this host's own.

A rule that is wrong here cuts a network. So each check needs evidence: a host's MACs are only checked when one of them
has been seen (the sets `proven/…`), and interfaces only when it is known how all other hosts are reached. Like
ruleset.py, this module renders only the difference. It reads no kernel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calicoctl.addresses import BITS, pack, version_of
from calicoctl.datastore.keys import INTERFACE_PREFIX
from calicoctl.datastore.model import NEVER
from calicoctl.felix.dataplane.changes import Change, spelled
from calicoctl.felix.dataplane.vxlan import DEVICES, PORT, VNI

if TYPE_CHECKING:
    from calicoctl.desired.snapshot import Dirty, Snapshot

BGP_PORT = 179

COUNTERS = {
    (protocol, version): (f"{protocol}{version}-arrived", f"{protocol}{version}-passed")
    for protocol in ("bgp", "vxlan")
    for version in (4, 6)
}
"""By protocol and IP version: the counters of the packets from peers that arrive, and of those that the host's own
firewall has let through."""

_SPELLABLE = re.compile(r"[^\s\"*\\]+")
"""Names of interfaces that nftables takes as they are."""

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
add rule inet calico not-its-host counter drop

add chain inet calico by-interface

add chain inet calico from-outside
add rule inet calico from-outside iifname "lo" accept
add rule inet calico from-outside ip saddr vmap @owners4
add rule inet calico from-outside ip6 saddr vmap @owners6
add rule inet calico from-outside ip6 saddr != fe80::/10 ip6 daddr != ff00::/8 fib saddr type local drop

add chain inet calico bgp-port
add rule inet calico bgp-port iifname "lo" accept
add rule inet calico bgp-port ip saddr @peers4 counter name bgp4-arrived accept
add rule inet calico bgp-port ip6 saddr @peers6 counter name bgp6-arrived accept
add rule inet calico bgp-port counter drop

add chain inet calico vxlan-port
add rule inet calico vxlan-port iifname "PREFIX*" drop
add rule inet calico vxlan-port ip saddr @hosts4 counter name vxlan4-arrived accept
add rule inet calico vxlan-port ip6 saddr @hosts6 counter name vxlan6-arrived accept
add rule inet calico vxlan-port counter drop
""".replace("PREFIX", INTERFACE_PREFIX).replace("BGP", str(BGP_PORT))
)
"""The chain `not-its-host` spares what a host needs to tell the others, through an etcd on one of them or behind one,
that it has got another MAC: otherwise it would be cut off for good. A TCP connection can only be opened with a forged
address by a machine that also answers ARP for it. BGP, which trusts addresses, is not spared. It has two rules of its
own, since nftables 1.0.6 merges two adjacent `!=` about ports into one comparison."""

BASE_CHAINS = {
    "ports": "{ type filter hook input priority filter - 12; policy accept; }",
    "ports-passed": "{ type filter hook input priority filter + 20; policy accept; }",
    "vxlan-forward": "{ type filter hook forward priority filter - 12; policy accept; }",
    "translated": "{ type filter hook postrouting priority srcnat + 10; policy accept; }",
}
"""Base chains that only exist while they are needed: each costs every packet a little."""

FROM_HOST = tuple(
    f"{family} saddr @hosts{version} {family} daddr @pools{version} oifname @interfaces accept"
    for version, family in ((4, "ip"), (6, "ip6"))
)
"""The rules of `inbound-forward` for what other hosts send: it passes, as what this host sends does. The same is in
`verdict.is_from_host`."""


Moved = tuple[str, tuple[str, ...], tuple[str, ...]]
"""The host of an endpoint, and the endpoint's addresses before and now."""


@dataclass(frozen=True)
class Ports:
    """Which ports of this host are ours: that of BGP, which BIRD holds; and that of VXLAN, while a device is there.

    The latter is ours, too, as long as a pool needs a device, unless there can be none (`blocked`): then VXLAN with our
    VNI is another program's.
    """

    bgp: bool = False
    vxlan: bool = False
    blocked: bool = False


class HostRules:
    """The contents of our tables that are about other hosts."""

    def __init__(self) -> None:
        self._claims: dict[str, tuple[str, ...]] = {}
        """By address: the names of the hosts whose endpoints have it, sorted; a host with two such endpoints is there
        twice."""
        self._verdicts: dict[str, str] = {}
        """The contents of the maps `owners4` and `owners6`."""
        self._users: dict[str, str] = {}
        """By address: the registered host that uses it; and an empty name for other addresses that this host uses."""
        self._named: dict[str, int] = {}
        """By name of another host: how many claims it has. Each host in here, or in `_registered`, has a chain."""
        self._registered: frozenset[str] = frozenset()
        self._dynamic: dict[str, str] = {}
        """The sets that packets add to, and their types."""

    def update(
        self, snapshot: Snapshot, dirty: Dirty, moved: Iterable[Moved], ports: Ports, change: Change
    ) -> set[str]:
        """Add what has changed to `change`; return the addresses whose connections that may deny.

        `moved` has the addresses of the endpoints in `dirty`, before and now.
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
        if dirty.pools:
            affected |= {address for address, host in snapshot.topology.users.items() if host != snapshot.host}
        if dirty.topology or dirty.pools:
            change.set_chain("by-interface", _by_interface(snapshot))
            _update_base_chains(snapshot, ports, change)
        for address in doubtful:
            self._update_owner(address, snapshot.host, change)
        for host in unsure_hosts:
            self._update_chain(host, snapshot, change)
        return affected

    def create_sets(self, change: Change) -> None:
        """Add the creation of the sets that packets add to."""
        for name, type in self._dynamic.items():
            change.create_set(name, type)

    def proofs(self, keys: Callable[[str], Collection[bytes]]) -> str:
        """Return the commands that add what these sets have now, as `keys` reads it, to the same sets in new tables."""
        commands = []
        for name in self._dynamic:
            with suppress(OSError):  # there was no such set
                for interface in (key.rstrip(b"\0").decode(errors="replace") for key in keys(name)):
                    if _SPELLABLE.fullmatch(interface):
                        commands.append(f"add element inet calico {name} {{ {_quoted([interface])} }}\n")
        return "".join(commands)

    def _update_claims(self, moved: Iterable[Moved]) -> tuple[set[str], set[str]]:
        """Update which hosts have which addresses; return the addresses, and the hosts, that this changes."""
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

    def _update_owner(self, address: str, own: str, change: Change) -> None:
        """Update what becomes of packets with this sender, according to who has the address."""
        hosts = sorted(set(self._claims.get(address, ())))
        user = self._users.get(address)
        verdict = None
        if user is not None:  # this host's own addresses are checked by the kernel, or by the last rule of from-outside
            verdict = f"goto {_chain(user)}" if user not in ("", own) else None
        elif hosts == [own]:
            verdict = "drop"
        elif len(hosts) == 1:
            verdict = f"goto {_chain(hosts[0])}"
        elif hosts:  # it is moving, or one of the records is obsolete
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
    """Return the rules for packets with the address of another host, or of one of its endpoints.

    Where the two hosts share a network, such packets come from a MAC of the host's, or of another host's that forwards
    them. That is only enforced on an interface on which the host has been seen with one of its MACs: clouds and
    bridges over WLAN replace MACs. Elsewhere, behind routers, only the interface counts.
    """
    network, topology = snapshot.network, snapshot.topology
    rules = []
    macs = ", ".join(sorted(topology.macs.get(host, ())))
    # where routes come from routers that peer, packets may take the way through the router in the same network, too
    is_direct = topology.mesh or all(topology.users.get(peer.ip) for peer in topology.peers.values())
    is_direct = is_direct and snapshot.check_senders == "mac"
    for version in (4, 6):
        address = topology.address(host, version)
        if address is None or not macs or not is_direct:
            continue
        number = int.from_bytes(pack(address), "big")
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
    """Return the rules that only accept packets from interfaces through which packets of other hosts may come.

    See `_fabric`. On others, hosts are known by their MACs, except on bridges, to which containers are connected. An IP
    version is not checked while a host has no route: then it is not known which interface is its.
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
    peers = {peer.ip for peer in topology.peers.values()}
    if topology.mesh:
        peers |= {address for address, host in topology.users.items() if host != snapshot.host}
    for version in BITS:
        for name, addresses in (("hosts", topology.users), ("peers", peers)):
            chosen = (address for address in addresses if version_of(address) == version)
            change.replace(("inet", f"{name}{version}"), chosen)
    change.replace(("inet", "host-macs"), (mac for host in others for mac in topology.macs.get(host, ())))
    interfaces = filter(_SPELLABLE.fullmatch, _fabric(snapshot))
    change.replace(("inet", "fabric"), (_quoted([interface]) for interface in interfaces))


def _fabric(snapshot: Snapshot) -> set[str]:
    """Return the interfaces from which packets of other hosts may come.

    Packets need not come the way that leads back, and routers that this host has no route to may send them. So these
    are all interfaces with an address, but of bridges only those with a router and that with the registered address:
    others connect containers.
    """
    network = snapshot.network
    own = [
        (version, int.from_bytes(pack(address), "big"))
        for version in BITS
        if (address := snapshot.topology.own(version)) is not None
    ]
    registered = {one.interface for one in network.networks if any(one.has(*address) for address in own)}
    return registered.union(DEVICES.values(), network.macs, network.routed, *network.reached.values())


def _update_base_chains(snapshot: Snapshot, held: Ports, change: Change) -> None:
    topology = snapshot.topology
    has_own = topology.own(4) is not None or topology.own(6) is not None
    is_needed = has_own and not held.blocked
    vxlan = held.vxlan or (is_needed and any(pool.vxlan != NEVER for pool in snapshot.pools.values()))
    ports, passed, forward, translated = [], [], [], []
    if held.bgp:
        ports.append(f"tcp dport {BGP_PORT} goto bgp-port")
        passed += _passed(f"tcp dport {BGP_PORT}", "bgp")
    if vxlan:
        # to another address, a workload's packet might come that was translated to its host's address
        ports += [
            f"{_IS_OUR_VXLAN} {family} daddr {own} goto vxlan-port"
            for version, family in ((4, "ip"), (6, "ip6"))
            if (own := topology.own(version)) is not None
        ]
        ports.append(f"{_IS_OUR_VXLAN} counter drop")
        passed += _passed(_IS_OUR_VXLAN, "vxlan")
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
        ("ports-passed", passed),
        ("vxlan-forward", forward),
        ("translated", translated),
    ):
        change.set_chain(name, tuple(rules) or None)


def _translated(version: int, family: str, vxlan: bool, snapshot: Snapshot) -> list[str]:
    """Return the rules for packets of an IP version that were translated to the address of a host."""
    # the host's own packets have no incoming interface; those to endpoints of this host were judged already
    match = f'ct status snat ct direction original iif != 0 oifname != "{INTERFACE_PREFIX}*"'
    match += f" {family} saddr @hosts{version}"
    rules = []
    if vxlan:
        # to whatever address: a router may translate that to a host's. The kernel has the device for incoming interface
        # of what it sends through the device
        rules.append(f"{match} iifname != {{ {_quoted(DEVICES.values())} }} {_IS_OUR_VXLAN} counter drop")
    # a pool may overlap a network of this host. There, workloads of others are reached through hosts or BGP peers
    network = snapshot.network
    doubtful = {one for pool in snapshot.pools.values() for one in network.overlapping(pool.cidr)}
    for one in sorted(doubtful, key=lambda one: (one.version, one.first, one.length, one.interface)):
        if one.version == version and _SPELLABLE.fullmatch(one.interface):
            by_none = " ".join(f"rt {family} nexthop != @{name}{version}" for name in ("hosts", "peers"))
            rules.append(f'{family} daddr {one.cidr} oifname "{one.interface}" {by_none} accept')
    others = " ".join(f"{family} daddr != @{name}{version}" for name in ("hosts", "peers"))
    return [*rules, f"{match} {family} daddr @pools{version} {others} counter drop"]


def _passed(match: str, protocol: str) -> list[str]:
    return [
        f'iifname != "lo" {match} meta nfproto ipv{version} counter name {COUNTERS[protocol, version][1]}'
        for version in (4, 6)
    ]


def _quoted(interfaces: Collection[str]) -> str:
    return ", ".join(f'"{interface}"' for interface in sorted(interfaces))
