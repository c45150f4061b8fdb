"""Converts times to text and back, in the format of the store and of reports."""

from __future__ import annotations

from datetime import datetime, timezone

_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


def now() -> str:
    """Return the current time in UTC, in ISO 8601, such as `2026-11-25T21:33:11Z`."""
    return text(datetime.now(timezone.utc))


def text(time: datetime) -> str:
    """Return a time, which must be in UTC, in the format of `now`."""
    return time.strftime(_FORMAT)


def parse(text: str) -> datetime:
    """Parse a time in the format of `now`; raise ValueError for any other text."""
    return datetime.strptime(text, _FORMAT).replace(tzinfo=timezone.utc)
