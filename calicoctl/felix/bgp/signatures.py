"""Detects packets that the kernel drops because of their TCP MD5 signature: a password is wrong, or one end has none.

BIRD is not notified of such packets. The kernel counts them for the whole network namespace, not for each sender, so
they only raise a suspicion about a session that is down.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Callable

NETSTAT = Path("/proc/net/netstat")

RECENT = 60.0
"""Seconds for which dropped packets raise a suspicion. A peer that cannot connect tries again within 30 s."""

_UNSIGNED, _SIGNED, _WRONG = "TCPMD5NotFound", "TCPMD5Unexpected", "TCPMD5Failure"
"""Counters of dropped packets: signature missing; signature present but not expected; signature wrong. Source:
net/ipv4/proc.c in Linux.
"""


class Signatures:
    """Records which kinds of packets were dropped recently because of their signature."""

    def __init__(
        self, read: Callable[[], str] = NETSTAT.read_text, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`read` returns the text of /proc/net/netstat, and `clock` a time in seconds."""
        self._read = read
        self._clock = clock
        self._before: Mapping[str, int] = {}
        self._grew: dict[str, float] = {}
        """Counter -> when `update` last found that it had increased."""

    def update(self) -> None:
        """Read the counters, and record which have increased since the last call. Must be called every few seconds.

        If the counters cannot be read, this does nothing.
        """
        try:
            found = counters(self._read())
        except (OSError, ValueError):
            return
        for name, count in found.items():
            if count > self._before.get(name, count):
                self._grew[name] = self._clock()
        self._before = found

    def suspicion(self, has_password: bool) -> str | None:
        """Return what may be wrong with the password of a session that is down; None if nothing is suspected.

        `has_password` says whether this host has a password for the session.
        """
        recent = {name for name, grew in self._grew.items() if self._clock() - grew <= RECENT}
        if has_password and _WRONG in recent:
            return "the peer may have another password: packets with a wrong signature arrive"
        if has_password and _UNSIGNED in recent:
            return "the peer may have no password for this host: packets without a signature arrive"
        if not has_password and _SIGNED in recent:
            return "the peer may have a password, and this host has none for it: packets with a signature arrive"
        return None


def counters(text: str) -> dict[str, int]:
    """Return the counters of dropped packets, by name, in the text of /proc/net/netstat.

    Raises ValueError if the text has no valid group TcpExt. A group consists of two lines that begin with the group's
    name: the counters' names, then the values.
    """
    lines = [line.split() for line in text.splitlines()]
    for names, values in zip(lines, lines[1:]):
        if names[:1] == values[:1] == ["TcpExt:"]:
            found = dict(zip(names[1:], map(int, values[1:])))
            return {name: found[name] for name in (_UNSIGNED, _SIGNED, _WRONG) if name in found}
    raise ValueError("no counters of TCP")
