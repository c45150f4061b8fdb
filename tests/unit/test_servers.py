"""The servers that a host depends on: names that change, and resolvers that hang or fail."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import pytest

from calicoctl.datastore.reserved import Servers
from calicoctl.felix import sources
from calicoctl.felix.events import ServersChanged
from calicoctl.felix.sources import SERVERS_KEPT, ServerEvents
from calicoctl.workloads import servers


def test_members_are_resolved_and_dns_servers_read(tmp_path: Path) -> None:
    assert servers.resolved("192.0.2.1") == {"192.0.2.1"} and servers.resolved("[2001:DB8:0::1]") == {"2001:db8::1"}
    assert servers.resolved("a..b") == servers.resolved("\ud800") == frozenset()
    file = tmp_path / "resolv.conf"
    text = "; nameserver 192.0.2.9\nnameserver 192.0.2.1 # ours\n nameserver 2001:db8:0::1\nnameserver fe80::1%eth0\n"
    file.write_text(f"{text}nameserver\nnameserver none\nsearch 192.0.2.8\n")
    (tmp_path / "resolved").write_text("nameserver 192.0.2.7\n")
    files = [str(tmp_path / name) for name in ("none", "resolv.conf", "resolved")]
    assert servers.dns_servers(files) == {"192.0.2.1", "2001:db8::1", "192.0.2.7"}
    assert servers.dns_servers(files[:1]) == frozenset()


class Names:
    """What names are resolved to now; a name that is not in here cannot be resolved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.known: dict[str, list[str]] = {}
        self.clock = 1000.0
        self.hang: threading.Event | None = None
        monkeypatch.setattr(servers.socket, "getaddrinfo", self._getaddrinfo)
        monkeypatch.setattr(servers, "dns_servers", lambda: frozenset(["192.0.2.53"]))
        monkeypatch.setattr(sources.time, "monotonic", lambda: self.clock)
        self.queue: SimpleQueue[Any] = SimpleQueue()
        self.source = ServerEvents(["etcd1", "etcd2"], self.queue)

    def _getaddrinfo(self, name: str, *_: object, **__: object) -> list[Any]:
        if self.hang is not None and name == "etcd2":
            self.hang.wait(30)
        if name not in self.known:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in self.known[name]]

    def found(self) -> list[Servers]:
        """Return the changes that were emitted."""
        events = []
        try:
            while True:
                events.append(self.queue.get_nowait())
        except Empty:
            assert all(isinstance(event, ServersChanged) for event in events)
            return [event.servers for event in events]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


def of(*members: str, unknown: tuple[str, ...] = ()) -> Servers:
    return Servers(frozenset(members), frozenset(["192.0.2.53"]), frozenset(unknown))


def test_names_may_have_several_addresses_which_change(names: Names) -> None:
    names.known = {"etcd1": ["192.0.2.1", "192.0.2.2"], "etcd2": ["192.0.2.3"]}
    names.source.look()
    assert names.found()[-1] == of("192.0.2.1", "192.0.2.2", "192.0.2.3")
    names.source.look()
    assert names.found() == []
    names.known = {"etcd1": ["192.0.2.4"]}
    names.clock += SERVERS_KEPT - 1
    names.source.look()
    assert names.found()[-1] == of("192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4"), "an answer may be a part"
    names.clock += 2
    names.source.look()
    assert names.found() == [of("192.0.2.3", "192.0.2.4")], "while a name cannot be resolved, its last addresses hold"
    names.known = {}
    names.clock += 10 * SERVERS_KEPT
    names.source.look()
    assert names.found() == []


def test_a_resolver_that_hangs_keeps_nobody_from_what_is_known(names: Names) -> None:
    names.known = {"etcd1": ["192.0.2.1"], "etcd2": ["192.0.2.2"]}
    names.hang = threading.Event()
    names.source.start()
    assert names.queue.get(timeout=10).servers == of("192.0.2.1", unknown=("etcd2",))
    assert not names.source.known.wait(0.05), "the agent waits for it for some seconds only"
    names.hang.set()
    assert names.queue.get(timeout=10).servers == of("192.0.2.1", "192.0.2.2") and names.source.known.wait(10)


def test_what_a_name_had_outlives_the_agent(names: Names) -> None:
    names.known = {"etcd1": ["192.0.2.1"]}
    names.source.look()
    names.known = {}
    again = ServerEvents(["etcd1", "etcd2"], names.queue)
    names.found()
    again.look()
    assert names.found() == [of("192.0.2.1", unknown=("etcd2",))]
    now = servers.current(["etcd1", "etcd2"])
    assert now == of("192.0.2.1", unknown=("etcd2",)) and now.vital == {"192.0.2.1", "192.0.2.53"}
    assert of("192.0.2.1").vital == {"192.0.2.1"}, "DNS is not on the way to it"
