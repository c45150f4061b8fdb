"""Docker's hook: Docker's configuration, the script of the runtime, and what the runtime calls."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import pytest

from calicoctl import engine, environment, files, proc
from calicoctl.diagnose import checks
from calicoctl.errors import CalicoError, DockerUnavailable
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
    assert ours["timeout"] > oci_hook.SECONDS + oci_hook.PROCESS_SECONDS + oci_hook.KILL_AFTER
    # a container that this host's engine does not have, and other commands
    (tmp_path / "data/containers" / ID / "config.v2.json").unlink()
    assert "hooks" not in create(folder, bundle)[1]
    done = subprocess.run([folder / "runtime", "delete", ID], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["--its own", "delete", ID]


def test_the_hook_s_program_is_copied_in_every_locale(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from calicoctl.workloads import docker_hook as hook; "
        "hook.FOLDER = Path(sys.argv[1]); "
        "hook._write_files(hook.Settings('host1', 'calicoctl', '/d', {}, '/c', False, None, ['runc']))"
    )
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "hook")], env=ascii_only, check=True)
    assert (tmp_path / "hook" / "hook.py").read_bytes() == Path(oci_hook.__file__).read_bytes()


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
    docker_hook._put(path, docker_hook._encoded(ours))
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
    # the engine would not start with a default runtime that it does not know
    alone = docker_hook._with_ours({"labels": []})
    assert docker_hook._without_ours(alone, before, keep_entry=False) == {"labels": []}
    stock = settings(tmp_path, default="runc")
    assert docker_hook._without_ours(alone, stock, keep_entry=False) == {"labels": [], "default-runtime": "runc"}


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
    config["runtimes"] |= {"d": {"path": "/d", "runtimeArgs": 7}, "e": {"path": "/e", "runtimeArgs": [7]}}
    assert docker_hook._words_of("runc", config, described) == ["/usr/bin/runc"]
    assert docker_hook._words_of("runc", {}, {}) == ["runc"]
    assert docker_hook._words_of("a", config, described) == ["/a", "--b"]
    described["Runtimes"]["io.containerd.runc.v2"] = {"path": "runc"}
    for name in ("kata", "c", "d", "e", "unknown", "io.containerd.runc.v2"):
        with pytest.raises(CalicoError, match=f"default runtime of Docker, {name}"):
            docker_hook._words_of(name, config, described)


@pytest.mark.parametrize(
    ("script", "refused"),
    [
        ("""echo '{"hooks": ["prestart", "createRuntime"]}'""", False),
        ("""echo '{"hooks": ["prestart"]}'""", True),
        ("""echo '{"hooks": []}'""", True),
        *(("""echo '{"hooks": ["prestart"]}'; exit 1""", False), ("echo '{}'", False), ("echo []", False)),
        ("echo unknown command features", False),
    ],
)
def test_a_runtime_without_such_hooks_is_refused(tmp_path: Path, script: str, refused: bool) -> None:
    runtime = tmp_path / "runtime"
    runtime.write_text(f'#!/bin/sh\n[ "$1" = features ] || exit 9\n{script}\n')
    runtime.chmod(0o755)
    with pytest.raises(CalicoError, match="calls no hooks") if refused else nullcontext():
        docker_hook._refuse_without_hooks(runtime)


class Engine:
    """An engine of Docker that reads its configuration file whenever it is told to, as process 42."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.default = "runc"
        self.containers: list[str] = []
        self.alive = True
        self.obeys = True
        self.asked_at: set[str | None] = set()
        self.seen: list[dict] = []

    def reload(self, daemon: int, default: str) -> None:
        if not self.alive:
            raise DockerUnavailable("it has ended")
        config = json.loads(self.path.read_text())
        self.seen.append(config)
        if not self.obeys:
            raise CalicoError("the Docker Engine (process 42) has not taken it")
        self.default = config.get("default-runtime", self.default)

    def info(self) -> dict:
        if not self.alive:
            raise DockerUnavailable("it has ended")
        self.asked_at.add(os.environ.get("DOCKER_HOST"))
        return {"DefaultRuntime": self.default, "DockerRootDir": "/data", "Runtimes": {"runc": {"path": "runc"}}}

    def process(self) -> int:
        self.info()
        return 42

    def using(self, runtime: str) -> list[str]:
        self.info()
        assert self.default != runtime, "a container that is created now would not be in the list"
        return self.containers


@pytest.fixture
def an_engine(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    found = Engine(tmp_path / "daemon.json")
    monkeypatch.setattr(engine, "info", found.info)
    monkeypatch.setattr(docker_hook, "_engine_process", found.process)
    monkeypatch.setattr(docker_hook, "_configuration_of", lambda daemon: found.path)
    monkeypatch.setattr(docker_hook, "_refuse_unsuitable", lambda *_: None)
    monkeypatch.setattr(docker_hook, "_refuse_other_root", lambda daemon: None)
    monkeypatch.setattr(docker_hook, "_reload", found.reload)
    monkeypatch.setattr(docker_hook, "_containers_of", found.using)
    monkeypatch.setattr(proc, "running_since", lambda pid: "1" if found.alive else None)
    monkeypatch.setattr(files, "RUN", tmp_path / "run")
    monkeypatch.setenv("DOCKER_HOST", "unix:///its.sock")
    return found


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mode) for path in folder.glob("*")}


def test_the_hook_is_set_up_and_removed(an_engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    an_engine.path.write_text('{"labels": ["a"]}')
    assert docker_hook.set_up("host1") and not docker_hook.set_up("host1")
    assert an_engine.default == "calico"
    entry = {"path": str(folder / "runtime")}
    with_hook = {"labels": ["a"], "runtimes": {"calico": entry}, "default-runtime": "calico"}
    assert json.loads(an_engine.path.read_text()) == with_hook
    # the engine is the one that the hook was set up for; and its file is not what it was when the removal began
    monkeypatch.delenv("DOCKER_HOST")
    an_engine.asked_at.clear()

    def using(runtime: str) -> list[str]:
        config = json.loads(an_engine.path.read_text())
        assert config == {"labels": ["a"], "runtimes": {"calico": entry}}
        an_engine.path.write_text(json.dumps({**config, "debug": True}))
        return an_engine.using(runtime)

    monkeypatch.setattr(docker_hook, "_containers_of", using)
    assert docker_hook.remove() is None
    assert an_engine.default == "runc" and an_engine.asked_at == {"unix:///its.sock"}
    assert "DOCKER_HOST" not in os.environ
    assert json.loads(an_engine.path.read_text()) == {"labels": ["a"], "debug": True} and not folder.exists()


def test_the_hook_is_for_one_engine(
    an_engine: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docker_hook.set_up("host1")
    kept, first = tree(folder), an_engine.path
    roots: dict[str | None, str] = {"unix:///its.sock": "/data", "unix:///second.sock": "/second"}
    monkeypatch.setenv("DOCKER_HOST", "unix:///second.sock")

    def info() -> dict:
        found = roots.get(os.environ.get("DOCKER_HOST"))
        if found is None:
            raise DockerUnavailable("nothing listens")
        return {**an_engine.info(), "DockerRootDir": found}

    monkeypatch.setattr(engine, "info", info)
    for path in (first, tmp_path / "second.json"):
        monkeypatch.setattr(docker_hook, "_configuration_of", lambda daemon, path=path: path)
        with pytest.raises(CalicoError, match="set up for the Docker Engine with the data in /data, whose conf"):
            docker_hook.set_up("host1")
        assert tree(folder) == kept and not (tmp_path / "second.json").exists()
    # the first engine's file does not name the runtime any more
    monkeypatch.setattr(an_engine, "path", tmp_path / "second.json")
    an_engine.default = "runc"
    first.write_text("{}")
    assert docker_hook.set_up("host1")
    # it is the same engine: its data was moved, and then its socket as well
    roots = {"unix:///second.sock": "/third"}
    docker_hook.set_up("host1")
    roots = {"unix:///third.sock": "/fourth"}
    monkeypatch.setenv("DOCKER_HOST", "unix:///third.sock")
    docker_hook.set_up("host1")
    found = docker_hook.settings()
    assert found is not None and found.data_root == "/fourth"
    # it has another configuration file, a copy
    third = tmp_path / "third.json"
    third.write_text(an_engine.path.read_text())
    monkeypatch.setattr(docker_hook, "_configuration_of", lambda daemon: third)
    docker_hook.set_up("host1")
    found = docker_hook.settings()
    assert found is not None and found.configuration == str(third) and found.default is None


def test_the_runtime_stays_while_it_may_be_needed(an_engine: Engine, folder: Path) -> None:
    docker_hook.set_up("host1")
    entry = {"runtimes": {"calico": {"path": str(folder / "runtime")}}}
    an_engine.alive = False
    assert "Docker does not answer" in str(docker_hook.remove())
    assert json.loads(an_engine.path.read_text()) == entry
    an_engine.alive, an_engine.containers = True, ["ab"]
    assert "would not start 1 container without it (ab)" in str(docker_hook.remove())
    assert "hook.py" not in (folder / "runtime").read_text()
    assert (folder / "hook.py").exists(), "the hook of a container that is just being started"
    assert an_engine.default == "runc" and json.loads(an_engine.path.read_text()) == entry
    an_engine.containers = []
    assert docker_hook.remove() is None
    assert not an_engine.path.exists() and not folder.exists()


def test_a_default_runtime_that_is_gone_is_not_made_the_default_again(an_engine: Engine, folder: Path) -> None:
    an_engine.path.write_text('{"runtimes": {"mine": {"path": "/mine"}}, "default-runtime": "mine"}')
    docker_hook.set_up("host1")
    config = json.loads(an_engine.path.read_text())
    del config["runtimes"]["mine"]
    an_engine.path.write_text(json.dumps(config))
    assert "no runtime mine any more" in str(docker_hook.remove())
    assert json.loads(an_engine.path.read_text()) == {} and an_engine.default == "runc"


@pytest.mark.parametrize(
    "before", [[], ["settings.json", "hook.py", "runtime"], ["settings.json"], ["hook.py"]], ids=" ".join
)
@pytest.mark.parametrize("dies", [False, True], ids=["refuses", "dies"])
def test_a_set_up_that_fails_puts_back_what_was(
    an_engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch, before: list[str], dies: bool
) -> None:
    an_engine.path.write_text('{"labels":   ["a"]}')
    if before:
        docker_hook.set_up("host1")
        for name in tree(folder).keys() - before:
            (folder / name).unlink()
        an_engine.path.write_text('{"labels":   ["b"]}')
    content, kept = an_engine.path.read_bytes(), tree(folder)

    def reload(daemon: int, default: str) -> None:
        an_engine.alive = not dies
        raise CalicoError("its log says why")

    monkeypatch.setattr(docker_hook, "_reload", reload)
    with pytest.raises(CalicoError, match="its log says why"):
        docker_hook.set_up("host2")
    assert an_engine.path.read_bytes() == content and tree(folder) == kept
    assert sorted(kept) == sorted(before)


def test_files_that_the_engine_uses_stay(an_engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reload(daemon: int, default: str) -> None:
        an_engine.default = "calico"
        raise CalicoError("its log says why")

    monkeypatch.setattr(docker_hook, "_reload", reload)
    with pytest.raises(CalicoError, match="its log says why"):
        docker_hook.set_up("host1")
    assert (folder / "runtime").exists() and not an_engine.path.exists()


OTHERS = {"mine": {"path": "/my runtime", "runtimeArgs": ["--a b"]}, "other": {"path": "/other"}}


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "null",
        '{"host": "a"}',
        {"runtime": [1]},
        {"runtime": []},
        {"host": 1},
        {"variables": []},
        {"made": 1},
    ],
)
@pytest.mark.parametrize("default", [None, "runc", "mine"])
def test_damaged_settings_are_written_anew(
    an_engine: Engine, folder: Path, damage: str | dict, default: str | None
) -> None:
    config = {"runtimes": OTHERS, **({"default-runtime": default} if default else {})}
    an_engine.path.write_text(json.dumps(config))
    docker_hook.set_up("host1")
    file = folder / "settings.json"
    if isinstance(damage, dict):
        damage = json.dumps({**json.loads(file.read_text()), **damage})
    file.write_text(damage)
    with pytest.raises(CalicoError, match="--docker-hook' writes it anew"):
        docker_hook.remove()
    docker_hook.set_up("host1")
    found = docker_hook.settings()
    assert found is not None and found.host == "host1"
    assert docker_hook.remove() is None
    left = json.loads(an_engine.path.read_text())
    assert left.pop("default-runtime", "runc") == (default or "runc") and left == {"runtimes": OTHERS}


def test_without_its_files_the_hook_does_not_guess_the_former_default(an_engine: Engine, folder: Path) -> None:
    docker_hook.set_up("host1")
    for name in ("settings.json", "runtime"):
        (folder / name).write_text("")
    with pytest.raises(CalicoError, match="what was the default before is unknown"):
        docker_hook.set_up("host1")


def test_the_engine_is_found_among_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def process(number: int | str, name: bytes, **namespaces: str) -> None:
        folder = tmp_path / str(number)
        (folder / "ns").mkdir(parents=True)
        (folder / "comm").write_bytes(name + b"\n")
        for kind in ("pid", "mnt"):
            (folder / "ns" / kind).symlink_to(namespaces.get(kind, f"{kind}:[1]"))

    monkeypatch.setattr(docker_hook, "_PROC", tmp_path)
    process("self", b"calicoctl")
    process(2, b"\xff\xfe")
    monkeypatch.setattr(docker_hook, "_is_root_s", lambda pid: pid != 3)
    process(3, b"dockerd")
    process(4, b"dockerd", pid="pid:[2]", mnt="mnt:[2]")
    process(5, b"dockerd", mnt="mnt:[2]")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "docker.sock"))
    listening.listen()  # as systemd does for it
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    assert docker_hook._engine_process() == 5, "it may have mounts of its own"
    process(6, b"dockerd")
    assert docker_hook._engine_process() == 6
    process(7, b"dockerd")
    with pytest.raises(CalicoError, match="2 processes here"):
        docker_hook._engine_process()


def test_the_hook_keeps_what_selects_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in environment.STORE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CALICO_ENV_FILE", "node.env")
    (tmp_path / "node.env").write_text("ETCD_ENDPOINTS=https://a:1\nETCD_CA_CERT_FILE=/ca\n")
    file = {"CALICO_ENV_FILE": str(tmp_path / "node.env")}
    monkeypatch.setenv("ETCD_ENDPOINTS", "https://a:1")
    monkeypatch.setenv("ETCD_CA_CERT_FILE", "/ca")
    assert docker_hook._variables() == file, "the file is read when a container starts"
    monkeypatch.setenv("ETCD_KEY_FILE", "key")
    ours = {"ETCD_ENDPOINTS": "https://a:1", "ETCD_CA_CERT_FILE": "/ca", "ETCD_KEY_FILE": str(tmp_path / "key")}
    assert docker_hook._variables() == {**file, **ours}
    monkeypatch.delenv("ETCD_KEY_FILE")
    monkeypatch.delenv("ETCD_CA_CERT_FILE")
    assert docker_hook._variables() == {**file, "ETCD_ENDPOINTS": "https://a:1"}


def test_what_another_command_has_done_meanwhile_counts(
    an_engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands wait for one another, and read the settings after that."""
    changing = docker_hook._changing

    def after(change: Callable[[], object]) -> None:
        @contextmanager
        def waited() -> Iterator[None]:
            monkeypatch.setattr(docker_hook, "_changing", changing)
            change()
            with changing():
                yield

        monkeypatch.setattr(docker_hook, "_changing", waited)

    after(lambda: docker_hook.set_up("host1"))
    assert not docker_hook.set_up("host1")
    for command in (docker_hook.remove, lambda: docker_hook.refresh("host1")):
        docker_hook.set_up("host1")
        after(docker_hook.remove)
        command()
        assert not folder.exists()


def test_what_is_written_outlives_a_power_failure(
    an_engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(str(Path(f"/proc/self/fd/{fd}").readlink())))
    docker_hook.set_up("host1")
    parents = [str(folder.parent), str(folder.parent.parent)]
    assert synced[:2] == parents
    for name in ("settings.json", "hook.py", "runtime"):
        place = synced.index(str(folder / f".{name}.new"))
        assert synced[place + 1] == str(folder)
    assert synced[-2:] == [str(an_engine.path.parent / ".daemon.json.calico"), str(an_engine.path.parent)]


def test_checksystem_says_if_the_hook_does_not_work(
    an_engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(docker_hook, "_command", lambda: sys.executable)
    found = checks._hook(True)
    assert found.ok and "not set up" in found.found
    docker_hook.set_up("host1")
    found = checks._hook(False)
    assert found.ok and found == checks._hook(True)
    an_engine.default = "runc"
    assert "has not read its configuration" in checks._hook(True).found
    an_engine.default = "calico"
    file = folder / "settings.json"
    file.write_text(file.read_text().replace('"/data"', '"/other"'))
    assert "Docker's data is in /data, not in /other" in checks._hook(True).found
    file.unlink()
    found = checks._hook(True)
    assert not found.ok and "Docker's default runtime is calico, and its settings are lost" in found.found
    an_engine.alive = False
    assert checks._hook(True).ok


def test_the_files_follow_the_host_s_name(folder: Path, tmp_path: Path) -> None:
    docker_hook._write_files(settings(tmp_path))
    docker_hook.refresh("host2")
    found = docker_hook.settings()
    assert found is not None and found.host == "host2"
    assert " prepare host2 " in (folder / "runtime").read_text()


def test_an_interpreter_that_is_too_old_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert docker_hook._python() == "/usr/bin/python3"
    monkeypatch.setattr(docker_hook, "_OLDEST_PYTHON", (4, 0))
    assert docker_hook._python() == os.path.realpath(sys.executable)


class Server:
    """Answers one request at the hook's socket."""

    def __init__(self, run: Path, answer: bytes | None) -> None:
        """If `answer` is empty, the server ends the connection; if it is None, it never answers."""
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
        if self._answer is None:
            self.kept = channel
        else:
            channel.sendall(self._answer)
            channel.close()


@pytest.mark.parametrize(
    ("answer", "said", "again"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n{}", None, False),
        (b'HTTP/1.1 400 Bad Request\r\n\r\n{"Err": "no pool."}', "Calico: no pool.\n", False),
        (b'HTTP/1.1 200 OK\r\n\r\n{"Err": "etcd is away", "Again": true}', "Calico: etcd is away.\n", True),
        (b'HTTP/1.1 400 Bad Request\r\n\r\n{"Err": "etcd is slow", "Again": true}', "Calico: etcd is slow.\n", True),
        (b"HTTP/1.1 200 OK\r\n\r\n", "Calico: the server of the hook has given an invalid answer.\n", True),
        (b"nonsense", "Calico: the server of the hook has given an invalid answer.\n", True),
        (None, "Calico: it was not connected within 0 s.\n", True),
    ],
)
def test_the_hook_asks_the_server(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    answer: bytes | None,
    said: str | None,
    again: bool,
) -> None:
    monkeypatch.setattr(oci_hook, "RUN", str(tmp_path))
    monkeypatch.setattr(oci_hook, "SECONDS", 0.2 if answer is None else 5)
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


@pytest.mark.parametrize("case", ["nobody-listens", "the-server-ends", "no-socket-can-have-this-name"])
@pytest.mark.parametrize(
    ("script", "succeeds", "again"),
    [("exit 0", True, False), ("exit 1", False, False), ("exit 75", False, True), ("exec sleep 60", False, True)],
)
def test_without_a_server_a_new_process_connects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, succeeds: bool, again: bool, case: str
) -> None:
    host = "host1" if case != "no-socket-can-have-this-name" else "h" * 120
    if case == "the-server-ends":
        Server(tmp_path, b"")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b'{"id": "a"}')))
    monkeypatch.setattr(oci_hook, "RUN", str(tmp_path))
    monkeypatch.setattr(oci_hook, "SECONDS", 30)
    monkeypatch.setattr(oci_hook, "PROCESS_SECONDS", 0.3 if "sleep" in script else 30)
    python = tmp_path / "tree/python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/words\ncat >{tmp_path}/state\n{script}\n')
    python.chmod(0o755)
    (tmp_path / "tree/calicoctl").touch()
    (tmp_path / "calicoctl").symlink_to("tree/calicoctl")
    status = 0
    try:
        oci_hook.connect(host, str(tmp_path / "calicoctl"), ID)
    except SystemExit as end:
        status = end.code
    assert (status == 0) == succeeds
    assert (tmp_path / "words").read_text() == f"-I -c {oci_hook.PROGRAM}\n"
    assert (tmp_path / "state").read_text() == '{"id": "a"}'
    assert (tmp_path / host / f"start-again.{ID}").exists() == again


def test_the_hook_needs_no_module_of_ours(tmp_path: Path) -> None:
    copy = tmp_path / "hook.py"
    copy.write_text(Path(oci_hook.__file__).read_text())
    script = f"import sys; exec(open({str(copy)!r}).read().partition('if __name__')[0]); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script], check=True, capture_output=True, text=True, env=dict(os.environ)
    )
    loaded = done.stdout.split()
    assert not {"pathlib", "subprocess", "urllib", "http"} & {*loaded} and "calicoctl" not in done.stdout
