"""Decides which of this host's valid endpoints get the interface and the addresses that they claim.

An endpoint wins its interface and all its addresses, or nothing. It loses if an endpoint that was created earlier has
won its interface or one of its addresses. Then endpoints that were created later can win whatever the loser claims.

After a change, only those endpoints are decided again that the change can affect. To decide all again would take too
long: anybody who may write to the store can create any number of endpoints with the same interface or addresses.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right, insort
from collections.abc import Iterable

from calicoctl import limits
from calicoctl.datastore.keys import EndpointId
from calicoctl.desired.local_endpoint import LocalEndpoint

_Claim = tuple[int, str, str, str]
"""The claim of an endpoint to its interface and its addresses: the revision at which the endpoint was created, and the
endpoint's id, workload and orchestrator. The smallest claim wins.
"""


class Claims:
    """The candidates (the valid, active endpoints of this host), and which of them win what they claim."""

    def __init__(self) -> None:
        self.candidates: dict[EndpointId, LocalEndpoint] = {}
        self._claims: dict[EndpointId, _Claim] = {}
        self._ids: dict[_Claim, EndpointId] = {}
        self._claimants: dict[str, list[_Claim]] = {}
        """Interface or address -> the claims to it, in ascending order."""
        self._holders: dict[str, _Claim] = {}
        """Interface or address -> the claim that won it in the last `decide`. The claim may have been withdrawn since
        then.
        """
        self._held: dict[EndpointId, tuple[str, ...]] = {}
        """Winner -> its interface and its addresses, as of the last `decide`."""
        self._crossed: set[str] = set()
        """The interfaces and addresses whose number of claims has crossed limits.CLAIMANTS since the last `decide`."""

    def add(self, candidate: LocalEndpoint, created: int) -> None:
        """Add an endpoint, which must not be a candidate yet, to the candidates.

        `created` is the revision of the store at which the endpoint was created.
        """
        id = candidate.id
        claim = (created, id.endpoint, id.workload, id.orchestrator)
        self.candidates[id], self._claims[id], self._ids[claim] = candidate, claim, id
        for thing in self.things(id):
            claimants = self._claimants.setdefault(thing, [])
            insort(claimants, claim)
            if len(claimants) == limits.CLAIMANTS + 1:
                self._crossed.add(thing)

    def withdraw(self, id: EndpointId) -> None:
        """Remove an endpoint from the candidates, if it is a candidate."""
        for thing in self.things(id):
            claimants = self._claimants[thing]
            del claimants[bisect_right(claimants, self._claims[id]) - 1]
            if len(claimants) == limits.CLAIMANTS:
                self._crossed.add(thing)
            if not claimants:
                del self._claimants[thing]
        if self.candidates.pop(id, None) is not None:
            del self._ids[self._claims.pop(id)]

    def things(self, id: EndpointId) -> tuple[str, ...]:
        """Return the interface and the addresses that an endpoint claims, () if the endpoint is not a candidate."""
        candidate = self.candidates.get(id)
        return () if candidate is None else (candidate.interface, *candidate.addresses)

    def holder(self, thing: str) -> EndpointId | None:
        """Return the endpoint that won `thing`, an interface or an address, in the last `decide`.

        Return None if no endpoint won it, or if the winner was withdrawn since then.
        """
        claim = self._holders.get(thing)
        return None if claim is None else self._ids.get(claim)

    def decide(self, changed: Iterable[EndpointId]) -> dict[EndpointId, str | None]:
        """Decide again after the endpoints `changed` were added or withdrawn, or both.

        Return candidate -> reason why it loses, or None if it wins, for the candidates that were decided: those that
        were added, and those that a change can affect. They are in ascending order of their claims.
        """
        freed: set[str] = set()
        waiting: list[_Claim] = []
        found: dict[EndpointId, str | None] = {}
        for thing in self._crossed:  # the reason names the winner, or does so no longer
            waiting += self._claimants.get(thing, ())[: limits.CLAIMANTS + 1]
        self._crossed = set()
        for id in changed:
            claim, things = self._claims.get(id), self.things(id)
            for thing in self._held.get(id, ()):
                if self._holders.get(thing) != claim or thing not in things:
                    del self._holders[thing]
                    freed.add(thing)
                    waiting += self._claimants.get(thing, ())[:1]
            if claim is None:
                self._held.pop(id, None)
            else:
                waiting.append(claim)
        heapq.heapify(waiting)
        while waiting:
            claim = heapq.heappop(waiting)
            id = self._ids[claim]
            if id not in found:
                found[id] = self._decide(claim, id, freed, waiting)
        return found

    def _decide(self, claim: _Claim, id: EndpointId, freed: set[str], waiting: list[_Claim]) -> str | None:
        """Decide whether the candidate `id`, with the claim `claim`, wins. Return why it loses, or None if it wins.

        `waiting` is the heap of the claims that are still to be decided, none of which is smaller than `claim`. The
        claims that this decision affects, which are larger, are added to the heap. `freed` are the interfaces and
        addresses that have lost their winner. Those that lose their winner by this decision are added.
        """
        things = self.things(id)
        lost = next((thing for thing in things if self._holders.get(thing, claim) < claim), None)
        if lost is None:
            for thing in things:
                before = self._holders.get(thing)
                if before != claim:
                    if before is not None:
                        heapq.heappush(waiting, before)
                    self._holders[thing] = claim
                    if len(self._claimants[thing]) <= limits.CLAIMANTS:
                        for later in self._after(claim, thing, limits.CLAIMANTS):
                            heapq.heappush(waiting, later)
            self._held[id] = things
            return None
        for thing in self._held.pop(id, ()):
            if self._holders.get(thing) == claim:
                del self._holders[thing]
                freed.add(thing)
        for thing in things:
            if thing in freed and thing not in self._holders:
                for later in self._after(claim, thing, 1):
                    heapq.heappush(waiting, later)
        if len(self._claimants[lost]) > limits.CLAIMANTS:
            return f"its interface or an address is another's already (more than {limits.CLAIMANTS} endpoints list it)"
        owner = self._ids[self._holders[lost]]
        return f"its interface or an address is that of endpoint {owner.endpoint} already"

    def _after(self, claim: _Claim, thing: str, most: int) -> list[_Claim]:
        """Return, in ascending order, the claims to an interface or address that follow `claim`: at most `most`."""
        claimants = self._claimants[thing]
        place = bisect_right(claimants, claim)
        return claimants[place : place + most]
