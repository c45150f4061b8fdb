"""Show the version of calicoctl.

Usage:
  calicoctl version [--output=<FORMAT>]

Options:
  -o, --output=<FORMAT>  json or yaml: an object with the version; default:
                         the version alone

Examples:
  calicoctl version
  calicoctl version --output=json
"""

from __future__ import annotations

from functools import partial

from calicoctl import __version__
from calicoctl.grammar import Prepared, parse
from calicoctl.output import data_format, print_data


def prepare(argv: list[str]) -> Prepared:
    arguments = parse(str(__doc__), argv)
    return partial(_version, data_format(arguments))


def _version(form: str | None) -> None:
    if form:
        print_data({"version": __version__}, form)
    else:
        print(__version__)
