"""The backend for etcd's v2 API, on python-etcd: sends requests, and converts errors.

Directories are read by etcd2_tree.py, and watched by etcd2_watch.py. Failover is in members.py, and the bounds on the
size and duration of answers are in answers.py.

Sources: https://github.com/etcd-io/etcd/blob/release-3.4/Documentation/v2/api.md and errorcode.md there.
"""

from __future__ import annotations

import http.client
import json
import posixpath
import re
import secrets
import socket
import time
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, Callable, TypeVar
from urllib.parse import quote

from calicoctl import answers
from calicoctl.datastore import etcd2_tree, last_known
from calicoctl.datastore.etcd2_watch import OpenWatch
from calicoctl.datastore.members import (
    ConnectionLost,
    Deadline,
    Members,
    NotSent,
    NotServed,
    RequestFailed,
    Unanswered,
    Verdict,
    created,
    deleted,
    updated,
    why,
)
from calicoctl.datastore.settings import TYPE, V2, EtcdSettings, Member
from calicoctl.datastore.store import Change, Entry, Fence, Keep, Write, itself, write_in_order
from calicoctl.errors import (
    CalicoError,
    CompareFailed,
    Fenced,
    InvalidValue,
    KeyExists,
    StoreError,
    StoreUnavailable,
    WatchExpired,
    is_shortage,
)

if TYPE_CHECKING:
    import etcd

T = TypeVar("T")

READ_TIMEOUT = 4.0
"""Seconds to wait for one member's answer."""

LARGEST_VALUE = 32 * answers.MiB
"""The maximum size of an answer about one key, in bytes. A value has at most 10 MiB, and more with JSON's escapes."""

LARGEST_DIRECTORY = 128 * answers.MiB
"""The maximum size of an answer about a directory tree, in bytes. 50,000 endpoints take about 50 MiB."""

QUORUM_TIMEOUT = 3.0
"""Timeout in seconds of the quorum read in `_confirm_quorum`."""

WATCH_PATIENCE = 3.0
"""Seconds after which a watch fails if no member answers."""

_NO_INDEX = 2**63 - 1
"""A revision that no entry ever has."""

_NOT_SENT = ("NewConnectionError", "ConnectTimeoutError", "NameResolutionError", "SSLError", "LocationParseError")
"""The names of the errors of urllib3 that occur before a request is sent."""

_GARBLED = ("SSLError", "ProtocolError", "RemoteDisconnected", "ConnectionResetError", "BadStatusLine")
"""The names of the errors that occur if a server speaks another protocol."""


class Etcd2Store:
    """Implements `Store` on etcd's v2 API. A write of a key also creates the directories above the key."""

    atomic = False
    leases = False
    fence: Fence | None = None

    def __init__(
        self,
        settings: EtcdSettings,
        patience: float,
        implied_directories: Callable[[str], Iterable[str]] = lambda key: (),
    ) -> None:
        """`patience`: for how many seconds a request is retried if members can be reached, but do not answer.

        If no member can be reached, a request fails at once.
        `implied_directories` returns, for a deleted key, the directories to remove if they are empty, deepest first.
        """
        self._members = Members(settings, lambda member: _Connection(settings, member), patience)
        self._implied_directories = implied_directories

    def recall_slow_members(self) -> None:
        """Do what Members.recall_slow does. Sends no request."""
        self._members.recall_slow()

    def get(self, key: str) -> Entry | None:
        import etcd

        try:
            return self._read(key, lambda client, path: _entry(client.read(path, quorum=True)))
        except etcd.EtcdKeyNotFound:
            return None

    def tree(self, directory: str) -> list[Entry]:
        return self.collect(directory, lambda entry: entry if entry.problem is None else None)

    def read(
        self, keys: Sequence[str], directories: Sequence[str] = ()
    ) -> tuple[list[Entry | None], list[list[Entry]]]:
        return [self.get(key) for key in keys], [self.tree(directory) for directory in directories]

    def names(self, directory: str, but: Collection[str] = ()) -> list[str]:
        import etcd

        try:
            keys = self._read(directory, _child_keys, directory=True)
        except etcd.EtcdKeyNotFound:
            return []
        return [name for name in (key.rpartition("/")[2] for key in keys if key != directory) if name not in but]

    def exists(self, directory: str) -> bool:
        import etcd

        pending = [directory]
        while pending:
            with suppress(etcd.EtcdKeyNotFound):
                keys, directories = self._read(pending.pop(), _children, directory=True)
                if keys:
                    return True
                pending += directories
        return False

    def create(self, key: str, value: str, ttl: int | None = None) -> Entry:
        import etcd

        def send(connection: _Connection) -> Entry:
            try:
                return connection.request(
                    key, lambda client, path: _entry(client.write(path, value, ttl=ttl, prevExist=False))
                )
            except etcd.EtcdAlreadyExist:
                raise KeyExists(f"etcd key {key} exists already") from None

        return self._write(key, send, created(key, value))

    def update(self, entry: Entry, value: str, ttl: int | None = None) -> Entry:
        import etcd

        def send(connection: _Connection) -> Entry:
            try:
                return connection.request(
                    entry.key, lambda client, path: _entry(client.write(path, value, ttl=ttl, prevIndex=entry.revision))
                )
            except (etcd.EtcdCompareFailed, etcd.EtcdKeyNotFound):
                raise CompareFailed(entry.key) from None

        return self._write(entry.key, send, updated(entry, value))

    def delete(self, entry: Entry) -> None:
        import etcd

        def send(connection: _Connection) -> Entry:
            try:
                connection.request(entry.key, lambda client, path: client.delete(path, prevIndex=entry.revision))
            except etcd.EtcdKeyNotFound:
                pass
            except etcd.EtcdCompareFailed:
                raise CompareFailed(entry.key) from None
            return entry

        self._write(entry.key, send, deleted(entry))
        self._prune(self._implied_directories(entry.key))

    def commit(self, writes: Sequence[Write]) -> list[Entry]:
        return write_in_order(self, writes)

    def touch(self, entry: Entry, value: str, ttl: int) -> Entry:
        return self.update(entry, value, ttl)

    def _prune(self, directories: Iterable[str]) -> None:
        """Remove `directories`, in this order, until one is not empty or a request fails, which raises no exception."""
        import etcd

        # the key is deleted already, and an empty directory that stays does no harm
        with suppress(etcd.EtcdDirNotEmpty, CalicoError, RequestFailed):
            for directory in directories:
                with suppress(etcd.EtcdKeyNotFound):
                    self._ask(directory, lambda client, path: client.delete(path, dir=True))

    def remove_tree(self, directory: str) -> None:
        import etcd

        with suppress(etcd.EtcdKeyNotFound):
            # with the slash, a role for `/calico/*` may delete all of /calico
            self._write_blindly(directory, lambda client, path: client.delete(path + "/", recursive=True, dir=True))

    def put(self, key: str, value: str, ttl: int | None = None) -> None:
        self._write_blindly(key, lambda client, path: client.write(path, value, ttl=ttl))

    def put_all(self, values: Mapping[str, str], ttl: int | None = None) -> None:
        for key, value in values.items():
            self.put(key, value, ttl)

    def _write(self, key: str, send: Callable[[_Connection], Entry], verdict: Verdict) -> Entry:
        """Send a conditional write of a key until its outcome is known; return its entry. See Members.write.

        Before each attempt, the fence is checked: see _check_fence.
        """

        def attempt(connection: _Connection, doubtful: bool) -> Entry:
            self._check_fence(connection, doubtful)
            return send(connection)

        return self._members.write(attempt, lambda: self.get(key), verdict)

    def _write_blindly(self, key: str, send: Callable[[etcd.Client, str], object]) -> None:
        """Send an idempotent write of a key, repeatedly until it is answered. See _Connection.request.

        Before each attempt, the fence is checked: see _check_fence.
        """

        def attempt(connection: _Connection, doubtful: bool) -> None:
            self._check_fence(connection, doubtful)
            connection.request(key, send)

        self._members.resend(attempt)

    def _check_fence(self, connection: _Connection, doubtful: bool) -> None:
        """Raise Fenced if the key of the fence (see store.Fence) has changed.

        The key is only read if the write may have been sent before (`doubtful`), or after the fence's `until`.
        Otherwise, or without a fence, does nothing.
        """
        import etcd

        fence = self.fence
        if fence is None or not (doubtful or time.monotonic() > fence.until):
            return
        try:
            now = connection.request(fence.key, lambda client, path: _entry(client.read(path, quorum=True))).revision
        except etcd.EtcdKeyNotFound:
            now = 0
        if now != fence.revision:
            raise Fenced(fence.key)

    def check_writable(self, *keys: str) -> None:
        import etcd

        for key in keys:
            # etcd checks the permission before it compares the revision, which no entry has
            with suppress(etcd.EtcdCompareFailed, etcd.EtcdKeyNotFound):
                self._read(key, lambda client, path: client.write(path, "", prevIndex=_NO_INDEX))

    def version(self) -> str:
        def read(client: etcd.Client, path: str) -> str:
            answer = client.http.request("GET", f"{client.base_uri}/version", timeout=READ_TIMEOUT, redirect=False)
            return str(answers.parsed(answer.data)["etcdserver"])

        return self._read("", read)

    def collect(self, directory: str, convert: Callable[[Entry], T | None], values: bool = True) -> list[T]:
        return self._tree(directory, convert)[0]

    def list_for_watch(self, directory: str, keep: Keep = itself) -> tuple[list[Entry], int]:
        return self._tree(directory, keep)

    def _tree(self, directory: str, convert: Callable[[Entry], T | None]) -> tuple[list[T], int]:
        """Return what `collect` returns, and the revision to watch the directory from."""
        import etcd

        try:
            read = self._read(
                directory, lambda client, path: etcd2_tree.read(client, directory, convert), directory=True
            )
            return read[0], read[1] + 1
        except etcd.EtcdKeyNotFound as error:
            reached = error.payload.get("index")
            if not isinstance(reached, int):
                raise StoreError("the store does not answer as etcd does: it has no index") from None
            return [], reached + 1

    def watch(self, directory: str, revision: int, seconds: float) -> Generator[list[Change], None, None]:
        with closing(OpenWatch(revision)) as watch:
            while True:
                yield self._await_changes(watch, directory, seconds)

    def _await_changes(self, watch: OpenWatch, directory: str, seconds: float) -> list[Change]:
        """Wait for at most `seconds` for a change below `directory`. Returns a list of at most one change.

        Raises WatchExpired if changes may have been missed, and StoreUnavailable if no member can be reached, or if
        none answers for WATCH_PATIENCE.
        """
        import etcd

        end = time.monotonic() + seconds
        deadline: Deadline | None = None

        def poll(client: etcd.Client, path: str) -> list[Change]:
            if deadline is not None:  # the member before had no quorum: do not wait for this one unless it has
                _confirm_quorum(client, path)
            changes = watch.changes(client, path, end - time.monotonic(), READ_TIMEOUT)
            if not changes and time.monotonic() >= end:
                _confirm_quorum(client, path)
            return changes

        try:
            while True:
                try:
                    changes = self._ask(directory, poll)
                except ConnectionLost as failure:
                    raise WatchExpired(f"a wait for changes was cut short: {failure}") from None
                except Unanswered as failure:
                    deadline = deadline or Deadline(WATCH_PATIENCE)
                    deadline.backoff(failure)
                else:
                    if changes or time.monotonic() >= end:
                        return changes
        except etcd.EtcdKeyNotFound:
            raise StoreError(f"the store does not answer as etcd does: it cannot watch {directory}") from None

    def _read(self, key: str, send: Callable[[etcd.Client, str], T], directory: bool = False) -> T:
        """Send an idempotent request about a key, repeatedly until it is answered. See _Connection.request.

        If no key can have this path, EtcdKeyNotFound is raised without a request.
        """
        import etcd

        if not _is_path(key):
            raise etcd.EtcdKeyNotFound(f"Key not found : {key}", {})
        return self._members.retry(lambda connection: connection.request(key, send, directory))

    def _ask(self, key: str, send: Callable[[etcd.Client, str], T]) -> T:
        """Send a request about a key, without retries. See Members.ask and _Connection.request."""
        return self._members.ask(lambda connection: connection.request(key, send))


def _is_path(key: str) -> bool:
    """Return whether the v2 API can have a key. For others, with `..` in their path for example, it takes another.

    Also return True for "", which stands for no key.
    """
    return key == "" or posixpath.normpath(key) == key


class _Connection:
    """python-etcd's client of one member. Converts exceptions of python-etcd, except those that callers handle."""

    def __init__(self, settings: EtcdSettings, member: Member) -> None:
        self._settings = settings
        self._member = member
        self._url = settings.url(member)

    def request(self, key: str, send: Callable[[etcd.Client, str], T], directory: bool = False) -> T:
        """Call `send` with python-etcd's client and the URL-quoted key; return the result.

        The answer may have up to LARGEST_DIRECTORY bytes if `directory` is true, and LARGEST_VALUE if not. Raises
        python-etcd's exception for an error that callers handle, such as a missing key or a failed comparison. Raises
        StoreError, WatchExpired or InvalidValue for other errors of etcd, RequestFailed (members.py) if there is no
        answer, no leader or no v2 API, and StoreUnavailable if this host lacks memory or file descriptors.
        """
        import etcd
        import urllib3.exceptions

        if not _is_path(key):
            raise StoreError(f"etcd's v2 API can have no key {key}")
        try:
            with answers.bounded(LARGEST_DIRECTORY if directory else LARGEST_VALUE):
                return send(self._client, quote(key))
        except (
            etcd.EtcdConnectionFailed,
            urllib3.exceptions.HTTPError,
            http.client.HTTPException,
            OSError,
            MemoryError,
        ) as error:
            raise self._without_answer(_cause(error)) from error
        except etcd.EtcdException as error:
            raise self._translated(error, key) from None
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise _no_etcd(self._url, error) from error  # JSON of another shape than etcd's

    @cached_property
    def _client(self) -> etcd.Client:
        settings = self._settings
        client = _client_class()(
            host=self._member[0],
            port=self._member[1],
            protocol=settings.scheme,
            ca_cert=settings.ca_cert,
            cert=(settings.cert, settings.key) if settings.cert else None,
            read_timeout=READ_TIMEOUT,
            allow_redirect=False,  # etcd sends none, and another server could redirect a request anywhere
            allow_reconnect=False,  # python-etcd would repeat a write that may have been applied
        )
        if settings.basic is not None:
            client.http.headers["Authorization"] = settings.basic
            client._get_headers = client.http.headers.copy  # python-etcd's own can encode Latin-1 only
        # urllib3 would send a PUT three times before it reports that none was answered
        client.http.connection_pool_kw["retries"] = False
        client.http.pool_classes_by_scheme = last_known.pools()
        if settings.scheme == "https":
            client.http.connection_pool_kw["ssl_context"] = _tls_context(settings)
        return client

    def _without_answer(self, cause: BaseException) -> Exception:
        """Return the exception to raise if a request failed because of `cause`, without an answer."""
        if is_shortage(cause):
            return StoreUnavailable(f"etcd cannot be asked: {why(cause)}")
        garbled = type(cause).__name__ in _GARBLED
        if type(cause).__name__ in _NOT_SENT:
            return NotSent(f"{self._url} ({why(cause)})", garbled)
        kind = Unanswered if _timed_out(cause) else ConnectionLost
        return kind(f"{self._url} did not answer ({why(cause)})", garbled)

    def _translated(self, error: Any, key: str) -> Any:
        """Return the exception to raise for python-etcd's `error`: `error` itself if callers of `request` handle it."""
        import etcd

        url = self._url
        payload = error.payload if isinstance(error.payload, dict) else {}
        cause = str(payload.get("cause", ""))
        if isinstance(error, etcd.EtcdKeyNotFound) and "errorCode" not in payload:
            return self._without_v2()
        if isinstance(error, etcd.EtcdInsufficientPermissions):
            user = self._settings.username
            who = "role 'guest'" if user is None else f"user '{user}' (if the password is right)"
            return StoreError(
                f"etcd at {url} does not permit this user to use {key}: calicoctl comes as its {who}, who must be "
                "allowed to read and write both /calico and /calico/*"
            )
        if isinstance(error, (etcd.EtcdEventIndexCleared, etcd.EtcdWatcherCleared)):
            return WatchExpired(f"etcd at {url} has forgotten the changes that are asked for")
        if isinstance(error, etcd.EtcdNotDir):
            return InvalidValue(cause or key, "it is a key, where a directory is expected")
        if isinstance(error, etcd.EtcdNotFile):
            return InvalidValue(cause or key, "it is a directory, where a key is expected")
        if type(error) is not etcd.EtcdException and not isinstance(error, etcd.EtcdLeaderElectionInProgress):
            return error
        if payload.get("errorCode") in (300, 301) or payload.get("status") in (500, 503):
            return Unanswered(f"{url} says: {cause or payload.get('message')}")
        if "404 page not found" in cause:
            return self._without_v2()
        return _no_etcd(url, error)

    def _without_v2(self) -> NotServed:
        asked = f", which {TYPE}={V2} asks for: unset that to use v3" if self._settings.api else ", where the data was"
        return NotServed(f"etcd at {self._url} does not serve its v2 API{asked}; etcd 3.4 and 3.5 do with --enable-v2")


def _tls_context(settings: EtcdSettings) -> Any:
    """Return the ssl.SSLContext for connections to etcd."""
    import ssl

    from urllib3.util.ssl_ import create_urllib3_context

    context = create_urllib3_context()
    # Python 3.13 refuses an authority without the key usage extension, as `openssl req -x509` creates; etcd accepts it
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if settings.ca_cert is None:
        context.load_default_certs()
    return context


def _client_class() -> type[etcd.Client]:
    """Return a subclass of python-etcd's client that parses no answer with too many elements (answers.ELEMENTS)."""
    import etcd

    class Client(etcd.Client):  # type: ignore[misc]
        def _handle_server_response(self, response: Any) -> Any:
            if response.status not in (200, 201):
                answers.check_elements(response.data.decode())
            return super()._handle_server_response(response)

        def _result_from_response(self, response: Any) -> Any:
            answers.check_elements(response.data.decode())
            return super()._result_from_response(response)

    return Client


def _children(client: etcd.Client, path: str) -> tuple[list[str], list[str]]:
    """Return the keys, and the subdirectories, directly in a directory, both as lists of full paths."""
    import etcd

    result = client.read(path, quorum=True)
    if not result.dir:
        raise etcd.EtcdNotDir("Not a directory")
    below = [leaf for leaf in result.leaves if leaf.key != result.key]
    return [leaf.key for leaf in below if not leaf.dir], [leaf.key for leaf in below if leaf.dir]


def _child_keys(client: etcd.Client, path: str) -> list[str]:
    """Return the full paths of the keys and subdirectories directly in a directory.

    The path of the directory itself may be among them.
    """
    import etcd

    url = f"{client.base_uri}{client.key_endpoint}{path}?quorum=true"
    answer = client.http.request("GET", url, timeout=READ_TIMEOUT, preload_content=False, redirect=False)
    if answer.status != 200:
        client._handle_server_response(answer)  # raises what the status means
    if "x-etcd-index" not in answer.headers:
        raise etcd.EtcdException("there is no etcd index in the answer")
    # the values are in the answer, too: with the blocks of a /16, the parsed answer would take some 80 MiB, so it is
    # searched while it arrives; each quote in a value is escaped, so no value looks like a key
    found: list[str] = []
    rest = b""
    for chunk in answer.stream(2**16):
        rest += chunk
        if not found and b'"dir":true' not in rest.partition(b'"nodes":')[0]:
            raise etcd.EtcdNotDir("Not a directory")
        end = 0
        for match in re.finditer(rb'"key":("(?:[^"\\]|\\.)*")', rest):
            found.append(json.loads(match[1]))
            end = match.end()
        rest = rest[max(end, len(rest) - 2**13) :]
    return found


def _confirm_quorum(client: etcd.Client, path: str) -> None:
    """Check by a quorum read that a member is not partitioned from the others.

    A partitioned member answers a watch as if there were no changes. Raises python-etcd's exceptions if the read fails.
    """
    import etcd

    # a key that does not exist, since existing keys may be large; its name is random, so that nobody has written it
    try:
        client.read(f"{path}/{secrets.token_hex(16)}", quorum=True, timeout=QUORUM_TIMEOUT)
    except etcd.EtcdKeyNotFound as error:
        if "errorCode" not in error.payload:
            raise


def _no_etcd(url: str, error: Exception) -> StoreError:
    return StoreError(f"{url} does not answer as etcd does: {' '.join(str(error).split())[:120]}")


def _entry(result: etcd.EtcdResult) -> Entry:
    if result.dir:
        raise InvalidValue(result.key, "it is a directory, where a key is expected")
    value = result.value or ""
    if not (isinstance(value, str) and isinstance(result.modifiedIndex, int)):
        raise TypeError(f"{result.key} is no key of etcd's")
    return Entry(result.key, value, result.modifiedIndex, result.createdIndex, None, result.expiration is not None)


def _cause(error: Any) -> BaseException:
    """Return the exception behind `error`, which was raised since a request got no answer.

    It is an exception of urllib3, of the operating system, or of answers.py.
    """
    import etcd

    cause = error.cause if isinstance(error, etcd.EtcdConnectionFailed) else error
    reason = getattr(cause, "reason", None)
    if isinstance(reason, BaseException):
        return reason
    refused = [part for part in getattr(cause, "args", ()) if isinstance(part, answers.Refused)]
    return refused[0] if refused else cause or error


def _timed_out(cause: BaseException) -> bool:
    return isinstance(cause, socket.timeout) or "Timeout" in type(cause).__name__
