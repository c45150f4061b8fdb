"""A cluster of three etcd members, of which one stops, hangs or is not there; and etcd over TLS."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.support import Etcd, Host, run

KEY = ("-newkey", "rsa:2048", "-nodes")
HOME = Path("/run/calico-tests/cluster")


@pytest.fixture
def members() -> Iterator[list[Etcd]]:
    servers = [Etcd(HOME / f"m{number}", f"m{number}") for number in range(3)]
    cluster = ",".join(f"{server.name}=http://127.0.0.1:{server.peer}" for server in servers)
    for server in servers:
        server.start(cluster)
    for server in servers:
        server.await_ready()
    yield servers
    for server in servers:
        server.stop(9)
    shutil.rmtree(HOME)


@pytest.fixture
def clustered(bare_host: Host, members: list[Etcd]) -> Host:
    host = Host(members[0], endpoints=",".join(server.url for server in members))
    host.register()
    return host


def is_leader(server: Etcd) -> bool:
    with urllib.request.urlopen(f"{server.url}/v2/stats/self") as answer:
        return json.load(answer)["state"] == "StateLeader"


@pytest.mark.parametrize("role", ["leader", "follower"])
@pytest.mark.parametrize("signal", [9, 19], ids=["killed", "hanging"])
def test_a_member_that_stops_in_a_row_of_commands_makes_none_fail(
    clustered: Host, members: list[Etcd], blue: str, role: str, signal: int
) -> None:
    victim = next(server for server in members if is_leader(server) == (role == "leader"))
    # it is the first that is asked
    rest = [server for server in members if server is not victim]
    clustered.endpoints = ",".join(server.url for server in [victim, *rest])
    clustered.etcd = rest[0]
    clustered.ctl("profile", "add", "before")
    running = [clustered.start("profile", "add", f"during{number}") for number in range(12)]
    running[0].wait()  # the others are under way by now
    victim.process.send_signal(signal)
    assert [command.wait() for command in running] == [0] * 12
    assert clustered.ctl("container", "add", blue, "192.168.0.1").out.startswith("IP 192.168.0.1 added")
    if signal == 9:  # one that hangs costs every command a few seconds
        clustered.ctl("profile", "add", "after")
        clustered.ctl("container", blue, "profile", "append", "before", "after", "during0", "during1", "during2")
    clustered.check_consistent()
    clustered.ctl("container", "remove", blue)
    clustered.check_nothing_left()


def test_without_a_majority_the_user_is_told_and_nothing_is_lost(clustered: Host, members: list[Etcd]) -> None:
    clustered.ctl("profile", "add", "web")
    for server in members[1:]:
        server.stop(9)
    said = clustered.ctl("profile", "web", "tag", "add", "x", status=1).err
    assert "etcd" in said and said.count("\n") == 1
    cluster = ",".join(f"{server.name}=http://127.0.0.1:{server.peer}" for server in members)
    for server in members[1:]:
        server.start(cluster)
    for server in members:
        server.await_ready()
    clustered.ctl("profile", "web", "tag", "add", "x")


def test_etcd_over_tls(bare_host: Host, tmp_path: Path) -> None:
    def openssl(*arguments: str) -> None:
        run("openssl", *arguments, cwd=tmp_path)

    openssl("req", "-x509", *KEY, "-days", "2", "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.pem")
    (tmp_path / "san").write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
    for name in ("server", "client"):
        openssl(*f"req -newkey rsa:2048 -nodes -keyout {name}.key -out {name}.csr -subj /CN={name}".split())
        openssl(
            *f"x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial".split(),
            *f"-days 2 -out {name}.pem -extfile san".split(),
        )
    server = Etcd(tmp_path / "etcd")
    url = f"https://127.0.0.1:{server.port}"
    server.start(
        None,
        *(f"--listen-client-urls={url}", f"--advertise-client-urls={url}", "--client-cert-auth"),
        *("--trusted-ca-file", str(tmp_path / "ca.pem")),
        *("--cert-file", str(tmp_path / "server.pem"), "--key-file", str(tmp_path / "server.key")),
    )
    files = {"ETCD_CA_CERT_FILE": "ca.pem", "ETCD_CERT_FILE": "client.pem", "ETCD_KEY_FILE": "client.key"}
    tls = {name: str(tmp_path / file) for name, file in files.items()}
    right = {"ETCD_ENDPOINTS": url, **tls}
    try:
        # it accepts connections some time before it serves: the client's own patience bridges that
        run(
            "sh",
            "-c",
            f"for i in $(seq 100); do curl -sk {url} >/dev/null; [ $? = 7 ] || exit 0; sleep .1; done",
            check=False,
        )
        assert bare_host.ctl("profile", "add", "web", env=right).out == "Created profile web\n"
        by_authority = {"ETCD_SCHEME": "https", "ETCD_AUTHORITY": f"127.0.0.1:{server.port}", **tls}
        assert "web" in bare_host.ctl("profile", "show", env=by_authority).out
        own_ca = {**right, "ETCD_CA_CERT_FILE": str(tmp_path / "server.pem")}
        assert "certificate" in bare_host.ctl("profile", "show", env=own_ca, status=1).err
        nobody = {"ETCD_ENDPOINTS": url, "ETCD_CA_CERT_FILE": tls["ETCD_CA_CERT_FILE"]}
        assert "certificate" in bare_host.ctl("profile", "show", env=nobody, status=1).err
    finally:
        server.stop()
