"""What has to be written to make one store hold what another one holds."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calicoctl.datastore import copy_plan, keys
from calicoctl.datastore.copy_plan import Difference, check_fits, copied, difference, plan
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.store import MOST_AT_ONCE, Create, Delete, Entry, Update
from calicoctl.errors import CalicoError
from tests.unit.memory_store import MemoryStore


def entries(*found: Entry) -> dict[str, Entry]:
    return {entry.key: entry for entry in found}


def endpoint(number: int, created: int, *addresses: str) -> Entry:
    key = keys.endpoint(EndpointId("host1", "docker", f"w{number}", f"{number:x}".ljust(32, "0")))
    return Entry(key, json.dumps({"name": f"cali{number}", "ipv4_nets": addresses}), created, created)


def test_what_agents_report_and_what_expires_is_not_copied() -> None:
    lasting = Entry("/calico/v1/a", "1", 1)
    others = [
        Entry(keys.READY, "true", 1),
        Entry(keys.UNUSED_COPY, "{}", 1),
        Entry(keys.COPIED_REVISION, "1", 1),
        Entry(keys.felix_status("host1"), "{}", 1),
        Entry("/calico/v1/b", "1", 1, expires=True),
        Entry(keys.FELIX_HOSTS + "/host1/x", "", 1, problem="it is not UTF-8"),
    ]
    assert copied([lasting, *others], "v2") == entries(lasting)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (Entry("/calico/v1/a", "", 0, problem="it is too large"), "/calico/v1/a in etcd's v2 API .*: it is too large"),
        (Entry("/calico/v1/a", "x" * 1_500_000, 1), "/calico/v1/a cannot be copied: it has 1500012 bytes"),
        (Entry("/calico/v1/a", "ä" * 750_000, 1), "/calico/v1/a cannot be copied: it has 1500012 bytes"),
        (Entry("/calico/v1/a", "\ud800", 1), "/calico/v1/a cannot be copied: it is not valid Unicode"),
    ],
)
def test_what_v3_does_not_take_is_named(entry: Entry, says: str) -> None:
    with pytest.raises(CalicoError, match=says):
        check_fits(copied([entry], "v2"))
    check_fits(entries(Entry("/calico/v1/a", "x" * 1_499_988, 1)))


def test_what_could_not_be_read_in_v3_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [Entry(f"/calico/v1/{name}", "x" * 100, 1) for name in "ab"]
    monkeypatch.setattr(copy_plan, "LARGEST_READ", 223)
    check_fits(entries(both[0]))
    with pytest.raises(CalicoError, match=r"2 keys with 224 bytes cannot be copied: .* no more than .* with 223 bytes"):
        check_fits(entries(*both))
    monkeypatch.setattr(copy_plan, "LARGEST_READ", 224)
    check_fits(entries(*both))
    monkeypatch.setattr(copy_plan, "MOST_KEYS", 1)
    with pytest.raises(CalicoError, match="no more than 1 keys"):
        check_fits(entries(*both))


def test_a_difference_is_listed_in_words() -> None:
    one = entries(*(Entry(f"/{name}", "1", 1) for name in "abcdef"))
    other = entries(Entry("/a", "1", 9), Entry("/b", "2", 1), Entry("/x", "1", 1))
    assert difference(one, other) == Difference(["/c", "/d", "/e", "/f"], ["/x"], ["/b"])
    assert str(difference(one, other)) == "4 new (/c, /d, /e, …); 1 changed (/b); 1 deleted (/x)"
    assert not difference(one, one) and str(difference(one, one)) == ""


def test_keys_are_created_in_the_order_of_their_creation() -> None:
    source = entries(Entry("/a", "1", 9, 3), Entry("/b", "1", 1, 1), Entry("/c", "1", 7, 2))
    assert [[write.key for write in commit] for commit in plan(source, {}, {})] == [["/b", "/c", "/a"]]


def test_commits_are_bounded_in_number_and_size() -> None:
    source = entries(*(Entry(f"/{number:04}", "1", 1, number) for number in range(250)))
    assert [len(commit) for commit in plan(source, {}, {})] == [99, 99, 52]
    assert MOST_AT_ONCE == 100, "the note is written with them"
    large = entries(*(Entry(f"/{number}", "x" * 400_000, 1, number) for number in range(5)))
    assert [len(commit) for commit in plan(large, {}, {})] == [2, 2, 1]
    huge = entries(*(Entry(f"/{number}", "x" * 1_200_000, 1, number) for number in range(2)))
    assert [len(commit) for commit in plan(huge, {}, {})] == [1, 1]


def test_endpoints_that_claim_the_same_are_not_created_at_the_same_time() -> None:
    """The one that was created first has the address; in one commit, all are created at the same time."""
    one, other = endpoint(9, 1, "192.168.0.1/32"), endpoint(1, 2, "192.168.0.2/32", "192.168.0.1/32")
    third = endpoint(3, 3, "192.168.0.3/32")
    assert [len(commit) for commit in plan(entries(one, third), {}, {})] == [2]
    commits = list(plan(entries(one, other, third), {}, {}))
    assert [[write.key for write in commit] for commit in commits] == [[one.key], [other.key, third.key]]
    odd = Entry(one.key, "[1]", 1, 1), Entry(other.key, '{"ipv4_nets": 3}', 2, 2)
    assert [len(commit) for commit in plan(entries(*odd), {}, {})] == [2]


def test_a_key_that_was_deleted_and_created_again_is_created_again() -> None:
    before = entries(Entry("/a", "1", 5, 1), Entry("/b", "1", 2, 2), Entry("/c", "1", 3, 3))
    target = entries(*(Entry(f"/{name}", "1", 50, 50) for name in "abc"))
    now = entries(Entry("/a", "1", 9, 9), Entry("/b", "2", 10, 2))
    assert list(plan(now, before, target)) == [
        [Delete(target["/a"]), Delete(target["/c"])],
        [Update(target["/b"], "2"), Create("/a", "1")],
    ]


_STORES = st.dictionaries(st.sampled_from([f"/calico/{name}" for name in "abcdefgh"]), st.sampled_from("xyz"))


@given(_STORES, _STORES, st.booleans())
def test_a_plan_leads_to_the_source(source: dict[str, str], target: dict[str, str], is_known: bool) -> None:
    two, three = MemoryStore(), MemoryStore(modern=True)
    for key, value in source.items():
        two.put(key, value)
    for key, value in target.items():
        three.put(key, value)
    wanted = copied(two.tree("/calico"), "v2")
    before = wanted if is_known else {}
    for commit in plan(wanted, before, copied(three.tree("/calico"), "v3")):
        three.commit(commit)
    assert not difference(wanted, copied(three.tree("/calico"), "v3"))
    if not is_known:
        order = sorted(wanted, key=lambda key: (two.entries[key].created, key))
        assert order == sorted(wanted, key=lambda key: (three.entries[key].created, order.index(key)))
    assert not list(plan(wanted, wanted, copied(three.tree("/calico"), "v3")))
