"""Routes follow endpoints and interfaces; statuses say what became of them; what belongs to no endpoint is removed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from calicoctl import state
from calicoctl.datastore.keys import EndpointId
from calicoctl.desired.snapshot import INACTIVE
from calicoctl.felix import kept_addresses
from calicoctl.felix.dataplane.endpoint_manager import EndpointManager
from calicoctl.felix.dataplane.manager import PendingAddresses
from calicoctl.felix.events import KernelEventsLost, LinkChanged, PolicyFailed, RouteLost, Tick
from tests.unit.kernel import FakeRoutes
from tests.unit.snapshots import World, endpoint_id

A, B, A6 = "192.168.0.1", "192.168.0.2", "fd00::1"


class EndpointWorld(World):
    """One endpoint, with its interface and route, after the first update."""

    def __init__(self) -> None:
        super().__init__()
        self.routes = FakeRoutes([])
        self.checked: list[EndpointId] = []
        self.manager = EndpointManager(self.context, self.routes, self.checked.append)  # type: ignore[arg-type]
        self.store.profile("web")
        self.store.endpoint(1, A)
        self.link = self.routes.add_link("cali1", 11)
        self.manager.resync()
        self.apply()
        self.health.first_update = True

    def apply(self) -> None:
        self.manager.on_event(self.snapshot.take_dirty())
        if self.manager.needs_apply:
            self.manager.apply()
        self.context.statuses.publish()

    def tick(self) -> None:
        self.manager.on_event(Tick())
        self.apply()


@pytest.fixture
def world() -> EndpointWorld:
    return EndpointWorld()


def test_an_endpoint_gets_its_routes_and_is_up(world: EndpointWorld) -> None:
    assert world.routes.routes == {11: (A,)} and world.status(1) == ("up", None)
    assert not world.manager.needs_apply
    world.store.endpoint(1, A, B)
    world.apply()
    assert world.routes.routes == {11: (A, B)}


def test_pending_addresses_keep_an_endpoint_from_being_programmed(world: EndpointWorld) -> None:
    world.store.endpoint(1, A, B)
    world.context.pending[endpoint_id(1)] = PendingAddresses({B}, 1)
    world.apply()
    assert world.routes.routes == {11: (A,)}


def test_a_missing_interface_is_reported_and_its_workload_checked(world: EndpointWorld) -> None:
    world.manager.on_event(LinkChanged(world.link, deleted=True))
    world.apply()
    assert world.status(1) == ("down", "there is no interface cali1") and world.checked == [endpoint_id(1)]
    world.manager.on_event(LinkChanged(replace(world.link, index=12)))
    world.apply()
    assert world.status(1) == ("up", None) and world.routes.routes == {12: (A,)}


def test_an_interface_that_is_down_gets_no_routes(world: EndpointWorld) -> None:
    world.manager.on_event(LinkChanged(replace(world.link, up=False)))
    world.apply()
    assert world.status(1) == ("down", "the interface cali1 is down") and not world.routes.routes
    world.manager.on_event(LinkChanged(world.link))
    world.apply()
    assert world.status(1) == ("up", None) and world.routes.routes == {11: (A,)}


def test_proxy_entries_are_added_again_after_an_interface_had_no_carrier(world: EndpointWorld) -> None:
    """The kernel drops them then, and keeps the other neighbour entries."""
    world.routes.next_hops[11] = "2001:db8::2"
    world.manager.on_event(LinkChanged(replace(world.link, carrier=False)))
    world.apply()
    assert 11 in world.routes.next_hops
    world.manager.on_event(LinkChanged(world.link))
    assert 11 not in world.routes.next_hops and world.routes.routes == {11: (A,)}
    world.apply()
    assert 11 in world.routes.next_hops


def test_an_event_of_an_interface_as_it_is_changes_nothing(world: EndpointWorld) -> None:
    world.manager.on_event(LinkChanged(world.link))
    assert not world.manager.needs_apply


def test_other_interfaces_do_not_matter(world: EndpointWorld) -> None:
    world.manager.on_event(LinkChanged(replace(world.link, name="eth0", index=2)))
    assert not world.manager.needs_apply
    world.tick()
    world.tick()
    assert world.health.unknown_interfaces == []


def test_a_renamed_interface_loses_its_routes(world: EndpointWorld) -> None:
    world.manager.on_event(LinkChanged(replace(world.link, name="eth7")))
    world.apply()
    assert world.status(1) == ("down", "there is no interface cali1") and not world.routes.routes


def test_a_new_mac_is_followed_by_a_check_of_the_workload(world: EndpointWorld) -> None:
    """Its neighbour entry of the next hop has the old one."""
    world.manager.on_event(LinkChanged(replace(world.link, mac="02:00:00:00:00:99")))
    assert not world.routes.indices(), "the kernel has removed the neighbour entries"
    world.apply()
    assert world.checked == [endpoint_id(1)] and world.routes.routes == {11: (A,)}


def test_a_route_that_another_process_removes_is_restored(world: EndpointWorld) -> None:
    world.manager.on_event(RouteLost("192.168.0.99"))
    assert not world.manager.needs_apply
    world.manager.on_event(RouteLost(A))
    assert not world.routes.indices()
    world.apply()
    assert world.routes.routes == {11: (A,)}


def test_what_fails_is_an_error_and_is_retried_at_the_tick(world: EndpointWorld) -> None:
    world.routes.refuses = {B}
    world.store.endpoint(1, B)
    world.apply()
    assert world.status(1) == ("error", "the kernel refused to add a route") and not world.manager.needs_apply
    world.routes.refuses = set()
    world.tick()
    assert world.status(1) == ("up", None) and world.routes.routes == {11: (B,)}
    world.manager.on_event(Tick())
    assert not world.manager.needs_apply, "nothing is left to retry"


def test_an_endpoint_that_is_removed_loses_its_routes_and_its_status(world: EndpointWorld) -> None:
    world.store.endpoint(1)
    world.apply()
    assert world.status(1) is None and world.removed == [endpoint_id(1)] and not world.routes.routes
    assert world.reported[-1] == {endpoint_id(1): None}


def test_routes_that_cannot_be_removed_are_retried_at_the_tick(world: EndpointWorld) -> None:
    world.routes.refuses = {A}
    world.store.endpoint(1)
    world.apply()
    assert world.routes.routes == {11: (A,)} and world.health.last_error
    world.routes.refuses = set()
    world.tick()
    assert not world.routes.routes


def test_routes_of_unowned_interfaces_are_collected_at_a_resync(world: EndpointWorld) -> None:
    world.routes.routes[99] = (B,)
    world.manager.resync()
    world.apply()
    assert world.routes.routes == {11: (A,)}


def test_links_are_listed_again_only_when_events_of_them_were_lost(world: EndpointWorld) -> None:
    world.manager.resync()
    assert world.routes.listings == 1 and world.routes.journal.count("read routes") == 2
    world.routes.add_link("cali1", 12)
    world.manager.on_event(KernelEventsLost())
    world.manager.resync()
    world.apply()
    assert world.routes.listings == 2 and world.routes.routes == {12: (A,)} and not world.checked
    world.routes.add_link("cali1", 12, mac="02:00:00:00:00:99")
    world.manager.on_event(KernelEventsLost())
    world.manager.resync()
    assert world.checked == [endpoint_id(1)], "the MAC has changed"


def test_a_failed_policy_is_an_error_of_every_endpoint_which_is_applied_again(world: EndpointWorld) -> None:
    world.manager.on_event(PolicyFailed("no nftables"))
    assert world.status(1) == ("error", "no nftables")
    world.apply()
    assert world.status(1) == ("up", None)


def test_an_inactive_endpoint_is_down_and_a_bad_record_an_error(world: EndpointWorld) -> None:
    world.store.endpoint(1, A, state="inactive")
    world.store.endpoint(2, B, mac="nonsense")
    world.apply()
    status = world.status(2)
    assert world.status(1) == ("down", INACTIVE) and status is not None and status[0] == "error"
    assert not world.routes.routes


def test_the_status_names_a_profile_that_cannot_be_read(world: EndpointWorld) -> None:
    world.store.put("/calico/v1/policy/profile/web/rules", "nonsense")
    world.apply()
    assert world.status(1) == ("up", "profile web does not exist or cannot be read, and denies")
    world.store.profile("web")
    world.apply()
    assert world.status(1) == ("up", None)


def test_the_next_hop_of_ipv6_is_the_hosts_address(world: EndpointWorld) -> None:
    world.store.endpoint(1, A6)
    world.apply()
    assert world.routes.next_hops == {11: None}
    world.store.put("/calico/bgp/v1/host/host1/ip_addr_v6", "2001:db8::2")
    world.apply()
    assert world.routes.next_hops == {11: "2001:db8::2"}


def test_a_record_without_its_containers_name_has_the_workload_checked(world: EndpointWorld) -> None:
    world.store.endpoint(1, A, workload_name=None)
    world.store.endpoint(2, B, workload_name=None, host="elsewhere")
    world.apply()
    assert world.checked == [endpoint_id(1)]


def test_unknown_interfaces_are_reported_at_the_second_tick(world: EndpointWorld) -> None:
    """A command makes the interface first, and writes the record later."""
    world.manager.on_event(LinkChanged(world.routes.add_link("cali9", 19)))
    world.tick()
    assert world.health.unknown_interfaces == []
    world.tick()
    assert world.health.unknown_interfaces == ["cali9"]
    world.store.endpoint(9, B, state="nonsense")
    world.tick()
    assert world.health.unknown_interfaces == [], "its record is refused, but there"
    world.store.endpoint(9, B)
    world.tick()
    assert world.health.unknown_interfaces == []


def test_unknown_interfaces_are_reported_at_once_at_the_start() -> None:
    world = World()
    routes = FakeRoutes([])
    routes.add_link("cali9", 19)
    manager = EndpointManager(world.context, routes, lambda id: None)  # type: ignore[arg-type]
    manager.resync()
    manager.apply()
    assert world.health.unknown_interfaces == ["cali9"]


def test_nothing_that_is_kept_is_cut_however_much_it_is() -> None:
    kept = sorted((f"calix{n // 256:04}abc", f"192.168.{64 + n // 256}.{n % 256}") for n in range(130 * 256))
    kept_addresses.write("vm", kept)
    assert state.path("vm", "kept").stat().st_size > 2**20
    assert kept_addresses.read("vm") == kept


def test_what_a_removed_pool_contained_outlives_a_reboot(world: EndpointWorld) -> None:
    host = world.snapshot.host
    assert kept_addresses.read(host) == []
    world.store.endpoint(2, B, state="inactive")
    world.apply()
    world.snapshot.admission.set_pool("0.0.0.0/0", None)  # the one that every address is in
    world.store.put("/calico/v1/ipam/v4/pool/10.9.0.0-16", {"cidr": "10.9.0.0/16"})
    world.apply()
    assert kept_addresses.read(host) == [("cali1", A), ("cali2", B)]
    again = World()
    again.snapshot.admission.set_pool("0.0.0.0/0", None)
    routes = FakeRoutes([])
    manager = EndpointManager(again.context, routes, lambda id: None)  # type: ignore[arg-type]
    manager.resync()
    assert again.snapshot.admission.exceptions() == {("cali1", A), ("cali2", B)}
    world.store.endpoint(2)
    world.apply()
    assert kept_addresses.read(host) == [("cali1", A)], "no record lists the other any more"
    world.store.put("/calico/v1/ipam/v4/pool/192.168.0.0-16", {"cidr": "192.168.0.0/16"})
    world.apply()
    assert kept_addresses.read(host) == []
