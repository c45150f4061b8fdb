"""The keys of the store, and what they identify."""

from __future__ import annotations

import pytest

from calicoctl.datastore import keys
from calicoctl.datastore.keys import EndpointId

ID = EndpointId("h", "docker", "w", "e")


def test_an_endpoint_and_its_status_are_found_by_their_keys() -> None:
    assert keys.parse_endpoint(keys.endpoint(ID)) == ID and keys.parse_felix_endpoint(keys.felix_endpoint(ID)) == ID
    assert keys.parse_endpoint(keys.felix_endpoint(ID)) is None and keys.parse_felix_endpoint(keys.endpoint(ID)) is None
    for key in (keys.host_bird_ip("h"), keys.endpoint(ID) + "/x", keys.endpoints("h", "docker", "w")):
        assert keys.parse_endpoint(key) is None


def test_the_directories_of_a_workload_go_with_its_last_key() -> None:
    workload = "/calico/v1/host/h/workload/docker/w"
    assert keys.implied_directories(keys.endpoint(ID)) == [f"{workload}/endpoint", workload]
    reports = "/calico/felix/v1/host/h/workload/docker"
    assert keys.implied_directories(keys.felix_endpoint(ID)) == [f"{reports}/w/endpoint", f"{reports}/w", reports]


def test_the_directory_of_a_profile_goes_with_its_last_key() -> None:
    profile = keys.profile("web")
    assert keys.implied_directories(keys.profile_tags("web")) == [profile]
    assert keys.implied_directories(f"{profile}/a/b") == [f"{profile}/a", profile]
    assert keys.implied_directories(profile) == []


@pytest.mark.parametrize(
    "key",
    [keys.pool(4, "10.0.0.0/8"), keys.felix_status("h"), keys.ipam_handle("x"), keys.bgp_peer(4, "192.0.2.1"), "/a/b"],
)
def test_other_directories_stay(key: str) -> None:
    assert keys.implied_directories(key) == []
