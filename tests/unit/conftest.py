"""What all unit tests share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def no_file_of_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what this machine's file says out of the tests."""
    monkeypatch.setenv("CALICO_ENV_FILE", os.devnull)
