"""The commands that follow a change: they come to what a fresh load gives, and are as few as the change is small."""

from __future__ import annotations

import pytest

from calicoctl.datastore.model import Rule
from calicoctl.desired.snapshot import Dirty, Snapshot
from calicoctl.felix.dataplane.ruleset import Ruleset, remove_commands, rule_lines
from calicoctl.policy.verdict import Party, either_party
from tests.random_changes import check_random_updates
from tests.unit.kernel import FakeNft
from tests.unit.snapshots import Store, endpoint_id, in_pools

A, B, C, A6 = "192.168.0.1", "192.168.0.2", "192.168.0.3", "fd00::1"
ALLOW = {"action": "allow"}


class Tables:
    """Tables that follow the snapshot of host1."""

    def __init__(self) -> None:
        self.nft = FakeNft([])
        self.snapshot = in_pools(Snapshot("host1"))
        self.store = Store(self.snapshot)
        self.ruleset = Ruleset()
        self.nft.run(self.ruleset.load(self.snapshot).commands)
        self.snapshot.take_dirty()

    def update(self, pending: dict | None = None) -> tuple[str, set[Party]]:
        """Apply what has changed; return the commands, and the parties that they affect."""
        update = self.ruleset.update(self.snapshot, self.snapshot.take_dirty(), pending)
        if update.commands:
            self.nft.run(update.commands)
        return update.commands, update.affected


def counters(tables: Tables) -> list[str]:
    """Return the names of the counters of rules."""
    return sorted(name.split()[-1] for name in tables.nft.objects if name.startswith("counter ") and "/" in name)


def test_any_order_of_changes_comes_to_what_a_fresh_load_gives() -> None:
    """The same on the kernel's nftables: tests/system/test_ruleset.py."""
    nft = FakeNft([])
    check_random_updates(nft, lambda: nft.objects, seeds=30, updates=40)


def test_an_endpoint_is_in_every_set_and_leaves_each() -> None:
    tables = Tables()
    before = tables.nft.objects
    tables.store.endpoint(1, A, A6)
    _, affected = tables.update()
    assert tables.nft.set("from") == ['"cali1" : goto from/web'] and tables.nft.set("to") == ['"cali1" : goto to/web']
    assert tables.nft.set("senders4") == [f'"cali1" . 02:00:00:00:00:01 . {A}'] == tables.nft.set("senders", "arp")
    assert f'"cali1" . 02:00:00:00:00:01 . {A6}' in tables.nft.set("senders6")
    assert affected == either_party([A, A6, "fe80::ff:fe00:1"])
    assert 'log prefix "inbound profile web"' in tables.nft.chain("inbound/web")[1], (
        "a profile that cannot be read denies"
    )
    tables.store.endpoint(1)
    tables.update()
    tables.nft.run(tables.ruleset.restore_established_fast_path())
    assert tables.nft.objects == before


def test_the_commands_grow_with_the_change_and_not_with_the_host() -> None:
    tables = Tables()
    tables.store.profile("web", ALLOW)
    for number in range(1, 100):
        tables.store.endpoint(number, f"10.0.0.{number}")
    tables.update()
    tables.store.endpoint(1, "10.0.0.1", "10.0.1.1")
    commands, affected = tables.update()
    assert "10.0.0.2" not in commands and len(commands.splitlines()) < 40
    assert affected == either_party(["10.0.0.1", "10.0.1.1", "fe80::ff:fe00:1"])
    assert tables.update() == ("", set())


def test_pending_addresses_are_in_no_set_of_the_endpoint() -> None:
    tables = Tables()
    tables.store.endpoint(1, A, B)
    tables.update({endpoint_id(1): {B}})
    assert tables.nft.set("senders4") == [f'"cali1" . 02:00:00:00:00:01 . {A}']
    assert [name for name in tables.nft.objects if B in str(tables.nft.objects[name])] == ["set inet calico owners4"]
    assert tables.ruleset.addresses_of(endpoint_id(1)) == (A,)
    assert tables.ruleset.has(endpoint_id(1)) and not tables.ruleset.has(endpoint_id(2))
    tables.store.endpoint(1, A, B, profile_ids=["db"])
    tables.update()
    assert tables.ruleset.addresses_of(endpoint_id(1)) == (A, B)


def test_a_tag_in_use_has_the_addresses_of_all_hosts() -> None:
    tables = Tables()
    tables.store.profile("web", {"action": "allow", "src_tag": "db"})
    tables.store.profile("db", tags=["db"])
    tables.store.endpoint(1, A)
    tables.update()
    tables.store.endpoint(2, B, A6, host="elsewhere", profile_ids=["db"])
    tables.update()
    assert tables.nft.set("tag4/db") == [B] and tables.nft.set("tag6/db") == [A6]
    assert tables.ruleset.tag_contains("db", B) and not tables.ruleset.tag_contains("db", A)
    tables.store.endpoint(2, host="elsewhere")
    tables.update()
    assert tables.nft.set("tag4/db") == []
    tables.store.profile("web")
    tables.update()
    assert "set inet calico tag4/db" not in tables.nft.objects, "no rule uses it any more"


@pytest.mark.parametrize(
    ("action", "by_joining", "by_leaving"), [("allow", set(), {B, A6}), ("deny", {B, A6}, set()), ("log", set(), set())]
)
@pytest.mark.parametrize(("side", "originates"), [("src_tag", True), ("dst_tag", False)])
def test_an_address_in_a_tag_is_affected_when_a_connection_of_its_may_be_denied(
    action: str, by_joining: set[str], by_leaving: set[str], side: str, originates: bool
) -> None:
    tables = Tables()
    tables.store.profile("web", {"action": action, side: "db"}, ALLOW)
    tables.store.profile("db", tags=["db"])
    tables.store.endpoint(1, A)
    tables.update()
    tables.store.endpoint(2, B, A6, host="elsewhere", profile_ids=["db"])
    assert tables.update()[1] == {Party(address, originates) for address in by_joining}
    tables.store.endpoint(2, host="elsewhere")
    assert tables.update()[1] == {Party(address, originates) for address in by_leaving}


def test_rules_that_change_while_an_address_leaves_their_tag_affect_their_endpoints() -> None:
    tables = Tables()
    tables.store.profile("web", {"action": "allow", "src_tag": "db"})
    tables.store.profile("db", tags=["db"])
    tables.store.endpoint(1, A)
    tables.store.endpoint(2, B, host="elsewhere", profile_ids=["db"])
    tables.update()
    tables.store.endpoint(2, host="elsewhere")
    tables.store.profile("web", {"action": "deny", "src_tag": "db"})
    assert either_party([A]) <= tables.update()[1], "a connection from B to A is denied now"


def test_endpoints_with_the_same_profiles_share_chains() -> None:
    tables = Tables()
    tables.store.profile("web", ALLOW)
    tables.store.endpoint(1, A)
    tables.store.endpoint(2, B)
    tables.update()
    assert tables.nft.chain("to/web") == ["jump inbound/web", "goto dropped/inbound/no-rule"]
    tables.store.endpoint(2)
    tables.update()
    assert tables.nft.chain("to/web")
    tables.store.endpoint(1)
    tables.update()
    assert not [name for name in tables.nft.objects if "web" in name]


def test_names_that_nftables_cannot_spell_are_replaced_by_digests() -> None:
    tables = Tables()
    tables.store.profile("a; drop", ALLOW)
    tables.store.endpoint(1, A, profile_ids=["a; drop"])
    tables.update()
    assert ";" not in str(tables.nft.set("from")) and "goto from//" in str(tables.nft.set("from"))


def test_a_log_rule_writes_the_profile_and_its_number_and_is_limited() -> None:
    tables = Tables()
    for name in ("web", 'a" accept'):
        tables.store.profile(name, ALLOW, {"action": "log", "protocol": "tcp"})
        tables.store.endpoint(1, A, profile_ids=[name])
        tables.update()
        (chain,) = [chain for key, chain in tables.nft.objects.items() if key.startswith("chain inet calico inbound/")]
        if name == "web":
            assert 'log prefix "calico-packet: profile web, inbound rule 2: "' in chain[2]
        assert chain[2].count('"') == 4 and 'limit rate 10/second burst 50 packets limit name "log-rules"' in chain[2]


def test_a_rule_keeps_its_counter_while_others_come_and_go() -> None:
    tables = Tables()
    deny = {"action": "deny", "protocol": "tcp"}
    tables.store.profile("web", deny)
    assert counters(tables) == [], "no endpoint has the profile"
    tables.store.endpoint(1, A)
    tables.update()
    (of_deny,) = (name for name in counters(tables) if name.startswith("inbound/"))
    of_deny_alone = counters(tables)
    tables.store.profile("web", {"action": "log"}, ALLOW, deny, deny)
    commands, _ = tables.update()
    assert f"add counter inet calico {of_deny} " not in commands and f"counter name {of_deny} " in commands
    assert len(counters(tables)) == 4, "two equal rules have one each, and a rule that logs has none"
    tables.store.profile("web", deny)
    tables.update()
    assert counters(tables) == of_deny_alone
    tables.store.endpoint(1)
    tables.update()
    assert counters(tables) == []


def test_a_rule_that_allows_counts_connections_and_not_their_packets() -> None:
    rule = Rule(protocol="icmp")
    assert rule_lines(rule, "", "X", "inbound") == [
        "ct status confirmed meta nfproto ipv4 meta l4proto 1 accept",
        "meta nfproto ipv4 meta l4proto 1 counter name X accept",
    ]


def test_a_rule_that_denies_counts_and_logs_what_it_drops() -> None:
    assert rule_lines(Rule("deny", ip_version=4), "", "inbound/web/X", "inbound") == [
        "meta nfproto ipv4 counter name inbound/web/X jump sample/inbound/rule",
        'meta nfproto ipv4 log prefix "inbound rule inbound/web/X" group 2015 snaplen 128 drop',
    ]


def test_the_hosts_action_and_pools_are_in_the_tables() -> None:
    tables = Tables()
    tables.store.endpoint(1, A)
    tables.update()
    assert tables.nft.chain("host-action") == ["accept"]
    tables.store.put("/calico/v1/host/host1/config/DefaultEndpointToHostAction", "DROP")
    assert Party(A, True) in tables.update()[1] and tables.nft.chain("host-action") == [
        "goto dropped/outbound/host-action"
    ]
    for cidr in ("10.0.0.0/9", "10.128.0.0/9"):
        key = f"/calico/v1/ipam/v4/pool/{cidr.replace('/', '-')}"
        tables.store.put(key, {"cidr": cidr, "masquerade": True})
    tables.update()
    assert tables.nft.set("masquerade4") == ["10.0.0.0/8"], "nftables takes no overlapping intervals"
    assert "masquerade" in tables.nft.chain("outgoing")[0]


def test_an_endpoint_may_get_what_another_has_not_given_up_yet() -> None:
    tables = Tables()
    tables.store.endpoint(1, A)
    tables.store.endpoint(2, B)
    tables.update()
    tables.store.endpoint(1, A, C, name="cali3")
    tables.store.endpoint(2, B, name="cali1")
    tables.snapshot.take_dirty()
    for number in (2, 1):
        tables.nft.run(tables.ruleset.update(tables.snapshot, Dirty({endpoint_id(number)})).commands)
    changed = tables.nft.objects
    tables.nft.run(Ruleset().load(tables.snapshot).commands)
    assert changed == tables.nft.objects and "cali2" not in str(changed)


def test_the_tables_can_be_removed_whether_they_are_there_or_not() -> None:
    tables = Tables()
    for _ in range(2):
        tables.nft.run(remove_commands())
        assert tables.nft.objects == {}


def test_the_rules_that_name_a_tag_are_examined_once_however_many_addresses_come_and_go() -> None:
    class Counting(dict):
        asked = 0

        def get(self, *arguments: object) -> object:
            Counting.asked += 1
            return super().get(*arguments)

    tables = Tables()
    tables.store.profile("web", {"action": "allow", "src_tag": "web"})
    tables.store.endpoint(1, A)
    tables.store.endpoint(2, *(f"192.168.1.{number}" for number in range(100)))
    tables.update()
    tables.snapshot.profiles = Counting(tables.snapshot.profiles)
    tables.store.profile("web", {"action": "allow", "src_tag": "web"}, tags=["web"])
    tables.update()
    assert len(tables.nft.set("tag4/web")) == 101
    assert Counting.asked < 20


def test_a_change_of_rules_alone_does_not_touch_the_members_of_the_profiles_tags(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables = Tables()
    tables.store.profile("web", {"action": "allow", "src_tag": "web"}, tags=["web"])
    tables.store.endpoint(1, A)
    tables.store.endpoint(2, B, host="host2")
    tables.update()
    addresses_of = tables.snapshot.admission.addresses_of
    asked: list[object] = []
    monkeypatch.setattr(tables.snapshot.admission, "addresses_of", lambda one: asked.append(one) or addresses_of(one))
    tables.store.profile("web", {"action": "deny", "src_tag": "web"}, tags=["web"])
    tables.ruleset.update(tables.snapshot, tables.snapshot.dirty)
    assert not asked
    tables.store.profile("web", {"action": "deny", "src_tag": "web"}, tags=["web", "all"])
    tables.ruleset.update(tables.snapshot, tables.snapshot.dirty)
    assert len(asked) == 2
