"""Peak memory of commands, also with many objects in the store."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.system.support import CALICOCTL, Host

LIMIT = 64 * 1024
"""KiB"""


MEASURE = """
import os, sys
pid = os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss, file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def peak(host: Host, *arguments: str) -> int:
    """Run a command; return its peak resident memory in KiB.

    The kernel counts the process that a child was forked from as well, so it is forked from a small one.
    """
    python = [sys.executable, "-S", "-c", MEASURE, CALICOCTL]
    return int(host.ctl(*arguments, command=python).err.splitlines()[-1])


@pytest.fixture
def full_store(host: Host) -> Host:
    """Ten thousand endpoints of other hosts, and a /16 of which every block but the last is taken and full."""

    def write_endpoint(number: int) -> None:
        record = {
            "state": "active",
            "name": f"cali{number:011x}",
            "mac": "86:32:73:fd:c6:86",
            "profile_ids": ["web"],
            "ipv4_nets": [f"192.168.{number // 256 % 256}.{number % 256}/32"],
            "ipv6_nets": [],
            "ipv4_gateway": "192.0.2.2",
            "ipv6_gateway": None,
        }
        folder = f"/calico/v1/host/other{number % 20}/workload/docker/{number:064x}"
        host.etcd.put(f"{folder}/endpoint/{number:032x}", record)

    def write_block(number: int) -> None:
        cidr = f"192.168.{number // 4}.{number % 4 * 64}/26"
        attributes = [
            {
                "handle_id": f"docker.{number * 64 + ordinal:064x}",
                "secondary": {"host": "other", "workload": f"{ordinal:064x}", "endpoint": f"{ordinal:032x}"},
            }
            for ordinal in range(64)
        ]
        block = {"cidr": cidr, "affinity": "host:other", "allocations": list(range(64)), "attributes": attributes}
        host.etcd.put("/calico/ipam/v2/assignment/ipv4/block/" + cidr.replace("/", "-"), block)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write_endpoint, range(10_000)))
        list(pool.map(write_block, range(1023)))
    return host


def test_no_command_needs_64_mib(full_store: Host, blue: str, workload: str) -> None:
    host = full_store
    commands = [
        ("version",),
        ("profile", "add", "web"),
        ("container", "add", blue, "ipv4"),
        ("container", "add", "workload", "192.168.255.250"),
        ("container", blue, "profile", "append", "web"),
        ("container", blue, "endpoint", "show"),
        ("profile", "show", "--detailed"),
        ("profile", "remove", "web", "--no-check"),
        ("container", "remove", blue),
        ("container", "remove", "workload"),
        ("pool", "show"),
        ("endpoint", "show", "--detailed"),
        ("ipam", "show"),
        ("ipam", "info", "192.168.0.1"),
    ]
    peaks = {" ".join(command): peak(host, *command) for command in commands}
    assert {command: used for command, used in peaks.items() if used > LIMIT} == {}, json.dumps(peaks, indent=1)
