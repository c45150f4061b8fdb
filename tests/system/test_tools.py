"""What helps people: completion in real shells, checksystem, diags."""

from __future__ import annotations

import json
import socket
import subprocess
import tarfile
import threading
from pathlib import Path

import pytest

from tests.system.agent import LOG_DIR, AgentHost
from tests.system.support import CALICOCTL, HOST_IP, Host, run

BASH = """
source <(calicoctl completion bash)
COMP_LINE=$1 COMP_POINT=${#1}
_calicoctl 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""

ZSH = """
autoload -Uz compinit && compinit -u -d /tmp/zcompdump-$$; rm -f /tmp/zcompdump-$$
source <(calicoctl completion zsh)
compadd() { while [[ $1 == -* && $1 != -- ]]; do [[ $1 == -S ]] && shift; shift; done; shift; print -l -- "$@" }
_files() { print files }
words=("${(@s: :)1}") CURRENT=${#words} PREFIX=${words[-1]}
_calicoctl
"""


def complete(host: Host, shell: str, line: str, **env: str) -> list[str]:
    script = BASH if shell == "bash" else ZSH
    options = ["--norc"] if shell == "bash" else ["-f"]
    done = run(shell, *options, "-c", script, "x", line, env=host.environment(**env))
    return sorted(filter(None, done.out.splitlines()))


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(bare_host: Host, workload: str, shell: str) -> None:
    host = bare_host
    host.register(HOST_IP)
    host.ctl("profile", "add", "web")
    host.etcd.put("/calico/v1/policy/profile/x%3b%24(reboot)/tags", "[]")
    run("ip", "netns", "add", "blue")
    host.ctl("container", "add", "/var/run/netns/blue", "ipv4")
    assert complete(host, shell, "calicoctl check") == ["checksystem"]
    assert complete(host, shell, "calicoctl container add ") == ["/var/run/netns/blue", "workload"]
    assert complete(host, shell, "calicoctl container workload profile append ") == ["web"]
    assert complete(host, shell, "calicoctl pool remove 1") == ["192.168.0.0/16"]
    (endpoint,) = [key.rpartition("/")[2] for key in host.records()]
    assert complete(host, shell, "calicoctl endpoint ") == sorted(["show", endpoint])
    # bash replaces what is behind the = alone
    assert complete(host, shell, "calicoctl pool show --output=") == ["json" if shell == "bash" else "--output=json"]
    nowhere = complete(host, shell, "calicoctl container add ", ETCD_AUTHORITY="127.0.0.1:1", DOCKER_HOST="unix:///no")
    assert nowhere == ["/var/run/netns/blue"]
    host.ctl("container", "remove", "/var/run/netns/blue")


def test_completion_keeps_nobody_waiting(bare_host: Host) -> None:
    """An etcd that hangs."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: server.accept(), daemon=True).start()
        port = server.getsockname()[1]
        env = bare_host.environment(ETCD_AUTHORITY=f"127.0.0.1:{port}")
        command = [CALICOCTL, "completion", "candidates", "bash", "calicoctl profile "]
        assert subprocess.run(command, env=env, timeout=10, capture_output=True).returncode == 0


def checks(host: Host, *options: str, status: int = 0, **env: str) -> dict[str, dict]:
    said = host.ctl("checksystem", "--output=json", *options, status=status, env=env)
    return {check["name"]: check for check in json.loads(said.out)}


def test_checksystem(bare_host: Host) -> None:
    found = checks(bare_host)
    assert found["root"]["ok"] and found["veth"]["ok"]
    assert found["nftables: policy, connection tracking, NAT, ARP"]["found"] == "works"
    assert found["etcd with its v2 API"]["found"].startswith("version 3.")
    assert not found["host agent"]["ok"] and not found["host agent"]["needed"]
    links = run("ip", "-br", "link").out
    assert "check0" not in links and "check" not in run("nft", "list", "tables").out, "nothing is left"
    text = bare_host.ctl("checksystem").out
    assert all(word in text for word in ("What to do", "iptables", "Docker Engine"))


def test_checksystem_without_what_is_needed(bare_host: Host, tmp_path: Path) -> None:
    for tool in ("ip", "iptables-save", "ip6tables-save"):
        (tmp_path / tool).symlink_to(run("which", tool).out.strip())
    nowhere = {"ETCD_AUTHORITY": "127.0.0.1:1", "DOCKER_HOST": "unix:///nowhere", "PATH": str(tmp_path)}
    said = bare_host.ctl("checksystem", "--output=json", status=1, env=nowhere)
    assert said.err.startswith("This host lacks what is needed: etcd")
    found = {check["name"]: check for check in json.loads(said.out)}
    assert "nothing listens" in found["Docker Engine"]["found"] and not found["Docker Engine"]["needed"]
    assert found["conntrack"]["advice"] == "install the package conntrack"
    assert found["port 2379 of 127.0.0.1"]["ok"] is False, "an etcd is there"
    assert "Docker Engine" in bare_host.ctl("checksystem", "--libnetwork", status=1, env=nowhere).err
    (tmp_path / "ip").unlink()
    assert "needed: ip;" in bare_host.ctl("checksystem", status=1, env=nowhere).err
    unprivileged = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", CALICOCTL]
    said = bare_host.ctl("checksystem", status=1, command=unprivileged)
    assert "lacks what is needed: root." in said.err


def test_checksystem_and_a_firewall(bare_host: Host) -> None:
    run("iptables", "-P", "FORWARD", "DROP")
    try:
        assert "will accept it there" in checks(bare_host)["Docker's firewall"]["found"]
        AgentHost(bare_host.etcd).start_agent()
        assert "nothing drops" in checks(bare_host)["Docker's firewall"]["found"]
    finally:
        run("iptables", "-P", "FORWARD", "ACCEPT")


SECRETS = ("hunter2", "s3cr3t", "MIIEvQIBADANB", "swordfish")


def test_diags_have_what_is_needed_and_no_secrets(bare_host: Host, engine: None, tmp_path: Path) -> None:
    host = AgentHost(bare_host.etcd)
    host.start_agent()
    host.add("a", "192.168.0.1")
    run("docker", "run", "--net=none", "--name", "workload", "-e", "DB_PASSWORD=hunter2", "-tid", "busybox")
    host.etcd.put("/calico/v1/config/BgpPassword", "hunter2")
    host.etcd.put("/calico/v1/config/Odd", {"token": "s3cr3t", "x": 1})
    with (LOG_DIR / "felix.log").open("a") as log:
        log.write("-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANB\n-----END PRIVATE KEY-----\nurl https://u:swordfish@h/\n")
        log.write("Authorization: Basic s3cr3t\nclient_secret=s3cr3t password: 'hunter2 swordfish'\n")
    proxy = "http://user:swordfish@127.0.0.1:9"
    try:
        said = host.ctl(
            "diags", f"--log-dir={LOG_DIR}", "--output=json", env={"TMPDIR": str(tmp_path), "ETCD_PROXY": proxy}
        )
        file = Path(json.loads(said.out)["file"])
        assert file.parent == tmp_path and file.stat().st_mode & 0o777 == 0o600 and said.err == ""
        with tarfile.open(file) as archive:
            texts = {member.name.rpartition("/")[2]: archive.extractfile(member).read().decode() for member in archive}
        for secret in SECRETS:
            assert [name for name, text in texts.items() if secret in text] == []
        interface = host.interface("a")
        for name, word in (
            ("nftables.txt", "table inet calico"),
            ("iptables.txt", "*filter"),
            ("routes-ipv4.txt", f"192.168.0.1 dev {interface}"),
            ("neighbours.txt", host.mac("a")),
            ("links.txt", interface),
            ("settings.txt", f"net/ipv4/conf/{interface}/proxy_arp = 1"),
            ("felix.log", "is up"),
            ("status.json", '"up": 1'),
            ("etcd.json", "/calico/v1/host/host1/workload/namespace"),
            ("etcd.json", "/calico/v1/config/BgpPassword"),
            ("docker.json", "workload"),
            ("versions.txt", "pyroute2"),
            ("checksystem.json", "nftables"),
            ("environment.txt", "ETCD_AUTHORITY"),
        ):
            assert word in texts[name], name
    finally:
        run("docker", "rm", "-f", "workload")
        host.ctl("container", "remove", "/var/run/netns/a")


def test_diags_where_little_can_be_had(bare_host: Host, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    env = {
        "ETCD_AUTHORITY": "127.0.0.1:1",
        "DOCKER_HOST": "unix:///nowhere",
        "PATH": str(tmp_path / "bin"),
        "TMPDIR": str(tmp_path),
    }
    said = bare_host.ctl("diags", f"--log-dir={tmp_path}", env=env)
    file = Path(said.out.split()[-1])
    with tarfile.open(file) as archive:
        texts = {member.name.rpartition("/")[2]: archive.extractfile(member).read().decode() for member in archive}
    assert "could not be had" in texts["etcd.json"] and "could not be had" in texts["nftables.txt"]
    assert "could not be had" in texts["felix.log"]
    assert "--log-dir" in bare_host.ctl("diags", "--log-dir=", status=1).err
    file.unlink()
    full = bare_host.ctl("diags", status=1, env=env, command=["/usr/bin/prlimit", "--fsize=1000", CALICOCTL])
    assert "cannot be written" in full.err and not list(tmp_path.glob("*.gz"))
