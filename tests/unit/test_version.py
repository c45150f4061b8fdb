"""`calicoctl version`."""

from __future__ import annotations

import json

import pytest

from calicoctl import __version__
from calicoctl.commands import version


@pytest.mark.parametrize(
    ("commit", "text", "field"),
    [("", __version__, None), ("1a2b3c4d5e6f", f"{__version__} (commit 1a2b3c4d5e6f)", "1a2b3c4d5e6f")],
)
def test_it_tells_the_commit_of_what_was_built(
    commit: str, text: str, field: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(version, "__commit__", commit)
    version.prepare(["version"])()
    assert capsys.readouterr().out == f"{text}\n"
    version.prepare(["version", "--output=json"])()
    assert json.loads(capsys.readouterr().out) == {"version": __version__, "commit": field}
