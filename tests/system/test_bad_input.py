"""Wrong command lines and environments: one clear line, the right exit status, and nothing changed."""

from __future__ import annotations

import http.server
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.support import AS_NOBODY, CALICOCTL, Etcd, Host, Result, free_port, links, run, wait_for

BLUE = "/var/run/netns/blue"


def refused(host: Host, *words: str, says: str, status: int = 1, **options) -> Result:
    """Run a command that must be refused with a line that says this, and check that nothing has changed."""
    before = (host.etcd.tree(), set(links()), set(links("blue")) if Path(BLUE).exists() else None)
    result = host.ctl(*words, status=status, **options)
    assert says in result.err, result
    assert result.out == ""
    lines = result.err.strip().splitlines()
    if len(lines) > 1:  # words that do not fit are answered with the grammar, too
        assert status == 2 and lines[1] in ("Usage:", "Usage of a rule:")
    assert (host.etcd.tree(), set(links()), set(links("blue")) if Path(BLUE).exists() else None) == before
    return result


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (f"container add {BLUE} 203.0.113.1", "IP 203.0.113.1 is in no pool. IPv4 pools: 192.168.0.0/16."),
        (f"container add {BLUE} 10.9.0.0/16", "10.9.0.0/16 is not the CIDR of a pool"),
        (f"container add {BLUE} 192.168.77.5/16", "it has host bits set; 192.168.0.0/16 has none"),
        ("container 0123 endpoint show", "0123"),
        ("profile add _web", "etcd hides what begins with '_'"),
        ("node --ip=255.255.255.255", "are not for hosts and workloads"),
        ("node --ip=0.1.2.3", "are not for hosts and workloads"),
        ("node --ip6=::ffff:192.0.2.1", "are not for hosts and workloads"),
        ("node --ip=192.0.2.2 --detach=maybe", "--detach=maybe"),
        (f"container add {BLUE} 192.168.0.256", "'192.168.0.256' is not a valid IP address"),
        (f"container add {BLUE} 192.168", "'192.168' is not a valid IP address"),
        (f"container add {BLUE} ipv5", "'ipv5' is not a valid IP address"),
        (f"container add {BLUE} 10.0.0.0/x", "'10.0.0.0/x' is not a valid CIDR"),
        (f"container add {BLUE} ipv4 --interface=0123456789abcdef", "not a valid interface name"),
        (f"container add {BLUE} ipv4 --interface=a/b", "not a valid interface name"),
        (f"container add {BLUE} ipv4 --interface=lo", "has an interface lo already"),
        ("container add /var/run/netns/nosuch ipv4", "cannot be opened: No such file or directory"),
        ("container add /etc/passwd ipv4", "/etc/passwd is not a network namespace"),
        ("container add /tmp ipv4", "/tmp is not a network namespace"),
        ("container add /proc/self/ns/mnt ipv4", "is not a network namespace"),
        ("container add /proc/self/ns/net ipv4", "is the host's own"),
        ("container add / ipv4", "not the path of a network namespace"),
        ("container add ../x ipv4", "neither a Docker container's name or id, nor the absolute path"),
        (f"container remove {BLUE}", "is not connected to Calico"),
        (f"container {BLUE} ip add ipv4", "is not connected to Calico"),
        (f"container {BLUE} ip remove 192.168.0.1", "is not connected to Calico"),
        (f"container {BLUE} endpoint show", "is not connected to Calico"),
        (f"container {BLUE} profile append a/b", "'a/b' is not a valid profile name"),
        (f"container {BLUE} profile append web", "is not connected to Calico"),
        ("profile add a/b", "'a/b' is not a valid profile name"),
        ("profile add " + "x" * 40, "is not a valid profile name"),
        ("profile add ..", "is not a valid profile name"),
        ("profile web tag add a/b", "'a/b' is not a valid tag name"),
        ("profile nosuch rule show", "Profile nosuch does not exist"),
        ("profile nosuch rule json", "Profile nosuch does not exist"),
        ("profile nosuch rule add inbound allow", "Profile nosuch does not exist"),
        ("profile web rule add inbound allow tcp to ports 90:80", "port range '90:80' is backwards"),
        ("profile web rule add inbound allow tcp to ports 99999", "from 0 to 65535"),
        ("profile web rule add inbound allow from cidr 10.0.0.0/8x", "is not a valid CIDR"),
        ("profile web rule add inbound --at=0 allow", "--at=0"),
        ("profile web rule add inbound --at=x allow", "--at=x"),
        ("profile web rule remove inbound --at=7", "out of range"),
        ("node --ip=fd00::1", "--ip: fd00::1 is not an IPv4 address"),
        ("node --ip=192.0.2", "--ip: '192.0.2' is not a valid IP address"),
        ("node --ip6=192.0.2.2", "--ip6: 192.0.2.2 is not an IPv6 address"),
        ("node --ip=127.0.0.1", "are not for hosts and workloads"),
        ("node --ip=192.0.2.2 --as=0", "'0' is not a valid AS number"),
    ],
)
def test_values(host: Host, blue: str, words: str, says: str) -> None:
    host.ctl("profile", "add", "web")
    refused(host, *words.split(), says=says)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("frobnicate", "'frobnicate' is not a calicoctl command"),
        ("", "Which command?"),
        ("container", "'add', 'remove' or <CONTAINER> is missing"),
        (f"container add {BLUE}", "<IP> is missing"),
        (f"container {BLUE} profile append", "Say which profiles"),
        (f"container add {BLUE} ipv4 --colour=red", "'--colour' is no option"),
        ("profile web rule add sideways allow", "'sideways' does not fit"),
        ("profile web rule add inbound", "<RULE> is missing"),
        ("profile web rule add inbound permit", "did you mean 'allow'?"),
        ("profile web rule add inbound allow icmp code 3", "needs an ICMP type"),
        ("profile web rule add inbound allow icmp to ports 3", "goes with tcp and udp"),
        ("profile show --output=xml", "--output=xml: it must be text, json or yaml"),
        ("pool show --ipv4 --ipv6", "'--ipv4' and '--ipv6' do not go together"),
        ("version 7", "'7' does not fit"),
    ],
)
def test_words(host: Host, blue: str, words: str, says: str) -> None:
    host.ctl("profile", "add", "web")
    refused(host, *words.split(), says=says, status=2)


def test_names_with_blanks_and_odd_bytes(host: Host, blue: str) -> None:
    refused(host, "container", "add", BLUE, "ipv4", "--interface=a b", says="not a valid interface name")
    refused(host, "container", "add", BLUE, "ipv4", "--interface=", says="not a valid interface name")
    refused(host, "container", "add", "/no\nsuch", "ipv4", says="cannot be opened")
    refused(host, "container", "add", b"/run/netns/\xff", "ipv4", says="not UTF-8")
    refused(host, "container", "remove", b"/run/netns/\xff", says="not UTF-8")
    refused(host, "profile", "add", "a b\nc", says="not a valid profile name")
    refused(host, "profile", "add", b"\xff\xfe", says="not UTF-8")
    refused(host, "profile", "add", "", says="not a valid profile name")
    refused(host, "container", "add", "", "ipv4", says="neither a Docker container's name")
    refused(host, "node", says="HOSTNAME", env={"HOSTNAME": "a/b"}, status=1)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "must be a JSON object"),
        ('{"id": "web", "inbound_rules": []}', "lack the field 'outbound_rules'"),
        ('{"id": "db", "inbound_rules": [], "outbound_rules": []}', "not of web"),
        ('{"id": "web", "inbound_rules": [], "outbound_rules": [], "x": 1}', "unknown field 'x'"),
        ('{"id": "web", "inbound_rules": [{"action": "maybe"}], "outbound_rules": []}', "inbound_rules, rule 1"),
    ],
)
def test_rules_on_standard_input(host: Host, rules: str, says: str) -> None:
    host.ctl("profile", "add", "web")
    refused(host, "profile", "web", "rule", "update", says=says, input=rules)


def test_an_address_that_is_taken(host: Host, blue: str) -> None:
    run("ip", "netns", "add", "green")
    host.ctl("container", "add", "/var/run/netns/green", "192.168.0.1")
    said = refused(host, "container", "add", BLUE, "192.168.0.1", says="IP 192.168.0.1 is already assigned")
    assert "/var/run/netns/green on host host1" in said.err
    host.ctl("container", "add", BLUE, "192.168.0.2")
    refused(host, "container", BLUE, "ip", "add", "192.168.0.1", says="already assigned")
    refused(host, "container", "add", BLUE, "192.168.0.2", says="has already been configured with Calico Networking.")


def test_a_pool_that_is_used_up(host: Host, blue: str) -> None:
    host.etcd.put("/calico/v1/ipam/v4/pool/10.0.0.0-26", {"cidr": "10.0.0.0/26"})
    block = {
        "cidr": "10.0.0.0/26",
        "affinity": "host:other",
        "allocations": [0] * 64,
        "attributes": [{"handle_id": None, "secondary": {}}],
    }
    host.etcd.put("/calico/ipam/v2/assignment/ipv4/block/10.0.0.0-26", block)
    refused(host, "container", "add", BLUE, "10.0.0.0/26", says="There is no free IP address in 10.0.0.0/26.")


def test_a_host_that_is_not_registered_for_the_version(bare_host: Host, blue: str) -> None:
    bare_host.etcd.put("/calico/v1/ipam/v4/pool/192.168.0.0-16", {"cidr": "192.168.0.0/16"})
    refused(bare_host, "container", "add", BLUE, "ipv4", says="This node is not configured for IPv4.")
    bare_host.register()
    refused(bare_host, "container", "add", BLUE, "ipv6", says="This node is not configured for IPv6.")
    bare_host.ctl("container", "add", BLUE, "ipv4")
    refused(bare_host, "container", BLUE, "ip", "add", "ipv6", says="This node is not configured for IPv6.")


def test_a_namespace_with_a_default_route(host: Host, blue: str) -> None:
    run("ip", "-n", "blue", "link", "add", "eth0", "type", "veth", "peer", "name", "far")
    run("ip", "-n", "blue", "link", "set", "eth0", "up")
    run("ip", "-n", "blue", "address", "add", "10.9.9.2/24", "dev", "eth0")
    run("ip", "-n", "blue", "route", "add", "default", "via", "10.9.9.1")
    said = refused(host, "container", "add", BLUE, "ipv4", says="has an IPv4 default route already")
    assert "via 10.9.9.1 dev eth0" in said.err and "--net=none" in said.err
    refused(host, "container", "add", BLUE, "ipv6", "--interface=eth0", says="has an interface eth0 already")
    host.ctl("container", "add", BLUE, "ipv6")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--net=host",), "it runs in the host's network (--net=host)"),
        (("--net=container:workload",), "it shares the network of container workload"),
    ],
)
def test_containers_without_a_network_of_their_own(
    host: Host, workload: str, options: tuple[str, ...], says: str
) -> None:
    try:
        run("docker", "run", *options, "--name", "other", "-tid", "busybox")
        refused(host, "container", "add", "other", "ipv4", says=says)
    finally:
        run("docker", "rm", "-f", "other", check=False)


def test_containers_that_do_not_run_or_exist(host: Host, workload: str) -> None:
    refused(host, "container", "add", "nosuch", "ipv4", says="No such container: nosuch")
    refused(host, "container", "remove", "nosuch", says="No such container: nosuch")
    refused(host, "container", "nosuch", "endpoint", "show", says="No such container: nosuch")
    run("docker", "stop", "-t", "0", "workload")
    refused(host, "container", "add", "workload", "ipv4", says="workload is not running")
    refused(host, "container", "workload", "ip", "add", "ipv4", says="workload is not running")


def test_docker_that_does_not_answer(host: Host, tmp_path: Path) -> None:
    nowhere = {"DOCKER_HOST": f"unix://{tmp_path}/docker.sock"}
    refused(host, "container", "add", "workload", "ipv4", says="start Docker, or set DOCKER_HOST", env=nowhere)
    closed = {"DOCKER_HOST": f"tcp://127.0.0.1:{free_port()}"}
    refused(host, "container", "add", "workload", "ipv4", says="start Docker, or set DOCKER_HOST", env=closed)
    for where, says in (
        ("ftp://x", "begins with ftp://, and only unix:// and tcp:// are supported. Unset it"),
        ("npipe:////./pipe/docker_engine", "begins with npipe://"),
        ("fd://", "Cannot ask Docker about workload"),
        ("ssh://root@192.0.2.9", "only containers of this host"),
        ("SSH://root@192.0.2.9", "only containers of this host"),
        (f"tcp://127.0.0.1:{host.etcd.port}", "does not answer like a Docker Engine ("),
    ):
        said = refused(host, "container", "add", "workload", "ipv4", says=says, env={"DOCKER_HOST": where})
        assert ".." not in said.err.replace("//./", ""), said


def test_docker_that_does_not_let_one_in(host: Host, workload: str) -> None:
    says = "no permission on unix:///var/run/docker.sock"
    refused(host, "container", "workload", "endpoint", "show", says=says, command=[*AS_NOBODY, CALICOCTL])


def without_etcd(host: Host, *words: str, says: str, **environment: str) -> None:
    result = host.ctl(*words, status=1, env={"ETCD_AUTHORITY": "", **environment})
    assert says in result.err and result.err.count("\n") == 1, result


def test_etcd_that_is_not_there(host: Host, blue: str) -> None:
    address = f"127.0.0.1:{free_port()}"
    for words in ("profile add web", f"container add {BLUE} ipv4", "pool show", "node --ip=192.0.2.2", "profile show"):
        without_etcd(host, *words.split(), says=f"etcd cannot be reached at http://{address}", ETCD_AUTHORITY=address)
    without_etcd(host, "pool", "show", says="unknown host name", ETCD_AUTHORITY="nosuch.invalid:2379")
    without_etcd(host, "pool", "show", says="ETCD_AUTHORITY: 'x'", ETCD_AUTHORITY="x")
    without_etcd(
        host, "pool", "show", says="cannot read /nonexistent", ETCD_SCHEME="https", ETCD_CA_CERT_FILE="/nonexistent"
    )
    assert links("blue") == {}


def test_etcd_without_its_v2_api(host: Host, tmp_path: Path) -> None:
    server = Etcd(tmp_path / "etcd")
    server.start(None, "--enable-v2=false")
    try:
        server.await_ready()
        there = {"ETCD_AUTHORITY": f"127.0.0.1:{server.port}", "DATASTORE_TYPE": "etcdv2"}
        says = "does not serve its v2 API, which DATASTORE_TYPE=etcdv2 asks for"
        for words in ("profile add web", "pool show"):
            without_etcd(host, *words.split(), says=says, **there)
    finally:
        server.stop()


@pytest.fixture
def web_server() -> Iterator[str]:
    """Something that is not etcd: a web server that answers everything with a page."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


def test_something_that_is_not_etcd(host: Host, web_server: str) -> None:
    without_etcd(host, "pool", "show", says="does not answer as etcd does", ETCD_AUTHORITY=web_server)
    without_etcd(host, "profile", "add", "web", says="does not answer as etcd does", ETCD_AUTHORITY=web_server)
    without_etcd(host, "profile", "show", says="does not answer as etcd does", ETCD_AUTHORITY=web_server)


def test_a_server_that_speaks_grpc_alone(host: Host, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    (tmp_path / "config").write_text(
        f"""version = 2
        root = "{tmp_path}/root"
        state = "{tmp_path}/state"
        disabled_plugins = ["io.containerd.grpc.v1.cri"]
        [grpc]
        address = "{tmp_path}/socket"
        tcp_address = "{address}"
        """
    )
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(["containerd", "--config", str(tmp_path / "config")], stdout=log, stderr=log)
    try:
        listens = ["ss", "-ltnH", f"src {address}"]
        wait_for(lambda: run(*listens).out, "containerd")
        for words in ("profile add web", "pool show"):
            since = time.monotonic()
            without_etcd(host, *words.split(), says="it speaks gRPC alone", ETCD_AUTHORITY=address)
            assert time.monotonic() - since < 5
    finally:
        server.terminate()
        server.wait()


BLOCK = "/calico/ipam/v2/assignment/ipv4/block/192.168.0.0-26"


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("/calico/v1/policy/profile/web/tags", "profile web tag add x"),
        ("/calico/v1/policy/profile/web/rules", "profile web rule show"),
        ("/calico/v1/policy/profile/web/rules", "profile web rule add inbound allow"),
        ("/calico/v1/ipam/v4/pool/192.168.0.0-16", "pool add 10.0.0.0/8"),
        ("/calico/v1/ipam/v4/pool/192.168.0.0-16", f"container add {BLUE} ipv4"),
        ("/calico/bgp/v1/host/host1/ip_addr_v4", f"container add {BLUE} ipv4"),
        (BLOCK, f"container add {BLUE} 192.168.0.1"),
        ("/calico/ipam/v2/handle/namespace.-var-run-netns-blue", f"container add {BLUE} ipv4"),
        (
            "/calico/v1/host/host1/workload/namespace/-var-run-netns-blue/endpoint/" + "a" * 32,
            f"container add {BLUE} ipv4",
        ),
        (
            "/calico/v1/host/host1/workload/namespace/-var-run-netns-blue/endpoint/" + "a" * 32,
            f"container {BLUE} endpoint show",
        ),
    ],
)
@pytest.mark.parametrize("garbage", ["gar bage", "[7]", json.dumps({"cidr": 7, "block": 7, "mac": 7})])
def test_garbage_in_a_key_is_named(host: Host, blue: str, key: str, words: str, garbage: str) -> None:
    host.ctl("profile", "add", "web")
    host.etcd.put(key, garbage)
    if garbage.startswith("{") and key.endswith("rules"):
        garbage = '{"inbound_rules": 7}'
        host.etcd.put(key, garbage)
    refused(host, *words.split(), says=f"etcd key {key} has an invalid value")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("/calico/v1/host/host1/workload/docker/x/endpoint/" + "a" * 32, "profile show --detailed"),
        ("/calico/v1/host/host1/workload/docker/x/endpoint/" + "a" * 32, "profile remove web"),
        ("/calico/v1/ipam/v4/pool/10.0.0.0-8", "pool show"),
        ("/calico/v1/ipam/v4/pool/10.0.0.0-8", "ipam show"),
    ],
)
def test_garbage_in_a_key_does_not_hide_the_others(host: Host, key: str, words: str) -> None:
    host.ctl("profile", "add", "web")
    host.etcd.put(key, "gar bage")
    said = host.ctl(*words.split())
    assert said.err.startswith(f"Warning: etcd key {key} has an invalid value")
    assert "web" in said.out or "192.168.0.0/16" in said.out


@pytest.mark.api("etcdv2")
def test_a_directory_where_a_key_should_be(host: Host) -> None:
    host.etcd.put("/calico/v1/policy/profile/web/tags/oops", "x")
    refused(host, "profile", "web", "tag", "show", says="/calico/v1/policy/profile/web/tags")
    host.etcd.put("/calico/v1/policy/profile/db", "x")
    refused(host, "profile", "add", "db", says="/calico/v1/policy/profile/db")
    host.ctl("profile", "remove", "db")
    assert host.etcd.get("/calico/v1/policy/profile/db") is None


def test_a_pool_of_the_other_version(host: Host, blue: str) -> None:
    key = "/calico/v1/ipam/v4/pool/10.0.0.0-8"
    host.etcd.put(key, {"cidr": "fd00::/64"})
    refused(host, "container", "add", BLUE, "10.0.0.1", says=f"etcd key {key} has an invalid value")
    assert "fd00::/64 is not an IPv4 CIDR" in host.ctl("pool", "show").err
    host.ctl("container", "add", BLUE, "ipv4")
    host.ctl("container", "remove", BLUE)


@pytest.mark.parametrize("nets", [["garbage"], ["192.168.0.1"], ["fd00::1/128"], ["192.168.0.1/33"]])
def test_garbage_among_the_addresses_of_an_endpoint(host: Host, blue: str, nets: list[str]) -> None:
    host.ctl("profile", "add", "web")
    host.ctl("container", "add", BLUE, "192.168.0.1")
    ((key, record),) = host.records().items()
    host.etcd.put(key, {**record, "ipv4_nets": nets})
    for words in ("{} endpoint show", "{} profile append web", "{} ip add ipv4", "add {} ipv4"):
        refused(host, "container", *words.format(BLUE).split(), says=f"etcd key {key} has an invalid value")
    host.ctl("container", "remove", BLUE)
    host.check_nothing_left()


def test_control_characters_from_etcd_do_not_reach_the_terminal(host: Host, blue: str) -> None:
    host.etcd.put("/calico/v1/policy/profile/a\x1b[31mb/tags", [])
    assert "a\\x1b[31mb" in host.ctl("profile", "show").out
    host.etcd.put("/calico/v1/policy/profile/web/tags", ["\x1b[31m"])
    assert host.ctl("profile", "web", "tag", "show").out == "\\x1b[31m\n"
    refused(host, "profile", "web", "rule", "add", "inbound", "permit\x1b", says="permit\\x1b", status=2)


def test_debug_shows_where_an_error_comes_from(host: Host) -> None:
    for words, environment in (
        (["--debug", "profile", "add", "a/b"], {}),
        (["profile", "add", "a/b"], {"CALICO_DEBUG": "1"}),
    ):
        result = run(CALICOCTL, *words, check=False, env=host.environment(**environment))
        assert result.status == 1
        assert "Traceback" in result.err and "not a valid profile name" in result.err.splitlines()[-1]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(host: Host, closed: str) -> None:
    for words, status in (
        ("profile add web", 0),
        ("version", 0),
        ("profile web rule update", 1),
        ("profile add a/b", 1),
    ):
        stdin = closed if "<" in closed else "</dev/null"
        done = run("sh", "-c", f"{CALICOCTL} {words} {stdin} {closed}", check=False, env=host.environment())
        assert done.status == status, (words, done)
        assert "Traceback" not in done.err and "Internal error" not in done.err
    assert host.etcd.get("/calico/v1/policy/profile/web/tags") == '["web"]'


def test_output_that_nobody_reads(host: Host) -> None:
    done = run(
        "sh",
        "-c",
        f"{CALICOCTL} profile --help | true; {CALICOCTL} pool show >/dev/full",
        check=False,
        env=host.environment(),
    )
    assert "Traceback" not in done.err
    assert "No space left on device" in done.err


def test_a_namespace_named_like_a_container(host: Host, blue: str, engine: None) -> None:
    for docker in ({}, {"DOCKER_HOST": "unix:///nowhere"}):
        said = host.ctl("container", "add", "blue", "ipv4", status=1, env=docker)
        assert said.err.endswith(f"There is a network namespace of that name: did you mean {blue}?\n")
    assert host.records() == {}
