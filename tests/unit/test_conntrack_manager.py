"""Connections that a change denies are ended, and an address is pending while it may have connections of another's."""

from __future__ import annotations

import pytest

from calicoctl.felix.dataplane.conntrack import Connection
from calicoctl.felix.dataplane.conntrack_manager import ConntrackManager, allowed
from calicoctl.felix.dataplane.policy_manager import PolicyManager
from calicoctl.felix.events import Tick
from calicoctl.policy.verdict import Packet, either_party
from tests.unit.kernel import FakeConntrack, FakeNft
from tests.unit.snapshots import World, endpoint_id

A, B, C, OUTSIDE = "192.168.0.1", "192.168.0.2", "192.168.0.3", "198.51.100.1"
ALLOW = {"action": "allow"}


def connection(source: str, destination: str) -> Connection:
    return Connection(Packet(source, destination, 6, 4000, 80), b"")


class ConnectionWorld(World):
    """One endpoint, that may be reached, after the first update. A round is what the agent does, without routes."""

    def __init__(self) -> None:
        super().__init__()
        self.journal: list[str] = []
        self.nft = FakeNft(self.journal)
        self.conntrack = FakeConntrack(self.journal)
        self.policy = PolicyManager(self.context, self.nft)  # type: ignore[arg-type]
        self.manager = ConntrackManager(self.context, self.policy, self.conntrack)  # type: ignore[arg-type]
        self.store.profile("web", ALLOW)
        self.store.endpoint(1, A)
        self.round()
        self.manager.verify_now()
        self.health.first_update = True
        self.conntrack.requests.clear()
        self.journal.clear()

    def round(self) -> set[str]:
        """Defer, and apply policy and connections; return the workloads of the endpoints that were dirty."""
        dirty = self.snapshot.take_dirty()
        self.manager.defer_new_addresses(dirty)
        self.policy.on_event(dirty)
        if self.policy.needs_apply:
            self.policy.apply()
            if self.policy.in_sync:
                self.manager.mark_unverified()
                if self.health.first_update:
                    self.manager.apply()
        return {id.workload for id in dirty.endpoints}

    def verify(self) -> None:
        self.manager.on_event(self.conntrack.answer())
        assert self.manager.verify_listings() and not self.manager.verify_listings()


@pytest.fixture
def world() -> ConnectionWorld:
    return ConnectionWorld()


def test_what_a_change_denies_is_ended_and_then_the_fast_path_restored(world: ConnectionWorld) -> None:
    world.conntrack.connections = [connection(OUTSIDE, A), connection(A, OUTSIDE), connection(OUTSIDE, "192.0.2.2")]
    assert world.nft.has_fast_path()
    world.store.profile("web")  # nothing may come in any more
    world.round()
    assert not world.nft.has_fast_path() and len(world.conntrack.connections) == 3
    world.verify()
    assert world.journal[:1] == ["nft"] and world.journal[-3:] == ["list", f"end {OUTSIDE}", "nft"]
    assert connection(OUTSIDE, A) not in world.conntrack.connections and len(world.conntrack.connections) == 2
    assert world.nft.has_fast_path()


def test_a_listing_that_was_requested_before_the_last_change_restores_nothing(world: ConnectionWorld) -> None:
    world.store.profile("web")
    world.round()
    early = world.conntrack.answer()
    world.store.profile("web", {"action": "deny"})
    world.round()
    world.manager.on_event(early)
    world.manager.verify_listings()
    assert not world.nft.has_fast_path()
    world.verify()
    assert world.nft.has_fast_path()


def test_what_cannot_be_listed_is_retried_at_the_tick(world: ConnectionWorld) -> None:
    world.conntrack.connections = [connection(OUTSIDE, A)]
    world.store.profile("web")
    world.round()
    world.conntrack.error = "no memory"
    world.verify()
    assert world.conntrack.connections and not world.nft.has_fast_path()
    assert world.health.last_error is not None and world.health.last_error["error"] == "no memory"
    world.conntrack.error = None
    world.manager.on_event(Tick())
    world.verify()
    assert not world.conntrack.connections and world.nft.has_fast_path()
    world.manager.on_event(Tick())
    assert not world.conntrack.requests, "nothing is left to retry"


def test_a_new_endpoint_is_pending_until_its_address_has_been_verified(world: ConnectionWorld) -> None:
    """The address was another workload's, which has left a connection that the new endpoint's policy denies."""
    world.conntrack.connections = [connection(OUTSIDE, B)]
    world.store.profile("closed")
    world.store.endpoint(2, B, profile_ids=["closed"])
    assert world.round() == set() and world.context.pending[endpoint_id(2)].addresses == {B}
    assert B not in str(world.nft.objects)
    world.verify()
    assert not world.conntrack.connections and not world.context.pending
    assert world.round() == {"w2"} and B in str(world.nft.set("senders4"))
    assert world.round() == set()
    assert world.journal.index(f"end {OUTSIDE}") < len(world.journal) - 1 - world.journal[::-1].index("nft")


def test_of_an_endpoint_with_a_new_address_everything_else_is_applied(world: ConnectionWorld) -> None:
    world.store.endpoint(1, A, B, profile_ids=["closed"])
    assert world.round() == {"w1"}
    assert world.nft.set("from") == ['"cali1" : goto from/closed'] and B not in str(world.nft.set("senders4"))
    world.verify()
    assert world.round() == {"w1"} and B in str(world.nft.set("senders4"))


def test_an_address_that_cannot_be_verified_stays_pending_with_an_error(world: ConnectionWorld) -> None:
    world.store.endpoint(2, B)
    world.round()
    world.conntrack.error = "no memory"
    world.verify()
    assert world.status(2) == ("error", "no memory") and endpoint_id(2) in world.context.pending
    assert world.round() == set()
    world.conntrack.error = None
    world.manager.on_event(Tick())
    world.verify()
    assert world.round() == {"w2"} and not world.context.pending


def test_a_pending_endpoint_that_changes_again_waits_for_a_new_listing(world: ConnectionWorld) -> None:
    world.store.endpoint(2, B)
    world.round()
    early = world.conntrack.answer()
    world.store.endpoint(2, B, C)
    world.round()
    world.manager.on_event(early)
    world.manager.verify_listings()
    assert world.context.pending[endpoint_id(2)].addresses == {B, C}
    world.verify()
    assert not world.context.pending


def test_an_endpoint_that_gets_one_more_address_when_it_is_admitted_is_pending_again(world: ConnectionWorld) -> None:
    world.store.endpoint(2, B)
    world.round()
    world.verify()
    world.store.endpoint(2, B, C)
    assert world.round() == set() and world.context.pending[endpoint_id(2)].addresses == {B, C}
    assert B not in str(world.nft.objects)


def test_a_pending_endpoint_that_is_removed_is_forgotten(world: ConnectionWorld) -> None:
    world.store.endpoint(2, B)
    world.round()
    world.store.endpoint(2)
    world.round()
    assert not world.context.pending
    world.verify()
    assert world.round() == set()


def test_a_reload_verifies_again_what_was_being_verified(world: ConnectionWorld) -> None:
    world.store.endpoint(2, B)
    world.round()
    world.conntrack.requests.clear()  # that listing never comes
    world.policy.invalidate(-1)
    world.round()
    assert B not in str(world.nft.set("senders4")), "it stays pending in the tables that are reloaded"
    world.verify()
    assert world.round() == {"w2"}


def test_listings_that_come_while_the_tables_are_unknown_are_made_again(world: ConnectionWorld) -> None:
    world.conntrack.connections = [connection(OUTSIDE, A)]
    world.store.profile("web")
    world.round()
    world.policy.invalidate(-1)
    world.verify()
    assert world.conntrack.connections
    world.manager.on_event(Tick())
    assert world.conntrack.requests == [either_party([A, "fe80::ff:fe00:1"])]
    world.round()
    world.verify()
    assert not world.conntrack.connections and world.nft.has_fast_path()


def test_listings_that_come_while_the_store_must_not_be_used_are_made_again(world: ConnectionWorld) -> None:
    world.store.endpoint(2, B)
    world.round()
    world.manager.on_event(world.conntrack.answer())
    world.manager.discard_listings()
    assert not world.manager.verify_listings() and world.context.pending
    world.manager.on_event(Tick())
    world.verify()
    assert not world.context.pending


def test_before_the_first_update_nothing_is_pending(world: ConnectionWorld) -> None:
    """All connections are verified then, before the host forwards."""
    world.health.first_update = False
    world.conntrack.connections = [connection(OUTSIDE, B)]
    world.store.profile("closed")
    world.store.endpoint(2, B, profile_ids=["closed"])
    assert world.round() == {"w2"} and not world.context.pending and not world.nft.has_fast_path()
    assert world.manager.needs_apply
    world.manager.verify_now()
    assert not world.conntrack.connections and world.nft.has_fast_path() and not world.manager.needs_apply


def test_policy_of_both_ends_and_of_the_host_decides(world: ConnectionWorld) -> None:
    def may(source: str, destination: str, port: int = 80) -> bool:
        packet = Packet(source, destination, 6, 4000, port)
        return allowed(packet, world.snapshot, world.policy.ruleset.tag_contains, ("192.0.2.2",))

    world.store.profile("closed")
    world.store.endpoint(2, B, profile_ids=["closed"])
    assert may(B, A) and not may(A, B) and may("192.0.2.2", B)
    assert may(A, "192.0.2.2")
    world.store.put("/calico/v1/host/host1/config/DefaultEndpointToHostAction", "DROP")
    assert not may(A, "192.0.2.2")
    world.store.put("/calico/v1/policy/profile/closed/rules", "nonsense")
    assert not may(B, A), "a profile that cannot be read denies"


def test_connections_from_a_host_stay_as_long_as_it_is_one(world: ConnectionWorld) -> None:
    host = "172.18.0.12"
    world.store.put("/calico/v1/ipam/v4/pool/192.168.0.0-16", {"cidr": "192.168.0.0/16"})
    world.store.put("/calico/bgp/v1/host/host2/ip_addr_v4", host)
    world.round()
    world.verify()
    world.conntrack.connections = [connection(host, A)]
    world.store.profile("web")  # nobody may come in any more
    world.round()
    world.verify()
    assert world.conntrack.connections
    world.store.put("/calico/bgp/v1/host/host2/ip_addr_v4", None)
    world.round()
    world.verify()
    assert not world.conntrack.connections and world.nft.has_fast_path()
