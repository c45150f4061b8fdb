"""Reads a directory of etcd's v2 API with all that is below it, however deep, many or large its keys are.

Python's JSON parser is recursive, so one key some 500 levels deep would make an answer unreadable. Here, an answer is
searched for its innermost objects, which are its keys and its empty directories; what is around them does not matter.
If an answer is too large, each directory in it is asked for by itself, down to the depth of this program's keys.
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
"""If the answer about a directory is too large, the directory is read in parts only if its path has fewer parts than
this: no key of Calico has more."""

_scan_string: Any = json.decoder.scanstring  # type: ignore[attr-defined]
"""The function of the module json that finds the end of a JSON string; it is written in C."""

_SIGNIFICANT = re.compile('["{}]')

_MOST_STRINGS = 64
"""The most strings between two braces, as a bound of the time that an answer takes which is not etcd's. An object of
etcd's has up to 8 names, and 3 values that are strings."""


def read(client: etcd.Client, directory: str) -> tuple[list[Entry], int]:
    """Return all entries below a directory, and the revision of the store at the first answer.

    For each directory below it that is too large to be read, there is an Entry with a `problem`. Raises python-etcd's
    exceptions (EtcdKeyNotFound if there is no such directory), and KeyError, TypeError or ValueError for an answer that
    is not etcd's.
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
    """Return the keys and the empty directories below a path, as etcd's JSON objects, and the store's revision.

    Without `recursive`, only what is directly in the directory `path` is returned: keys and directories, empty or not.
    In both cases, the directory itself may be among them. Raises python-etcd's exceptions, and KeyError, TypeError or
    ValueError for an answer that is not etcd's.
    """
    options = {"quorum": "true", **({"recursive": "true"} if recursive else {})}
    answer = client.api_execute(client.key_endpoint + quote(path), "GET", params=options)
    index = int(answer.headers["x-etcd-index"])
    nodes = []
    for node in innermost(answer.data.decode("latin-1")):  # each is checked before the next is kept
        _check(node, path, index)
        nodes.append(node)
    if not nodes:
        raise _unasked()
    return nodes, index


def _check(node: dict[str, Any], path: str, index: int) -> None:
    """Raise TypeError unless an object is a key, or an empty directory, that an answer may contain.

    The answer is about `path`, and the store's revision is `index`.
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

    `text` is UTF-8 that was decoded as Latin-1, so that each byte takes one byte of memory, whatever characters the
    text contains. Raises ValueError if braces do not match, if an object between the outermost and an innermost one
    does not begin with its key, as etcd's directories do, or if there are more strings than etcd writes.
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
    return Entry(node["key"], node.get("value") or "", node["modifiedIndex"], node["createdIndex"], node.get("problem"))


def _is_too_large(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, answers.TooLarge):
            return True
        error = error.__cause__ or error.__context__
    return False
