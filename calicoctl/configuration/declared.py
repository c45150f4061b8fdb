"""Reads the configuration that a file declares, and checks all that can be checked without the store.

Errors name the file and the line. What an object that exists may have, but a new one may not, is checked in changes.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, Generic, TypeVar

from calicoctl.addresses import parse_address, parse_as_number, parse_pool_cidr
from calicoctl.configuration.stored import PeerId, SettingId
from calicoctl.datastore import keys
from calicoctl.datastore.config import RESERVED, settings_of
from calicoctl.datastore.hosts import check_hostname
from calicoctl.datastore.model import RULE_FIELDS, VXLAN_MODES, Peer, Pool, Rule
from calicoctl.errors import CalicoError
from calicoctl.policy import rules as policy
from calicoctl.spelling import did_you_mean, nearest
from calicoctl.yaml_text import Node, load

T = TypeVar("T")

SECTIONS = ("pools", "profiles", "bgp", "settings", "endpoints")

POOL_FIELDS = ("ipip", "masquerade", "vxlan_mode")


@dataclass(frozen=True)
class Located(Generic[T]):
    """A value, and the part of the file that declares it."""

    value: T
    node: Node


@dataclass(frozen=True)
class DeclaredRule:
    """A rule in a file. `problem` says why no new rule may be like this, None if one may.

    `foreign` has the fields that are not known, which another program may know.
    """

    rule: Rule
    node: Node
    problem: str | None = None
    foreign: tuple[str, ...] = ()


@dataclass
class DeclaredProfile:
    """A profile in a file. What is None is not in the file."""

    node: Node
    tags: list[Located[str]] | None = None
    inbound: list[DeclaredRule] | None = None
    outbound: list[DeclaredRule] | None = None
    other_fields: dict[str, Any] = field(default_factory=dict)


@dataclass
class Declared:
    """The configuration in a file. A section that is None is not in the file.

    The peers in `peers` and `node_peers`, and the settings, have the same keys as in Stored. `scopes` are the parts of
    `settings` that are in the file, as pairs of daemon, and whether it is about single hosts.
    """

    pools: dict[str, Located[Pool]] | None = None
    profiles: dict[str, DeclaredProfile] | None = None
    node_mesh: Located[bool] | None = None
    as_num: Located[str] | None = None
    peers: dict[PeerId, Located[Peer]] | None = None
    node_peers: dict[PeerId, Located[Peer]] | None = None
    settings: dict[SettingId, Located[str]] = field(default_factory=dict)
    scopes: set[tuple[str, bool]] = field(default_factory=set)
    endpoints: dict[str, Located[list[Located[str]]]] | None = None


def parse(text: str, source: str) -> Declared:
    """Return the configuration that `text`, YAML, declares; `source` is the file's name. Raises CalicoError."""
    declared = Declared()
    sections = load(text, source).mapping("the file", SECTIONS)
    if "pools" in sections:
        declared.pools = _each(sections["pools"], "pools", _pool, _pool_name)
    if "profiles" in sections:
        declared.profiles = _each(sections["profiles"], "profiles", _profile, _profile_name)
    if "bgp" in sections:
        _bgp(declared, sections["bgp"])
    if "settings" in sections:
        _settings(declared, sections["settings"])
    if "endpoints" in sections:
        declared.endpoints = {
            name: Located(_texts(node, "the profiles of an endpoint"), _named(node, _endpoint_name, name))
            for name, node in sections["endpoints"].mapping("endpoints").items()
        }
    return declared


def _each(
    section: Node, what: str, convert: Callable[[str, Node], T], canonical: Callable[[str], str] = str
) -> dict[str, T]:
    """Return the members of a section, converted, by their canonical names. `what` is what errors call the section."""
    found: dict[str, T] = {}
    for text, node in section.mapping(what).items():
        name = _located(node, canonical, text)
        if name in found:
            raise node.error(f"'{text}' is {name}, which is there already")
        found[name] = convert(name, node)
    return found


def _located(node: Node, function: Callable[[str], T], text: str) -> T:
    """Return `function(text)`; if it raises CalicoError, raise one that names the line of `node`."""
    try:
        return function(text)
    except CalicoError as error:
        raise node.error(str(error)) from None


def _named(node: Node, check: Callable[[str], object], name: str) -> Node:
    _located(node, check, name)
    return node


def _texts(node: Node, what: str) -> list[Located[str]]:
    return [Located(item.text(f"an item of {what}"), item) for item in node.items(what)]


# Pools


def _pool_name(text: str) -> str:
    if "/" not in text:
        raise CalicoError(f"'{text}' is one address, and a pool is a network: add a prefix length")
    return str(parse_pool_cidr(text))


def _pool(cidr: str, node: Node) -> Located[Pool]:
    known: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for name, value in node.mapping(f"pool {cidr}").items():
        data = value.data()
        if name == "cidr":
            raise value.error("the CIDR of a pool stands before its fields, and cannot be one of them")
        if name == "masquerade" and not isinstance(data, bool):
            raise value.error("masquerade must be true or false")
        if name == "vxlan_mode" and data not in VXLAN_MODES:
            raise value.error(f"vxlan_mode must be one of {', '.join(VXLAN_MODES)}")
        (known if name in POOL_FIELDS else extra)[name] = data
    pool = Pool(
        cidr, known.get("ipip") or None, known.get("masquerade", False), known.get("vxlan_mode", "never"), extra
    )
    return Located(pool, node)


# Profiles


def _profile_name(text: str) -> str:
    if not keys.can_be_part(text):
        raise CalicoError(f"'{text}' is not a valid profile name")
    return text


def _profile(name: str, node: Node) -> DeclaredProfile:
    fields = node.mapping(f"profile {name}", ("tags", "inbound", "outbound", "other_fields"))
    profile = DeclaredProfile(node)
    if "tags" in fields:
        profile.tags = _texts(fields["tags"], "tags")
    if "inbound" in fields:
        profile.inbound = [_rule(item) for item in fields["inbound"].items("inbound")]
    if "outbound" in fields:
        profile.outbound = [_rule(item) for item in fields["outbound"].items("outbound")]
    if "other_fields" in fields:
        others = fields["other_fields"].mapping("other_fields")
        for known in ("id", "inbound_rules", "outbound_rules"):
            if known in others:
                raise others[known].error(f"'{known}' cannot be one of the other fields")
        profile.other_fields = {other: value.data() for other, value in others.items()}
    return profile


def _rule(node: Node) -> DeclaredRule:
    if isinstance(node.value, str):
        text = node.text("a rule")
        return DeclaredRule(_located(node, lambda words: policy.parse(words.split()), text), node)
    fields = node.mapping("a rule, unless it is a text,")
    data = {name: value.data() for name, value in fields.items()}
    for name, value in data.items():
        if value is None and name in RULE_FIELDS:  # in the store, that is as if it were not there: it matches more
            raise fields[name].error(f"{name} of a rule has no value")
    foreign = tuple(name for name in data if name not in RULE_FIELDS)
    for name in foreign:
        near = nearest(name, RULE_FIELDS)
        if near:
            return DeclaredRule(
                Rule.from_dict(data), fields[name], f"a rule has no field '{name}'{did_you_mean(repr(near))}", foreign
            )
    if "action" not in data:  # such as `- allow from tag: web`, which YAML takes for a mapping
        raise node.error("a rule is a text, such as 'allow tcp', or a mapping with an action: allow, deny or log")
    try:
        sound = policy.check_rule({name: value for name, value in data.items() if name in RULE_FIELDS})
    except CalicoError as error:
        return DeclaredRule(Rule.from_dict(data), node, str(error), foreign)
    return DeclaredRule(Rule.from_dict(data) if foreign else sound, node, None, foreign)


# BGP


def _bgp(declared: Declared, section: Node) -> None:
    fields = section.mapping("bgp", ("node-mesh", "default-node-as", "peers", "node-peers"))
    if "node-mesh" in fields:
        node = fields["node-mesh"]
        text = node.text("node-mesh")
        if text not in ("true", "false", "on", "off"):
            raise node.error("node-mesh must be true or false")
        declared.node_mesh = Located(text in ("true", "on"), node)
    if "default-node-as" in fields:
        node = fields["default-node-as"]
        declared.as_num = Located(_located(node, parse_as_number, node.text("default-node-as")), node)
    if "peers" in fields:
        declared.peers = {(None, ip): peer for ip, peer in _peers(fields["peers"]).items()}
    if "node-peers" in fields:
        hosts = _each(fields["node-peers"], "node-peers", lambda name, node: _peers(node), check_hostname)
        declared.node_peers = {(host, ip): peer for host, peers in hosts.items() for ip, peer in peers.items()}


def _peers(section: Node) -> dict[str, Located[Peer]]:
    return _each(section, "BGP peers", _peer, lambda text: str(parse_address(text)))


def _peer(ip: str, node: Node) -> Located[Peer]:
    fields = dict(node.mapping(f"BGP peer {ip}"))
    if "ip" in fields:
        raise fields["ip"].error("the address of a peer stands before its fields, and cannot be one of them")
    number = fields.pop("as_num", None)
    if number is None:
        raise node.error(f"BGP peer {ip} has no as_num")
    as_num = _located(number, parse_as_number, number.text("as_num"))
    return Located(Peer(ip, as_num, {name: value.data() for name, value in fields.items()}), node)


# Settings


def _settings(declared: Declared, section: Node) -> None:
    fields = section.mapping("settings", ("felix", "bgp", "node"))
    for daemon in ("felix", "bgp"):
        if daemon in fields:
            _add_settings(declared, fields[daemon], daemon, None)
    if "node" in fields:
        declared.scopes |= {("felix", True), ("bgp", True)}
        for host, node in fields["node"].mapping("node").items():
            _located(node, check_hostname, host)
            for daemon, inner in node.mapping(f"the settings of {host}", ("felix", "bgp")).items():
                _add_settings(declared, inner, daemon, host)


def _add_settings(declared: Declared, section: Node, daemon: str, host: str | None) -> None:
    declared.scopes.add((daemon, host is not None))
    for text, node in section.mapping(f"the settings of {daemon}").items():
        known = settings_of(daemon, host is not None).get(text)
        id = SettingId(daemon, host, text if known is None else known.name)
        if text in RESERVED or not keys.can_be_part(text):
            raise node.error(f"'{text}' cannot be a setting")
        if id in declared.settings:
            raise node.error(f"'{text}' is {id.name}, which is there already")
        declared.settings[id] = Located(node.text(f"setting {text}"), node)


def _endpoint_name(text: str) -> None:
    if text.count("/") not in (2, 3):
        form = "HOST/ORCHESTRATOR/WORKLOAD"
        raise CalicoError(f"'{text}' is not an endpoint: it must be {form}, or {form}/ENDPOINT")
