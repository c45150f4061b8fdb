"""Waits for conditions that threads and processes bring about."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 20.0


def wait_for(condition: Callable[[], object], what: str = "the condition") -> None:
    """Wait until a condition holds; fail after PATIENCE seconds."""
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up, what
        time.sleep(0.005)  # nothing announces it
