"""The events that drive the loops of the agent and of the WorkloadKeeper, as plain data.

Each loop reads a queue of its own. The threads of sources.py, report.py, workload_keeper.py, dataplane/ and bgp/ put
events into these queues. Tick and PolicyFailed pass through no queue: the agent's loop itself sends them to the
managers. StoreChanged and StoreRead do not either: the loop takes them from a StorePending.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

from calicoctl.datastore.reserved import Servers
from calicoctl.datastore.store import Change, Entry
from calicoctl.felix.bgp.bird import Session
from calicoctl.felix.dataplane.drops import Logged
from calicoctl.felix.dataplane.links import Link


@dataclass(frozen=True)
class StoreRead:
    """All entries below a directory of the store: the result of an initial sync, or of a resync."""

    directory: str
    entries: list[Entry]


@dataclass(frozen=True)
class StoreChanged:
    """One change that a watch of the store has delivered."""

    change: Change


@dataclass(frozen=True)
class StorePending:
    """Changes of the store wait to be processed (see pending.py).

    `take` returns, and removes, all changes that wait when it is called. It returns an empty list if these changes have
    been taken already, or if a newer StorePending stands for them.
    """

    take: Callable[[], list[StoreRead | StoreChanged]]


@dataclass(frozen=True)
class WatchRecovered:
    """The watch of a directory of the store works again, or for the first time."""

    directory: str


@dataclass(frozen=True)
class WatchFailed:
    """The watch of a directory of the store fails, for the reason `why`.

    `read` says whether the directory can still be read. `since` is the time (ISO 8601) of the last successful request
    about the directory or, before the first one, of the agent's start.
    """

    directory: str
    why: str
    since: str
    read: bool = False


@dataclass(frozen=True)
class WritesRecovered:
    """Writes to the store succeed again, or for the first time."""


@dataclass(frozen=True)
class WritesFailed:
    """Writes to the store fail, for the reason `why`.

    `since` is the time (ISO 8601) of the last successful write or, before the first one, of the agent's start.
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
    """An interface was added or changed or, if `deleted` is True, removed. `link` is its new or last state."""

    link: Link
    deleted: bool = False


@dataclass(frozen=True)
class RouteLost:
    """One of the agent's routes to endpoints may have been deleted or replaced by another process.

    `address` is the route's destination, without a prefix length.
    """

    address: str


@dataclass(frozen=True)
class OverlayRouteLost:
    """One of the overlay's routes was deleted, or another process may have replaced it.

    Also emitted if the agent has deleted the route itself. `cidr` is the route's destination.
    """

    cidr: str


@dataclass(frozen=True)
class BirdRouteLost:
    """A route with BIRD's protocol number was deleted, by BIRD or by another process."""


@dataclass(frozen=True)
class AddressesChanged:
    """An address of this host, other than an IPv6 link-local address, was added or deleted."""


@dataclass(frozen=True)
class GatewaysChanged:
    """Routes that are not the agent's have changed, so this host may use other gateways now."""


@dataclass(frozen=True)
class ServersChanged:
    """The servers that this host depends on (etcd's members, DNS servers) have become known, or have changed."""

    servers: Servers


@dataclass(frozen=True)
class KernelEventsLost:
    """Changes of this host's network may have been missed, for example because the netlink socket's buffer was full."""


@dataclass(frozen=True)
class TablesChanged:
    """Another process has changed the nftables tables with these names.

    The empty name stands for any table: the kernel has dropped notifications.
    """

    names: frozenset[str]


@dataclass(frozen=True)
class PacketsLogged:
    """The tables have dropped packets, and logged some of them.

    `take` returns, and removes, all that wait when it is called.
    """

    take: Callable[[], list[Logged]]


@dataclass(frozen=True)
class Container:
    """A container in the Docker Engine's list. `runs` says whether it is running or paused.

    `name` is None if the list contains no name for it. `network_mode` is the value of `docker run --net`, such as
    `none`. `labelled` says whether it, or its image, has the label that asks for a connection (workloads/labels.py).
    """

    runs: bool
    name: str | None
    network_mode: str = ""
    labelled: bool = False

    @property
    def may_ask(self) -> bool:
        """Whether it may ask to be connected: it runs, and has the label or was started with --net=none.

        A container with --net=none may have environment variables that ask for a connection. The list has no variables.
        """
        return self.runs and (self.labelled or self.network_mode == "none")


@dataclass(frozen=True)
class EngineListed:
    """The Docker Engine has listed its containers. `containers` maps their ids to them."""

    containers: dict[str, Container]


@dataclass(frozen=True)
class EngineUnavailable:
    """The Docker Engine has become unavailable, for the reason `why`."""

    why: str


@dataclass(frozen=True)
class ContainerChanged:
    """A Docker container was started or renamed, or has ended, or was removed.

    `started` is True if it was started, `removed` if it was removed.
    """

    id: str
    removed: bool
    started: bool = False


@dataclass(frozen=True)
class MountsChanged:
    """The mount table has changed: a network namespace may have been mounted at a path, or unmounted."""


@dataclass(frozen=True)
class Failure:
    """An operation has failed, for a workload or for the host as a whole. `why` is a sentence about the failure.

    A failure with a `subject` lasts until another Failure with the same subject is emitted. If `why` of the other one
    is None, the failure has ended. A failure without a subject does not last: it is only logged and reported as the
    last error.
    """

    why: str | None
    subject: str | None = None


@dataclass(frozen=True)
class LabelsFailed:
    """A container cannot be connected as its labels ask, for the reason `why`. If `why` is None, that is over.

    `id` and `name` are those of the container; the name is empty if `why` is None.
    """

    id: str
    name: str
    why: str | None


BGP, BGP_CONFIGURATION, BGP_PASSWORDS = "bgp", "bgp configuration", "bgp passwords"
"""Subjects of failures: BIRD does not run or answer; BIRD refuses a configuration; the agent refuses the file with the
passwords.
"""

DROPS_LOGGED, DROPS_RECEIVED = "dropped packets: logging", "dropped packets: receiving"
"""Subjects of failures that keep packets from `calicoctl drops`: the kernel cannot log them; the agent does not receive
them.
"""


@dataclass(frozen=True)
class OverlayBlocked:
    """If `blocked` is True, the overlay needs VXLAN devices, but none could be created.

    One cause is a device of another program with our VNI, or with the name of a device of ours. If `blocked` is False,
    the overlay needs no devices any more, or has a device.
    """

    blocked: bool


@dataclass(frozen=True)
class BgpChanged:
    """The state of BIRD: its process, and its BGP sessions. Emitted when the state has changed.

    `settled` becomes True after the first attempt to apply the configuration that follows from the store, even if the
    attempt has failed. If BGP is off, it becomes True after the agent has tried to end BIRD. `pid` is None while BIRD
    does not run. `running` says whether BIRD listens on the port of BGP, as it does while a session is configured.
    `restarts` counts the restarts of BIRD, and `refusals` the configurations that BIRD has refused, both since the
    agent's start.
    """

    settled: bool = False
    pid: int | None = None
    running: bool = False
    sessions: tuple[Session, ...] = ()
    restarts: int = 0
    refusals: int = 0


@dataclass(frozen=True)
class Tick:
    """The interval TICK (agent.py) has passed: retry operations that failed."""


@dataclass(frozen=True)
class PolicyFailed:
    """The nftables tables could not be programmed, so this round of the agent's loop programs nothing else."""

    why: str


@dataclass(frozen=True)
class Stop:
    """The agent was asked to end, by a signal."""


@dataclass(frozen=True)
class ThreadDied:
    """A thread that the agent needs has ended, so the agent must end, too."""

    why: str


Events = SimpleQueue  # of the classes above
