"""The settings file: systemd's syntax, which variables are used, and calicoctl's own lines in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from calicoctl.cli import completion
from calicoctl.cli.main import main
from calicoctl.environment import EnvironmentFile, complete, parse
from calicoctl.errors import CalicoError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # what systemd's own parser makes of these
        ("", {}),
        ("a=a\nb=b\\\nc\nd=d\\\ne\\\nf\ng=g\\ \nh=i\\", {"a": "a", "b": "bc", "d": "def", "g": "g ", "h": "i"}),
        ("# a=b\n; c=d\n \t# e=f\n\n   \n g=h", {"g": "h"}),
        ("# a comment ends with its line \\\na=b", {"a": "b"}),
        ("a=\nb=", {"a": "", "b": ""}),
        ("  a \t= \t b c \t\r\nd=e\r\n", {"a": "b c", "d": "e"}),
        ("a=b # no comment; here", {"a": "b # no comment; here"}),
        ("a=\"b c \" d 'e'", {"a": "b c d 'e'"}),
        ("""a=  'b' "c" d\n""", {"a": "bcd"}),
        ("""a='b\\n"$c"\\'\n""", {"a": 'b\\n"$c"\\'}),
        ('a="b\\"\\$\\`\\\\\\n\\x\\\ny\nz"', {"a": 'b"$`\\\\n\\xy\nz'}),
        ("a=\\n\\\\\\'\\\"$HOME", {"a": "n\\'\"$HOME"}),
        ("a=\\\n  b", {"a": "  b"}),
        ("a=b=c\na=d", {"a": "d"}),
        ("a=ä", {"a": "ä"}),
        ("# no end", {}),
    ],
)
def test_the_syntax_is_systemds(text: str, expected: dict[str, str]) -> None:
    assert parse(text, "file") == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a=b\n\nexport ETCD_AUTHORITY=a:1", r"file, line 3: 'export ETCD_AUTHORITY' is not the name .* no shell's"),
        ("ETCD_AUTHORITY a:1\n", "file, line 1: 'ETCD_AUTHORITY a:1' sets no variable"),
        ("a=b\nETCD_AUTHORITY", "file, line 2: 'ETCD_AUTHORITY' sets no variable"),
        ("=b", "line 1: '' is not the name"),
        ("1a=b", "line 1: '1a' is not the name"),
        ("ä=b", "line 1: 'ä' is not the name"),
        ('# x\na="b\nETCD_AUTHORITY=a:1', 'line 2: the quotation that begins with " does not end'),
        ("a='b", "line 1: the quotation that begins with ' does not end"),
        ("a=b\0c", "line 1: the value of a has a control character"),
    ],
)
def test_a_line_that_systemd_would_pass_over_is_named(text: str, why: str) -> None:
    with pytest.raises(CalicoError, match=why):
        parse(text, "file")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALICO_ENV_FILE", str(tmp_path / "node.env"))
    return tmp_path / "node.env"


@pytest.mark.parametrize(
    ("text", "before", "expected"),
    [
        # the store, together or not at all
        ("ETCD_AUTHORITY=a:1\nETCD_SCHEME=https", {}, {"ETCD_AUTHORITY": "a:1", "ETCD_SCHEME": "https"}),
        (
            "ETCD_AUTHORITY=a:1\nETCD_CA_CERT_FILE=/a",
            {"ETCD_ENDPOINTS": "http://b:1"},
            {"ETCD_ENDPOINTS": "http://b:1"},
        ),
        ("ETCD_AUTHORITY=a:1", {"DATASTORE_TYPE": "etcdv2"}, {"DATASTORE_TYPE": "etcdv2"}),
        ("DATASTORE_TYPE=etcdv3\nETCD_PASSWORD=x", {"ETCD_AUTHORITY": "b:1"}, {"ETCD_AUTHORITY": "b:1"}),
        ("ETCD_USERNAME=a\nETCD_PASSWORD_FILE=/a", {"ETCD_AUTHORITY": "b:1"}, {"ETCD_AUTHORITY": "b:1"}),
        ("ETCD_AUTHORITY=a:1", {"ETCD_ENDPOINTS": ""}, {"ETCD_ENDPOINTS": "", "ETCD_AUTHORITY": "a:1"}),
        ("ETCD_AUTHORITY=a:1", {"ETCD_NAME": "m0"}, {"ETCD_NAME": "m0", "ETCD_AUTHORITY": "a:1"}),
        # the others, one by one
        ("HOSTNAME=a\nCALICO_DEBUG=1", {"HOSTNAME": "b"}, {"HOSTNAME": "b", "CALICO_DEBUG": "1"}),
        ("HOSTNAME=a\nETCD_AUTHORITY=a:1", {"ETCD_AUTHORITY": "b:1"}, {"ETCD_AUTHORITY": "b:1", "HOSTNAME": "a"}),
        # an engine with what belongs to it
        ("DOCKER_HOST=tcp://a:1\nDOCKER_TLS_VERIFY=1", {}, {"DOCKER_HOST": "tcp://a:1", "DOCKER_TLS_VERIFY": "1"}),
        ("DOCKER_HOST=tcp://a:1\nDOCKER_TLS_VERIFY=1", {"DOCKER_HOST": "unix:///b"}, {"DOCKER_HOST": "unix:///b"}),
        (
            "DOCKER_HOST=tcp://a:1\nDOCKER_CERT_PATH=/a",
            {"DOCKER_CERT_PATH": "/b"},
            {"DOCKER_HOST": "tcp://a:1", "DOCKER_CERT_PATH": "/b"},
        ),
        # nothing else
        ("CALICO_NODE_OPTIONS=--ip=192.0.2.2\nPATH=/a\nLD_PRELOAD=/a\nHOSTNAME=", {}, {}),
    ],
)
def test_the_file_completes_the_environment(
    path: Path, text: str, before: dict[str, str], expected: dict[str, str]
) -> None:
    path.write_text(text)
    environment = {"CALICO_ENV_FILE": str(path), **before}
    complete(environment)
    assert environment == {"CALICO_ENV_FILE": str(path), **expected}


@pytest.mark.parametrize(
    ("text", "before", "expected"),
    [
        (
            "ETCD_AUTHORITY=a:1\nHOSTNAME=a",
            {"ETCD_ENDPOINTS": "http://b:1", "ETCD_USERNAME": "b", "HOSTNAME": "b", "PATH": "/b"},
            {"ETCD_AUTHORITY": "a:1", "HOSTNAME": "a", "PATH": "/b"},
        ),
        ("HOSTNAME=a\nETCD_AUTHORITY=", {"ETCD_AUTHORITY": "b:1"}, {"HOSTNAME": "a", "ETCD_AUTHORITY": "b:1"}),
        ("ETCD_AUTHORITY=a:1\nCALICO_DEBUG=0", {"HOSTNAME": "b", "CALICO_DEBUG": "1"}, None),
    ],
)
def test_the_file_comes_first_for_store_and_host_name(
    path: Path, text: str, before: dict[str, str], expected: dict[str, str] | None
) -> None:
    path.write_text(text)
    environment = {"CALICO_ENV_FILE": str(path), **before}
    complete(environment, file_first=True)
    wanted = {**before, "ETCD_AUTHORITY": "a:1"} if expected is None else expected
    assert environment == {"CALICO_ENV_FILE": str(path), **wanted}


def test_a_file_that_is_not_there_says_nothing(path: Path) -> None:
    complete()
    assert EnvironmentFile({}).path == Path("/etc/calico/node.env")
    assert EnvironmentFile({"CALICO_ENV_FILE": ""}).path == Path("/etc/calico/node.env")
    assert EnvironmentFile({"CALICO_ENV_FILE": os.devnull}).variables() == {}


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("folder", "Is a directory|not a regular file"),
        ("link", "No such file or directory \\(it is a link\\)"),
        ("pipe", "not a regular file"),
        ("below a file", "Not a directory"),
        ("not UTF-8", "it is not UTF-8 text"),
        ("large", "more than 1048576 bytes"),
        ("itself", "remove that line"),
        ("no variable", "line 1: 'x' sets no variable"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error(
    path: Path, kind: str, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "below a file":
        path.write_text("")
        monkeypatch.setenv("CALICO_ENV_FILE", f"{path}/below")
    else:
        content = {"not UTF-8": b"HOSTNAME=\xff", "large": b"#" * 2**21, "itself": b"CALICO_ENV_FILE=/x"}
        path.write_bytes(content.get(kind, b"x"))
    with pytest.raises(CalicoError, match=why):
        complete()
    assert main(["pool", "show"]) == 1
    said = capsys.readouterr()
    assert str(path) in said.err and said.err.count("\n") == 1 and said.out == ""
    # what asks no store works all the same
    for words in (["--help"], ["--version"], ["version"], ["pool", "--help"], ["completion", "bash"]):
        assert main(words) == 0, words
    assert completion.candidates("calicoctl profile web ") == ["rule", "tag"]
    assert completion.candidates("calicoctl profile trace ") == []


OTHERS = "\n# mine\nHOSTNAME=host1 \\\n"
"""What a user wrote; its last line goes on."""


@pytest.mark.parametrize("before", [OTHERS, "", "HOSTNAME=a", None])
def test_what_a_user_wrote_stays(path: Path, before: str | None) -> None:
    if before is not None:
        path.write_text(before)
        path.chmod(0o640)
    file = EnvironmentFile()
    others = file.variables()
    for port in ("1", "2"):
        file.set_own({"ETCD_AUTHORITY": f"a:{port}"})
        assert file.own() == {"ETCD_AUTHORITY": f"a:{port}"} and file.others() == others
        assert file.variables() == {**others, **file.own()}
        assert path.stat().st_mode & 0o777 == (0o644 if before is None else 0o640)
        assert path.read_text().count("ETCD_AUTHORITY") == 1
    file.remove_own()
    assert (path.read_text() if path.exists() else None) == before
    file.remove_own()
    assert list(path.parent.iterdir()) == ([] if before is None else [path])


def test_what_a_user_writes_later_stays(path: Path) -> None:
    file = EnvironmentFile({"CALICO_ENV_FILE": str(path.parent / "new/node.env")})
    file.set_own({"ETCD_AUTHORITY": "a:1"})
    assert file.path.parent.stat().st_mode & 0o777 == 0o755
    file.path.write_text(file.path.read_text() + OTHERS)
    file.set_own({"ETCD_AUTHORITY": "a:2"})
    file.remove_own()
    assert file.path.read_text() == OTHERS
    file.path.unlink()
    file.set_own({"ETCD_AUTHORITY": "a:1"})  # into a folder that was there
    file.remove_own()
    assert list(file.path.parent.iterdir()) == []
    file.path.parent.rmdir()
    file.set_own({"ETCD_AUTHORITY": "a:1"})
    file.remove_own()
    assert not file.path.parent.exists()


def test_a_link_stays_one(path: Path) -> None:
    real = path.parent / "real"
    real.write_text(OTHERS)
    path.symlink_to(real)
    EnvironmentFile().set_own({"ETCD_AUTHORITY": "a:1"})
    assert path.is_symlink() and "a:1" in real.read_text()
    EnvironmentFile().remove_own()
    assert path.is_symlink() and real.read_text() == OTHERS


def test_a_file_that_cannot_be_written_stays_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text(OTHERS)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CalicoError, match=f"{path} cannot be written: No space left on device"):
        EnvironmentFile().set_own({"ETCD_AUTHORITY": "a:1"})
    assert path.read_text() == OTHERS and list(path.parent.iterdir()) == [path]
