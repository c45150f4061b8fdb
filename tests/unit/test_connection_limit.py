"""The limit of connections follows its setting; a kernel without it is reported, and so is who has reached it."""

from __future__ import annotations

from calicoctl.desired.snapshot import Dirty
from calicoctl.felix.dataplane.connection_limit import TABLE, ConnectionLimit
from calicoctl.felix.dataplane.nft import Count
from calicoctl.felix.events import TablesChanged, Tick
from tests.unit.kernel import FakeNft
from tests.unit.snapshots import World


class LimitWorld(World):
    def __init__(self) -> None:
        super().__init__()
        self.nft = FakeNft([])
        self.manager = ConnectionLimit(self.context, self.nft)  # type: ignore[arg-type]

    def step(self, event: object) -> str:
        """Handle an event; return what fails."""
        self.manager.on_event(event)
        if self.manager.needs_apply:
            self.manager.apply()
        return "; ".join(failure["error"] for failure in self.health.failures.values())

    def rate(self) -> str:
        return self.nft.objects[f"chain inet {TABLE} count"][1]

    def lists(self) -> str:
        return self.nft.objects[f"chain inet {TABLE} count"][2]


def test_the_number_of_lists_and_the_rate_follow_the_setting_and_what_is_counted_stays() -> None:
    world = LimitWorld()
    assert not world.step(Dirty(settings=True)) and "mod 64 ct count over 256 }" in world.lists()
    assert "{ iifname . 16384 limit rate over 1024/second burst 16384 packets } goto refuse" in world.rate()
    world.nft.objects[f"set inet {TABLE} lists"].append("a list")
    world.nft.objects[f"set inet {TABLE} rates"].append("a bucket")
    world.store.put("/calico/v1/config/MaxConnections", "1000")
    assert not world.step(Dirty(settings=True)) and "mod 3 ct count over 256 }" in world.lists()
    assert "{ iifname . 1000 limit rate over 62/second burst 1000 packets }" in world.rate(), (
        "not that of an old element"
    )
    assert world.nft.objects[f"set inet {TABLE} lists"] == ["a list"]
    assert world.nft.objects[f"set inet {TABLE} rates"] == ["a bucket"]
    assert not world.manager.needs_apply
    for value in ("0", "many"):
        world.store.put("/calico/v1/config/MaxConnections", value)
        assert world.snapshot.max_connections == 16384 and world.snapshot.problems


def test_it_is_loaded_again_when_another_process_has_changed_it() -> None:
    world = LimitWorld()
    world.step(Dirty())
    world.step(TablesChanged(frozenset(["filter"])))
    assert len(world.nft.transactions) == 1
    world.nft.flush_ruleset()
    world.step(TablesChanged(frozenset([TABLE])))
    assert "mod 64" in world.lists()


def test_a_kernel_that_cannot_count_is_reported_and_asked_again_now_and_then() -> None:
    world = LimitWorld()
    world.nft.refusals = 2
    assert "not limited" in world.step(Dirty()) and world.step(Dirty())
    assert len(world.nft.transactions) == 1
    assert world.step(Tick())
    assert not world.step(Tick())


def test_endpoints_that_have_reached_the_limit_are_named_without_values_of_the_store() -> None:
    world = LimitWorld()
    world.store.endpoint(1, "10.0.0.1")
    world.store.endpoint(2, "10.0.0.2")
    world.step(Dirty())
    world.nft.counted["refusals"] = Count(5)
    world.nft.objects[f"set inet {TABLE} refused"] = ['"cali2"', '"cali3"']
    text = world.step(Tick())
    assert "of w2 (cali2) are dropped" in text and "16384 at a time" in text and "1024 a second" in text
    assert world.health.refused_connections == 5
    world.nft.counted["refusals"] = Count(2)  # the table was loaded anew
    world.nft.objects[f"set inet {TABLE} refused"] = []
    assert not world.step(Tick()) and world.health.refused_connections == 7
