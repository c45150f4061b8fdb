"""What the archive of diagnostics shows: of the store, the fields that the data model defines; of files, no secrets."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest

from calicoctl.datastore.client import DatastoreClient
from calicoctl.diagnose import archive
from calicoctl.errors import CalicoError
from tests.unit.memory_store import MemoryStore

DATA_MODEL = Path(__file__).parent.parent.parent / "docs/datamodel.md"
KEY = "/calico/ipam/v2/assignment/ipv4/block/192.168.0.0-26"


def shown(monkeypatch: pytest.MonkeyPatch, value: dict[str, object]) -> object:
    store = MemoryStore()
    store.create(KEY, json.dumps(value))
    monkeypatch.setattr(DatastoreClient, "from_environment", lambda: DatastoreClient(store, "h"))
    return json.loads("".join(archive.sources("/nowhere")["etcd.json"]()))[KEY]


def test_every_field_of_the_data_model_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    text = DATA_MODEL.read_text()
    block_of_2016 = ["unallocated", "strict_affinity"]
    names = {*re.findall(r'"([^"\s]+)":', text), *block_of_2016}
    assert len(names) > 30 and all(f"`{name}`" in text for name in block_of_2016)
    fields: dict[str, object] = dict.fromkeys(sorted(names), 1)
    assert shown(monkeypatch, fields) == fields


def test_other_fields_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, {"id": "a", "note": "private"}) == {"id": "a", "note": "(left out)"}


def test_passwords_in_birds_configuration_are_left_out() -> None:
    text = (
        'protocol bgp a from peer4 {\n  neighbor 192.0.2.1 as 1; password "s3 cr\'3t";\n}\n'
        "b { password  \"s3 cr'3t; } # unfinished\n"
    )
    shown = archive.without_secrets(text)
    assert "cr'3t" not in shown
    assert shown.startswith('protocol bgp a from peer4 {\n  neighbor 192.0.2.1 as 1; password "(left out)";\n}\n')


@pytest.mark.parametrize(
    "text",
    [
        "curl -u root:hunter2 http://h/v2/keys",
        "curl -uroot:hunter2 h",
        "curl -su root:hunter2 h",
        "curl -sku 'root:hun hunter2' h",
        "cmd --pw hunter2",
        "password:\n  - hunter2",
        "private key:\nhunter2",
        "private key hunter2",
        "wg set wg0 private-key hunter2",
        "redis-cli -h h -a hunter2 ping",
        "curl --user 'root:hun hunter2' h",
        "curl --proxy-user=root:hunter2 h",
        "etcdctl --user root:hunter2 get a",
        "etcdctl --username root --password hunter2 ls",
        'cmd --password "my hunter2"',
        "cmd --Password 'my hunter2'",
        "cmd --etcd-token hunter2",
        "cmd -token hunter2",
        "cmd --token=hunter2",
        "mysql -phunter2 -h db",
        "mysql -p'my hunter2'",
        "docker login -u me -p hunter2 registry",
        "sshpass -p hunter2 ssh h",
        "private key: hunter2",
        "PrivateKey = hunter2",
        "  preshared key: hunter2",
        "PresharedKey=hunter2",
        "['curl', '-u', 'root:hunter2', 'h']",
        '["cmd", "--password", "hunter2"]',
        'said "cmd --password \\"hunter2\\""',
        "machine h login root password hunter2",
        "requirepass hunter2",
        "the password is hunter2",
        "Proxy-Authorization: Basic hunter2",
        "x bearer hunter2",
        "-----BEGIN EC PRIVATE KEY-----\nhunter2\n-----END EC PRIVATE KEY-----",
        "-----BEGIN OPENSSH PRIVATE KEY-----\nhunter2",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.hunter2",
        "password=hunter2",
        "ETCDCTL_USER=root:hunter2",
        "ETCDCTL_USER='root:my hunter2'",
        '"user": "root:hunter2"',
        "password 'my hunter2'",
        "password 'my hunter2",
        "password 'it'\\''s hunter2' x",
        'said "password \\"my hunter2\\""',
        "X-Auth-Token: hunter2",
        '["cmd","--token","hunter2"]',
        "cmd --password a,hunter2 b",
        "cmd --password a'hunter2 b",
        "mysql -pa,hunter2",
        "curl -u 'my user:hunter2' h",
        "curl -u root:a,hunter2 h",
        "private key is hunter2",
    ],
)
def test_secrets_are_left_out(text: str) -> None:
    assert "hunter2" not in archive.without_secrets(f"a\n{text}\nb")


@pytest.mark.parametrize(
    "text",
    [
        "/usr/sbin/bird -f -c /run/calico/h/bird/conf -s ctl -u bird -g bird",
        "-A FORWARD -i cali+ -p tcp -m comment --comment calico -j ACCEPT",
        "endpoint 4d5 of namespace -proc-17-ns-net is up",
        "date -u",
        "user=root: it runs as that user: yes",
        "nothing was dropped because of a wrong or missing password of a peer",
        "192.168.0.1 dev cali4d5 proto 80 scope link",
        "12:00:00 INFO: endpoint 4d5 of docker 0a1b is up",
    ],
)
def test_what_is_no_secret_is_kept(text: str) -> None:
    assert archive.without_secrets(text) == text


@pytest.mark.parametrize(
    "kind", ["-", "--", "-u", "-u a:", "-p", "--password", "--password ", "eyJ", "eyJaaaaaaaa.", "password ", "login "]
)
def test_long_texts_take_no_time(kind: str) -> None:
    began = time.monotonic()
    archive.without_secrets(kind * (200_000 // len(kind)))
    archive.without_secrets(kind + "a" * 200_000)
    assert time.monotonic() - began < 5


def test_links_are_not_followed_to_files_of_root(tmp_path: Path) -> None:
    secret = tmp_path / "bgp-passwords"
    secret.write_text("mesh horse\n")
    (tmp_path / "felix.log").symlink_to(secret)
    os.link(secret, tmp_path / "felix.log.1")
    os.mkfifo(tmp_path / "etcd.log")
    found = archive.sources(str(tmp_path))
    for name in ("felix.log", "felix.log.1", "etcd.log"):
        with pytest.raises((OSError, CalicoError)):
            found[name]()
    (tmp_path / "felix.log").unlink()
    (tmp_path / "felix.log").write_text("x" * archive.LOG_SIZE + "end")
    assert found["felix.log"]() == "x" * (archive.LOG_SIZE - 3) + "end"
