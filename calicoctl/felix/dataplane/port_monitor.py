"""Detects that the host's own firewall drops packets of BGP or VXLAN from or to other hosts.

Our tables count the packets that arrive from BGP peers and other hosts at the ports of BGP and VXLAN, and the packets
that this host sends to these ports of BGP peers and other hosts. Each packet is counted before the host's own firewall
and, if the firewall lets it pass, again after it (host_rules.COUNTERS). This module compares the counters. It does not
change the firewall.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from calicoctl.felix.dataplane.host_rules import BGP_PORT, COUNTERS
from calicoctl.felix.dataplane.manager import Context, Manager
from calicoctl.felix.dataplane.vxlan import PORT
from calicoctl.felix.events import Failure, Tick

if TYPE_CHECKING:
    from calicoctl.felix.dataplane.nft import Nft
    from calicoctl.felix.dataplane.policy_manager import PolicyManager

DROPPED_CHECKS = 2
"""A failure is reported after this many checks that found packets, but none that had passed the firewall. The count
begins again when a check finds packets that have passed.
"""

PAUSE = 3.0
"""Seconds between two checks while packets seem to be dropped. Otherwise, a check runs at each Tick."""

SILENT_CHECKS = 20
"""A failure ends after this many consecutive checks without any packet."""

_PORTS = {"bgp": ("tcp", BGP_PORT), "vxlan": ("udp", PORT)}
_LOST = {
    ("bgp", "input"): ("what BGP peers send", "the sessions that they open"),
    ("bgp", "output"): ("what is sent to BGP peers", "the sessions that this host opens"),
    ("vxlan", "input"): ("VXLAN from other hosts", "the packets of their workloads"),
    ("vxlan", "output"): ("VXLAN to other hosts", "the packets of this host's workloads"),
}
"""(protocol, hook) -> what is dropped, and what fails as a result."""
_COMMANDS = {4: "iptables", 6: "ip6tables"}


class PortMonitor(Manager):
    """Compares the counters at each Tick, and more often while packets seem to be dropped (see PAUSE).

    Reports a Failure for each protocol and each direction in which the host's firewall drops packets.
    """

    def __init__(self, context: Context, policy: PolicyManager, nft: Nft) -> None:
        self._context = context
        self._policy = policy
        self._nft = nft
        self._due = False
        self._again_at: float | None = None
        """When to check again without waiting for a Tick (monotonic); None to wait for the next Tick."""
        self._before: Mapping[str, int] = {}
        self._dropped: dict[tuple[str, str, int], int] = {}
        """(protocol, hook, IP version) -> how many checks have found dropped packets since a packet last passed."""
        self._silent: dict[tuple[str, str, int], int] = {}
        """(protocol, hook, IP version) -> how many consecutive checks have found no packet."""

    def on_event(self, event: Any) -> None:
        if isinstance(event, Tick) and self._policy.ruleset.counts_ports:
            self._due = True

    @property
    def due_at(self) -> float | None:
        return self._again_at

    @property
    def needs_apply(self) -> bool:
        return self._due or (self._again_at is not None and time.monotonic() >= self._again_at)

    def apply(self) -> None:
        if not self.needs_apply:
            return
        self._due, self._again_at = False, None
        try:
            now = {name: count.packets for name, count in self._nft.counters("calico").items()}
        except OSError:  # checked again at the next Tick
            return
        for key, names in COUNTERS.items():
            every, passed = (self._since_before(name, now) for name in names)
            if passed:
                self._dropped[key] = 0
            elif every:
                self._dropped[key] = self._dropped.get(key, 0) + 1
            self._silent[key] = 0 if every else self._silent.get(key, 0) + 1
            if self._silent[key] >= SILENT_CHECKS:
                self._dropped[key] = 0
        self._before = now
        if any(self._dropped.values()):
            self._again_at = time.monotonic() + PAUSE
        for protocol, hook in _LOST:
            versions = [v for v in (4, 6) if self._dropped.get((protocol, hook, v), 0) >= DROPPED_CHECKS]
            why = _explanation(protocol, hook, versions) if versions else None
            self._context.health.record(Failure(why, f"firewall, {protocol} {hook}"))

    def _since_before(self, name: str, now: Mapping[str, int]) -> int:
        count, before = now.get(name, 0), self._before.get(name, 0)
        return count - before if count >= before else count  # the tables were reloaded, so the counter began at 0 again


def _explanation(protocol: str, hook: str, versions: list[int]) -> str:
    transport, port = _PORTS[protocol]
    what, lost = _LOST[protocol, hook]
    commands = " and ".join(
        f"'{_COMMANDS[version]} -I {hook.upper()} -p {transport} --dport {port} -j ACCEPT'" for version in versions
    )
    named = " and ".join(f"IPv{version}" for version in versions)
    return (
        f"this host's firewall drops {what} on {transport.upper()} port {port} over {named}, and with it {lost}: let "
        f"it pass, for example with {commands}, or with the rule '{transport} dport {port} accept' of nftables"
    )
