"""Compares the configuration in a file with the one in the store, and changes what differs.

`compare` checks everything before anything is changed: what an object that exists may keep, but a new one may not have,
and what is in use and so cannot be removed. `apply` writes by compare-and-swap alone; after a conflict with another
writer, it reads and compares again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Callable

from calicoctl import limits
from calicoctl.addresses import check_unicast, parse_address, parse_cidr, version_of
from calicoctl.configuration.declared import POOL_FIELDS, Declared, DeclaredProfile, DeclaredRule, Located
from calicoctl.configuration.stored import PeerId, SettingId, Stored, StoredProfile, read, same
from calicoctl.datastore import keys
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.config import IPIP
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import NEVER, Endpoint, Peer, Pool, Rule, Rules, check_tags, load_object
from calicoctl.datastore.pools import check_new, refuse_overlap
from calicoctl.datastore.store import MOST_AT_ONCE, Create, Delete, Entry, Update, Write, pause
from calicoctl.errors import CalicoError, CompareFailed, Conflict, InvalidValue, KeyExists
from calicoctl.output import first_few, quantity
from calicoctl.policy import rules as policy
from calicoctl.spelling import did_you_mean, nearest
from calicoctl.workloads import libnetwork, network_profiles
from calicoctl.workloads.workload import short_id
from calicoctl.yaml_text import Node

ATTEMPTS = 10
"""How often the store is read and compared again, because another writer came between, until Conflict is raised."""

LONGEST_COMMIT = 512 * 1024
"""Maximum length of the values that are written by one commit, in characters. etcd takes requests of 1.5 MiB."""

ADD, CHANGE, REMOVE = "+", "~", "-"


@dataclass(frozen=True)
class Difference:
    """A difference: `sign` is ADD, CHANGE or REMOVE; `kind` and `name` say of what. `detail` may be empty."""

    sign: str
    kind: str
    name: str
    detail: str = ""

    @property
    def word(self) -> str:
        """What `sign` stands for, as a verb."""
        return {ADD: "add", CHANGE: "change", REMOVE: "remove"}[self.sign]

    def __str__(self) -> str:
        return f"{self.sign} {self.kind} {self.name}" + (f": {self.detail}" if self.detail else "")


@dataclass(frozen=True)
class Step:
    """The change of an object: what is shown of it, and the writes.

    `check` is called after these, and raises CalicoError, after it has undone them, if another writer came before.
    """

    differences: list[Difference]
    writes: Sequence[Write]
    check: Callable[[], object] | None = None


@dataclass
class Changes:
    """What makes the store hold what a file declares, in a safe order.

    `missing` are the endpoints in the file that do not exist, and `warnings` are sentences.
    """

    steps: list[Step] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def differences(self) -> list[Difference]:
        return [difference for step in self.steps for difference in step.differences]


def apply(
    datastore: DatastoreClient,
    declared: Declared,
    prune: bool,
    show: Callable[[Changes], None],
    made: Callable[[list[Difference]], None],
) -> None:
    """Make the store hold what a file declares. With `prune`, remove what is not in the file.

    `show` is called before anything is changed, and after each conflict. `made` is called after each commit, with the
    differences that it has made. Raises CalicoError, and Conflict if other writers keep interfering.
    """
    for attempt in range(ATTEMPTS):
        changes = compare(datastore, read(datastore), declared, prune)
        show(changes)
        try:
            for steps in _portions(changes.steps, datastore.atomic):
                datastore.commit([write for step in steps for write in step.writes])
                for step in steps:
                    if step.check is not None:
                        step.check()
                made([difference for step in steps for difference in step.differences])
            return
        except (CompareFailed, KeyExists):
            pause(attempt)
    raise Conflict("what is to be changed keeps being modified concurrently; retry")


def _portions(steps: Sequence[Step], atomic: bool) -> Iterator[list[Step]]:
    """Divide steps into the lists that are written by a commit each: as few as possible, if a commit is atomic.

    If not, each step is alone, so that it is known which ones are done. So is a step with a check.
    """
    portion: list[Step] = []
    writes = length = 0
    for step in steps:
        own = sum(len(write.value) for write in step.writes if not isinstance(write, Delete))
        alone = not atomic or step.check is not None or (portion and portion[-1].check is not None)
        if portion and (alone or writes + len(step.writes) > MOST_AT_ONCE or length + own > LONGEST_COMMIT):
            yield portion
            portion, writes, length = [], 0, 0
        portion.append(step)
        writes += len(step.writes)
        length += own
    if portion:
        yield portion


def compare(datastore: DatastoreClient, stored: Stored, declared: Declared, prune: bool) -> Changes:
    """Return the changes that make the store, which holds `stored`, hold what is declared.

    Raises CalicoError if they cannot be made.
    """
    return _Comparison(datastore, stored, declared, prune).changes()


class _Comparison:
    def __init__(self, datastore: DatastoreClient, stored: Stored, declared: Declared, prune: bool) -> None:
        self._datastore = datastore
        self._stored = stored
        self._declared = declared
        self._prune = prune
        self._warnings: list[str] = []
        self._missing: list[str] = []
        gone = set(stored.profiles) - set(declared.profiles or ()) if prune and declared.profiles is not None else set()
        self._unneeded = sorted(name for name in gone if not self._has_problem(keys.profile(name) + "/"))
        self._profiles = (set(stored.profiles) | set(declared.profiles or ())) - set(self._unneeded)
        """The profiles that there will be."""

    def changes(self) -> Changes:
        endpoints = [*self._endpoints()]
        removed_pools, removed_profiles = [*self._removed_pools()], [*self._removed_profiles(endpoints)]
        steps = [
            *removed_pools,  # first: a new pool must not overlap them
            *self._pools(),
            *self._profiles_changed(),
            *self._bgp(),
            *self._settings(),
            *(step for _, step in endpoints),
            *removed_profiles,  # last: until then, an endpoint has them
        ]
        self._warn_of_tags()
        if self._prune:
            self._warnings += map(str, self._stored.problems.values())
        return Changes(steps, self._missing, self._warnings)

    def _has_problem(self, beginning: str) -> bool:
        return any(key.startswith(beginning) for key in self._stored.problems)

    def _refuse_problem(self, *found: str) -> None:
        """Raise the error about one of the keys `found`, if there is one: its value cannot be compared."""
        for key in found:
            if key in self._stored.problems:
                raise self._stored.problems[key]

    # Pools

    def _pools(self) -> Iterator[Step]:
        kept = [cidr for cidr in self._stored.pools if not (self._prune and cidr not in (self._declared.pools or {}))]
        others = [parse_cidr(cidr) for cidr in {**dict.fromkeys(kept), **(self._declared.pools or {})}]
        has_ipip = False
        for cidr, located in (self._declared.pools or {}).items():
            key = keys.pool(version_of(cidr), cidr)
            self._refuse_problem(key)
            entry, before = self._stored.pools.get(cidr, (None, None))
            pool = located.value
            extra = {} if before is None else before.extra
            now = Pool(cidr, pool.ipip, pool.masquerade, pool.vxlan, {**extra, **pool.extra})
            if before is not None and same(before.to_dict(), now.to_dict()):
                continue
            with _at(located.node):
                if before is None:
                    check_new([parse_cidr(cidr)], ipip=False)
                    refuse_overlap(parse_cidr(cidr), others)
                self._check_options(before, now)
            self._check_fields(located, extra)
            has_ipip = has_ipip or bool(now.ipip and not (before and before.ipip))
            details = _fields_changed({} if before is None else _options(before), _options(now, before is None))
            difference = Difference(ADD if before is None else CHANGE, "pool", cidr, details)
            check = None if before is not None else partial(self._datastore.refuse_overlap, key, now)
            yield Step([difference], [_put(entry, key, _readable(now.to_json(), key, located.node))], check)
        if has_ipip:
            yield from self._ipip_enabled()

    def _ipip_enabled(self) -> Iterator[Step]:
        """Yield the change of the setting that goes with a new pool with ipip, unless the file has the setting."""
        id = SettingId("felix", None, IPIP.name)
        entry = self._stored.settings.get(id)
        if id in self._declared.settings or (entry is not None and entry.value == "true"):
            return
        self._refuse_problem(id.key)
        difference = _changed("setting", id.title, None if entry is None else entry.value, "true")
        yield Step([difference], [_put(entry, id.key, "true")])

    def _check_options(self, before: Pool | None, now: Pool) -> None:
        if before is not None and (before.ipip, before.vxlan) == (now.ipip, now.vxlan):
            return
        if now.ipip and now.ipip != "tunl0":
            raise CalicoError("ipip must be tunl0, or left out")
        if now.ipip and now.vxlan != NEVER:
            raise CalicoError("ipip and vxlan_mode exclude each other: packets of a pool are encapsulated in one way")
        if now.ipip and version_of(now.cidr) == 6:
            raise CalicoError("ipip is for IPv4 alone")
        if now.ipip:
            self._warnings.append(
                f"pool {now.cidr}: this version's agents do not encapsulate in IP-in-IP (ipip): use vxlan_mode instead"
            )

    def _check_fields(self, located: Located[Pool], extra: dict[str, Any]) -> None:
        """Raise CalicoError for an unknown field that is new and looks like a known one."""
        assert isinstance(located.node.value, dict)
        for name in located.value.extra.keys() - extra.keys():
            near = nearest(name, (*POOL_FIELDS, "disabled"))
            if near and near != name:
                raise located.node.value[name].error(f"a pool has no field '{name}'{did_you_mean(repr(near))}")

    def _removed_pools(self) -> Iterator[Step]:
        if not self._prune or self._declared.pools is None:
            return
        pools = self._stored.pools.items()
        extra = {cidr: entry for cidr, (entry, _) in pools if cidr not in self._declared.pools}
        used_in = self._datastore.ipam.used_in(map(parse_cidr, extra))
        for cidr, entry in extra.items():
            used = used_in[parse_cidr(cidr)]
            if used:
                some = first_few(map(str, used))
                raise CalicoError(
                    f"pool {cidr} is not in the file, and cannot be removed: "
                    f"{quantity(len(used), 'address', 'addresses')} in use ({some}); nothing is changed"
                )
            yield Step([Difference(REMOVE, "pool", cidr)], [Delete(entry)])

    # Profiles

    def _profiles_changed(self) -> Iterator[Step]:
        for name, declared in (self._declared.profiles or {}).items():
            stored = self._stored.profiles.get(name)
            if stored is None:
                self._refuse_problem(keys.profile_tags(name), keys.profile_rules(name))
                yield self._new_profile(name, self._completed(name, declared, StoredProfile()))
                continue
            declared = self._completed(name, declared, stored)
            differences: list[Difference] = []
            writes: list[Write] = []
            for found, write in (
                self._tags_changed(name, declared, stored),
                self._rules_changed(name, declared, stored),
            ):
                differences += found
                writes += [] if write is None else [write]
            if differences:
                yield Step(differences, writes)

    def _completed(self, name: str, declared: DeclaredProfile, stored: StoredProfile) -> DeclaredProfile:
        """Return a declared profile with what `profile add` gives one, where neither the file nor the store has any.

        The store has only a part of a profile if its creation was interrupted.
        """
        tags, inbound, outbound = declared.tags, declared.inbound, declared.outbound
        if tags is None and stored.tags_entry is None and not self._has_problem(keys.profile_tags(name)):
            tags = [Located(name, declared.node)]
        if stored.rules_entry is None and not self._has_problem(keys.profile_rules(name)):
            default = Rules.default(name)
            if inbound is None:
                inbound = [DeclaredRule(rule, declared.node) for rule in default.inbound]
            if outbound is None:
                outbound = [DeclaredRule(rule, declared.node) for rule in default.outbound]
        return replace(declared, tags=tags, inbound=inbound, outbound=outbound)

    def _new_profile(self, name: str, declared: DeclaredProfile) -> Step:
        with _at(declared.node):
            policy.check_name(name, "profile")
        tags = _new_tags(declared.tags or [], [])
        rules = Rules(
            name,
            self._new_rules(name, declared.inbound or [], []),
            self._new_rules(name, declared.outbound or [], []),
            declared.other_fields,
        )
        with _at(declared.node):
            check_tags(tags)
            text = rules.to_json()
        _readable(text, keys.profile_rules(name), declared.node)
        details = [f"tag {tag}" for tag in tags]
        for direction, some in (("inbound", rules.inbound), ("outbound", rules.outbound)):
            details += [f"{direction} rule {position}: {_shown(rule)}" for position, rule in enumerate(some, start=1)]
        differences = [Difference(ADD, "profile", name, detail) for detail in details]
        return Step(
            [Difference(ADD, "profile", name), *differences],
            [Create(keys.profile_tags(name), json.dumps(tags)), Create(keys.profile_rules(name), text)],
        )

    def _tags_changed(
        self, name: str, declared: DeclaredProfile, stored: StoredProfile
    ) -> tuple[list[Difference], Write | None]:
        if declared.tags is None:
            return [], None
        self._refuse_problem(keys.profile_tags(name))
        before = stored.tags or []
        tags = _new_tags(declared.tags, before)
        with _at(declared.node):
            check_tags(tags)
        added, removed = (
            [tag for tag in some if tag not in others] for some, others in ((tags, before), (before, tags))
        )
        if not added and not removed:
            return [], None
        signed = [(ADD, tag) for tag in added] + [(REMOVE, tag) for tag in dict.fromkeys(removed)]
        found = [Difference(CHANGE, "profile", name, f"{sign} tag {tag}") for sign, tag in signed]
        return found, _put(stored.tags_entry, keys.profile_tags(name), json.dumps(tags))

    def _rules_changed(
        self, name: str, declared: DeclaredProfile, stored: StoredProfile
    ) -> tuple[list[Difference], Write | None]:
        if declared.inbound is None and declared.outbound is None and not declared.other_fields:
            return [], None
        key = keys.profile_rules(name)
        self._refuse_problem(key)
        before = stored.rules
        assert before is not None, "invalid rules are a problem"
        every = [*before.inbound, *before.outbound]
        now = Rules(
            name,
            before.inbound if declared.inbound is None else self._new_rules(name, declared.inbound, every),
            before.outbound if declared.outbound is None else self._new_rules(name, declared.outbound, every),
            {**before.extra, **declared.other_fields},
        )
        with _at(declared.node):
            now.check_size()  # before very many are compared
        found = []
        for direction in ("inbound", "outbound"):
            details = _rules_between(direction, getattr(before, direction), getattr(now, direction))
            found += [Difference(CHANGE, "profile", name, detail) for detail in details]
        if not same(before.extra, now.extra):
            found.append(Difference(CHANGE, "profile", name, _fields_changed(before.extra, now.extra)))
        if not found:
            return [], None
        with _at(declared.node):
            text = now.to_json()
        return found, _put(stored.rules_entry, key, _readable(text, key, declared.node))

    def _new_rules(self, profile: str, declared: list[DeclaredRule], stored: list[Rule]) -> list[Rule]:
        """Return declared rules. Raise CalicoError for one that no new rule may be like, unless it is in `stored`."""
        existing = set(map(_identity, stored))
        for one in declared:
            is_new = _identity(one.rule) not in existing
            if is_new and one.problem is not None:
                raise one.node.error(one.problem)
            if is_new and one.foreign:
                self._warnings.append(
                    f"{one.node.source}:{one.node.line}: the field '{one.foreign[0]}' of a rule is not known here, so "
                    f"profile {profile} denies what gets to the rule"
                )
        return [one.rule for one in declared]

    def _removed_profiles(self, endpoints: list[tuple[Endpoint, Step]]) -> Iterator[Step]:
        lists = {id: endpoint.profile_ids for id, endpoint in self._stored.endpoints.items()}
        lists.update({endpoint.id: endpoint.profile_ids for endpoint, _ in endpoints})
        for name in self._unneeded:
            users = [id for id, profiles in lists.items() if name in profiles]
            keeping = network_profiles.containers_with(self._datastore.host, name)
            if users or keeping:
                names = (self._stored.endpoints[id].workload_name or short_id(id.workload) for id in users)
                some = names if users else map(short_id, keeping)
                who = quantity(len(users), "endpoint") if users else quantity(len(keeping), "stopped container")
                raise CalicoError(
                    f"profile {name} is not in the file, and cannot be removed: {who} "
                    f"{'has' if len(users or keeping) == 1 else 'have'} it ({first_few(some)}); nothing is changed"
                )
            stored = self._stored.profiles[name]
            entries = [stored.rules_entry, stored.tags_entry, *self._stored.foreign.get(name, [])]
            writes = [Delete(entry) for entry in entries if entry is not None]
            yield Step([Difference(REMOVE, "profile", name)], writes[:MOST_AT_ONCE])
            for start in range(MOST_AT_ONCE, len(writes), MOST_AT_ONCE):
                yield Step([], writes[start : start + MOST_AT_ONCE])

    def _warn_of_tags(self) -> None:
        """Warn of each tag in the declared rules that no profile has, since it may be misspelt."""
        there = {name: set(one.tags or ()) for name, one in self._stored.profiles.items() if name in self._profiles}
        named: set[str] = set()
        for name, profile in (self._declared.profiles or {}).items():
            if profile.tags is not None or name not in there:
                there[name] = {name} if profile.tags is None else {tag.value for tag in profile.tags}
            rules = [one.rule for one in [*(profile.inbound or ()), *(profile.outbound or ())]]
            named |= {tag for rule in rules for tag in (rule.src_tag, rule.dst_tag) if isinstance(tag, str)}
        unknown = named.difference(*there.values())
        self._warnings += [f"no profile has the tag {tag}, so it matches nothing" for tag in sorted(unknown)]

    # BGP

    def _bgp(self) -> Iterator[Step]:
        mesh, as_num = self._declared.node_mesh, self._declared.as_num
        if mesh is not None:
            self._refuse_problem(keys.BGP_NODE_MESH)
            entry, before = self._stored.node_mesh or (None, None)
            if mesh.value != before:
                fields = {} if entry is None else load_object(entry.value, entry.key)
                write = _put(entry, keys.BGP_NODE_MESH, json.dumps({**fields, "enabled": mesh.value}))
                yield Step([_changed("bgp", "node-mesh", before, mesh.value)], [write])
        if as_num is not None:
            self._refuse_problem(keys.BGP_AS_NUM)
            entry, number = self._stored.as_num or (None, None)
            if as_num.value != number:
                write = _put(entry, keys.BGP_AS_NUM, as_num.value)
                yield Step([_changed("bgp", "default-node-as", number, as_num.value)], [write])
        peers: dict[PeerId, Located[Peer]] = {**(self._declared.peers or {}), **(self._declared.node_peers or {})}
        for (host, ip), located in peers.items():
            yield from self._peer(host, ip, located)
        for (host, ip), (stored, _) in self._stored.peers.items():
            is_declared = (self._declared.peers if host is None else self._declared.node_peers) is not None
            if self._prune and is_declared and (host, ip) not in peers:
                yield Step([Difference(REMOVE, "bgp peer", _peer_name(host, ip))], [Delete(stored)])

    def _peer(self, host: str | None, ip: str, located: Located[Peer]) -> Iterator[Step]:
        key = keys.bgp_peer(version_of(ip), ip, host)
        self._refuse_problem(key)
        entry, before = self._stored.peers.get((host, ip), (None, None))
        now = (
            located.value if before is None else Peer(ip, located.value.as_num, {**before.extra, **located.value.extra})
        )
        if before is not None and same(before.to_dict(), now.to_dict()):
            return
        if before is None:
            with _at(located.node):
                check_unicast(parse_address(ip))
                self._check_host(host)
                if host is not None and ip in self._stored.hosts[host]:
                    raise CalicoError(f"{ip} is an address of {host}, which cannot have a BGP session with itself")
        fields = [{} if one is None else _without_ip(one) for one in (before, now)]
        sign = ADD if before is None else CHANGE
        difference = Difference(sign, "bgp peer", _peer_name(host, ip), _fields_changed(*fields))
        yield Step([difference], [_put(entry, key, _readable(now.to_json(), key, located.node))])

    def _check_host(self, host: str | None) -> None:
        if host is not None and host not in self._stored.hosts:
            near = nearest(host, self._stored.hosts)
            raise CalicoError(f"no host {host} is registered (calicoctl node){did_you_mean(near and repr(near))}")

    # Settings

    def _settings(self) -> Iterator[Step]:
        for id, located in self._declared.settings.items():
            self._refuse_problem(id.key)
            entry = self._stored.settings.get(id)
            before = None if entry is None else entry.value
            if before == located.value:
                continue
            with _at(located.node):
                self._check_setting(id, located.value)
            default = None if id.known is None else id.known.default
            if before is None and default == located.value:
                continue  # it is in force
            yield Step([_changed("setting", id.title, before, located.value)], [_put(entry, id.key, located.value)])
        for id, entry in self._stored.settings.items():
            if self._prune and (id.daemon, id.host is not None) in self._declared.scopes and self._is_pruned(id, entry):
                yield Step([Difference(REMOVE, "setting", id.title, f"it was {entry.value}")], [Delete(entry)])

    def _is_pruned(self, id: SettingId, entry: Entry) -> bool:
        known = id.known
        # pools with ipip set IpInIpEnabled; what has its default is as good as removed
        return id not in self._declared.settings and known not in (None, IPIP) and entry.value != known.default

    def _check_setting(self, id: SettingId, value: str) -> None:
        """Raise CalicoError for a value that a setting cannot get, or a new setting that is not known."""
        known = id.known
        if known is None and id not in self._stored.settings:
            raise CalicoError(f"'{id.name}' is no setting that is known; 'calicoctl config --force' sets any")
        if known is not None:
            try:
                known.check(value)
            except CalicoError as error:
                raise CalicoError(f"'{value}' is not a valid value for {id.name}: {error}") from None
        if not value.isprintable():
            raise CalicoError(f"{value!a} is not a valid value for {id.name}: it must be one line of text")
        if len(value) > limits.VALUE:
            raise CalicoError(f"{id.name} has more than {limits.VALUE // 1024} KiB")
        if id not in self._stored.settings:
            self._check_host(id.host)

    # Endpoints

    def _endpoints(self) -> Iterator[tuple[Endpoint, Step]]:
        """Yield the endpoints that change, as they will be, each with its step."""
        if self._declared.endpoints is None:
            return
        named = self._stored.named(self._declared.endpoints)
        seen: set[EndpointId] = set()
        for name, located in self._declared.endpoints.items():
            ids = named.get(name, [])
            if not ids:
                self._missing.append(name)
                continue
            if len(ids) > 1:
                some = first_few(id.endpoint for id in ids)
                raise located.node.error(f"{name} has several endpoints ({some}): add /ENDPOINT to say which")
            if ids[0] in seen:
                raise located.node.error(f"{name} is an endpoint that is there already, by another name")
            seen.add(ids[0])
            before = self._stored.endpoints[ids[0]]
            profiles = [one.value for one in located.value]
            if profiles == before.profile_ids:
                continue
            found: set[str] = set()
            for one in located.value:
                if one.value not in self._profiles and one.value not in before.profile_ids:
                    near = nearest(one.value, self._profiles)
                    raise one.node.error(f"profile {one.value} does not exist{did_you_mean(near and repr(near))}")
                if one.value in found:
                    raise one.node.error(f"profile {one.value} is in the list twice")
                found.add(one.value)
            now = Endpoint.from_json(ids[0], before.entry.value, before.entry.key)
            now.profile_ids = profiles
            with _at(located.node):
                text = now.to_json()
            if libnetwork.is_ours(now.id):
                self._warnings.append(
                    f"{name} is in a Docker network, and keeps these profiles until it stops: 'calicoctl container "
                    f"NAME profile set' on {now.id.host} has them kept for its next start, too"
                )
            detail = f"profiles from {_listed(before.profile_ids)} to {_listed(profiles)}"
            yield now, Step([Difference(CHANGE, "endpoint", name, detail)], [Update(before.entry, text)])


@contextmanager
def _at(node: Node) -> Iterator[None]:
    """If the body of `with` raises CalicoError, raise one that names the line of `node`."""
    try:
        yield
    except CalicoError as error:
        raise node.error(str(error).rstrip(".")) from None


def _put(entry: Entry | None, key: str, value: str) -> Write:
    return Create(key, value) if entry is None else Update(entry, value)


def _readable(text: str, key: str, node: Node) -> str:
    """Return the value of `key` that the part `node` declares; raise CalicoError if it could not be read again."""
    try:
        load_object(text, key)
    except InvalidValue as error:
        raise node.error(f"this cannot be stored: {error.why}") from None
    return text


def _changed(kind: str, name: str, before: object, now: object) -> Difference:
    words = [str(one).lower() if isinstance(one, bool) else str(one) for one in (before, now)]
    if before is None:
        return Difference(ADD, kind, name, words[1])
    return Difference(CHANGE, kind, name, f"from {words[0]} to {words[1]}")


def _fields_changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return a text with the fields whose values differ. `before` is empty for a new object."""
    words = []
    for name in dict.fromkeys([*before, *now]):
        if name in before and name in now and same(before[name], now[name]):
            continue
        if name not in before:
            words.append(f"{name} {_json(now[name])}")
        else:
            words.append(f"{name} from {_json(before[name])} to {_json(now.get(name))}")
    return ", ".join(words)


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _options(pool: Pool, without_defaults: bool = False) -> dict[str, Any]:
    """Return the fields of a pool beside its CIDR, also those that are off, unless `without_defaults` is true."""
    options = {"ipip": pool.ipip, "masquerade": pool.masquerade, "vxlan_mode": pool.vxlan}
    known = pool.to_dict() if without_defaults else options
    return {name: known[name] for name in options if name in known} | pool.extra


def _peer_name(host: str | None, ip: str) -> str:
    return ip if host is None else f"{ip} of {host}"


def _without_ip(peer: Peer) -> dict[str, Any]:
    return {"as_num": peer.as_num, **peer.extra}


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _new_tags(declared: list[Located[str]], stored: list[str]) -> list[str]:
    """Return declared tags, those that are stored first. Raises CalicoError for a new one that is invalid."""
    names = {tag.value: tag.node for tag in declared}
    tags = [tag for tag in stored if tag in names]
    there = set(tags)
    for name, node in names.items():
        if name not in there:
            with _at(node):
                tags.append(policy.check_name(name, "tag"))
    return tags


def _identity(rule: Rule) -> str:
    """Return a text that two rules have in common if they mean the same."""
    with suppress(CalicoError):
        rule = policy.check_rule(rule.to_dict(), must_match=False)
    return json.dumps(rule.to_dict(), sort_keys=True)


def _shown(rule: Rule) -> str:
    return policy.text(rule) if not rule.extra else json.dumps(rule.to_dict())


def _rules_between(direction: str, before: list[Rule], now: list[Rule]) -> list[str]:
    """Return which rules are removed and added, with their positions before and after."""
    from difflib import SequenceMatcher

    found = []
    ids = [[_identity(rule) for rule in rules] for rules in (before, now)]
    if ids[0] == ids[1]:
        return []
    for kind, first, last, new_first, new_last in SequenceMatcher(None, ids[0], ids[1]).get_opcodes():
        if kind != "equal":
            found += [f"- {direction} rule {n + 1}: {_shown(before[n])}" for n in range(first, last)]
            found += [f"+ {direction} rule {n + 1}: {_shown(now[n])}" for n in range(new_first, new_last)]
    return found
