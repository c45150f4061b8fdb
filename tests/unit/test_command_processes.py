"""The command server's own process: when it ends, and when its program is outdated."""

from __future__ import annotations

import socket

import pytest

from calicoctl.cli.command_server import Server
from calicoctl.errors import CalicoError


def test_a_worker_that_ends_before_it_could_serve_is_not_replaced_at_once() -> None:
    ours, theirs = socket.socketpair()
    server = Server.__new__(Server)
    server._workers, server._starting, server._ends = {ours: True}, {ours}, False
    theirs.close()
    with pytest.raises(CalicoError, match="before it could serve"):
        server._hear(ours)
    server._ends = True
    assert server._hear(ours) == b"" and not server._workers
