"""What all unit tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from calicoctl import files, state

# a property is tried with few examples where a developer waits for the answer, and with many where nobody does
settings.register_profile("local", max_examples=25, deadline=None)
settings.register_profile("ci", max_examples=400, deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")


# Tests must not write to this machine's own folders, nor must threads that outlive a test, and so its patches. In these
# folders there is nothing, and nothing can be created. They are set before other modules derive paths from them.
state.DIRECTORY = Path("/proc/no-var-lib-calico")
files.RUN = Path("/proc/no-run-calico")


@pytest.fixture(autouse=True)
def no_file_of_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what this machine's file says out of the tests."""
    monkeypatch.setenv("CALICO_ENV_FILE", os.devnull)


@pytest.fixture(autouse=True)
def state_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(state, "DIRECTORY", tmp_path / "var-lib-calico")
    monkeypatch.setattr(files, "RUN", tmp_path / "run-calico")
