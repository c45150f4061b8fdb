"""What Docker's hook does with a container that is being started, and which containers the agent starts again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calicoctl import engine, files
from calicoctl.errors import CalicoError, NoSuchContainer, StoreUnavailable
from calicoctl.workloads import docker_hook, oci_hook, starting, wiring

ID, IMAGE = "ab" * 32, "cd" * 32
STATE = {"id": ID, "pid": 42, "status": "created"}


class Docker:
    """The data folder of an engine with one container; `connected` are the calls of connect_starting."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.connected: list[tuple[Any, ...]] = []
        (root / "containers" / ID).mkdir(parents=True)
        (root / "image/overlay2/imagedb/content/sha256").mkdir(parents=True)
        self.container()
        self.image()

    def container(self, labels: dict | None = None, mode: str = "none", **others: Any) -> None:
        config = {"Name": "/web", "Image": f"sha256:{IMAGE}", "Config": {"Labels": labels}, **others}
        folder = self.root / "containers" / ID
        (folder / "config.v2.json").write_text(json.dumps(config))
        (folder / "hostconfig.json").write_text(json.dumps({"NetworkMode": mode}))

    def image(self, labels: dict | None = None) -> None:
        path = self.root / f"image/overlay2/imagedb/content/sha256/{IMAGE}"
        path.write_text(json.dumps({"config": {"Labels": labels}}))


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Docker:
    found = Docker(tmp_path)
    monkeypatch.setattr(docker_hook, "settings", lambda: SimpleNamespace(data_root=str(tmp_path)))
    monkeypatch.setattr(wiring, "connect_starting", lambda *arguments: found.connected.append(arguments))
    return found


def test_a_container_is_connected_as_its_own_labels_ask(docker: Docker) -> None:
    docker.container({"calico.ip": "ipv4,ipv6", "calico.profile": "a,b", "calico.interface": "eth0"})
    starting.connect(None, STATE)
    ((_, workload, requests, interface, profiles, _),) = docker.connected
    assert (workload.id, workload.pid, workload.docker_name, workload.network_mode) == (ID, 42, "web", "none")
    assert workload.started_at and [request.version for request in requests] == [4, 6]
    assert interface == "eth0" and profiles == ("a", "b")


def test_labels_of_the_image_do_not_count(docker: Docker) -> None:
    docker.container({"calico.ip": "ipv4"})
    docker.image({"calico.ip": "ipv4"})
    starting.connect(None, STATE)
    assert docker.connected == []
    (docker.root / f"image/overlay2/imagedb/content/sha256/{IMAGE}").unlink()
    with pytest.raises(CalicoError, match="its image was removed"):
        starting.connect(None, STATE)
    docker.container({"calico.ip": "ipv4"}, Image="sha256:../../x")
    with pytest.raises(CalicoError, match="its image was removed"):
        starting.connect(None, STATE)


@pytest.mark.parametrize(
    "state", [{}, {**STATE, "id": "../x"}, {**STATE, "id": None}, {**STATE, "pid": 0}, {**STATE, "pid": True}]
)
def test_a_state_that_names_no_container_is_refused(docker: Docker, state: dict) -> None:
    with pytest.raises(CalicoError, match="which container it is"):
        starting.connect(None, state)


def test_files_of_docker_that_cannot_be_read_are_named(docker: Docker) -> None:
    path = docker.root / "containers" / ID / "config.v2.json"
    for text in ("{", "[]", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(CalicoError, match="a file of Docker"):
            starting.connect(None, STATE)


@pytest.mark.parametrize(
    ("policy", "most", "restarts", "starts"),
    [
        ("always", 0, 0, True),
        ("unless-stopped", 0, 0, True),
        ("on-failure", 0, 7, True),
        ("on-failure", 2, 1, True),
        ("on-failure", 2, 2, False),
        ("no", 0, 0, False),
        ("", 0, 0, False),
    ],
)
def test_containers_are_started_again_as_their_restart_policy_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, most: int, restarts: int, starts: bool
) -> None:
    started: list[str] = []
    failure = f"OCI runtime create failed: … stderr: {oci_hook.PREFIX}etcd does not answer.: unknown"
    container = {
        "Name": "/web",
        "State": {"Running": False, "Error": failure},
        "HostConfig": {"RestartPolicy": {"Name": policy, "MaximumRetryCount": most}},
        "RestartCount": restarts,
    }
    monkeypatch.setattr(files, "RUN", tmp_path)
    monkeypatch.setattr(engine, "inspect", lambda id: container)
    monkeypatch.setattr(engine, "start", started.append)
    datastore: Any = SimpleNamespace(host="host1", hosts=SimpleNamespace(is_registered=lambda: True))
    note = tmp_path / f"host1/start-again.{ID}"
    note.parent.mkdir()

    def attempt() -> bool:
        note.touch()
        (tmp_path / "host1/start-again.other").touch()
        assert starting.waiting("host1") == [ID]
        started.clear()
        starting.start_again(datastore, ID)
        assert not note.exists()
        return started == [ID]

    assert attempt() == starts
    container["State"]["Running"] = True
    assert not attempt()
    container["State"] = {"Running": False, "Error": "no such program"}
    assert not attempt(), "its start has failed for another reason"


def test_a_container_waits_until_the_store_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away() -> bool:
        raise StoreUnavailable("etcd is away")

    def gone(id: str) -> dict:
        raise NoSuchContainer(id)

    monkeypatch.setattr(files, "RUN", tmp_path)
    monkeypatch.setattr(engine, "inspect", gone)
    datastore: Any = SimpleNamespace(host="host1", hosts=SimpleNamespace(is_registered=away))
    assert starting.waiting("host1") == []
    note = tmp_path / f"host1/start-again.{ID}"
    note.parent.mkdir()
    note.touch()
    with pytest.raises(StoreUnavailable):
        starting.start_again(datastore, ID)
    assert note.exists()
    datastore.hosts.is_registered = lambda: True
    assert starting.start_again(datastore, ID) is None and not note.exists()
