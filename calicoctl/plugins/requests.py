"""Validates the fields of the engine's calls. Nothing else of a call may be used unchecked."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from calicoctl.addresses import BITS, parse_address
from calicoctl.errors import CalicoError
from calicoctl.workloads.libnetwork import is_id

if TYPE_CHECKING:
    from netaddr import IPAddress

LONGEST = 4096
"""The maximum length of a text, in characters."""


def text(request: dict[str, Any], name: str) -> str:
    """Return a text, empty if it is missing or null. Raises CalicoError if it is anything else, or too long."""
    value = request.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > LONGEST:
        raise CalicoError(f"{name} is not a text")
    return value


def fields(request: dict[str, Any], name: str) -> dict[str, Any]:
    """Return an object, empty if it is missing or null. Raises CalicoError if it is anything else."""
    value = request.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CalicoError(f"{name} is not an object")
    return value


def id(request: dict[str, Any], name: str) -> str:
    """Return the engine's id of a network or an endpoint. Raises CalicoError if it is missing or invalid."""
    value = request.get(name)
    if not is_id(value):
        raise CalicoError(f"{name} is not an id of 64 hexadecimal digits")
    return str(value)


def address(request: dict[str, Any], name: str, version: int | None = None) -> IPAddress | None:
    """Return the address in a field such as `192.0.2.1` or `192.0.2.1/32`, None if it is missing or empty.

    Raises CalicoError if it is not an address, or has another prefix length, or is not of the IP `version`, unless that
    is None.
    """
    value = text(request, name)
    if not value:
        return None
    plain, _, length = value.partition("/")
    found = parse_address(plain)
    if version not in (None, found.version) or length not in ("", str(BITS[found.version])):
        raise CalicoError(f"{name} is {value}, which is not a single IP{f'v{version}' if version else ''} address")
    return found


def mac(request: dict[str, Any], name: str) -> str | None:
    """Return a MAC address in lower case, None if it is missing or empty. Raises CalicoError if it is invalid."""
    value = text(request, name).lower()
    if value and not re.fullmatch("([0-9a-f]{2}:){5}[0-9a-f]{2}", value):
        raise CalicoError(f"{name} is not a MAC address")
    return value or None


def sandbox(request: dict[str, Any]) -> str:
    """Return the path of a container's network namespace, which need not exist yet. Raises CalicoError."""
    value = text(request, "SandboxKey")
    if not re.fullmatch("(/[A-Za-z0-9_.-]+)+/[0-9a-z]{1,64}", value, re.ASCII) or os.path.normpath(value) != value:
        raise CalicoError("SandboxKey is not the path of a network namespace")
    return value
