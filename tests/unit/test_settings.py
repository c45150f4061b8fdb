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
    ],
)
def test_what_is_wrong_in_the_environment_is_named(environment: dict, why: str) -> None:
    with pytest.raises(StoreError, match=why):
        EtcdSettings.from_environment(environment)


def test_the_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTNAME", "host-1.example")
    assert hostname() == "host-1.example"
    for bad in ("a/b", "..", "a b", ".", "_a"):
        monkeypatch.setenv("HOSTNAME", bad)
        with pytest.raises(CalicoError, match="host name"):
            hostname()
