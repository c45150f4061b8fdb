"""Prints what a map of the network costs: the seconds and the memory to make it, its size, and how long a browser takes
for a click.

`make bench` runs this; arguments are the numbers of endpoints (1000), profiles (100) and hosts (20). Every endpoint has
one to three of the profiles, at random, so hardly two of them are treated alike: the worst case.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measuring import HOME, endpoint_record, percentile, report, running_etcd, timed

from tests.system.browser import Browser, chromium
from tests.system.test_memory_usage import MEASURE

PROGRAM = str(Path(sys.executable).parent / "calicoctl")
CLICKS = 40


def rules(chance: random.Random, tags: list[str], side: str, count: int) -> Iterator[dict[str, Any]]:
    """Yield random rules, most of which name a protocol and a tag."""
    for _ in range(count):
        rule: dict[str, Any] = {"action": chance.choice(["allow", "allow", "allow", "deny"])}
        kind = chance.random()
        if kind < 0.6:
            ports = chance.sample([22, 80, 443, 5432, 3306, 6379, 8080, "9000:9100"], chance.randint(1, 3))
            rule.update(protocol="tcp", dst_ports=ports)
        elif kind < 0.7:
            rule.update(protocol="udp", dst_ports=[53])
        elif kind < 0.85:
            rule.update(protocol="icmp", icmp_type=8)
        if chance.random() < 0.7:
            rule[f"{side}_tag"] = chance.choice(tags)
        elif chance.random() < 0.3:
            rule[f"{side}_net"] = f"192.168.{128 + chance.randint(0, 3)}.0/24"
        yield rule


def network(endpoints: int, profiles: int, hosts: int) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of a network."""
    chance = random.Random(1)
    tags = [f"tag{number}" for number in range(profiles)]
    for number in range(hosts):
        yield f"/calico/bgp/v1/host/host{number}/ip_addr_v4", f"192.0.2.{number + 1}"
    yield "/calico/v1/ipam/v4/pool/192.168.0.0-16", {"cidr": "192.168.0.0/16"}
    for number, tag in enumerate(tags):
        profile = f"/calico/v1/policy/profile/profile{number}"
        inbound = [{"action": "allow", "src_tag": tag}, *rules(chance, tags, "src", 4)]
        outbound = [*rules(chance, tags, "dst", chance.choice([0, 0, 2])), {"action": "allow"}]
        yield f"{profile}/tags", [tag, chance.choice(tags)]
        yield f"{profile}/rules", {"inbound_rules": inbound, "outbound_rules": outbound}
    for number in range(endpoints):
        key, record = endpoint_record(f"host{number % hosts}", number, "")
        some = chance.sample(range(profiles), chance.randint(1, min(3, profiles)))
        yield key, {**record, "profile_ids": [f"profile{one}" for one in some], "workload_name": f"w{number}"}


def click(browser: Browser, place: int) -> float:
    """Return the seconds from a click on a cell until the rules of the pair have been drawn."""
    spent: float = browser.evaluate(
        f"""new Promise(done => {{
          const cell = document.querySelector("[data-row='{place % 20}'][data-column='{place % 17 + 1}']");
          const before = performance.now();
          cell.click();
          requestAnimationFrame(() => setTimeout(() => done(performance.now() - before)));
        }})"""
    )
    return spent / 1000


def peak(environment: dict[str, str], output: str) -> float:
    """Return the peak resident memory of a map, made without the command server, in MiB."""
    command = [sys.executable, "-S", "-c", MEASURE, PROGRAM, "map", output]
    cold = {**environment, "CALICO_COLD": "1"}
    done = subprocess.run(command, env=cold, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)
    return int(done.stderr.splitlines()[-1]) / 1024


def main() -> None:
    endpoints, profiles, hosts = (int(word) for word in (sys.argv[1:] + ["1000", "100", "20"][len(sys.argv) - 1 :]))
    what = f"map of {endpoints} endpoints with {profiles} profiles"
    with running_etcd() as etcd, tempfile.TemporaryDirectory(dir=HOME) as folder, ThreadPoolExecutor(8) as pool:
        entries = list(network(endpoints, profiles, hosts))
        list(
            pool.map(
                lambda entry: etcd.put(entry[0], entry[1] if isinstance(entry[1], str) else json.dumps(entry[1])),
                entries,
            )
        )
        file = Path(folder) / "map.html"
        environment = {**os.environ, "HOSTNAME": "host0", "ETCD_AUTHORITY": "127.0.0.1:2379"}
        seconds = [timed(PROGRAM, "map", str(file), env=environment) for _ in range(3)]
        report(f"{what}: seconds", "under 10", statistics.median(seconds))
        report(f"{what}: size of the file, MB", "under 5", file.stat().st_size / 1e6)
        report(f"{what}: peak memory, MiB", "under 64", peak(environment, str(file)))
        if endpoints <= 1500:  # these are for at most 2,000 groups
            report(f"{what}: seconds as JSON", "", timed(PROGRAM, "map", "--output=json", env=environment))
            for form in ("json", "text"):
                memory = peak(environment, f"--output={form}")
                report(f"{what}: peak memory as {form}, MiB", "under 64", memory)
        with chromium(Path(folder) / "chromium") as browser:
            browser.open(file)
            clicks = [click(browser, number) for number in range(CLICKS)]
        report(
            "a click on a pair: milliseconds, of 19 in 20 clicks at most", "under 100", percentile(clicks, 0.95) * 1000
        )


if __name__ == "__main__":
    main()
