"""Profiles of containers in Docker networks: what is kept, and which ones an endpoint gets when.

The fake is at the engine's descriptions of containers and networks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

import pytest

from calicoctl import engine, limits, state
from calicoctl.commands.endpoint import change_profiles
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.model import Endpoint
from calicoctl.errors import CalicoError
from calicoctl.workloads import docker_networks, libnetwork, locks, network_profiles
from calicoctl.workloads.docker_networks import Connection
from calicoctl.workloads.workload import of_container
from tests.unit.memory_store import MemoryStore

WEB, DB = "1" * 64, "2" * 64
NET1, NET2 = "a" * 64, "b" * 64
FIRST, SECOND = "e" * 64, "f" * 64


@dataclass
class World:
    """A host, and the container web in the network net1, as the engine describes it."""

    datastore: DatastoreClient
    networks: dict[str, Any] = field(default_factory=dict)

    def connect(self, endpoint: str, network: str = NET1, name: str = "net1", **more: Any) -> None:
        self.networks = {name: {"NetworkID": network, "EndpointID": endpoint, **more}}

    def container(self) -> dict[str, Any]:
        return {"Id": WEB, "Name": "/web", "NetworkSettings": {"Networks": self.networks}}

    def connections(self) -> list[Connection]:
        state, host_config = {"Running": True, "Pid": 7}, {"NetworkMode": "net1"}
        container = {**self.container(), "State": state, "HostConfig": host_config, "Config": {}}
        return docker_networks.of_workload(of_container(container, "web"))

    def create(self, id: str, *usual: str, network: str = NET1) -> None:
        """Create an endpoint as a call of the engine does."""
        endpoint = Endpoint(libnetwork.endpoint_id("vm", id))
        endpoint.extra[libnetwork.NETWORK] = {"id": network, "name": "net1"}
        network_profiles.assign("vm", endpoint, network, usual)
        self.datastore.create_endpoint(endpoint)

    def report(self, id: str, container: str = WEB, network: str = NET1) -> None:
        """Report an endpoint's container, as the engine does afterwards."""

        def change(stored: Endpoint) -> bool:
            network_profiles.settle("vm", stored, container, network)
            stored.extra[libnetwork.CONTAINER] = container
            return True

        self.datastore.modify_endpoint(libnetwork.endpoint_id("vm", id), change)

    def profiles(self, id: str) -> list[str]:
        endpoint = self.datastore.readable(libnetwork.endpoint_id("vm", id))
        assert endpoint is not None
        return endpoint.profile_ids

    def append(self, name: str) -> bool:
        (connection,) = self.connections()
        return network_profiles.modify(self.datastore, connection, appending(name))


def appending(name: str) -> Callable[[Endpoint], bool]:
    def change(endpoint: Endpoint) -> bool:
        if name in endpoint.profile_ids:
            return False
        endpoint.profile_ids = [*endpoint.profile_ids, name]
        return True

    return change


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    world = World(DatastoreClient(MemoryStore(), "vm"))
    known = [
        {"Id": NET1, "Name": "net1", "Driver": "calico", "Options": None},
        {"Id": NET2, "Name": "net2", "Driver": "calico", "Options": {"calico.profile": "x, y"}},
        {"Id": "c" * 64, "Name": "other", "Driver": "bridge", "Options": {}},
    ]
    monkeypatch.setattr(locks, "DIRECTORY", tmp_path)
    monkeypatch.setattr(engine, "inspect", lambda name: world.container())
    monkeypatch.setattr(engine, "networks", lambda: known)
    return world


def test_profiles_are_kept_for_each_container_and_network() -> None:
    assert network_profiles.kept("vm", WEB, NET1) is None and network_profiles.every("vm") == []
    network_profiles.keep("vm", WEB, NET1, ["b", "a"])
    network_profiles.keep("vm", WEB, NET2, [])
    network_profiles.keep("vm", DB, NET1, ["c"])
    assert network_profiles.kept("vm", WEB, NET1) == ["b", "a"]
    assert network_profiles.kept("vm", WEB, NET2) == [] and network_profiles.kept("elsewhere", WEB, NET1) is None
    assert sorted(network_profiles.every("vm")) == [(WEB, NET1), (WEB, NET2), (DB, NET1)]
    network_profiles.forget_network("vm", NET1)
    assert network_profiles.every("vm") == [(WEB, NET2)]
    network_profiles.forget("vm", WEB, NET2)
    network_profiles.forget("vm", WEB, NET2)
    network_profiles.keep("vm", WEB, NET2, [])
    network_profiles.forget_all("vm")
    assert network_profiles.every("vm") == [] and not state.path("vm").exists()


def test_files_with_other_names_are_left_out_and_removed() -> None:
    network_profiles.keep("vm", WEB, NET1, ["a"])
    for name in ("notes", f"{WEB}.", f"{WEB}.{NET1}.bak", "a.b"):
        state.write("vm", "networks.profiles", name, content=b"x")
    assert network_profiles.every("vm") == [(WEB, NET1)]
    network_profiles.forget_network("vm", NET1)
    assert network_profiles.every("vm") == []
    network_profiles.forget_all("vm")
    assert not state.path("vm").exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b"[" * 100_000])
def test_an_invalid_file_is_no_empty_list(content: bytes) -> None:
    state.write("vm", "networks.profiles", f"{WEB}.{NET1}", content=content)
    with pytest.raises(CalicoError, match="has no list of profiles: delete it"):
        network_profiles.kept("vm", WEB, NET1)


@pytest.mark.parametrize("id", ["../../etc", "1" * 63, "A" * 64, ""])
def test_only_ids_of_the_engines_become_parts_of_paths(id: str) -> None:
    with pytest.raises(AssertionError):
        network_profiles.keep("vm", id, NET1, [])


def test_a_new_endpoint_has_the_usual_profiles_at_once_if_none_are_kept_in_its_network(world: World) -> None:
    network_profiles.keep("vm", WEB, NET2, ["kept"])
    world.create(FIRST, "net1")
    assert world.profiles(FIRST) == ["net1"]
    world.report(FIRST)
    assert world.profiles(FIRST) == ["net1"]


@pytest.mark.parametrize(("container", "expected"), [(WEB, ["kept"]), (DB, ["net1", "x"])])
def test_in_other_networks_it_has_none_until_its_container_is_known(
    world: World, container: str, expected: list[str]
) -> None:
    network_profiles.keep("vm", WEB, NET1, ["kept"])
    world.create(FIRST, "net1", "x")
    assert world.profiles(FIRST) == []
    world.report(FIRST, container)
    assert world.profiles(FIRST) == expected
    endpoint = world.datastore.readable(libnetwork.endpoint_id("vm", FIRST))
    assert endpoint is not None and network_profiles.PENDING not in endpoint.extra


def test_a_container_that_is_reported_again_does_not_lose_what_was_set_meanwhile(world: World) -> None:
    network_profiles.keep("vm", WEB, NET1, ["kept"])
    world.create(FIRST, "net1")
    world.report(FIRST)
    world.datastore.modify_endpoint(
        libnetwork.endpoint_id("vm", FIRST), lambda stored: bool(stored.profile_ids.append("from elsewhere")) or True
    )
    world.report(FIRST)
    assert world.profiles(FIRST) == ["kept", "from elsewhere"]


def test_an_unreadable_file_lets_no_packet_pass(world: World) -> None:
    state.write("vm", "networks.profiles", f"{WEB}.{NET1}", content=b"nonsense")
    world.create(FIRST, "net1")
    with pytest.raises(CalicoError, match="delete it"):
        world.report(FIRST)
    assert world.profiles(FIRST) == []


def test_a_command_changes_the_endpoint_and_the_next_ones(world: World) -> None:
    world.connect(FIRST)
    world.create(FIRST, "net1")
    assert world.append("web") and not world.append("web")
    assert world.profiles(FIRST) == network_profiles.kept("vm", WEB, NET1) == ["net1", "web"]
    world.create(SECOND, "net1")
    world.report(SECOND)
    assert world.profiles(SECOND) == ["net1", "web"]
    assert not list(locks.DIRECTORY.rglob("libnetwork.*"))


def test_a_command_for_an_endpoint_whose_container_is_not_known_yet(world: World) -> None:
    network_profiles.keep("vm", DB, NET1, ["kept"])
    world.connect(FIRST)
    world.create(FIRST, "net1")
    assert not world.append("net1") and world.profiles(FIRST) == ["net1"]
    assert world.append("web")
    world.report(FIRST)
    assert world.profiles(FIRST) == ["net1", "web"]


@pytest.mark.parametrize(
    ("network", "name", "more", "usual"),
    [
        (NET1, "net1", {}, ["net1"]),
        ("", "net1", {}, ["net1"]),  # never started
        ("", NET1, {}, ["net1"]),  # and created by the network's id
        (NET2, "net2", {}, ["x", "y"]),
        (NET2, "net2", {"DriverOpts": {"calico.profile": "z"}}, ["z"]),
        (NET2, "net2", {"DriverOpts": {"else": "z"}}, ["x", "y"]),
    ],
)
def test_a_container_without_an_endpoint_has_the_profiles_of_its_next_one(
    world: World, network: str, name: str, more: dict[str, Any], usual: list[str]
) -> None:
    world.connect("", network, name, **more)
    (connection,) = world.connections()
    endpoint = network_profiles.current(world.datastore, connection)
    assert (endpoint.id.endpoint, endpoint.profile_ids) == ("", usual)
    assert world.append("web")
    assert network_profiles.kept("vm", WEB, connection.network) == [*usual, "web"]
    assert network_profiles.current(world.datastore, connection).profile_ids == [*usual, "web"]


def test_a_container_that_starts_during_the_command(world: World) -> None:
    """Its endpoint is made, and reported, after the command has asked, and before the file is written."""
    world.connect("")
    (connection,) = world.connections()
    world.connect(FIRST)
    world.create(FIRST, "net1")
    world.report(FIRST)
    assert network_profiles.modify(world.datastore, connection, appending("web"))
    assert world.profiles(FIRST) == ["net1", "web"]


def test_a_container_that_stops_during_the_command(world: World) -> None:
    world.connect(FIRST)
    assert world.append("web") and network_profiles.kept("vm", WEB, NET1) == ["net1", "web"]


def test_a_container_that_starts_and_stops_during_the_command(world: World) -> None:
    world.connect("")
    (connection,) = world.connections()
    world.connect(FIRST)  # which is removed before it is changed
    assert network_profiles.modify(world.datastore, connection, appending("web"))
    assert network_profiles.kept("vm", WEB, NET1) == ["net1", "web"]


def test_profiles_that_another_host_sets_before_the_container_is_known_stay(world: World) -> None:
    network_profiles.keep("vm", DB, NET1, ["kept"])
    world.create(FIRST, "net1")
    world.datastore.modify_endpoint(libnetwork.endpoint_id("vm", FIRST), appending("from elsewhere"))
    world.report(FIRST)
    assert world.profiles(FIRST) == ["from elsewhere"]


def test_another_host_changes_no_list_that_is_not_known_yet(world: World) -> None:
    world.datastore.create_profile("web")
    network_profiles.keep("vm", DB, NET1, ["kept"])
    world.create(FIRST, "net1")
    endpoint = world.datastore.readable(libnetwork.endpoint_id("vm", FIRST))
    assert endpoint is not None
    words = {"append": False, "set": False, "remove": False}
    with pytest.raises(CalicoError, match="has not stored whose it is: try again"):
        change_profiles(world.datastore, endpoint, FIRST, {**words, "append": True}, ["web"])
    world.report(FIRST)
    assert world.profiles(FIRST) == ["net1"]
    change_profiles(world.datastore, endpoint, FIRST, {**words, "append": True}, ["web"])
    assert world.profiles(FIRST) == ["net1", "web"]


def test_for_which_containers_a_profile_is_kept() -> None:
    for container, network in ((WEB, NET1), (WEB, NET2), (DB, NET1)):
        network_profiles.keep("vm", container, network, ["web", "other"])
    network_profiles.keep("vm", "9" * 64, NET1, ["other"])
    state.write("vm", "networks.profiles", f"{'8' * 64}.{NET1}", content=b"[")
    assert network_profiles.containers_with("vm", "web") == sorted([WEB, DB])
    assert network_profiles.containers_with("vm", "none") == []


def test_too_many_profiles_are_not_kept(world: World) -> None:
    world.connect("")
    network_profiles.keep("vm", WEB, NET1, [f"p{number}" for number in range(limits.PROFILES)])
    with pytest.raises(CalicoError, match="can have 64 profiles"):
        world.append("web")
    assert len(network_profiles.kept("vm", WEB, NET1) or ()) == limits.PROFILES


@pytest.mark.parametrize(
    "networks",
    [
        None,
        [],
        {"bridge": {"NetworkID": "9" * 64}, "host": {}, "none": {}},
        {"other": {"NetworkID": "c" * 64}},
        {"net1": {"NetworkID": "d" * 64}},
        {"net3": 7},
    ],
)
def test_containers_that_are_in_no_network_of_calicos(world: World, networks: Any) -> None:
    world.networks = networks
    assert world.connections() == []


def test_only_ids_of_the_engines_are_used(world: World) -> None:
    world.networks = {"net1": {"NetworkID": "../x", "EndpointID": ["x"]}}
    assert [(one.network, one.endpoint) for one in world.connections()] == [(NET1, "")]


def test_the_connection_of_an_endpoint(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.create(FIRST, "net1")
    endpoint = world.datastore.readable(libnetwork.endpoint_id("vm", FIRST))
    assert endpoint is not None
    world.connect(FIRST)
    monkeypatch.setattr(engine, "containers", lambda: [{**world.container(), "Names": ["/web"], "Name": None}])
    assert docker_networks.connection_of(endpoint) == Connection(WEB, "web", NET1, "net1", FIRST)
    world.report(FIRST)
    endpoint = world.datastore.readable(libnetwork.endpoint_id("vm", FIRST))
    monkeypatch.setattr(engine, "containers", list)
    assert endpoint is not None
    assert docker_networks.connection_of(endpoint) == Connection(WEB, WEB[:12], NET1, "net1", FIRST)
    endpoint.extra[libnetwork.NETWORK] = {"id": "../x"}
    assert docker_networks.connection_of(endpoint) is None
    old = Endpoint(libnetwork.EndpointId("vm", "libnetwork", "libnetwork", FIRST))
    assert docker_networks.connection_of(old) is None


@pytest.mark.parametrize(("value", "names"), [("a", ("a",)), (" b , a,b", ("b", "a"))])
def test_the_option_of_networks(value: str, names: tuple[str, ...]) -> None:
    assert network_profiles.parse_option(value) == names


@pytest.mark.parametrize("value", ["", " ", ",", "a,,b", "a/b", 7, None, ",".join(f"p{n}" for n in range(65))])
def test_invalid_options_of_networks(value: object) -> None:
    with pytest.raises(CalicoError, match=r"^calico\.profile: "):
        network_profiles.parse_option(value)


def test_a_network_whose_name_no_profile_can_have() -> None:
    assert network_profiles.named_after("net_1") == "net_1"
    with pytest.raises(CalicoError, match=r"Create the network with -o calico\.profile=NAME"):
        network_profiles.named_after("n" * 41)
