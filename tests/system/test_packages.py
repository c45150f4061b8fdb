"""`make packages` on hosts with and without a foreign Docker Engine or BIRD: it never removes a package.

The packages are stand-ins, with the relations of the real ones (Docker's deb/common/control; Debian's docker.io), in a
dpkg and apt of their own: `/etc`, `/usr` and `/var` are overlays that only the commands of the test see.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.support import Result, run

ROOT = Path(__file__).parent.parent.parent
MAKE_PACKAGES = ("make", "packages", "TEST_HERE=")
"""What the tests need on every release."""

ENGINE = ("docker", "dockerd", "containerd", "runc", "docker-proxy", "docker-init")

PYTHON = {"python3-venv", "python3-yaml"}
"""Packages that are installed on each machine, since the tests need them to run."""

CONTAINERD_IO = {
    "Package": "containerd.io",
    "Provides": "containerd, runc",
    "Conflicts": "containerd, runc",
    "Replaces": "containerd, runc",
}
DOCKER_CE_CLI = {"Package": "docker-ce-cli", "Conflicts": "docker-engine, docker.io", "commands": "docker"}
DOCKER_CE = {
    "Package": "docker-ce",
    "Depends": "containerd.io, docker-ce-cli",
    "Conflicts": "docker-engine, docker.io",
    "commands": "dockerd",
}
RUNC = {"Package": "runc", "commands": "runc"}
CONTAINERD = {"Package": "containerd", "Depends": "runc (>= 1.0)", "commands": "containerd"}
DOCKER_IO = {
    "Package": "docker.io",
    "Depends": "containerd (>= 1.4~), runc (>= 1.0)",
    "Conflicts": "docker-ce, docker-ce-cli",
    "commands": "dockerd docker",
}
DEBIAN_12 = (RUNC, CONTAINERD, DOCKER_IO)
DEBIAN_13 = (
    RUNC,
    CONTAINERD,
    {**DOCKER_IO, "Recommends": "docker-cli", "commands": "dockerd"},
    {"Package": "docker-cli", "Conflicts": "docker-ce-cli", "commands": "docker"},
)
BIRD_1 = {"Package": "bird", "commands": "bird"}
BIRD_2 = {
    "Package": "bird2",
    "Conflicts": "bird",
    "files": {
        "usr/sbin/bird": "#!/bin/sh\necho BIRD version 2.0.12 >&2\n",
        "usr/lib/systemd/system/bird.service": "[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target",
        "etc/init.d/bird": """#!/bin/sh
### BEGIN INIT INFO
# Default-Start: 2 3 4 5
# Default-Stop: 0 1 6
### END INIT INFO
echo sysvinit >>/etc/started
""",
    },
    # what debhelper makes for a service of both kinds
    "postinst": """#!/bin/sh -e
        update-rc.d bird defaults
        invoke-rc.d --skip-systemd-native bird ${2:+re}start
        if deb-systemd-helper --quiet was-enabled bird.service; then
            deb-systemd-helper enable bird.service || true
        else
            deb-systemd-helper update-state bird.service || true
        fi
        [ ! -d /run/systemd/system ] || deb-systemd-invoke ${2:+re}start bird.service
    """,
}
BROKEN_BIRD_2 = {**BIRD_2, "postinst": "#!/bin/sh\nexit 1\n"}

SYSTEMCTL = """#!/bin/sh
mask=/run/systemd/system/bird.service link=/etc/systemd/system/multi-user.target.wants/bird.service
echo "$*" >>/etc/asked
case " $* " in
*" unmask "*) rm $mask ;;
*" mask "*) ln -s /dev/null $mask ;;
*" preset "*) [ ! -e $mask ] || exit 1; mkdir -p ${link%/*}; ln -sf /usr/lib/systemd/system/bird.service $link ;;
*" disable "*) rm -f $link ;;
*" is-enabled "*) [ ! -e $mask ] && [ -e $link ] && echo enabled ;;
*" is-active "*) exit 3 ;;
*" start "*|*" restart "*) echo systemd >>/etc/started ;;
esac
"""
"""A stand-in for a part of systemctl(1), whose state is in its real places."""

RUNLEVEL = """#!/bin/sh
echo "${PREVLEVEL:-N} ${RUNLEVEL:-2}"
"""
"""A stand-in for runlevel(8) of sysvinit."""


class Machine:
    """A machine whose packages are a release's stand-ins; its commands beside Docker's are the host's."""

    def __init__(self, directory: Path, release: tuple[dict[str, str], ...], hidden: tuple[str, ...] = ENGINE) -> None:
        # the upper layer of an overlay must not be an overlay itself, as /tmp may be
        self.directory = directory = Path("/run") / directory.relative_to("/")
        repository = directory / "repository"
        repository.mkdir(parents=True)
        for name in ("etc", "usr", "var"):
            (directory / name / "new").mkdir(parents=True)
            (directory / name / "work").mkdir()
        index = ""
        for package in release:
            file = self._build(package)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            index += run("dpkg-deb", "--field", str(file)).out
            index += f"Filename: ./{file.name}\nSize: {file.stat().st_size}\nSHA256: {digest}\n\n"
        (repository / "Packages").write_text(index)
        installed = "\n".join(
            f"Package: {name}\nStatus: install ok installed\nVersion: 3\nArchitecture: all\nMaintainer: nobody\n"
            "Description: stand-in\n"
            for name in PYTHON
        )
        script = f"""
            rm -rf /var/lib/dpkg /var/lib/apt /var/cache/apt /etc/apt
            mkdir -p /var/lib/dpkg/info /var/lib/dpkg/updates /var/lib/dpkg/triggers
            mkdir -p /var/lib/apt/lists/partial /var/cache/apt/archives/partial /etc/apt/apt.conf.d
            echo '{installed}' >/var/lib/dpkg/status
            echo 'deb [trusted=yes] file:{repository} ./' >/etc/apt/sources.list
            echo 'APT::Sandbox::User "root";' >/etc/apt/apt.conf.d/root
            for name in {" ".join(hidden)}; do
                rm -f /usr/bin/$name /usr/sbin/$name /usr/local/bin/$name /usr/local/sbin/$name
            done"""
        assert self.run("sh", "-ec", script).status == 0

    def put(self, path: str, text: str) -> None:
        """Write a program, or another file."""
        assert self.run("sh", "-ec", 'printf %s "$2" >"$1"; chmod 755 "$1"', "sh", path, text).status == 0

    def _build(self, package: dict[str, str | dict[str, str]]) -> Path:
        """Make a package with commands that do nothing, and files."""
        fields = {"Version": "20.0", "Architecture": "all", "Maintainer": "nobody", **package}
        commands, files = fields.pop("commands", "").split(), fields.pop("files", {})
        scripts = {"DEBIAN/postinst": fields.pop("postinst")} if "postinst" in fields else {}
        tree = self.directory / "trees" / package["Package"]
        shutil.rmtree(tree, ignore_errors=True)
        (tree / "DEBIAN").mkdir(parents=True)
        control = "".join(f"{name}: {value}\n" for name, value in fields.items())
        (tree / "DEBIAN/control").write_text(f"{control}Description: stand-in\n")
        for command in commands:
            (tree / "usr/bin").mkdir(parents=True, exist_ok=True)
            (tree / "usr/bin" / command).write_text("#!/bin/sh\nexit 1\n")
            (tree / "usr/bin" / command).chmod(0o755)
        for path, text in {**files, **scripts}.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(text)
            (tree / path).chmod(0o755)
        file = self.directory / "repository" / f"{package['Package']}.deb"
        run("dpkg-deb", "--root-owner-group", "--build", str(tree), str(file))
        return file

    def run(self, *command: str) -> Result:
        mounts = "".join(
            f"mount -t overlay -o lowerdir=/{name},upperdir={over}/new,workdir={over}/work overlay /{name} && "
            for name in ("etc", "usr", "var")
            for over in [self.directory / name]
        )
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", f'{mounts}exec "$@"', "machine", *command],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=ROOT,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8"},
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def install(self, *packages: dict[str, str]) -> None:
        done = self.run("dpkg", "--install", *(str(self._build(package)) for package in packages))
        assert done.status == 0, done

    def exists(self, path: str) -> bool:
        return self.run("test", "-e", path).status == 0 or self.run("test", "-L", path).status == 0

    def packages(self) -> set[str]:
        lines = self.run("dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n").out.splitlines()
        return {line.split()[0] for line in lines if line.endswith(" installed")} - PYTHON


@pytest.mark.parametrize("release", [DEBIAN_12, DEBIAN_13], ids=["docker in docker.io", "docker in docker-cli"])
def test_an_existing_engine_is_used_and_one_is_installed_only_where_none_exists(tmp_path: Path, release) -> None:
    machine = Machine(tmp_path / "with", release)
    theirs = {"docker-ce", "docker-ce-cli", "containerd.io"}
    machine.install(CONTAINERD_IO, DOCKER_CE_CLI, DOCKER_CE)
    assert machine.packages() == theirs
    done = machine.run(*MAKE_PACKAGES)
    assert done.status == 0 and done.out == "" and done.err == "", done
    assert machine.packages() == theirs

    machine = Machine(tmp_path / "without", release)
    done = machine.run(*MAKE_PACKAGES)
    assert done.status == 0, done
    assert machine.packages() == {package["Package"] for package in release}
    assert machine.run("which", "docker", "dockerd").out == "/usr/bin/docker\n/usr/bin/dockerd\n"


@pytest.mark.parametrize("release", [DEBIAN_12, DEBIAN_13], ids=["docker in docker.io", "docker in docker-cli"])
@pytest.mark.parametrize("theirs", [CONTAINERD_IO, DOCKER_CE_CLI], ids=["containerd.io", "docker-ce-cli"])
def test_nothing_is_installed_where_that_would_remove_a_package(tmp_path: Path, release, theirs) -> None:
    machine = Machine(tmp_path, release)
    machine.install(theirs)
    done = machine.run(*MAKE_PACKAGES)
    assert done.status != 0
    name = theirs["Package"]
    assert f"apt-get would remove {name} to install" in done.err and f"or remove {name} yourself" in done.err, done
    assert "dockerd" in done.err.partition("missing (")[2].partition(")")[0], done
    assert machine.packages() == {name}


def test_installing_calicoctl_installs_what_running_needs_and_nothing_else(tmp_path: Path) -> None:
    others = ("etcd", "etcdctl", "busybox", "conntrack", "curl", "man", "zsh")
    release = (*DEBIAN_12, {"Package": "iptables", "commands": "iptables"}, BIRD_2)
    machine = Machine(tmp_path, release, (*ENGINE, *others, "iptables", "bird"))
    for_a_package = ("make", "install", f"DESTDIR={tmp_path}/package", "PYTHON=/bin/false")
    assert "could not be built" in machine.run(*for_a_package).err
    assert machine.packages() == set()
    done = machine.run(*MAKE_INSTALL)
    assert done.status != 0 and "Installing iptables\nInstalling bird2\n" in done.out, done
    assert "Continuing without" not in done.err and "could not be built" in done.err, "it has come as far as that"
    assert machine.packages() == {"iptables", "bird2"}


MAKE_INSTALL = ("make", "install", "PREFIX=/usr/local", "PYTHON=/bin/false")
LINK = "/etc/systemd/system/multi-user.target.wants/bird.service"
MASK = "/run/systemd/system/bird.service"


def bird_machine(directory: Path, *release: dict[str, str], init: str = "systemd") -> Machine:
    """Return a machine without BIRD, and without a policy for services."""
    machine = Machine(directory, release, ("bird", "birdc", "policy-rc.d", "systemctl", "runlevel"))
    machine.run("sh", "-c", "rm -rf /etc/init.d/bird /etc/rc?.d/*bird /var/lib/systemd /etc/systemd")
    if init == "systemd":
        machine.put("/usr/bin/systemctl", SYSTEMCTL)
    else:
        machine.put("/usr/sbin/runlevel", RUNLEVEL)
        machine.run("sh", "-c", "rm -f /usr/sbin/init; touch /usr/sbin/init")  # without one, no service is started
    return machine


@pytest.fixture
def systemd() -> Iterator[None]:
    """systemd runs, as far as can be seen."""
    folder = Path("/run/systemd/system")
    folder.mkdir(parents=True)
    yield
    shutil.rmtree(folder.parent)


def test_systemd_starts_the_service_of_bird2_neither_at_once_nor_at_an_upgrade(tmp_path: Path, systemd: None) -> None:
    machine = bird_machine(tmp_path, BIRD_2)
    done = machine.run("demo/packages", "bird:bird2")
    assert done.status == 0 and done.out == "Installing bird2\n", done
    assert machine.packages() == {"bird2"}
    asked = machine.run("cat", "/etc/asked").out
    assert "--runtime mask bird.service" in asked and "is-enabled -- bird.service" in asked, asked
    for _ in range(2):
        assert not machine.exists("/etc/started") and not machine.exists(LINK) and not machine.exists(MASK)
        machine.install({**BIRD_2, "Version": "20.1"})

    machine = bird_machine(tmp_path / "control", BIRD_2)
    machine.install(BIRD_2)
    assert machine.exists("/etc/started") and machine.exists(LINK), "the stand-ins do what the real ones do"


def test_sysvinit_starts_the_service_of_bird2_neither_at_once_nor_at_an_upgrade(tmp_path: Path) -> None:
    machine = bird_machine(tmp_path, BIRD_2, init="sysvinit")
    done = machine.run("demo/packages", "bird:bird2")
    assert done.status == 0, done
    for _ in range(2):
        links = machine.run("sh", "-c", "ls /etc/rc?.d | grep bird | sort -u").out
        assert links == "K01bird\n" and not machine.exists("/etc/started") and not machine.exists(LINK)
        machine.install({**BIRD_2, "Version": "20.1"})

    machine = bird_machine(tmp_path / "control", BIRD_2, init="sysvinit")
    machine.install(BIRD_2)
    assert machine.exists("/etc/started"), "the stand-ins do what the real ones do"


def test_a_bird_that_was_there_before_is_left_alone(tmp_path: Path, systemd: None) -> None:
    machine = bird_machine(tmp_path / "2", BIRD_2)
    machine.install(BIRD_2)
    asked = machine.run("cat", "/etc/asked").out
    done = machine.run(*MAKE_INSTALL)
    assert "Installing" not in done.out and "BIRD" not in done.err and "could not be built" in done.err, done
    assert machine.run("cat", "/etc/asked").out == asked and machine.exists(LINK)

    machine = bird_machine(tmp_path / "1", BIRD_1, BIRD_2)
    machine.install(BIRD_1)
    done = machine.run(*MAKE_INSTALL)
    assert "apt-get would remove bird to install bird2" in done.err, done
    assert "Continuing without BIRD 2" in done.err and "could not be built" in done.err, done
    assert machine.packages() == {"bird"} and not machine.exists("/etc/asked")

    machine = bird_machine(tmp_path / "odd", BIRD_2)
    machine.install(BIRD_2)
    machine.put("/usr/sbin/bird", "#!/bin/sh\nexit 1\n")
    done = machine.run(*MAKE_INSTALL)
    assert "bird2 is there, but" in done.err and "Continuing without BIRD 2" in done.err and machine.exists(LINK), done

    machine = bird_machine(tmp_path / "own", BIRD_2)
    machine.run("mkdir", "-p", "/etc/systemd/system")
    machine.put("/etc/systemd/system/bird.service", "[Service]")
    done = machine.run(*MAKE_INSTALL)
    assert "bird.service is a service of this host's own" in done.err and "Continuing without BIRD 2" in done.err, done
    assert machine.packages() == set() and not machine.exists("/etc/asked")


def test_a_failed_installation_of_bird2_leaves_no_mask_and_calicoctl_is_installed(
    tmp_path: Path, systemd: None
) -> None:
    for number, release in enumerate(((BROKEN_BIRD_2,), ())):
        machine = bird_machine(tmp_path / str(number), *release)
        done = machine.run(*MAKE_INSTALL)
        assert "Installing bird2 failed" in done.err and "Continuing without BIRD 2" in done.err, done
        assert "could not be built" in done.err, "it has come as far as that"
        assert not machine.exists(MASK) and not machine.exists("/etc/started") and not machine.exists(LINK)
