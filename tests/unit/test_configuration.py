"""`export` and `apply`: what is written is read as the same; what differs is changed, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from calicoctl.cli.main import Interrupted, main
from calicoctl.configuration import changes
from calicoctl.configuration.declared import parse
from calicoctl.configuration.stored import document, read
from calicoctl.datastore import chosen, keys
from calicoctl.datastore.blocks import Owner
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Endpoint, Peer, Pool, Rule
from calicoctl.errors import CalicoError
from calicoctl.output import warn
from calicoctl.yaml_text import DEPTH, LONGEST, dump, load
from tests.unit.memory_store import MemoryStore
from tests.unit.test_chosen import World

# Any store


NAMES = st.sampled_from(
    ["web", "no", "1:20", "010", "~", "a b", "x" * 60, "ü", "<<", "null", "2026-11-27", "tcp", "[a]"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | NAMES | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=4,
)
EXTRA = st.dictionaries(
    st.sampled_from(["dscp", "not_src_net", "disabled", "Cidr", "ipip_mode"]) | NAMES, JSON, max_size=2
)
SOUND = st.fixed_dictionaries(
    {},
    optional={
        "action": st.sampled_from(["allow", "deny", "log", None]),
        "protocol": st.sampled_from(["tcp", "udp", "icmp", "icmpv6", "sctp", 6, 47, "17", None]),
        "ip_version": st.sampled_from([4, 6]),
        "src_net": st.sampled_from(["10.0.0.1/8", "fd00::/64", "10.0.0.1"]),
        "dst_tag": NAMES,
        "dst_ports": st.sampled_from([[80], ["80"], ["1:2", 3], [], "80"]),
        "icmp_type": st.sampled_from([0, 8, "8"]),
    },
)
RULES = st.lists(SOUND | st.builds(lambda rule, extra: {**rule, **extra}, SOUND, EXTRA) | EXTRA, max_size=3)
HOSTS = st.sampled_from(["host1", "host2", "1e3"])
CONTENTS = st.one_of(
    st.tuples(NAMES.map(keys.profile_tags), st.lists(NAMES, max_size=3)),
    st.tuples(
        NAMES.map(keys.profile_rules),
        st.builds(lambda i, o, e: {"inbound_rules": i, "outbound_rules": o, **e}, RULES, RULES, EXTRA),
    ),
    st.builds(
        lambda cidr, extra: (keys.pool(6 if ":" in cidr else 4, cidr), {"cidr": cidr, **extra}),
        st.sampled_from(["10.0.0.0/8", "10.1.0.0/30", "fd00::/64", "0.0.0.0/0"]),
        st.fixed_dictionaries(
            {}, optional={"ipip": JSON, "masquerade": JSON, "vxlan_mode": st.sampled_from(["always", "x"]), "n": JSON}
        )
        | EXTRA,
    ),
    st.builds(
        lambda ip, host, number, extra: (
            keys.bgp_peer(6 if ":" in ip else 4, ip, host),
            {"ip": ip, "as_num": number, **extra},
        ),
        st.sampled_from(["192.0.2.1", "fe80::1", "127.0.0.1"]),
        HOSTS | st.none(),
        st.sampled_from(["64512", 64512, "1.10", "x"]),
        EXTRA,
    ),
    st.just((keys.BGP_NODE_MESH, {"enabled": False, "more": 1})),
    st.builds(lambda host, name, value: (f"{keys.host(host)}/config/{name}", value), HOSTS, NAMES, NAMES),
    st.builds(
        lambda daemon, name, value: (f"{daemon}/{name}", value),
        st.sampled_from([keys.CONFIG, keys.BGP_GLOBAL, f"{keys.BGP_HOSTS}/host1"]),
        st.sampled_from(["MTU", "loglevel", "LogSeverityScreen", "IpInIpEnabled", "as_num", "HoldTime"]) | NAMES,
        st.sampled_from(["1400", "true", "no", "none", "", "a\nb", "1:20", "010", "30", "~", "info"]),
    ),
    st.builds(
        lambda host, orchestrator, workload, endpoint, name, profiles: (
            keys.endpoint(EndpointId(host, orchestrator, workload, endpoint)),
            {"profile_ids": profiles, "workload_name": name},
        ),
        HOSTS,
        st.sampled_from(["docker", "namespace"]),
        st.sampled_from(["1:20", "abc", "-run-netns-a"]),
        st.sampled_from(["e1", "e2", "1e3"]),
        st.sampled_from([None, "abc", "db", "a/b", "", "no"]),
        st.lists(NAMES, max_size=3),
    ),
)


_ENDPOINT = "/calico/v1/host/host1/workload/namespace/{}/endpoint/e1"


@example(  # the name of a workload is the id of another one
    [
        (_ENDPOINT.format("1:20"), {"profile_ids": [], "workload_name": "abc"}),
        (_ENDPOINT.format("abc"), {"profile_ids": ["a"], "workload_name": None}),
    ],
    [],
    False,
)
@given(st.lists(CONTENTS, max_size=8), st.lists(st.tuples(CONTENTS, st.text(max_size=3)), max_size=1), st.booleans())
def test_an_export_never_differs_from_its_store(contents: list, invalid: list, modern: bool) -> None:
    store = MemoryStore(modern)
    datastore = DatastoreClient(store, "host1")
    for key, value in contents:
        store.put(key, value if isinstance(value, str) else json.dumps(value))
    for (key, _), text in invalid:
        store.put(key, text)
    stored = read(datastore)
    text = dump(document(stored))
    found = changes.compare(datastore, stored, parse(text, "file"), prune=True)
    assert [str(one) for one in found.differences] == [] and found.steps == [] and found.missing == []
    assert yaml.safe_load(text) == document(stored) or "nan" in text


OBJECTS = st.text(max_size=3) | JSON
RULE_OBJECTS = st.lists(SOUND | st.sampled_from(["allow", "deny udp to ports 53"]) | OBJECTS, max_size=3)
FILES = st.fixed_dictionaries(
    {},
    optional={
        "pools": st.dictionaries(
            st.sampled_from(["10.0.0.0/8", "10.1.0.0/16", "fd00:1::/64", "x"]),
            st.fixed_dictionaries(
                {},
                optional={
                    "ipip": st.sampled_from(["tunl0", None]),
                    "masquerade": st.booleans(),
                    "vxlan_mode": st.sampled_from(["always", "never"]),
                    "note": OBJECTS,
                },
            ),
        ),
        "profiles": st.dictionaries(
            NAMES,
            st.fixed_dictionaries(
                {}, optional={"tags": st.lists(NAMES), "inbound": RULE_OBJECTS, "other_fields": EXTRA | OBJECTS}
            ),
            max_size=2,
        ),
        "bgp": st.fixed_dictionaries(
            {},
            optional={
                "node-mesh": st.booleans(),
                "peers": st.dictionaries(
                    st.sampled_from(["192.0.2.9", "fd00::9"]), st.fixed_dictionaries({"as_num": st.just(1)}) | OBJECTS
                ),
            },
        ),
        "settings": st.fixed_dictionaries(
            {}, optional={"felix": st.dictionaries(st.sampled_from(["MTU", "loglevel"]), st.just(1400) | OBJECTS)}
        ),
    },
)


@given(FILES, st.booleans(), st.booleans())
def test_what_was_applied_does_not_differ_any_more(content: dict, prune: bool, modern: bool) -> None:
    datastore = DatastoreClient(MemoryStore(modern), "host1")
    datastore.put_pool(Pool("10.1.0.0/16"))
    datastore.create_profile("web")
    try:
        declared = parse(dump(content), "file")
        changes.apply(datastore, declared, prune, lambda found: None, lambda made: None)
    except CalicoError:
        return  # any mistake has a sentence
    stored = read(datastore)
    assert changes.compare(datastore, stored, declared, prune).steps == [] and stored.problems == {}


# One store


@pytest.fixture(params=[False, True], ids=["v2", "v3"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """Two hosts, a pool, three profiles, and an endpoint."""
    store = MemoryStore(request.param)
    datastore = DatastoreClient(store, "host1")
    for number, host in enumerate(("host1", "host2"), start=1):
        store.put(keys.bgp_host_address(host, 4), f"192.0.2.{number}")
    datastore.put_pool(Pool("10.0.0.0/16", extra={"disabled": True}))
    for name in ("web", "db", "old"):
        datastore.create_profile(name)
    datastore.put_bgp_peer(Peer("192.0.2.9", "64512", {"note": "x"}))
    datastore.set(keys.config("MTU"), "1400")
    datastore.set(keys.config("LogFilePath"), "none")  # its default
    datastore.create_endpoint(
        Endpoint(EndpointId("host1", "docker", "a" * 64, "e1"), profile_ids=["web"], workload_name="w")
    )
    monkeypatch.setattr(DatastoreClient, "from_environment", lambda *of, **options: datastore)
    monkeypatch.setattr("calicoctl.workloads.network_profiles.containers_with", lambda host, profile: [])
    monkeypatch.setattr("calicoctl.commands.apply.warn_of_overlaps", lambda cidrs: warn(f"New: {', '.join(cidrs)}"))
    monkeypatch.setenv("HOSTNAME", "host1")
    return store


def values(store: MemoryStore) -> dict[str, str]:
    return {key: entry.value for key, entry in store.entries.items()}


@pytest.fixture
def apply(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that applies a text, with options, and returns the exit status, and what was printed."""

    def run(text: str, *options: str) -> tuple[int, str, str]:
        (tmp_path / "file").write_text(text)
        capsys.readouterr()
        status = main(["apply", str(tmp_path / "file"), *options])
        said = capsys.readouterr()
        return status, said.out, said.err.replace(f"{tmp_path}/", "")

    return run


WISHES = """
pools:
  10.0.0.0/16: {masquerade: true}
  fd00:1::/64: {vxlan_mode: always}
profiles:
  web:
    tags: [web, frontend]
    inbound:
    - allow tcp from tag db to ports 80,443
    - {action: deny, protocol: udp, ip_version: 4}
    - allow from tag web
  new: {}
bgp:
  node-mesh: false
  default-node-as: 0.64512
  peers:
    192.0.2.9: {as_num: 64513}
  node-peers:
    host2:
      fd00::9: {as_num: 64512}
settings:
  felix: {loglevel: debug, MTU: 1400}
  node:
    host2: {felix: {DefaultEndpointToHostAction: DROP}}
endpoints:
  host1/docker/w: [db, new]
"""

SAID = """~ pool 10.0.0.0/16: masquerade from false to true
+ pool fd00:1::/64: vxlan_mode always
~ profile web: + tag frontend
~ profile web: + inbound rule 1: allow tcp from tag db to ports 80,443
~ profile web: + inbound rule 2: deny ipv4 udp
+ profile new
+ profile new: tag new
+ profile new: inbound rule 1: allow from tag new
+ profile new: outbound rule 1: allow
+ bgp node-mesh: false
+ bgp default-node-as: 64512
~ bgp peer 192.0.2.9: as_num from 64512 to 64513
+ bgp peer fd00::9 of host2: as_num 64512
+ setting felix LogSeverityScreen: debug
+ setting node host2 felix DefaultEndpointToHostAction: DROP
~ endpoint host1/docker/w: profiles from web to db, new
"""


def test_what_differs_is_printed_and_changed_and_nothing_else(store: MemoryStore, apply: Any) -> None:
    before = values(store)
    new = "New: fd00:1::/64\n"
    assert apply(WISHES, "--dry-run") == (3, SAID, f"{new}16 differences; nothing was changed.\n")
    assert values(store) == before
    assert apply(WISHES) == (0, SAID, new)
    now = values(store)
    changed = {key for key in now if now[key] != before.get(key)}
    assert (
        not before.keys() - now.keys()
        and f"{keys.PROFILES}/db/tags" not in changed
        and keys.config("MTU") not in changed
    )
    assert json.loads(now[keys.pool(4, "10.0.0.0/16")]) == {"cidr": "10.0.0.0/16", "masquerade": True, "disabled": True}
    assert json.loads(now[keys.bgp_peer(4, "192.0.2.9")]) == {"ip": "192.0.2.9", "as_num": "64513", "note": "x"}
    assert json.loads(now[keys.profile_rules("web")])["inbound_rules"][1] == {
        "action": "deny",
        "protocol": "udp",
        "ip_version": 4,
    }
    assert len(changed) == 13
    revision = store.revision
    assert apply(WISHES) == (0, "No difference.\n", "") and store.revision == revision
    assert apply(WISHES, "--dry-run") == (0, "No difference.\n", "")


def test_json_says_the_same(store: MemoryStore, apply: Any) -> None:
    status, out, _ = apply("profiles: {n: {}}\nendpoints: {host1/docker/gone: []}", "--dry-run", "--output=json")
    found = json.loads(out)
    assert status == 1 and found["changed"] is found["dry_run"] is True
    assert found["missing_endpoints"] == ["host1/docker/gone"]
    assert found["differences"][:2] == [
        {"change": "add", "kind": "profile", "name": "n", "detail": None},
        {"change": "add", "kind": "profile", "name": "n", "detail": "tag n"},
    ]


def test_the_document_has_defaults_left_out_and_short_names(store: MemoryStore) -> None:
    datastore = DatastoreClient(store, "host1")
    for workload, endpoint, name in (("c", "e1", "same"), ("d", "e2", "same"), ("x", "y", None), ("e", "e3", "x/y")):
        datastore.create_endpoint(Endpoint(EndpointId("host1", "docker", workload, endpoint), workload_name=name))
    shown = document(read(datastore))
    assert shown["settings"] == {"felix": {"MTU": 1400}, "bgp": {}, "node": {}}
    places = ["c/e1", "d/e2", "e", "w", "x"]
    assert list(shown["endpoints"]) == [f"host1/docker/{place}" for place in ("c", "d", "e", "w", "x")]
    assert set(places) < {name.removeprefix("host1/docker/") for name in read(datastore).named()}
    assert read(datastore).named()["host1/docker/x/y"] == [EndpointId("host1", "docker", "x", "y")]


def test_pruning_removes_what_is_not_in_a_section_that_is_there(store: MemoryStore, apply: Any) -> None:
    before = values(store)
    text = "profiles: {web: {}, db: {}}\nsettings: {felix: {}}\nbgp: {peers: {}}"
    assert apply(text)[:2] == (0, "No difference.\n")
    said = "- bgp peer 192.0.2.9\n- setting felix MTU: it was 1400\n- profile old\n"
    assert apply(text, "--prune") == (0, said, "")
    gone = {keys.profile_tags("old"), keys.profile_rules("old"), keys.bgp_peer(4, "192.0.2.9"), keys.config("MTU")}
    assert values(store) == {key: value for key, value in before.items() if key not in gone}


def test_what_is_in_use_is_not_removed_and_then_nothing_is_changed(store: MemoryStore, apply: Any) -> None:
    datastore = DatastoreClient(store, "host1")
    from netaddr.ip import IPAddress

    datastore.ipam.assign(IPAddress("10.0.0.1"), Owner("h", {}))
    before = values(store)
    for text, why in (
        ("profiles: {new: {}}", "profile web is not in the file, and cannot be removed: 1 endpoint has it (w)"),
        (
            "profiles: {new: {}}\npools: {10.1.0.0/16: {}}",
            "pool 10.0.0.0/16 is not in the file, and cannot be removed: 1",
        ),
    ):
        status, out, err = apply(text, "--prune")
        assert (status, out) == (1, "") and why in err and "nothing is changed" in err and values(store) == before
    # what the file itself takes from the endpoint can go
    status, out, _ = apply("profiles: {new: {}}\nendpoints: {host1/docker/w: [new]}", "--prune")
    assert status == 0 and out.endswith("- profile db\n- profile old\n- profile web\n")
    assert DatastoreClient(store, "host1").profile_names() == ["new"]


def test_an_endpoint_that_does_not_exist_is_named_and_the_rest_applied(store: MemoryStore, apply: Any) -> None:
    status, out, err = apply("endpoints: {host1/docker/gone: [db], host1/docker/w: [db]}")
    assert status == 1 and "1 endpoint in file does not exist: host1/docker/gone" in err
    assert out == "~ endpoint host1/docker/w: profiles from web to db\n"


MISTAKES = [
    ("pools:\n  10.0.0.0/8: {}", "file:2: 10.0.0.0/8 overlaps with 10.0.0.0/16"),
    ("pools:\n  10.1.0.0/30: {}", "file:2: 10.1.0.0/30 is smaller than a block"),
    ("pools:\n  10.1.0.1/16: {}", "file:2: '10.1.0.1/16' is not the CIDR of a pool: it has host bits set"),
    (
        "pools:\n  fd00:1::/64: {}\n  fd00:0001::/64: {}",
        "file:3: 'fd00:0001::/64' is fd00:1::/64, which is there already",
    ),
    ("pools:\n  10.1.0.0/16:\n    vxlan: always", "file:3: a pool has no field 'vxlan'; did you mean 'vxlan_mode'?"),
    ("pools:\n  10.1.0.0/16:\n    vxlan_mode: on", "file:3: on can be understood in several ways: put it in quotes"),
    ("pools:\n  10.1.0.0/16: {masquerade: 1}", "file:2: masquerade must be true or false"),
    ("pools:\n  10.1.0.0/16: {ipip: tunl0, vxlan_mode: always}", "file:2: ipip and vxlan_mode exclude each other"),
    ("pools:\n", "file:1: pools must be a mapping"),
    ("pool: {}", "file:1: the file has no 'pool': it can have pools, profiles, bgp, settings, endpoints; did you mean"),
    ("profiles:\n  web: {}\n  db: {}\n  web: {}", "file:4: 'web' is there already, in line 2"),
    ("profiles:\n  a b: {}", "file:2: 'a b' is not a valid profile name"),
    ("profiles:\n  web:\n    tags: [a, b c]", "file:3: 'b c' is not a valid tag name"),
    (
        "profiles:\n  web:\n    inbound:\n    - allow\n    - alow tcp",
        "file:5: a rule begins with 'allow', 'deny' or 'log'",
    ),
    ("profiles:\n  web:\n    inbound:\n    - {src_tagg: web}", "file:4: a rule has no field 'src_tagg'; did you mean"),
    (
        "profiles:\n  web:\n    inbound:\n    - {action: allow,\n       icmp_type: 300, protocol: icmp}",
        "file:4: '300' is not",
    ),
    (
        "profiles:\n  web:\n    inbound:\n    - action: allow\n      src_tag:\n",
        "file:5: src_tag of a rule has no value",
    ),
    ("profiles:\n  web:\n    inbound:\n    - {action: ~}", "file:4: action of a rule has no value"),
    ("profiles:\n  web:\n    inbound:\n    - {}", "file:4: a rule is a text, such as 'allow tcp', or a mapping with"),
    ("profiles:\n  web:\n    inbound:\n    - allow from tag: db", "file:4: a rule is a text, such as 'allow tcp', or"),
    ("profiles:\n  web: {inbound: allow}", "file:2: inbound must be a list"),
    ("profiles:\n  web: {tags: [[a]]}", "file:2: an item of tags must be a single value"),
    ("profiles:\n  web:\n    tags:\n    -\n", "file:4: an item of tags has no value"),
    ("bgp:\n  node-mesh: maybe", "file:2: node-mesh must be true or false"),
    ("bgp:\n  default-node-as: 0", "file:2: '0' is not a valid AS number"),
    ("bgp:\n  peers:\n    192.0.2.7: {}", "file:3: BGP peer 192.0.2.7 has no as_num"),
    ("bgp:\n  peers:\n    127.0.0.1: {as_num: 1}", "file:3: 127.0.0.1 cannot be used"),
    ("bgp:\n  node-peers:\n    host3:\n      192.0.2.7: {as_num: 1}", "file:4: no host host3 is registered"),
    ("bgp:\n  node-peers:\n    host1:\n      192.0.2.1: {as_num: 1}", "file:4: 192.0.2.1 is an address of host1"),
    (
        "settings:\n  felix:\n    MTU: 12",
        "file:3: '12' is not a valid value for MTU: it must be a whole number from 1280",
    ),
    ("settings:\n  felix:\n    Colour: 12", "file:3: 'Colour' is no setting that is known"),
    (
        "settings:\n  felix: {loglevel: info, LogSeverityScreen: info}",
        "file:2: 'LogSeverityScreen' is LogSeverityScreen",
    ),
    ("endpoints:\n  w: []", "file:2: 'w' is not an endpoint"),
    ("endpoints:\n  host1/docker/w: [wep]", "file:2: profile wep does not exist; did you mean 'web'?"),
    ("endpoints:\n  host1/docker/w: [db, db]", "file:2: profile db is in the list twice"),
    (f"endpoints:\n  host1/docker/w: []\n  host1/docker/{'a' * 64}: []", "is an endpoint that is there already"),
    ("pools: [", "file:2: it is no YAML"),
    ("pools: {}\n\tprofiles: {}", "file:2: it is no YAML"),
    ("pools: {}\n---\npools: {}", "file:2: there is a second document"),
    ("profiles: !!python/name:os.system {}", "file:1: 'tag:yaml.org,2002:python/name:os.system' is a tag"),
    ("profiles:\n  web: &a {}\n  db:\n    <<: *a", "file:4: merge keys (<<) cannot be used here"),
    ("profiles: *a", "file:1: nothing before this line is called &a"),
    ("profiles: &a {web: *a}", "file:1: nothing before this line is called &a"),
    ("? [a]\n: b", "file:1: a list or a mapping cannot be a key"),
    ("a\x00b", "file:1: it is no YAML"),
    ("", "file:1: it is empty"),
    (
        f"pools:\n  10.1.0.0/16: {{note: {'[' * 40}{']' * 40}}}",
        "file:2: this cannot be stored: it is nested deeper than",
    ),
    (f"pools:\n  10.1.0.0/16: {{note: {'x' * 600_000}}}", "file:2: this cannot be stored: it has more than 512 KiB"),
    (
        f"bgp:\n  peers:\n    192.0.2.9: {{as_num: 1, note: {'[' * 40}{']' * 40}}}",
        "file:3: this cannot be stored: it is nested deeper than",
    ),
    (
        f"profiles:\n  web:\n    inbound:\n    - {{action: allow, dscp: {'[' * 40}{']' * 40}}}",
        "file:2: this cannot be stored: it is nested deeper than",
    ),
    (f"profiles:\n  new: {{other_fields: {{n: {'[' * 40}{']' * 40}}}}}", "file:2: this cannot be stored: it is nested"),
    ("pools:\n  fd00:1::/64: {ipip: tunl0}", "file:2: ipip is for IPv4 alone"),
    (f"profiles:\n  web:\n    tags: [{', '.join(map(str, range(100_000)))}]", "file:2: a profile can have 256 tags"),
    (f"profiles:\n  web:\n    inbound: [{'allow, ' * 6000}]", "file:2: a profile can have 5000 rules"),
    (f"settings:\n  felix:\n    LogFilePath: {'x' * 600_000}", "file:3: LogFilePath has more than 512 KiB"),
    ("- a", "file:1: the file must be a mapping"),
]


@pytest.mark.parametrize(("text", "why"), MISTAKES)
def test_a_mistake_changes_nothing_and_its_line_is_named(store: MemoryStore, apply: Any, text: str, why: str) -> None:
    before = values(store)
    status, out, err = apply(f"{text}\n")
    err = "".join(line for line in err.splitlines(True) if not line.startswith("Warning: file:"))
    assert status == 1 and out == "" and why in err and err.count("\n") == 1, err
    assert values(store) == before


def test_bad_usage_and_unreadable_files(store: MemoryStore, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["apply"]) == 2 and main(["apply", "x", "--force"]) == 2
    assert main(["apply", f"{tmp_path}/none"]) == 1 and "none: No such file" in capsys.readouterr().err
    (tmp_path / "binary").write_bytes(b"pools: {}\n\xff\xfe")
    assert main(["apply", f"{tmp_path}/binary"]) == 1 and "binary:2: it is not UTF-8 text" in capsys.readouterr().err
    assert main(["apply", "/dev/zero"]) == 1 and "/dev/zero: it has more than 8 MiB" in capsys.readouterr().err
    assert main(["apply", str(tmp_path)]) == 1 and "Is a directory" in capsys.readouterr().err
    assert main(["export", f"{tmp_path}/none/x"]) == 1 and "No such file" in capsys.readouterr().err


def test_texts_are_taken_as_they_stand(store: MemoryStore, apply: Any) -> None:
    """What YAML takes for a boolean, a number or a date is a name where a name is expected."""
    assert apply("profiles:\n  no: {tags: [no, 1.20, 010, 2026-11-27]}\nendpoints: {host1/docker/w: [no]}")[0] == 0
    assert json.loads(values(store)[keys.profile_tags("no")]) == ["no", "1.20", "010", "2026-11-27"]
    assert DatastoreClient(store, "host1").readable_endpoints()[0][0].profile_ids == ["no"]


def test_anchors_save_typing_and_cannot_be_a_bomb(store: MemoryStore, apply: Any) -> None:
    shared = "profiles:\n  a: &std\n    inbound: [deny udp]\n    tags: []\n  b: *std\n"
    assert apply(shared)[0] == 0
    assert json.loads(values(store)[keys.profile_rules("b")])["inbound_rules"] == [
        {"action": "deny", "protocol": "udp"}
    ]
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
    for text, why in (
        (bomb, "it has more than 1000000 parts"),
        ("[" * 100_000, "exceeded maximum nesting depth|nested deeper"),
        ("[" * 100, f"nested deeper than {DEPTH} levels"),
        ("{a: " * 100, f"nested deeper than {DEPTH} levels"),
        (" " * (LONGEST + 1), "it has more than 8 MiB"),
    ):
        with pytest.raises(CalicoError, match=why):
            load(text, "file")


def test_rules_that_no_text_can_say_are_objects(store: MemoryStore, apply: Any) -> None:
    text = "profiles:\n  web:\n    inbound:\n    - {action: allow, dscp: 1}\n"
    status, _, err = apply(text)
    assert status == 0 and "file:4: the field 'dscp' of a rule is not known here, so profile web denies" in err
    assert json.loads(values(store)[keys.profile_rules("web")])["inbound_rules"] == [{"action": "allow", "dscp": 1}]
    assert "- action: allow\n      dscp: 1\n" in dump(document(read(DatastoreClient(store, "host1"))))
    # what is invalid stays, and can be moved, but not added
    DatastoreClient(store, "host1").modify_rules("web", lambda rules: not rules.inbound.insert(0, Rule("alow")))
    assert apply(text + "    - {action: alow}\n")[0] == 0
    assert "file:4: a rule's action is 'alow'" in apply("profiles:\n  db:\n    outbound:\n    - {action: alow}\n")[2]
    assert "no profile has the tag lb" in apply("profiles: {db: {inbound: [allow from tag lb]}}")[2]


def test_an_endpoint_can_keep_a_profile_that_does_not_exist_but_not_get_one(store: MemoryStore, apply: Any) -> None:
    assert apply("endpoints: {host1/docker/w: [old]}")[0] == 0
    DatastoreClient(store, "host1").remove_profile("old")
    assert apply("endpoints: {host1/docker/w: [db, old]}")[0] == 0
    assert DatastoreClient(store, "host1").readable_endpoints()[0][0].profile_ids == ["db", "old"]
    assert apply("endpoints: {host1/docker/w: [db]}")[0] == 0
    assert "file:1: profile old does not exist" in apply("endpoints: {host1/docker/w: [db, old]}")[2]


def test_values_that_are_invalid_in_the_store(
    store: MemoryStore, apply: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    store.put(keys.profile_rules("web"), "{")
    assert main(["export"]) == 1
    said = capsys.readouterr()
    assert "  web:\n    tags: [web]\n  " in said.out or "  web:\n    tags: [web]\nbgp" in said.out
    assert "web/rules has an invalid value" in said.err and "1 invalid value left out." in said.err
    assert apply(said.out) == (0, "No difference.\n", "")
    status, out, err = apply("profiles: {db: {}, old: {}}\nendpoints: {host1/docker/w: [db]}", "--prune")
    assert status == 0 and "web" in DatastoreClient(store, "host1").profile_names()  # it may be anything
    assert err.startswith("Warning: etcd key /calico/v1/policy/profile/web/rules has an invalid value: ")
    status, out, err = apply("profiles: {web: {inbound: []}}")
    assert (status, out) == (1, "") and "web/rules has an invalid value" in err


def test_another_writer_comes_between(store: MemoryStore, apply: Any) -> None:
    """The change is computed again from what the other writer has left, and what is new is printed."""
    other = DatastoreClient(store.client(), "host2")
    came: list[str] = []

    def fault() -> None:
        store.fault = lambda: None
        came.append("once")
        other.modify_tags("web", lambda tags: not tags.append("theirs"))
        other.modify_rules("web", lambda rules: not rules.outbound.append(Rule("deny")))

    store.fault = fault
    status, out, _ = apply("profiles: {web: {inbound: [deny udp], tags: [web]}}")
    assert status == 0 and came
    assert out.splitlines() == [
        "~ profile web: - inbound rule 1: allow from tag web",
        "~ profile web: + inbound rule 1: deny udp",
        "~ profile web: - tag theirs",
    ]
    rules = other.rules("web")
    assert [rule.action for rule in rules.inbound] == ["deny"] and [r.action for r in rules.outbound] == [
        "allow",
        "deny",
    ]
    assert other.tags("web") == ["web"]

    store.fault = lambda: "conflict"
    status, _, err = apply("profiles: {db: {tags: []}}")
    assert status == 1 and "keeps being modified concurrently; retry" in err


def test_what_is_no_configuration_is_not_read(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses, handles and statuses are most of what is below /calico."""
    read_directories: list[str] = []
    collect = store.collect

    def noting(directory: str, *more: Any) -> list[Any]:
        read_directories.append(directory)
        return collect(directory, *more)

    monkeypatch.setattr(store, "collect", noting)
    read(DatastoreClient(store, "host1"))
    assert read_directories == ["/calico/v1", "/calico/bgp/v1"]


def test_a_pool_is_compared_with_what_the_difference_was_computed_from(store: MemoryStore, apply: Any) -> None:
    other = DatastoreClient(store.client(), "host2")

    def fault() -> None:
        store.fault = lambda: None
        other.put_pool(Pool("10.0.0.0/16", vxlan="always"))

    store.fault = fault
    status, out, _ = apply("pools: {10.0.0.0/16: {masquerade: true}}")
    assert status == 0 and out.splitlines() == [
        "~ pool 10.0.0.0/16: masquerade from false to true",
        "~ pool 10.0.0.0/16: masquerade from false to true, vxlan_mode from always to never",
    ]


def test_a_pool_gives_way_to_an_older_one_that_overlaps(store: MemoryStore, apply: Any) -> None:
    other = DatastoreClient(store.client(), "host2")

    def before_the_second() -> None:
        store.fault = lambda: None
        other.put_pool(Pool("10.2.0.0/17"))

    def before_the_first() -> None:
        store.fault = before_the_second

    store.fault = before_the_first
    status, _, err = apply("pools: {10.1.0.0/16: {}, 10.2.0.0/16: {}}\nprofiles: {new: {}}")
    assert status == 1 and err.splitlines()[1:] == [
        "1 of 6 differences were applied, or a few more; the last one was '+ pool 10.1.0.0/16'. Repeat the command to "
        "apply the rest.",
        "10.2.0.0/16 overlaps with 10.2.0.0/17, which was added concurrently.",
    ]
    assert [pool.cidr for pool in other.pools(4)] == ["10.0.0.0/16", "10.1.0.0/16", "10.2.0.0/17"]
    assert not other.profile_exists("new")


def test_the_setting_that_goes_with_ipip_is_a_difference(store: MemoryStore, apply: Any) -> None:
    text = "pools: {10.1.0.0/16: {ipip: tunl0}}"
    setting = keys.config("IpInIpEnabled")
    status, out, err = apply(f"{text}\nsettings: {{felix: {{IpInIpEnabled: false}}}}")
    assert (status, out) == (0, "+ pool 10.1.0.0/16: ipip tunl0\n") and setting not in store.entries
    assert "use vxlan_mode instead" in err
    assert apply(text)[1] == "No difference.\n"
    assert (
        apply(text.replace(".1.", ".2."))[1] == "+ pool 10.2.0.0/16: ipip tunl0\n+ setting felix IpInIpEnabled: true\n"
    )
    assert store.entries[setting].value == "true"


def test_a_profile_that_another_writer_creates_again_stays(
    store: MemoryStore, apply: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = DatastoreClient(store.client(), "host2")
    commit = DatastoreClient.commit

    def then_create(datastore: DatastoreClient, writes: Any) -> None:
        commit(datastore, writes)
        other.create_profile("old")

    monkeypatch.setattr(DatastoreClient, "commit", then_create)
    assert apply("profiles: {web: {}, db: {}}", "--prune")[:2] == (0, "- profile old\n")
    assert other.tags("old") == ["old"] and len(other.rules("old").inbound) == 1


def test_a_profile_goes_with_what_other_programs_have_put_beside_it(store: MemoryStore, apply: Any) -> None:
    for number in range(150):
        store.put(f"{keys.profile('old')}/notes/{number}", "x")
    assert apply("profiles: {web: {}, db: {}}", "--prune")[:2] == (0, "- profile old\n")
    assert DatastoreClient(store, "host1").profile_names() == ["db", "web"]


def test_a_profile_whose_creation_was_interrupted_is_completed(store: MemoryStore, apply: Any) -> None:
    store.put(keys.profile_tags("half"), '["half"]')
    store.put(keys.profile_rules("other"), '{"inbound_rules": []}')
    assert apply("profiles: {half: {}, other: {}, web: {}}")[:2] == (
        0,
        "~ profile half: + inbound rule 1: allow from tag half\n~ profile half: + outbound rule 1: allow\n"
        "~ profile other: + tag other\n",
    )
    assert DatastoreClient(store, "host1").rules("half").outbound == [Rule()]


TWO_POOLS = "pools: {10.1.0.0/16: {}, 10.2.0.0/16: {}}\nprofiles: {new: {}}"


def test_what_was_changed_before_a_failure_is_said(store: MemoryStore, apply: Any) -> None:
    left = 2

    def fault() -> str | None:
        nonlocal left
        left -= 1
        return "down" if left < 0 else None

    store.fault = fault
    status, out, err = apply(TWO_POOLS, "--output=json")
    found = json.loads(out)
    assert (
        status == 1
        and found["changed"]
        and [one["name"] for one in found["differences"]]
        == [
            "10.1.0.0/16",
            "10.2.0.0/16",
        ]
    )
    said = "2 of 6 differences were applied, or a few more; the last one was '+ pool 10.2.0.0/16'."
    assert said in err and "etcd cannot be reached" in err
    status, out, err = apply("profiles: {new: {}}")
    assert status == 1 and err == "etcd cannot be reached\n"  # nothing was


def test_what_was_changed_before_an_interrupt_is_said(store: MemoryStore, apply: Any) -> None:
    calls = iter([None, Interrupted(2)])

    def fault() -> None:
        interrupted = next(calls)
        if interrupted is not None:
            raise interrupted

    store.fault = fault
    status, _, err = apply(TWO_POOLS)
    assert status == 130 and "1 of 6 differences were applied" in err and "Interrupted" in err


@pytest.mark.parametrize("api", ["etcdv2", "etcdv3"])
def test_frozen_data_is_not_changed(apply: Any, api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "FRESH", -1)  # Ready is read before each write
    world = World(api)
    datastore = DatastoreClient(world.store, "host1")
    monkeypatch.setattr(DatastoreClient, "from_environment", lambda *of, **options: datastore)
    monkeypatch.setattr("calicoctl.commands.apply.warn_of_overlaps", lambda cidrs: None)
    datastore.create_profile("web")
    world.set_ready("false")
    assert apply("profiles: {web: {}}")[:2] == (0, "No difference.\n")
    assert apply(TWO_POOLS, "--dry-run")[0] == 3
    status, out, err = apply(TWO_POOLS)
    assert status == 1 and "data is frozen" in err and "applied" not in err and out.count("\n") == 6
    assert datastore.profile_names() == ["web"] and datastore.pools(4) == []

    # it is frozen between two commits
    world.set_ready("true")
    world.frozen = False
    check = DatastoreClient.refuse_overlap

    def freeze(*arguments: Any) -> None:
        check(*arguments)
        world.set_ready("false")

    monkeypatch.setattr(DatastoreClient, "refuse_overlap", freeze)
    status, _, err = apply(TWO_POOLS)
    assert status == 1 and "data is frozen" in err and "1 of 6 differences were applied" in err
    assert [pool.cidr for pool in datastore.pools(4)] == ["10.1.0.0/16"]


def test_export_warns_of_a_file_that_is_too_large_to_be_applied(
    store: MemoryStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["export"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    for longest, is_warned in ((len(said.out), False), (len(said.out) - 1, True)):
        monkeypatch.setattr("calicoctl.yaml_text.LONGEST", longest)
        assert main(["export"]) == 0 and ("and this is larger" in capsys.readouterr().err) == is_warned


def test_a_file_is_replaced_at_once(
    store: MemoryStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, link = tmp_path / "network.yaml", tmp_path / "link"
    file.write_text("before")
    file.chmod(0o640)
    link.symlink_to(file)
    reader = file.open()
    assert main(["export", str(link)]) == 0 and link.is_symlink()
    assert reader.read() == "before"  # whoever has it open reads no part of the new one
    assert "profiles:" in file.read_text() and file.stat().st_mode & 0o777 == 0o640
    monkeypatch.setattr("pathlib.Path.rename", lambda *of: pytest.fail("it could not be written"))
    with pytest.raises(pytest.fail.Exception):
        main(["export", str(tmp_path / "other")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "network.yaml"]
    reader.close()
    assert main(["export", "/dev/full"]) == 1 and "No space left on device" in capsys.readouterr().err
    assert main(["export", str(tmp_path)]) == 1 and "Is a directory" in capsys.readouterr().err


def test_warnings_are_bounded(store: MemoryStore, apply: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(300):
        store.put(keys.profile_rules(f"p{number}"), "{")
    assert main(["export"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 102 and "300 invalid values left out." in err
    rules = ", ".join(f"allow from tag t{number}" for number in range(300))
    err = apply(f"profiles: {{web: {{inbound: [{rules}]}}}}")[2]
    assert err.count("\n") == 101 and "no profile has the tag t0, so it matches nothing.\n" in err


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_standard_input_is_utf_8_in_any_locale(locale: str) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "calicoctl", "apply", "-"],
        input=b"pools: {}\nprofiles: {\xff: {}}\n",
        env={
            **os.environ,
            "LC_ALL": locale,
            "PYTHONUTF8": "0",
            "PYTHONCOERCECLOCALE": "0",
            "CALICO_ENV_FILE": "/dev/null",
        },
        capture_output=True,
    )
    assert said.returncode == 1 and said.stderr == b"standard input:2: it is not UTF-8 text\n"


def test_only_export_and_apply_import_yaml() -> None:
    script = "import sys, calicoctl.cli.main, calicoctl.commands.{}; assert 'yaml' not in sys.modules"
    for command in ("apply", "export", "profile", "pool"):
        subprocess.run([sys.executable, "-c", script.format(command)], check=True)
