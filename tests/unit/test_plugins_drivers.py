"""The drivers of Docker networks, on two hosts with one store: what is made and removed there, and what is refused.

The fakes are at the kernel: `netns`, the guard, and what this host's network is.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from calicoctl import state
from calicoctl.addresses import parse_address
from calicoctl.datastore.blocks import Owner
from calicoctl.datastore.chosen import FROZEN
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.reserved import HostNetwork
from calicoctl.errors import CalicoError, DockerUnavailable, NamespaceError, StoreUnavailable
from calicoctl.felix.heartbeat import Identity
from calicoctl.netlink import Interface
from calicoctl.plugins import collection, endpoints, networks, restarting, stores
from calicoctl.plugins.collection import Collection
from calicoctl.plugins.engine_events import EngineEvents
from calicoctl.plugins.ipam_driver import IpamDriver
from calicoctl.plugins.network_driver import NetworkDriver
from calicoctl.plugins.networks import Network, Networks
from calicoctl.plugins.stores import Stores
from calicoctl.workloads import host_network, libnetwork, locks, netns, network_profiles
from tests.unit.memory_store import MemoryStore

NETWORK, OTHER = "a" * 64, "b" * 64
ONE, TWO, THREE = "1" * 64, "2" * 64, "3" * 64
CONTAINER = "c" * 64
SANDBOX = "/var/run/docker/netns/0123456789ab"
POOLS = {"IPv4Data": [{"AddressSpace": "calico", "Pool": "0.0.0.0/0"}], "IPv6Data": []}


class Kernel:
    """The interfaces of one host."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.attached: set[str] = set()
        """Those of `names` whose other end is in a container."""

    def create(self, name: str, peer: str, mtu: int, mac: str) -> None:
        self.names |= {name, peer}

    def interfaces(self) -> list[Interface]:
        inside = {True: 0, False: None}
        return [Interface(name, 1, "", True, peer_namespace=inside[name in self.attached]) for name in self.names]

    def find(self, name: str) -> Interface | None:
        return next((one for one in self.interfaces() if one.name == name), None)

    def delete(self, name: str) -> bool:
        found = name in self.names
        self.names -= {name, endpoints.PEER_PREFIX + name[4:]}
        return found


class OneStore(Stores):
    """Clients of a store in memory."""

    def __init__(self, host: str, store: MemoryStore) -> None:
        super().__init__(host, {})
        self.store = store

    def _open(self) -> DatastoreClient:
        return DatastoreClient(self.store, self.host)


class Node:
    """A host with its drivers."""

    def __init__(self, name: str, store: MemoryStore, address: str) -> None:
        self.stores = OneStore(name, store)
        self.datastore = DatastoreClient(store, name)
        self.datastore.hosts.register(address, "fd00::" + address[-1], None)
        self.networks = Networks(name)
        self.driver = NetworkDriver(self.stores, self.networks)
        self.ipam = IpamDriver(self.stores)
        self.events = EngineEvents(self.stores, self.networks)
        self.collection = Collection(self.stores, self.networks, self.events, self.driver)

    def call(self, name: str, **request: Any) -> dict[str, Any]:
        routes = {**self.driver.routes(), **self.ipam.routes()}
        return json.loads(json.dumps(routes[name](json.loads(json.dumps(request)))))

    def network(self, id: str = NETWORK, name: str = "net1", **options: Any) -> None:
        generic = {f"calico.{option}": value for option, value in options.items()}
        self.call(
            "/NetworkDriver.CreateNetwork", NetworkID=id, Options={"com.docker.network.generic": generic}, **POOLS
        )
        self.events.name(id, name)

    def address(self, pool: str = "ipv4", address: str = "") -> str:
        return str(self.call("/IpamDriver.RequestAddress", PoolID=pool, Address=address, Options=None)["Address"])

    def endpoint(self, id: str, network: str = NETWORK, address: str = "", **options: Any) -> str:
        given = address or self.address()
        request = {"NetworkID": network, "EndpointID": id, "Options": options}
        self.call("/NetworkDriver.CreateEndpoint", Interface={"Address": given}, **request)
        return given

    def join(self, id: str, sandbox: str = SANDBOX, network: str = NETWORK) -> dict[str, Any]:
        return self.call("/NetworkDriver.Join", NetworkID=network, EndpointID=id, SandboxKey=sandbox)

    def remove(self, id: str, address: str) -> None:
        for call in ("Leave", "DeleteEndpoint"):
            self.call(f"/NetworkDriver.{call}", NetworkID=NETWORK, EndpointID=id)
        self.call("/IpamDriver.ReleaseAddress", PoolID="ipv4", Address=address.partition("/")[0])

    def record(self, id: str) -> Any:
        return self.datastore.readable(libnetwork.endpoint_id(self.datastore.host, id))

    def held(self) -> dict[str, int | None]:
        return self.datastore.ipam.handles.totals()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(netns, "create_veth_here", kernel.create)
    monkeypatch.setattr(netns, "delete_interface", kernel.delete)
    monkeypatch.setattr(netns, "interfaces", kernel.interfaces)
    monkeypatch.setattr(netns, "find_interface", kernel.find)
    monkeypatch.setattr(endpoints, "ensure_guard", lambda datastore: None)
    monkeypatch.setattr(endpoints.mtu, "of_interface", lambda *arguments: 1500)
    monkeypatch.setattr(host_network, "read_for", lambda version: HostNetwork())
    monkeypatch.setattr(networks, "NAME_PATIENCE", 0.05)
    return kernel


@pytest.fixture(params=[False, True], ids=["v2", "v3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    monkeypatch.setattr("calicoctl.workloads.locks.DIRECTORY", tmp_path / "run")
    return MemoryStore(request.param)


@pytest.fixture
def node(store: MemoryStore, kernel: Kernel) -> Node:
    found = Node("host1", store, "192.0.2.1")
    found.network()
    return found


def test_an_endpoint_from_beginning_to_end(node: Node, kernel: Kernel) -> None:
    address = node.address()
    assert list(node.held().values()) == [1]
    answer = node.call(
        "/NetworkDriver.CreateEndpoint",
        NetworkID=NETWORK,
        EndpointID=ONE,
        Options={"com.docker.network.endpoint.exposedports": []},
        Interface={"Address": address, "AddressIPv6": "", "MacAddress": ""},
    )
    assert answer == {"Interface": {"MacAddress": "02:11:11:11:11:11"}}
    assert node.held() == {f"libnetwork.{ONE}": 1}
    found = node.record(ONE)
    assert (found.state, found.name, found.mac) == ("active", "cali11111111111", "02:11:11:11:11:11")
    assert (found.ipv4_nets, found.profile_ids, found.ipv4_gateway) == ([address], ["net1"], "192.0.2.1")
    assert found.extra["docker_network"] == {"id": NETWORK, "name": "net1"}
    joined = node.join(ONE)
    assert joined["InterfaceName"] == {"SrcName": "tmp11111111111", "DstPrefix": "eth"}
    assert (joined["Gateway"], joined["GatewayIPv6"], joined["DisableGatewayService"]) == ("192.0.2.1", "", True)
    assert joined["StaticRoutes"] == [
        {"Destination": "192.0.2.1/32", "RouteType": 1},
        {"Destination": "192.168.0.0/16", "RouteType": 0, "NextHop": "192.0.2.1"},
    ]
    assert kernel.names == {"cali11111111111", "tmp11111111111"}
    for call in ("ProgramExternalConnectivity", "EndpointOperInfo", "RevokeExternalConnectivity"):
        node.call(f"/NetworkDriver.{call}", NetworkID=NETWORK, EndpointID=ONE)
    node.call("/NetworkDriver.Leave", NetworkID=NETWORK, EndpointID=ONE)
    assert kernel.names == set()
    node.call("/NetworkDriver.DeleteEndpoint", NetworkID=NETWORK, EndpointID=ONE)
    assert node.record(ONE).state == "inactive" and node.held() == {f"libnetwork.{ONE}": 1}
    node.call("/IpamDriver.ReleaseAddress", PoolID="ipv4", Address=address.partition("/")[0])
    assert node.record(ONE) is None and node.held() == {}
    node.remove(ONE, address)  # each call can be repeated


def test_each_call_of_a_creation_can_be_repeated(node: Node, kernel: Kernel) -> None:
    address = node.address()
    for _ in range(2):
        node.endpoint(ONE, address=address)
        node.join(ONE)
    assert node.held() == {f"libnetwork.{ONE}": 1} and len(kernel.names) == 2
    node.remove(ONE, address)
    with pytest.raises(CalicoError, match="does not exist, or has been removed"):
        node.join(ONE)


def test_only_the_release_comes_after_the_engine_was_killed(node: Node, kernel: Kernel) -> None:
    first, second = node.endpoint(ONE), node.endpoint(TWO)
    node.join(ONE), node.join(TWO, SANDBOX + "1")
    node.call("/IpamDriver.ReleaseAddress", PoolID="ipv4", Address=first.partition("/")[0])
    assert node.record(ONE) is None and node.record(TWO) is not None
    assert kernel.names == {"cali22222222222", "tmp22222222222"} and node.held() == {f"libnetwork.{TWO}": 1}
    requested = node.address()
    node.call("/IpamDriver.ReleaseAddress", PoolID="ipv4", Address=requested.partition("/")[0])
    assert node.held() == {f"libnetwork.{TWO}": 1}
    node.remove(TWO, second)
    assert node.held() == {} and kernel.names == set()


def test_the_addresses_of_others_are_not_released(node: Node, store: MemoryStore, kernel: Kernel) -> None:
    other = Node("host2", store, "192.0.2.2")
    other.network()
    theirs, mine = other.endpoint(ONE), node.endpoint(TWO)
    assert theirs != mine, "unique over all hosts"
    with pytest.raises(CalicoError, match="is already assigned"):
        node.address(address=theirs)
    node.datastore.ipam.assign(parse_address("192.168.9.9"), Owner("docker.x", {"host": "host1"}))
    node.datastore.ipam.assign(parse_address("192.168.9.8"), Owner(None, {}))
    before = node.held()
    for address in (theirs, "192.168.9.9", "192.168.9.8", "192.168.9.7", "0.0.0.0", "::"):
        node.call("/IpamDriver.ReleaseAddress", PoolID="ipv4", Address=address.partition("/")[0])
    assert node.held() == before and other.record(ONE) is not None


def test_what_is_no_single_address_is_refused(node: Node) -> None:
    before = node.endpoint(ONE)
    plain = before.partition("/")[0]
    for text in (f"{plain}/99", f"{plain}/24", f"{plain}/x", "x"):
        for call in ("RequestAddress", "ReleaseAddress"):
            with pytest.raises(CalicoError, match=r"not a (single|valid) IP address"):
                node.call(f"/IpamDriver.{call}", PoolID="ipv4", Address=text)
    with pytest.raises(CalicoError, match="Address is missing"):
        node.call("/IpamDriver.ReleaseAddress", PoolID="ipv4")
    assert node.record(ONE) is not None and node.held() == {f"libnetwork.{ONE}": 1}


def test_both_addresses_are_released_one_after_the_other(node: Node) -> None:
    four, six = node.address(), node.address("ipv6")
    interface = {"Address": four, "AddressIPv6": six}
    node.call("/NetworkDriver.CreateEndpoint", NetworkID=NETWORK, EndpointID=ONE, Interface=interface)
    assert node.record(ONE).nets == [four, six]
    joined = node.join(ONE)
    assert joined["GatewayIPv6"] == "fd00::1" and len(joined["StaticRoutes"]) == 4
    node.remove(ONE, four)
    assert node.held() == {f"libnetwork.{ONE}": 1} and node.record(ONE) is None
    node.call("/IpamDriver.ReleaseAddress", PoolID="ipv6", Address=six.partition("/")[0])
    assert node.held() == {}


def test_pools(node: Node) -> None:
    every = node.call("/IpamDriver.RequestPool", AddressSpace="calico", Pool="", SubPool="", V6=False)
    assert (every["PoolID"], every["Pool"]) == ("ipv4", "0.0.0.0/0")
    assert every["Data"] == {"com.docker.network.gateway": "0.0.0.0/0"}
    part = node.call("/IpamDriver.RequestPool", Pool="192.168.5.0/24", SubPool="192.168.5.64/26", V6=False)
    assert (part["PoolID"], part["Pool"]) == ("192.168.5.64/26", "192.168.5.0/24")
    assert node.address(part["PoolID"]) == "192.168.5.64/32"
    assert node.call("/IpamDriver.RequestPool", Pool="", V6=True)["PoolID"] == "ipv6"
    for pool, text in (
        ("10.0.0.0/8", "neither a pool nor"),
        ("192.168.0.1/16", "host bits"),
        ("x", "not a valid CIDR"),
    ):
        with pytest.raises(CalicoError, match=text):
            node.call("/IpamDriver.RequestPool", Pool=pool, V6=False)
    with pytest.raises(CalicoError, match="not an IPv6 subnet"):
        node.call("/IpamDriver.RequestPool", Pool="192.168.5.0/24", V6=True)
    node.datastore.hosts.register("192.0.2.1", None, None)
    with pytest.raises(CalicoError, match="not configured for IPv6"):
        node.call("/IpamDriver.RequestPool", Pool="", V6=True)
    with pytest.raises(CalicoError, match="omit --ip for any"):
        node.address(address="192.168.5.64")
    with pytest.raises(CalicoError, match="is in no pool"):
        node.address(address="10.0.0.1")


@pytest.mark.parametrize(
    ("call", "request_", "text"),
    [
        ("CreateEndpoint", {"EndpointID": "x"}, "EndpointID is not an id"),
        ("CreateEndpoint", {"EndpointID": "../" * 20 + "etc"}, "EndpointID is not an id"),
        ("CreateEndpoint", {"EndpointID": ["1"]}, "EndpointID is not an id"),
        ("CreateEndpoint", {"NetworkID": None}, "NetworkID is not an id"),
        ("CreateEndpoint", {"NetworkID": OTHER}, "is not known to Calico on this host"),
        ("CreateEndpoint", {"Options": [1]}, "Options is not an object"),
        ("CreateEndpoint", {"Options": {"com.docker.network.portmap": [{"Port": 80}]}}, "-p and -P have no effect"),
        ("CreateEndpoint", {"Options": {"calico.profile": "a b"}}, "not a valid profile name"),
        ("CreateEndpoint", {"Options": {"calico.profile": "nowhere"}}, "Profile nowhere does not exist"),
        ("CreateEndpoint", {"Interface": {}}, "has no address"),
        ("CreateEndpoint", {"Interface": {"Address": "192.168.0.0/24"}}, "not a single IPv4 address"),
        ("CreateEndpoint", {"Interface": {"Address": "::1"}}, "not a single IPv4 address"),
        ("CreateEndpoint", {"Interface": {"Address": "192.168.0.1/32"}}, "was released, or given to another"),
        ("CreateEndpoint", {"Interface": {"Address": "192.168.0.1/32", "MacAddress": "x"}}, "not a MAC address"),
        ("Join", {"SandboxKey": "/var/run/../../etc/shadow"}, "not the path of a network namespace"),
        ("Join", {"SandboxKey": "relative"}, "not the path of a network namespace"),
        ("Join", {}, "does not exist"),
        ("CreateNetwork", {"IPv4Data": [{"AddressSpace": "LocalDefault"}]}, "--ipam-driver=calico-ipam, too"),
        ("CreateNetwork", {"IPv4Data": [{"AddressSpace": "calico", "AuxAddresses": {"a": "b"}}]}, "--aux-address"),
        ("CreateNetwork", {"IPv4Data": "x"}, "not a list"),
        ("CreateNetwork", {"Options": {"com.docker.network.generic": {"calico.x": "1"}}}, "no option calico.x"),
        ("DeleteNetwork", {"NetworkID": "/etc/passwd"}, "NetworkID is not an id"),
        ("Leave", {"EndpointID": "%d"}, "EndpointID is not an id"),
    ],
)
def test_what_is_refused(node: Node, call: str, request_: dict[str, Any], text: str) -> None:
    valid = {"NetworkID": NETWORK, "EndpointID": ONE, "SandboxKey": SANDBOX, "Interface": {"Address": "192.168.0.1/32"}}
    with pytest.raises(CalicoError, match=text):
        node.call(f"/NetworkDriver.{call}", **{**valid, **request_})
    assert node.held() == {} and node.record(ONE) is None


def test_one_calico_interface_for_a_container(node: Node, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    node.network(OTHER, "net2")
    node.endpoint(ONE)
    node.endpoint(TWO, OTHER)
    node.join(ONE)
    with pytest.raises(CalicoError, match="docker network disconnect net2 NAME"):
        node.join(TWO, network=OTHER)
    node.join(TWO, SANDBOX + "1", OTHER)
    node.call("/NetworkDriver.Leave", NetworkID=NETWORK, EndpointID=ONE)
    node.endpoint(THREE)
    node.join(THREE)

    class Namespace:
        def __init__(self, path: str, name: str) -> None:
            if path != SANDBOX + "2":
                raise NamespaceError("there is none")

        def __enter__(self) -> Namespace:
            return self

        def __exit__(self, *_: object) -> None: ...

        def pairs(self) -> list[tuple[Interface, Interface]]:
            own, host_end = (Interface(name, 1, "", True) for name in ("eth1", "cali99999999999"))
            return [(own, host_end)]

    monkeypatch.setattr(netns, "Namespace", Namespace)
    node.call("/NetworkDriver.Leave", NetworkID=NETWORK, EndpointID=THREE)
    with pytest.raises(CalicoError, match="no second interface"):
        node.join(THREE, SANDBOX + "2")  # as a command has connected it
    node.join(THREE)


def test_names_and_profiles_of_networks(store: MemoryStore, kernel: Kernel) -> None:
    node = Node("host1", store, "192.0.2.1")
    node.call("/NetworkDriver.CreateNetwork", NetworkID=NETWORK, **POOLS)
    with pytest.raises(CalicoError, match="name of network aaaaaaaaaaaa is not known yet"):
        node.endpoint(ONE)
    event = {"Action": "create", "Actor": {"ID": NETWORK, "Attributes": {"name": "net1", "type": "calico"}}}
    for other in (None, [], {}, {"Actor": 1}, {**event, "Actor": {"ID": "../x", "Attributes": {"type": "calico"}}}):
        node.events.on_event(other)
    node.events.on_event(event)
    assert node.datastore.tags("net1") == ["net1"]
    address = node.endpoint(ONE)
    assert node.record(ONE).profile_ids == ["net1"]
    node.remove(ONE, address)
    # it survives a restart, and a profile that was removed stays removed
    node.datastore.remove_profile("net1")
    again = Node("host1", store, "192.0.2.1")
    assert again.networks.get(NETWORK) == Network(NETWORK, "net1", has_profile=True)
    again.endpoint(ONE)
    assert not again.datastore.profile_exists("net1")
    # options
    for name in ("one", "two", "three"):
        node.datastore.create_profile(name)
    again.network(OTHER, "net2", profile="one, two")
    again.endpoint(TWO, OTHER)
    assert again.record(TWO).profile_ids == ["one", "two"] and not again.datastore.profile_exists("net2")
    given = again.address()
    options = {"calico.profile": "three"}
    again.call(
        "/NetworkDriver.CreateEndpoint",
        NetworkID=OTHER,
        EndpointID=THREE,
        Interface={"Address": given, "MacAddress": "02:00:00:00:00:AA"},
        Options=options,
    )
    assert again.record(THREE).profile_ids == ["three"] and again.record(THREE).mac == "02:00:00:00:00:aa"
    # a network whose file was lost is learned from the engine's list
    again.call("/NetworkDriver.DeleteNetwork", NetworkID=OTHER)
    assert list(state.read_all("host1", "networks")) == [NETWORK]
    listed = {"Id": OTHER, "Name": "net2", "Driver": "calico", "Internal": True, "Options": {"calico.profile": "one"}}
    again.events.learn(listed)
    assert again.networks.get(OTHER) == Network(OTHER, "net2", True, ("one",))
    again.events.learn({**listed, "Id": "d" * 64, "Driver": "bridge"})
    assert set(again.networks.all()) == {NETWORK, OTHER}
    state.write("host1", "networks", NETWORK, content=b"{")
    assert set(Networks("host1").all()) == {OTHER}
    # a name that no profile can have
    again.network("e" * 64, "a network")
    with pytest.raises(CalicoError, match="the network's profile would have its name"):
        again.endpoint("4" * 64, "e" * 64)


class Engine:
    """What the Docker Engine lists."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.endpoints: dict[str, dict[str, dict[str, str]]] = {NETWORK: {}}
        self.answers = True
        self.id = "this one"
        self.now = 1000.0
        monkeypatch.setattr("calicoctl.engine.info", lambda: {"ID": self.id})
        monkeypatch.setattr("calicoctl.engine.containers", list)
        monkeypatch.setattr("calicoctl.engine.networks", self.networks)
        monkeypatch.setattr("calicoctl.engine.network", lambda id: {"Containers": self.endpoints[id]})
        monkeypatch.setattr(collection.time, "monotonic", lambda: self.now)

    def networks(self) -> list[dict[str, Any]]:
        if not self.answers:
            raise DockerUnavailable("it does not answer")
        return [{"Id": id, "Name": "net1", "Driver": "calico", "Internal": False} for id in self.endpoints]


def test_what_the_engine_does_not_know_is_removed(
    node: Node, kernel: Kernel, monkeypatch: pytest.MonkeyPatch, store: MemoryStore
) -> None:
    engine = Engine(monkeypatch)
    for id in (ONE, TWO, THREE):
        node.endpoint(id)
        node.join(id, f"{SANDBOX}{id[0]}")
    node.datastore.remove_endpoint(libnetwork.endpoint_id("host1", THREE))  # by somebody else
    requested = node.address()
    node.network(OTHER, "net2")
    other = Node("host2", store, "192.0.2.2")
    other.network()
    other.endpoint("4" * 64)
    old = f"/calico/v1/host/host1/workload/libnetwork/libnetwork/endpoint/{'5' * 64}"
    store.put(old, "{}")
    engine.endpoints[NETWORK] = {CONTAINER: {"EndpointID": ONE, "Name": "web"}}
    node.collection.look()
    assert node.record(ONE).workload_name == "web" and node.record(ONE).extra["docker_container"] == CONTAINER
    engine.now += collection.GRACE - 1
    node.collection.look()
    assert node.record(TWO) is not None and set(node.networks.all()) == {NETWORK, OTHER}
    engine.now += 2
    node.collection.look()
    assert node.record(TWO) is None and node.record(ONE) is not None and set(node.networks.all()) == {NETWORK}
    assert kernel.names == {"cali11111111111", "tmp11111111111"}
    handles = node.held()
    assert len(handles) == 3 and {f"libnetwork.{ONE}", f"libnetwork.{'4' * 64}"} < handles.keys()
    engine.now += collection.REQUEST_GRACE
    node.collection.look()
    assert set(node.held()) == {f"libnetwork.{ONE}", f"libnetwork.{'4' * 64}"}
    assert old in store.entries and other.record("4" * 64) is not None
    assert node.address(address=requested) == requested


def test_nothing_is_removed_while_the_engine_does_not_answer(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch)
    node.endpoint(ONE)
    node.collection.look()
    engine.answers = False
    engine.now += 1000
    with pytest.raises(DockerUnavailable):
        node.collection.look()
    assert node.record(ONE) is not None


def test_what_is_in_use_is_not_removed(node: Node, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch)
    node.endpoint(ONE)
    node.join(ONE)
    kernel.attached.add("cali11111111111")

    def look_for_long() -> None:
        for _ in range(3):
            node.collection.look()
            engine.now += collection.GRACE

    look_for_long()
    assert node.record(ONE) is not None, "it is in a container: the engine that was asked is not the container's"
    kernel.attached.clear()
    monkeypatch.setattr(Identity, "own", lambda: Identity("here", "boot"))
    node.datastore.statuses.write_host({"machine": "elsewhere", "boot": "boot"}, 30, None)
    look_for_long()
    assert node.record(ONE) is not None, "another machine's agent has this host's name"
    node.datastore.unset("/calico/felix/v1/host/host1/status")
    look_for_long()
    assert node.record(ONE) is None


def test_a_removal_succeeds_without_the_store(
    node: Node, store: MemoryStore, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = node.endpoint(ONE)
    node.join(ONE)

    def away() -> None:
        raise StoreUnavailable("etcd is away")

    store.before_read = away
    node.remove(ONE, address)
    assert kernel.names == set() and node.stores.failed
    with pytest.raises(StoreUnavailable):
        node.address()
    store.before_read = lambda: None
    monkeypatch.setattr(stores, "PAUSE", 0.0)
    engine = Engine(monkeypatch)
    node.collection.look()
    engine.now += collection.GRACE
    node.collection.look()
    assert node.record(ONE) is None and node.held() == {}


def test_an_address_that_was_not_released_in_time_is_given_to_the_next_container(
    node: Node, store: MemoryStore, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Node("host2", store, "192.0.2.2")
    other.network()
    first = node.endpoint(ONE, address=node.address(address="192.168.0.9"))
    node.join(ONE)
    with monkeypatch.context() as patch:
        patch.setattr(node.stores, "remove", lambda work: False)  # it is too slow
        node.remove(ONE, first)
    assert node.record(ONE) is not None
    with pytest.raises(CalicoError, match="is already assigned"):
        other.address(address="192.168.0.9")
    assert node.address(address="192.168.0.9") == first
    assert node.record(ONE) is None and list(node.held().values()) == [1]
    # now it belongs to the new one
    with pytest.raises(CalicoError, match="is already assigned"):
        node.address(address="192.168.0.9")


def test_an_address_that_was_not_released_before_the_process_started_anew_is_given_to_the_next_container(
    node: Node, store: MemoryStore, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a reboot, when etcd has ended before the containers."""
    given = node.endpoint(ONE, address=node.address(address="192.168.0.9"))
    node.join(ONE)
    kernel.attached.add("cali11111111111")
    anew = Node("host1", store, "192.0.2.1")

    def refuses() -> None:
        with pytest.raises(CalicoError, match="is already assigned"):
            anew.address(address="192.168.0.9")
        assert node.record(ONE) is not None

    with monkeypatch.context() as patch:
        patch.delattr(netns, "interfaces")  # of all interfaces, a host may have thousands
        refuses()  # its container runs
    kernel.names.clear()
    monkeypatch.setattr(Identity, "own", lambda: Identity("here", "boot"))
    node.datastore.statuses.write_host({"machine": "elsewhere", "boot": "boot"}, 30, None)
    refuses()  # it may run on that machine
    node.datastore.unset("/calico/felix/v1/host/host1/status")
    assert anew.address(address="192.168.0.9") == given
    assert node.record(ONE) is None and list(node.held().values()) == [1]
    refused = pytest.raises(CalicoError, match="is already assigned")
    with refused:  # it is about to be that of a new endpoint
        anew.address(address="192.168.0.9")
    anew.network()
    anew.endpoint(TWO, address=given)
    with refused:
        anew.address(address="192.168.0.9")


def test_an_address_that_was_not_released_and_assigned_again_is_not_taken(
    node: Node, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = node.endpoint(ONE)
    with monkeypatch.context() as patch:
        patch.setattr(node.stores, "remove", lambda work: False)
        node.remove(ONE, first)
    node.remove(ONE, first)  # by somebody else, later
    assert node.held() == {}
    assert node.endpoint(TWO) == first
    with pytest.raises(CalicoError, match="is already assigned"):
        node.address(address=first.partition("/")[0])
    assert node.record(TWO) is not None


def test_a_networks_file_is_written_again(node: Node) -> None:
    listed = {"Id": NETWORK, "Name": "net1", "Driver": "calico", "Internal": False}
    before = state.read("host1", "networks", NETWORK)
    libnetwork.forget_networks("host1")  # as `node remove` does
    node.events.learn(listed)
    assert state.read("host1", "networks", NETWORK) == before is not None


def test_a_network_that_is_removed_meanwhile_does_not_come_back(node: Node) -> None:
    network = Network(OTHER, "net2")
    node.networks.put(network)
    node.networks.remove(OTHER)
    networks.ensure_profile(node.datastore, node.networks, network)
    assert set(node.networks.all()) == {NETWORK} and list(state.read_all("host1", "networks")) == [NETWORK]


def test_containers_are_asked_for_once_for_each_network(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, asked = Engine(monkeypatch), []
    found = {CONTAINER: {"EndpointID": ONE, "Name": "web"}, "d" * 64: {"EndpointID": TWO, "Name": "db"}}

    def inspected(id: str) -> dict[str, Any]:
        asked.append(id)
        if id == OTHER:
            raise DockerUnavailable("no such network")
        return {"Containers": found}

    monkeypatch.setattr("calicoctl.engine.network", inspected)
    node.endpoint(ONE)
    node.endpoint(TWO)
    for network, container in ((OTHER, CONTAINER), (NETWORK, CONTAINER), (NETWORK, "d" * 64), (NETWORK, "e" * 64)):
        facts = {"type": "calico", "name": "net1", "container": container}
        node.events.on_event({"Action": "connect", "Actor": {"ID": network, "Attributes": facts}})
    assert asked == [], "the thread that takes the events does not ask"
    node.events.ask()
    assert asked == [OTHER, NETWORK]
    assert [node.record(id).workload_name for id in (ONE, TWO)] == ["web", "db"]
    assert engine.answers


def test_files_are_not_removed_for_another_engine(node: Node, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch)
    network_profiles.keep("host1", CONTAINER, NETWORK, ["web"])
    monkeypatch.setattr("calicoctl.engine.containers", lambda: [{"Id": CONTAINER, "State": "running"}])
    node.collection.look()

    def look_for_long() -> None:
        for _ in range(3):
            node.collection.look()
            engine.now += collection.GRACE

    engine.id, engine.endpoints = "another", {}
    look_for_long()
    assert set(node.networks.all()) == {NETWORK} and network_profiles.every("host1") == [(CONTAINER, NETWORK)]
    engine.id = "this one"
    look_for_long()
    assert node.networks.all() == {} and network_profiles.every("host1") == []


def test_a_look_changes_no_handle_of_another_host(
    node: Node, store: MemoryStore, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(monkeypatch)
    # another host is about to take an address: it has counted it already
    wrong = {"id": f"libnetwork.{TWO}", "block": {"192.168.0.0/26": 1}}
    key = f"/calico/ipam/v2/handle/libnetwork.{TWO}"
    store.put(key, json.dumps(wrong))
    node.collection.look()
    assert store.entries[key].value == json.dumps(wrong)
    engine.now += collection.GRACE
    node.collection.look()
    assert key not in store.entries, "it stands for nothing for long"


def test_a_failure_is_logged_once(
    node: Node, store: MemoryStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(monkeypatch)
    engine.answers = False
    assert not node.collection.try_to_look() and not node.collection.try_to_look()
    assert [record.getMessage() for record in caplog.records] == [
        "it cannot be seen what is left of Docker networks: it does not answer"
    ]
    engine.answers = True
    assert node.collection.try_to_look()
    engine.answers = False
    assert not node.collection.try_to_look()
    assert len(caplog.records) == 2


def test_a_failed_look_is_not_repeated_at_once(node: Node, store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, looks = Engine(monkeypatch), []

    class Ended(BaseException):
        pass

    def away() -> None:
        looks.append(engine.now)
        node.stores.note_failure()  # by calls of the engine, too
        raise StoreUnavailable("etcd is away")

    def sleep(seconds: float) -> None:
        engine.now += seconds
        if engine.now > 1000 + 3 * collection.PAUSE:
            raise Ended

    store.before_read = away
    monkeypatch.setattr(collection.time, "sleep", sleep)
    with pytest.raises(Ended):
        node.collection._run()
    assert len(looks) in (3, 4)


def test_a_failure_of_the_store_ends_the_wait_for_the_next_look(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    class Ended(BaseException):
        pass

    def look() -> bool:
        looks.append(node.stores.failed)
        if len(looks) > 1:
            raise Ended
        return True

    monkeypatch.setattr(node.collection, "try_to_look", look)
    monkeypatch.setattr(collection, "SHORTEST", 0)
    monkeypatch.setattr(collection, "INTERVAL", 20)
    node.collection._refused = False
    began = time.monotonic()
    threading.Timer(0.1, node.stores.note_failure).start()
    with pytest.raises(Ended):
        node.collection._run()
    assert time.monotonic() < began + 10
    assert node.collection._refused and looks == [False, False]


def test_what_joins_during_a_look_is_not_forgotten(node: Node, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    Engine(monkeypatch)
    node.endpoint(ONE)
    node.endpoint(TWO)

    def inspected(id: str) -> dict[str, Any]:
        node.join(ONE)  # just after the engine has listed what is in the network
        return {"Containers": {}}

    monkeypatch.setattr("calicoctl.engine.network", inspected)
    node.collection.look()
    with pytest.raises(CalicoError, match="no second interface"):
        node.join(TWO)


def test_lock_files_of_killed_processes_are_removed(
    node: Node, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    Engine(monkeypatch)
    stale = locks.DIRECTORY / "host1" / f"libnetwork.{ONE}"
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.touch()
    with locks.WorkloadLock("host1", "libnetwork", TWO) as held:
        node.collection.look()
        assert not stale.exists() and held.path.exists()


@pytest.mark.parametrize(
    "error",
    [
        f"failed to create endpoint: IpamDriver.RequestAddress: {restarting.UNAVAILABLE}: etcd did not answer",
        f"IpamDriver.RequestAddress: Nothing can be changed: {FROZEN}, since /calico/v1/Ready is false",
        # as Docker 20.10 says it at boot, and when the process has just ended
        'plugin "calico-ipam" not found',
        'Post "http://%2Frun%2Fdocker%2Fplugins%2Fcalico.sock/NetworkDriver.CreateEndpoint": EOF',
    ],
)
def test_containers_that_were_refused_are_started_when_etcd_and_this_process_are_back(
    node: Node, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    Engine(monkeypatch)
    described: dict[str, tuple[str, str, str, str]] = {
        "1" * 64: ("exited", NETWORK, error, "always"),
        "2" * 64: ("created", NETWORK, error, "unless-stopped"),
        "3" * 64: ("exited", NETWORK, error, "no"),
        "4" * 64: ("exited", NETWORK, 'plugin "calico-other" not found', "always"),
        "5" * 64: ("exited", OTHER, error, "always"),
        "6" * 64: ("running", NETWORK, error, "always"),
        "7" * 64: ("exited", NETWORK, error, "on-failure"),
    }

    def listed() -> list[dict[str, Any]]:
        return [
            {"Id": id, "State": state, "NetworkSettings": {"Networks": {"net": {"NetworkID": network}}}}
            for id, (state, network, _, _) in described.items()
        ]

    def inspected(id: str) -> dict[str, Any]:
        state, _, text, policy = described[id]
        host_config = {"RestartPolicy": {"Name": policy, "MaximumRetryCount": 0}}
        status = {"Running": state == "running", "Error": text}
        return {"Id": id, "Name": f"/{id[0]}", "State": status, "HostConfig": host_config}

    started: list[str] = []
    monkeypatch.setattr("calicoctl.engine.containers", listed)
    monkeypatch.setattr("calicoctl.engine.inspect", inspected)
    monkeypatch.setattr("calicoctl.engine.start", lambda id: started.append(id[0]))
    with monkeypatch.context() as frozen:
        frozen.setattr(DatastoreClient, "is_frozen", lambda client: True)
        node.collection.look()
    assert started == [] and node.collection._refused, "they would be refused again"
    node.collection.look()
    assert started == ["1", "2", "7"]
    node.collection.look()
    assert len(started) == 3, "nothing was refused since then"


def test_kept_profiles_are_forgotten_with_their_container_and_network(
    node: Node, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(monkeypatch)
    containers = [{"Id": CONTAINER, "State": "running"}]
    monkeypatch.setattr("calicoctl.engine.containers", lambda: list(containers))
    gone = "d" * 64
    for container, network in ((CONTAINER, NETWORK), (gone, NETWORK), (CONTAINER, OTHER)):
        network_profiles.keep("host1", container, network, ["web"])
    node.network()
    node.endpoint(ONE)
    assert node.record(ONE).profile_ids == []
    engine.endpoints[NETWORK] = {CONTAINER: {"EndpointID": ONE, "Name": "web"}}
    node.collection.look()
    assert node.record(ONE).profile_ids == ["web"], "also if the event was lost"
    assert len(network_profiles.every("host1")) == 3
    engine.now += collection.GRACE
    node.collection.look()
    assert network_profiles.every("host1") == [(CONTAINER, NETWORK)]
    node.call("/NetworkDriver.DeleteNetwork", NetworkID=NETWORK)
    assert network_profiles.every("host1") == []
