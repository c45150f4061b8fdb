"""What the benchmarks share: they time commands, fill a store, and print figures beside their bounds.

Seconds mean little on a shared machine. So most figures are medians of the ratios of pairs that ran one right after the
other. A figure that misses its bound is marked.
"""

from __future__ import annotations

import json
import operator
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.system.support import Etcd

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installation has the bytecode of its modules, so it is wanted here

HOME = Path("/run/calico-bench")
PYTHON = sys.executable
PTP = "/usr/lib/cni/ptp"

Measure = Callable[[], float]

SCALES = {"ms": 1000, "MiB": 1}
"""Unit in which a figure is printed -> what a measured value (seconds, MiB) is multiplied by."""


@contextmanager
def running_etcd() -> Iterator[Etcd]:
    """An etcd at the default port, inside `with`."""
    etcd = Etcd(HOME / "etcd", port=2379)
    etcd.start()
    try:
        etcd.await_ready()
        yield etcd
    finally:
        etcd.stop()


def timed(*command: str, env: dict[str, str] | None = None, text: str = "") -> float:
    """Run a command that succeeds; return the seconds that it takes."""
    start = time.perf_counter()
    done = subprocess.run(command, env=env, input=text, capture_output=True, text=True)
    taken = time.perf_counter() - start
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return taken


def is_met(bound: str, value: float) -> bool:
    """Return whether a value meets a bound such as "at most 1.2"; other texts are met by all values."""
    for words, met in (("at most", operator.le), ("under", operator.lt), ("at least", operator.ge)):
        number = re.match(rf"{words} ([\d.]+)", bound)
        if number:
            return bool(met(value, float(number[1])))
    return True


def report(title: str, bound: str, value: float, detail: str = "") -> bool:
    """Print a figure; return whether it meets its bound."""
    met = is_met(bound, value)
    print(f"{title:76} {value:8.3f}  {bound:22} {'' if met else 'MISSED  '}{detail}", flush=True)
    return met


def compare(title: str, bound: str, one: Measure, other: Measure, pairs: int, unit: str = "ms") -> bool:
    """Measure two things in turn; print the median of the ratios, and return whether it meets its bound."""
    return report_ratios(title, bound, in_turn(one, other, pairs), unit)


def in_turn(one: Measure, other: Measure, pairs: int) -> list[tuple[float, float]]:
    """Measure two things in turn, after a pair that does not count."""
    one(), other()
    return [(one(), other()) for _ in range(pairs)]


def report_ratios(title: str, bound: str, results: list[tuple[float, float]], unit: str = "ms") -> bool:
    """Print the median of the ratios of measured pairs; return whether it meets its bound."""
    ratios = [a / b for a, b in results]
    medians = [f"{statistics.median(column) * SCALES[unit]:.1f} {unit}" for column in zip(*results)]
    detail = f"({min(ratios):.2f} to {max(ratios):.2f})  {' / '.join(medians)}"
    return report(title, bound, statistics.median(ratios), detail)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def endpoint_record(host: str, number: int, profile: str) -> tuple[str, dict[str, Any]]:
    """Return the key and the value of an endpoint of a host, which has a workload, a name and an address of its own."""
    id = f"{number:011x}".ljust(32, "0")
    record = {
        "state": "active",
        "name": f"cali{id[:11]}",
        "mac": f"02:00:00:00:{number // 256:02x}:{number % 256:02x}",
        "profile_ids": [profile],
        "ipv4_nets": [f"192.168.{128 + number // 256}.{number % 256}/32"],
        "ipv6_nets": [],
        "ipv4_gateway": "192.0.2.2",
        "ipv6_gateway": None,
    }
    return f"/calico/v1/host/{host}/workload/docker/{number:064x}/endpoint/{id}", record


def fill(etcd: Etcd, host: str, count: int, profiles: int = 1) -> None:
    """Write so many endpoints of a host, spread over the profiles crowd0, crowd1 and so on."""

    def write(number: int) -> None:
        etcd.put(*endpoint_record(host, number, f"crowd{number % profiles}"))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(count)))


def ptp(operation: str) -> float:
    """Return the seconds of an operation of CNI's ptp plugin, with host-local, on the namespace `bench`."""
    network = {
        "cniVersion": "0.4.0",
        "name": "bench",
        "type": "ptp",
        "ipam": {
            "type": "host-local",
            "subnet": "192.168.0.0/24",
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": str(HOME / "cni"),
        },
    }
    return timed(PTP, env=cni_environment(operation), text=json.dumps(network))


def cni_environment(operation: str) -> dict[str, str]:
    """Return the variables with which a runtime runs a CNI plugin for the namespace `bench`."""
    return {
        "CNI_COMMAND": operation,
        "CNI_CONTAINERID": "bench",
        "CNI_NETNS": "/var/run/netns/bench",
        "CNI_IFNAME": "eth1",
        "CNI_PATH": str(Path(PTP).parent),
        "PATH": os.environ["PATH"],
    }
