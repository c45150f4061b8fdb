"""Any command line, and any value in etcd, is answered with a sentence: no traceback, no internal error."""

from __future__ import annotations

import contextlib
import io
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calicoctl.cli import completion
from calicoctl.cli.main import main
from calicoctl.commands import batch
from calicoctl.datastore import backends
from calicoctl.datastore.blocks import Block
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.handles import counts_of
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Endpoint, Peer, Pool, Rules, load_strings
from calicoctl.datastore.store import Change, Entry
from calicoctl.desired.snapshot import Snapshot
from calicoctl.errors import CalicoError
from calicoctl.grammar import COMMANDS
from calicoctl.policy.rules import check_rules
from calicoctl.policy.rules import parse as parse_rule
from tests.unit.memory_store import MemoryStore

WORDS = sorted(
    {
        word
        for command in COMMANDS
        for usage in [str(__import__(f"calicoctl.commands.{command}", fromlist=["x"]).__doc__)]
        for word in re.findall(r"[a-z][a-z-]+|--[a-z0-9-]+", usage.partition("Options:")[0])
    }
)
VALUES = st.one_of(
    st.sampled_from(
        ["192.168.0.1", "fd00::1", "10.0.0.0/8", "ipv4", "0", "-1", "65536", "1.10", "web", "/", "", "-", "é"]
    ),
    st.text(max_size=20),
    st.from_regex(r"[0-9./:]{1,20}", fullmatch=True),
)
WORD = st.one_of(st.sampled_from(WORDS), VALUES, st.builds("{}={}".format, st.sampled_from(WORDS), VALUES))

# these ask the system around, wait for it, or write files
COMMANDS = sorted(set(COMMANDS) - {"map", "export", "checksystem", "diags", "node", "batch", "status", "completion"})


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """A store in memory, where the commands look for etcd; nobody is root, and there is no Docker."""
    memory = MemoryStore()
    client = DatastoreClient(memory, "host1")
    monkeypatch.setattr(backends, "connect", lambda settings, patience, shared: memory)
    monkeypatch.setenv("HOSTNAME", client.host)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere")
    monkeypatch.setattr("calicoctl.diagnose.audit.RECHECK_DELAY", 0)
    client.hosts.register("192.0.2.2", None, None)
    client.create_profile("web")
    return memory


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(COMMANDS), st.lists(WORD, max_size=7))
def test_no_command_line_causes_a_traceback(store: MemoryStore, command: str, words: list[str]) -> None:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([command, *words])
    assert status in (0, 1, 2)
    assert "Internal error" not in err.getvalue(), (command, words, err.getvalue())
    assert (status == 0) == (err.getvalue() == "" or err.getvalue().startswith("Warning")), (command, words)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = [
    "cidr",
    "ipip",
    "masquerade",
    "state",
    "name",
    "mac",
    "profile_id",
    "profile_ids",
    "ipv4_nets",
    "ipv6_nets",
    "ipv4_gateway",
    "ipv6_gateway",
    "id",
    "inbound_rules",
    "outbound_rules",
    "action",
    "protocol",
    "src_net",
    "dst_net",
    "src_tag",
    "dst_ports",
    "icmp_type",
    "icmp_code",
    "ip_version",
    "affinity",
    "allocations",
    "attributes",
    "handle_id",
    "secondary",
    "block",
    "ip",
    "as_num",
]
RECORD = st.dictionaries(
    st.sampled_from(FIELDS),
    JSON
    | st.sampled_from([["192.168.0.1/32"], "02:00:00:00:00:01", "10.0.0.0/8", [None] * 64, "192.168.0.0/26"])
    | st.lists(st.dictionaries(st.sampled_from(FIELDS), JSON | st.sampled_from(["tcp", "allow", [80], "10.0.0.0/8"]))),
)
TEXT = st.one_of(st.text(max_size=20), JSON.map(json.dumps), RECORD.map(json.dumps), st.just("[" * 100_000))
ID = EndpointId("host1", "docker", "w", "e")

READERS = (
    lambda text: Endpoint.from_json(ID, text, "key"),
    lambda text: Rules.from_json("web", text, "key"),
    lambda text: Pool.from_json(text, "key"),
    lambda text: Peer.from_json(text, "key"),
    lambda text: load_strings(text, "key"),
    lambda text: Block.from_entry(Entry("/x/192.168.0.0-26", text, 1)),
    lambda text: counts_of(Entry("key", text, 1)),
    lambda text: check_rules("web", text),
    lambda text: parse_rule(text.split()),
)


@given(TEXT, st.sampled_from(READERS))
def test_no_value_causes_a_traceback(text: str, reader) -> None:
    with contextlib.suppress(CalicoError):
        reader(text)


KEYS = (
    "/calico/v1/host/host1/workload/docker/w/endpoint/e",
    "/calico/v1/policy/profile/web/rules",
    "/calico/v1/policy/profile/web/tags",
    "/calico/v1/ipam/v4/pool/10.0.0.0-8",
    "/calico/v1/host/host1/config/DefaultEndpointToHostAction",
    "/calico/bgp/v1/host/host1/ip_addr_v6",
    "/calico/v1/Ready",
)


@given(st.lists(st.tuples(st.sampled_from(KEYS), TEXT), max_size=5))
def test_nothing_in_the_store_crashes_the_snapshot(entries: list[tuple[str, str]]) -> None:
    snapshot = Snapshot("host1")
    for index, (key, text) in enumerate(entries):
        snapshot.change(Change(key, Entry(key, text, index, index)))


COMMAND_KEYS = (
    *KEYS,
    "/calico/ipam/v2/assignment/ipv4/block/192.168.0.0-26",
    "/calico/ipam/v2/handle/docker.w",
    "/calico/bgp/v1/global/peer_v4/192.0.2.9",
    "/calico/bgp/v1/global/node_mesh",
)
LOOKS = (
    "endpoint show --detailed",
    "pool show",
    "ipam info 192.168.0.1",
    "ipam show",
    "ipam check",
    "bgp peer show",
    "bgp node-mesh",
    "profile show --detailed --output=json",
    "profile show --detailed --output=yaml",
    "export",
    "profile web rule show",
    "profile trace 192.168.0.1 10.0.0.1 tcp 80",
    "map --output=json",
    "map --output=text",
    "endpoint e profile append web",
    "pool add 10.0.0.0/8",
    "pool remove 10.0.0.0/8",
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(COMMAND_KEYS), TEXT), max_size=4), st.sampled_from(LOOKS))
def test_nothing_in_the_store_causes_a_traceback(store: MemoryStore, entries: list, line: str) -> None:
    before = dict(store.entries)
    for key, text in entries:
        store.entries[key] = Entry(key, text, 10**6, 10**6)
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        main(line.split())
    store.entries = before
    assert "Internal error" not in err.getvalue(), (line, entries, err.getvalue())


@given(st.text(max_size=60))
def test_no_line_crashes_completion_or_a_batch(text: str) -> None:
    with contextlib.suppress(CalicoError):
        batch._lines(text, "x")
    if not text.split()[1:]:  # more would ask etcd
        completion.candidates("calicoctl " + text)
