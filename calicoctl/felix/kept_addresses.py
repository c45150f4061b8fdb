"""Keeps across reboots which addresses endpoints of this host have although they would be refused today.

The file /var/lib/calico/HOST/kept (JSON), of root alone, has the interface and the address of each. There is none while
there is no such address. desired/admission.py decides which addresses are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from calicoctl import state
from calicoctl.desired.admission import Use
from calicoctl.errors import CalicoError

_FILE = "kept"


def read(host: str) -> list[Use]:
    """Return the interfaces and addresses that were written last. Raises CalicoError."""
    try:
        return [(str(interface), str(address)) for interface, address in json.loads(state.read(host, _FILE) or b"[]")]
    except (TypeError, ValueError):
        raise CalicoError(f"{state.path(host, _FILE)} is damaged, and not used") from None


def write(host: str, kept: Iterable[Use]) -> None:
    """Replace what is kept. Raises CalicoError."""
    found = sorted(kept)
    if found:
        state.write(host, _FILE, content=json.dumps(found).encode())
    else:
        state.remove(host, _FILE)
