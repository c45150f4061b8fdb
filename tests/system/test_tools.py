"""What helps people: completion in real shells, checksystem, diags."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import socket
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.system.agent import LOG_DIR, AgentHost
from tests.system.support import AS_NOBODY, CALICOCTL, HOST_IP, Host, not_installed, run, wait_for

BASH = """
compopt() { printf 'compopt %s %s\\n' "$@"; }
source <(calicoctl completion bash)
COMP_LINE=$1 COMP_POINT=${#1}
_calicoctl 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""

ZSH = """
autoload -Uz compinit && compinit -u -d /tmp/zcompdump-$$; rm -f /tmp/zcompdump-$$
source <(calicoctl completion zsh)
compadd() { while [[ $1 == -* && $1 != -- ]]; do [[ $1 == -S ]] && shift; shift; done; shift; print -l -- "$@" }
_files() { print compopt -o ${${1:+dirnames}:-default} }
compset() { : }
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
    assert complete(host, shell, "calicoctl profile web rule add inbound allow tcp from ") == [
        *("cidr", "ports", "tag", "to")
    ]
    assert complete(host, shell, "calicoctl profile web rule add inbound allow from tag ") == ["web"]
    assert complete(host, shell, "calicoctl container /var/run/netns/blue ip remove 1") == ["192.168.0.0"]
    assert complete(host, shell, "calicoctl ipam info 1") == ["192.168.0.0"]
    assert complete(host, shell, "calicoctl config felix loglevel w") == ["warning"]
    # names of files only where one is meant
    assert complete(host, shell, "calicoctl pool show ") == []
    assert complete(host, shell, "calicoctl batch ") == ["compopt -o default"]
    assert complete(host, shell, "calicoctl diags --log-dir=/va") == ["compopt -o dirnames"]
    (endpoint,) = [key.rpartition("/")[2] for key in host.records()]
    assert complete(host, shell, "calicoctl endpoint ") == sorted(["show", endpoint])
    # bash replaces what is behind the = alone
    assert complete(host, shell, "calicoctl pool show --output=j") == ["json" if shell == "bash" else "--output=json"]
    nowhere = complete(host, shell, "calicoctl container add ", ETCD_AUTHORITY="127.0.0.1:1", DOCKER_HOST="unix:///no")
    assert nowhere == ["/var/run/netns/blue"]
    host.ctl("container", "remove", "/var/run/netns/blue")


def test_completion_in_an_interactive_shell_also_behind_sudo(bare_host: Host, tmp_path: Path) -> None:
    """As on a minimal Debian, without the package bash-completion."""
    (tmp_path / "sudo").write_text('#!/bin/sh\nexec "$@"\n')
    (tmp_path / "sudo").chmod(0o755)
    ours, theirs = pty.openpty()
    environment = bare_host.environment()
    environment |= {"PATH": f"{tmp_path}:{environment['PATH']}", "PS1": "$ ", "TERM": "dumb"}
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"], stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
        cwd=tmp_path, start_new_session=True,
    )  # fmt: skip
    os.set_blocking(ours, False)
    shown = ""

    def shows(text: str) -> bool:
        nonlocal shown
        with contextlib.suppress(BlockingIOError):
            shown += os.read(ours, 10000).decode()
        return text in shown

    try:
        os.write(ours, b"source <(calicoctl completion bash); echo rea''dy\n")
        wait_for(lambda: shows("ready"), "the shell")
        os.write(ours, b"sudo calicoctl checks\t --out\tjs\t | head -c 99 >found; echo do''ne\n")
        wait_for(lambda: shows("done"), "the command")
        assert json.loads((tmp_path / "found").read_text().partition("}")[0].strip("[ \n") + "}")["name"]
        # behind sudo, other commands are completed as before: by the names of files
        os.write(ours, b"sudo cat fou\t | head -c 1; echo and do''ne\n")
        wait_for(lambda: shows("and done"), "the command")
        assert "[and done" in shown.replace("\r", "").replace("\n", "")
    finally:
        shell.kill()
        shell.wait()
        os.close(ours)
        os.close(theirs)


def test_completion_keeps_nobody_waiting(bare_host: Host) -> None:
    """An etcd, or a Docker Engine, that hangs; what needs neither is told."""
    run("ip", "netns", "add", "blue")
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
        for line, words in (("profile ", {"add", "show"}), ("container ", {"add", "/var/run/netns/blue"})):
            env = bare_host.environment(ETCD_AUTHORITY=where, DOCKER_HOST=f"tcp://{where}")
            command = [CALICOCTL, "completion", "candidates", "bash", f"calicoctl {line}"]
            done = subprocess.run(command, env=env, timeout=10, capture_output=True, text=True)
            assert done.returncode == 0 and words <= set(done.stdout.splitlines()), line


def checks(host: Host, *options: str, status: int = 0, **env: str) -> dict[str, dict]:
    said = host.ctl("checksystem", "--output=json", *options, status=status, env=env)
    return {check["name"]: check for check in json.loads(said.out)}


def test_checksystem(bare_host: Host) -> None:
    found = checks(bare_host)
    assert found["root"]["ok"] and found["veth"]["ok"]
    assert found["nftables: policy, connection tracking, NAT, ARP"]["found"] == "works"
    assert found["etcd with its v2 API"]["found"].startswith("version 3.")
    (limit,) = re.findall(r"thresh3 (\d+)", run("ip", "ntable", "show", "name", "arp_cache").out)
    assert f"room for {limit} endpoints" in found["neighbour table of IPv4"]["found"]
    assert not found["host agent"]["ok"] and not found["host agent"]["needed"]
    links = run("ip", "-br", "link").out
    assert "check0" not in links and "check" not in run("nft", "list", "tables").out, "nothing is left"
    text = bare_host.ctl("checksystem").out
    assert all(word in text for word in ("What to do", "iptables", "Docker Engine"))


def test_checksystem_without_what_is_needed(bare_host: Host, tmp_path: Path) -> None:
    nowhere = {"ETCD_AUTHORITY": "127.0.0.1:1", "DOCKER_HOST": "unix:///nowhere", "PATH": str(tmp_path)}
    with not_installed("conntrack"):
        said = bare_host.ctl("checksystem", "--output=json", status=1, env=nowhere)
    assert said.err.startswith("This host lacks prerequisites: etcd")
    found = {check["name"]: check for check in json.loads(said.out)}
    assert "nothing listens" in found["Docker Engine"]["found"] and not found["Docker Engine"]["needed"]
    assert found["conntrack"]["advice"] == "install the package conntrack"
    assert found["local etcd"]["found"].endswith("would start it at http://127.0.0.1:1")
    assert "Docker Engine" in bare_host.ctl("checksystem", "--libnetwork", status=1, env=nowhere).err
    with not_installed("ip"):
        assert "prerequisites: ip;" in bare_host.ctl("checksystem", status=1, env=nowhere).err
    unprivileged = [*AS_NOBODY, CALICOCTL]
    said = bare_host.ctl("checksystem", status=1, command=unprivileged)
    assert "lacks prerequisites: root." in said.err


def test_checksystem_where_nothing_is_as_it_should_be(bare_host: Host, engine: None, tmp_path: Path) -> None:
    """Each check fails for itself alone."""
    found = checks(bare_host, status=1, HOSTNAME="-x")
    assert "host name" in found["host name"]["found"] and not found["etcd with its v2 API"]["ok"]
    assert "1.2.3.4:abc" in checks(bare_host, DOCKER_HOST="tcp://1.2.3.4:abc")["Docker Engine"]["found"]
    with not_installed("iptables*", "conntrack"):
        found = checks(bare_host, status=1)
        assert found["iptables"]["needed"] and not found["iptables"]["ok"] and not found["conntrack"]["ok"]
        run("ip", "netns", "add", "new")  # the tables of iptables-legacy stay where they have been used once
        said = bare_host.ctl(
            "checksystem", "--output=json", status=1, command=["ip", "netns", "exec", "new", CALICOCTL]
        )
    found = {check["name"]: check for check in json.loads(said.out)}
    assert found["Docker's firewall"]["ok"] and found["iptables chains of an old Felix"]["ok"], "there is none"
    bare_host.etcd.put("/calico", "x")
    try:
        assert "a key, where a directory is expected" in checks(bare_host, status=1)["etcd with its v2 API"]["found"]
    finally:
        bare_host.etcd._request("DELETE", "/calico")


def test_checksystem_and_a_firewall(bare_host: Host) -> None:
    run("iptables", "-P", "FORWARD", "DROP")
    try:
        assert "will accept it there" in checks(bare_host)["Docker's firewall"]["found"]
        AgentHost(bare_host.etcd).start_agent()
        assert "nothing drops" in checks(bare_host)["Docker's firewall"]["found"]
    finally:
        run("iptables", "-P", "FORWARD", "ACCEPT")


SECRETS = ("hunter2", "s3cr3t", "MIIEvQIBADANB", "swordfish", "horse")


def test_diags_have_what_is_needed_and_no_secrets(bare_host: Host, engine: None, tmp_path: Path) -> None:
    host = AgentHost(bare_host.etcd)
    host.start_agent()
    host.add("a", "192.168.0.1")
    run("docker", "run", "--net=none", "--name", "workload", "-e", "DB_PASSWORD=hunter2", "-tid", "busybox")
    host.etcd.put("/calico/v1/config/BgpPassword", "hunter2")
    host.etcd.put("/calico/v1/config/Odd", {"token": "s3cr3t", "x": 1})
    host.etcd.put("/calico/v1/config/pw", "hunter2")
    host.etcd.put("/calico/v1/config/passwords", ["hunter2"])
    host.etcd.put("/calico/v1/other/creds", {"name": "hunter2", "status": {"reason": "s3cr3t"}})
    host.etcd.put("/calico/v1/policy/profile/odd/rules", {"inbound_rules": ["hunter2"]})
    host.etcd.put("/calico/v1/policy/profile/odd/tags", ["a" * 30000])  # which takes no time
    peer = {"ip": "192.0.2.9", "as_num": "1", "md5": "s3cr3t", "password": 'correct "horse'}
    host.etcd.put("/calico/bgp/v1/global/peer_v4/192.0.2.9", peer)
    with (LOG_DIR / "felix.log").open("a") as log:
        log.write("-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANB\n-----END PRIVATE KEY-----\nurl https://u:swordfish@h/\n")
        log.write("Authorization: Basic s3cr3t\nclient_secret=s3cr3t password: 'hunter2 swordfish'\n")
        log.write(
            "password = correct horse\nroot:hunter2@127.0.0.1:2379 is no address\nhttp://u:hun/ter2@h:1 neither\n"
        )
    secrets = {
        "ETCD_PROXY": "http://user:swordfish@127.0.0.1:9",
        "DOCKER_PASS": "hunter2",
        "DOCKER_PASSWORD": "correct horse",
        "DOCKER_AUTH_CONFIG": '{"auths": {"x": {"auth": "s3cr3t"}}}',
        "CALICO_KEY": "hunter2",
    }
    try:
        said = host.ctl("diags", f"--log-dir={LOG_DIR}", "--output=json", env={"TMPDIR": str(tmp_path), **secrets})
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
            ("etcd.json", "192.0.2.9"),
            ("etcd.json", '"/calico/v1/config/LogSeverityScreen": "info"'),
            ("environment.txt", "DOCKER_PASS is set"),
            ("docker.json", "workload"),
            ("versions.txt", "pyroute2"),
            ("checksystem.json", "nftables"),
            ("environment.txt", "ETCD_AUTHORITY"),
        ):
            assert word in texts[name], name
    finally:
        run("docker", "rm", "-f", "workload")
        host.ctl("container", "remove", "/var/run/netns/a")


def test_diags_of_an_address_with_a_password(bare_host: Host, tmp_path: Path) -> None:
    for name, value in (
        ("ETCD_ENDPOINTS", "http://root:hunter2@127.0.0.1:2379"),
        ("ETCD_ENDPOINTS", "http://root:hun/ter2@127.0.0.1:2379,x:hunter2@y"),
        ("ETCD_AUTHORITY", "root:hunter2@127.0.0.1:2379"),
        ("ETCD_AUTHORITY", "root:hunter2,y@127.0.0.1:2379"),
        ("ETCD_ENDPOINTS", "http://root:hunter2,y@127.0.0.1:2379"),
        ("DOCKER_HOST", "tcp://root:hunter2@127.0.0.1:1"),
        ("DOCKER_HOST", "tcp://root:hun'ter2@127.0.0.1:1"),
    ):
        file = Path(bare_host.ctl("diags", env={name: value, "TMPDIR": str(tmp_path)}).out.split()[-1])
        with tarfile.open(file) as archive:
            for member in archive:
                text = archive.extractfile(member).read().decode()
                assert "hunter2" not in text and "ter2" not in text, (name, member.name)
        assert "hunter2" not in bare_host.ctl("pool", "show", status=None, env={name: value}).err


def test_diags_where_little_can_be_had(bare_host: Host, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    env = {
        "ETCD_AUTHORITY": "127.0.0.1:1",
        "DOCKER_HOST": "unix:///nowhere",
        "PATH": str(tmp_path / "bin"),
        "TMPDIR": str(tmp_path),
    }
    with not_installed("nft"):
        said = bare_host.ctl("diags", f"--log-dir={tmp_path}", env=env)
    file = Path(said.out.split()[-1])
    with tarfile.open(file) as archive:
        texts = {member.name.rpartition("/")[2]: archive.extractfile(member).read().decode() for member in archive}
    assert "could not be collected" in texts["etcd.json"] and "could not be collected" in texts["nftables.txt"]
    assert "could not be collected" in texts["felix.log"]
    assert "--log-dir" in bare_host.ctl("diags", "--log-dir=", status=1).err
    file.unlink()
    full = bare_host.ctl("diags", status=1, env=env, command=["/usr/bin/prlimit", "--fsize=1000", CALICOCTL])
    assert "cannot be written" in full.err and not list(tmp_path.glob("*.gz"))
