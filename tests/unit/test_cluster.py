"""What `datastore show` says of servers that are not etcd, and of data that is not Calico's."""

from __future__ import annotations

import json

import pytest

from calicoctl.commands import datastore
from calicoctl.datastore import cluster, keys
from calicoctl.datastore.backends import Backends
from calicoctl.datastore.detection import Shown, decide
from calicoctl.datastore.settings import EtcdSettings
from calicoctl.errors import CalicoError
from tests.unit.memory_store import MemoryStore
from tests.unit.rogue_server import answer, serving


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"\xff", b"[" * 200_000, b'{"etcdserver": 3, "enabled": "no"}'])
def test_a_member_that_is_not_etcd_says_nothing_of_itself(body: bytes) -> None:
    with serving(lambda client, _: client.send(answer(body))) as server:
        settings = EtcdSettings("http", (("127.0.0.1", server.port),))
        (info,) = cluster.members(settings)
        assert (info.version, info.healthy, info.leader, info.size) == (None, False, None, None)
        assert info.error is not None and "does not answer as etcd does" in info.error
        assert cluster.users(settings)[0] in (None, False)


def test_whether_v2_has_users_is_known_from_a_member_that_serves_v2() -> None:
    no_page = answer(b"404 page not found\n", b"HTTP/1.1 404 Not Found\r\nConnection: close\r\n")
    enabled = answer(b'{"enabled": true}')
    with serving(lambda client, _: client.send(no_page)) as one, serving(lambda client, _: client.send(enabled)) as two:
        members = (("127.0.0.1", one.port), ("127.0.0.1", two.port))
        assert cluster.users(EtcdSettings("http", members))[0] is True


def test_a_ready_that_is_neither_true_nor_false_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = MemoryStore()
    store.create(keys.READY, "perhaps")
    monkeypatch.setenv("ETCD_ENDPOINTS", "http://127.0.0.1:1")
    monkeypatch.setattr(cluster, "members", lambda _: [cluster.MemberInfo("http://127.0.0.1:1", healthy=True)])
    monkeypatch.setattr(Backends, "open", lambda *_: store)
    monkeypatch.setattr(Backends, "choose", lambda *_: decide(Shown(ready="perhaps"), Shown(), "here"))
    with pytest.raises(CalicoError, match=f"{keys.READY} .*neither true nor false"):
        datastore.prepare(["datastore", "show", "--output=json"])()
    shown = json.loads(capsys.readouterr().out)
    assert shown["used"] is None and "neither true nor false" in shown["error"]
    assert [api["ready"] for api in shown["apis"].values()] == ["perhaps", "perhaps"]
