"""Looks after what is the whole host's and no endpoint's: forwarding, and the host's own firewall.

In a thread of its own: iptables may wait for somebody who holds its lock, and the Docker Engine take long to answer,
while the agent has policy to enforce.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from calicoctl.errors import CalicoError
from calicoctl.felix.dataplane import docker_firewall
from calicoctl.felix.dataplane.sysctls import HostSettings
from calicoctl.felix.events import Failure

log = logging.getLogger("calico.felix")

INTERVAL = 10.0
"""Seconds between two looks at settings, which tell nobody of their changes, and at what failed before."""

FIREWALL_DELAY = 0.3
"""Seconds from a change of the host's firewall to our look at it: Docker makes many changes at a time."""

FIREWALL_INTERVAL = 5.0
"""Seconds between two looks at a firewall of iptables-legacy, which tells nobody of its changes."""

END_PATIENCE = 5.0
"""Seconds that a look may take when the agent ends."""


class HostKeeper(threading.Thread):
    """Keeps the host forwarding, and its firewall from dropping what is ours.

    Until it is started, `forward` and `check_firewall` are for whoever made it; from then on, it calls them itself.
    """

    def __init__(self, settings: HostSettings, tell: Callable[[Failure], None]) -> None:
        super().__init__(name="looking after the host", daemon=True)
        self._settings = settings
        self._tell = tell
        self._asked: SimpleQueue[Any] = SimpleQueue()
        self._ipv6 = False
        self._forward_at = 0.0
        self._firewall_at = 0.0
        self._polls = False
        self._troubles: dict[str, str | None] = {}
        """What was told last of each of the two."""
        self._alive = True

    def set_ipv6(self, ipv6: bool) -> None:
        """Have IPv6 forwarded, too, or not any more."""
        self._asked.put(ipv6)

    def firewall_changed(self) -> None:
        """Have the host's firewall looked at, which somebody has changed."""
        self._asked.put(None)

    def end(self) -> None:
        """End, when what is being done is done; wait for that, but not for long."""
        self._alive = False
        self._asked.put(None)
        if self.is_alive():
            self.join(END_PATIENCE)

    def run(self) -> None:
        while True:
            until = min(self._forward_at, self._firewall_at)
            with suppress(Empty):
                asked = self._asked.get(timeout=max(0.0, until - time.monotonic()))
                if asked is None:
                    self._firewall_at = min(self._firewall_at, time.monotonic() + FIREWALL_DELAY)
                else:
                    self._ipv6, self._forward_at = asked, 0.0
            if not self._alive:
                return
            if time.monotonic() >= self._forward_at:
                self.forward(self._ipv6)
            if time.monotonic() >= self._firewall_at:
                self.check_firewall()

    def forward(self, ipv6: bool) -> None:
        """Have the host forward IPv4 and, with `ipv6`, IPv6."""
        self._ipv6 = ipv6
        self._try("what the host forwards", lambda: self._settings.forward(ipv6))
        self._forward_at = time.monotonic() + INTERVAL

    def check_firewall(self) -> None:
        """Have the host's firewall accept what is ours, where it would drop that."""
        done = self._try("the host's firewall", self._ensure)
        pause = (FIREWALL_INTERVAL if self._polls else float("inf")) if done else INTERVAL
        self._firewall_at = time.monotonic() + pause

    def _ensure(self) -> None:
        self._polls = not docker_firewall.sends_events()
        for line in docker_firewall.ensure():
            log.info("%s", line)

    def _try(self, what: str, work: Callable[[], None]) -> bool:
        """Do something, and tell why it failed, once; tell whether it was done."""
        why = None
        try:
            work()
        except Exception as error:  # whatever is in somebody else's firewall, it must not end the thread
            why = str(error) if isinstance(error, CalicoError) else f"{what} cannot be looked after: {error!r}"
        if why != self._troubles.get(what):
            self._tell(Failure(why, what))
        self._troubles[what] = why
        return why is None
