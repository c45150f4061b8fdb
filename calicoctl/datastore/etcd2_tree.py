"""Reads a directory tree of etcd's v2 API, however deep or large it is.

Python's recursive JSON parser fails on an answer that is nested too deeply. So only the innermost objects of an answer
are parsed: keys and empty directories. They are converted while the answer arrives, so memory is needed only for what
the caller keeps. If an answer is too large, each subdirectory is requested separately, down to the depth DEEPEST.
"""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Callable, TypeVar
from urllib.parse import quote

from calicoctl import answers
from calicoctl.datastore.store import Entry

if TYPE_CHECKING:
    import etcd

T = TypeVar("T")

DEEPEST = 10
"""The number of slashes in Calico's deepest key. If the answer about a directory at this depth or below is too large,
its subdirectories are not requested separately."""

_scan_string: Any = json.decoder.scanstring  # type: ignore[attr-defined]
"""The C function of the module json that finds the end of a JSON string."""

_SIGNIFICANT = re.compile(r'["{}\[]')

_MOST_STRINGS = 64
"""The maximum number of strings between two braces, which bounds the time for an answer that is not etcd's. An object
of etcd has up to 8 names, and 3 values that are strings."""


CHUNK = 2**16
"""How many bytes of an answer are read at a time."""


def read(client: etcd.Client, directory: str, convert: Callable[[Entry], T | None]) -> tuple[list[T], int]:
    """Return `convert(entry)` for each entry below a directory, without None, and the store's revision.

    The revision is that of the first answer. For a subdirectory that is too large to be read, `convert` gets an Entry
    with a `problem`. `convert` may be called for an entry more than once. Raises python-etcd's exceptions
    (EtcdKeyNotFound if there is no such directory) and urllib3's, and KeyError, RecursionError, TypeError or ValueError
    for an answer that is not etcd's.
    """
    import etcd
    import urllib3.exceptions

    failures = (etcd.EtcdException, urllib3.exceptions.HTTPError, http.client.HTTPException)
    found: list[T] = []
    reached: int | None = None
    pending = [directory]
    while pending:
        path = pending.pop()
        try:
            some, _, index = _ask(client, path, True, convert)
        except etcd.EtcdKeyNotFound:
            if reached is None:
                raise
            continue  # it was deleted meanwhile
        except failures as error:
            if not _is_too_large(error):
                raise
            try:
                if path.count("/") >= DEEPEST:
                    raise
                some, directories, index = _ask(client, path, False, convert)
                pending += directories
            except etcd.EtcdKeyNotFound:
                some, index = [], reached or 0
            except failures as again:
                if reached is None or not _is_too_large(again):
                    raise
                why = "it is too large, so nothing below it is read; delete what does not belong there"
                unread = convert(Entry(path, "", 0, 0, why))
                some, index = [] if unread is None else [unread], reached or 0
        found += some
        # a watch from here has all that is written while the others are read
        reached = index if reached is None else reached
    assert reached is not None, "there is at least one answer"
    return found, reached


def _ask(
    client: etcd.Client, path: str, recursive: bool, convert: Callable[[Entry], T | None]
) -> tuple[list[T], list[str], int]:
    """Return `convert(entry)` for the keys below `path`, without None, some subdirectories, and the store's revision.

    With `recursive`, the subdirectories (their paths) are the empty ones. Without `recursive`, they are all that are
    directly in `path`, and the keys are those directly in `path`. Raises what `read` raises.
    """
    # with the slash, a role for `/calico/*` may read all of /calico
    url = f"{client.base_uri}{client.key_endpoint}{quote(path + '/')}?quorum=true{'&recursive=true' * recursive}"
    answer = client.http.request("GET", url, timeout=client.read_timeout, preload_content=False, redirect=False)
    try:
        client._handle_server_response(answer)  # raises what the status means
        index = int(answer.headers["x-etcd-index"])
        found: list[T] = []
        directories: list[str] = []
        is_empty = True
        for node in innermost(chunk.decode("latin-1") for chunk in answer.stream(CHUNK)):
            _check(node, path, index)  # each is checked before the next is kept
            is_empty = False
            if not node.get("dir"):
                item = convert(_entry(node))
                found += [] if item is None else [item]
            elif node["key"] != path:
                directories.append(node["key"])
    finally:
        answer.close()  # if all of it was read, its connection has been given back, and stays open
    if is_empty:
        raise _unasked()
    return found, directories, index


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


def innermost(parts: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the objects in a JSON text that contain no other objects.

    `parts` together are the text: UTF-8 that was decoded as Latin-1, which saves memory. Raises ValueError if the text
    is not an answer of etcd: if braces do not match, if a directory has no key, if there are more than _MOST_STRINGS
    strings between two braces, or a list other than that of a directory's nodes.
    """
    parts = iter(parts)
    text = ""
    position = depth = strings = 0
    begin: int | None = None
    has_list = False
    while depth >= 0:
        match = _SIGNIFICANT.search(text, position)
        end = None if match is None else _string_end(text, match.end()) if match[0] == '"' else match.end()
        if match is None or end is None:
            # what is before is not needed any more
            start = len(text) if match is None else match.start()
            kept = start if begin is None else begin
            part = _next(parts, len(text) - kept)
            if not part:
                if match is not None:
                    raise ValueError("the JSON ends within a string")
                break
            text, position, begin = text[kept:] + part, start - kept, None if begin is None else 0
            continue
        position = end
        if match[0] == '"':
            strings += 1
            if strings > _MOST_STRINGS:
                raise ValueError("there are more strings than etcd writes")
            continue
        if match[0] == "[":
            if has_list:
                raise ValueError("there are more lists than etcd writes")
            has_list = True
            continue
        strings = 0
        if match[0] == "{":
            if begin is not None and depth > 1 and '"key"' not in text[begin:position]:
                raise ValueError("there is a directory without a key")
            begin = position - 1
            depth += 1
        else:
            depth -= 1
            if begin is not None:
                if has_list:  # it may take 25 times as much memory as it has bytes
                    raise ValueError("there is a list where etcd writes none")
                yield json.loads(text[begin:position].encode("latin-1"))
            begin = None
        has_list = False
    if depth != 0:
        raise ValueError("the JSON is not whole")


def _string_end(text: str, position: int) -> int | None:
    """Return the index after the JSON string in `text` whose content begins at `position`; None if it is cut off.

    Raises ValueError if it is no JSON string, whatever may follow `text`.
    """
    try:
        return int(_scan_string(text, position, True)[1])
    except json.JSONDecodeError as error:
        # an escape at the end may be cut: \u0000
        if error.msg.startswith("Unterminated") or error.pos > len(text) - 16:
            return None
        raise


def _next(parts: Iterator[str], size: int) -> str:
    """Return the next parts, together at least `size` characters; fewer only if there are no more."""
    # as much as is parsed again: so the time for a long string does not grow with its square
    found: list[str] = []
    read = 0
    for part in parts:
        found.append(part)
        read += len(part)
        if read >= max(1, size):
            break
    return "".join(found)


def _entry(node: dict[str, Any]) -> Entry:
    value, expires = node.get("value") or "", node.get("expiration") is not None
    return Entry(node["key"], value, node["modifiedIndex"], node["createdIndex"], None, expires)


def _is_too_large(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, answers.TooLarge):
            return True
        error = error.__cause__ or error.__context__
    return False
