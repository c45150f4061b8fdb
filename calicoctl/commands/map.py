"""Show who may reach whom, on which protocols and ports.

Usage:
  calicoctl map <FILE>
  calicoctl map --output=<FORMAT> [--no-trunc]

Options:
  <FILE>                 the file to write, such as map.html, which any
                         browser shows, without a network; a regular file of
                         this name is replaced; - for standard output
  -o, --output=<FORMAT>  json or yaml, for scripts; text: a matrix
  --no-trunc             show everything on a terminal, too, whatever its
                         width; default: the matrix in parts that fit

Policy is evaluated for all pairs of endpoints, and of endpoints and hosts, as
`profile trace` evaluates it for one packet: for the first packets of
connections, from source port 40000, which stands for an ephemeral port.
Endpoints that policy treats alike are a group: they have the same profiles,
and no rule of these tells their addresses apart. Routes, and whether agents
run, are left out: see `profile trace`.

The file shows all of it as a matrix and as a graph, with filters by name,
host, profile and port, and the rules that decide about each pair; if root
runs this where an agent runs, also which packets were dropped on this host
lately. It contains the names, addresses, tags and rules of the whole network.

In the matrix, `all` means that everything passes, and `-` that nothing does.
Everything passes from a host to its own endpoints, whatever profiles say.
What an endpoint sends to its own host is then up to that host's own firewall.
Of more than 2,000 groups, there is the file only; as YAML, of more than 500.

Examples:
  calicoctl map map.html
  calicoctl map --output=text
  calicoctl map --output=json
"""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calicoctl import clock, files
from calicoctl.datastore.client import DatastoreClient
from calicoctl.errors import CalicoError, one_line
from calicoctl.grammar import Prepared, parse
from calicoctl.output import data_format, print_data, print_table, quantity, warn, warn_of_each, with_progress

if TYPE_CHECKING:
    from calicoctl.diagnose.network_map import NetworkMap
    from calicoctl.diagnose.reachability import Group

MOST_GROUPS = {None: 2000, "json": 2000, "yaml": 500}
"""The size of the largest matrix that is printed, by the format; None is text.

Four million pairs take about 20 seconds, and 170 MB of memory; YAML takes ten times as much as JSON.
"""

MANY_GROUPS = 200
"""The number of groups above which the progress is shown on a terminal."""


def prepare(argv: list[str]) -> Prepared:
    arguments = parse(str(__doc__), argv)
    if arguments["<FILE>"] is not None:
        return partial(_write, None if arguments["<FILE>"] == "-" else Path(arguments["<FILE>"]))
    return partial(_show, data_format(arguments), arguments["--no-trunc"])


def _show(form: str | None, complete: bool) -> None:
    network = _network()
    count, most = len(network.reach.groups), MOST_GROUPS[form]
    if count > most:
        raise CalicoError(
            f"Policy tells {count} groups of endpoints and hosts apart, too many for a matrix as {form or 'text'}, "
            f"which can have {most}: write a file instead, such as 'calicoctl map map.html', which has no such limit."
        )
    if form:
        print_data(network.to_dict(_progress), form)
        return
    print_table(["Group", "Members", "Names", "Profiles"], network.legend(), complete=complete)
    heading, rows = network.table(_progress)
    problems = network.problems()
    del network  # the tables need the memory
    parts = _parts(heading, rows, complete)
    for columns in parts:
        left = _let_go(rows) if columns is parts[-1] else rows
        print_table([heading[n] for n in columns], ([row[n] for n in columns] for row in left), complete=complete)
    warn_of_each([f"{key}: {problem}" for key, problem in problems])


def _write(file: Path | None) -> None:
    """Write the map to a file, or to standard output (None)."""
    from calicoctl.diagnose.network_page import page

    if file is not None:
        _check(file)
    made = clock.now()
    network = _network()
    content = page(network, made, _drops(network.enforcement.host), _progress)
    if file is None:
        if isinstance(sys.stdout, io.TextIOWrapper):  # with --quiet, it is something else
            sys.stdout.buffer.write(content)  # the page is in UTF-8, whatever the locale says
        return
    _check(file)
    try:
        files.replace(file, content, files.new_mode(), suffix=f".{os.getpid()}").close()
    except OSError as error:
        raise CalicoError(f"{file} cannot be written: {error.strerror}.") from None
    endpoints = len({node.endpoint for node in network.reach.endpoints})
    hosts = len(network.reach.hosts)
    what = f"{quantity(endpoints, 'endpoint')} on {quantity(hosts, 'host')}"
    print(f"Map of {what} written to {one_line(str(file))}")


def _drops(host: str) -> list[dict[str, Any]]:
    """Return the packets that were dropped lately on this host; none if nobody may know, or knows, of them."""
    from calicoctl.diagnose import dropped
    from calicoctl.felix import process

    if os.geteuid() != 0:
        return []
    try:
        return list(dropped.read(host, follow=False))
    except CalicoError as error:
        if process.running(host) is not None:
            warn(f"Warning: the map shows no dropped packets: {error}")
        return []


def _progress(groups: Sequence[Group]) -> Iterable[Group]:
    """Yield the groups; show the progress on a terminal if there are many."""
    return with_progress(groups, "evaluating") if len(groups) > MANY_GROUPS else groups


def _check(file: Path) -> None:
    """Raise CalicoError if there is something else than a regular file at this path: it must not be replaced."""
    try:
        mode = file.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise CalicoError(f"{file} cannot be written: {error.strerror}.") from None
    if not stat.S_ISREG(mode):
        raise CalicoError(f"{file} is not a regular file, so it is not replaced: name another file.")


def _network() -> NetworkMap:
    from calicoctl.diagnose.enforcement import Enforcement
    from calicoctl.diagnose.network_map import NetworkMap

    return NetworkMap(Enforcement(DatastoreClient.from_environment()))


def _let_go(rows: list[list[str]]) -> Iterator[list[str]]:
    """Yield the rows, and remove each: a table of thousands of columns is not to be in memory twice."""
    rows.reverse()
    while rows:
        yield rows.pop()


def _parts(heading: list[str], rows: list[list[str]], complete: bool) -> list[list[int]]:
    """Return the columns of the tables that the matrix is printed as: on a terminal, as many as fit its width."""
    import shutil

    if not sys.stdout.isatty() or complete:
        return [list(range(len(heading)))]
    widths = [max(len(row[column]) for row in [heading, *rows]) + 3 for column in range(len(heading))]
    room = shutil.get_terminal_size().columns - 1
    parts: list[list[int]] = []
    for column in range(1, len(heading)):
        if not parts or sum(widths[n] for n in [*parts[-1], column]) > room:
            parts.append([0])
        parts[-1].append(column)
    return parts
