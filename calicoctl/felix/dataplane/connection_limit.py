"""Limits how many tracked connections each endpoint has started, so that none fills connection tracking alone.

The kernel counts the connections that an endpoint starts and policy accepts, whatever their destination. The maximum is
the setting MaxConnections. The counts are in a table of their own, since a reload of our other tables would reset them.

To count a connection, the kernel looks up all others in the same list. So each endpoint has many short lists, and a
hash of the connection's destination address and ports selects the list. Connections of protocols other than _PROTOCOLS
share one list per endpoint. If a list is full, the endpoint's new connections are dropped for 50 ms, without counting.

The kernel's count leaves out TCP connections that are closed, although it tracks them for up to 120 s more. So the rate
of an endpoint's new connections is limited, too, by a token bucket per endpoint.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from calicoctl import limits
from calicoctl.datastore.keys import INTERFACE_PREFIX
from calicoctl.desired.snapshot import Dirty
from calicoctl.errors import CalicoError
from calicoctl.felix.dataplane.manager import Context, Manager
from calicoctl.felix.events import Failure, TablesChanged, Tick
from calicoctl.limits import shortened
from calicoctl.output import first_few
from calicoctl.workloads.workload import short_id

if TYPE_CHECKING:
    from calicoctl.felix.dataplane.nft import Nft

log = logging.getLogger("calico.felix")

TABLE = "calico-connections"

LIST = 256
"""The maximum number of connections in a list. It does not depend on the setting MaxConnections, since an element of
the set `lists` keeps the limit with which it was created. The setting determines the number of lists.
"""

RATE = 16
"""An endpoint may start MaxConnections / RATE connections per second, after a burst of MaxConnections.

With the default of MaxConnections, 16,384, that is 1,024 a second, so an endpoint has at most 16,384 + 120 * 1,024
entries that began in the last 120 s: half of the default size of connection tracking. Connections by UDP have a lower
rate anyway, 16,384 in 30 s.
"""

_PROTOCOLS = "{ icmp, tcp, udp, dccp, ipv6-icmp, sctp, udplite }"
"""The protocols whose headers begin with 32 bits that differ between connections of the same two addresses."""

_LISTS = """
add table inet TABLE
add counter inet TABLE refusals
add set inet TABLE lists { type ifname . mark; size 1048576; flags dynamic; }
add set inet TABLE rates { type ifname . mark; size 65536; flags dynamic,timeout; timeout 1m; }
add set inet TABLE paused { type ifname; size 65536; flags dynamic,timeout; timeout 50ms; }
add set inet TABLE refused { type ifname; size 65536; flags dynamic,timeout; timeout 1m; }
add chain inet TABLE refuse
add chain inet TABLE pause
add chain inet TABLE count
add chain inet TABLE forward { type filter hook forward priority filter - 9; policy accept; }
add chain inet TABLE to-host { type filter hook input priority filter - 9; policy accept; }
flush table inet TABLE
add rule inet TABLE refuse update @refused { iifname } counter name refusals drop
add rule inet TABLE pause update @paused { iifname } goto refuse
add rule inet TABLE count iifname @paused goto refuse
add rule inet TABLE count update @rates { iifname . MOST limit rate over RATE/second burst MOST packets } goto refuse
add rule inet TABLE count meta l4proto PROTOCOLS add @lists { iifname . jhash ip daddr . @th,0,32 mod COUNT FULL
add rule inet TABLE count meta l4proto PROTOCOLS add @lists { iifname . jhash ip6 daddr . @th,0,32 mod COUNT FULL
add rule inet TABLE count meta l4proto != PROTOCOLS add @lists { iifname . 0 FULL
add rule inet TABLE forward iifname "PREFIX*" ct status & confirmed == 0 goto count
add rule inet TABLE to-host iifname "PREFIX*" ct status & confirmed == 0 goto count
"""
"""The commands, with placeholders that `commands` replaces. The base chains are evaluated after those of policy, which
have priorities up to filter - 10. A connection that is not confirmed is a new one.

An element of `rates` keeps the rate with which it was created, so its key contains MaxConnections. Its timeout is
longer than the time in which its bucket fills (RATE seconds), so no endpoint gains a burst by waiting for the timeout.
"""

REMOVE = f"add table inet {TABLE}\ndelete table inet {TABLE}\n"
"""The commands that delete the table, whether it exists or not."""


def commands(largest: int) -> str:
    """Return the commands that create the table or, if it exists, replace its rules. The kernel's counts do not change.

    `largest` is the maximum number of connections of an endpoint: at least LIST.
    """
    text = _LISTS.replace("FULL", "ct count over LIST } goto pause").replace("LIST", str(LIST))
    text = text.replace("COUNT", str(largest // LIST)).replace("PROTOCOLS", _PROTOCOLS)
    text = text.replace("MOST", str(largest)).replace("RATE", str(rate(largest)))
    return text.replace("TABLE", TABLE).replace("PREFIX", INTERFACE_PREFIX)


def rate(largest: int) -> int:
    """Return how many connections an endpoint may start per second if it may have `largest` connections at a time."""
    return largest // RATE


class ConnectionLimit(Manager):
    """Applies the setting MaxConnections to the table, and reports the endpoints whose new connections were dropped."""

    def __init__(self, context: Context, nft: Nft) -> None:
        self._context = context
        self._nft = nft
        self._loaded: int | None = None
        """The limit in the table; None if the table must be loaded."""
        self._due = False
        self._refusals = 0
        """The value of the table's counter `refusals` when it was last read."""

    def on_event(self, event: Any) -> None:
        if isinstance(event, Dirty):
            if self._loaded != self._context.snapshot.max_connections:
                self._loaded = None
        elif isinstance(event, TablesChanged):
            if event.names & {"", TABLE}:
                self._loaded = None
        elif isinstance(event, Tick):
            self._due = True

    @property
    def needs_apply(self) -> bool:
        return self._due or self._loaded is None

    def apply(self) -> None:
        """Load the table if necessary. After a Tick, also report the endpoints that reached a limit in the last minute.

        If the kernel refuses the table, a failure is reported, and loading the table is retried after the next Tick.
        """
        if self._loaded is None and (self._due or "connection limit" not in self._context.health.failures):
            self._load()
        if self._due:
            self._due = False
            with suppress(OSError):  # read again at the next Tick
                self._report()

    def _load(self) -> None:
        largest, why = self._context.snapshot.max_connections, None
        try:
            self._nft.run(commands(largest))
            self._loaded = largest
        except CalicoError as error:
            why = f"the connections of endpoints are not limited: {error}"
        self._context.health.record(Failure(why, "connection limit"))

    def _report(self) -> None:
        refusals = self._nft.counters(TABLE).get("refusals")
        now = 0 if refusals is None else refusals.packets
        # a table that was loaded anew begins at 0
        self._context.health.refused_connections += now - self._refusals if now >= self._refusals else now
        self._refusals = now
        snapshot, why = self._context.snapshot, None
        interfaces = {key.rstrip(b"\0").decode(errors="replace") for key in self._nft.keys(TABLE, "refused")}
        # by their ids: the name of a container is a value of the store, and every user may read this text
        names = sorted(
            f"{shortened(short_id(id.workload), limits.NAME)} ({endpoint.interface})"
            for id, endpoint in snapshot.local.items()
            if endpoint.interface in interfaces
        )
        if names:
            why = (
                f"new connections of {first_few(names)} are dropped: an endpoint may have {snapshot.max_connections} "
                f"at a time, and after as many start {rate(snapshot.max_connections)} a second. Find out what they are "
                "('conntrack -L -s ADDRESS'), or raise the number ('calicoctl config felix MaxConnections NUMBER')"
            )
        self._context.health.record(Failure(why, "connections"))
