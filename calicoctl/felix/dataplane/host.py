"""The host as a whole: drives IP forwarding, and the host's own iptables firewall, to what endpoints need.

In a thread of its own: iptables may wait for another process that holds its lock, and the Docker Engine may be slow to
answer, while the agent has policy to enforce.
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
"""Seconds between two checks of settings, which deliver no events, and between retries of what failed."""

FIREWALL_DELAY = 0.3
"""Seconds from a change of the host's firewall to our check: Docker makes many changes at a time."""

FIREWALL_INTERVAL = 5.0
"""Seconds between two checks of a firewall of iptables-legacy, which delivers no events."""

END_PATIENCE = 5.0
"""Seconds that a check may take when the agent ends."""


class HostReconciler(threading.Thread):
    """Keeps the host forwarding, and its firewall accepting what comes from endpoints or goes to them.

    Until the thread is started, its owner may call `forward` and `check_firewall`; afterwards, only the thread does.
    """

    def __init__(self, settings: HostSettings, put: Callable[[Failure], None]) -> None:
        super().__init__(name="reconciling the host", daemon=True)
        self._settings = settings
        self._put = put
        self._requests: SimpleQueue[Any] = SimpleQueue()
        self._ipv6 = False
        self._forward_at = 0.0
        self._firewall_at = 0.0
        self._polls = False
        self._failures: dict[str, str | None] = {}
        """The last failure that was emitted, by subject."""
        self._alive = True

    def set_ipv6(self, ipv6: bool) -> None:
        """Request that IPv6 is forwarded, too, or no longer."""
        self._requests.put(ipv6)

    def firewall_changed(self) -> None:
        """Request a check of the host's firewall, which another process has changed."""
        self._requests.put(None)

    def end(self) -> None:
        """End after the check that is running; wait for that, but not for long."""
        self._alive = False
        self._requests.put(None)
        if self.is_alive():
            self.join(END_PATIENCE)

    def run(self) -> None:
        while True:
            until = min(self._forward_at, self._firewall_at)
            with suppress(Empty):
                request = self._requests.get(timeout=max(0.0, until - time.monotonic()))
                if request is None:
                    self._firewall_at = min(self._firewall_at, time.monotonic() + FIREWALL_DELAY)
                else:
                    self._ipv6, self._forward_at = request, 0.0
            if not self._alive:
                return
            if time.monotonic() >= self._forward_at:
                self.forward(self._ipv6)
            if time.monotonic() >= self._firewall_at:
                self.check_firewall()

    def forward(self, ipv6: bool) -> None:
        """Make the host forward IPv4 and, with `ipv6`, IPv6."""
        self._ipv6 = ipv6
        self._try("what the host forwards", lambda: self._settings.forward(ipv6))
        self._forward_at = time.monotonic() + INTERVAL

    def check_firewall(self) -> None:
        """Make the host's firewall accept the endpoints' packets, where it would drop them."""
        done = self._try("the host's firewall", self._ensure)
        pause = (FIREWALL_INTERVAL if self._polls else float("inf")) if done else INTERVAL
        self._firewall_at = time.monotonic() + pause

    def _ensure(self) -> None:
        self._polls = not docker_firewall.sends_events()
        for line in docker_firewall.ensure():
            log.info("%s", line)

    def _try(self, subject: str, work: Callable[[], None]) -> bool:
        """Run `work`; emit its failure, once, and the failure's end. Return whether `work` succeeded."""
        why = None
        try:
            work()
        except Exception as error:  # whatever is in the host's firewall, it must not end the thread
            why = str(error) if isinstance(error, CalicoError) else f"{subject} cannot be reconciled: {error!r}"
        if why != self._failures.get(subject):
            self._put(Failure(why, subject))
        self._failures[subject] = why
        return why is None
