"""How many requests to etcd the commands make that users and orchestrators run most, counted at a proxy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from calicoctl.datastore.backends import connect
from calicoctl.datastore.settings import EtcdSettings
from tests.system.proxy import Proxy, proxy_before
from tests.system.support import Host, run

PATH = "/var/run/netns/blue"


class Counted:
    """A host whose commands reach etcd through a proxy, which counts."""

    def __init__(self, host: Host, proxy: Proxy, api: str) -> None:
        self.host, self.proxy, self.api = host, proxy, api

    def count(self, *words: str) -> int:
        self.proxy.asked.clear()
        self.host.ctl(*words, env={"ETCD_AUTHORITY": f"127.0.0.1:{self.proxy.port}", "DATASTORE_TYPE": self.api})
        return len(self.proxy.asked)


@pytest.fixture(params=["etcdv2", "etcdv3"])
def counted(request: pytest.FixtureRequest, host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    run("ip", "netns", "add", "blue")
    monkeypatch.setenv("DATASTORE_TYPE", request.param)
    store = connect(EtcdSettings("http", (("127.0.0.1", host.etcd.port),)))
    if store.atomic:
        store.remove_tree("/calico")
        for key, value in host.etcd.tree().items():
            store.put(key, value)
    with proxy_before(host.etcd.port) as proxy:
        yield Counted(host, proxy, request.param)


def test_commands_make_few_requests(counted: Counted) -> None:
    """They are about a namespace, whose path has two spellings, and which old tools stored elsewhere; for a container,
    there are fewer."""
    counted.count("container", "add", PATH, "192.168.0.1")  # claims the host's first block
    counted.count("container", "remove", PATH)
    found = {
        "add": counted.count("container", "add", PATH, "192.168.0.1"),
        "remove": counted.count("container", "remove", PATH),
        "add any": counted.count("container", "add", PATH, "ipv4"),
        "ip add": counted.count("container", PATH, "ip", "add", "192.168.0.7"),
        "ip remove": counted.count("container", PATH, "ip", "remove", "192.168.0.7"),
        "profile add": counted.count("profile", "add", "web"),
        "profile add again": counted.count("profile", "add", "web"),
    }
    names = ("add", "remove", "add any", "ip add", "ip remove", "profile add", "profile add again")
    assert found == dict(zip(names, (14, 11, 15, 12, 9, 2, 2) if counted.api == "etcdv2" else (6, 7, 6, 7, 7, 1, 2)))
