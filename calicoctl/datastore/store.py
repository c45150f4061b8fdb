"""The narrow seam over etcd's v2 API: get, tree, create, compare-and-swap, delete, prune, watch. Knows no Calico.

`EtcdStore` asks the members of the cluster in turn, so one dead member stops nothing, and never sends a write again
that may have been applied without looking first: see `_judge`. One python-etcd client per member is used, without its
own reconnecting, which repeats unanswered writes blindly.

Source: https://github.com/etcd-io/etcd/blob/release-3.4/Documentation/v2/api.md and …/v2/errorcode.md
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Callable, Mapping, Protocol, TypeVar
from urllib.parse import quote, urlsplit

from calicoctl.environment import EnvironmentFile
from calicoctl.errors import (
    CalicoError,
    CompareFailed,
    Conflict,
    InvalidValue,
    KeyExists,
    NotFound,
    StoreError,
    StoreUnavailable,
    WatchExpired,
    is_shortage,
    redact_userinfo,
)

if TYPE_CHECKING:
    import etcd

T = TypeVar("T")

READ_TIMEOUT = 4.0
"""Seconds to wait for one member's answer. A member that hangs costs this once a command."""

CONFIRMATION = 0.5
"""Seconds that a watch which saw nothing is asked again, before what happened elsewhere is passed over."""

QUORUM_TIMEOUT = 3.0
"""Seconds for a member to show that it has the majority of its cluster behind it, after a watch that saw nothing."""

PATIENCE = 20.0
"""Seconds for which a cluster that answers, but can do nothing (it elects a leader, say), is asked again."""

WATCH_PATIENCE = 3.0
"""The same for a watch, after which its caller is told: what is reported of the store must be true within seconds."""

ATTEMPTS = 200
"""How often a change of a key that others change too is tried."""

DEFAULT_HOSTS = (("127.0.0.1", 2379),)

_NO_INDEX = 2**63 - 1
"""The index of no entry."""

_ENABLE_V2 = (
    "start it with --enable-v2 (for Debian's package etcd-server: "
    "echo ETCD_ENABLE_V2=true | sudo tee -a /etc/default/etcd && sudo systemctl restart etcd)"
)

_NOT_SENT = ("NewConnectionError", "ConnectTimeoutError", "NameResolutionError", "SSLError", "LocationParseError")

_MISUNDERSTOOD = ("SSLError", "ProtocolError", "RemoteDisconnected", "ConnectionResetError", "BadStatusLine")
"""How connections fail with a server that speaks something else."""


@dataclass(frozen=True)
class Entry:
    """A key with its value, the index of its last change, which a compare-and-swap names, and that of its creation."""

    key: str
    value: str
    index: int
    created: int = 0


class Store(Protocol):
    """What the layers above need of a store; reads see all writes that were answered before (quorum)."""

    def get(self, key: str) -> Entry | None:
        """Return the entry of `key`, or None."""

    def tree(self, directory: str) -> list[Entry]:
        """Return all entries below `directory`, at any depth; an empty list when there are none."""

    def names(self, directory: str) -> list[str]:
        """Return the last parts of the keys and directories directly below `directory`."""

    def create(self, key: str, value: str, ttl: int | None = None) -> Entry:
        """Write `key`, which must not exist; raise KeyExists when it does.

        With `ttl`, it expires after so many seconds; without, never.
        """

    def update(self, entry: Entry, value: str, ttl: int | None = None) -> Entry:
        """Write a new value over `entry`, as it was read; raise CompareFailed when it has changed or gone.

        With `ttl`, it expires after so many seconds; without, never.
        """

    def delete(self, entry: Entry) -> None:
        """Remove `entry`, as it was read; nothing happens when it is gone; raise CompareFailed when it has changed."""

    def prune(self, directory: str) -> None:
        """Remove `directory` if it is there and empty."""

    def remove_tree(self, directory: str) -> None:
        """Remove `directory` with all that is below it, whatever it holds."""

    def put(self, key: str, value: str) -> None:
        """Write `key`, whatever it holds."""

    def check_writable(self, key: str) -> None:
        """Raise StoreError where this user may not write `key`, which stays as it is."""

    def version(self) -> str:
        """Return the version of the program that is the store."""

    def snapshot(self, directory: str) -> tuple[list[Entry], int]:
        """Return all entries below `directory`, and the index from which a watch sees what comes after them."""

    def watch(self, directory: str, index: int, seconds: float) -> tuple[list[Change], int]:
        """Wait for the first change below `directory` that has `index` or a later one.

        Returns it, or nothing after `seconds`, and the index to go on from. Nothing means that nothing has happened: a
        part of the store that is cut off from the rest is not believed. Raises WatchExpired when the store does not
        remember that far back, and when the connection was lost: it may be another store that answers the next time.
        """


@dataclass(frozen=True)
class Change:
    """What has happened to a key: its new value and index, or that it is gone, with all that was below it (None)."""

    key: str
    entry: Entry | None


@dataclass(frozen=True)
class EtcdSettings:
    """Where the members are and how to speak with them. `hosts` are (name, port) pairs.

    `is_default` tells that no member is named, and etcd's own port of this host is meant.
    """

    scheme: str
    hosts: tuple[tuple[str, int], ...]
    ca_cert: str | None = None
    cert: str | None = None
    key: str | None = None
    is_default: bool = field(default=False, compare=False)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> EtcdSettings:
        """Read ETCD_ENDPOINTS, else ETCD_AUTHORITY and ETCD_SCHEME, and the files for TLS; raise StoreError."""
        if environment.get("ETCD_ENDPOINTS"):
            scheme, hosts = _parse_endpoints(environment["ETCD_ENDPOINTS"])
            source = "ETCD_ENDPOINTS"
        else:
            scheme = environment.get("ETCD_SCHEME") or "http"
            if scheme not in ("http", "https"):
                raise StoreError(f"ETCD_SCHEME is '{scheme}': it must be http or https")
            authority = environment.get("ETCD_AUTHORITY") or "127.0.0.1:2379"
            hosts = (_parse_authority("ETCD_AUTHORITY", authority),)
            source = "ETCD_SCHEME"
        files = {}
        for name in ("ETCD_CA_CERT_FILE", "ETCD_CERT_FILE", "ETCD_KEY_FILE"):
            path = files[name] = environment.get(name) or None
            if path is None:
                continue
            if scheme == "http":
                raise StoreError(f"{name} is set, but {source} says http: TLS files go with https")
            try:
                with open(path, "rb"):
                    pass
            except OSError as error:
                raise StoreError(f"{name}: cannot read {path}: {error.strerror}") from None
        for one, other in (("ETCD_CERT_FILE", "ETCD_KEY_FILE"), ("ETCD_KEY_FILE", "ETCD_CERT_FILE")):
            if files[one] and not files[other]:
                raise StoreError(f"{one} is set without {other}: a client certificate needs both")
        if scheme == "https":
            _check_tls_files(files["ETCD_CA_CERT_FILE"], files["ETCD_CERT_FILE"], files["ETCD_KEY_FILE"])
        is_default = not any(environment.get(name) for name in ("ETCD_ENDPOINTS", "ETCD_AUTHORITY", "ETCD_SCHEME"))
        return cls(
            scheme, hosts, files["ETCD_CA_CERT_FILE"], files["ETCD_CERT_FILE"], files["ETCD_KEY_FILE"], is_default
        )

    def url(self, host: tuple[str, int]) -> str:
        return f"{self.scheme}://{host[0]}:{host[1]}"


def _check_tls_files(ca_cert: str | None, cert: str | None, key: str | None) -> None:
    """Raise StoreError for a file that is not what its variable says."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if ca_cert is not None:
        try:
            context.load_verify_locations(ca_cert)
        except (OSError, ValueError):
            raise StoreError(f"ETCD_CA_CERT_FILE: {ca_cert} holds no certificate in PEM format") from None
    if cert is not None:
        try:
            context.load_cert_chain(cert, key, password=lambda: b"")
        except (OSError, ValueError):
            raise StoreError(
                f"ETCD_CERT_FILE and ETCD_KEY_FILE: {cert} and {key} are not a certificate and its key, without a "
                "password, in PEM format"
            ) from None


def _parse_endpoints(text: str) -> tuple[str, tuple[tuple[str, int], ...]]:
    if "@" in text:  # before it is taken apart: a password may have anything in it
        raise StoreError(f"ETCD_ENDPOINTS: '{redact_userinfo(text)}': a user and a password are not supported")
    scheme = ""
    hosts = []
    for url in (part.strip() for part in text.split(",")):
        its_scheme, separator, rest = url.partition("://")
        if not separator or its_scheme not in ("http", "https"):
            raise StoreError(f"ETCD_ENDPOINTS: '{redact_userinfo(url)}' is not a URL such as http://192.0.2.1:2379")
        if scheme and its_scheme != scheme:
            raise StoreError("ETCD_ENDPOINTS mixes http and https: all endpoints must have the same scheme")
        scheme = its_scheme
        hosts.append(_parse_authority("ETCD_ENDPOINTS", rest.rstrip("/")))
    return scheme, tuple(hosts)


def _parse_authority(variable: str, text: str) -> tuple[str, int]:
    try:
        parts = urlsplit("//" + text)
        if parts.hostname and parts.port and parts.netloc == text and "@" not in text and not set(text) & set(" \t%"):
            return (f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname, parts.port)
    except ValueError:
        pass
    why = "; a user and a password are not supported" if "@" in text else ""
    raise StoreError(
        f"{variable}: '{redact_userinfo(text)}' is not an address such as 192.0.2.1:2379 (host and port){why}"
    )


class _Unanswered(Exception):
    """A request was sent, or may have been, and its outcome is not known."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class _Cut(_Unanswered):
    """The connection was lost before the answer came."""


class EtcdStore:
    """`Store` over the v2 API of an etcd cluster."""

    def __init__(self, settings: EtcdSettings, patience: float = PATIENCE) -> None:
        """`patience` is how many seconds a cluster that answers, but can do nothing, is asked again."""
        self._settings = settings
        self._patience = patience
        self._members = list(settings.hosts)
        self._clients: dict[tuple[str, int], etcd.Client] = {}
        self._known: set[tuple[str, int]] = set()
        """Members that have answered as etcd does."""

    def get(self, key: str) -> Entry | None:
        import etcd

        try:
            return self._read(key, lambda client, path: _entry(client.read(path, quorum=True)))
        except etcd.EtcdKeyNotFound:
            return None

    def tree(self, directory: str) -> list[Entry]:
        return self.snapshot(directory)[0]

    def names(self, directory: str) -> list[str]:
        import etcd

        try:
            keys = self._read(directory, _child_keys)
        except etcd.EtcdKeyNotFound:
            return []
        return [key.rpartition("/")[2] for key in keys if key != directory]

    def create(self, key: str, value: str, ttl: int | None = None) -> Entry:
        import etcd

        def judge(now: Entry | None) -> Entry | None:
            if now is not None and now.value != value:
                raise KeyExists(f"etcd key {key} exists already")
            return now

        try:
            return self._write(
                key, judge, lambda client, path: _entry(client.write(path, value, ttl=ttl, prevExist=False))
            )
        except etcd.EtcdAlreadyExist:
            raise KeyExists(f"etcd key {key} exists already") from None

    def update(self, entry: Entry, value: str, ttl: int | None = None) -> Entry:
        import etcd

        def judge(now: Entry | None) -> Entry | None:
            if now is not None and now.index == entry.index:
                return None
            if now is not None and now.value == value:
                return now
            raise CompareFailed(entry.key, maybe_applied=True)

        try:
            return self._write(
                entry.key,
                judge,
                lambda client, path: _entry(client.write(path, value, ttl=ttl, prevIndex=entry.index)),
            )
        except (etcd.EtcdCompareFailed, etcd.EtcdKeyNotFound):
            raise CompareFailed(entry.key) from None

    def delete(self, entry: Entry) -> None:
        import etcd

        def judge(now: Entry | None) -> Entry | None:
            if now is None:
                return entry
            if now.index == entry.index:
                return None
            raise CompareFailed(entry.key, maybe_applied=True)

        def delete(client: etcd.Client, path: str) -> Entry:
            client.delete(path, prevIndex=entry.index)
            return entry

        try:
            self._write(entry.key, judge, delete)
        except etcd.EtcdKeyNotFound:
            pass
        except etcd.EtcdCompareFailed:
            raise CompareFailed(entry.key) from None

    def prune(self, directory: str) -> None:
        import etcd

        # leaving an empty directory does no harm: it means nothing
        with suppress(etcd.EtcdKeyNotFound, etcd.EtcdDirNotEmpty, InvalidValue, _Unanswered):
            self._answer(directory, lambda client, path: client.delete(path, dir=True))

    def remove_tree(self, directory: str) -> None:
        import etcd

        # sending it twice does no harm
        with suppress(etcd.EtcdKeyNotFound):
            self._read(directory, lambda client, path: client.delete(path, recursive=True, dir=True))

    def put(self, key: str, value: str) -> None:
        self._read(key, lambda client, path: client.write(path, value))  # twice does no harm, either

    def check_writable(self, key: str) -> None:
        import etcd

        # whether it may be written is looked at before whether the index, which no entry has, is that of the key
        with suppress(etcd.EtcdCompareFailed, etcd.EtcdKeyNotFound):
            self._read(key, lambda client, path: client.write(path, "", prevIndex=_NO_INDEX))

    def version(self) -> str:
        def read(client: etcd.Client, path: str) -> str:
            answer = client.http.request("GET", f"{client.base_uri}/version", timeout=READ_TIMEOUT)
            return str(json.loads(answer.data)["etcdserver"])

        return self._read("", read)

    def snapshot(self, directory: str) -> tuple[list[Entry], int]:
        import etcd

        def read(client: etcd.Client, path: str) -> tuple[list[Entry], int]:
            result = client.read(path, recursive=True, quorum=True)
            entries = [_entry(leaf) for leaf in result.leaves if not leaf.dir]
            reached = result.etcd_index  # the library makes up one that is missing
            if not (result.dir or result.key == directory) or any(entry.index > reached for entry in entries):
                raise TypeError("something else than what was asked for")
            return entries, reached + 1

        try:
            return self._read(directory, read)
        except etcd.EtcdKeyNotFound as error:
            reached = error.payload.get("index")
            if not isinstance(reached, int):
                raise StoreError("the store does not answer as etcd does: it has no index") from None
            return [], reached + 1

    def watch(self, directory: str, index: int, seconds: float) -> tuple[list[Change], int]:
        import etcd

        give_up: float | None = None

        def wait(client: etcd.Client, path: str) -> tuple[list[Change], int]:
            if give_up is not None:  # the member before had no majority: the next one need not be waited for, either
                _confirm_quorum(client, path)
            return _await_change(client, path, index, seconds)

        try:
            while True:
                try:
                    return self._answer(directory, wait)
                except _Cut as cut:
                    raise WatchExpired(f"a wait for changes was cut short: {cut.why}") from None
                except _Unanswered as unanswered:
                    give_up = give_up or time.monotonic() + WATCH_PATIENCE
                    self._wait(unanswered, give_up)
        except etcd.EtcdKeyNotFound:
            raise StoreError(f"the store does not answer as etcd does: it cannot watch {directory}") from None

    def _read(self, key: str, read: Callable[[etcd.Client, str], T]) -> T:
        """Read from the first member that answers; raise what python-etcd raises for a definite answer."""
        give_up = time.monotonic() + self._patience
        while True:
            try:
                return self._answer(key, read)
            except _Unanswered as unanswered:
                self._wait(unanswered, give_up)

    def _write(
        self,
        key: str,
        judge: Callable[[Entry | None], Entry | None],
        send: Callable[[etcd.Client, str], Entry],
    ) -> Entry:
        """Send a write until its outcome is known.

        After an attempt that was not answered, or that was refused although an earlier one may have been applied,
        the key is read again and `judge` decides: it returns the entry when the write was applied, returns None when
        it was not and may be sent again, and raises when somebody else has changed the key.
        """
        import etcd

        give_up = time.monotonic() + self._patience
        doubtful = False
        while True:
            try:
                return self._answer(key, send)
            except (etcd.EtcdCompareFailed, etcd.EtcdAlreadyExist, etcd.EtcdKeyNotFound):
                if not doubtful:
                    raise
                applied = judge(self.get(key))
                if applied is not None:
                    return applied
                raise
            except _Unanswered as unanswered:
                doubtful = True
                self._wait(unanswered, give_up)
                applied = judge(self.get(key))
                if applied is not None:
                    return applied

    def _answer(self, key: str, send: Callable[[etcd.Client, str], T]) -> T:
        """Send a request to the first member that can be reached, and return its answer.

        Raises what python-etcd raises for an answer that the caller can use (no such key, compare failed, …),
        StoreError for one that nobody can, _Unanswered when the outcome is unknown, StoreUnavailable when the request
        could be sent to nobody.
        """
        import etcd

        path = quote(key)
        reasons, misunderstood = [], 0
        for member in tuple(self._members):
            url = self._settings.url(member)
            try:
                answer = send(self._client(member), path)
                self._known.add(member)
                return answer
            except etcd.EtcdConnectionFailed as error:
                self._ask_others_first(member)
                if is_shortage(_cause(error)):
                    raise StoreUnavailable(f"etcd cannot be asked: {_reason(error)}") from error
                why = self._mismatch(member, error)
                if why is not None:
                    reasons.append(f"{url}: {why}")
                    misunderstood += 1
                    continue
                if type(_cause(error)).__name__ not in _NOT_SENT:
                    kind = _Unanswered if _timed_out(error) else _Cut
                    raise kind(f"{url} did not answer ({_reason(error)})") from None
                reasons.append(f"{url} ({_reason(error)})")
            except etcd.EtcdException as error:
                translated = self._translate(error, url, key)
                if isinstance(translated, _Unanswered):
                    self._ask_others_first(member)
                raise translated from None
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise _no_etcd(url, error) from error  # the library's, about JSON of another shape than etcd's
        if misunderstood == len(reasons):
            raise StoreUnavailable(f"etcd cannot be used at {'; '.join(reasons)}")
        local = self._advice_for_one_host("one", "it", self._settings.hosts == DEFAULT_HOSTS)
        raise StoreUnavailable(
            f"etcd cannot be reached at {', '.join(reasons)}: start it, or say with ETCD_AUTHORITY or ETCD_ENDPOINTS "
            f"where it is{f'; {local}' if local else ''}"
        )

    def _ask_others_first(self, member: tuple[str, int]) -> None:
        """Ask a member that did not do what it was asked for only when the others have been, from now on."""
        self._members.remove(member)
        self._members.append(member)

    def _mismatch(self, member: tuple[str, int], error: etcd.EtcdConnectionFailed) -> str | None:
        """Return why a server that has never answered cannot be spoken to in this way, None where that is not why."""
        if member in self._known or type(_cause(error)).__name__ not in _MISUNDERSTOOD:
            return None
        from calicoctl.datastore import probe

        return probe.mismatch(self._settings.scheme, *member)

    def _advice_for_one_host(self, one: str, local: str, would_do: bool = False) -> str:
        """Return what `calicoctl node --local-etcd` would do here, or an empty text where it would refuse."""
        command = "'calicoctl node --local-etcd'"
        if self._settings.is_default or would_do:
            return f"for a host that is alone, {command} starts {one}"
        with suppress(CalicoError):
            if EnvironmentFile().own().get("ETCD_AUTHORITY") in {
                f"{name}:{port}" for name, port in self._settings.hosts
            }:
                return f"{command}, which has written this address into {EnvironmentFile().path}, starts {local} again"
        return ""

    def _without_v2(self, url: str) -> StoreError:
        local = self._advice_for_one_host("another one, at a free port", "its own")
        return StoreError(f"etcd at {url} does not serve its v2 API: {_ENABLE_V2}{f', or, {local}' if local else ''}")

    def _translate(self, error: Any, url: str, key: str) -> Any:
        """Return what to raise for an answer that is an error: itself, when the caller knows what it means."""
        import etcd

        payload = error.payload if isinstance(error.payload, dict) else {}
        cause = str(payload.get("cause", ""))
        if isinstance(error, etcd.EtcdKeyNotFound) and "errorCode" not in payload:
            return self._without_v2(url)
        if isinstance(error, etcd.EtcdInsufficientPermissions):
            return StoreError(
                f"etcd at {url} does not permit this user to use {key}: calicoctl comes as its role 'guest', which "
                "must be allowed to read and write /calico/*"
            )
        if isinstance(error, etcd.EtcdEventIndexCleared):
            return WatchExpired(f"etcd at {url} has forgotten the changes that are asked for")
        if isinstance(error, etcd.EtcdNotDir):
            return InvalidValue(cause or key, "it is a key, where a directory is expected")
        if isinstance(error, etcd.EtcdNotFile):
            return InvalidValue(cause or key, "it is a directory, where a key is expected")
        if type(error) is not etcd.EtcdException and not isinstance(error, etcd.EtcdLeaderElectionInProgress):
            return error
        if payload.get("errorCode") in (300, 301) or payload.get("status") in (500, 503):
            return _Unanswered(f"{url} says: {cause or payload.get('message')}")
        if "404 page not found" in cause:
            return self._without_v2(url)
        return _no_etcd(url, error)

    @staticmethod
    def _wait(unanswered: _Unanswered, give_up: float) -> None:
        if time.monotonic() > give_up:
            raise StoreUnavailable(f"etcd cannot do what was asked: {unanswered.why}; try again later")
        time.sleep(random.uniform(0.1, 0.3))

    def _client(self, member: tuple[str, int]) -> etcd.Client:
        if member not in self._clients:
            import etcd

            settings = self._settings
            client = etcd.Client(
                host=member[0],
                port=member[1],
                protocol=settings.scheme,
                ca_cert=settings.ca_cert,
                cert=(settings.cert, settings.key) if settings.cert else None,
                read_timeout=READ_TIMEOUT,
                allow_reconnect=False,
            )
            # urllib3 would send a PUT three times before it reports that none was answered
            client.http.connection_pool_kw["retries"] = False
            if settings.scheme == "https":
                client.http.connection_pool_kw["ssl_context"] = _tls_context(settings)
            self._clients[member] = client
        return self._clients[member]


def _tls_context(settings: EtcdSettings) -> Any:
    """Return an ssl.SSLContext that takes the certificate authorities that etcd and its tools take.

    Python 3.13 refuses by default one without a key usage, as `openssl req -x509` makes them.
    """
    import ssl

    from urllib3.util.ssl_ import create_urllib3_context

    context = create_urllib3_context()
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if settings.ca_cert is None:
        context.load_default_certs()
    return context


def _child_keys(client: etcd.Client, path: str) -> list[str]:
    """Return the keys of a directory and what is directly in it.

    etcd sends the values along; the blocks of a /16 would fill some 80 MiB if read as one document. So the answer is
    searched for its keys as it comes. Inside a value every quote has a backslash before it, which a key's name has not.
    """
    import etcd
    import urllib3.exceptions

    url = f"{client.base_uri}{client.key_endpoint}{path}?quorum=true"
    try:
        answer = client.http.request("GET", url, timeout=READ_TIMEOUT, preload_content=False)
        if answer.status != 200:
            return [child.key for child in client.read(path, quorum=True).children]  # raises what the status means
        if "x-etcd-index" not in answer.headers:
            raise etcd.EtcdException("there is no etcd index in the answer")
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
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise etcd.EtcdConnectionFailed(cause=error) from error


def _await_change(client: etcd.Client, path: str, index: int, seconds: float) -> tuple[list[Change], int]:
    """Wait for a change as python-etcd does, but read the headers, which come at once, before the change.

    They tell the index up to which nothing has happened here; without it, a watch of a quiet directory would fall
    behind what the store remembers of the busy ones.
    """
    import etcd

    event, reached = _poll(client, path, index, seconds)
    if reached + 1 < index:
        # another store than the one that gave the index, or one set back
        raise WatchExpired(f"the store has reached {reached} only, where {index - 1} had been reached before")
    next_index = max(index, reached + 1)
    if event is None and reached >= index:
        # a change may have got stuck on its way: ask again before it is taken for none
        try:
            event, _ = _poll(client, path, index, CONFIRMATION)
        except etcd.EtcdConnectionFailed as error:
            if not _timed_out(error):
                raise
            next_index = index  # who answers late is to be asked again
    if event is None:
        _confirm_quorum(client, path)
        return [], next_index
    node = event["node"]
    if node.get("dir") and event["action"] == "update":
        return [], node["modifiedIndex"] + 1  # of its time to live; what is in it stays
    gone = node.get("dir") or event["action"] in ("delete", "expire", "compareAndDelete")
    value = node.get("value", "")
    if not (isinstance(node["key"], str) and isinstance(value, str) and isinstance(node["modifiedIndex"], int)):
        raise TypeError("a change of another shape")
    entry = None if gone else Entry(node["key"], value, node["modifiedIndex"], node["createdIndex"])
    return [Change(node["key"], entry)], node["modifiedIndex"] + 1


def _confirm_quorum(client: etcd.Client, path: str) -> None:
    """Have a member show, by a quorum read, that it is not cut off from the others; raise what python-etcd raises.

    One that is cut off keeps answering watches, and sees no change in them.
    """
    import etcd

    with suppress(etcd.EtcdKeyNotFound):
        client.read(path, quorum=True, timeout=QUORUM_TIMEOUT)


def _poll(client: etcd.Client, path: str, index: int, seconds: float) -> tuple[Any, int]:
    """Do one long poll; return the event, None for none, and the index that the store had reached at its start."""
    import etcd
    import urllib3.exceptions

    url = f"{client.base_uri}{client.key_endpoint}{path}?wait=true&recursive=true&waitIndex={index}"
    try:
        answer = client.http.request("GET", url, timeout=seconds, preload_content=False)
        try:
            if answer.status != 200:
                client.read(path, wait=True, recursive=True, waitIndex=index, timeout=READ_TIMEOUT)  # raises its reason
                raise TypeError(f"status {answer.status}")
            reached = int(answer.headers["x-etcd-index"])
            try:
                body = answer.read()
            except urllib3.exceptions.ReadTimeoutError:
                return None, reached
            if not body:
                raise etcd.EtcdConnectionFailed(cause=ConnectionError("the watch was ended"))
            return json.loads(body), reached
        finally:
            answer.release_conn()
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise etcd.EtcdConnectionFailed(cause=error) from error


def _no_etcd(url: str, error: Exception) -> StoreError:
    return StoreError(f"{url} does not answer as etcd does: {' '.join(str(error).split())[:120]}")


def _entry(result: etcd.EtcdResult) -> Entry:
    if result.dir:
        raise InvalidValue(result.key, "it is a directory, where a key is expected")
    value = result.value or ""
    if not (isinstance(value, str) and isinstance(result.modifiedIndex, int)):
        raise TypeError(f"{result.key} is no key of etcd's")
    return Entry(result.key, value, result.modifiedIndex, result.createdIndex)


def _cause(error: etcd.EtcdConnectionFailed) -> BaseException | None:
    """Return the library error behind a failed connection."""
    cause = error.cause
    return getattr(cause, "reason", None) if isinstance(getattr(cause, "reason", None), BaseException) else cause


def _timed_out(error: etcd.EtcdConnectionFailed) -> bool:
    """Tell whether a connection failed because the answer took too long, and not because it was lost."""
    return "Timeout" in type(_cause(error)).__name__


def _reason(error: etcd.EtcdConnectionFailed) -> str:
    """Return a few words for a person: why a member could not be reached."""
    text = str(_cause(error))
    for words in ("Connection refused", "timed out", "No route to host", "Network is unreachable"):
        if words in text:
            return words.lower()
    if "resolve" in text or "Name or service" in text:
        return "unknown host name"
    text = re.sub(r"\(_ssl\.c:\d+\)", "", text)
    return text.rpartition(": ")[2].strip("()'\" ,") or type(_cause(error)).__name__


def create_if_missing(store: Store, key: str, value: str) -> bool:
    """Write `key` unless it exists; tell whether it was written."""
    try:
        store.create(key, value)
    except KeyExists:
        return False
    return True


def set_value(store: Store, key: str, value: str | None) -> None:
    """Make `key` hold `value`, or be absent for None, whatever it holds now. Does nothing where that is so already."""
    for attempt in range(ATTEMPTS):
        entry = store.get(key)
        try:
            if entry is None and value is not None:
                store.create(key, value)
            elif entry is not None and value is None:
                store.delete(entry)
            elif entry is not None and value is not None and entry.value != value:
                store.update(entry, value)
            return
        except (KeyExists, CompareFailed):
            pause(attempt)
    raise _contended(key)


def modify(store: Store, key: str, missing: str, change: Callable[[str], str | None]) -> bool:
    """Change a value by compare-and-swap: read it, let `change` compute the new one, write it; again on a conflict.

    `change` returns None where there is nothing to change. Returns whether something was changed, by this call.
    Raises NotFound with the sentence `missing` when there is no such key.
    """
    done = False
    for attempt in range(ATTEMPTS):
        entry = store.get(key)
        if entry is None:
            raise NotFound(missing)
        value = change(entry.value)
        if value is None:
            return done
        try:
            store.update(entry, value)
            return True
        except CompareFailed as failed:
            done = done or failed.maybe_applied
            pause(attempt)
    raise _contended(key)


def pause(attempt: int) -> None:
    """Wait a random while, longer after more conflicts, so that many writers get their turn."""
    time.sleep(random.uniform(0, min(0.2, 0.004 * (attempt + 1))))


def _contended(key: str) -> Conflict:
    return Conflict(f"etcd key {key} keeps being modified concurrently; retry")
