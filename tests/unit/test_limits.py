"""What is written to the store without end costs its writer alone: each record beyond a limit is invalid by itself."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from netaddr import IPAddress

from calicoctl import limits
from calicoctl.commands import ipam, profile
from calicoctl.datastore import keys
from calicoctl.datastore.blocks import Owner
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Endpoint, Rule, Rules, load_object, load_tags
from calicoctl.datastore.store import Change, Entry
from calicoctl.desired.snapshot import Snapshot
from calicoctl.errors import CalicoError, InvalidValue
from calicoctl.felix import heartbeat, process, report
from calicoctl.felix.health import Health, Status
from calicoctl.felix.report import ReportFile, StoreReporter
from tests.unit.memory_store import MemoryStore
from tests.unit.snapshots import HOST, Store, endpoint_id, in_pools

HUGE = "x" * (limits.VALUE + 1)
NETS = [f"10.1.{number // 256}.{number % 256}/32" for number in range(limits.ADDRESSES + 1)]


def with_rules(*rules: Rule) -> str:
    return json.dumps({"inbound_rules": [rule.to_dict() for rule in rules], "outbound_rules": []})


@pytest.fixture
def store() -> Store:
    store = Store(in_pools(Snapshot(HOST)))
    store.profile("web", {"action": "allow"})
    store.endpoint(0, "192.168.0.1", profile_ids=["web"])
    return store


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"profile_ids": [f"p{number}" for number in range(limits.PROFILES + 1)]}, "can have 64 profiles"),
        ({"ipv4_nets": NETS}, "can have 256 addresses"),
        ({"mac": HUGE}, "more than 512 KiB"),
        ({"x": json.loads("[" * 100 + "]" * 100)}, "nested deeper than 32 levels"),
    ],
)
def test_an_endpoint_beyond_a_limit_is_an_error_by_itself(store: Store, fields: dict[str, Any], why: str) -> None:
    store.endpoint(1, "192.168.0.2")
    before = store.snapshot.endpoints[endpoint_id(1)]
    store.endpoint(1, **fields)
    assert why in store.snapshot.unusable[endpoint_id(1)][1]
    assert set(store.snapshot.local) == {endpoint_id(0)}
    assert store.snapshot.endpoints[endpoint_id(1)] == before, "in tags, it stays as it was last valid"
    assert all(len(entry.value) <= limits.VALUE + 1 for entry in store.snapshot._entries.values())
    store.endpoint(1, "192.168.0.2")
    assert endpoint_id(1) in store.snapshot.local and not store.snapshot.problems


def test_an_endpoint_at_the_limits_is_valid(store: Store) -> None:
    profiles = [f"p{number}" for number in range(limits.PROFILES)]
    store.endpoint(
        1, *(net.replace("10.1.0.", "192.168.7.").partition("/")[0] for net in NETS[:-1]), profile_ids=profiles
    )
    assert len(store.snapshot.local[endpoint_id(1)].addresses) == limits.ADDRESSES


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (with_rules(*[Rule()] * (limits.RULES + 1)), "can have 5000 rules"),
        (with_rules(Rule(protocol="tcp", dst_ports=list(range(limits.PORTS + 1)))), "can have 100 ports"),
        (HUGE, "more than 512 KiB"),
    ],
)
def test_a_profile_beyond_a_limit_denies_everything(store: Store, value: str, why: str) -> None:
    store.put(keys.profile_rules("big"), value)
    assert store.snapshot.profiles["big"].rules is None
    assert why in store.snapshot.problems[keys.profile_rules("big")]
    assert store.snapshot.has_valid_rules("web")


def test_tags_beyond_the_limit_stay_as_they_were(store: Store) -> None:
    store.put(keys.profile_tags("web"), ["a"])
    store.put(keys.profile_tags("web"), [f"t{number}" for number in range(limits.TAGS + 1)])
    assert store.snapshot.profiles["web"].tags == ("a",)
    assert "can have 256 tags" in store.snapshot.problems[keys.profile_tags("web")]


def test_a_tag_may_have_any_number_of_addresses(store: Store) -> None:
    for number in range(3000):
        store.endpoint(number, f"10.2.{number // 256}.{number % 256}", host="other", mac="02:00:00:00:00:01")
    assert len(store.snapshot.endpoints) == 3001 and not store.snapshot.problems


def test_commands_refuse_what_the_agent_would(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = MemoryStore()
    client = DatastoreClient(memory, HOST)
    monkeypatch.setattr(DatastoreClient, "from_environment", lambda: client)
    memory.put(keys.profile_tags("web"), json.dumps([f"t{number}" for number in range(limits.TAGS)]))
    rules = [Rule(protocol="tcp", dst_ports=[number]) for number in range(limits.RULES)]
    memory.put(keys.profile_rules("web"), with_rules(*rules))
    before = dict(memory.entries)
    for words in ("rule add inbound allow", "tag add another"):
        with pytest.raises(CalicoError, match="a profile can have"):
            profile.prepare(["profile", "web", *words.split()])()
    ports = ",".join(map(str, range(limits.PORTS + 1)))
    with pytest.raises(CalicoError, match="a rule can have 100 ports"):
        profile.prepare(["profile", "web", "rule", "add", "inbound", "allow", "tcp", "to", "ports", ports])()
    id = endpoint_id(1)
    for fields in ({"profile_ids": ["p"] * (limits.PROFILES + 1)}, {"ipv4_nets": NETS}):
        with pytest.raises(CalicoError, match="an endpoint can have"):
            client.create_endpoint(Endpoint(id, **fields))
    with pytest.raises(CalicoError, match="KiB"):
        client.replace_rules(Rules("web", [Rule(extra={"x": HUGE})]))
    assert memory.entries == before


def test_limits_hold_whatever_a_value_holds() -> None:
    with pytest.raises(InvalidValue, match="nested deeper"):
        load_object('{"a":' * 5000 + "1" + "}" * 5000, "/key")
    assert load_object('{"a":' * limits.DEPTH + "1" + "}" * limits.DEPTH, "/key")
    assert load_object(json.dumps({"a": "[" * 1000}), "/key"), "it is text"
    with pytest.raises(InvalidValue, match="256 tags"):
        load_tags(json.dumps(["t"] * (limits.TAGS + 1)), "/key")


def test_what_is_skipped_is_named_as_long_as_it_is_there() -> None:
    snapshot = Snapshot(HOST)
    deep, large = "/calico/v1/policy/profile" + "/a" * 600, "/calico/v1/junk"
    many = [f"/calico/v1{'/b' * 20}/{number}" for number in range(500)]
    snapshot.replace("/calico/v1", [Entry(large, "", 0, 0, "it is too large"), Entry(deep, "x", 1, 1)])
    assert snapshot.skipped.keys() == {deep, large} and "604 levels" in snapshot.skipped[deep]
    snapshot.change(Change("/calico/v1/policy/profile/a", None))
    assert snapshot.skipped.keys() == {large}
    snapshot.replace("/calico/v1", [Entry(key, "x", 1, 1) for key in many])
    assert len(snapshot.skipped) == limits.REPORTED
    snapshot.change(Change("/calico/v1/b", None))
    assert snapshot.skipped == {}


def test_what_is_below_a_directory_that_is_too_large_stays_as_it_was_read_last() -> None:
    read = Store(in_pools(Snapshot(HOST)))
    snapshot = read.snapshot
    read.profile("web", {"action": "allow"})
    read.endpoint(0, "192.168.0.1", profile_ids=["web"])
    id = endpoint_id(0)
    snapshot.take_dirty()
    for large in ("/calico/v1/policy", "/calico/v1/host"):
        rest = [entry for key, entry in snapshot._entries.items() if not key.startswith(large + "/")]
        snapshot.replace("/calico/v1", [*rest, Entry(large, "", 0, 0, "it is too large")])
        assert id in snapshot.local and snapshot.has_valid_rules("web")
        assert snapshot.unread == snapshot.skipped.keys() == {large} and not snapshot.take_dirty()
    read.profile("web", {"action": "deny"})
    assert snapshot.take_dirty().profiles == {"web"}, "changes are followed"
    snapshot.replace("/calico/v1", [])
    assert snapshot.unread == set() and id not in snapshot.endpoints and not snapshot.has_valid_rules("web")


def test_a_key_that_cannot_be_read_keeps_nothing_below_it_from_being_deleted() -> None:
    """In a store without directories, there may be a key with the path of a directory."""
    read = Store(in_pools(Snapshot(HOST)))
    snapshot = read.snapshot
    read.profile("web", {"action": "allow"})
    read.endpoint(0, "192.168.0.1", profile_ids=["web"])
    keys_of_directories = [Entry(key, "", 7, 7, "it is not UTF-8") for key in ("/calico/v1/policy", "/calico/v1/host")]
    snapshot.replace("/calico/v1", keys_of_directories)
    assert not snapshot.endpoints and not snapshot.has_valid_rules("web") and not snapshot.unread
    assert snapshot.skipped.keys() == {entry.key for entry in keys_of_directories}
    snapshot.change(Change("/calico/v1/host", None, alone=True))
    assert snapshot.skipped.keys() == {"/calico/v1/policy"}


def test_what_cannot_be_read_is_not_repaired(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The addresses of endpoints that are not read would be released."""
    memory = MemoryStore()
    client = DatastoreClient(memory, HOST)
    client.ipam.assign(IPAddress("192.168.0.1"), Owner("docker.w", {"host": HOST, "orchestrator": "docker"}))
    monkeypatch.setattr(DatastoreClient, "from_environment", lambda: client)
    unread = Entry(keys.HOSTS, "", 0, 0, "it is too large")
    read = memory.collect
    monkeypatch.setattr(memory, "collect", lambda where, convert, *_, **__: [convert(unread), *read(where, convert)])
    before = dict(memory.entries)
    with pytest.raises(CalicoError, match=rf"^Nothing is repaired, .*: {keys.HOSTS} \(it is too large\)\.$"):
        ipam.prepare(["ipam", "check", "--fix"])()
    assert memory.entries == before
    with pytest.raises(CalicoError, match="2 of 2 problems remain"):
        ipam.prepare(["ipam", "check"])()
    assert f"counts as missing here: {keys.HOSTS} (it is too large)." in capsys.readouterr().err


def test_a_key_that_is_too_long_is_skipped_and_named_and_nothing_is_written_for_it() -> None:
    snapshot = Snapshot(HOST)
    snapshot.take_dirty()
    base = f"/calico/v1/host/{HOST}/workload/x/"
    longest, longer = (base.ljust(length - 11, "<") + "/endpoint/1" for length in (limits.KEY, limits.KEY + 1))
    rules = f"/calico/v1/policy/profile/{'<' * limits.KEY}/rules"
    snapshot.replace("/calico/v1", [Entry(key, "{", 1, 1) for key in (longest, longer, rules)])
    assert [keys.endpoint(id) for id in snapshot.take_dirty().endpoints] == [longest], "the others get no status"
    assert snapshot.problems.keys() == {longest}
    assert snapshot.skipped.keys() == {longer, rules} and "has 5001 characters" in snapshot.skipped[longer]
    store = MemoryStore()
    store.put(longer.replace("/v1/", "/felix/v1/", 1), "{}")
    assert DatastoreClient(store, HOST).statuses.of_endpoints() == {}


def test_the_report_is_bounded_and_has_the_worst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "DIRECTORY", tmp_path)
    (tmp_path / HOST).mkdir()
    health = Health(HOST, "1", first_update=True)
    long = "w" * 100_000
    for number in range(20_000):
        id = EndpointId(HOST, "docker", "w" * (limits.KEY - 200), f"{number:032x}")
        health.endpoints[id] = Status("down" if number else "error", 1, long, long)
        health.problems[keys.endpoint(id)] = long
        health.failures[f"failure {number}"] = {"since": "", "error": ""}
        health.labels_failed[f"{number:064x}"] = {"name": long, "reason": long, "since": ""}
    health.problems["/calico/v1/policy/profile/web/rules"] = "it is no JSON"
    health.unknown_interfaces = [f"cali{number}" for number in range(20_000)]
    health.error(long)
    ReportFile(process.report_file(HOST)).write(health)
    for file in (process.report_file(HOST), process.private(process.report_file(HOST))):
        assert file.stat().st_size < 600_000
        found = json.loads(file.read_text())
        lists = ("endpoints_in_trouble", "problems", "troubles", "unknown_interfaces", "containers_not_connected")
        assert {len(found[name]) for name in lists} == {limits.REPORTED}
        assert all(found["left_out"][name] >= 20_000 - limits.REPORTED for name in lists)
        assert found["endpoints_in_trouble"][0]["status"] == "error"
        assert found["problems"][0]["key"].endswith("web/rules")


def test_a_flood_of_statuses_does_not_cost_the_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "INTERVAL", 0.1)
    store = MemoryStore()
    health = Health(HOST, "1", first_update=True)
    reporter = StoreReporter(DatastoreClient(store, HOST), health, lambda event: None)
    beats = threading.Event()
    count = [0, 0]
    beat = heartbeat.Heartbeat.beat

    def counted(self: Any, fields: Any) -> Any:
        count[0] += 1
        if count[0] == 3:
            beats.set()
        return beat(self, fields)

    put = store.put

    def put_and_change_more(key: str, value: str, ttl: int | None) -> None:
        put(key, value, ttl)
        if not beats.is_set():  # each write is followed by another change
            count[1] += 1
            reporter.set({endpoint_id(count[1]): Status("up", 1)})

    monkeypatch.setattr(heartbeat.Heartbeat, "beat", counted)
    monkeypatch.setattr(store, "put", put_and_change_more)
    reporter.set({endpoint_id(0): Status("up", 1)})
    reporter.start()
    try:
        assert beats.wait(10)
        assert count[1] > 3, "it was a flood"
    finally:
        beats.set()
        reporter.end()


def test_errors_are_written_after_what_works_and_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "ERRORS_AT_ONCE", 3)
    store = MemoryStore()
    health = Health(HOST, "1", first_update=True)
    reporter = StoreReporter(DatastoreClient(store, HOST), health, lambda event: None)
    reporter.set({endpoint_id(number): Status("error", 1) for number in range(8)})
    reporter.set({endpoint_id(number): Status("up", 1) for number in range(10, 20)})

    def written() -> list[str]:
        return [entry.value for key, entry in store.entries.items() if "/workload/" in key]

    reporter._beaten = report.time.monotonic()
    reporter._write_endpoints()
    assert sorted(json.loads(value)["status"] for value in written()) == ["error"] * 3 + ["up"] * 10
    reporter._write_endpoints()
    assert len(written()) == 13, "the others wait"
    monkeypatch.setattr(report.time, "monotonic", lambda: reporter._errors_at)
    reporter._beaten = reporter._errors_at
    reporter._write_endpoints()
    assert len(written()) == 16


def test_a_report_that_takes_long_is_made_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "DIRECTORY", tmp_path)
    monkeypatch.setattr(report, "LONG", -1.0)
    (tmp_path / HOST).mkdir()
    health = Health(HOST, "1")
    clock = iter(range(1000))
    monkeypatch.setattr(report.time, "thread_time", lambda: next(clock))
    file = ReportFile(process.report_file(HOST))
    file.write(health)
    assert file.due_at is None
    health.error("a change")
    file.write(health)
    assert file.due_at is not None and "a change" not in process.private(process.report_file(HOST)).read_text()
    file.write(health, at_once=True)
    assert file.due_at is None and "a change" in process.private(process.report_file(HOST)).read_text()


def test_a_deleted_key_that_is_no_directory_costs_no_search(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = store.snapshot._entries
    monkeypatch.setattr(type(entries), "__iter__", lambda self: pytest.fail("a search"))
    store.put("/calico/v1/junk/1", None)
    store.put(keys.workload(HOST, "docker", "w7"), None)
    monkeypatch.undo()
    store.put(keys.host(HOST), None)
    assert set(entries) == {
        keys.profile_tags("web"),
        keys.profile_rules("web"),
        *(key for key in entries if "pool" in key),
    }
    assert {hash(keys.host(HOST)), hash(keys.workload(HOST, "docker", "w7"))}.isdisjoint(entries._below)
