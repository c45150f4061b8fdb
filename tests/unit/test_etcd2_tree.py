"""A directory of etcd is read with all that is below it, whatever the depth and the size of single keys."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from calicoctl.datastore import etcd2, etcd2_tree
from calicoctl.datastore.etcd2 import Etcd2Store
from calicoctl.datastore.etcd2_tree import innermost
from calicoctl.datastore.settings import EtcdSettings
from calicoctl.errors import StoreError
from tests.unit.rogue_server import Client, Server, answer, serving

REVISION = 5


class FakeEtcd:
    """Answers GET requests for a directory as etcd's v2 API does, from a dict of keys and values."""

    def __init__(self, keys: dict[str, str]) -> None:
        self.keys = keys

    def __call__(self, client: Client, line: str) -> None:
        url = urlsplit(line.split()[1])
        path = unquote(url.path).replace("/v2/keys", "", 1).rstrip("/")
        client.send(answer(json_of(self.keys, path, "recursive" in parse_qs(url.query)).encode()))


def json_of(keys: dict[str, str], path: str, recursive: bool) -> str:
    """Return the answer as text, built without recursion."""
    children: dict[str, set[str]] = {}
    for key in keys:
        while key != path and key.startswith(path + "/"):
            parent = key.rpartition("/")[0]
            children.setdefault(parent, set()).add(key)
            key = parent
    texts: dict[str, str] = {}
    for key in sorted({path, *children, *(key for of in children.values() for key in of)}, key=len, reverse=True):
        node: dict[str, Any] = {"key": key, "modifiedIndex": REVISION, "createdIndex": REVISION}
        if key in keys:
            texts[key] = json.dumps({**node, "value": keys[key]})
            continue
        shown = sorted(children.get(key, ())) if recursive or key == path else []
        nodes = f', "nodes": [{", ".join(texts.pop(child) for child in shown)}]' if shown else ""
        texts[key] = json.dumps({**node, "dir": True})[:-1] + nodes + "}"
    return f'{{"action": "get", "node": {texts[path]}}}'


def store_of(server: Server) -> Etcd2Store:
    return Etcd2Store(EtcdSettings.from_environment({"ETCD_AUTHORITY": f"127.0.0.1:{server.port}"}), 0.1)


@pytest.mark.parametrize("depth", [500, 20_000])
def test_a_deep_key_does_not_keep_others_from_being_read(depth: int) -> None:
    body = '{"key":"/d","dir":true,"nodes":[' * depth + '{"key":"/x","value":"{}[\\"\\\\"}' + "]}" * depth
    assert list(innermost([body])) == [{"key": "/x", "value": '{}["\\'}]


@pytest.mark.parametrize("body", ["{", '{"a": {}', "}", '{"a": "}', '{"a": {}}}'])
def test_an_answer_that_is_not_whole_is_an_error(body: str) -> None:
    with pytest.raises(ValueError):
        list(innermost([body]))


@pytest.mark.parametrize(
    "body",
    [
        '{"node":{' + "{}" * 100 + "}}",
        '{"node":' * 100,
        '{"node":{' + '""' * 1000 + "}}",
        '{"node":{"nodes":[' + "[]," * 100 + "1]}}",
        '{"node":{"nodes":[' + "1," * 100 + "1]}}",
    ],
)
def test_an_answer_that_is_not_etcds_is_not_read_to_its_end(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take minutes and gigabytes to keep every object of a large one."""
    parsed: list[Any] = []
    for module, name in ((etcd2_tree.json, "loads"), (etcd2_tree, "_scan_string")):
        before = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *of, before=before: parsed.append(of) or before(*of))
    with (
        serving(lambda client, line: client.send(answer(body.encode()))) as server,
        pytest.raises(StoreError, match="does not answer as etcd does"),
    ):
        store_of(server).list_for_watch("/calico")
    assert 0 < len(parsed) < 80


@pytest.mark.parametrize("size", range(1, 40))
def test_an_answer_is_parsed_wherever_it_is_cut(size: int) -> None:
    values = ['a "quoted" {brace}', "\\", "é€😀", "", "\x00" * 30]
    keys = {f"/calico/{'x/' * number}{number}": value for number, value in enumerate(values)}
    body = json_of(keys, "/calico", True)
    whole = list(innermost([body]))
    assert {node["key"]: node["value"] for node in whole} == keys
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    assert list(innermost(parts)) == whole
    for cut in range(1, len(parts)):
        with pytest.raises(ValueError):
            list(innermost(parts[:cut]))


def test_a_long_value_in_many_parts_is_not_read_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    scanned: list[int] = []
    before = etcd2_tree._scan_string
    monkeypatch.setattr(etcd2_tree, "_scan_string", lambda *of: scanned.append(len(of[0])) or before(*of))
    body = json_of({"/calico/a": "x" * 2**20}, "/calico", True)
    parts = [body[start : start + 2**10] for start in range(0, len(body), 2**10)]
    assert [node["value"] for node in innermost(parts)] == ["x" * 2**20]
    assert sum(scanned) < 8 * 2**20


def test_only_what_is_kept_needs_memory() -> None:
    """The answer is converted while it arrives."""
    keys = {f"/calico/{number}": "x" * 2**15 for number in range(1000)}
    body = answer(json_of(keys, "/calico", True).encode())
    with serving(lambda client, line: client.send(body)) as server:
        store = store_of(server)
        assert len(store.collect("/calico", lambda entry: entry.value[:1])) == 1000  # what is imported stays
        tracemalloc.start()
        store.collect("/calico", lambda entry: entry.value[:1])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 * 2**20, "32 MiB are read"


def test_all_keys_are_read_with_their_values_and_revisions() -> None:
    keys = {
        "/calico/a": 'value with {"braces"}',
        "/calico/b/c": "é€😀",
        "/calico/b/d/e": "",
        "/calico" + "/x" * 600: "1",
    }
    with serving(FakeEtcd(keys)) as server:
        entries, revision = store_of(server).list_for_watch("/calico")
    assert {entry.key: entry.value for entry in entries} == keys
    assert {(entry.revision, entry.created) for entry in entries} == {(REVISION, REVISION)}
    assert revision == REVISION + 1


def test_what_is_too_large_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd2, "LARGEST_DIRECTORY", 20_000)
    flood = {f"/calico/v1/flood/{number}": "x" * 400 for number in range(100)}
    deep = {"/calico/v1/deep" + f"/{'d' * 50}" * 40 + "/x": "x" * 500}
    sound = {"/calico/v1/a": "1", "/calico/v1/deep/b": "2", "/calico/bgp/c/d": "3"}
    with serving(FakeEtcd({**flood, **deep, **sound})) as server:
        entries, revision = store_of(server).list_for_watch("/calico")
        seen = store_of(server).tree("/calico")
        problems = store_of(server).collect("/calico", lambda entry: entry.problem and entry.key)
    assert {entry.key: entry.value for entry in entries if entry.problem is None} == sound
    skipped = {entry.key for entry in entries if entry.problem is not None}
    assert "/calico/v1/flood" in skipped and len(skipped) == 2
    assert {entry.key for entry in seen} == sound.keys()
    assert set(problems) == skipped
    assert revision == REVISION + 1


def test_a_directory_that_cannot_be_read_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, the agent would take the store for empty."""
    monkeypatch.setattr(etcd2, "LARGEST_DIRECTORY", 20_000)
    with (
        serving(FakeEtcd({f"/calico/{number}": "x" * 400 for number in range(100)})) as server,
        pytest.raises(StoreError, match="larger than"),
    ):
        store_of(server).list_for_watch("/calico")


def test_a_role_for_what_is_below_a_directory_suffices_for_all_of_it() -> None:
    """Of a recursive request, etcd compares the path with a role's pattern `/calico/*`, which needs the slash."""
    with serving(FakeEtcd({"/calico/a": "1"})) as server:
        store = store_of(server)
        assert [entry.key for entry in store.tree("/calico")] == ["/calico/a"]
        store.remove_tree("/calico")
    assert [line.partition("?")[0] for line in server.requests] == ["GET /v2/keys/calico/", "DELETE /v2/keys/calico/"]
