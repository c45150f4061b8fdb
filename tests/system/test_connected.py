"""What etcd says of a workload that nobody has connected here does not give it a network. With a running agent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.agent import A4, B4, AgentHost, holds
from tests.system.support import HOST_IP, Host, calico_links, links, run, wait_for
from tests.system.test_workload_keeper import connected, container_links, id_of, look_now

STATE = Path("/var/lib/calico/host1/workloads")
VICTIM = "-var-run-netns-victim"


def plant(host: Host, orchestrator: str, workload: str, address: str, namespace: str | None, endpoint: str) -> str:
    """Write what `container add` writes: a record, an address with attributes, and a handle. Return its key."""
    handle = f"{orchestrator}.{workload}"
    secondary = {
        "host": host.name,
        "orchestrator": orchestrator,
        "workload": workload,
        "endpoint": endpoint,
        "interface": "eth1",
        "namespace": namespace,
    }
    block_key = "/calico/ipam/v2/assignment/ipv4/block/192.168.0.0-26"
    empty = {"cidr": "192.168.0.0/26", "affinity": f"host:{host.name}", "allocations": [None] * 64, "attributes": []}
    block = json.loads(host.etcd.get(block_key) or json.dumps(empty))
    block["allocations"][int(address.rpartition(".")[2])] = len(block["attributes"])
    block["attributes"].append({"handle_id": handle, "secondary": secondary})
    host.etcd.put(block_key, block)
    host.etcd.put(f"/calico/ipam/v2/handle/{handle}", {"id": handle, "block": {"192.168.0.0/26": 1}})
    key = f"/calico/v1/host/{host.name}/workload/{orchestrator}/{workload}/endpoint/{endpoint}"
    record = {"state": "active", "name": f"cali{endpoint[:11]}", "mac": "02:00:00:00:00:01", "profile_ids": []}
    host.etcd.put(key, {**record, "ipv4_nets": [f"{address}/32"], "ipv6_nets": [], "ipv4_gateway": HOST_IP})
    return key


@pytest.fixture
def guarded(node: AgentHost, engine: None) -> Iterator[AgentHost]:
    """A host with a namespace `victim` and a container `workload` that nobody has connected."""
    run("ip", "netns", "add", "victim")
    run("docker", "run", "--net=none", "--name", "workload", "-tid", "busybox")
    yield node
    run("docker", "rm", "-f", "workload", check=False)


def told(host: AgentHost) -> str:
    """Return what the agent says of workloads that nobody has connected; nothing if there are none."""
    return next((one["error"] for one in host.status()["troubles"] if one["subject"] == "not connected"), "")


def test_what_nobody_has_connected_gets_no_network(guarded: AgentHost) -> None:
    id = id_of("workload")
    space = plant(guarded, "namespace", VICTIM, A4, "/var/run/netns/victim", "1" * 32)
    box = plant(guarded, "docker", id, B4, None, "2" * 32)
    # its path, and that of another record, lead to the same namespace
    plant(guarded, "namespace", "-var-run-netns-other", "192.168.0.9", "/var/run/netns/victim", "3" * 32)
    guarded.sync()
    look_now()
    wait_for(lambda: "connected 3 of" in told(guarded), guarded.log())
    assert id[:12] in told(guarded) and VICTIM in told(guarded)
    assert "not attached" in guarded.ctl("status", status=None).out
    run("docker", "restart", "--time=0", "workload")
    look_now()
    guarded.kill_agent()
    shutil.rmtree("/run/calico")  # as after a reboot
    guarded.start_agent()
    guarded.sync()
    look_now()
    assert holds(lambda: not calico_links() and not links("victim"), 1), guarded.log()
    assert container_links("workload") == {}
    assert {guarded.endpoint_status(key)["status"] for key in (space, box)} == {"down"}

    # who connects them has them attached, as they are, and the agent keeps them so
    guarded.ctl("container", "add", "workload", B4)
    guarded.ctl("container", "add", "/var/run/netns/victim", A4)
    wait_for(lambda: connected(guarded, space) and connected(guarded, box), guarded.log())
    look_now()
    wait_for(lambda: "connected 1 of" in told(guarded), guarded.log())
    run("ip", "link", "delete", "cali" + "1" * 11)
    wait_for(lambda: "eth1" in links("victim") and connected(guarded, space), guarded.log())
    files = {file.name: file.read_text() for file in STATE.glob("*/*")}
    assert files == {id: "", VICTIM: "/var/run/netns/victim"}
    assert {path.stat().st_mode & 0o7777 for path in STATE.rglob("*") if path.is_file()} == {0o600}
    assert {path.stat().st_mode & 0o7777 for path in (STATE, *STATE.iterdir()) if path.is_dir()} == {0o700}

    # an id that would make the kernel choose an interface's name
    record = json.loads(guarded.etcd.get(space))
    guarded.etcd.delete(space)
    guarded.etcd.put(space[:-32] + "%d" + "0" * 30, {**record, "name": "cali%d000000000"})
    run("ip", "link", "delete", "cali" + "1" * 11)
    run("ip", "netns", "delete", "victim")
    run("ip", "netns", "add", "victim")
    wait_for(lambda: "is not hexadecimal" in guarded.log(), guarded.log())
    assert "is not hexadecimal" in guarded.ctl("container", "add", "/var/run/netns/victim", A4, status=1).err
    assert calico_links() == {"cali" + "2" * 11}

    # what is disconnected, or gone, is connected no more
    guarded.ctl("container", "remove", "/var/run/netns/victim")
    run("docker", "rm", "-f", "workload")
    wait_for(lambda: not list(STATE.glob("*/*")), guarded.log())
    guarded.ctl("node", "remove", "--remove-endpoints")
    assert sorted(path.name for path in STATE.iterdir()) == ["docker.learned", "namespace.learned"]
    guarded.check_nothing_left(folders=False)

    # whoever writes to etcd puts everything back: nothing is learned a second time
    run("docker", "run", "--net=none", "--name", "again", "-tid", "busybox")
    try:
        again = plant(guarded, "docker", id_of("again"), A4, None, "3" * 32)
        guarded.etcd.put(f"/calico/bgp/v1/host/{guarded.name}/ip_addr_v4", HOST_IP)
        guarded.start_agent()
        wait_for(lambda: "connected 1 of" in told(guarded), guarded.log())
        assert not calico_links() and guarded.endpoint_status(again)["status"] == "down"
    finally:
        run("docker", "rm", "-f", "again")


def test_paths_are_not_taken_from_the_store(pair: AgentHost) -> None:
    """What a namespace's record and address say is somebody else's, after a reboot and without etcd for a while."""
    run("ip", "netns", "add", "victim")
    key = pair.key("a")
    block_key = "/calico/ipam/v2/assignment/ipv4/block/192.168.0.0-26"
    block = pair.etcd.get(block_key)
    tree = {name: value for name, value in pair.etcd.tree().items() if "/felix/" not in name}
    pair.etcd.put(block_key, block.replace("/var/run/netns/a", "/var/run/netns/victim"))
    pair.kill_agent()
    for name in ("a", "b"):
        run("ip", "netns", "delete", name)
    wait_for(lambda: not calico_links(), "the interfaces' end")
    shutil.rmtree("/run/calico")
    pair.start_agent()
    for name in ("a", "b"):
        run("ip", "netns", "add", name)
    wait_for(lambda: connected(pair, pair.key("b")) and "eth1" in links("a"), pair.log())
    assert links("victim") == {} and len(calico_links()) == 2
    # the store is lost, and restored: what was connected is so again
    pair.etcd.delete("/calico")
    wait_for(lambda: pair.status()["waiting_for"], pair.log(), 40)
    pair.start_agent()
    for name, value in tree.items():
        pair.etcd.put(name, value)
    run("ip", "netns", "delete", "a")
    wait_for(lambda: json.loads(pair.etcd.get(key))["state"] == "inactive", pair.log())
    run("ip", "netns", "add", "a")
    wait_for(lambda: connected(pair, key) and "eth1" in links("a"), pair.log())


def test_what_an_older_version_has_connected_is_learned_once(guarded: AgentHost) -> None:
    """What is wired; and after a reboot, a container without a network of its own whose addresses name this host."""
    for name in ("old", "gone"):
        run("docker", "run", "--net=none", "--name", name, "-tid", "busybox")
    try:
        guarded.ctl("container", "add", "workload", A4)
        guarded.ctl("container", "add", "old", B4)
        run("docker", "stop", "--time=0", "old")
        guarded.add("space", "192.168.0.3")
        key = guarded.key("space")
        guarded.kill_agent()
        # an older version has the paths of namespaces in /run alone
        shutil.rmtree("/var/lib/calico/host1")
        Path("/run/calico/host1/namespace.-var-run-netns-space").write_text("/var/run/netns/space")
        Path(f"/run/calico/host1/namespace.{VICTIM}").write_text("/var/run/netns/victim")
        plant(guarded, "namespace", VICTIM, "192.168.0.9", "/var/run/netns/victim", "1" * 32)
        foreign = plant(guarded, "docker", id_of("gone"), "192.168.0.8", None, "2" * 32)
        block_key = "/calico/ipam/v2/assignment/ipv4/block/192.168.0.0-26"
        block = json.loads(guarded.etcd.get(block_key))
        block["attributes"][-1]["secondary"]["host"] = "elsewhere"
        guarded.etcd.put(block_key, block)
        guarded.start_agent()
        expected = {id_of("workload"), id_of("old"), "-var-run-netns-space"}
        wait_for(lambda: {file.name for file in STATE.glob("*/*")} == expected, guarded.log())
        run("docker", "start", "old")
        run("ip", "netns", "delete", "space")
        run("ip", "netns", "add", "space")
        wait_for(lambda: "eth1" in container_links("old") and connected(guarded, key), guarded.log())
        # not again
        run("docker", "restart", "--time=0", "gone")
        block["attributes"][-1]["secondary"]["host"] = guarded.name
        guarded.etcd.put(block_key, block)
        guarded.kill_agent()
        guarded.start_agent()
        wait_for(lambda: "connected 2 of" in told(guarded), guarded.log())
        assert links("victim") == {} and container_links("gone") == {} and guarded.etcd.get(foreign)
    finally:
        run("docker", "rm", "-f", "old", "gone", check=False)


def test_without_space_for_it_nothing_is_connected(host: Host, blue: str) -> None:
    Path("/var/lib/calico").mkdir(exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=1", "tmpfs", "/var/lib/calico")
    try:
        said = host.ctl("container", "add", blue, "ipv4", status=1).err
        assert said.count("\n") == 1 and "/var/lib/calico/host1/" in said and "No space left" in said
        run("mount", "-o", "remount,ro", "/var/lib/calico")
        said = host.ctl("container", "add", blue, "ipv4", status=1).err
        assert said.count("\n") == 1 and "/var/lib/calico/host1/" in said and "Read-only file system" in said
    finally:
        run("umount", "/var/lib/calico")
    host.check_nothing_left()
