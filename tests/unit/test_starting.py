"""What Docker's hook does with a container that is being started, and which containers the agent starts again."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import syslog
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calicoctl import engine, environment, files
from calicoctl.datastore.client import DatastoreClient
from calicoctl.errors import (
    AddressTaken,
    CalicoError,
    Conflict,
    DockerUnavailable,
    Frozen,
    NoSuchContainer,
    StoreUnavailable,
)
from calicoctl.workloads import connected, docker_hook, oci_hook, starting, wiring

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
        self.image_file.write_text(json.dumps({"config": {"Labels": labels}}))

    @property
    def image_file(self) -> Path:
        return self.root / f"image/overlay2/imagedb/content/sha256/{IMAGE}"


class Store:
    """A store in which addresses have owners, and containers may have endpoints."""

    host = "host1"

    def __init__(self) -> None:
        self.owners: dict[str, SimpleNamespace] = {}
        self.endpoints: list[str] = []
        self.away = self.frozen = False
        self.ipam = self.hosts = self

    def owner(self, address: Any) -> SimpleNamespace | None:
        return self.owners.get(str(address))

    def assign(self, address: str, container: str, host: str = "host1") -> None:
        self.owners[address] = SimpleNamespace(
            secondary={"host": host, "orchestrator": "docker", "workload": container}
        )

    def is_registered(self) -> bool:
        if self.away:
            raise StoreUnavailable("etcd is away")
        return True

    def is_frozen(self) -> bool:
        return self.frozen

    def workload_endpoint_ids(self, orchestrator: str, id: str) -> list[str]:
        return self.endpoints


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Docker:
    found = Docker(tmp_path)
    monkeypatch.setattr(docker_hook, "settings", lambda: SimpleNamespace(data_root=str(tmp_path)))
    monkeypatch.setattr(wiring, "connect_starting", lambda *arguments: found.connected.append(arguments) or True)
    return found


def test_a_container_is_connected_as_its_own_labels_ask(docker: Docker) -> None:
    docker.container({"calico.ip": "ipv4,ipv6", "calico.profile": "a,b", "calico.interface": "eth0"})
    starting.connect(Store(), STATE)
    ((_, workload, requests, interface, profiles, _),) = docker.connected
    assert (workload.id, workload.pid, workload.docker_name, workload.network_mode) == (ID, 42, "web", "none")
    assert workload.started_at and [request.version for request in requests] == [4, 6]
    assert interface == "eth0" and profiles == ("a", "b")


def test_labels_of_the_image_do_not_count(docker: Docker, monkeypatch: pytest.MonkeyPatch) -> None:
    docker.container({"calico.ip": "ipv4"})
    docker.image({"calico.ip": "ipv4"})
    assert starting.connect(Store(), STATE) == ("label calico.ip is ignored, since it is the image's own",)
    # whose they are is unknown, and those of an image alone keep no container from starting
    docker.image_file.unlink()
    starting.connect(Store(), STATE)
    docker.container({"calico.ip": "ipv4"}, Image="sha256:../../x")
    starting.connect(Store(), STATE)
    assert docker.connected == []


def test_the_system_s_log_tells_which_labels_are_ignored(docker: Docker, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(syslog, "syslog", told.append)
    settings = SimpleNamespace(variables={}, host="host1", data_root=docker.root)
    monkeypatch.setattr(docker_hook, "settings", lambda: settings)
    monkeypatch.setattr(environment, "complete", lambda: None)
    monkeypatch.setenv("HOSTNAME", "host1")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(DatastoreClient, "from_environment", lambda patience: Store())
    docker.image({"calico.profile": "web"})
    for labels, ignored in (({}, 0), ({"calico.profile": "web"}, 1)):
        docker.container({"calico.ip": "ipv4", **labels})
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(json.dumps(STATE).encode())))
        with pytest.raises(SystemExit) as end:
            starting.main()
        assert end.value.code == 0 and len(told) == ignored
    assert told == [f"container {ID[:12]}: label calico.profile is ignored, since it is the image's own"]


@pytest.mark.parametrize(
    ("error", "status"), [(Frozen("it is frozen"), oci_hook.TEMPORARY), (CalicoError("no such profile"), 1)]
)
def test_only_what_may_succeed_later_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: CalicoError, status: int
) -> None:
    def settings() -> None:
        raise error

    monkeypatch.setattr(docker_hook, "settings", settings)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        starting.main()
    assert end.value.code == status and capsys.readouterr().err == f"{oci_hook.PREFIX}{error}.\n"


@pytest.mark.parametrize("removed", [True, False], ids=["image-removed", "labels-invalid"])
def test_a_container_with_an_endpoint_gets_it_back_whatever_its_labels_are(
    docker: Docker, monkeypatch: pytest.MonkeyPatch, removed: bool
) -> None:
    docker.container({"calico.ip": "ipv4" if removed else "nonsense"})
    if removed:
        docker.image_file.unlink()
    known = connected.Connected(labelled=True)
    monkeypatch.setattr(connected, "get", lambda *key: known)
    starting.connect(Store(), STATE)
    ((_, workload, *asked, _),) = docker.connected
    assert workload.id == ID and asked == [(), None, ()]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"config": {"labels": {"calico.ip": "ipv4"}}}', "'labels' instead of Labels"),
        ('{"config": {"Label\u017f": {"calico.ip": "ipv4"}}}', "instead of Labels"),
        ('{"config": {"Label\\u017f": {"calico.ip": "ipv4"}}}', "instead of Labels"),
        ('{"Config": {"Labels": {"calico.ip": "ipv4"}}}', "'Config' instead of config"),
        ('{"config": {"ENV": ["CALICO_IP=auto"]}}', "'ENV' instead of Env"),
        ('{"config": {"Labels": {"calico.ip": "ipv4"}}, "config": {}}', "a name twice"),
        ('{"config": {"Labels": {"calico.ip": "ipv4"}, "Labels": {}}}', "a name twice"),
        ('{"config": {"Labels": {"calico.profile": "\\ud800"}}}', "surrogates not allowed"),
    ],
)
def test_what_the_engine_may_read_otherwise_is_refused(docker: Docker, text: str, why: str) -> None:
    docker.container({"calico.ip": "ipv4"})
    docker.image_file.write_text(text)
    with pytest.raises(CalicoError, match="unusual configuration") as refused:
        starting.connect(Store(), STATE)
    assert why in str(refused.value) and docker.connected == []
    docker.image_file.write_text('{"config": {"Labels": {"labels": "a", "Labels": "b"}}, "Other": 1}')
    starting.connect(Store(), STATE)
    assert len(docker.connected) == 1


def test_the_address_of_a_removed_container_is_waited_for(docker: Docker, monkeypatch: pytest.MonkeyPatch) -> None:
    store, old = Store(), "ef" * 32
    attempts: list[int] = []

    def connect(*arguments: Any) -> None:
        attempts.append(1)
        if len(attempts) == 3:
            store.owners.clear()
        if store.owners:
            raise AddressTaken("IP 10.0.0.1 is assigned.")

    monkeypatch.setattr(wiring, "connect_starting", connect)
    monkeypatch.setattr(starting, "PATIENCE", 60)
    monkeypatch.setattr(starting, "PAUSE", 0)
    docker.container({"calico.ip": "10.0.0.1"})
    store.assign("10.0.0.1", old)
    starting.connect(store, STATE)
    assert len(attempts) == 3
    # it may take longer, for example if the agent does not run
    monkeypatch.setattr(starting, "PATIENCE", -1)
    attempts.clear()
    store.assign("10.0.0.1", old)
    with pytest.raises(Conflict, match="Its container was removed"):
        starting.connect(store, STATE)
    # others keep it
    (docker.root / "containers" / old).mkdir()
    for container, host in ((old, "host1"), ("ee" * 32, "host2"), ("-var-run-netns-a", "host1")):
        monkeypatch.setattr(starting, "PATIENCE", 60)
        attempts.clear()
        store.assign("10.0.0.1", container, host)
        with pytest.raises(AddressTaken):
            starting.connect(store, STATE)
        assert len(attempts) == 1


@pytest.mark.parametrize(
    "state", [{}, {**STATE, "id": "../x"}, {**STATE, "id": None}, {**STATE, "pid": 0}, {**STATE, "pid": True}]
)
def test_a_state_that_names_no_container_is_refused(docker: Docker, state: dict) -> None:
    with pytest.raises(CalicoError, match="which container it is"):
        starting.connect(Store(), state)


def test_files_of_docker_that_cannot_be_read_are_named(docker: Docker) -> None:
    path = docker.root / "containers" / ID / "config.v2.json"
    for text in ("{", "[]", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(CalicoError, match="a file of Docker"):
            starting.connect(Store(), STATE)


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
        "Id": ID,
        "Name": "/web",
        "Config": {},
        "State": {"Running": False, "Error": failure},
        "HostConfig": {"RestartPolicy": {"Name": policy, "MaximumRetryCount": most}},
        "RestartCount": restarts,
    }
    monkeypatch.setattr(files, "RUN", tmp_path)
    monkeypatch.setattr(engine, "inspect", lambda id: container)
    monkeypatch.setattr(engine, "start", started.append)
    store = Store()
    note = tmp_path / f"host1/start-again.{ID}"
    note.parent.mkdir()

    def attempt() -> bool:
        note.touch()
        (tmp_path / "host1/start-again.other").touch()
        assert starting.waiting("host1") == [ID]
        started.clear()
        starting.start_again(store, ID)
        assert not note.exists()
        return started == [ID]

    assert attempt() == starts
    container["State"]["Running"] = True
    assert not attempt()
    container["State"] = {"Running": False, "Error": "no such program"}
    assert not attempt(), "its start has failed for another reason"


class Waiting:
    """A container that was kept from starting; starting it does what `start` is."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = Store()
        self.note = folder / f"host1/start-again.{ID}"
        self.note.parent.mkdir()
        self.note.touch()
        os.utime(self.note, (1, 1))
        self.start: Any = lambda id: None
        self.alive = True
        container = {
            "Id": ID,
            "Name": "/web",
            "Config": {"Labels": {"calico.ip": "10.0.0.1"}},
            "State": {"Running": False, "Error": f"{oci_hook.PREFIX}etcd is away"},
            "HostConfig": {"RestartPolicy": {"Name": "always"}},
        }
        monkeypatch.setattr(files, "RUN", folder)
        monkeypatch.setattr(engine, "inspect", lambda id: container)
        monkeypatch.setattr(engine, "start", lambda id: self.start(id))
        monkeypatch.setattr(engine, "info", self.info)

    def info(self) -> dict:
        if not self.alive:
            raise DockerUnavailable("it has ended")
        return {}


@pytest.fixture
def waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Waiting:
    return Waiting(tmp_path, monkeypatch)


def test_a_container_waits_until_the_store_is_back(waiting: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(id: str) -> dict:
        raise NoSuchContainer(id)

    monkeypatch.setattr(engine, "inspect", gone)
    assert starting.waiting("host2") == []
    for waiting.store.away, waiting.store.frozen in ((True, False), (False, True)):
        with pytest.raises(StoreUnavailable):
            starting.start_again(waiting.store, ID)
        assert waiting.note.exists()
    waiting.store.frozen = False
    assert starting.start_again(waiting.store, ID) is None and not waiting.note.exists()


def test_a_container_waits_for_its_address(waiting: Waiting) -> None:
    waiting.store.assign("10.0.0.1", "ef" * 32)
    waiting.start = lambda id: pytest.fail("it would fail")
    assert starting.start_again(waiting.store, ID) is None and waiting.note.exists()
    waiting.start = lambda id: None
    waiting.store.endpoints = ["its own"]
    assert starting.start_again(waiting.store, ID) is not None and not waiting.note.exists()


def test_a_start_that_fails_is_repeated_only_if_it_may_succeed(waiting: Waiting) -> None:
    def is_repeated(again: bool = False, alive: bool = True) -> bool:
        def start(id: str) -> None:
            assert waiting.note.exists(), "the agent may be killed now"
            if again:
                os.utime(waiting.note)
            waiting.alive = alive
            raise DockerUnavailable("it does not start")

        waiting.start = start
        with pytest.raises(DockerUnavailable):
            starting.start_again(waiting.store, ID)
        return waiting.note.exists()

    assert is_repeated(alive=False)
    assert is_repeated(again=True)
    assert not is_repeated()
