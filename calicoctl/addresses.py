"""Parses addresses, CIDRs, AS numbers and ports that users type, and converts addresses.

The parsers are strict: netaddr alone would parse `1.2` as 1.0.0.2, and `10` as 10.0.0.0/8.
"""

from __future__ import annotations

import re
import socket
from functools import cache
from typing import TYPE_CHECKING

from calicoctl.errors import CalicoError

if TYPE_CHECKING:
    from netaddr import IPAddress, IPNetwork


FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
"""The address family of each IP version."""
BITS = {4: 32, 6: 128}
"""The length of an address of each IP version, in bits."""


def parse_address(text: str, what: str = "IP address") -> IPAddress:
    """Parse an IP address. If it is invalid, raises CalicoError with a message that calls the address `what`."""
    from netaddr.core import INET_PTON, AddrFormatError
    from netaddr.ip import IPAddress

    try:
        return IPAddress(text, flags=INET_PTON)
    except (AddrFormatError, ValueError):
        raise CalicoError(f"'{text}' is not a valid {what}") from None


def parse_cidr(text: str) -> IPNetwork:
    """Parse a CIDR such as `10.0.0.0/8`; an address without a prefix length is a /32 or /128.

    Host bits are cleared. Raises CalicoError if the text is not a CIDR.
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


def parse_pool_cidr(text: str) -> IPNetwork:
    """Parse the CIDR of a pool. Raises CalicoError if the text is not a CIDR, or if host bits are set."""
    network = parse_cidr(text)
    if parse_address(text.partition("/")[0]) != network.network:
        raise CalicoError(f"'{text}' is not the CIDR of a pool: it has host bits set; {network} has none")
    return network


_NOT_UNICAST = {
    4: ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3"),
    6: ("::/96", "::ffff:0.0.0.0/96", "fe80::/10", "ff00::/8"),
}
"""Ranges that hosts and workloads cannot use. Source: IANA's special-purpose address registries."""


def check_unicast(network: IPAddress | IPNetwork) -> None:
    """Raise CalicoError if `network` contains an address that hosts and workloads cannot use (see _NOT_UNICAST)."""
    from netaddr.ip import IPNetwork

    own = IPNetwork(network)
    for special in map(IPNetwork, _NOT_UNICAST[own.version]):
        if own in special or special in own:
            raise CalicoError(f"{network} cannot be used: addresses of {special} are not for hosts and workloads")


def is_unicast(packed: bytes) -> bool:
    """Return whether hosts and workloads can use an address (see _NOT_UNICAST); `packed` are its 4 or 16 bytes."""
    number = int.from_bytes(packed, "big")
    for shift, prefix in _not_unicast(len(packed)):  # noqa: SIM110, since all() would take twice as long
        if number >> shift == prefix:
            return False
    return True


@cache
def _not_unicast(size: int) -> list[tuple[int, int]]:
    """Return the ranges in _NOT_UNICAST for addresses of `size` bytes (4 or 16), each as (shift, prefix).

    An address is in the range if its number, shifted right by `shift` bits, equals `prefix`.
    """
    ranges = []
    for cidr in _NOT_UNICAST[4 if size == 4 else 6]:
        first, _, length = cidr.partition("/")
        shift = 8 * size - int(length)
        ranges.append((shift, number_of(first) >> shift))
    return ranges


def parse_as_number(text: str) -> str:
    """Parse an AS number in asplain or asdot notation (RFC 5396), and return it in asplain notation.

    Raises CalicoError if the text is not an AS number from 1 to 4294967295.
    """
    match = re.fullmatch(r"(?:(\d{1,5})\.)?(\d{1,10})", text, re.ASCII)
    if match:
        high, low = (int(part or 0) for part in match.groups())
        if high < 65536 and low < (65536 if match[1] else 2**32) and high * 65536 + low > 0:
            return str(high * 65536 + low)
    raise CalicoError(f"'{text}' is not a valid AS number: it must be 1 to 4294967295, or like 1.10")


def parse_port(text: str, what: str) -> int:
    """Parse a port, 1 to 65535. If it is invalid, raises CalicoError with a message that calls the port `what`."""
    if not re.fullmatch("[0-9]{1,5}", text, re.ASCII) or not 0 < int(text) < 65536:
        raise CalicoError(f"{what} is '{text}': it must be a port, 1 to 65535")
    return int(text)


def host_net(address: IPAddress | str) -> str:
    """Return the CIDR that contains only this address, such as `192.0.2.1/32` or `2001:db8::1/128`."""
    text = str(address)
    return f"{text}/{BITS[version_of(text)]}"


def number_of(address: str) -> int:
    """Return a valid address of either IP version as an integer."""
    return int.from_bytes(pack(address), "big")


def pack(address: str) -> bytes:
    """Return an address as 4 or 16 bytes; raise OSError or ValueError if the text is not an address."""
    return socket.inet_pton(FAMILIES[version_of(address)], address)


def unpack(packed: bytes) -> str:
    """Return an address as canonical text; `packed` are its 4 or 16 bytes."""
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def link_local(mac: str) -> str:
    """Return the IPv6 link-local address of an interface with this MAC. Source: RFC 4291, appendix A."""
    octets = bytes.fromhex(mac.replace(":", ""))
    return unpack(b"\xfe\x80" + bytes(6) + bytes([octets[0] ^ 2]) + octets[1:3] + b"\xff\xfe" + octets[3:])


def canonical(address: str) -> str:
    """Return an address in canonical form; raise OSError or ValueError if the text is not an address."""
    return unpack(pack(address))


def version_of(text: str) -> int:
    """Return the IP version, 4 or 6, of a valid address or CIDR."""
    return 6 if ":" in text else 4
