"""A host with its agent, and namespaces on it: set-up for the tests of the agent."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.system.support import HOST_IP, HOST_IP6, Host, links, run, tables, wait_for

LOG_DIR = Path("/run/calico-tests/log")
A4, B4, C4 = "192.168.0.1", "192.168.0.2", "192.168.0.3"
A6, B6, C6 = "fd80:24e2:f998:72d6::1", "fd80:24e2:f998:72d6::2", "fd80:24e2:f998:72d6::3"
ALLOW = {"action": "allow"}

_fences = itertools.count()


class AgentHost(Host):
    """A host with an agent, which is started by `calicoctl node`."""

    def start_agent(self, *options: str, **env: str) -> None:
        self.ctl("node", f"--ip={HOST_IP}", f"--ip6={HOST_IP6}", f"--log-dir={LOG_DIR}", *options, env=env)

    def read_anew(self) -> None:
        """Have the agent read the whole store anew, since it cannot follow any more what is changed there."""
        if self.etcd.api == "etcdv3":
            self.etcd.stop()
            self.etcd.start()
            self.etcd.await_ready()
            return
        os.kill(self.pid, signal.SIGSTOP)
        for number in range(1100):  # etcd's v2 API remembers 1,000 changes, but what is watched waits in sockets
            self.etcd.put("/elsewhere", str(number))
        os.kill(self.pid, signal.SIGCONT)

    @property
    def pid(self) -> int:
        return int(Path(f"/run/calico/{self.name}/felix.pid").read_text().split()[0])

    def kill_agent(self) -> None:
        """Kill the agent with SIGKILL, and wait until it has ended."""
        pid = self.pid
        os.kill(pid, 9)
        wait_for(lambda: not self.agent_runs(pid), "the agent's end")

    @staticmethod
    def agent_runs(pid: int) -> bool:
        try:
            return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False

    def log(self) -> str:
        return (LOG_DIR / "felix.log").read_text()

    def status(self) -> dict:
        return json.loads(self.ctl("status", "--output=json", status=None).out)

    def endpoint_status(self, key: str) -> dict | None:
        """Return the status that the agent has reported of the endpoint with this key; None if there is none."""
        value = self.etcd.get(key.replace("/calico/v1", "/calico/felix/v1", 1))
        return None if value is None else json.loads(value)

    def sync(self) -> None:
        """Wait until the agent has applied everything that was written before."""
        # the agent reports endpoints with a new address in order, among themselves: a new one is reported last
        number = next(_fences)
        key = f"/calico/v1/host/{self.name}/workload/test/fence/endpoint/fe{number:030x}"
        fence = {
            "name": f"calif{number}",
            "mac": "02:00:00:00:00:ff",
            "ipv4_nets": [f"192.168.255.{number % 250 + 1}/32"],
        }
        self.etcd.put(key, fence)
        wait_for(lambda: self.endpoint_status(key), f"the agent\n{self.log()}", 20)
        self.etcd.delete(key)
        wait_for(lambda: not self.endpoint_status(key), f"the agent\n{self.log()}", 20)
        wait_for(self.has_fast_path, f"connections to be verified\n{self.log()}", 20)

    @staticmethod
    def has_fast_path() -> bool:
        """Return whether the agent has verified all connections that a change may have denied."""
        return "direction reply" not in run("nft", "list", "chain", "inet", "calico", "to-host", check=False).out

    def profile(self, name: str, inbound: list | None = None, outbound: list | None = None, tags: list | None = None):
        """Write a profile; by default, it allows all outbound and no inbound traffic."""
        rules = {"id": name, "inbound_rules": inbound or [], "outbound_rules": outbound or [{"action": "allow"}]}
        self.etcd.put(f"/calico/v1/policy/profile/{name}/rules", rules)
        self.etcd.put(f"/calico/v1/policy/profile/{name}/tags", [name] if tags is None else tags)

    def set_profiles(self, namespace: str, *profiles: str) -> None:
        key = self.key(namespace)
        record = json.loads(self.etcd.get(key))
        self.etcd.put(key, {**record, "profile_ids": list(profiles)})

    def key(self, namespace: str) -> str:
        """Return the key of a namespace's endpoint."""
        (key,) = [key for key in self.records() if f"/-var-run-netns-{namespace}/" in key]
        return key

    def add(self, namespace: str, *addresses: str) -> None:
        """Create a namespace and connect it."""
        run("ip", "netns", "add", namespace)
        run("ip", "-n", namespace, "link", "set", "lo", "up")
        path = f"/var/run/netns/{namespace}"
        self.ctl("container", "add", path, addresses[0])
        for address in addresses[1:]:
            self.ctl("container", path, "ip", "add", address)

    def add_pair(self) -> None:
        """Connect two namespaces, a and b, whose profile allows traffic between them."""
        self.add("a", A4)
        self.add("b", B4)
        self.profile("web", inbound=[ALLOW])
        self.set_profiles("a", "web")
        self.set_profiles("b", "web")

    def interface(self, namespace: str) -> str:
        """Return the name of the host end of a namespace's veth pair."""
        return json.loads(self.etcd.get(self.key(namespace)))["name"]

    def mac(self, namespace: str) -> str:
        return links(namespace)["eth1"]["address"]


class FreeHost(AgentHost):
    """A host whose environment does not say which of etcd's APIs to use, unless a command is told."""

    def environment(self, **extra: str) -> dict[str, str]:
        return super().environment(**{"DATASTORE_TYPE": "", **extra})


@contextmanager
def locked(host: Host, namespace: str) -> Iterator[None]:
    """Hold the lock of a namespace's workload, as a command does."""
    lock = f"/run/calico/{host.name}/namespace.-var-run-netns-{namespace}"
    while True:
        with open(lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # the holder before may have removed the file
            if os.path.exists(lock) and os.path.samestat(os.stat(lock), os.fstat(file.fileno())):
                yield
                return


@contextmanager
def outside_host(name: str = "outside", network: str = "198.51.100", network6: str = "2001:db8:1::") -> Iterator[str]:
    """Create a machine outside the host: a namespace whose default route is through the host. Yields its name."""
    run("ip", "netns", "add", name)
    run("ip", "link", "add", "uplink", "type", "veth", "peer", "name", "eth0", "netns", name)
    for prefix, device, number in ((["ip"], "uplink", 1), (["ip", "-n", name], "eth0", 2)):
        run(*prefix, "address", "add", f"{network}.{number}/24", "dev", device)
        run(*prefix, "address", "add", f"{network6}{number}/64", "dev", device, "nodad")
        run(*prefix, "link", "set", device, "up")
    run("ip", "-n", name, "link", "set", "lo", "up")
    run("ip", "-n", name, "route", "add", "default", "via", f"{network}.1")
    run("ip", "-n", name, "-6", "route", "add", "default", "via", f"{network6}1")
    try:
        yield name
    finally:
        run("ip", "link", "delete", "uplink", check=False)
        run("ip", "netns", "delete", name, check=False)


def kernel() -> dict[str, str]:
    """Return, as texts, everything in the kernel that an agent may change."""
    routes = run("sh", "-c", "ip route show table all; ip -6 route show table all").out.splitlines()
    settings = run("sh", "-c", "sysctl -a 2>/dev/null | grep -E '^net.ipv[46]' | grep -v 'neigh.*gc'").out
    return {
        "tables": "\n".join(tables()),
        "iptables": re.sub(r"#.*|\[\d+:\d+\]", "", run("sh", "-c", "iptables-save; ip6tables-save").out),
        # those that the kernel makes for an interface come some time after it
        "routes": "\n".join(line for line in routes if not ("cali" in line and "proto kernel" in line)),
        "neighbours": run("sh", "-c", "ip neigh show nud permanent; ip neigh show proxy; ip -6 neigh show proxy").out,
        "settings": "\n".join(line for line in settings.splitlines() if "cali" not in line),
    }


def holds(condition, seconds: float) -> bool:
    """Return whether a condition stays true for so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not condition():
            return False
    return True
