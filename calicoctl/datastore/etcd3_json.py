"""Converts between the JSON of etcd's v3 API and Python: keys and values, numbers, entries, and changes.

In this JSON, keys and values are in base64, and int64 numbers are strings. Fields that are zero, false or empty are
omitted. If the JSON has an unexpected shape, the functions raise LookupError, TypeError, AttributeError or ValueError
(including binascii.Error).

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
    """Decode a key or a value from base64. Raise TypeError if it is not a string, ValueError if it is not base64."""
    if not isinstance(text, str):
        raise TypeError("no text")
    return binascii.a2b_base64(text)


def encoded(key: str) -> bytes:
    """Return a key, or a value, in UTF-8. Raise InvalidValue if it is not valid Unicode."""
    try:
        return key.encode()
    except UnicodeEncodeError:
        raise InvalidValue(ascii(key)[1:-1], "it is not valid Unicode") from None


def below(directory: str) -> tuple[bytes, bytes]:
    """Return the range of the keys below a directory, as (start, end). The range excludes `end`."""
    path = encoded(directory)
    return path + b"/", path + b"0"  # the character after the slash


def number(thing: Any, name: str) -> int:
    """Return the int64 in the field `name` of the JSON object `thing`; 0 if the field is missing.

    Raises TypeError for a negative number, and for any other value that is not an int64.
    """
    text = thing.get(name, "0")
    if not (isinstance(text, str) and text.isdecimal() and len(text) < 20):
        raise TypeError(f"{name} is no number")
    return int(text)


def revision(answer: Any) -> int:
    """Return the store's revision from the header of an answer."""
    return number(answer["header"], "revision")


def read(kv: Any) -> Entry:
    """Convert the JSON object of a key to an Entry.

    Bytes of the value that are not UTF-8 are replaced by U+FFFD. If the key is not UTF-8, ValueError is raised.
    """
    return Entry(
        raw(kv["key"]).decode(),
        raw(kv.get("value", "")).decode(errors="replace"),
        number(kv, "mod_revision"),
        number(kv, "create_revision"),
        None,
        number(kv, "lease") != 0,
    )


def followed(kv: Any) -> Entry:
    """Convert the JSON object of a key to an Entry, which has a `problem` if the key could not be read.

    If the JSON object has a field "problem" (see Etcd3Store._list), the Entry has this `problem`. If it has no such
    field, the Entry has a `problem` if the key or the value is not UTF-8. An Entry with a `problem` has an empty value.
    Bytes of the key that are not UTF-8 are escaped (see `name`).
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
    """Return a key, from its JSON object, as text. Bytes that are not UTF-8 are escaped, for example as `\\xff`."""
    return raw(kv["key"]).decode(errors="backslashreplace")


def change(event: Any) -> Change:
    """Convert an event of a watch (a JSON object) to a Change."""
    kv = event["kv"]
    if event.get("type", "PUT") == "DELETE":
        return Change(name(kv), None, alone=True)
    return Change((entry := followed(kv)).key, entry)
