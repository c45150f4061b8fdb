"""The valid endpoints of a host, and which of them claim the same interface or address.

snapshot.py decides which of the claimants gets the interface or the address.
"""

from __future__ import annotations

from collections.abc import Iterable

from calicoctl.datastore.keys import EndpointId
from calicoctl.desired.local_endpoint import LocalEndpoint


class Claims:
    """The candidates: valid endpoints. If several claim the same interface or address, only one can have it."""

    def __init__(self) -> None:
        self.candidates: dict[EndpointId, LocalEndpoint] = {}
        self._claimants: dict[str, set[EndpointId]] = {}

    def add(self, candidate: LocalEndpoint) -> None:
        """Add a candidate. Its id must not be among the candidates yet."""
        self.candidates[candidate.id] = candidate
        for thing in self.things(candidate.id):
            self._claimants.setdefault(thing, set()).add(candidate.id)

    def withdraw(self, id: EndpointId) -> set[EndpointId]:
        """Remove an endpoint, if it is a candidate.

        Returns the other candidates that claim its interface or one of its addresses.
        """
        others = set()
        for thing in self.things(id):
            claimants = self._claimants[thing]
            claimants.discard(id)
            others |= claimants
            if not claimants:
                del self._claimants[thing]
        self.candidates.pop(id, None)
        return others

    def things(self, id: EndpointId) -> tuple[str, ...]:
        """Return the interface and the addresses that an endpoint claims; nothing if it is not a candidate."""
        candidate = self.candidates.get(id)
        return () if candidate is None else (candidate.interface, *candidate.addresses)

    def claimants(self, thing: str) -> set[EndpointId]:
        """Return the candidates that claim an interface or an address."""
        return self._claimants.get(thing, set())

    def rivals(self, ids: Iterable[EndpointId]) -> set[EndpointId]:
        """Return these endpoints, and all candidates that share a claim with one of them, directly or transitively."""
        found = set(ids)
        unseen = set(found)
        while unseen:
            for thing in self.things(unseen.pop()):
                unseen |= self._claimants[thing] - found
                found |= self._claimants[thing]
        return found
