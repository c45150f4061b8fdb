"""Completion in real shells."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import socket
import subprocess
from pathlib import Path

import pytest

from tests.system.support import CALICOCTL, HOST_IP, Host, run, wait_for
from tests.system.test_cni import Network, namespaces

BASH = """
compopt() { printf 'compopt %s %s\\n' "$@"; }
source <(calicoctl completion bash)
COMP_LINE=$1 COMP_POINT=${#1}
_calicoctl 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


ZSH = """
autoload -Uz compinit && compinit -C -d /run/zcompdump
source <(calicoctl completion zsh)
compadd() { while [[ $1 == -* && $1 != -- ]]; do [[ $1 == -S ]] && shift; shift; done; shift; print -l -- "$@" }
_files() { print compopt -o ${${1:+dirnames}:-default} }
compset() { : }
words=("${(@s: :)1}") CURRENT=${#words} PREFIX=${words[-1]}
_calicoctl
"""


def complete(host: Host, shell: str, line: str, **env: str) -> list[str]:
    """Return what a shell offers for a line. Where it offers nothing, ask again: a busy machine may take too long."""
    script = BASH if shell == "bash" else ZSH
    options = ["--norc"] if shell == "bash" else ["-f"]
    found: list[str] = []
    for _ in range(3):
        done = run(shell, *options, "-c", script, "x", line, env=host.environment(**env))
        found = sorted(filter(None, done.out.splitlines()))
        if found:
            break
    return found


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(bare_host: Host, workload: str, shell: str) -> None:
    host = bare_host
    host.register(HOST_IP)
    host.ctl("profile", "add", "web")
    host.etcd.put("/calico/v1/policy/profile/x%3b%24(reboot)/tags", "[]")
    namespaces("blue", "red")
    host.ctl("container", "add", "/var/run/netns/blue", "ipv4")
    assert complete(host, shell, "calicoctl check") == ["checksystem"]
    assert complete(host, shell, "calicoctl container add ") == [
        *("/var/run/netns/blue", "/var/run/netns/red", "workload")
    ]
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
    Network(host).add(id="c1", CNI_NETNS="/var/run/netns/red", CNI_ARGS="K8S_POD_NAME=shop")
    assert "shop" in complete(host, shell, "calicoctl container ")
    assert "shop" not in complete(host, shell, "calicoctl container add ")
    Network(host).delete(id="c1", CNI_NETNS="/var/run/netns/red")
    run("ip", "netns", "delete", "red")
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


def test_completion_gives_up_after_a_timeout(bare_host: Host) -> None:
    """An etcd, or a Docker Engine, that hangs; what needs neither is told."""
    run("ip", "netns", "add", "blue")
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
        for line, words in (("profile ", {"add", "show"}), ("container ", {"add", "/var/run/netns/blue"})):
            env = bare_host.environment(ETCD_AUTHORITY=where, DOCKER_HOST=f"tcp://{where}")
            command = [CALICOCTL, "completion", "candidates", "bash", f"calicoctl {line}"]
            done = subprocess.run(command, env=env, timeout=10, capture_output=True, text=True)
            assert done.returncode == 0 and words <= set(done.stdout.splitlines()), line
