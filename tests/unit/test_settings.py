"""Where etcd is, from the environment; the host's name."""

from __future__ import annotations

import shutil
from pathlib import Path

import certifi
import pytest

from calicoctl.datastore.hosts import hostname
from calicoctl.datastore.settings import EtcdSettings
from calicoctl.errors import CalicoError, StoreError


def test_the_default_is_etcd_on_this_host() -> None:
    assert EtcdSettings.from_environment({}) == EtcdSettings("http", (("127.0.0.1", 2379),))


def test_endpoints_go_before_authority(tmp_path: Path) -> None:
    shutil.copy(certifi.where(), tmp_path / "ca")
    settings = EtcdSettings.from_environment(
        {
            "ETCD_ENDPOINTS": "https://a.example:2379, https://[2001:db8::1]:4001/",
            "ETCD_AUTHORITY": "c:1",
            "ETCD_CA_CERT_FILE": str(tmp_path / "ca"),
        }
    )
    assert settings.members == (("a.example", 2379), ("[2001:db8::1]", 4001))
    assert (settings.scheme, settings.ca_cert) == ("https", str(tmp_path / "ca"))
    assert settings.url(settings.members[1]) == "https://[2001:db8::1]:4001"


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"ETCD_AUTHORITY": "localhost"}, "ETCD_AUTHORITY: 'localhost'"),
        ({"ETCD_AUTHORITY": "localhost:99999"}, "ETCD_AUTHORITY"),
        ({"ETCD_AUTHORITY": "a:1/x"}, "ETCD_AUTHORITY"),
        ({"ETCD_AUTHORITY": "u@a:1"}, "ETCD_AUTHORITY"),
        ({"ETCD_SCHEME": "ftp"}, "ETCD_SCHEME is 'ftp'"),
        ({"ETCD_ENDPOINTS": "127.0.0.1:2379"}, "ETCD_ENDPOINTS: '127.0.0.1:2379'"),
        ({"ETCD_ENDPOINTS": "http://a:1,"}, "ETCD_ENDPOINTS: ''"),
        ({"ETCD_ENDPOINTS": "http://a:1,https://b:1"}, "mixes http and https"),
        ({"ETCD_CERT_FILE": "/dev/null"}, "ETCD_CERT_FILE is set, but ETCD_SCHEME says http"),
        ({"ETCD_SCHEME": "https", "ETCD_CERT_FILE": "/dev/null"}, "without ETCD_KEY_FILE"),
        ({"ETCD_SCHEME": "https", "ETCD_KEY_FILE": "/dev/null"}, "without ETCD_CERT_FILE"),
        ({"ETCD_SCHEME": "https", "ETCD_CA_CERT_FILE": "/nonexistent"}, "ETCD_CA_CERT_FILE: cannot read /nonexistent"),
        (
            {"ETCD_SCHEME": "https", "ETCD_CA_CERT_FILE": "/dev/null"},
            "ETCD_CA_CERT_FILE: /dev/null holds no certificate",
        ),
        (
            {"ETCD_SCHEME": "https", "ETCD_CERT_FILE": "/dev/null", "ETCD_KEY_FILE": "/dev/null"},
            "ETCD_CERT_FILE and ETCD_KEY_FILE: /dev/null",
        ),
        ({"DATASTORE_TYPE": "kubernetes"}, "DATASTORE_TYPE is 'kubernetes': it must be etcdv2 or etcdv3, or unset"),
        ({"ETCD_USERNAME": "calico"}, "ETCD_USERNAME is set without ETCD_PASSWORD or ETCD_PASSWORD_FILE"),
        ({"ETCD_PASSWORD": "hunter2"}, "ETCD_PASSWORD is set without ETCD_USERNAME"),
        ({"ETCD_PASSWORD_FILE": "/dev/null"}, "ETCD_PASSWORD_FILE is set without ETCD_USERNAME"),
        ({"ETCD_USERNAME": "a", "ETCD_PASSWORD": "b", "ETCD_PASSWORD_FILE": "/dev/null"}, "both set: set one"),
        ({"ETCD_USERNAME": "a", "ETCD_PASSWORD_FILE": "/nonexistent"}, "ETCD_PASSWORD_FILE: cannot read /nonexistent"),
        ({"ETCD_USERNAME": "a", "ETCD_PASSWORD_FILE": "/"}, "ETCD_PASSWORD_FILE: cannot read /: Is a directory"),
        ({"ETCD_USERNAME": "a", "ETCD_PASSWORD_FILE": "/dev/null"}, "/dev/null must hold a password, in one line"),
        ({"ETCD_USERNAME": "a\udcff", "ETCD_PASSWORD": "b"}, "ETCD_USERNAME must be printable UTF-8 text"),
        ({"ETCD_USERNAME": "a\nb", "ETCD_PASSWORD": "b"}, "ETCD_USERNAME must be printable UTF-8 text"),
        ({"ETCD_ENDPOINTS": "http://a:b@c:1"}, "the name and the password of a user are set by ETCD_USERNAME"),
    ],
)
def test_what_is_wrong_in_the_environment_is_named(environment: dict, why: str) -> None:
    with pytest.raises(StoreError, match=why):
        EtcdSettings.from_environment(environment)


def test_the_api_and_the_user(tmp_path: Path) -> None:
    assert EtcdSettings.from_environment({}).api is None
    assert EtcdSettings.from_environment({"DATASTORE_TYPE": "etcdv2"}).api == "etcdv2"
    file = tmp_path / "password"
    file.touch(0o600)
    file.write_text(" hunter 2\r\n")
    user = {"ETCD_USERNAME": "calicö"}
    for more, password in (({"ETCD_PASSWORD": "x ÿ "}, "x ÿ "), ({"ETCD_PASSWORD_FILE": str(file)}, " hunter 2")):
        settings = EtcdSettings.from_environment({**user, **more})
        assert (settings.username, settings.password) == ("calicö", password)
        assert password not in repr(settings) and settings.basic is not None


def test_a_password_that_is_not_utf8_is_refused_and_not_quoted() -> None:
    with pytest.raises(StoreError, match=r"^ETCD_PASSWORD is not UTF-8 text") as refused:
        EtcdSettings.from_environment({"ETCD_USERNAME": "calico", "ETCD_PASSWORD": "hunter2\udcff"})
    assert "hunter" not in str(refused.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_password_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "file"
    file.write_text("hunter2\n")
    file.chmod(mode)
    user = {"ETCD_USERNAME": "calico", "ETCD_PASSWORD_FILE": str(file)}
    with pytest.raises(StoreError, match=rf"/file has mode {mode:04o}, so .*: run 'chmod 600 .*/file'") as refused:
        EtcdSettings.from_environment(user)
    assert "hunter" not in str(refused.value)
    file.chmod(0o400)
    assert EtcdSettings.from_environment(user).password == "hunter2"


@pytest.mark.parametrize("content", [b"hunter2\nhunter3\n", b"hunter2" * 1000, b"hunter2\xff\n", b"\n", b"hunter2\0"])
def test_a_file_that_holds_no_password_is_refused_and_not_quoted(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(StoreError, match=r"^ETCD_PASSWORD_FILE: .*/file ") as refused:
        EtcdSettings.from_environment({"ETCD_USERNAME": "calico", "ETCD_PASSWORD_FILE": str(tmp_path / "file")})
    assert "hunter" not in str(refused.value)


def test_the_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTNAME", "host-1.example")
    assert hostname() == "host-1.example"
    for bad in ("a/b", "..", "a b", ".", "_a"):
        monkeypatch.setenv("HOSTNAME", bad)
        with pytest.raises(CalicoError, match="host name"):
            hostname()
