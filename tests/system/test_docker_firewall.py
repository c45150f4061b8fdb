"""Next to a Docker Engine with its firewall: Calico's packets pass, and Docker's own networks keep working."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.agent import A4, ALLOW, B4, C4, LOG_DIR, AgentHost, outside_host
from tests.system.support import CALICOCTL, HOST_IP, Host, import_busybox, not_installed, run, start_docker, wait_for
from tests.system.traffic import PATIENT, ping, tcp

FOLDER = Path("/run/calico-tests/firewall")
SOCKET = f"unix://{FOLDER}/docker.sock"
WITH_FIREWALL = ("--iptables=true", "--ip-forward=true", "--bip=172.17.0.1/16")


@pytest.fixture
def pair(bare_host: Host) -> Iterator[AgentHost]:
    host = AgentHost(bare_host.etcd)
    with outside_host():
        host.start_agent()
        for name, address in (("a", A4), ("b", B4), ("c", C4)):
            host.add(name, address)
        host.profile("web", inbound=[{"action": "allow", "src_tag": "web"}])
        host.profile("none")
        for name, profile in (("a", "web"), ("b", "web"), ("c", "none")):
            host.set_profiles(name, profile)
        host.sync()
        yield host
    run("iptables", "-P", "FORWARD", "ACCEPT")
    for command in ("iptables", "ip6tables"):
        run(command, "-F", check=False)
        run(command, "-X", check=False)
    run("iptables", "-t", "nat", "-F", check=False)
    run("ip", "link", "delete", "docker0", check=False)


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen]:
    """A second engine, with bridge and firewall, at a socket of its own."""
    monkeypatch.setenv("DOCKER_HOST", SOCKET)
    process = start_docker(FOLDER / "first", *WITH_FIREWALL, host=SOCKET)
    import_busybox(tmp_path / "busybox", SOCKET)
    yield process
    run("sh", "-c", "docker ps -aq | xargs -r docker rm -f", check=False)
    process.terminate()
    process.wait()
    shutil.rmtree(FOLDER, ignore_errors=True)


def ours(chain: str, command: str = "iptables") -> list[str]:
    return [line for line in run(command, "-S", chain, check=False).out.splitlines() if "cali+" in line]


def test_nothing_is_added_where_nothing_would_drop(pair: AgentHost) -> None:
    assert ping("a", B4, patience=PATIENT)
    assert "cali" not in run("sh", "-c", "iptables-save; ip6tables-save").out
    run("iptables", "-P", "FORWARD", "DROP")
    wait_for(lambda: len(ours("FORWARD")) == 2, "the rules")
    assert ping("a", B4, patience=PATIENT) and not ping("a", C4)
    run("iptables", "-P", "FORWARD", "ACCEPT")
    wait_for(lambda: not ours("FORWARD"), "the rules' end")
    run("ip6tables", "-A", "FORWARD", "-j", "REJECT")
    wait_for(lambda: len(ours("FORWARD", "ip6tables")) == 2, "the rules")
    assert not ours("FORWARD")


def test_a_path_without_sbin_hides_no_firewall(pair: AgentHost) -> None:
    """That of cron. The very command is `env -i PATH=/usr/bin:/bin … calicoctl node --ip=…`."""
    pair.ctl("node", "stop", "--force")
    run("iptables", "-P", "FORWARD", "DROP")
    for environment in (["PATH=/usr/bin:/bin"], []):
        command = ["env", "-i", *environment, "HOSTNAME=host1", CALICOCTL]
        assert "running" in run(*command, "node", f"--ip={HOST_IP}", f"--log-dir={LOG_DIR}", cwd="/").out
        assert len(ours("FORWARD")) == 2 and ping("a", B4, patience=PATIENT), environment
        checked = run(*command, "checksystem", check=False).out
        assert "nothing drops packets from or to containers" in checked and "not there (needed beside" not in checked
        run(*command, "node", "stop", "--force")
        run("iptables", "-F", "FORWARD")
    run("ip6tables", "-P", "FORWARD", "DROP")  # what a machine's own script sets
    with not_installed("ip*tables*"):
        pair.start_agent()
        wait_for(lambda: pair.status()["last_error"], "the agent's complaint")
        said = pair.ctl("status", status=None).out
        assert "drop what is forwarded, and there is no command iptables" in " ".join(said.split())
        assert "install the package iptables" in pair.ctl("checksystem", status=None).out
        pair.ctl("node", "remove", "--remove-endpoints")
        for _ in range(2):  # the agent is started, and runs already
            told = pair.ctl("node", f"--ip={HOST_IP}", f"--log-dir={LOG_DIR}").err
            assert "Warning" in told and "iptables chain FORWARD would drop" in told, told
    wait_for(lambda: len(ours("FORWARD")) == 2 and len(ours("FORWARD", "ip6tables")) == 2, "the command to be noticed")
    run("ip6tables", "-P", "FORWARD", "ACCEPT")


def test_a_legacy_firewall_is_seen_without_its_command(bare_host: Host) -> None:
    run("ip", "netns", "add", "legacy")
    within = ["ip", "netns", "exec", "legacy"]
    run(*within, "iptables-legacy", "-P", "FORWARD", "DROP")
    with not_installed("ip*tables*"):
        said = bare_host.ctl("checksystem", "--output=json", command=[*within, CALICOCTL], status=1).out
    (firewall,) = [check for check in json.loads(said) if check["name"] == "Docker's firewall"]
    assert "iptables-legacy firewall" in firewall["found"] and not firewall["ok"]


def test_ipv6_forwarding_stays_on_where_an_engine_needs_it(bare_host: Host) -> None:
    """And, where it does not, the host gets back what it had."""
    host = AgentHost(bare_host.etcd)
    env = {"DOCKER_HOST": SOCKET}
    without_ipv6 = ("node", "--ip=192.0.2.2", f"--log-dir={LOG_DIR}")

    def settings() -> list[str]:
        return run("sysctl", "-n", "net.ipv6.conf.all.forwarding", "net.ipv6.conf.other.accept_ra").out.split()

    run("sysctl", "-w", "net.ipv6.conf.all.forwarding=0")
    run("ip", "link", "add", "other", "type", "veth", "peer", "name", "other2")
    try:
        for options, needed in (((), False), (("--ipv6", "--fixed-cidr-v6=2001:db8:6::/64"), True)):
            for command in (("node", "remove"), without_ipv6):
                run("sysctl", "-w", "net.ipv6.conf.all.forwarding=0", "net.ipv6.conf.other.accept_ra=1")
                host.start_agent()
                assert settings() == ["1", "2"]
                engine = start_docker(FOLDER / "v6", *WITH_FIREWALL, *options, host=SOCKET)
                try:
                    host.ctl("node", "stop")
                    host.ctl(*command, env=env)
                    assert settings() == (["1", "2"] if needed else ["0", "1"]), (options, command)
                    if command is without_ipv6:
                        host.ctl("node", "remove", env=env)
                finally:
                    engine.terminate()
                    engine.wait()
                    shutil.rmtree(FOLDER, ignore_errors=True)
    finally:
        run("ip", "link", "delete", "other")
        run("ip", "link", "delete", "docker0", check=False)
        run("sysctl", "-w", "net.ipv6.conf.all.forwarding=0")
        for command in (("-P", "FORWARD", "ACCEPT"), ("-F",), ("-X",), ("-t", "nat", "-F")):
            run("iptables", *command)


def test_an_engine_that_hangs_when_the_host_is_removed_keeps_its_forwarding(pair: AgentHost) -> None:
    def forwards() -> str:
        return run("sysctl", "-n", "net.ipv4.ip_forward").out.strip()

    pair.ctl("node", "remove", "--remove-endpoints")
    run("sysctl", "-qw", "net.ipv4.ip_forward=0")
    pair.start_agent()
    engine = start_docker(FOLDER / "hangs", *WITH_FIREWALL, host=SOCKET)
    try:
        engine.send_signal(signal.SIGSTOP)
        said = pair.ctl("node", "remove", env={"DOCKER_HOST": SOCKET})
        assert "Cannot ask Docker for its networks" in said.err and "may need" in said.err and forwards() == "1"
    finally:
        engine.send_signal(signal.SIGCONT)
        engine.terminate()
        engine.wait()
        shutil.rmtree(FOLDER, ignore_errors=True)


def test_an_iptables_that_takes_its_time_keeps_no_policy_waiting(pair: AgentHost, tmp_path: Path) -> None:
    held = tmp_path / "held"
    waiting = tmp_path / "waiting"
    for name in ("iptables-save", "ip6tables-save"):
        script = (
            f'#!/bin/sh\nwhile [ -e {held} ]; do touch {waiting}; sleep 0.05; done\nexec {shutil.which(name)} "$@"\n'
        )
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    pair.ctl("node", "stop", "--force")
    pair.start_agent(PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert ping("a", B4, patience=PATIENT)
    held.touch()
    run("iptables", "-P", "FORWARD", "DROP")
    wait_for(waiting.exists, "iptables to be asked")
    pair.profile("web")
    wait_for(lambda: not pair.status()["last_error"] and not tcp("a", "b", B4), pair.log())
    pair.profile("web", inbound=[ALLOW])
    pair.sync()
    assert not ours("FORWARD")
    held.unlink()
    wait_for(lambda: len(ours("FORWARD")) == 2, pair.log())
    assert ping("a", B4, patience=PATIENT)


def test_beside_a_docker_engine_that_comes_and_goes(pair: AgentHost, docker: subprocess.Popen) -> None:
    # what an engine does that is there first, and switches forwarding on itself
    run("iptables", "-P", "FORWARD", "DROP")
    wait_for(lambda: len(ours("DOCKER-USER")) == 2, "the rules", 10)
    assert ping("a", B4, patience=PATIENT) and tcp("a", "b", B4, patience=PATIENT)
    assert not ping("c", B4) and not ping("a", C4)
    assert ping("a", "198.51.100.2", patience=PATIENT)

    run("docker", "run", "--name", "own", "-tid", "busybox")
    address = run("docker", "inspect", "-f", "{{.NetworkSettings.Networks.bridge.IPAddress}}", "own").out.strip()
    assert ping(None, address, patience=PATIENT)
    assert run("docker", "exec", "own", "ping", "-c", "1", "-W", "1", "198.51.100.2", check=False).status == 0

    run("iptables", "-F", "DOCKER-USER")
    wait_for(lambda: len(ours("DOCKER-USER")) == 2 and ping("a", B4), "the repair", 10)
    mine = ["-s", "203.0.113.0/24", "-j", "DROP"]
    run("iptables", "-I", "DOCKER-USER", *mine)

    docker.terminate()
    docker.wait()
    assert ping("a", B4, patience=PATIENT)
    again = start_docker(FOLDER / "second", *WITH_FIREWALL, host=SOCKET)
    try:
        wait_for(lambda: len(ours("DOCKER-USER")) == 2 and ping("a", B4), "the rules", 10)
        assert not ping("c", B4)
        assert "203.0.113.0/24" in run("iptables", "-S", "DOCKER-USER").out, "an operator's own rules stay"
        before = run("iptables", "-S").out
        pair.ctl("node", "remove", "--remove-endpoints", env={"DOCKER_HOST": SOCKET})
        after = run("iptables", "-S").out
        assert [line for line in before.splitlines() if "cali" not in line] == after.splitlines()
        assert run("sysctl", "-n", "net.ipv4.ip_forward").out.strip() == "1", "the engine needs it"
        assert re.search("-A FORWARD .*(-o docker0|-j DOCKER-FORWARD)", after), "the engine's own rules stay"
    finally:
        again.terminate()
        again.wait()
