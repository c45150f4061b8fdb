"""Schedules rescans of the kernel's routes by BIRD, in addition to BIRD's own scan every 20 seconds.

In a rescan, BIRD compares the kernel's routes with its own. BIRD does not notice that another process, or the kernel,
deletes one of its routes. So a rescan is requested when a route with BIRD's protocol number is deleted, when an address
is added or deleted, and when events of the kernel were lost.
"""

from __future__ import annotations

import time

PAUSE = 0.1
"""Seconds from a request to the rescan: routes are often deleted together, and an address is soon added again."""

INTERVAL = 1.0
"""The minimum number of seconds between two rescans."""


class Rescans:
    """Determines when the next rescan is due. `due_at` is that time (monotonic), None if no rescan is requested."""

    def __init__(self) -> None:
        self.due_at: float | None = None
        self._last = 0.0

    def request(self) -> bool:
        """Request a rescan. Return False if a rescan was requested already and is not done yet.

        Another thread may call this.
        """
        if self.due_at is not None:
            return False
        self.due_at = max(time.monotonic() + PAUSE, self._last + INTERVAL)
        return True

    def take(self) -> bool:
        """Return whether a requested rescan is due. If it is, remove the request."""
        if self.due_at is None or time.monotonic() < self.due_at:
            return False
        self._last, self.due_at = time.monotonic(), None
        return True
