"""Makes `python -m calicoctl` run the same program as the installed `calicoctl`."""

from calicoctl.cli.main import entry

entry()
