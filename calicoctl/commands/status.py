"""Show what this host's agent says of itself and of the host's endpoints.

Usage:
  calicoctl status [--output=<FORMAT>]

Options:
  --output=<FORMAT>  json: an object with all that the agent reports; default: text

The agent tells: since when it runs, whether etcd can be reached, how many endpoints are up, down, or in error, how
many containers and namespaces it has given their interface back since, how many that are no more it has forgotten or
cleared leftovers of, which endpoints are in trouble and why, which keys of etcd cannot be understood, and what went
wrong last. The exit status is 0 when the agent is running, and 1 when it is not; what it said last is shown then.

Examples:
  calicoctl status
  calicoctl status --output=json
"""

from __future__ import annotations

from typing import Any

from calicoctl.cli import parse
from calicoctl.datastore.client import hostname
from calicoctl.errors import CalicoError, NotThere, one_line
from calicoctl.felix import process
from calicoctl.output import print_json, wants_json


def run(argv: list[str]) -> None:
    arguments = parse(str(__doc__), argv)
    as_json = wants_json(arguments)
    host = hostname()
    running = process.running(host) is not None
    report = process.report(host)
    if as_json:
        print_json({"host": host, **(report or {}), "running": running})
    elif report is not None:
        try:
            lines = _lines(report, running)
        except (KeyError, TypeError):
            raise CalicoError(
                f"What the agent of host {host} reports cannot be read: it is of another version. Start it anew with "
                "'calicoctl node stop --force' and 'calicoctl node'."
            ) from None
        for line in lines:
            print(one_line(line))
    if not running:
        raise NotThere(f"The agent of host {host} is not running. Start it with 'calicoctl node'.")


def _lines(report: dict[str, Any], running: bool) -> list[str]:
    etcd, counts, error = report["etcd"], report["endpoints"], report["last_error"]
    lines = [
        f"Host:       {report['host']}",
        f"Agent:      version {report['version']}, process {report['pid']}, "
        + (f"running since {report['running_since']}" if running else "not running; it said last:"),
        f"etcd:       {'reachable' if etcd['reachable'] else 'not reachable'} since {etcd['since']}"
        + (f" ({etcd['error']})" if etcd["error"] else ""),
        f"Endpoints:  {counts['up']} up, {counts['down']} down, {counts['error']} in error"
        + ("" if report["first_update"] else " (not looked at yet)"),
    ]
    lines.append(
        f"Workloads:  {report.get('healed', 0)} given their interface back, {report.get('collected', 0)} cleared away"
    )
    if report["waiting_for"]:
        lines.append(f"Waiting:    for {report['waiting_for']}")
    for trouble in report["endpoints_in_trouble"]:
        lines.append(
            f"  endpoint {trouble['endpoint']} of {trouble['orchestrator']} {trouble['workload'][:64]} is "
            f"{trouble['status']}: {trouble['reason']}"
        )
    if report["problems"]:
        lines.append("Problems:")
    for problem in report["problems"]:
        lines.append(f"  {problem['key']}: {problem['problem']}")
    lines.append(f"Last error: {error['time'] + ' ' + error['error'] if error else 'none'}")
    lines.append("BGP:        no sessions; this agent runs no routing daemon")
    return lines
