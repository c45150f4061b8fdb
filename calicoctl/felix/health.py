"""The agent's health: the statuses of endpoints, whether the store can be used, and what fails on the host.

Only the agent's thread changes this state. report.py and metrics.py publish it.
"""

from __future__ import annotations

import copy
import heapq
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any

from calicoctl import limits
from calicoctl.addresses import pack
from calicoctl.clock import now
from calicoctl.datastore import keys
from calicoctl.datastore.keys import EndpointId
from calicoctl.desired.snapshot import INACTIVE
from calicoctl.felix.bgp.bird import Session
from calicoctl.felix.events import BgpChanged, Failure, LabelsFailed
from calicoctl.limits import shortened
from calicoctl.workloads.upkeep import COLLECTED, REATTACHED, Action
from calicoctl.workloads.workload import short_id

log = logging.getLogger("calico.felix")


NO_MTU: dict[str, Any] = {"underlay": {"ipv4": None, "ipv6": None}, "overlay": None, "configured": None}
"""The value of `mtu` in the report while the MTUs are unknown."""

UNTOLD = "root alone is told what (sudo calicoctl status)"
"""Replaces texts that may quote the store in the report that every user may read."""


@dataclass(frozen=True)
class Status:
    """An endpoint's `status` ("up", "down" or "error"), and the `reason` for it, None if there is none.

    `revision` is the endpoint's revision in the store. `workload_name` is the container's name as written in the
    endpoint, None if no name is written there.
    """

    status: str
    revision: int
    reason: str | None = None
    workload_name: str | None = None

    @property
    def is_stopped(self) -> bool:
        """Whether the endpoint is down because its workload is stopped, which is no problem."""
        return self.reason == INACTIVE

    def to_json(self) -> str:
        # JSON with the lone surrogates of an interface's name could not be read again
        text = None if self.reason is None else self.reason.encode(errors="backslashreplace").decode()
        reason = {} if text is None else {"reason": text}
        return json.dumps({"status": self.status, "index": self.revision, **reason})


class Ability:
    """Whether one kind of access to the store (reading, watching or writing) works.

    Several parts of the agent need the access. Each is called a user, and identified by a name, such as the directory
    that it reads. `since` is the time (ISO 8601) at which the access began to work or to fail; before that, the agent's
    start.
    """

    def __init__(self, users: Iterable[str]) -> None:
        self._untried = set(users)
        self._failing: dict[str, str] = {}
        self.since = now()

    @property
    def works(self) -> bool | None:
        """False if the access fails for any part of the agent; else None until all parts have tried it, then True."""
        return False if self._failing else None if self._untried else True

    @property
    def error(self) -> str | None:
        return next(iter(self._failing.values()), None)

    def succeeded(self, user: str) -> bool:
        """Note that the access has worked for `user`, a part of the agent (see Ability).

        Return True if it now works for all users, and did not before.
        """
        before = self.works
        self._untried.discard(user)
        self._failing.pop(user, None)
        if before is self.works or not self.works:
            return False
        self.since = now()
        return True

    def failed(self, user: str, why: str, since: str) -> bool:
        """Note that the access fails for `user`, a part of the agent (see Ability), for the reason `why`.

        `since` is the time since when it fails (ISO 8601). Return False if it was failing for any user before, else
        True.
        """
        before = self.works
        self._untried.discard(user)
        self._failing.pop(user, None)
        self._failing = {user: why, **self._failing}  # the newest reason is reported
        if before is False:
            return False
        self.since = since
        return True

    def to_dict(self) -> dict[str, Any]:
        return {"works": self.works, "since": self.since, "error": self.error}


class StoreHealth:
    """Whether the store can be read, written and watched."""

    def __init__(self, directories: Iterable[str]) -> None:
        """`directories` are the directories of the store that the agent reads and watches."""
        directories = list(directories)
        self.reads = Ability(directories)
        self.watch = Ability(directories)
        self.writes = Ability(["statuses"])

    @property
    def works(self) -> bool:
        return all(ability.works for ability in (self.reads, self.writes, self.watch))

    def to_dict(self) -> dict[str, Any]:
        return {
            "reachable": self.works,
            "since": max(ability.since for ability in (self.reads, self.writes, self.watch)),
            "error": self.reads.error or self.watch.error or self.writes.error,
            "reads": self.reads.to_dict(),
            "writes": self.writes.to_dict(),
            "watch": self.watch.to_dict(),
        }


@dataclass
class Health:
    """The agent's state, as it is reported. Only the agent's thread changes it."""

    host: str
    version: str
    options: dict[str, Any] = field(default_factory=dict)
    """The agent's options: the fields of process.Options."""
    followed: InitVar[frozenset[str]] = frozenset()
    pid: int = field(default_factory=os.getpid)
    since: str = field(default_factory=now)
    started: float = field(default_factory=time.monotonic)
    first_update: bool = False
    """Whether the first snapshot is in the kernel."""
    waiting_for: str | None = None
    replaced: str | None = None
    """A sentence that names the other agent that reports for this host; None while this agent reports."""
    unknown_interfaces: list[str] = field(default_factory=list)
    """Interfaces `cali…` of this host that belong to no endpoint in the store."""
    endpoints: dict[EndpointId, Status] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    """Key of the store -> what is wrong with the key's value."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Key of the store -> why the key, or the keys below it, are not read."""
    unread: set[str] = field(default_factory=set)
    """Those keys of `skipped` that are directories, and were too large to be read."""
    failures: dict[str, dict[str, str]] = field(default_factory=dict)
    """Subject -> the current failure: its `error` (a sentence), and `since` when it lasts (ISO 8601)."""
    labels_failed: dict[str, dict[str, str]] = field(default_factory=dict)
    """Id of a container that cannot be connected as its labels ask -> its `name`, the `reason`, and since when."""
    last_error: dict[str, str] | None = None
    mtu: dict[str, Any] = field(default_factory=lambda: copy.deepcopy(NO_MTU))
    """The MTU of new interfaces of workloads. In pools without an overlay, it is the MTU of the `underlay`, by IP
    version; in pools with an overlay, that of the `overlay` (None if there are no such pools). If an MTU is
    `configured`, it replaces both.
    """
    bgp: BgpChanged = field(default_factory=BgpChanged)
    users: Mapping[str, str] = field(default_factory=dict)
    """Address -> name of the host that is registered with it: see Topology."""
    resyncs: int = 0
    """How often the whole store was read."""
    reattached: int = 0
    """Workloads that were re-attached; `healed` in the report and in metrics."""
    collected: int = 0
    """Workloads, and leftovers of interrupted commands, that were garbage-collected."""
    refused_connections: int = 0
    """Packets of new connections that were dropped because their endpoint had, or started, too many: see
    connection_limit.py.
    """

    def __post_init__(self, followed: frozenset[str]) -> None:
        self.store = StoreHealth(followed)

    def count(self, act: Action) -> None:
        self.reattached += act.kind == REATTACHED
        self.collected += act.kind == COLLECTED

    def error(self, sentence: str) -> None:
        """Log an error, and store it as the last error."""
        sentence = shortened(sentence, limits.TEXT)
        log.error("%s", sentence)
        self.last_error = {"time": now(), "error": sentence}

    def record(self, failure: Failure) -> None:
        """Store a failure that has a subject, or remove it if `why` is None. Log it when it begins or changes.

        A failure without a subject does not last: it is only logged, and stored as the last error.
        """
        if failure.subject is None:
            self.error(failure.why or "")
            return
        before = self.failures.get(failure.subject)
        if failure.why is None:
            self.failures.pop(failure.subject, None)
        elif before is None or before["error"] != failure.why:
            self.failures[failure.subject] = {"since": before["since"] if before else now(), "error": failure.why}
            self.error(failure.why)

    def record_labels(self, event: LabelsFailed) -> None:
        """Store and log that a container cannot be connected as its labels ask; or remove that if it has ended."""
        before = self.labels_failed.get(event.id)
        if event.why is None:
            self.labels_failed.pop(event.id, None)
            return
        since = before["since"] if before else now()
        self.labels_failed[event.id] = {"name": event.name, "reason": event.why, "since": since}
        name = f"{short_id(event.id)} ({event.name})"
        self.error(f"container {name} cannot be connected as its labels ask: {event.why}")

    def counts(self) -> dict[str, int]:
        """Return the number of endpoints by status. Stopped endpoints are counted as `down`, and again as `stopped`."""
        counts = {"up": 0, "down": 0, "error": 0, "stopped": 0}
        for status in list(self.endpoints.values()):  # the thread that serves metrics calls this, too
            counts[status.status] += 1
            counts["stopped"] += status.is_stopped
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Return the report that `calicoctl status` reads.

        Scripts read it as JSON, so `troubles` and `healed` keep their names. Each list has a limited length
        (limits.py). The list of endpoints begins with the worst ones: see `_worst`. `left_out` contains, for each list,
        the number of items that were left out.
        """
        troubled, problems = self._troubled(), {**self.problems, **self.skipped}
        shown = self._worst(troubled)
        # the reasons of endpoints are in another list
        some = heapq.nsmallest(
            limits.REPORTED,
            problems,
            key=lambda key: (key not in self.unread, keys.parse_endpoint(key) in self.endpoints, key),
        )
        subjects = sorted(self.failures)[: limits.REPORTED]
        sessions = sorted(self.bgp.sessions, key=_place)[: limits.SESSIONS]
        interfaces = self.unknown_interfaces[: limits.REPORTED]
        unconnected = sorted(self.labels_failed)[: limits.REPORTED]
        return {
            "host": self.host,
            "version": self.version,
            "pid": self.pid,
            "running_since": self.since,
            **self.options,
            "first_update": self.first_update,
            "waiting_for": self.waiting_for,
            "replaced": self.replaced,
            "etcd": self.store.to_dict(),
            "endpoints": self.counts(),
            "endpoints_in_trouble": [
                {
                    "orchestrator": shortened(id.orchestrator, limits.NAME),
                    "workload": shortened(id.workload, limits.NAME),
                    "workload_name": status.workload_name and shortened(status.workload_name, limits.NAME),
                    "endpoint": shortened(id.endpoint, limits.NAME),
                    "status": status.status,
                    "reason": shortened(status.reason or "", limits.TEXT),
                }
                for id, status in shown
            ],
            "containers_not_connected": [self._not_connected(id) for id in unconnected],
            "unknown_interfaces": interfaces,
            "problems": [
                {
                    "key": shortened(key, limits.NAME),
                    "problem": shortened(problems[key], limits.TEXT),
                    "unread": key in self.unread,
                }
                for key in some
            ],
            "troubles": [{"subject": subject, **self.failures[subject]} for subject in subjects],
            "left_out": {
                "endpoints_in_trouble": len(troubled) - len(shown),
                "containers_not_connected": len(self.labels_failed) - len(unconnected),
                "unknown_interfaces": len(self.unknown_interfaces) - len(interfaces),
                "problems": len(problems) - len(some),
                "troubles": len(self.failures) - len(subjects),
                "bgp_sessions": len(self.bgp.sessions) - len(sessions),
            },
            "last_error": self.last_error,
            "resyncs": self.resyncs,
            "healed": self.reattached,
            "collected": self.collected,
            "refused_connections": self.refused_connections,
            "mtu": self.mtu,
            "bird": {
                "pid": self.bgp.pid,
                "listens": self.bgp.running,
                "restarts": self.bgp.restarts,
                "refused_configurations": self.bgp.refusals,
            },
            "bgp_sessions": [self._session(session) for session in sessions],
        }

    def public(self, report: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of `report`, the result of `to_dict`, without texts that may quote values of the store.

        The health must not have changed since `to_dict` was called. Keys of the store stay in the copy, and so do
        validated names and addresses, since the kernel shows them to every user.
        """
        endpoints = []
        for one, (id, _) in zip(report["endpoints_in_trouble"], self._worst(self._troubled())):
            untold = {"reason": UNTOLD} if keys.endpoint(id) in self.problems else {}
            endpoints.append({**one, "workload_name": None, **untold})
        last = report["last_error"]
        return {
            **report,
            "endpoints_in_trouble": endpoints,
            "containers_not_connected": [
                {**one, "workload_name": None, "reason": UNTOLD} for one in report["containers_not_connected"]
            ],
            "problems": [{**problem, "problem": UNTOLD} for problem in report["problems"]],
            "last_error": last and {**last, "error": UNTOLD},
        }

    def _not_connected(self, id: str) -> dict[str, str]:
        failed = self.labels_failed[id]
        return {
            "workload": shortened(id, limits.NAME),
            "workload_name": shortened(failed["name"], limits.NAME),
            "reason": shortened(failed["reason"], limits.TEXT),
            "since": failed["since"],
        }

    def _troubled(self) -> list[tuple[EndpointId, Status]]:
        return [item for item in self.endpoints.items() if item[1].reason and not item[1].is_stopped]

    @staticmethod
    def _worst(troubled: list[tuple[EndpointId, Status]]) -> list[tuple[EndpointId, Status]]:
        """Return the first limits.REPORTED of these endpoints: those in error first, then in the order of their ids."""
        return heapq.nsmallest(
            limits.REPORTED, troubled, key=lambda item: (item[1].status != "error", item[0].endpoint, item[0].workload)
        )

    def _session(self, session: Session) -> dict[str, Any]:
        return {
            "peer": session.peer,
            "host": shortened(self.users.get(session.peer, ""), limits.NAME) or None,
            "kind": session.kind,
            "as_num": session.as_num,
            "state": session.state,
            "up": session.is_up,
            "since": session.since,
            "routes_in": session.imported,
            "routes_out": session.exported,
            "last_error": session.error,
            "suspicion": session.suspicion,
        }


def _place(session: Session) -> tuple[int, bytes]:
    """Return a sort key that orders sessions by the address of the peer, IPv4 first.

    Sessions whose peer's address is unknown come before all others.
    """
    try:
        packed = pack(session.peer)
    except (OSError, ValueError):  # BIRD names none
        return 0, b""
    return len(packed), packed
