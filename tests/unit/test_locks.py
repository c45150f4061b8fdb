"""Locks of workloads: exclusive, released when their holder dies, and without leftover files."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from calicoctl import files
from calicoctl.errors import Conflict
from calicoctl.workloads import locks
from calicoctl.workloads.locks import WorkloadLock


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(locks, "DIRECTORY", tmp_path)
    return tmp_path


def test_a_lock_leaves_no_file(directory: Path) -> None:
    with WorkloadLock("vm", "namespace", "-var-run-netns-blue"):
        assert [file.name for file in (directory / "vm").iterdir()] == ["namespace.-var-run-netns-blue"]
    assert list((directory / "vm").iterdir()) == []


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_before_or_after_the_file_is_locked_leaves_none(
    directory: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    place, name = (files.fcntl, "flock") if when == "before" else (Path, "exists")
    ours, original = threading.get_ident(), getattr(place, name)

    def interrupted(*arguments: Any) -> Any:
        if threading.get_ident() != ours:  # a thread that another test has left
            return original(*arguments)
        monkeypatch.undo()
        monkeypatch.setattr(locks, "DIRECTORY", directory)
        raise KeyboardInterrupt

    monkeypatch.setattr(place, name, interrupted)
    with pytest.raises(KeyboardInterrupt), WorkloadLock("vm", "docker", "c"):
        pass
    assert list((directory / "vm").iterdir()) == []


def test_waiting_for_a_lock_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    with WorkloadLock("vm", "docker", "c"):
        with pytest.raises(Conflict, match="another command"), WorkloadLock("vm", "docker", "c"):
            pass
        with WorkloadLock("vm", "docker", "d"):
            pass


def test_holders_take_turns() -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(20):
            with WorkloadLock("vm", "docker", "c"):
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_a_holder_that_dies_releases_the_lock(directory: Path) -> None:
    code = (
        "import os, pathlib; from calicoctl.workloads import locks; locks.DIRECTORY = pathlib.Path(os.environ['D'])\n"
        "locks.WorkloadLock('vm', 'docker', 'c').__enter__(); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], env={"D": str(directory)}, check=False)
    assert done.returncode == -9
    with WorkloadLock("vm", "docker", "c"):
        pass


def test_a_very_long_path_can_be_locked(directory: Path) -> None:
    with WorkloadLock("vm", "namespace", "-x" * 2000):
        assert len(list((directory / "vm").iterdir())) == 1


def test_an_interrupted_change_is_detected() -> None:
    assert locks.interrupted("vm", "docker") == []
    with WorkloadLock("vm", "docker", "c") as lock:
        lock.mark_in_progress()
        assert locks.interrupted("vm", "docker") == ["c"]
        lock.clear_mark()
        assert locks.interrupted("vm", "docker") == []
        lock.mark_in_progress()
    assert locks.interrupted("vm", "docker") == ["c"]
    with WorkloadLock("vm", "docker", "c") as lock:
        assert lock.interrupted
        lock.mark_in_progress()
        lock.clear_mark()  # this change is done; the interrupted one may have left something
        assert locks.interrupted("vm", "docker") == ["c"]
        lock.clear_all()
    assert locks.interrupted("vm", "docker") == []
    assert not locks.exists("vm", "docker", "c")


@pytest.mark.parametrize("id", ["/etc/passwd", "../../x", "..", "a\0b"])
def test_an_id_leads_to_no_other_folder(directory: Path, id: str) -> None:
    with WorkloadLock("vm", "namespace", id) as lock:
        lock.mark_in_progress()
        assert {file.parent for file in directory.rglob("*") if file.is_file()} == {directory / "vm"}
    assert locks.interrupted("vm", "namespace") == [id.partition("\0")[0]]


def test_paths_that_an_older_version_has_kept_are_read(directory: Path) -> None:
    (directory / "vm").mkdir()
    long = "/x" * 300
    hashed = hashlib.sha256(long.replace("/", "-").encode()).hexdigest()
    (directory / "vm" / "namespace.-var-run-netns-blue").write_text("/var/run/netns/blue")
    (directory / "vm" / "namespace.-proc-7-ns-net").write_text("/proc/7/ns/net\x004711")
    (directory / "vm" / f"namespace.{hashed}").write_text(long)
    (directory / "vm" / "namespace.-empty").touch()
    assert locks.paths_of_older_version("vm", "namespace") == {
        "-var-run-netns-blue": "/var/run/netns/blue",
        "-proc-7-ns-net": "/proc/7/ns/net",
        long.replace("/", "-"): long,
    }


def test_without_waiting_a_held_lock_is_a_conflict() -> None:
    with WorkloadLock("vm", "docker", "c"), pytest.raises(Conflict), WorkloadLock("vm", "docker", "c", patience=0):
        pass
