"""Renders how our tables drop packets, and reads what they have counted.

Each rule of the tables that drops a packet of an endpoint does so through chains of this module:

* `sample/DIRECTION/REASON` counts the packet in the set `drops`, whose elements are an interface and a number, which
  stands for a direction and a reason (see KINDS). Then `sample/DIRECTION` adds it to the counter `dropped`, which has
  the total. It drops most packets of a flood, so that these cost next to nothing, and returns from the others.
* These are logged to the agent (packet_log.py), with a prefix that says why they are dropped (see `dropping`), and
  counted in `logged`. A rule that denies does that itself, since its prefix names the rule. `dropped/DIRECTION/REASON`
  does it for all other reasons. A kernel that cannot log drops and counts the same packets: see `why_not_logged`.

The named counters of ruleset.py, one for each rule of a profile that allows or denies, are read here, too. The comment
of a counter is the time since when it has counted. A reload of the tables creates the counters and elements with the
values that they had before: see Counts.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from calicoctl import clock
from calicoctl.datastore.keys import INTERFACE_PREFIX
from calicoctl.errors import CalicoError
from calicoctl.felix.dataplane.nft import Count

if TYPE_CHECKING:
    from calicoctl.felix.dataplane.nft import Nft

RULE, NO_RULE, PROFILE, SPOOFED = "rule", "no-rule", "profile", "spoofed"
NO_CONNECTION, NO_ENDPOINT, HOST_ACTION = "no-connection", "no-endpoint", "host-action"

KINDS = {
    1: ("outbound", RULE),
    2: ("outbound", NO_RULE),
    3: ("outbound", PROFILE),
    4: ("outbound", SPOOFED),
    5: ("outbound", NO_CONNECTION),
    6: ("outbound", NO_ENDPOINT),
    7: ("outbound", HOST_ACTION),
    8: ("inbound", RULE),
    9: ("inbound", NO_RULE),
    10: ("inbound", PROFILE),
    11: ("inbound", NO_CONNECTION),
    12: ("inbound", NO_ENDPOINT),
}
"""Number -> direction and reason of a drop. The numbers outlive the agent, so none may get another meaning.

"outbound" are packets from an endpoint, "inbound" packets to one. The reasons are: a rule denies the packet; no rule
matches it; a profile is missing or invalid; its sender is forged; it belongs to no connection and starts none; its
interface has no endpoint; DefaultEndpointToHostAction is DROP.
"""

REASONS = tuple(dict.fromkeys(reason for _, reason in KINDS.values()))

INTERFACES = {"outbound": "iifname", "inbound": "oifname"}
"""Direction -> what nftables calls the endpoint's interface in packets of that direction."""

SET = "drops"
"""The set that counts dropped packets by interface and number in KINDS."""

TOTAL = "dropped"
"""The counter of all packets that are counted in the set `drops`."""

LOGGED = "logged"
"""The counter of those of them that are logged to the agent."""

GROUP = 2015
"""The netlink group to which packets are logged. Each network namespace has its own groups."""

_SNAPLEN = 128
"""How many bytes of a packet are logged: its headers."""

_LIMITS = """
add limit inet calico sampled { rate 200/second burst 400 packets ; }
add set inet calico sampling { type ifname . mark; size 65536; flags dynamic,timeout; timeout 1m; }
"""

SPELLABLE = re.compile(r"[A-Za-z0-9_.-]{1,15}", re.ASCII)
"""Names of interfaces that may stand in the text of an element. Elements of others are neither kept nor removed."""
_TRIAL = "calico-trial"
"""The table that `trial` creates and deletes."""

_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", re.ASCII)


@dataclass(frozen=True)
class Counts:
    """What the tables have counted.

    `counters` are the named counters. `drops` maps (name of an interface, number in KINDS) to the packets that were
    dropped.
    """

    counters: Mapping[str, Count] = field(default_factory=dict)
    drops: Mapping[tuple[str, int], Count] = field(default_factory=dict)


@dataclass(frozen=True)
class Logged:
    """A packet that was logged. `at` is when (seconds since 1970); `prefix` is what the tables say of it.

    `incoming` and `outgoing` are the names of its interfaces, "" if it has none, or if that exists no more. `header` is
    None if it cannot be read.
    """

    at: float
    prefix: str
    incoming: str
    outgoing: str
    header: Header | None


@dataclass(frozen=True)
class Header:
    """The addresses and the protocol of a packet; ports, or type and code of ICMP, if it has them."""

    source: str
    destination: str
    protocol: int
    source_port: int | None = None
    port: int | None = None
    icmp_type: int | None = None
    icmp_code: int | None = None


def read(nft: Nft) -> Counts:
    """Return what our tables have counted. Raises OSError if they do not exist, or count no drops."""
    counters = nft.counters("calico")
    if TOTAL not in counters:
        raise FileNotFoundError(TOTAL)
    return Counts(counters, read_drops(nft))


def read_drops(nft: Nft) -> dict[tuple[str, int], Count]:
    """Return the field `drops` of Counts alone. Raises OSError like `read`."""
    found = {}
    for key, count in nft.element_counts("calico", SET):
        name, number = struct.unpack("=16sI", key)  # a concatenation of an interface's name and a mark
        found[name.rstrip(b"\0").decode(errors="replace"), number] = count
    return found


def counter(name: str, counts: Counts) -> str:
    """Return the command that creates a named counter with the value that it has in `counts`, or else with zero."""
    count = counts.counters.get(name, Count())
    since = count.comment if _TIME.fullmatch(count.comment) else clock.now()
    return f'add counter inet calico {name} {{ packets {count.packets} bytes {count.bytes} ; comment "{since}" ; }}\n'


def skeleton(counts: Counts, logs: bool = True) -> str:
    """Return the commands that create, in new tables, what this module needs, with the values in `counts`.

    `logs` is whether packets are logged: see `why_not_logged`.
    """
    lines = [f"add set inet calico {SET} {{ type ifname . mark; size 65536; flags dynamic; counter; }}"]
    for direction in INTERFACES:
        rules = [*(_sample(direction) if logs else [f"counter name {TOTAL}"]), "drop"]
        lines.append(f"add chain inet calico sample/{direction}")
        lines += [f"add rule inet calico sample/{direction} {rule}" for rule in rules]
    for number, (direction, reason) in KINDS.items():
        sample, chain = f"sample/{direction}/{reason}", f"dropped/{direction}/{reason}"
        lines += [
            f"add chain inet calico {sample}",
            f"add rule inet calico {sample} update @{SET} {{ {INTERFACES[direction]} . {number} }}",
            f"add rule inet calico {sample} goto sample/{direction}",
        ]
        if reason not in (RULE, PROFILE):
            lines.append(f"add chain inet calico {chain}")
            lines += [f"add rule inet calico {chain} {rule}" for rule in dropping(direction, reason, logs=logs)]
    elements = ", ".join(
        f'"{interface}" . {number} counter packets {count.packets} bytes {count.bytes}'
        for (interface, number), count in counts.drops.items()
        if number in KINDS and SPELLABLE.fullmatch(interface)
    )
    if elements:
        lines.append(f"add element inet calico {SET} {{ {elements} }}")
    objects = counter(TOTAL, counts) + counter(LOGGED, counts) + (_LIMITS if logs else "")
    return objects + "".join(line + "\n" for line in lines)


def _sample(direction: str) -> Iterator[str]:
    """Yield the rules of a chain `sample/DIRECTION` that drop most packets, and return from it for those to be logged.

    Multicasts of neighbour discovery and listeners are left out, since every interface sends some when it is brought
    up. Packets from a workload are limited by the interface that they come from, also if they are counted for the one
    that they go to: so a workload that floods others leaves room for what the rest sends. An interface's packets are
    divided into 32 parts by a hash of addresses and destination port, so that a flood of one connection's packets
    leaves room for others. There is a limit for each part, one for each interface, which nothing can evade, such as
    packets without ports, and one for all interfaces.
    """
    interface = INTERFACES[direction]
    if direction == "inbound":
        yield f'iifname "{INTERFACE_PREFIX}*" goto sample/outbound'
    yield f"counter name {TOTAL}"
    yield "ip6 daddr ff02::/16 meta l4proto ipv6-icmp drop"
    for version, family in ((4, "ip"), (6, "ip6")):
        part = f"{interface} . jhash {family} saddr . {family} daddr . @th,16,16 mod 32"
        yield f"meta nfproto ipv{version} update @sampling {{ {part} limit rate over 2/second burst 5 packets }} drop"
    for one in dict.fromkeys(("iifname", interface)):
        yield f"update @sampling {{ {one} . 32 limit rate over 50/second burst 100 packets }} drop"
    yield f'limit name "sampled" counter name {LOGGED} return'


def trial() -> str:
    """Return commands that create everything of this module in a table of its own, and delete it: one transaction."""
    created = skeleton(Counts()).replace("inet calico ", f"inet {_TRIAL} ")
    return f"add table inet {_TRIAL}\n{created}delete table inet {_TRIAL}\n"


def why_not_logged(nft: Nft) -> str | None:
    """Return why the kernel refuses what this module needs to sample and log packets; None if it does not.

    That takes parts of the kernel, such as the modules nft_hash and nfnetlink_log, that policy does not need. Without
    them, the kernel would refuse the tables as a whole. So `logs` must be False then, wherever this module asks for it.
    """
    try:
        nft.run(trial())
    except CalicoError as error:
        return str(error)
    return None


def chain_of(direction: str, reason: str) -> str:
    """Return the name of the chain that drops packets of this kind: see KINDS. There is none for RULE and PROFILE."""
    return f"dropped/{direction}/{reason}"


def dropping(
    direction: str, reason: str, subject: str = "", match: str = "", counted: str = "", logs: bool = True
) -> list[str]:
    """Return the rules that drop packets of this kind (see KINDS): those that `match`, or all.

    `subject` is what else the log is to say: the counter of the rule that denies, or the name of a profile as in names
    of chains. If `counted` is not empty, it is a statement that counts the packets. For `logs`,
    see `skeleton`.
    """
    prefix = f"{direction} {reason} {subject}".rstrip()
    log = f'log prefix "{prefix}" group {GROUP} snaplen {_SNAPLEN} drop' if logs else "drop"
    jump = f"{counted} jump sample/{direction}/{reason}"
    return [" ".join(f"{match} {action}".split()) for action in (jump, log)]


def parse_prefix(prefix: str) -> tuple[str, str, str] | None:
    """Return direction, reason and subject of a prefix that `dropping` has made; None for any other prefix."""
    direction, _, rest = prefix.partition(" ")
    reason, _, subject = rest.partition(" ")
    return (direction, reason, subject) if (direction, reason) in KINDS.values() else None
