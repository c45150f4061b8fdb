"""Reads the status of this host's agent, running or not, and lists its problems, worst first. Prints nothing.

The agent's report (felix/report.py) is a file that every user may read, even while the store is unreachable. The
report's field `problems` lists the keys that are invalid or not read; its field `troubles` lists the failures that
concern the whole host. `_issues` converts these and all other problems to Issues.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from calicoctl import environment, proc, state
from calicoctl.datastore import keys
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.keys import INTERFACE_PREFIX, EndpointId
from calicoctl.datastore.settings import EtcdSettings
from calicoctl.errors import CalicoError
from calicoctl.felix import heartbeat, local_etcd, plugin_process, process
from calicoctl.felix.bgp import passwords
from calicoctl.felix.health import NO_MTU
from calicoctl.output import first_few, quantity
from calicoctl.workloads import docker_hook, libnetwork
from calicoctl.workloads.workload import short_id

OLDEST_REPORT = 30.0
"""The age, in seconds, beyond which a report is stale. An agent writes its report at least every agent.TICK (10 s)."""

AGENT, STORE, ENDPOINT, CONTAINER, HOST, KEY, BGP = "agent", "store", "endpoint", "container", "host", "key", "bgp"

_ABILITY = {"works": None, "since": None, "error": None}
_NOTHING: dict[str, Any] = {
    "host": None,
    "version": None,
    "pid": None,
    "running_since": None,
    "log_dir": None,
    "metrics_port": None,
    "local_etcd": None,
    "bgp": None,
    "libnetwork": None,
    "first_update": False,
    "waiting_for": None,
    "replaced": None,
    "etcd": {
        "reachable": False,
        "since": None,
        "error": None,
        "reads": _ABILITY,
        "writes": _ABILITY,
        "watch": _ABILITY,
    },
    "endpoints": {"up": 0, "down": 0, "error": 0, "stopped": 0},
    "endpoints_in_trouble": [],
    "containers_not_connected": [],
    "unknown_interfaces": [],
    "problems": [],
    "troubles": [],
    "left_out": dict.fromkeys(
        (
            *("endpoints_in_trouble", "containers_not_connected", "unknown_interfaces"),
            *("problems", "troubles", "bgp_sessions"),
        ),
        0,
    ),
    "last_error": None,
    "resyncs": 0,
    "healed": 0,  # re-attached workloads: the name is fixed, since scripts read it
    "collected": 0,
    "refused_connections": 0,
    "mtu": NO_MTU,
    "bird": {"pid": None, "listens": False, "restarts": 0, "refused_configurations": 0},
    "bgp_sessions": [],
    "report": {"time": None, "clock": None},
}
"""All fields of a report, with the values that are used if there is no report."""

_NO_ROOM = "Kernel MD5 auth"
"""BIRD's error if the kernel refuses the password of a session (TCP_MD5SIG), usually because there are too many."""

_LATER = ("bgp", "libnetwork", "bird", "mtu", "left_out", "containers_not_connected")
"""Fields that reports of older agents lack."""

_OLDEST = {name: value for name, value in _NOTHING.items() if name not in _LATER}
"""The fields of the oldest report that can be read."""


@dataclass(frozen=True)
class Issue:
    """A problem of the host's agent. `kind` says what it concerns: AGENT, STORE, ENDPOINT, CONTAINER, HOST, KEY or BGP.

    `advice` says what the user can do; it is empty if there is no advice. If `fails` is true, `calicoctl status` ends
    with exit status 1 because of this problem.
    """

    kind: str
    text: str
    advice: str = ""
    fails: bool = False

    def __str__(self) -> str:
        return f"{self.text}; {self.advice}" if self.advice else self.text


def read(host: str) -> dict[str, Any]:
    """Return the last report of the host's agent, and an assessment of it, always with the same fields.

    If there is no report, or it cannot be read, its fields have the values in _NOTHING. These fields are added to the
    report:

    * `running`: whether the agent runs.
    * `other_agent`: null if the agent runs. If it does not run, and another agent reports for this host, an object: the
      other agent's `machine` (null if unknown), and a `text`. Null if no other agent reports, or if the store cannot be
      read.
    * In `report`: `age`, the age of the report in seconds, null if there is no report, or if it is from before a
      reboot; `current`, whether the report is from the running agent, and not older than OLDEST_REPORT; `readable`,
      false if the report has the format of an unknown version.
    * `docker_hook`: null if Docker's hook is not set up, or if the user is not root. If it is, an object: whether it
      `works`, as far as files tell, and a `text`.
    * `issues`: a list of objects with the fields of Issue.

    If no agent runs and the store can be read, `unknown_interfaces` are determined anew, not taken from the report.
    """
    pid = process.running(host)
    found = process.report(host)
    readable = found is not None and _has_shape(found, _OLDEST)
    status: dict[str, Any] = {**_NOTHING, **(found if found is not None and readable else {})}
    hook = docker_hook.state_of_hook() if os.geteuid() == 0 else None
    status |= {"host": host, "running": pid is not None, "other_agent": None}
    status["docker_hook"] = None if hook is None else {"works": hook[0], "text": hook[1]}
    if pid is None:
        with suppress(CalicoError):  # the store may be unreachable
            status |= _without_agent(DatastoreClient.from_environment())
    report = status["report"]
    age = None if report["clock"] is None else time.clock_gettime(time.CLOCK_MONOTONIC) - report["clock"]
    if age is not None and age < 0:  # from before a reboot
        age = None
    current = pid is not None and status["pid"] == pid and age is not None and age <= OLDEST_REPORT
    status["report"] = {
        "time": report["time"],
        "age": None if age is None else round(age, 1),
        "current": current,
        "readable": readable or found is None,
    }
    status["issues"] = [asdict(issue) for issue in _issues(status, pid)]
    return status


def containers_not_connected(host: str) -> list[dict[str, Any]]:
    """Return the containers that cannot be connected as their labels ask; empty if the host's agent does not run.

    Each has the container's id (`workload`), its `workload_name` (None for users other than root), `reason` and
    `since`.
    """
    found = process.report(host) if process.running(host) is not None else None
    containers = (found or {}).get("containers_not_connected")
    return containers if isinstance(containers, list) else []


def issues(status: dict[str, Any]) -> list[Issue]:
    """Return the problems in a status from `read`, worst first."""
    return [Issue(**issue) for issue in status["issues"]]


def _issues(status: dict[str, Any], pid: int | None) -> Iterator[Issue]:
    yield from _agent(status, pid)
    if status["report"]["time"] is None or status["other_agent"] is not None:
        yield from _unknown_interfaces(status)
        return
    yield from _store(status)
    yield from _endpoints(status, "error")
    yield from _not_connected(status)
    hook = status["docker_hook"]
    if hook is not None and not hook["works"]:
        yield Issue(HOST, f"Docker's hook does not work: {hook['text']}", "run 'calicoctl node --docker-hook'")
    yield from _docker_networks(status)
    yield from _host_failures(status)
    yield from _sessions(status)
    yield from _unknown_interfaces(status)
    yield from _endpoints(status, "down")
    yield from _endpoints(status, "up")
    yield from _local_etcd(status)
    yield from _keys(status)


def _docker_networks(status: dict[str, Any]) -> Iterator[Issue]:
    host = status["host"]
    if plugin_process.running(host) is not None or plugin_process.served_elsewhere():
        return
    if status["libnetwork"]:
        text = "the process for Docker networks does not run: their containers neither start nor stop"
        yield Issue(HOST, text, f"see plugins.log in {status['log_dir'] or process.DEFAULT_LOG_DIR}")
        return
    networks = {}
    with suppress(CalicoError):  # only root may read them
        networks = state.read_all(host, libnetwork.NETWORKS)
    if networks:
        some = quantity(len(networks), "Docker network")
        text = f"nothing serves this host's {some}, so containers there do not start"
        use = "'calicoctl node stop --force' and then 'calicoctl node --libnetwork', or systemd's calico-docker.socket"
        yield Issue(HOST, text, f"use {use}")


def _agent(status: dict[str, Any], pid: int | None) -> Iterator[Issue]:
    host, report = status["host"], status["report"]
    other = status["other_agent"]
    if pid is None and other is not None:
        # an old agent names no machine, and may run on this one; if a machine is named, it is another one
        yield Issue(AGENT, other["text"], "", other["machine"] is not None)
    elif pid is None:
        yield Issue(AGENT, f"The agent of host {host} is not running", "start it with 'calicoctl node'", True)
    elif not report["readable"]:
        advice = "restart it with 'calicoctl node stop --force' and 'calicoctl node'"
        text = f"The report of host {host}'s agent cannot be read: it is from another version"
        yield Issue(AGENT, text, advice, True)
    elif status["pid"] != pid:
        text = f"The agent of host {host} (process {pid}) has not reported yet"
        full = _full(host)
        yield Issue(AGENT, f"{text}: {full}" if full else text, "make room there" if full else "", True)
    elif not report["current"]:
        text = f"The agent of host {host} (process {pid}) has not reported for {report['age'] or 0:.0f} s"
        full = _full(host)
        advice = f"'kill -9 {pid}' leaves the data plane as it is; 'calicoctl node' starts it again"
        text, advice = (f"{text}: {full}", "make room there") if full else (f"{text}: it hangs", advice)
        yield Issue(AGENT, text, advice, True)
    elif status["replaced"]:
        yield Issue(AGENT, status["replaced"], "", True)
    elif status["waiting_for"] and status["etcd"]["error"] is None:
        yield Issue(AGENT, f"The agent waits for {status['waiting_for']}")
    older = process.without_bgp(status)
    if older is not None and pid is not None and status["pid"] == pid:
        yield Issue(AGENT, older)
    if pid is not None and _has_other_settings(pid):
        text = "the agent and its command server were started with other settings of etcd or Docker than this command's"
        advice = "to give it these, end it ('calicoctl node stop --force', or systemctl), and start it again"
        yield Issue(AGENT, text, advice)


def _has_other_settings(pid: int) -> bool:
    """Return whether an agent uses another store or Docker Engine than this process.

    Variables that the agent was started without are taken from the settings file. Returns False if the agent's
    environment, which only root may read, or a setting is unreadable.
    """
    try:
        theirs = dict(text.partition("=")[::2] for text in proc.strings(pid, "environ"))
        environment.complete(theirs)
        if EtcdSettings.from_environment(theirs) != EtcdSettings.from_environment():
            return True
    except (OSError, CalicoError):
        return False
    return environment.engine_of(theirs) != environment.engine_of(os.environ)


def _full(host: str) -> str | None:
    """Return a clause about the full file system if an agent's report cannot be written for lack of space.

    Return None if there is space, or if that is unknown.
    """
    file = process.report_file(host)
    directory = file.parent
    with suppress(OSError):  # it is gone
        space = os.statvfs(directory)
        size = file.stat().st_size if file.exists() else 1
        # some file systems count no inodes
        if space.f_bavail * space.f_frsize < size or (space.f_files and space.f_favail == 0):
            return f"the file system of {directory} is full, so its report cannot be written"
    return None


def _store(status: dict[str, Any]) -> Iterator[Issue]:
    """Yield an Issue for each error that keeps the agent from reading, writing or watching the store."""
    failing: dict[str, list[str]] = {}
    since: dict[str, str] = {}
    for what, verb in (("reads", "read"), ("writes", "written"), ("watch", "followed")):
        ability = status["etcd"][what]
        if ability["works"] is False:  # it is None while that is not known
            error = ability["error"]
            failing.setdefault(error, []).append(verb)
            since[error] = min(since.get(error, ability["since"]), ability["since"])
    for error, verbs in failing.items():
        text = " or ".join(filter(None, [", ".join(verbs[:-1]), verbs[-1]]))
        yield Issue(STORE, f"etcd cannot be {text} since {since[error]}: {error}", "", True)


def _endpoints(status: dict[str, Any], state: str) -> Iterator[Issue]:
    for endpoint in status["endpoints_in_trouble"]:
        if endpoint["status"] == state:
            # a report of an older version names no containers
            workload = endpoint.get("workload_name") or short_id(endpoint["workload"])
            text = f"endpoint {short_id(endpoint['endpoint'])} of {endpoint['orchestrator']} {workload} is {state}"
            text += f": {endpoint['reason']}"
            yield Issue(ENDPOINT, text, "", state == "error")


def _not_connected(status: dict[str, Any]) -> Iterator[Issue]:
    for container in status["containers_not_connected"]:
        name = container["workload_name"] or short_id(container["workload"])
        text = f"container {name} cannot be connected as its labels ask (since {container['since']})"
        yield Issue(CONTAINER, f"{text}: {container['reason']}", "", True)


def _host_failures(status: dict[str, Any]) -> Iterator[Issue]:
    for failure in status["troubles"]:
        yield Issue(HOST, f"{failure['error']} (since {failure['since']})")


def _sessions(status: dict[str, Any]) -> Iterator[Issue]:
    """Yield the Issues about BGP sessions.

    There is one for all sessions that are not up, one for those among them whose passwords find no room in the kernel,
    and one for each `suspicion` about their passwords in the report.
    """
    sessions = status["bgp_sessions"]
    down = [session for session in sessions if not session["up"]]
    if down:
        text = f"{len(down)} of {quantity(len(sessions), 'BGP session')} {'is' if len(down) == 1 else 'are'} not up"
        text += f": with {first_few(_peer(session) for session in down)}"
        advice = "'calicoctl checksystem' names rules of this host's firewall that may drop them"
        yield Issue(BGP, text, f"'calicoctl node show' says which hosts' agents are alive, {advice}")
    full = [_peer(session) for session in down if _NO_ROOM in (session["last_error"] or "")]
    if full:
        text = f"the kernel has no room for the password of the BGP session with {first_few(full)}"
        yield Issue(BGP, text, "set net.core.optmem_max to 131072 with sysctl")
    suspicions: dict[str, list[str]] = {}
    for session in down:
        if session["suspicion"]:
            suspicions.setdefault(session["suspicion"], []).append(_peer(session))
    for suspicion, peers in suspicions.items():
        text = f"BGP session{'s' if len(peers) > 1 else ''} with {first_few(peers)}: {suspicion}"
        yield Issue(BGP, text, f"compare the passwords of both ends (here: {passwords.PATH})")


def _peer(session: dict[str, Any]) -> str:
    return f"{session['peer']} ({session['host']})" if session["host"] else str(session["peer"])


def _unknown_interfaces(status: dict[str, Any]) -> Iterator[Issue]:
    names = status["unknown_interfaces"]
    if names:
        some = first_few(names)
        text = f"{quantity(len(names), 'interface')} cali… of this host without an endpoint ({some})"
        yield Issue(HOST, f"{text}, which pass nothing", "did the host have another name when they were connected?")


def _without_agent(datastore: DatastoreClient) -> dict[str, Any]:
    """Return the fields `other_agent` and `unknown_interfaces` of the status, for a host whose agent does not run.

    Raises StoreError if the store cannot be read.
    """
    other = None
    status = datastore.statuses.of_host()
    who = None if status is None else heartbeat.other_writer(datastore, status, own_agent_writes=False)
    if status is not None and who is not None:
        text = f"{who} reports for host {datastore.host}; none of this version runs here"
        other = {"text": text, "machine": heartbeat.Identity.of(status).machine}
    unknown = {name for _, name in socket.if_nameindex() if name.startswith(INTERFACE_PREFIX)}
    if unknown:
        endpoints, invalid = datastore.readable_endpoints(datastore.host)
        unknown -= {name for endpoint in endpoints for name in (endpoint.name, endpoint.id.interface)}
        unknown -= {id.interface for id in (keys.parse_endpoint(error.key) for error in invalid) if id is not None}
    return {"other_agent": other, "unknown_interfaces": sorted(unknown)}


def _local_etcd(status: dict[str, Any]) -> Iterator[Issue]:
    """Yield an Issue if the local etcd runs and still serves the v2 API, for data of an older version."""
    if status["local_etcd"] and local_etcd.serves_v2(status["host"]):
        text = "the local etcd has its data in etcd's v2 API, which etcd 3.6 does not have any more"
        yield Issue(STORE, text, "move it with 'calicoctl datastore migrate', then '… migrate --finish'")


def _keys(status: dict[str, Any]) -> Iterator[Issue]:
    """Yield an Issue for each key in the report's `problems`, except keys of endpoints that have an Issue already."""
    host = status["host"]
    named = {
        keys.endpoint(EndpointId(host, one["orchestrator"], one["workload"], one["endpoint"]))
        for one in status["endpoints_in_trouble"]
    }
    for problem in status["problems"]:
        if problem["key"] not in named:
            key, why = problem["key"], problem["problem"]
            # a report of an older version does not say which directories were not read
            yield Issue(KEY, why if key in why else f"{key}: {why}", "", problem.get("unread", False))


def _has_shape(value: Any, shape: Any) -> bool:
    """Return whether a value has all the fields of `shape`, a dictionary whose values may be dictionaries as well.

    Any value has the shape of a value that is not a dictionary.
    """
    if not isinstance(shape, dict):
        return True
    return isinstance(value, dict) and all(name in value and _has_shape(value[name], shape[name]) for name in shape)
