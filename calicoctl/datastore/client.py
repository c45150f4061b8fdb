"""Access to Calico's data in the store: endpoints, profiles, pools, BGP peers and settings.

For other data, the client has the attributes `ipam` (addresses), `hosts` (registrations of hosts) and `statuses`
(reports of agents). "This host" is the host on whose behalf the client acts, `DatastoreClient.host`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Callable, TypeVar, cast

from calicoctl.addresses import version_of
from calicoctl.datastore import backends, config, keys, recent_blocks
from calicoctl.datastore.backends import PATIENCE
from calicoctl.datastore.chosen import ChosenStore
from calicoctl.datastore.copied import CopiedStore
from calicoctl.datastore.detection import Choice
from calicoctl.datastore.hosts import Hosts, hostname
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Endpoint, Peer, Pool, Rules, check_tags, load_object, load_tags
from calicoctl.datastore.settings import EtcdSettings
from calicoctl.datastore.statuses import Statuses
from calicoctl.datastore.store import (
    Entry,
    Store,
    Watch,
    Write,
    create_if_missing,
    create_missing,
    each_below,
    modify,
    read_all,
    set_value,
)
from calicoctl.errors import CalicoError, CompareFailed, InvalidValue, KeyExists, NotFound

if TYPE_CHECKING:
    from netaddr import IPAddress

    from calicoctl.datastore.blocks import Owner
    from calicoctl.datastore.ipam import Ipam

T = TypeVar("T")

_CREATABLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,38}")
"""Profiles that 'calicoctl profile add NAME' creates: `check_name` in policy/rules.py, which is not imported here, has
the exact rule."""


@dataclass(frozen=True)
class StoredWorkload:
    """What the store has of a workload: the entry of its handle (None: no handle), and its endpoints' entries by id.

    If `is_handle_read` is false, the handle was not read, and `handle` is None.
    """

    handle: Entry | None
    endpoints: dict[EndpointId, Entry]
    is_handle_read: bool = True


@dataclass(frozen=True)
class AddressFacts:
    """The data from the store that is needed to assign an address to a workload.

    `hosts` are the entries below keys.BGP_HOSTS. `pools` are the entries of the pools of the address's IP version.
    `mtu` is the setting MTU, None if it is not set. `affine` are the names (last parts of keys) of the blocks with
    affinity to this host, None if they were not read. `recent` is the block in which this host has last assigned an
    address (recent_blocks.py), None if it is not known, does not exist or was not read.
    """

    hosts: list[Entry]
    pools: list[Entry]
    mtu: str | None
    affine: list[str] | None
    recent: Entry | None


# more than 400 lines: one short method for each operation on profiles, endpoints, pools, peers and settings; hosts,
# statuses and addresses have classes of their own
class DatastoreClient:
    """Reads and changes Calico's data in the store on behalf of one host, `host`."""

    def __init__(self, store: Store, host: str, members: tuple[str, ...] = ()) -> None:
        """`members` are the names or addresses of the store's servers."""
        self.host = host
        self.members = members
        self._store = store

    @classmethod
    def from_environment(cls, patience: float = PATIENCE, shared: bool = True) -> DatastoreClient:
        """Return a client for this host and the etcd that the environment variables select. Sends no request.

        `patience` and `shared`: see backends.connect. A client that another thread than this one uses must not be
        `shared`. Raises StoreError for invalid settings, CalicoError for an invalid host name.
        """
        settings = EtcdSettings.from_environment()
        store = backends.connect(settings, patience, shared)
        return cls(store, hostname(), tuple(name for name, _ in settings.members))

    @cached_property
    def ipam(self) -> Ipam:
        from calicoctl.datastore.ipam import Ipam

        return Ipam(self._store, self.host)

    @cached_property
    def hosts(self) -> Hosts:
        return Hosts(self._store, self.host)

    @cached_property
    def statuses(self) -> Statuses:
        return Statuses(self._store, self.host)

    def everything(self) -> Iterator[Entry]:
        """Yield all entries below `/calico`, except those that cannot be read (see `each_below`)."""
        return each_below(self._store, keys.ROOT)

    def collect(self, directory: str, convert: Callable[[Entry], T | None]) -> list[T]:
        """Return `convert(entry)` for each entry below a directory, without None; see Store.collect.

        If the store is atomic, all are of one revision.
        """
        return self._store.collect(directory, convert)

    @property
    def atomic(self) -> bool:
        """Whether `commit` applies all of its writes or none."""
        return self._store.atomic

    def commit(self, writes: Sequence[Write]) -> None:
        """Apply writes of different keys that were read by this client; see Store.commit."""
        self._store.commit(writes)

    def copied(self, directory: str) -> tuple[DatastoreClient, list[Entry]]:
        """Read all keys below a directory into memory. Return what `copy_of` returns for their entries."""
        return self.copy_of(self._store.list_for_watch(directory)[0])

    def copy_of(self, entries: Iterable[Entry]) -> tuple[DatastoreClient, list[Entry]]:
        """Return a read-only client of a store that has only `entries`, and those of them that have a problem.

        The latter stand for keys and directories that could not be read (see `Entry.problem`). For the client, these do
        not exist.
        """
        copy = CopiedStore(entries)
        return DatastoreClient(cast("Store", copy), self.host, self.members), copy.unread

    def store_version(self) -> str:
        """Check that the store can be read, and return the version of the server. Raises StoreError if it cannot."""
        self._store.names(keys.ROOT)
        return self._store.version()

    def choice(self) -> Choice | None:
        """Return the choice of etcd's API, None if the store is not a ChosenStore. If there is none yet, choose first.

        Raises StoreError or InvalidValue if no API may be used.
        """
        return self._store.choice() if isinstance(self._store, ChosenStore) else None

    def current_choice(self) -> Choice | None:
        """Do what `choice` does, but first check by a request which API to use, and whether its data is frozen."""
        return self._store.current_choice() if isinstance(self._store, ChosenStore) else None

    def is_frozen(self) -> bool:
        """Return whether the data must not be changed now, by a request. Raises what `choice` raises."""
        choice = self.current_choice()
        return choice is not None and bool(choice.frozen)

    def for_host(self, host: str) -> DatastoreClient:
        """Return a client of the same store on behalf of `host`."""
        return DatastoreClient(self._store, host, self.members)

    # Pools

    def pools(self, version: int, entries: Iterable[Entry] | None = None) -> list[Pool]:
        """Return the pools of an IP version, ordered by address; raise InvalidValue for an invalid pool.

        `entries`: see readable_pools.
        """
        pools, invalid = self.readable_pools(version, entries)
        for error in invalid:
            raise error
        return pools

    def readable_pools(
        self, version: int, entries: Iterable[Entry] | None = None
    ) -> tuple[list[Pool], list[InvalidValue]]:
        """Return the valid pools of an IP version, ordered by address, and an error for each invalid pool.

        `entries` are those that `pool_entries` returns, if the caller has just read them.
        """
        from netaddr.ip import IPNetwork

        found, invalid = self._pool_entries(version, entries)
        return sorted((pool for _, pool in found), key=lambda pool: IPNetwork(pool.cidr)), invalid

    def put_pool(self, pool: Pool, entries: Iterable[Entry] | None = None) -> Pool | None:
        """Create or update a pool; return the previous pool, None if the pool was created.

        `entries` are the entries of the pools of its IP version, if the caller has just read them (pool_entries). The
        key of an existing pool and its unknown fields are preserved. For a pool with IP-in-IP, the global setting
        IpInIpEnabled is set to `true` as well. Raises CalicoError, and changes nothing, if a new pool overlaps with an
        older one (callers have checked this before, so the older one was added concurrently), NotFound if the pool was
        deleted concurrently, Conflict if other writers keep changing it, and InvalidValue if the stored pool is
        invalid.
        """
        before = self._put_pool(pool, entries)
        if pool.ipip:  # last: a pool that is refused changes nothing
            set_value(self._store, keys.config(config.IPIP.name), "true")
        return before

    def _put_pool(self, pool: Pool, entries: Iterable[Entry] | None) -> Pool | None:
        version = version_of(pool.cidr)
        # another tool may have stored the pool under another key
        known = next((entry for entry, it in self._pool_entries(version, entries)[0] if it.cidr == pool.cidr), None)
        key = keys.pool(version, pool.cidr) if known is None else known.key
        if known is None and create_if_missing(self._store, key, pool.to_json()):
            self.refuse_overlap(key, pool)
            return None
        before = pool

        def text_of(old: str) -> str | None:
            nonlocal before
            before = Pool.from_json(old, key)
            now = Pool(pool.cidr, pool.ipip, pool.masquerade, pool.vxlan, before.extra)
            return None if now == before else now.to_json()

        modify(self._store, key, f"Pool {pool.cidr} was deleted concurrently", text_of, known)
        return before

    def refuse_overlap(self, key: str, pool: Pool) -> None:
        """If an older pool overlaps with `pool`, delete `key`, just created for `pool`, and raise CalicoError.

        Whoever creates a pool calls this afterwards, since another writer may have added the older one meanwhile.
        """
        from netaddr.ip import IPNetwork

        # of two writers, each reads the pools after its own write, so the later writer always sees the earlier pool
        own = IPNetwork(pool.cidr)
        entries = self.pool_entries(own.version)
        mine = next((entry for entry in entries if entry.key == key), None)
        for entry, other in self._pool_entries(own.version, entries)[0]:
            network = IPNetwork(other.cidr)
            overlaps = entry.key != key and (network in own or own in network)
            if overlaps and mine is not None and entry.created < mine.created:
                set_value(self._store, key, None)
                raise CalicoError(f"{pool.cidr} overlaps with {other.cidr}, which was added concurrently.")

    def pool_entries(self, version: int) -> list[Entry]:
        """Return the entries of the pools of an IP version, valid or not."""
        return self._store.tree(keys.pools(version))

    def _pool_entries(
        self, version: int, entries: Iterable[Entry] | None = None
    ) -> tuple[list[tuple[Entry, Pool]], list[InvalidValue]]:
        found: list[tuple[Entry, Pool]] = []
        invalid: list[InvalidValue] = []
        for entry in self.pool_entries(version) if entries is None else entries:
            try:
                found.append((entry, _pool(entry, version)))
            except InvalidValue as error:
                invalid.append(error)
        return found, invalid

    def pool_keys(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Return, for each of `names`, the keys of the pools, of both IP versions, that it is a name of.

        A name is the CIDR in the value or in the key, or the last part of the key, such as `10.1.0.0-16`. The pools may
        be invalid; then, only the key counts.
        """
        return self._keys_called(names, [keys.pools(version) for version in (4, 6)], lambda e: Pool.from_json(*e).cidr)

    def _keys_called(
        self, names: Iterable[str], directories: list[str], named: Callable[[tuple[str, str]], str]
    ) -> dict[str, list[str]]:
        """Return, for each of `names`, the keys below `directories` that match it.

        A key matches its last part, what `keys.undashed` converts that to, and what `named((value, key))` returns. If
        `named` raises InvalidValue, only the last part counts.
        """
        found: dict[str, list[str]] = {name: [] for name in names}
        for entry in (entry for directory in directories for entry in self._store.tree(directory)):
            own = {keys.last(entry.key), keys.undashed(keys.last(entry.key))}
            with suppress(InvalidValue):
                own.add(named((entry.value, entry.key)))
            for name in own & found.keys():
                found[name].append(entry.key)
        return found

    # BGP

    def readable_bgp_peers(self, version: int, host: str | None = None) -> tuple[list[Peer], list[InvalidValue]]:
        """Return the valid BGP peers of an IP version, ordered by address, and an error for each invalid peer.

        With `host`, returns only the peers of that host; without `host`, only the global peers.
        """
        from calicoctl.addresses import parse_address

        peers, invalid = [], []
        for entry in self._store.tree(keys.bgp_peers(version, host)):
            try:
                peers.append(Peer.from_json(entry.value, entry.key))
            except InvalidValue as error:
                invalid.append(error)
        return sorted(peers, key=lambda peer: parse_address(peer.ip)), invalid

    def put_bgp_peer(self, peer: Peer, host: str | None = None) -> Peer | None:
        """Create or update a BGP peer; return the previous peer, None if the peer was created.

        With `host`, it is a peer of that host; without `host`, a global peer. Unknown fields of an existing peer are
        preserved. Raises NotFound if the peer was deleted concurrently, Conflict if other writers keep changing it, and
        InvalidValue if the stored peer is invalid.
        """
        key = keys.bgp_peer(version_of(peer.ip), peer.ip, host)
        if create_if_missing(self._store, key, peer.to_json()):
            return None
        before = peer

        def text_of(old: str) -> str | None:
            nonlocal before
            before = Peer.from_json(old, key)
            now = Peer(peer.ip, peer.as_num, before.extra)
            return None if now == before else now.to_json()

        modify(self._store, key, f"BGP peer {peer.ip} was deleted concurrently", text_of)
        return before

    def bgp_peer_keys(self, name: str, host: str | None = None) -> list[str]:
        """Return the keys of the BGP peers called `name`: it is the address in the value, or the last part of the key.

        The peers may be invalid; then, only the key counts. With `host`, only that host's peers are searched; without
        `host`, only the global peers.
        """
        directories = [keys.bgp_peers(version, host) for version in (4, 6)]
        return self._keys_called([name], directories, lambda e: Peer.from_json(*e).ip)[name]

    def node_mesh(self) -> bool:
        """Return whether the full mesh between hosts is enabled, which it is if the key is missing.

        Raises InvalidValue if the key has an invalid value.
        """
        entry = self._store.get(keys.BGP_NODE_MESH)
        if entry is None:
            return True
        enabled = load_object(entry.value, keys.BGP_NODE_MESH).get("enabled")
        if not isinstance(enabled, bool):
            raise InvalidValue(keys.BGP_NODE_MESH, '"enabled" should be true or false')
        return enabled

    def set_node_mesh(self, enabled: bool) -> None:
        self.set(keys.BGP_NODE_MESH, json.dumps({"enabled": enabled}))

    # Settings: keys with plain text

    def setting(self, key: str) -> str | None:
        """Return the value of a key, None if there is no such key."""
        entry = self._store.get(key)
        return None if entry is None else entry.value

    def set(self, key: str, value: str) -> None:
        set_value(self._store, key, value)

    def unset(self, key: str) -> bool:
        """Delete a key; return whether it existed."""
        return set_value(self._store, key, None) is not None

    # Profiles

    def profile_names(self) -> list[str]:
        return sorted(self._store.names(keys.PROFILES))

    def profile_exists(self, name: str) -> bool:
        return self._store.exists(keys.profile(name))

    def require_profile(self, name: str) -> None:
        """Raise NotFound if there is no profile with this name."""
        if not self.profile_exists(name):
            raise NotFound(_no_profile(name))

    def create_profile(self, name: str) -> bool:
        """Create a profile with the default tag and rules; return whether anything was written.

        Existing tags or rules are not changed.
        """
        values = {keys.profile_tags(name): json.dumps([name]), keys.profile_rules(name): Rules.default(name).to_json()}
        return create_missing(self._store, values)

    def remove_profile(self, name: str) -> None:
        """Delete a profile, with all keys below it. Do nothing if it does not exist."""
        self._store.remove_tree(keys.profile(name))

    def tags(self, name: str) -> list[str]:
        """Return a profile's tags; an empty list if the profile exists without the key of its tags.

        Raises NotFound if there is no such profile, and InvalidValue for invalid tags.
        """
        entry = self._profile_entry(keys.profile_tags(name), name)
        return [] if entry is None else load_tags(entry.value, entry.key)

    def all_tags(self) -> frozenset[str] | None:
        """Return the tags of all profiles; None if the tags of any profile are invalid.

        Tags that could not be read (see `Entry.problem`) are missing from the result.
        """

        def tags(entry: Entry) -> list[str] | None:
            if keys.last(entry.key) != "tags" or keys.parse_profile(entry.key) is None or entry.problem is not None:
                return None
            return load_tags(entry.value, entry.key)

        try:
            return frozenset(chain.from_iterable(self._store.collect(keys.PROFILES, tags)))
        except InvalidValue:
            return None

    def modify_tags(self, name: str, change: Callable[[list[str]], bool]) -> bool:
        """Change the tags of a profile by compare-and-swap; return whether they were written.

        `change` modifies the list of tags in place, and returns whether to write it. After a concurrent write, `change`
        is called again with the new tags. Raises NotFound if there is no such profile, InvalidValue if the stored tags
        are invalid, CalicoError if there are too many tags after the change, and Conflict if other writers keep
        changing them.
        """
        key = keys.profile_tags(name)

        def text_of(old: str) -> str | None:
            tags = load_tags(old, key)
            return json.dumps(check_tags(tags)) if change(tags) else None

        known = self._complete(key, name, "[]")
        return modify(self._store, key, _no_profile(name), text_of, known)

    def rules(self, name: str) -> Rules:
        """Return a profile's rules; empty Rules if the profile exists without the key of its rules.

        Raises NotFound if there is no such profile, and InvalidValue for invalid rules.
        """
        entry = self._profile_entry(keys.profile_rules(name), name)
        return Rules(name) if entry is None else Rules.from_json(name, entry.value, entry.key)

    def modify_rules(self, name: str, change: Callable[[Rules], bool]) -> bool:
        """Change the rules of a profile by compare-and-swap; return whether they were written.

        `change` modifies the rules in place, and returns whether to write them. After a concurrent write, `change` is
        called again with the new rules. Raises NotFound if there is no such profile, InvalidValue if the stored rules
        are invalid, CalicoError if the changed rules are too many or too long, and Conflict if other writers keep
        changing them.
        """
        key = keys.profile_rules(name)

        def text_of(old: str) -> str | None:
            rules = Rules.from_json(name, old, key)
            return rules.to_json() if change(rules) else None

        known = self._complete(key, name, Rules(name).to_json())
        return modify(self._store, key, _no_profile(name), text_of, known)

    def replace_rules(self, rules: Rules) -> None:
        """Overwrite a profile's rules, even if the stored rules are invalid.

        Raises NotFound if there is no such profile, CalicoError if the new rules are too many or too long, and Conflict
        if other writers keep changing the stored rules.
        """
        key = keys.profile_rules(rules.id)
        known = self._complete(key, rules.id, rules.to_json())
        modify(self._store, key, _no_profile(rules.id), lambda old: rules.to_json(), known)

    def _profile_entry(self, key: str, name: str) -> Entry | None:
        """Return the entry of `key`, one of the keys of the profile `name`; None if only this key is missing.

        Raises NotFound if the profile does not exist.
        """
        entry = self._store.get(key)
        if entry is None:
            self.require_profile(name)
        return entry

    def _complete(self, key: str, name: str, value: str) -> Entry | None:
        """Create `key`, one of the keys of the profile `name`, with `value`, unless the key exists.

        Return its entry, None if another writer has just created it. Raises NotFound if the profile does not exist.
        """
        entry = self._profile_entry(key, name)
        if entry is None:
            with suppress(KeyExists):
                entry = self._store.create(key, value)
        return entry

    # Endpoints

    def readable_endpoints(
        self,
        host: str | None = None,
        orchestrator: str | None = None,
        wanted: Callable[[Endpoint], bool] = lambda endpoint: True,
    ) -> tuple[list[Endpoint], list[InvalidValue]]:
        """Return the valid endpoints of `host` (None: all hosts) for which `wanted` returns true.

        Also return an error for each invalid endpoint of `host`. If `orchestrator` is not None, both are only about its
        endpoints. Endpoints that could not be read (see `Entry.problem`) are in neither list.
        """

        def read(entry: Entry) -> Endpoint | InvalidValue | None:
            id = keys.parse_endpoint(entry.key)
            if id is None or entry.problem is not None or orchestrator not in (None, id.orchestrator):
                return None
            try:
                endpoint = Endpoint.from_json(id, entry.value, entry.key)
                return endpoint if wanted(endpoint) else None
            except InvalidValue as error:
                return error

        return _separate(self._store.collect(_endpoints_directory(host, orchestrator), read))

    def endpoints_beginning(
        self, beginning: str, host: str | None = None, orchestrator: str | None = None
    ) -> tuple[list[Endpoint], list[InvalidValue]]:
        """Return the valid endpoints whose `EndpointId.endpoint` begins with `beginning`.

        Also return an error for each invalid endpoint of which that is true. The endpoints have an `entry`. `host`,
        `orchestrator`: see readable_endpoints. If the store is atomic, the values of other endpoints are not read.
        """

        def matching(entry: Entry) -> Entry | None:
            id = keys.parse_endpoint(entry.key)
            if id is None or entry.problem is not None or orchestrator not in (None, id.orchestrator):
                return None
            return entry if id.endpoint.startswith(beginning) else None

        # through etcd's v2 API, the values come with the keys
        directory = _endpoints_directory(host, orchestrator)
        entries = self._store.collect(directory, matching, values=not self._store.atomic)
        if self._store.atomic:
            entries = list(read_all(self._store, [entry.key for entry in entries]).values())
        found: list[Endpoint | InvalidValue] = []
        for id, entry in _endpoint_entries(entries).items():
            try:
                found.append(_endpoint(id, entry))
            except InvalidValue as error:
                found.append(error)
        return _separate(found)

    def endpoints_with(self, address: IPAddress, owner: Owner | None) -> dict[EndpointId, Endpoint | None]:
        """Return the endpoints, on any host, that have the address `address`. The value is None if one is invalid.

        `owner` is the address's owner in IPAM, None if it has none. If one of the endpoints owns the address in IPAM,
        only that one is returned. An invalid endpoint counts as having the address if it owns it in IPAM, or if its
        JSON text contains it.
        """
        text = str(address)
        if owner is not None:
            id = EndpointId(
                *(str(owner.secondary.get(part)) for part in ("host", "orchestrator", "workload", "endpoint"))
            )
            if keys.parse_endpoint(keys.endpoint(id)) == id:
                entry = self._store.get(keys.endpoint(id))
                if entry is not None and _lists(entry, id, text, owned=True):
                    return {id: _readable(id, entry)}

        def listing(entry: Entry) -> tuple[EndpointId, Endpoint | None] | None:
            id = keys.parse_endpoint(entry.key)
            lists = id is not None and entry.problem is None and _lists(entry, id, text)
            return (id, _readable(id, entry)) if id is not None and lists else None

        return dict(self._store.collect(keys.HOSTS, listing))

    def endpoint_ids(self) -> list[EndpointId]:
        """Return the ids of this host's endpoints, including invalid endpoints."""
        return self.all_endpoint_ids(self.host)

    def all_endpoint_ids(self, host: str | None = None, orchestrator: str | None = None) -> list[EndpointId]:
        """Return the ids of the endpoints of `host` (None: all hosts), including invalid endpoints.

        If `orchestrator` is not None, only the ids of its endpoints are returned.
        """

        def read(entry: Entry) -> EndpointId | None:
            id = keys.parse_endpoint(entry.key) if entry.problem is None else None
            return id if id is not None and orchestrator in (None, id.orchestrator) else None

        return self._store.collect(_endpoints_directory(host, orchestrator), read, values=False)

    def endpoint_revision(self, id: EndpointId) -> int | None:
        """Return the revision of an endpoint's key, None if the endpoint does not exist."""
        entry = self._store.get(keys.endpoint(id))
        return None if entry is None else entry.revision

    def workload_endpoints(self, orchestrator: str, workload: str) -> list[Endpoint]:
        """Return the endpoints of one workload on this host, with `entry`; raise InvalidValue for an invalid one."""
        entries = self._store.tree(keys.endpoints(self.host, orchestrator, workload))
        return [_endpoint(id, entry) for id, entry in _endpoint_entries(entries).items()]

    def read_workload(self, handle: str, places: Sequence[tuple[str, str]], is_new: bool = False) -> StoredWorkload:
        """Return the entry of a workload's handle, and the entries of its endpoints on this host, valid or not.

        `places` are pairs (orchestrator, workload id) under which the workload may be stored. The endpoints of the
        first pair that has any are returned. `is_new` says that the handle probably does not exist. An atomic store
        reads everything in one request. From another store, the handle is not read if `is_new` is true and there are
        no endpoints.
        """
        directories = [keys.endpoints(self.host, *place) for place in places]
        if self._store.atomic:
            (entry,), trees = self._store.read([keys.ipam_handle(handle)], directories)
            return StoredWorkload(entry, next(filter(None, map(_endpoint_entries, trees)), {}))
        found = next(filter(None, map(_endpoint_entries, map(self._store.tree, directories))), {})
        if is_new and not found:
            return StoredWorkload(None, {}, is_handle_read=False)
        return StoredWorkload(self._store.get(keys.ipam_handle(handle)), found)

    def read_for_address(self, version: int, automatic: bool) -> AddressFacts:
        """Return the data that is needed to assign an address of an IP version to a workload.

        `automatic` says that the user has not asked for a specific address. `affine` and `recent` of the result are
        only read if `automatic` is true and the store is atomic, which needs no further request for them.
        """
        single, directories = [keys.config(config.MTU.name)], [keys.BGP_HOSTS, keys.pools(version)]
        if automatic and self._store.atomic:
            directories.append(keys.ipam_affinities(self.host, version))
            single += filter(None, [recent_blocks.key(self.host, version)])
        (mtu, *recent), (hosts, pools, *blocks) = self._store.read(single, directories)
        affine = [keys.last(entry.key) for entry in blocks[0]] if blocks else None
        return AddressFacts(hosts, pools, None if mtu is None else mtu.value, affine, recent[0] if recent else None)

    def read_for_interface(self, id: EndpointId) -> tuple[Endpoint | None, dict[int, list[Entry]], str | None]:
        """Return what is needed to create the interface of an endpoint, by one `Store.read`.

        These are the endpoint, None if it does not exist or is invalid; a dict of IP version -> the entries of the
        pools of that version; and the setting MTU, None if it is not set.
        """
        (entry, mtu), pools = self._store.read(
            [keys.endpoint(id), keys.config(config.MTU.name)], [keys.pools(version) for version in (4, 6)]
        )
        return _readable(id, entry), dict(zip((4, 6), pools)), None if mtu is None else mtu.value

    def workload_endpoint_ids(self, orchestrator: str, workload: str) -> list[EndpointId]:
        """Return the ids of the endpoints of one workload on this host, including invalid endpoints."""
        found = self._store.names(keys.endpoints(self.host, orchestrator, workload))
        return [EndpointId(self.host, orchestrator, workload, endpoint) for endpoint in found]

    def readable(self, id: EndpointId) -> Endpoint | None:
        """Return an endpoint, None if it does not exist or is invalid."""
        return _readable(id, self._store.get(keys.endpoint(id)))

    def workload_ids(self, orchestrator: str) -> list[str]:
        """Return the sorted ids of an orchestrator's workloads on this host that have at least one endpoint."""
        return sorted({id.workload for id in self.all_endpoint_ids(self.host, orchestrator)})

    def workloads_named(self, orchestrator: str, name: str) -> list[str]:
        """Return the sorted ids of an orchestrator's workloads on this host whose name is `name`.

        The endpoints are searched first. If no endpoint matches, the attributes of the assigned addresses are searched.
        """
        endpoints = self.readable_endpoints(self.host, orchestrator, lambda e: e.workload_name == name)[0]
        ids = {endpoint.id.workload for endpoint in endpoints}
        # old tools remove the name from the endpoint, but not from the attributes
        return sorted(ids or {id for of, id in self.ipam.workloads(name) if of == orchestrator})

    def knows_interface(self, name: str) -> bool:
        """Return whether the interface `name` of this host may belong to an endpoint.

        That is so if an endpoint of this host has this interface, if an address on this host is assigned to an endpoint
        that would have it (perhaps not in the store yet), or if any endpoint of this host is invalid.
        """
        if any(self.readable_endpoints(self.host, wanted=lambda one: name in (one.name, one.id.interface))):
            return True
        # an endpoint that is being set up has addresses in IPAM before it is in the store
        return name in self.ipam.interfaces()

    def create_endpoint(self, endpoint: Endpoint) -> None:
        """Create an endpoint; raise KeyExists if it exists, CalicoError if it has too many profiles or addresses."""
        self._store.create(keys.endpoint(endpoint.id), endpoint.to_json())

    def modify_endpoint(self, id: EndpointId, change: Callable[[Endpoint], bool], known: Entry | None = None) -> bool:
        """Change an endpoint by compare-and-swap; return whether it was written.

        `change` modifies the endpoint in place, and returns whether to write it. After a concurrent write, `change` is
        called again with the new endpoint. `known` is the endpoint's entry, if the caller has just read it. Raises
        NotFound if there is no such endpoint, InvalidValue if it is invalid, CalicoError if it would have too many
        profiles or addresses, and Conflict if other writers keep changing it.
        """
        key = keys.endpoint(id)

        def text_of(old: str) -> str | None:
            endpoint = Endpoint.from_json(id, old, key)
            return endpoint.to_json() if change(endpoint) else None

        return modify(self._store, key, f"endpoint {id.endpoint} no longer exists", text_of, known)

    def check_endpoints_writable(self, ids: Iterable[EndpointId], handle: str) -> None:
        """Raise StoreError if etcd does not permit writes to these endpoints or to the handle `handle`."""
        self._store.check_writable(*map(keys.endpoint, ids), keys.ipam_handle(handle))

    def remove_endpoint(self, id: EndpointId) -> None:
        """Delete an endpoint, even if it is invalid, or has changed concurrently. Do nothing if it does not exist."""
        set_value(self._store, keys.endpoint(id), None)

    def remove_workloads(self, ids: Iterable[EndpointId]) -> None:
        """Delete all endpoints of the workloads that the endpoints `ids` belong to, even if invalid or changed since.

        The ids must be those of endpoints that were read from the store. One request is made for each workload.
        """
        for directory in {keys.workload(id.host, id.orchestrator, id.workload) for id in ids}:
            self._store.remove_tree(directory)

    def touch_endpoint(self, id: EndpointId) -> None:
        """If an endpoint exists, write it again unchanged, so that the agent reports the endpoint's status again."""
        entry = self._store.get(keys.endpoint(id))
        if entry is not None:
            with suppress(CompareFailed):  # another writer had the same effect
                self._store.update(entry, entry.value)

    # The host agent

    def followed(self) -> list[str]:
        """Return the directories that this host's agent watches."""
        return [keys.POLICY_AND_HOSTS, keys.BGP, keys.IPAM_HOSTS]

    def list_for_watch(self, directory: str) -> tuple[list[Entry], int]:
        """Return all entries below a directory, and the revision to watch it from; see Store.list_for_watch."""
        return self._store.list_for_watch(directory)

    def watch(self, directory: str, revision: int, seconds: float) -> Watch:
        """Return a watch of a directory; see Store.watch."""
        return self._store.watch(directory, revision, seconds)


def _pool(entry: Entry, version: int) -> Pool:
    pool = Pool.from_json(entry.value, entry.key)
    if version_of(pool.cidr) != version:
        raise InvalidValue(entry.key, f"{pool.cidr} is not an IPv{version} CIDR")
    return pool


def _endpoint(id: EndpointId, entry: Entry) -> Endpoint:
    """Return the endpoint in an entry of the store, with that entry. Raises InvalidValue if it is invalid."""
    endpoint = Endpoint.from_json(id, entry.value, entry.key)
    endpoint.entry = entry
    return endpoint


def _readable(id: EndpointId, entry: Entry | None) -> Endpoint | None:
    """Return the endpoint in an entry of the store, None if it is invalid or `entry` is None."""
    with suppress(InvalidValue):
        return None if entry is None else Endpoint.from_json(id, entry.value, entry.key)
    return None


def _endpoints_directory(host: str | None, orchestrator: str | None) -> str:
    """Return the directory that contains the endpoints of an orchestrator (None: all) on a host.

    If `host` is None, the directory contains the endpoints of all hosts and orchestrators.
    """
    if host is None:
        return keys.HOSTS
    return f"{keys.host(host)}/workload" if orchestrator is None else keys.workloads(host, orchestrator)


def _separate(found: Iterable[Endpoint | InvalidValue]) -> tuple[list[Endpoint], list[InvalidValue]]:
    """Return the endpoints in `found`, and the errors."""
    endpoints: list[Endpoint] = []
    invalid: list[InvalidValue] = []
    for one in found:
        if isinstance(one, InvalidValue):
            invalid.append(one)
        else:
            endpoints.append(one)
    return endpoints, invalid


def _endpoint_entries(entries: Iterable[Entry]) -> dict[EndpointId, Entry]:
    """Return endpoint id -> entry for those of `entries` that are endpoints, valid or not."""
    ids = ((keys.parse_endpoint(entry.key), entry) for entry in entries)
    return {id: entry for id, entry in ids if id is not None}


def _lists(entry: Entry, id: EndpointId, address: str, owned: bool = False) -> bool:
    """Return whether an endpoint has the address `address`.

    An invalid endpoint counts as having the address if its JSON text contains it, or if `owned` says that the endpoint
    owns it in IPAM.
    """
    try:
        return address in Endpoint.from_json(id, entry.value, entry.key).addresses
    except InvalidValue:
        return owned or re.search(rf'"{re.escape(address)}["/]', entry.value) is not None


def _no_profile(name: str) -> str:
    text = f"Profile {name} does not exist."
    return f"{text} Create it with 'calicoctl profile add {name}'." if _CREATABLE.fullmatch(name) else text
