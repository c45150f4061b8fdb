"""Calculates the writes that copy the data of one store to another. Sends no requests.

Not copied are keys that expire, keys about the move itself, and agents' reports, since agents report again. The order
of creation is kept: if two endpoints claim the same address, the older endpoint has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from calicoctl.datastore import keys
from calicoctl.datastore.etcd3 import LARGEST_READ, MOST_KEYS
from calicoctl.datastore.store import MOST_AT_ONCE, Create, Delete, Entry, Update, Write
from calicoctl.errors import CalicoError
from calicoctl.output import first_few

LARGEST_VALUE = 1_500_000
"""The most bytes that a key and its value have together. etcd's v3 API takes requests of 1.5 MiB by default."""

LARGEST_COMMIT = 1_000_000
"""The most bytes of the keys and values of one commit. A write that has more by itself is a commit of its own."""

Entries = Mapping[str, Entry]
"""The entries of a store by key."""


@dataclass(frozen=True)
class Difference:
    """The keys by which a first store differs from a second one.

    The keys `added` exist only in the first store. The keys `removed` exist only in the second one. The keys `changed`
    exist in both, with different values.
    """

    added: list[str]
    removed: list[str]
    changed: list[str]

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)

    def __str__(self) -> str:
        """Return the difference as a part of a sentence: for example "2 new (/a, /b); 1 deleted (/c)"."""
        parts = ((self.added, "new"), (self.changed, "changed"), (self.removed, "deleted"))
        return "; ".join(f"{len(some)} {what} ({first_few(some)})" for some, what in parts if some)


def is_data(entry: Entry) -> bool:
    """Return whether an entry is neither an agent's report nor one of the keys about a move between the APIs."""
    own = entry.key in (keys.READY, keys.UNUSED_COPY, keys.COPIED_REVISION)
    return not (own or entry.key.startswith(keys.FELIX_HOSTS + "/"))


def is_copied(entry: Entry) -> bool:
    """Return whether an entry is to be copied: it is data (see is_data), and does not expire."""
    return is_data(entry) and not entry.expires


def copied(entries: Iterable[Entry], version: str) -> dict[str, Entry]:
    """Return those of `entries` that are to be copied (see is_copied), by key.

    Raises CalicoError if one of these could not be read. Its message calls the API of the entries `version`, which is
    "v2" or "v3".
    """
    found = {entry.key: entry for entry in entries if is_copied(entry)}
    for key, entry in found.items():
        if entry.problem is not None:
            raise CalicoError(
                f"{key} in etcd's {version} API cannot be copied or compared: {entry.problem}. Delete it first"
            )
    return found


def check_fits(entries: Entries) -> None:
    """Raise CalicoError if `entries` cannot be moved to etcd's v3 API.

    The API would refuse one of them, for its size or its encoding, or they would be too many, or too large together, to
    be read there at once (see etcd3.MOST_KEYS and LARGEST_READ).
    """
    total = sum(len(key) + len(entry.value) for key, entry in entries.items())
    if len(entries) > MOST_KEYS or total > LARGEST_READ:
        raise CalicoError(
            f"{len(entries)} keys with {total} bytes cannot be copied: in etcd's v3 API, no more than {MOST_KEYS} keys "
            f"with {LARGEST_READ} bytes below {keys.ROOT} can be read; delete what does not belong there"
        )
    for key, entry in entries.items():
        try:
            size = _size(key, entry.value)
        except UnicodeEncodeError:
            raise CalicoError(f"{ascii(key)[1:-1]} cannot be copied: it is not valid Unicode") from None
        if size > LARGEST_VALUE:
            raise CalicoError(
                f"{key} cannot be copied: it has {size} bytes, and etcd's v3 API takes {LARGEST_VALUE} at most; "
                "delete what does not belong there"
            )


def difference(one: Entries, other: Entries) -> Difference:
    """Return the difference between the entries of a first store, `one`, and of a second one, `other`."""
    return Difference(
        sorted(one.keys() - other.keys()),
        sorted(other.keys() - one.keys()),
        sorted(key for key in one.keys() & other.keys() if one[key].value != other[key].value),
    )


def plan(source: Entries, before: Entries, target: Entries) -> Iterator[list[Write]]:
    """Yield the commits, in order, that copy the entries `source` to a store with the entries `target`.

    `before` is the `source` of the previous copy to the same target. A key that was deleted and created again since
    then is also deleted and created again in the target. If there was no previous copy, `before` is empty, and the
    commits first delete everything in the target. Keys are created in the order in which they were created in the
    source. Each commit has fewer than MOST_AT_ONCE writes. The caller may keep `target` up to date while the commits
    are yielded.
    """
    stale = [entry for key, entry in target.items() if not _is_same_key(source.get(key), before.get(key))]
    yield from _commits(map(Delete, stale))
    gone = {entry.key for entry in stale}

    def writes() -> Iterator[Write]:
        for entry in sorted(source.values(), key=lambda entry: (entry.created, entry.key)):
            if entry.key not in target or entry.key in gone:
                yield Create(entry.key, entry.value)
            elif target[entry.key].value != entry.value:
                yield Update(target[entry.key], entry.value)

    yield from _commits(writes())


def _is_same_key(now: Entry | None, before: Entry | None) -> bool:
    """Return whether a key existed at both of two reads, and was not deleted and created again in between.

    `now` and `before` are the key's entries at the two reads, None if the key did not exist.
    """
    return now is not None and before is not None and now.created == before.created


def _commits(writes: Iterable[Write]) -> Iterator[list[Write]]:
    """Divide writes into commits, in the same order.

    Two endpoints that claim the same address or interface are written by different commits: all keys that one commit
    creates have the same revision, so it would no longer be known which endpoint is older.
    """
    commit: list[Write] = []
    size, claimed = 0, set[str]()
    for write in writes:
        value = "" if isinstance(write, Delete) else write.value
        own_size, own = _size(write.key, value), _claims(write.key, value)
        if commit and (len(commit) == MOST_AT_ONCE - 1 or size + own_size > LARGEST_COMMIT or own & claimed):
            yield commit
            commit, size, claimed = [], 0, set()
        commit.append(write)
        size += own_size
        claimed |= own
    if commit:
        yield commit


def _claims(key: str, value: str) -> set[str]:
    """Return the interfaces and the addresses that an endpoint claims on its host, as texts that contain the host.

    Returns an empty set if `key` is not the key of an endpoint, or if the endpoint is invalid.
    """
    id = keys.parse_endpoint(key)
    if id is None:
        return set()
    try:
        fields = json.loads(value)
        nets = [*(fields.get("ipv4_nets") or ()), *(fields.get("ipv6_nets") or ())]
        return {f"{id.host} {thing}" for thing in (id.interface, fields.get("name"), *nets)}
    except (AttributeError, RecursionError, TypeError, ValueError):
        return set()


def _size(key: str, value: str) -> int:
    return len(key.encode()) + len(value.encode())
