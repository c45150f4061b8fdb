"""What `calicoctl node` says of an agent that is running already."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from calicoctl import proc
from calicoctl.commands import node
from calicoctl.felix import process

HOST = "host1"


def test_an_agent_of_a_version_without_bgp_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warned(report: dict[str, object], bgp: bool = True) -> str:
        process.report_file(HOST).write_text(json.dumps({"host": HOST, "resyncs": 0, **report}))
        node._start_agent(HOST, process.Options(bgp=bgp))
        out, err = capsys.readouterr()
        assert "running already" in out
        return err

    monkeypatch.setattr(process, "DIRECTORY", tmp_path)
    (tmp_path / HOST).mkdir()
    (tmp_path / HOST / "felix.pid").write_text(f"{os.getpid()} {proc.running_since(os.getpid())}\n")
    older = warned({"version": "1.2"})
    assert older.startswith("Warning: the agent is of an older version (1.2), which does no BGP")
    assert "'calicoctl node restart'" in older
    assert warned({"version": "1.2"}, bgp=False) == warned({"version": "2", "bgp": True}) == ""
