"""Show which packets policy has dropped on this host lately.

Usage:
  calicoctl drops [--follow] [--output=<FORMAT>]

Options:
  --follow               go on, and show each drop as it happens, until
                         Ctrl-C, or until nobody reads the output any more
  -o, --output=<FORMAT>  json or yaml; json is an object for each drop, on a
                         line of its own; default: text, a line for each drop

Each line says when the packet was dropped, from and to which workload, host
or address, its protocol and port, whether it was outbound of a workload or
inbound of one, why, and how often the same was dropped within ten seconds.
The command at its end, for TCP, UDP and pings, says what policy does now to
the first packet of such a connection. `calicoctl endpoint --help` explains
the reasons.

The kernel counts all drops, but reports no more than a sample of them to the
agent: two packets a second of a connection, 50 from a workload, 200 of the
host, without the multicasts that every interface sends by IPv6 (ICMPv6 to
ff02::/16). The agent keeps the last 1,000 drops, until it ends. How many are
not shown is said at the end, on standard error. With --follow, a drop that
was repeated is shown once more after ten seconds, with the number (JSON:
count); id tells that it is the same. Must be run as root.

Examples:
  sudo calicoctl drops
  sudo calicoctl drops --output=json
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from calicoctl.datastore.hosts import hostname
from calicoctl.errors import CalicoError, Failed, one_line
from calicoctl.grammar import Prepared, parse, require_root
from calicoctl.output import data_format, print_data, quantity, warn


def prepare(argv: list[str]) -> Prepared:
    arguments = parse(str(__doc__), argv)
    require_root()
    return partial(_drops, arguments["--follow"], data_format(arguments))


def _drops(follow: bool, form: str | None) -> None:
    from calicoctl.diagnose import dropped
    from calicoctl.felix import events, process

    host = hostname()
    for why in process.troubles(host, (events.DROPS_LOGGED, events.DROPS_RECEIVED)):
        warn(f"Warning: {why}.")
    shown: dict[int, int] = {}
    try:
        for drop in dropped.read(host, follow):
            _print(drop, form)
            sys.stdout.flush()  # a pipe, too, gets each drop as it happens
            shown[drop["id"]] = drop["count"]
    except KeyboardInterrupt as interrupted:
        interrupted.handled = True  # type: ignore[attr-defined]  # see cli/main.py
        number = getattr(interrupted, "number", signal.SIGINT)
        raise Failed(_summary(host, shown), 128 + number) from None
    if follow and dropped.is_output_read():
        raise CalicoError("The host agent has ended, or has waited too long for this command to print.")
    if form == "yaml" and not shown:
        print_data([], form)
    warn(_summary(host, shown))


def _print(drop: dict[str, Any], form: str | None) -> None:
    if form == "json":
        print(json.dumps(drop))
    elif form:
        print_data(iter([drop]), form)
    else:
        print(one_line(_line(drop)))


def _line(drop: dict[str, Any]) -> str:
    ends = [
        end["address"] if end["name"] == end["address"] else f"{end['name']} ({end['address']})"
        for end in (drop["from"], drop["to"])
    ]
    return "; ".join(_parts(drop, *ends))


def _parts(drop: dict[str, Any], source: str, destination: str) -> Iterator[str]:
    protocol = drop["protocol"] if isinstance(drop["protocol"], str) else f"protocol {drop['protocol']}"
    if drop["port"] is not None:
        protocol += f" {drop['port']}"
    elif drop["icmp_type"] is not None:
        protocol += f" type {drop['icmp_type']}"
    yield f"{drop['time']} {source} to {destination}, {protocol}, {drop['direction']}: {drop['why']}"
    if drop["count"] > 1:
        yield f"{drop['count']} times until {drop['last']}"
    if drop["trace"] is not None:
        yield drop["trace"]


def _summary(host: str, shown: dict[int, int]) -> str:
    """Return a sentence about how many packets were dropped, and how many of them are not shown."""
    from calicoctl.diagnose import counters
    from calicoctl.felix.dataplane import drops

    total = counters.read().counters[drops.TOTAL]
    missing = max(0, total.packets - sum(shown.values()))
    many = quantity(total.packets, "packet")
    said = f"{many} {'was' if total.packets == 1 else 'were'} dropped on {host} since {total.comment}"
    return f"{said}; {missing} of them {'is' if missing == 1 else 'are'} not shown." if missing else f"{said}."
