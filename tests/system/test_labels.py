"""Containers are connected as their labels ask, by the agent, when they start."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.agent import A4, A6, ALLOW, B4, C4, AgentHost, holds
from tests.system.conftest import HOME
from tests.system.support import Etcd, Host, calico_links, import_busybox, run, start_docker, wait_for

NAMES = ("web", "db", "late")


def start(name: str, *labels: str, options: tuple[str, ...] = (), image: str = "busybox") -> str:
    """Run a container with labels such as `ip=ipv4`; return its id."""
    given = [word for label in labels for word in ("--label", f"calico.{label}")]
    run("docker", "run", "--net=none", "--stop-signal=KILL", "--name", name, *given, *options, "-tid", image)
    return run("docker", "inspect", "--format", "{{.Id}}", name).out.strip()


def stop(*names: str) -> None:
    run("docker", "rm", "-f", *names, check=False)


def record(host: Host, id: str) -> dict | None:
    return next((value for key, value in host.records().items() if f"/docker/{id}/" in key), None)


def is_up(host: AgentHost, id: str) -> bool:
    """Return whether the agent reports that a container's endpoint is up."""
    keys = [key for key in host.records() if f"/docker/{id}/" in key]
    return bool(keys) and (host.endpoint_status(keys[0]) or {}).get("status") == "up"


def await_up(host: AgentHost, id: str) -> dict:
    wait_for(lambda: is_up(host, id), f"the connection\n{host.log()}", 20)
    found = record(host, id)
    assert found is not None
    return found


def await_failure(host: AgentHost, text: str) -> dict:
    """Wait until a container is reported that cannot be connected, with `text` in the reason; return its report."""

    def found() -> dict | None:
        return next((one for one in host.status()["containers_not_connected"] if text in one["reason"]), None)

    return wait_for(found, f"the report\n{host.log()}", 20)


@pytest.fixture
def labelled(node: AgentHost, engine: None) -> Iterator[AgentHost]:
    """A host with an agent, an engine, and a profile whose members may talk to each other."""
    node.profile("all", inbound=[ALLOW])
    node.profile("none")
    yield node
    stop(*NAMES)


def test_labels_connect_a_container_once_for_each_start(labelled: AgentHost) -> None:
    host = labelled
    web = start("web", f"ip={B4},{A6}", "profile=none,all", "interface=eth0")
    db = start("db", options=("--env=CALICO_IP=auto", "--env=CALICO_PROFILE=all"))
    found = await_up(host, web)
    assert found["ipv4_nets"] == [f"{B4}/32"] and found["ipv6_nets"] == [f"{A6}/128"]
    assert found["profile_ids"] == ["none", "all"] and found["workload_name"] == "web"
    inside = run("docker", "exec", "web", "ip", "address", "show", "eth0").out
    assert f"{B4}/32" in inside and f"{A6}/128" in inside
    assert await_up(host, db)["profile_ids"] == ["all"]
    ping = ("docker", "exec", "db", "ping", "-c", "1", "-W", "1", B4)
    wait_for(lambda: run(*ping, check=False).status == 0, host.log(), 10)
    host.check_consistent()

    # a command that disconnects it wins until it is started again, also over a new agent
    host.ctl("container", "remove", "web")
    host.ctl("node", "restart")
    host.sync()
    assert holds(lambda: record(host, web) is None, 2) and record(host, db) is not None
    run("docker", "restart", "--time=0", "web")
    assert await_up(host, web)["ipv4_nets"] == [f"{B4}/32"]

    # its endpoint is lost, as when etcd is restored from an older copy: its next start is a new request
    (key,) = (key for key in host.records() if f"/docker/{web}/" in key)
    host.etcd.delete(key)
    wait_for(lambda: record(host, web) is None, "the deletion")
    run("docker", "restart", "--time=0", "web")
    assert await_up(host, web)["ipv4_nets"] == [f"{B4}/32"]
    host.check_consistent()
    stop("web", "db")
    wait_for(lambda: host.records() == {} and host.allocations() == {}, host.log())
    wait_for(lambda: not list(Path("/var/lib/calico").glob("*/workloads/*/*")), host.log(), 10)


def test_what_cannot_be_connected_is_told_and_connected_when_it_can_be(labelled: AgentHost) -> None:
    host = labelled
    web = start("web", f"ip={A4}", "profile=all")
    await_up(host, web)
    db = start("db", f"ip=ipv4,{A4},ipv6", "profile=all")
    failed = await_failure(host, f"IP {A4} is already assigned (web on host {host.name})")
    assert failed["workload"] == db and failed["workload_name"] == "db"
    # nothing is left of the addresses that were free
    host.check_consistent()
    assert len(host.records()) == 1 and not list(Path("/var/lib/calico").glob(f"*/workloads/*/{db}"))
    answer = host.ctl("status", status=1)
    assert "container db cannot be connected as its labels ask (since " in answer.out
    assert "1 container cannot be connected as its labels ask" in answer.err
    shown = host.ctl("container", "db", "endpoint", "show")
    assert db in shown.out and "error" in shown.out and f"IP {A4} is already assigned" in shown.err
    shown = host.ctl("endpoint", "show", "--detailed", "--workload=db", "--output=json")
    (row,) = json.loads(shown.out)
    assert (row["workload"], row["endpoint"], row["state"], row["status"]) == (db, None, "error", "error")
    assert "already assigned" in row["reason"] and row["ipv4_nets"] == []
    assert len([line for line in host.log().splitlines() if "cannot be connected" in line]) == 1

    # as `docker compose` does: the container is made again, and the old one's address is free by then
    new = start("late", f"ip={B4}", "profile=nowhere")
    await_failure(host, "Profile nowhere does not exist")
    host.ctl("profile", "add", "nowhere")
    await_up(host, new)
    stop("late")
    other = Host(host.etcd, "host2")
    other.register("192.0.2.3")
    run("ip", "netns", "add", "elsewhere")
    other.ctl("container", "add", "/var/run/netns/elsewhere", C4)
    new = start("late", f"ip={C4}")
    await_failure(host, f"IP {C4} is already assigned (/var/run/netns/elsewhere on host host2)")
    # at once, and not at the next attempt after a pause
    since = time.monotonic()
    other.ctl("container", "/var/run/netns/elsewhere", "ip", "remove", C4)
    await_up(host, new)
    assert time.monotonic() - since < 8, host.log()
    other.ctl("container", "remove", "/var/run/netns/elsewhere")
    stop("web")
    found = await_up(host, db)
    assert f"{A4}/32" in found["ipv4_nets"] and len(found["ipv4_nets"]) == 2 and len(found["ipv6_nets"]) == 1
    host.check_consistent()
    stop("db")
    db = start("db", f"ip={A4}")
    await_up(host, db)
    wait_for(lambda: host.status()["containers_not_connected"] == [], host.log(), 10)
    host.ctl("status")


def test_labels_of_an_image_and_networks_that_are_taken(labelled: AgentHost) -> None:
    host = labelled
    start("web")
    image = run("docker", "commit", "--change", f"LABEL calico.ip={A4}", "web").out.strip()
    stop("web")
    web = start("web", image=image)
    wait_for(lambda: "label calico.ip is ignored, since it is the image's own" in host.log(), "the log", 20)
    db = start("db", f"ip={B4}", image=image)
    await_up(host, db)
    assert record(host, web) is None
    stop("web")
    start("web", f"ip={A6},{A6.replace('::1', ':0::1')}")
    await_failure(host, f"{A6} is named twice")
    stop("web")
    start("web", "ip=ipv4", "interface=lo")
    await_failure(host, "with --interface or with the label calico.interface")
    host.ctl("container", "add", "web", "ipv4")
    wait_for(lambda: host.status()["containers_not_connected"] == [], f"that the command is noticed\n{host.log()}", 8)
    stop("web")
    command = ("docker", "run", "--net=host", "--label", f"calico.ip={A4}", "--name", "web", "-tid", "busybox")
    run(*command)
    await_failure(host, "web cannot be connected: it runs in the host's network (--net=host)")
    stop("web", "db")
    run("docker", "image", "rm", image)
    wait_for(lambda: host.status()["containers_not_connected"] == [], host.log(), 10)


def test_containers_that_start_while_agent_store_or_engine_are_away(
    own_etcd: Etcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = AgentHost(own_etcd)
    home, socket = HOME / "labels", f"unix://{HOME}/labels.sock"
    monkeypatch.setenv("DOCKER_HOST", socket)
    environment = {"DOCKER_HOST": socket}
    process = start_docker(home, host=socket)
    try:
        import_busybox(home / "busybox", socket)
        host.start_agent(**environment)
        host.profile("all", inbound=[ALLOW])
        host.kill_agent()
        web = start("web", f"ip={A4}", options=("--restart=always",))
        host.start_agent(**environment)
        await_up(host, web)

        own_etcd.stop()
        db = start("db", f"ip={B4}", options=("--restart=always",))
        assert holds(lambda: len(calico_links()) == 1, 1)
        own_etcd.start()
        own_etcd.await_ready()
        await_up(host, db)

        # the engine restarts: what a command has disconnected is connected at its next start, the others re-attached
        host.ctl("container", "remove", "db", env=environment)
        process.kill()
        process.wait()
        process = start_docker(home, host=socket)
        wait_for(lambda: "can be asked again" in host.log(), host.log(), 20)
        for id, address in ((web, A4), (db, B4)):
            assert await_up(host, id)["ipv4_nets"] == [f"{address}/32"]
        late = start("late", f"ip={C4}")
        await_up(host, late)
        host.check_consistent()
    finally:
        stop(*NAMES)
        process.terminate()
        process.wait()
