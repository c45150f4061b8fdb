"""Renders the snapshot as nftables tables: their chains, sets and maps, and the commands that change them.

The tables (docs/agent.md lists them):

* Base chains contain the rules that are the same for all endpoints. They find the chain of an interface in two verdict
  maps, `from` and `to`. The packets of an interface that is in no map are dropped.
* Endpoints with the same list of profiles share a pair of chains, `from/…` and `to/…`, which jump to the chains of the
  profiles, `outbound/…` and `inbound/…`, in the order of the list. So the rules of a profile exist only once. The
  addresses of a tag exist only once, too: one set for each IP version.
* Policy for packets from endpoints is evaluated in one base chain, and policy for packets to endpoints in a later one,
  since `accept` ends the evaluation only of the base chain that it occurs in.
* An ICMP error belongs to the connection of the packet that it quotes. From an endpoint's interface, it passes only if
  that connection is the endpoint's own.
* Each drop of an endpoint's packet is counted (drops.py), and so is what each rule of a profile decides.
* The established fast path: packets of established connections pass without evaluation of the rules. When a change may
  deny open connections, the fast path is left out until the denied connections have been ended: meanwhile, packets in a
  connection's first direction are evaluated like the packets of new connections.

`Ruleset` caches the contents of the tables, and renders commands only for what has changed. All commands that one call
returns must run as one transaction. policy_manager.py runs them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from calicoctl.addresses import number_of, version_of
from calicoctl.datastore.keys import INTERFACE_PREFIX, EndpointId
from calicoctl.datastore.model import Rule
from calicoctl.desired.local_endpoint import LocalEndpoint
from calicoctl.desired.snapshot import Dirty, Snapshot
from calicoctl.felix.dataplane import drops, host_rules
from calicoctl.felix.dataplane.changes import Change, spelled
from calicoctl.felix.dataplane.drops import Counts
from calicoctl.felix.dataplane.host_rules import HostRules, Moved, Ports
from calicoctl.policy.rules import ICMP, ICMPV6, protocol_number, versions
from calicoctl.policy.verdict import HOST_ICMPV6_TYPES, Party, either_party, may_deny, port_ranges

TABLES = (("inet", "calico"), ("arp", "calico"))

_LOG = 'limit rate 10/second burst 50 packets limit name "log-rules" log prefix "calico-packet: {where}: " level warn'
"""The action of a log rule. Without the limit of each rule, and the limit of all log rules together, a container could
fill the host's disk. The kernel accepts a prefix of up to 127 bytes.
"""

_BEGUN = "ct status confirmed"
"""Matches packets of a connection whose first packet has passed."""

_TYPES = {4: "ipv4_addr", 6: "ipv6_addr"}

_NO_CONNECTION = "ct state new tcp flags & (fin | syn | rst | ack) != syn"
"""Matches TCP packets that belong to no connection and start none: they would revive a connection that was ended."""

_SKELETON = """
add limit inet calico log-rules { rate 50/second burst 200 packets ; }
add map inet calico from { type ifname : verdict; }
add map inet calico to { type ifname : verdict; }
add set inet calico interfaces { type ifname; }
add set inet calico macs { type ifname . ether_addr; }
add set inet calico senders4 { type ifname . ether_addr . ipv4_addr; }
add set inet calico senders6 { type ifname . ether_addr . ipv6_addr; }
add set inet calico targets6 { typeof iifname . @th,64,128; }
add set inet calico masquerade4 { type ipv4_addr; flags interval; }
add set inet calico masquerade6 { type ipv6_addr; flags interval; }

add chain inet calico forged
add rule inet calico forged iifname != @interfaces goto dropped/outbound/no-endpoint
add rule inet calico forged goto dropped/outbound/spoofed

add chain inet calico sender4
add rule inet calico sender4 iifname . ether saddr != @macs SPOOFED
add rule inet calico sender4 ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept
add rule inet calico sender4 SPOOFED

add chain inet calico sender6
add rule inet calico sender6 icmpv6 type { nd-router-advert, nd-redirect } SPOOFED
add rule inet calico sender6 icmpv6 type nd-neighbor-advert iifname . @th,64,128 != @targets6 SPOOFED
add rule inet calico sender6 iifname . ether saddr . ip6 saddr @senders6 accept
add rule inet calico sender6 iifname . ether saddr != @macs SPOOFED
add rule inet calico sender6 ip6 saddr :: icmpv6 type { 131, 132, 133, 135, 143 } accept
add rule inet calico sender6 SPOOFED

add chain inet calico related
add rule inet calico related iifname . ether saddr . ct original ip saddr @senders4 accept
add rule inet calico related iifname . ether saddr . ct reply ip saddr @senders4 accept
add rule inet calico related iifname . ether saddr . ct original ip6 saddr @senders6 accept
add rule inet calico related iifname . ether saddr . ct reply ip6 saddr @senders6 accept
add rule inet calico related goto dropped/outbound/no-connection

add chain inet calico anti-spoofing { type filter hook prerouting priority raw; policy accept; }
add rule inet calico anti-spoofing iifname != "PREFIX*" goto from-outside
add rule inet calico anti-spoofing iifname . ether saddr . ip saddr @senders4 accept
add rule inet calico anti-spoofing meta protocol vmap { ip : goto sender4, ip6 : goto sender6 }

add chain inet calico from-host { type filter hook output priority filter - 10; policy accept; }
add rule inet calico from-host oifname != "PREFIX*" accept
add rule inet calico from-host oifname != @interfaces goto dropped/inbound/no-endpoint
add rule inet calico from-host NO_CONNECTION goto dropped/inbound/no-connection

add set arp calico macs { type ifname . ether_addr; }
add set arp calico senders { type ifname . ether_addr . ipv4_addr; }
add chain arp calico anti-spoofing { type filter hook input priority filter; policy accept; }
add rule arp calico anti-spoofing iifname != "PREFIX*" accept
add rule arp calico anti-spoofing iifname . ether saddr != @macs drop
add rule arp calico anti-spoofing iifname . arp saddr ether != @macs drop
add rule arp calico anti-spoofing arp operation request arp saddr ip 0.0.0.0 accept
add rule arp calico anti-spoofing iifname . arp saddr ether . arp saddr ip != @senders drop
""".replace("PREFIX", INTERFACE_PREFIX)
_SKELETON = _SKELETON.replace("NO_CONNECTION", _NO_CONNECTION).replace("SPOOFED", "goto forged")

_HOST_ACTIONS = ("accept", f"goto {drops.chain_of('outbound', drops.HOST_ACTION)}")
"""The rule of the chain `host-action`, without and with DefaultEndpointToHostAction DROP."""

_HOST_SERVICES = (
    "meta nfproto ipv4 udp sport 68 udp dport 67 accept",
    "meta nfproto ipv6 udp sport 546 udp dport 547 accept",
    "udp dport 53 accept",
    f"icmpv6 type {{ {', '.join(map(str, HOST_ICMPV6_TYPES))} }} accept",
)
"""The rules of the chain `host-services`. `verdict.is_host_service` decides the same."""


def remove_commands() -> str:
    """Return the commands that delete our tables, whether they exist or not."""
    return "".join(f"add table {family} {name}\ndelete table {family} {name}\n" for family, name in TABLES)


def _replace_tables(commands: str, counts: Counts, logs: bool) -> str:
    """Return commands that delete our tables and create them with their static contents, followed by `commands`.

    `counts` is what the new tables have counted already. For `logs`, see Ruleset.
    """
    tables = "".join(f"add table {family} {name}\n" for family, name in TABLES)
    return remove_commands() + tables + host_rules.SKELETON + drops.skeleton(counts, logs) + _SKELETON + commands


@dataclass
class Update:
    """The commands of one transaction. `affected` are the parties whose open connections they may deny.

    `commands` is "" if nothing must be changed.
    """

    commands: str
    affected: set[Party]


class Ruleset:
    """The contents of our tables, as they were rendered last: elements of sets and maps, and chains with their rules.

    Static contents, which are the same on all hosts, are left out (see `_SKELETON`).
    """

    def __init__(self, logs: bool = True) -> None:
        """`logs` is whether a sample of the dropped packets is logged to the agent: see drops.why_not_logged."""
        self.logs = logs
        self._elements: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        """(family, name) of a set or map -> its elements, with reference counts. An endpoint may get an element while
        another endpoint, whose update is deferred, still has it.
        """
        self._chains: dict[str, tuple[str, ...]] = {}
        # which endpoints and profiles use which chains and sets, so that unused ones are removed
        self._endpoints: dict[EndpointId, LocalEndpoint] = {}
        self._members: dict[EndpointId, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        self._members_of_profile: dict[str, set[EndpointId]] = defaultdict(set)
        self._addresses: dict[str, Counter[str]] = defaultdict(Counter)
        self._tags: dict[str, tuple[str, ...]] = {}
        self._endpoints_of_list: dict[tuple[str, ...], set[EndpointId]] = defaultdict(set)
        self._lists_of_profile: dict[str, set[tuple[str, ...]]] = defaultdict(set)
        self._profiles_of_tag: dict[str, set[str]] = defaultdict(set)
        self._tags_used: dict[str, set[str]] = {}
        self._counters: dict[str, set[str]] = {}
        """Profile -> the names of the counters of its rules, for the profiles that this host's endpoints have."""
        self._counts = Counts()
        """The values with which new counters begin: those of the tables that are being replaced."""
        self._hosts = HostRules()

    def load(
        self,
        snapshot: Snapshot,
        pending: Mapping[EndpointId, Collection[str]] | None = None,
        ports: Ports = Ports(),  # noqa: B008 it cannot change
        counts: Counts = Counts(),  # noqa: B008 it cannot change
    ) -> Update:
        """Return the commands that replace the tables as a whole. Must be called on a new Ruleset.

        `counts` is what the old tables have counted; the new tables continue from there. For the other arguments, see
        `update`.
        """
        self._counts = counts
        everything = Dirty(set(snapshot.endpoints), profiles=set(snapshot.profiles), pools=True, settings=True)
        everything.topology = True
        update = self.update(snapshot, everything, pending, ports)
        self._counts = Counts()
        return Update(_replace_tables(update.commands, counts, self.logs), update.affected)

    def proofs(self, keys: Callable[[str], Collection[bytes]]) -> str:
        """Return commands that add, to new tables, the elements that packets had added to the old tables.

        For details and for `keys`, see HostRules.proofs.
        """
        return self._hosts.proofs(keys)

    def recreate(self, counts: Counts = Counts()) -> str:  # noqa: B008 it cannot change
        """Return the commands that replace the tables as a whole, with the contents that the Ruleset has rendered last.

        The established fast path is left out, since connections may have begun while there were no tables. `counts` is
        what the old tables have counted; the new tables continue from there.
        """
        self._chains.update({name: _base_chain_rules(name, fast_path=False) for name in _POLICY_BASE_CHAINS})
        change = Change(defaultdict(Counter), {}, _BASE_CHAINS)
        for tag in self._profiles_of_tag:
            for version in (4, 6):
                change.create_set(set_of_tag(tag, version), _TYPES[version])
        self._hosts.create_sets(change)
        for name in itertools.chain.from_iterable(self._counters.values()):
            change.create_counter(drops.counter(name, counts))
        for where, elements in self._elements.items():
            for element in elements:
                change.add(where, element)
        for name, rules in self._chains.items():
            change.set_chain(name, rules)
        return _replace_tables(change.commands(), counts, self.logs)

    @property
    def counts_ports(self) -> bool:
        """Whether the tables count the packets to the ports of BGP or VXLAN: see host_rules.COUNTERS."""
        return "input-passed" in self._chains

    def tag_contains(self, tag: str, address: str) -> bool:
        """Return whether any endpoint, on any host, has both the address and a profile with the tag."""
        return address in self._addresses.get(tag, ())

    def has(self, id: EndpointId) -> bool:
        """Return whether an endpoint of this host is in the tables."""
        return id in self._endpoints

    def addresses_of(self, id: EndpointId) -> tuple[str, ...]:
        """Return the addresses of an endpoint of this host that are in the tables; () if the endpoint is not there."""
        endpoint = self._endpoints.get(id)
        return () if endpoint is None else endpoint.addresses

    def update(
        self,
        snapshot: Snapshot,
        dirty: Dirty,
        pending: Mapping[EndpointId, Collection[str]] | None = None,
        ports: Ports = Ports(),  # noqa: B008 it cannot change
    ) -> Update:
        """Return the commands that change the tables according to `dirty`, which says what has changed in `snapshot`.

        From then on, the Ruleset assumes that the caller has run the commands. `pending` maps endpoints of this host to
        addresses that they must not use yet. `ports` says which ports to protect.

        If `affected` of the result is not empty, the commands remove the established fast path. When the connections of
        all these parties have been verified, the caller must call `restore_established_fast_path`.
        """
        change = Change(self._elements, self._chains, _BASE_CHAINS)
        affected, moved = self._update_members(snapshot, dirty, change)
        affected |= either_party(self._hosts.update(snapshot, dirty, moved, ports, change))
        profiles = set(dirty.profiles)
        ids = [id for id in dirty.endpoints if id.host == snapshot.host]
        # all removals before all additions: an interface may have passed from one endpoint to another
        for id in ids:
            before = self._endpoints.get(id)
            for where, element in _elements(before) if before is not None else ():
                change.remove(where, element)
        for id in ids:
            endpoint = snapshot.local.get(id)
            not_yet = (pending or {}).get(id)
            if endpoint is not None and not_yet:
                endpoint = replace(endpoint, addresses=tuple(a for a in endpoint.addresses if a not in not_yet))
            self._update_endpoint(id, endpoint, change, profiles, affected)
        for profile in sorted(profiles):
            self._update_profile(profile, snapshot, change)
            if profile in dirty.profiles:
                for list_of in self._lists_of_profile.get(profile, ()):
                    for id in self._endpoints_of_list[list_of]:
                        affected |= either_party(self._endpoints[id].sources)
        if dirty.pools:
            _update_pools(snapshot, change)
        if dirty.settings:
            for chain, rules in (
                ("host-action", (_HOST_ACTIONS[snapshot.host_action == "DROP"],)),
                ("host-services", _HOST_SERVICES if snapshot.host_services else ()),
            ):
                if self._chains.get(chain) != rules:
                    change.set_chain(chain, rules)
                    for endpoint in self._endpoints.values():
                        affected |= either_party(endpoint.sources)
        if affected or "to-host" not in self._chains:
            self._set_base_chains(change, fast_path=not affected)
        return Update(change.commands(), affected)

    def restore_established_fast_path(self) -> str:
        """Return the commands that let packets of established connections pass without evaluation of the rules."""
        change = Change(self._elements, self._chains, _BASE_CHAINS)
        self._set_base_chains(change, fast_path=True)
        return change.commands()

    def _set_base_chains(self, change: Change, fast_path: bool) -> None:
        for name in _POLICY_BASE_CHAINS:
            change.set_chain(name, _base_chain_rules(name, fast_path))

    # A tag's addresses: those of all endpoints, of all hosts, that have a profile with that tag

    def _update_members(self, snapshot: Snapshot, dirty: Dirty, change: Change) -> tuple[set[Party], list[Moved]]:
        """Update the addresses of all tags. Return the parties whose open connections may be denied as a result.

        Also return a Moved for each endpoint, of any host, whose addresses have changed.
        """
        changed: Counter[tuple[str, str]] = Counter()
        ids = set(dirty.endpoints)
        tags_now: dict[str, tuple[str, ...]] = {}
        for profile in dirty.profiles:
            known = snapshot.profiles.get(profile)
            tags_now[profile] = known.tags if known is not None else ()
            if tags_now[profile] != self._tags.get(profile, ()):  # there may be thousands of members
                ids |= self._members_of_profile.get(profile, set())
        before_by_id: dict[EndpointId, tuple[str, ...]] = {}
        for id in ids:
            addresses, profiles = self._members.pop(id, ((), ()))
            before_by_id[id] = addresses
            for profile in profiles:
                self._members_of_profile[profile].discard(id)
                for tag in self._tags.get(profile, ()):
                    changed.subtract((tag, address) for address in addresses)
        self._tags.update(tags_now)
        for id in ids:
            endpoint = snapshot.endpoints.get(id)
            if endpoint is None:
                continue
            addresses = snapshot.admission.addresses_of(endpoint)
            self._members[id] = (addresses, tuple(dict.fromkeys(endpoint.profile_ids)))
            for profile in self._members[id][1]:
                self._members_of_profile[profile].add(id)
                for tag in self._tags.get(profile, ()):
                    changed.update((tag, address) for address in addresses)
        affected: set[Party] = set()
        # most changes of other hosts can deny nothing, and require no listing of connections: see verdict.may_deny. If
        # the rules of a profile change at the same time, its endpoints are affected anyway
        tags = {tag for tag, _ in changed}  # there may be many addresses of each
        rules = {tag: self._rules_that_name(tag, snapshot) for tag in tags if self._profiles_of_tag.get(tag)}
        denying = {
            (tag, joins, originates)
            for tag, joins in itertools.product(rules, (True, False))
            for rule in rules[tag]
            for originates, named in ((True, rule.src_tag), (False, rule.dst_tag))
            if named == tag and may_deny(rule, joins)
        }
        for (tag, address), difference in changed.items():
            before = self._addresses[tag][address]
            if difference == 0:
                continue
            self._addresses[tag][address] = before + difference
            if before + difference == 0:
                del self._addresses[tag][address]
            joins = before == 0
            if joins != (before + difference == 0) and tag in rules:
                affected.update(Party(address, o) for o in (True, False) if (tag, joins, o) in denying)
                name = set_of_tag(tag, version_of(address))
                if joins:
                    change.add(("inet", name), address)
                else:
                    change.remove(("inet", name), address)
        after = {id: self._members.get(id, ((), ()))[0] for id in ids}
        return affected, [(id.host, before_by_id[id], after[id]) for id in ids if before_by_id[id] != after[id]]

    def _rules_that_name(self, tag: str, snapshot: Snapshot) -> list[Rule]:
        """Return the rules that name a tag, in the profiles that this host's endpoints use."""
        profiles = [snapshot.profiles.get(name) for name in self._profiles_of_tag[tag]]
        found = [known.rules for known in profiles if known is not None and known.rules is not None]
        rules = [rule for each in found for rule in (*each.inbound, *each.outbound)]
        return [rule for rule in rules if tag in (rule.src_tag, rule.dst_tag)]

    # This host's endpoints

    def _update_endpoint(
        self,
        id: EndpointId,
        now: LocalEndpoint | None,
        change: Change,
        profiles: set[str],
        affected: set[Party],
    ) -> None:
        before = self._endpoints.pop(id, None)
        if now is not None:
            self._endpoints[id] = now
            for where, element in _elements(now):
                change.add(where, element)
        if before is not None and (now is None or now.profiles != before.profiles):
            users = self._endpoints_of_list[before.profiles]
            users.discard(id)
            if not users:
                del self._endpoints_of_list[before.profiles]
                for chain in _chains_of_list(before.profiles):
                    change.set_chain(chain, None)
                for profile in before.profiles:
                    self._lists_of_profile[profile].discard(before.profiles)
                    profiles.add(profile)
        if now is not None and (before is None or now.profiles != before.profiles):
            users = self._endpoints_of_list[now.profiles]
            users.add(id)
            if len(users) == 1:
                outbound, inbound = _chains_of_list(now.profiles)
                names = [spelled(profile) for profile in now.profiles]
                for direction, chain in (("outbound", outbound), ("inbound", inbound)):
                    unmatched = f"goto {drops.chain_of(direction, drops.NO_RULE)}"
                    change.set_chain(chain, (*(f"jump {direction}/{name}" for name in names), unmatched))
                for profile in now.profiles:
                    self._lists_of_profile[profile].add(now.profiles)
                    profiles.add(profile)
        # a removed endpoint needs no conntrack cleanup: anti-spoofing drops all its packets, also those of established
        # connections
        if now is not None and (before is None or _policy_of(before) != _policy_of(now)):
            for endpoint in (before, now):
                affected.update(either_party(endpoint.sources if endpoint is not None else ()))

    # Profiles that endpoints of this host have

    def _update_profile(self, profile: str, snapshot: Snapshot, change: Change) -> None:
        used = bool(self._lists_of_profile.get(profile))
        if not used:
            self._lists_of_profile.pop(profile, None)
        known = snapshot.profiles.get(profile)
        rules = known.rules if used and known is not None else None
        tags = set()
        for rule in [*rules.inbound, *rules.outbound] if rules is not None else ():
            tags |= {tag for tag in (rule.src_tag, rule.dst_tag) if tag is not None}
        before = self._tags_used.pop(profile, set())
        if tags:
            self._tags_used[profile] = tags
        for tag in tags - before:
            users = self._profiles_of_tag[tag]
            users.add(profile)
            if len(users) == 1:
                for version in (4, 6):
                    change.create_set(set_of_tag(tag, version), _TYPES[version])
                for address in self._addresses.get(tag, ()):
                    change.add(("inet", set_of_tag(tag, version_of(address))), address)
        for tag in before - tags:
            users = self._profiles_of_tag[tag]
            users.discard(profile)
            if not users:
                del self._profiles_of_tag[tag]
                for version in (4, 6):
                    change.delete_set(set_of_tag(tag, version))
        counters: set[str] = set()
        for word, of_direction in (
            ("inbound", rules.inbound if rules is not None else None),
            ("outbound", rules.outbound if rules is not None else None),
        ):
            chain = f"{word}/{spelled(profile)}"
            if not used:
                change.set_chain(chain, None)
            elif of_direction is None:
                denying = drops.dropping(word, drops.PROFILE, spelled(profile), logs=self.logs)
                change.set_chain(chain, tuple(denying))
            else:
                places = (f"profile {spelled(profile)}, {word} rule {number}" for number in itertools.count(1))
                names = rule_counters(profile, word, of_direction)
                counters.update(name for name in names if name is not None)
                of_rules = (rule_lines(*each, word, self.logs) for each in zip(of_direction, places, names))
                change.set_chain(chain, tuple(itertools.chain.from_iterable(of_rules)))
        counted = self._counters.pop(profile, set())
        if counters:
            self._counters[profile] = counters
        for name in sorted(counters - counted):
            change.create_counter(drops.counter(name, self._counts))
        for name in sorted(counted - counters):
            change.delete_counter(name)


def rule_counters(profile: str, direction: str, rules: Sequence[Rule]) -> list[str | None]:
    """Return the name of the counter of each rule; None for a rule that logs.

    `rules` are a profile's rules for a direction, validated by verdict.readable. The name depends on the rule, and not
    on its position, so a rule keeps its counter when other rules come and go. Of equal rules, each has its own counter.
    """
    seen: Counter[str] = Counter()
    names: list[str | None] = []
    for rule in rules:
        text = json.dumps(rule.to_dict(), sort_keys=True)
        seen[text] += 1
        digest = hashlib.sha256(f"{seen[text]} {text}".encode(errors="surrogatepass")).hexdigest()[:16]
        names.append(None if rule.action == "log" else f"{direction}/{spelled(profile)}/{digest}")
    return names


def rule_lines(rule: Rule, where: str, counter: str | None, direction: str, logs: bool = True) -> list[str]:
    """Render a rule as nftables rules. The list is empty if no packet can match the rule.

    If the rule contains a match that differs by IP version, the list has nftables rules for each IP version that can
    match. If it contains none, the nftables rules are for both versions.

    A rule that denies counts each packet in `counter`. A rule that allows counts connections: it does not count packets
    of a connection that it has let begin already, such as those of a connection by UDP that nobody has answered.
    `direction` is "inbound" or "outbound". For `logs`, see Ruleset.

    Each line that a log rule writes to the kernel's log begins with "calico-packet: ", followed by `where`, a text
    without characters that need escapes in nftables.
    """
    number = None if rule.protocol is None else protocol_number(rule.protocol)
    by_version = (
        number in (ICMP, ICMPV6) or rule.ip_version or rule.src_tag or rule.dst_tag or rule.src_net or rule.dst_net
    )
    lines = []
    for version in versions(rule) if by_version else (None,):
        parts = []
        if version is not None:
            parts.append(f"meta nfproto ipv{version}")
        if number is not None:
            parts.append(f"meta l4proto {number}")
        family = "ip" if version == 4 else "ip6"
        for side, net, tag in (("saddr", rule.src_net, rule.src_tag), ("daddr", rule.dst_net, rule.dst_tag)):
            if net is not None and not net.endswith("/0"):
                parts.append(f"{family} {side} {net}")
            if tag is not None and version is not None:
                parts.append(f"{family} {side} @{set_of_tag(tag, version)}")
        for side, ports in (("sport", rule.src_ports), ("dport", rule.dst_ports)):
            if ports is not None:
                ranges = [str(low) if low == high else f"{low}-{high}" for low, high in port_ranges(ports)]
                # a set of its own costs as much as the rest of the rule
                parts.append(f"th {side} {ranges[0]}" if len(ranges) == 1 else f"th {side} {{ {', '.join(ranges)} }}")
        icmp = "icmp" if number == ICMP else "icmpv6"
        if rule.icmp_type is not None:
            parts.append(f"{icmp} type {rule.icmp_type}")
        if rule.icmp_code is not None:
            parts.append(f"{icmp} code {rule.icmp_code}")
        if rule.action == "allow":
            lines.append(" ".join([_BEGUN, *parts, "accept"]))
            lines.append(" ".join([*parts, f"counter name {counter} accept"]))
        elif rule.action == "deny":
            match, counted = " ".join(parts), f"counter name {counter}"
            lines += drops.dropping(direction, drops.RULE, str(counter), match, counted, logs)
        else:
            lines.append(" ".join([*parts, _LOG.format(where=where)]))
    return lines


_FROM_ENDPOINT = (
    f"{_NO_CONNECTION} goto dropped/outbound/no-connection",
    "iifname vmap @from",
    "goto dropped/outbound/no-endpoint",
)
_TO_ENDPOINT = (
    f"{_NO_CONNECTION} goto dropped/inbound/no-connection",
    *host_rules.FROM_HOST,
    "oifname vmap @to",
    "goto dropped/inbound/no-endpoint",
)

_POLICY_BASE_CHAINS = {
    "outbound-forward": ("forward", -11, "outbound", _FROM_ENDPOINT),
    "inbound-forward": ("forward", -10, "inbound", _TO_ENDPOINT),
    "outbound-to-host": ("input", -11, "outbound", ("jump host-services", *_FROM_ENDPOINT)),
    "to-host": ("input", -10, "outbound", ("jump host-services", "jump host-action")),
}
"""Name -> base chain that evaluates policy: hook, priority relative to `filter`, whether the packets that it matches
are from endpoints ("outbound") or to them ("inbound"), rules.
"""

_BASE_CHAINS = (
    host_rules.BASE_CHAINS
    | {"outgoing": "{ type nat hook postrouting priority srcnat; policy accept; }"}
    | {
        name: f"{{ type filter hook {hook} priority filter - {-priority}; policy accept; }}"
        for name, (hook, priority, _, _) in _POLICY_BASE_CHAINS.items()
    }
)
"""Name -> definition of a base chain whose rules change, or that does not always exist."""


def _base_chain_rules(name: str, fast_path: bool) -> tuple[str, ...]:
    """Return the rules of `name`, one of _POLICY_BASE_CHAINS.

    `fast_path` says whether the established fast path is one of the rules.
    """
    _, _, direction, ask = _POLICY_BASE_CHAINS[name]
    invalid = f"ct state invalid goto {drops.chain_of(direction, drops.NO_CONNECTION)}"
    rules = [f'{drops.INTERFACES[direction]} != "{INTERFACE_PREFIX}*" accept', invalid, *ask]
    if name.startswith("outbound-"):  # the chains that follow accept what these do not drop
        established, related = "ct state established", []
        rules.insert(1, "ct state related goto related")
    else:
        established, related = "ct state established,related", ["ct state related accept"]
    if fast_path:
        return f"{established} accept", *rules
    return "ct state established ct direction reply accept", *related, *rules


def _elements(endpoint: LocalEndpoint) -> list[tuple[tuple[str, str], str]]:
    """Return an endpoint's elements of sets and maps.

    Each is a pair: its set or map as (family, name), and the element in nftables' syntax.
    """
    name, mac = f'"{endpoint.interface}"', endpoint.mac
    outbound, inbound = _chains_of_list(endpoint.profiles)
    elements = [
        (("inet", "from"), f"{name} : goto {outbound}"),
        (("inet", "to"), f"{name} : goto {inbound}"),
        (("inet", "interfaces"), name),
        (("inet", "macs"), f"{name} . {mac}"),
        (("arp", "macs"), f"{name} . {mac}"),
    ]
    for address in endpoint.addresses_of(4):
        elements.append((("inet", "senders4"), f"{name} . {mac} . {address}"))
        elements.append((("arp", "senders"), f"{name} . {mac} . {address}"))
    for address in [*endpoint.addresses_of(6), endpoint.link_local]:
        elements.append((("inet", "senders6"), f"{name} . {mac} . {address}"))
        number = number_of(address)
        elements.append((("inet", "targets6"), f"{name} . {number:#034x}"))
    return elements


def _policy_of(endpoint: LocalEndpoint) -> tuple[object, ...]:
    return endpoint.interface, endpoint.addresses, endpoint.profiles


def _update_pools(snapshot: Snapshot, change: Change) -> None:
    from netaddr.ip import IPNetwork, cidr_merge

    translations = []
    for version, family in ((4, "ip"), (6, "ip6")):
        pools = [pool for pool in snapshot.pools.values() if version_of(pool.cidr) == version]
        for name, chosen in (("pools", pools), ("masquerade", [pool for pool in pools if pool.masquerade])):
            merged = cidr_merge([IPNetwork(pool.cidr) for pool in chosen])
            change.replace(("inet", f"{name}{version}"), (str(network) for network in merged))
        if any(pool.masquerade for pool in pools):
            translations.append(f"{family} saddr @masquerade{version} {family} daddr != @pools{version} masquerade")
    # only where it is needed: a NAT base chain costs every packet of the host
    change.set_chain("outgoing", tuple(translations) or None)


def set_of_tag(tag: str, version: int) -> str:
    """Return the name of the set that contains those addresses of a tag that have the IP version `version`."""
    return f"tag{version}/{spelled(tag)}"


def _chains_of_list(profiles: Sequence[str]) -> tuple[str, str]:
    """Return the names of two chains: for packets from, and for packets to, endpoints with this list of profiles."""
    name = "/".join(map(spelled, profiles))
    if len(name) > 200:
        name = "//" + hashlib.sha256(name.encode()).hexdigest()[:32]
    return f"from/{name}", f"to/{name}"
