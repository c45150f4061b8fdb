"""How much of the store is read to find endpoints: requests, directories, and whether the values are needed.

And what a client writes, or says, when it refuses.
"""

from __future__ import annotations

import json
from typing import Callable, TypeVar
from unittest.mock import Mock

import pytest

from calicoctl.cli import completion
from calicoctl.commands import endpoint as endpoint_command
from calicoctl.commands import ipam as ipam_command
from calicoctl.commands import profile as profile_command
from calicoctl.datastore import keys
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Endpoint, Pool, Rules
from calicoctl.datastore.store import Entry
from calicoctl.errors import CalicoError, InvalidValue, NotFound
from tests.unit.memory_store import MemoryStore

T = TypeVar("T")


class RecordingStore(MemoryStore):
    """`collected` has each directory that is read, and whether its values are."""

    def __init__(self, modern: bool) -> None:
        super().__init__(modern)
        self.collected: list[tuple[str, bool]] = []

    def collect(self, directory: str, convert: Callable[[Entry], T | None], values: bool = True) -> list[T]:
        self.collected.append((directory, values or not self.atomic))
        return super().collect(directory, convert, values)


@pytest.fixture(params=[False, True], ids=["v2", "v3"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RecordingStore:
    """Twenty endpoints on two hosts, the ids of ten of which begin with `a`; and an invalid one, `bad`."""
    store = RecordingStore(request.param)
    datastore = DatastoreClient(store, "host1")
    for number in range(10):
        for host, digit in (("host1", "a"), ("host2", "c")):
            id = EndpointId(host, "docker", f"w{number}", f"{digit}{number:03}")
            nets = [f"10.0.{digit == 'c':d}.{number}/32"]
            datastore.create_endpoint(Endpoint(id, profile_ids=[f"p{number % 3}"], ipv4_nets=nets))
    store.put(keys.endpoint(EndpointId("host2", "cni", "w", "bad")), "{")
    for name in ("p0", "p1", "p2", "p3", "p4"):
        datastore.create_profile(name)
    monkeypatch.setattr(DatastoreClient, "from_environment", lambda *of, **options: datastore)
    store.requests = 0
    return store


def endpoint(store: RecordingStore, *words: str) -> None:
    store.requests = 0
    store.collected.clear()
    endpoint_command.prepare(["endpoint", *words])()


def test_an_endpoint_is_found_by_its_id_without_the_values_of_others(
    store: RecordingStore, capsys: pytest.CaptureFixture[str]
) -> None:
    values = not store.atomic
    for options, directory in (
        ((), keys.HOSTS),
        (("--orchestrator=docker",), keys.HOSTS),
        (("--host=host1",), f"{keys.HOSTS}/host1/workload"),
        (("--host=host1", "--orchestrator=docker"), f"{keys.HOSTS}/host1/workload/docker"),
    ):
        endpoint(store, "a007", "profile", "show", *options)
        assert store.collected == [(directory, values)] and store.requests == (2 if store.atomic else 1)
        said = capsys.readouterr()
        assert said.out == "p1\n" and said.err == ""
    for words in (("a00", "profile", "show"), ("a007", "profile", "show", "--host=host2")):
        with pytest.raises(CalicoError, match=r"matches several|does not exist"):
            endpoint(store, *words)


def test_an_invalid_endpoint_with_that_id_is_named(store: RecordingStore, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CalicoError, match="ba does not exist"):
        endpoint(store, "ba", "profile", "show")
    assert "host2/workload/cni/w/endpoint/bad has an invalid value" in capsys.readouterr().err
    endpoint(store, "show")
    assert "endpoint/bad has an invalid value" in capsys.readouterr().err


def test_ids_are_completed_without_values(store: RecordingStore) -> None:
    line = "calicoctl endpoint show --host=host1 --endpoint=a00"
    assert len(completion.candidates(line)) == 10
    assert store.collected == [(f"{keys.HOSTS}/host1/workload", not store.atomic)]
    store.collected.clear()
    assert completion.candidates("calicoctl endpoint show --host host2 --endpoint a") == []
    assert completion.candidates("calicoctl endpoint show --host=.. --endpoint a00") != []
    assert store.collected == [
        (f"{keys.HOSTS}/host2/workload", not store.atomic),
        (keys.HOSTS, not store.atomic),
    ]
    assert completion.candidates("calicoctl endpoint c00")[:2] == ["c000", "c001"]
    assert completion.candidates("calicoctl ipam info 10.0.1.") == [f"10.0.1.{number}" for number in range(10)]


def test_the_endpoints_are_read_once_for_all_profiles_to_remove(
    store: RecordingStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calicoctl.workloads.network_profiles.containers_with", lambda host, profile: [])
    with pytest.raises(CalicoError):
        profile_command.prepare(["profile", "remove", "p3", "p1", "p4", "none"])()
    said = capsys.readouterr()
    assert said.out == "Deleted profile p3\nDeleted profile p4\n" and "endpoint/bad has an invalid value" in said.err
    assert store.collected == [(keys.HOSTS, True)]
    store.collected.clear()
    with pytest.raises(CalicoError, match="none does not exist"):
        profile_command.prepare(["profile", "remove", "none"])()
    profile_command.prepare(["profile", "remove", "p1", "--no-check"])()
    assert store.collected == []


def test_all_profiles_are_shown_with_few_requests(store: RecordingStore, capsys: pytest.CaptureFixture[str]) -> None:
    store.put(f"{keys.PROFILES}/p4/tags", "nonsense")
    store.requests = 0
    profile_command.prepare(["profile", "show", "--detailed", "--output=json"])()
    said = capsys.readouterr()
    assert store.requests == 3 and said.out.count('"inbound_rules"') == 5
    assert "p4/tags has an invalid value" in said.err


def test_a_profile_is_read_once_to_be_changed(store: RecordingStore) -> None:
    datastore = DatastoreClient(store, "host1")

    def requests(change: Callable[[], object]) -> int:
        store.requests = 0
        change()
        return store.requests

    def add(tags: list[str]) -> bool:
        tags.append("red")
        return True

    def clear(rules: Rules) -> bool:
        rules.inbound = []
        return True

    assert requests(lambda: datastore.modify_tags("p0", add)) == 2
    assert requests(lambda: datastore.modify_rules("p0", clear)) == 2
    assert requests(lambda: datastore.replace_rules(Rules("p0"))) == 2
    assert datastore.tags("p0") == ["p0", "red"] and datastore.rules("p0") == Rules("p0")
    store.remove_tree(keys.profile_tags("p0"))  # without tags, as an old program may have left it
    datastore.modify_tags("p0", add)
    assert datastore.tags("p0") == ["red"]


def test_the_block_of_an_address_is_read_once(store: RecordingStore, capsys: pytest.CaptureFixture[str]) -> None:
    secondary = {"host": "host1", "orchestrator": "docker", "workload": "w1", "endpoint": "a001"}
    block = {
        "cidr": "10.0.0.0/26",
        "affinity": "host:host1",
        "allocations": [None, 0, *[None] * 62],
        "attributes": [{"handle_id": "docker.w1", "secondary": secondary}],
    }
    store.put("/calico/ipam/v2/assignment/ipv4/block/10.0.0.0-26", json.dumps(block))
    store.requests = 0
    ipam_command.prepare(["ipam", "info", "10.0.0.1"])()
    assert "a001" in capsys.readouterr().out and store.requests == 3, "the block, pools, and the endpoint"


def test_a_pool_that_is_refused_changes_nothing() -> None:
    store = MemoryStore()
    datastore = DatastoreClient(store, "host1")
    datastore.put_pool(Pool("10.0.0.0/8"))
    before = dict(store.entries)
    with pytest.raises(CalicoError, match="overlaps with"):
        datastore.put_pool(Pool("10.1.0.0/16", ipip="tunl0"))
    assert store.entries == before
    datastore.put_pool(Pool("192.168.0.0/16", ipip="tunl0"))
    assert datastore.setting("/calico/v1/config/IpInIpEnabled") == "true"


@pytest.mark.parametrize("name", ["web", "web.1-a_b", "w" * 39, "w" * 40, "a b", "a;b", "_web", "-web", "wéb"])
def test_a_profile_that_cannot_be_created_gets_no_hint_to_create_it(name: str) -> None:
    with pytest.raises(NotFound, match="does not exist") as refused:
        DatastoreClient(MemoryStore(), "host1").tags(name)
    try:
        profile_command.prepare(["profile", "add", name])
        can_be_created = True
    except CalicoError:
        can_be_created = False
    assert (f"'calicoctl profile add {name}'" in str(refused.value)) == can_be_created


def test_the_statuses_of_a_few_endpoints_are_read_without_those_of_others(store: RecordingStore) -> None:
    hosts = DatastoreClient(store, "host1").hosts
    ids = [
        EndpointId(host, "docker", f"w{n}", f"{digit}{n:03}")
        for host, digit in (("host1", "a"), ("host2", "c"))
        for n in range(10)
    ]
    for id in ids:
        store.put(keys.felix_endpoint(id), '{"status": "error", "reason": "why"}')
    store.put(keys.felix_status("host1"), "{}")
    for some, collected, requests in (
        (ids[:1], [], 1 if store.atomic else 2),
        (ids[:10], [] if store.atomic else [keys.felix_host("host1")], 1),
        (ids, [keys.FELIX_HOSTS], 1),
    ):
        store.requests = 0
        store.collected.clear()
        status_of = hosts.endpoint_statuses(some)
        assert store.requests == requests and [directory for directory, _ in store.collected] == collected
        of_host2 = ("unknown", None)  # its agent has no heartbeat
        assert [status_of(id) for id in some] == [("error", "why") if id.host == "host1" else of_host2 for id in some]


def test_a_status_that_cannot_be_read_is_unknown(store: RecordingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(keys.felix_status("host1"), "{}")
    id = EndpointId("host1", "docker", "w0", "a000")
    monkeypatch.setattr(store, "read", Mock(side_effect=InvalidValue(keys.felix_endpoint(id), "it is not UTF-8")))
    assert DatastoreClient(store, "host1").hosts.endpoint_statuses([id])(id) == ("unknown", None)
