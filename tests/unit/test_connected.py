"""Which workloads are connected here: files of root alone, without links, that are complete or not there at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from calicoctl import files, state
from calicoctl.datastore.keys import EndpointId
from calicoctl.errors import CalicoError
from calicoctl.workloads import connected
from calicoctl.workloads.connected import Connected

ID = "-var-run-netns-blue"
BLUE = "/var/run/netns/blue"


def modes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mode & 0o777 for path in folder.rglob("*")}


@pytest.mark.parametrize("path", [BLUE, "/proc/7/ns/net", "/x" * 300, "/odd\n\udcff"])
def test_a_namespace_is_known_by_its_path_until_it_is_forgotten(path: str) -> None:
    id = path.replace("/", "-")
    started = "4711" if path.startswith("/proc") else None
    assert connected.get("vm", "namespace", id) is None and connected.every("vm", "namespace") == {}
    connected.put("vm", "namespace", id, path, started)
    assert connected.get("vm", "namespace", id) == Connected(path, started)
    assert connected.every("vm", "namespace") == {id: Connected(path, started)}
    assert connected.every("vm", "docker") == connected.every("elsewhere", "namespace") == {}
    connected.forget("vm", "namespace", id)
    connected.forget("vm", "namespace", id)
    assert connected.every("vm", "namespace") == {}


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"\xff"])
def test_a_damaged_file_does_not_make_a_namespace_seem_to_be_missing(content: bytes) -> None:
    connected.put("vm", "namespace", ID, BLUE)
    file = state.path("vm", "workloads", "namespace", ID)
    file.write_bytes(content)
    with pytest.raises(CalicoError, match=f"{file} is damaged"):
        connected.get("vm", "namespace", ID)
    connected.forget("vm", "namespace", ID)
    assert connected.get("vm", "namespace", ID) is None


def test_only_root_reads_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0)
    try:
        connected.put("vm", "docker", "1" * 64)
    finally:
        os.umask(before)
    assert modes(state.DIRECTORY) == {
        "vm": 0o700,
        "vm/workloads": 0o700,
        "vm/workloads/docker": 0o700,
        f"vm/workloads/docker/{'1' * 64}": 0o600,
    }


def test_a_process_of_another_boot_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connected.put("vm", "namespace", "-proc-7-ns-net", "/proc/7/ns/net", "4711")
    boot = tmp_path / "boot_id"
    boot.write_text("another")
    monkeypatch.setattr(connected, "_BOOT_ID", boot)
    known = connected.get("vm", "namespace", "-proc-7-ns-net")
    assert known is not None and known.path == "/proc/7/ns/net" and known.started not in (None, "4711")


@pytest.mark.parametrize("part", ["vm", "vm/workloads", "vm/workloads/namespace", f"vm/workloads/namespace/{ID}"])
def test_links_are_not_followed(tmp_path: Path, part: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    if part.endswith(ID):
        elsewhere.write_text("/etc/victim")
    else:
        (elsewhere / "workloads" / "namespace").mkdir(parents=True)
    link = state.DIRECTORY / part
    link.parent.mkdir(parents=True, mode=0o700)
    link.symlink_to(elsewhere)
    with pytest.raises(CalicoError, match=f"{state.DIRECTORY}/vm"):
        connected.get("vm", "namespace", ID)
    with pytest.raises(CalicoError):
        connected.put("vm", "namespace", ID, BLUE)
    assert not elsewhere.is_file() or elsewhere.read_text() == "/etc/victim"
    assert not elsewhere.is_dir() or not [path for path in elsewhere.rglob("*") if path.is_file()]


def test_what_is_no_regular_file_is_none_and_keeps_no_descriptor() -> None:
    connected.put("vm", "namespace", ID, BLUE)
    folder = state.DIRECTORY / "vm" / "workloads" / "namespace"
    (folder / "-folder").mkdir()
    os.mkfifo(folder / "-fifo")
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert connected.get("vm", "namespace", "-folder") is None and connected.get("vm", "namespace", "-fifo") is None
    assert connected.every("vm", "namespace") == {ID: Connected(BLUE)}
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_folder_that_others_may_write_to_is_refused() -> None:
    connected.put("vm", "namespace", ID, BLUE)
    (state.DIRECTORY / "vm" / "workloads").chmod(0o777)
    for ask in (lambda: connected.get("vm", "namespace", ID), lambda: connected.forget("vm", "namespace", ID)):
        with pytest.raises(CalicoError, match="vm/workloads must belong to root, and nobody else may write to it"):
            ask()


def test_a_full_disk_leaves_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    connected.put("vm", "namespace", ID, BLUE)
    monkeypatch.setattr(files, "replace", full)
    connected.put("vm", "namespace", ID, BLUE)  # nothing to write
    with pytest.raises(CalicoError, match=f"{state.DIRECTORY}/vm/workloads/namespace/{ID}: No space left on device"):
        connected.put("vm", "namespace", ID, "/other")
    assert connected.get("vm", "namespace", ID) == Connected(BLUE)


def test_other_orchestrators_workloads_are_not_connected_by_this_program() -> None:
    connected.forget("vm", "..", "x")
    assert connected.get("vm", "../..", "x") is None


def test_removing_a_host_leaves_what_others_keep_there() -> None:
    connected.set_first("vm")
    assert connected.is_first("vm")
    connected.put("vm", "namespace", ID, BLUE)
    connected.put("vm", "docker", "1" * 64)
    connected.put("other", "docker", "1" * 64)
    (state.DIRECTORY / "vm" / "member").mkdir()
    connected.forget_all("vm")
    assert modes(state.DIRECTORY).keys() >= {"vm/member", "other/workloads/docker"}
    learned = {"workloads", "workloads/docker.learned", "workloads/namespace.learned"}
    assert modes(state.DIRECTORY / "vm").keys() == {"member", *learned}, "learning is not repeated"
    assert connected.is_learned("vm", "docker") and connected.is_learned("vm", "namespace")
    assert not connected.is_first("vm"), "an older program may be used next"
    connected.forget_all("other")
    connected.forget_all("never was here")
    assert list(state.DIRECTORY.iterdir()) == [state.DIRECTORY / "vm"]


@pytest.mark.parametrize(("id", "valid"), [("0a" * 16, True), ("%d" + "0" * 30, False), ("", False), ("0A", False)])
def test_ids_of_endpoints_are_hexadecimal(id: str, valid: bool) -> None:
    assert EndpointId("vm", "docker", "c", id).is_valid is valid
