"""Lets `python -m calicoctl` do what the installed `calicoctl` does."""

from calicoctl.cli import entry

entry()
