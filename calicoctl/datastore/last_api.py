"""Records in which API of which etcd servers a host is registered. The record is the file /var/lib/calico/HOST/api.

If an etcd with data in its v2 API is restarted without this API, its empty v3 API looks like that of a new etcd. If the
host registered there, its workloads would be disconnected. The record prevents that.
"""

from __future__ import annotations

from collections.abc import Collection

from calicoctl import state
from calicoctl.datastore.detection import Choice
from calicoctl.datastore.settings import TYPE, V2, V3
from calicoctl.errors import CalicoError

_FILE = "api"


def refuse_other(host: str, members: Collection[str], choice: Choice) -> None:
    """Raise CalicoError if `choice` is the v3 API of an etcd without data, but the host's data was in v2.

    `members` are the host names or addresses of the etcd's servers. If the host's record names servers, but none of
    `members`, the record is about another etcd, and nothing is raised.
    """
    if not choice.is_new or choice.api == V2:
        return
    api, *before = (state.read(host, _FILE) or _of_older_version(host)).decode(errors="replace").split() or [""]
    if api == V2 and (not before or set(before) & set(members)):
        raise CalicoError(
            f"The data of host {host} was in etcd's v2 API, and there is none now: neither there nor in its v3 API. If "
            "this is the right etcd, start it with --enable-v2 (etcd 3.4 or 3.5) to have it back; to begin anew in v3, "
            f"set {TYPE}={V3}"
        )


def _of_older_version(host: str) -> bytes:
    """Return the record to assume for a host that has none: v2 if it has connected workloads, empty if it has not."""
    # only versions that knew v2 alone did not write the record
    is_connected = any(state.read_all(host, "workloads", orchestrator) for orchestrator in ("docker", "namespace"))
    return V2.encode() if is_connected else b""


def remember(host: str, members: Collection[str], choice: Choice) -> None:
    """Record that a host is registered in the API of `choice`, and who etcd's servers are.

    `members` are their host names or addresses.
    Raises CalicoError if the file cannot be written.
    """
    state.write(host, _FILE, content=f"{' '.join([choice.api, *members])}\n".encode())


def forget(host: str) -> None:
    """Remove the record of a host, if there is one. Raises CalicoError if the file cannot be removed."""
    state.remove(host, _FILE)
