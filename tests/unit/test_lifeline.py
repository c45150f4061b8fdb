"""What is taken back although the store cannot be read: routes to what the host needs, and elements of maps."""

from __future__ import annotations

import dataclasses

from calicoctl.addresses import pack
from calicoctl.datastore.reserved import DNS_SERVER, HostNetwork, Servers
from calicoctl.felix.dataplane.lifeline import let_members_pass, take_back_blocks, take_back_routes
from calicoctl.felix.dataplane.vxlan import Route
from tests.unit.kernel import FakeNft, FakeRoutes, FakeVxlan

MEMBER, MEMBER6, OTHER = "192.0.2.1", "2001:db8::1", "192.168.0.1"
NETWORK = HostNetwork().with_servers(Servers(frozenset([MEMBER, MEMBER6])))


def test_routes_to_members_alone_are_removed() -> None:
    routes = FakeRoutes([])
    routes.routes = {11: (OTHER, MEMBER), 12: (MEMBER6,)}
    first, second = take_back_routes(NETWORK, routes)  # type: ignore[arg-type]
    assert routes.routes == {11: (OTHER,), 12: ()}
    assert f"the route to {MEMBER} led to an endpoint, but that is a member" in first and MEMBER6 in second
    assert list(take_back_routes(NETWORK, routes)) == []  # type: ignore[arg-type]
    routes.routes, routes.refuses = {11: (MEMBER,), 12: (MEMBER6,)}, {MEMBER}
    assert len(list(take_back_routes(NETWORK, routes))) == 2 and routes.routes[12] == ()  # type: ignore[arg-type]


def test_routes_to_dns_servers_are_removed_only_if_no_address_of_a_member_is_known() -> None:
    servers = Servers(frozenset([MEMBER]), frozenset([OTHER]))
    routes = FakeRoutes([])
    routes.routes = {11: (OTHER,)}
    assert list(take_back_routes(HostNetwork().with_servers(servers), routes)) == []  # type: ignore[arg-type]
    cut_off = HostNetwork().with_servers(dataclasses.replace(servers, unknown=frozenset(["etcd2"])))
    (said,) = take_back_routes(cut_off, routes)  # type: ignore[arg-type]
    assert DNS_SERVER in said and routes.routes == {11: ()}


def test_blocks_that_contain_a_member_are_removed() -> None:
    vxlan = FakeVxlan()
    block, other, remote = Route("192.0.2.0/26"), Route("192.168.0.0/26"), Route("2001:db8::/122", 40, "fe80::1")
    vxlan.kernel = {block, other, remote}
    vxlan.read()
    first, second = take_back_blocks(NETWORK, vxlan)  # type: ignore[arg-type]
    assert vxlan.kernel == {other} and sorted([block.cidr in first, block.cidr in second]) == [False, True]
    assert list(take_back_blocks(NETWORK, vxlan)) == []  # type: ignore[arg-type]


class Maps(FakeNft):
    def keys(self, table: str, set: str) -> list[bytes]:
        if f"set inet {table} {set}" not in self.objects:
            raise FileNotFoundError(set)
        return [pack(element.partition(" : ")[0]) for element in self.set(set)]


def test_packets_of_members_pass_again() -> None:
    nft = Maps([])
    assert list(let_members_pass(NETWORK, nft)) == [], "there are no tables yet"  # type: ignore[arg-type]
    nft.objects = {
        "set inet calico owners4": [f"{OTHER} : drop", f"{MEMBER} : drop"],
        "set inet calico owners6": [f"{MEMBER6} : drop"],
    }
    assert len(list(let_members_pass(NETWORK, nft))) == 2  # type: ignore[arg-type]
    assert nft.set("owners4") == [f"{OTHER} : drop"] and nft.set("owners6") == []
    assert list(let_members_pass(HostNetwork(), nft)) == []  # type: ignore[arg-type]
