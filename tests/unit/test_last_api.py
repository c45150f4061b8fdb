"""A host whose data was in the v2 API does not begin anew in v3 by itself."""

from __future__ import annotations

import pytest

from calicoctl import state
from calicoctl.datastore import last_api
from calicoctl.datastore.detection import Choice
from calicoctl.errors import CalicoError

NEW = Choice("etcdv3", False, "there is no data yet", is_new=True)
HERE = ("etcd.example", "192.0.2.1")


def refused(members: tuple[str, ...] = HERE, choice: Choice = NEW) -> bool:
    try:
        last_api.refuse_other("host1", members, choice)
    except CalicoError as error:
        assert "data of host host1 was in etcd's v2 API" in str(error) and "DATASTORE_TYPE=etcdv3" in str(error)
        return True
    return False


def test_a_new_host_begins_in_v3_and_one_whose_data_was_in_v2_does_not() -> None:
    assert not refused()
    last_api.remember("host1", HERE, Choice("etcdv2", False, "it has the data"))
    assert refused() and refused(("192.0.2.1", "192.0.2.2"))
    assert not refused(("other.example",)), "another etcd"
    assert not refused(choice=Choice("etcdv3", None, "DATASTORE_TYPE says so"))
    assert not refused(choice=Choice("etcdv2", False, "etcd serves v2 alone", is_new=True))
    last_api.remember("host1", HERE, Choice("etcdv3", None, "DATASTORE_TYPE says so"))
    assert not refused()
    last_api.remember("host1", HERE, Choice("etcdv2", False, "it has the data"))
    last_api.forget("host1")
    assert not refused()


@pytest.mark.parametrize("orchestrator", ["docker", "namespace"])
def test_what_an_older_version_has_connected_was_in_v2(orchestrator: str) -> None:
    state.write("host1", "members", content=b"{}")
    assert not refused()
    state.write("host1", "workloads", orchestrator, "a", content=b"")
    assert refused()
