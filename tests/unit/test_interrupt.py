"""A signal that asks a command to end is heard at any moment, also when Python or a library would swallow it."""

from __future__ import annotations

import asyncio
import importlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Callable

import pytest

from calicoctl.cli import main
from calicoctl.output import report_discarded

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a command does with signals."""
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)}
    for module, name in ((sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(module, name, getattr(module, name))
    report_discarded(debug=False)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)


def hit(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    for _ in range(1000):  # the handler runs between two of these
        pass


def is_heard(attempt: Callable[[], object], number: int = signal.SIGTERM) -> bool:
    """Return whether the command is interrupted during an attempt, or soon after it."""
    for one in SIGNALS:
        signal.signal(one, main.interrupt)
    with pytest.raises(main.Interrupted) as interrupted:
        attempt()
        time.sleep(5)  # the interrupt ends it; longer than the repeated one takes
    interrupted.value.handled = True
    return interrupted.value.number == number and signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("number", SIGNALS)
def test_at_an_ordinary_moment(number: int) -> None:
    assert is_heard(lambda: hit(number), number)


def test_while_a_module_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "interrupted_import.py").write_text(f"from {__name__} import hit\nhit()\nwhole = True\n")
    assert is_heard(lambda: importlib.import_module("interrupted_import"))
    assert sys.modules.pop("interrupted_import").whole


def test_in_a_finalizer(capsys: pytest.CaptureFixture[str]) -> None:
    class Finalized:
        def __del__(self) -> None:
            hit()

    assert is_heard(Finalized)
    assert capsys.readouterr().err == ""


def test_in_what_ignores_all_errors() -> None:
    class Closed(io.RawIOBase):
        def close(self) -> None:
            hit()

    def careless() -> None:
        with suppress(BaseException):
            hit()

    assert is_heard(Closed)
    assert is_heard(careless)


def test_in_a_callback_of_asyncio() -> None:
    async def work() -> None:
        asyncio.get_running_loop().call_soon(hit)
        await asyncio.sleep(5)

    assert is_heard(lambda: asyncio.run(work()))


@pytest.mark.parametrize("debug", [False, True])
def test_other_errors_of_finalizers_and_threads_are_shown(debug: bool, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        def __del__(self) -> None:
            raise ValueError("broken")

    def fail() -> None:
        raise ValueError("thread")

    report_discarded(debug)
    Broken()
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    said = capsys.readouterr().err
    for why in ("broken", "thread"):
        assert f"Internal error (ValueError: {why}); run again with --debug to see where.\n" in said
    assert said.count("Traceback") == (2 if debug else 0) and (debug or said.count("\n") == 2)


@pytest.mark.parametrize("debug", [False, True])
def test_every_command_reports_them(debug: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(main, "report_discarded", asked.append)
    monkeypatch.setattr(main, "main", lambda argv: 0)
    with (tmp_path / "output").open("w") as output:
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, output)
        assert main.run(["status", *(["--debug"] if debug else [])], "here") == 0
    assert asked == [debug]
