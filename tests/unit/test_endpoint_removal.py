"""`endpoint ID remove`: what is removed of an endpoint, and which endpoints are refused.

The fakes are at the kernel's interfaces and at the engine's list of containers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from netaddr import IPAddress, IPNetwork

from calicoctl import engine
from calicoctl.datastore.blocks import Owner
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Endpoint
from calicoctl.errors import CalicoError, DockerNotRunning, NoSuchContainer, NotFound
from calicoctl.netlink import Interface
from calicoctl.workloads import connected, endpoint_removal, locks, netns
from calicoctl.workloads.endpoint_removal import remove_endpoint
from tests.unit.memory_store import MemoryStore

ONE, TWO, CONTAINER = "1" * 64, "2" * 64, "c" * 64


@dataclass
class World:
    """A host with its store, its interfaces, and its engine: containers by id, or None if no engine runs."""

    datastore: DatastoreClient
    interfaces: set[str] = field(default_factory=set)
    in_containers: set[str] = field(default_factory=set)
    """Those of `interfaces` whose other end is in another namespace."""
    containers: dict[str, dict[str, Any]] | None = field(default_factory=dict)

    def endpoint(
        self,
        orchestrator: str,
        workload: str,
        endpoint: str,
        *addresses: str,
        handle: str | None = "",
        host: str = "vm",
    ) -> EndpointId:
        """Create an endpoint with its interface, and assign its addresses to a handle (default: the workload's)."""
        id = EndpointId(host, orchestrator, workload, endpoint)
        self.datastore.create_endpoint(Endpoint(id, ipv4_nets=[f"{address}/32" for address in addresses]))
        owner = Owner(f"{orchestrator}.{workload}" if handle == "" else handle, {})
        for address in addresses:
            if self.datastore.ipam.owner(IPAddress(address)) is None:
                self.datastore.ipam.assign(IPAddress(address), owner)
        self.interfaces.add(id.interface)
        return id

    def removed(self, id: EndpointId) -> list[str]:
        return [str(address) for address in remove_endpoint(self.datastore, id)]

    def held(self) -> list[str]:
        (held,) = self.datastore.ipam.used_in([IPNetwork("0.0.0.0/0")]).values()
        return list(map(str, held))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    world = World(DatastoreClient(MemoryStore(), "vm"))

    def known() -> dict[str, dict[str, Any]]:
        if world.containers is None:
            raise DockerNotRunning("Cannot ask Docker: nothing listens.")
        return world.containers

    def inspect(name: str) -> dict[str, Any]:
        if name not in known():
            raise NoSuchContainer(f"No such container: {name}")
        return known()[name]

    monkeypatch.setattr(locks, "DIRECTORY", tmp_path)

    def find_interface(name: str) -> Interface | None:
        found = Interface(name, 1, "", True, peer_namespace=0 if name in world.in_containers else None)
        return found if name in world.interfaces else None

    monkeypatch.setattr(netns, "find_interface", find_interface)
    monkeypatch.setattr(netns, "delete_interface", world.interfaces.discard)
    monkeypatch.setattr(engine, "containers", lambda: list(known().values()))
    monkeypatch.setattr(engine, "inspect", inspect)
    monkeypatch.setattr(endpoint_removal, "has_processes", lambda id: False)
    return world


def on_network(endpoint: str, name: str = "web", network: str = "net1") -> dict[str, Any]:
    """Return a running container as the engine lists it, with a connection to a Docker network."""
    networks = {network: {"NetworkID": "f" * 64, "EndpointID": endpoint}}
    return {
        "Id": CONTAINER,
        "Names": [f"/{name}"],
        "State": "running",
        "NetworkSettings": {"Networks": networks},
    }


def test_an_endpoint_of_the_plugin_of_2015_is_removed_with_its_address(world: World) -> None:
    id = world.endpoint("libnetwork", "libnetwork", ONE, "10.0.0.1", handle=None)
    other = world.endpoint("libnetwork", "libnetwork", TWO, "10.0.0.2", handle=None)
    assert world.removed(id) == ["10.0.0.1"]
    assert world.held() == ["10.0.0.2"] and world.interfaces == {other.interface}
    assert world.datastore.endpoint_ids() == [other]
    with pytest.raises(NotFound, match=f"^Endpoint {ONE} does not exist"):
        world.removed(id)


def test_an_address_without_a_handle_that_another_endpoint_lists_is_kept(world: World) -> None:
    id = world.endpoint("libnetwork", "libnetwork", ONE, "10.0.0.1", "10.0.0.3", handle=None)
    other = world.endpoint("libnetwork", "libnetwork", TWO, "10.0.0.1", handle=None)
    assert world.removed(id) == ["10.0.0.3"] and world.held() == ["10.0.0.1"]
    assert world.removed(other) == ["10.0.0.1"]


def test_an_address_that_is_assigned_to_another_workload_is_kept(world: World) -> None:
    world.endpoint("docker", CONTAINER, "ab" * 16, "10.0.0.1")
    id = world.endpoint("libnetwork", "libnetwork", ONE, "10.0.0.1")
    assert world.removed(id) == [] and world.held() == ["10.0.0.1"]


def test_of_a_workload_with_two_endpoints_the_other_stays_whole(world: World) -> None:
    ids = [world.endpoint("openstack", "pod", digit * 32, f"10.0.0.{digit}") for digit in "12"]
    world.datastore.ipam.assign(IPAddress("10.0.0.8"), Owner("openstack.pod", {"endpoint": "1" * 32}))
    world.datastore.ipam.assign(IPAddress("10.0.0.9"), Owner("openstack.pod", {}))
    assert world.removed(ids[0]) == ["10.0.0.1", "10.0.0.8"]
    assert world.held() == ["10.0.0.2", "10.0.0.9"] and world.interfaces == {ids[1].interface}
    assert world.removed(ids[1]) == ["10.0.0.2", "10.0.0.9"]
    assert world.held() == [] and not world.datastore.ipam.handles.exists("openstack.pod")


def test_an_interface_whose_name_another_endpoint_has_is_kept(world: World) -> None:
    id = world.endpoint("openstack", "pod", "1" * 32, "10.0.0.1")
    world.endpoint("openstack", "other", "1" * 31 + "2", "10.0.0.2")
    world.removed(id)
    assert world.interfaces == {id.interface}


def test_an_invalid_endpoint_and_one_whose_id_names_no_interface_are_removed(world: World) -> None:
    id = EndpointId("vm", "openstack", "pod", "1" * 32)
    world.datastore.set(f"/calico/v1/host/vm/workload/openstack/pod/endpoint/{'1' * 32}", "{")
    assert world.removed(id) == [] and world.datastore.endpoint_ids() == []
    strange = world.endpoint("openstack", "pod", "%d", "10.0.0.1")
    assert world.removed(strange) == ["10.0.0.1"] and strange.interface in world.interfaces


def test_a_container_that_is_attached_through_cni_keeps_its_endpoint_as_long_as_its_namespace_exists(
    world: World,
) -> None:
    """Its namespace exists if its interface does, even if no path leads to it."""
    id = world.endpoint("cni", "pod", "1" * 32, "10.0.0.1")
    with pytest.raises(CalicoError, match=r"that of a container that exists: .* 'calicoctl container remove pod'"):
        world.removed(id)
    world.interfaces.clear()
    assert world.removed(id) == ["10.0.0.1"]


def test_an_endpoint_of_another_host_is_refused(world: World) -> None:
    id = world.endpoint("openstack", "pod", "1" * 32, "10.0.0.1", host="elsewhere")
    with pytest.raises(CalicoError, match=r"is on elsewhere, not on this host .*--hostname=elsewhere"):
        world.removed(id)
    assert world.datastore.readable(id) is not None


def test_a_container_on_a_docker_network_is_to_be_disconnected_by_docker(world: World) -> None:
    id = world.endpoint("libnetwork", ONE, ONE, "10.0.0.1")
    world.containers = {CONTAINER: on_network(ONE)}
    with pytest.raises(
        CalicoError, match=r"is that of web on the Docker network net1.*'docker network disconnect net1 web'"
    ):
        world.removed(id)
    assert world.held() == ["10.0.0.1"] and world.interfaces == {id.interface}
    world.containers = {CONTAINER: on_network(TWO)}
    assert world.removed(id) == ["10.0.0.1"]


def test_an_endpoint_of_a_container_of_another_engine_is_not_removed(world: World) -> None:
    id = world.endpoint("libnetwork", ONE, ONE, "10.0.0.1")
    world.in_containers.add(id.interface)
    with pytest.raises(CalicoError, match="DOCKER_HOST may name another engine than the container's"):
        world.removed(id)
    assert world.held() == ["10.0.0.1"] and world.interfaces == {id.interface}
    world.in_containers.clear()
    assert world.removed(id) == ["10.0.0.1"]


@pytest.mark.parametrize(
    "settings", [None, [], {}, {"Networks": None}, {"Networks": {"net1": None, "n": {"EndpointID": 3}}}]
)
def test_an_unexpected_description_of_a_container_does_no_harm(world: World, settings: Any) -> None:
    id = world.endpoint("libnetwork", ONE, ONE, "10.0.0.1")
    world.containers = {CONTAINER: {**on_network(ONE), "NetworkSettings": settings, "Names": None}}
    assert world.removed(id) == ["10.0.0.1"]


def test_without_docker_only_an_endpoint_with_an_interface_may_be_in_use(world: World) -> None:
    id = world.endpoint("libnetwork", "libnetwork", ONE, "10.0.0.1", handle=None)
    world.containers = None
    with pytest.raises(CalicoError, match=r"nothing listens.*has its interface cali11111111111"):
        world.removed(id)
    world.interfaces.clear()
    assert world.removed(id) == ["10.0.0.1"]


def test_a_container_that_exists_is_to_be_disconnected_by_container_remove(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = world.endpoint("docker", CONTAINER, "ab" * 16, "10.0.0.1")
    stopped = {"Running": False, "Pid": 0}
    host_config = {"NetworkMode": "none"}
    world.containers = {CONTAINER: {"Id": CONTAINER, "Name": "/web", "State": stopped, "HostConfig": host_config}}
    refusal = f"is that of a container that exists: disconnect it with 'calicoctl container remove {'c' * 12}'"
    with pytest.raises(CalicoError, match=re.escape(refusal)):
        world.removed(id)
    world.containers = None
    with pytest.raises(CalicoError, match="Without Docker, 'calicoctl container remove cccccccccccc' removes"):
        world.removed(id)
    world.containers = {}
    monkeypatch.setattr(endpoint_removal, "has_processes", lambda id: True)
    with pytest.raises(CalicoError, match=re.escape(refusal)):  # it is another engine's
        world.removed(id)
    world.interfaces.clear()
    assert world.removed(id) == ["10.0.0.1"]
    assert not list(locks.DIRECTORY.rglob("*docker*"))


@pytest.mark.parametrize("orchestrator", ["namespace", "docker"])
def test_a_namespace_that_exists_is_to_be_disconnected_by_container_remove(world: World, orchestrator: str) -> None:
    """Old tools have stored namespaces as if they were containers."""
    own = "/proc/self/ns/net"
    id = world.endpoint(orchestrator, own.replace("/", "-"), "ab" * 16, "10.0.0.1")
    with pytest.raises(CalicoError, match=r"is that of a namespace that exists: .*'calicoctl container remove PATH'"):
        world.removed(id)
    world.interfaces.clear()
    connected.put("vm", "namespace", id.workload, own)
    with pytest.raises(CalicoError, match=f"'calicoctl container remove {own}'"):
        world.removed(id)
    connected.put("vm", "namespace", id.workload, "/var/run/netns/gone")
    assert world.removed(id) == ["10.0.0.1"]
    assert connected.get("vm", "namespace", id.workload) is None
