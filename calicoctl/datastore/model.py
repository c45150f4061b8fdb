"""Endpoints, rules, profiles, pools and BGP peers: plain data, converted from and to JSON. Does not access the store.

A missing optional field gets its default. An unknown field is preserved in `extra`. An invalid value raises
InvalidValue, except in rules: policy/rules.py validates the values in rules.
"""

from __future__ import annotations

import json
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from calicoctl import limits
from calicoctl.addresses import BITS, FAMILIES, canonical
from calicoctl.datastore.keys import EndpointId
from calicoctl.errors import CalicoError, InvalidValue

if TYPE_CHECKING:
    from calicoctl.datastore.store import Entry


def load_object(text: str, key: str) -> dict[str, Any]:
    """Parse `text`, the value of `key`, as a JSON object. Raise InvalidValue if it is anything else, or too large."""
    value = _load(text, key)
    if not isinstance(value, dict):
        raise InvalidValue(key, f"it should hold a JSON object, and holds {_excerpt(text)}")
    return value


def load_strings(text: str, key: str) -> list[str]:
    """Parse `text`, the value of `key`, as a JSON list of strings.

    Raises InvalidValue if it is anything else, or too large.
    """
    value = _load(text, key)
    if not _is_strings(value):
        raise InvalidValue(key, f"it should hold a JSON list of strings, and holds {_excerpt(text)}")
    return list(value)


def check_tags(tags: list[str]) -> list[str]:
    """Return `tags` unchanged; raise CalicoError if there are more than limits.TAGS."""
    if len(tags) > limits.TAGS:
        raise CalicoError(f"a profile can have {limits.TAGS} tags, and these are {len(tags)}")
    return tags


def load_tags(text: str, key: str) -> list[str]:
    """Parse `text`, the value of `key`, as a profile's tags. Raise InvalidValue if it is invalid, or has too many."""
    with _limited(key):
        return check_tags(load_strings(text, key))


@contextmanager
def _limited(key: str) -> Iterator[None]:
    """Convert a CalicoError that the body of `with` raises to an InvalidValue for `key`."""
    try:
        yield
    except InvalidValue:
        raise
    except CalicoError as error:
        raise InvalidValue(key, str(error)) from None


def _is_deep(value: Any) -> bool:
    """Return whether the lists and objects in `value` are nested deeper than limits.DEPTH levels."""
    level = [value]
    for _ in range(limits.DEPTH + 1):
        level = [item for item in level if isinstance(item, (dict, list))]
        if not level:
            return False
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return True


def _load(text: str, key: str) -> Any:
    if len(text) > limits.VALUE:
        raise InvalidValue(key, f"it has more than {limits.VALUE // 1024} KiB")
    try:
        value = json.loads(text)
        if text.count("[") + text.count("{") > limits.DEPTH and _is_deep(value):
            raise RecursionError
        if "\\ud" in text or "\\uD" in text:  # an escaped lone surrogate parses, but cannot be encoded
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise InvalidValue(key, f"it is nested deeper than {limits.DEPTH} levels") from None
    except ValueError:
        raise InvalidValue(key, f"it holds no JSON but {_excerpt(text)}") from None


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _is_net(text: str, version: int) -> bool:
    """Return whether a text is an address of an IP version with a prefix length, such as `192.0.2.1/32`."""
    # without netaddr, whose import takes too long
    address, _, length = text.partition("/")
    try:
        socket.inet_pton(FAMILIES[version], address)
    except (OSError, ValueError):
        return False
    return re.fullmatch("[0-9]{1,3}", length) is not None and int(length) <= BITS[version]


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


@dataclass
class Endpoint:
    """One interface of a workload.

    `state` is "active" or "inactive". `name` is the name of the veth pair's end on the host. `profile_ids` are the
    names of the profiles, in order of evaluation. Each of the nets should be `address/32` or `address/128`: the agent
    rejects an endpoint with other nets. The gateways are the workload's next hops, which are addresses of the host.
    `inactive_since` is when the workload was found stopped (ISO 8601, UTC), None if that is unknown, or if the endpoint
    is active. `workload_name` is the name of the Docker container, None for other workloads.

    `entry` is the entry of the store that the endpoint was read from, if the reader keeps it for a compare-and-swap.
    """

    id: EndpointId
    state: str = "active"
    name: str = ""
    mac: str | None = None
    profile_ids: list[str] = field(default_factory=list)
    ipv4_nets: list[str] = field(default_factory=list)
    ipv6_nets: list[str] = field(default_factory=list)
    ipv4_gateway: str | None = None
    ipv6_gateway: str | None = None
    inactive_since: str | None = None
    workload_name: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    entry: Entry | None = field(default=None, compare=False, repr=False)

    @classmethod
    def from_json(cls, id: EndpointId, text: str, key: str) -> Endpoint:
        """Parse `text`, the value of `key`, as the endpoint `id`. Raise InvalidValue if it is invalid."""
        data = load_object(text, key)
        profile = data.pop("profile_id", None)  # an older form of `profile_ids`
        if profile is not None and data.get("profile_ids") is None:
            data["profile_ids"] = [profile]
        known: dict[str, Any] = {}
        for name in ("profile_ids", "ipv4_nets", "ipv6_nets"):
            value = data.pop(name, None)
            known[name] = [] if value is None else value
            if not _is_strings(known[name]):
                raise InvalidValue(key, f'"{name}" should be a list of strings')
        for name in ("mac", "ipv4_gateway", "ipv6_gateway", "state", "name"):
            known[name] = data.pop(name, None)
            if not (known[name] is None or isinstance(known[name], str)):
                raise InvalidValue(key, f'"{name}" should be a string')
        for name, version in (("ipv4_nets", 4), ("ipv6_nets", 6)):
            for net in known[name]:
                if not _is_net(net, version):
                    raise InvalidValue(
                        key, f'"{name}" has {_excerpt(net)}, which is no IPv{version} address with prefix'
                    )
        if known["mac"] is not None and not re.fullmatch("([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}", known["mac"]):
            raise InvalidValue(key, f'"mac" is {_excerpt(known["mac"])}, which is no MAC address')
        known["state"] = known["state"] or "active"
        known["name"] = known["name"] or id.interface
        # thousands of endpoints have the same ones
        known["profile_ids"] = list(map(sys.intern, known["profile_ids"]))
        for name in ("state", "ipv4_gateway", "ipv6_gateway"):
            known[name] = known[name] and sys.intern(known[name])
        for name in ("inactive_since", "workload_name"):
            value = data.pop(name, None)
            known[name] = value if isinstance(value, str) and value else None
        endpoint = cls(id=id, extra=data, **known)
        with _limited(key):
            endpoint.check_size()
        return endpoint

    def check_size(self) -> None:
        """Raise CalicoError if there are more than limits.PROFILES profiles or limits.ADDRESSES addresses."""
        for most, count, what in (
            (limits.PROFILES, len(self.profile_ids), "profiles"),
            (limits.ADDRESSES, len(self.nets), "addresses"),
        ):
            if count > most:
                raise CalicoError(f"an endpoint can have {most} {what}, and this would have {count}")

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object for the store."""
        return {
            "state": self.state,
            "name": self.name,
            "mac": self.mac,
            "profile_ids": self.profile_ids,
            "ipv4_nets": self.ipv4_nets,
            "ipv6_nets": self.ipv6_nets,
            "ipv4_gateway": self.ipv4_gateway,
            "ipv6_gateway": self.ipv6_gateway,
            **({} if self.inactive_since is None else {"inactive_since": self.inactive_since}),
            **({} if self.workload_name is None else {"workload_name": self.workload_name}),
            **self.extra,
        }

    def to_json(self) -> str:
        """Return the JSON text for the store; raise CalicoError if there are too many profiles or addresses."""
        self.check_size()
        return json.dumps(self.to_dict())

    @property
    def nets(self) -> list[str]:
        return self.ipv4_nets + self.ipv6_nets

    @property
    def addresses(self) -> list[str]:
        """The endpoint's canonical addresses, without prefix length."""
        return [canonical(net.partition("/")[0]) for net in self.nets]

    def nets_of(self, version: int) -> list[str]:
        """Return the list `ipv4_nets` or `ipv6_nets` itself, not a copy."""
        return self.ipv6_nets if version == 6 else self.ipv4_nets

    def gateway(self, version: int) -> str | None:
        return self.ipv6_gateway if version == 6 else self.ipv4_gateway

    def set_gateway(self, version: int, address: str | None) -> None:
        if version == 6:
            self.ipv6_gateway = address
        else:
            self.ipv4_gateway = address


@dataclass
class Rule:
    """One rule of a profile. A packet must match all conditions that are not None; see docs/datamodel.md.

    `protocol` is a name or a number. A net is a CIDR. A port is a number or a range, `"first:last"`.
    """

    action: str = "allow"
    protocol: str | int | None = None
    ip_version: int | None = None
    src_net: str | None = None
    src_tag: str | None = None
    src_ports: list[int | str] | None = None
    dst_net: str | None = None
    dst_tag: str | None = None
    dst_ports: list[int | str] | None = None
    icmp_type: int | None = None
    icmp_code: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Rule:
        known = {name: data[name] for name in RULE_FIELDS if data.get(name) is not None}
        extra = {name: value for name, value in data.items() if name not in RULE_FIELDS}
        return cls(extra=extra, **known)

    def to_dict(self) -> dict[str, Any]:
        known = {name: getattr(self, name) for name in RULE_FIELDS}
        return {**{name: value for name, value in known.items() if value is not None}, **self.extra}


RULE_FIELDS = tuple(name for name in Rule.__dataclass_fields__ if name != "extra")


@dataclass
class Rules:
    """A profile's rules for packets to its endpoints (inbound) and from its endpoints (outbound), in order."""

    id: str
    inbound: list[Rule] = field(default_factory=list)
    outbound: list[Rule] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def default(cls, profile: str) -> Rules:
        """Return the rules of a new profile.

        They allow inbound packets from endpoints with the tag `profile`, and all outbound packets.
        """
        return cls(profile, inbound=[Rule(src_tag=profile)], outbound=[Rule()])

    @classmethod
    def from_json(cls, profile: str, text: str, key: str) -> Rules:
        """Parse `text`, the value of `key`, as the rules of `profile`. Raise InvalidValue if it is invalid.

        The values in each rule are not validated.
        """
        data = load_object(text, key)
        lists = []
        for name in ("inbound_rules", "outbound_rules"):
            value = data.pop(name, None)
            value = [] if value is None else value
            if not (isinstance(value, list) and all(isinstance(rule, dict) for rule in value)):
                raise InvalidValue(key, f'"{name}" should be a list of objects')
            lists.append([Rule.from_dict(rule) for rule in value])
        data.pop("id", None)
        rules = cls(profile, inbound=lists[0], outbound=lists[1], extra=data)
        with _limited(key):
            rules.check_size()
        return rules

    def check_size(self) -> None:
        """Raise CalicoError if there are more than limits.RULES rules, inbound and outbound together."""
        count = len(self.inbound) + len(self.outbound)
        if count > limits.RULES:
            raise CalicoError(f"a profile can have {limits.RULES} rules, and this would have {count}")

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "inbound_rules": [rule.to_dict() for rule in self.inbound],
            "outbound_rules": [rule.to_dict() for rule in self.outbound],
            **self.extra,
        }

    def to_json(self) -> str:
        """Return the JSON text for the store; raise CalicoError for too many rules, or if the text is too long."""
        self.check_size()
        text = json.dumps(self.to_dict())
        if len(text) > limits.VALUE:
            raise CalicoError(f"the rules of a profile can have {limits.VALUE // 1024} KiB, and these have more")
        return text


VXLAN_MODES = (NEVER, ALWAYS, CROSS_SUBNET) = ("never", "always", "cross-subnet")


@dataclass
class Pool:
    """An IP pool. `cidr` is canonical. `ipip` is the name of the IP-in-IP device, None for a pool without IP-in-IP.

    If `masquerade` is true, packets from the pool to destinations outside of all pools get the host's address as their
    source. `vxlan` is one of VXLAN_MODES. It selects which packets between hosts are encapsulated in VXLAN. If it is
    "cross-subnet", these are the packets to hosts in networks to which the sending host is not connected.
    """

    cidr: str
    ipip: str | None = None
    masquerade: bool = False
    vxlan: str = NEVER
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: str, key: str) -> Pool:
        """Parse `text`, the value of `key`, as a pool. Raise InvalidValue if it is invalid."""
        from calicoctl.addresses import parse_cidr
        from calicoctl.errors import CalicoError

        data = load_object(text, key)
        try:
            cidr = str(parse_cidr(str(data.pop("cidr", None))))
        except CalicoError as error:
            raise InvalidValue(key, str(error)) from None
        vxlan = data.pop("vxlan_mode", None) or NEVER
        if vxlan not in VXLAN_MODES:
            raise InvalidValue(key, f'"vxlan_mode" should be one of {", ".join(VXLAN_MODES)}')
        return cls(cidr, data.pop("ipip", None) or None, bool(data.pop("masquerade", False)), vxlan, data)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object for the store, without the options that have their default value."""
        options: dict[str, Any] = {}
        if self.ipip:
            options["ipip"] = self.ipip
        if self.masquerade:
            options["masquerade"] = True
        if self.vxlan != NEVER:
            options["vxlan_mode"] = self.vxlan
        return {"cidr": self.cidr, **options, **self.extra}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())


@dataclass
class Peer:
    """A BGP peer of one host or of all hosts. `ip` is canonical. `as_num` is text in decimal (asplain, RFC 5396)."""

    ip: str
    as_num: str
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: str, key: str) -> Peer:
        """Parse `text`, the value of `key`, as a BGP peer. Raise InvalidValue if it is invalid."""
        from calicoctl.addresses import parse_address, parse_as_number
        from calicoctl.errors import CalicoError

        data = load_object(text, key)
        try:
            ip = str(parse_address(str(data.pop("ip", None))))
            stored = data.pop("as_num", None)
            if not isinstance(stored, (str, int)):  # a number like 1.5 would be read as asdot
                raise CalicoError(f"'{stored}' is not a valid AS number: it must be a text or a whole number")
            as_num = parse_as_number(str(stored))
        except CalicoError as error:
            raise InvalidValue(key, str(error)) from None
        return cls(ip, as_num, data)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object for the store."""
        return {"ip": self.ip, "as_num": self.as_num, **self.extra}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())
