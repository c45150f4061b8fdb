"""Docker's hook: Docker's configuration, the script of the runtime, and what the runtime calls."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from calicoctl.errors import CalicoError
from calicoctl.workloads import docker_hook, labels, oci_hook
from calicoctl.workloads.docker_hook import Settings

ID = "ab" * 32


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(docker_hook, "FOLDER", tmp_path / "hook")
    return tmp_path / "hook"


def settings(tmp_path: Path, **others: object) -> Settings:
    runtime = tmp_path / "my runtime"
    runtime.write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    runtime.chmod(0o755)
    values = {
        "host": "host1",
        "command": str(tmp_path / "bin/calicoctl"),
        "data_root": str(tmp_path / "data"),
        "variables": {},
        "configuration": str(tmp_path / "daemon.json"),
        "made": False,
        "default": None,
        "runtime": [str(runtime), "--its own"],
        **others,
    }
    return Settings(**values)


def container(tmp_path: Path, config: dict) -> None:
    path = tmp_path / "data/containers" / ID
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.v2.json").write_text(json.dumps({"Config": config}))


def create(folder: Path, bundle: Path, config: dict | None = None) -> tuple[list[str], dict]:
    """Call the runtime's script as Docker does; return the words that the real runtime gets, and the configuration."""
    (bundle / "config.json").write_text(json.dumps({"ociVersion": "1.0.2", **(config or {})}))
    words = [folder / "runtime", "--root", "/run", "create", "--bundle", bundle, "--pid-file", "a b", ID]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return done.stdout.splitlines(), json.loads((bundle / "config.json").read_text())


def test_the_runtime_adds_the_hook_to_containers_with_labels_alone(folder: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    docker_hook._write_files(settings(tmp_path))
    for config, asks in (
        ({"Labels": {"calico.ip": "ipv4"}}, True),
        ({"Labels": {"calico.ip": " "}, "Env": None}, False),
        ({"Labels": None, "Env": ["CALICO_IP=auto"]}, True),
        ({"Labels": {"other": "calico.ip"}, "Env": ["CALICO_IP=", "MY_CALICO_IP=1"]}, False),
        ({"Labels": {}, "Cmd": ["sleep"]}, False),
    ):
        container(tmp_path, config)
        said, made = create(folder, bundle)
        assert said == ["--its own", "--root", "/run", "create", "--bundle", str(bundle), "--pid-file", "a b", ID]
        assert ("hooks" in made) == asks == labels.is_labelled({"Config": config})
    container(tmp_path, {"Labels": {"calico.ip": "ipv4"}})
    before = {"prestart": [{"path": "/a"}], "createRuntime": [{"path": "/b"}]}
    _, made = create(folder, bundle, {"hooks": before, "number": 18446744073709551615})
    first, ours = made["hooks"]["createRuntime"]
    assert made["hooks"]["prestart"] == before["prestart"] and first == {"path": "/b"}
    assert made["number"] == 18446744073709551615
    assert ours["args"][3:] == [str(folder / "hook.py"), "connect", "host1", str(tmp_path / "bin/calicoctl"), ID]
    assert ours["timeout"] > oci_hook.SECONDS + oci_hook.KILL_AFTER
    # a container that this host's engine does not have, and other commands
    (tmp_path / "data/containers" / ID / "config.v2.json").unlink()
    assert "hooks" not in create(folder, bundle)[1]
    done = subprocess.run([folder / "runtime", "delete", ID], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["--its own", "delete", ID]


def test_what_the_hook_cannot_be_added_to_does_not_start(folder: Path, tmp_path: Path) -> None:
    docker_hook._write_files(settings(tmp_path))
    container(tmp_path, {"Labels": {"calico.ip": "ipv4"}})
    log = tmp_path / "log.json"
    words = [folder / "runtime", "--log", log, "create", "--bundle", tmp_path / "none", ID]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    said = json.loads(log.read_text())
    assert said["level"] == "error" and said["msg"].startswith("Calico: the hook could not be added to the container")


CONFIG = {"labels": ["ä"], "runtimes": {"mine": {"path": "/x"}}, "default-runtime": "mine", "n": 1.5}


def test_docker_s_configuration_keeps_what_it_has(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "daemon.json"
    path.write_text(json.dumps(CONFIG, indent=8))
    path.chmod(0o600)
    _, config = docker_hook._read(path)
    ours = docker_hook._with_ours(config)
    docker_hook._replace(path, ours)
    assert path.stat().st_mode & 0o777 == 0o600
    entry = {"path": str(folder / "runtime")}
    expected = {**CONFIG, "runtimes": {"mine": {"path": "/x"}, "calico": entry}, "default-runtime": "calico"}
    assert json.loads(path.read_text()) == expected and list(json.loads(path.read_text())) == list(CONFIG)
    assert docker_hook._with_ours(ours) == ours, "the second time"
    before = settings(tmp_path, default="mine")
    assert docker_hook._without_ours(ours, before, keep_entry=False) == CONFIG
    kept = docker_hook._without_ours(ours, before, keep_entry=True)
    assert kept == {**CONFIG, "runtimes": {**CONFIG["runtimes"], "calico": entry}}
    # what somebody else has changed meanwhile stays
    changed = {**ours, "default-runtime": "other", "runtimes": {"calico": {"path": "/theirs"}}}
    assert docker_hook._without_ours(changed, before, keep_entry=False) == changed
    assert docker_hook._without_ours(docker_hook._with_ours({}), settings(tmp_path), keep_entry=False) == {}


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", "1", '{"a": 1, "a": 2}', '{"runtimes": []}', '{"default-runtime": 1}', '{"a": 1.10}', "\ufeff{}"),
        *('{"a": NaN}', "// a comment\n{}", "[" * 100_000),
    ],
)
def test_a_configuration_that_would_lose_something_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "daemon.json"
    path.write_text(text)
    with pytest.raises(CalicoError, match="is not changed"):
        docker_hook._read(path)
    assert path.read_text() == text


def test_the_default_runtime_must_be_a_program() -> None:
    described = {"Runtimes": {"runc": {"path": "/usr/bin/runc"}}}
    config = {"runtimes": {"a": {"path": "/a", "runtimeArgs": ["--b"]}, "kata": {"runtimeType": "io.kata"}, "c": {}}}
    assert docker_hook._words_of("runc", config, described) == ["/usr/bin/runc"]
    assert docker_hook._words_of("runc", {}, {}) == ["runc"]
    assert docker_hook._words_of("a", config, described) == ["/a", "--b"]
    for name in ("kata", "c", "unknown"):
        with pytest.raises(CalicoError, match=f"default runtime of Docker, {name}"):
            docker_hook._words_of(name, config, described)


class Server:
    """Answers one request at the hook's socket."""

    def __init__(self, run: Path, answer: bytes) -> None:
        (run / "host1").mkdir(parents=True)
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(run / "host1/hook.sock"))
        self.socket.listen()
        self.request = b""
        self._answer = answer
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        channel, _ = self.socket.accept()
        self.request = channel.recv(65536)
        channel.sendall(self._answer)
        if self._answer:
            channel.close()
        else:
            self.kept = channel  # and never answers


@pytest.mark.parametrize(
    ("answer", "said", "again"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n{}", None, False),
        (b'HTTP/1.1 400 Bad Request\r\n\r\n{"Err": "no pool."}', "Calico: no pool.\n", False),
        (b'HTTP/1.1 200 OK\r\n\r\n{"Err": "etcd is away", "Again": true}', "Calico: etcd is away.\n", True),
        (b"HTTP/1.1 200 OK\r\n\r\n", "Calico: the server of the hook has ended.\n", True),
        (b"nonsense", "Calico: the server of the hook has ended.\n", True),
        (b"", "Calico: it was not connected within 0 s.\n", True),
    ],
)
def test_the_hook_asks_the_server(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    answer: bytes,
    said: str | None,
    again: bool,
) -> None:
    monkeypatch.setattr(oci_hook, "RUN", str(tmp_path))
    monkeypatch.setattr(oci_hook, "SECONDS", 5 if answer else 0.2)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b'{"id": "a"}')))
    server = Server(tmp_path, answer)
    if said is None:
        oci_hook.connect("host1", "calicoctl", ID)
    else:
        with pytest.raises(SystemExit, match="1"):
            oci_hook.connect("host1", "calicoctl", ID)
    assert server.request == b'POST /connect HTTP/1.0\r\nContent-Length: 11\r\n\r\n{"id": "a"}'
    assert capsys.readouterr().err == (said or "")
    assert (tmp_path / "host1" / f"start-again.{ID}").exists() == again


@pytest.mark.parametrize(
    ("script", "succeeds", "again"),
    [("exit 0", True, False), ("exit 1", False, False), ("exit 75", False, True), ("exec sleep 60", False, True)],
)
def test_without_a_server_a_new_process_connects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, succeeds: bool, again: bool
) -> None:
    monkeypatch.setattr(oci_hook, "RUN", str(tmp_path))
    monkeypatch.setattr(oci_hook, "SECONDS", 0.3 if "sleep" in script else 30)
    python = tmp_path / "tree/python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/words\n{script}\n')
    python.chmod(0o755)
    (tmp_path / "tree/calicoctl").touch()
    (tmp_path / "calicoctl").symlink_to("tree/calicoctl")
    status = 0
    try:
        oci_hook.connect("host1", str(tmp_path / "calicoctl"), ID)
    except SystemExit as end:
        status = end.code
    assert (status == 0) == succeeds
    assert (tmp_path / "words").read_text() == f"-I -c {oci_hook.PROGRAM}\n"
    assert (tmp_path / "host1" / f"start-again.{ID}").exists() == again


def test_the_hook_needs_no_module_of_ours(tmp_path: Path) -> None:
    copy = tmp_path / "hook.py"
    copy.write_text(Path(oci_hook.__file__).read_text())
    script = f"import sys; exec(open({str(copy)!r}).read().partition('if __name__')[0]); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script], check=True, capture_output=True, text=True, env=dict(os.environ)
    )
    loaded = done.stdout.split()
    assert not {"pathlib", "subprocess", "urllib", "http"} & {*loaded} and "calicoctl" not in done.stdout
