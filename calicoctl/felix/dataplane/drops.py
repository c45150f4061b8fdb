"""Renders how our tables drop packets, and reads what they have counted.

Each rule of the tables that drops a packet of an endpoint does so through a chain of this module. The chain counts the
packet in the set `drops`, whose elements are an interface and a number, which stands for a direction and a reason (see
KINDS). The counter `dropped` has the total.

The named counters of ruleset.py, one for each rule of a profile that allows or denies, are read here, too. The comment
of a counter is the time since when it has counted. A reload of the tables creates the counters and elements with the
values that they had before: see Counts.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from calicoctl import clock
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

TOTAL = "dropped"
"""The counter of all packets that are counted in the set `drops`."""

_SET = "drops"
_SPELLABLE = re.compile(r"[A-Za-z0-9_.-]{1,15}", re.ASCII)
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", re.ASCII)


@dataclass(frozen=True)
class Counts:
    """What the tables have counted.

    `counters` are the named counters. `drops` maps (name of an interface, number in KINDS) to the packets that were
    dropped.
    """

    counters: Mapping[str, Count] = field(default_factory=dict)
    drops: Mapping[tuple[str, int], Count] = field(default_factory=dict)


def read(nft: Nft) -> Counts:
    """Return what our tables have counted. Raises OSError if they do not exist, or count no drops."""
    counters = nft.counters("calico")
    if TOTAL not in counters:
        raise FileNotFoundError(TOTAL)
    found = {}
    for key, count in nft.element_counts("calico", _SET):
        name, number = struct.unpack("=16sI", key)  # a concatenation of an interface's name and a mark
        found[name.rstrip(b"\0").decode(errors="replace"), number] = count
    return Counts(counters, found)


def counter(name: str, counts: Counts) -> str:
    """Return the command that creates a named counter with the value that it has in `counts`, or else with zero."""
    count = counts.counters.get(name, Count())
    since = count.comment if _TIME.fullmatch(count.comment) else clock.now()
    return f'add counter inet calico {name} {{ packets {count.packets} bytes {count.bytes} ; comment "{since}" ; }}\n'


def skeleton(counts: Counts) -> str:
    """Return the commands that create, in new tables, what this module needs, with the values in `counts`."""
    lines = [f"add set inet calico {_SET} {{ type ifname . mark; size 65536; flags dynamic; counter; }}"]
    for number, (direction, reason) in KINDS.items():
        chain = chain_of(direction, reason)
        lines += [
            f"add chain inet calico {chain}",
            f"add rule inet calico {chain} update @{_SET} {{ {INTERFACES[direction]} . {number} }}",
            f"add rule inet calico {chain} counter name {TOTAL} drop",
        ]
    elements = ", ".join(
        f'"{interface}" . {number} counter packets {count.packets} bytes {count.bytes}'
        for (interface, number), count in counts.drops.items()
        if number in KINDS and _SPELLABLE.fullmatch(interface)
    )
    if elements:
        lines.append(f"add element inet calico {_SET} {{ {elements} }}")
    return counter(TOTAL, counts) + "".join(line + "\n" for line in lines)


def chain_of(direction: str, reason: str) -> str:
    """Return the name of the chain that counts and drops packets of this kind: see KINDS."""
    return f"dropped/{direction}/{reason}"
