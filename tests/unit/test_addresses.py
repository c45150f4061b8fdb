"""Addresses, CIDRs and AS numbers that users type."""

from __future__ import annotations

import pytest

from calicoctl.addresses import canonical, check_unicast, is_unicast, pack, parse_address, parse_cidr
from calicoctl.commands.node import parse_as_number
from calicoctl.errors import CalicoError


@pytest.mark.parametrize("text", ["", "1.2", "1", "0x7f.1.1.1", "192.168.0.256", "192.168.0.1 ", "::g", "fe80::1%eth0"])
def test_invalid_addresses(text: str) -> None:
    with pytest.raises(CalicoError):
        parse_address(text)


@pytest.mark.parametrize(
    "text", ["10/8", "10.0.0.0/", "10.0.0.0/+8", "10.0.0.0/33", "10.0.0.0/255.0.0.0", "fd00::/129"]
)
def test_invalid_cidrs(text: str) -> None:
    with pytest.raises(CalicoError):
        parse_cidr(text)


def test_as_numbers_in_both_notations() -> None:
    assert [parse_as_number(text) for text in ("64511", "1.10", "0.5", "65535.65535")] == [
        "64511",
        "65546",
        "5",
        "4294967295",
    ]
    for bad in ("0", "4294967296", "65536.1", "1.65536", "x", "-1", "1.2.3", ""):
        with pytest.raises(CalicoError, match="AS number"):
            parse_as_number(bad)


@pytest.mark.parametrize(
    ("text", "usable"),
    [
        *((text, False) for text in ("0.1.2.3", "127.255.255.255", "169.254.0.0", "169.254.255.255", "224.0.0.1")),
        *((text, False) for text in ("240.0.0.1", "255.255.255.255", "::", "::1", "::1.2.3.4", "::ffff:10.0.0.1")),
        *((text, False) for text in ("fe80::1", "febf::1", "ff02::1", "ffff::")),
        *((text, True) for text in ("1.0.0.0", "126.1.1.1", "128.0.0.1", "169.253.255.255", "169.255.0.0")),
        *((text, True) for text in ("223.255.255.255", "0:0:0:0:0:1::", "64:ff9b::1", "fd00::1", "fec0::1", "feff::1")),
    ],
)
def test_commands_and_the_agent_refuse_the_same_addresses(text: str, usable: bool) -> None:
    assert is_unicast(pack(canonical(text))) == usable
    if usable:
        check_unicast(parse_address(text))
    else:
        with pytest.raises(CalicoError, match="not for hosts and workloads"):
            check_unicast(parse_address(text))


@pytest.mark.parametrize("cidr", ["169.254.128.0/26", "168.0.0.0/7", "::/0", "fe80::/64"])
def test_a_network_that_overlaps_unusable_addresses_is_refused(cidr: str) -> None:
    with pytest.raises(CalicoError, match="not for hosts and workloads"):
        check_unicast(parse_cidr(cidr))
