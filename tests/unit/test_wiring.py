"""The ids of new endpoints, and what users may request: addresses and interface names."""

from __future__ import annotations

import uuid

import pytest
from netaddr import IPAddress

from calicoctl.datastore.blocks import Owner
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.handles import KnownHandle
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Pool
from calicoctl.datastore.reserved import Reserved
from calicoctl.errors import CalicoError
from calicoctl.workloads.addressing import AddressRequest, check_interface_name, owner_of
from calicoctl.workloads.wiring import _adopt, _new_endpoint
from calicoctl.workloads.workload import Workload
from tests.unit.memory_store import MemoryStore


def test_interfaces_of_endpoints_made_at_the_same_time_have_different_names() -> None:
    ids = [_new_endpoint() for _ in range(500)]
    assert {uuid.UUID(id).version for id in ids} == {1}
    names = [EndpointId("host1", "docker", "w", id).interface for id in ids]
    assert len(set(names)) == 500
    assert len({name[len("cali")] for name in names}) == 16, "the time would be much the same"


class Session:
    """As much of a WorkloadSession as choosing addresses needs, of a container that holds addresses of its handle."""

    def __init__(self) -> None:
        self.datastore = DatastoreClient(MemoryStore(), "vm")
        self.workload = Workload("docker", "1" * 64, "web", docker_name="web")
        self.held: dict[IPAddress, Owner] = {}
        self.handle: KnownHandle | None = None

    def hold(self, address: str, endpoint: str, interface: str = "eth1") -> None:
        owner = owner_of(self.workload, EndpointId("vm", "docker", self.workload.id, endpoint), interface)
        self.datastore.ipam.assign(IPAddress(address), owner)
        self.held[IPAddress(address)] = owner


@pytest.mark.parametrize(
    ("wanted", "adopted"),
    [
        (["ipv4"], {0: "10.0.0.1"}),
        (["10.0.0.3", "ipv4"], {1: "10.0.0.1", 0: "10.0.0.3"}),
        (["ipv6"], {}),
        (["ipv6", "10.0.0.0/24", "ipv4"], {1: "10.0.0.1", 2: "10.0.0.3"}),
    ],
)
def test_addresses_of_an_interrupted_change_are_adopted_for_one_endpoint(
    wanted: list[str], adopted: dict[int, str]
) -> None:
    """The address of another endpoint, and one for another name of the interface, are released, as all others are."""
    session, one = Session(), "1" * 32
    session.hold("10.0.0.1", one)
    session.hold("10.0.0.2", "2" * 32)
    session.hold("10.0.0.3", one)
    session.hold("10.0.0.4", one, "eth0")
    requests = [AddressRequest.parse(text) for text in wanted]
    found, id = _adopt(session, requests, "eth1", [Reserved()] * len(requests))  # type: ignore[arg-type]
    assert {number: str(address) for number, address in found.items()} == adopted
    assert (id.endpoint == one) == bool(adopted)
    held = session.datastore.ipam.held_by(session.workload.handle) or {}
    assert {str(address) for address in held} == set(adopted.values())


def test_address_requests() -> None:
    assert AddressRequest.parse("ipv4") == AddressRequest(4)
    assert AddressRequest.parse("IPv6") == AddressRequest(6)
    assert AddressRequest.parse("10.0.0.0/8") == AddressRequest(4, cidr="10.0.0.0/8")
    assert str(AddressRequest.parse("fd00:0::1").address) == "fd00::1"
    with pytest.raises(CalicoError, match="'ipv5' is not a valid IP address"):
        AddressRequest.parse("ipv5")


def test_a_subnet_is_a_pool_or_a_part_of_one() -> None:
    datastore = DatastoreClient(MemoryStore(), "vm")
    datastore.put_pool(Pool("10.0.0.0/16", vxlan="always"))
    for subnet in ("10.0.0.0/16", "10.0.7.0/24"):
        (pool,) = AddressRequest(4, subnet=subnet).pools(datastore)
        assert (pool.cidr, pool.vxlan) == (subnet, "always")
    for subnet in ("10.1.0.0/16", "10.0.0.0/8"):
        with pytest.raises(CalicoError, match=f"{subnet} is neither a pool nor a part of one. IPv4 pools: 10.0.0.0/16"):
            AddressRequest(4, subnet=subnet).pools(datastore)


def test_names_of_interfaces() -> None:
    check_interface_name("eth1")
    check_interface_name("x" * 15)
    for bad in ("", "x" * 16, "a/b", "a b", "a\tb", ".", "..", "eth%d", "a:b", "é" * 8, "a\x00"):
        with pytest.raises(CalicoError, match="interface name"):
            check_interface_name(bad)
