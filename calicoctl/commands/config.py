"""Show and change settings of the host agents (felix), and of the routing
daemons (bgp).

Usage:
  calicoctl config felix <NAME> [<VALUE> | --remove] [--force]
      [--output=<FORMAT>]
  calicoctl config node felix <NAME> [<VALUE> | --remove] [--force]
      [--output=<FORMAT>]
  calicoctl config bgp <NAME> [<VALUE> | --remove] [--force]
      [--output=<FORMAT>]
  calicoctl config node bgp <NAME> [<VALUE> | --remove] [--force]
      [--output=<FORMAT>]

Options:
  <NAME>                 a setting's name, see below
  <VALUE>                what it is to be; default: show what it is
  --remove               unset it, so that the default is in force
  --force                take a name or a value that is not known here, too,
                         for other programs
  -o, --output=<FORMAT>  json or yaml: an object with the setting's key in
                         etcd, and its value; default: the value alone

  felix
    loglevel           none, debug, info, warning, error, critical; default:
                       info
    LogSeverityScreen  the same setting under the name that it has in etcd
    GraceTime          seconds, 0 to 86400, before agents garbage-collect a
                       workload that is gone or whose state is unknown;
                       default: 60
    MTU                bytes, 1280 to 65535: the MTU of new interfaces of
                       containers; default: that of the host's own network
                       interface, in pools with an overlay 50 less (70 over
                       IPv6)
    CheckSenders       mac, interface, off: whether packets from addresses of
                       other hosts and their containers are checked for MAC
                       and interface, for the interface alone, or for
                       neither; default: mac
    EndpointToHostServices
                       allow, drop: whether DNS, DHCP, and ICMPv6 for
                       neighbour discovery and multicast reach a host from
                       its containers whatever their profiles say; with drop,
                       rules and DefaultEndpointToHostAction decide on them
                       like on everything else; default: allow
    MaxConnections     256 to 1048576: how many connections, tracked by the
                       kernel, a container may have at a time; new ones are
                       dropped then, and after as many at once also those
                       above a 16th of the number a second; default: 16384
    LogSeverityFile, LogFilePath, InterfacePrefix, IpInIpEnabled
                       for agents of 2015; this version ignores them
  node felix
    DefaultEndpointToHostAction
                       RETURN, DROP, ACCEPT: what happens to packets from a
                       container to this host that the rules allow; default:
                       RETURN, the host's own firewall decides
  bgp
    HoldTime           seconds, 3 to 65535, after which a host that does not
                       answer has no routes; default: 30. A change resets all
                       BGP sessions: hosts have no routes to each other for
                       about a second
  bgp, node bgp
    loglevel           none, debug, info; default: none

With `node`, a setting applies to this host, without it to all hosts. Agents
apply a change at once. The exit status is 1 for a setting that has no value
and no default.

Examples:
  calicoctl config felix loglevel debug
  calicoctl config node felix DefaultEndpointToHostAction DROP
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from calicoctl.datastore import keys
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.config import RESERVED, Setting, settings_of
from calicoctl.errors import CalicoError, NotFound, about, printable
from calicoctl.grammar import Prepared, parse
from calicoctl.output import data_format, print_data, warn


def prepare(argv: list[str]) -> Prepared:
    arguments = parse(str(__doc__), argv)
    name, value, force = arguments["<NAME>"], arguments["<VALUE>"], arguments["--force"]
    daemon = "felix" if arguments["felix"] else "bgp"
    settings = settings_of(daemon, arguments["node"])
    setting = settings.get(name)
    if setting is None:
        if not force:
            from calicoctl.spelling import did_you_mean, nearest

            if name in settings_of(daemon, not arguments["node"]):
                which, words = ("all hosts", "config") if arguments["node"] else ("one host", "config node")
                raise CalicoError(f"'{name}' is a setting of {which}: use 'calicoctl {words} {daemon} {name}'")
            near = nearest(name, settings)
            raise CalicoError(
                f"'{name}' is none of the settings {', '.join(settings)}; --force accepts any name"
                + did_you_mean(near and repr(near))
            )
        setting = Setting(_checked_name(name))
    if value is not None and not force:
        with about(f"'{value}' is not a valid value for {name}"):
            setting.check(value)
    if value is not None and not value.isprintable():
        raise CalicoError(f"{value!a} is not a valid value for {name}: it must be one line of text")
    return partial(_config, setting, arguments)


def _config(setting: Setting, arguments: dict[str, Any]) -> None:
    name, value, form = arguments["<NAME>"], arguments["<VALUE>"], data_format(arguments)
    of_node, felix = arguments["node"], arguments["felix"]
    datastore = DatastoreClient.from_environment()
    if felix:
        key = keys.host_config(datastore.host, setting.name) if of_node else keys.config(setting.name)
    else:
        key = keys.bgp_setting(setting.name, datastore.host if of_node else None)
    now = None
    if arguments["--remove"]:
        if not datastore.unset(key):
            raise NotFound(f"{name} is not set.")
    elif value is not None:
        datastore.set(key, value)
        now = value
    else:
        now = datastore.setting(key)
    if now is not None and setting.default is not None and not (felix or of_node):
        try:
            setting.check(now)
        except CalicoError as error:
            warn(f"Warning: the stored value '{printable(now)}' is invalid, and agents use {setting.default}: {error}")
            now = None
    if now is None:
        now = setting.default
    if form:
        print_data({"key": key, "value": now}, form)
    elif now is not None:
        print(printable(now))
    if now is None and not arguments["--remove"]:
        raise NotFound(f"{name} is not set.")


def _checked_name(name: str) -> str:
    """Return `name` if it can be the name of a setting.

    Raises CalicoError if it cannot be part of a key, or if the key belongs to another command (see RESERVED).
    """
    if name in RESERVED:
        raise CalicoError(f"'{name}' is not a setting: other commands write it")
    # etcd hides keys that begin with an underscore
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name, re.ASCII):
        raise CalicoError(f"'{name}' cannot be a setting: it must have up to 64 letters, digits, '_', '.' and '-'")
    return name
