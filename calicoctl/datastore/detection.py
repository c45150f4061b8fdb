"""Determines which of etcd's two APIs holds Calico's data, if DATASTORE_TYPE does not say so. Changes nothing.

In etcd 3.4 and 3.5, the APIs v2 and v3 have separate data; etcd 3.6 has only v3. The key Ready is `true` in the API
whose data is current. It is `false` in an API whose data is frozen; while the data is moved from one API to the other,
it is `false` in both. Both APIs are queried at the same time.

During a rolling restart or upgrade, some members may serve v2, and others not. So if the member that was asked does not
serve it, and Ready is not `true` in v3, the other members are asked as well.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Callable

from calicoctl import answers
from calicoctl.datastore import keys
from calicoctl.datastore.etcd3_http import Connection
from calicoctl.datastore.members import Members, NotServed, Unanswered
from calicoctl.datastore.settings import TYPE, V2, V3, EtcdSettings, Member
from calicoctl.errors import InvalidValue, NoSuchApi, StoreError, StoreUnavailable

if TYPE_CHECKING:
    from calicoctl.datastore.etcd3 import Etcd3Store
    from calicoctl.datastore.store import Entry, Store


@dataclass(frozen=True)
class Shown:
    """The state of Calico's data in one API of etcd.

    `served` says whether the servers have this API. `ready` is the value of the key Ready, None if there is no such
    key, and `revision` its revision, or 0. If the key could not be read, for example since etcd refused that, `refused`
    is the error, and `ready` is None. `foreign` says whether there is data of Calico 3; it is determined for v3 only.
    """

    served: bool = True
    ready: str | None = None
    revision: int = 0
    refused: StoreError | None = None
    foreign: bool = False


@dataclass(frozen=True)
class Choice:
    """The API to use (V2 or V3). `why` is the reason, as a clause.

    `frozen` says whether the data must not be changed, None if that is unknown. `revision` is that of the key Ready in
    the API, 0 if there is no such key. `at` is the time when Ready was asked for (monotonic, seconds). `is_new` says
    that no data was found in either API. `pinned` says that the environment names the API.
    """

    api: str
    frozen: bool | None
    why: str
    is_new: bool = False
    pinned: bool = False
    revision: int = 0
    at: float = field(default_factory=lambda: time.monotonic(), compare=False)

    @property
    def version(self) -> str:
        """The name of the API for messages: v2 or v3."""
        return self.api[-2:]


def decide(v3: Shown, v2: Shown, where: str) -> Choice:
    """Return which API holds Calico's data, given the states of both.

    `where` are the servers' URLs, for messages. Raises StoreError if neither API is served, if it is unclear which API
    holds the data, or if that API must not be used. Raises InvalidValue if a value of Ready is neither `true` nor
    `false`.
    """
    check_ready(v3.ready, v2.ready)
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
    return replace(chosen, revision=(v3 if chosen.api == V3 else v2).revision)


def check_ready(v3: str | None, v2: str | None) -> None:
    """Raise InvalidValue if the key Ready in v3 or in v2 exists, and its value is neither `true` nor `false`.

    `v3` and `v2` are the two values, None if there is no such key.
    """
    for api, ready in (("v3", v3), ("v2", v2)):
        if ready not in (None, "true", "false"):
            raise InvalidValue(keys.READY, f"'{ready}', in etcd's {api} API, is neither true nor false")


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
        return Choice(V2, False, "etcd serves v2 alone", is_new=True)
    return Choice(V3, False, f"there is no data yet ({keys.READY}), and v3 is the default", is_new=True)


def foreign(where: str) -> StoreError:
    """Return the error for an etcd, with the URLs `where`, whose v3 API holds data of Calico 3."""
    return StoreError(
        f"etcd at {where} has the data of another Calico in its v3 API ({keys.OTHER_CALICO}/), and both would assign "
        "the same addresses: use another etcd"
    )


def detect(settings: EtcdSettings, v3: Etcd3Store, patience: float) -> Choice:
    """Query both APIs, v3 through the backend `v3`, and return the API to use.

    `patience`: see backends.PATIENCE. Raises what `decide` raises, and StoreUnavailable if no member answers.
    """
    question = _Question(settings, patience)
    question.start()
    v3_shown, v2_shown = ask_v3(v3), question.answer()
    if not v2_shown.served and v3_shown.ready != "true" and len(settings.members) > 1:
        v2_shown = question.ask_all()
    return decide(v3_shown, v2_shown, settings.urls)


def ask_v2(v2: Store) -> Shown:
    """Query the v2 API through its backend, and return its state. Raises StoreUnavailable if no member answers."""
    return _asked(lambda: (v2.get(keys.READY), False))


def ask_v3(v3: Etcd3Store) -> Shown:
    """Query the v3 API, and return its state. Raises StoreUnavailable if no member answers."""

    def read() -> tuple[Entry | None, bool]:
        found = v3.read_at_once([keys.READY], peeked=[keys.OTHER_CALICO])
        if found is None:
            raise StoreUnavailable(f"the value of the etcd key {keys.READY} is too large")
        (ready,), _, (foreign,) = found
        return ready, foreign

    return _asked(read)


def _asked(read: Callable[[], tuple[Entry | None, bool]]) -> Shown:
    """Return the state of an API. `read` returns the entry of Ready, and whether the API has data of Calico 3."""
    try:
        ready, foreign = read()
    except NoSuchApi:
        return Shown(served=False)
    except StoreUnavailable:
        raise
    except StoreError as error:
        return Shown(refused=error)
    return Shown(foreign=foreign) if ready is None else Shown(True, ready.value, ready.revision, foreign=foreign)


class _Question(threading.Thread):
    """A thread that queries the v2 API. It does not use python-etcd, whose import takes longer than the query."""

    def __init__(self, settings: EtcdSettings, patience: float) -> None:
        super().__init__(name="etcd's v2 API", daemon=True)
        self._settings = settings
        self._members = Members(settings, self._connection, patience)
        self._shown: Shown | Exception | None = None

    def run(self) -> None:
        try:
            self._shown = self._members.retry(_read_ready_of_one)
        except StoreUnavailable as error:
            self._shown = error
        except StoreError as error:
            self._shown = Shown(refused=error)
        except Exception as error:  # it is raised in the thread that waits for the answer
            self._shown = error

    def answer(self) -> Shown:
        """Wait until the query is answered; return the state of the v2 API, or raise the exception of the query.

        If the member that has answered does not serve the v2 API, the result's `served` is false, although other
        members may serve it.
        """
        self.join()
        assert self._shown is not None
        if isinstance(self._shown, Exception):
            raise self._shown
        return self._shown

    def ask_all(self) -> Shown:
        """Query the members, after `answer`, until one serves the v2 API; return the state of the API.

        If the reachable members do not serve it, but another one cannot be reached or does not answer, the state is not
        known: then the result's `refused` says so.
        """
        try:
            return self._members.retry(_read_ready)
        except NoSuchApi:
            return Shown(served=False)
        except StoreError as error:
            return Shown(refused=error)

    def _connection(self, member: Member) -> Connection:
        connection = Connection(self._settings, member)
        connection.token = self._settings.basic
        return connection


def _read_ready_of_one(member: Connection) -> Shown:
    """Do what `_read_ready` does; if the member does not serve the API, return this instead of raising NotServed."""
    try:
        return _read_ready(member)
    except NotServed:
        return Shown(served=False)


def _read_ready(member: Connection) -> Shown:
    """Ask one member for the key Ready in the v2 API, and return the state of the API.

    Raises NotServed if the member does not serve the API, another RequestFailed if there is no answer, and StoreError
    if the answer is not etcd's.

    Source: https://github.com/etcd-io/etcd/blob/release-3.4/Documentation/v2/errorcode.md
    """
    status, content = member.fetch("GET", f"/v2/keys{keys.READY}?quorum=true")
    member.close()
    try:
        answer = answers.parsed(content)
    except (RecursionError, ValueError):
        answer = None
    if not isinstance(answer, dict):
        if status == 404:
            raise NotServed(f"etcd at {member.url} does not serve its v2 API")
        answer = {}
    code, node = answer.get("errorCode"), answer.get("node")
    if code == 100:
        return Shown()
    if code == 110:
        return Shown(refused=StoreError(f"etcd at {member.url} does not let this user read {keys.READY} in its v2 API"))
    if code in (300, 301) or status in (500, 503):
        raise Unanswered(f"{member.url} says: {answer.get('message', status)}")
    if status == 200 and isinstance(node, dict):
        value, revision = node.get("value"), node.get("modifiedIndex")
        if isinstance(value, str) and isinstance(revision, int):
            return Shown(ready=value, revision=revision)
    raise member.no_etcd(f"status {status}, {content[:100]}")
