"""The configuration of BIRD: derived from the snapshot as plain data, then rendered in BIRD's language.

In the configuration, each BGP session is a protocol, as BIRD calls it. Its name consists of the kind of the peer, the
IP version, and the peer's address. The name does not depend on other peers, so a change of another peer resets no
session. Values from etcd are rendered only as numbers, or as addresses and networks in canonical form.

Source of the language: the BIRD User's Guide, version 2.0.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from calicoctl.addresses import BITS, number_of, unpack, version_of
from calicoctl.datastore.keys import INTERFACE_PREFIX
from calicoctl.desired.routes import announced, guarded, plain_pools
from calicoctl.errors import CalicoError
from calicoctl.felix.bgp.passwords import Passwords
from calicoctl.netlink import OUR_PROTOCOL, OVERLAY_PROTOCOL

if TYPE_CHECKING:
    from calicoctl.desired.snapshot import Snapshot

MESH, NODE, GLOBAL = "mesh", "node", "global"
"""The kinds of peers: another host of the full mesh, a peer of this host only, a peer of all hosts."""

RESTART_WAIT = 8
"""After a crash, BIRD waits for its peers for up to this many seconds. Until then, its old routes stay in the
kernel.
"""

FIRST_CALL, SECOND_CALL = 1, 6
"""Seconds that BIRD waits before it connects to a peer, also after a failed attempt.

Of two hosts of the mesh, the host with the higher address uses FIRST_CALL, and the other host SECOND_CALL, so that they
do not connect at the same time. For all other peers, FIRST_CALL is used. BIRD shortens both times by up to a quarter.

Why: if two connections cross, BIRD may accept the second one just after the session has come up on the first, and takes
that for a crash of the peer. If the peer really crashed just before, BIRD counts two crashes, and deletes the routes
that it has kept since the first. Source: bgp_incoming_connection in BIRD's proto/bgp/bgp.c, version 2.0.12.

SECOND_CALL is less than RESTART_WAIT, in case that a firewall lets only the host with the lower address connect.
"""

LONGEST_RESTART = 4095
"""The maximum graceful restart time in seconds: how long peers keep the routes of a BIRD that has crashed.

The configured time is the hold time, limited to this maximum. Source of the maximum: RFC 4724, section 3.
"""

LOG_SIZE = 2**20
"""The maximum size of BIRD's log in bytes. One previous log is kept, too. Both are in memory, below /run."""

_DEBUG = {"debug": "all", "info": "{ states, events }", "none": "{ states }"}
"""Log level -> what BIRD logs about its protocols besides errors. BIRD must log changes of state: see wakeups.py."""


@dataclass(frozen=True)
class Neighbour:
    """A BGP peer. `kind` is MESH, NODE or GLOBAL. `address` is canonical, and `as_num` is decimal text."""

    kind: str
    address: str
    as_num: str

    @property
    def name(self) -> str:
        """The name of the peer's protocol in BIRD, for example `mesh4_172_18_0_12`."""
        return f"{self.kind}{version_of(self.address)}_{self.address.translate(_NAME)}"


_NAME = str.maketrans(".:", "__")


@dataclass(frozen=True)
class Family:
    """The part of the configuration about one IP version.

    `own` is this host's registered address, None if it has none. `is_here` says whether an interface of this host has
    that address, or had it since the agent started. `pools` are CIDRs: a route from a peer is accepted only if its
    destination is inside one of them. `blocks` and `addresses` are what this host announces. Routes from peers must not
    override `guarded_networks` and `guarded_addresses`. `neighbours` are the BGP peers. `split` is as in Announced
    (desired/routes.py); it is only logged, and ignored when two configurations are compared.
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
    split: tuple[tuple[str, str], ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Config:
    """The configuration of BIRD. `hold_time` is in seconds; `as_num` is this host's AS number, as decimal text.

    `router_id` is an IPv4 address as text. `log_level` is "none", "debug" or "info".
    """

    router_id: str
    as_num: str
    hold_time: int
    log_level: str
    families: tuple[Family, ...]

    @property
    def neighbours(self) -> tuple[Neighbour, ...]:
        return tuple(neighbour for family in self.families for neighbour in family.neighbours)


def derive(snapshot: Snapshot, here: Collection[str]) -> Config:
    """Derive the configuration from the snapshot.

    `here` contains those of this host's registered addresses that an interface of this host has, or had since the agent
    started.
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
    """Return a router ID for a host without an IPv4 address: a class E address, computed from the host's name."""
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
        routes.split,
    )


def _neighbours(snapshot: Snapshot, version: int) -> Iterable[Neighbour]:
    """Return the peers of an IP version, sorted by address. Addresses of this host itself are left out.

    If an address is configured several times, a host of the mesh takes precedence over a peer of this host, and a peer
    of this host over a global peer.
    """
    topology = snapshot.topology
    # by address: of several sessions to an address, BIRD would keep only one up
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


def text(config: Config, passwords: Passwords, directory: Path, turns: bool = True) -> str:
    """Render the configuration in BIRD's language. Raises CalicoError if a text in it cannot be quoted.

    `passwords` contains the passwords of the sessions. `directory` is the folder of BIRD's log. If `turns` is False,
    SECOND_CALL is not used: see `has_turns`.
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
        # without the protocol direct, BIRD cannot resolve next hops on connected networks
        f'protocol direct {{ ipv4; ipv6; interface -"{INTERFACE_PREFIX}*", -"docker*", -"vxlan*.calico", "*"; }}',
    ]
    for family in config.families:
        lines += _family_lines(config, family, passwords, turns)
    return "\n".join(lines) + "\n"


def has_turns(text: str) -> bool:
    """Return whether the sessions of the mesh in a rendered configuration have the times FIRST_CALL and SECOND_CALL.

    Also return True if there is no such session. In configurations of earlier versions, the sessions do not have the
    times. A BIRD that runs with such a configuration does not get the times before its next start, since the change
    would reset its sessions.
    """
    return f"protocol bgp {MESH}" not in text or re.search(r"^  neighbor \S+ as \d+; connect", text, re.M) is not None


def quoted(value: str) -> str:
    """Return a text as a string literal of BIRD's language. Raise CalicoError if the text would need an escape."""
    if '"' in value or not value.isprintable():
        raise CalicoError("a text with a quotation mark or a control character cannot be told to BIRD")
    return f'"{value}"'


def _family_lines(config: Config, family: Family, passwords: Passwords, turns: bool) -> Iterable[str]:
    v, bits = family.version, BITS[family.version]
    source = f" krt_prefsrc = {family.own};" if family.own is not None and family.is_here else ""
    yield f"filter learned{v} {{"
    if family.guarded_networks:
        # reject all prefixes inside or around a connected network, except single addresses: other machines are in there
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
    # packets of this host itself to other hosts' workloads have its registered address as source
    yield f"  if source = RTS_BGP then {{{source} accept; }}"
    yield f'  if proto = "blocks{v}" then accept;'
    yield "  reject;"
    yield "}"
    ours = " && ".join(f"krt_source != {number}" for number in (OUR_PROTOCOL, OVERLAY_PROTOCOL))
    # learn: import routes that BIRD did not set, to resolve next hops behind a router
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
    yield f"  connect delay time {FIRST_CALL}; connect retry time 5; error wait time 2, 30;"
    # import table: after a change of pools, BIRD filters the routes again without requesting them from the peer
    yield f"  ipv{v} {{ import table on; import filter learned{v}; export where source = RTS_STATIC; next hop self; }};"
    yield "}"
    for neighbour in family.neighbours:
        password = passwords.of(neighbour.address, neighbour.kind == MESH)
        secret = "" if password is None else f" password {quoted(password)};"
        yield f"protocol bgp {neighbour.name} from peer{v} {{"
        turn = f" connect delay time {_turn(family, neighbour)};" if turns and neighbour.kind == MESH else ""
        yield f"  neighbor {neighbour.address} as {neighbour.as_num};{turn}{secret}"
        yield "}"


def _turn(family: Family, neighbour: Neighbour) -> int:
    """Return the number of seconds until BIRD connects to another host of the mesh."""
    is_first = family.own is not None and number_of(family.own) > number_of(neighbour.address)
    return FIRST_CALL if is_first else SECOND_CALL
