"""Commands about containers in Docker networks: policy that lasts, what is shown, and what Docker owns."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.agent import ALLOW, AgentHost
from tests.system.support import CALICOCTL, run, wait_for
from tests.system.test_docker_networks import (
    address,
    await_reach,
    create,
    endpoint,
    inspected,
    reaches,
    record,
    start,
)
from tests.system.test_docker_networks import served as served

KEPT = Path("/var/lib/calico/host1/networks.profiles")
AS_NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", CALICOCTL]


@pytest.fixture
def network(served: AgentHost) -> Iterator[AgentHost]:
    """A host with the network net1, the container web in it, and the profile open, which lets everybody in."""
    served.profile("open", inbound=[ALLOW])
    create("net1")
    start("web", "net1")
    yield served
    shutil.rmtree(KEPT, ignore_errors=True)


def test_profiles_set_by_command_last_across_restarts(network: AgentHost) -> None:
    host = network
    start("db", "net1")
    await_reach("db", address("web"))
    assert host.ctl("container", "web", "profile", "show").out == "net1\n"
    assert host.ctl("container", "web", "profile", "append", "open").out == "Profiles open appended\n"
    assert record(host, "web")["profile_ids"] == ["net1", "open"]
    again = host.ctl("container", "web", "profile", "append", "open").out
    assert again == "Profile open is in the list of web already.\n"
    assert "not in the list of web" in host.ctl("container", "web", "profile", "remove", "nope", status=1).err
    assert "does not exist" in host.ctl("container", "web", "profile", "append", "nope", status=1).err
    before = endpoint("web")
    run("docker", "restart", "-t", "0", "web")
    assert endpoint("web") != before
    wait_for(lambda: record(host, "web")["profile_ids"] == ["net1", "open"], "the kept profiles")
    assert "docker_profiles" not in record(host, "web")

    # the other container, of the same network, has the usual one, also after its own restart
    run("docker", "restart", "-t", "0", "db")
    wait_for(lambda: record(host, "db")["profile_ids"] == ["net1"], "the usual profile")
    assert host.ctl("container", "db", "profile", "show").out == "net1\n"
    await_reach("db", address("web"))

    assert host.ctl("container", "web", "profile", "set").out == "Profiles none set.\n"
    run("docker", "restart", "-t", "0", "web")
    wait_for(lambda: record(host, "web").get("workload_name") == "web", "the container's name")
    assert record(host, "web")["profile_ids"] == [] and not reaches("db", address("web"))
    assert "has no profile" in host.ctl("profile", "trace", "db", "web", "icmp", status=1).err


def test_no_packet_passes_before_the_kept_profiles_apply(network: AgentHost) -> None:
    """Its process sends and is sent packets from its first moment on; the usual profile would let them pass."""
    host = network
    start("db", "net1", words=("sh", "-c", "while :; do nc -l -p 80 -e cat; done"))
    script = f"while :; do echo from-app | nc -w 1 {address('db')} 80 && echo passed; done"
    run("docker", "create", "--net", "net1", "--name", "app", "busybox", "sh", "-c", script)
    host.ctl("container", "app", "profile", "set")
    for _ in range(3):
        run("docker", "start", "app")
        wait_for(lambda: record(host, "app").get("workload_name") == "app", "the container's name")
        host.sync()
        assert record(host, "app")["profile_ids"] == []
        run("docker", "kill", "app")
    assert run("docker", "logs", "app").out == ""
    host.ctl("container", "app", "profile", "set", "net1")
    run("docker", "start", "app")
    wait_for(lambda: "passed" in run("docker", "logs", "app").out, "a packet that passes")


def test_a_stopped_container_has_its_profiles_when_it_starts(network: AgentHost) -> None:
    host = network
    run("docker", "create", "--net", "net1", "--name", "app", "-ti", "busybox")
    for state in ("created", "exited"):
        assert host.ctl("container", "app", "profile", "show", "--output=json").out.split() == ["[", '"net1"', "]"]
        said = host.ctl("container", "app", "endpoint", "show", status=1)
        assert said.err == (
            "app is in the Docker network net1, and has no endpoint there, since it is not running.\n"
        ), state
        host.ctl("container", "app", "profile", "append", "open")
        assert host.ctl("container", "app", "profile", "show").out == "net1\nopen\n"
        said = host.ctl("profile", "remove", "open", status=1).err
        assert f"for the next start of 1 container in Docker networks ({inspected('app')['Id'][:12]})" in said
        run("docker", "start", "app")
        wait_for(lambda: record(host, "app")["profile_ids"] == ["net1", "open"], "the kept profiles")
        run("docker", "kill", "app")
        assert host.ctl("container", "app", "profile", "show").out == "net1\nopen\n"
        host.ctl("container", "app", "profile", "remove", "open")
    run("docker", "start", "app")
    wait_for(lambda: record(host, "app")["profile_ids"] == ["net1"], "the kept profiles")


def test_profiles_are_kept_for_each_network_and_go_with_it(network: AgentHost) -> None:
    host = network
    create("net2", "-o", "calico.profile=open")
    host.ctl("container", "web", "profile", "append", "open")
    run("docker", "network", "disconnect", "net1", "web")
    run("docker", "network", "connect", "net2", "web")
    wait_for(lambda: record(host, "web", "net2").get("workload_name") == "web", "the container's name")
    assert record(host, "web", "net2")["profile_ids"] == ["open"]
    host.profile("other")
    host.ctl("container", "web", "profile", "set", "other")
    networks = [json.loads(run("docker", "network", "inspect", name).out)[0]["Id"] for name in ("net1", "net2")]
    web = inspected("web")["Id"]
    assert {file.name for file in KEPT.iterdir()} == {f"{web}.{id}" for id in networks}
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in KEPT.iterdir())
    run("docker", "network", "disconnect", "net2", "web")
    run("docker", "network", "connect", "net1", "web")
    wait_for(lambda: record(host, "web")["profile_ids"] == ["net1", "open"], "the kept profiles")
    run("docker", "network", "rm", "net2")
    assert {file.name for file in KEPT.iterdir()} == {f"{web}.{networks[0]}"}
    host.ctl("endpoint", endpoint("web"), "profile", "remove", "open")
    assert json.loads(next(KEPT.iterdir()).read_text()) == ["net1"]
    run("docker", "rm", "-f", "web")
    run("docker", "network", "rm", "net1")
    assert not list(KEPT.iterdir())


def test_by_the_id_of_its_endpoint(network: AgentHost) -> None:
    host = network
    id = endpoint("web")
    host.ctl("endpoint", id[:16], "profile", "append", "open")
    run("docker", "restart", "-t", "0", "web")
    wait_for(lambda: record(host, "web")["profile_ids"] == ["net1", "open"], "the kept profiles")
    # another host has no such file here
    elsewhere = {"HOSTNAME": "host2"}
    said = host.ctl("endpoint", endpoint("web"), "profile", "set", env=elsewhere)
    assert "Run the command on host1" in said.err and record(host, "web")["profile_ids"] == []
    assert json.loads(next(KEPT.iterdir()).read_text()) == ["net1", "open"]


def test_what_is_shown_and_traced(network: AgentHost) -> None:
    host = network
    start("db", "net1")
    wait_for(lambda: record(host, "db").get("workload_name") == "db", "the container's name")
    shown = host.ctl("endpoint", "show", "--detailed").out
    assert endpoint("web") in shown and " web " in shown and " db " in shown
    (one,) = json.loads(host.ctl("container", "web", "endpoint", "show", "--output=json").out)
    assert (one["orchestrator"], one["endpoint"], one["workload_name"]) == ("libnetwork", endpoint("web"), "web")
    assert one["docker_network"]["name"] == "net1"
    (same,) = json.loads(host.ctl("endpoint", "show", "--workload=web", "--detailed", "--output=json").out)
    assert same["endpoint"] == one["endpoint"]
    await_reach("web", address("db"))
    assert "passes" in host.ctl("profile", "trace", "web", "db", "icmp", "--output=json").out


def test_what_docker_owns_is_refused(network: AgentHost) -> None:
    host = network
    wait_for(lambda: "docker_container" in record(host, "web"), "the container's name in its record")
    before = host.records(), host.allocations()
    why = "web is connected by Docker, to its network net1: "
    for words, advice in (
        (("remove", "web"), "disconnect it with 'docker network disconnect net1 web'.\n"),
        (
            ("web", "ip", "add", "ipv4"),
            "for another address, disconnect it with 'docker network disconnect net1 web', and",
        ),
        (("web", "ip", "remove", address("web")), "for another address, disconnect it with"),
        (("add", "web", "ipv4"), "to connect it otherwise, run it with --net=none.\n"),
    ):
        said = host.ctl("container", *words, status=1)
        assert said.out == "" and said.err.startswith(why + advice), said
    assert (host.records(), host.allocations()) == before
    said = host.ctl("endpoint", endpoint("web"), "remove", status=1)
    assert said.err.endswith(
        "of web on the Docker network net1: disconnect it with 'docker network disconnect net1 web'.\n"
    )
    run("docker", "kill", "web")
    assert "is connected by Docker" in host.ctl("container", "remove", "web", status=1).err


def test_only_root_keeps_profiles(network: AgentHost) -> None:
    host = network
    socket = Path("/var/run/docker.sock")
    mode = socket.stat().st_mode & 0o777
    socket.chmod(0o666)
    try:
        assert host.ctl("container", "web", "profile", "show", command=AS_NOBODY).out == "net1\n"
        for words in (("container", "web"), ("endpoint", endpoint("web"))):
            said = host.ctl(*words, "profile", "append", "open", command=AS_NOBODY, status=2)
            assert "must be run as root" in said.err
    finally:
        socket.chmod(mode)
    assert record(host, "web")["profile_ids"] == ["net1"] and not list(KEPT.glob("*"))
