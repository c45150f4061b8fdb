"""The file of BGP passwords: its syntax, who may own it, when it is read again, and that no message quotes it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from calicoctl.errors import CalicoError
from calicoctl.felix.bgp import passwords
from calicoctl.felix.bgp.passwords import Passwords, parse, read

SECRET = "s3cret"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A valid file with one password."""
    monkeypatch.setattr(passwords, "OWNER", os.geteuid())
    path = tmp_path / "bgp-passwords"
    path.touch(0o600)
    path.write_text(f"192.0.2.1 {SECRET}\n")
    return path


def test_lines_are_about_a_peer_or_the_mesh_and_the_peers_own_takes_precedence() -> None:
    text = "# a comment\n\n  \n192.0.2.1\tone  two # three \r\n2001:DB8:0::1 ä'\\\nmesh all\n   # mesh other\n"
    found = parse(text.encode(), "file")
    assert found.of("192.0.2.1", in_mesh=True) == found.of("192.0.2.1", in_mesh=False) == "one  two # three"
    assert found.of("2001:db8::1", in_mesh=False) == "ä'\\"
    assert found.of("192.0.2.2", in_mesh=True) == "all"
    assert found.of("192.0.2.2", in_mesh=False) is None
    assert SECRET not in repr(Passwords({"192.0.2.1": SECRET}, SECRET))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (SECRET, "there is no password"),
        (f"{SECRET} {SECRET}", "neither with the address of a peer nor with 'mesh'"),
        (f"192.0.2 {SECRET}", "neither with the address"),
        (f"192.0.2.0/24 {SECRET}", "neither with the address"),
        (f"Mesh {SECRET}", "neither with the address"),
        (f'192.0.2.2 "{SECRET}"', "a quotation mark"),
        (f"192.0.2.2 {SECRET}\x07", "a control character"),
        (f"192.0.2.2 {SECRET}\x00", "a control character"),
        (f"192.0.2.2 {SECRET}\r{SECRET}", "a control character"),
        (f"192.0.2.2 {SECRET}{'ä' * 40}", "more than 80 bytes"),
        (f"192.0.2.2 {SECRET}\udcff", "is not UTF-8"),
        (f"192.0.2.1 {SECRET}", "an earlier line"),
        (f"mesh {SECRET}", "an earlier line"),
    ],
)
def test_an_invalid_line_is_named_by_its_number_and_never_quoted(line: str, why: str) -> None:
    text = f"192.0.2.1 x\nmesh {'y' * 80}\n\n{line}\n".encode(errors="surrogateescape")
    with pytest.raises(CalicoError, match=f"^file, line 4: .*{re.escape(why)}") as caught:
        parse(text, "file")
    assert SECRET not in str(caught.value)


def test_a_file_that_others_may_read_is_refused_and_the_passwords_from_before_stay(file: Path) -> None:
    valid = read(file)
    assert valid.problem is None and valid.known and valid.peers == {"192.0.2.1": SECRET}
    for mode in (0o640, 0o604, 0o620, 0o601):
        file.chmod(mode)
        file.write_text("192.0.2.1 other\n")
        refused = read(file, valid)
        assert refused.peers == valid.peers and refused.known
        assert f"{file} has mode {mode:04o}" in refused.problem and f"chmod 600 {file}" in refused.problem
        assert "stay in use" in refused.problem
        assert not read(file).known and not read(file).peers and "no BGP session" in read(file).problem
        assert not read(file, read(file)).known
    file.chmod(0o400)
    assert read(file, refused).peers == {"192.0.2.1": "other"} and read(file, refused).problem is None
    file.chmod(0o600)
    file.write_text(f"mesh {SECRET} \nnonsense\n")
    refused = read(file, valid)
    assert refused.peers == valid.peers and "line 2" in refused.problem


def test_a_file_of_another_user_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords, "OWNER", os.geteuid() + 1)
    found = read(file)
    assert not found.known and "belongs to user " in found.problem and "chown root" in found.problem
    assert SECRET not in found.problem


def test_what_is_no_file_is_refused(tmp_path: Path, file: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    assert "not a regular file" in read(tmp_path / "pipe").problem
    for path in (tmp_path, file / "x"):
        assert "cannot be read" in read(path).problem
    file.write_bytes(b"#" * 2**20 + b"\n")
    assert "has more than" in read(file).problem
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    assert not read(file).known and "to a file that does not exist" in read(file).problem
    kept = read(file, Passwords({}, SECRET))
    assert (kept.mesh, kept.known) == (SECRET, True) and "stay in use" in kept.problem


def test_the_file_is_read_again_only_when_it_has_changed(file: Path) -> None:
    first = read(file)
    assert read(file, first) is first
    file.write_text(f"192.0.2.1 {SECRET[::-1]}\n")
    second = read(file, first)
    assert second.peers == {"192.0.2.1": SECRET[::-1]}
    file.chmod(0o644)
    refused = read(file, second)
    assert refused.problem and read(file, refused) is refused
    file.chmod(0o600)
    third = read(file, refused)
    assert third.problem is None and third.peers == second.peers
    file.unlink()
    gone = read(file, third)
    assert gone == Passwords() and read(file, gone) is gone
