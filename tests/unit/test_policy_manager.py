"""The tables follow the snapshot; refused changes, and tables that another process has modified, are reloaded."""

from __future__ import annotations

import struct

import pytest

from calicoctl.datastore.model import Rule
from calicoctl.felix.dataplane import policy_manager
from calicoctl.felix.dataplane.links import Link
from calicoctl.felix.dataplane.manager import PendingAddresses
from calicoctl.felix.dataplane.nft import Count
from calicoctl.felix.dataplane.policy_manager import BACKOFF, PolicyManager
from calicoctl.felix.dataplane.ruleset import rule_counters
from calicoctl.felix.events import DROPS_LOGGED, BgpChanged, LinkChanged, TablesChanged, Tick
from calicoctl.policy.verdict import Party
from tests.unit.kernel import FakeNft
from tests.unit.snapshots import World, endpoint_id

A, B = "192.168.0.1", "192.168.0.2"
ALLOW = {"action": "allow"}


class PolicyWorld(World):
    """One endpoint, whose policy is in the tables."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.clock = 1000.0
        monkeypatch.setattr(policy_manager.time, "monotonic", lambda: self.clock)
        self.nft = FakeNft([])
        self.devices: dict[int, bool] = {}
        self.manager = PolicyManager(self.context, self.nft, lambda: self.devices)  # type: ignore[arg-type]
        self.store.profile("web")
        self.store.endpoint(1, A)
        self.apply()
        self.health.first_update = True

    def apply(self) -> int:
        """Let the manager take in what has changed, and apply it; return how many transactions that took."""
        before = len(self.nft.transactions)
        self.manager.on_event(self.snapshot.take_dirty())
        if self.manager.needs_apply:
            self.manager.apply()
        return len(self.nft.transactions) - before

    def allows(self) -> bool:
        """Return whether the profile has the rule ALLOW, and no other."""
        first, counted = self.nft.chain("inbound/web") or ("", "")
        name = rule_counters("web", "inbound", [Rule()])[0]
        return first == "ct status confirmed accept" and counted == f"counter name {name} accept"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> PolicyWorld:
    return PolicyWorld(monkeypatch)


def test_the_first_apply_loads_the_tables_as_a_whole(world: PolicyWorld) -> None:
    assert world.manager.in_sync and world.manager.reloaded
    assert world.nft.set("from") == ['"cali1" : goto from/web'] and "delete table" in world.nft.transactions[0]
    assert Party(A, True) in world.manager.affected


def test_a_change_is_one_transaction_of_what_differs(world: PolicyWorld) -> None:
    world.store.profile("web", ALLOW)
    assert world.apply() == 1 and not world.manager.reloaded
    assert world.allows()
    assert "delete table" not in world.nft.transactions[-1] and Party(A, True) in world.manager.affected
    assert not world.manager.needs_apply and world.apply() == 0


def test_pending_addresses_are_left_out(world: PolicyWorld) -> None:
    world.context.pending[endpoint_id(1)] = PendingAddresses({B}, 1)
    world.store.endpoint(1, A, B)
    world.apply()
    assert B not in str(world.nft.set("senders4"))
    del world.context.pending[endpoint_id(1)]
    world.store.endpoint(1, A, B, profile_ids=["web", "other"])
    world.apply()
    assert B in str(world.nft.set("senders4"))


def test_a_refused_change_is_followed_by_a_reload(world: PolicyWorld) -> None:
    world.store.profile("web", ALLOW)
    world.nft.refusals = 1
    assert world.apply() == 2
    assert world.manager.in_sync and world.manager.reloaded and world.allows()
    assert not world.health.failures


def test_a_refused_reload_is_reported_and_retried_after_a_backoff(world: PolicyWorld) -> None:
    world.store.profile("web", ALLOW)
    world.nft.refusals = 2
    world.apply()
    assert not world.manager.in_sync and "refused" in str(world.manager.error)
    assert "refused" in world.health.failures["tables"]["error"]
    assert world.manager.is_backing_off and world.manager.retry_at == world.clock + BACKOFF
    assert world.nft.chain("inbound/web") == [], "a transaction is all or nothing"
    world.clock += BACKOFF
    assert not world.manager.is_backing_off and world.manager.needs_apply
    world.apply()
    assert world.allows() and not world.health.failures
    assert world.manager.retry_at is None and world.manager.error is None


def test_tables_that_another_process_has_modified_are_reloaded(world: PolicyWorld) -> None:
    world.nft.flush_ruleset()
    world.manager.on_event(TablesChanged(frozenset(["other", "filter"])))
    assert not world.manager.needs_apply
    world.manager.on_event(TablesChanged(frozenset(["calico"])))
    world.apply()
    assert world.manager.reloaded, "connections may have begun without the tables"
    assert Party(A, True) in world.manager.affected
    assert not world.manager.needs_apply


def test_what_was_counted_outlives_the_tables(world: PolicyWorld) -> None:
    world.store.profile("web", ALLOW)
    world.apply()
    (name,) = rule_counters("web", "inbound", [Rule()])
    since = "2026-11-27T10:00:00Z"
    world.nft.counted = {"dropped": Count(9, 900, since), str(name): Count(7, 420, since)}
    world.nft.dropped = [(struct.pack("=16sI", b"cali1", 8), Count(9, 900)), (struct.pack("=16sI", b'c"', 8), Count(1))]
    world.manager.on_event(Tick())

    def check() -> None:
        loaded = world.nft.transactions[-1]
        assert f'{name} {{ packets 7 bytes 420 ; comment "{since}" ; }}' in loaded
        assert f'dropped {{ packets 9 bytes 900 ; comment "{since}" ; }}' in loaded
        assert 'drops { "cali1" . 8 counter packets 9 bytes 900 }' in loaded

    world.manager.invalidate(-1)
    world.apply()
    check()
    world.nft.counted, world.nft.dropped = {}, []  # another process has removed the tables
    world.nft.flush_ruleset()
    world.manager.on_event(TablesChanged(frozenset(["calico"])))
    world.manager.restore()
    check()
    world.apply()
    check()


def test_tables_of_a_kernel_that_cannot_log_dropped_packets_drop_and_count_them(world: PolicyWorld) -> None:
    world.store.profile("web", {"action": "deny", "protocol": "udp"})
    world.store.endpoint(2, B, profile_ids=["missing"])
    world.apply()
    assert any(" group " in rule for rule in world.nft.chain("inbound/web"))
    world.nft.logs = False
    world.manager.invalidate(-1)
    world.apply()
    assert world.manager.in_sync and world.manager.reloaded
    failure = world.health.failures[DROPS_LOGGED]["error"]
    assert "counted" in failure and "it cannot log" in failure and "tables" not in world.health.failures
    jump, drop = world.nft.chain("inbound/web")
    assert jump.endswith(" jump sample/inbound/rule") and drop == "meta l4proto 17 drop"
    assert world.nft.chain("sample/inbound") == ["counter name dropped", "drop"]
    for chain in ("inbound/missing", "dropped/inbound/no-rule"):
        assert world.nft.chain(chain)[1] == "drop"
    # so it stays in changes, and when the tables are restored
    world.store.profile("web", {"action": "deny"})
    assert world.apply() == 1 and not world.manager.reloaded
    world.nft.flush_ruleset()
    world.manager.on_event(TablesChanged(frozenset(["calico"])))
    world.manager.restore()
    assert world.manager.in_sync and world.nft.chain("inbound/web")[1] == "drop"
    world.apply()
    world.manager.resync()
    assert not world.manager.needs_apply
    # until the kernel can
    world.nft.logs = True
    world.manager.resync()
    world.apply()
    assert world.manager.reloaded and DROPS_LOGGED not in world.health.failures
    assert " group " in world.nft.chain("inbound/web")[1]
    world.manager.resync()
    assert not world.manager.needs_apply


def test_nothing_is_restored_before_the_first_update(world: PolicyWorld) -> None:
    world.health.first_update = False
    world.nft.flush_ruleset()
    world.manager.on_event(TablesChanged(frozenset(["calico"])))
    world.manager.restore()
    assert not world.nft.objects


def test_the_fast_path_is_closed_by_a_change_and_restored(world: PolicyWorld) -> None:
    assert not world.nft.has_fast_path()
    world.manager.restore_established_fast_path()
    assert world.nft.has_fast_path() and world.manager.in_sync
    world.store.profile("web", ALLOW)
    world.apply()
    assert not world.nft.has_fast_path()
    world.nft.refusals = 1
    world.manager.restore_established_fast_path()
    assert not world.manager.in_sync, "a refusal means a reload"


def test_an_internal_error_leads_to_a_reload_after_the_backoff(world: PolicyWorld) -> None:
    world.manager.invalidate(10)
    assert world.manager.is_backing_off
    world.clock += 10
    world.apply()
    assert world.manager.reloaded


def test_the_ports_are_guarded_while_bird_holds_one_and_a_device_the_other(world: PolicyWorld) -> None:
    def guarded() -> list[str]:
        world.apply()
        return world.nft.objects.get("chain inet calico ports", [])

    world.store.put(f"/calico/bgp/v1/host/{world.snapshot.host}/ip_addr_v4", "172.18.0.9")
    assert not guarded()
    world.manager.on_event(BgpChanged(running=True))
    assert len(guarded()) == 1
    assert world.apply() == 0, "nothing has changed"
    world.devices[4] = False
    world.manager.on_event(LinkChanged(Link("vxlan7", 8, True)))
    assert len(guarded()) == 1
    world.manager.on_event(LinkChanged(Link("vxlan.calico", 7, False)))
    down = guarded()
    assert len(down) == 2 and down[-1].endswith("counter drop"), "another process may hold the port"
    world.devices[4] = True
    world.manager.on_event(LinkChanged(Link("vxlan.calico", 7, True)))
    assert len(guarded()) == 3
    world.manager.invalidate(-1)
    assert len(guarded()) == 3, "also in tables that are loaded anew"
    world.devices.clear()
    world.manager.on_event(LinkChanged(Link("vxlan.calico", 7, True), deleted=True))
    world.manager.on_event(BgpChanged(running=False))
    assert not guarded()
