"""Check this host's prerequisites.

Usage:
  calicoctl checksystem [--fix] [--libnetwork] [--output=<FORMAT>]

Options:
  --fix                  load missing kernel modules first (as root)
  --libnetwork           require Docker 1.9 or later; default: Docker is
                         optional, since namespaces can be connected without
  -o, --output=<FORMAT>  json or yaml: an array of objects with name, ok,
                         needed, found and advice; default: a table

Checks the kernel, by trying the required features in a temporary network
namespace, settings, tools and their versions, Docker and its firewall, etcd,
and pools that overlap networks of this host. Some checks need root. The exit
status is 1 when something required is missing; warnings do not count.

Examples:
  sudo calicoctl checksystem
  sudo calicoctl checksystem --output=json
"""

from __future__ import annotations

from functools import partial
from typing import Any

from calicoctl.diagnose import checks
from calicoctl.errors import CalicoError
from calicoctl.grammar import Prepared, parse, require_root
from calicoctl.output import data_format, print_data, print_table, warn


def prepare(argv: list[str]) -> Prepared:
    arguments = parse(str(__doc__), argv)
    if arguments["--fix"]:
        require_root()
    return partial(_check, arguments, data_format(arguments))


def _check(arguments: dict[str, Any], form: str | None) -> None:
    if arguments["--fix"]:
        for why in checks.load_modules():
            warn(f"Warning: {why}")
    found = list(checks.check(arguments["--libnetwork"]))
    if form:
        print_data([check.to_dict() for check in found], form)
    else:
        rows = []
        for check in found:
            state = "ok" if check.ok else ("missing" if check.needed else "warning")
            rows.append([check.name, state, check.found, "" if check.ok else check.advice])
        print_table(["What", "State", "Found", "What to do"], rows, widest=50)
    missing = [check.name for check in found if check.needed and not check.ok]
    if missing:
        raise CalicoError(f"This host lacks prerequisites: {'; '.join(missing)}.")
