"""How the namespace of one process is distinguished from another's."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from calicoctl.errors import NamespaceError
from calicoctl.workloads.connected import Connected
from calicoctl.workloads.workload import WorkloadState, find_state, process_started


def test_a_path_that_leads_through_a_process_is_that_ones(tmp_path: Path) -> None:
    started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    process = f"/proc/{os.getpid()}"
    (tmp_path / "root").symlink_to(f"{process}/root")
    (tmp_path / "relative").symlink_to("root/etc/../etc")
    (tmp_path / "net").symlink_to(f"{process}/ns/net")
    (tmp_path / "round").symlink_to("round")
    for path in (f"{process}/ns/net", f"{process}/root/etc", f"{process}/task/{os.getpid()}/ns/net"):
        assert process_started(path) == started, path
    for name in ("root/etc", "relative/x", "net"):
        assert process_started(str(tmp_path / name)) == started, name
    for path in (
        "",
        "/etc/passwd",
        "/proc/1234567890/ns/net",
        "/proc/self/root/etc",
        "/proc/1/root/etc",
        "/nowhere/at/all",
        str(tmp_path / "round/x"),
    ):
        assert process_started(path) is None, path


def test_a_process_that_cannot_be_inspected_is_not_considered_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"/proc/{os.getpid()}/ns/net"
    started = process_started(path)
    assert find_state("namespace", path.replace("/", "-"), Connected(path, started))[0] is WorkloadState.RUNNING

    def no_files_left(*_: object, **__: object) -> str:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Path, "read_text", no_files_left)
    with pytest.raises(NamespaceError, match="Too many open files"):
        find_state("namespace", path.replace("/", "-"), Connected(path, started))
