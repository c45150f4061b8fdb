"""What the agent says of itself: to the store, for all hosts; to a file, for this one; to Prometheus, if asked to.

The store gets the status of each endpoint, and a heartbeat (heartbeat.py). The file has all of that and the reasons,
and can be read when the store is away. Statuses are written by a thread of their own: a slow store holds nothing up.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from calicoctl import files
from calicoctl.datastore.keys import EndpointId
from calicoctl.desired.snapshot import INACTIVE
from calicoctl.errors import CalicoError, StoreError, StoreUnavailable, is_shortage
from calicoctl.felix import events
from calicoctl.felix.heartbeat import INTERVAL, Heartbeat, Identity, now, replaced
from calicoctl.workloads.upkeep import COLLECTED, REATTACHED, Action

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from calicoctl.datastore.client import DatastoreClient

log = logging.getLogger("calico.felix")

PATIENCE = 6.0
"""Seconds for which a store that answers, but can do nothing, is asked again before it is reported that it is away."""

FILE_INTERVAL = 5.0
"""Seconds after which the report is written anew although nothing has changed, by the agent's next tick: its age tells
that the agent works."""

END_PATIENCE = 5.0
"""Seconds that the last of the reports may take; the heartbeat expires in any case."""


@dataclass(frozen=True)
class Status:
    """What became of an endpoint: "up", "down" or "error", of which record (its index in the store), and why.

    `workload_name` is what that record says its container is called.
    """

    status: str
    index: int
    reason: str | None = None
    workload_name: str | None = None

    @property
    def is_stopped(self) -> bool:
        """Whether its workload is stopped, which is nothing wrong."""
        return self.reason == INACTIVE

    def to_json(self) -> str:
        reason = {} if self.reason is None else {"reason": self.reason}
        return json.dumps({"status": self.status, "index": self.index, **reason})


class Ability:
    """Whether the store can be read, say: since when, and why not. It can when all who are to try it have succeeded."""

    def __init__(self, users: Iterable[str]) -> None:
        self._untried = set(users)
        self._failing: dict[str, str] = {}
        self.since = now()

    @property
    def works(self) -> bool | None:
        """Whether it does, None while that is not known."""
        return False if self._failing else None if self._untried else True

    @property
    def error(self) -> str | None:
        return next(iter(self._failing.values()), None)

    def succeeded(self, user: str) -> bool:
        """Note that it works for a user; tell whether that makes it work."""
        before = self.works
        self._untried.discard(user)
        self._failing.pop(user, None)
        if before is self.works or not self.works:
            return False
        self.since = now()
        return True

    def failed(self, user: str, why: str, since: str) -> bool:
        """Note that it does not work for a user since a time; tell whether that is news."""
        before = self.works
        self._untried.discard(user)
        self._failing.pop(user, None)
        self._failing = {user: why, **self._failing}  # the newest reason is shown
        if before is False:
            return False
        self.since = since
        return True

    def to_dict(self) -> dict[str, Any]:
        return {"works": self.works, "since": self.since, "error": self.error}


@dataclass
class Health:
    """What the agent knows of itself."""

    host: str
    version: str
    options: dict[str, Any] = field(default_factory=dict)
    """How it was started: where it logs to, its port for Prometheus, whether it looks after an etcd of the host's."""
    followed: frozenset[str] = frozenset()
    """The directories of the store that it reads and watches."""
    pid: int = field(default_factory=os.getpid)
    since: str = field(default_factory=now)
    started: float = field(default_factory=time.monotonic)
    first_update: bool = False
    waiting_for: str | None = None
    replaced: str | None = None
    """The sentence that says which other agent has this host's status, and so its records; None while none has."""
    unknown_interfaces: list[str] = field(default_factory=list)
    """Interfaces `cali…` here that no record of this host knows."""
    endpoints: dict[EndpointId, Status] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    """What is wrong with keys of the store."""
    troubles: dict[str, dict[str, str]] = field(default_factory=dict)
    """What is wrong with the host, by subject, until it is put right: since when, and why."""
    last_error: dict[str, str] | None = None
    resyncs: int = 0
    healed: int = 0
    """Interfaces given back to workloads that had lost theirs."""
    collected: int = 0
    """Workloads forgotten, and leftovers of commands that were cut short."""

    def __post_init__(self) -> None:
        self.reads = Ability(self.followed)
        self.watch = Ability(self.followed)
        self.writes = Ability(["statuses"])

    @property
    def store_works(self) -> bool:
        """Whether the store can be read, written and followed."""
        return all(ability.works for ability in (self.reads, self.writes, self.watch))

    def count(self, act: Action) -> None:
        """Count something that was done for a workload."""
        self.healed += act.kind == REATTACHED
        self.collected += act.kind == COLLECTED

    def error(self, sentence: str) -> None:
        """Remember what went wrong last, and log it."""
        log.error("%s", sentence)
        self.last_error = {"time": now(), "error": sentence}

    def trouble(self, trouble: events.Failure) -> None:
        """Note what could not be done; one with a subject until it is told that it is put right."""
        if trouble.subject is None:
            self.error(trouble.why or "")
            return
        before = self.troubles.get(trouble.subject)
        if trouble.why is None:
            self.troubles.pop(trouble.subject, None)
        elif before is None or before["error"] != trouble.why:
            self.troubles[trouble.subject] = {"since": before["since"] if before else now(), "error": trouble.why}
            self.error(trouble.why)

    def counts(self) -> dict[str, int]:
        """Return how many endpoints are in which state; those that are stopped are down, too."""
        counts = {"up": 0, "down": 0, "error": 0, "stopped": 0}
        for status in list(self.endpoints.values()):  # a thread of the metrics' asks, too
            counts[status.status] += 1
            counts["stopped"] += status.is_stopped
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
            "replaced": self.replaced,
            "etcd": {
                "reachable": self.store_works,
                "since": max(ability.since for ability in (self.reads, self.writes, self.watch)),
                "error": self.reads.error or self.watch.error or self.writes.error,
                "reads": self.reads.to_dict(),
                "writes": self.writes.to_dict(),
                "watch": self.watch.to_dict(),
            },
            "endpoints": self.counts(),
            "endpoints_in_trouble": [
                {
                    "orchestrator": id.orchestrator,
                    "workload": id.workload,
                    "workload_name": status.workload_name,
                    "endpoint": id.endpoint,
                    "status": status.status,
                    "reason": status.reason,
                }
                for id, status in sorted(
                    (item for item in self.endpoints.items() if item[1].reason and not item[1].is_stopped),
                    key=lambda item: item[0].endpoint,
                )
            ],
            "unknown_interfaces": self.unknown_interfaces,
            "problems": [{"key": key, "problem": self.problems[key]} for key in sorted(self.problems)],
            "troubles": [{"subject": subject, **self.troubles[subject]} for subject in sorted(self.troubles)],
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
        self._file: IO[bytes] | None = None
        """What was written last, kept open: where no other file can be, the report must still say so."""
        self._written: dict[str, Any] = {}
        self._written_at = float("-inf")

    @property
    def is_due(self) -> bool:
        """Whether it is to be written even if nothing has changed."""
        return time.monotonic() >= self._written_at + FILE_INTERVAL

    def write(self, health: Health) -> None:
        """Bring the file up to date; a disk that is full is logged, and nothing more."""
        report = health.to_dict()
        if report == self._written and not self.is_due:
            return
        # the clock of the time since boot: that of the day may jump
        text = json.dumps({**report, "report": {"time": now(), "clock": time.clock_gettime(time.CLOCK_MONOTONIC)}})
        try:
            self._replace(text.encode())
            self._written, self._written_at = report, time.monotonic()
        except OSError as error:
            log.error("%s cannot be written: %s", self._path, error.strerror)

    def _replace(self, data: bytes) -> None:
        try:
            file = files.replace(self._path, data, 0o644)  # for everybody
        except OSError as error:
            if self._file is None or not is_shortage(error):
                raise
            os.pwrite(self._file.fileno(), data, 0)  # who reads at this very moment tries again
            self._file.truncate(len(data))
            return
        if self._file is not None:
            self._file.close()
        self._file = file


class StoreReporter(threading.Thread):
    """Keeps the statuses in the store like those it was given last, unless another agent reports for this host."""

    def __init__(self, datastore: DatastoreClient, health: Health, tell: Callable[[Any], None]) -> None:
        """`tell` takes whether they could be written (StoreWritten, StoreNotWritten), other trouble (Failure), and
        that another agent has begun to report for this host, or does so no more (Replaced).
        """
        super().__init__(name="reporting", daemon=True)
        self._datastore = datastore
        self._health = health
        self._tell = tell
        self._heartbeat = Heartbeat(datastore)
        self._replaced_by: Identity | None = None
        self._lock = threading.Lock()
        self._wanted: dict[EndpointId, str] = {}
        self._changed: set[EndpointId] = set()
        self._written: dict[EndpointId, str] | None = None
        self._wake = threading.Event()
        self._alive = True
        self._written_last = now()
        self._away: events.StoreNotWritten | None = events.StoreNotWritten("nothing has been written yet", "")
        self._refused: str | None = None

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

    def beat_soon(self) -> None:
        """Have the next heartbeat come soon, which says something new."""
        self._beaten = 0.0
        self._wake.set()

    def run(self) -> None:
        self._beaten = 0.0
        ending = False
        while not ending:
            self._wake.wait(max(0.1, min(INTERVAL, self._beaten + INTERVAL - time.monotonic())))
            self._wake.clear()
            ending = not self._alive
            try:
                if time.monotonic() >= self._beaten + INTERVAL:
                    self._beat()
                    self._beaten = time.monotonic()
                if self._health.first_update and self._replaced_by is None:
                    self._write_endpoints()
                self._note(None)
            except Exception as error:  # of whatever kind: to end would leave the host without a sign of life
                self._note(error)
                time.sleep(1)  # and again, with what has changed meanwhile
                self._wake.set()
        try:
            self._heartbeat.end()
        except CalicoError as error:
            log.warning("the host's status cannot be removed: %s", error)

    def _beat(self) -> None:
        replaced_by = self._heartbeat.beat(
            {
                "time": now(),
                "uptime": round(time.monotonic() - self._health.started, 1),
                "first_update": self._health.first_update,
            }
        )
        if replaced_by != self._replaced_by:
            self._replaced_by = replaced_by
            why = None if replaced_by is None else replaced(self._datastore, replaced_by)
            self._tell(events.Replaced(why))

    def _note(self, error: Exception | None) -> None:
        """Tell what has changed: whether the store can be written, and whether it takes all statuses."""
        away, refused = None, None
        if isinstance(error, StoreError):
            away = events.StoreNotWritten(str(error), self._written_last)
        else:
            self._written_last = now()
            refused = None if error is None else f"statuses cannot be written: {error}"
        if away != self._away:
            self._tell(away or events.StoreWritten())
        if refused != self._refused:
            self._tell(events.Failure(refused, "statuses"))
        self._away, self._refused = away, refused

    def end(self) -> None:
        """Write what there is to write, and take the heartbeat away, if the store is not too slow for that."""
        self._alive = False
        self._wake.set()
        self.join(END_PATIENCE)

    def _write_endpoints(self) -> None:
        """Write what has changed; raise what went wrong last, but for a store that is away, after all were tried."""
        refused: dict[EndpointId, CalicoError] = {}
        with self._lock:
            written = self._written
        if written is None:
            written = self._datastore.statuses.of_endpoints()
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
                    self._datastore.statuses.report_endpoint(id, None)
                    written.pop(id, None)
                elif status is not None and written.get(id) != status:
                    self._datastore.statuses.report_endpoint(id, status)
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
