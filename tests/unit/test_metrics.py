"""The metrics about BGP, as a scrape shows them."""

from __future__ import annotations

import os
import socket
import urllib.request
from wsgiref.util import setup_testing_defaults

import pytest

from calicoctl.felix import events, metrics_server
from calicoctl.felix.bgp.bird import Session
from calicoctl.felix.dataplane.drops_manager import Counted
from calicoctl.felix.health import Health
from calicoctl.felix.metrics import Metrics


def test_sessions_routes_restarts_and_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    monkeypatch.setattr(metrics_server, "serve", lambda app, address, port: served.append(app))
    health = Health("host1", "1")
    Metrics(health, 9091)
    sessions = (
        Session("mesh4_192_0_2_1", "mesh", "192.0.2.1", "1", "Established", "", 3, 2),
        Session("mesh4_192_0_2_2", "mesh", "192.0.2.2", "1", "Established", "", 1, 2),
        Session("mesh4_192_0_2_3", "mesh", "192.0.2.3", "1", "Connect", ""),
    )
    health.bgp = events.BgpChanged(True, 7, True, sessions, restarts=2, refusals=1)
    environ: dict[str, object] = {}
    setup_testing_defaults(environ)
    lines = b"".join(served[0](environ, lambda *_: None)).decode().splitlines()
    assert [line for line in lines if line.startswith("calico_felix_bgp_")] == [
        "calico_felix_bgp_sessions_configured 3.0",
        "calico_felix_bgp_sessions_up 2.0",
        'calico_felix_bgp_routes{direction="in"} 4.0',
        'calico_felix_bgp_routes{direction="out"} 4.0',
        "calico_felix_bgp_bird_restarts_total 2.0",
        "calico_felix_bgp_refused_configurations_total 1.0",
    ]


def test_a_port_that_somebody_else_has_is_taken_once_it_is_free() -> None:
    health = Health("host1", "1")
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        metrics = Metrics(health, port)
        metrics.serve()
        why = health.failures["metrics"]["error"]
        assert f"--metrics-port={port}" in why and f"(by process {os.getpid()} (" in why
    metrics.serve()
    assert not health.failures
    metrics.serve()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        assert b"calico_felix_failures 0.0" in answer.read()


def test_failures_while_they_last(monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    monkeypatch.setattr(metrics_server, "serve", lambda app, address, port: served.append(app))
    health = Health("host1", "1")
    Metrics(health, 9091)

    def failures() -> str:
        environ: dict[str, object] = {}
        setup_testing_defaults(environ)
        lines = b"".join(served[0](environ, lambda *_: None)).decode().splitlines()
        (line,) = (line for line in lines if line.startswith("calico_felix_failures "))
        return line.split()[1]

    assert failures() == "0.0"
    health.record(events.Failure("BIRD does not run", events.BGP))
    health.record(events.Failure("once"))
    health.record_labels(events.LabelsFailed("1" * 64, "web", "there is no such address"))
    assert failures() == "2.0"
    health.record(events.Failure(None, events.BGP))
    assert failures() == "1.0"


def test_drops_of_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    monkeypatch.setattr(metrics_server, "serve", lambda app, address, port: served.append(app))
    Metrics(Health("host1", "1"), 9091, lambda: [Counted("e1", "inbound", "rule", 7)])
    environ: dict[str, object] = {}
    setup_testing_defaults(environ)
    lines = b"".join(served[0](environ, lambda *_: None)).decode().splitlines()
    expected = 'calico_felix_dropped_packets_total{direction="inbound",endpoint="e1",reason="rule"} 7.0'
    assert expected in lines
