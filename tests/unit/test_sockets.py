"""Sockets of root's."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from calicoctl import sockets


def test_a_socket_is_of_its_owner_alone_and_other_threads_keep_their_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ("a" * 100) / "some.sock"
    before = os.umask(0)
    try:
        with monkeypatch.context() as patched:
            patched.delattr(os, "umask")
            listening = sockets.listen(path, socket.SOCK_STREAM, 1)
    finally:
        os.umask(before)
    with listening, sockets.connect(path, socket.SOCK_STREAM):
        assert path.stat().st_mode & 0o777 == 0o600
        assert [file.name for file in path.parent.iterdir()] == ["some.sock"]
