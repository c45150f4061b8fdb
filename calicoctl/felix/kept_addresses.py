"""Stores the addresses that endpoints of this host may use only because they used them before.

The file /var/lib/calico/HOST/kept survives reboots, and only root can read it. It is a JSON list of pairs (interface,
address). If there are no such addresses, there is no file. Admission.exceptions (desired/admission.py) determines the
addresses.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from calicoctl import state
from calicoctl.desired.admission import Use
from calicoctl.errors import CalicoError

_FILE = "kept"


def read(host: str) -> list[Use]:
    """Return the (interface, address) pairs in the file; an empty list if there is no file.

    Raises CalicoError if the file is damaged or cannot be read.
    """
    try:
        return [(str(interface), str(address)) for interface, address in json.loads(state.read(host, _FILE) or b"[]")]
    except (TypeError, ValueError):
        raise CalicoError(f"{state.path(host, _FILE)} is damaged, and not used") from None


def write(host: str, kept: Iterable[Use]) -> None:
    """Replace the pairs in the file by `kept`. Remove the file if `kept` is empty. Raises CalicoError."""
    found = sorted(kept)
    if found:
        state.write(host, _FILE, content=json.dumps(found).encode())
    else:
        state.remove(host, _FILE)
