"""Keeps the addresses that endpoints of this host may go on using although a new endpoint would be refused them.

They are kept across reboots, in the file /var/lib/calico/HOST/kept, which only root can read: a JSON list of pairs,
each an interface and an address. Without such addresses, there is no file. desired/admission.py decides which addresses
are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from calicoctl import state
from calicoctl.desired.admission import Use
from calicoctl.errors import CalicoError

_FILE = "kept"


def read(host: str) -> list[Use]:
    """Return the (interface, address) pairs that were written last, empty if there is no file.

    Raises CalicoError if the file is damaged or cannot be read.
    """
    try:
        return [(str(interface), str(address)) for interface, address in json.loads(state.read(host, _FILE) or b"[]")]
    except (TypeError, ValueError):
        raise CalicoError(f"{state.path(host, _FILE)} is damaged, and not used") from None


def write(host: str, kept: Iterable[Use]) -> None:
    """Replace the pairs in the file by `kept`; remove the file if there are none. Raises CalicoError."""
    found = sorted(kept)
    if found:
        state.write(host, _FILE, content=json.dumps(found).encode())
    else:
        state.remove(host, _FILE)
