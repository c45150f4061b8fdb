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
    """Of a namespace, which has two spellings, and which old tools stored elsewhere; a container's are fewer."""
    counted.count("container", "add", PATH, "192.168.0.1")  # with the first block
    counted.count("container", "remove", PATH)
    assert counted.count("container", "add", PATH, "192.168.0.1") <= 14
    assert counted.count("container", "remove", PATH) <= 11
    assert counted.count("container", "add", PATH, "ipv4") <= 15
    assert counted.count("container", PATH, "ip", "add", "192.168.0.7") <= 12
    assert counted.count("container", PATH, "ip", "remove", "192.168.0.7") <= 9
    assert counted.count("container", "remove", PATH) <= 11
    assert counted.count("profile", "add", "web") <= 2
    assert counted.count("profile", "add", "web") <= 2
