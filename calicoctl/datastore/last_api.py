"""Remembers in which API of which etcd the data of a host was, in /var/lib/calico/HOST/api.

If an etcd is started again without its v2 API, or upgraded to one that has none, its v3 API looks like that of a new
installation. A host that registers there would drop what is connected to it. Versions of this program that knew v2
alone have not written this file; of them, what is connected says that the host had its data there.
"""

from __future__ import annotations

from collections.abc import Collection

from calicoctl import state
from calicoctl.datastore.detection import Choice
from calicoctl.datastore.settings import TYPE, V2, V3
from calicoctl.errors import CalicoError

_FILE = "api"


def refuse_other(host: str, members: Collection[str], choice: Choice) -> None:
    """Raise CalicoError if the data of a host was in v2, and the choice fell on v3 because there is none in either.

    `members` are the names of the etcd's servers. If none of them was one when the host was registered, this is another
    etcd, which may be new.
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
    """Return what an older version would have written in the file of this host."""
    is_connected = any(state.read_all(host, "workloads", orchestrator) for orchestrator in ("docker", "namespace"))
    return V2.encode() if is_connected else b""


def remember(host: str, members: Collection[str], choice: Choice) -> None:
    """Note that a host is registered in the chosen API of an etcd with these servers. Raises CalicoError."""
    state.write(host, _FILE, content=f"{' '.join([choice.api, *members])}\n".encode())


def forget(host: str) -> None:
    """Remove the note about a host. Raises CalicoError."""
    state.remove(host, _FILE)
