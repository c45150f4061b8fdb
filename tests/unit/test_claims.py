"""Claims of endpoints for interfaces and addresses."""

from __future__ import annotations

import random

import pytest

from calicoctl import limits
from calicoctl.datastore.keys import EndpointId
from calicoctl.desired.claims import Claims
from calicoctl.desired.local_endpoint import LocalEndpoint

A, B, C, D = (EndpointId("h", "docker", "w", name) for name in "abcd")


def candidate(id: EndpointId, *addresses: str) -> LocalEndpoint:
    return LocalEndpoint(id, 1, f"cali{id.endpoint}", "02:00:00:00:00:01", addresses, (), None)


def claims_of(claimed: dict[EndpointId, tuple[str, ...]]) -> Claims:
    claims = Claims()
    for created, (id, addresses) in enumerate(claimed.items()):
        claims.add(candidate(id, *addresses), created)
    return claims


def winners(found: dict[EndpointId, str | None]) -> list[EndpointId]:
    return [id for id, why in found.items() if why is None]


def test_the_first_wins_and_the_next_takes_over_through_others() -> None:
    claims = claims_of({A: ("10.0.0.1",), B: ("10.0.0.1", "10.0.0.2"), C: ("10.0.0.2",), D: ()})
    found = claims.decide([A, B, C, D])
    assert winners(found) == [A, C, D] and "endpoint a already" in str(found[B])
    assert claims.holder("10.0.0.1") == A and claims.holder("10.0.0.2") == C and claims.holder("10.0.0.3") is None
    claims.withdraw(A)
    found = claims.decide([A])
    assert winners(found) == [B] and "endpoint b already" in str(found[C]) and claims.things(A) == ()
    assert claims.holder("calia") is None
    claims.withdraw(A)
    assert claims.decide([A]) == {}, "it has none left"


def greedy(made: dict[EndpointId, tuple[int, LocalEndpoint]]) -> dict[EndpointId, EndpointId | None]:
    """Return who wins (None) and who loses to whom, decided from the start."""
    taken: dict[str, EndpointId] = {}
    found: dict[EndpointId, EndpointId | None] = {}
    for id, (_, one) in sorted(made.items(), key=lambda item: (item[1][0], item[0].endpoint)):
        things = (one.interface, *one.addresses)
        found[id] = next((taken[thing] for thing in things if thing in taken), None)
        if found[id] is None:
            taken.update(dict.fromkeys(things, id))
    return found


@pytest.mark.parametrize("most", [100, 3])
def test_changes_one_by_one_decide_as_all_at_once(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CLAIMANTS", most)
    for seed in range(40):
        chosen = random.Random(seed)
        ids = [EndpointId("h", "docker", "w", f"{number:02}") for number in range(16)]
        claims = Claims()
        made: dict[EndpointId, tuple[int, LocalEndpoint]] = {}
        known: dict[EndpointId, str | None] = {}
        for step in range(60):
            changed = chosen.sample(ids, chosen.choice((1, 1, 1, 4)))
            for id in changed:
                created = made[id][0] if id in made and chosen.random() < 0.7 else step
                claims.withdraw(id)
                made.pop(id, None)
                known.pop(id, None)
                if chosen.random() < 0.7:
                    addresses = chosen.sample([f"10.0.0.{number}" for number in range(6)], chosen.randrange(4))
                    made[id] = created, candidate(id, *addresses)
                    claims.add(made[id][1], created)
            known.update(claims.decide(changed))
            expected = greedy(made)
            assert {id: why is None for id, why in known.items()} == {
                id: owner is None for id, owner in expected.items()
            }, (seed, step)
            if most == 100:
                assert all(f"endpoint {owner.endpoint} " in str(known[id]) for id, owner in expected.items() if owner)


def test_of_many_claimants_only_few_are_decided() -> None:
    ids = [EndpointId("h", "docker", "w", f"{number:04}") for number in range(1000)]
    claims, decided = Claims(), 0
    for created, id in enumerate(ids):
        claims.add(candidate(id, "10.0.0.1", "10.0.0.2"), created)
        decided += len(claims.decide([id]))
    assert decided == len(ids) + limits.CLAIMANTS
    for id in (ids[0], ids[500]):  # a change of its own that does not touch its claims
        claims.withdraw(id)
        claims.add(candidate(id, "10.0.0.1", "10.0.0.2"), int(id.endpoint))
        assert set(claims.decide([id])) == {id}
    claims.withdraw(ids[0])
    found = claims.decide([ids[0]])
    assert found == {ids[1]: None} and claims.holder("10.0.0.2") == ids[1]
    claims.add(candidate(ids[0], "10.0.0.2"), 0)
    found = claims.decide([ids[0]])
    assert winners(found) == [ids[0]] and "more than 100" in str(found[ids[1]]), "it was created first"
    assert claims.holder("10.0.0.1") is None, "all who list it list the other one, too"
