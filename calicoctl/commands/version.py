"""Show the version of calicoctl, and the commit that it was built from.

Usage:
  calicoctl version [--output=<FORMAT>]

Options:
  -o, --output=<FORMAT>  json or yaml: an object with the version, and the
                         commit or null; default: the version, and the commit
                         in parentheses

In a checkout, which is not built, no commit is shown: 'git log' tells it.
"calicoctl --version" prints the version alone.

Examples:
  calicoctl version
  calicoctl version --output=json
"""

from __future__ import annotations

from functools import partial

from calicoctl import __commit__, __version__
from calicoctl.grammar import Prepared, parse
from calicoctl.output import data_format, print_data


def prepare(argv: list[str]) -> Prepared:
    arguments = parse(str(__doc__), argv)
    return partial(_version, data_format(arguments))


def _version(form: str | None) -> None:
    if form:
        print_data({"version": __version__, "commit": __commit__ or None}, form)
    else:
        print(f"{__version__} (commit {__commit__})" if __commit__ else __version__)
