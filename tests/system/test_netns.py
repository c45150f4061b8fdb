"""What no command can be made to meet on demand: an interrupt in a namespace, and what the kernel leaves for later."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
from types import FrameType

import pytest

from calicoctl.netlink import delete_link, interface_at
from calicoctl.workloads.netns import Namespace
from tests.system.support import run


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


def test_a_deleted_interface_is_gone_with_its_other_end_when_the_call_returns(blue: str) -> None:
    for _ in range(5):
        run("ip", "link", "add", "cali1", "type", "veth", "peer", "name", "eth7", "netns", "blue")
        for prefix, name in ((["ip"], "cali1"), (["ip", "-n", "blue"], "eth7")):
            run(*prefix, "link", "set", name, "up")
        index = socket.if_nametoindex("cali1")
        delete_link(index)
        assert interface_at(index) is None and "eth7" not in run("ip", "-n", "blue", "link").out
    with pytest.raises(OSError) as refused:
        delete_link(index)
    assert refused.value.errno == errno.ENODEV
