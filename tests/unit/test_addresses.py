"""Addresses, CIDRs and AS numbers that users type."""

from __future__ import annotations

import pytest

from calicoctl.addresses import parse_address, parse_cidr
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
