"""Containers and namespaces keep their network through restarts, crashes and reboots. With a running agent."""

from __future__ import annotations

import fcntl
import http.server
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from calicoctl.workloads.connected import set_learned
from tests.system.agent import A4, A6, ALLOW, B4, LOG_DIR, AgentHost, holds, locked
from tests.system.conftest import HOME
from tests.system.support import (
    FAULTY,
    HOST_IP,
    HOST_IP6,
    Etcd,
    Host,
    addresses,
    calico_links,
    import_busybox,
    links,
    run,
    start_docker,
    wait_for,
)


def container_links(name: str) -> dict[str, dict]:
    """Return the interfaces in a container, by name."""
    pid = run("docker", "inspect", "--format", "{{.State.Pid}}", name).out.strip()
    found = json.loads(run("nsenter", "-t", pid, "-n", "ip", "-json", "address", "show").out)
    return {link["ifname"]: link for link in found if link["ifname"] != "lo"}


def connected(host: AgentHost, key: str) -> bool:
    """Return whether the agent says that the endpoint, as its record is now, is up."""
    status = host.endpoint_status(key)
    if host.etcd.get(key) is None or not status:
        return False
    return bool(status["status"] == "up" and status["index"] >= host.etcd.revision(key))


def record(host: Host, workload: str) -> dict | None:
    """Return the record of a workload's endpoint; its id may be part of `workload`."""
    found = [value for key, value in host.records().items() if workload in key]
    return found[0] if found else None


def is_clean(host: Host) -> bool:
    """Return whether no workload has anything left, but for what the agent keeps of itself."""
    files = [file.name for file in Path(f"/run/calico/{host.name}").glob("*.*")]
    return (
        host.records() == {}
        and host.allocations() == {}
        and host.handles() == {}
        and calico_links() == set()
        and not [name for name in files if name.startswith(("docker.", "namespace.", "unfinished."))]
        and not list(Path("/var/lib/calico").glob("*/workloads/*/*"))
    )


def look_now() -> None:
    """Have the agent look at once at what it looks at every ten seconds otherwise: something has been mounted."""
    run("ip", "netns", "add", "nudge")
    run("ip", "netns", "delete", "nudge")


def connect_containers(host: AgentHost, home: Path, socket: str) -> None:
    """Run two containers in an engine of their own, which restarts them with itself, and connect them."""
    import_busybox(home / "busybox", socket)
    options = ("--net=none", "--restart=always", "--stop-signal=KILL")
    for name, address in (("workload", A4), ("peer", B4)):
        run("docker", "--host", socket, "run", *options, "--name", name, "-tid", "busybox")
        host.ctl("container", "add", name, address, env={"DOCKER_HOST": socket})


@pytest.fixture
def containers(node: AgentHost, engine: None) -> Iterator[AgentHost]:
    """A host with an agent, and the containers workload and peer, which may talk to each other."""
    node.profile("web", inbound=[ALLOW])
    for name, address in (("workload", A4), ("peer", B4)):
        run("docker", "run", "--net=none", "--name", name, "-tid", "busybox")
        node.ctl("container", "add", name, address)
        node.ctl("container", name, "profile", "set", "web")
    node.ctl("container", "workload", "ip", "add", A6)
    ids = [id_of(name) for name in ("workload", "peer")]
    yield node
    run("docker", "rm", "-f", "workload", "peer", *ids, check=False)  # by id, for one may have been renamed


def id_of(name: str) -> str:
    return run("docker", "inspect", "--format", "{{.Id}}", name).out.strip()


def key_of(host: Host, name: str) -> str:
    (key,) = [key for key in host.records() if f"/docker/{id_of(name)}/" in key]
    return key


def answers(name: str, address: str) -> bool:
    return run("docker", "exec", name, "ping", "-c", "1", "-W", "1", address, check=False).status == 0


# 1. starts again


@pytest.mark.parametrize("how", ["restart", "kill and start"])
def test_a_restarted_container_is_reattached(containers: AgentHost, how: str) -> None:
    key = key_of(containers, "workload")
    before, inside = containers.records()[key], container_links("workload")["eth1"]
    if how == "restart":
        run("docker", "restart", "--time=0", "workload")
    else:
        run("docker", "kill", "workload")
        run("docker", "start", "workload")
    wait_for(lambda: connected(containers, key) and links().get(before["name"]), containers.log())
    assert containers.records()[key] == before
    now = container_links("workload")["eth1"]
    assert now["address"] == inside["address"] == before["mac"]
    assert {a["local"] for a in now["addr_info"]} >= {A4, A6}
    wait_for(lambda: answers("workload", B4) and answers("peer", A4), "an answer")
    assert containers.status()["healed"] >= 1
    id = id_of("workload")[:12]
    lines = [line for line in containers.log().splitlines() if id in line]
    (line,) = [line for line in lines if "is re-attached" in line]
    assert "(workload)" in line and A4 in line


def test_while_a_container_is_stopped_its_endpoint_is_inactive(containers: AgentHost) -> None:
    key = key_of(containers, "workload")
    before = containers.records()[key]
    run("docker", "stop", "--time=0", "workload")
    wait_for(lambda: containers.records()[key]["state"] == "inactive", containers.log())
    now = containers.records()[key]
    since = now.pop("inactive_since")
    assert now == {**before, "state": "inactive"}
    assert {A4, A6} <= set(containers.allocations())
    containers.ctl("container", "add", "peer2", A4, status=1)
    shown = containers.ctl("endpoint", "show", "--detailed").out
    assert f"inactive since {since}" in shown and since.startswith("20") and since.endswith("Z")
    wait_for(lambda: before["name"] not in calico_links(), "the interface's end")
    # an old tool that rewrites the record drops what it does not know
    containers.etcd.put(key, {**before, "state": "inactive"})
    run("docker", "start", "workload")
    wait_for(lambda: containers.records()[key] == before and connected(containers, key), containers.log())


def test_an_interface_that_is_deleted_comes_back(containers: AgentHost) -> None:
    key = key_of(containers, "workload")
    before = containers.records()[key]
    index = links()[before["name"]]["ifindex"]
    run("ip", "link", "delete", before["name"])
    wait_for(lambda: links().get(before["name"], {}).get("ifindex", index) != index, containers.log())
    wait_for(lambda: connected(containers, key) and answers("peer", A4), containers.log())
    assert containers.records()[key] == before


def test_a_containers_name_is_followed_and_given_back_to_its_record(containers: AgentHost) -> None:
    key, id = key_of(containers, "workload"), id_of("workload")

    def is_called(name: str) -> bool:
        """Return whether the record, and what stands beside all addresses, have a name, and the endpoint is well."""
        held = [one["secondary"] for one in containers.allocations().values() if one["handle_id"] == f"docker.{id}"]
        names = [one["workload_name"] for one in held]
        return names == [name] * 2 and containers.records()[key].get("workload_name") == name

    before = containers.records()[key]
    assert is_called("workload")
    run("docker", "rename", "workload", "renamed")
    wait_for(lambda: is_called("renamed") and connected(containers, key), containers.log())
    assert containers.records()[key] == {**before, "workload_name": "renamed"}
    told = f"container {id[:12]} (renamed) was called workload before"
    wait_for(lambda: told in containers.log(), "the agent to tell of it")
    assert containers.ctl("container", "renamed", "profile", "show").out == "web\n"
    assert re.search("Name: +renamed\n", containers.ctl("ipam", "info", A4).out)
    # an old tool that rewrites the record drops what it does not know
    old = {name: value for name, value in before.items() if name != "workload_name"}
    containers.etcd.put(key, {**old, "colour": "red"})
    wait_for(lambda: is_called("renamed"), containers.log())
    assert containers.records()[key]["colour"] == "red"
    # also of one that is stopped, and while no agent runs
    run("docker", "stop", "--time=0", "renamed")
    run("docker", "rename", "renamed", "again")
    wait_for(lambda: is_called("again") and containers.records()[key]["state"] == "inactive", containers.log())
    containers.kill_agent()
    run("docker", "rename", "again", "workload")
    run("docker", "start", "workload")
    assert is_called("again")
    containers.start_agent()
    wait_for(lambda: is_called("workload") and connected(containers, key), containers.log())
    assert answers("workload", B4)


# 2. removed


def test_a_removed_container_is_garbage_collected(containers: AgentHost) -> None:
    ids = id_of("workload"), id_of("peer")
    run("docker", "rm", "-f", "workload")
    wait_for(lambda: set(containers.allocations()) == {B4} and len(containers.records()) == 1, containers.log())
    run("docker", "stop", "--time=0", "peer")
    wait_for(lambda: record(containers, "docker")["state"] == "inactive", containers.log())
    run("docker", "rm", "peer")
    wait_for(lambda: is_clean(containers), containers.log())
    assert containers.status()["collected"] == 2
    for id in ids:
        assert re.search(f"container {id[:12]}.* no longer exists; removed 1 endpoint, released ", containers.log())
    assert containers.ctl("ipam", "check").err == ""


def test_one_removed_while_no_agent_ran_is_garbage_collected_at_its_start(containers: AgentHost) -> None:
    containers.kill_agent()
    run("docker", "rm", "-f", "workload")
    run("docker", "restart", "--time=0", "peer")
    key = key_of(containers, "peer")
    containers.start_agent()
    wait_for(lambda: set(containers.allocations()) == {B4} and len(containers.records()) == 1, containers.log())
    wait_for(lambda: connected(containers, key), containers.log())


def test_objects_of_unknown_hosts_are_not_changed(node: AgentHost, engine: None) -> None:
    gone_id, other, mine = "ab" * 32, "cd" * 32, "ef" * 32
    node.kill_agent()
    owner = {"orchestrator": "docker", "interface": "eth1", "namespace": None, "endpoint": "1" * 32}
    attributes = [
        {"handle_id": None, "secondary": {}},
        {"handle_id": f"docker.{other}", "secondary": {**owner, "host": "elsewhere", "workload": other}},
        {"handle_id": f"k8s.{gone_id}", "secondary": {**owner, "host": node.name, "workload": gone_id}},
        {"handle_id": f"docker.{other}", "secondary": {}},
        {"handle_id": f"docker.{mine}", "secondary": {**owner, "host": node.name, "workload": mine}},
    ]
    block = {"cidr": "192.168.0.0/26", "affinity": f"host:{node.name}", "attributes": attributes}
    node.etcd.put(
        "/calico/ipam/v2/assignment/ipv4/block/192.168.0.0-26",
        {**block, "allocations": [None, 0, 1, 2, 3, 4] + [None] * 58},
    )
    for handle, count in ((f"docker.{other}", 2), (f"k8s.{gone_id}", 1), (f"docker.{mine}", 1)):
        value = {"id": handle, "block": {"192.168.0.0/26": count}}
        node.etcd.put(f"/calico/ipam/v2/handle/{handle}", value)

    def endpoint(host: str, orchestrator: str, workload: str, number: int) -> str:
        key = f"/calico/v1/host/{host}/workload/{orchestrator}/{workload}/endpoint/{number:032x}"
        net = {"name": f"cali{number:011x}", "mac": "02:00:00:00:00:01", "ipv4_nets": [f"192.168.0.{number}/32"]}
        node.etcd.put(key, net)
        return key

    kept = {
        endpoint("elsewhere", "docker", other, 2),
        endpoint(node.name, "k8s", gone_id, 3),
        endpoint(node.name, "docker", "-var-run-netns-old", 9),
    }
    endpoint(node.name, "docker", gone_id, 1)  # an old tool's: its address has no handle
    # an engine that knows none of them may have been started before its data was there
    node.start_agent()
    wait_for(lambda: (record(node, f"docker/{gone_id}") or {}).get("state") == "inactive", node.log())
    assert holds(lambda: len(node.records()) == len(kept) + 1, 2), node.log()
    node.ctl("config", "felix", "GraceTime", "1")
    wait_for(lambda: set(node.records()) == kept, node.log())
    wait_for(lambda: set(node.allocations()) == {f"192.168.0.{n}" for n in (1, 2, 3, 4)}, node.log())
    look_now()
    node.sync()
    assert set(node.records()) == kept
    assert "kept 192.168.0.1, which has no handle" in node.log()


# an engine that cannot be asked


def test_an_engine_that_is_away_is_not_taken_for_one_without_containers(bare_host: Host, engine: None) -> None:
    home = HOME / "own"
    socket = f"unix://{HOME}/own.sock"
    docker = ("docker", "--host", socket)
    host = AgentHost(bare_host.etcd)
    process = start_docker(home, host=socket)
    try:
        host.start_agent(DOCKER_HOST=socket)
        host.ctl("config", "felix", "GraceTime", "1")
        connect_containers(host, home, socket)
        before = host.records()
        # it hangs: whoever asks it waits
        process.send_signal(signal.SIGSTOP)
        run("ip", "link", "delete", before[sorted(before)[0]]["name"])
        assert holds(lambda: len(host.records()) == 2 and len(host.allocations()) == 2, 4), host.log()
        process.send_signal(signal.SIGCONT)
        wait_for(lambda: all(connected(host, key) for key in before), host.log(), 60)
        # it ends, and all containers with it; a container goes while it is away
        process.terminate()
        process.wait()
        assert holds(lambda: len(host.records()) == 2 and len(host.allocations()) == 2, 3), host.log()
        process = start_docker(home, host=socket)
        wait_for(lambda: all(connected(host, key) for key in before), host.log(), 60)
        assert host.records() == before
        wait_for(lambda: "the Docker Engine can be asked again" in host.log(), host.log())
    finally:
        process.send_signal(signal.SIGCONT)
        run(*docker, "rm", "-f", "workload", "peer", check=False)
        process.terminate()
        process.wait()


def test_a_container_of_another_engine_is_left_alone(containers: AgentHost, tmp_path: Path) -> None:
    containers.kill_agent()
    socket = f"unix://{HOME}/other.sock"
    other = start_docker(HOME / "other", host=socket)
    try:
        before, held = containers.records(), set(containers.allocations())
        containers.start_agent(DOCKER_HOST=socket)
        wait_for(lambda: "is it another Docker Engine's?" in containers.log(), containers.log())
        look_now()
        containers.sync()
        assert (containers.records(), set(containers.allocations())) == (before, held)
        assert answers("peer", A4)
    finally:
        other.terminate()
        other.wait()


# 3. namespaces


def test_a_namespace_that_comes_back_is_reattached(pair: AgentHost) -> None:
    key = pair.key("a")
    before = pair.records()[key]
    pair.ctl("container", "/var/run/netns/a", "ip", "add", A6)
    before = pair.records()[key]
    run("ip", "netns", "delete", "a")
    wait_for(lambda: pair.records()[key]["state"] == "inactive", pair.log())
    assert {A4, A6} <= set(pair.allocations())
    run("ip", "netns", "add", "a")
    wait_for(lambda: pair.records()[key] == before and connected(pair, key), pair.log())
    assert links("a")["eth1"]["address"] == before["mac"]
    assert addresses("a", "eth1") == {f"{A4}/32", f"{A6}/128"}
    assert run("ip", "netns", "exec", "b", "ping", "-c", "1", "-W", "2", A4).status == 0


def test_a_namespace_that_stays_away_is_garbage_collected(pair: AgentHost) -> None:
    pair.ctl("config", "felix", "GraceTime", "2")
    run("ip", "netns", "delete", "a")
    wait_for(lambda: record(pair, "-a/")["state"] == "inactive", pair.log())
    wait_for(lambda: record(pair, "-a/") is None and set(pair.allocations()) == {B4}, pair.log())
    # though something still runs in it
    sleeper = subprocess.Popen(["ip", "netns", "exec", "b", "sleep", "1000"])
    try:
        wait_for(lambda: unshared(sleeper), "sleep")
        run("ip", "netns", "delete", "b")
        wait_for(lambda: is_clean(pair), pair.log())
    finally:
        sleeper.kill()
        sleeper.wait()


def unshared(process: subprocess.Popen) -> bool:
    return Path(f"/proc/{process.pid}/ns/net").stat().st_ino != Path("/proc/self/ns/net").stat().st_ino


def test_an_ended_process_is_garbage_collected_at_once_and_its_successor_gets_nothing(node: AgentHost) -> None:
    first = subprocess.Popen(["unshare", "-n", "sleep", "1000"])
    wait_for(lambda: unshared(first), "unshare")
    path = f"/proc/{first.pid}/ns/net"
    node.ctl("container", "add", path, A4)
    node.kill_agent()
    first.kill()
    first.wait()
    # another process gets the same id
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(first.pid - 1))
    second = subprocess.Popen(["unshare", "-n", "sleep", "1000"])
    try:
        assert second.pid == first.pid
        wait_for(lambda: unshared(second), "unshare")
        node.start_agent()
        wait_for(lambda: is_clean(node), node.log())
        inside = run("nsenter", f"--net={path}", "ip", "-json", "link", "show")
        assert [link["ifname"] for link in json.loads(inside.out)] == ["lo"]
        node.ctl("container", "add", path, A4)
        node.sync()
    finally:
        second.kill()
        second.wait()
    wait_for(lambda: is_clean(node), node.log())


# 4. reboot


@pytest.mark.parametrize("first", ["engine", "agent"])
def test_after_a_reboot_everything_is_connected_again(bare_host: Host, first: str) -> None:
    home, socket = HOME / f"boot-{first}", f"unix://{HOME}/boot.sock"
    docker = ("docker", "--host", socket)
    host = AgentHost(bare_host.etcd)
    process = start_docker(home, host=socket)
    try:
        host.start_agent(DOCKER_HOST=socket)
        connect_containers(host, home, socket)
        host.add("space", "192.168.0.3")
        before = host.records()
        # the host goes down: no interface, no table, no file below /run is left
        host.kill_agent()
        process.terminate()
        process.wait()
        run("ip", "netns", "delete", "space")
        run("nft", "flush", "ruleset")
        wait_for(lambda: not calico_links(), "the interfaces' end")
        run("rm", "-rf", "/run/calico")
        if first == "agent":
            host.start_agent(DOCKER_HOST=socket)
        process = start_docker(home, host=socket)
        if first == "engine":
            host.start_agent(DOCKER_HOST=socket)
        run("ip", "netns", "add", "space")
        wait_for(lambda: all(connected(host, key) for key in before), host.log(), 60)
        assert host.records() == before
    finally:
        run(*docker, "rm", "-f", "workload", "peer", check=False)
        process.terminate()
        process.wait()


# 5. only under the lock


def test_a_command_under_way_is_not_disturbed(pair: AgentHost) -> None:
    before = pair.records()
    with locked(pair, "a"):
        run("ip", "link", "delete", pair.interface("a"))
        wait_for(lambda: pair.endpoint_status(pair.key("a"))["status"] == "down", pair.log())
        look_now()
        assert holds(lambda: pair.records() == before and len(calico_links()) == 1, 2)
    wait_for(lambda: len(calico_links()) == 2 and connected(pair, pair.key("a")), pair.log())


PATH = "/var/run/netns/blue"
CUT = {
    "add": (("container", "add", PATH, A4), ()),
    "remove": (("container", "remove", PATH), (("container", "add", PATH, A4),)),
    "ip add": (("container", PATH, "ip", "add", A6), (("container", "add", PATH, A4),)),
    "ip remove": (
        ("container", PATH, "ip", "remove", A6),
        (("container", "add", PATH, A4), ("container", PATH, "ip", "add", A6)),
    ),
}


def is_consistent(host: Host) -> bool:
    try:
        host.check_consistent()
        inside = links("blue")
        recorded = {net for r in host.records().values() for net in r["ipv4_nets"] + r["ipv6_nets"]}
        assert {net for name in inside for net in addresses("blue", name)} == recorded
        assert not list(Path(f"/run/calico/{host.name}").glob("unfinished.*"))
    except AssertionError:
        return False
    return True


IMPATIENT_AGENT = """
from calicoctl.felix import agent, process
from calicoctl.workloads import locks
locks.PATIENCE = 3.0
agent.run("host1", process.Options())
"""


def test_a_command_that_never_ends_is_reported(pair: AgentHost) -> None:
    pair.kill_agent()
    agent = subprocess.Popen([sys.executable, "-c", IMPATIENT_AGENT], env=pair.environment(), stderr=subprocess.DEVNULL)
    try:
        with locked(pair, "a"):
            run("ip", "-n", "a", "link", "delete", "eth1")
            error = wait_for(lambda: (pair.status()["last_error"] or {}).get("error"), "the report")
            assert "-var-run-netns-a: another command has been working on this workload for 3 s" in error
            assert "is locked" in error
        wait_for(lambda: "eth1" in links("a"), "the repair")
    finally:
        agent.terminate()
        agent.wait()


@pytest.mark.parametrize("command", CUT)
def test_leftovers_of_kill_9_are_reconciled(node: AgentHost, blue: str, tmp_path: Path, command: str) -> None:
    words, before = CUT[command]
    log = tmp_path / "steps"
    number, ended = 0, False
    while not ended:
        log.write_text("")
        for line in before:
            node.ctl(*line)
        fault = {"FAULT": f"kill:{number}", "FAULT_LOG": str(log)}
        result = node.ctl(*words, status=None, command=[sys.executable, FAULTY], env=fault)
        ended = result.status != -9
        look_now()
        wait_for(lambda: is_consistent(node), f"step {number}: {log.read_text()}\n{node.log()}", 40)
        node.ctl("container", "remove", PATH, status=None)
        wait_for(lambda: is_clean(node), f"step {number}: {log.read_text()}\n{node.log()}", 40)
        number += 1
    assert number > 3


# 6. without an agent


def test_container_add_reattaches_a_restarted_container_without_an_agent(containers: AgentHost) -> None:
    key = key_of(containers, "workload")
    before = containers.records()[key]
    run("docker", "stop", "--time=0", "workload")
    wait_for(lambda: "inactive_since" in containers.records()[key], containers.log())
    containers.ctl("node", "stop", "--force")
    run("docker", "start", "workload")
    containers.ctl("container", "add", "workload", A4)
    assert containers.records()[key] == before
    assert container_links("workload")["eth1"]["address"] == before["mac"]


# what a path leads to, and what may be another's


class Process:
    """A process in a network namespace of its own; another may get its id."""

    def __init__(self, pid: int | None = None) -> None:
        if pid is not None:
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        self.process = subprocess.Popen(["unshare", "-n", "sleep", "1000"])
        assert pid in (None, self.process.pid)
        wait_for(lambda: unshared(self.process), "unshare")
        self.path = f"/proc/{self.process.pid}/ns/net"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def interfaces(self) -> list[str]:
        inside = run("nsenter", f"--net={self.path}", "ip", "-json", "link", "show").out
        return [link["ifname"] for link in json.loads(inside) if link["ifname"] != "lo"]


def test_a_link_to_a_process_is_not_taken_for_a_name(node: AgentHost) -> None:
    first = Process()
    link = Path("/var/run/netns/web")
    link.symlink_to(first.path)
    node.ctl("container", "add", str(link), A4)
    node.sync()
    first.end()
    second = Process(first.process.pid)
    try:
        look_now()
        wait_for(lambda: is_clean(node), node.log())
        assert second.interfaces() == []
    finally:
        link.unlink()
        second.end()


def test_another_process_of_the_same_id_is_connected_from_scratch(node: AgentHost) -> None:
    first = Process()
    node.ctl("container", "add", first.path, A4)
    node.profile("secret")
    node.ctl("container", first.path, "profile", "set", "secret")
    before = node.record()
    node.ctl("node", "stop", "--force")
    first.end()
    second = Process(first.process.pid)
    try:
        node.ctl("container", "add", first.path, "ipv4")
        now = node.record()
        assert now["profile_ids"] == [] and now["mac"] != before["mac"] and second.interfaces() == ["eth1"]
        node.check_consistent()
        node.ctl("container", "remove", first.path)
    finally:
        second.end()


def test_an_interface_removed_from_a_process_is_restored(node: AgentHost, tmp_path: Path) -> None:
    process = Process()
    try:
        node.ctl("container", "add", process.path, A4)
        name = node.record()["name"]
        (key,) = node.records()
        wait_for(lambda: connected(node, key), node.log())
        run("ip", "link", "delete", name)
        wait_for(lambda: process.interfaces() == ["eth1"] and connected(node, key), node.log())
        fault = {"FAULT": "kill:0", "FAULT_LOG": str(tmp_path / "steps")}
        killed = node.ctl("container", "remove", process.path, status=None, command=[sys.executable, FAULTY], env=fault)
        assert killed.status == -9 and name not in calico_links()
        look_now()
        wait_for(lambda: process.interfaces() == ["eth1"] and connected(node, key), node.log())
        node.check_consistent()
    finally:
        process.end()
    wait_for(lambda: is_clean(node), node.log())


def test_a_removed_container_with_an_unreadable_record_is_garbage_collected(containers: AgentHost) -> None:
    workload, peer = key_of(containers, "workload"), key_of(containers, "peer")
    containers.etcd.put(workload, "{not json")
    containers.sync()
    run("docker", "rm", "-f", "workload")
    wait_for(lambda: workload not in containers.etcd.tree() and set(containers.allocations()) == {B4}, containers.log())
    run("docker", "run", "--net=none", "--name", "workload", "-tid", "busybox")
    containers.ctl("container", "add", "workload", A4)
    containers.etcd.put(peer, "{not json")
    containers.kill_agent()
    run("docker", "rm", "-f", "peer")
    containers.start_agent()
    wait_for(lambda: peer not in containers.etcd.tree() and set(containers.allocations()) == {A4}, containers.log())


HOLDERS = ["a container", "a paused container", "a process"]


@pytest.mark.parametrize(("how", "holder"), [("restart", HOLDERS[0]), *(("rm", holder) for holder in HOLDERS)])
def test_a_namespace_that_outlives_its_container(containers: AgentHost, how: str, holder: str) -> None:
    """While no agent runs; another container shares it, or a process of the host's is in it."""
    key, inside = key_of(containers, "workload"), run("docker", "inspect", "-f", "{{.State.Pid}}", "workload").out
    run("docker", "run", "--net=container:workload", "--name", "sidecar", "-tid", "busybox")
    process = None
    if holder == "a process":
        process = subprocess.Popen(["nsenter", "-t", inside.strip(), "-n", "sleep", "1000"])
        wait_for(lambda: unshared(process), "nsenter")
        run("docker", "rm", "-f", "sidecar")
    containers.kill_agent()
    try:
        run("docker", how, *(["--time=0"] if how == "restart" else ["-f"]), "workload")
        if holder == "a paused container":
            run("docker", "pause", "sidecar")
        # the engine tells of what has happened in the last second to whoever begins to listen
        started = time.monotonic()
        wait_for(lambda: time.monotonic() > started + 2.5, "the events to be old")
        containers.start_agent()
        if how != "restart":
            wait_for(
                lambda: key not in containers.records() and set(containers.allocations()) == {B4}, containers.log()
            )
        else:
            wait_for(lambda: "eth1" in container_links("workload"), containers.log())
            wait_for(lambda: connected(containers, key) and answers("peer", A4), containers.log())
            assert run("docker", "inspect", "-f", "{{.State.Pid}}", "workload").out != inside
        assert process is not None or "eth1" not in container_links("sidecar")
    finally:
        run("docker", "rm", "-f", "sidecar", check=False)
        if process is not None:
            process.kill()
            process.wait()


def test_a_namespace_that_outlives_its_name(pair: AgentHost) -> None:
    """While no agent runs; a process is in it still."""
    sleeper = subprocess.Popen(["ip", "netns", "exec", "a", "sleep", "1000"])
    wait_for(lambda: unshared(sleeper), "sleep")
    try:
        pair.kill_agent()
        run("ip", "netns", "delete", "a")
        run("ip", "netns", "add", "a")
        pair.start_agent()
        wait_for(lambda: "eth1" in links("a") and connected(pair, pair.key("a")), pair.log())
        # the old one gets its name back, while an old tool has rewritten the record
        run("ip", "netns", "delete", "a")
        wait_for(lambda: record(pair, "-a/")["state"] == "inactive", pair.log())
        run("ip", "netns", "attach", "a", str(sleeper.pid))
        wait_for(lambda: "eth1" in links("a") and connected(pair, pair.key("a")), pair.log())
        run("ip", "netns", "delete", "a")
        wait_for(lambda: record(pair, "-a/")["state"] == "inactive", pair.log())
        old = record(pair, "-a/")
        del old["inactive_since"]
        pair.etcd.put(pair.key("a"), old)
        run("ip", "netns", "attach", "a", str(sleeper.pid))
        wait_for(lambda: record(pair, "-a/")["state"] == "active" and connected(pair, pair.key("a")), pair.log())
    finally:
        sleeper.kill()
        sleeper.wait()


def test_an_old_tools_namespace_is_reconciled_once_its_path_is_known(node: AgentHost, blue: str) -> None:
    set_learned(node.name, "namespace")  # as on a host that the old tool has registered
    key = f"/calico/v1/host/{node.name}/workload/docker/-var-run-netns-blue/endpoint/{'1' * 32}"
    node.etcd.put(key, {"name": "cali11111111111", "mac": "02:00:00:00:00:01", "ipv4_nets": [f"{A4}/32"]})
    node.ctl("container", "add", blue, A4)
    wait_for(lambda: connected(node, key), node.log())
    run("ip", "netns", "delete", "blue")
    wait_for(lambda: node.records()[key]["state"] == "inactive", node.log())
    run("ip", "netns", "add", "blue")
    wait_for(lambda: "eth1" in links("blue") and connected(node, key), node.log())


def test_without_a_next_hop_of_one_version_the_old_one_serves(node: AgentHost, blue: str) -> None:
    node.ctl("container", "add", blue, A4)
    node.ctl("container", blue, "ip", "add", A6)
    node.etcd.put(f"/calico/bgp/v1/host/{node.name}/ip_addr_v6", "")
    (key,) = node.records()
    before = node.records()[key]
    run("ip", "netns", "delete", "blue")
    wait_for(lambda: node.records()[key]["state"] == "inactive", node.log())
    run("ip", "netns", "add", "blue")
    wait_for(lambda: connected(node, key), node.log())
    assert node.records()[key] == before and addresses("blue", "eth1") == {f"{A4}/32", f"{A6}/128"}


# the store, set back


def test_a_store_restored_from_a_backup(bare_host: Host, own_etcd: Etcd, engine: None, tmp_path: Path) -> None:
    host = AgentHost(own_etcd)
    host.start_agent()
    run("docker", "run", "--net=none", "--name", "workload", "-tid", "busybox")
    try:
        host.ctl("container", "add", "workload", A4)
        (key,) = host.records()
        run("docker", "stop", "--time=0", "workload")
        wait_for(lambda: host.records()[key]["state"] == "inactive", host.log())
        own_etcd.stop()
        shutil.copytree(own_etcd.directory, tmp_path / "backup")
        own_etcd.start()
        own_etcd.await_ready()
        run("docker", "start", "workload")
        wait_for(lambda: connected(host, key), host.log())
        for number in range(20):  # so that the index is seen to have gone back
            own_etcd.put("/calico/v1/other", str(number))
        own_etcd.stop()
        shutil.rmtree(own_etcd.directory)
        shutil.copytree(tmp_path / "backup", own_etcd.directory)
        own_etcd.start()
        own_etcd.await_ready()
        wait_for(lambda: host.records()[key]["state"] == "active" and connected(host, key), host.log(), 40)
        # emptied: what runs keeps its network, and can be connected anew
        own_etcd.delete("/calico")
        wait_for(lambda: host.status()["waiting_for"], host.log(), 40)
        host.ctl("node", f"--ip={HOST_IP}", f"--ip6={HOST_IP6}", f"--log-dir={LOG_DIR}")
        host.ctl("container", "add", "workload", A4, "--wait=20")
        assert len(calico_links()) == 1
        host.check_consistent()
        host.ctl("container", "remove", "workload")
    finally:
        run("docker", "rm", "-f", "workload")


def test_a_removal_after_the_engine_was_away_is_acted_on_at_once(bare_host: Host) -> None:
    home, socket = HOME / "again", f"unix://{HOME}/again.sock"
    docker = ("docker", "--host", socket)
    host = AgentHost(bare_host.etcd)
    process = start_docker(home, host=socket)
    try:
        host.start_agent(DOCKER_HOST=socket)
        import_busybox(home / "busybox", socket)
        always = ("--restart=always", "--stop-signal=KILL")
        run(*docker, "run", "--net=none", *always, "--name", "workload", "-tid", "busybox")
        host.ctl("container", "add", "workload", A4, env={"DOCKER_HOST": socket})
        (key,) = host.records()
        process.kill()
        process.wait()
        process = start_docker(home, host=socket)
        wait_for(lambda: "the Docker Engine can be asked again" in host.log(), host.log())
        wait_for(lambda: connected(host, key), host.log(), 60)
        run(*docker, "rm", "-f", "workload")
        wait_for(lambda: is_clean(host), host.log(), 20)
    finally:
        run(*docker, "rm", "-f", "workload", check=False)
        process.terminate()
        process.wait()


def test_an_impostor_of_the_engine_is_not_trusted(containers: AgentHost) -> None:
    """All that it has are pages that are not found."""
    containers.kill_agent()
    before = containers.records()

    class NotFound(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404, "page not found")

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotFound) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        containers.ctl("config", "felix", "GraceTime", "0")
        containers.start_agent(DOCKER_HOST=f"tcp://127.0.0.1:{server.server_address[1]}")
        run("ip", "link", "delete", next(iter(before.values()))["name"])
        assert holds(lambda: containers.records() == before, 4), containers.log()
        containers.kill_agent()
        server.shutdown()


# what is left where no agent looks


def test_removing_a_host_removes_leftovers_of_interrupted_commands(node: AgentHost, blue: str, tmp_path: Path) -> None:
    node.ctl("node", "stop")
    for step in (2, 5):
        fault = {"FAULT": f"kill:{step}", "FAULT_LOG": str(tmp_path / "steps")}
        node.ctl("container", "add", PATH, A4, status=-9, command=[sys.executable, FAULTY], env=fault)
        assert node.allocations() or step == 2
        node.ctl("node", "remove")
        assert node.allocations() == {} and node.handles() == {} and calico_links() == set()
        assert not list(Path("/run/calico").glob("*/*"))
        node.register(HOST_IP)


def test_an_empty_lock_is_removed(node: AgentHost) -> None:
    lock = Path(f"/run/calico/{node.name}/docker.{'ab' * 32}")
    lock.touch()
    look_now()
    wait_for(lambda: not lock.exists(), "the lock's end")
    held = Path(f"/run/calico/{node.name}/namespace.-x")
    with held.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lock.touch()
        look_now()
        wait_for(lambda: not lock.exists(), "the lock's end")
        assert held.exists()
    wait_for(lambda: look_now() or not held.exists(), "the lock's end")


def test_an_empty_handle_is_removed_and_reported(node: AgentHost, engine: None) -> None:
    node.kill_agent()
    id = "cd" * 32
    node.etcd.put(f"/calico/ipam/v2/handle/docker.{id}", {"id": f"docker.{id}", "block": {"192.168.0.0/26": 1}})
    node.start_agent()
    wait_for(lambda: node.handles() == {}, node.log())
    wait_for(lambda: node.status()["collected"] == 1 and "a handle that held nothing" in node.log(), node.log())
