"""Limits on the data in the store, and on the contents of the agent's reports. The agent and the commands use them.

docs/agent.md lists the limits.
"""

from __future__ import annotations

VALUE = 512 * 1024
"""Maximum length of a value, in characters. 5,000 rules with a net, a tag and ports have about this length."""

# a namespace's path of up to 4,095 characters is a part of a key; etcd accepts keys that are too long for a request
KEY = 5000
"""Maximum length of a key, in characters."""

DEPTH = 32
"""Maximum nesting of lists and objects in a value."""

PROFILES = 64
"""Maximum number of profiles of an endpoint. Each list of profiles is a chain in nftables."""

ADDRESSES = 256
"""Maximum number of addresses of an endpoint. An address is an element of four sets, a route and a neighbour entry."""

CLAIMANTS = 100
"""If more endpoints than this list the same interface or address, errors do not name the endpoint that uses it."""

BLOCKS = 1000
"""Maximum number of blocks that a handle names. Each is read when an address of the handle is assigned or released."""

TAGS = 256
"""Maximum number of tags of a profile."""

RULES = 5000
"""Maximum number of rules of a profile, inbound and outbound together."""

PORTS = 100
"""Maximum number of ports and port ranges in one list of a rule."""

REPORTED = 100
"""Maximum number of items in each list of the agent's report, except the list of BGP sessions."""

SESSIONS = 1000
"""Maximum number of BGP sessions in the agent's report."""

NAME = 200
"""Maximum length of a key or a name in a report, in characters."""

TEXT = 1000
"""Maximum length of a reason or an error in a report or in the log, in characters."""


LINE = 5000
"""Maximum length of a command's message, and of a line in a cell of a table, in characters. Each row of a table is as
long as its longest one.
"""


def shortened(text: str, longest: int) -> str:
    """Return `text`, shortened to at most `longest` characters if it is longer: then `…` replaces its middle."""
    half = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[-half:]}"
