"""The ids of new endpoints, and what users may request: addresses and interface names."""

from __future__ import annotations

import uuid

import pytest

from calicoctl.datastore.keys import EndpointId
from calicoctl.errors import CalicoError
from calicoctl.workloads.wiring import AddressRequest, _new_endpoint, check_interface_name


def test_interfaces_of_endpoints_made_at_the_same_time_have_different_names() -> None:
    ids = [_new_endpoint() for _ in range(500)]
    assert {uuid.UUID(id).version for id in ids} == {1}
    names = [EndpointId("host1", "docker", "w", id).interface for id in ids]
    assert len(set(names)) == 500
    assert len({name[len("cali")] for name in names}) == 16, "the time would be much the same"


def test_address_requests() -> None:
    assert AddressRequest.parse("ipv4") == AddressRequest(4)
    assert AddressRequest.parse("IPv6") == AddressRequest(6)
    assert AddressRequest.parse("10.0.0.0/8") == AddressRequest(4, cidr="10.0.0.0/8")
    assert str(AddressRequest.parse("fd00:0::1").address) == "fd00::1"
    with pytest.raises(CalicoError, match="'ipv5' is not a valid IP address"):
        AddressRequest.parse("ipv5")


def test_names_of_interfaces() -> None:
    check_interface_name("eth1")
    check_interface_name("x" * 15)
    for bad in ("", "x" * 16, "a/b", "a b", "a\tb", ".", "..", "eth%d", "a:b", "é" * 8, "a\x00"):
        with pytest.raises(CalicoError, match="interface name"):
            check_interface_name(bad)
