"""Collect diagnostics of this host into one archive.

Usage:
  calicoctl diags [--log-dir=<DIR>] [--output=<FORMAT>]

Options:
  --log-dir=<DIR>        the directory of the host agent's logs; default: the
                         one in its report, else /var/log/calico
  -o, --output=<FORMAT>  json or yaml: an object with the archive's path;
                         default: a sentence

The archive, a .tar.gz that only its owner can read, is written to the folder
for temporary files (TMPDIR, else /tmp). It holds this host's nftables and
iptables rules, routes, neighbours, links, tunnels, network settings and
connections, the agent's logs and status, BIRD's configuration, log, sessions
and routes, Calico's keys in etcd, versions, and Docker's containers and their
networks; what cannot be read is left out. TLS keys, passwords, tokens and the
containers' environment are not included. Run it as root to
include everything.

Examples:
  sudo calicoctl diags
  sudo calicoctl diags --log-dir=/var/log/calico --output=json
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path

from calicoctl.datastore.hosts import hostname
from calicoctl.diagnose import archive
from calicoctl.errors import CalicoError
from calicoctl.felix import process
from calicoctl.grammar import Prepared, parse
from calicoctl.output import data_format, print_data, with_progress


def prepare(argv: list[str]) -> Prepared:
    arguments = parse(str(__doc__), argv)
    log_dir = arguments["--log-dir"]
    if log_dir is not None and (not log_dir or not Path(log_dir).is_dir()):
        raise CalicoError(f"--log-dir={log_dir}: it is no directory")
    return partial(_diags, log_dir, data_format(arguments))


def _diags(log_dir: str | None, form: str | None) -> None:
    if log_dir is None:
        log_dir = _log_dir()
    found = list(archive.sources(log_dir).items())
    path = archive.collect(with_progress(found, "collecting"))
    if form:
        print_data({"file": str(path)}, form)
    else:
        print(f"Diagnostics are in {path}")


def _log_dir() -> str:
    """Return the log directory that this host's agent has reported, or the default one if there is no such report."""
    reported = None
    with suppress(CalicoError):  # a host that has no name has no agent
        reported = (process.report(hostname()) or {}).get("log_dir")
    return reported if isinstance(reported, str) else process.DEFAULT_LOG_DIR
