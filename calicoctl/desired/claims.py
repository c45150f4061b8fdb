"""The valid endpoints of a host, and which of them claim the same interface or address.

snapshot.py decides which of these has the interface or the address.
"""

from __future__ import annotations

from collections.abc import Iterable

from calicoctl.datastore.keys import EndpointId
from calicoctl.desired.local_endpoint import LocalEndpoint


class Claims:
    """The candidates: valid endpoints. Where several of them claim an interface or an address, only one can have it."""

    def __init__(self) -> None:
        self.candidates: dict[EndpointId, LocalEndpoint] = {}
        self._claimants: dict[str, set[EndpointId]] = {}

    def add(self, candidate: LocalEndpoint) -> None:
        """Add a candidate, which must not be there yet."""
        self.candidates[candidate.id] = candidate
        for thing in self.things(candidate.id):
            self._claimants.setdefault(thing, set()).add(candidate.id)

    def withdraw(self, id: EndpointId) -> set[EndpointId]:
        """Remove an endpoint, if it is a candidate; return the others that claim its interface or an address of it."""
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
        """Return what an endpoint claims, its interface and addresses: nothing if it is no candidate."""
        candidate = self.candidates.get(id)
        return () if candidate is None else (candidate.interface, *candidate.addresses)

    def claimants(self, thing: str) -> set[EndpointId]:
        """Return the candidates that claim an interface or an address."""
        return self._claimants.get(thing, set())

    def rivals(self, ids: Iterable[EndpointId]) -> set[EndpointId]:
        """Return these endpoints, and all that share a claim with one of them, directly or through others."""
        found = set(ids)
        unseen = set(found)
        while unseen:
            for thing in self.things(unseen.pop()):
                unseen |= self._claimants[thing] - found
                found |= self._claimants[thing]
        return found
