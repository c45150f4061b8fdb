"""The registration of hosts in the store (names, addresses, AS numbers, MACs), and summaries of all hosts."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Optional

from calicoctl import limits
from calicoctl.datastore import config, keys
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Pool, load_object
from calicoctl.datastore.store import Entry, Store, create_if_missing, set_value
from calicoctl.errors import CalicoError, InvalidValue

DEFAULT_AS_NUMBER = "64511"
ENDPOINT_STATES = ("up", "down", "error", "unknown")
DEFAULT_POOLS = {4: "192.168.0.0/16", 6: "fd80:24e2:f998:72d6::/64"}

_FEW = 50
"""The maximum number of endpoints of a host for whose statuses an atomic store does not read those of all others."""

_Report = tuple[str, Optional[str], Any]
"""(key, None, (status, reason)) for the status of an endpoint, (key, host, fields) for a heartbeat."""


def hostname() -> str:
    """Return this host's name: $HOSTNAME or, if that is empty or not set, the system's host name.

    Raises CalicoError for an invalid name.
    """
    name = os.environ.get("HOSTNAME") or socket.gethostname()
    try:
        return check_hostname(name)
    except CalicoError as error:
        raise CalicoError(f"{error}; set HOSTNAME") from None


def check_hostname(name: str) -> str:
    """Return `name` unchanged; raise CalicoError if it is not a valid name of a host."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,252}", name, re.ASCII):
        raise CalicoError(
            f"the host name '{name}' cannot be used: it must have letters, digits, '_', '.' and '-', with a letter or "
            "digit first"
        )
    return name


@dataclass
class HostSummary:
    """A summary of the data about one host in the store.

    `ipv4` and `ipv6` are the registered addresses as they are stored, None if they are missing or empty. `as_num` is
    the host's own AS number or, if it has none, the global AS number. `agent` is "up", "starting" (until it has
    programmed the kernel for the first time), or "down" if there is no heartbeat. `reported` is the time (ISO 8601) in
    the heartbeat, None if there is no heartbeat, or no time in it.

    `endpoints` maps each of ENDPOINT_STATES to the number of endpoints with that status. Endpoints without a reported
    status count as "unknown", and so do all endpoints of the host while `agent` is not "up".
    """

    name: str
    ipv4: str | None = None
    ipv6: str | None = None
    as_num: str | None = None
    agent: str = "down"
    reported: str | None = None
    endpoints: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ENDPOINT_STATES, 0))


class Hosts:
    """Reads the registrations of all hosts, and writes the registration of `host`."""

    def __init__(self, store: Store, host: str) -> None:
        self.host = host
        self._store = store

    def is_registered(self) -> bool:
        """Return whether the store has any address, setting or endpoint of this host."""
        directories = (keys.host(self.host), keys.bgp_host(self.host))
        return any(self._store.exists(directory) for directory in directories)

    def registered(self) -> list[str]:
        """Return the sorted names of the hosts that have a key for a BGP address, even if the key's value is empty."""
        entries = self._store.tree(keys.BGP_HOSTS)
        return sorted({host for host in map(keys.parse_bgp_host_address, (e.key for e in entries)) if host is not None})

    def summaries(self) -> list[HostSummary]:
        """Return a HostSummary for each host that has an address, AS number, heartbeat or endpoint, sorted by name."""
        found: dict[str, HostSummary] = {}

        def summary(name: str) -> HostSummary:
            return found.setdefault(name, HostSummary(name))

        for entry in self._store.tree(keys.BGP_HOSTS):
            name, _, setting = entry.key[len(keys.BGP_HOSTS) + 1 :].partition("/")
            value = limits.shortened(entry.value, limits.NAME) or None
            if setting == "ip_addr_v4":
                summary(name).ipv4 = value
            elif setting == "ip_addr_v6":
                summary(name).ipv6 = value
            elif setting == "as_num":
                summary(name).as_num = value
        reports = _Reports(_reports_below(self._store, keys.FELIX_HOSTS))
        for name, heartbeat in reports.heartbeats.items():
            summary(name).agent = "starting" if heartbeat.get("first_update") is False else "up"
            time = heartbeat.get("time")
            summary(name).reported = time if isinstance(time, str) else None

        def registered(entry: Entry) -> tuple[str, str | None, str | None] | None:
            """Return (host, status, None) for an endpoint, (host, None, IPv4 address) for a host; None for the rest."""
            id = keys.parse_endpoint(entry.key) if entry.problem is None else None
            if id is not None:
                return sys.intern(id.host), reports.status(id)[0], None
            host = keys.parse_host_bird_ip(entry.key) if entry.problem is None else None
            return None if host is None else (host, None, limits.shortened(entry.value, limits.NAME))

        for name, status, address in self._store.collect(keys.HOSTS, registered):
            if status is not None:
                summary(name).endpoints[status] += 1
            elif summary(name).ipv4 is None:
                summary(name).ipv4 = address or None
        default_as_num = self.default_as_num()
        for host in found.values():
            host.as_num = host.as_num or default_as_num
        return [found[name] for name in sorted(found)]

    def endpoint_statuses(self, ids: Collection[EndpointId]) -> Callable[[EndpointId], tuple[str, str | None]]:
        """Read the statuses of these endpoints, in few requests.

        Return a function that maps an endpoint's id to (status, reason). The status is one of ENDPOINT_STATES. It is
        "unknown" if none was reported, or if the agent of the endpoint's host is not up (see HostSummary). The reason
        is None if none was reported.
        """
        hosts = {id.host for id in ids}
        if len(hosts) > 1:
            return _Reports(_reports_below(self._store, keys.FELIX_HOSTS)).status
        host = hosts.pop() if hosts else self.host
        if len(ids) <= (_FEW if self._store.atomic else 1):
            with suppress(InvalidValue):  # for a key that cannot be read; below, it is skipped
                entries, _ = self._store.read([keys.felix_status(host), *map(keys.felix_endpoint, ids)])
                return _Reports(filter(None, (_report(entry) for entry in entries if entry is not None))).status
        return _Reports(_reports_below(self._store, keys.felix_host(host))).status

    def default_as_num(self) -> str:
        """Return the global AS number; DEFAULT_AS_NUMBER if it is missing or invalid."""
        from calicoctl.addresses import parse_as_number

        with suppress(CalicoError):
            return parse_as_number(self._text(keys.BGP_AS_NUM) or DEFAULT_AS_NUMBER)
        return DEFAULT_AS_NUMBER

    def addresses(self, version: int | None = None, entries: Iterable[Entry] | None = None) -> dict[str, str]:
        """Return the addresses of all registered hosts, as canonical address -> host.

        If `version` is 4 or 6, only addresses of that IP version are returned. Invalid addresses are left out. If this
        host and another host have registered the same address, the address maps to the other host. `entries` are the
        entries below keys.BGP_HOSTS, if the caller has just read them; if `entries` is None, they are read.
        """
        from calicoctl.addresses import parse_address

        texts: list[tuple[str, str]] = []
        complete: set[str] = set()
        for entry in self._store.tree(keys.BGP_HOSTS) if entries is None else entries:
            host = keys.parse_bgp_host_address(entry.key)
            if host is not None and entry.value:
                texts.append((entry.value, host))
                complete.update({host} if entry.key == keys.bgp_host_address(host, 4) else ())
        if version != 6:
            # normally this is the same address, but a host that an older tool has registered may have it only here
            for host in self._store.names(keys.HOSTS, complete):
                texts.append((self._text(keys.host_bird_ip(host)) or "", host))
        found: dict[str, str] = {}
        for text, host in sorted(texts, key=lambda one: one[1] != self.host):
            with suppress(CalicoError):
                address = parse_address(text)
                if version in (None, address.version):
                    found[str(address)] = host
        return found

    def addresses_of_others(self) -> dict[str, str]:
        """Return the addresses of all registered hosts except this one, as canonical address -> host."""
        return {address: host for address, host in self.addresses().items() if host != self.host}

    def check_writable(self) -> None:
        """Raise StoreError if etcd does not permit writes to this host's keys.

        Only the keys of the host's IPv4 address are tested. Nothing is changed.
        """
        self._store.check_writable(keys.host_bird_ip(self.host), keys.bgp_host_address(self.host, 4))

    def unregister(self) -> bool:
        """Delete this host's keys, and release its block affinities. Addresses in use stay assigned.

        Returns whether the host was registered (see `is_registered`), or had any block affinity.
        """
        from calicoctl.datastore.ipam import Ipam

        found = self.is_registered()
        found = Ipam(self._store, self.host).release_affinities() or found
        for directory in (
            keys.felix_host(self.host),
            keys.bgp_host(self.host),
            keys.ipam_host(self.host),
            keys.host(self.host),
        ):
            self._store.remove_tree(directory)
        return found

    def register(self, ipv4: str | None, ipv6: str | None, as_num: str | None) -> None:
        """Create the global settings and default pools that are missing; then write this host's keys.

        A default pool is missing if there is no pool of its IP version. If an address is None, an empty value is
        written. If `as_num` is None, the host's own AS number is deleted. Raises Frozen while the data must not be
        changed, since it may be moved between etcd's APIs.
        """
        for setting in config.WRITTEN:
            create_if_missing(self._store, keys.config(setting.name), str(setting.default))
        create_if_missing(self._store, keys.BGP_AS_NUM, DEFAULT_AS_NUMBER)
        create_if_missing(self._store, keys.BGP_NODE_MESH, json.dumps({"enabled": True}))
        for version, cidr in DEFAULT_POOLS.items():
            if not self._store.exists(keys.pools(version)):
                create_if_missing(self._store, keys.pool(version, cidr), Pool(cidr).to_json())
        create_if_missing(self._store, keys.READY, "true")
        set_value(self._store, keys.host_bird_ip(self.host), ipv4 or "")
        action = config.HOST_ACTION
        create_if_missing(self._store, keys.host_config(self.host, action.name), str(action.default))
        set_value(self._store, keys.bgp_host_address(self.host, 4), ipv4 or "")
        set_value(self._store, keys.bgp_host_address(self.host, 6), ipv6 or "")
        set_value(self._store, keys.bgp_host_as_num(self.host), as_num)
        set_value(self._store, keys.host_config(self.host, "marker"), "created")  # last: old tools wait for it

    def publish_macs(self, macs: Collection[str]) -> None:
        """Write `macs` to the store: the source MACs of the packets that this host sends to other hosts."""
        set_value(self._store, keys.bgp_host_macs(self.host), json.dumps(sorted(macs)))

    def own_addresses(self) -> set[str]:
        """Return this host's registered addresses in canonical form; invalid addresses are omitted."""
        from calicoctl.addresses import parse_address

        found = set()
        for key in (keys.host_bird_ip(self.host), *(keys.bgp_host_address(self.host, version) for version in (4, 6))):
            with suppress(CalicoError):
                found.add(str(parse_address(self._text(key) or "")))
        return found

    def next_hop(self, version: int, entries: Iterable[Entry] | None = None) -> str:
        """Return this host's registered address of an IP version, which is the next hop of its workloads.

        `entries` are the entries below keys.BGP_HOSTS, if the caller has just read them; if it is None, the address is
        read. Raises CalicoError if this host is not registered for that IP version, and InvalidValue if the registered
        address is invalid.
        """
        from calicoctl.addresses import parse_address

        key = keys.bgp_host_address(self.host, version)
        if entries is None:
            entry = self._store.get(key)
        else:
            entry = next((entry for entry in entries if entry.key == key), None)
        if entry is None or not entry.value:
            option = "--ip" if version == 4 else "--ip6"
            # scripts may look for this first sentence, which the 2015 tool printed as well: do not change it
            raise CalicoError(
                f"This node is not configured for IPv{version}. Register it with 'calicoctl node {option}=ADDRESS'."
            )
        try:
            address = parse_address(entry.value)
            if address.version != version:
                raise CalicoError(f"'{entry.value}' is not an IPv{version} address")
        except CalicoError as error:
            raise InvalidValue(key, str(error)) from None
        return str(address)

    def _text(self, key: str) -> str | None:
        entry = self._store.get(key)
        return None if entry is None else entry.value


class _Reports:
    """The reports of agents in the store: heartbeats by host, and statuses of endpoints."""

    def __init__(self, reports: Iterable[_Report]) -> None:
        self.heartbeats: dict[str, dict[str, Any]] = {}
        self._statuses: dict[str, tuple[Any, Any]] = {}
        """Key of an endpoint's status -> the status and its reason, as they stand in the store."""
        for key, host, fields in reports:
            if host is None:
                self._statuses[key] = fields
            else:
                self.heartbeats[host] = fields

    def status(self, id: EndpointId) -> tuple[str, str | None]:
        """Return (status, reason) of an endpoint; see Hosts.endpoint_statuses."""
        heartbeat = self.heartbeats.get(id.host)
        state, reason = self._statuses.get(keys.felix_endpoint(id), (None, None))
        if heartbeat is None or heartbeat.get("first_update") is False or state not in ENDPOINT_STATES:
            return "unknown", None
        return str(state), reason if isinstance(reason, str) else None


def _reports_below(store: Store, directory: str) -> list[_Report]:
    return store.collect(directory, _report)


def _report(entry: Entry) -> _Report | None:
    """Return what an entry of the store reports; None for any other entry, and for one that cannot be read."""
    if entry.problem is not None:
        return None
    host = entry.key[len(keys.FELIX_HOSTS) + 1 :].partition("/")[0]
    if keys.parse_felix_endpoint(entry.key) is not None:
        fields = _fields(entry.value)
        return entry.key, None, (_once(fields.get("status")), _once(fields.get("reason")))
    return (entry.key, host, _fields(entry.value)) if entry.key == keys.felix_status(host) else None


def _once(value: Any) -> Any:
    """Return `value`, interned if it is a text, since thousands of endpoints have the same status."""
    return sys.intern(value) if isinstance(value, str) else value


def _fields(text: str) -> dict[str, Any]:
    """Parse the JSON text of a status; return its fields, or an empty dictionary if the text is invalid."""
    try:
        return load_object(text, "")
    except InvalidValue:
        return {}
