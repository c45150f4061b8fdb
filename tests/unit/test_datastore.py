"""The command `datastore`: what `show` prints, and which local etcd `migrate --finish` starts again."""

from __future__ import annotations

from typing import Any

import pytest

from calicoctl.commands import datastore
from calicoctl.felix import local_etcd


@pytest.mark.parametrize(
    ("environment", "restarted"),
    [
        ({}, True),
        ({"ETCD_AUTHORITY": "localhost:2379"}, True),
        ({"ETCD_AUTHORITY": "127.0.0.1:2389"}, False),
        ({"ETCD_AUTHORITY": "192.0.2.1:2379"}, False),
        ({"ETCD_ENDPOINTS": "http://127.0.0.1:2379,http://192.0.2.1:2379"}, False),
    ],
)
def test_the_local_etcd_is_started_again_only_if_it_has_the_data(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], restarted: bool
) -> None:
    done: list[str] = []
    for name in ("ETCD_AUTHORITY", "ETCD_ENDPOINTS", "ETCD_SCHEME", "DATASTORE_TYPE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    arguments = ["etcd", "--enable-v2", "--listen-client-urls=http://127.0.0.1:2379"]
    monkeypatch.setattr(local_etcd, "running", lambda host: 42)
    monkeypatch.setattr("calicoctl.proc.arguments", lambda pid: arguments)
    monkeypatch.setattr(datastore, "require_root", lambda: done.append("root"))
    monkeypatch.setattr(datastore, "_migrate", lambda act: done.append("migrate"))
    monkeypatch.setattr(local_etcd, "serve_v3_alone", lambda: done.append("v3 alone"))
    monkeypatch.setattr("calicoctl.felix.process.running", lambda host: None)
    datastore._finish(False)
    assert done == (["root", "migrate", "v3 alone"] if restarted else ["migrate"])


@pytest.mark.parametrize(("value", "shown"), [(None, "none"), ("", "''"), ("yes", "'yes'"), ("true", "true")])
def test_show_tells_an_empty_ready_from_none(capsys: pytest.CaptureFixture[str], value: str | None, shown: str) -> None:
    api: dict[str, Any] = {"served": True, "ready": value, "keys": 1, "bytes": 1, "users": None, "error": None}
    datastore._print(None, "an error", None, {"v2": api}, [])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "v2" in line)
    assert line.strip("|").split("|")[1].strip() == shown
