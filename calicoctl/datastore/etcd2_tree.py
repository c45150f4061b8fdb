"""Reads a directory tree of etcd's v2 API, however deep or large it is.

Python's recursive JSON parser fails on an answer that is nested too deeply. So only the innermost objects of an answer
are parsed: keys and empty directories. If an answer is too large, each subdirectory is requested separately, down to
the depth DEEPEST.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from calicoctl import answers
from calicoctl.datastore.store import Entry

if TYPE_CHECKING:
    import etcd

DEEPEST = 10
"""The number of parts of Calico's deepest key. A directory at this depth or below is not read in parts."""

_scan_string: Any = json.decoder.scanstring  # type: ignore[attr-defined]
"""The C function of the module json that finds the end of a JSON string."""

_SIGNIFICANT = re.compile('["{}]')

_MOST_STRINGS = 64
"""The maximum number of strings between two braces, which bounds the time for an answer that is not etcd's. An object
of etcd has up to 8 names, and 3 values that are strings."""


def read(client: etcd.Client, directory: str) -> tuple[list[Entry], int]:
    """Return all entries below a directory, and the store's revision at the first answer.

    A subdirectory that is too large to be read is returned as an Entry with a `problem`. Raises python-etcd's
    exceptions (EtcdKeyNotFound if there is no such directory), and KeyError, RecursionError, TypeError or ValueError
    for an answer that is not etcd's.
    """
    import etcd

    entries: list[Entry] = []
    reached: int | None = None
    pending = [directory]
    while pending:
        path = pending.pop()
        try:
            nodes, index = _ask(client, path, recursive=True)
        except etcd.EtcdKeyNotFound:
            if reached is None:
                raise
            continue  # it was deleted meanwhile
        except etcd.EtcdException as error:
            if not _is_too_large(error):
                raise
            try:
                if path.count("/") >= DEEPEST:
                    raise
                nodes, index = _ask(client, path, recursive=False)
                pending += [node["key"] for node in nodes if node.get("dir") and node["key"] != path]
            except etcd.EtcdKeyNotFound:
                nodes, index = [], reached or 0
            except etcd.EtcdException as again:
                if reached is None or not _is_too_large(again):
                    raise
                why = "it is too large, so nothing below it is read; delete what does not belong there"
                nodes, index = [{"key": path, "modifiedIndex": 0, "createdIndex": 0, "problem": why}], reached or 0
        entries += [_entry(node) for node in nodes if not node.get("dir")]
        # a watch from here has all that is written while the others are read
        reached = index if reached is None else reached
    assert reached is not None, "there is at least one answer"
    return entries, reached


def _ask(client: etcd.Client, path: str, recursive: bool) -> tuple[list[dict[str, Any]], int]:
    """Return the JSON objects of the keys and of the empty directories below `path`, and the store's revision.

    Without `recursive`, returns the objects of the keys and of all subdirectories directly in `path`. The object of
    `path` itself may be among them. Raises what `read` raises.
    """
    options = {"quorum": "true", **({"recursive": "true"} if recursive else {})}
    # with the slash, a role for `/calico/*` may read all of /calico
    answer = client.api_execute(client.key_endpoint + quote(path + "/"), "GET", params=options)
    index = int(answer.headers["x-etcd-index"])
    nodes = []
    for node in innermost(answer.data.decode("latin-1")):  # each is checked before the next is kept
        _check(node, path, index)
        nodes.append(node)
    if not nodes:
        raise _unasked()
    return nodes, index


def _check(node: dict[str, Any], path: str, index: int) -> None:
    """Raise TypeError if a JSON object is not a key or a directory of etcd, or cannot be in an answer about `path`.

    `index` is the store's revision: no key in the answer can have a later one.
    """
    key, value, revision = node.get("key"), node.get("value") or "", node.get("modifiedIndex")
    if not (isinstance(key, str) and (key + "/").startswith(path + "/")):
        raise _unasked()
    if not (isinstance(value, str) and isinstance(revision, int) and isinstance(node.get("createdIndex"), int)):
        raise TypeError(f"{key[:100]} is no key of etcd's")
    if revision > index:
        raise _unasked()


def _unasked() -> TypeError:
    return TypeError("something else than what was asked for")


def innermost(text: str) -> Iterator[dict[str, Any]]:
    """Yield the objects in a JSON text that contain no other objects.

    `text` is UTF-8 that was decoded as Latin-1, which saves memory. Raises ValueError if the text is not an answer of
    etcd: if braces do not match, if a directory has no key, or if there are more than _MOST_STRINGS strings between two
    braces.
    """
    position = depth = strings = 0
    begin: int | None = None
    while (match := _SIGNIFICANT.search(text, position)) is not None:
        position = match.end()
        character = match[0]
        if character == '"':
            _, position = _scan_string(text, position, True)
            strings += 1
            if strings > _MOST_STRINGS:
                raise ValueError("there are more strings than etcd writes")
            continue
        strings = 0
        if character == "{":
            if begin is not None and depth > 1 and '"key"' not in text[begin:position]:
                raise ValueError("there is a directory without a key")
            begin = position - 1
            depth += 1
        else:
            depth -= 1
            if begin is not None:
                yield json.loads(text[begin:position].encode("latin-1"))
            begin = None
            if depth < 0:
                break
    if depth != 0:
        raise ValueError("the JSON is not whole")


def _entry(node: dict[str, Any]) -> Entry:
    value, expires = node.get("value") or "", node.get("expiration") is not None
    return Entry(node["key"], value, node["modifiedIndex"], node["createdIndex"], node.get("problem"), expires)


def _is_too_large(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, answers.TooLarge):
            return True
        error = error.__cause__ or error.__context__
    return False
