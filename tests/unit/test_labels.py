"""Labels and variables of containers that ask for a connection: how they are read, and what the agent does with them.

The fakes are at the Docker Engine, and at `wiring.connect_started`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from calicoctl import engine, limits, state
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Endpoint
from calicoctl.errors import AddressTaken, CalicoError, NoSuchContainer, NoSuchImage, StoreUnavailable
from calicoctl.workloads import connected, labelling, labels, locks, wiring
from calicoctl.workloads.addressing import DEFAULT_INTERFACE
from calicoctl.workloads.labels import Wanted
from calicoctl.workloads.wiring import Attachment
from calicoctl.workloads.workload import Workload, of_container
from tests.unit.memory_store import MemoryStore

ID = "1" * 64
STARTED = "2026-01-02T03:04:05.678Z"


def described(own: Any = None, variables: Any = None, mode: str = "none", running: bool = True) -> dict[str, Any]:
    """Return the engine's description of a container with these labels and variables."""
    return {
        "Id": ID,
        "Name": "/web",
        "Image": "sha256:abc",
        "State": {"Running": running, "Pid": 123 if running else 0, "StartedAt": STARTED},
        "HostConfig": {"NetworkMode": mode},
        "Config": {"Labels": own, "Env": variables},
    }


def image(own: Any = None, variables: Any = None) -> dict[str, Any]:
    return {"Config": {"Labels": own, "Env": variables}}


def test_labels() -> None:
    own = {"calico.ip": "192.168.0.1, IPv6", "calico.profile": "web,db", "calico.interface": "eth0", "other": "x"}
    expected = Wanted(("192.168.0.1", "ipv6"), ("web", "db"), "eth0")
    assert labels.wanted(described(own), image({"other": "x"})) == expected
    assert labels.wanted(described({"calico.ip": "ipv4,ipv4"}), image()).addresses == ("ipv4", "ipv4")


@pytest.mark.parametrize("own", [None, {}, {"calico.profile": "web"}, {"calico.ip": ""}, {"calico.ip": " "}, [], "x"])
def test_containers_that_do_not_ask(own: Any) -> None:
    assert labels.wanted(described(own), image()) == Wanted()
    assert not labels.is_labelled(described(own))


def test_variables_of_2015() -> None:
    variables = ["PATH=/bin", "CALICO_IP=auto", "CALICO_PROFILE=web", "CALICO_INTERFACE=x", "CALICO", None]
    assert labels.wanted(described(None, variables), image()) == Wanted(("ipv4",), ("web",))
    assert labels.wanted(described({"calico.ip": "auto"}), image()).addresses == ("auto",), "a label has no such word"


def test_variables_count_without_another_network_alone() -> None:
    container = described(None, ["CALICO_IP=auto"], mode="bridge")
    why = "variable CALICO_IP is ignored, since the container does not run with --net=none"
    assert labels.wanted(container, image()) == Wanted(ignored=(why,)) and labels.is_labelled(container)
    assert labels.wanted(described({"calico.ip": "ipv4"}, [], mode="bridge"), image()).addresses == ("ipv4",)


def test_labels_win_each_by_itself_even_if_empty() -> None:
    variables = ["CALICO_IP=192.168.0.1", "CALICO_PROFILE=web"]
    assert labels.wanted(described({"calico.ip": "ipv6"}, variables), image()) == Wanted(("ipv6",), ("web",))
    own = {"calico.profile": "db"}
    assert labels.wanted(described(own, variables), image()) == Wanted(("192.168.0.1",), ("db",))
    assert labels.wanted(described({"calico.ip": ""}, variables), image()) == Wanted()


def test_what_the_image_has_is_ignored_and_named() -> None:
    own = {"calico.ip": "ipv4", "calico.profile": "web"}
    why = "is ignored, since it is the image's own"
    assert labels.wanted(described(own), image(own)) == Wanted(ignored=(f"label calico.ip {why}",))
    found = labels.wanted(described(own), image({"calico.ip": "ipv6", "calico.profile": "web"}))
    assert found == Wanted(("ipv4",), ignored=(f"label calico.profile {why}",))
    found = labels.wanted(described(own, ["CALICO_IP=auto"]), image(own, ["CALICO_IP=auto"]))
    assert found == Wanted(ignored=(f"label calico.ip {why}", f"variable CALICO_IP {why}"))
    found = labels.wanted(described({"calico.ip": "ipv6"}, ["CALICO_IP=auto"]), image({"calico.ip": "ipv6"}))
    assert found == Wanted(("ipv4",), ignored=(f"label calico.ip {why}",)), "the variable is the container's own"


@pytest.mark.parametrize("name", ["calico.ip", "calico.profile"])
def test_lists_are_bounded(name: str) -> None:
    most = limits.ADDRESSES if name == "calico.ip" else limits.PROFILES
    for text, why in (
        (",".join(f"10.0.0.{number}" for number in range(most + 1)), f"can have {most}"),
        ("1" * 16385, "more than 16 KiB"),
    ):
        with pytest.raises(CalicoError, match=f"label {name}: .*{why}"):
            labels.wanted(described({"calico.ip": "ipv4", name: text}), image())


def test_lists_have_each_item_once() -> None:
    with pytest.raises(CalicoError, match="profile: web is named twice"):
        labels.wanted(described({"calico.ip": "ipv4", "calico.profile": "web,db,web"}), image())
    for addresses in (("10.0.0.1", "10.0.0.2", "10.0.0.1"), ("fd00::1", "ipv6", "fd00:0::1")):
        with pytest.raises(CalicoError, match=r"calico\.ip: (10\.0\.0\.1|fd00::1) is named twice"):
            labelling.checked(Wanted(addresses))
    requests, _ = labelling.checked(Wanted(("ipv4", "ipv4", "10.0.0.0/24", "10.0.0.0/24")))
    assert len(requests) == 4, "any address, twice"


def test_names_of_profiles_that_cannot_be_keys() -> None:
    for name in ("..", "a/b"):
        with pytest.raises(CalicoError, match="is not a valid profile name"):
            labels.wanted(described({"calico.ip": "ipv4", "calico.profile": name}), image())


def test_the_start_of_a_container_is_known_if_it_has_labels() -> None:
    assert of_container(described({"calico.ip": "ipv4"}), "web").started_at == STARTED
    assert of_container(described(), "web").started_at is None


# What the agent does


class World:
    """A host whose engine has the container `container` of the image `image`. `calls` are those of connect_started."""

    def __init__(self) -> None:
        self.datastore = DatastoreClient(MemoryStore(), "vm")
        self.container: dict[str, Any] | None = described({"calico.ip": "ipv4,192.168.0.1", "calico.profile": "web"})
        self.image: dict[str, Any] | None = image()
        self.error: Exception | None = None
        self.calls: list[tuple[Any, ...]] = []

    def inspect(self, id: str) -> dict[str, Any]:
        if self.container is None:
            raise NoSuchContainer("No such container")
        return self.container

    def inspect_image(self, id: str) -> dict[str, Any]:
        if self.image is None:
            raise NoSuchImage("No such image")
        return self.image

    def connect_started(self, datastore: object, workload: Any, requests: Any, *rest: Any) -> Attachment:
        from netaddr import IPAddress

        self.calls.append((workload.id, requests, *rest))
        if self.error is not None:
            raise self.error
        addresses = [request.address or IPAddress("192.168.0.9") for request in requests]
        id = EndpointId("vm", "docker", workload.id, "e" * 32)
        return Attachment(id, addresses[0], DEFAULT_INTERFACE, None, others=tuple(addresses[1:]))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    world = World()
    monkeypatch.setattr(state, "DIRECTORY", tmp_path)
    monkeypatch.setattr(engine, "inspect", world.inspect)
    monkeypatch.setattr(engine, "inspect_image", world.inspect_image)
    monkeypatch.setattr(wiring, "connect_started", world.connect_started)
    return world


def test_a_labelled_container_is_connected(world: World) -> None:
    done = labelling.connect(world.datastore, ID)
    ((id, requests, interface, profiles),) = world.calls
    assert (id, interface, profiles) == (ID, None, ("web",))
    assert [(request.version, str(request.address or "")) for request in requests] == [(4, ""), (4, "192.168.0.1")]
    assert done.asks and done.action is not None
    assert done.action.text == (
        f"container {ID[:12]} (web) is connected as its labels ask: interface {'cali' + 'e' * 11}, "
        "192.168.0.9, 192.168.0.1"
    )


def test_containers_that_are_left_as_they_are(world: World) -> None:
    world.container = described()
    assert not labelling.connect(world.datastore, ID).asks
    world.container = described({"calico.ip": "ipv4"}, running=False)
    assert labelling.connect(world.datastore, ID) == labelling.Labelled(True)
    world.container = None
    assert labelling.connect(world.datastore, ID) == labelling.Labelled(True)
    world.container = described({"calico.ip": ""}, ["CALICO_IP=auto"])
    assert labelling.connect(world.datastore, ID) == labelling.Labelled(False), "the label wins"
    world.container = described({"calico.ip": "ipv4"})
    connected.put("vm", "docker", ID)
    world.datastore.create_endpoint(Endpoint(EndpointId("vm", "docker", ID, "e" * 32)))
    assert labelling.connect(world.datastore, ID) == labelling.Labelled(True)
    assert world.calls == []


def test_a_connected_container_whose_endpoint_is_gone_is_connected_when_it_starts(world: World) -> None:
    """For example, etcd was restored from an older copy."""
    connected.put("vm", "docker", ID)
    assert labelling.connect(world.datastore, ID).action is not None and len(world.calls) == 1


def test_labels_of_the_image_alone_ask_for_nothing_and_that_is_said(world: World) -> None:
    world.container = described({"calico.ip": "ipv4"})
    world.image = image({"calico.ip": "ipv4"})
    done = labelling.connect(world.datastore, ID)
    assert not done.asks and done.action is not None and world.calls == []
    assert done.action.text == (
        f"container {ID[:12]} (web) is not connected: label calico.ip is ignored, since it is the image's own"
    )


def test_an_image_that_is_gone_cannot_be_compared_with(world: World) -> None:
    world.image = None
    with pytest.raises(labelling.LabelsRefused, match="its image was removed"):
        labelling.connect(world.datastore, ID)


@pytest.mark.parametrize(
    ("own", "why"),
    [
        ({"calico.ip": "ipv5"}, "calico.ip: 'ipv5' is not a valid IP address"),
        ({"calico.ip": "ipv4", "calico.interface": "a/b"}, "calico.interface: 'a/b' is not a valid interface name"),
    ],
)
def test_values_that_make_no_sense_are_refused(world: World, own: dict[str, str], why: str) -> None:
    world.container = described(own)
    with pytest.raises(labelling.LabelsRefused, match=why):
        labelling.connect(world.datastore, ID)
    assert world.calls == []


def test_errors_of_the_container_are_told_from_those_of_the_store(world: World) -> None:
    world.error = AddressTaken("IP 192.168.0.1 is already assigned")
    with pytest.raises(labelling.LabelsRefused, match="is already assigned") as refused:
        labelling.connect(world.datastore, ID)
    assert refused.value.name == "web"
    world.error = StoreUnavailable("etcd is away")
    with pytest.raises(StoreUnavailable):
        labelling.connect(world.datastore, ID)


def test_a_container_that_a_command_has_disconnected_waits_for_its_next_start(world: World) -> None:
    connected.set_disconnected("vm", ID, STARTED)
    assert labelling.connect(world.datastore, ID) == labelling.Labelled(True) and world.calls == []
    assert world.container is not None
    world.container["State"]["StartedAt"] = "2026-01-02T03:05:00Z"
    labelling.connect(world.datastore, ID)
    assert len(world.calls) == 1


def test_a_container_that_was_disconnected_without_its_engine_waits_for_its_next_start_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connected, "now", lambda: "2026-01-02T03:04:06Z")
    connected.set_disconnected("vm", ID, "")
    assert connected.is_disconnected("vm", ID, STARTED)
    assert not connected.is_disconnected("vm", ID, "2026-01-02T03:04:07.1Z")
    assert connected.disconnected("vm") == {ID}
    connected.set_disconnected("vm", ID, STARTED)
    assert connected.is_disconnected("vm", ID, STARTED)
    assert not connected.is_disconnected("vm", ID, "2026-01-01T00:00:00Z"), "the clock was set back meanwhile"
    connected.forget_disconnected("vm", ID)
    assert connected.disconnected("vm") == set() and not connected.is_disconnected("vm", ID, STARTED)


def test_it_is_kept_that_a_connected_container_has_labels() -> None:
    connected.put("vm", "docker", ID, labelled=True)
    assert connected.get("vm", "docker", ID) == connected.Connected(labelled=True)
    assert connected.every("vm", "docker") == {ID: connected.Connected(labelled=True)}


@pytest.mark.parametrize("started_at", [STARTED, "", None])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_disconnected_container_is_noted_if_it_is_known_to_have_labels(
    started_at: str | None, labelled: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The start is unknown where the engine does not answer."""
    monkeypatch.setattr(locks, "DIRECTORY", tmp_path)
    datastore = DatastoreClient(MemoryStore(), "vm")
    connected.put("vm", "docker", ID, labelled=labelled)
    datastore.create_endpoint(Endpoint(EndpointId("vm", "docker", ID, "e" * 32)))
    wiring.disconnect(datastore, Workload("docker", ID, "web", started_at=started_at))
    assert connected.get("vm", "docker", ID) is None
    is_noted = started_at == STARTED or (started_at == "" and labelled)
    assert connected.disconnected("vm") == ({ID} if is_noted else set())
