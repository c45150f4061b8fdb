"""Which of etcd's APIs holds the data, by what they show; how that is read is tested with a real etcd."""

from __future__ import annotations

from dataclasses import replace

import pytest

from calicoctl.datastore.detection import Shown, decide
from calicoctl.errors import CalicoError, StoreError

NO_API = Shown(served=False)
DENIED = Shown(refused=StoreError("etcd does not permit this"))
V2, V3 = ("etcdv2", False), ("etcdv3", False)
V2_FROZEN, V3_FROZEN = ("etcdv2", True), ("etcdv3", True)


def ready(value: str | None) -> Shown:
    return Shown(ready=value)


def chosen(v3: Shown, v2: Shown) -> tuple[str, bool]:
    choice = decide(v3, v2, "http://a:1")
    assert choice.why
    return choice.api, choice.frozen


@pytest.mark.parametrize(
    ("v3", "v2", "api"),
    [
        ("true", None, V3),
        ("true", "false", V3),
        ("false", "true", V2),
        ("false", "false", V2_FROZEN),
        ("false", None, V3_FROZEN),
        (None, "true", V2),
        (None, "false", V2_FROZEN),
        (None, None, V3),
    ],
)
def test_ready_decides(v3: str | None, v2: str | None, api: tuple[str, bool]) -> None:
    assert chosen(ready(v3), ready(v2)) == api
    if v2 is None:  # a server without the v2 API is like one that has nothing there
        assert chosen(ready(v3), NO_API) == api
    if v3 is None and v2 is not None:
        assert chosen(NO_API, ready(v2)) == api


def test_current_data_in_both_apis_is_refused() -> None:
    with pytest.raises(StoreError, match=r"http://a:1 has current data .* in both .* Set DATASTORE_TYPE to etcdv3 or"):
        decide(ready("true"), ready("true"), "http://a:1")


def test_a_server_without_the_gateway_is_used_by_v2() -> None:
    assert chosen(NO_API, ready(None)) == V2
    with pytest.raises(StoreError, match=r"neither its v2 API nor .* --enable-grpc-gateway"):
        decide(NO_API, NO_API, "http://a:1")


def test_what_a_user_may_not_read_is_not_guessed() -> None:
    assert chosen(DENIED, ready("true")) == V2  # who used v2 before goes on
    assert chosen(ready("true"), DENIED) == V3
    for v2 in (ready(None), ready("false"), NO_API, DENIED):
        with pytest.raises(StoreError, match=r"^etcd does not permit this$"):
            decide(DENIED, v2, "http://a:1")
    for v3 in (ready(None), ready("false"), NO_API):
        with pytest.raises(StoreError, match=r"^etcd does not permit this; so .* set DATASTORE_TYPE"):
            decide(v3, DENIED, "http://a:1")


@pytest.mark.parametrize("v3", ["true", "false", None])
def test_another_calico_in_v3_is_refused_unless_the_data_is_in_v2(v3: str | None) -> None:
    there = replace(ready(v3), foreign=True)
    with pytest.raises(StoreError, match=r"another Calico in its v3 API .* use another etcd"):
        decide(there, NO_API, "http://a:1")
    if v3 != "true":
        assert chosen(there, ready("true")) == V2


@pytest.mark.parametrize(("v3", "v2"), [("True", None), (None, ""), ("true", "yes")])
def test_another_value_of_ready_is_named(v3: str | None, v2: str | None) -> None:
    with pytest.raises(CalicoError, match=r"/calico/v1/Ready has an invalid value: .* API, is neither true nor"):
        decide(ready(v3), ready(v2), "http://a:1")
