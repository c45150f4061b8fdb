"""The events that drive the loops of the agent and of the WorkloadKeeper, as plain data.

The threads of sources.py, report.py, workload_keeper.py, dataplane/ and bgp/ put them into a queue. The thread that
reads the queue decides what an event means. The agent's loop itself sends Tick and PolicyFailed to the managers,
without a queue.
"""

from __future__ import annotations

from dataclasses import dataclass
from queue import SimpleQueue

from calicoctl.datastore.reserved import Servers
from calicoctl.datastore.store import Change, Entry
from calicoctl.felix.bgp.bird import Session
from calicoctl.felix.dataplane.links import Link


@dataclass(frozen=True)
class StoreRead:
    """All entries below a directory of the store: the result of an initial sync, or of a resync."""

    directory: str
    entries: list[Entry]


@dataclass(frozen=True)
class StoreChanged:
    """One change that a watch delivered."""

    change: Change


@dataclass(frozen=True)
class WatchRecovered:
    """The watch of a directory of the store works again, or works for the first time."""

    directory: str


@dataclass(frozen=True)
class WatchFailed:
    """The watch of a directory of the store fails. `read` says whether the directory can still be read.

    `since` is the time (ISO 8601) of the last request about the directory that succeeded; if none has yet, of the
    agent's start.
    """

    directory: str
    why: str
    since: str
    read: bool = False


@dataclass(frozen=True)
class WritesRecovered:
    """The store can be written again, or could be written for the first time."""


@dataclass(frozen=True)
class WritesFailed:
    """The store cannot be written.

    `since` is the time (ISO 8601) of the last write that succeeded; if none has yet, of the agent's start.
    """

    why: str
    since: str


@dataclass(frozen=True)
class Replaced:
    """Another agent reports for this host; `why` is a sentence that names that agent.

    If `why` is None, this agent reports for the host again.
    """

    why: str | None


@dataclass(frozen=True)
class LinkChanged:
    """An interface was added, changed or, with `deleted`, removed."""

    link: Link
    deleted: bool = False


@dataclass(frozen=True)
class RouteLost:
    """Another process may have deleted or replaced one of the agent's routes to endpoints.

    `address` is the route's destination, without a prefix length.
    """

    address: str


@dataclass(frozen=True)
class OverlayRouteLost:
    """A route of the overlay was deleted, or may have been replaced by another process.

    `cidr` is the destination of the route.
    """

    cidr: str


@dataclass(frozen=True)
class BirdRouteLost:
    """A route with BIRD's protocol number was deleted, by BIRD or by another process."""


@dataclass(frozen=True)
class AddressesChanged:
    """An address of this host was added or deleted; IPv6 link-local addresses do not count."""


@dataclass(frozen=True)
class GatewaysChanged:
    """Routes that are not the agent's have changed; the gateways that this host uses may have changed with them."""


@dataclass(frozen=True)
class ServersChanged:
    """The servers that this host depends on have become known, or have changed."""

    servers: Servers


@dataclass(frozen=True)
class KernelEventsLost:
    """Changes of this host's network may have been missed, for example because the netlink socket's buffer was full."""


@dataclass(frozen=True)
class TablesChanged:
    """Another process has changed nftables tables of these names.

    The empty name stands for any table: notifications were lost.
    """

    names: frozenset[str]


@dataclass(frozen=True)
class Container:
    """A container in the Docker Engine's list: whether it runs, and its name (None if the list has no name for it).

    A paused container counts as running. `network_mode` is the value of `docker run --net`, such as `none`.
    """

    runs: bool
    name: str | None
    network_mode: str = ""


@dataclass(frozen=True)
class EngineListed:
    """The Docker Engine's containers, by id. Changes follow as ContainerChanged."""

    containers: dict[str, Container]


@dataclass(frozen=True)
class EngineUnavailable:
    """The Docker Engine has become unavailable."""

    why: str


@dataclass(frozen=True)
class ContainerChanged:
    """A Docker container was started, has ended, was renamed or, with `removed`, was removed."""

    id: str
    removed: bool


@dataclass(frozen=True)
class MountsChanged:
    """The mount table has changed: a network namespace may have been mounted at a path, or unmounted."""


@dataclass(frozen=True)
class Failure:
    """An operation failed, for a workload or for the host as a whole.

    A failure with a `subject` lasts until an event with the same subject replaces it. If that event's `why` is None,
    the failure has ended.
    """

    why: str | None
    subject: str | None = None


BGP, BGP_CONFIGURATION, BGP_PASSWORDS = "bgp", "bgp configuration", "bgp passwords"
"""Subjects of failures: BIRD does not run or answer; BIRD refuses a configuration; the agent refuses the file with the
passwords."""


@dataclass(frozen=True)
class OverlayBlocked:
    """The overlay needs devices, but none could be created; with `blocked` False, that is no longer so.

    For example, another program's devices may have our VNI or our names.
    """

    blocked: bool


@dataclass(frozen=True)
class BgpChanged:
    """What is known of BIRD: the process that the agent runs, and its BGP sessions, in order of their addresses.

    `settled` says whether BIRD uses the first configuration that follows from the store, or the attempt has failed. If
    BGP is off, `settled` says that the attempt to end BIRD is over. `pid` is None while BIRD does not run. `running`
    says whether BIRD listens on the port of BGP, as it does while a session is configured. `restarts` counts how often
    BIRD was started again since the agent's start, `refusals` how many configurations it has refused.
    """

    settled: bool = False
    pid: int | None = None
    running: bool = False
    sessions: tuple[Session, ...] = ()
    restarts: int = 0
    refusals: int = 0


@dataclass(frozen=True)
class Tick:
    """The interval of the agent (TICK in agent.py) has passed: retry what failed."""


@dataclass(frozen=True)
class PolicyFailed:
    """The nftables tables could not be programmed.

    So routes, and whatever else makes the host forward, are not programmed in this round of the agent's loop.
    """

    why: str


@dataclass(frozen=True)
class Stop:
    """The agent was asked to end."""


@dataclass(frozen=True)
class ThreadDied:
    """A thread that the agent needs has ended, so the agent must end, too."""

    why: str


Events = SimpleQueue  # of the classes above
