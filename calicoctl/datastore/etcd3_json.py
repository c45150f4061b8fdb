"""Converts the JSON of etcd's v3 API: keys and values in base64, revisions, entries, changes.

In this JSON, int64 values are strings, and fields that are zero, false or empty are omitted. For JSON of unexpected
shape, the functions raise LookupError, TypeError, AttributeError or ValueError (including binascii.Error).

Source: https://github.com/etcd-io/etcd/blob/release-3.4/Documentation/learning/api.md
"""

from __future__ import annotations

import binascii
from typing import Any

from calicoctl.datastore.store import Change, Entry
from calicoctl.errors import InvalidValue


def base64(raw: bytes) -> str:
    return binascii.b2a_base64(raw, newline=False).decode()


def raw(text: str) -> bytes:
    """Decode a key or a value from base64; raise TypeError or ValueError."""
    if not isinstance(text, str):
        raise TypeError("no text")
    return binascii.a2b_base64(text)


def encoded(key: str) -> bytes:
    """Encode a key or a value in UTF-8; raise InvalidValue if it is not valid Unicode."""
    try:
        return key.encode()
    except UnicodeEncodeError:
        raise InvalidValue(ascii(key)[1:-1], "it is not valid Unicode") from None


def below(directory: str) -> tuple[bytes, bytes]:
    """Return the range of the keys below a directory: the first possible key, and the end, which is excluded."""
    path = encoded(directory)
    return path + b"/", path + b"0"  # the character after the slash


def number(thing: Any, name: str) -> int:
    """Return the field `name` of a JSON object, an int64 that is not negative; 0 if it is missing."""
    text = thing.get(name, "0")
    if not (isinstance(text, str) and text.isdecimal() and len(text) < 20):
        raise TypeError(f"{name} is no number")
    return int(text)


def revision(answer: Any) -> int:
    """Return the store's revision in the header of an answer."""
    return number(answer["header"], "revision")


def read(kv: Any) -> Entry:
    """Return a key's entry. Invalid UTF-8 in the value is replaced by U+FFFD; in the key, it raises ValueError."""
    return Entry(
        raw(kv["key"]).decode(),
        raw(kv.get("value", "")).decode(errors="replace"),
        number(kv, "mod_revision"),
        number(kv, "create_revision"),
        None,
        number(kv, "lease") != 0,
    )


def followed(kv: Any) -> Entry:
    """Return a key's entry, which has a `problem` and no value if the key or the value is not UTF-8.

    If the JSON object has a field "problem", the entry has this `problem`.
    """
    value, problem = "", kv.get("problem")
    for what, part in (("key", kv["key"]), ("value", kv.get("value", ""))):
        try:
            value = raw(part).decode()
        except UnicodeDecodeError:
            problem = problem or f"its {what} is not UTF-8, and not read"
    value = "" if problem else value
    expires = number(kv, "lease") != 0
    return Entry(name(kv), value, number(kv, "mod_revision"), number(kv, "create_revision"), problem, expires)


def name(kv: Any) -> str:
    """Return a key as text. Bytes that are not UTF-8 are escaped."""
    return raw(kv["key"]).decode(errors="backslashreplace")


def change(event: Any) -> Change:
    """Convert an event of a watch to a Change."""
    kv = event["kv"]
    if event.get("type", "PUT") == "DELETE":
        return Change(name(kv), None, alone=True)
    return Change((entry := followed(kv)).key, entry)
