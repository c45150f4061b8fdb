"""Prints how soon a restarted container is connected, compared with the time that the engine takes to restart it.

Restarts one container at a time, then ten at once. `make bench` runs this; its argument is the number of repetitions
(default: 30).
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

from measuring import HOME, percentile, report

from tests.system.agent import A4, ALLOW, AgentHost
from tests.system.conftest import clear_host
from tests.system.support import Etcd, import_busybox, run, start_docker


def started_at(name: str) -> float:
    """Return when, according to the engine, a container was started, in seconds since 1970."""
    text = run("docker", "inspect", "--format", "{{.State.StartedAt}}", name).out.strip()
    whole, _, fraction = text.rstrip("Z").partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")


def restart(name: str) -> float:
    """Return the seconds that the engine takes to restart a container."""
    start = time.perf_counter()
    run("docker", "restart", "--time=0", name)
    return time.perf_counter() - start


def await_answer(address: str) -> float:
    """Wait until a container refuses a TCP connection, and so answers; return the time, in seconds since 1970."""
    while True:
        with socket.socket() as client:
            client.settimeout(0.01)
            try:
                client.connect((address, 9))
            except ConnectionRefusedError:
                return time.time()
            except OSError:
                time.sleep(0.001)


def at_once(host: AgentHost, count: int, repetitions: int) -> list[float]:
    """Return, for `count` containers that are restarted at once, the seconds from each one's start until it answers."""
    names = {f"crowd{number}": f"192.168.0.{100 + number}" for number in range(count)}
    taken = []
    try:
        for name, address in names.items():
            run("docker", "run", "--net=none", "--name", name, "-tid", "busybox")
            host.ctl("container", "add", name, address)
            host.ctl("container", name, "profile", "set", "web")
        for _ in range(repetitions):
            with ThreadPoolExecutor(2 * count) as pool:
                restarts = [pool.submit(restart, name) for name in names]
                for each in restarts:
                    each.result()
                answered = list(pool.map(await_answer, names.values()))
            taken += [at - started_at(name) for name, at in zip(names, answered)]
    finally:
        run("docker", "rm", "-f", *names, check=False)
    return taken


def main(repetitions: int) -> None:
    etcd = Etcd(HOME / "etcd", port=2379)
    etcd.start()
    etcd.await_ready()
    engine = start_docker(HOME / "docker")
    host = AgentHost(etcd)
    try:
        import_busybox(HOME / "busybox")
        host.start_agent()
        host.profile("web", inbound=[ALLOW])
        for name in ("workload", "plain"):
            run("docker", "run", "--net=none", "--name", name, "-tid", "busybox")
        host.ctl("container", "add", "workload", A4)
        host.ctl("container", "workload", "profile", "set", "web")
        alone, connected, together = [], [], []
        for _ in range(repetitions):
            alone.append(restart("plain"))
            start = time.time()
            restart("workload")
            answered = await_answer(A4)
            connected.append(answered - started_at("workload"))
            together.append(answered - start)
        one, other = statistics.median(together), statistics.median(alone)
        report(
            "docker restart until the container answers / docker restart of one without Calico",
            "",
            one / other,
            f"{one * 1000:.0f} ms / {other * 1000:.0f} ms",
        )
        report("start of a container until it answers, p95, seconds", "at most 1", percentile(connected, 0.95))
        crowd = at_once(host, 10, max(1, repetitions // 10))
        report("the same for ten that are restarted at once, p95, seconds", "at most 1", percentile(crowd, 0.95))
    finally:
        run("docker", "rm", "-f", "workload", "plain", check=False)
        engine.terminate()
        engine.wait()
        clear_host()
        etcd.stop()


if __name__ == "__main__":
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
