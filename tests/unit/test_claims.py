"""Claims of endpoints for interfaces and addresses."""

from __future__ import annotations

from calicoctl.datastore.keys import EndpointId
from calicoctl.desired.claims import Claims
from calicoctl.desired.local_endpoint import LocalEndpoint

A, B, C, D = (EndpointId("h", "docker", "w", name) for name in "abcd")


def claims_of(claimed: dict[EndpointId, tuple[str, ...]]) -> Claims:
    claims = Claims()
    for id, addresses in claimed.items():
        claims.add(LocalEndpoint(id, 1, f"cali{id.endpoint}", "02:00:00:00:00:01", addresses, (), None))
    return claims


def test_rivals_are_found_through_other_rivals() -> None:
    claims = claims_of({A: ("10.0.0.1",), B: ("10.0.0.1", "10.0.0.2"), C: ("10.0.0.2",), D: ()})
    assert claims.rivals([A]) == {A, B, C} and claims.rivals([D]) == {D} and claims.rivals([]) == set()
    assert claims.claimants("10.0.0.1") == {A, B} and claims.claimants("10.0.0.3") == set()


def test_claims_are_withdrawn() -> None:
    claims = claims_of({A: ("10.0.0.1",), B: ("10.0.0.1",)})
    assert claims.withdraw(A) == {B}
    assert claims.things(A) == () and claims.claimants("10.0.0.1") == {B} and claims.claimants("calia") == set()
    assert claims.withdraw(A) == set(), "it has none left"
