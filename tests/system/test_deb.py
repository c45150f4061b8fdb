"""The Debian package: it is built, installed, upgraded while packets pass, removed and purged.

dpkg changes `/usr` in an overlay, which goes away after each test.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from tests.system.agent import B4, LOG_DIR, FreeHost
from tests.system.booted import Booted, booted
from tests.system.support import HOST_IP, Host, Result, gone, import_busybox, run, wait_for
from tests.system.test_install import ANOTHER_USERS, ROOT, WHEELS, commit, make, pinging, program
from tests.system.traffic import PATIENT, ping

pytestmark = pytest.mark.api("etcdv3")

PROGRAM = "/usr/bin/calicoctl"
OLDER = "0.0.1"
POLICY = Path("/usr/sbin/policy-rc.d")

IN_AN_IMAGE = """
mount -t tmpfs tmpfs /mnt && cd /mnt
for folder in bin dev etc lib lib64 proc run sbin usr var; do
    if [ -L /$folder ]; then cp -d /$folder .; fi
    if [ -e /$folder ] && [ ! -L /$folder ]; then mkdir $folder && mount --rbind /$folder $folder; fi
done
exec chroot . "$@"
"""
"""Runs a command in a root that is another one, but shares processes and `/run`, as when a disk image is made."""


@pytest.fixture(scope="module")
def deb() -> Path:
    assert (WHEELS / "ready").exists(), f"run 'make {WHEELS.relative_to(ROOT)}/ready'"
    done = make("deb", Path("/unused"), by=ANOTHER_USERS)
    assert done.status == 0, done
    return ROOT / done.out.splitlines()[-1]


@pytest.fixture(scope="module")
def older(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same package, with another version."""
    version = run("dpkg-deb", "--field", str(deb), "Version").out.strip()
    tree = tmp_path_factory.mktemp("older") / "tree"
    run("dpkg-deb", "--raw-extract", str(deb), str(tree))
    named = run("grep", "-rlF", version, *(str(tree / folder) for folder in ("DEBIAN", "usr/share/calicoctl/bin"))).out
    for name in named.splitlines():
        Path(name).write_text(Path(name).read_text().replace(version, OLDER))
    file = tree.parent / "calicoctl.deb"
    run("dpkg-deb", "--root-owner-group", "-Znone", "--build", str(tree), str(file))
    return file


@pytest.fixture
def usr() -> Iterator[None]:
    """A `/usr` that dpkg may change, where packages may restart services; what it changes elsewhere is removed."""
    layers = Path("/run/usr")
    for name in ("new", "work"):
        (layers / name).mkdir(parents=True)
    run("mount", "-t", "overlay", "-o", f"lowerdir=/usr,upperdir={layers}/new,workdir={layers}/work", "overlay", "/usr")
    POLICY.unlink(missing_ok=True)
    try:
        yield
    finally:
        run("dpkg", "--purge", "--force-all", "calicoctl", check=False)
        run("umount", "--lazy", "/usr")
        shutil.rmtree(layers, ignore_errors=True)


def dpkg(*arguments: str) -> Result:
    return run("dpkg", *arguments, check=False)


def tree() -> Path:
    """Return the folder that the program runs in; there must be one alone."""
    (found,) = (path for path in Path("/usr/lib/calicoctl").iterdir() if not path.is_symlink())
    assert Path(PROGRAM).resolve() == found / "bin/calicoctl"
    return found


def left() -> list[str]:
    """Return what of calicoctl lies where the package, or what it has installed, puts files."""
    found = run("find", "/usr/bin", "/usr/lib", "/usr/share", "-xdev", "-name", "*calico*").out.splitlines()
    return found + [folder for folder in ("/etc/calico", "/var/lib/calico", "/var/log/calico") if Path(folder).exists()]


def test_lintian_finds_no_error(deb: Path) -> None:
    fields = run("dpkg-deb", "--info", str(deb)).out
    assert "Architecture: all" in fields
    names = {line.split()[5] for line in run("dpkg-deb", "--contents", str(deb)).out.splitlines()}
    assert not [name for name in names if name.endswith((".so", ".pyc", "/WHEEL"))], "what differs between builders"
    assert {"./usr/share/man/man1/calicoctl.1.gz", "./usr/lib/systemd/system/calico-node.service"} <= names
    if "VERSION_CODENAME=bookworm" in Path("/etc/os-release").read_text():
        run("lintian", "--allow-root", "--fail-on=error", "--tag-display-limit=0", str(deb))


def test_the_same_commit_makes_the_same_file(deb: Path) -> None:
    before = deb.read_bytes()
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    run("mount", "-t", "tmpfs", "tmpfs", str(build))  # where folders have other sizes than on disk
    try:
        done = make("deb", Path("/unused"), by=("sh", "-c", 'umask 077; exec "$@"', "sh"))
    finally:
        run("umount", str(build))
    assert done.status == 0, done
    assert deb.read_bytes() == before


def test_it_has_the_licenses_of_its_libraries_and_its_commit(deb: Path, tmp_path: Path) -> None:
    run("dpkg-deb", "--raw-extract", str(deb), str(tmp_path))
    version = run("dpkg-deb", "--field", str(deb), "Version").out.strip()
    assert version.partition("+")[2].partition(".g")[2] == (commit() or "").replace("-", ".")
    libraries = {path.stem for path in tmp_path.glob("usr/share/calicoctl/lib/python3/site-packages/*.dist-info")}
    libraries -= {name for name in libraries if name.startswith("calicoctl-")}
    _, *texts = (tmp_path / "usr/share/doc/calicoctl/copyright").read_text().split("\n== ")
    found = {text.partition("\n")[0]: text.partition("\n")[2] for text in texts}
    assert set(found) == libraries and len(libraries) > 10
    assert not [name for name, text in found.items() if "licen" not in text.lower() and "permi" not in text.lower()]


def test_it_is_installed_upgraded_without_loss_removed_and_purged(
    deb: Path, older: Path, usr: None, bare_host: Host
) -> None:
    host = FreeHost(bare_host.etcd)
    for folder in ("etc", "var/lib", "var/log"):
        shutil.rmtree(f"/{folder}/calico", ignore_errors=True)  # of other tests
    assert left() == []
    done = dpkg("--install", str(older))
    assert done.status == 0, done
    assert not list(Path("/run/calico").glob("*/felix.pid")), "nothing is started"
    assert not list(Path("/etc/systemd/system").rglob("calico*")), "or enabled"
    host.ctl("node", f"--ip={HOST_IP}", f"--log-dir={LOG_DIR}", command=[PROGRAM])
    host.add_pair()
    host.sync()
    old = host.pid
    assert program(old).startswith(f"/usr/lib/calicoctl/{OLDER}-")

    restart = ("env", "PREFIX=/usr", "/usr/share/calicoctl/setup", "restart", str(tree()))  # as postinst does
    assert "agent" not in run("unshare", "--mount", "sh", "-ec", IN_AN_IMAGE, "sh", *restart).out
    POLICY.write_text('#!/bin/sh\n[ "$*" != "calico-node restart" ] || exit 101\n')
    POLICY.chmod(0o755)
    assert "policy-rc.d forbids to restart it" in run(*restart).out
    assert host.pid == old and not gone(old)
    POLICY.unlink()

    with pinging():
        done = dpkg("--install", str(deb))
    assert done.status == 0 and "The host agent is restarted" in done.out, done
    assert gone(old) and host.pid != old
    new = tree()
    assert Path(program(host.pid)).parent == new / "bin"
    host.sync()
    assert host.ctl("profile", "show", "-o", "yaml", command=[PROGRAM]).status == 0, "with Debian's PyYAML"
    assert "calicoctl container add" in run("man", "calicoctl").out
    assert (
        "1.1.0" in run("/usr/lib/cni/calico", input="{}", env={"CNI_COMMAND": "VERSION", "PATH": "/usr/bin:/bin"}).out
    )
    units = [str(path) for path in Path("/usr/lib/systemd/system").glob("calico-*")]
    assert len(units) == 5
    assert run("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *units).err == ""
    refused = make("install", Path("/usr/local"))
    assert refused.status != 0 and "The Debian package calicoctl is installed" in refused.err, refused

    old = host.pid
    run("dpkg-trigger", "--by-package=python3-minimal", "/usr/bin/python3")  # as when this is replaced
    done = dpkg("--triggers-only", "calicoctl")
    assert done.status == 0 and gone(old) and Path(program(host.pid)).parent == tree() / "bin", done
    assert tree() != new, "what ran was whole until the end"

    done = dpkg("--remove", "calicoctl")
    assert done.status == 0 and "Endpoints of this host stay connected" in done.err, done
    assert not list(Path("/run/calico").glob("*/felix.pid")) and ping("a", B4, PATIENT)
    assert left() == ["/var/lib/calico"]
    refused_by = Path("/usr/local/lib/calicoctl")
    refused_by.mkdir(parents=True)
    done = dpkg("--install", str(deb))
    assert done.status != 0 and "run 'make uninstall' in its checkout first" in done.err, done
    refused_by.rmdir()

    assert dpkg("--install", str(deb)).status == 0
    host.ctl("node", f"--ip={HOST_IP}", f"--log-dir={LOG_DIR}", command=[PROGRAM])
    for name in ("a", "b"):
        host.ctl("container", "remove", f"/var/run/netns/{name}", command=[PROGRAM])
    Path("/etc/calico").mkdir(exist_ok=True)
    done = dpkg("--purge", "calicoctl")
    assert done.status == 0, done
    wait_for(lambda: "calico" not in run("nft", "list", "tables").out, "no table of the agent's")
    assert run("ip", "route", "show", "proto", "80").out == ""
    assert left() == [] and dpkg("--status", "calicoctl").status != 0


def test_it_is_configured_without_shared_memory(deb: Path, usr: None) -> None:
    """As in a root that is just being made, without /dev."""
    run("unshare", "--mount", "sh", "-ec", f"mount -t tmpfs -o size=0,nr_inodes=1 tmpfs /dev/shm; dpkg -i {deb}")
    assert list((tree() / "lib/python3/site-packages/calicoctl/__pycache__").glob("*.pyc"))


def test_commands_end_before_the_program_is_removed(deb: Path, usr: None) -> None:
    assert dpkg("--install", str(deb)).status == 0
    works = "import sys; print(flush=True); sys.stdin.read(); import calicoctl.workloads.wiring"
    command = subprocess.Popen(
        [str(tree() / "bin/python"), "-I", "-c", works], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert command.stdout is not None and command.stdout.readline() == b"\n"
    removal = subprocess.Popen(["dpkg", "--remove", "calicoctl"], stdout=subprocess.DEVNULL)
    wait_for(lambda: run("pgrep", "-xf", "sleep 1", check=False).out, "the removal to wait")
    assert command.communicate(timeout=30) and command.returncode == 0, "it finds its modules"
    assert removal.wait(timeout=30) == 0 and left() == []


def test_what_cannot_be_configured_can_be_removed(deb: Path, usr: None) -> None:
    assert dpkg("--unpack", str(deb)).status == 0
    script, hook = Path("/var/lib/dpkg/info/calicoctl.postinst"), Path("/var/lib/calico/docker-hook")
    script.write_text(script.read_text().replace("-m compileall", "-m nothing"))
    assert dpkg("--configure", "calicoctl").status != 0
    assert not list(Path("/usr/lib/calicoctl").iterdir())
    refused = make("install", Path("/usr/local"))
    assert refused.status != 0 and "The Debian package calicoctl is installed" in refused.err, refused
    hook.mkdir(parents=True)
    try:
        (hook / "settings.json").write_text(f'{{\n  "command": "{PROGRAM}",\n}}\n')  # of one that was removed
        done = dpkg("--remove", "calicoctl")
        assert done.status == 0, done
    finally:
        shutil.rmtree(hook.parent)


def test_purging_keeps_what_docker_or_another_calicoctl_uses(deb: Path, usr: None) -> None:
    assert dpkg("--install", str(deb)).status == 0
    data, pid_file = Path("/var/lib/calico"), Path("/run/calico/host1/felix.pid")
    runtime, other = data / "docker-hook/runtime", data / "host1/workloads"
    script = Path("/var/lib/dpkg/info/calicoctl.preinst")
    folder = Path("/usr/local/lib/calicoctl")
    folder.mkdir(parents=True)
    assert run(str(script), "upgrade", "1", check=False).status == 1
    assert run(str(script), "abort-upgrade", "1", check=False).status == 0, "nothing is installed then"
    folder.rmdir()
    try:
        for path in (runtime, other, pid_file):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        assert dpkg("--remove", "calicoctl").status == 0
        agent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "-m", "calicoctl.felix"])
        try:
            pid_file.write_text(f"{agent.pid} 1\n")
            done = run("sh", "/var/lib/dpkg/info/calicoctl.postrm", "purge", check=False)
            assert done.status == 0 and "are kept" in done.err and other.exists(), done
        finally:
            agent.kill()
            agent.wait()
        done = dpkg("--purge", "calicoctl")
        assert done.status == 0 and "docker-hook is kept" in done.err, done
        assert runtime.exists() and not other.parent.exists()
    finally:
        for folder in (data, pid_file.parent.parent):
            shutil.rmtree(folder, ignore_errors=True)


INSTALL = "apt-get install ./dist/calicoctl_*.deb"


def block_of(page: str, line: str) -> str:
    """Return the indented lines of a page among which is `line`, as they would be typed."""
    blocks = re.findall(r"(?:^    .*\n)+", (ROOT / page).read_text(), re.MULTILINE)
    (block,) = (dedent(block) for block in blocks if f"    {line}\n" in block)
    return block


@pytest.fixture
def machine(deb: Path) -> Iterator[Booted]:
    """A machine that has booted, with an etcd that hosts reach, and an agent, all as the documentation says."""
    with booted(ROOT) as machine:
        machine.run("ip", "address", "add", "172.18.0.1/32", "dev", "lo")
        machine.run("systemctl", "enable", "--now", "etcd")
        before = machine.property("etcd", "MainPID")
        machine.shell(block_of("docs/hosts.md", "systemctl restart etcd"))
        assert machine.property("etcd", "MainPID") not in (before, "0")
        make_deb, _, install = block_of("README.md", INSTALL).partition("\n")
        assert make_deb == "make deb", "it is made by the fixture"
        machine.shell(f"cd {ROOT} && {install}", input="y\n")  # it asks where there are several files
        settings = "ETCD_ENDPOINTS=http://172.18.0.1:2379\nCALICO_NODE_OPTIONS=--ip=172.18.0.1"
        machine.shell(f"mkdir /etc/calico && echo '{settings}' >/etc/calico/node.env")
        done = machine.shell(block_of("docs/install.md", "systemctl enable --now calico-node"), check=False)
        assert done.status == 0, machine.journal("calico-node")
        assert machine.run("systemctl", "is-enabled", "calico-node").out == "enabled\n"
        machine.shell("calicoctl pool add 10.65.0.0/16 && calicoctl profile add all")
        yield machine


def connect(machine: Booted, name: str, address: str) -> None:
    path = f"/var/run/netns/{name}"
    machine.shell(f"ip netns add {name} && calicoctl container add {path} {address} --wait=20")
    machine.shell(f"calicoctl container {path} profile append all")


def answers(machine: Booted, address: str) -> bool:
    return machine.run("ip", "netns", "exec", "a", "ping", "-c1", "-W3", address, check=False).status == 0


def status(machine: Booted) -> dict:
    out = machine.run("calicoctl", "status", "--output=json", check=False).out
    return json.loads(out) if out else {"problems": ["no report"], "report": {"current": False}}


def test_systemd_runs_the_agent_which_does_all_its_work_in_its_unit(machine: Booted) -> None:
    agent = machine.property("calico-node", "MainPID")
    connect(machine, "a", "10.65.0.1")
    connect(machine, "b", "10.65.0.2")
    wait_for(lambda: answers(machine, "10.65.0.2"), "a ping that policy allows")
    assert "of the command server" in machine.run("calicoctl", "--debug", "profile", "show").err
    bird = machine.run("pgrep", "-x", "bird").out
    assert status(machine)["bird"]["pid"] == int(bird) and not status(machine)["problems"]

    machine.run("kill", "-9", agent)
    wait_for(lambda: machine.property("calico-node", "MainPID") not in (agent, "0"), "another agent", 60)
    wait_for(lambda: status(machine)["report"]["current"], "its report", 60)
    assert answers(machine, "10.65.0.2"), "what was connected stays so"
    agent = machine.property("calico-node", "MainPID")
    machine.run("kill", "-9", bird.strip())
    wait_for(lambda: machine.run("pgrep", "-x", "bird", check=False).out not in ("", bird), "another BIRD", 60)
    machine.run("nft", "flush", "ruleset")
    wait_for(lambda: "table inet calico\n" in machine.run("nft", "list", "tables").out, "the tables")
    # what attaches anew enters the namespace, and mounts that are newer than the agent
    machine.run("ip", "-n", "b", "link", "delete", "eth1")
    wait_for(lambda: answers(machine, "10.65.0.2"), "the interface to be attached again", 60)
    assert machine.property("calico-node", "MainPID") == agent

    machine.run("systemctl", "restart", "calico-node")
    assert machine.property("calico-node", "MainPID") != agent and answers(machine, "10.65.0.2")
    done = machine.run("apt-get", "--yes", "purge", "calicoctl")
    assert "Endpoints of this host stay connected" in done.err + done.out
    assert answers(machine, "10.65.0.2") and not machine.run("pgrep", "-f", "calicoctl", check=False).out
    assert not machine.run("systemctl", "list-unit-files", "--no-legend", "calico-*", check=False).out


def test_systemd_serves_docker_networks_and_debians_services_can_be_disabled(machine: Booted, tmp_path: Path) -> None:
    machine.shell(block_of("docs/docker.md", "sudo systemctl enable --now calico-docker.socket").replace("sudo ", ""))
    machine.run("systemctl", "enable", "--now", "containerd", "docker.socket", "docker")
    import_busybox(tmp_path / "busybox", f"unix:///proc/{machine.pid}/root/run/docker.sock")
    machine.run("docker", "network", "create", "--driver=calico", "--ipam-driver=calico-ipam", "shop")
    machine.shell("for name in web db; do docker run --net=shop --restart=always --name=$name -tid busybox; done")
    assert machine.property("calico-docker", "ActiveState") == "active"

    def pings() -> bool:
        return machine.run("docker", "exec", "web", "ping", "-c1", "-W3", "db", check=False).status == 0

    wait_for(pings, "a ping by name within the network")
    before = machine.property("docker", "MainPID")
    machine.run("systemctl", "restart", "docker")
    assert machine.property("docker", "MainPID") != before
    wait_for(pings, "the restarted containers", 60)

    (disable,) = re.findall(r"`(systemctl\s+disable[^`]*)`", (ROOT / "README.md").read_text())
    machine.run(*disable.split())
    left = machine.run("pgrep", "-l", "-x", "etcd|dockerd|containerd", check=False).out
    assert left == "" and "enabled" not in machine.run("systemctl", "is-enabled", *UNITS, check=False).out


def test_a_service_that_flushes_nftables_can_be_kept_from_deleting_the_tables(machine: Booted) -> None:
    def tables() -> list[str]:
        return machine.run("nft", "list", "tables", "inet").out.splitlines()

    conf, page = "/etc/nftables.conf", "docs/agent.md"
    flushes = "grep -q '^flush ruleset$' " + conf
    machine.shell(f"{flushes} && systemctl enable --now nftables && systemctl restart calico-node")
    machine.run("systemctl", "stop", "calico-node")
    assert {"table inet calico", "table inet filter"} < set(tables()), "the service's, and what the agent leaves"
    own = block_of(page, "delete table inet filter")
    override = block_of(page, "ExecStop=/usr/sbin/nft delete table inet filter")
    folder = "/etc/systemd/system/nftables.service.d"
    machine.shell(f"sed -i 's/^flush ruleset$/{own.strip()}/' {conf}".replace(chr(10), "\\n"))
    machine.shell(f"mkdir {folder} && cat >{folder}/override.conf && systemctl daemon-reload", input=override)
    machine.run("systemctl", "restart", "nftables")
    assert {"table inet calico", "table inet filter"} < set(tables())
    machine.shell(f"sed -i 's/^delete table inet filter$/flush ruleset/' {conf}")
    machine.run("systemctl", "restart", "nftables")
    assert tables() == ["table inet filter"], "the tables of a host whose agent is dead"


UNITS = ("etcd", "docker", "docker.socket", "containerd")
"""The services of Debian's that the packages of the demo enable."""
