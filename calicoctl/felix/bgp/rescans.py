"""Schedules rescans: BIRD compares the kernel's routes with its own, in addition to its own scan every 20 seconds.

BIRD does not notice when another process, or the kernel, deletes one of its routes. The agent's thread requests a
rescan when a route with BIRD's protocol number is deleted, when an address is added or deleted, and when the kernel's
events were lost. A deletion by BIRD itself leads to a rescan, too; BIRD then finds nothing to do, so there is no loop.
With 5,000 routes, a rescan takes BIRD 3 ms.
"""

from __future__ import annotations

import time

PAUSE = 0.1
"""Seconds from a request to the rescan: routes are often deleted together, and an address is soon added again."""

INTERVAL = 1.0
"""The minimum number of seconds between two rescans."""


class Rescans:
    """Knows when the next rescan is due. `due_at` is a time of time.monotonic, None while no rescan is requested."""

    def __init__(self) -> None:
        self.due_at: float | None = None
        self._last = 0.0

    def request(self) -> bool:
        """Request a rescan, and return whether none was requested before. Another thread may call this."""
        if self.due_at is not None:
            return False
        self.due_at = max(time.monotonic() + PAUSE, self._last + INTERVAL)
        return True

    def take(self) -> bool:
        """Return whether a rescan is due. If so, it counts as done from then on, even if it fails."""
        if self.due_at is None or time.monotonic() < self.due_at:
            return False
        self._last, self.due_at = time.monotonic(), None
        return True
