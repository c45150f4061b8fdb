"""The backend for etcd's v3 API: converts the operations of `Store` to requests, and etcd's refusals to exceptions.

Connections are in etcd3_http.py, JSON is in etcd3_json.py, and watches are in etcd3_watch.py. Failover and retries are
in members.py.

Each conditional write is a transaction that cannot be applied twice, since it makes its own condition false. So if the
answer is lost, the transaction is sent again. If the condition fails then, the answer contains the current values of
the keys, which show whether the first attempt was applied. The fence (see store.Fence) is one more condition of each
transaction that writes.

Source: https://github.com/etcd-io/etcd/blob/release-3.4/Documentation/learning/api.md
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Generic, Optional, TypeVar

from calicoctl import answers
from calicoctl.datastore import etcd3_http, etcd3_json
from calicoctl.datastore.etcd3_http import Authorize, Connection, ErrorAnswer
from calicoctl.datastore.etcd3_json import base64, below, encoded, number, revision
from calicoctl.datastore.etcd3_watch import OpenWatch
from calicoctl.datastore.members import ConnectionLost, Deadline, Members, Unanswered, created, deleted, updated
from calicoctl.datastore.settings import EtcdSettings
from calicoctl.datastore.store import MOST_AT_ONCE, Change, Create, Delete, Entry, Fence, Keep, Update, Write, itself
from calicoctl.errors import CompareFailed, Fenced, KeyExists, NoSuchApi, StoreError, StoreUnavailable, WatchExpired

T = TypeVar("T")

Item = Callable[[Any], Optional[Entry]]
"""A function that converts the JSON object of a key to an entry, None for a key that is left out."""

PAGE = 1000
"""The maximum number of keys per request for a range, in the first attempt to read a directory."""

FIRST_PAGE = 128
"""The maximum number of keys in the first request of `collect`, which does not know yet how large the values are."""

PAGE_SIZE = 2 * answers.MiB
"""The size that each further page of `collect` should have, in characters of the answer's JSON."""

_JSON_OF_A_KEY = 120
"""The number of characters that the JSON of a key has, besides the key and the value themselves."""

ATTEMPTS = 5
"""The maximum number of attempts to read a directory whose revision is compacted during the read, and to use a lease
that expires before it is used."""

MOST_KEYS = 1_000_000
"""The maximum number of keys that are read below one directory."""

LARGEST_READ = 128 * answers.MiB
"""The maximum size of what is read below one directory, in characters of keys and values."""

LONGEST_READ = 120.0
"""Seconds after which no further page of a directory is requested."""

QUORUM_TIMEOUT = 3.0
"""Timeout in seconds of the linearizable read in `_confirm_quorum`."""

WATCH_PATIENCE = 3.0
"""Seconds after which a watch fails if no member answers."""

TOO_LARGE = "its value is too large, and not read"

TOO_FULL = "it is too large, so nothing below it is read; delete what does not belong there"

_NEVER = 2**63 - 1
"""A revision that no key ever has."""


class _Compacted(StoreError):
    """The store does not have the requested revision: it was compacted, or the store was restored to an earlier one."""


class _NoLease(StoreError):
    """The lease of a request has expired."""


@dataclass(frozen=True)
class _Page(Generic[T]):
    """A page of a directory: some of its keys, in order, each converted to an item.

    `last` is the last of these keys, empty if there are none. `revision` is the store's revision. `more` says whether
    other keys follow. `limit` is the number of keys that were requested.
    """

    items: list[T]
    last: bytes
    revision: int
    more: bool
    limit: int


class _Reading:
    """The bounds of a read of a directory by several requests: its time, and the number and size of what is found."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._end = time.monotonic() + LONGEST_READ

    def check(self, count: int, size: int = 0) -> None:
        """Raise StoreError if the read takes too long, or if `count` or `size` is too large.

        `count` is the number of keys or names that have been read, and `size` is the total size of the names in bytes.
        """
        if count > MOST_KEYS:
            raise StoreError(f"there are more than {MOST_KEYS} keys below {self._directory}, and they are not read")
        if time.monotonic() > self._end:
            raise StoreUnavailable(
                f"etcd takes more than {LONGEST_READ:.0f} s to say what is below {self._directory}; try again later"
            )
        if size > LARGEST_READ:
            raise StoreError(f"the names in {self._directory} are too long, {size} bytes, and they are not read")


class _Found:
    """The entries that are read below a directory, bounded to a total size of LARGEST_READ.

    Each name directly in the directory makes a part: in the directory `/calico`, for example, the key `/calico/bgp` and
    all keys below it are one part. If the entries become too large, those of the largest part are dropped. So a program
    that writes too much below one name does not hide the other parts.
    """

    def __init__(self, directory: str) -> None:
        self.entries: list[Entry] = []
        self.unread: dict[str, Entry] = {}
        """Path of a part that was dropped -> the entry that says so."""
        self._above = len(directory) + 1
        self._sizes: dict[str, int] = {}
        self._size = 0

    def add(self, entries: list[Entry]) -> None:
        for entry in entries:
            part = self.part(entry.key)
            if part not in self.unread:
                self.entries.append(entry)
                size = len(entry.key) + len(entry.value)
                self._sizes[part] = self._sizes.get(part, 0) + size
                self._size += size
        while self._size > LARGEST_READ:
            largest = max(self._sizes, key=self._sizes.__getitem__)
            self._size -= self._sizes.pop(largest)
            self.unread[largest] = Entry(largest, "", 0, 0, TOO_FULL)
            self.entries = [entry for entry in self.entries if self.part(entry.key) != largest]

    def part(self, key: str) -> str:
        """Return the path of the part that contains a key: the first level below the directory that is read."""
        return key[: self._above] + key[self._above :].partition("/")[0]


# more than 400 lines: the protocol Store has one method for each operation, and all share the members, the leases and
# the fence
class Etcd3Store:
    """Implements `Store` on etcd's v3 API. Not thread-safe.

    All keys that an object writes with the same time to live are attached to one lease. Each such write renews the
    lease; only `put` and `put_all` do not renew it if it was renewed less than half of the time to live ago.
    """

    atomic = True
    leases = True
    fence: Fence | None = None

    def __init__(self, settings: EtcdSettings, patience: float, authorize: Authorize | None = None) -> None:
        """`patience`: for how many seconds a request is retried if members can be reached, but do not answer.

        If no member can be reached, a request fails at once.
        `authorize`: see Authorize.
        """
        self._members = Members(settings, lambda member: Connection(settings, member, authorize), patience)
        self._leases: dict[int, str] = {}
        """Time to live in seconds -> id of the lease."""
        self._renewed: dict[int, float] = {}
        """Time to live -> when the last request that has renewed its lease was sent (monotonic)."""
        self._early: dict[str, OpenWatch | None] = {}
        """Directory of which a watch has expired -> the watch that was opened before the directory was read again.

        The value is None before that, and after `watch` has taken the watch.
        """

    def recall_slow_members(self) -> None:
        """Do what Members.recall_slow does. Sends no request."""
        self._members.recall_slow()

    # Reads

    def get(self, key: str) -> Entry | None:
        return self._get(key)[0]

    def read(
        self, keys: Sequence[str], directories: Sequence[str] = ()
    ) -> tuple[list[Entry | None], list[list[Entry]]]:
        if not (keys or directories):
            return [], []
        found = self.read_at_once(keys, directories)
        return found[:2] if found is not None else (list(map(self.get, keys)), list(map(self.tree, directories)))

    def read_at_once(
        self, keys: Sequence[str], directories: Sequence[str] = (), peeked: Sequence[str] = ()
    ) -> tuple[list[Entry | None], list[list[Entry]], list[bool]] | None:
        """Do what `read` does, by one request, and return also whether there is any key below each of `peeked`.

        Returns None if the answer is too large.
        """
        ranges = [_key(key) for key in keys] + [_range(*below(directory), 0) for directory in directories]
        ranges += [_range(*below(directory), 1, keys_only=True) for directory in peeked]
        request = {"success": [{"request_range": one} for one in ranges]}

        def send(connection: Connection) -> tuple[list[Entry | None], list[list[Entry]], list[bool]] | None:
            try:
                with _translated(connection, (*keys, *directories)[0]):
                    answer = connection.post("/v3/kv/txn", request)
                    found = [of_one.get("kvs", []) for of_one in _ranges(answer, len(ranges))]
                    entries = [_entry_of(kvs, key) for kvs, key in zip(found, keys)]
                    end = len(keys) + len(directories)
                    trees = [list(filter(None, map(_readable, kvs))) for kvs in found[len(keys) : end]]
                    return entries, trees, list(map(bool, found[end:]))
            except ConnectionLost as lost:
                if _is_too_large(lost):
                    return None
                raise

        return self._members.retry(send)

    def tree(self, directory: str) -> list[Entry]:
        return [entry for entry in self._list(directory, _readable)[0] if entry.problem is None]

    def collect(self, directory: str, convert: Callable[[Entry], T | None], values: bool = True) -> list[T]:
        reading = _Reading(directory)
        first = FIRST_PAGE if values else PAGE
        for attempt in range(ATTEMPTS):
            try:
                return self._collect_once(directory, convert, values, min(MOST_KEYS, first * 10**attempt), reading)
            except _Compacted:
                continue
        raise _forgetful(directory)

    def _collect_once(
        self, directory: str, convert: Callable[[Entry], T | None], values: bool, first: int, reading: _Reading
    ) -> list[T]:
        """Do what `collect` does, once, with `first` keys in the first page.

        All pages are read at the revision of the first one. Each of the others should have PAGE_SIZE, going by the
        average size of a key in the page before, but at most twice as many keys as that page. `reading` limits the time
        and the number of keys. Raises _Compacted if the revision is compacted before all pages are read.
        """

        def sized(kv: Any) -> tuple[int, T | None]:
            return len(kv["key"]) + len(kv.get("value", "")) + _JSON_OF_A_KEY, convert(
                _readable(kv) or etcd3_json.followed(kv)
            )

        found: list[T] = []
        start, end = below(directory)
        limit, at, count = first, 0, 0
        while True:
            page = self._page(directory, start, end, sized, limit, at, values)
            found += [item for _, item in page.items if item is not None]
            at, count = at or page.revision, count + len(page.items)
            if not page.more:
                return found
            reading.check(count)
            average = sum(size for size, _ in page.items) // len(page.items)
            start, limit = page.last + b"\0", max(1, min(PAGE_SIZE // average, 2 * page.limit))

    def list_for_watch(self, directory: str, keep: Keep = itself) -> tuple[list[Entry], int]:
        watch = self._opened_early(directory)
        try:
            entries, reached = self._list(directory, lambda kv: keep(etcd3_json.followed(kv)))
        except BaseException:
            self._close_early(directory)
            raise
        return entries, reached + 1 if watch is None else watch.revision

    def names(self, directory: str, but: Collection[str] = ()) -> list[str]:
        prefix = below(directory)[0]
        names: set[bytes] = set()
        size, reading = 0, _Reading(directory)
        gaps = _gaps(directory, but)
        while gaps:
            pages = self._first_keys(directory, gaps[:MOST_AT_ONCE])
            left = gaps[len(pages) :]
            for (_, stop), (found, more) in zip(gaps, pages):
                new = {key[len(prefix) :].partition(b"/")[0] for key in found} - names
                names |= new
                size += sum(map(len, new))
                reading.check(len(names), size)
                if more:  # what else is below the last name is skipped
                    name, slash, _ = found[-1][len(prefix) :].partition(b"/")
                    left.append((prefix + name + (b"0" if slash else b"\0"), stop))
            gaps = [gap for gap in left if gap[0] < gap[1]]
        return [name.decode() for name in sorted(names) if name and _is_utf8(name)]

    def exists(self, directory: str) -> bool:
        return bool(self._first_keys(directory, [below(directory)], 1)[0][0])

    def version(self) -> str:
        def send(connection: Connection) -> str:
            with _translated(connection, "/version"):
                return str(connection.exchange("GET", "/version")["etcdserver"])

        return self._members.retry(send)

    def check_writable(self, *keys: str) -> None:
        # etcd checks the permissions for all that a transaction may do, before it looks at the condition
        never = _unchanged(keys[0], _NEVER)
        puts = [{"request_put": _key(key)} for key in keys]
        self._ask("/v3/kv/txn", {"compare": [never], "success": puts}, " or ".join(keys), revision)

    # Writes

    def create(self, key: str, value: str, ttl: int | None = None) -> Entry:
        return self._commit([Create(key, value)], ttl)[0]

    def update(self, entry: Entry, value: str, ttl: int | None = None) -> Entry:
        return self._commit([Update(entry, value)], ttl)[0]

    def delete(self, entry: Entry) -> None:
        self.commit([Delete(entry)])

    def commit(self, writes: Sequence[Write]) -> list[Entry]:
        return self._commit(writes, None)

    def _commit(self, writes: Sequence[Write], ttl: int | None) -> list[Entry]:
        """Do what `commit` does. If `ttl` is not None, attach the written keys to this object's lease for that ttl."""
        known: dict[str, Entry] = {}

        def send(lease: str | None, connection: Connection, doubtful: bool) -> None:
            while len(known) < len(writes):
                left = [write for write in writes if write.key not in known]
                with _translated(connection, left[0].key):
                    answer = connection.post("/v3/kv/txn", _transaction(left, lease, self.fence))
                    if answer.get("succeeded"):
                        known.update({write.key: _written(write, revision(answer)) for write in left})
                    else:
                        known.update(_settled(left, answer, doubtful, self.fence))

        self._attached(ttl, lambda lease: self._members.resend(partial(send, lease)))
        return [known[write.key] for write in writes]

    def touch(self, entry: Entry, value: str, ttl: int) -> Entry:
        if self._members.retry(lambda connection: self._keep_alive(connection, ttl)):
            now, lease = self._get(entry.key)
            if now is None or now.revision != entry.revision:
                raise CompareFailed(entry.key)
            if lease == self._leases[ttl]:
                return now
        return self.update(entry, value, ttl)

    def put(self, key: str, value: str, ttl: int | None = None) -> None:
        self.put_all({key: value}, ttl)

    def put_all(self, values: Mapping[str, str], ttl: int | None = None) -> None:
        def send(lease: str | None) -> None:
            puts = [{"request_put": _put(key, value, lease)} for key, value in values.items()]
            self._write_blindly(puts, next(iter(values)))

        if values:
            self._attached(ttl, send, always_renew=False)

    def remove_tree(self, directory: str) -> None:
        start, end = map(base64, below(directory))
        ranges = [{"key": start, "range_end": end}, _key(directory)]
        self._write_blindly([{"request_delete_range": keys} for keys in ranges], directory)

    def _write_blindly(self, operations: list[dict[str, Any]], key: str) -> None:
        """Apply idempotent operations, in one transaction whose only condition is the fence. `key` is for messages.

        Raises Fenced if the key of the fence has changed.
        """
        fence = self.fence

        def parse(answer: dict[str, Any]) -> None:
            revision(answer)
            if fence is not None and not answer.get("succeeded"):
                raise Fenced(fence.key)

        self._ask("/v3/kv/txn", {"compare": _conditions([], fence), "success": operations}, key, parse)

    def _attached(self, ttl: int | None, send: Callable[[str | None], T], always_renew: bool = True) -> T:
        """Call `send` with the id of the lease for `ttl`, or with None if `ttl` is None; return the result.

        The lease is first created or renewed; if `always_renew` is false, it is not renewed if the last renewal was
        less than half of `ttl` ago. If the lease has expired when `send` uses it, `send` is called again with a new
        one. Raises StoreUnavailable if that happens ATTEMPTS times.
        """
        if ttl is None:
            return send(None)
        for _ in range(ATTEMPTS):
            lease = self._leases.get(ttl)
            try:
                if lease is None or always_renew or time.monotonic() > self._renewed[ttl] + ttl / 2:
                    lease = self._members.retry(lambda connection: self._lease(connection, ttl))
                return send(lease)
            except _NoLease:  # it has expired since it was renewed
                self._leases.pop(ttl, None)
        raise StoreUnavailable(f"etcd ends leases of {ttl} s before they are used; try again later")

    def _lease(self, connection: Connection, ttl: int) -> str:
        """Renew the lease for `ttl`, or create one if there is none or it has expired; return the id of the lease."""
        if not self._keep_alive(connection, ttl):
            now = time.monotonic()
            with _translated(connection, "a lease"):
                granted = connection.post("/v3/lease/grant", {"TTL": str(ttl)})
                number(granted, "ID")
                self._leases[ttl], self._renewed[ttl] = granted["ID"], now
        return self._leases[ttl]

    def _keep_alive(self, connection: Connection, ttl: int) -> bool:
        """Renew the lease for `ttl`; return False if there is none, or if it has expired."""
        if ttl not in self._leases:
            return False
        now = time.monotonic()
        with _translated(connection, "a lease"):
            answer = connection.post("/v3/lease/keepalive", {"ID": self._leases[ttl]})
            if number(answer["result"], "TTL") == 0:
                del self._leases[ttl]
            else:
                self._renewed[ttl] = now
        return ttl in self._leases

    # Watches

    def watch(self, directory: str, revision: int, seconds: float) -> Generator[list[Change], None, None]:
        watch: OpenWatch | None = self._early.get(directory)
        if watch is not None and watch.revision == revision:
            self._early[directory] = None
        else:
            watch = None

        def close() -> None:
            nonlocal watch, revision
            if watch is not None:
                watch.close()
                revision = watch.revision
                watch = None

        def poll(connection: Connection, end: float) -> list[Change]:
            nonlocal watch
            if watch is not None and watch.connection is not connection:
                close()
            try:
                with _translated(connection, directory):
                    if watch is None:
                        _confirm_quorum(connection, directory)
                        watch = OpenWatch(connection, directory, revision)
                    changes = watch.changes(end - time.monotonic())
                    if not changes:
                        _confirm_quorum(connection, directory)
            except BaseException:
                close()
                raise
            return changes

        try:
            while True:
                yield self._await_changes(poll, time.monotonic() + seconds)
        except WatchExpired:
            self._early.setdefault(directory)
            raise
        finally:
            close()

    def _opened_early(self, directory: str) -> OpenWatch | None:
        """If a watch of the directory has expired before, open a watch of the changes from now on, and return it.

        Called before the directory is read. If the store is compacted very often, a watch that is opened after the read
        comes too late: the changes since the read are compacted already. A watch that is opened before the read
        receives them. Returns None if no watch of the directory has expired.
        """
        if directory not in self._early:
            return None
        self._close_early(directory)

        def send(connection: Connection) -> OpenWatch:
            with _translated(connection, directory):
                return OpenWatch(connection, directory)

        self._early[directory] = watch = self._members.retry(send)
        return watch

    def _close_early(self, directory: str) -> None:
        watch = self._early.get(directory)
        if watch is not None:
            watch.close()
            self._early[directory] = None

    def _await_changes(self, poll: Callable[[Connection, float], list[Change]], end: float) -> list[Change]:
        """Call `poll(connection, end)` for one member after another until it succeeds; return its result.

        `poll` fails if the member does not answer or has no quorum. `end` is the time at which it must return
        (monotonic). Raises WatchExpired if a connection was lost, and StoreUnavailable if no member can be reached, or
        if none answers for WATCH_PATIENCE.
        """
        deadline: Deadline | None = None
        while True:
            try:
                return self._members.ask(lambda connection: poll(connection, end))
            except ConnectionLost as failure:
                raise WatchExpired(f"a wait for changes was cut short: {failure}") from None
            except Unanswered as failure:
                deadline = deadline or Deadline(WATCH_PATIENCE)
                deadline.backoff(failure)

    # Requests

    def _ask(self, path: str, request: dict[str, Any], key: str, parse: Callable[[dict[str, Any]], T]) -> T:
        """Send an idempotent request, repeatedly until it is answered; return `parse(answer)`. `key`: for messages."""

        def send(connection: Connection) -> T:
            with _translated(connection, key):
                return parse(connection.post(path, request))

        return self._members.retry(send)

    def _get(self, key: str) -> tuple[Entry | None, str | None]:
        """Return a key's entry (None: no such key), and the id of the key's lease (None: no key or no lease)."""

        def parse(answer: dict[str, Any]) -> tuple[Entry | None, str | None]:
            kvs = answer.get("kvs", [])
            return _entry_of(kvs, key), kvs[0].get("lease") if kvs else None

        return self._ask("/v3/kv/range", _key(key), key, parse)

    def _list(self, directory: str, item: Item) -> tuple[list[Entry], int]:
        """Return `item(kv)` for each key below a directory, and the revision at which all keys were read.

        `kv` is the JSON object of a key. If the key's value is too large to be read, `kv` has no value, and a field
        "problem". A key for which `item` returns None is left out. If there is too much to be read below the directory,
        the largest part is left out, and an Entry with a `problem` stands for it: see _Found.

        All pages are read at the revision of the first one. If that revision is compacted before the last page is read,
        the directory is read again with larger pages. The last attempt needs only one page, unless that is too large.
        """
        reading = _Reading(directory)
        for attempt in range(ATTEMPTS):
            try:
                return self._list_once(directory, item, min(MOST_KEYS, PAGE * 10**attempt), reading)
            except _Compacted:
                continue
        raise _forgetful(directory)

    def _list_once(self, directory: str, item: Item, most: int, reading: _Reading) -> tuple[list[Entry], int]:
        """Do what `_list` does, once, with pages of at most `most` keys.

        `reading` limits the time, and the number of keys, of all attempts together.
        Raises _Compacted if the revision is compacted before all pages are read.
        """
        found = _Found(directory)
        prefix, end = below(directory)
        start, at, limit, count = prefix, 0, most, 0
        while True:
            page = self._page(directory, start, end, item, limit, at)
            found.add([entry for entry in page.items if entry is not None])
            at, count = at or page.revision, count + len(page.items)
            if not page.more:
                return [*found.entries, *found.unread.values()], at
            reading.check(count)
            start, limit = page.last + b"\0", min(most, 2 * page.limit)
            name, slash, _ = page.last[len(prefix) :].partition(b"/")
            if slash and found.part((prefix + name).decode(errors="backslashreplace")) in found.unread:
                start = prefix + name + b"0"  # what else is below the name is skipped

    def _page(
        self,
        directory: str,
        start: bytes,
        end: bytes,
        item: Callable[[Any], T],
        limit: int,
        at: int,
        values: bool = True,
    ) -> _Page[T]:
        """Return a page of up to `limit` keys from `start` on, before `end`. `item` converts a key: see `_list`.

        The keys are read at the revision `at`, or at the current one if `at` is 0; without their values if `values` is
        false. If the answer is too large, fewer keys are requested; a single key whose value is too large is requested
        without the value.
        """

        def send(connection: Connection) -> _Page[T]:
            count, problem = limit, None
            while True:
                try:
                    with _translated(connection, directory):
                        keys_only = problem is not None or not values
                        answer = connection.post("/v3/kv/range", _range(start, end, count, at, keys_only))
                        return _page_of(answer, start, end, item, count, problem)
                except ConnectionLost as lost:
                    if not _is_too_large(lost) or problem is not None:
                        raise
                    count, problem = max(1, count // 4), TOO_LARGE if count == 1 else None

        return self._members.retry(send)

    def _first_keys(
        self, directory: str, gaps: Sequence[tuple[bytes, bytes]], limit: int = PAGE
    ) -> list[tuple[list[bytes], bool]]:
        """Return a pair for each of the ranges `gaps`: up to `limit` of its keys, and whether other keys follow there.

        If the answer is too large, fewer ranges and fewer keys are requested. So the result may be shorter than `gaps`:
        pairs for the last ranges are then missing.
        """

        def send(connection: Connection) -> list[tuple[list[bytes], bool]]:
            count, most = len(gaps), limit
            while True:
                try:
                    with _translated(connection, directory):
                        ranges = [{"request_range": _range(*gap, most, keys_only=True)} for gap in gaps[:count]]
                        found = _ranges(connection.post("/v3/kv/txn", {"success": ranges}), count)
                        pages = [_page_of(one, *gap, _raw_key) for one, gap in zip(found, gaps)]
                        return [(page.items, page.more) for page in pages]
                except ConnectionLost as lost:
                    if not _is_too_large(lost) or (count, most) == (1, 1):
                        raise
                    count, most = max(1, count // 4), max(1, most // 4)

        return self._members.retry(send)


@contextmanager
def _translated(connection: Connection, key: str) -> Iterator[None]:
    """Convert an ErrorAnswer to a StoreError; convert other exceptions, which JSON of unexpected shape causes, as well.

    `key` is the key that the message of the StoreError names.
    """
    try:
        yield
    except ErrorAnswer as error:
        raise _refusal(error, key, connection) from None
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise connection.no_etcd(error) from error


def _refusal(error: ErrorAnswer, key: str, connection: Connection) -> StoreError:
    url, code, text = connection.url, error.code, " ".join(error.message.split())[:200]
    if error.is_about_token and connection.user is None:
        return StoreError(f"etcd at {url} asks for a user: set ETCD_USERNAME and ETCD_PASSWORD")
    if error.is_about_token:
        return StoreError(
            f"etcd at {url} has refused the token of user '{connection.user}', also a new one ({text}): try again "
            "later; etcd's members need the same time, and the same --auth-token"
        )
    if code == etcd3_http.PERMISSION_DENIED:
        return StoreError(
            f"etcd at {url} does not permit this user to use {key}: a role of the user must be allowed to read and "
            "write all keys below /calico/"
        )
    if code == etcd3_http.OUT_OF_RANGE and "required revision" in text:
        return _Compacted(f"etcd at {url} has forgotten what is asked for ({text})")
    if code == etcd3_http.NOT_FOUND and "lease" in text:
        return _NoLease(f"etcd at {url} has ended a lease ({text})")
    if "database space exceeded" in text:
        return StoreError(
            f"etcd at {url} has no space left, and takes no writes: compact and defragment it, or raise its "
            "--quota-backend-bytes, then disarm its alarm ('etcdctl compact', 'etcdctl defrag', 'etcdctl alarm disarm')"
        )
    if "too large" in text or "larger than max" in text:
        return StoreError(f"etcd at {url} refuses the value of {key}: it is too large for one request ({text})")
    if code == etcd3_http.UNIMPLEMENTED:
        return NoSuchApi(
            f"etcd at {url} does not serve its v3 API over HTTP: etcd 3.4 or later is needed, with its gRPC gateway on"
        )
    if code == etcd3_http.UNAVAILABLE:
        return StoreError(
            f"etcd at {url} cannot connect to itself: with --client-cert-auth, its own certificate must be good for "
            f"clients, too (extended key usage clientAuth) ({text})"
        )
    return StoreError(f"etcd at {url} refuses a request about {key}: {text}")


def _forgetful(directory: str) -> StoreUnavailable:
    return StoreUnavailable(f"etcd forgets what is below {directory} before it is read to the end; try again later")


def _is_too_large(lost: ConnectionLost) -> bool:
    return isinstance(lost.__cause__, answers.TooLarge)


def _confirm_quorum(connection: Connection, directory: str) -> None:
    """Check by a linearizable read that a member answers, and is not partitioned from the others.

    Raises what Connection.post raises.
    """
    # a key below the directory, since a role may be for these alone; a count, since the value of any key may be large
    revision(connection.post("/v3/kv/range", {**_key(f"{directory}/quorum"), "count_only": True}, QUORUM_TIMEOUT))


def _key(key: str) -> dict[str, Any]:
    return {"key": base64(encoded(key))}


def _put(key: str, value: str, lease: str | None) -> dict[str, Any]:
    request = {**_key(key), "value": base64(encoded(value))}
    return request if lease is None else {**request, "lease": lease}


def _range(start: bytes, end: bytes, limit: int, at: int = 0, keys_only: bool = False) -> dict[str, Any]:
    request: dict[str, Any] = {"key": base64(start), "range_end": base64(end), "limit": str(limit)}
    if at:
        request["revision"] = str(at)
    if keys_only:
        request["keys_only"] = True
    return request


def _page_of(
    answer: Any, start: bytes, end: bytes, item: Callable[[Any], T], limit: int = PAGE, problem: str | None = None
) -> _Page[T]:
    """Convert the answer to a read of the range from `start` to `end` to a page.

    `item` converts the JSON object of each key. If `problem` is not None, it is first added to that object, as the
    field "problem". `answer` is not usable afterwards: the objects are removed, to save memory. Raises TypeError if the
    answer is not about this range.
    """
    kvs, more = answer.get("kvs", []), bool(answer.get("more"))
    last = etcd3_json.raw(kvs[-1]["key"]) if kvs else b""
    if (kvs and not start <= last < end) or (more and not kvs):
        raise TypeError("something else than what was asked for")
    if problem is not None:
        kvs = [{**kv, "problem": problem} for kv in kvs]
    items = []
    for place, kv in enumerate(kvs):
        kvs[place] = None  # its memory is needed for the next ones
        items.append(item(kv))
    return _Page(items, last, revision(answer), more, limit)


def _entry_of(kvs: list[Any], key: str) -> Entry | None:
    """Return the entry in the answer to a read of `key`, None if the key does not exist.

    Raises TypeError if the answer is about another key.
    """
    if not kvs:
        return None
    entry = etcd3_json.read(kvs[0])
    if entry.key != key:
        raise TypeError("something else than what was asked for")
    return entry


def _ranges(answer: Any, count: int) -> list[Any]:
    """Return the answers to the `count` reads of a transaction; raise TypeError if there are fewer or more answers."""
    responses = answer.get("responses", [])
    if len(responses) != count:
        raise TypeError("something else than what was asked for")
    return [response["response_range"] for response in responses]


def _gaps(directory: str, but: Collection[str]) -> list[tuple[bytes, bytes]]:
    """Return ranges, as (first key, end), that together contain all keys below `directory` except those of `but`.

    `but` are names directly in the directory: the key with such a name, and all keys below it, are in none of the
    ranges.
    """
    start, end = below(directory)
    gaps = []
    # between the key of a name and what is below it, there may be others: "a", "a.b", "a/c"
    paths = [start + encoded(name) for name in but]
    for begin, stop in sorted(part for path in paths for part in ((path, path + b"\0"), (path + b"/", path + b"0"))):
        gaps.append((start, begin))
        start = max(start, stop)
    gaps.append((start, end))
    return [gap for gap in gaps if gap[0] < gap[1]]


def _readable(kv: Any) -> Entry | None:
    """Return a key's entry, None if its value is too large, or if the key is not UTF-8."""
    return etcd3_json.read(kv) if "problem" not in kv and _is_utf8(_raw_key(kv)) else None


def _raw_key(kv: Any) -> bytes:
    return etcd3_json.raw(kv["key"])


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


# Conditional writes


def _transaction(writes: Sequence[Write], lease: str | None, fence: Fence | None) -> dict[str, Any]:
    """Return a request that applies all writes or, if a condition fails, reads the entries of all their keys.

    The entry of the fence's key is read last.
    """
    read = [write.key for write in writes] + ([fence.key] if fence is not None else [])
    return {
        "compare": _conditions(writes, fence),
        "success": [_operation(write, lease) for write in writes],
        "failure": [{"request_range": _key(key)} for key in read],
    }


def _conditions(writes: Sequence[Write], fence: Fence | None) -> list[dict[str, Any]]:
    conditions = [_condition(write) for write in writes]
    return conditions if fence is None else [*conditions, _unchanged(fence.key, fence.revision)]


def _condition(write: Write) -> dict[str, Any]:
    if isinstance(write, Create):
        return {**_key(write.key), "target": "CREATE", "result": "EQUAL", "create_revision": "0"}
    return _unchanged(write.key, write.entry.revision)


def _unchanged(key: str, revision: int) -> dict[str, Any]:
    return {**_key(key), "target": "MOD", "result": "EQUAL", "mod_revision": str(revision)}


def _operation(write: Write, lease: str | None) -> dict[str, Any]:
    if isinstance(write, Delete):
        return {"request_delete_range": _key(write.key)}
    return {"request_put": _put(write.key, write.value, lease)}


def _written(write: Write, reached: int) -> Entry:
    """Return the entry of a write that was applied at the revision `reached`; for a Delete, the deleted entry."""
    if isinstance(write, Delete):
        return write.entry
    return Entry(write.key, write.value, reached, reached if isinstance(write, Create) else write.entry.created)


def _settled(writes: Sequence[Write], answer: Any, doubtful: bool, fence: Fence | None) -> dict[str, Entry]:
    """Return key -> entry for those writes of a failed transaction that need not be sent again.

    `answer` contains the current entries of the keys. `doubtful` says that an earlier attempt at the transaction may
    have been applied. If it was applied, each key is as its write leaves it, so the result contains all writes. If it
    was not, the result contains only the Deletes of keys that no longer exist. Raises KeyExists or CompareFailed if
    another writer has changed a key, and Fenced if none has, but the fence has changed and writes are left.
    """
    found = [one.get("kvs", []) for one in _ranges(answer, len(writes) + (fence is not None))]
    verdicts = [_verdict(write, _entry_of(kvs, write.key), doubtful) for write, kvs in zip(writes, found)]
    settled = {write.key: entry for write, entry in zip(writes, verdicts) if entry is not None}
    if len(settled) < len(writes):  # the attempt was not applied: what looks like its values is of other writers
        for write in writes:
            if write.key in settled and not isinstance(write, Delete):
                raise _conflict(write, doubtful)
        now = None if fence is None else _entry_of(found[-1], fence.key)
        if fence is not None and fence.revision != (0 if now is None else now.revision):
            raise Fenced(fence.key)
    if not settled:
        raise TypeError("a transaction failed although its conditions are met")
    return settled


def _verdict(write: Write, now: Entry | None, doubtful: bool) -> Entry | None:
    """Return a write's entry if the key is as the write leaves it, None if the write's condition is met.

    `now` is the key's current entry, None if there is no such key. `doubtful` says that the write may have been
    applied. Raises KeyExists or CompareFailed if another writer has changed the key.
    """
    if isinstance(write, Create):
        if now is not None and not doubtful:
            raise _conflict(write, doubtful)
        return created(write.key, write.value)(now)
    unchanged = now is not None and now.revision == write.entry.revision
    if not (doubtful or unchanged or (now is None and isinstance(write, Delete))):
        raise _conflict(write, doubtful)
    return (deleted(write.entry) if isinstance(write, Delete) else updated(write.entry, write.value))(now)


def _conflict(write: Write, doubtful: bool) -> KeyExists | CompareFailed:
    if isinstance(write, Create):
        return KeyExists(f"etcd key {write.key} exists already")
    return CompareFailed(write.key, maybe_applied=doubtful)
