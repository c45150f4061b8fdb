"""The text of rules: what is accepted and refused, and that parsing and printing are inverse."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calicoctl.datastore.model import RULE_FIELDS, Rule
from calicoctl.errors import CalicoError, UsageError
from calicoctl.felix.dataplane.ruleset import rule_lines
from calicoctl.policy.rules import check_name, check_rule, check_rules, parse, text


@pytest.mark.parametrize(
    ("words", "stored"),
    [
        ("allow", {"action": "allow"}),
        ("deny from tag web", {"action": "deny", "src_tag": "web"}),
        ("allow tcp", {"action": "allow", "protocol": "tcp"}),
        (
            "allow tcp from ports 80,443 tag a cidr 10.1.2.3/8 to ports 8000:8010,1-2 tag b cidr 192.0.2.1",
            {
                "action": "allow",
                "protocol": "tcp",
                "src_ports": [80, 443],
                "src_tag": "a",
                "src_net": "10.0.0.0/8",
                "dst_ports": ["8000:8010", "1:2"],
                "dst_tag": "b",
                "dst_net": "192.0.2.1/32",
            },
        ),
        ("deny udp to ports 53", {"action": "deny", "protocol": "udp", "dst_ports": [53]}),
        ("allow icmp type 8 code 0", {"action": "allow", "protocol": "icmp", "icmp_type": 8, "icmp_code": 0}),
        ("allow icmpv6 type 128", {"action": "allow", "protocol": "icmpv6", "icmp_type": 128}),
        ("allow protocol 47 to cidr fd00::/8", {"action": "allow", "protocol": 47, "dst_net": "fd00::/8"}),
        ("allow from 10.0.0.0/8", {"action": "allow", "src_net": "10.0.0.0/8"}),
        ("log", {"action": "log"}),
        ("log tcp from tag web to ports 80", {"action": "log", "protocol": "tcp", "src_tag": "web", "dst_ports": [80]}),
        ("deny ipv6 udp", {"action": "deny", "ip_version": 6, "protocol": "udp"}),
        ("allow protocol sctp to ports 80", {"action": "allow", "protocol": "sctp", "dst_ports": [80]}),
        ("allow protocol 58 type 1 code 4", {"action": "allow", "protocol": 58, "icmp_type": 1, "icmp_code": 4}),
    ],
)
def test_the_grammar(words: str, stored: dict) -> None:
    assert parse(words.split()).to_dict() == stored


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("", "begins with 'allow', 'deny' or 'log'"),
        ("permit tcp", "begins with 'allow', 'deny' or 'log'"),
        ("allow icmp code 0", "needs an ICMP type"),
        ("allow icmp to ports 80", "'ports' goes with tcp and udp"),
        ("allow from ports 80", "'ports' goes with tcp and udp"),
        ("allow tcp from", "'from' needs"),
        ("allow tcp from tag", "'tag' needs a value"),
        ("allow tcp from tag to tag b", "there twice"),
        ("allow tcp to tag a from tag b", "'from' is out of place"),
        ("allow tcp from tag a tag b", "there twice"),
        ("allow tcp type 8", "'type' goes with icmp"),
        ("allow sctp", "out of place"),
        ("allow tcp ipv4", "'ipv4' is out of place"),
    ],
)
def test_words_out_of_place_are_bad_usage(words: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse(words.split())


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("allow tcp to ports 90-80", "backwards"),
        ("allow tcp to ports 65536", "from 0 to 65535"),
        ("allow tcp to ports 80,", "not a valid port"),
        ("allow tcp to ports 1-2-3", "not a valid port"),
        ("allow tcp to ports \uff14", "not a valid port"),
        ("allow icmp type 256", "from 0 to 255"),
        ("allow icmp type x", "from 0 to 255"),
        ("allow from cidr 10.0.0.0/33", "not a valid CIDR"),
        ("allow from cidr 10.0.0.0/8garbage", "not a valid CIDR"),
        ("allow from cidr 10/8", "not a valid CIDR"),
        ("allow from tag a/b", "not a valid tag name"),
        ("allow protocol 256", "from 0 to 255"),
        ("allow protocol ²", "not a valid protocol"),
        ("allow icmpv6 from cidr 10.0.0.0/8", "never match"),
        ("log ipv4 from cidr fd00::/8", "never match"),
        ("allow from cidr 10.0.0.0/8 to cidr fd00::/8", "never match"),
        ("{", "not a JSON object"),
    ],
)
def test_values_that_are_not_allowed_are_named(words: str, why: str) -> None:
    with pytest.raises(CalicoError, match=why):
        parse(words.split())


NAMES = st.from_regex(r"[A-Za-z0-9_.-]{1,39}", fullmatch=True).filter(lambda name: name not in (".", ".."))
NUMBER = st.integers(0, 255)
PORT = st.integers(0, 65535)
PORTS = st.lists(PORT | st.tuples(PORT, PORT).map(lambda pair: f"{min(pair)}:{max(pair)}"), min_size=1, max_size=5)
NETS = st.ip_addresses(v=4).map(lambda a: f"{a}/32")
SIDES = {"src_tag": NAMES, "dst_tag": NAMES, "src_net": NETS, "dst_net": NETS}
RULES = st.one_of(
    st.fixed_dictionaries(
        {"action": st.sampled_from(["allow", "deny"])},
        optional={**SIDES, "protocol": st.sampled_from(["tcp", "udp"]), "ip_version": st.just(4)},
    ),
    st.fixed_dictionaries(
        {"action": st.sampled_from(["allow", "deny", "log"]), "protocol": st.sampled_from(["tcp", "udp", "sctp"])},
        optional={**SIDES, "src_ports": PORTS, "dst_ports": PORTS, "ip_version": st.just(4)},
    ),
    st.fixed_dictionaries(
        {"action": st.just("allow"), "protocol": st.just("icmp"), "icmp_type": NUMBER},
        optional={**SIDES, "icmp_code": NUMBER},
    ),
    st.fixed_dictionaries({"action": st.just("deny"), "protocol": NUMBER.filter(lambda n: n != 58)}, optional=SIDES),
)


@given(RULES)
def test_a_rules_text_is_what_parse_accepts(stored: dict) -> None:
    rule = Rule.from_dict(stored)
    assert parse(text(rule).split()) == rule


@pytest.mark.parametrize(
    ("stored", "spelled"),
    [
        ({}, "allow"),
        ({"protocol": "sctp"}, "allow protocol sctp"),
        ({"protocol": "tcp", "dst_ports": ["80", "90:90"]}, "allow tcp to ports 80,90:90"),
        (
            {"action": "deny", "ip_version": 6, "src_net": "10.0.0.0/8"},
            "deny ipv6 from cidr 10.0.0.0/8 [matches no packet: it mixes IPv4 and IPv6]",
        ),
        (
            {"action": "allow", "src_tag": "two words"},
            "allow from tag two words [cannot be enforced, so the profile denies: 'two words' is not a valid tag name: "
            "it must have letters, digits, '_', '.' and '-']",
        ),
    ],
)
def test_texts_of_rules_that_others_have_written(stored: dict, spelled: str) -> None:
    assert text(Rule.from_dict(stored)) == spelled


@pytest.mark.parametrize(
    "stored",
    [{"colour": "red"}, {"src_ports": "80"}, {"action": {"a": 1}}, {"dst_ports": []}, {"protocol": ["tcp"]}],
)
def test_what_cannot_be_enforced_is_shown_with_the_reason_and_without_json(stored: dict) -> None:
    spelled = text(Rule.from_dict({"action": "allow", **stored}))
    assert "[cannot be enforced, so the profile denies: a rule" in spelled and '{"' not in spelled


GOOD = {
    "id": "web",
    "inbound_rules": [{"action": "allow", "protocol": "tcp", "dst_ports": ["80"]}],
    "outbound_rules": [],
}


def test_rules_from_json_are_taken_as_the_store_has_them() -> None:
    rules = check_rules("web", json.dumps(GOOD))
    assert rules.to_dict() == {**GOOD, "inbound_rules": [{"action": "allow", "protocol": "tcp", "dst_ports": [80]}]}


@pytest.mark.parametrize(
    ("document", "why"),
    [
        ("", "not JSON"),
        ("[]", "must be a JSON object"),
        ("[" * 100_000, "nested too deeply|not JSON"),
        (json.dumps({"id": "web", "inbound_rules": []}), "lack the field 'outbound_rules'"),
        (json.dumps({**GOOD, "colour": 1}), "unknown field 'colour'"),
        (json.dumps({**GOOD, "id": "db"}), "not of web"),
        (json.dumps({**GOOD, "inbound_rules": {}}), "inbound_rules must be a list"),
        *(
            (json.dumps({**GOOD, "outbound_rules": [{"action": "allow"}, rule]}), f"outbound_rules, rule 2: .*{why}")
            for rule, why in [
                (1, "must be a JSON object"),
                ({"action": "permit"}, "action is 'permit'"),
                ({"action": "allow", "colour": "red"}, "unknown field 'colour'"),
                ({"action": "allow", "protocol": "gre"}, "not a valid protocol"),
                ({"action": "allow", "protocol": []}, "neither a number nor a string"),
                ({"action": "allow", "src_net": "10.0.0.0/99"}, "not a valid CIDR"),
                ({"action": "allow", "src_tag": "a/b"}, "not a valid tag"),
                ({"action": "allow", "protocol": "tcp", "dst_ports": 80}, "must be a list"),
                ({"action": "allow", "protocol": "tcp", "dst_ports": ["9:8"]}, "backwards"),
                ({"action": "allow", "dst_ports": [80]}, "ports go with"),
                ({"action": "allow", "protocol": "icmp", "icmp_code": 1}, "needs an ICMP type"),
                ({"action": "allow", "protocol": "tcp", "icmp_type": 1}, "goes with the protocols icmp"),
                ({"action": "allow", "ip_version": 5}, "must be 4 or 6"),
            ]
        ),
    ],
)
def test_rules_json_that_is_wrong_is_refused_with_the_place(document: str, why: str) -> None:
    with pytest.raises(CalicoError, match=why):
        check_rules("web", document)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["action", "protocol", "src_ports", "x"]), inner),
)


@given(JSON | st.fixed_dictionaries({"id": st.just("web"), "inbound_rules": JSON, "outbound_rules": st.lists(JSON)}))
def test_no_json_makes_anything_but_a_sentence(document: object) -> None:
    with contextlib.suppress(CalicoError):
        check_rules("web", json.dumps(document))


WORDS = ("allow", "tcp", "icmp", "from", "to", "ports", "tag", "cidr", "type", "code", "80", "10.0.0.0/8", "{", "x")


@given(st.lists(st.sampled_from(WORDS) | st.text()))
def test_no_words_make_anything_but_a_sentence(words: list[str]) -> None:
    try:
        rule = parse(words)
    except CalicoError:
        return
    assert parse(text(rule).split(" ")) == rule


@pytest.mark.parametrize("name", ["", "a/b", "a b", ".", "..", "x" * 40, "é", "a\n", "_a"])
def test_names_that_are_not_allowed(name: str) -> None:
    with pytest.raises(CalicoError, match="not a valid profile name"):
        check_name(name, "profile")


ANYTHING = st.none() | st.booleans() | st.integers(-1, 300) | st.sampled_from(["tcp", "allow", "1", "10.0.0.0/8", "x"])


@given(st.dictionaries(st.sampled_from(RULE_FIELDS), ANYTHING | st.lists(ANYTHING, max_size=2)))
def test_every_accepted_rule_can_be_rendered_as_nftables(fields: dict) -> None:
    try:
        rule = check_rule({"action": "allow", **fields}, must_match=False)
    except CalicoError:
        return
    assert all(isinstance(line, str) for line in rule_lines(rule, "here", "inbound/web/0", "inbound"))
    assert rule.src_tag is None or isinstance(rule.src_tag, str)
