"""Prints what the ways of connecting a container without a command cost, as ratios or seconds measured in one run.

These are Docker networks, labels and Docker's hook. `make bench` runs this; an argument is the number of pairs
(20), others select parts, by name.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from measuring import (
    HOME,
    Measure,
    in_turn,
    percentile,
    report,
    report_ratios,
    running_etcd,
    timed,
)

from tests.system.agent import ALLOW, AgentHost
from tests.system.conftest import clear_host
from tests.system.support import end_agents, end_process, import_busybox, run, start_docker, wait_for

LABELS = ("--net=none", "--label=calico.ip=ipv4", "--label=calico.profile=web")
NETWORK = ("--driver=calico", "--ipam-driver=calico-ipam", "--subnet=192.168.0.0/16")
OUTPUT = HOME / "output"
"""Where containers say that they run."""

_names = (f"c{number}" for number in itertools.count())


def remove(host: AgentHost, name: str) -> None:
    """Remove a container, and wait until nothing of it is left, so that this is not measured with the next one."""
    run("docker", "rm", "-f", name)
    wait_for(lambda: host.records() == {} and host.allocations() == {}, f"the end of {name}\n{host.log()}", 30)


def start(host: AgentHost, *options: str) -> Measure:
    """A measurement: the seconds of `docker run` of a container that stays, which is then removed."""

    def measure() -> float:
        name = next(_names)
        taken = timed("docker", "run", "--name", name, *options, "-d", "busybox", "sleep", "1000")
        remove(host, name)
        return taken

    return measure


def start_and_end(host: AgentHost, *options: str) -> Measure:
    """A measurement: the seconds of `docker run --rm` of a container that ends at once."""

    def measure() -> float:
        taken = timed("docker", "run", "--rm", *options, "busybox", "sleep", "0")
        wait_for(lambda: host.records() == {} and host.allocations() == {}, f"the end\n{host.log()}", 30)
        return taken

    return measure


@contextmanager
def agent(host: AgentHost, *options: str) -> Iterator[None]:
    """Run the agent with options of `calicoctl node`; end all its processes."""
    host.start_agent(*options)
    try:
        host.profile("web", inbound=[ALLOW])
        host.sync()
        yield
    finally:
        end_agents()  # first, since it would start the other one again
        for file in Path("/run/calico").glob("*/plugins.pid"):
            end_process(file)


def networks(host: AgentHost, pairs: int) -> None:
    """The engine sets up no firewall here, for either network."""
    with agent(host, "--libnetwork"):
        run("docker", "network", "create", "bridged")
        run("docker", "network", "create", *NETWORK, "net1")
        for title, bound, measure in (
            ("docker run --net: a Calico network / a bridge", "at most 1.2", start),
            ("docker run --rm --net: a Calico network / a bridge", "", start_and_end),
        ):
            results = in_turn(measure(host, "--net=net1"), measure(host, "--net=bridged"), pairs)
            report_ratios(title, bound, results)
            fastest, other = (min(column) for column in zip(*results))
            report("  the fastest of each", "", fastest / other, f"{fastest * 1000:.1f} ms / {other * 1000:.1f} ms")
        run("docker", "network", "rm", "bridged", "net1")


def has_default_route(pid: int) -> bool:
    """Return whether a process has a default route: the last thing that a container gets."""
    lines = Path(f"/proc/{pid}/net/route").read_text().splitlines()[1:]
    return any(line.split()[:2] == ["eth1", "00000000"] for line in lines)


def until_interface(host: AgentHost) -> float:
    """Return the seconds from the first instruction of a container with labels until its interface is ready.

    The time of the first instruction is that of a file that it writes; it may be up to 4 ms too early.
    """
    name, started = next(_names), OUTPUT / "started"
    started.unlink(missing_ok=True)
    # with the host's process ids, so that nobody has to ask the engine for it just then
    say = f"echo $$ >{started}; exec sleep 1000"
    options = ("--pid=host", f"--volume={OUTPUT}:{OUTPUT}", "--name", name, "-d", "busybox", "sh", "-c", say)
    run("docker", "run", *LABELS, *options)
    # `docker run` may return before the first instruction
    pid = int(wait_for(lambda: started.exists() and started.read_text(), "the container's process"))
    began, give_up = started.stat().st_mtime, time.time() + 30
    while not has_default_route(pid):
        assert time.time() < give_up, host.log()
        time.sleep(0.001)  # the resolution of the figure: nothing in a container's namespace announces a route here
    taken = time.time() - began
    remove(host, name)
    return taken


def labels(host: AgentHost, pairs: int) -> None:
    OUTPUT.mkdir(exist_ok=True)
    with agent(host):
        until_interface(host)
        taken = [until_interface(host) for _ in range(2 * pairs)]
    title = "labels: first instruction to default route, "
    report(f"{title}p50, ms", "", 1000 * percentile(taken, 0.5))
    report(f"{title}p95, ms", "at most 150", 1000 * percentile(taken, 0.95), f"(of {len(taken)})")


def report_difference(title: str, bound: str, results: list[tuple[float, float]]) -> None:
    """Print the median of the differences of measured pairs, in milliseconds."""
    differences = [1000 * (a - b) for a, b in results]
    one, other = (1000 * statistics.median(column) for column in zip(*results))
    detail = f"({min(differences):.0f} to {max(differences):.0f})  {one:.0f} ms - {other:.0f} ms"
    report(title, bound, statistics.median(differences), detail)


def hook(host: AgentHost, pairs: int) -> None:
    """The hook is set up in the engine's default runtime; the runtime runc is without it."""
    for way, options, bound in (("served", ("--libnetwork",), "at most 150"), ("cold", (), "")):
        with agent(host, "--docker-hook", *options):
            for title, words, limit in (
                ("with labels", LABELS, bound),
                ("without labels", ("--net=none",), ""),
            ):
                results = in_turn(start(host, *words), start(host, "--runtime=runc", *words), pairs)
                report_difference(f"docker run {title}: with the hook, {way} - without, ms", limit, results)
    host.ctl("node", "remove", "--docker-hook")


PARTS = {"networks": networks, "labels": labels, "hook": hook}


def main(words: list[str]) -> None:
    pairs = int(words.pop(0)) if words and words[0].isdigit() else 20
    print(f"Medians of {pairs} pairs (lowest to highest)\n")
    with ExitStack() as undo:
        etcd = undo.enter_context(running_etcd())
        engine = start_docker(HOME / "docker")
        undo.callback(engine.wait)
        undo.callback(engine.terminate)
        undo.callback(clear_host)
        import_busybox(HOME / "busybox")
        for name in words or PARTS:
            PARTS[name](AgentHost(etcd), pairs)


if __name__ == "__main__":
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    main(sys.argv[1:])
