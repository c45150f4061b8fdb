"""What etcd's v3 API says as JSON: keys and values in base64, revisions, entries, changes. Sends nothing.

int64 come as texts, and what is zero, false or empty is left out. The functions raise LookupError, TypeError,
AttributeError or ValueError (binascii.Error is one) for JSON of another shape.

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
    """Return what a key or a value is in base64; raise TypeError or ValueError."""
    if not isinstance(text, str):
        raise TypeError("no text")
    return binascii.a2b_base64(text)


def encoded(key: str) -> bytes:
    """Return a key, or a value, as etcd has it; raise InvalidValue if it is not valid Unicode."""
    try:
        return key.encode()
    except UnicodeEncodeError:
        raise InvalidValue(ascii(key)[1:-1], "it is not valid Unicode") from None


def below(directory: str) -> tuple[bytes, bytes]:
    """Return the first key that may be below a directory, and the first one after all of them."""
    path = encoded(directory)
    return path + b"/", path + b"0"  # the character after the slash


def number(thing: Any, name: str) -> int:
    """Return a revision, or another int64 that is not negative."""
    text = thing.get(name, "0")
    if not (isinstance(text, str) and text.isdecimal() and len(text) < 20):
        raise TypeError(f"{name} is no number")
    return int(text)


def revision(answer: Any) -> int:
    """Return the revision that the store had reached at an answer."""
    return number(answer["header"], "revision")


def read(kv: Any) -> Entry:
    """Return a key's entry; bytes of its value that are not UTF-8 become U+FFFD. Its key must be UTF-8."""
    return Entry(
        raw(kv["key"]).decode(),
        raw(kv.get("value", "")).decode(errors="replace"),
        number(kv, "mod_revision"),
        number(kv, "create_revision"),
    )


def followed(kv: Any) -> Entry:
    """Return a key's entry, with a problem, and no value, if its key or its value is not UTF-8.

    A JSON object with a `problem` has it anyway.
    """
    value, problem = "", kv.get("problem")
    for what, part in (("key", kv["key"]), ("value", kv.get("value", ""))):
        try:
            value = raw(part).decode()
        except UnicodeDecodeError:
            problem = problem or f"its {what} is not UTF-8, and not read"
    value = "" if problem else value
    return Entry(name(kv), value, number(kv, "mod_revision"), number(kv, "create_revision"), problem)


def name(kv: Any) -> str:
    """Return a key as text, with escapes for what is not UTF-8 in it."""
    return raw(kv["key"]).decode(errors="backslashreplace")


def change(event: Any) -> Change:
    """Return the change that an event stands for."""
    kv = event["kv"]
    if event.get("type", "PUT") == "DELETE":
        return Change(name(kv), None, alone=True)
    return Change((entry := followed(kv)).key, entry)
