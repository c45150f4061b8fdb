"""A cluster of three etcd members, of which one stops, hangs, is cut off or is not there; and etcd over TLS."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.system.agent import AgentHost
from tests.system.support import Etcd, Host, end_agents, run, wait_for

KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
HOME = Path("/run/calico-tests/cluster")
HERE, THERE = "198.51.100.1", "198.51.100.2"


@pytest.fixture
def members() -> Iterator[list[Etcd]]:
    with running([Etcd(HOME / f"m{number}", f"m{number}") for number in range(3)]) as servers:
        yield servers


@contextmanager
def running(servers: list[Etcd], *options: str) -> Iterator[list[Etcd]]:
    """A cluster of these members."""
    try:
        for server in servers:
            server.start(cluster_of(servers), *options)
        for server in servers:
            server.await_ready()
        yield servers
    finally:
        for server in servers:
            server.stop(9)
            shutil.rmtree(server.directory)


def cluster_of(servers: list[Etcd]) -> str:
    """Return what a member has to know of the others."""
    return ",".join(f"{server.name}={server.peer_url}" for server in servers)


@pytest.fixture
def clustered(bare_host: Host, members: list[Etcd]) -> Host:
    host = Host(members[0], endpoints=",".join(server.url for server in members))
    host.register()
    return host


def is_leader(server: Etcd) -> bool:
    status = server.v3("maintenance/status", {})
    return status["leader"] == status["header"]["member_id"]


@pytest.mark.parametrize(
    ("signal", "role"),
    [(9, "leader"), (9, "follower"), (19, "leader")],
    ids=["killed leader", "killed follower", "hanging leader"],
)
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
    clustered.ctl("profile", "add", "after")
    clustered.ctl("container", blue, "profile", "append", "before", "after", "during0", "during1", "during2")
    clustered.check_consistent()
    clustered.ctl("container", "remove", blue)
    clustered.check_nothing_left()


def test_a_member_that_hangs_is_waited_for_once(host: Host) -> None:
    """By all lines of a batch, and by the commands of the next minute."""
    asked = 0

    def count() -> int:
        nonlocal asked
        with suppress(BlockingIOError):
            while True:
                taken.append(hanging.accept()[0])
                asked += 1
        return asked

    with ExitStack() as stack:
        hanging = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=100))
        hanging.setblocking(False)
        taken: list[socket.socket] = []
        stack.callback(lambda: [connection.close() for connection in taken])
        host.endpoints = f"http://127.0.0.1:{hanging.getsockname()[1]},{host.etcd.url}"
        host.ctl("batch", input="profile add web\nprofile web tag add x\n" + "profile show\n" * 10)
        first = count()
        assert 1 <= first <= 2, "each API is asked for once"
        host.ctl("profile", "add", "db")
        host.ctl("batch", input="profile show\n" * 3)
        assert count() == first


def test_an_etcd_that_hangs_is_shown_within_seconds(bare_host: Host) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        bare_host.endpoints = f"http://127.0.0.1:{hanging.getsockname()[1]}"
        since = time.monotonic()
        said = bare_host.ctl("datastore", "show", "--output=json", env={"DATASTORE_TYPE": ""}, status=1)
        assert time.monotonic() - since < 30, "nothing that cannot be answered is asked again and again"
    shown = json.loads(said.out)
    assert shown["used"] is None and "did not answer" in said.err
    for found in (*shown["apis"].values(), *shown["members"]):
        assert "did not answer" in found["error"], shown


def test_without_a_majority_the_user_is_told_and_nothing_is_lost(clustered: Host, members: list[Etcd]) -> None:
    clustered.ctl("profile", "add", "web")
    for server in members[1:]:
        server.stop(9)
    began = time.monotonic()
    said = clustered.ctl("batch", "--keep-going", input="profile web tag add x\n" * 10, status=1).err
    assert "etcd" in said and said.count("\n") == 2
    assert "1 failed, 9 not run, from standard input, line 2 on: etcd did not answer" in said
    assert time.monotonic() - began < 35, "a single command takes some 20 s"
    for server in members[1:]:
        server.start(cluster_of(members))
    for server in members:
        server.await_ready()
    clustered.ctl("profile", "web", "tag", "add", "x")


@pytest.fixture
def apart(bare_host: Host) -> Iterator[list[Etcd]]:
    """Three members, of which the first is on another machine: it can be cut off from the others alone."""
    run("ip", "netns", "add", "machine")
    run("ip", "link", "add", "tomachine", "type", "veth", "peer", "name", "eth0", "netns", "machine")
    for prefix, device, address in ((["ip"], "tomachine", HERE), (["ip", "-n", "machine"], "eth0", THERE)):
        run(*prefix, "address", "add", f"{address}/24", "dev", device)
        run(*prefix, "link", "set", device, "up")
    run("ip", "-n", "machine", "link", "set", "lo", "up")
    try:
        away = Etcd(HOME / "m0", "m0", address=THERE, namespace="machine")
        with running([away, *(Etcd(HOME / f"m{number}", f"m{number}", address=HERE) for number in (1, 2))]) as servers:
            yield servers
    finally:
        end_agents()
        run("nft", "add table inet cut; delete table inet cut")
        run("ip", "link", "delete", "tomachine")
        run("ip", "netns", "delete", "machine")


def cut_off(servers: list[Etcd]) -> None:
    """Let nothing through any more between the first member and the others; hosts still reach it."""
    peers = ",".join(str(server.peer) for server in servers)
    run(
        "nft",
        "add table inet cut; add chain inet cut input { type filter hook input priority 0; };"
        "add chain inet cut output { type filter hook output priority 0; };"
        f"add rule inet cut input iifname tomachine tcp dport {{ {peers} }} drop;"
        f"add rule inet cut input iifname tomachine tcp sport {{ {peers} }} drop;"
        f"add rule inet cut output oifname tomachine tcp dport {{ {peers} }} drop;"
        f"add rule inet cut output oifname tomachine tcp sport {{ {peers} }} drop;",
    )


def test_a_member_that_is_cut_off_from_the_others_is_left_within_seconds(apart: list[Etcd]) -> None:
    host = AgentHost(apart[1], endpoints=",".join(server.url for server in apart))
    host.start_agent()
    host.add("a", "192.168.0.1")
    host.profile("web")
    host.set_profiles("a", "web")
    host.sync()
    before = host.status()["etcd"]
    cut_off(apart)
    since = time.monotonic()
    elsewhere = Host(apart[1], endpoints=",".join(server.url for server in apart[1:]))
    elsewhere.ctl("profile", "web", "rule", "add", "inbound", "allow", "tcp", "to", "ports", "4711")
    wait_for(lambda: "4711" in run("nft", "list", "table", "inet", "calico").out, host.log(), 20)
    took = time.monotonic() - since
    assert took < 10, f"{took:.1f} s"
    run("ip", "netns", "add", "b")
    assert "added" in host.ctl("container", "add", "/var/run/netns/b", "192.168.0.2", "--wait=10").out
    assert "Problems:   none" in host.ctl("status").out
    etcd = host.status()["etcd"]  # nothing has been away
    assert [etcd[what]["since"] for what in ("reads", "watch")] == [
        before[what]["since"] for what in ("reads", "watch")
    ]


def test_status_says_that_there_is_no_majority(bare_host: Host, members: list[Etcd]) -> None:
    host = AgentHost(members[0], endpoints=",".join(server.url for server in members))
    host.start_agent()
    before = host.status()["etcd"]
    assert all(before[what]["works"] for what in ("reads", "writes", "watch"))
    for server in members[1:]:
        server.stop(9)

    def works(*whats: str) -> list[bool]:
        return [host.status()["etcd"][what]["works"] for what in whats]

    # where the watch's member was killed, the agent reads all again, and tries that for 20 s before it calls it failed
    wait_for(lambda: not any(works("reads", "watch", "writes")), host.log(), 40)
    shown = host.ctl("status", status=1)
    for what in ("reading", "writing", "following changes"):
        assert f" {what} fails since 20" in shown.out
    assert "etcd cannot be read" in shown.out and "cannot fully use etcd" in shown.err
    for server in members[1:]:
        server.start(cluster_of(members))
    for server in members:
        server.await_ready()
    wait_for(lambda: all(works("reads", "writes", "watch")), host.log())
    after = host.status()["etcd"]
    assert all(after[what]["since"] > before[what]["since"] for what in ("reads", "writes", "watch"))
    assert "Problems:   none" in host.ctl("status").out


OPTIONS = {"cacert": "ETCD_CA_CERT_FILE", "cert": "ETCD_CERT_FILE", "key": "ETCD_KEY_FILE"}
"""What etcdctl calls the files of these variables."""


def test_etcd_over_tls(bare_host: Host, tmp_path: Path) -> None:
    def openssl(*arguments: str) -> None:
        run("openssl", *arguments, cwd=tmp_path)

    for name in ("ca", "other"):
        openssl(*f"req -x509 -days 2 -subj /CN={name} -keyout {name}.key -out {name}.pem".split(), *KEY)
    (tmp_path / "san").write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
    for name, subject in (("server", "/CN=server"), ("client", "/CN=client"), ("host", "/O=host")):
        openssl(*f"req -keyout {name}.key -out {name}.csr -subj {subject}".split(), *KEY)
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
        other_ca = {**right, "ETCD_CA_CERT_FILE": str(tmp_path / "other.pem")}
        assert "certificate" in bare_host.ctl("profile", "show", env=other_ca, status=1).err
        nobody = {"ETCD_ENDPOINTS": url, "ETCD_CA_CERT_FILE": tls["ETCD_CA_CERT_FILE"]}
        since = time.monotonic()
        said = bare_host.ctl("profile", "show", env={**nobody, "DATASTORE_TYPE": "etcdv3"}, status=1).err
        assert "wants a certificate that it trusts, as ETCD_CERT_FILE and" in said and "]" not in said
        assert "certificate" in bare_host.ctl("profile", "show", env=nobody, status=1).err
        assert time.monotonic() - since < 10, "it is not asked again and again"
        # what speaks TLS, and what does not, asked the wrong way
        plain = {"ETCD_ENDPOINTS": url.replace("https", "http")}
        for words in (("profile", "show"), ("profile", "add", "db")):
            since = time.monotonic()
            assert "it speaks TLS: use https" in bare_host.ctl(*words, env=plain, status=1).err
            to_plain = {"ETCD_ENDPOINTS": bare_host.etcd.url.replace("http", "https")}
            assert "it speaks no TLS: use http" in bare_host.ctl(*words, env=to_plain, status=1).err
            assert time.monotonic() - since < 5
        # one that can be spoken to is found behind one that cannot
        mixed = {**right, "ETCD_ENDPOINTS": f"https://127.0.0.1:{bare_host.etcd.port},{url}"}
        assert "web" in bare_host.ctl("profile", "show", env=mixed).out

        # with users, etcd's gateway accepts no certificate with a common name
        etcdctl = ("etcdctl", f"--endpoints={url}", *(f"--{o}={tls[n]}" for o, n in OPTIONS.items()))
        for words in ("add root:x", "grant-role root root"):
            run(*etcdctl, "user", *words.split(), env={**os.environ, "ETCDCTL_API": "3"})
        run(*etcdctl, "auth", "enable", env={**os.environ, "ETCDCTL_API": "3"})
        user = {**right, "DATASTORE_TYPE": "etcdv3", "ETCD_USERNAME": "root", "ETCD_PASSWORD": "x"}
        said = bare_host.ctl("profile", "show", env=user, status=1).err
        assert "accepts no client certificate with a common name (CN)" in said and said.count("\n") == 1
        of_host = {"ETCD_CERT_FILE": str(tmp_path / "host.pem"), "ETCD_KEY_FILE": str(tmp_path / "host.key")}
        assert bare_host.ctl("profile", "add", "db", env={**user, **of_host}).out == "Created profile db\n"
    finally:
        server.stop()
