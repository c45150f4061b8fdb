"""Reading addresses as people type them: strict, with a sentence for what is wrong.

netaddr alone would take `1.2` for 1.0.0.2 and `10` for 10.0.0.0/8; nobody who types an address means that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from calicoctl.errors import CalicoError

if TYPE_CHECKING:
    from netaddr import IPAddress, IPNetwork


def parse_address(text: str, what: str = "IP address") -> IPAddress:
    """Return the IPAddress that `text` spells in full; raise CalicoError, naming `what`, when it spells none."""
    from netaddr.core import INET_PTON, AddrFormatError
    from netaddr.ip import IPAddress

    try:
        return IPAddress(text, flags=INET_PTON)
    except (AddrFormatError, ValueError):
        raise CalicoError(f"'{text}' is not a valid {what}") from None


def parse_cidr(text: str) -> IPNetwork:
    """Return the network of a CIDR such as `10.0.0.0/8`; an address alone stands for itself (/32 or /128).

    Bits behind the prefix are dropped: the result is the network. Raise CalicoError when it is no CIDR.
    """
    from netaddr.core import AddrFormatError
    from netaddr.ip import IPNetwork

    address_text, slash, prefix = text.partition("/")
    try:
        address = parse_address(address_text)
        if not slash:
            return IPNetwork(address)
        if not (prefix.isascii() and prefix.isdigit()):
            raise AddrFormatError
        return IPNetwork((int(address), int(prefix)), version=address.version).cidr
    except (CalicoError, AddrFormatError, ValueError):
        raise CalicoError(f"'{text}' is not a valid CIDR (such as 10.0.0.0/8 or fd00::/64)") from None


def host_net(address: IPAddress | str) -> str:
    """Return the network of one address alone, `192.0.2.1/32` or `2001:db8::1/128`."""
    text = str(address)
    return f"{text}/{128 if ':' in text else 32}"


def version_of(text: str) -> int:
    """Return 4 or 6 for the text of a valid address or CIDR."""
    return 6 if ":" in text else 4
