"""How much of anything is accepted from the store, and told of it: one table, for the agent and for the commands.

Whoever may write to the store can write without end. A record beyond a limit is invalid by itself, so that what one key
can cost is bounded, and others go on. The limits are far above what deployments need. docs/agent.md lists them.
"""

from __future__ import annotations

VALUE = 512 * 1024
"""Characters of a value. 5,000 rules with a net, a tag and ports take about this much."""

DEPTH = 32
"""Levels of lists and objects in a value: Calico's have four, and unknown fields are written back by recursion."""

PROFILES = 64
"""Profiles of an endpoint: each list of profiles is a chain in nftables, with a jump for each."""

ADDRESSES = 256
"""Addresses of an endpoint: each is an element of four sets, a route, and a neighbour."""

CLAIMANTS = 100
"""Endpoints that list the same interface or address: if there are more, reasons do not name the one that has it."""

TAGS = 256
"""Tags of a profile: each tag in a rule has all addresses of the profile's endpoints."""

RULES = 5000
"""Rules of a profile, both directions together: nftables takes about half a second for so many."""

PORTS = 100
"""Ports and ranges in one list of a rule: each is an element of a set, and iptables had 15."""

REPORTED = 100
"""Items of each list in the agent's report, and so in `calicoctl status`."""

SESSIONS = 1000
"""BGP sessions in the report: a full mesh of so many hosts is beyond what BGP can do without route reflectors."""

NAME = 200
"""Characters of a key or a name in a report."""

TEXT = 1000
"""Characters of a reason or an error in a report or in the log."""


def shortened(text: str, longest: int) -> str:
    """Return a text of at most `longest` characters, with an ellipsis in its middle if it was longer."""
    half = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[-half:]}"
