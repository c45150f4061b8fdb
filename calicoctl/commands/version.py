"""Show the version of calicoctl.

Usage:
  calicoctl version [--output=<FORMAT>]

Options:
  --output=<FORMAT>  json: an object with the version; default: the version alone

Examples:
  calicoctl version
  calicoctl version --output=json
"""

from __future__ import annotations

from calicoctl import __version__
from calicoctl.cli import parse
from calicoctl.output import print_json, wants_json


def run(argv: list[str]) -> None:
    if wants_json(parse(str(__doc__), argv)):
        print_json({"version": __version__})
    else:
        print(__version__)
