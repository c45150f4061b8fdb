"""The configuration of BIRD: derived from the snapshot as plain data, then written in BIRD's language.

Pure, and knows no process: bird.py speaks to BIRD, and manager.py decides when. A protocol's name says which kind of
peer it is for, and depends on the peer's address alone, so that a change of other peers resets no session. What
comes from etcd reaches the text only as numbers, or as addresses and networks in canonical form.

Source of the language: the BIRD User's Guide, version 2.0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from calicoctl.addresses import BITS, unpack, version_of
from calicoctl.datastore.keys import INTERFACE_PREFIX
from calicoctl.desired.routes import announced, guarded, plain_pools
from calicoctl.errors import CalicoError
from calicoctl.felix.bgp.passwords import Passwords
from calicoctl.netlink import OUR_PROTOCOL, OVERLAY_PROTOCOL

if TYPE_CHECKING:
    from calicoctl.desired.snapshot import Snapshot

MESH, NODE, GLOBAL = "mesh", "node", "global"
"""The kinds of peers: another host of the full mesh, a peer of this host, a peer of all hosts."""

RESTART_WAIT = 8
"""Seconds for which a BIRD that was started after a crash keeps the kernel's routes while it waits for its peers."""

LONGEST_RESTART = 4095
"""The longest time in seconds for which a BIRD that has crashed can ask its peers to keep its routes.

It asks for the hold time: BIRD's default, 120, is long for a host whose agent has ended as well; an agent starts BIRD
again in about a second. Source of the limit: RFC 4724, section 3.
"""

LOG_SIZE = 2**20
"""Bytes of BIRD's log, beside as many of the log before; both are in memory, below /run."""

_DEBUG = {"debug": "all", "info": "{ states, events }", "none": "{ states }"}
"""By log level: what BIRD's log says of its protocols besides errors. The agent waits for changes of their states."""


@dataclass(frozen=True)
class Neighbour:
    """A BGP peer: its kind, its canonical address, and its AS number (decimal text)."""

    kind: str
    address: str
    as_num: str

    @property
    def name(self) -> str:
        """The name of the peer's protocol: `mesh4_172_18_0_12`, say."""
        return f"{self.kind}{version_of(self.address)}_{self.address.translate(_NAME)}"


_NAME = str.maketrans(".:", "__")


@dataclass(frozen=True)
class Family:
    """The part of the configuration about one IP version.

    `own` is the address that this host is registered with, None without one; `is_here` says whether an interface has
    it. The others are CIDRs and addresses: pools from which routes are accepted, what this host announces, and what
    routes of others must leave alone.
    """

    version: int
    own: str | None = None
    is_here: bool = False
    pools: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    guarded_networks: tuple[str, ...] = ()
    guarded_addresses: tuple[str, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()


@dataclass(frozen=True)
class Config:
    """What BIRD is to do. `hold_time` is in seconds; `as_num` is this host's AS number, as decimal text."""

    router_id: str
    as_num: str
    hold_time: int
    log_level: str
    families: tuple[Family, ...]

    @property
    def neighbours(self) -> tuple[Neighbour, ...]:
        return tuple(neighbour for family in self.families for neighbour in family.neighbours)


def derive(snapshot: Snapshot, here: Collection[str]) -> Config:
    """Return the configuration that follows from the store and from this host's network.

    `here` are those addresses that this host is registered with that its interfaces have.
    """
    topology = snapshot.topology
    return Config(
        topology.own(4) or _router_id(snapshot.host),
        topology.as_num(snapshot.host),
        topology.hold_time,
        topology.log_level,
        tuple(_family(snapshot, version, here) for version in BITS),
    )


def _router_id(host: str) -> str:
    """Return a router id for a host without an IPv4 address: an address of class E, which no host has."""
    number = int.from_bytes(hashlib.sha256(host.encode()).digest()[:4], "big") | 0xF0000000
    return unpack(number.to_bytes(4, "big"))


def _family(snapshot: Snapshot, version: int, here: Collection[str]) -> Family:
    routes, guards = announced(snapshot, version), guarded(snapshot, version)
    own = snapshot.topology.own(version)
    return Family(
        version,
        own,
        own in here,
        tuple(pool.cidr for pool in plain_pools(snapshot, version)),
        routes.blocks,
        routes.addresses,
        guards.networks,
        guards.addresses,
        () if own is None else tuple(_neighbours(snapshot, version)),
    )


def _neighbours(snapshot: Snapshot, version: int) -> Iterable[Neighbour]:
    """Return the peers of an IP version, each address once: BIRD would leave all sessions but one with it idle.

    What a host is registered with goes first, then a peer of this host alone.
    """
    topology = snapshot.topology
    found: dict[str, Neighbour] = {}
    if topology.mesh:
        for host in sorted(topology.hosts()):
            address = topology.address(host, version)
            if address is not None:
                found.setdefault(address, Neighbour(MESH, address, topology.as_num(host)))
    of_host = f"/host/{snapshot.host}/"
    for kind in (NODE, GLOBAL):
        for key, peer in sorted(topology.peers.items()):
            if version_of(peer.ip) == version and (of_host in key) == (kind == NODE):
                found.setdefault(peer.ip, Neighbour(kind, peer.ip, peer.as_num))
    own = snapshot.network.own | {str(topology.own(version))}
    return [found[address] for address in sorted(found) if address not in own]


def text(config: Config, passwords: Passwords, directory: Path) -> str:
    """Return the configuration in BIRD's language; BIRD's log is in `directory`. Raises CalicoError.

    `passwords` says which sessions have one.
    """
    log = directory / "log"
    lines = [
        "# Written by calicoctl. Changes are overwritten.",
        f"log {quoted(str(log))} {LOG_SIZE} {quoted(str(log.with_suffix('.1')))} all;",
        f"debug protocols {_DEBUG.get(config.log_level, _DEBUG['none'])};",
        f"router id {config.router_id};",
        "timeformat protocol iso long;",
        f"graceful restart wait {RESTART_WAIT};",
        "protocol device { scan time 10; }",
        # without it, next hops on connected networks are not found
        f'protocol direct {{ ipv4; ipv6; interface -"{INTERFACE_PREFIX}*", -"docker*", -"vxlan*.calico", "*"; }}',
    ]
    for family in config.families:
        lines += _family_lines(config, family, passwords)
    return "\n".join(lines) + "\n"


def quoted(value: str) -> str:
    """Return a text as BIRD's language has it; raise CalicoError for one that it cannot have: there are no escapes."""
    if '"' in value or not value.isprintable():
        raise CalicoError("a text with a quotation mark or a control character cannot be told to BIRD")
    return f'"{value}"'


def _family_lines(config: Config, family: Family, passwords: Passwords) -> Iterable[str]:
    v, bits = family.version, BITS[family.version]
    source = f" krt_prefsrc = {family.own};" if family.own is not None and family.is_here else ""
    yield f"filter learned{v} {{"
    if family.guarded_networks:
        # of networks with other machines, single addresses alone are taken: those inside of it, and those around it
        patterns = ", ".join(f"{network}{{0,{bits - 1}}}" for network in family.guarded_networks)
        yield f"  if net ~ [ {patterns} ] then reject;"
    if family.guarded_addresses:
        patterns = ", ".join(f"{address}/{bits}{{0,{bits}}}" for address in family.guarded_addresses)
        yield f"  if net ~ [ {patterns} ] then reject;"
    if family.pools:
        yield f"  if net ~ [ {', '.join(f'{pool}+' for pool in family.pools)} ] then accept;"
    yield "  reject;"
    yield "}"
    yield f"filter to_kernel{v} {{"
    # what the host itself sends to a workload elsewhere comes from its registered address
    yield f"  if source = RTS_BGP then {{{source} accept; }}"
    yield f'  if proto = "blocks{v}" then accept;'
    yield "  reject;"
    yield "}"
    ours = " && ".join(f"krt_source != {number}" for number in (OUR_PROTOCOL, OVERLAY_PROTOCOL))
    # learn: for next hops behind a router
    yield f"protocol kernel kernel{v} {{"
    yield f"  ipv{v} {{ import where {ours}; export filter to_kernel{v}; }};"
    yield "  learn; persist; merge paths on; scan time 20; graceful restart;"
    yield "}"
    yield f"protocol static blocks{v} {{ ipv{v};"
    yield from (f"  route {block} blackhole;" for block in family.blocks)
    yield "}"
    yield f"protocol static addresses{v} {{ ipv{v};"
    yield from (f"  route {address}/{bits} unreachable;" for address in family.addresses)
    yield "}"
    if not family.neighbours:
        return
    keepalive = max(1, config.hold_time // 3)
    yield f"template bgp peer{v} {{"
    yield f"  local {family.own} as {config.as_num};" if family.is_here else f"  local as {config.as_num};"
    yield f"  multihop; graceful restart on; graceful restart time {min(config.hold_time, LONGEST_RESTART)};"
    yield f"  hold time {config.hold_time}; keepalive time {keepalive};"
    yield "  connect delay time 1; connect retry time 5; error wait time 2, 30;"
    # import table: pools can change without asking the peer for its routes again
    yield f"  ipv{v} {{ import table on; import filter learned{v}; export where source = RTS_STATIC; next hop self; }};"
    yield "}"
    for neighbour in family.neighbours:
        password = passwords.of(neighbour.address, neighbour.kind == MESH)
        secret = "" if password is None else f" password {quoted(password)};"
        yield f"protocol bgp {neighbour.name} from peer{v} {{"
        yield f"  neighbor {neighbour.address} as {neighbour.as_num};{secret}"
        yield "}"
