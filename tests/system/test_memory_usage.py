"""Peak memory of commands, and memory of the agent, with many objects in the store."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.system.agent import AgentHost
from tests.system.support import CALICOCTL, Host, run, wait_for

LIMIT = 64 * 1024
"""KiB"""

AGENT_LIMIT = 70 * 1024
"""KiB"""


MEASURE = """
import os, sys
pid = os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss, file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def write_endpoint(host: Host, owner: str, orchestrator: str, number: int) -> None:
    """Write an endpoint of the host `owner` whose id, interface and address follow from its number."""
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
    folder = f"/calico/v1/host/{owner}/workload/{orchestrator}/{number:064x}"
    host.etcd.put(f"{folder}/endpoint/{number:032x}", record)


def write_block(host: Host, number: int) -> None:
    """Write a block of another host of which every address is assigned: block 0 to 1022 of a /16."""
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


def peaks(host: Host, tmp: Path, *commands: tuple[str, ...]) -> dict[str, int]:
    return {" ".join(command): peak(host, tmp, *command) for command in commands}


def peak(host: Host, tmp: Path, *arguments: str) -> int:
    """Run a command, with `tmp` for temporary files; return its peak resident memory in KiB.

    The kernel counts the process that a child was forked from as well, so it is forked from a small one.
    """
    python = [sys.executable, "-S", "-c", MEASURE, CALICOCTL]
    return int(host.ctl(*arguments, command=python, env={"TMPDIR": str(tmp)}).err.splitlines()[-1])


def test_no_command_needs_64_mib(host: Host, blue: str, workload: str, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: write_endpoint(host, f"other{n % 20}", "docker", n), range(10_000)))
    # with the addresses of 10,000 endpoints
    found = peaks(host, tmp_path, ("diags",), ("datastore", "show"), ("node", "show"))
    # of a /16, every block but the last is taken and full
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: write_block(host, n), range(1023)))
    found |= peaks(
        host,
        tmp_path,
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
        ("endpoint", "show", "--detailed", "--output=json"),
        ("ipam", "show"),
        ("ipam", "info", "192.168.0.1"),
    )
    assert {command: used for command, used in found.items() if used > LIMIT} == {}, json.dumps(found, indent=1)


def test_an_agent_with_a_thousand_endpoints_needs_70_mib(bare_host: Host) -> None:
    host = AgentHost(bare_host.etcd)
    run("ip", "netns", "add", "many")
    pairs = "".join(
        f"link add cali{n:011x} type veth peer name p{n} netns many\nlink set cali{n:011x} up\n" for n in range(1, 1001)
    )
    run("ip", "-batch", "-", input=pairs)
    host.profile("web")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: write_endpoint(host, host.name, "test", n), range(1, 1001)))
    host.start_agent()

    def programmed() -> bool:
        reported = host.etcd.tree(f"/calico/felix/v1/host/{host.name}/workload").values()
        return sum(json.loads(status)["status"] == "up" for status in reported) == 1000

    wait_for(programmed, f"the endpoints\n{host.log()}")
    used = Path(f"/proc/{host.pid}/status").read_text().partition("VmRSS:")[2].split()[0]
    assert int(used) < AGENT_LIMIT
