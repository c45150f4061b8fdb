"""Which netlink ports are those of this process: its own changes of tables are told from those of others by these."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from calicoctl.felix.dataplane.nft import OwnPorts
from calicoctl.netlink import NETLINK_NETFILTER

HOLD = """
import socket, sys
with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, int(sys.argv[2])) as one:
    one.bind((int(sys.argv[1]), 0))
    print("bound", flush=True)
    sys.stdin.read()
"""


def netlink(port: int, protocol: int = NETLINK_NETFILTER) -> socket.socket:
    one = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
    one.bind((port, 0))
    return one


@contextmanager
def of_another_process(port: int) -> Iterator[None]:
    command = [sys.executable, "-c", HOLD, str(port), str(NETLINK_NETFILTER)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"bound\n"
        yield
        process.communicate()


def test_the_ports_of_this_process() -> None:
    port, own = 2**31 - os.getpid(), OwnPorts()
    assert port not in own
    with netlink(port) as one:
        assert port in own and port in own and port in OwnPorts()
        assert port not in OwnPorts(socket.NETLINK_ROUTE) and port + 1 not in own
        fd = one.fileno()
    assert port not in own
    with netlink(port):
        assert port in own
    with netlink(0) as other, of_another_process(port):
        assert other.fileno() == fd, "the same descriptor, but another socket"
        assert port not in own and port not in OwnPorts()
    with netlink(port):
        assert port in own
