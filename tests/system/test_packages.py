"""`make packages` on hosts with and without a foreign Docker Engine: it never removes a package.

The packages are stand-ins, with the relations of the real ones (Docker's deb/common/control; Debian's docker.io), in a
dpkg and apt of their own: `/etc`, `/usr` and `/var` are overlays that only the commands of the test see.
"""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from tests.system.support import Result, run

ROOT = Path(__file__).parent.parent.parent
ENGINE = ("docker", "dockerd", "containerd", "runc", "docker-proxy", "docker-init")

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
        installed = "Package: python3-venv\nStatus: install ok installed\nVersion: 3\nArchitecture: all\n"
        installed += "Maintainer: nobody\nDescription: stand-in\n"
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

    def _build(self, package: dict[str, str]) -> Path:
        """Make a package with commands that do nothing."""
        fields = {"Version": "20.0", "Architecture": "all", "Maintainer": "nobody", **package}
        commands = fields.pop("commands", "").split()
        tree = self.directory / "trees" / package["Package"]
        (tree / "DEBIAN").mkdir(parents=True)
        control = "".join(f"{name}: {value}\n" for name, value in fields.items())
        (tree / "DEBIAN/control").write_text(f"{control}Description: stand-in\n")
        for command in commands:
            (tree / "usr/bin").mkdir(parents=True, exist_ok=True)
            (tree / "usr/bin" / command).write_text("#!/bin/sh\nexit 1\n")
            (tree / "usr/bin" / command).chmod(0o755)
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

    def packages(self) -> set[str]:
        lines = self.run("dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n").out.splitlines()
        return {line.split()[0] for line in lines if line.endswith(" installed")} - {"python3-venv"}


@pytest.mark.parametrize("release", [DEBIAN_12, DEBIAN_13], ids=["docker in docker.io", "docker in docker-cli"])
def test_an_existing_engine_is_used_and_one_is_installed_only_where_none_exists(tmp_path: Path, release) -> None:
    machine = Machine(tmp_path / "with", release)
    theirs = {"docker-ce", "docker-ce-cli", "containerd.io"}
    machine.install(CONTAINERD_IO, DOCKER_CE_CLI, DOCKER_CE)
    assert machine.packages() == theirs
    done = machine.run("make", "packages")
    assert done.status == 0 and done.out == "" and done.err == "", done
    assert machine.packages() == theirs

    machine = Machine(tmp_path / "without", release)
    done = machine.run("make", "packages")
    assert done.status == 0, done
    assert machine.packages() == {package["Package"] for package in release}
    assert machine.run("which", "docker", "dockerd").out == "/usr/bin/docker\n/usr/bin/dockerd\n"


@pytest.mark.parametrize("release", [DEBIAN_12, DEBIAN_13], ids=["docker in docker.io", "docker in docker-cli"])
@pytest.mark.parametrize("theirs", [CONTAINERD_IO, DOCKER_CE_CLI], ids=["containerd.io", "docker-ce-cli"])
def test_nothing_is_installed_where_that_would_remove_a_package(tmp_path: Path, release, theirs) -> None:
    machine = Machine(tmp_path, release)
    machine.install(theirs)
    done = machine.run("make", "packages")
    assert done.status != 0
    name = theirs["Package"]
    assert f"apt-get would remove {name} to install" in done.err and f"or remove {name} yourself" in done.err, done
    assert "dockerd" in done.err.partition("missing (")[2].partition(")")[0], done
    assert machine.packages() == {name}


def test_installing_calicoctl_installs_what_running_needs_and_nothing_else(tmp_path: Path) -> None:
    others = ("etcd", "etcdctl", "busybox", "conntrack", "curl", "man", "zsh")
    release = (*DEBIAN_12, {"Package": "iptables", "commands": "iptables"})
    machine = Machine(tmp_path, release, (*ENGINE, *others, "iptables"))
    done = machine.run("make", "install", f"PREFIX={tmp_path}/prefix", "PYTHON=/bin/false")
    assert done.status != 0 and "Installing iptables\n" in done.out, done
    assert "The new version could not be built" in done.err, "it has come as far as that"
    assert machine.packages() == {"iptables"}
