"""Lets `python -m calicoctl` do what the installed `calicoctl` does."""

from calicoctl.cli.main import entry

entry()
