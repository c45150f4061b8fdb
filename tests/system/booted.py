"""A machine that systemd has booted, in namespaces of its own: this one's files, in an overlay, with its packages."""

from __future__ import annotations

import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.system.support import Result, run, wait_for

SYSTEMD = "/lib/systemd/systemd"

_BOOT = """
hierarchy=$1 checkout=$2
echo $$ >"$hierarchy/cgroup.procs"
exec unshare --net --mount --pid --uts --ipc --cgroup --fork --kill-child sh -euc '
    mount --make-rprivate /
    mount -t tmpfs tmpfs /mnt && mkdir /mnt/new /mnt/work /mnt/root
    mount -t overlay -o lowerdir=/,upperdir=/mnt/new,workdir=/mnt/work overlay /mnt/root && cd /mnt/root
    mount --bind "$1" "./$1" # it may be on another file system
    mount -t proc proc proc
    mount -t sysfs -o ro sysfs sys && mount -t cgroup2 cgroup2 sys/fs/cgroup
    mount -t tmpfs tmpfs run
    mount -t tmpfs tmpfs tmp
    mount -t tmpfs -o mode=755 tmpfs dev && mkdir dev/pts dev/shm
    for name in null zero full random urandom tty; do touch dev/$name && mount --bind /dev/$name dev/$name; done
    mount -t devpts -o newinstance,ptmxmode=666,mode=620 devpts dev/pts && ln -s pts/ptmx dev/ptmx
    mount -t tmpfs -o mode=1777 tmpfs dev/shm
    # an engine has overlays there, which cannot be on an overlay
    for folder in docker containerd; do mkdir -p var/lib/$folder && mount -t tmpfs tmpfs var/lib/$folder; done
    # what boots a whole machine would change settings and mounts of the kernel that are not of a namespace
    rm -f usr/lib/systemd/system/sysinit.target.wants/* usr/sbin/policy-rc.d
    rm -f etc/systemd/system/*.wants/* # nothing is started but what is asked for
    echo host1 >etc/hostname
    ip link set lo up
    pivot_root . mnt && umount --lazy mnt
    exec env -i container=namespaces PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd \\
        --system --unit=basic.target --show-status=no --log-target=journal' boot "$checkout"
"""


class Booted:
    """A machine that has booted; `pid` is its systemd's."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def run(self, *command: str, check: bool = True, **options) -> Result:
        """Run a command on it, as a shell of root would."""
        enter = ("nsenter", f"--target={self.pid}", "--mount", "--net", "--pid", "--uts", "--ipc", "--cgroup", "--root")
        environment = ("env", "--chdir=/", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8")
        return run(*enter, *environment, *command, check=check, **options)

    def shell(self, text: str, **options) -> Result:
        return self.run("bash", "-ec", text, **options)

    def is_up(self) -> bool:
        return self.run("systemctl", "is-system-running", check=False).out.strip() in ("running", "degraded")

    def property(self, unit: str, name: str) -> str:
        return self.run("systemctl", "show", f"--property={name}", "--value", unit).out.strip()

    def journal(self, unit: str) -> str:
        return self.run("journalctl", "--no-pager", f"--unit={unit}", "--lines=50").out


@contextmanager
def booted(checkout: Path) -> Iterator[Booted]:
    """Boot a machine on which `checkout` is at the same path. All that runs on it ends with it."""
    folder = Path("/run/booted")
    folder.mkdir()
    run("mount", "-t", "cgroup2", "cgroup2", str(folder))
    hierarchy = folder / f"calicoctl-tests-{uuid.uuid4().hex}"
    hierarchy.mkdir()
    process = subprocess.Popen(["sh", "-euc", _BOOT, "boot", str(hierarchy), str(checkout)])
    try:

        def systemd() -> int:
            assert process.poll() is None, "it did not boot"
            for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                if Path(f"/proc/{child}/cmdline").read_bytes().startswith(SYSTEMD.encode()):
                    return int(child)
            return 0

        machine = Booted(wait_for(systemd, "systemd"))
        wait_for(machine.is_up, "the machine to boot")
        yield machine
    finally:
        process.kill()  # and with it, by --kill-child, the namespaces
        process.wait()
        for path in [*sorted(filter(Path.is_dir, hierarchy.rglob("*")), reverse=True), hierarchy]:
            wait_for(lambda p=path: _removed(p), f"{path} to be empty")
        run("umount", str(folder))
        shutil.rmtree(folder)


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False
    return True
