"""Makes `python -m calicoctl` run the same program as the installed `calicoctl`."""

from calicoctl.cli.command_client import entry

entry()
