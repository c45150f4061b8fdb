"""The desired state of one host: the contents of the store, validated, and updated with each change.

If the value of a key is invalid, `Snapshot.problems` contains the reason. Only the object or the setting of that key is
affected:

* A profile whose rules are invalid denies everything.
* A profile whose tags are invalid keeps its last valid tags, since rules of other profiles may deny packets by tag.
* An endpoint keeps in `Snapshot.endpoints` its last value that could be parsed, but is not in `Snapshot.local`.
* A setting gets its default or a stricter value.
* Any other object is treated as if it did not exist.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Callable

from calicoctl import limits
from calicoctl.datastore import config, keys
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Endpoint, Pool, Rules, load_tags
from calicoctl.datastore.reserved import HostNetwork
from calicoctl.datastore.store import Change, Entry
from calicoctl.desired.admission import Admission, pool_of_key
from calicoctl.desired.claims import Claims
from calicoctl.desired.local_endpoint import LocalEndpoint, validated
from calicoctl.desired.topology import Topology
from calicoctl.errors import CalicoError
from calicoctl.policy.verdict import readable

INACTIVE = "it is inactive"

GRACE_TIME = int(config.GRACE_TIME.default or 0)
"""The default of `Snapshot.grace_time`, in seconds."""

MAX_CONNECTIONS = int(config.MAX_CONNECTIONS.default or 0)

_READ = (config.LOG_LEVEL, config.GRACE_TIME, config.MTU, config.CHECK_SENDERS, config.HOST_SERVICES)
_SETTINGS = {keys.READY, *(keys.config(setting.name) for setting in (*_READ, config.MAX_CONNECTIONS))}
"""The keys of the global settings that the agent uses."""


@dataclass(frozen=True)
class Profile:
    """A profile's tags and rules.

    If the rules are missing or invalid, `rules` is None, and the profile denies everything.
    """

    tags: tuple[str, ...]
    rules: Rules | None


@dataclass
class Dirty:
    """The changes since the last `Snapshot.take_dirty`.

    `endpoints` are the endpoints, of all hosts, whose values or usable addresses may have changed. `profiles` are the
    names of the changed profiles. `pools` and `settings` say whether any pool and any setting has changed; this host's
    registered IPv6 address counts as a setting, too. `topology` says whether the network between the hosts, this host's
    own addresses and networks, or the setting CheckSenders may have changed.

    `interfaces` are the previous interfaces of those endpoints of this host that were changed, became unusable or were
    deleted. A changed endpoint may still have its previous interface.
    """

    endpoints: set[EndpointId] = field(default_factory=set)
    interfaces: set[str] = field(default_factory=set)
    profiles: set[str] = field(default_factory=set)
    pools: bool = False
    settings: bool = False
    topology: bool = False

    def merge(self, other: Dirty) -> None:
        """Add the changes in `other` to this object."""
        self.endpoints |= other.endpoints
        self.interfaces |= other.interfaces
        self.profiles |= other.profiles
        self.pools = self.pools or other.pools
        self.settings = self.settings or other.settings
        self.topology = self.topology or other.topology

    def __bool__(self) -> bool:
        return bool(self.endpoints or self.profiles or self.pools or self.settings or self.topology)


class _Entries(dict[str, Entry]):
    """The entries of the store by key. Also counts the entries below each directory."""

    def __init__(self) -> None:
        super().__init__()
        self._below: Counter[int] = Counter()
        """Hash of a directory -> the number of entries below all directories with this hash. The directories of
        thousands of workloads would take more memory."""

    def put(self, key: str, entry: Entry) -> None:
        if key not in self:
            self._below.update(map(hash, keys.directories(key)))
        self[key] = entry

    def forget(self, key: str) -> None:
        if self.pop(key, None) is not None:
            for directory in map(hash, keys.directories(key)):
                self._below[directory] -= 1
                if not self._below[directory]:
                    del self._below[directory]

    def below(self, directory: str) -> list[str]:
        return [key for key in self if key.startswith(directory + "/")] if hash(directory) in self._below else []


class Snapshot:
    """The contents of the store, validated, as the agent of `host` uses them. See the module's docstring.

    In this class, "this host" is `host`.
    """

    def __init__(self, host: str, known: Topology | None = None) -> None:
        """`known`: see Topology."""
        self.host = host
        self.ready = False
        self.endpoints: dict[EndpointId, Endpoint] = {}
        """The endpoints of all hosts, each with its last valid value."""
        self.local: dict[EndpointId, LocalEndpoint] = {}
        """This host's usable endpoints: those that are valid, active, and not in conflict with others (claims.py)."""
        self.unusable: dict[EndpointId, tuple[int, str]] = {}
        """This host's endpoints that are invalid, inactive or in conflict -> (revision in the store, reason)."""
        self.profiles: dict[str, Profile] = {}
        self.pools: dict[str, Pool] = {}
        self.host_action = "RETURN"
        self.max_connections = MAX_CONNECTIONS
        self.host_services = True
        """Whether all endpoints may reach the services of verdict.is_host_service on this host."""
        self.log_level = "info"
        self.grace_time = GRACE_TIME
        """Seconds until a workload that no longer exists, or whose state is unknown, is garbage-collected."""
        self.mtu: int | None = None
        """The MTU for workloads' interfaces; None if it is derived from the host's interfaces."""
        self.check_senders = str(config.CHECK_SENDERS.default)
        """How packets from other hosts' addresses are checked: one of config.CHECK_SENDERS.values."""
        self.topology = Topology(host, known)
        self.admission = Admission(self.topology)
        self.problems: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        """Key -> why the key, or the keys below it, are not read. Keys that are skipped because of their length, or
        of the number of their levels, are added only while there are fewer than limits.REPORTED.
        """
        self.unread: set[str] = set()
        """Directories that were too large to be read. The keys below them keep their last values."""
        self.dirty = Dirty(pools=True, settings=True, topology=True)
        self._entries = _Entries()
        self._claims = Claims()
        """This host's valid and active endpoints, including those that conflict with others."""
        self._owners: dict[str, LocalEndpoint] = {}
        """Interface or address -> the endpoint in `local` that has it."""
        self._unchecked: set[EndpointId] = set()

    @property
    def network(self) -> HostNetwork:
        """This host's own addresses and networks, and the servers that it depends on, as of the last `set_network`."""
        return self.admission.network

    def set_network(self, network: HostNetwork) -> None:
        """Set this host's own addresses and networks, and the servers that it depends on."""
        before, self.admission.network = self.network, network
        self.dirty.topology = self.dirty.topology or network != before
        if (network.in_use, network.local, network.servers) != (before.in_use, before.local, before.servers):
            self._mark_decided_anew()
            self._check_local()

    def replace(self, directory: str, entries: Iterable[Entry]) -> None:
        """Replace all entries below a directory by `entries`, which were read from the store.

        If `entries` contains an unread directory (`Entry.is_unread_directory`), the previous entries below the unread
        directory are kept.
        """
        now = {entry.key: entry for entry in entries}
        unread = {key for key, entry in now.items() if entry.is_unread_directory}
        self._forget_skipped(directory)
        self.unread |= unread
        for key in self._entries.below(directory):
            if key not in now and unread.isdisjoint(keys.directories(key)):
                self._set(key, None)
        for key, entry in now.items():
            if self._entries.get(key) != entry:
                self._set(key, entry)
        if keys.HOSTS.startswith(directory):
            self.admission.retain([endpoint for id, endpoint in self.endpoints.items() if id.host == self.host])
        self._check_local()

    def change(self, change: Change) -> None:
        """Apply one change of the store to this snapshot."""
        if change.entry is not None or change.alone or change.key in self._entries:
            self._set(change.key, change.entry)
        else:
            self._forget_skipped(change.key)
            for key in self._entries.below(change.key):
                self._set(key, None)
        self._check_local()

    def complete(self) -> None:
        """Release the memory that only changes need. Afterwards, this snapshot must not be changed."""
        self._entries, self._claims, self._owners, self.dirty = _Entries(), Claims(), {}, Dirty()

    def _forget_skipped(self, directory: str) -> None:
        self.unread = {key for key in self.unread if not (key + "/").startswith(directory + "/")}
        self.skipped = {key: why for key, why in self.skipped.items() if not (key + "/").startswith(directory + "/")}

    def owner(self, thing: str) -> LocalEndpoint | None:
        """Return the endpoint in `local` that has the interface or the address `thing`; None if there is none."""
        return self._owners.get(thing)

    def senders(self, address: str) -> list[LocalEndpoint]:
        """Return the endpoints in `local` that may send packets from an address.

        Several endpoints may share a link-local address.
        """
        owner = self._owners.get(address)
        if owner is not None:
            return [owner]
        if not address.startswith("fe80:"):
            return []
        return [endpoint for endpoint in self.local.values() if endpoint.link_local == address]

    def addresses_listed(self) -> dict[tuple[str, str], int]:
        """Return how many addresses the endpoints of each workload list, for the workloads of all hosts.

        The keys of the result are (orchestrator, workload).
        """
        counts: dict[tuple[str, str], int] = {}
        for id, endpoint in self.endpoints.items():
            key = (id.orchestrator, id.workload)
            counts[key] = counts.get(key, 0) + len(endpoint.nets)
        return counts

    @property
    def lacking(self) -> str | None:
        """A directory in `unread` that may contain more than one object that this host needs; None if there is none.

        That is a directory with all profiles, all pools, all global BGP settings, or this host's endpoints, its own BGP
        settings or its blocks.
        """
        needed = (
            f"{keys.host(self.host)}/workload",
            *(keys.pools(4), keys.pools(6), keys.PROFILES),
            *(keys.BGP_GLOBAL, keys.bgp_host(self.host), keys.ipam_host(self.host)),
        )
        return next(
            (key for key in sorted(self.unread) if any(f"{one}/".startswith(f"{key}/") for one in needed)), None
        )

    def has_valid_rules(self, profile: str) -> bool:
        """Return whether a profile exists and its rules are valid."""
        known = self.profiles.get(profile)
        return known is not None and known.rules is not None

    def take_dirty(self) -> Dirty:
        """Return the changes since the last call.

        Also mark as admitted the addresses that this host's changed endpoints may use now (see admission.py).
        """
        dirty, self.dirty = self.dirty, Dirty()
        local = (id for id in dirty.endpoints if id.host == self.host and id in self.endpoints)
        self.admission.admit(map(self.endpoints.__getitem__, local))
        return dirty

    def _set(self, key: str, entry: Entry | None) -> None:
        """Store the entry of a key, or remove it if `entry` is None, and interpret it.

        If the entry is invalid, the reason is added to `problems`. If the agent does not use the key, the entry is not
        stored, and only `skipped` is updated.
        """
        handle = self._handler(key)
        if handle is None:
            self._skip(key, entry)
            return
        if entry is None:
            self._entries.forget(key)
        else:
            if len(entry.value) > limits.VALUE:  # it is invalid, and need not be kept
                entry = dataclasses.replace(entry, value=entry.value[: limits.VALUE + 1])
            self._entries.put(key, entry)
        self.problems.pop(key, None)
        try:
            handle(key, entry)
        except CalicoError as error:
            self.problems[key] = str(error)

    def _skip(self, key: str, entry: Entry | None) -> None:
        """Update `skipped` for a key that the agent does not use. `entry` is None if the key was deleted.

        The key is added to `skipped` if it could not be read, or has too many levels or characters. In all other cases,
        it is removed from `skipped`. If `skipped` has limits.REPORTED keys already, only keys that could not be read
        are added.
        """
        self.skipped.pop(key, None)
        if entry is not None and entry.problem is not None:
            self.skipped[key] = entry.problem
            return
        if entry is None or len(self.skipped) >= limits.REPORTED:
            return
        levels = key.count("/")
        if levels > keys.DEEPEST:
            self.skipped[key] = f"it is skipped: no key of Calico's has {levels} levels"
        elif len(key) > limits.KEY:
            self.skipped[key] = f"it is skipped: it has {len(key)} characters, and keys may have {limits.KEY}"

    def _handler(self, key: str) -> Callable[[str, Entry | None], None] | None:
        """Return the method that interprets a key, or None if the agent does not use the key."""
        if len(key) > limits.KEY:
            return None
        if key.startswith(keys.HOSTS + "/"):
            if keys.parse_endpoint(key) is not None:
                return self._set_endpoint
            if key == keys.host_config(self.host, config.HOST_ACTION.name):
                return self._set_setting
        if key.startswith(keys.PROFILES + "/"):
            return self._set_profile if keys.parse_profile(key) is not None else None
        if key.startswith((keys.pools(4) + "/", keys.pools(6) + "/")):
            return self._set_pool
        if key in _SETTINGS:
            return self._set_setting
        return self._set_topology if self.topology.handler(key) is not None else None

    def _set_endpoint(self, key: str, entry: Entry | None) -> None:
        id = keys.parse_endpoint(key)
        assert id is not None, "only endpoints' keys come here"
        self.dirty.endpoints.add(id)
        if id.host == self.host:
            self._unchecked.add(id)
        before = self.endpoints.get(id)
        if entry is None:
            self.endpoints.pop(id, None)
        else:
            self.endpoints[id] = Endpoint.from_json(id, entry.value, key)
        if id.host == self.host:
            self.admission.forget(before, self.endpoints.get(id))

    def _set_profile(self, key: str, entry: Entry | None) -> None:
        name = keys.parse_profile(key)
        assert name is not None, "only profiles' keys come here"
        self.dirty.profiles.add(name)
        tags_key, rules_key = keys.profile_tags(name), keys.profile_rules(name)
        tags_entry, rules_entry = self._entries.get(tags_key), self._entries.get(rules_key)
        self.problems.pop(tags_key, None)
        self.problems.pop(rules_key, None)
        if tags_entry is None and rules_entry is None:
            self.profiles.pop(name, None)
            return
        before = self.profiles.get(name)
        tags: tuple[str, ...] = ()
        rules: Rules | None = None
        if tags_entry is not None:
            try:
                tags = tuple(dict.fromkeys(load_tags(tags_entry.value, tags_key)))
            except CalicoError as error:
                tags = () if before is None else before.tags
                self.problems[tags_key] = (
                    f"{error}; until then, profile {name} has the tags {', '.join(tags) or '(none)'}"
                )
        try:
            if rules_entry is None:
                raise CalicoError("its rules key is missing")
            rules = readable(Rules.from_json(name, rules_entry.value, rules_key))
        except CalicoError as error:
            self.problems[rules_key] = f"profile {name} denies everything: {error}"
        self.profiles[name] = Profile(tags, rules)

    def _set_pool(self, key: str, entry: Entry | None) -> None:
        self.pools.pop(key, None)
        self.dirty.pools = True
        self.admission.set_pool(key, None if entry is None else pool_of_key(key))
        if entry is not None:
            self.pools[key] = Pool.from_json(entry.value, key)
            self.admission.set_pool(key, self.pools[key].cidr)

    def _set_setting(self, key: str, entry: Entry | None) -> None:
        value = "" if entry is None else entry.value
        self.dirty.settings = True
        if key == keys.READY:
            self.ready = value == "true"
        elif key == keys.config(config.LOG_LEVEL.name):
            self.log_level = (value or str(config.LOG_LEVEL.default)).lower()
        elif key == keys.config(config.GRACE_TIME.name):
            self.grace_time = GRACE_TIME
            if value and not re.fullmatch("[0-9]{1,9}", value, re.ASCII):
                raise CalicoError(f"'{value}' is not a number of seconds; {GRACE_TIME} is used")
            self.grace_time = int(value or GRACE_TIME)
        elif key == keys.config(config.CHECK_SENDERS.name):
            self.check_senders, self.dirty.topology = str(config.CHECK_SENDERS.default), True
            if value:
                config.CHECK_SENDERS.check(value)
                self.check_senders = value
        elif key == keys.config(config.HOST_SERVICES.name):
            self.host_services = value in ("", "allow")
            if value:  # fail closed for an unknown value
                config.HOST_SERVICES.check(value)
        elif key == keys.config(config.MAX_CONNECTIONS.name):
            self.max_connections = MAX_CONNECTIONS
            if value:
                config.MAX_CONNECTIONS.check(value)
                self.max_connections = int(value)
        elif key == keys.config(config.MTU.name):
            self.mtu = None
            if value:
                config.MTU.check(value)
                self.mtu = int(value)
        else:
            # fail closed for an unknown value
            self.host_action = (value or str(config.HOST_ACTION.default)).upper()
            if self.host_action not in (config.HOST_ACTION.values or ()):
                self.host_action = "DROP"
                raise CalicoError(f"'{value}' is none of {', '.join(config.HOST_ACTION.values or ())}; DROP is used")

    def _set_topology(self, key: str, entry: Entry | None) -> None:
        handle = self.topology.handler(key)
        assert handle is not None, "only keys of the topology come here"
        self.dirty.topology = True
        self.dirty.settings = self.dirty.settings or key == keys.bgp_host_address(self.host, 6)
        try:
            handle(key, entry)
        finally:
            for address in self.topology.take_changed_addresses():
                holder = self._claims.holder(address)
                self._unchecked |= set() if holder is None else {holder}
                self.dirty.endpoints |= self.unusable.keys()

    # This host's endpoints: which are valid and free of conflicts

    def _check_local(self) -> None:
        """Decide again which of this host's endpoints belong into `local`.

        Only the endpoints in `_unchecked`, and the endpoints that conflict with them, are decided again.
        """
        if self.admission.take_changed():
            self._mark_decided_anew()
        changed, self._unchecked = self._unchecked, set()
        for id in changed:
            self._withdraw(id)
            try:
                self._validate(id)
            except CalicoError as error:
                self._refuse(id, str(error))
        for id, why in self._claims.decide(changed).items():
            if why is not None:
                if self.unusable.get(id, (0, ""))[1] != why:
                    self._drop(id)
                    self._refuse(id, why)
                continue
            usable = self.admission.decide(self._claims.candidates[id])
            if self.local.get(id) != usable:
                self._drop(id)
                self.local[id] = usable
                self._owners.update(dict.fromkeys((usable.interface, *usable.addresses), usable))
                self.unusable.pop(id, None)
                self.problems.pop(keys.endpoint(id), None)
                self.dirty.endpoints.add(id)

    def _validate(self, id: EndpointId) -> None:
        """Make an active endpoint a candidate (see claims.py), and add an inactive endpoint to `unusable`.

        Do nothing if the endpoint was deleted. Raise CalicoError if it is invalid.
        """
        key = keys.endpoint(id)
        entry = self._entries.get(key)
        if entry is None:
            return
        if key in self.problems:
            raise CalicoError(self.problems[key])
        endpoint = self.endpoints[id]
        if endpoint.state == "inactive":
            self.unusable[id] = (entry.revision, INACTIVE)
            return
        if endpoint.state != "active":
            raise CalicoError(f"its state is {endpoint.state!a:.40}, neither active nor inactive")
        self._claims.add(validated(endpoint, entry.revision), entry.created)

    def _mark_decided_anew(self) -> None:
        """Add to `_unchecked` the endpoints in `local` for which `Admission.decide` now returns another result.

        Also add all unusable endpoints to `dirty`: their addresses, too, belong to tags unless they are refused, and
        which ones are refused may have changed.
        """
        decide, candidates = self.admission.decide, self._claims.candidates
        self._unchecked |= {id for id, endpoint in self.local.items() if decide(candidates[id]) != endpoint}
        self.dirty.endpoints |= self.unusable.keys()

    def _refuse(self, id: EndpointId, why: str) -> None:
        key = keys.endpoint(id)
        self.problems[key] = why
        self.unusable[id] = (self._entries[key].revision, why)
        self.dirty.endpoints.add(id)

    def _withdraw(self, id: EndpointId) -> None:
        """Remove an endpoint from `local`, from `unusable` and from the candidates. Do nothing where it is absent."""
        self._drop(id)
        self.unusable.pop(id, None)
        self._claims.withdraw(id)

    def _drop(self, id: EndpointId) -> None:
        """Remove an endpoint from `local`, and add its interface to `dirty`. Do nothing if it is not in `local`."""
        endpoint = self.local.pop(id, None)
        if endpoint is None:
            return
        self.dirty.interfaces.add(endpoint.interface)
        for thing in (endpoint.interface, *endpoint.addresses):
            if self._owners.get(thing) is endpoint:
                del self._owners[thing]
