"""How many requests to etcd the commands make that users and orchestrators run most, counted at a proxy.

The page docs/architecture.md lists the requests of `container add` and `container remove` with their reasons.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from calicoctl.datastore import backends, keys, slow_members
from calicoctl.datastore.chosen import ChosenStore
from calicoctl.datastore.settings import EtcdSettings
from calicoctl.errors import Frozen, StoreError
from calicoctl.workloads import connected
from tests.system.proxy import Proxy, proxy_before
from tests.system.support import Host, run

PATH = "/var/run/netns/blue"


class Counted:
    """A host whose commands reach etcd through a proxy, which counts."""

    def __init__(self, host: Host, proxy: Proxy) -> None:
        self.host, self.proxy = host, proxy

    def count(self, *words: str) -> int:
        """Return how many requests a command makes, but for one that asks whether the data may be changed."""
        return len(self.asked(*words)) - 1

    def asked(self, *words: str, status: int = 0) -> list[str]:
        """Return the paths of a command's requests, with the one that asks whether the data may be changed."""
        self.proxy.asked.clear()
        self.host.ctl(*words, status=status, env={"ETCD_AUTHORITY": f"127.0.0.1:{self.proxy.port}"})
        return list(self.proxy.asked)


APIS = {api: pytest.param(api, marks=pytest.mark.api(api)) for api in ("etcdv2", "etcdv3")}


@pytest.fixture(params=APIS.values())
def counted(host: Host, blue: str) -> Iterator[Counted]:
    connected.set_first(host.name)  # as `node` does on a host that is not registered yet
    with proxy_before(host.etcd.port) as proxy:
        yield Counted(host, proxy)


COMMANDS = (
    # the most requests through the v2 and the v3 API
    (9, 6, ("container", "add", PATH, "192.168.0.1")),
    (8, 5, ("container", "remove", PATH)),
    (9, 5, ("container", "add", PATH, "ipv4")),
    (10, 6, ("container", PATH, "ip", "add", "192.168.0.7")),
    (8, 5, ("container", PATH, "ip", "remove", "192.168.0.7")),
    (2, 1, ("profile", "add", "web")),
    (2, 2, ("profile", "add", "web")),
    (4, 4, ("container", PATH, "profile", "append", "web")),
    (3, 3, ("container", PATH, "profile", "append", "web")),
    (4, 4, ("container", PATH, "profile", "remove", "web")),
    (2, 2, ("container", PATH, "profile", "show")),
    (3, 2, ("container", PATH, "endpoint", "show")),
    (3, 3, ("pool", "add", "10.5.0.0/16")),
    (1, 1, ("pool", "add", "10.5.0.0/16")),
    (2, 2, ("config", "felix", "LogSeverityScreen", "info")),
    (2, 2, ("config", "felix", "LogSeverityScreen", "--remove")),
    (2, 2, ("bgp", "node-mesh", "off")),
    (5, 5, ("node", "bgp", "peer", "add", "192.0.2.99", "as", "64512")),
    (6, 6, ("pool", "add", "10.6.0.0/16", "10.7.0.0/16", "10.5.0.0/16")),
)


def test_commands_make_few_requests(counted: Counted) -> None:
    """A container takes as many as a namespace on a host that no older program has used."""
    counted.count("container", "add", PATH, "192.168.0.1")  # the host claims its first block
    counted.count("container", "remove", PATH)
    v3 = counted.host.etcd.api == "etcdv3"
    made = [(words, counted.count(*words)) for _, _, words in COMMANDS]
    assert not [one for one, limits in zip(made, COMMANDS) if one[1] > limits[v3]], made


def test_a_docker_container_takes_no_more(counted: Counted, workload: str) -> None:
    counted.count("container", "add", PATH, "192.168.0.1")  # the host claims its first block
    v3 = counted.host.etcd.api == "etcdv3"
    for most, words in (((9, 6), ("add", workload, "192.168.0.2")), ((10, 6), ("remove", workload))):
        made = counted.count("container", *words)
        assert made <= most[v3], (words, made)
    counted.count("container", "remove", PATH)


def test_what_only_looks_something_up_reads_nothing_twice(counted: Counted) -> None:
    counted.count("container", "add", PATH, "192.168.0.1")
    commands: tuple[tuple[int, int, tuple[str, ...]], ...] = (
        # the most requests, and the exit status; what changes nothing does not ask whether it may
        (1, 0, ("bgp", "default-node-as")),
        (3, 0, ("bgp", "default-node-as", "64513")),
        (3, 0, ("ipam", "info", "192.168.0.1")),
        (2, 1, ("ipam", "release", "192.168.0.1")),
        (2, 1, ("ipam", "release", "192.168.0.9")),
        (6, 1, ("profile", "trace", PATH, "192.168.0.9", "tcp", "80")),
    )
    made = [(words, len(counted.asked(*words, status=status))) for _, status, words in commands]
    assert not [one for one, (most, _, _) in zip(made, commands) if one[1] > most], made


def test_endpoints_are_removed_side_by_side(counted: Counted) -> None:
    for number in range(3):
        run("ip", "netns", "add", f"n{number}")
        counted.host.ctl("container", "add", f"/var/run/netns/n{number}", f"192.168.0.{number}")
    counted.proxy.meet(3)
    said = counted.host.ctl(
        "node", "remove", "--remove-endpoints", env={"ETCD_AUTHORITY": f"127.0.0.1:{counted.proxy.port}"}
    )
    assert counted.proxy.together is None, "one after the other"
    assert said.out.count("Removed Calico from") == 3 and not counted.host.records()


def test_blocks_are_read_together(counted: Counted, tmp_path: Path) -> None:
    """Otherwise, the commands would take minutes at a thousand blocks, and a slow link."""
    host, network = counted.host, str(tmp_path / "network.yaml")
    host.ctl("export", network)
    host.ctl("pool", "add", "10.8.0.0/16", "10.9.0.0/16", "10.11.0.0/16", "10.12.0.0/16")
    commands = (
        (4, ("ipam", "show")),
        (1, ("ipam", "check")),
        (8, ("pool", "remove", "10.8.0.0/16", "10.9.0.0/16")),
        (5, ("apply", "--prune", network)),
    )
    for number in range(150):
        cidr = f"10.10.{number // 4}.{number % 4 * 64}/26"
        block = {"cidr": cidr, "affinity": None, "allocations": [None] * 64, "attributes": []}
        host.etcd.put("/calico/ipam/v2/assignment/ipv4/block/" + cidr.replace("/", "-"), block)
    made = [(words, counted.count(*words)) for _, words in commands]
    assert not [one for one, (most, _) in zip(made, commands) if one[1] > most], made
    host.etcd.delete("/calico/ipam")


def test_lines_of_a_batch_make_fewer(counted: Counted, tmp_path: Path) -> None:
    """They read the addresses of hosts once a second. Each that an old tool has registered takes a request."""
    for number in range(3):
        run("ip", "netns", "add", f"n{number}")
        counted.host.etcd.put(keys.host_bird_ip(f"old{number}"), f"192.0.2.{101 + number}")
    counted.host.ctl("container", "add", PATH, "192.168.0.9")  # the host claims its first block

    def count(number: int) -> int:
        lines = [f"container add /var/run/netns/n{one} ipv4\n" for one in range(number)]
        (tmp_path / "lines").write_text("".join(lines))
        return counted.count("batch", str(tmp_path / "lines"))

    first = count(1)
    counted.host.ctl("container", "remove", "/var/run/netns/n0")
    others = count(3) - first
    # 8 and 16, or, if a second passes between two lines, 12 and 20; 16 and 24 if each reads them
    assert others <= (12 if counted.host.etcd.api == "etcdv3" else 20), (first, others)


@pytest.mark.parametrize("counted", [APIS["etcdv2"]], indirect=True)
def test_nothing_is_read_twice(counted: Counted) -> None:
    counted.count("container", "add", PATH, "192.168.0.1")  # the host claims its first block
    counted.count("container", "remove", PATH)
    for words in (
        ("add", PATH, "ipv4"),
        (PATH, "ip", "add", "ipv4"),
        (PATH, "ip", "remove", "192.168.0.0"),
        ("remove", PATH),
    ):
        read = [path.partition("?")[0].rstrip("/") for path in counted.asked("container", *words) if "quorum" in path]
        assert len(read) == len(set(read)), (words, read)


@pytest.mark.parametrize("counted", [APIS["etcdv2"]], indirect=True)
def test_a_handle_of_another_host_or_that_left_no_trace_here_is_found(counted: Counted) -> None:
    """It is not read for a workload of which the host knows nothing."""
    host = counted.host
    host.ctl("container", "add", PATH, "192.168.0.1")
    ((key, value),) = host.etcd.tree("/calico/ipam/v2/handle").items()
    (block,) = (value for key, value in host.etcd.tree("/calico/ipam/v2/assignment").items())
    host.ctl("container", "remove", PATH)
    block_key = "/calico/ipam/v2/assignment/ipv4/block/192.168.0.0-26"
    for text in (block, block.replace('"host": "host1"', '"host": "host2"')):
        host.etcd.put(key, value)
        host.etcd.put(block_key, text)
        host.ctl("container", "add", PATH, "192.168.0.2")
        kept = {"192.168.0.1"} if "host2" in text else set()
        assert set(host.allocations()) == {"192.168.0.2"} | kept
        assert host.handles() == {"namespace.-var-run-netns-blue": {"192.168.0.0/26": 1 + len(kept)}}
        host.ctl("container", "remove", PATH)
        assert set(host.allocations()) == kept
    host.etcd.delete("/calico/ipam")


@pytest.mark.parametrize("counted", [APIS["etcdv3"]], indirect=True)
def test_the_first_read_of_a_warm_command_also_says_whether_the_data_is_still_there(counted: Counted) -> None:
    settings, etcd = EtcdSettings("http", (("127.0.0.1", counted.proxy.port),)), counted.host.etcd

    def store_of_a_command() -> ChosenStore:
        backends.begin_command()  # as a worker of the command server does before each command
        counted.proxy.asked.clear()
        return backends.connect(settings, shared=True)

    def read(store: ChosenStore) -> object:
        assert store.atomic
        (number, missing), (hosts,) = store.read([keys.BGP_AS_NUM, f"{keys.BGP_GLOBAL}/none"], [keys.BGP_HOSTS])
        return number and number.value, missing, sorted(entry.value for entry in hosts)

    etcd.put(keys.BGP_AS_NUM, "64511")
    expected = read(store_of_a_command())
    assert expected == ("64511", None, ["192.0.2.2", "2001:db8::2"])
    store = store_of_a_command()
    assert read(store) == expected
    store.put(f"{keys.BGP_GLOBAL}/test", "written without a further look")
    assert len(counted.proxy.asked) == 2

    etcd.put(keys.READY, "false")
    store = store_of_a_command()
    assert read(store) == expected and store.choice().frozen
    with pytest.raises(Frozen):
        store.put(f"{keys.BGP_GLOBAL}/test", "frozen")
    etcd.put(keys.READY, "true")
    assert read(store_of_a_command()) == expected and len(counted.proxy.asked) == 1
    etcd.put(f"{keys.OTHER_CALICO}/test", "")
    with pytest.raises(StoreError, match="another Calico"):
        read(store_of_a_command())


@pytest.mark.parametrize("counted", APIS.values(), indirect=True)
def test_a_warm_command_asks_a_member_last_that_has_kept_another_waiting(counted: Counted) -> None:
    members = (("127.0.0.1", counted.proxy.port), ("127.0.0.1", counted.host.etcd.port))
    settings = EtcdSettings("http", members, api=counted.host.etcd.api)

    def asked() -> int:
        backends.begin_command()  # as a worker of the command server does before each command
        counted.proxy.asked.clear()
        assert backends.connect(settings, shared=True).get(keys.READY)
        return len(counted.proxy.asked)

    assert asked() and asked()
    slow_members.remember(members[0])  # as another worker does
    assert not asked()
