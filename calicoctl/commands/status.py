"""Show the status of this host's agent and endpoints, and what is wrong.

Usage:
  calicoctl status [--output=<FORMAT>]

Options:
  -o, --output=<FORMAT>  json or yaml: an object with all that the agent
                         reports; default: text

Shows since when the agent runs, and the age of its report; since when reads,
writes and watches of etcd work or fail; how many endpoints are up, down and
in error (endpoints of stopped containers are down, which is no problem); how
many workloads the agent has re-attached, and how many it has
garbage-collected; the MTU of new interfaces; Docker's hook, if it is set up
(root only); the last error; the BGP sessions with other hosts and routers;
then the current problems, worst first, ten
lines at most. JSON has up to 100 problems of each kind, and 1,000 sessions;
left_out has the number of the others, by list.

A BGP session is with a host of the full mesh (mesh), a peer of all hosts
(global) or a peer of this host (node). If it is up, its state is Established,
and `in` and `out` are the numbers of routes that were accepted from the peer
and announced to it. JSON: bgp_sessions is an array of objects with peer, host
(null for a peer that is no host), kind, as_num, state, up, since, routes_in,
routes_out, last_error and suspicion (what may be wrong with its password).

What comes from etcd or Docker, such as names of containers and the reasons of
errors, is shown to root alone.

The exit status is 1 when etcd cannot be read, written or watched, when a
directory in it is too large to be read, when an endpoint is in error, when a
container cannot be connected as its labels ask, and when the current status
is unknown: the agent is not running, or its report is older than half a
minute (it is written every ten seconds), or an agent on another machine has
taken over the host's name. In all other cases it is 0, also if BGP sessions
are down, or an old agent (Felix) reports for this host and none of this
version runs here.

Examples:
  calicoctl status
  calicoctl status --output=json
"""

from __future__ import annotations

from functools import partial
from typing import Any

from calicoctl import limits
from calicoctl.datastore.hosts import hostname
from calicoctl.diagnose import host_status
from calicoctl.diagnose.host_status import AGENT, CONTAINER, KEY, STORE, Issue
from calicoctl.errors import CalicoError, one_line
from calicoctl.felix import events
from calicoctl.grammar import Prepared, parse
from calicoctl.output import data_format, print_data, quantity

_WORKS = {True: "works", False: "fails", None: "has not been tried,"}

MOST_LINES = 10
"""The maximum number of lines about problems."""


def prepare(argv: list[str]) -> Prepared:
    arguments = parse(str(__doc__), argv)
    return partial(_status, data_format(arguments))


def _status(form: str | None) -> None:
    status = host_status.read(hostname())
    issues = host_status.issues(status)
    if form:
        print_data(status, form)
    elif status["report"]["time"] is not None:
        for line in [*_lines(status), *_issue_lines(issues, any(status["left_out"].values()))]:
            print(one_line(line))
    elif status["other_agent"] or any(issue.kind != AGENT for issue in issues):
        for line in _issue_lines(issues, any(status["left_out"].values())):
            print(one_line(line))
    failures = [issue for issue in issues if issue.fails]
    if failures:
        raise CalicoError(_summary(failures, status["endpoints"]["error"]))


def _lines(status: dict[str, Any]) -> list[str]:
    counts, error, age = status["endpoints"], status["last_error"], status["report"]["age"]
    stopped = f" ({counts['stopped']} of them stopped)" if counts["stopped"] else ""
    reported = "" if age is None else f", reported {age:.0f} s ago"
    return [
        f"Host:       {status['host']}",
        f"Agent:      version {status['version']}, process {status['pid']}, "
        + (f"running since {status['running_since']}" if status["running"] else f"{_absent(status)}; its last report:")
        + (reported if status["running"] else ""),
        *(
            f"{label}{_WORKS[ability['works']]} since {ability['since']}"
            for label, ability in (
                ("etcd:       reading ", status["etcd"]["reads"]),
                ("            writing ", status["etcd"]["writes"]),
                ("            following changes ", status["etcd"]["watch"]),
            )
        ),
        f"Endpoints:  {counts['up']} up, {counts['down']} down{stopped}, {counts['error']} in error"
        + ("" if status["first_update"] else " (initial sync pending)"),
        f"Workloads:  {status['healed']} re-attached, {status['collected']} garbage-collected",
        f"MTU:        {_mtu(status['mtu'])}",
        *([f"Hook:       {status['docker_hook']['text']}"] if status["docker_hook"] else []),
        f"Last error: {error['time'] + ' ' + error['error'] if error else 'none'}",
        *_bgp_lines(status),
    ]


def _mtu(mtu: dict[str, Any]) -> str:
    """Return a text about the MTU of new interfaces: the configured MTU, or the one that the underlay's MTU implies.

    `mtu` is the field of that name in the report of the agent.
    """
    of_versions = {version: value for version, value in mtu["underlay"].items() if value is not None}
    same = len(set(of_versions.values())) == 1
    names = {"ipv4": "IPv4", "ipv6": "IPv6"}
    parts = [str(value) if same else f"{value} ({names[version]})" for version, value in of_versions.items()]
    underlay = ", ".join(dict.fromkeys(parts)) or "unknown"
    if mtu["configured"] is not None:
        return f"{mtu['configured']}, as configured; underlay {underlay}"
    return underlay + ("" if mtu["overlay"] is None else f"; in pools with an overlay {mtu['overlay']}")


def _bgp_lines(status: dict[str, Any]) -> list[str]:
    """Return a line about BIRD and, if BIRD has sessions, the lines of a table of them."""
    label, sessions = "BGP:        ", status["bgp_sessions"]
    if status["bgp"] is None:
        return [f"{label}none; the agent is of an older version"]
    if not status["bgp"]:
        return [f"{label}off (--bgp=off)"]
    failures = {failure["subject"]: failure["error"] for failure in status["troubles"]}
    if events.BGP in failures:
        return [f"{label}{failures[events.BGP].removeprefix('BGP: ')}"]
    if status["bird"]["pid"] is None:
        return [f"{label}{failures.get(events.BGP_PASSWORDS, 'BIRD has not been started yet')}"]
    refused = "; BIRD refuses the newest configuration (see below)" if events.BGP_CONFIGURATION in failures else ""
    if not sessions:
        return [f"{label}no sessions; BIRD has no peers{refused}"]
    up = sum(session["up"] for session in sessions)
    table = [f"  {line}" for line in _session_table(sessions)]
    return [f"{label}{up} of {quantity(len(sessions), 'session')} up{refused}", *table]


def _session_table(sessions: list[dict[str, Any]]) -> list[str]:
    rows = [["peer", "host", "kind", "state", "since", "in", "out", "last error"]]
    for session in sessions:
        fields = ["peer", "host", "kind", "state", "since", "routes_in", "routes_out", "last_error"]
        rows.append(["-" if session[name] is None else str(session[name]) for name in fields])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _absent(status: dict[str, Any]) -> str:
    return "another one reports for this host" if status["other_agent"] else "not running"


def _issue_lines(issues: list[Issue], left_out: bool) -> list[str]:
    """Return a heading with the number of problems, and at most MOST_LINES lines about them.

    `left_out` says that there are more problems than the agent's report contains.
    """
    if not issues:
        return ["Problems:   none"]
    shown = len(issues) if len(issues) <= MOST_LINES else MOST_LINES - 1
    least = "more than " if left_out else ""
    lines = [f"Problems:   {least}{len(issues)}", *(f"  {issue}" for issue in issues[:shown])]
    if len(issues) > shown:
        which = f"{limits.REPORTED} of each kind" if left_out else "all"
        lines.append(f"  … and {least}{len(issues) - shown} more (calicoctl status --output=json shows {which})")
    return lines


def _summary(failures: list[Issue], in_error: int) -> str:
    """Return one sentence that explains a non-zero exit status.

    `failures` are the problems that cause it, and `in_error` is the number of endpoints in error.
    """
    for issue in failures:
        if issue.kind == AGENT:
            return f"{issue}."
    parts = []
    if any(issue.kind == STORE for issue in failures):
        parts.append("its agent cannot fully use etcd")
    if any(issue.kind == KEY for issue in failures):
        parts.append("its agent cannot read a part of etcd")
    unconnected = [issue for issue in failures if issue.kind == CONTAINER]
    if unconnected:
        count = quantity(len(unconnected), "container")
        parts.append(f"{count} cannot be connected as {'its' if len(unconnected) == 1 else 'their'} labels ask")
    if in_error:
        parts.append(f"{in_error} endpoint{'s are' if in_error > 1 else ' is'} in error")
    return f"This host has problems: {', and '.join(parts)}."
