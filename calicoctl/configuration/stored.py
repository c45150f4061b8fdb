"""Reads what the store has of the configuration: pools, profiles, BGP, settings, and endpoints' profiles.

`document` returns it as the document that `calicoctl export` writes.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Container
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple, Optional

from calicoctl.addresses import pack, parse_as_number, version_of
from calicoctl.datastore import keys
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.config import RESERVED, Setting, settings_of
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Endpoint, Peer, Pool, Rule, Rules, load_object, load_tags
from calicoctl.datastore.store import Entry
from calicoctl.errors import CalicoError, InvalidValue
from calicoctl.policy import rules as policy
from calicoctl.yaml_text import Inline


class SettingId(NamedTuple):
    """Identifies a setting: `daemon` is "felix" or "bgp"; `host` is None for a setting of all hosts."""

    daemon: str
    host: str | None
    name: str

    @property
    def key(self) -> str:
        if self.daemon == "bgp":
            return keys.bgp_setting(self.name, self.host)
        return keys.config(self.name) if self.host is None else keys.host_config(self.host, self.name)

    @property
    def known(self) -> Setting | None:
        """What is known of the setting; None if it is another program's."""
        found = settings_of(self.daemon, self.host is not None).values()
        return next((setting for setting in found if setting.name == self.name), None)

    @property
    def title(self) -> str:
        """What differences call the setting: the words of the command that shows it."""
        return f"{self.daemon} {self.name}" if self.host is None else f"node {self.host} {self.daemon} {self.name}"


PeerId = tuple[Optional[str], str]
"""The host that has a BGP peer, None for a peer of all hosts, and the address of the peer."""


@dataclass
class StoredProfile:
    """A profile: its tags and rules, each with the entry that it was read from, None if there is none.

    `tags` and `rules` are None if they are invalid.
    """

    tags: list[str] | None = field(default_factory=list)
    rules: Rules | None = None
    tags_entry: Entry | None = None
    rules_entry: Entry | None = None


class StoredEndpoint(NamedTuple):
    """What is compared of an endpoint, and its entry. Ten thousand whole endpoints would take 10 MiB more."""

    entry: Entry
    profile_ids: list[str]
    workload_name: str | None


@dataclass
class Stored:
    """The configuration in the store. Each object has the entry that it was read from.

    `pools` are by CIDR. `hosts` are the registered hosts, each with its addresses. `foreign` are the entries beside the
    tags and rules of each profile, which other programs have written. `problems` has an error for each key that could
    not be read, or whose value is invalid, by key: such objects are missing from the other fields.
    """

    pools: dict[str, tuple[Entry, Pool]] = field(default_factory=dict)
    profiles: dict[str, StoredProfile] = field(default_factory=dict)
    node_mesh: tuple[Entry, bool] | None = None
    as_num: tuple[Entry, str] | None = None
    peers: dict[PeerId, tuple[Entry, Peer]] = field(default_factory=dict)
    settings: dict[SettingId, Entry] = field(default_factory=dict)
    endpoints: dict[EndpointId, StoredEndpoint] = field(default_factory=dict)
    hosts: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    foreign: dict[str, list[Entry]] = field(default_factory=lambda: defaultdict(list))
    problems: dict[str, InvalidValue] = field(default_factory=dict)

    def named(self, wanted: Container[str] | None = None) -> dict[str, list[EndpointId]]:
        """Return the endpoints by what a file may call them; only by the names in `wanted`, unless that is None.

        A name is HOST/ORCHESTRATOR/WORKLOAD, where WORKLOAD is the id or the name of the workload, which may have
        several endpoints; and the same with /ENDPOINT, the endpoint's id. If the name of a workload is the id of
        another one, it means that other one.
        """
        by_id: dict[str, list[EndpointId]] = defaultdict(list)
        by_name: dict[str, list[EndpointId]] = defaultdict(list)
        for id, endpoint in self.endpoints.items():
            for found, workload in ((by_id, id.workload), (by_name, endpoint.workload_name)):
                if workload and "/" not in workload:  # no Docker container has such a name
                    place = f"{id.host}/{id.orchestrator}/{workload}"
                    for name in (place, f"{place}/{id.endpoint}"):
                        if wanted is None or name in wanted:
                            found[name].append(id)
        return {**by_name, **by_id}


def read(datastore: DatastoreClient) -> Stored:
    """Read the configuration, but for BGP; through etcd's v3 API, all of it at one revision. Then read BGP likewise.

    Raises InvalidValue if a directory cannot be read.
    """
    stored = Stored()
    # not all at once: below /calico are also addresses, handles and statuses, three times as much
    found = [datastore.collect(directory, _relevant) for directory in (keys.POLICY_AND_HOSTS, keys.BGP)]
    for entry in sorted(chain(*found), key=lambda entry: entry.key):
        if entry.is_unread_directory:
            raise InvalidValue(entry.key, str(entry.problem))
        try:
            if entry.problem is not None:
                raise InvalidValue(entry.key, entry.problem)
            _add(stored, entry)
        except InvalidValue as error:
            stored.problems[entry.key] = error
    return stored


_DIRECTORIES = (keys.pools(4), keys.pools(6), keys.PROFILES, keys.CONFIG, keys.HOSTS, keys.BGP)


def _relevant(entry: Entry) -> Entry | None:
    if entry.is_unread_directory:
        return (
            entry
            if any(f"{one}/".startswith(f"{entry.key}/") or _is_below(entry, one) for one in _DIRECTORIES)
            else None
        )
    return entry if any(_is_below(entry, directory) for directory in _DIRECTORIES) else None


def _is_below(entry: Entry, directory: str) -> bool:
    return entry.key.startswith(directory + "/")


def _add(stored: Stored, entry: Entry) -> None:
    """Add what an entry contains. Raises InvalidValue."""
    parts = entry.key.split("/")
    if _is_below(entry, keys.PROFILES):
        _add_profile(stored, entry)
    elif any(_is_below(entry, keys.pools(version)) for version in (4, 6)):
        pool = Pool.from_json(entry.value, entry.key)
        if not _is_below(entry, keys.pools(version_of(pool.cidr))):
            raise InvalidValue(entry.key, f"{pool.cidr} is of the other IP version")
        stored.pools.setdefault(pool.cidr, (entry, pool))
    elif entry.key == keys.BGP_NODE_MESH:
        enabled = load_object(entry.value, entry.key).get("enabled")
        if not isinstance(enabled, bool):
            raise InvalidValue(entry.key, '"enabled" should be true or false')
        stored.node_mesh = entry, enabled
    elif entry.key == keys.BGP_AS_NUM:
        try:
            stored.as_num = entry, parse_as_number(entry.value)
        except CalicoError as error:
            raise InvalidValue(entry.key, str(error)) from None
    elif _is_below(entry, keys.BGP):
        _add_bgp(stored, entry, parts)
    elif (id := keys.parse_endpoint(entry.key)) is not None:
        endpoint = Endpoint.from_json(id, entry.value, entry.key)
        stored.endpoints[id] = StoredEndpoint(entry, endpoint.profile_ids, endpoint.workload_name)
    elif _is_below(entry, keys.CONFIG) and len(parts) == 5:
        _add_setting(stored, SettingId("felix", None, parts[4]), entry)
    elif _is_below(entry, keys.HOSTS) and len(parts) == 7 and parts[5] == "config":
        _add_setting(stored, SettingId("felix", parts[4], parts[6]), entry)


def _add_profile(stored: Stored, entry: Entry) -> None:
    name = keys.parse_profile(entry.key)
    if name is None:
        stored.foreign[entry.key.split("/")[5]].append(entry)
        return
    profile = stored.profiles.setdefault(name, StoredProfile(rules=Rules(name)))
    if keys.last(entry.key) == "tags":
        profile.tags, profile.tags_entry = None, entry
        profile.tags = load_tags(entry.value, entry.key)
    else:
        profile.rules, profile.rules_entry = None, entry
        profile.rules = Rules.from_json(name, entry.value, entry.key)


def _add_bgp(stored: Stored, entry: Entry, parts: list[str]) -> None:
    """Add a peer, a setting, or a host's address. `parts` are those of the key, /calico/bgp/v1/…"""
    host = parts[5] if parts[4] == "host" and len(parts) > 6 else None
    rest = parts[6:] if host is not None else parts[5:]
    if parts[4] not in ("host", "global") or (parts[4] == "host" and host is None):
        return
    if len(rest) == 2 and rest[0] in ("peer_v4", "peer_v6"):
        peer = Peer.from_json(entry.value, entry.key)
        stored.peers.setdefault((host, peer.ip), (entry, peer))
    elif keys.parse_bgp_host_address(entry.key) is not None and host is not None:
        stored.hosts[host].add(entry.value)
    elif len(rest) == 1:
        _add_setting(stored, SettingId("bgp", host, rest[0]), entry)


def _add_setting(stored: Stored, id: SettingId, entry: Entry) -> None:
    named = settings_of(id.daemon, id.host is not None).get(id.name)
    # what commands call so may have another name in the store
    if id.name not in RESERVED and (named is None or named.name == id.name):
        stored.settings[id] = entry


# The document


def document(stored: Stored) -> dict[str, Any]:
    """Return the configuration as a document for YAML, in an order for people."""
    return {
        "pools": {cidr: _without(pool.to_dict(), "cidr") for cidr, pool in _sorted_pools(stored)},
        "profiles": {name: _profile(profile) for name, profile in sorted(stored.profiles.items())},
        "bgp": _bgp(stored),
        "settings": _settings(stored),
        "endpoints": _endpoints(stored),
    }


def _sorted_pools(stored: Stored) -> list[tuple[str, Pool]]:
    pools = [(cidr, pool) for cidr, (_, pool) in stored.pools.items()]
    return sorted(pools, key=lambda pair: _address_order(pair[0].partition("/")[0]))


def _address_order(address: str) -> tuple[int, bytes]:
    return version_of(address), pack(address)


def _without(data: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name not in names}


def _profile(profile: StoredProfile) -> dict[str, Any]:
    """Return a profile without what is invalid in the store."""
    shown: dict[str, Any] = {}
    if profile.tags is not None:
        shown["tags"] = Inline(profile.tags)
    if profile.rules is not None:
        shown["inbound"] = [_shown(rule) for rule in profile.rules.inbound]
        shown["outbound"] = [_shown(rule) for rule in profile.rules.outbound]
        if profile.rules.extra:
            shown["other_fields"] = profile.rules.extra
    return shown


def _shown(rule: Rule) -> str | dict[str, Any]:
    """Return a rule as the text that `rule add` takes or, if there is no such text, as the object in the store."""
    try:
        return policy.text(policy.check_rule(rule.to_dict()))
    except CalicoError:
        return rule.to_dict()


def _bgp(stored: Stored) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    if stored.node_mesh is not None:
        shown["node-mesh"] = stored.node_mesh[1]
    if stored.as_num is not None:
        shown["default-node-as"] = int(stored.as_num[1])
    shown["peers"] = {}
    shown["node-peers"] = {}
    for (host, ip), (_, peer) in sorted(
        stored.peers.items(), key=lambda pair: (pair[0][0] or "", _address_order(pair[0][1]))
    ):
        into = shown["peers"] if host is None else shown["node-peers"].setdefault(host, {})
        into[ip] = {"as_num": int(peer.as_num), **peer.extra}
    return shown


def _settings(stored: Stored) -> dict[str, Any]:
    """Return the settings, without those that have their default value."""
    shown: dict[str, Any] = {"felix": {}, "bgp": {}, "node": {}}
    for id, entry in sorted(stored.settings.items(), key=lambda pair: (pair[0].host or "", pair[0])):
        known = id.known
        if known is not None and known.default == entry.value:
            continue
        into = shown if id.host is None else shown["node"].setdefault(id.host, {})
        into.setdefault(id.daemon, {})[id.name] = _scalar(entry.value)
    return shown


def _scalar(value: str) -> Any:
    """Return the text of a setting as what YAML shows without quotes, if that is read as the same text."""
    if value in ("true", "false"):
        return value == "true"
    return int(value) if value.isascii() and value.isdigit() and len(value) < 20 and str(int(value)) == value else value


def _endpoints(stored: Stored) -> dict[str, Any]:
    """Return the profiles of the endpoints, by the shortest name that only one endpoint has."""
    named = stored.named()
    shown: dict[str, Any] = {}
    for id, endpoint in stored.endpoints.items():
        places = [
            f"{id.host}/{id.orchestrator}/{workload}" for workload in (endpoint.workload_name, id.workload) if workload
        ]
        names = [place for place in places if place.count("/") == 2] + [f"{places[-1]}/{id.endpoint}"]
        shown[next((name for name in names if named.get(name) == [id]), names[-1])] = Inline(endpoint.profile_ids)
    return dict(sorted(shown.items()))


def same(one: Any, other: Any) -> bool:
    """Return whether two values are the same in JSON, where true is not 1, and NaN is NaN."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
