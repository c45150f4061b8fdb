"""Limits of what is accepted from the store, and of what reports contain, for the agent and for the commands.

Anyone who may write to the store can write any amount. A value beyond a limit is invalid, and only that value: so the
cost of one key is bounded, and other keys stay valid. The limits are far above what deployments need. docs/agent.md
lists them.
"""

from __future__ import annotations

VALUE = 512 * 1024
"""Characters of a value. 5,000 rules with a net, a tag and ports take about this much."""

KEY = 5000
"""Characters of a key. A namespace's path, which is part of a key, may have 4,095. etcd takes 1 MiB, each as up to 12
bytes, but no request for a key that is much longer, so it could be neither read nor written by itself."""

DEPTH = 32
"""Nested levels of lists and objects in a value. Calico's values have four; unknown fields are written recursively."""

PROFILES = 64
"""Profiles of an endpoint: each list of profiles is a chain in nftables, with a jump for each profile."""

ADDRESSES = 256
"""Addresses of an endpoint: each is an element of four sets, a route, and a neighbour."""

CLAIMANTS = 100
"""Endpoints that list the same interface or address: if there are more, reasons do not name the one that uses it."""

TAGS = 256
"""Tags of a profile: a tag in a rule stands for the addresses of all endpoints of the profile."""

RULES = 5000
"""Rules of a profile, both directions together: nftables takes about half a second for so many."""

PORTS = 100
"""Ports and port ranges in one list of a rule: each is an element of a set. iptables allowed 15."""

REPORTED = 100
"""Items of each list in the agent's report, and so in `calicoctl status`."""

SESSIONS = 1000
"""BGP sessions in the agent's report: with more hosts than this, a full mesh does not work; use route reflectors."""

NAME = 200
"""Characters of a key or a name in a report."""

TEXT = 1000
"""Characters of a reason or an error in a report or in the log."""


def shortened(text: str, longest: int) -> str:
    """Return a text, shortened to at most `longest` characters, with `…` in its middle, if it is longer."""
    half = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[-half:]}"
