"""Other programs that are run on this host, iptables, say: where they are looked for."""

from __future__ import annotations

import os

_SYSTEM = ("/usr/local/sbin", "/usr/sbin", "/sbin")


def look_in_system_folders() -> None:
    """Have this process, and those it starts, look for programs in the system's folders, too, behind all others.

    The PATH of cron, of many a service, and of users does not name them.
    """
    path = os.environ.get("PATH") or os.defpath
    os.environ["PATH"] = os.pathsep.join(
        [path, *(folder for folder in _SYSTEM if folder not in path.split(os.pathsep))]
    )
