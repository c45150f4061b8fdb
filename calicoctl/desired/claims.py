"""The valid endpoints of a host, and which of them claim the same interface or address. Does not decide who has it."""

from __future__ import annotations

from collections.abc import Iterable

from calicoctl.datastore.keys import EndpointId
from calicoctl.desired.local_endpoint import LocalEndpoint


class Claims:
    """The candidates: endpoints that claim their interface and addresses, each of which only one can have."""

    def __init__(self) -> None:
        self.candidates: dict[EndpointId, LocalEndpoint] = {}
        self._claimants: dict[str, set[EndpointId]] = {}

    def add(self, candidate: LocalEndpoint) -> None:
        """Add a candidate, which must not be there yet."""
        self.candidates[candidate.id] = candidate
        for thing in self.things(candidate.id):
            self._claimants.setdefault(thing, set()).add(candidate.id)

    def withdraw(self, id: EndpointId) -> set[EndpointId]:
        """Remove a candidate, if it is one; return the others that claim the same."""
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
        """Return these endpoints, and the transitive closure of those that claim the same."""
        found = set(ids)
        unseen = set(found)
        while unseen:
            for thing in self.things(unseen.pop()):
                unseen |= self._claimants[thing] - found
                found |= self._claimants[thing]
        return found
