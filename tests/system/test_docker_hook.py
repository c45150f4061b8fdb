"""Docker's hook connects containers with labels before their first instruction."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.agent import A4, ALLOW, B4, AgentHost
from tests.system.conftest import HOME
from tests.system.support import CALICOCTL, HOST_IP, Etcd, end_agents, import_busybox, run, start_docker, wait_for

FOLDER = Path("/var/lib/calico/docker-hook")
SOCKET = f"unix://{HOME}/hook.sock"
NAMES = ("web", "db", "late", "plain")


class Engine:
    """A Docker Engine, without a bridge and a firewall."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = Path("/etc/docker/daemon.json")
        self.process: subprocess.Popen | None = None

    def start(self, *options: str) -> None:
        without = ("--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false")
        self.process = start_docker(self.folder, *without, *options, host=SOCKET)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.process = None

    def says(self, field: str) -> str:
        return run("docker", "info", "--format", f"{{{{.{field}}}}}").out.strip()

    @property
    def configuration(self) -> dict:
        return json.loads(self.file.read_text())


@pytest.fixture(scope="module")
def running_engine() -> Iterator[Engine]:
    engine = Engine(HOME / "hook")
    engine.folder.mkdir(parents=True)
    engine.start()
    import_busybox(engine.folder / "busybox", SOCKET)
    yield engine
    engine.stop()


@pytest.fixture
def engine(running_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine without a configuration file, which commands use."""
    monkeypatch.setenv("DOCKER_HOST", SOCKET)
    yield running_engine
    run("docker", "rm", "-f", *NAMES, check=False)
    if FOLDER.exists() or running_engine.process is None or running_engine.file.exists():
        running_engine.stop()
        shutil.rmtree(FOLDER, ignore_errors=True)
        running_engine.file.unlink(missing_ok=True)
        running_engine.start()


@pytest.fixture
def hooked(request: pytest.FixtureRequest, bare_host: AgentHost, engine: Engine) -> Iterator[AgentHost]:
    """A host with an agent and the hook, and a profile whose members may talk to each other.

    Options of `calicoctl node` are the parameter.
    """
    host = AgentHost(bare_host.etcd)
    host.start_agent("--docker-hook", *getattr(request, "param", ()), DOCKER_HOST=SOCKET)
    host.profile("all", inbound=[ALLOW])
    yield host
    end_server()


SERVED = pytest.mark.parametrize("hooked", [(), ("--libnetwork",)], ids=["alone", "served"], indirect=True)
"""Without and with a process that serves the hook."""


def server() -> int:
    """Return the id of the process that serves the hook."""
    (file,) = Path("/run/calico").glob("*/plugins.pid")
    return int(file.read_text())


def end_server() -> None:
    """End the process that serves the hook, if there is one; the agent must not run, or it starts another."""
    end_agents()
    if list(Path("/run/calico").glob("*/plugins.pid")):
        with contextlib.suppress(ProcessLookupError):
            os.kill(server(), signal.SIGKILL)


def docker_run(name: str, *labels: str, command: tuple[str, ...] = (), options: tuple[str, ...] = (), status=0):
    given = [word for label in labels for word in ("--label", f"calico.{label}")]
    words = ("docker", "run", "--net=none", "--stop-signal=KILL", "--name", name, *given, *options, "busybox", *command)
    answer = run(*words, check=False)
    assert status is None or (answer.status == 0) == (status == 0), answer
    return answer


def id_of(name: str) -> str:
    return run("docker", "inspect", "--format", "{{.Id}}", name).out.strip()


SEEN = ("sh", "-c", "ip -o address show; ip route; sleep 1000")


def first_seen(name: str) -> str:
    return wait_for(lambda: run("docker", "logs", name).out, "the output")


def record(host: AgentHost, name: str) -> dict | None:
    id = id_of(name)
    return next((value for key, value in host.records().items() if f"/docker/{id}/" in key), None)


@SERVED
def test_interface_and_address_are_there_before_the_first_instruction(hooked: AgentHost) -> None:
    host = hooked
    # its only instruction
    assert f"inet {A4}/32" in docker_run("late", f"ip={A4}", command=("ip", "-o", "address")).out
    run("docker", "rm", "late")
    docker_run("web", f"ip={A4}", "profile=all", command=SEEN, options=("-d",))
    assert f"{A4}/32" in first_seen("web") and "default" in first_seen("web")
    answer = docker_run("db", "ip=ipv4", "profile=all", command=("ping", "-c", "20", "-i", "0.1", "-W", "1", A4))
    assert ", 0 packets received" not in answer.out
    found = record(host, "web")
    assert found is not None and found["profile_ids"] == ["all"] and found["workload_name"] == "web"
    assert found["state"] == "active" and "connected as its labels ask" not in host.log(), "the agent has not done it"
    # it keeps its address when it is restarted, whatever the agent does just then about its end
    for number in range(2, 5):
        began = time.monotonic()
        run("docker", "restart", "--time=0", "web")
        assert time.monotonic() - began < 4, host.log()
        output = wait_for(lambda n=number: run("docker", "logs", "web").out.count("default") == n, "the output")
        assert output and run("docker", "logs", "web").out.count(f"{A4}/32") == number
    assert record(host, "web")["state"] == "active"
    # without the agent, too
    run("docker", "stop", "--time=0", "web")
    host.kill_agent()
    run("docker", "start", "web")
    wait_for(lambda: run("docker", "logs", "web").out.count(f"{A4}/32") == 5, "the output")
    run("docker", "rm", "-f", "db", "web")


def test_containers_without_labels_of_their_own_start_as_ever(hooked: AgentHost, engine: Engine) -> None:
    docker_run("web", "other=calico.ip", options=("-d",), command=("sleep", "1000"))
    image = run("docker", "commit", "--change", f"LABEL calico.ip={A4}", "web").out.strip()
    (FOLDER / "hook.py").rename(FOLDER / "gone.py")
    assert "eth" not in docker_run("plain", command=("ip", "-o", "address")).out
    (FOLDER / "gone.py").rename(FOLDER / "hook.py")
    answer = run("docker", "run", "--net=none", "--name", "db", image, "ip", "-o", "address")
    assert "eth" not in answer.out
    run("docker", "rm", "db")
    answer = run("docker", "run", "--net=none", "--name", "db", "-e", f"CALICO_IP={B4}", image, "ip", "-o", "address")
    assert f"inet {B4}/32" in answer.out
    run("docker", "rm", "-f", "web", "db")
    # without the image, nobody knows whose the labels are: what is recorded stays, and others start as ever
    for verb, name in (("run", "db"), ("create", "late")):
        run("docker", verb, "--net=none", "--name", name, "-e", f"CALICO_IP={B4}", image, "ip", "-o", "address")
    run("docker", "image", "rm", "--force", image)
    assert f"inet {B4}/32" in run("docker", "start", "--attach", "db").out
    assert "eth" not in run("docker", "start", "--attach", "late").out
    run("docker", "rm", "db", "late")


def test_labels_that_only_docker_finds_in_an_image_do_not_count(hooked: AgentHost, tmp_path: Path) -> None:
    host = hooked
    run("docker", "save", "--output", str(tmp_path / "image.tar"), "busybox")
    (tmp_path / "image").mkdir()
    run("tar", "-C", str(tmp_path / "image"), "-xf", str(tmp_path / "image.tar"))
    manifest = tmp_path / "image/manifest.json"
    (described,) = json.loads(manifest.read_text())
    image = json.loads((tmp_path / "image" / described["Config"]).read_text())
    image["config"] = {"labels": {"calico.ip": A4}}
    (tmp_path / "image" / described["Config"]).unlink()
    (tmp_path / "image/config.json").write_text(json.dumps(image))
    manifest.write_text(json.dumps([{**described, "Config": "config.json", "RepoTags": ["sly:latest"]}]))
    run("tar", "-C", str(tmp_path / "image"), "-cf", str(tmp_path / "sly.tar"), ".")
    run("docker", "load", "--input", str(tmp_path / "sly.tar"))
    answer = run("docker", "run", "--net=none", "--name=web", "sly", "ip", "-o", "address", check=False)
    labels = json.loads(run("docker", "inspect", "--format", "{{json .Config.Labels}}", "web").out)
    assert labels == {"calico.ip": A4}, "Docker takes them for labels"
    assert answer.status != 0 and "its image has an unusual configuration" in answer.err, answer
    assert host.records() == {}
    run("docker", "rm", "web")
    run("docker", "image", "rm", "sly")


@SERVED
def test_the_address_of_a_removed_container_is_waited_for(hooked: AgentHost) -> None:
    host = hooked
    words, options = ("sleep", "1000"), ("-d", "--restart=always")
    docker_run("web", f"ip={A4}", command=words, options=("-d",))
    for _ in range(3):
        run("docker", "rm", "-f", "web")
        docker_run("web", f"ip={A4}", command=words, options=("-d",))
    # if it takes too long, the container is started later
    host.ctl("config", "felix", "GraceTime", "3")
    host.kill_agent()
    run("docker", "rm", "-f", "web")
    answer = docker_run("web", f"ip={A4}", command=words, options=options, status=1)
    assert f"IP {A4} is already assigned" in answer.err and "Its container was removed" in answer.err
    host.start_agent(DOCKER_HOST=SOCKET)
    wait_for(lambda: "true" in run("docker", "inspect", "-f", "{{.State.Running}}", "web").out, host.log(), 60)
    assert (record(host, "web") or {}).get("ipv4_nets") == [f"{A4}/32"]
    wait_for(lambda: not list(Path("/run/calico").glob("*/start-again.*")), "the file to go")
    run("docker", "rm", "-f", "web")
    wait_for(lambda: host.records() == {} and not host.allocations(), host.log())
    host.check_consistent()
    host.ctl("config", "felix", "GraceTime", "60")


@SERVED
def test_what_cannot_be_done_stops_the_start_with_a_sentence(hooked: AgentHost) -> None:
    host = hooked
    docker_run("web", f"ip={A4}", options=("-d",), command=("sleep", "1000"))
    for labels, why in (
        ((f"ip={A4}",), f"IP {A4} is already assigned (web on host {host.name})"),
        ((f"ip={B4}", "profile=nowhere"), "Calico: Profile nowhere does not exist"),
        (("ip=10.9.9.9",), "IP 10.9.9.9 is in no pool"),
        (("ip=nonsense",), "'nonsense' is not a valid IP address"),
    ):
        answer = docker_run("db", *labels, status=1, command=("sleep", "1000"))
        assert why in answer.err, answer
        assert run("docker", "inspect", "--format", "{{.State.Running}}", "db").out.strip() == "false"
        run("docker", "rm", "db")
    answer = run("docker", "run", "--net=host", "--label=calico.ip=ipv4", "--name=db", "busybox", check=False)
    assert "cannot be connected: it runs in the host's network" in answer.err
    run("docker", "rm", "db")
    assert len(host.records()) == 1
    host.check_consistent()
    host.ctl("profile", "add", "nowhere")
    docker_run("db", f"ip={B4}", "profile=nowhere", options=("-d",), command=("sleep", "1000"))
    host.check_consistent()


OWN = {
    "labels": ["a=b"],
    "log-opts": {"max-size": "10m"},
    "runtimes": {"mine": {"path": "/run/calico-tests/mine", "runtimeArgs": ["--systemd-cgroup=false"]}},
    "default-runtime": "mine",
}


def test_the_configuration_of_docker_keeps_what_it_has(bare_host: AgentHost, engine: Engine) -> None:
    host = AgentHost(bare_host.etcd)
    environment = {"DOCKER_HOST": SOCKET}
    calls = HOME / "mine.calls"
    mine = HOME / "mine"
    mine.write_text(f'#!/bin/sh\necho "$@" >>{calls}\nshift\nexec runc "$@"\n')
    mine.chmod(0o755)
    engine.file.parent.mkdir(exist_ok=True)
    engine.file.write_text(json.dumps(OWN, indent=4))
    engine.file.chmod(0o640)
    engine.stop()
    engine.start()
    # Docker 20.10 forgets this runtime when it reads a configuration with others
    docker_run("late", command=("sleep", "1000"), options=("-d", "--runtime=io.containerd.runc.v2"))
    host.start_agent("--docker-hook", **environment)
    run("docker", "restart", "--time=0", "late")
    assert engine.says("DefaultRuntime") == "calico" and engine.says("Labels") == "[a=b]"
    entry = {"path": str(FOLDER / "runtime")}
    assert engine.configuration == {
        **OWN,
        "runtimes": {**OWN["runtimes"], "calico": entry},
        "default-runtime": "calico",
    }
    assert list(engine.configuration) == list(OWN) and engine.file.stat().st_mode & 0o777 == 0o640
    calls.unlink(missing_ok=True)
    assert f"{A4}/32" in docker_run("web", f"ip={A4}", command=("ip", "-o", "address")).out
    assert "create --bundle" in calls.read_text()
    assert "--systemd-cgroup=false --root" in calls.read_text(), "the arguments of the user's runtime"

    # once more: nothing changes
    before = engine.file.read_bytes()
    assert "set up already" in host.ctl("node", f"--ip={HOST_IP}", "--docker-hook", env=environment).out
    assert engine.file.read_bytes() == before
    shown = json.loads(host.ctl("checksystem", "-o", "json", env=environment, status=None).out)
    (check,) = (one for one in shown if one["name"] == "Docker's hook")
    assert check["ok"] and "set up in /etc/docker/daemon.json" in check["found"]
    settings = FOLDER / "settings.json"
    kept = settings.read_text()
    settings.write_text(kept.replace('"data_root": "', '"data_root": "/other'))
    shown = json.loads(host.ctl("checksystem", "-o", "json", env=environment, status=None).out)
    (check,) = (one for one in shown if one["name"] == "Docker's hook")
    assert not check["ok"] and "Docker's data is in" in check["found"]
    settings.write_text(kept)
    assert host.status()["docker_hook"] == {"works": True, "text": "set up in /etc/docker/daemon.json"}

    # a second engine cannot have it, too
    second = start_docker(HOME / "second", "--bridge=none", "--iptables=false", host=f"unix://{HOME}/second.sock")
    answer = host.ctl(
        "node", f"--ip={HOST_IP}", "--docker-hook", env={"DOCKER_HOST": f"unix://{HOME}/second.sock"}, status=1
    )
    second.terminate()
    second.wait()
    assert f"set up for the Docker Engine with the data in {engine.folder}/data" in answer.err
    assert engine.file.read_bytes() == before and settings.read_text() == kept

    # damaged settings keep no agent from starting
    (FOLDER / "settings.json").write_text("{")
    refused = host.ctl("node", "remove", "--remove-endpoints", env=environment, status=1)
    assert "settings.json cannot be read" in refused.err and host.agent_runs(host.pid)
    assert "settings.json cannot be read" in host.ctl("node", "restart", env=environment).err
    shown = host.ctl("status", status=None).out
    assert "Docker's hook does not work" in shown and "settings.json cannot be read" in shown
    answer = docker_run("db", f"ip={B4}", status=1)
    run("docker", "rm", "db")
    assert "settings.json is damaged" in answer.err and "Run 'calicoctl node --docker-hook' again" in answer.err
    host.ctl("node", f"--ip={HOST_IP}", "--docker-hook", env=environment)
    assert settings.read_text() == kept, "the former default is known"

    # a container names the runtime: it stays
    docker_run("plain", command=("sleep", "1000"), options=("-d",))
    run("docker", "rm", "-f", "web")
    wait_for(lambda: host.records() == {}, host.log())
    answer = host.ctl("node", "remove", env=environment)
    assert "The runtime calico stays in /etc/docker/daemon.json" in answer.err and "1 container" in answer.err
    assert engine.says("DefaultRuntime") == "mine"
    assert engine.configuration == {**OWN, "runtimes": {**OWN["runtimes"], "calico": entry}}
    run("docker", "restart", "--time=0", "plain", "late")
    engine.stop()
    engine.start()
    run("docker", "start", "plain")
    run("docker", "rm", "-f", "plain")
    host.ctl("node", "remove", "--docker-hook", env=environment)
    assert engine.configuration == OWN and not FOLDER.exists()
    host.ctl("node", "remove", "--docker-hook", env=environment, status=1)
    run("docker", "run", "--rm", "--net=none", "busybox", "sh", "-c", ":")


def test_the_configuration_is_refused_where_it_cannot_be_changed(bare_host: AgentHost, engine: Engine) -> None:
    host = AgentHost(bare_host.etcd)
    environment = {"DOCKER_HOST": SOCKET}
    engine.file.parent.mkdir(exist_ok=True)
    for text, why in (
        ('{"labels": ["a"], }', "is invalid, and is not changed"),
        ('{"labels": ["a"], "labels": []}', "a name is in it twice"),
        ("[]", "is not what Docker expects"),
        ('{"runtimes": {"calico": {"path": "runc"}}}', "a runtime calico already"),
        ('{"default-runtime": "io.containerd.runc.v2"}', "is a shim of containerd. Name runc instead"),
    ):
        engine.file.write_text(text)
        answer = host.ctl("node", f"--ip={HOST_IP}", "--docker-hook", env=environment, status=1)
        assert why in answer.err, answer
        assert engine.file.read_text() == text and not FOLDER.exists()
    # what the engine refuses is taken back
    engine.file.write_text('{"pidfile": "/run/other"}')
    answer = host.ctl("node", f"--ip={HOST_IP}", "--docker-hook", env=environment, status=1)
    assert "has not taken calico as its default runtime" in answer.err
    assert engine.file.read_text() == '{"pidfile": "/run/other"}' and not FOLDER.exists()
    engine.file.unlink()
    for option in ("--default-runtime=runc", "--add-runtime=a=/usr/sbin/runc"):
        engine.stop()
        engine.start(option)
        answer = host.ctl("node", f"--ip={HOST_IP}", "--docker-hook", env=environment, status=1)
        assert f"has {option.partition('=')[0]}, so" in answer.err and f"into {engine.file}" in answer.err, answer
        assert not engine.file.exists()
    engine.stop()
    answer = host.ctl("node", f"--ip={HOST_IP}", "--docker-hook", env=environment, status=1)
    assert "nothing listens" in answer.err
    engine.start()


@pytest.fixture
def without_server() -> Iterator[None]:
    yield
    end_server()


@pytest.mark.parametrize("options", [(), ("--libnetwork",)], ids=["alone", "served"])
def test_without_the_store_a_start_fails_soon_and_is_repeated(
    own_etcd: Etcd, engine: Engine, without_server: None, options: tuple[str, ...]
) -> None:
    host = AgentHost(own_etcd)
    host.start_agent("--docker-hook", *options, DOCKER_HOST=SOCKET)
    docker_run("web", f"ip={A4}", command=("sleep", "1000"), options=("-d", "--restart=always"))
    docker_run("db", f"ip={B4}", command=("sleep", "1000"), options=("-d",))
    host.kill_agent()
    run("docker", "stop", "--time=0", "db")
    own_etcd.stop()
    engine.kill()  # as at the end of a machine
    engine.start()
    answer = wait_for(lambda: run("docker", "inspect", "--format", "{{.State.Error}}", "web").out.strip(), "the start")
    assert "Calico: " in answer and "etcd" in answer
    began = time.monotonic()
    answer = run("docker", "start", "db", check=False)
    assert answer.status != 0 and "Calico: " in answer.err and time.monotonic() - began < 10
    docker_run("plain", command=("sh", "-c", ":"))

    own_etcd.start()
    own_etcd.await_ready()
    host.start_agent(*options, DOCKER_HOST=SOCKET)
    wait_for(lambda: "true" in run("docker", "inspect", "-f", "{{.State.Running}}", "web").out, host.log(), 30)
    wait_for(lambda: "(web) is started, which had failed" in host.log(), host.log(), 10)
    wait_for(lambda: (record(host, "web") or {}).get("state") == "active", host.log(), 20)
    assert "false" in run("docker", "inspect", "-f", "{{.State.Running}}", "db").out
    assert not list(Path("/run/calico").glob("*/start-again.*"))


@pytest.mark.parametrize("hooked", [("--libnetwork",)], ids=["served"], indirect=True)
def test_a_server_that_hangs_or_has_died_holds_up_no_start_for_long(hooked: AgentHost) -> None:
    host = hooked
    os.kill(server(), signal.SIGSTOP)
    began = time.monotonic()
    answer = docker_run("web", f"ip={A4}", status=1, command=("sleep", "1000"))
    assert "Calico: it was not connected within 5 s" in answer.err and time.monotonic() - began < 10
    docker_run("plain", command=("sh", "-c", ":"))
    run("docker", "rm", "web")
    os.kill(server(), signal.SIGCONT)
    assert f"{A4}/32" in docker_run("web", f"ip={A4}", command=("ip", "-o", "address")).out
    run("docker", "rm", "web")
    wait_for(lambda: host.records() == {} and not host.allocations(), host.log())
    host.kill_agent()  # it would start another
    # the server ends while it is asked
    os.kill(server(), signal.SIGSTOP)
    starting = subprocess.Popen(
        ("docker", "run", "--net=none", "--name=late", f"--label=calico.ip={A4}", "busybox", "ip", "-o", "address"),
        stdout=subprocess.PIPE,
        text=True,
    )
    # the socket with the name that it was created with, and one for each connection
    sockets = Path("/proc/net/unix")
    wait_for(lambda: sockets.read_text().count(f"/{host.name}/.hook.sock.") > 1, "the hook to ask")
    os.kill(server(), signal.SIGKILL)
    assert f"{A4}/32" in starting.communicate(timeout=30)[0] and starting.returncode == 0
    run("docker", "rm", "late")
    assert f"{B4}/32" in docker_run("web", f"ip={B4}", command=("ip", "-o", "address")).out


def test_containers_with_the_hook_start_after_the_program_is_uninstalled(
    hooked: AgentHost, engine: Engine, tmp_path: Path
) -> None:
    host, prefix = hooked, tmp_path / "prefix"
    for folder in ("bin", "lib"):
        (prefix / folder).mkdir(parents=True)
    (prefix / "bin/calicoctl").symlink_to(CALICOCTL)
    installed = [str(prefix / "bin/calicoctl")]
    host.ctl("node", f"--ip={HOST_IP}", "--docker-hook", env={"DOCKER_HOST": SOCKET}, command=installed)
    settings = FOLDER / "settings.json"  # by another way to the same program
    (tmp_path / "link").symlink_to(prefix)
    settings.write_text(settings.read_text().replace(f"{prefix}/bin", f"{tmp_path}/link/bin"))
    docker_run("web", f"ip={A4}", command=("sleep", "1000"), options=("-d",))
    docker_run("plain", command=("sleep", "1000"), options=("-d",))
    run("docker", "stop", "--time=0", "web", "plain")
    script = Path(__file__).parent.parent.parent / "setup/calicoctl"
    kept = settings.read_text()
    settings.write_text("{")
    answer = run(str(script), "uninstall", env={**os.environ, "PREFIX": str(prefix)}, check=False)
    assert answer.status != 0 and "nothing is uninstalled" in answer.err and (prefix / "bin/calicoctl").exists()
    settings.write_text(kept)
    # it knows itself which engine it is about
    others = {name: value for name, value in os.environ.items() if name != "DOCKER_HOST"}
    answer = run(str(script), "uninstall", env={**others, "PREFIX": str(prefix)})
    assert "Docker's hook is removed." in answer.out, answer
    assert not (prefix / "bin/calicoctl").exists()
    assert engine.says("DefaultRuntime") == "runc" and "default-runtime" not in engine.configuration
    run("docker", "start", "web", "plain")
    engine.stop()
    engine.start()
    run("docker", "start", "web", "plain")
    docker_run("late", f"ip={B4}", command=("sh", "-c", ":"))
    # when no container needs it any more, nothing is left, and the file that the command has made is gone
    assert "stays in" in host.ctl("node", "remove", "--docker-hook", env={"DOCKER_HOST": SOCKET}).err
    run("docker", "rm", "-f", "web", "plain")
    assert host.ctl("node", "remove", "--docker-hook", env={"DOCKER_HOST": SOCKET}).err == ""
    assert not engine.file.exists() and not FOLDER.exists()
