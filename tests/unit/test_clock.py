"""The time as records and reports have it."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from calicoctl import clock


def test_the_time_is_written_and_read_in_utc() -> None:
    before = datetime.now(timezone.utc)
    text = clock.now()
    assert len(text) == len("2026-11-25T21:33:11Z") and text.endswith("Z")
    assert abs(clock.parse(text) - before) < timedelta(seconds=5)


def test_another_format_is_refused() -> None:
    with pytest.raises(ValueError):
        clock.parse("yesterday")
