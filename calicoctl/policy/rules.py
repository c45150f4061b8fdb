"""Parses, formats and validates the rules of profiles.

A rule is text or JSON on the command line, and JSON in files and in the store.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

from calicoctl import limits
from calicoctl.addresses import parse_cidr, version_of
from calicoctl.datastore.model import RULE_FIELDS, Rule, Rules
from calicoctl.errors import CalicoError, UsageError

PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17, "icmpv6": 58, "sctp": 132, "udplite": 136}
"""Protocol name in rules -> IP protocol number. Source: IANA, Assigned Internet Protocol Numbers."""

ICMP, UDP, ICMPV6 = PROTOCOLS["icmp"], PROTOCOLS["udp"], PROTOCOLS["icmpv6"]

PORT_PROTOCOLS = ("tcp", "udp")
ICMP_PROTOCOLS = ("icmp", "icmpv6")
OTHER_PROTOCOLS = ("sctp", "udplite")

ACTIONS = ("allow", "deny", "log")

WITH_PORTS = frozenset(PROTOCOLS[name] for name in PORT_PROTOCOLS + OTHER_PROTOCOLS)
"""The numbers of the protocols that have ports."""
_VERSIONS = {"ipv4": 4, "ipv6": 6}

GRAMMAR = """Usage:
  calicoctl (allow|deny|log) [ipv4|ipv6] (tcp|udp) [(from [(ports <PORTS>)] [(tag <TAG>)] [(cidr <CIDR>)])]
            [(to [(ports <PORTS>)] [(tag <TAG>)] [(cidr <CIDR>)])]
  calicoctl (allow|deny|log) [ipv4|ipv6] (icmp|icmpv6) [(type <TYPE> [(code <CODE>)])]
            [(from [(tag <TAG>)] [(cidr <CIDR>)])] [(to [(tag <TAG>)] [(cidr <CIDR>)])]
  calicoctl (allow|deny|log) [ipv4|ipv6] protocol <PROTOCOL>
            [(from [(tag <TAG>)] [(cidr <CIDR>)])] [(to [(tag <TAG>)] [(cidr <CIDR>)])]
  calicoctl (allow|deny|log) [ipv4|ipv6] [(from [(tag <TAG>)] [(cidr <CIDR>)])] [(to [(tag <TAG>)] [(cidr <CIDR>)])]
"""
"""The grammar of a rule in docopt's syntax, used for completion. `parse` accepts more than this grammar."""

KEYWORDS = ("from", "to", "ports", "tag", "cidr", "type", "code", "protocol", *_VERSIONS)
KEYWORDS += PORT_PROTOCOLS + ICMP_PROTOCOLS

_NAME = r"[A-Za-z0-9_.-]+"
LONGEST_NEW_NAME = 39
"""The maximum length of the name of a new profile or tag."""


def check_name(name: str, what: str) -> str:
    """Return `name`, the name of a new profile or tag; raise CalicoError if it is invalid.

    `what` is "profile" or "tag".
    """
    if what == "profile" and name.startswith("_"):
        raise CalicoError(f"'{name}' is not a valid profile name: etcd hides what begins with '_'")
    if not re.fullmatch(_NAME, name, re.ASCII) or name in (".", "..") or len(name) > LONGEST_NEW_NAME:
        raise CalicoError(
            f"'{name}' is not a valid {what} name: it must have 1 to {LONGEST_NEW_NAME} letters, digits, '_', '.' "
            "and '-'"
        )
    return name


def check_tag(name: str) -> str:
    """Return `name`, the name of a tag in a rule; raise CalicoError if it is invalid."""
    # the length is not limited, since other tools do not limit it
    if not re.fullmatch(_NAME, name, re.ASCII):
        raise CalicoError(f"'{name}' is not a valid tag name: it must have letters, digits, '_', '.' and '-'")
    return name


def parse(words: Sequence[str], is_new: bool = True) -> Rule:
    """Parse a rule from the words of a command line, or from a single word that is a JSON object.

    `is_new` is False for a rule that is to be removed: then a rule that matches no packet is accepted and, if it is not
    JSON, also a rule with an invalid tag name. Raises UsageError for missing or unexpected words, and CalicoError for
    invalid values.
    """
    if len(words) == 1 and words[0].startswith("{"):
        try:
            return check_rule(json.loads(words[0]), must_match=is_new)
        except (ValueError, RecursionError):
            raise CalicoError(f"'{words[0]}' is not a JSON object") from None
    left = deque(words)
    action = left.popleft() if left else ""
    if action not in ACTIONS:
        from calicoctl.spelling import did_you_mean, nearest

        meant = did_you_mean(repr(near)) if (near := nearest(action, ACTIONS)) else ""
        raise UsageError(f"a rule begins with 'allow', 'deny' or 'log', not '{action}'{meant}")
    rule = Rule(action)
    if left and left[0] in _VERSIONS:
        rule.ip_version = _VERSIONS[left.popleft()]
    if left and left[0] in PORT_PROTOCOLS + ICMP_PROTOCOLS:
        rule.protocol = left.popleft()
    elif left and left[0] == "protocol":
        left.popleft()
        rule.protocol = _protocol(_value(left, "protocol"))
    if _has_icmp_type(rule) and left and left[0] == "type":
        left.popleft()
        rule.icmp_type = _number(_value(left, "type"), 255, "ICMP type")
        if left and left[0] == "code":
            left.popleft()
            rule.icmp_code = _number(_value(left, "code"), 255, "ICMP code")
    for word, side in (("from", "src"), ("to", "dst")):
        if left and left[0] == word:
            left.popleft()
            _parse_side(rule, left, word, side, is_new)
    if left:
        raise UsageError(_out_of_place(left[0]))
    _check_sense(rule)
    if is_new:
        _check_versions(rule)
    return rule


def _parse_side(rule: Rule, left: deque[str], word: str, side: str, is_new: bool) -> None:
    """Parse the words at the start of `left`, up to "from" or "to", and remove them from `left`.

    The values are stored in the fields of `rule` whose names begin with `side` ("src" or "dst"). `word` is the keyword
    before the words: "from" or "to". For `is_new`, see `parse`.
    """
    seen = False
    while left and left[0] not in ("from", "to"):
        kind = left.popleft()
        if kind == "ports" and _has_ports(rule) and getattr(rule, f"{side}_ports") is None:
            setattr(rule, f"{side}_ports", _ports(_value(left, "ports")))
        elif kind == "tag" and getattr(rule, f"{side}_tag") is None:
            tag = _value(left, "tag")
            setattr(rule, f"{side}_tag", check_tag(tag) if is_new else tag)
        # old scripts omit the keyword `cidr`
        elif (kind == "cidr" or kind[0:1].isdigit() or ":" in kind) and getattr(rule, f"{side}_net") is None:
            setattr(rule, f"{side}_net", str(parse_cidr(_value(left, "cidr") if kind == "cidr" else kind)))
        else:
            raise UsageError(_out_of_place(kind))
        seen = True
    if not seen:
        raise UsageError(f"'{word}' needs a 'tag', a 'cidr' or, with tcp and udp, 'ports' after it")


def _out_of_place(word: str) -> str:
    if word == "ports":
        return "'ports' goes with tcp and udp, once after 'from' and once after 'to'"
    if word == "code":
        return "an ICMP code needs an ICMP type before it: 'type N code N'"
    if word == "type":
        return "'type' goes with icmp and icmpv6, directly after that word"
    from calicoctl.spelling import did_you_mean, nearest

    near = None if word in KEYWORDS else nearest(word, KEYWORDS)
    return f"'{word}' is out of place in a rule{did_you_mean(repr(near)) if near else ', or there twice'}"


def _value(left: deque[str], word: str) -> str:
    if not left:
        raise UsageError(f"'{word}' needs a value after it")
    return left.popleft()


def _number(text: str, highest: int, what: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) > highest:
        raise CalicoError(f"'{text}' is not a valid {what}: it must be a number from 0 to {highest}")
    return int(text)


def _protocol(text: str) -> str | int:
    named = PORT_PROTOCOLS + ICMP_PROTOCOLS + OTHER_PROTOCOLS
    if text in named:
        return text
    if not text.isdigit():
        raise CalicoError(f"'{text}' is not a valid protocol: it must be a number from 0 to 255, {', '.join(named)}")
    return _number(text, 255, "protocol")


def _ports(text: str) -> list[int | str]:
    ports: list[int | str] = []
    for part in text.split(","):
        first, last = (re.split("[:-]", part, maxsplit=1) * 2)[:2]
        low, high = _number(first, 65535, "port"), _number(last, 65535, "port")
        if low > high:
            raise CalicoError(f"port range '{part}' is backwards: {low} is greater than {high}")
        ports.append(f"{low}:{high}" if re.search("[:-]", part) else low)
    return ports


def check_rule(data: Any, must_match: bool = True) -> Rule:
    """Return the rule in `data`, a decoded JSON value, with canonical values.

    Raises CalicoError for unknown fields or invalid values. With `must_match`, raises CalicoError also for a rule that
    matches no packet because it mixes IPv4 and IPv6.
    """
    if not isinstance(data, dict):
        raise CalicoError(f"a rule must be a JSON object, not {json.dumps(data)[:60]}")
    unknown = sorted(set(data) - set(RULE_FIELDS))
    if unknown:
        raise CalicoError(f"a rule has an unknown field '{unknown[0]}'; known are {', '.join(RULE_FIELDS)}")
    rule = Rule.from_dict(data)
    if rule.action not in ACTIONS:
        raise CalicoError(f"a rule's action is {rule.action!r}; it must be 'allow', 'deny' or 'log'")
    if rule.protocol is not None:
        rule.protocol = _protocol(_text(rule.protocol, "protocol"))
    if rule.ip_version is not None and (type(rule.ip_version) is not int or rule.ip_version not in (4, 6)):
        raise CalicoError(f"a rule's ip_version is {rule.ip_version!r}; it must be 4 or 6")
    for name in ("icmp_type", "icmp_code"):
        if getattr(rule, name) is not None:
            setattr(rule, name, _number(_text(getattr(rule, name), name), 255, name))
    for name in ("src_tag", "dst_tag"):
        if getattr(rule, name) is not None:
            setattr(rule, name, check_tag(_text(getattr(rule, name), name)))
    for name in ("src_net", "dst_net"):
        if getattr(rule, name) is not None:
            setattr(rule, name, str(parse_cidr(_text(getattr(rule, name), name))))
    for name in ("src_ports", "dst_ports"):
        ports = getattr(rule, name)
        if ports is None:
            continue
        if not isinstance(ports, list) or not ports:
            raise CalicoError(f'a rule\'s {name} must be a list, such as [80, "8000:8010"]')
        setattr(rule, name, [port for part in ports for port in _ports(_text(part, name))])
    _check_sense(rule)
    if must_match:
        _check_versions(rule)
    return rule


def _text(value: Any, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise CalicoError(f"a rule's {name} is {json.dumps(value)[:60]}, which is neither a number nor a string")
    return str(value)


def check_rules(profile: str, text: str) -> Rules:
    """Return the rules of the profile `profile` that `text`, JSON from the user, contains.

    Raises CalicoError if `text` is not the JSON of a profile's rules, if it contains the rules of another profile, or
    if any rule is invalid or matches no packet.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise CalicoError(f"the rules are not JSON: {error}") from None
    except RecursionError:
        raise CalicoError("the rules are not readable JSON: they are nested too deeply") from None
    fields = ("id", "inbound_rules", "outbound_rules")
    if not isinstance(data, dict):
        raise CalicoError("the rules must be a JSON object with id, inbound_rules and outbound_rules")
    for name in fields:
        if name not in data:
            raise CalicoError(f"the rules lack the field '{name}'; they must have {', '.join(fields)}")
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise CalicoError(f"the rules have an unknown field '{unknown[0]}'; known are {', '.join(fields)}")
    if data["id"] != profile:
        raise CalicoError(f"the rules are those of profile {json.dumps(data['id'])[:60]}, not of {profile}")
    lists: dict[str, list[Rule]] = {}
    for name in fields[1:]:
        if not isinstance(data[name], list):
            raise CalicoError(f"{name} must be a list of rules")
        lists[name] = []
        for position, rule in enumerate(data[name], start=1):
            try:
                lists[name].append(check_rule(rule))
            except CalicoError as error:
                raise CalicoError(f"{name}, rule {position}: {error}") from None
    return Rules(profile, lists["inbound_rules"], lists["outbound_rules"])


def _check_sense(rule: Rule) -> None:
    if rule.icmp_code is not None and rule.icmp_type is None:
        raise CalicoError("an ICMP code needs an ICMP type")
    if rule.icmp_type is not None and not _has_icmp_type(rule):
        raise CalicoError("an ICMP type goes with the protocols icmp and icmpv6 only")
    if any(len(ports) > limits.PORTS for ports in (rule.src_ports or (), rule.dst_ports or ())):
        raise CalicoError(f"a rule can have {limits.PORTS} ports and ranges on each side: join them, or use more rules")
    if (rule.src_ports or rule.dst_ports) and not _has_ports(rule):
        raise CalicoError("ports go with a protocol that has ports only, such as tcp and udp")


def protocol_number(protocol: str | int) -> int:
    return PROTOCOLS[protocol] if isinstance(protocol, str) else protocol


def _has_ports(rule: Rule) -> bool:
    return rule.protocol is not None and protocol_number(rule.protocol) in WITH_PORTS


def _has_icmp_type(rule: Rule) -> bool:
    return rule.protocol is not None and protocol_number(rule.protocol) in (ICMP, ICMPV6)


def versions(rule: Rule) -> Collection[int]:
    """Return the IP versions (4, 6) of the packets that a rule can match; empty if the rule mixes IPv4 and IPv6."""
    possible = {4, 6}
    if rule.ip_version is not None:
        possible &= {rule.ip_version}
    number = None if rule.protocol is None else protocol_number(rule.protocol)
    if number in (ICMP, ICMPV6):
        possible &= {4 if number == ICMP else 6}
    for net in (rule.src_net, rule.dst_net):
        if net is not None:
            possible &= {version_of(net)}
    return sorted(possible)


def _check_versions(rule: Rule) -> None:
    if not versions(rule):
        raise CalicoError("a rule that mixes IPv4 and IPv6 (icmp is IPv4, icmpv6 is IPv6) would never match")


def text(rule: Rule) -> str:
    """Return a rule as the text that users type.

    If the rule is invalid, or matches no packet, the reason is appended in brackets. `parse` rejects a text with such a
    reason.
    """
    try:
        sound = check_rule(rule.to_dict(), must_match=False)
    except CalicoError as error:
        return f"{_spell(rule)} [cannot be enforced, so the profile denies: {error}]"
    try:
        _check_versions(sound)
    except CalicoError:
        return f"{_spell(sound)} [matches no packet: it mixes IPv4 and IPv6]"
    return _spell(sound)


def _spell(rule: Rule) -> str:
    words: list[object] = [rule.action]
    words += [word for word, version in _VERSIONS.items() if version == rule.ip_version]
    if rule.protocol in PORT_PROTOCOLS + ICMP_PROTOCOLS:
        words.append(rule.protocol)
    elif rule.protocol is not None:
        words += ["protocol", rule.protocol]
    if rule.icmp_type is not None:
        words += ["type", rule.icmp_type]
    if rule.icmp_code is not None:
        words += ["code", rule.icmp_code]
    for word, side in (("from", "src"), ("to", "dst")):
        clauses: list[object] = []
        ports, tag, net = (getattr(rule, f"{side}_{name}") for name in ("ports", "tag", "net"))
        if ports is not None:
            clauses += ["ports", ",".join(map(str, ports)) if isinstance(ports, list) else ports]
        if tag is not None:
            clauses += ["tag", tag]
        if net is not None:
            clauses += ["cidr", net]
        if clauses:
            words += [word, *clauses]
    return " ".join(map(str, words))
