"""Reads what the kernel has counted on this host: for each rule of a profile, and for each endpoint. Needs root.

The agent need not run, since its tables stay when it ends.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from calicoctl import netlink
from calicoctl.datastore.model import Endpoint, Rule, Rules
from calicoctl.errors import CalicoError, about
from calicoctl.felix.dataplane import drops
from calicoctl.felix.dataplane.drops import Counts
from calicoctl.felix.dataplane.nft import Nft
from calicoctl.felix.dataplane.ruleset import rule_counters
from calicoctl.policy.verdict import readable


def read() -> Counts:
    """Return what this host's tables have counted. Raises CalicoError if the host has no tables that count."""
    try:
        return drops.read(Nft())
    except OSError:
        raise CalicoError(
            "Nothing is counted on this host, since the agent's tables are not in the kernel, or those of an older "
            "agent: start it with 'calicoctl node', or restart it with 'calicoctl node restart'."
        ) from None


def of_rules(rules: Rules, counts: Counts) -> dict[str, list[dict[str, Any]]]:
    """Return what each rule of a profile has decided: "inbound" and "outbound" -> a dictionary for each rule.

    In a dictionary, `connections` is how many connections a rule that allows has let begin, and None for other rules.
    `dropped_packets` and `dropped_bytes` are what a rule that denies has dropped, and zero for one that allows.
    `since` is when counting began. All are None for a rule that logs, and if no endpoint of this host has the profile.
    Raises CalicoError if a rule is invalid.
    """
    with about(f"Profile {rules.id} denies everything, and nothing is counted"):
        rules = readable(rules)
    return {
        "inbound": _of_direction(rules.id, "inbound", rules.inbound, counts),
        "outbound": _of_direction(rules.id, "outbound", rules.outbound, counts),
    }


def _of_direction(profile: str, direction: str, rules: Sequence[Rule], counts: Counts) -> list[dict[str, Any]]:
    found = []
    for rule, name in zip(rules, rule_counters(profile, direction, rules)):
        values: tuple[object, ...] = (None, None, None, None)
        count = None if name is None else counts.counters.get(name)
        if count is not None:
            allows = rule.action == "allow"
            dropped = (0, 0) if allows else (count.packets, count.bytes)
            values = (count.packets if allows else None, *dropped, count.comment)
        found.append(dict(zip(("connections", "dropped_packets", "dropped_bytes", "since"), values)))
    return found


def of_endpoints(endpoints: Collection[Endpoint], counts: Counts) -> list[dict[str, Any]]:
    """Return the counters of endpoints of this host.

    `sent` is what the workload has sent through its interface, and `received` what it has received, since the interface
    was created; both are None if there is no interface. `dropped` lists, by direction and reason (drops.KINDS), the
    packets that were dropped since `since`. Raises OSError.
    """
    traffic = netlink.traffic()
    by_interface: dict[str, list[dict[str, Any]]] = {}
    for (interface, number), count in sorted(counts.drops.items()):
        if number in drops.KINDS:
            direction, reason = drops.KINDS[number]
            one = {"direction": direction, "reason": reason, "packets": count.packets, "bytes": count.bytes}
            by_interface.setdefault(interface, []).append(one)
    found = []
    for endpoint in endpoints:
        seen = traffic.get(endpoint.name)
        found.append(
            {
                # what the host receives, the workload has sent
                "sent": None if seen is None else {"packets": seen.received_packets, "bytes": seen.received_bytes},
                "received": None if seen is None else {"packets": seen.sent_packets, "bytes": seen.sent_bytes},
                "dropped": by_interface.get(endpoint.name, []),
                "since": counts.counters[drops.TOTAL].comment,
            }
        )
    return found
