"""Remembers which members of etcd have just kept a command waiting, so that the caller's next commands ask them last.

They are in a file that is left for the next command (see files.py), for a minute each. It is a JSON object: `host:port`
of a member -> the time when a request to it timed out, in seconds of the clock that starts with the system.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable

from calicoctl import files
from calicoctl.datastore.settings import Member

_NAME = ".etcd-slow-members"
"""The name of the file: see files.leave."""

REMEMBERED = 60.0
"""Seconds after which a member is asked in its turn again."""


def last(members: Iterable[Member]) -> list[Member]:
    """Return `members` with the remembered ones moved to the end; otherwise, the order is unchanged."""
    slow = _read()
    return sorted(members, key=lambda member: _text(member) in slow)


def remember(member: Member) -> None:
    """Remember a member, which must have kept a request waiting just now. Raises nothing if this is not possible."""
    files.leave(_NAME, json.dumps({**_read(), _text(member): time.monotonic()}).encode())


def forget() -> None:
    """Remove the file, if there is one."""
    files.remove_left(_NAME)


def _read() -> dict[str, float]:
    """Return the members that are remembered, with their times. They are none if the file is missing or invalid."""
    try:
        found = json.loads(files.read_left(_NAME) or b"{}")
        now = time.monotonic()
        return {member: at for member, at in found.items() if 0 <= now - at < REMEMBERED}
    except (AttributeError, OverflowError, RecursionError, TypeError, ValueError):
        return {}


def _text(member: Member) -> str:
    name, port = member
    return f"{name}:{port}"
