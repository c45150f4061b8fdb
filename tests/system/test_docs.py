"""Runs every command line in the documentation, as a reader would."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.system.fabric import FabricHost, fabric
from tests.system.support import CALICOCTL, Etcd, Host, Result, b64, free_port, run, wait_for

pytestmark = pytest.mark.api("etcdv3")
"""A reader has etcd as it is by default, and sets no DATASTORE_TYPE."""

NAMES = ("workload", "other", "web", "db", "guest", "front", "back")
"""Containers of all pages."""

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs/commands").glob("*.md")])]
PAGES = [page for page in PAGES if "```sh\n" in page.read_text() and page.stem not in ("hosts", "fabrics")]

NODE = "calicoctl node --ip=192.0.2.2"
TWO = f"""{NODE}
docker run --net=none --name workload -tid busybox
docker run --net=none --name other -tid busybox
calicoctl container add other 192.168.0.2
calicoctl profile add PROFILE
calicoctl container other profile append PROFILE"""
CONNECTED = f"""{TWO}
calicoctl container add workload 192.168.0.1
calicoctl container workload profile append PROFILE"""
WEB_AND_DB = f"""{NODE}
docker run --net=none --name web -tid busybox
docker run --net=none --name db -tid busybox
calicoctl container add web 192.168.0.1
calicoctl container add db 192.168.0.2
calicoctl profile add shop
calicoctl container web profile append shop
calicoctl container db profile append shop"""

BEFORE = {
    "README": """ip link add uplink type veth peer name router
ip address add 198.51.100.2/24 dev uplink
ip link set uplink up""",  # the address that `node` registers
    "apply": f"{NODE}\ncalicoctl export network.yaml",
    "batch": "echo profile add web >commands.txt",
    "configuration": f"""{WEB_AND_DB}
calicoctl profile add db
calicoctl profile db rule add inbound allow icmp from tag web""",
    "container": TWO,
    "datastore": f"DATASTORE_TYPE=etcdv2 {NODE}\ncalicoctl node stop --force",
    "docker": f"{NODE} --libnetwork",
    "drops": NODE,
    "endpoint": CONNECTED,
    "ipam": CONNECTED,
    "map": WEB_AND_DB,
    "profile": CONNECTED,
    "status": NODE,
    "seeing": f"{WEB_AND_DB}\ncalicoctl profile add db",
    "troubleshooting": WEB_AND_DB,
    "migration": WEB_AND_DB,
}
"""What a page takes for granted."""

FABRICS = {"hosts": (0, 0, 0), "fabrics": (0, 0, 1)}
"""Pages about several hosts: the networks of host1, host2 and host3, of which the second is behind a router."""


def examples(page: Path) -> list[tuple[str, bool]]:
    """Return a page's command lines, and whether each is said to fail."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    return [line for block in blocks for line in _lines(block)]


def connecting(name: str, address: str) -> str:
    """Return the command lines that connect a container, which they start, or a namespace."""
    start = "" if name.startswith("/") else f"docker run --net=none --name {name} -tid busybox\n"
    return f"{start}calicoctl container add {name} {address}\ncalicoctl container {name} profile append all"


@dataclass(frozen=True)
class Step:
    """A block of a page about several hosts: what is to be run, and the numbers of the hosts to run it on.

    `text` is a configuration of BIRD if `machine` names a machine that is no host, else `lines` are shell commands.
    `dead` is the number of a host that is to die before.
    """

    hosts: list[int]
    dead: int | None
    machine: str
    text: str

    @property
    def lines(self) -> list[tuple[str, bool]]:
        return _lines(self.text)


def steps(page: Path) -> Iterator[Step]:
    """Yield a page's blocks.

    One of shell commands begins with `# on host1`, `# on host1, host2 and host3`, or `# on host1, when host3 is dead`,
    a configuration of BIRD with `# on the router` or `# on the reflector`.
    """
    for kind, block in re.findall(r"```(sh|bird)\n(.*?)```", page.read_text(), re.DOTALL):
        where, _, text = block.partition("\n")
        alive, _, dead = where.partition(", when ")
        numbers = [int(number) for number in re.findall(r"host(\d)", alive)]
        machine = where.removeprefix("# on the ") if kind == "bird" else ""
        assert machine in ("router", "reflector") if kind == "bird" else numbers, block
        yield Step(numbers, int(re.findall(r"host(\d)", dead)[0]) if dead else None, machine, text)


def _lines(block: str) -> list[tuple[str, bool]]:
    lines = [line for line in block.splitlines() if line.strip()]
    return [(line.partition("  #")[0].strip(), line.endswith("# fails")) for line in lines]


IN_V2 = ("datastore",)
"""Pages that begin with data in etcd's v2 API."""


def page_of(path: Path):
    marks = [pytest.mark.api("etcdv2")] if path.stem in IN_V2 else []
    return pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.parametrize("page", [page_of(path) for path in PAGES])
def test_the_command_lines_work(bare_host: Host, engine: None, page: Path, tmp_path: Path) -> None:
    tools = fake_sudo(tmp_path)
    environment = bare_host.environment()
    del environment["DATASTORE_TYPE"]
    environment["PATH"] = f"{tools}:{Path(CALICOCTL).parent}:{environment['PATH']}"
    environment["TMPDIR"] = str(tmp_path)

    def shell(line: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "-c", line], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )

    try:
        for line in BEFORE.get(page.stem, "").splitlines():
            done = shell(line)
            assert done.returncode == 0, (line, done)
        for line, fails in examples(page):
            if "--local-etcd" in line:  # where there is neither an agent nor an etcd
                shell("calicoctl node remove")
                environment["ETCD_AUTHORITY"] = f"127.0.0.1:{free_port()}"
            done = shell(line)
            assert (done.returncode != 0) == fails, (line, done)
            assert "Traceback" not in done.stderr
    finally:
        run("docker", "rm", "-f", *NAMES, check=False)
        run("docker", "network", "rm", "shop", check=False)
        shell("calicoctl node remove --remove-endpoints")
        run("ip", "link", "delete", "uplink", check=False)
        shutil.rmtree("/var/lib/calico", ignore_errors=True)
        bare_host.etcd.v3("kv/deleterange", {"key": b64("/calico/"), "range_end": b64("/calico0")})
        for name in run("ip", "netns", "list").out.split():
            run("ip", "netns", "delete", name, check=False)


@pytest.mark.parametrize("name", FABRICS)
def test_the_command_lines_work_on_several_hosts(open_etcd: Etcd, engine: None, name: str, tmp_path: Path) -> None:
    tools = fake_sudo(tmp_path)
    with ExitStack() as undo:
        undo.callback(run, "docker", "rm", "-f", *NAMES, check=False)
        hosts = undo.enter_context(fabric(open_etcd, *FABRICS[name]))
        routers: dict[str, subprocess.Popen] = {}
        undo.callback(lambda: [end(router) for router in routers.values()])
        for number, host in enumerate(hosts, 1):
            host.name = f"host{number}"
        for step in (*BEFORE_ON_HOSTS.get(name, ()), *steps(ROOT / f"docs/{name}.md")):
            if step.dead is not None:
                die(hosts[step.dead - 1])
            if step.machine:
                if step.machine in routers:
                    end(routers.pop(step.machine))
                routers[step.machine] = start_bird(step, tmp_path)
                for host in hosts:
                    wait_for(lambda h=host: sessions_up(h), host.log(), 30)
                continue
            for host in (hosts[number - 1] for number in step.hosts):
                environment = {n: v for n, v in host.environment().items() if not n.startswith(("ETCD_", "DATASTORE_"))}
                environment["PATH"] = f"{tools}:{environment['PATH']}"
                for line, fails in step.lines:
                    line = line.replace("172.18.0.1:2379", f"172.18.0.1:{open_etcd.port}")
                    done = patiently(host, line, fails, environment)
                    assert (done.status != 0) == fails, (host.name, line, done)
                    assert "Traceback" not in done.err
        wait_for(lambda: sessions_up(hosts[0], none=name == "hosts"), hosts[0].log(), 30)


def sessions_up(host: FabricHost, none: bool = False) -> bool:
    """Return whether all BGP sessions of a host are up, of which there must be some, or none."""
    sessions = host.status()["bgp_sessions"]
    return (not sessions) == none and all(session["up"] for session in sessions)


def start_bird(step: Step, folder: Path) -> subprocess.Popen:
    """Start BIRD on a machine that is no host: the fabric's router, or this one, which is the reflector."""
    conf = folder / f"{step.machine}.conf"
    conf.write_text(step.text)
    where = ("ip", "netns", "exec", "router") if step.machine == "router" else ()
    files = ("-c", str(conf), "-s", str(conf.with_suffix(".ctl")), "-P", str(conf.with_suffix(".pid")))
    return subprocess.Popen([*where, "bird", "-f", *files])


def end(router: subprocess.Popen) -> None:
    router.terminate()
    router.wait()


def fake_sudo(folder: Path) -> Path:
    """Make a folder with a `sudo` that changes nothing; return it."""
    tools = folder / "bin"
    tools.mkdir()
    (tools / "sudo").write_text('#!/bin/sh\nexec "$@"\n')
    (tools / "sudo").chmod(0o755)
    return tools


def die(host: FabricHost) -> None:
    """Let a host die, and its heartbeat expire."""
    host.unplug()
    host.end()
    v3 = ("etcdctl", f"--endpoints={host.etcd.url}", "del")
    run(*v3, f"/calico/felix/v1/host/{host.name}/status", env={**os.environ, "ETCDCTL_API": "3"})


BEFORE_ON_HOSTS = {
    "fabrics": [
        Step([1, 2, 3], None, "", "echo ETCD_ENDPOINTS=http://172.18.0.1:2379 >/etc/calico/node.env"),
        Step(
            [1], None, "", "calicoctl node --ip=172.18.0.11\ncalicoctl pool add 10.65.0.0/16\ncalicoctl profile add all"
        ),
        Step([2], None, "", "calicoctl node --ip=172.18.0.12\nip netns add blue"),
        Step([3], None, "", "calicoctl node --ip=172.19.0.13"),
        Step([1], None, "", connecting("web", "10.65.1.1")),
        Step([2], None, "", connecting("/var/run/netns/blue", "10.65.2.1")),
        Step([3], None, "", connecting("db", "10.65.3.1")),
    ]
}
"""What a page about several hosts takes for granted."""


def patiently(host: FabricHost, line: str, fails: bool, environment: dict[str, str]) -> Result:
    """Run a line; repeat one with packets, which a reader would, too, until routes have got around."""
    until = time.monotonic() + (20 if "ping" in line and not fails else 0)
    while True:
        done = host.run("bash", "-c", line, check=False, env=environment)
        if done.status == 0 or time.monotonic() >= until:
            return done
