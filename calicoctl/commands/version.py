"""Show the version of calicoctl.

Usage:
  calicoctl version [--output=<FORMAT>]

Options:
  -o, --output=<FORMAT>  json: an object with the version; default: the
                         version alone

Examples:
  calicoctl version
  calicoctl version --output=json
"""

from __future__ import annotations

from functools import partial

from calicoctl import __version__
from calicoctl.grammar import Prepared, parse
from calicoctl.output import print_json, wants_json


def prepare(argv: list[str]) -> Prepared:
    arguments = parse(str(__doc__), argv)
    return partial(_version, wants_json(arguments))


def _version(as_json: bool) -> None:
    if as_json:
        print_json({"version": __version__})
    else:
        print(__version__)
