"""What Prometheus can ask the agent, on loopback, where a port was given for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from typing import TYPE_CHECKING, Any

from calicoctl.errors import CalicoError

if TYPE_CHECKING:
    from calicoctl.felix.report import Health

ADDRESS = "127.0.0.1"


class _NoTimer:
    def time(self) -> AbstractContextManager[None]:
        return nullcontext()


class Metrics:
    """The metrics, served on a port of loopback; without a port, nothing is measured or served."""

    def __init__(self, health: Health, port: int | None) -> None:
        self.apply_time: Any = _NoTimer()
        if port is None:
            return
        from prometheus_client import CollectorRegistry, Histogram, make_wsgi_app

        from calicoctl.felix.metrics_server import serve

        registry = CollectorRegistry()
        registry.register(_HealthCollector(health))
        self.apply_time = Histogram(
            "calico_felix_apply_seconds", "Time taken to bring the kernel up to date.", registry=registry
        )
        try:
            serve(make_wsgi_app(registry), ADDRESS, port)
        except OSError as error:
            raise CalicoError(f"--metrics-port={port}: cannot listen on {ADDRESS}: {error.strerror}") from None


class _HealthCollector:
    """Turns what the agent knows of itself into metrics when somebody asks."""

    def __init__(self, health: Health) -> None:
        self._health = health

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        endpoints = GaugeMetricFamily("calico_felix_endpoints", "Endpoints of this host by status.", labels=["status"])
        for status, count in self._health.counts().items():
            endpoints.add_metric([status], count)
        yield endpoints
        yield CounterMetricFamily(
            "calico_felix_resyncs", "Times that the store was read anew after the start.", self._health.resyncs
        )
        yield CounterMetricFamily(
            "calico_felix_healed", "Interfaces given back to workloads that had lost theirs.", self._health.healed
        )
        yield CounterMetricFamily(
            "calico_felix_collected", "Workloads forgotten, and leftovers of cut commands.", self._health.collected
        )
        yield GaugeMetricFamily(
            "calico_felix_store_reachable",
            "1 while the store can be read, written and followed.",
            int(self._health.store_works),
        )
        last = self._health.last_error
        yield GaugeMetricFamily(
            "calico_felix_last_error_timestamp_seconds",
            "When something went wrong last; 0 for never.",
            datetime.fromisoformat(last["time"].replace("Z", "+00:00")).timestamp() if last else 0,
        )
