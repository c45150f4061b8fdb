"""Extends PATH by the sbin folders, which contain iptables, nft and ip."""

from __future__ import annotations

import os

_SYSTEM = ("/usr/local/sbin", "/usr/sbin", "/sbin")


def look_in_system_folders() -> None:
    """Append the sbin folders to PATH, for this process and its children, unless they are in PATH already.

    The PATH of cron jobs, of many services, and of ordinary users lacks them.
    """
    path = os.environ.get("PATH") or os.defpath
    os.environ["PATH"] = os.pathsep.join(
        [path, *(folder for folder in _SYSTEM if folder not in path.split(os.pathsep))]
    )
