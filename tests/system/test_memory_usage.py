"""Peak memory of commands, and memory of the agent, with many objects in the store."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from tests.system.agent import LOG_DIR, AgentHost
from tests.system.support import CALICOCTL, HOST_IP, Host, b64, run, wait_for

LIMIT = 64 * 1024
"""KiB"""

ENDPOINTS = 9984
"""With the few that are connected, some 10,000. Their addresses fill 156 blocks."""

AGENT_LIMIT = 70 * 1024
"""KiB"""


MEASURE = """
import os, sys
pid = os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss, file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def endpoint(owner: str, orchestrator: str, number: int) -> tuple[str, dict]:
    """Return the key and the record of an endpoint of the host `owner`; its id, interface and address follow from its
    number.
    """
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
    return f"{folder}/endpoint/{number:032x}", record


def fill(host: Host, values: Iterable[tuple[str, dict | str]]) -> None:
    """Write keys."""
    if host.etcd.api == "etcdv2":
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda one: host.etcd.put(*one), values))
        return
    texts = [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in values]
    puts = [{"request_put": {"key": b64(key), "value": b64(text)}} for key, text in texts]
    for start in range(0, len(puts), 50):
        host.etcd.v3("kv/txn", {"success": puts[start : start + 50]})


def block(number: int) -> tuple[str, dict]:
    """Return the key and the value of a block whose addresses are those of 64 endpoints: block 0 to 1022 of a /16."""
    cidr = f"192.168.{number // 4}.{number % 4 * 64}/26"
    numbers = range(number * 64, number * 64 + 64)
    attributes = [
        {
            "handle_id": f"docker.{n:064x}",
            "secondary": {"host": f"other{n % 20}", "workload": f"{n:064x}", "endpoint": f"{n:032x}"},
        }
        for n in numbers
    ]
    value = {"cidr": cidr, "affinity": "host:other0", "allocations": list(range(64)), "attributes": attributes}
    return "/calico/ipam/v2/assignment/ipv4/block/" + cidr.replace("/", "-"), value


def of_endpoint(number: int) -> Iterator[tuple[str, dict]]:
    """Yield the keys, with their values, of an endpoint, of its status and of its handle."""
    key, record = endpoint(f"other{number % 20}", "docker", number)
    yield key, record
    yield key.replace("/calico/v1", "/calico/felix/v1"), {"status": "up"}
    cidr = f"192.168.{number // 256}.{number // 64 % 4 * 64}/26"
    yield f"/calico/ipam/v2/handle/docker.{number:064x}", {"block": {cidr: 1}}


def add_interfaces(count: int) -> None:
    """Create interfaces as those of the first endpoints have (see `endpoint`)."""
    run("ip", "netns", "add", "many")
    pairs = (
        f"link add cali{n:011x} type veth peer name p{n} netns many\nlink set cali{n:011x} up\n"
        for n in range(1, count + 1)
    )
    run("ip", "-batch", "-", input="".join(pairs))


def peaks(host: Host, tmp: Path, *commands: tuple[str, ...]) -> dict[str, int]:
    return {" ".join(command): peak(host, tmp, *command) for command in commands}


def peak(host: Host, tmp: Path, *arguments: str) -> int:
    """Run a command, with `tmp` for temporary files; return its peak resident memory in KiB.

    The kernel counts the process that a child was forked from as well, so it is forked from a small one.
    """
    python = [sys.executable, "-S", "-c", MEASURE, CALICOCTL]
    return int(host.ctl(*arguments, command=python, env={"TMPDIR": str(tmp)}).err.splitlines()[-1])


def test_no_command_needs_64_mib(host: Host, blue: str, workload: str, tmp_path: Path) -> None:
    fill(host, chain.from_iterable(map(of_endpoint, range(ENDPOINTS))))
    fill(host, ((f"/calico/bgp/v1/host/other{n}/ip_addr_v4", f"192.0.2.{n + 10}") for n in range(20)))
    blocks = [block(number) for number in range(1023)]
    fill(host, blocks[: ENDPOINTS // 64])
    fill(host, ((key.replace("assignment", "host/other0"), "") for key, _ in blocks[: ENDPOINTS // 64]))
    found = peaks(
        host,
        tmp_path,
        ("diags",),
        ("datastore", "show"),
        ("node", "show"),
        ("ipam", "check"),
        ("endpoint", "show", "--detailed"),
        ("endpoint", "show", "--detailed", "--output=json"),
    )
    fill(host, blocks[ENDPOINTS // 64 :])  # of a /16, every block but the last is taken and full
    network = str(tmp_path / "network.yaml")
    found |= peaks(
        host,
        tmp_path,
        ("version",),
        ("profile", "add", "web"),
        ("map", str(tmp_path / "map.html")),
        ("map", "--output=text"),
        ("map", "--output=json"),
        ("map", "--output=yaml"),
        ("export", network),
        ("apply", network, "--dry-run"),
        ("container", "add", blue, "ipv4"),
        ("container", "add", "workload", "192.168.255.250"),
        ("container", blue, "profile", "append", "web"),
        ("container", blue, "endpoint", "show"),
        ("profile", "show", "--detailed"),
        ("profile", "show", "--detailed", "--output=json"),
        ("profile", "show", "--detailed", "--output=yaml"),
        ("profile", "trace", "192.168.0.1", "192.168.0.2", "tcp", "80"),
        ("profile", "remove", "web", "--no-check"),
        ("container", "remove", blue),
        ("container", "remove", "workload"),
        ("pool", "show"),
        ("ipam", "show"),
        ("ipam", "info", "192.168.0.1"),
    )
    assert {command: used for command, used in found.items() if used > LIMIT} == {}, json.dumps(found, indent=1)


def test_two_thousand_interfaces_do_not_change_that(bare_host: Host, tmp_path: Path) -> None:
    host = AgentHost(bare_host.etcd)
    fill(host, chain.from_iterable(map(of_endpoint, range(ENDPOINTS))))
    add_interfaces(2000)
    found = peaks(host, tmp_path, ("node", f"--ip={HOST_IP}", f"--log-dir={LOG_DIR}"), ("diags",), ("drops",))
    assert {command: used for command, used in found.items() if used > LIMIT} == {}, json.dumps(found, indent=1)


def test_an_agent_with_a_thousand_endpoints_needs_70_mib(bare_host: Host) -> None:
    host = AgentHost(bare_host.etcd)
    add_interfaces(1000)
    host.profile("web")
    fill(host, (endpoint(host.name, "test", n) for n in range(1, 1001)))
    host.start_agent()

    def programmed() -> bool:
        reported = host.etcd.tree(f"/calico/felix/v1/host/{host.name}/workload").values()
        return sum(json.loads(status)["status"] == "up" for status in reported) == 1000

    wait_for(programmed, f"the endpoints\n{host.log()}")
    used = Path(f"/proc/{host.pid}/status").read_text().partition("VmRSS:")[2].split()[0]
    assert int(used) < AGENT_LIMIT
