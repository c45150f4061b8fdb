"""All settings that Calico keeps in the store: name, allowed values, default. The one table; keys.py has their keys."""

from __future__ import annotations

import re
from dataclasses import dataclass

from calicoctl.errors import CalicoError


@dataclass(frozen=True)
class Setting:
    """A setting's name in the store, its values, None for any text, and what holds where it is not set.

    One with a `largest` is a whole number from 0 to that.
    """

    name: str
    values: tuple[str, ...] | None = None
    default: str | None = None
    largest: int | None = None

    def check(self, value: str) -> None:
        """Raise CalicoError for a value that is not allowed."""
        allowed = None
        if self.largest is not None:
            if not re.fullmatch("[0-9]{1,9}", value, re.ASCII) or int(value) > self.largest:
                allowed = f"a whole number from 0 to {self.largest}"
        elif self.values is not None and value not in self.values:
            allowed = f"one of {', '.join(self.values)}"
        if allowed is not None:
            raise CalicoError(f"it must be {allowed}")


LEVELS = ("none", "debug", "info", "warning", "error", "critical")

LOG_LEVEL = Setting("LogSeverityScreen", LEVELS, "info")
GRACE_TIME = Setting("GraceTime", default="60", largest=86400)
IPIP = Setting("IpInIpEnabled", ("true", "false"), "false")
HOST_ACTION = Setting("DefaultEndpointToHostAction", ("RETURN", "DROP", "ACCEPT"), "RETURN")

WRITTEN = (
    Setting("InterfacePrefix", ("cali",), "cali"),
    Setting("LogSeverityFile", LEVELS, "none"),
    LOG_LEVEL,
    Setting("LogFilePath", None, "none"),
    IPIP,
)
"""Settings of all host agents that are written with their defaults when a host registers, as the tools of 2015 did."""

FELIX = {"loglevel": LOG_LEVEL, **{setting.name: setting for setting in (*WRITTEN, GRACE_TIME)}}
"""Settings of all host agents, by the names that the command line takes."""

NODE_FELIX = {HOST_ACTION.name: HOST_ACTION}
"""Settings of one host's agent."""

BGP = {"loglevel": Setting("loglevel", ("none", "debug", "info"), "none")}
"""Settings of the routing daemons of all hosts, or of one."""

RESERVED = ("marker", "as_num", "node_mesh", "peer_v4", "peer_v6", "ip_addr_v4", "ip_addr_v6")
"""What stands beside the settings in the store, and is written by other commands than `config`."""


def settings_of(daemon: str, of_node: bool) -> dict[str, Setting]:
    """Return the settings of a daemon, "felix" or "bgp"; of one host's, or of all."""
    return (NODE_FELIX if of_node else FELIX) if daemon == "felix" else BGP
