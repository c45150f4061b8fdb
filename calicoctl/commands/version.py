"""Show the version of calicoctl.

Usage:
  calicoctl version
"""

from __future__ import annotations

from calicoctl import __version__
from calicoctl.cli import parse


def run(argv: list[str]) -> None:
    parse(str(__doc__), argv)
    print(__version__)
