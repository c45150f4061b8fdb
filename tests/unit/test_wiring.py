"""New endpoints' ids."""

from __future__ import annotations

import uuid

from calicoctl.datastore.keys import EndpointId
from calicoctl.workloads.wiring import _new_endpoint


def test_interfaces_of_endpoints_made_at_the_same_time_have_different_names() -> None:
    ids = [_new_endpoint() for _ in range(500)]
    assert {uuid.UUID(id).version for id in ids} == {1}
    names = [EndpointId("host1", "docker", "w", id).interface for id in ids]
    assert len(set(names)) == 500
    assert len({name[len("cali")] for name in names}) == 16, "the time would be much the same"
