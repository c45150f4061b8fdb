"""The network between the hosts, as the store describes it: hosts, their addresses and blocks, BGP peers and settings.

The topology is a part of the snapshot, and validated in the same way (see snapshot.py).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from calicoctl.addresses import BITS, number_of, parse_as_number, version_of
from calicoctl.datastore import config, keys
from calicoctl.datastore.blocks import BLOCK_SIZE
from calicoctl.datastore.hosts import DEFAULT_AS_NUMBER
from calicoctl.datastore.model import Peer, load_object, load_strings
from calicoctl.datastore.reserved import Network
from calicoctl.datastore.store import Entry
from calicoctl.desired.local_endpoint import checked_address
from calicoctl.errors import CalicoError

HOLD_TIME = int(config.HOLD_TIME.default or 0)
"""The default hold time of BGP sessions, in seconds."""

_MAC = re.compile("([0-9a-f]{2}:){5}[0-9a-f]{2}")


class Topology:
    """The registered hosts, their blocks, and the BGP configuration of `host`, which is called "this host" below."""

    def __init__(self, host: str, known: Topology | None = None) -> None:
        """`known` is the complete topology of another host, with the same store.

        Then what both know of all hosts (see `is_of_all`) is shared with it, and must not be changed.
        """
        self.host = host
        self.users: dict[str, str] = {}
        """Registered address of a host (canonical) -> name of the host."""
        self.blocks: dict[str, dict[str, Network]] = defaultdict(dict)
        """Name of a host -> CIDR -> block with affinity to the host."""
        self.macs: dict[str, frozenset[str]] = {}
        """Name of a host -> the source MACs (lower-case) of its packets to other hosts. Contains only hosts that
        publish their MACs.
        """
        self.as_nums: dict[str, str] = {}
        """Name of a host -> its AS number (decimal). Contains only hosts that have an AS number of their own."""
        self.default_as_num = DEFAULT_AS_NUMBER
        self.mesh = True
        """Whether all hosts peer with each other."""
        self.peers: dict[str, Peer] = {}
        """The global BGP peers, and the peers of `host`, by key."""
        self.hold_time = HOLD_TIME
        self.log_level = str(config.BGP_LOG_LEVEL.default)
        self._addresses: dict[str, str] = {}
        """The addresses of registered hosts, by key."""
        self._changed: set[str] = set()
        self._settings: dict[str, str] = {}
        """The log level of BIRD, global and of `host`, by key."""
        if known is not None:
            self.users, self.blocks, self.macs = known.users, known.blocks, known.macs
            self.as_nums, self._addresses = known.as_nums, known._addresses

    def address(self, host: str, version: int) -> str | None:
        """Return a host's registered BGP address of an IP version, or None if it has none."""
        return self._addresses.get(keys.bgp_host_address(host, version))

    def own(self, version: int) -> str | None:
        """Return this host's registered BGP address of an IP version, or None if it has none."""
        return self.address(self.host, version)

    def hosts(self) -> set[str]:
        """Return the names of the hosts that are registered for BGP."""
        return {host for host in map(keys.parse_bgp_host_address, self._addresses) if host is not None}

    def others(self) -> frozenset[str]:
        """Return the registered addresses of the other hosts, and the addresses of this host's BGP peers."""
        hosts = (address for address, host in self.users.items() if host != self.host)
        return frozenset(hosts) | {peer.ip for peer in self.peers.values()}

    def may_reach_bgp(self) -> set[str]:
        """Return the addresses that may connect to BGP on this host.

        These are the addresses of its BGP peers and, if the mesh is on, the registered addresses of all other hosts.
        """
        addresses = {peer.ip for peer in self.peers.values()}
        if self.mesh:
            addresses |= {address for address, host in self.users.items() if host != self.host}
        return addresses

    def peers_without_session(self, version: int) -> list[str]:
        """Return those of this host's own (not global) BGP peers that get no session because of their IP version.

        If this host has no registered address of `version`, but one of the other IP version, the result contains the
        addresses of the peers of `version`, sorted. In all other cases, it is empty.
        """
        if self.own(version) is not None or self.host not in self.hosts():
            return []
        directory = f"{keys.bgp_peers(version, self.host)}/"
        return sorted(peer.ip for key, peer in self.peers.items() if key.startswith(directory))

    def own_peers(self) -> list[str]:
        """Return those of this host's own (not global) BGP peers that are registered addresses of this host, sorted.

        Such a peer is a mistake in the configuration, and gets no session.
        """
        own = {self.own(4), self.own(6)}
        return sorted(peer.ip for key, peer in self.peers.items() if f"/host/{self.host}/" in key and peer.ip in own)

    def inside(self) -> frozenset[str]:
        """Return the first address of each block that has affinity to another host."""
        blocks = (block for host, of_host in self.blocks.items() if host != self.host for block in of_host.values())
        return frozenset(block.address(block.first) for block in blocks)

    def as_num(self, host: str) -> str:
        """Return the AS number of a host (decimal): its own or, if it has none of its own, the default AS number."""
        return self.as_nums.get(host, self.default_as_num)

    def block_of(self, host: str, address: str) -> Network | None:
        """Return the block that contains an address and has affinity to `host`; None if there is none."""
        version, number = version_of(address), number_of(address)
        return next((block for block in self.blocks.get(host, {}).values() if block.has(version, number)), None)

    def take_changed_addresses(self) -> set[str]:
        """Return the addresses that were registered or unregistered, for any host, since the last call."""
        changed, self._changed = self._changed, set()
        return changed

    # Interpreting entries of the store

    def handler(self, key: str) -> Callable[[str, Entry | None], None] | None:
        """Return the method that interprets the entry of a key, or None if the key does not belong to the topology.

        The method is called with the key and its entry, or with None as the entry if the key was deleted. If the value
        is invalid, the method removes the previous value, and raises CalicoError.
        """
        of_all = self._handler_of_all(key)
        if of_all is not None:
            return of_all
        directories = [keys.bgp_peers(version, host) for host in (None, self.host) for version in (4, 6)]
        if key.rpartition("/")[0] in directories:
            return self._set_peer
        settings = {
            keys.BGP_AS_NUM: self._set_default_as_num,
            keys.BGP_NODE_MESH: self._set_mesh,
            keys.bgp_setting(config.HOLD_TIME.name): self._set_hold_time,
            keys.bgp_setting(config.BGP_LOG_LEVEL.name): self._set_log_level,
            keys.bgp_setting(config.BGP_LOG_LEVEL.name, self.host): self._set_log_level,
        }
        return settings.get(key)

    def is_of_all(self, key: str) -> bool:
        """Return whether a key is about one host, but interpreted by all hosts, and by all in the same way.

        These are the addresses, blocks, MACs and AS numbers of hosts.
        """
        return self._handler_of_all(key) is not None

    def _handler_of_all(self, key: str) -> Callable[[str, Entry | None], None] | None:
        """Return the method for a key for which `is_of_all` is true, None for any other key; see `handler`."""
        if keys.parse_bgp_host_address(key) is not None or keys.parse_host_bird_ip(key) is not None:
            return self._set_address
        if keys.parse_affinity(key) is not None:
            return self._set_block
        if keys.parse_bgp_host_setting(key, keys.MACS) is not None:
            return self._set_macs
        if keys.parse_bgp_host_setting(key, keys.AS_NUM) is not None:
            return self._set_as_num
        return None

    def _set_address(self, key: str, entry: Entry | None) -> None:
        host = keys.parse_bgp_host_address(key) or keys.parse_host_bird_ip(key) or ""
        before = self._addresses.pop(key, None)
        if before is not None:
            self._changed.add(before)
            del self.users[before]
            others = [other for other, address in self._addresses.items() if address == before]
            for other in others:
                self.users[before] = keys.parse_bgp_host_address(other) or keys.parse_host_bird_ip(other) or ""
        if entry is not None and entry.value:
            address = checked_address(entry.value, 6 if key == keys.bgp_host_address(host, 6) else 4, "a host")
            self._addresses[key] = address
            self.users[address] = host
            self._changed.add(address)

    def _set_block(self, key: str, entry: Entry | None) -> None:
        host, version, cidr = _affinity(key)
        blocks = self.blocks[host]
        blocks.pop(cidr, None)
        if entry is not None:
            # a larger one, or one that begins elsewhere, would take the addresses of other hosts' blocks
            address, _, length = cidr.partition("/")
            if length != str(BITS[version] - (BLOCK_SIZE - 1).bit_length()):
                raise CalicoError(f"'{cidr}' is not a block: blocks have {BLOCK_SIZE} addresses")
            block = Network.of(checked_address(address, version), int(length))
            if block.first != number_of(address):
                raise CalicoError(f"'{cidr}' is not a block, but inside of {block.cidr}")
            blocks[cidr] = block
        elif not blocks:
            del self.blocks[host]

    def _set_macs(self, key: str, entry: Entry | None) -> None:
        host = keys.parse_bgp_host_setting(key, keys.MACS) or ""
        self.macs.pop(host, None)
        if entry is not None:
            macs = frozenset(mac.lower() for mac in load_strings(entry.value, key))
            if not all(map(_MAC.fullmatch, macs)):
                raise CalicoError("it should be a list of MAC addresses")
            self.macs[host] = macs

    def _set_as_num(self, key: str, entry: Entry | None) -> None:
        host = keys.parse_bgp_host_setting(key, keys.AS_NUM) or ""
        self.as_nums.pop(host, None)
        if entry is not None:
            self.as_nums[host] = parse_as_number(entry.value)

    def _set_peer(self, key: str, entry: Entry | None) -> None:
        self.peers.pop(key, None)
        if entry is not None:
            peer = Peer.from_json(entry.value, key)
            checked_address(peer.ip, version_of(peer.ip), "a BGP peer")
            self.peers[key] = peer

    def _set_default_as_num(self, key: str, entry: Entry | None) -> None:
        self.default_as_num = DEFAULT_AS_NUMBER
        if entry is not None:
            self.default_as_num = parse_as_number(entry.value)

    def _set_mesh(self, key: str, entry: Entry | None) -> None:
        self.mesh = True
        enabled: Any = True if entry is None else load_object(entry.value, key).get("enabled")
        if not isinstance(enabled, bool):
            raise CalicoError('"enabled" should be true or false; the mesh is on')
        self.mesh = enabled

    def _set_hold_time(self, key: str, entry: Entry | None) -> None:
        self.hold_time = HOLD_TIME
        if entry is not None:
            config.HOLD_TIME.check(entry.value)
            self.hold_time = int(entry.value)

    def _set_log_level(self, key: str, entry: Entry | None) -> None:
        self._settings.pop(key, None)
        try:
            if entry is not None:
                config.BGP_LOG_LEVEL.check(entry.value)
                self._settings[key] = entry.value
        finally:
            own, of_all = (keys.bgp_setting(config.BGP_LOG_LEVEL.name, host) for host in (self.host, None))
            default = str(config.BGP_LOG_LEVEL.default)
            self.log_level = self._settings.get(own) or self._settings.get(of_all) or default


def _affinity(key: str) -> tuple[str, int, str]:
    found = keys.parse_affinity(key)
    assert found is not None, "only affinities' keys come here"
    return found
