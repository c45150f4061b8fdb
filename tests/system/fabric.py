"""Several hosts on one machine: each a network namespace with a machine id and `/run` of its own, on common bridges.

The bridges are in the tests' own namespace, where etcd runs; its address on each is the first one. Hosts reach each
other through their bridge, or through a router between two bridges.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.system.machines import Machine
from tests.system.reach import Prober
from tests.system.support import CALICOCTL, Etcd, Result, gone, run, wait_for

ETC = Path("/etc/calico")
NETWORKS = (("172.18.0.", "fd00:18::"), ("172.19.0.", "fd00:19::"))
"""The networks of the bridges: their IPv4 and IPv6 prefixes, of 24 and 64 bits."""
ROUTER = 254
"""The last part of the router's addresses."""

_SETUP = """
mount --make-private / && mkdir -p /etc/calico /run/calico /run/netns &&
mount --bind "$1/run" /run/calico && mount --bind "$1/netns" /run/netns && mount --bind "$1/log" /var/log &&
mount --bind "$1/etc" /etc/calico && mount --bind "$1/lib" /var/lib && mount --bind "$1/machine-id" /etc/machine-id &&
mount --bind "$1/boot-id" /proc/sys/kernel/random/boot_id || exit 99
echo ready
exec sleep infinity
"""


class FabricHost(Machine):
    """A host of the fabric: what is run on it sees its own network, `/run/calico`, `/run/netns`, `/var/lib`, logs."""

    namespace: str

    def __init__(self, etcd: Etcd, number: int, network: int = 0) -> None:
        """`number` is the last part of its addresses, and of its name; `network` the number of its bridge."""
        super().__init__(etcd, f"host{number}")
        self.name, self.number, self.network = f"host{number}", number, network
        prefix4, prefix6 = NETWORKS[network]
        self.ip, self.ip6 = f"{prefix4}{number}", f"{prefix6}{number:x}"
        self.endpoints = self.endpoint_of(etcd)
        (self.home / "etc").mkdir(exist_ok=True)
        self._holder: subprocess.Popen | None = None
        self._plug()

    def endpoint_of(self, etcd: Etcd) -> str:
        """Return the URL under which this host reaches an etcd."""
        return f"http://{NETWORKS[self.network][0]}1:{etcd.port}"

    def _plug(self) -> None:
        prefix4, prefix6 = NETWORKS[self.network]
        run("ip", "netns", "add", self.namespace)
        run("ip", "link", "add", self.namespace, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        run("ip", "link", "set", self.namespace, "master", f"fabric{self.network}", "up")
        for command in (
            "link set lo up",
            f"address add {self.ip}/24 dev eth0",
            f"-6 address add {self.ip6}/64 dev eth0 nodad",
            "link set eth0 up",
            f"route add default via {prefix4}{ROUTER}",
            f"-6 route add default via {prefix6}{ROUTER:x}",
        ):
            run("ip", "-n", self.namespace, *command.split())
        self._holder = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, "sh", "-c", _SETUP, "sh", str(self.home)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n"

    @property
    def mac(self) -> str:
        (link,) = json.loads(run("ip", "-n", self.namespace, "-json", "link", "show", "eth0").out)
        return link["address"]

    def inside(self, *command: str) -> list[str]:
        """Return the command that runs `command` on this host."""
        assert self._holder is not None
        return [
            "nsenter",
            f"--mount=/proc/{self._holder.pid}/ns/mnt",
            f"--net=/proc/{self._holder.pid}/ns/net",
            *command,
        ]

    def run(self, *command: str, check: bool = True, **options) -> Result:
        """Run a command on this host."""
        return run(*self.inside(*command), check=check, **options)

    def ctl(self, *arguments: str, **options) -> Result:
        return super(Machine, self).ctl(*arguments, command=self.inside(CALICOCTL), **options)

    def start_agent(self, *options: str, **env: str) -> None:
        self.ctl("node", f"--ip={self.ip}", f"--ip6={self.ip6}", *options, env=env)

    @property
    def bird(self) -> int | None:
        """The process id of this host's BIRD, None if it does not run.

        One that only checks a text, or tells its version, does not count.
        """
        for pid in run("ip", "netns", "pids", self.namespace).out.split():
            with contextlib.suppress(OSError):
                tells = {b"-p", b"--version"}.intersection(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))
                if Path(f"/proc/{pid}/comm").read_text() == "bird\n" and not tells and not gone(int(pid)):
                    return int(pid)
        return None

    def birdc(self, *command: str) -> str:
        """Return what this host's BIRD answers to a command; nothing if it does not run."""
        return self.run("birdc", "-r", "-s", f"/run/calico/{self.name}/bird/ctl", *command, check=False).out

    @property
    def sessions(self) -> int:
        """The number of BGP sessions of this host that are up."""
        return self.birdc("show", "protocols").count("Established")

    def log(self) -> str:
        return (self.home / "log/calico/felix.log").read_text()

    def add(self, namespace: str, *addresses: str) -> None:
        self.run("ip", "netns", "add", namespace)
        self.run("ip", "-n", namespace, "link", "set", "lo", "up")
        path = f"/var/run/netns/{namespace}"
        self.ctl("container", "add", path, addresses[0])
        for address in addresses[1:]:
            self.ctl("container", path, "ip", "add", address)

    def set_profiles(self, namespace: str, *profiles: str) -> None:
        self.ctl("container", f"/var/run/netns/{namespace}", "profile", "set", *profiles)

    def prober(self, namespace: str, *addresses: str) -> Prober:
        """Start the process that sends to others from the network namespace of a workload on this host."""
        return Prober(self.inside("nsenter", f"--net=/run/netns/{namespace}"), *addresses)

    def of(self, namespace: str, *command: str, check: bool = True, **options) -> Result:
        """Run a command in the network namespace of a workload on this host."""
        return self.run("ip", "netns", "exec", namespace, *command, check=check, **options)

    def reaches(self, namespace: str, address: str, seconds: int = 1) -> bool:
        """Return whether a workload on this host gets an answer to one ping."""
        return self.of(namespace, "ping", "-n", "-c1", f"-W{seconds}", address, check=False).status == 0

    def routes(self, *selection: str, version: int = 4) -> list[dict]:
        """Return the routes of this host, as `ip -json` has them."""
        return json.loads(self.run("ip", f"-{version}", "-json", "route", "show", *selection).out or "[]")

    def unplug(self) -> None:
        """Take the cable out."""
        run("ip", "link", "set", self.namespace, "nomaster")

    def replug(self) -> None:
        run("ip", "link", "set", self.namespace, "master", f"fabric{self.network}")

    def boot(self) -> None:
        """Files only: at the first start, the host has no network yet."""
        super().boot()

    def end(self) -> None:
        """Kill all processes of the host, whatever they are."""
        holder = getattr(getattr(self, "_holder", None), "pid", None)
        # an agent that is still alive starts its BIRD again
        while pids := set(map(int, run("ip", "netns", "pids", self.namespace, check=False).out.split())) - {holder}:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            for pid in pids:
                wait_for(lambda p=pid: gone(p), f"the end of process {pid}")

    def remove(self) -> None:
        """End everything on the host, and remove it."""
        self.end()
        if self._holder is not None:
            for name in self.run("ls", "/run/netns").out.split():
                self.run("ip", "netns", "delete", name, check=False)
            self._holder.kill()
            self._holder.communicate()
        run("ip", "link", "delete", self.namespace, check=False)  # the kernel may take long to end the namespace
        run("ip", "netns", "delete", self.namespace, check=False)
        shutil.rmtree(self.home, ignore_errors=True)


def introduce(*hosts: FabricHost) -> None:
    """Give hosts of one bridge permanent neighbour entries for one another: the kernel's table is small.

    A host whose MAC changes must be introduced again.
    """
    macs = {host.name: host.mac for host in hosts}
    for host in hosts:
        entries = [
            f"neigh replace {address} lladdr {macs[other.name]} dev eth0 nud permanent"
            for other in hosts
            if other is not host and other.network == host.network
            for address in (other.ip, other.ip6)
        ]
        run("ip", "-n", host.namespace, "-batch", "-", input="\n".join(entries))


def await_recovery(*hosts: FabricHost) -> None:
    """Wait until the BIRDs of hosts, whose sessions are up, have told each other all routes after a crash of one.

    If that one crashes again before, its peers delete its routes: see RFC 4724, section 4.2.
    """

    def is_over() -> bool:
        said = "".join(host.birdc("show", *what) for host in hosts for what in (["status"], ["protocols", "all"]))
        return "recovery in progress" not in said and "Neighbor graceful restart active" not in said

    wait_for(is_over, "the end of the recovery")


@contextmanager
def bridges(count: int = 1) -> Iterator[None]:
    """The bridges `fabric0` and, if there are two, `fabric1` with a router between them, which knows no pools.

    The router is the network namespace `router`, its interfaces are `eth0` and `eth1`.
    """
    with ExitStack() as undo:
        if count > 1:
            run("ip", "netns", "add", "router")
            undo.callback(run, "ip", "netns", "delete", "router")
            run(
                "ip",
                "netns",
                "exec",
                "router",
                "sysctl",
                "-qw",
                "net.ipv4.ip_forward=1",
                "net.ipv6.conf.all.forwarding=1",
            )
        for number, (prefix4, prefix6) in enumerate(NETWORKS[:count]):
            bridge = f"fabric{number}"
            # else, a bridge takes the lowest MAC of its ports: with each new port, hosts might lose etcd for seconds
            run("ip", "link", "add", bridge, "address", f"02:00:00:00:fb:0{number}", "type", "bridge")
            undo.callback(run, "ip", "link", "delete", bridge)
            run("ip", "address", "add", f"{prefix4}1/24", "dev", bridge)
            run("ip", "-6", "address", "add", f"{prefix6}1/64", "dev", bridge, "nodad")
            run("ip", "link", "set", bridge, "up")
            if count > 1:
                cable, device = f"router{number}", f"eth{number}"
                run("ip", "link", "add", cable, "type", "veth", "peer", "name", device, "netns", "router")
                run("ip", "link", "set", cable, "master", bridge, "up")
                for words in (
                    f"address add {prefix4}{ROUTER}/24 dev {device}",
                    f"-6 address add {prefix6}{ROUTER:x}/64 dev {device} nodad",
                    f"link set {device} up",
                ):
                    run("ip", "-n", "router", *words.split())
        yield


@contextmanager
def fabric(etcd: Etcd, *networks: int) -> Iterator[list[FabricHost]]:
    """Hosts with the numbers 11, 12 … on the bridges with these numbers; without agents yet.

    etcd must listen on all addresses.
    """
    with bridges(max(networks) + 1), ExitStack() as undo:
        undo.callback(_remove_mount_points)
        hosts = []
        for number, network in enumerate(networks, 11):
            host = FabricHost(etcd, number, network)
            undo.callback(host.remove)
            hosts.append(host)
        introduce(*hosts)
        yield hosts


def _remove_mount_points() -> None:
    """Remove the folders of this machine over which hosts have mounted their own."""
    for folder in (ETC, Path("/run/calico")):
        with contextlib.suppress(OSError):  # a test has put something there
            folder.rmdir()
