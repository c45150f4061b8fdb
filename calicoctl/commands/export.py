"""Write pools, profiles, BGP, settings and endpoints' profiles as one file.

Usage:
  calicoctl export [<FILE>]

Options:
  <FILE>  the file to write or replace, or - for standard output, which is the
          default

The file is YAML that people can read and keep in git, and that 'calicoctl
apply' takes. Rules are the texts that 'calicoctl profile PROFILE rule add'
takes; a rule that has no such text, such as one with a field of another
program, is the object that is in etcd. Pools and BGP peers have the fields
that they have in etcd. Settings that have their default are left out.
`endpoints` has the profiles of each, by HOST/ORCHESTRATOR/WORKLOAD, where
WORKLOAD is the workload's name or id, and /ENDPOINT follows if it has several
endpoints.

What belongs to a running host is not in the file: hosts' addresses and AS
numbers, and which addresses are assigned. Nor is any password: those of BGP
sessions are in /etc/calico/bgp-passwords on each host, not in etcd.

What has an invalid value in etcd is left out; a warning names it, and the
exit status is 1.

Examples:
  calicoctl export network.yaml
  calicoctl export >network.yaml
"""

from __future__ import annotations

import os
import stat
from functools import partial
from pathlib import Path

from calicoctl import files
from calicoctl.datastore.client import DatastoreClient
from calicoctl.errors import CalicoError, printable
from calicoctl.grammar import Prepared, parse
from calicoctl.output import quantity, warn, warn_of_each

HEADING = "# written by 'calicoctl export'; 'calicoctl apply FILE' makes etcd hold this\n"


def prepare(argv: list[str]) -> Prepared:
    arguments = parse(str(__doc__), argv)
    return partial(_export, arguments["<FILE>"])


def _export(file: str | None) -> None:
    from calicoctl.configuration.stored import document, read
    from calicoctl.yaml_text import LONGEST, dumped

    stored = read(DatastoreClient.from_environment())
    text = HEADING + "".join(dumped(document(stored)))
    if file in (None, "-"):
        print(text, end="")
    else:
        _write(str(file), text)
        print(f"The configuration is in {printable(str(file))}")
    if len(text) > LONGEST:
        warn(
            f"Warning: 'calicoctl apply' takes files of {LONGEST // 1024 // 1024} MiB at most, and this is larger: "
            "divide it, and apply the parts without --prune."
        )
    warn_of_each([*stored.problems.values()])
    if stored.problems:
        raise CalicoError(f"{quantity(len(stored.problems), 'invalid value')} left out.")


def _write(file: str, text: str) -> None:
    """Write or replace a file, so that nobody ever reads a part of it. Raises CalicoError."""
    try:
        if Path(file).exists() and not Path(file).is_file():  # such as a pipe
            Path(file).write_text(text, encoding="utf-8")
            return
        path = Path(os.path.realpath(file))  # a link stays a link
        mode, owner = files.new_mode(), (-1, -1)
        if path.exists():
            before = path.stat()
            mode = stat.S_IMODE(before.st_mode)
            owner = (before.st_uid, before.st_gid) if os.geteuid() == 0 else owner
        files.replace(path, text.encode(), mode, owner, suffix=f".{os.getpid()}").close()
    except OSError as error:
        raise CalicoError(f"{file}: {error.strerror}") from None
