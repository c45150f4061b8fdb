"""The demo, as a newcomer runs it: it works, and it leaves no trace."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from functools import partial
from itertools import permutations
from pathlib import Path

import pytest

from tests.system.support import CALICOCTL, Result, free_port, gone, run, wait_for

ROOT = Path(__file__).parent.parent.parent


def traces() -> dict[str, str]:
    """All that a demo could leave behind on a host."""
    return {
        "links": run("ip", "-br", "link").out,
        "namespaces": run("ip", "netns", "list").out,
        "firewall": run("sh", "-c", "iptables-save | sed '/^#/d; s/\\[[0-9:]*]//'", check=False).out,
        "tables": run("nft", "list", "ruleset").out,
        "routes": run("sh", "-c", "ip route; ip -6 route; ip address show lo").out,
        "settings": run("sh", "-c", "sysctl -a 2>/dev/null | grep -E '^net.ipv[46].(conf|ip_forward)'").out,
        "files": run("sh", "-c", "find /etc/calico /var/lib/calico /var/log/calico 2>/dev/null", check=False).out,
        "mounts": run("cat", "/proc/mounts").out,
        "processes": run(
            "sh", "-c", "ps -eo comm= | grep -E 'etcd|dockerd|containerd|python|bird|sleep' | sort", check=False
        ).out,
        "run": run("ls", "/run").out,
        "containers": run("docker", "ps", "-aq").out,
        "images": run("docker", "images", "-q").out,
    }


def make(target: str, environment: dict[str, str] | None = None) -> Result:
    """Run make as a newcomer does."""
    return run("make", "--no-print-directory", target, check=False, cwd=ROOT, env=environment)


@pytest.mark.parametrize("which", ["engine that runs", "engine of its own"])
def test_the_demo_works_and_leaves_no_trace(engine: None, which: str) -> None:
    environment = {**os.environ, "CALICOCTL_BIN": str(Path(CALICOCTL).parent)}
    if which == "engine of its own":
        environment["DOCKER_HOST"] = f"tcp://127.0.0.1:{free_port()}"
    run(
        "docker", "run", "--rm", "--net=none", "busybox", "sh", "-c", ":"
    )  # what an engine makes once is not the demo's
    # a network that a demo with an address chosen in advance would break
    run("ip", "address", "add", "10.65.0.1/23", "dev", "lo")
    before = traces()
    done = make("demo", environment)
    try:
        assert done.status == 0, done
        (pool,) = re.findall(r"^Added pool (\S+)\.0/24$", done.out, re.MULTILINE)
        for line in (
            f"IP {pool}.1 added to workload",
            "Created profile web",
            "Profiles web appended",
            "1 packets transmitted, 1 packets received, 0% packet loss",
            "1 packets transmitted, 0 packets received, 100% packet loss",
            f"inet {pool}.1/32 scope global eth1",
            "default via 192.0.2.2 dev eth1",
            "Endpoints:  3 up, 0 down, 0 in error",
            "/calico/v1/policy/profile/web/rules",
            '"profile_ids": ["web"]',
        ):
            assert line in done.out, line
        assert ("of our own, without bridge" in done.out) == (which == "engine of its own")
        assert pool not in ("10.65.0", "10.65.1") and not pool.startswith("192.168.")
        again = make("demo", environment)
        assert again.status == 2 and "Error 1" in again.err and "make demo-clean" in again.err
    finally:
        cleaned = make("demo-clean", environment)
        after = traces()
        run("ip", "address", "delete", "10.65.0.1/23", "dev", "lo")
    assert cleaned.status == 0 and after == before


def test_the_message_after_a_reboot_says_how_to_remove_the_demo(tmp_path: Path) -> None:
    settings = tmp_path / "node.env"
    environment = {"PATH": os.environ["PATH"], "HOSTNAME": "rebooted", "CALICO_ENV_FILE": str(settings)}
    environment["CALICOCTL_BIN"] = str(Path(CALICOCTL).parent)
    silent = run(str(ROOT / "demo/clean"), env=environment)
    assert (silent.out, silent.err) == ("", "")
    run(CALICOCTL, "node", "--ip=192.0.2.2", "--local-etcd", env=environment)
    for pid_file in (Path("/run/calico/rebooted/felix.pid"), Path("/run/calico/rebooted/etcd.pid")):
        pid = int(pid_file.read_text().split()[0])
        os.kill(pid, signal.SIGKILL)
        wait_for(partial(gone, pid), "its end")
    shutil.rmtree("/run/calico")
    said = run(str(ROOT / "demo/clean"), env=environment)
    assert said.out == "" and settings.exists()
    (command, data, _) = re.findall(r"'(\S+ [^']+)'", said.err)
    assert command.startswith(CALICOCTL)
    run("sh", "-c", command, env=environment)
    assert not settings.exists()
    run("sh", "-c", data)
    assert not Path("/var/lib/calico/etcd").exists()
    assert run(str(ROOT / "demo/clean"), env=environment).err == ""
    shutil.rmtree("/var/lib/calico")


def test_a_demo_that_lacks_a_program_says_so_and_makes_nothing(tmp_path: Path) -> None:
    for program in {*Path("/usr/bin").iterdir(), *Path("/usr/sbin").iterdir()}:
        if program.name not in ("docker", "etcdctl"):
            (tmp_path / program.name).unlink(missing_ok=True)
            (tmp_path / program.name).symlink_to(program)
    environment = {**os.environ, "CALICOCTL_BIN": str(Path(CALICOCTL).parent), "PATH": str(tmp_path)}
    done = run(str(ROOT / "demo/demo"), check=False, env=environment)
    assert (done.status, done.err) == (1, "The demo needs docker etcdctl: 'make demo' installs what is missing.\n")
    assert done.out == "" and not Path("/run/calico-demo").exists()


def test_a_demo_whose_engine_does_not_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "dockerd").write_text("#!/bin/sh\necho no space left on device >&2; exit 1\n")
    (tmp_path / "dockerd").chmod(0o755)
    environment = {
        **os.environ,
        "CALICOCTL_BIN": str(Path(CALICOCTL).parent),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "DOCKER_HOST": f"tcp://127.0.0.1:{free_port()}",
    }
    done = run(str(ROOT / "demo/demo"), check=False, env=environment)
    assert done.status == 1 and not Path("/run/calico-demo").exists()
    assert "The Docker Engine has ended:\nno space left on device\n" in done.err


def test_the_demo_of_three_hosts_works_and_leaves_no_trace(engine: None) -> None:
    environment = {**os.environ, "CALICOCTL_BIN": str(Path(CALICOCTL).parent)}
    for change in ("add", "delete"):  # the first namespace makes /run/netns a mount, which stays
        run("ip", "netns", change, "first")
    before = traces()
    done = make("demo-hosts", environment)
    try:
        assert done.status == 0, done
        rows = done.out.partition("from \\ to")[2].splitlines()[1:6]
        cells = {
            (row[0], target): row[12 * column : 12 * column + 12].strip()
            for row in rows
            for column, target in enumerate("ABCDE", 1)
            if row[0] != target
        }
        assert cells == {pair: "4+6" if set(pair) < set("ACE") else "-" for pair in permutations("ABCDE", 2)}
        assert "host3 | 172.18.0.13" in done.out
        again = make("demo-hosts", environment)
        assert again.status == 2 and "Error 1" in again.err and "make demo-hosts-clean" in again.err
        # what its user left running
        subprocess.Popen(["/run/calico-demo-hosts/on", "host1", "ip", "netns", "exec", "A", "sleep", "1000"])
    finally:
        cleaned = make("demo-hosts-clean")
    assert cleaned.status == 0 and traces() == before


def test_a_demo_of_three_hosts_that_fails_says_why_and_leaves_no_trace(engine: None, tmp_path: Path) -> None:
    (tmp_path / "etcd").write_text("#!/bin/sh\necho no space left on device >&2; exit 1\n")
    (tmp_path / "etcd").chmod(0o755)
    environment = {**os.environ, "CALICOCTL_BIN": f"{tmp_path}:{Path(CALICOCTL).parent}"}
    before = traces()
    done = run(str(ROOT / "demo/hosts"), check=False, env=environment)
    assert done.status == 1 and "no space left on device\nThe demo failed; it is removed again.\n" in done.err
    assert traces() == before
