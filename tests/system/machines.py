"""More machines than the one that the tests run on, each with its own machine id, boot id and /run."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.system.agent import AgentHost, outside_host
from tests.system.support import CALICOCTL, Etcd, Result, end_agents

HOME = Path("/run/calico-tests/machines")

_ENTER = """
mount --bind "$1/run" /run/calico && mount --bind "$1/netns" /run/netns && mount --bind "$1/log" /var/log &&
mount --bind "$1/lib" /var/lib && mount --bind "$1/machine-id" /etc/machine-id &&
mount --bind "$1/boot-id" /proc/sys/kernel/random/boot_id || exit 99
shift
exec "$@"
"""


class Machine(AgentHost):
    """A host on a machine of its own. In no network namespace of its own, unless it is given one."""

    def __init__(self, etcd: Etcd, namespace: str | None = None, machine_id: str | None = None) -> None:
        """`machine_id` is 32 hex digits; without it, the machine is none that there was before."""
        super().__init__(etcd)
        self.namespace = namespace
        self.home = HOME / uuid.uuid4().hex
        for folder in ("run", "netns", "log", "lib"):
            (self.home / folder).mkdir(parents=True)
        (self.home / "machine-id").write_text(f"{machine_id or uuid.uuid4().hex}\n")
        self.boot()

    def boot(self) -> None:
        """Be started anew: with another boot id, and an empty /run."""
        self.end()
        for file in (self.home / "run").glob("*/*"):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        (self.home / "boot-id").write_text(f"{uuid.uuid4()}\n")

    def end(self) -> None:
        """Kill the machine's agents and BIRDs."""
        end_agents(self.home / "run")

    @property
    def pid(self) -> int:
        return int((self.home / "run" / self.name / "felix.pid").read_text().split()[0])

    def ctl(self, *arguments: str, **options) -> Result:
        enter = ["ip", "netns", "exec", self.namespace] if self.namespace else ["unshare", "--mount"]
        Path("/run/calico").mkdir(exist_ok=True)
        command = [*enter, "sh", "-c", _ENTER, "sh", str(self.home), CALICOCTL]
        return super().ctl(*arguments, command=command, **options)


@contextmanager
def other_machine(etcd: Etcd) -> Iterator[Machine]:
    """A machine beyond the host, with a network of its own; it reaches an etcd that listens on all addresses."""
    with outside_host() as namespace:
        machine = Machine(etcd, namespace)
        machine.endpoints = f"http://198.51.100.1:{etcd.port}"
        try:
            yield machine
        finally:
            machine.end()
