"""A kernel in memory, at the seam of the drivers: what the agent's managers are tested against, without root.

Every change is appended to one journal, shared by all drivers, so that a test can check the order.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Callable

from calicoctl.desired.local_endpoint import LocalEndpoint
from calicoctl.desired.overlay import Tunnel
from calicoctl.errors import CalicoError
from calicoctl.felix.bgp.config import Config
from calicoctl.felix.dataplane import drops
from calicoctl.felix.dataplane.conntrack import Connection, Listing
from calicoctl.felix.dataplane.links import Link
from calicoctl.felix.dataplane.nft import Count, NftError
from calicoctl.felix.dataplane.vxlan import Route
from calicoctl.felix.events import BgpChanged
from calicoctl.policy.verdict import Packet, Party
from calicoctl.workloads.mtu import Underlay

Tables = dict[str, dict[str, list[str]]]
"""By "set inet calico NAME" or "chain inet calico NAME": what it contains. A set's elements are sorted."""


class FakeNft:
    """Runs the commands that ruleset.py writes, as transactions; refuses what the kernel would refuse.

    `refusals` counts the transactions to refuse besides. `logs` is whether it can log dropped packets. Knows only what
    it is given: not nftables' whole syntax.
    """

    def __init__(self, journal: list[str]) -> None:
        self.journal = journal
        self.refusals = 0
        self.logs = True
        self.transactions: list[str] = []
        self.objects: dict[str, list[str]] = {}
        self.counted: dict[str, Count] = {}
        self.dropped: list[tuple[bytes, Count]] = []

    def counters(self, table: str) -> dict[str, Count]:
        return dict(self.counted)

    def element_counts(self, table: str, set: str) -> list[tuple[bytes, Count]]:
        return list(self.dropped)

    def keys(self, table: str, set: str) -> list[bytes]:
        elements = self.objects.get(f"set inet {table} {set}")
        if elements is None:
            raise FileNotFoundError(set)
        return [element.strip('"').encode().ljust(16, b"\0") for element in elements]

    def run(self, commands: str) -> str:
        if commands.startswith("list chain "):
            return "\n".join(self._get(self.objects, commands[len("list ") :]))
        if not self.logs and (f" group {drops.GROUP} " in commands or "jhash" in commands):
            raise NftError("nftables refused a change: it cannot log")
        if " inet calico-trial " in commands:
            return ""
        self.transactions.append(commands)
        self.journal.append("nft")
        if self.refusals:
            self.refusals -= 1
            self.journal[-1] += " refused"
            raise NftError("nftables refused a change: by order of the test")
        after = copy.deepcopy(self.objects)
        for line in commands.splitlines():
            if line:
                self._run(after, line)
        self.objects = after
        return ""

    def flush_ruleset(self) -> None:
        """Remove everything, as another process may."""
        self.objects = {}

    def set(self, name: str, family: str = "inet") -> list[str]:
        return self.objects[f"set {family} calico {name}"]

    def chain(self, name: str, family: str = "inet") -> list[str]:
        return self.objects[f"chain {family} calico {name}"]

    def has_fast_path(self) -> bool:
        """Return whether packets of established connections pass unevaluated, in both directions."""
        return self.chain("inbound-forward")[0] == "ct state established,related accept"

    @staticmethod
    def _get(objects: dict[str, list[str]], name: str) -> list[str]:
        if name not in objects:
            raise NftError(f"nftables refused a change: no such object: {name}")
        return objects[name]

    def _run(self, objects: dict[str, list[str]], line: str) -> None:
        verb, kind, family, *words = line.split(" ", 5)
        name = f"{family} {words[0]} {words[1]}" if len(words) > 1 else f"{family} {words[0]}"
        rest = words[2] if len(words) > 2 else ""
        if (verb, kind) == ("add", "table"):
            objects.setdefault(f"table {name}", [])
        elif (verb, kind) == ("delete", "table"):
            self._get(objects, f"table {name}")
            for object in [object for object in objects if f" {name} " in f"{object} "]:
                del objects[object]
        elif verb == "add" and kind in ("set", "map"):
            self._get(objects, f"table {family} {words[0]}")
            objects.setdefault(f"set {name}", [])
        elif verb == "add" and kind in ("counter", "limit"):
            objects.setdefault(f"{kind} {name}", [])
        elif (verb, kind) == ("add", "chain"):
            self._get(objects, f"table {family} {words[0]}")
            objects.setdefault(f"chain {name}", [])
        elif (verb, kind) == ("flush", "table"):
            for object in [object for object in objects if object.startswith(f"chain {name} ")]:
                objects[object].clear()
        elif (verb, kind) == ("flush", "chain"):
            self._get(objects, f"chain {name}").clear()
        elif (verb, kind) == ("add", "rule"):
            self._check_references(objects, f"{family} {words[0]}", rest)
            self._get(objects, f"chain {name}").append(rest)
        elif kind == "element":
            elements = self._get(objects, f"set {name}")
            for element in rest.strip("{ }").split(", "):
                if verb == "add":
                    self._check_references(objects, f"{family} {words[0]}", element)
                    key = element.partition(" : ")[0]
                    if any(there.partition(" : ")[0] == key and there != element for there in elements):
                        raise NftError(f"nftables refused a change: {element} is there with another value")
                    elements[:] = sorted({*elements, element})
                else:
                    match = [there for there in elements if there.partition(" : ")[0] == element]
                    if not match:
                        raise NftError(f"nftables refused a change: no such element: {element}")
                    elements.remove(match[0])
        elif verb == "delete" and kind in ("set", "chain", "counter"):
            self._get(objects, f"{kind} {name}")
            del objects[f"{kind} {name}"]
            for object, contents in objects.items():
                for text in contents:
                    if object.split()[1] == family and words[1] in self._references(text):
                        raise NftError(f"nftables refused a change: {words[1]} is in use by {object}")
        else:
            raise AssertionError(f"what does this mean? {line}")

    @staticmethod
    def _references(text: str) -> list[str]:
        """Return the names of the sets and chains that a rule, or an element of a map, refers to."""
        names = re.findall(r"@(?!th,)(\S+)|\b(?:jump|goto|counter name) ([^\s,}]+)", text)
        return [one or other for one, other in names]

    def _check_references(self, objects: dict[str, list[str]], table: str, text: str) -> None:
        for name in self._references(text):
            if not any(f"{kind} {table} {name}" in objects for kind in ("set", "chain", "counter")):
                raise NftError(f"nftables refused a change: no such set, chain or counter: {name}")


class FakeRoutes:
    """Interfaces and routes, as the driver Routes shows them; `refuses` are addresses it cannot be given routes to."""

    def __init__(self, journal: list[str]) -> None:
        self.journal = journal
        self.links: dict[str, Link] = {}
        self.routes: dict[int, tuple[str, ...]] = {}
        self.refuses: set[str] = set()
        self.next_hops: dict[int, str | None] = {}
        self.listings = 0

    def add_link(self, name: str, index: int, up: bool = True, mac: str = "ee:ee:ee:ee:ee:ee") -> Link:
        self.links[name] = Link(name, index, up, mac)
        return self.links[name]

    def list_links(self) -> list[Link]:
        self.listings += 1
        return list(self.links.values())

    def read(self, links: Collection[Link]) -> None:
        self.journal.append("read routes")

    def forget(self, index: int) -> None:
        self.routes.pop(index, None)

    def forget_proxies(self, index: int) -> None:
        self.next_hops.pop(index, None)

    def forget_route(self, address: str) -> int | None:
        for index, addresses in self.routes.items():
            if address in addresses:
                self.routes[index] = tuple(other for other in addresses if other != address)
                return index
        return None

    def routed(self) -> list[tuple[int, str]]:
        return [(index, address) for index, addresses in self.routes.items() for address in addresses]

    def remove_route(self, index: int, address: str) -> None:
        if address in self.refuses:
            raise CalicoError("the kernel refused to remove a route")
        self.routes[index] = tuple(other for other in self.routes[index] if other != address)

    def indices(self) -> set[int]:
        return {index for index, addresses in self.routes.items() if addresses}

    def apply(self, endpoint: LocalEndpoint, link: Link, next_hop: str | None) -> None:
        if self.refuses.intersection(endpoint.addresses):
            raise CalicoError("the kernel refused to add a route")
        self.journal.append(f"route {link.name}")
        self.routes[link.index] = endpoint.addresses
        self.next_hops[link.index] = next_hop

    def clear(self, index: int) -> None:
        if self.refuses.intersection(self.routes.get(index, ())):
            raise CalicoError("the kernel refused to remove a route")
        self.journal.append(f"clear {index}")
        self.routes.pop(index, None)


def parties_of(packet: Packet) -> set[Party]:
    """Return the parties of the connection that a packet begins."""
    return {Party(packet.source, True), Party(packet.destination, False)}


class FakeConntrack:
    """Open connections, as the driver Conntrack shows them. Listings are made when a test calls `answer`.

    `error` is why connections can neither be listed nor deleted.
    """

    def __init__(self, journal: list[str]) -> None:
        self.journal = journal
        self.connections: list[Connection] = []
        self.requests: list[frozenset[Party]] = []
        self.count = 0
        self.error: str | None = None

    def request(self, parties: Collection[Party], urgent: bool = False) -> int:
        if parties:
            self.count += 1
            self.journal.append(f"request {' '.join(sorted({party.address for party in parties}))}")
            self.requests.append(frozenset(parties))
        return self.count

    def answer(self) -> Listing:
        """Return the listing that answers all requests so far."""
        parties = frozenset().union(*self.requests)
        self.requests = []
        listing = self.list(parties)
        listing.number = self.count
        return listing

    def list(self, parties: Collection[Party]) -> Listing:
        self.journal.append("list")
        if self.error is not None:
            return Listing(parties, [], (), self.error)
        found = [c for c in self.connections if parties_of(c.forwarded).intersection(parties)]
        return Listing(parties, found, ("192.0.2.2",))

    def delete(self, connections: Sequence[Connection]) -> None:
        if self.error is not None:
            raise CalicoError(self.error)
        for connection in connections:
            self.journal.append(f"end {connection.forwarded.source}")
            self.connections.remove(connection)


class FakeVxlan:
    """Devices and routes of the overlay, as the driver Vxlan shows them.

    `kernel` are the routes that there are, `routes` those of the last `read`. `refuses` are the IP versions
    whose devices are not the agent's, and CIDRs that it cannot be given routes to. The devices' indices are 40 and 60.
    """

    def __init__(self) -> None:
        self.kernel: set[Route] = set()
        self.routes: set[Route] = set()
        self.devices: dict[int, tuple[Tunnel, int | None, int]] = {}
        self.underlays: dict[str, Underlay] = {}
        self.interfaces = {"eth0": 2}
        self.bird: set[str] = set()
        self.refuses: set[str | int] = set()
        self.reads = self.underlay_reads = 0

    def read(self) -> None:
        self.reads += 1
        self.routes = set(self.kernel)

    def index(self, version: int) -> int | None:
        return 10 * version if version in self.devices else None

    def versions(self) -> set[int]:
        return set(self.devices)

    def states(self) -> dict[int, bool]:
        return dict.fromkeys(self.devices, True)

    def apply_device(self, tunnel: Tunnel, parent: int | None, mtu: int) -> None:
        if tunnel.version in self.refuses:
            raise CalicoError("the interface vxlan.calico is not the agent's")
        self.devices[tunnel.version] = tunnel, parent, mtu

    def remove_device(self, version: int) -> None:
        if self.devices.pop(version, None) is not None:
            self.kernel = {route for route in self.kernel if route.index != 10 * version}
            self.routes &= self.kernel

    def apply_routes(self, desired: Iterable[Route]) -> None:
        refused = {route for route in desired if route.cidr in self.refuses}
        self.kernel = set(desired) - refused
        self.routes = set(self.kernel)
        if refused:
            raise CalicoError("the kernel refused a route")

    def underlay(self, address: str) -> Underlay:
        self.underlay_reads += 1
        return self.underlays.get(address, Underlay())

    def index_of(self, interface: str) -> int | None:
        return self.interfaces.get(interface)

    def routed_by_bird(self) -> set[str]:
        return self.bird


class FakeBgp:
    """The thread that runs BIRD, as BgpManager shows it: `wanted` has the configurations that it was given."""

    def __init__(self, put: Callable[[Any], None] = lambda event: None, enabled: bool = True) -> None:
        """`put` takes the event that BIRD has been dealt with, once the thread is started."""
        self.enabled = enabled
        self._put = put
        self.started = False
        self.wanted: list[Config] = []
        self.rescans = 0

    def rescan(self) -> None:
        self.rescans += 1

    def start_once(self) -> None:
        self.started = True
        self._put(BgpChanged(settled=True))

    def want(self, config: Config) -> None:
        self.wanted.append(config)
