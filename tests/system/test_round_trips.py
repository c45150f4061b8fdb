"""How many requests to etcd the commands make that users and orchestrators run most, counted at a proxy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.proxy import Proxy, proxy_before
from tests.system.support import Host

PATH = "/var/run/netns/blue"


class Counted:
    """A host whose commands reach etcd through a proxy, which counts."""

    def __init__(self, host: Host, proxy: Proxy) -> None:
        self.host, self.proxy = host, proxy

    def count(self, *words: str) -> int:
        """Return how many requests a command makes, but for one that asks whether the data may be changed."""
        self.proxy.asked.clear()
        self.host.ctl(*words, env={"ETCD_AUTHORITY": f"127.0.0.1:{self.proxy.port}"})
        return len(self.proxy.asked) - 1


@pytest.fixture(params=[pytest.param(api, marks=pytest.mark.api(api)) for api in ("etcdv2", "etcdv3")])
def counted(host: Host, blue: str) -> Iterator[Counted]:
    with proxy_before(host.etcd.port) as proxy:
        yield Counted(host, proxy)


COMMANDS = (
    # the most requests through the v2 and the v3 API
    (14, 6, ("container", "add", PATH, "192.168.0.1")),
    (8, 5, ("container", "remove", PATH)),
    (15, 6, ("container", "add", PATH, "ipv4")),
    (12, 7, ("container", PATH, "ip", "add", "192.168.0.7")),
    (8, 5, ("container", PATH, "ip", "remove", "192.168.0.7")),
    (2, 1, ("profile", "add", "web")),
    (2, 2, ("profile", "add", "web")),
)


def test_commands_make_few_requests(counted: Counted) -> None:
    """Old tools stored namespaces elsewhere, and this one has a second path: for a container, there are fewer."""
    counted.count("container", "add", PATH, "192.168.0.1")  # the host claims its first block
    counted.count("container", "remove", PATH)
    v3 = counted.host.etcd.api == "etcdv3"
    made = [(words, counted.count(*words)) for _, _, words in COMMANDS]
    assert not [one for one, limits in zip(made, COMMANDS) if one[1] > limits[v3]], made
