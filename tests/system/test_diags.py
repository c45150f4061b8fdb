"""The archive of `diags`: what is in it, and that no secret is."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

from tests.system.agent import LOG_DIR, AgentHost
from tests.system.support import CALICOCTL, Host, not_installed, run

SECRETS = ("hunter2", "s3cr3t", "MIIEvQIBADANB", "swordfish", "horse")


def test_diags_are_complete_and_have_no_secrets(bare_host: Host, engine: None, tmp_path: Path) -> None:
    host = AgentHost(bare_host.etcd)
    host.start_agent()
    host.add("a", "192.168.0.1")
    run("docker", "run", "--net=none", "--name", "workload", "-e", "DB_PASSWORD=hunter2", "-tid", "busybox")
    run("iptables", "-N", "mark-of-test")  # without any chain, iptables-save prints nothing
    host.etcd.put("/calico/v1/config/BgpPassword", "hunter2")
    host.etcd.put("/calico/v1/config/Odd", {"token": "s3cr3t", "x": 1})
    host.etcd.put("/calico/v1/config/pw", "hunter2")
    host.etcd.put("/calico/v1/config/passwords", ["hunter2"])
    host.etcd.put("/calico/v1/other/creds", {"name": "hunter2", "status": {"reason": "s3cr3t"}})
    host.etcd.put("/calico/v1/policy/profile/odd/rules", {"inbound_rules": ["hunter2"]})
    host.etcd.put("/calico/v1/policy/profile/odd/tags", ["a" * 30000])  # which takes no time
    peer = {"ip": "192.0.2.9", "as_num": "1", "md5": "s3cr3t", "password": 'correct "horse'}
    host.etcd.put("/calico/bgp/v1/global/peer_v4/192.0.2.9", peer)
    with (LOG_DIR / "felix.log").open("a") as log:
        log.write("-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANB\n-----END PRIVATE KEY-----\nurl https://u:swordfish@h/\n")
        log.write("Authorization: Basic s3cr3t\nclient_secret=s3cr3t password: 'hunter2 swordfish'\n")
        log.write(
            "password = correct horse\nroot:hunter2@127.0.0.1:2379 is no address\nhttp://u:hun/ter2@h:1 neither\n"
        )
        log.write(
            "curl -u root:hunter2 h; mysql -phunter2; x --password hunter2 --token s3cr3t\nprivate key: swordfish\n"
        )
    # what the user `bird` can do in its folder
    passwords = Path("/etc/calico/bgp-passwords")
    passwords.parent.mkdir(exist_ok=True)
    passwords.touch(0o600)
    passwords.write_text("mesh correct horse\n")
    folder = Path(f"/run/calico/{host.name}/bird")
    folder.mkdir(exist_ok=True)
    (folder / "log").unlink(missing_ok=True)
    (folder / "log").symlink_to(passwords)
    secrets = {
        "ETCD_PROXY": "http://user:swordfish@127.0.0.1:9",
        "DOCKER_PASS": "hunter2",
        "DOCKER_PASSWORD": "correct horse",
        "DOCKER_AUTH_CONFIG": '{"auths": {"x": {"auth": "s3cr3t"}}}',
        "CALICO_KEY": "hunter2",
    }
    try:
        said = host.ctl("diags", f"--log-dir={LOG_DIR}", "--output=json", env={"TMPDIR": str(tmp_path), **secrets})
        file = Path(json.loads(said.out)["file"])
        assert file.parent == tmp_path and file.stat().st_mode & 0o777 == 0o600 and said.err == ""
        with tarfile.open(file) as archive:
            texts = {member.name.rpartition("/")[2]: archive.extractfile(member).read().decode() for member in archive}
        for secret in SECRETS:
            assert [name for name, text in texts.items() if secret in text] == []
        interface = host.interface("a")
        # what other users of the host can read of the same
        open_to_all = [
            file
            for folder in (LOG_DIR, Path("/run/calico"))
            for file in folder.rglob("*")
            if file.is_file() and not file.is_symlink() and file.stat().st_mode & 0o004
        ]
        assert Path(f"/run/calico/{host.name}/felix.json") in open_to_all
        assert not [file for file in open_to_all for secret in SECRETS if secret in file.read_text()]
        as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", CALICOCTL]
        shown = host.ctl("status", command=as_nobody).out
        assert "/calico/v1/policy/profile/odd/rules: root alone is told what" in shown and "1 up" in shown
        for name, word in (
            ("nftables.txt", "table inet calico"),
            ("iptables.txt", "mark-of-test"),
            ("routes-ipv4.txt", f"192.168.0.1 dev {interface}"),
            ("neighbours.txt", host.mac("a")),
            ("links.txt", interface),
            ("settings.txt", f"net/ipv4/conf/{interface}/proxy_arp = 1"),
            ("felix.log", "is up"),
            ("bird.log", "could not be collected"),
            ("status.json", '"up": 1'),
            ("etcd.json", "/calico/v1/host/host1/workload/namespace"),
            ("etcd.json", "/calico/v1/config/BgpPassword"),
            ("etcd.json", "192.0.2.9"),
            ("etcd.json", '"/calico/v1/config/LogSeverityScreen": "info"'),
            ("environment.txt", "DOCKER_PASS is set"),
            ("docker.json", "workload"),
            ("versions.txt", "pyroute2"),
            ("checksystem.json", "nftables"),
            ("environment.txt", "ETCD_AUTHORITY"),
        ):
            assert word in texts[name], name
    finally:
        passwords.unlink()
        (folder / "log").unlink()
        run("iptables", "-X", "mark-of-test")
        run("docker", "rm", "-f", "workload")
        host.ctl("container", "remove", "/var/run/netns/a")


def test_diags_of_an_address_with_a_password(bare_host: Host, tmp_path: Path) -> None:
    for name, value in (
        ("ETCD_ENDPOINTS", "http://root:hunter2@127.0.0.1:2379"),
        ("ETCD_ENDPOINTS", "http://root:hun/ter2@127.0.0.1:2379,x:hunter2@y"),
        ("ETCD_AUTHORITY", "root:hunter2@127.0.0.1:2379"),
        ("ETCD_AUTHORITY", "root:hunter2,y@127.0.0.1:2379"),
        ("ETCD_ENDPOINTS", "http://root:hunter2,y@127.0.0.1:2379"),
        ("DOCKER_HOST", "tcp://root:hunter2@127.0.0.1:1"),
        ("DOCKER_HOST", "tcp://root:hun'ter2@127.0.0.1:1"),
    ):
        file = Path(bare_host.ctl("diags", env={name: value, "TMPDIR": str(tmp_path)}).out.split()[-1])
        with tarfile.open(file) as archive:
            for member in archive:
                text = archive.extractfile(member).read().decode()
                assert "hunter2" not in text and "ter2" not in text, (name, member.name)
        assert "hunter2" not in bare_host.ctl("pool", "show", status=None, env={name: value}).err


def test_diags_where_little_can_be_had(bare_host: Host, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    env = {
        "ETCD_AUTHORITY": "127.0.0.1:1",
        "DOCKER_HOST": "unix:///nowhere",
        "PATH": str(tmp_path / "bin"),
        "TMPDIR": str(tmp_path),
    }
    with not_installed("nft"):
        said = bare_host.ctl("diags", f"--log-dir={tmp_path}", env=env)
    file = Path(said.out.split()[-1])
    with tarfile.open(file) as archive:
        texts = {member.name.rpartition("/")[2]: archive.extractfile(member).read().decode() for member in archive}
    assert "could not be collected" in texts["etcd.json"] and "could not be collected" in texts["nftables.txt"]
    assert "could not be collected" in texts["felix.log"]
    assert "--log-dir" in bare_host.ctl("diags", "--log-dir=", status=1).err
    file.unlink()
    full = bare_host.ctl("diags", status=1, env=env, command=["/usr/bin/prlimit", "--fsize=1000", CALICOCTL])
    assert "cannot be written" in full.err and not list(tmp_path.glob("*.gz"))
