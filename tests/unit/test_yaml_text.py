"""YAML says the same as JSON, whoever reads it."""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from calicoctl import grammar, yaml_text
from calicoctl.cli.main import main
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Endpoint, Peer, Pool
from calicoctl.errors import CalicoError
from calicoctl.yaml_text import Inline, dump, dumped, load
from tests.unit.memory_store import MemoryStore

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
TRICKY = st.from_regex(r"[-+.:_~yn0-9eE]{1,8}", fullmatch=True)
VALUES = st.recursive(
    PLAIN | TRICKY, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | TRICKY, inner)
)


@given(VALUES)
@example("a...")
@example(["a..."])
@example({"a": "b..."})
def test_what_is_written_is_read_as_the_same_value(value: Any) -> None:
    text = dump(value)
    assert text.isascii() and text.endswith("\n") and yaml.safe_load(text) == value
    assert yaml.load(text, yaml.SafeLoader) == value  # in Python, as where PyYAML has no libyaml


@given(VALUES, st.integers(1, 3))
def test_what_is_written_in_parts_is_the_same(value: Any, part: int) -> None:
    with mock.patch.object(yaml_text, "PART", part):
        assert "".join(dumped(value)) == dump(value)


# values of several types in YAML 1.1, in 1.2, and in what readers make of them
TRAPS = """no No y N on off yes true null ~ 1 0 017 0o17 0x1f 089 1_000 1e3 1E3 .5e3 1. +1 -1 1:20 12:34:56 190:20:30.15
.inf .NaN 2026-11-27 2026-11-27T10:00:00Z << = #b *a &a !a % @a"""


@pytest.mark.parametrize("text", [*TRAPS.split(), "", " ", "- a", "a: b", "a #b"])
def test_texts_that_look_like_something_else_are_quoted(text: str) -> None:
    assert dump([text])[2] in "'\"" and yaml.safe_load(dump({text: [text]})) == {text: [text]}


@pytest.mark.parametrize("text", ["1.5e3", "017", "0x1f", "1_000", "1:20", "no", "+1", "1.", "2026-11-27", "Null"])
def test_a_value_that_readers_understand_differently_is_refused(text: str) -> None:
    with pytest.raises(CalicoError, match=r"file:1: .* can be understood in several ways"):
        load(text, "file").data()
    assert load(f"'{text}'", "file").data() == text


def test_the_text_is_one_that_a_person_likes() -> None:
    value = {"b": Inline(["x", "no"]), "a": ["allow tcp to ports 80,443 cidr 10.0.0.0/8", "deny"], "fd00::/64": {}}
    assert dump(value) == ("b: [x, 'no']\na:\n- allow tcp to ports 80,443 cidr 10.0.0.0/8\n- deny\nfd00::/64: {}\n")
    assert dump("web") == "web\n" and len(dump([["x y " * 100]]).splitlines()) == 1
    same = ["a"]
    assert "&" not in dump([same, same])  # no anchors
    assert dump("\ud800") == "\\ud800\n" and "\x1b" not in dump("\x1b")


COMMANDS_WITH_DATA = [name for name in grammar.COMMANDS if "--output=<FORMAT>" in grammar.grammar_of(name)]


@pytest.mark.parametrize("command", COMMANDS_WITH_DATA)
def test_every_help_says_that_there_is_yaml(command: str) -> None:
    assert "  -o, --output=<FORMAT>  json or yaml" in grammar.grammar_of(command)


SHOWS = (
    "bgp peer show",
    "bgp node-mesh",
    "bgp default-node-as",
    "config felix MTU",
    "endpoint show",
    "endpoint show --detailed",
    "endpoint a1 profile show",
    "ipam show",
    "ipam info 10.0.0.1",
    "ipam check",
    "node show",
    "node bgp peer show",
    "pool show",
    "profile show",
    "profile show --detailed",
    "profile web tag show",
    "profile web rule show",
    "version",
)


@pytest.mark.parametrize("command", SHOWS)
def test_commands_print_the_same_as_json_and_as_yaml(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    datastore = DatastoreClient(MemoryStore(), "host1")
    datastore.put_pool(Pool("10.0.0.0/16", masquerade=True, extra={"disabled": True, "note": "no"}))
    datastore.create_profile("web")
    datastore.create_endpoint(
        Endpoint(EndpointId("host1", "docker", "1:20", "a1"), profile_ids=["web"], ipv4_nets=["10.0.0.1/32"])
    )
    datastore.put_bgp_peer(Peer("192.0.2.9", "64512"))
    datastore.put_bgp_peer(Peer("192.0.2.8", "64512"), "host1")
    datastore.set("/calico/v1/config/MTU", "1400")
    monkeypatch.setattr(DatastoreClient, "from_environment", lambda *of, **options: datastore)
    monkeypatch.setenv("HOSTNAME", "host1")
    shown = []
    for form in ("json", "yaml"):
        main([*command.split(), f"--output={form}"])
        shown.append(capsys.readouterr().out)
    assert json.loads(shown[0]) == yaml.safe_load(shown[1]) and shown[0] != shown[1]
