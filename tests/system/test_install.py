"""`make install` and `make uninstall`: a first time, over an older version with its agent running, and for a package.

A stand-in for `systemctl` writes down what it is asked, and does it; test_deb.py has a real systemd.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from calicoctl import __version__
from tests.system.agent import B4, LOG_DIR, FreeHost
from tests.system.support import CALICOCTL, HOST_IP, Host, Result, free_port, gone, run, wait_for
from tests.system.traffic import PATIENT, ping

pytestmark = pytest.mark.api("etcdv3")

ROOT = Path(__file__).parent.parent.parent
WHEELS = Path(CALICOCTL).parent.parent / "wheels"
"""What `make install` installs, as published, for a host without a network; made by `make .venv/wheels/ready`."""

ANOTHER_USERS = ("env", "GIT_TEST_ASSUME_DIFFERENT_OWNER=true")
"""Runs a command in a checkout that is, for git, another user's."""

NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")

SYSTEMCTL = """\
#!/bin/sh
echo "$* ($(readlink {prefix}/bin/calicoctl))" >>{home}/asked
end() {{ kill "$(cat {home}/pid)" && while [ -d "/proc/$(cat {home}/pid)" ]; do sleep 0.05; done; }}
case "$*" in
"show --property=MainPID --value calico-node.service") cat {home}/pid ;;
"show --property=FragmentPath --value calico-node.service") echo {unit} ;;
"start calico-node.service"|"restart calico-node.service")
    [ "$1" = start ] || end
    rm -f /run/calico/*/felix.json
    {environment} setsid sh -c 'echo $$ >{home}/pid
        exec {prefix}/bin/calicoctl node --detach=false --ip={ip}' >/dev/null 2>&1 &
    while ! grep -q '"first_update": true' /run/calico/*/felix.json; do sleep 0.05; done ;;
"disable --now calico-node.service") end ;;
esac
"""


def make(
    target: str, prefix: Path, path: str = "", by: tuple[str, ...] = (), wheels: Path = WHEELS, **variables: str
) -> Result:
    """Run make as an administrator does, who knows nothing of the agent's environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ETCD_", "HOSTNAME", "PIP_"))}
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}
    arguments = [f"{name}={value}" for name, value in variables.items()]
    environment = {**kept, **offline, "PATH": f"{path}{kept['PATH']}"}
    return run(
        *by,
        "make",
        "--no-print-directory",
        target,
        f"PREFIX={prefix}",
        *arguments,
        check=False,
        cwd=ROOT,
        env=environment,
    )


def older_version(prefix: Path) -> None:
    """Put a version of the time when there was one environment, in lib/calicoctl itself, without running pip."""
    library = prefix / "lib/calicoctl"
    run("/usr/bin/python3", "-m", "venv", "--without-pip", str(library))
    (packages,) = library.glob("lib/python3*/site-packages")
    (ours,) = Path(CALICOCTL).parent.parent.glob("lib/python3*/site-packages")
    shutil.copytree(ours, packages, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__editable__*", "mypy", "pip"))
    shutil.copytree(ROOT / "calicoctl", packages / "calicoctl")
    program = library / "bin/calicoctl"
    program.write_text(f"#!{library}/bin/python3\nfrom calicoctl.cli.main import entry\nentry()\n")
    program.chmod(0o755)
    (prefix / "bin").mkdir()
    (prefix / "bin/calicoctl").symlink_to(program)


def program(pid: int) -> str:
    """Return the path of the interpreter that a process was started with."""
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]


def commit() -> str | None:
    """Return the commit of this checkout as built programs tell it; None in a copy that git knows nothing of."""
    if not (ROOT / ".git").exists():
        return None
    return run("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*", cwd=ROOT).out.strip()


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


@contextmanager
def pinging() -> Iterator[None]:
    """Have namespace `a` ping `b` fifty times a second, and fail when a single answer is missing."""
    command = ["ip", "netns", "exec", "a", "ping", "-q", "-i", "0.02", B4]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield
    finally:
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=30)
    sent, received = re.findall(r"(\d+) (?:packets transmitted|received)", said)
    assert sent == received and int(sent) > 20, said


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    assert (WHEELS / "ready").exists(), f"run 'make {WHEELS.relative_to(ROOT)}/ready'"
    return tmp_path / "prefix"


def test_installing_over_a_running_agent_restarts_it_on_whole_files_and_no_packet_is_lost(
    bare_host: Host, prefix: Path, tmp_path: Path
) -> None:
    host = FreeHost(bare_host.etcd)
    prefix.mkdir()
    older_version(prefix)
    library, program_path = prefix / "lib/calicoctl", str(prefix / "bin/calicoctl")
    port = free_port()
    options = (f"--ip={HOST_IP}", f"--log-dir={LOG_DIR}", f"--metrics-port={port}", "--libnetwork")
    host.ctl("node", *options, command=[program_path])
    plugins = Path(f"/run/calico/{host.name}/plugins.pid")
    assert program(int(plugins.read_text())).startswith(f"{library}/bin/")
    host.add_pair()
    host.sync()
    old = host.pid
    assert program(old) == f"{library}/bin/python3" or program(old) == f"{library}/bin/python"
    before = tree(prefix)

    failed = make("install", prefix, PYTHON="/bin/false")
    assert failed.status != 0 and "The installed version is unchanged" in failed.err, failed
    forged = tmp_path / "forged"
    forged.mkdir()
    for file in WHEELS.iterdir():
        (forged / file.name).symlink_to(file)
    (wheel,) = forged.glob("setuptools-*.whl")
    content = wheel.read_bytes()
    wheel.unlink()
    wheel.write_bytes(content + b"\0")
    failed = make("install", prefix, wheels=forged)
    assert failed.status != 0 and "DO NOT MATCH THE HASHES" in failed.err and "is unchanged" in failed.err, failed
    assert host.pid == old and tree(prefix) == before

    with pinging():
        done = make("install", prefix)
        assert done.status == 0, done
        assert "The host agent is restarted" in done.out
    assert gone(old) and host.pid != old
    (version,) = library.iterdir()
    assert Path(program(host.pid)).parent == version / "bin"
    new = [version / "bin"]
    wait_for(lambda: plugins.exists() and [Path(program(int(plugins.read_text()))).parent] == new, "its process")
    assert (prefix / "bin/calicoctl").resolve() == version / "bin/calicoctl"
    assert host.status()["metrics_port"] == port, "its options"
    host.sync()  # its environment: it still follows this store

    # what is installed, as people and their shells find it
    told = json.loads(host.ctl("version", "--output=json", command=[program_path]).out)
    assert told == {"version": __version__, "commit": commit()}
    assert host.ctl("container", "--help", command=[program_path]).out.count("container add") > 1
    assert "calicoctl container add" in run("man", "-l", str(prefix / "share/man/man1/calicoctl.1")).out
    completion = prefix / "share/bash-completion/completions/calicoctl"
    assert "calicoctl" in run("bash", "-c", f". {completion} && complete -p calicoctl").out
    assert (prefix / "share/zsh/site-functions/_calicoctl").read_text().startswith("#compdef calicoctl\n")
    units = prefix / "lib/systemd/system"
    unit = units / "calico-node.service"
    assert f"ExecStart={prefix}/bin/calicoctl node --detach=false" in unit.read_text()
    start = Path(program_path).read_text().partition("import")[0]
    assert "-IS\n" in start, "the command starts without more than it needs"
    assert run("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)).err == ""
    run("systemd-analyze", "security", "--offline=true", "--threshold=50", "--no-pager", str(unit))
    sockets, service = units / "calico-docker.socket", units / "calico-docker.service"
    others = (str(units / f"calico-{name}.service") for name in ("docker-etcd", "commands"))
    together = (str(sockets), str(service), *others)
    said = run("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *together).err
    assert said == ""
    run("systemd-analyze", "security", "--offline=true", "--threshold=50", "--no-pager", str(service))
    assert run("find", str(prefix), "!", "-type", "l", "!", "-perm", "-o=r").out == "", "all of it is for everybody"

    before = tree(prefix)
    for target in ("install", "uninstall"):
        refused = make(target, prefix, by=NOBODY)
        assert refused.status != 0 and refused.out == "" and "nothing is changed: run this as root" in refused.err
        assert refused.err.count("\n") == 2, "a sentence, and make's own line"
    assert tree(prefix) == before
    plugin = prefix / "cni/calico"
    assert make("install-cni", prefix, CNI_BIN=str(plugin.parent)).status == 0
    asked = run(str(plugin), input="{}", env={"CNI_COMMAND": "VERSION", "PATH": "/usr/bin:/bin"})
    assert "1.1.0" in json.loads(asked.out)["supportedVersions"]
    networks = Path(f"/var/lib/calico/{host.name}/networks")
    networks.mkdir(parents=True)
    (networks / ("a" * 64)).write_text('{"name": "shop", "internal": false, "profiles": null, "has_profile": true}')
    done = make("uninstall", prefix, CNI_BIN=str(plugin.parent))
    assert done.status == 0 and "still has networks with Calico's driver: shop." in done.err, done
    shutil.rmtree(networks)
    assert tree(prefix) == set()
    assert not [pid for name in ("felix", "plugins") for pid in Path("/run/calico").glob(f"*/{name}.pid")]
    assert not list(Path("/run/docker/plugins").iterdir())
    assert ping("a", B4, PATIENT)


def test_an_agent_of_systemds_is_restarted_and_ended_by_systemd(
    bare_host: Host, prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = FreeHost(bare_host.etcd)
    prefix.mkdir()
    older_version(prefix)
    home = tmp_path / "systemd"
    home.mkdir()
    unit = prefix / "lib/systemd/system/calico-node.service"
    # what the unit's EnvironmentFile would set
    names = ("HOSTNAME", "ETCD_AUTHORITY")
    environment = " ".join(f"{name}={host.environment()[name]}" for name in names)
    stand_in = SYSTEMCTL.format(home=home, prefix=prefix, unit=unit, ip=HOST_IP, environment=environment)
    (home / "systemctl").write_text(stand_in)
    (home / "systemctl").chmod(0o755)
    asked = home / "asked"
    monkeypatch.setenv("PATH", f"{home}:{os.environ['PATH']}")
    booted = Path("/run/systemd/system")
    booted.mkdir(parents=True)
    try:
        run("systemctl", "start", "calico-node.service")
        old, link = host.pid, (prefix / "bin/calicoctl").readlink()
        asked.unlink()

        package = tmp_path / "package"
        done = make("install", Path("/opt/calicoctl"), DESTDIR=str(package))
        assert done.status == 0, done
        assert not asked.exists() and host.pid == old and not Path("/opt/calicoctl").exists()
        done = make("install-cni", Path("/opt/calicoctl"), DESTDIR=str(package))
        assert done.status == 0 and (package / "opt/cni/bin/calico").stat().st_mode & 0o777 == 0o755, done
        assert run("grep", "-rlF", str(package), str(package), check=False).out == ""
        shutil.copytree(package / "opt/calicoctl", "/opt/calicoctl", symlinks=True)
        host.ctl("pool", "show", command=["/opt/calicoctl/bin/calicoctl"])
        assert make("uninstall", Path("/opt/calicoctl"), DESTDIR=str(package)).status == 0
        assert tree(package) == set() and not asked.exists() and Path("/opt/calicoctl/bin/calicoctl").exists()
        # a unit of this name, and its agent, belong to another place
        assert make("uninstall", Path("/opt/calicoctl")).status == 0
        assert tree(Path("/opt/calicoctl")) == set() and host.pid == old
        assert "disable" not in asked.read_text()
        asked.unlink()

        done = make("install", prefix)
        assert done.status == 0, done
        lines = asked.read_text().splitlines()
        new = (prefix / "bin/calicoctl").readlink()
        assert new != link
        assert f"daemon-reload ({new})" in lines and lines[-1] == f"restart calico-node.service ({new})", lines
        assert lines.index(f"daemon-reload ({new})") < len(lines) - 1
        assert host.pid != old and Path(program(host.pid)).parent == new.parent
        asked.unlink()

        assert make("uninstall", prefix).status == 0
        lines = asked.read_text().splitlines()
        assert f"disable --now calico-node.service ({new})" in lines and lines[-1] == "daemon-reload ()"
        assert tree(prefix) == set()
    finally:
        booted.rmdir()


def test_a_wheel_has_the_package_alone_and_its_license_and_commit() -> None:
    file = ROOT / f"dist/calicoctl-{__version__}-py3-none-any.whl"
    file.unlink(missing_ok=True)
    private = ROOT / "LICENSE"
    mode = private.stat().st_mode
    private.chmod(0o600)  # as all of a careful user's checkout
    try:
        done = make("wheel", ROOT, by=ANOTHER_USERS)
    finally:
        private.chmod(mode)
    assert done.status == 0 and done.out == f"{file.relative_to(ROOT)}\n", done
    with zipfile.ZipFile(file) as wheel:
        ours = {name for name in wheel.namelist() if ".dist-info/" not in name}
        said = wheel.read("calicoctl/__init__.py").decode()
        (license,) = (one for one in wheel.infolist() if one.filename.endswith("/LICENSE"))
    assert license.external_attr >> 16 & 0o777 == 0o644
    files = (path.relative_to(ROOT) for path in (ROOT / "calicoctl").rglob("*") if path.is_file())
    assert ours == {str(file) for file in files if "__pycache__" not in file.parts}
    assert f'__commit__ = "{commit() or ""}"\n' in said


def test_cleaning_removes_what_the_targets_make_and_nothing_else(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "calicoctl").mkdir()
    made = [line.strip("/").replace("*", "calicoctl") for line in (ROOT / ".gitignore").read_text().splitlines()]
    for name in made:
        (tmp_path / name / "folder").mkdir(parents=True)
    run("make", "clean", cwd=tmp_path)
    # those of the demo, which make demo-clean removes, and of Python
    assert {path.name for path in tmp_path.iterdir()} == {"Makefile", "calicoctl", ".demo", "__pycache__"}
