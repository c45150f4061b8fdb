"""How many requests to etcd the commands make that users and orchestrators run most, counted at a proxy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.proxy import Proxy, proxy_before
from tests.system.support import Host, run

PATH = "/var/run/netns/blue"


class Counted:
    """A host whose commands reach etcd through a proxy, which counts."""

    def __init__(self, host: Host, proxy: Proxy) -> None:
        self.host, self.proxy = host, proxy

    def count(self, *words: str) -> int:
        self.proxy.asked.clear()
        self.host.ctl(*words, env={"ETCD_AUTHORITY": f"127.0.0.1:{self.proxy.port}"})
        print(*words, *self.proxy.asked, sep="\n    ")
        return len(self.proxy.asked)


@pytest.fixture
def counted(host: Host) -> Iterator[Counted]:
    run("ip", "netns", "add", "blue")
    with proxy_before(host.etcd.port) as proxy:
        yield Counted(host, proxy)


def test_commands_make_few_requests(counted: Counted) -> None:
    found = {}
    found["first add"] = counted.count("container", "add", PATH, "192.168.0.1")
    found["remove"] = counted.count("container", "remove", PATH)
    found["add"] = counted.count("container", "add", PATH, "192.168.0.1")
    counted.count("container", "remove", PATH)
    found["add any"] = counted.count("container", "add", PATH, "ipv4")
    found["ip add"] = counted.count("container", PATH, "ip", "add", "192.168.0.7")
    found["ip remove"] = counted.count("container", PATH, "ip", "remove", "192.168.0.7")
    found["remove"] = counted.count("container", "remove", PATH)
    found["profile add"] = counted.count("profile", "add", "web")
    found["profile add again"] = counted.count("profile", "add", "web")
    print(found)
    assert found == {}
