"""Make pools, profiles, BGP, settings and endpoints' profiles as a file says.

Usage:
  calicoctl apply <FILE> [--dry-run] [--prune] [--output=<FORMAT>]

Options:
  <FILE>                 YAML, as 'calicoctl export' writes it, or - for
                         standard input
  --dry-run              print what differs, and change nothing
  --prune                remove what is not in the file, too: pools, profiles,
                         BGP peers and settings; default: leave it as it is
  -o, --output=<FORMAT>  json or yaml: an object with changed, dry_run, the
                         differences, and missing_endpoints; after a failure
                         halfway, with the differences that were applied;
                         default: a line for each difference

The file has any of the sections pools, profiles, bgp, settings and endpoints;
what is not in the file is not touched. --prune removes only what belongs to a
section that is there, no endpoint, and nothing that has an invalid value in
etcd, which a warning names. Of a profile, tags, inbound and outbound can be
left out; a new profile then has those of 'calicoctl profile add'. 'calicoctl
export' shows each form.

First the whole file is checked, as commands check their arguments: a mistake
changes nothing, and the error names its line. A pool or profile that is in
use is not removed, and then nothing else is changed, either. Then the
difference is printed, and what differs is changed, and nothing else. Fields
of other programs are kept. If another command changes the same at the same
time, `apply` reads again, and prints what differs then. If it fails or is
interrupted halfway, it says what it has changed; repeat it to do the rest.

An endpoint in the file that does not exist is named in a warning; everything
else is applied, and the exit status is 1.

The exit status is 0 if the file is applied, or nothing differs; 3 if
something differs, with --dry-run; 1 if something failed; and 2 for bad usage.
A file has 8 MiB at most, and one document; it has no tags (!name) and merge
keys (<<).

Examples:
  calicoctl apply network.yaml --dry-run
  calicoctl apply network.yaml --prune
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

from calicoctl.commands.pool import warn_of_overlaps
from calicoctl.datastore.client import DatastoreClient
from calicoctl.errors import CalicoError, Failed, one_line
from calicoctl.grammar import Prepared, parse
from calicoctl.output import data_format, first_few, print_data, quantity, warn, warn_of_each

if TYPE_CHECKING:
    from calicoctl.configuration.changes import Changes, Difference

DIFFERENT = 3
"""The exit status for --dry-run if something differs."""


def prepare(argv: list[str]) -> Prepared:
    arguments = parse(str(__doc__), argv)
    return partial(_apply, arguments["<FILE>"], arguments["--dry-run"], arguments["--prune"], data_format(arguments))


def _apply(file: str, dry_run: bool, prune: bool, form: str | None) -> None:
    from calicoctl.configuration import changes, declared, stored

    name = "standard input" if file == "-" else file
    wanted = declared.parse(_read(file, name), name)
    datastore = DatastoreClient.from_environment()
    shown = _Shown(form)
    if dry_run:
        shown.add(changes.compare(datastore, stored.read(datastore), wanted, prune))
    else:
        try:
            changes.apply(datastore, wanted, prune, shown.add, shown.made.extend)
        except BaseException:  # also if the user interrupts it
            shown.end_early()
            raise
    shown.end(dry_run)
    if shown.missing:
        raise CalicoError(
            f"{quantity(len(shown.missing), 'endpoint')} in {name} {'does' if len(shown.missing) == 1 else 'do'} not "
            f"exist: {first_few(shown.missing)}"
        )
    if dry_run and shown.lines:
        raise Failed(f"{quantity(len(shown.lines), 'difference')}; nothing was changed.", DIFFERENT)


class _Shown:
    """What is printed about changes: as text at once, each line once, and as data at the end."""

    def __init__(self, form: str | None) -> None:
        self._form = form
        self._warnings: set[str] = set()
        self.lines: dict[str, Difference] = {}
        self.missing: list[str] = []
        self.made: list[Difference] = []
        """What has been changed, in this order."""

    def add(self, changes: Changes) -> None:
        self.missing = changes.missing
        warnings = [f"{warning}." for warning in changes.warnings]
        warn_of_each([warning for warning in warnings if warning not in self._warnings])
        self._warnings.update(warnings)
        new = {str(one): one for one in changes.differences if str(one) not in self.lines}
        self.lines.update(new)
        if self._form is None:
            for line in new:
                print(one_line(line))
            sys.stdout.flush()  # before anything is changed
        pools = [one.name for one in new.values() if one.kind == "pool" and one.word == "add"]
        if pools:
            warn_of_overlaps(pools)

    def end_early(self) -> None:
        """Print what has been changed, if anything has, before the command fails."""
        if not self.made:
            return
        total, self.lines = len(self.lines), {str(one): one for one in self.made}
        warn(
            f"{len(self.lines)} of {quantity(total, 'difference')} were applied, or a few more; the last one was "
            f"'{self.made[-1]}'. Repeat the command to apply the rest."
        )
        if self._form:
            self.end(dry_run=False)

    def end(self, dry_run: bool) -> None:
        if self._form:
            print_data(
                {
                    "changed": bool(self.lines),
                    "dry_run": dry_run,
                    "differences": [
                        {"change": one.word, "kind": one.kind, "name": one.name, "detail": one.detail or None}
                        for one in self.lines.values()
                    ],
                    "missing_endpoints": self.missing,
                },
                self._form,
            )
        elif not self.lines:
            print("No difference.")


def _read(file: str, name: str) -> str:
    """Return the text of a file, or of standard input for "-". Errors call it `name`. Raises CalicoError."""
    from calicoctl.yaml_text import LONGEST

    is_input = file == "-"
    try:
        with open(0 if is_input else file, "rb", closefd=not is_input) as stream:  # UTF-8 in any locale
            content = stream.read(LONGEST + 1)
    except OSError as error:
        raise CalicoError(f"{name}: {error.strerror}") from None
    if len(content) > LONGEST:
        raise CalicoError(f"{name}: it has more than {LONGEST // 1024 // 1024} MiB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise CalicoError(f"{name}:{line}: it is not UTF-8 text") from None
