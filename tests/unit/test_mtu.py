"""The MTU of workloads' interfaces."""

from __future__ import annotations

import pytest

from calicoctl.datastore import keys
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.model import ALWAYS, CROSS_SUBNET, NEVER, Pool
from calicoctl.workloads import mtu
from calicoctl.workloads.mtu import Underlay, in_overlay, of_addresses, of_interface
from tests.unit.memory_store import MemoryStore

PLAIN, OVERLAY, PLAIN6, OVERLAY6 = (
    Pool("10.1.0.0/16"),
    Pool("10.2.0.0/16", vxlan=CROSS_SUBNET),
    Pool("fd01::/64"),
    Pool("fd02::/64", vxlan=ALWAYS),
)
MTUS = {"192.0.2.2": 9000, "2001:db8::2": 1500}


@pytest.mark.parametrize(
    ("modes", "underlays", "expected"),
    [
        ([(4, NEVER)], {4: 1500}, 1500),
        ([(4, NEVER)], {4: 9000, 6: 1500}, 9000),
        ([(4, ALWAYS)], {4: 1500}, 1450),
        ([(4, CROSS_SUBNET)], {4: 9000, 6: 1500}, 8950),
        ([(6, ALWAYS)], {4: 1500, 6: 9000}, 1450),
        ([(6, ALWAYS)], {6: 1500}, 1430),
        ([(4, ALWAYS)], {6: 1500}, 1430),
        ([(4, NEVER), (6, ALWAYS)], {4: 1500, 6: 1500}, 1450),
        ([(4, NEVER), (6, NEVER)], {4: 9000, 6: 1500}, 1500),
        ([(4, ALWAYS)], {4: 1300}, 1280),
        ([(4, NEVER)], {}, 1500),
        ([], {4: 1400}, 1400),
    ],
)
def test_the_mtu_fits_all_addresses(modes: list[tuple[int, str]], underlays: dict[int, int], expected: int) -> None:
    assert of_addresses(modes, underlays) == expected


def test_inside_a_tunnel() -> None:
    assert (in_overlay(1500, 4), in_overlay(1500, 6), in_overlay(1300, 6)) == (1450, 1430, 1280)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """A store without settings, on a host with both IP versions."""
    monkeypatch.setattr(mtu, "underlay", lambda address: Underlay(2, True, MTUS[address]))
    store = MemoryStore()
    store.create(keys.bgp_host_address("host1", 4), "192.0.2.2")
    return store


@pytest.mark.parametrize(
    ("addresses", "next_hops", "expected"),
    [
        (["10.1.0.1"], {4: "192.0.2.2"}, 9000),
        (["10.2.0.1"], {4: "192.0.2.2"}, 8950),
        (["fd01::1"], {6: "2001:db8::2"}, 1500),
        (["fd02::1"], {6: "2001:db8::2"}, 8950),
        (["10.1.0.1", "fd01::1"], {4: "192.0.2.2", 6: "2001:db8::2"}, 1500),
        (["10.9.0.1"], {4: "192.0.2.2"}, 9000),
    ],
)
def test_the_mtu_of_a_new_interface(
    store: MemoryStore, addresses: list[str], next_hops: dict[int, str], expected: int
) -> None:
    datastore = DatastoreClient(store, "host1")
    pools = [PLAIN, OVERLAY, PLAIN6, OVERLAY6]
    assert of_interface(datastore, addresses, pools, next_hops, mtu.configured(datastore)) == expected
    store.create(keys.config("MTU"), "900")
    assert of_interface(datastore, addresses, pools, next_hops, mtu.configured(datastore)) == expected, (
        "that is no valid value"
    )
    DatastoreClient(store, "host1").unset(keys.config("MTU"))
    store.create(keys.config("MTU"), "1400")
    assert of_interface(datastore, addresses, pools, next_hops, mtu.configured(datastore)) == 1400


def test_a_host_with_ipv6_alone_has_the_longer_header(store: MemoryStore) -> None:
    datastore = DatastoreClient(store, "host2")
    assert of_interface(datastore, ["fd02::1"], [OVERLAY6], {6: "2001:db8::2"}, None) == 1430
