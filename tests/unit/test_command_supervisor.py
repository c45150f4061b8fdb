"""How the agent starts its host's command server."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from calicoctl.felix import command_server


def test_no_module_is_taken_from_the_folder_where_the_agent_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tmp_path / "where"
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\npwd >{found}\n")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(program))
    command_server._run("host1")
    assert found.read_text() == "/\n"
