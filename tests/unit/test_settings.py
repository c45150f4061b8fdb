"""Where etcd is, from the environment; the host's name; addresses and AS numbers as people type them."""

from __future__ import annotations

import shutil
from pathlib import Path

import certifi
import pytest

from calicoctl.addresses import parse_address, parse_cidr
from calicoctl.commands.node import parse_as_number
from calicoctl.datastore.hosts import hostname
from calicoctl.datastore.settings import EtcdSettings
from calicoctl.errors import CalicoError, StoreError
from calicoctl.workloads.wiring import AddressRequest, check_interface_name


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
    assert settings.hosts == (("a.example", 2379), ("[2001:db8::1]", 4001))
    assert (settings.scheme, settings.ca_cert) == ("https", str(tmp_path / "ca"))
    assert settings.url(settings.hosts[1]) == "https://[2001:db8::1]:4001"


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


@pytest.mark.parametrize("text", ["", "1.2", "1", "0x7f.1.1.1", "192.168.0.256", "192.168.0.1 ", "::g", "fe80::1%eth0"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(CalicoError):
        parse_address(text)


@pytest.mark.parametrize(
    "text", ["10/8", "10.0.0.0/", "10.0.0.0/+8", "10.0.0.0/33", "10.0.0.0/255.0.0.0", "fd00::/129"]
)
def test_what_is_no_cidr(text: str) -> None:
    with pytest.raises(CalicoError):
        parse_cidr(text)


def test_wishes() -> None:
    assert AddressRequest.parse("ipv4") == AddressRequest(4)
    assert AddressRequest.parse("IPv6") == AddressRequest(6)
    assert AddressRequest.parse("10.0.0.0/8") == AddressRequest(4, cidr="10.0.0.0/8")
    assert str(AddressRequest.parse("fd00:0::1").address) == "fd00::1"
    with pytest.raises(CalicoError, match="'ipv5' is not a valid IP address"):
        AddressRequest.parse("ipv5")


def test_as_numbers_in_both_notations() -> None:
    assert [parse_as_number(text) for text in ("64511", "1.10", "0.5", "65535.65535")] == [
        "64511",
        "65546",
        "5",
        "4294967295",
    ]
    for bad in ("0", "4294967296", "65536.1", "1.65536", "x", "-1", "1.2.3", ""):
        with pytest.raises(CalicoError, match="AS number"):
            parse_as_number(bad)


def test_interface_names() -> None:
    check_interface_name("eth1")
    check_interface_name("x" * 15)
    for bad in ("", "x" * 16, "a/b", "a b", "a\tb", ".", "..", "eth%d", "a:b", "é" * 8, "a\x00"):
        with pytest.raises(CalicoError, match="interface name"):
            check_interface_name(bad)
