"""When the process for Docker networks is replaced, and when none is started. The process is a shell script here."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from calicoctl import proc
from calicoctl.felix import plugin_process
from calicoctl.felix.plugin_process import PluginProcess
from tests.unit.waiting import wait_for


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PluginProcess]:
    for name in plugin_process.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ETCD_ENDPOINTS", "http://a:1")
    monkeypatch.setattr(plugin_process, "DIRECTORY", tmp_path / "run")
    monkeypatch.setattr(plugin_process, "SOCKET", tmp_path / "calico.sock")
    monkeypatch.setattr(plugin_process, "POLL", 0.01)
    monkeypatch.setattr(plugin_process, "is_of_other_version", lambda host: False)
    command = ["sh", "-c", "while :; do sleep 0.05; done", "sh", f"{plugin_process.ARGUMENT}vm"]
    monkeypatch.setattr(PluginProcess, "_command", lambda self: command)
    yield PluginProcess("vm", str(tmp_path / "log"))
    plugin_process.stop("vm")


def test_a_process_that_uses_another_store_or_engine_is_replaced(
    one: PluginProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not plugin_process.has_other_settings("vm")
    one._launch()
    first = plugin_process.running("vm")
    one._launch()
    assert plugin_process.running("vm") == first is not None
    monkeypatch.setenv("DOCKER_HOST", "unix:///run/other.sock")
    one._launch()
    second = plugin_process.running("vm")
    assert second not in (first, None) and proc.strings(second or 0, "environ").count("ETCD_ENDPOINTS=http://a:1") == 1
    monkeypatch.setenv("ETCD_ENDPOINTS", "http://b:1")
    assert plugin_process.has_other_settings("vm")


def test_what_the_process_reads_from_the_file_is_no_other_setting(
    one: PluginProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALICO_ENV_FILE", str(tmp_path / "node.env"))
    monkeypatch.delenv("ETCD_ENDPOINTS")
    one._launch()
    (tmp_path / "node.env").write_text("ETCD_ENDPOINTS=http://c:1\n")
    monkeypatch.setenv("ETCD_ENDPOINTS", "http://c:1")  # as of the next agent
    assert not plugin_process.has_other_settings("vm")
    monkeypatch.setenv("ETCD_ENDPOINTS", "http://d:1")
    assert plugin_process.has_other_settings("vm")


def test_a_command_waits_for_the_end_of_another_version(one: PluginProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin_process.await_replacement("vm")
    one._launch()
    plugin_process.await_replacement("vm")
    monkeypatch.setattr(plugin_process, "is_of_other_version", lambda host: True)
    waiting = threading.Thread(target=plugin_process.await_replacement, args=("vm",), daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    plugin_process.stop("vm")
    waiting.join(5)
    assert not waiting.is_alive()


def test_none_is_started_while_another_process_serves(one: PluginProcess) -> None:
    one._launch()
    before = plugin_process.running("vm")
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(plugin_process.SOCKET))
        theirs.listen()
        assert plugin_process.served_elsewhere()
        launching = threading.Thread(target=one._launch, daemon=True)
        launching.start()
        wait_for(lambda: plugin_process.running("vm") is None, "the end of the one that is not reached any more")
        assert launching.is_alive()
    launching.join(10)
    assert plugin_process.running("vm") not in (before, None)
    assert os.path.exists(plugin_process.SOCKET) and not plugin_process.served_elsewhere()
