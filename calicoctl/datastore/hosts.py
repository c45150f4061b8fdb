"""The registration of hosts: names and addresses. Knows no workloads and no kernel."""

from __future__ import annotations

import json
import os
import re
import socket
from contextlib import suppress

from calicoctl.datastore import config, keys
from calicoctl.datastore.model import Pool
from calicoctl.datastore.store import Store, create_if_missing, set_value
from calicoctl.errors import CalicoError, InvalidValue

DEFAULT_AS_NUMBER = "64511"
DEFAULT_POOLS = {4: "192.168.0.0/16", 6: "fd80:24e2:f998:72d6::/64"}


def hostname() -> str:
    """Return this host's name: $HOSTNAME, else the system's; raise CalicoError for an invalid one."""
    name = os.environ.get("HOSTNAME") or socket.gethostname()
    try:
        return check_hostname(name)
    except CalicoError as error:
        raise CalicoError(f"{error}; set HOSTNAME") from None


def check_hostname(name: str) -> str:
    """Return a host's name; raise CalicoError for an invalid one."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,252}", name, re.ASCII):
        raise CalicoError(
            f"the host name '{name}' cannot be used: it must have letters, digits, '_', '.' and '-', with a letter or "
            "digit first"
        )
    return name


class Hosts:
    """The registrations of all hosts in the store, read and changed on behalf of one of them, `host`."""

    def __init__(self, store: Store, host: str) -> None:
        self.host = host
        self._store = store

    def is_registered(self) -> bool:
        """Return whether the store has anything about this host."""
        directories = (keys.host(self.host), keys.bgp_host(self.host))
        return any(self._store.exists(directory) for directory in directories)

    def registered(self) -> list[str]:
        """Return the names of the hosts that are registered with BGP addresses; settings alone do not count."""
        entries = self._store.tree(keys.BGP_HOSTS)
        return sorted({host for host in map(keys.parse_bgp_host_address, (e.key for e in entries)) if host is not None})

    def addresses(self, version: int | None = None) -> dict[str, str]:
        """Return canonical address -> host, for all registered hosts; with `version`, for that IP version only.

        Where this host and another one have the same address, the other one is returned.
        """
        from calicoctl.addresses import parse_address

        texts: list[tuple[str, str]] = []
        complete: set[str] = set()
        for entry in self._store.tree(keys.BGP_HOSTS):
            host = keys.parse_bgp_host_address(entry.key)
            if host is not None and entry.value:
                texts.append((entry.value, host))
                complete.update({host} if entry.key == keys.bgp_host_address(host, 4) else ())
        if version != 6:
            # normally the same address; a host that was registered by an older tool may have it only here
            for host in set(self._store.names(keys.HOSTS)) - complete:
                texts.append((self._text(keys.host_bird_ip(host)) or "", host))
        found: dict[str, str] = {}
        for text, host in sorted(texts, key=lambda one: one[1] != self.host):
            with suppress(CalicoError):
                address = parse_address(text)
                if version in (None, address.version):
                    found[str(address)] = host
        return found

    def addresses_of_others(self) -> dict[str, str]:
        """Return canonical address -> host, for all registered hosts except this one."""
        return {address: host for address, host in self.addresses().items() if host != self.host}

    def check_writable(self) -> None:
        """Raise StoreError where this user may not write this host's keys. Changes nothing."""
        for key in (keys.host_bird_ip(self.host), keys.bgp_host_address(self.host, 4)):
            self._store.check_writable(key)

    def unregister(self) -> None:
        """Delete this host's keys and release its block affinities; addresses in use stay allocated."""
        from calicoctl.datastore.ipam import Ipam

        Ipam(self._store, self.host).release_affinities()
        for directory in (
            keys.felix_host(self.host),
            keys.bgp_host(self.host),
            keys.ipam_host(self.host),
            keys.host(self.host),
        ):
            self._store.remove_tree(directory)

    def register(self, ipv4: str | None, ipv6: str | None, as_num: str | None) -> None:
        """Write missing global configuration, then this host's keys; `marker`, which old tools wait for, comes last."""
        for setting in config.WRITTEN:
            create_if_missing(self._store, keys.config(setting.name), str(setting.default))
        create_if_missing(self._store, keys.BGP_AS_NUM, DEFAULT_AS_NUMBER)
        create_if_missing(self._store, keys.BGP_NODE_MESH, json.dumps({"enabled": True}))
        for version, cidr in DEFAULT_POOLS.items():
            if not self._store.exists(keys.pools(version)):
                create_if_missing(self._store, keys.pool(version, cidr), Pool(cidr).to_json())
        set_value(self._store, keys.READY, "true")
        set_value(self._store, keys.host_bird_ip(self.host), ipv4 or "")
        action = config.HOST_ACTION
        create_if_missing(self._store, keys.host_config(self.host, action.name), str(action.default))
        set_value(self._store, keys.bgp_host_address(self.host, 4), ipv4 or "")
        set_value(self._store, keys.bgp_host_address(self.host, 6), ipv6 or "")
        set_value(self._store, keys.bgp_host_as_num(self.host), as_num)
        set_value(self._store, keys.host_config(self.host, "marker"), "created")

    def own_addresses(self) -> set[str]:
        """Return the canonical addresses that this host is registered with; invalid ones are left out."""
        from calicoctl.addresses import parse_address

        found = set()
        for key in (keys.host_bird_ip(self.host), *(keys.bgp_host_address(self.host, version) for version in (4, 6))):
            with suppress(CalicoError):
                found.add(str(parse_address(self._text(key) or "")))
        return found

    def next_hop(self, version: int) -> str:
        """Return this host's address of an IP version, the next hop of its workloads.

        Raises CalicoError when the host is not registered for that IP version, InvalidValue for an invalid address.
        """
        from calicoctl.addresses import parse_address

        key = keys.bgp_host_address(self.host, version)
        entry = self._store.get(key)
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
