"""Which processes are BIRDs, and whose: their folders in /proc are made up, without root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from calicoctl.felix.bgp import processes

ALL, DOCKERS_DEFAULT = "000001ffffffffff", "00000000a80425fb"


def process(folder: Path, **changed: str) -> Path:
    """Create the /proc/PID of a BIRD that an agent has started, except for what is `changed`."""
    facts = {"comm": "bird", "exe": "/usr/sbin/bird", "capabilities": "0000000000001400", "net": "net", "user": "user"}
    facts.update(changed)
    (folder / "ns").mkdir(parents=True)
    (folder / "comm").write_text(f"{facts['comm']}\n")
    (folder / "status").write_text(
        f"Name:\t{facts['comm']}\nUid:\t103\t103\t103\t103\nCapEff:\t{facts['capabilities']}\n"
    )
    program = folder.parent / f"root{facts['exe']}"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.touch()
    program.chmod(int(facts.get("mode", "755"), 8))
    (folder / "exe").symlink_to(program)
    for kind in ("net", "user"):
        (folder / "ns" / kind).symlink_to(f"/proc/self/ns/{facts[kind]}")
    return folder


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"comm": "bird6", "exe": "/usr/sbin/bird6", "capabilities": ALL},
        {"exe": "/usr/sbin/bird.dpkg-tmp (deleted)"},  # its package was upgraded while it runs
    ],
)
def test_a_bird_may_change_routes(tmp_path: Path, changed: dict[str, str]) -> None:
    assert processes.is_bird(process(tmp_path / "7", **changed))


@pytest.mark.parametrize(
    "changed",
    [
        {"comm": "sleep"},
        {"capabilities": "0000000000000000"},
        {"capabilities": DOCKERS_DEFAULT},
        {"capabilities": ALL, "user": "net"},  # root in a user namespace of its own
        {"net": "user"},
        {"capabilities": ALL, "exe": "/usr/bin/su"},  # by a symbolic link, which any user can create
        {"capabilities": ALL, "exe": "/tmp/bird", "mode": "4755"},  # by a hard link
    ],
)
def test_one_that_is_only_named_like_it_is_none(tmp_path: Path, changed: dict[str, str]) -> None:
    assert not processes.is_bird(process(tmp_path / "7", **changed))


def test_one_of_ours_has_a_configuration_in_a_folder_of_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "DIRECTORY", tmp_path / "run")
    monkeypatch.setattr(processes, "ROOT", os.geteuid())
    longest = "h" * 253
    for host in ("host1", longest, "x", "bird"):
        (tmp_path / "run" / host).mkdir(parents=True)
    (tmp_path / "run" / "link").symlink_to(tmp_path / "run" / "host1")
    for path, host in (
        (f"{tmp_path}/run/host1/bird/conf", "host1"),
        (f"{tmp_path}/run/{longest}/bird/conf", longest),
        (f"{tmp_path}/run/../bird/conf", ""),
        (f"{tmp_path}/run/./bird/conf", ""),
        (f"{tmp_path}/run//bird/conf", ""),
        (f"{tmp_path}/run/missing/bird/conf", ""),
        (f"{tmp_path}/run/link/bird/conf", ""),
        (f"{tmp_path}/run/x/host1/bird/conf", ""),
        (f"{tmp_path}/run/host1/bird/conf.new", ""),
        (f"{tmp_path}/run/host1/bird/conf\n", ""),
        ("bird/conf", ""),
        ("/etc/bird/bird.conf", ""),
    ):
        assert processes.host_of(["/usr/sbin/bird", "-f", "-c", path, "-s", "ctl"]) == host
    monkeypatch.setattr(processes, "ROOT", os.geteuid() + 1)
    assert processes.host_of(["bird", "-c", f"{tmp_path}/run/host1/bird/conf"]) == ""
