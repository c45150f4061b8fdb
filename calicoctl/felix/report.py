"""Publishes the agent's health (health.py): in files, for `calicoctl status`, and in the store, for all hosts.

The files contain the number of endpoints by status, the endpoints in trouble, and the failures of the host. They can be
read while the store is unreachable.

A thread writes the host's heartbeat (heartbeat.py) and the status of each endpoint to the store, so a slow store does
not delay the agent's loop. If the store has leases, the host's status and the endpoints' statuses are attached to one
lease, which each heartbeat renews.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from calicoctl import files
from calicoctl.clock import now
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.statuses import agent_store
from calicoctl.errors import CalicoError, StoreError, StoreUnavailable, is_shortage
from calicoctl.felix import events, process
from calicoctl.felix.health import Health, Status
from calicoctl.felix.heartbeat import FROZEN_INTERVAL, INTERVAL, TIME_TO_LIVE, Heartbeat, Identity, replaced

if TYPE_CHECKING:
    from collections.abc import Callable

    from calicoctl.datastore.client import DatastoreClient
    from calicoctl.desired.snapshot import Snapshot

log = logging.getLogger("calico.felix")

PATIENCE = 6.0
"""Seconds for which requests are retried if the store answers with errors. Then it is reported as unavailable."""

FILE_INTERVAL = 5.0
"""Seconds after which the files are written although nothing has changed: their age shows that the agent is alive."""

LONG = 0.02
"""Seconds of CPU time. A report that takes longer, as with thousands of endpoints in error, is made less often."""

AT_ONCE = 50
"""The maximum number of statuses in one request."""

ERRORS_AT_ONCE = 50
"""The maximum number of statuses `error` that are written per second, so that other writes are not delayed."""

END_PATIENCE = 5.0
"""Seconds for which the agent's end waits for the last writes."""


class ReportFile:
    """The two files that `calicoctl status` reads.

    Every user may read the first file, which lacks texts that may quote the store (see Health.public). Only root may
    read the second file, which contains the whole report.
    """

    def __init__(self, path: Path) -> None:
        self._public = _Replaceable(path, 0o644)
        self._private = _Replaceable(process.private(path), 0o600)
        self._written: dict[str, Any] = {}
        self._written_at = float("-inf")
        self._rests_until = float("-inf")
        self.due_at: float | None = None
        """When a change that is not in the file yet must be written (monotonic); None if there is no such change."""

    @property
    def is_due(self) -> bool:
        """Whether the files must be written even if nothing has changed."""
        return time.monotonic() >= self._written_at + FILE_INTERVAL

    def write(self, health: Health, at_once: bool = False) -> None:
        """Write both files if the report has changed, or if `is_due` is True. An OSError is only logged.

        If it takes longer than LONG to make a report, no other report is made for ten times as long. A call during this
        time does nothing but set `due_at` to the end of this time, unless `at_once` is True.
        """
        self.due_at = self._rests_until
        if time.monotonic() < self._rests_until and not at_once:
            return
        self.due_at = None
        began = time.thread_time()
        report = health.to_dict()
        took = time.thread_time() - began
        self._rests_until = time.monotonic() + (10 * took if took > LONG else 0)
        if report == self._written and not self.is_due:
            return
        # the monotonic clock, to measure the age with: the time of day may jump
        times = {"time": now(), "clock": time.clock_gettime(time.CLOCK_MONOTONIC)}
        try:
            self._private.write(json.dumps({**report, "report": times}).encode())
            self._public.write(json.dumps({**health.public(report), "report": times}).encode())
            self._written, self._written_at = report, time.monotonic()
        except OSError as error:
            log.error("the report cannot be written: %s", error)


class _Replaceable:
    """A file that is replaced as a whole. If this process cannot open more files, it is overwritten in place."""

    def __init__(self, path: Path, mode: int) -> None:
        self._path = path
        self._mode = mode
        self._file: IO[bytes] | None = None
        """The current file, kept open, so that it can be overwritten."""

    def write(self, data: bytes) -> None:
        """Replace the file's content. Raises OSError."""
        try:
            file = files.replace(self._path, data, self._mode)
        except OSError as error:
            if self._file is None or not is_shortage(error):
                raise
            os.pwrite(self._file.fileno(), data, 0)  # a reader that finds the file half-written retries
            self._file.truncate(len(data))
            return
        if self._file is not None:
            self._file.close()
        self._file = file


class EndpointStatuses:
    """Collects the statuses that are set during one round of the agent, and publishes them together."""

    def __init__(
        self,
        snapshot: Snapshot,
        health: Health,
        report: Callable[[dict[EndpointId, Status | None]], None],
        removed: Callable[[EndpointId], None],
    ) -> None:
        """`report` is called with the statuses that have changed, None for an endpoint that was deleted.

        `removed` is called with the id of each endpoint that was deleted.
        """
        self._snapshot = snapshot
        self._health = health
        self._report = report
        self._removed = removed
        self._set: dict[EndpointId, Status | None] = {}

    def set(self, id: EndpointId, status: Status | None) -> None:
        """Set the status of an endpoint for the next `publish`; None for an endpoint that was deleted."""
        self._set[id] = status

    def publish(self) -> None:
        """Report and log those statuses set since the last call that differ from the statuses published before."""
        changed: dict[EndpointId, Status | None] = {}
        statuses, self._set = self._set, {}
        for id, status in statuses.items():
            before = self._health.endpoints.get(id)
            record = self._snapshot.endpoints.get(id)
            if status is not None and record is not None:
                status = replace(status, workload_name=record.workload_name)
            if status == before:
                continue
            changed[id] = status
            if status is None:
                self._health.endpoints.pop(id, None)
                log.info("endpoint %s was deleted", id.endpoint)
                self._removed(id)
                continue
            self._health.endpoints[id] = status
            if before is None or (before.status, before.reason) != (status.status, status.reason):
                text = f"endpoint {id.endpoint} of {id.orchestrator} {id.workload} is {status.status}"
                text += f": {status.reason}" if status.reason else ""
                if status.status == "error":
                    self._health.error(text)
                else:
                    log.info("%s", text)
        if changed:
            self._report(changed)


class StoreReporter(threading.Thread):
    """The thread that writes the heartbeat, the statuses of endpoints, and this host's MACs to the store.

    A write that fails is retried. While another agent reports for this host, the thread writes none of these.
    """

    def __init__(self, datastore: DatastoreClient, health: Health, put: Callable[[Any], None]) -> None:
        """`put` is called with the events WritesRecovered, WritesFailed, Replaced and Failure.

        A Failure says that the store refuses a status; if its `why` is None, the store does not refuse any status now.
        """
        super().__init__(name="reporting", daemon=True)
        self._datastore = datastore
        self._health = health
        self._put = put
        self._heartbeat = Heartbeat(datastore)
        self._replaced_by: Identity | None = None
        self._lock = threading.Lock()
        self._desired: dict[EndpointId, str] = {}
        self._changed: set[EndpointId] = set()
        self._errors: set[EndpointId] = set()
        """The endpoints that have changed to `error`. They are written after the others, ERRORS_AT_ONCE at a time."""
        self._errors_at = 0.0
        """When the next of `_errors` may be written (monotonic)."""
        self._written: dict[EndpointId, str] | None = None
        self._hanging: set[EndpointId] = set()
        """The endpoints whose statuses were written since the heartbeat last began (see Heartbeat.has_begun)."""
        self._macs: frozenset[str] | None = None
        """The MACs of this host that are still to be written; None if there are none."""
        self._wake = threading.Event()
        self._alive = True
        self._beaten = 0.0
        """When the last heartbeat was sent (monotonic); 0 to send the next one now."""
        self._interval = INTERVAL
        """Seconds from one heartbeat to the next."""
        self._written_last = now()
        self._failed: events.WritesFailed | None = events.WritesFailed("nothing has been written yet", "")
        self._refused: str | None = None

    def set(self, statuses: dict[EndpointId, Status | None]) -> None:
        """Have the thread write these statuses of endpoints. None stands for an endpoint that was deleted."""
        with self._lock:
            for id, status in statuses.items():
                if status is None:
                    self._desired.pop(id, None)
                else:
                    self._desired[id] = status.to_json()
                failed = status is not None and status.status == "error"
                (self._errors if failed else self._changed).add(id)
                (self._changed if failed else self._errors).discard(id)
        self._wake.set()

    def publish_macs(self, macs: frozenset[str]) -> None:
        """Have the thread write `macs`, the source MACs of this host's packets to other hosts, to the store."""
        with self._lock:
            self._macs = macs
        self._wake.set()

    def resync(self) -> None:
        """Have the thread read the statuses from the store again, and write those that differ from the present ones."""
        with self._lock:
            self._written = None
        self._wake.set()

    def beat_soon(self) -> None:
        """Have the thread send the next heartbeat now."""
        self._beaten = 0.0
        self._wake.set()

    def run(self) -> None:
        ending = False
        while not ending:
            longest = 1.0 if self._errors else self._interval
            self._wake.wait(max(0.1, min(longest, self._next_beat - time.monotonic())))
            self._wake.clear()
            ending = not self._alive
            try:
                if time.monotonic() >= self._next_beat:
                    before, self._beaten = self._beaten, time.monotonic()  # beat_soon may ask for another meanwhile
                    try:
                        self._beat()
                    except Exception:  # of any kind: the heartbeat stays due
                        self._beaten = before
                        raise
                if self._health.first_update and self._replaced_by is None:
                    self._write_macs()
                    self._write_endpoints()
                self._emit(None)
            except Exception as error:  # of any kind: an end of this thread would end the heartbeat
                self._emit(error)
                time.sleep(1)  # then retry, with what has changed meanwhile
                self._wake.set()
        try:
            self._heartbeat.end()
        except CalicoError as error:
            log.warning("the host's status cannot be removed: %s", error)

    @property
    def _next_beat(self) -> float:
        """When the next heartbeat is due (monotonic)."""
        return self._beaten + self._interval

    def _beat(self) -> None:
        choice = self._datastore.current_choice()
        self._interval = FROZEN_INTERVAL if choice is not None and choice.frozen else INTERVAL
        replaced_by = self._heartbeat.beat(
            {
                "time": now(),
                "uptime": round(time.monotonic() - self._health.started, 1),
                "first_update": self._health.first_update,
                **({} if choice is None else agent_store(choice)),
            }
        )
        if replaced_by is None and self._heartbeat.has_begun:
            self._hanging.clear()
            self.resync()
        if replaced_by != self._replaced_by:
            self._replaced_by = replaced_by
            why = None if replaced_by is None else replaced(self._datastore, replaced_by)
            self._put(events.Replaced(why))

    def _emit(self, error: Exception | None) -> None:
        """Emit an event if the outcome of writing to the store has changed.

        WritesFailed or WritesRecovered is emitted when writes begin or cease to fail. A Failure is emitted when the
        store begins or ceases to refuse a status. `error` is the exception of the last attempt to write, None if the
        attempt succeeded.
        """
        failed, refused = None, None
        if isinstance(error, StoreError):
            failed = events.WritesFailed(str(error), self._written_last)
        else:
            self._written_last = now()
            refused = None if error is None else f"statuses cannot be written: {error}"
        if failed != self._failed:
            self._put(failed or events.WritesRecovered())
        if refused != self._refused:
            self._put(events.Failure(refused, "statuses"))
        self._failed, self._refused = failed, refused

    def _hang(self, found: dict[EndpointId, str]) -> dict[EndpointId, str]:
        """Write again the statuses that are not attached to the lease of the host's status, to attach them.

        Statuses `error` are left out. So are the statuses that are left when the next heartbeat is due, and all
        statuses of a request that the store refuses. `found` contains the statuses in the store. Returns the statuses
        in the store after the writes, but with an empty text for each that is not attached yet: such a status differs
        from the desired one, so it is written later. Raises StoreUnavailable.
        """
        written = {id: status if id in self._hanging else "" for id, status in found.items()}
        with self._lock:
            desired = {id: status for id, status in self._desired.items() if id not in self._hanging}
        left = [id for id, status in desired.items() if json.loads(status)["status"] != "error"]
        while left and time.monotonic() < self._next_beat:
            some = {id: desired[id] for id in left[:AT_ONCE]}
            del left[:AT_ONCE]
            try:
                self._datastore.statuses.report_endpoints(some, TIME_TO_LIVE)
            except StoreUnavailable:
                raise
            except CalicoError:
                continue
            self._hanging |= some.keys()
            written.update(some)
        return written

    def end(self) -> None:
        """Have the thread write the remaining statuses, remove the host's status, and end.

        Wait until the thread has ended, for END_PATIENCE at most. Raises nothing.
        """
        self._alive = False
        self._wake.set()
        self.join(END_PATIENCE)

    def _write_macs(self) -> None:
        macs = self._macs
        if macs is not None:
            self._datastore.hosts.publish_macs(macs)
            with self._lock:
                if self._macs == macs:
                    self._macs = None

    def _write_endpoints(self) -> None:
        """Write the statuses that have changed; of those that have changed to `error`, ERRORS_AT_ONCE at most.

        Stops early if the heartbeat is due; the next call writes the rest. If the store is unavailable, raises
        StoreUnavailable at once. If the store refuses statuses, tries all others, and then raises the CalicoError of
        the first refusal.
        """
        refused: dict[EndpointId, CalicoError] = {}
        errors = 0
        with self._lock:
            written = self._written
        if written is None:
            written = self._datastore.statuses.of_endpoints()
            if self._datastore.statuses.hang_together:
                written = self._hang(written)
            with self._lock:
                self._written = written
                self._errors = {id for id, status in self._desired.items() if json.loads(status)["status"] == "error"}
                self._changed = (set(self._desired) | set(written)) - self._errors
        while True:
            if time.monotonic() >= self._next_beat:  # a flood of changes must not cost the heartbeat
                self._wake.set()
                break
            with self._lock:
                if self._changed:
                    id = self._changed.pop()
                elif self._errors and errors < ERRORS_AT_ONCE and time.monotonic() >= self._errors_at:
                    id = self._errors.pop()
                    errors += 1
                else:
                    break
                status = self._desired.get(id)
            try:
                if status is None and id in written:
                    self._datastore.statuses.report_endpoint(id, None)
                    written.pop(id, None)
                    self._hanging.discard(id)
                elif status is not None and written.get(id) != status:
                    self._datastore.statuses.report_endpoint(id, status, TIME_TO_LIVE)
                    written[id] = status
                    self._hanging.add(id)
            except StoreUnavailable:
                with self._lock:
                    self._changed |= {id, *refused}
                raise
            except CalicoError as error:
                refused[id] = error
        if errors == ERRORS_AT_ONCE:
            self._errors_at = time.monotonic() + 1
        if refused:
            with self._lock:
                self._changed |= refused.keys()
            raise next(iter(refused.values()))
