"""The time as text, in the form that the store's records and the reports use."""

from __future__ import annotations

from datetime import datetime, timezone

_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


def now() -> str:
    """Return the time in UTC, in ISO 8601, such as `2026-11-25T21:33:11Z`."""
    return datetime.now(timezone.utc).strftime(_FORMAT)


def parse(text: str) -> datetime:
    """Return the time (UTC) that a text of `now` states; raise ValueError for any other text."""
    return datetime.strptime(text, _FORMAT).replace(tzinfo=timezone.utc)
