"""Prints how long `export` and `apply --dry-run` take with 1,000 endpoints and 100 profiles.

`make bench` runs this; its argument is the number of runs (default: 5).
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path

from measuring import HOME, fill, report, running_etcd, timed

from tests.system.support import Host

ENDPOINTS, PROFILES, RULES = 1000, 100, 10


def main(runs: int) -> None:
    file = HOME / "network.yaml"
    with running_etcd() as etcd:
        host = Host(etcd, "bench")
        host.register()
        fill(etcd, "bench", ENDPOINTS, PROFILES)
        for number in range(PROFILES):
            key = f"/calico/v1/policy/profile/crowd{number}"
            rules = [
                {"action": "allow", "protocol": "tcp", "src_tag": f"crowd{n}", "dst_ports": [n]} for n in range(RULES)
            ]
            etcd.put(f"{key}/tags", [f"crowd{number}"])
            etcd.put(f"{key}/rules", {"id": f"crowd{number}", "inbound_rules": rules, "outbound_rules": rules})
        environment = host.environment()
        for words in (("export", str(file)), ("apply", str(file), "--dry-run")):
            taken = [timed("calicoctl", *words, env=environment) for _ in range(runs)]
            title = f"{' '.join(words[::2])}: {ENDPOINTS:,} endpoints, {PROFILES} profiles of {2 * RULES} rules, s"
            report(title, "under 3", statistics.median(taken), f"({min(taken):.2f} to {max(taken):.2f})")
        text = file.read_text()
        report("size of the file, KiB", "", len(text) / 1024)


if __name__ == "__main__":
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    main(int(sys.argv[1]) if sys.argv[1:] else 5)
