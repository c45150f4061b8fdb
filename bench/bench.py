"""Prints how fast commands are, as ratios of measurements of the same run.

Each figure is the median of the ratios of pairs; the two commands of a pair run one right after the other. `make bench`
runs this; its argument is the number of pairs (default: 10).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from measuring import HOME, PYTHON, Measure, compare, fill, ptp, timed

from tests.system.support import Etcd, Host, import_busybox, run, start_docker

IMPORT_ALL = (PYTHON, "-c", "import docopt, etcd, netaddr, pyroute2, docker")

KERNEL_WORK = """
import sys, time
from calicoctl import slim
slim.install()
from pyroute2 import netns as _
from pyroute2.iproute.linux import IPRoute
from calicoctl.workloads import netns
with netns.Namespace("/var/run/netns/bench", "bench") as space:
    start = time.perf_counter()
    space.inspect()
    assert netns.find_interface("calibench") is None
    netns.create_veth("calibench", space, "eth1", 1500)
    space.configure("eth1", ["192.168.0.1/32"], {4: "192.0.2.2"}, netns.HOST_MAC)
    netns.set_up("calibench")
    print(time.perf_counter() - start)
netns.delete_interface("calibench")
"""


def main(pairs: int) -> None:
    etcd = Etcd(HOME / "etcd", port=2379)
    etcd.start()
    etcd.await_ready()
    engine = start_docker(HOME / "docker")
    try:
        import_busybox(HOME / "busybox")
        run_all(Host(etcd, "bench"), pairs)
    finally:
        run("docker", "rm", "-f", "workload", check=False)
        engine.terminate()
        engine.wait()
        etcd.stop()


def run_all(host: Host, pairs: int) -> None:
    environment = host.environment()

    def ctl(*words: str) -> float:
        return timed("calicoctl", *words, env=environment)

    host.register()
    run("docker", "run", "--net=none", "--name", "workload", "-tid", "busybox")
    run("ip", "netns", "add", "bench")
    path = "/var/run/netns/bench"
    count = iter(range(10**6))

    def add(*words: str) -> Measure:
        def measure() -> float:
            taken = ctl("container", "add", *words)
            ctl("container", "remove", words[0])
            return taken

        return measure

    def remove(*words: str) -> Measure:
        def measure() -> float:
            ctl("container", "add", *words)
            return ctl("container", "remove", words[0])

        return measure

    def ip_add(name: str, address: str) -> Measure:
        def measure() -> float:
            ctl("container", "add", name, "ipv4")
            taken = ctl("container", name, "ip", "add", address)
            ctl("container", "remove", name)
            return taken

        return measure

    def all_imports() -> float:
        return timed(*IMPORT_ALL)

    def bare_python() -> float:
        return timed(PYTHON, "-c", "pass")

    def profile_add() -> float:
        return ctl("profile", "add", f"p{next(count)}")

    print(
        f"Median of the ratios of {pairs} pairs (lowest to highest); L is a process that imports all five libraries\n"
    )
    compare(
        "container add of a Docker container / L", "at most 1.0, aim 0.8", add("workload", "ipv4"), all_imports, pairs
    )
    compare("container add of a namespace path / L", "at most 0.8", add(path, "ipv4"), all_imports, pairs)
    for what, name in (("a Docker container", "workload"), ("a namespace path", path)):
        added = add(name, "192.168.0.1")
        for words, measure in (("remove", remove(name, "192.168.0.1")), ("ip add", ip_add(name, "192.168.0.7"))):
            compare(f"container {words} / add, {what}", "at most 1.0", measure, added, pairs)
    compare("profile add / L", "at most 0.5, aim 0.4", profile_add, all_imports, pairs)
    compare("version / python3 -c pass", "at most 3", lambda: ctl("version"), bare_python, pairs)

    run("docker", "network", "create", "bridged")
    run("docker", "run", "--net=bridged", "--name", "bridged", "-tid", "busybox")
    run("docker", "network", "create", "second")

    def network_connect() -> float:
        taken = timed("docker", "network", "connect", "second", "bridged")
        run("docker", "network", "disconnect", "second", "bridged")
        return taken

    compare("container add / docker network connect", "no bound yet", add("workload", "ipv4"), network_connect, pairs)
    run("docker", "rm", "-f", "bridged")
    run("docker", "network", "rm", "bridged", "second")

    compare(
        "kernel work inside container add (imports left out) / CNI ptp, a process",
        "at most 1.5",
        kernel_work,
        cni_ptp,
        pairs,
    )

    ctl("profile", "add", "web")
    ctl("container", "add", path, "ipv4")
    few = Host(host.etcd, "bench")
    fill(host.etcd, host.name, 10)

    def append() -> float:
        taken = ctl("container", path, "profile", "append", "web")
        ctl("container", path, "profile", "set")
        return taken

    crowded = Etcd(HOME / "crowded")
    crowded.start()
    crowded.await_ready()
    try:
        for key, value in host.etcd.tree().items():
            crowded.put(key, value)
        fill(crowded, host.name, 10_000)
        many = few.environment(ETCD_AUTHORITY=f"127.0.0.1:{crowded.port}")

        def append_to_many() -> float:
            taken = timed("calicoctl", "container", path, "profile", "append", "web", env=many)
            timed("calicoctl", "container", path, "profile", "set", env=many)
            return taken

        compare("profile append with 10,000 endpoints / with 10", "at most 1.2", append_to_many, append, pairs)
    finally:
        crowded.stop()
    ctl("container", "remove", path)
    run("ip", "netns", "delete", "bench")
    batches(host)


def batches(host: Host) -> None:
    """Compare connecting a hundred namespaces in a batch with connecting them one by one."""
    names = [f"bench{number}" for number in range(100)]
    for name in names:
        run("ip", "netns", "add", name)
    environment = host.environment()

    def lines(words: str, more: str = "") -> str:
        return "".join(f"container {words} /var/run/netns/{name} {more}\n" for name in names)

    def in_a_batch() -> float:
        taken = timed("calicoctl", "batch", env=environment, text=lines("add", "ipv4"))
        timed("calicoctl", "batch", env=environment, text=lines("remove"))
        return taken

    def one_by_one() -> float:
        taken = sum(timed("calicoctl", *line.split(), env=environment) for line in lines("add", "ipv4").splitlines())
        timed("calicoctl", "batch", env=environment, text=lines("remove"))
        return taken

    compare("100 container add in a batch / one by one", "at most 0.2", in_a_batch, one_by_one, 3)
    for name in names:
        run("ip", "netns", "delete", name)


def kernel_work() -> float:
    return float(run(PYTHON, "-c", KERNEL_WORK).out)


def cni_ptp() -> float:
    """Return the seconds that CNI's ptp plugin takes to create a veth pair, an address and routes."""
    taken = ptp("ADD")
    ptp("DEL")
    return taken


if __name__ == "__main__":
    os.environ["PATH"] = f"{Path(PYTHON).parent}:{os.environ['PATH']}"
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
