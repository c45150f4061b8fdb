"""What the thread that runs BIRD waits for."""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path
from typing import Callable

import pytest

from calicoctl.felix.bgp.wakeups import Wakeups

PATIENCE = 20.0


def waited(wakeups: Wakeups, pid: int | None, act: Callable[[], object]) -> bool:
    """Have one thread wait, and act meanwhile; return what the wait found."""
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(wakeups.wait(pid, PATIENCE)), daemon=True)
    began = time.monotonic()
    thread.start()
    act()
    thread.join(PATIENCE + 5)
    assert time.monotonic() - began < PATIENCE, "nothing has ended it"
    return found[0]


def test_a_request_ends_the_wait_even_if_it_came_before() -> None:
    wakeups = Wakeups()
    assert waited(wakeups, None, wakeups.request) is False
    for _ in range(100_000):  # more than a pipe holds
        wakeups.request()
    assert wakeups.wait(None, PATIENCE) is False and wakeups.wait(None, 0.01) is False


def test_news_in_the_log_end_the_wait(tmp_path: Path) -> None:
    wakeups, log = Wakeups(), tmp_path / "log"
    log.write_text("")
    wakeups.follow(tmp_path)
    wakeups.follow(tmp_path)
    assert wakeups.wait(None, 0.01) is False
    with log.open("a") as file:
        assert waited(wakeups, None, lambda: (file.write("one line\n"), file.flush()))
    assert wakeups.wait(None, 0.01) is False, "it is no news any more"
    log.rename(tmp_path / "log.1")
    wakeups.wait(None, 0.01)
    with log.open("w") as file:
        assert waited(wakeups, None, lambda: (file.write("the log that follows\n"), file.flush()))


def test_the_end_of_the_process_ends_the_wait() -> None:
    process = subprocess.Popen(["sleep", "600"])
    assert waited(Wakeups(), process.pid, process.kill) is False
    process.wait()
    assert Wakeups().wait(process.pid, PATIENCE) is False


def test_without_inotify_the_rest_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Without:
        @staticmethod
        def inotify_init1(flags: int) -> int:
            return -1

    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: Without())
    wakeups = Wakeups()
    wakeups.follow(tmp_path)
    assert wakeups.wait(None, 0.01) is False
    assert waited(wakeups, None, wakeups.request) is False
