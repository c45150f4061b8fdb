"""What the agent says of itself: to the store, for all hosts; to a file, for this one; to Prometheus, if asked to.

The store gets the status of each endpoint, and a sign of life that expires. The file has all of that and the reasons,
and can be read when the store is away. Statuses are written by a thread of their own: a slow store holds nothing up.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calicoctl.datastore.keys import EndpointId
from calicoctl.errors import CalicoError, StoreUnavailable
from calicoctl.upkeep import COLLECTED, HEALED, Act

if TYPE_CHECKING:
    from calicoctl.datastore.client import DatastoreClient

log = logging.getLogger("calico.felix")

INTERVAL = 10.0
"""Seconds between two signs of life."""

TIME_TO_LIVE = 30
"""Seconds after which a sign of life expires."""


END_PATIENCE = 5.0
"""Seconds that the last of the reports may take; the sign of life expires in any case."""


@dataclass(frozen=True)
class Status:
    """What became of an endpoint: "up", "down" or "error", of which record (its index in the store), and why."""

    status: str
    index: int
    reason: str | None = None

    def to_json(self) -> str:
        reason = {} if self.reason is None else {"reason": self.reason}
        return json.dumps({"status": self.status, "index": self.index, **reason})


def now() -> str:
    """Return the time, as ISO 8601 has it, in UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class Health:
    """What the agent knows of itself."""

    host: str
    version: str
    options: dict[str, Any] = field(default_factory=dict)
    """How it was started: where it logs to, its port for Prometheus, whether it looks after an etcd of the host's."""
    pid: int = field(default_factory=os.getpid)
    since: str = field(default_factory=now)
    started: float = field(default_factory=time.monotonic)
    first_update: bool = False
    store_away: dict[str, str] = field(default_factory=dict)
    """Why the store cannot be followed, by directory; empty while it can."""
    store_since: str = field(default_factory=now)
    waiting_for: str | None = None
    endpoints: dict[EndpointId, Status] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    last_error: dict[str, str] | None = None
    resyncs: int = 0
    healed: int = 0
    """Interfaces given back to workloads that had lost theirs."""
    collected: int = 0
    """Workloads forgotten, and leftovers of commands that were cut short."""

    def count(self, act: Act) -> None:
        """Count something that was done for a workload."""
        self.healed += act.kind == HEALED
        self.collected += act.kind == COLLECTED

    def error(self, sentence: str) -> None:
        """Remember what went wrong last, and log it."""
        log.error("%s", sentence)
        self.last_error = {"time": now(), "error": sentence}

    def counts(self) -> dict[str, int]:
        counts = {"up": 0, "down": 0, "error": 0}
        for status in list(self.endpoints.values()):  # a thread of the metrics' asks, too
            counts[status.status] += 1
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Return what `calicoctl status` tells."""
        return {
            "host": self.host,
            "version": self.version,
            "pid": self.pid,
            "running_since": self.since,
            **self.options,
            "first_update": self.first_update,
            "waiting_for": self.waiting_for,
            "etcd": {
                "reachable": not self.store_away,
                "since": self.store_since,
                "error": next(iter(self.store_away.values()), None),
            },
            "endpoints": self.counts(),
            "endpoints_in_trouble": [
                {
                    "orchestrator": id.orchestrator,
                    "workload": id.workload,
                    "endpoint": id.endpoint,
                    "status": status.status,
                    "reason": status.reason,
                }
                for id, status in sorted(
                    (item for item in self.endpoints.items() if item[1].reason is not None),
                    key=lambda item: item[0].endpoint,
                )
            ],
            "problems": [{"key": key, "problem": self.problems[key]} for key in sorted(self.problems)],
            "last_error": self.last_error,
            "resyncs": self.resyncs,
            "healed": self.healed,
            "collected": self.collected,
            "bgp_sessions": [],
        }


class ReportFile:
    """The file that `calicoctl status` reads. Anybody may."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written = ""

    def write(self, health: Health) -> None:
        """Bring the file up to date; a disk that is full is logged, and nothing more."""
        text = json.dumps(health.to_dict())
        if text == self._written:
            return
        new = self._path.with_suffix(".new")
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644), "w") as file:
                os.fchmod(file.fileno(), 0o644)  # for everybody, whatever the umask
                file.write(text)
            new.rename(self._path)
            self._written = text
        except OSError as error:
            log.error("%s cannot be written: %s", self._path, error.strerror)


class StoreReporter(threading.Thread):
    """Keeps the statuses in the store like those it was given last."""

    def __init__(self, datastore: DatastoreClient, health: Health) -> None:
        super().__init__(name="reporting", daemon=True)
        self._datastore = datastore
        self._health = health
        self._lock = threading.Lock()
        self._wanted: dict[EndpointId, str] = {}
        self._changed: set[EndpointId] = set()
        self._written: dict[EndpointId, str] | None = None
        self._wake = threading.Event()
        self._alive = True

    def set(self, statuses: dict[EndpointId, Status | None]) -> None:
        """Take in new statuses; None for an endpoint that is no more."""
        with self._lock:
            for id, status in statuses.items():
                if status is None:
                    self._wanted.pop(id, None)
                else:
                    self._wanted[id] = status.to_json()
                self._changed.add(id)
        self._wake.set()

    def read_again(self) -> None:
        """Compare with what the store has, which may not be what was written: it has been away."""
        with self._lock:
            self._written = None
        self._wake.set()

    def sign_of_life(self) -> None:
        """Say soon that the agent is alive."""
        self._signed = 0.0
        self._wake.set()

    def run(self) -> None:
        self._signed = 0.0
        failed = False
        ending = False
        while not ending:
            self._wake.wait(max(0.1, min(INTERVAL, self._signed + INTERVAL - time.monotonic())))
            self._wake.clear()
            ending = not self._alive
            try:
                if time.monotonic() >= self._signed + INTERVAL:
                    self._datastore.report_host(
                        {
                            "time": now(),
                            "uptime": round(time.monotonic() - self._health.started, 1),
                            "first_update": self._health.first_update,
                        },
                        TIME_TO_LIVE,
                    )
                    self._signed = time.monotonic()
                if self._health.first_update:
                    self._write_endpoints()
                failed = False
            except CalicoError as error:
                if not failed:
                    self._health.error(f"statuses cannot be written: {error}")
                failed = True
                time.sleep(1)  # and again, with what has changed meanwhile
                self._wake.set()
        try:
            self._datastore.report_host(None)
        except CalicoError as error:
            log.warning("the agent's sign of life cannot be removed: %s", error)

    def end(self) -> None:
        """Write what there is to write, and take the sign of life away, if the store is not too slow for that."""
        self._alive = False
        self._wake.set()
        self.join(END_PATIENCE)

    def _write_endpoints(self) -> None:
        """Write what has changed; raise what went wrong last, but for a store that is away, after all were tried."""
        refused: dict[EndpointId, CalicoError] = {}
        with self._lock:
            written = self._written
        if written is None:
            written = self._datastore.endpoint_statuses()
            with self._lock:
                self._written = written
                self._changed = set(self._wanted) | set(written)
        while True:
            with self._lock:
                if not self._changed:
                    break
                id = self._changed.pop()
                status = self._wanted.get(id)
            try:
                if status is None and id in written:
                    self._datastore.report_endpoint(id, None)
                    written.pop(id, None)
                elif status is not None and written.get(id) != status:
                    self._datastore.report_endpoint(id, status)
                    written[id] = status
            except StoreUnavailable:
                with self._lock:
                    self._changed |= {id, *refused}
                raise
            except CalicoError as error:
                refused[id] = error
        if refused:
            with self._lock:
                self._changed |= refused.keys()
            raise next(iter(refused.values()))
