"""Runs every command line in the documentation, as a reader would."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.system.support import CALICOCTL, Host, free_port, run

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs/commands").glob("*.md")])
PAGES = [page for page in PAGES if "```sh\n" in page.read_text()]

NODE = "calicoctl node --ip=192.0.2.2"
TWO = f"""{NODE}
docker run --net=none --name workload -tid busybox
docker run --net=none --name other -tid busybox
calicoctl container add other 192.168.0.2
calicoctl profile add PROFILE
calicoctl container other profile append PROFILE"""
CONNECTED = f"""{TWO}
calicoctl container add workload 192.168.0.1
calicoctl container workload profile append PROFILE"""
WEB_AND_DB = f"""{NODE}
docker run --net=none --name web -tid busybox
docker run --net=none --name db -tid busybox
calicoctl container add web 192.168.0.1
calicoctl container add db 192.168.0.2
calicoctl profile add shop
calicoctl container web profile append shop
calicoctl container db profile append shop"""

BEFORE = {
    "batch": "echo profile add web >commands.txt",
    "container": TWO,
    "endpoint": CONNECTED,
    "ipam": CONNECTED,
    "profile": CONNECTED,
    "status": NODE,
    "troubleshooting": WEB_AND_DB,
    "migration": WEB_AND_DB,
}
"""What a page takes for granted."""


def examples(page: Path) -> list[tuple[str, bool]]:
    """Return a page's command lines, and whether each is said to fail."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return [(line.partition("  #")[0].strip(), line.endswith("# fails")) for line in lines]


def readme() -> list[tuple[str, bool]]:
    """Return the command lines of the README's part about use."""
    part = (ROOT / "README.md").read_text().partition("## Use it")[2].partition("\n## ")[0]
    lines = re.findall(r"^    (\S.*)$", part, re.MULTILINE)
    assert len(lines) > 8
    return [(line, False) for line in lines]


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_the_command_lines_work(bare_host: Host, engine: None, page: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sudo").write_text('#!/bin/sh\nexec "$@"\n')
    (tools / "sudo").chmod(0o755)
    environment = bare_host.environment()
    environment["PATH"] = f"{tools}:{Path(CALICOCTL).parent}:{environment['PATH']}"
    environment["TMPDIR"] = str(tmp_path)

    def shell(line: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "-c", line], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )

    try:
        for line in BEFORE.get(page.stem, "").splitlines():
            done = shell(line)
            assert done.returncode == 0, (line, done)
        lines = readme() if page.stem == "README" else examples(page)
        for line, fails in lines:
            if "--local-etcd" in line:  # where there is neither an agent nor an etcd
                shell("calicoctl node remove")
                environment["ETCD_AUTHORITY"] = f"127.0.0.1:{free_port()}"
            done = shell(line)
            assert (done.returncode != 0) == fails, (line, done)
            assert "Traceback" not in done.stderr
    finally:
        names = ("workload", "other", "web", "db", "guest")
        run("docker", "rm", "-f", *names, check=False)
        shell("calicoctl node remove --remove-endpoints")
        shutil.rmtree("/var/lib/calico", ignore_errors=True)
        for name in run("ip", "netns", "list").out.split():
            run("ip", "netns", "delete", name, check=False)
