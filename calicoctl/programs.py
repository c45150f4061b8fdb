"""Adds the sbin directories, which contain commands such as iptables, nft and ip, to the variable PATH."""

from __future__ import annotations

import os

_SYSTEM = ("/usr/local/sbin", "/usr/sbin", "/sbin")


def look_in_system_folders() -> None:
    """Append those sbin directories to PATH that it does not contain yet, for this process and its children."""
    path = os.environ.get("PATH") or os.defpath
    os.environ["PATH"] = os.pathsep.join(
        [path, *(folder for folder in _SYSTEM if folder not in path.split(os.pathsep))]
    )
