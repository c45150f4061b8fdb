"""What a data plane is to the agent: a manager, which drives one part of the kernel to the desired state.

A manager decides what the kernel should have. Its drivers (nft.py, routes.py, conntrack.py …) read and change the
kernel, and do not evaluate policy. A new data plane is one file with a manager, and one line in the agent's list.
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
    """One data plane. All methods are called by the agent's thread; a round is `on_event` several times, then `apply`.

    The agent calls `apply` only while the store may be used, and in the order of docs/agent.md.
    """

    def on_event(self, event: Any) -> None:  # noqa: B027 not every manager needs it
        """Mark what an event makes dirty. Must be cheap, and change nothing in the kernel.

        Events are a Dirty (what has changed of the desired state), and those of events.py that are about the kernel.
        Tick asks to retry what failed; PolicyFailed says that the tables could not be programmed, so `apply` is not
        called in this round.
        """

    def resync(self) -> None:  # noqa: B027
        """Read what the kernel has, and mark dirty all that may differ.

        It may raise any exception: then the agent calls it again at the next tick, or ends if it was starting.
        """

    @property
    @abstractmethod
    def needs_apply(self) -> bool:
        """Whether `apply` has anything to do."""

    @property
    def due_at(self) -> float | None:
        """When `apply` has something to do by then (monotonic) even if no event comes; None for never."""
        return None

    @abstractmethod
    def apply(self) -> None:
        """Drive the kernel to the snapshot, as far as it is dirty.

        What fails is reported through the context, and is retried at the next Tick. An exception means a defect: the
        agent resyncs all managers and reloads the tables.
        """


@dataclass(frozen=True)
class PendingAddresses:
    """Addresses that an endpoint must not use until a listing of their connections has been verified.

    `requested` is the number of that listing: see Conntrack.request.
    """

    addresses: set[str]
    requested: int


@dataclass(frozen=True)
class Context:
    """What all managers share."""

    snapshot: Snapshot
    """The desired state."""
    health: Health
    """Takes failures of the host as a whole."""
    statuses: EndpointStatuses
    """Takes the status of each endpoint."""
    pending: dict[EndpointId, PendingAddresses] = field(default_factory=dict)
    """Written by the ConntrackManager. The other managers give an endpoint none of these addresses."""

    def pending_addresses(self) -> Mapping[EndpointId, set[str]]:
        """Return the pending addresses by endpoint."""
        return {id: pending.addresses for id, pending in self.pending.items()}
