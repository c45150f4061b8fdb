"""A host's name and addresses are unique: a host whose name changes, and a second machine with a name in use."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.agent import A4, AgentHost, holds
from tests.system.machines import Machine, other_machine
from tests.system.support import HOST_IP, Etcd, Host, calico_links, end_agents, run, wait_for

STATUS = "/calico/felix/v1/host/host1/status"
OLD_STATUS = json.dumps({"time": "2016-01-01T00:00:00Z", "uptime": 1.0, "first_update": False})


@pytest.fixture
def open_etcd(bare_host: Host, tmp_path: Path) -> Iterator[Etcd]:
    """An etcd that other machines reach."""
    etcd = Etcd(tmp_path / "etcd")
    etcd.start(
        None,
        f"--listen-client-urls=http://0.0.0.0:{etcd.port}",
        f"--advertise-client-urls=http://198.51.100.1:{etcd.port}",
    )
    etcd.await_ready()
    yield etcd
    end_agents()
    etcd.stop(9)


def processes() -> set[str]:
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if "calicoctl.felix" in words or Path(words[0]).name == "etcd":
            found.add(folder.name)
    return found


def stored(etcd: Etcd) -> dict[str, str]:
    """All that is in the store, but for what agents renew."""
    return {key: value for key, value in etcd.tree().items() if not key.endswith("/status")}


def refused(machine: Host, *arguments: str) -> str:
    """Run a command that must be refused, and change nothing; return what it says."""
    before = stored(machine.etcd), processes(), sorted(Path("/var/log/calico").glob("*"))
    said = machine.ctl(*arguments, status=1)
    assert (stored(machine.etcd), processes(), sorted(Path("/var/log/calico").glob("*"))) == before
    assert said.out == ""
    if isinstance(machine, Machine):
        assert not list((machine.home / "run").iterdir()) and not list((machine.home / "log").iterdir())
    return said.err


def test_a_second_machine_under_a_name_in_use(open_etcd: Etcd) -> None:
    first = AgentHost(open_etcd)
    first.start_agent()
    first.add("a", A4)
    first.sync()
    with other_machine(open_etcd) as second:
        macs = "/calico/bgp/v1/host/host1/macs"  # that of the link to the second machine
        wait_for(lambda: open_etcd.get(macs) not in (None, "[]"), macs)
        said = refused(second, "node", "--ip=198.51.100.2")
        assert "host1" in said and HOST_IP in said and "--force" in said
        assert "waiting" not in said

        third = Host(open_etcd, "third")
        said = refused(third, "node", "remove", "--hostname=host1", "--remove-endpoints")
        assert "runs on this machine" in said
        said = refused(second, "node", "remove", "--remove-endpoints")
        assert HOST_IP in said and "not gone" in said

        said = second.ctl("node", "--ip=198.51.100.2", "--force")
        assert "waiting" in said.err and "registered with 198.51.100.2" in said.out
        replaced = first.status()["replaced"]
        assert "198.51.100.2" in replaced or HOST_IP in replaced
        assert replaced in first.ctl("status", status=None).out and replaced in first.log()
        assert second.status()["replaced"] is None
        mine = json.loads(open_etcd.get(STATUS))

        # the namespace is not on the second machine, and the first leaves the record and the packets as they are
        wait_for(lambda: first.record()["state"] == "inactive", "the second machine's agent")
        assert A4 in run("ip", "route", "show", "proto", "80").out
        index = open_etcd.revision(first.key("a"))
        first.profile("xyzzy")
        open_etcd.put(f"{first.key('a').replace('/calico/v1', '/calico/felix/v1')}", "untouched")
        run("ip", "netns", "add", "b")  # the keeper looks at namespaces when something is mounted
        assert holds(lambda: A4 in run("ip", "route", "show", "proto", "80").out, 3)
        assert open_etcd.revision(first.key("a")) == index
        assert json.loads(open_etcd.get(STATUS))["machine"] == mine["machine"]
        assert "xyzzy" not in run("nft", "list", "table", "inet", "calico").out
        assert "198.51.100.2" in refused(first, "node", f"--ip={HOST_IP}")

        # the second machine is gone: the first has its name back when it is told to
        second.end()
        open_etcd.delete(STATUS)
        assert "running already" in first.ctl("node", f"--ip={HOST_IP}").out
        wait_for(lambda: first.status()["replaced"] is None, "the agent to go on", 15)
        wait_for(lambda: first.record()["state"] == "active", "the workload to be looked at")
        assert json.loads(open_etcd.get(STATUS))["machine"] != mine["machine"]
        first.sync()


def test_node_waits_while_an_agents_machine_is_unknown(host: Host) -> None:
    machine = Machine(host.etcd)
    try:
        machine.ctl("node", f"--ip={HOST_IP}")
        status = json.loads(host.etcd.get(STATUS))
        machine_id, boot_id = ((machine.home / name).read_text().strip() for name in ("machine-id", "boot-id"))
        assert status["boot"] == boot_id
        assert len(status["machine"]) == 32 and machine_id not in json.dumps(host.etcd.tree())

        # what the agent writes once, some time after its start
        wait_for(lambda: host.etcd.get("/calico/bgp/v1/host/host1/macs") is not None, "the MACs")
        # a clone of it finds that the status is renewed
        clone = Machine(host.etcd, machine_id=machine_id)
        began = time.monotonic()
        said = refused(clone, "node", f"--ip={HOST_IP}")
        assert "waiting" in said.splitlines()[0] and "copy" in said and HOST_IP in said
        # it is renewed every 10 s; on a lease, nobody sees that, but that it does not expire
        assert time.monotonic() - began < (40 if host.etcd.api == "etcdv3" else 15)

        # killed, it goes on at once; after a reboot, when the last boot's status has expired
        machine.kill_agent()
        assert machine.ctl("node", f"--ip={HOST_IP}").err == ""
        machine.boot()
        host.etcd.put(STATUS, host.etcd.get(STATUS), ttl=2)
        said = machine.ctl("node", f"--ip={HOST_IP}")
        assert said.err.count("\n") == 1 and "waiting" in said.err and "The host agent is running" in said.out
        assert json.loads(host.etcd.get(STATUS))["boot"] != boot_id
    finally:
        machine.end()


def test_beside_an_old_agent(node: AgentHost) -> None:
    node.add("a", A4)
    node.sync()

    # one of an older version of this program, for its pid file tells that it is ours
    node.etcd.put(STATUS, OLD_STATUS)
    said = node.ctl("node", f"--ip={HOST_IP}")
    assert "running already" in said.out and said.err == ""

    # which it is not; ours gives way, and goes on when it has ended
    wait_for(lambda: "An old agent (Felix" in (node.status()["replaced"] or ""), "the agent to notice", 15)
    assert "An old agent (Felix" in node.ctl("status", status=None).out
    node.etcd.put(STATUS, OLD_STATUS, ttl=2)
    wait_for(lambda: node.status()["replaced"] is None, "the agent to go on", 15)
    assert "machine" in json.loads(node.etcd.get(STATUS))
    node.sync()

    node.ctl("node", "stop", "--force")
    assert node.etcd.get(STATUS) is None
    assert "not running" in node.ctl("status", status=1).err
    node.etcd.put(STATUS, OLD_STATUS, ttl=60)
    said = node.ctl("status")
    assert "An old agent (Felix" in said.out and "not running" not in said.err
    status = json.loads(node.ctl("status", "--output=json").out)
    assert "An old agent (Felix" in status["other_agent"]["text"] and status["other_agent"]["machine"] is None


def test_a_host_whose_name_changes(node: AgentHost) -> None:
    node.add("a", A4)
    node.add("b", "192.168.0.2")
    node.sync()
    assert node.status()["unknown_interfaces"] == []
    renamed = AgentHost(node.etcd, "host1.example.com")
    assert "host1" in renamed.ctl("node", f"--ip={HOST_IP}", status=1).err, "its agent runs under the old name"
    node.ctl("node", "stop", "--force")

    for option in (f"--ip={HOST_IP}", "--ip=198.51.100.1"):
        said = refused(renamed, "node", option, *(() if HOST_IP in option else ("--ip6=2001:DB8::2",)))
        for words in ("host host1,", "HOSTNAME=host1", "node remove --hostname=host1", "--force"):
            assert words in said, said
    assert not Path("/run/calico/host1.example.com").exists()
    said = renamed.ctl("status", status=1)
    assert "2 interfaces cali…" in said.out and "not running" in said.err

    said = renamed.ctl("node", f"--ip={HOST_IP}", "--ip6=2001:db8:1::7", "--force")
    assert f"Host host1.example.com is registered with {HOST_IP}" in said.out
    status = renamed.status()
    assert set(status["unknown_interfaces"]) == calico_links() and len(calico_links()) == 2
    assert "2 interfaces cali…" in renamed.ctl("status", status=None).out

    # a command that is about to write the record is not one of them
    renamed.add("c", "192.168.0.3")
    renamed.sync()
    renamed.ctl("node", "stop", "--force")
    said = renamed.ctl("node", "remove", "--hostname=host1", "--remove-endpoints")
    assert calico_links() == {renamed.interface("c")}
    renamed.ctl("node", f"--ip={HOST_IP}")
    assert renamed.status()["unknown_interfaces"] == []
