"""An interrupt during an operation in a namespace, which no command can be made to meet on demand."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

import pytest

from calicoctl.workloads.netns import Namespace


class Interrupt(BaseException):
    pass


def test_an_interrupt_waits_for_what_is_being_done_in_the_namespace() -> None:
    interrupted, returned, done = threading.Event(), threading.Event(), threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not interrupted.is_set():
            interrupted.set()
            raise Interrupt

    def work() -> None:
        # the process gets it, and the main thread handles it, but late where it was just about to wait
        for _ in range(100):
            os.kill(os.getpid(), signal.SIGUSR1)
            if interrupted.wait(0.1):
                break
        if not returned.wait(0.2):
            done.set()

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with Namespace("/proc/self/ns/net", "this one") as namespace, pytest.raises(Interrupt):
            namespace.run(work)
        returned.set()
        assert done.is_set()
    finally:
        signal.signal(signal.SIGUSR1, before)
