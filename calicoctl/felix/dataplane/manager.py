"""The interface between the agent and its managers. Each manager drives one part of the kernel to the desired state.

A manager computes what must be in the kernel. Its drivers (nft.py, routes.py, conntrack.py …) read and change the
kernel. A new manager needs one file, and one line in the list of managers in agent.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calicoctl.datastore.keys import EndpointId
    from calicoctl.desired.snapshot import Snapshot
    from calicoctl.felix.health import Health
    from calicoctl.felix.report import EndpointStatuses


class Manager(ABC):
    """Drives one part of the kernel to the desired state. All methods are called by the agent's thread.

    In each round of its loop, the agent calls `on_event` for each event. Then it calls `apply` of all managers, in the
    order of docs/agent.md, if `needs_apply` of any manager is True. While the snapshot must not be applied, the agent
    calls `restore` in each round, and never `apply`.
    """

    def on_event(self, event: Any) -> None:  # noqa: B027 not every manager needs it
        """Mark what must be programmed again because of an event. Must be fast, and must not change the kernel.

        An event is a Dirty (a change of the desired state), a conntrack.Listing, or an event of events.py.
        """

    def resync(self) -> None:  # noqa: B027
        """Read the state of the kernel, and mark dirty whatever may differ from the desired state.

        May raise any exception. After an exception, the agent calls `resync` again at the next Tick; at the agent's
        start, an exception ends the agent instead.
        """

    @property
    @abstractmethod
    def needs_apply(self) -> bool:
        """Whether `apply` has anything to do. If it is True for any manager, `apply` of all managers is called."""

    @property
    def due_at(self) -> float | None:
        """When `apply` will have something to do even without an event (monotonic); None if there is no such time."""
        return None

    @abstractmethod
    def apply(self) -> None:
        """Program what is dirty, so that the kernel matches the snapshot.

        Report failures through the Context, and retry them at the next Tick. An exception is an internal error: the
        agent then resyncs all managers and reloads the tables.
        """

    def restore(self) -> None:  # noqa: B027
        """Repair the state of the kernel as far as that is possible without the snapshot, and change nothing else.

        Called instead of `apply` while the snapshot must not be applied: see `Agent._may_apply`.
        """


@dataclass(frozen=True)
class PendingAddresses:
    """Addresses that are new to an endpoint, and that the endpoint must not use yet.

    They stay pending until their open connections have been listed, and those that policy denies have been ended.
    `requested` is the number of the request for that listing: see Conntrack.request.
    """

    addresses: set[str]
    requested: int


@dataclass(frozen=True)
class Context:
    """Objects that all managers share."""

    snapshot: Snapshot
    """The desired state."""
    health: Health
    """Receives failures of the host as a whole."""
    statuses: EndpointStatuses
    """Receives the status of each endpoint."""
    pending: dict[EndpointId, PendingAddresses] = field(default_factory=dict)
    """Endpoint -> its pending addresses. The ConntrackManager sets them, and the other managers do not program them."""

    def pending_addresses(self) -> Mapping[EndpointId, set[str]]:
        """Return the pending addresses by endpoint."""
        return {id: pending.addresses for id, pending in self.pending.items()}
