"""The log files of the agent and of the process for Docker networks: who may read them, and how large they grow."""

from __future__ import annotations

import logging
import os
import sys
import threading
from pathlib import Path

import pytest

from calicoctl import logs
from calicoctl.felix import process


def test_the_log_is_not_for_everybody_and_has_what_python_discards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __del__(self) -> None:
            raise ValueError("broken")

    for module, name in ((sys, "unraisablehook"), (threading, "excepthook"), (logging, "raiseExceptions")):
        monkeypatch.setattr(module, name, getattr(module, name))
    file = tmp_path / "felix.log"
    file.write_text("of an older version\n")
    file.chmod(0o644)
    logger = logging.getLogger("calico")
    before = list(logger.handlers)
    process.log_to(str(tmp_path))
    (handler,) = set(logger.handlers) - set(before)
    try:
        logger.error("hé\n")
        assert file.stat().st_mode & 0o777 == 0o640
        handler.doRollover()  # type: ignore[attr-defined]
        logger.error("new")
        assert file.stat().st_mode & 0o777 == 0o640 and "new" in file.read_text()
        Broken()
        assert "ValueError: broken" in file.read_text()
        assert (tmp_path / "felix.log.1").read_text().splitlines()[1].endswith("ERROR: hé\\n")
    finally:
        logger.removeHandler(handler)
        handler.close()


def test_a_log_is_begun_again_after_somebody_has_renamed_or_removed_it(tmp_path: Path) -> None:
    file, renamed = tmp_path / "felix.log", tmp_path / "felix.log-20261127"
    handler = logs.RotatingFile(file)
    say = lambda text: handler.handle(logging.makeLogRecord({"msg": text}))  # noqa: E731
    try:
        say("one")
        file.rename(renamed)
        say("two")
        assert (renamed.read_text(), file.read_text()) == ("one\n", "two\n")
        file.unlink()
        say("three")
        say("four")
        assert file.read_text() == "three\nfour\n"
    finally:
        handler.close()


def test_a_file_that_cannot_be_renamed_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LARGEST", 100)
    with open(tmp_path / "log", "ab", buffering=0) as log:
        for number in range(10):
            log.write(b"%09d\n" % number)
        logs.shorten(log.fileno())
        assert len((tmp_path / "log").read_bytes()) == 100
        log.write(b"the last\n")
        logs.shorten(log.fileno())
        log.write(b"and one\n")
    assert (tmp_path / "log").read_text().splitlines()[-3:] == ["000000009", "the last", "and one"]
    assert (tmp_path / "log").stat().st_size < 70
    read, write = os.pipe()
    logs.shorten(write)
    os.close(read)
    os.close(write)
