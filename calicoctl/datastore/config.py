"""The settings in the store: names, allowed values and defaults."""

from __future__ import annotations

import re
from dataclasses import dataclass

from calicoctl.datastore.keys import INTERFACE_PREFIX
from calicoctl.errors import CalicoError


@dataclass(frozen=True)
class Setting:
    """A setting: its name in the store, its allowed values, and its default (None: there is no fixed default).

    If `largest` is set, the allowed values are the whole numbers from `smallest` to `largest`. If not, they are
    `values`, or any text if `values` is None.
    """

    name: str
    values: tuple[str, ...] | None = None
    default: str | None = None
    largest: int | None = None
    smallest: int = 0

    def check(self, value: str) -> None:
        """Raise CalicoError if `value` is not allowed."""
        allowed = None
        if self.largest is not None:
            if not re.fullmatch("[0-9]{1,9}", value, re.ASCII) or not self.smallest <= int(value) <= self.largest:
                allowed = f"a whole number from {self.smallest} to {self.largest}"
        elif self.values is not None and value not in self.values:
            allowed = f"one of {', '.join(self.values)}"
        if allowed is not None:
            raise CalicoError(f"it must be {allowed}")


LEVELS = ("none", "debug", "info", "warning", "error", "critical")

LOG_LEVEL = Setting("LogSeverityScreen", LEVELS, "info")
GRACE_TIME = Setting("GraceTime", default="60", largest=86400)
IPIP = Setting("IpInIpEnabled", ("true", "false"), "false")
MTU = Setting("MTU", smallest=1280, largest=65535)
"""The MTU of workloads' interfaces. The default is the MTU of the underlay minus the overlay's header."""
CHECK_SENDERS = Setting("CheckSenders", ("mac", "interface", "off"), "mac")
"""Whether agents check packets from addresses of other hosts and their endpoints for MAC and interface ("mac"), for
the interface alone ("interface"), or for neither ("off"). See docs/agent.md."""
HOST_SERVICES = Setting("EndpointToHostServices", ("allow", "drop"), "allow")
"""Whether endpoints may send DHCP, DNS and some ICMPv6 to their host, regardless of their profiles."""
MAX_CONNECTIONS = Setting("MaxConnections", default="16384", smallest=256, largest=1048576)
"""The maximum number of tracked connections of an endpoint, and of connections that the endpoint may start in a burst.
The rate at which the endpoint may start more is a part of this number: see RATE in felix/dataplane/connection_limit.py.
"""
HOST_ACTION = Setting("DefaultEndpointToHostAction", ("RETURN", "DROP", "ACCEPT"), "RETURN")

WRITTEN = (
    Setting("InterfacePrefix", (INTERFACE_PREFIX,), INTERFACE_PREFIX),
    Setting("LogSeverityFile", LEVELS, "none"),
    LOG_LEVEL,
    Setting("LogFilePath", None, "none"),
    IPIP,
)
"""Global settings of the agents for which `calicoctl node` writes the default if they are missing."""

_READ = (GRACE_TIME, MTU, CHECK_SENDERS, HOST_SERVICES, MAX_CONNECTIONS)

FELIX = {"loglevel": LOG_LEVEL, **{setting.name: setting for setting in (*WRITTEN, *_READ)}}
"""Global settings of the agents, by their names on the command line."""

NODE_FELIX = {HOST_ACTION.name: HOST_ACTION}
"""Settings of one host's agent."""

BGP_LOG_LEVEL = Setting("loglevel", ("none", "debug", "info"), "none")
HOLD_TIME = Setting("HoldTime", default="30", smallest=3, largest=65535)

BGP = {setting.name: setting for setting in (BGP_LOG_LEVEL, HOLD_TIME)}
"""Global settings of the routing daemons."""

NODE_BGP = {BGP_LOG_LEVEL.name: BGP_LOG_LEVEL}
"""Settings of one host's routing daemon."""

RESERVED = ("marker", "as_num", "macs", "node_mesh", "peer_v4", "peer_v6", "ip_addr_v4", "ip_addr_v6")
"""The names that `calicoctl config` refuses, since other commands write these keys. Each is the last part of a key in
the same directory as settings."""


def settings_of(daemon: str, of_node: bool) -> dict[str, Setting]:
    """Return the global settings of a daemon by name; with `of_node`, the settings of one host's daemon.

    `daemon` is "felix" or "bgp".
    """
    if daemon == "felix":
        return NODE_FELIX if of_node else FELIX
    return NODE_BGP if of_node else BGP
