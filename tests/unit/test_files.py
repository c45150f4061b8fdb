"""Locks, whose files may be removed at any time, and atomic replacement of files."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path

import pytest

from calicoctl import files, state
from calicoctl.datastore import last_known
from calicoctl.errors import CalicoError
from calicoctl.felix import local_etcd
from calicoctl.workloads.locks import WorkloadLock


def test_a_lock_is_exclusive_until_its_descriptor_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    fd = files.try_lock(path)
    assert fd is not None
    assert path.stat().st_mode & 0o777 == 0o600
    assert files.try_lock(path) is None
    os.close(fd)
    again = files.try_lock(path)
    assert again is not None
    os.close(again)


def test_a_lock_is_waited_for_and_not_for_longer_than_was_said(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    held = files.try_lock(path)
    assert held is not None
    with pytest.raises(CalicoError, match="held"):
        files.lock_within(path, 0.05, CalicoError("held"))
    threading.Timer(0.1, os.close, [held]).start()
    os.close(files.lock_within(path, 10, CalicoError("held")))


def test_the_lock_of_a_file_that_was_removed_meanwhile_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    flock = files.fcntl.flock

    def removed_by_the_holder_before(fd: int, operation: int) -> None:
        path.unlink()
        flock(fd, operation)

    monkeypatch.setattr(files.fcntl, "flock", removed_by_the_holder_before)
    assert files.try_lock(path) is None

    def replaced_by_another(fd: int, operation: int) -> None:
        path.unlink()
        path.touch()
        flock(fd, operation)

    monkeypatch.setattr(files.fcntl, "flock", replaced_by_another)
    assert files.try_lock(path) is None


def test_locking_leaks_no_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    held = files.try_lock(path)
    assert held is not None
    assert files.try_lock(path) is None
    assert [Path(f"/proc/self/fd/{held}")] == [
        file for file in Path("/proc/self/fd").iterdir() if _leads_to(file, path)
    ]
    os.close(held)


def _leads_to(descriptor: Path, path: Path) -> bool:
    try:
        return descriptor.readlink() == path
    except FileNotFoundError:  # another thread has closed it meanwhile
        return False


def test_links_are_not_followed_and_a_missing_file_is_created_only_on_request(tmp_path: Path) -> None:
    assert files.try_lock(tmp_path / "none", create=False) is None
    assert not (tmp_path / "none").exists()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(OSError):
        files.try_lock(tmp_path / "link")
    with pytest.raises(FileNotFoundError):
        files.try_lock(tmp_path / "no folder" / "lock")


def test_a_reader_sees_the_old_or_the_new_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    texts = [b"a" * 100_000, b"b" * 50_000]
    path.write_bytes(texts[0])
    done = threading.Event()

    def write() -> None:
        for number in range(200):
            files.replace(path, texts[number % 2], 0o644).close()
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert path.read_bytes() in texts
    writer.join()
    assert list(tmp_path.iterdir()) == [path]


def test_the_mode_of_a_replaced_file_does_not_depend_on_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "file"
    before = os.umask(0o077)
    try:
        files.replace(path, b"x", 0o644).close()
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644
    files.replace(path, b"y", 0o600, durable=True).close()
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"y", 0o600)


def test_a_replacement_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    (path / "in use").mkdir(parents=True)
    with pytest.raises(OSError):
        files.replace(path, b"x", 0o644)
    assert list(tmp_path.iterdir()) == [path]
    assert list(path.iterdir()) == [path / "in use"]


def test_a_replacement_that_is_written_only_in_part_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # like a disk with room for one page
    try:
        with pytest.raises(OSError) as failed:
            files.replace(path, b"x" * 5000, 0o644)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "before" and failed.value.filename == str(path)
    assert list(tmp_path.iterdir()) == [path]


def test_what_lies_under_the_name_of_the_new_file_is_not_written_to(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("another's")
    os.link(other, tmp_path / ".file.new")
    files.replace(tmp_path / "file", b"after", 0o644).close()
    assert other.read_text() == "another's"
    assert (tmp_path / "file").read_text() == "after"


def test_what_outlives_its_test_cannot_write_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # as at the end of a test, while a thread goes on
    assert not state.DIRECTORY.exists() and not files.RUN.exists()
    with pytest.raises(CalicoError, match=str(state.DIRECTORY)):
        last_known.remember({"etcd1": ["192.0.2.1"]})
    with pytest.raises(CalicoError, match=str(files.RUN)), WorkloadLock("vm", "docker", "c"):
        pass
    assert local_etcd.DATA.parent == state.DIRECTORY and not state.DIRECTORY.exists() and not files.RUN.exists()
