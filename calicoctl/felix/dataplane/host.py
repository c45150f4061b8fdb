"""Enables IP forwarding on the host, and makes the host's own iptables firewall accept endpoints' packets.

This is done in a thread of its own, so that the agent's loop does not wait: the iptables command waits while another
process holds the lock of iptables, and the Docker Engine may be slow to answer.
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
"""Seconds between two checks of the sysctls, whose changes cause no events, and between two retries."""

FIREWALL_DELAY = 0.3
"""Seconds from a change of the host's firewall until it is checked: Docker makes many changes at a time."""

FIREWALL_INTERVAL = 5.0
"""Seconds between two checks of the firewall if its changes cause no events: see docker_firewall.sends_events."""

END_PATIENCE = 5.0
"""Seconds for which the agent's end waits for a running check."""


class HostReconciler(threading.Thread):
    """The thread that keeps IP forwarding enabled, and keeps the agent's rules in the host's firewall.

    Before `start` is called, the owner of the object may call `forward` and `check_firewall`. After that, only the
    thread itself may call them. Neither raises an exception: after a failure, `put` is called with a Failure, and the
    thread tries again after INTERVAL.
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
        """Subject -> the reason of the last failure; None if the last attempt succeeded."""
        self._alive = True

    def set_ipv6(self, ipv6: bool) -> None:
        """Set whether the host must forward IPv6 besides IPv4. Returns at once; the thread then changes the sysctls."""
        self._requests.put(ipv6)

    def firewall_changed(self) -> None:
        """Request a check of the host's firewall, after another process has changed it. Returns at once."""
        self._requests.put(None)

    def end(self) -> None:
        """End the thread. If the thread is in the middle of a check, wait for the end of the check.

        The wait takes END_PATIENCE at most.
        """
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
        """Make the host forward IPv4 and, if `ipv6` is True, IPv6. For details, see HostSettings.forward."""
        self._ipv6 = ipv6
        self._try("what the host forwards", lambda: self._settings.forward(ipv6))
        self._forward_at = time.monotonic() + INTERVAL

    def check_firewall(self) -> None:
        """Add the agent's rules to the host's firewall if they are needed but missing: see docker_firewall.ensure."""
        done = self._try("the host's firewall", self._ensure)
        pause = (FIREWALL_INTERVAL if self._polls else float("inf")) if done else INTERVAL
        self._firewall_at = time.monotonic() + pause

    def _ensure(self) -> None:
        self._polls = not docker_firewall.sends_events()
        for line in docker_firewall.ensure():
            log.info("%s", line)

    def _try(self, subject: str, work: Callable[[], None]) -> bool:
        """Run `work`, and return whether it succeeded.

        If the outcome differs from that of the last call for `subject`, call `put` with a Failure. Its `why` is None if
        `work` succeeded.
        """
        why = None
        try:
            work()
        except Exception as error:  # whatever is in the host's firewall, it must not end the thread
            why = str(error) if isinstance(error, CalicoError) else f"{subject} cannot be reconciled: {error!r}"
        if why != self._failures.get(subject):
            self._put(Failure(why, subject))
        self._failures[subject] = why
        return why is None
