"""Remembers in which of its blocks a host has last assigned an address, so that its next command looks there first.

It is in a file that is left for the next command (see files.py): a JSON object with the host's name and, for each IP
version, the name of a block (the last part of its key). It is a hint alone: whoever reads it must read the block.
"""

from __future__ import annotations

import json

from calicoctl import files
from calicoctl.datastore import keys
from calicoctl.datastore.blocks import block_cidr, parse_name

_NAME = ".recent-blocks"
"""The name of the file: see files.leave."""


def key(host: str, version: int) -> str | None:
    """Return the key of the block in which `host` has last assigned an address of an IP version, None if unknown."""
    name = _read(host).get(str(version))
    named = parse_name(name) if isinstance(name, str) else None
    return keys.ipam_block(version, block_cidr(*named)) if named is not None and named[0] == version else None


def remember(host: str, version: int, name: str) -> None:
    """Record that `host` has last assigned an address of an IP version in the block `name`, if possible."""
    known = _read(host)
    if known.get(str(version)) != name:
        files.leave(_NAME, json.dumps({**known, "host": host, str(version): name}).encode())


def forget() -> None:
    """Remove the file, if there is one."""
    files.remove_left(_NAME)


def _read(host: str) -> dict[str, object]:
    """Return the content of the file; an empty dictionary if it is missing, of another host, or invalid."""
    try:
        found = json.loads(files.read_left(_NAME) or b"{}")
    except (RecursionError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("host") == host else {}
