"""Reads the version, the health and the database size of each member, and whether etcd has users. Changes nothing.

Reads the pages /version, /health and /metrics of each member, for which etcd requires no permissions. If a member does
not answer, the other members are still asked.

Source: https://github.com/etcd-io/etcd/blob/release-3.4/Documentation/metrics.md
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass

from calicoctl import answers
from calicoctl.datastore import keys
from calicoctl.datastore.etcd3_http import Connection, ErrorAnswer
from calicoctl.datastore.etcd3_json import base64, encoded
from calicoctl.datastore.members import RequestFailed
from calicoctl.datastore.settings import EtcdSettings, Member
from calicoctl.errors import StoreError

TIMEOUT = 2.0
"""Seconds to wait for each of a member's answers."""

_METRIC = re.compile(r"^(etcd_\w+) ([0-9.e+]+)$", re.MULTILINE)


@dataclass
class MemberInfo:
    """A member of the cluster. A field is None if it is not known; `healthy` is false then.

    `leader` says whether the member is the leader. `size` is the size of its database, `in_use` is the part of it that
    holds data, and `quota` is the maximum size, all in bytes. `error` says why the member is not healthy, or why one of
    its pages could not be read; None if neither is so.
    """

    url: str
    healthy: bool = False
    version: str | None = None
    leader: bool | None = None
    size: int | None = None
    in_use: int | None = None
    quota: int | None = None
    error: str | None = None


def members(settings: EtcdSettings) -> list[MemberInfo]:
    """Return the members in `settings`, in their order. All are asked at the same time. Raises no exceptions."""
    found = [MemberInfo(settings.url(member)) for member in settings.members]
    threads = [
        threading.Thread(target=_ask, args=(settings, member, info), name=info.url, daemon=True)
        for member, info in zip(settings.members, found)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def users(settings: EtcdSettings) -> tuple[bool | None, bool | None]:
    """Return whether authentication (users) is enabled in etcd's v2 API, and whether in its v3 API.

    Either is None if it cannot be determined.
    """
    found: list[bool | None] = [None, None]
    for number, ask in enumerate((_users_of_v2, _users_of_v3)):
        for member in settings.members:
            connection = Connection(settings, member)
            try:
                found[number] = ask(connection)
                if found[number] is not None:
                    break
            except (RecursionError, RequestFailed, StoreError, ValueError):
                continue
            finally:
                connection.close()
    return found[0], found[1]


def _ask(settings: EtcdSettings, member: Member, info: MemberInfo) -> None:
    connection = Connection(settings, member)
    try:
        page = _page(connection, "/version")
        info.version = _version(page)
        if info.version is None:
            raise connection.no_etcd(page)
        info.healthy = '"health":"true"' in _page(connection, "/health").replace(" ", "")
        metrics = dict(_METRIC.findall(_page(connection, "/metrics")))
        leads = _number(metrics, "etcd_server_is_leader")
        info.leader = None if leads is None else leads == 1
        info.size = _number(metrics, "etcd_mvcc_db_total_size_in_bytes")
        info.in_use = _number(metrics, "etcd_mvcc_db_total_size_in_use_in_bytes")
        info.quota = _number(metrics, "etcd_server_quota_backend_bytes")
        info.error = None if info.healthy else "it has no quorum, or cannot write"
    except (RequestFailed, StoreError) as error:
        info.error = str(error)
    finally:
        connection.close()


def _page(connection: Connection, path: str) -> str:
    return connection.fetch("GET", path, seconds=TIMEOUT)[1]


def _version(page: str) -> str | None:
    try:
        found = answers.parsed(page)["etcdserver"]
    except (LookupError, RecursionError, TypeError, ValueError):
        return None
    return found if isinstance(found, str) else None


def _number(metrics: dict[str, str], name: str) -> int | None:
    try:
        return int(float(metrics[name]))
    except (LookupError, OverflowError, ValueError):
        return None


def _users_of_v2(connection: Connection) -> bool | None:
    status, content = connection.fetch("GET", "/v2/auth/enable", seconds=TIMEOUT)
    answer = answers.parsed(content) if status == 200 else None
    return answer.get("enabled") is True if isinstance(answer, dict) else None


def _users_of_v3(connection: Connection) -> bool | None:
    """Return whether authentication is enabled in etcd's v3 API: whether a request is refused since it has no token.

    Returns None if the request is refused for another reason.
    """
    try:
        connection.exchange("POST", "/v3/kv/range", {"key": base64(encoded(keys.READY))}, TIMEOUT)
    except ErrorAnswer as error:
        return True if error.is_about_token else None
    return False
