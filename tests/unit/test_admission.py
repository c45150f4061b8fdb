"""Which addresses endpoints of this host are refused, and which they keep, whoever writes to the store."""

from __future__ import annotations

import pytest

from calicoctl.datastore.reserved import HostNetwork, InterfaceAddress, Networks, Servers
from calicoctl.datastore.store import Entry
from calicoctl.desired import admission
from calicoctl.desired.admission import pool_of_key
from calicoctl.desired.snapshot import Snapshot
from tests.unit.snapshots import HOST, Store, endpoint_id

A, B, A6 = "192.168.0.1", "192.168.0.2", "fd80::1"
POOL, POOL6 = "/calico/v1/ipam/v4/pool/192.168.0.0-16", "/calico/v1/ipam/v6/pool/fd80::-64"
NO_POOL = "its address {} is in no pool"


class Admitted(Store):
    """A snapshot with two pools."""

    def __init__(self) -> None:
        super().__init__(Snapshot(HOST))
        self.put(POOL, {"cidr": "192.168.0.0/16"})
        self.put(POOL6, {"cidr": "fd80::/64"})

    def programmed(self, number: int = 1) -> tuple[tuple[str, ...], str | None, str | None]:
        """Take what has changed, as the agent does; return an endpoint's addresses, conflict and warning."""
        self.snapshot.take_dirty()
        endpoint = self.snapshot.local[endpoint_id(number)]
        return endpoint.addresses, endpoint.conflict, endpoint.warning

    def listed(self, number: int = 1, host: str = HOST) -> tuple[str, ...]:
        """Return the addresses that an endpoint contributes to tags."""
        return self.snapshot.admission.addresses_of(self.snapshot.endpoints[endpoint_id(number, host)])

    def need(self, *members: str, dns: tuple[str, ...] = ()) -> None:
        self.snapshot.set_network(HostNetwork().with_servers(Servers(frozenset(members), frozenset(dns))))


@pytest.fixture
def store() -> Admitted:
    return Admitted()


def test_an_address_in_no_pool_is_refused_until_it_is_in_one(store: Admitted) -> None:
    store.endpoint(1, A, "10.0.0.1", "fd99::1")
    assert store.programmed() == ((A,), "its address 10.0.0.1 is in no pool; its address fd99::1 is in no pool", None)
    assert store.listed() == (A,), "no tag, and no check of senders, has them either"
    store.put("/calico/v1/ipam/v4/pool/10.0.0.0-8", {"cidr": "10.0.0.0/8"})
    assert endpoint_id(1) in store.snapshot.dirty.endpoints
    assert store.programmed() == ((A, "10.0.0.1"), NO_POOL.format("fd99::1"), None)


@pytest.mark.parametrize("value", [None, "{", {"cidr": "10.0.0.0/8"}])
def test_a_pool_that_goes_cuts_nobody_off_but_is_missed(store: Admitted, value: object) -> None:
    store.put("/calico/v1/ipam/v4/pool/mine", {"cidr": "172.16.0.0/12"})
    store.endpoint(1, "172.16.0.1")
    store.programmed()
    store.put("/calico/v1/ipam/v4/pool/mine", value)
    kept = (("172.16.0.1",), None, "its address 172.16.0.1 is in no pool, but stays")
    assert store.programmed() == kept
    store.endpoint(2, "172.16.0.2")
    assert store.programmed(2) == ((), NO_POOL.format("172.16.0.2"), None), "which is new"
    # while its container is stopped, too, but not once its record has been without it
    store.endpoint(1, "172.16.0.1", state="inactive")
    store.snapshot.take_dirty()
    store.endpoint(1, "172.16.0.1")
    assert store.programmed() == kept
    store.endpoint(1, A)
    store.endpoint(1, "172.16.0.1")
    assert store.programmed() == ((), NO_POOL.format("172.16.0.1"), None)


def test_a_pool_whose_value_cannot_be_read_is_known_by_its_key(store: Admitted) -> None:
    store.put(POOL, "{")
    store.endpoint(1, A)
    assert store.programmed() == ((A,), None, None)
    assert pool_of_key(POOL) == "192.168.0.0/16" and pool_of_key(POOL6) == "fd80::/64"
    assert pool_of_key("/calico/v1/ipam/v4/pool/mine") is None


def test_what_the_kernel_routes_at_the_start_is_kept_if_a_record_lists_it(store: Admitted) -> None:
    store.snapshot.admission.adopt([("cali1", "10.0.0.1"), ("cali2", "10.0.0.2")])
    record = store.endpoint_change(1, "10.0.0.1").entry
    assert record is not None
    store.snapshot.replace("/calico/v1", [record])
    assert store.programmed() == (("10.0.0.1",), None, "its address 10.0.0.1 is in no pool, but stays")
    store.endpoint(2, "10.0.0.2")
    assert store.programmed(2)[0] == (), "no record had listed it, so the agent has removed its route"


def test_what_the_host_needs_is_refused_also_later(store: Admitted) -> None:
    store.endpoint(1, A, B, A6)
    store.programmed()
    store.need(A, A6)
    why = "its address {} is a member of the etcd that this host uses"
    assert store.programmed() == ((B,), f"{why.format(A)}; {why.format(A6)}", None) and store.listed() == (B,)
    store.put("/calico/bgp/v1/host/host2/ip_addr_v4", B)
    assert store.programmed()[0] == () and "that of host host2" in str(store.programmed()[1])
    gateway = HostNetwork.of([InterfaceAddress("10.0.0.1", "10.0.0.1", 24, "eth0")], [(A, "eth0")])
    store.snapshot.set_network(gateway)
    assert store.programmed()[0] == (A6,) and "a gateway of this host" in str(store.programmed()[1])


def test_a_dns_server_is_refused_unless_the_endpoint_was_there_before(store: Admitted) -> None:
    store.endpoint(1, A)
    store.programmed()
    store.need(dns=(A, B))
    assert store.programmed()[:2] == ((A,), None) and "a DNS server" in str(store.programmed()[2])
    store.endpoint(2, B)
    assert store.programmed(2)[0] == () and "a DNS server of this host" in str(store.programmed(2)[1])
    assert store.snapshot.admission.exceptions() == {("cali1", A)}, "which outlives a reboot"
    store.put(POOL, None)
    assert store.programmed()[0] == (), "one in no pool is hardly a workload"


def test_addresses_of_other_hosts_endpoints_are_judged_there(store: Admitted) -> None:
    store.need(A)
    store.endpoint(1, A, "10.0.0.1", host="host2")
    assert store.listed(1, "host2") == (A, "10.0.0.1")


def test_servers_that_may_be_no_workloads_are_spared(store: Admitted) -> None:
    store.need(dns=("192.168.0.53",))
    for ip in ("10.0.0.9", "192.168.0.9"):
        store.put(f"/calico/bgp/v1/global/peer_v4/{ip}", {"ip": ip, "as_num": "64512"})
    assert store.snapshot.admission.spared() == {"192.168.0.53", "10.0.0.9"}


def test_many_pools_are_looked_up_as_one(store: Admitted, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setattr(admission, "Networks", lambda networks: (built.append(1), Networks(networks))[1])
    store.endpoint(1, A, "10.0.7.1")
    cidrs = [f"10.0.{number}.0/24" for number in range(200)]
    entries = [
        Entry(f"/calico/v1/ipam/v4/pool/{cidr.replace('/', '-')}", f'{{"cidr": "{cidr}"}}', 9, 9) for cidr in cidrs
    ]
    store.snapshot.replace("/calico/v1/ipam/v4", entries)
    assert store.snapshot.local[endpoint_id(1)].addresses == ("10.0.7.1",) and len(built) <= 2
