"""Determines which of etcd's two APIs holds Calico's data, if DATASTORE_TYPE does not say so. Changes nothing.

In etcd 3.4 and 3.5, the APIs v2 and v3 have a store each, which share nothing, and etcd 3.6 has v3 alone. The key Ready
says which of them is current: `true` in the store in use, `false` in one that is frozen, as both are while data moves
from one to the other. `decide` is the table of all cases, and a pure function of what the two APIs show.
"""

from __future__ import annotations

from dataclasses import dataclass

from calicoctl.datastore import keys
from calicoctl.datastore.settings import TYPE, V2, V3
from calicoctl.errors import InvalidValue, StoreError


@dataclass(frozen=True)
class Shown:
    """What one of the APIs shows of Calico's data.

    `served` says whether the servers have this API at all, and `ready` is the value of the key Ready, None if there is
    no such key. `refused` is the error if this user may not read it. `foreign` says that there is data of Calico 3,
    which is only looked for in v3.
    """

    served: bool = True
    ready: str | None = None
    refused: StoreError | None = None
    foreign: bool = False


@dataclass(frozen=True)
class Choice:
    """The API to use (V2 or V3), whether its data is frozen, and why it was chosen, as a clause."""

    api: str
    frozen: bool
    why: str


def decide(v3: Shown, v2: Shown, where: str) -> Choice:
    """Return the API that holds Calico's data; raise StoreError if it must not be used, or if that is not clear.

    `where` names the servers in messages. Raises InvalidValue for a Ready that is neither true nor false.
    """
    for api, shown in (("v3", v3), ("v2", v2)):
        if shown.ready not in (None, "true", "false"):
            raise InvalidValue(keys.READY, f"'{shown.ready}', in etcd's {api} API, is neither true nor false")
    if not (v3.served or v2.served):
        raise StoreError(
            f"etcd at {where} serves neither its v2 API nor the HTTP gateway of its v3 API: start it without "
            "--enable-grpc-gateway=false (with a --config-file, say 'enable-grpc-gateway: true' there)"
        )
    if v3.ready == v2.ready == "true":
        raise StoreError(
            f"etcd at {where} has current data ({keys.READY} is true) in both of its APIs, v2 and v3: perhaps an old "
            f"tool, which knows v2 alone, has registered a host there. Set {TYPE} to {V3} or {V2}, for all hosts alike"
        )
    chosen = _chosen(v3, v2)
    if chosen.api == V3 and v3.foreign:
        raise foreign(where)
    return chosen


def _chosen(v3: Shown, v2: Shown) -> Choice:
    if v3.ready == "true":
        return Choice(V3, False, f"{keys.READY} is true in v3 alone")
    if v2.ready == "true":
        return Choice(V2, False, f"{keys.READY} is true in v2 alone")
    if v3.refused is not None:
        raise v3.refused
    if v2.refused is not None:
        raise StoreError(f"{v2.refused}; so it is not known whether the data is in etcd's v2 or v3 API: set {TYPE}")
    if v2.ready == "false":
        return Choice(V2, True, f"{keys.READY} is false in v2, and not true in v3")
    if v3.ready == "false":
        return Choice(V3, True, f"{keys.READY} is false in v3, and v2 has none")
    if not v3.served:
        return Choice(V2, False, "etcd serves v2 alone")
    return Choice(V3, False, f"neither v2 nor v3 has {keys.READY}, and v3 is the default")


def foreign(where: str) -> StoreError:
    """Return the error for the v3 API of an etcd that Calico 3 uses."""
    return StoreError(
        f"etcd at {where} has the data of another Calico in its v3 API ({keys.OTHER_CALICO}/), and both would assign "
        "the same addresses: use another etcd"
    )
