"""The metrics that the agent serves to Prometheus, on loopback, if `--metrics-port` is set."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from typing import TYPE_CHECKING, Any

from calicoctl import proc

if TYPE_CHECKING:
    from calicoctl.felix.dataplane.drops_manager import Counted
    from calicoctl.felix.events import BgpChanged
    from calicoctl.felix.health import Health

ADDRESS = "127.0.0.1"


class _NoTimer:
    def time(self) -> AbstractContextManager[None]:
        return nullcontext()


class Metrics:
    """Serves the metrics on a TCP port of loopback. If `port` is None, nothing is measured or served.

    `apply_time.time()` returns a context manager that measures how long programming the kernel takes. `drops` is called
    at each scrape, in another thread. If the port cannot be bound, that is a failure of the host until `serve` has
    bound it: any user may have taken the port, and must not keep the agent from running by that.
    """

    def __init__(self, health: Health, port: int | None, drops: Callable[[], Iterable[Counted]] = tuple) -> None:
        self.apply_time: Any = _NoTimer()
        self._health, self._port = health, port
        self._app: Any = None
        """The WSGI application that is not served yet."""
        if port is None:
            return
        from prometheus_client import CollectorRegistry, Histogram, make_wsgi_app

        registry = CollectorRegistry()
        registry.register(_HealthCollector(health, drops))
        self.apply_time = Histogram(
            "calico_felix_apply_seconds", "Time taken to program the kernel.", registry=registry
        )
        self._app = make_wsgi_app(registry)
        self.serve()

    def serve(self) -> None:
        """Serve the metrics if they are to be served, and are not yet."""
        if self._app is None or self._port is None:
            return
        from calicoctl.felix import metrics_server
        from calicoctl.felix.events import Failure

        why = None
        try:
            metrics_server.serve(self._app, ADDRESS, self._port)
            self._app = None
        except OSError as error:
            holder = proc.port_holder("tcp", self._port) if error.errno == errno.EADDRINUSE else None
            why = f"--metrics-port={self._port}: cannot listen on {ADDRESS}: {error.strerror}"
            why += f" (by {holder})" if holder else ""
        self._health.record(Failure(why, "metrics"))


class _HealthCollector:
    """Turns the agent's health, and what the kernel has counted, into metrics at each scrape."""

    def __init__(self, health: Health, drops: Callable[[], Iterable[Counted]]) -> None:
        self._health = health
        self._drops = drops

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        endpoints = GaugeMetricFamily("calico_felix_endpoints", "Endpoints of this host by status.", labels=["status"])
        for status, count in self._health.counts().items():
            endpoints.add_metric([status], count)
        yield endpoints
        yield CounterMetricFamily(
            "calico_felix_resyncs", "Resyncs with the store since the start.", self._health.resyncs
        )
        # the name is fixed: dashboards rely on it
        yield CounterMetricFamily("calico_felix_healed", "Workloads that were re-attached.", self._health.reattached)
        yield CounterMetricFamily(
            "calico_felix_collected",
            "Garbage-collected workloads and leftovers of commands.",
            self._health.collected,
        )
        yield CounterMetricFamily(
            "calico_felix_refused_connections",
            "Packets of new connections that were dropped, since their endpoint had, or started, too many.",
            self._health.refused_connections,
        )
        dropped = CounterMetricFamily(
            "calico_felix_dropped_packets",
            "Packets of endpoints of this host that were dropped.",
            labels=["endpoint", "direction", "reason"],
        )
        for one in self._drops():
            dropped.add_metric([one.endpoint, one.direction, one.reason], one.packets)
        yield dropped
        yield GaugeMetricFamily(
            "calico_felix_store_reachable",
            "1 while the store can be read, written and followed.",
            int(self._health.store.works),
        )
        yield GaugeMetricFamily(
            "calico_felix_failures",
            "Failures that last: of this host, and of its containers that cannot be connected as their labels ask.",
            len(self._health.failures) + len(self._health.labels_failed),
        )
        yield from self._bgp(self._health.bgp)
        last = self._health.last_error
        yield GaugeMetricFamily(
            "calico_felix_last_error_timestamp_seconds",
            "Time of the last error; 0 for none.",
            datetime.fromisoformat(last["time"].replace("Z", "+00:00")).timestamp() if last else 0,
        )

    def _bgp(self, bgp: BgpChanged) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        yield GaugeMetricFamily(
            "calico_felix_bgp_sessions_configured", "BGP sessions that BIRD has.", len(bgp.sessions)
        )
        up = sum(session.is_up for session in bgp.sessions)
        yield GaugeMetricFamily("calico_felix_bgp_sessions_up", "BGP sessions that are established.", up)
        routes = GaugeMetricFamily("calico_felix_bgp_routes", "Routes of all BGP sessions.", labels=["direction"])
        routes.add_metric(["in"], sum(session.imported for session in bgp.sessions))
        routes.add_metric(["out"], sum(session.exported for session in bgp.sessions))
        yield routes
        yield CounterMetricFamily(
            "calico_felix_bgp_bird_restarts", "How often BIRD was started again since the agent's start.", bgp.restarts
        )
        yield CounterMetricFamily(
            "calico_felix_bgp_refused_configurations", "Configurations that BIRD has refused.", bgp.refusals
        )
