"""Access to the system for system tests: etcd over plain HTTP, the kernel through `ip`, calicoctl as a command.

Nothing here uses the code under test, except in_process.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

CALICOCTL = str(Path(sys.executable).parent / "calicoctl")
FAULTY = str(Path(__file__).parent / "faulty.py")
AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
"""A prefix for commands, which runs them as a user without privileges."""
HOST = "host1"
HOST_IP, HOST_IP6 = "192.0.2.2", "2001:db8::2"


@dataclass
class Result:
    """The exit status, standard output and standard error of a command."""

    status: int
    out: str
    err: str


def run(*command: str, check: bool = True, **options) -> Result:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    result = Result(done.returncode, done.stdout, done.stderr)
    if check and result.status != 0:
        raise AssertionError(f"{' '.join(command)}: {result}")
    return result


def wait_for(condition, what: str, seconds: float = 30):
    """Call `condition` until it returns a true value, and return that value; fail after `seconds`."""
    give_up = time.monotonic() + seconds
    pause = 0.001
    while True:
        asked = time.monotonic()
        value = condition()
        if value:
            return value
        assert time.monotonic() < give_up, f"{what}: not within {seconds} s"
        # a question that takes long, such as a command, would slow down what is awaited if it were always asked
        time.sleep(max(pause, min(0.1, time.monotonic() - asked)))
        pause = min(0.02, pause * 1.5)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def end_process(pid_file: Path) -> None:
    """Kill the process that a pid file names, and wait until it has ended. It need not be a child of this process."""
    text = next(iter(pid_file.read_text().split()), "")
    if text and Path(f"/proc/{text}").exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(text), 9)
        wait_for(lambda: gone(int(text)), f"the end of process {text}")


def end_agents(folder: Path = Path("/run/calico")) -> None:
    """Kill the agents whose pid files are below a directory, and then the BIRDs that they have left running."""
    for name in ("felix.pid", "bird.pid"):
        for file in folder.glob(f"*/{name}"):
            end_process(file)


def gone(pid: int) -> bool:
    """Return whether a process has ended; a zombie has."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def b64(text: str) -> str:
    return b64encode(text.encode()).decode()


class Etcd:
    """An etcd server on loopback, and a client of one of its APIs, v2 or v3.

    `api`, etcdv2 or etcdv3, is the one that is tested; it may be set on the class, and then holds for new servers. A
    server has v2 only if that is the API, or if it is started with --enable-v2.
    """

    api = os.environ.get("TESTED_API", "etcdv3")

    def __init__(
        self,
        directory: Path,
        name: str = "m0",
        port: int | None = None,
        peer: int | None = None,
        address: str = "127.0.0.1",
        namespace: str | None = None,
    ) -> None:
        """The server listens on `address`, in a network `namespace` if one is named."""
        self.api = Etcd.api
        self.name, self.directory = name, directory
        self.port, self.peer = port or free_port(), peer or free_port()
        self.url, self.peer_url = f"http://{address}:{self.port}", f"http://{address}:{self.peer}"
        self._prefix = ("ip", "netns", "exec", namespace) if namespace else ()
        self.process: subprocess.Popen | None = None
        self.token = ""

    def start(self, cluster: str | None = None, *options: str) -> None:
        peer = self.peer_url
        self.directory.mkdir(parents=True, exist_ok=True)
        command = [
            *(
                *self._prefix,
                "etcd",
                "--name",
                self.name,
                "--data-dir",
                str(self.directory / "data"),
                "--log-outputs",
                "stderr",
            ),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", cluster or f"{self.name}={peer}"),
        ]
        if not any(option.startswith("--listen-client-urls") for option in options):
            command += ["--listen-client-urls", self.url, "--advertise-client-urls", self.url]
        if self.api == "etcdv2" and not any(option.startswith("--enable-v2") for option in options):
            command.append("--enable-v2")
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen([*command, *options], stdout=log, stderr=log)

    def await_ready(self) -> None:
        def healthy() -> bool:
            assert self.process is None or self.process.poll() is None, (self.directory / "log").read_text()[-2000:]
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                    return json.load(answer)["health"] == "true"
            except (OSError, ValueError, http.client.HTTPException):
                return False

        wait_for(healthy, f"etcd {self.name}")

    def stop(self, signal: int = 15) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(18)
            self.process.send_signal(signal)
            self.process.wait()
        self.process = None

    def _request(self, method: str, key: str, query: str = "", **form: str) -> dict | None:
        data = urllib.parse.urlencode(form).encode() if form else None
        url = f"{self.url}/v2/keys{urllib.parse.quote(key)}{query}"
        request = urllib.request.Request(url, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    def v3(self, path: str, body: dict) -> dict:
        """Send a request of the v3 API, such as `kv/range`; return its answer."""
        user = {"Authorization": self.token} if self.token else {}
        request = urllib.request.Request(f"{self.url}/v3/{path}", json.dumps(body).encode(), user, method="POST")
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    def get(self, key: str) -> str | None:
        if self.api == "etcdv3":
            found = self.v3("kv/range", {"key": b64(key)}).get("kvs", [])
            return b64decode(found[0].get("value", "")).decode() if found else None
        answer = self._request("GET", key, "?quorum=true")
        return None if answer is None else answer["node"].get("value")

    def put(self, key: str, value, ttl: int | None = None) -> None:
        """Write a key, which is there for `ttl` seconds alone if that is given."""
        text = value if isinstance(value, str) else json.dumps(value)
        if self.api == "etcdv3":
            lease = {"lease": self.v3("lease/grant", {"TTL": ttl})["ID"]} if ttl else {}
            self.v3("kv/put", {"key": b64(key), "value": b64(text), **lease})
        else:
            self._request("PUT", key, value=text, **({"ttl": str(ttl)} if ttl else {}))

    def revision(self, key: str) -> int:
        """Return when a key was changed last, as the number that etcd gives each change."""
        if self.api == "etcdv3":
            return int(self.v3("kv/range", {"key": b64(key)})["kvs"][0]["mod_revision"])
        return self._request("GET", key, "?quorum=true")["node"]["modifiedIndex"]

    def ttl(self, key: str) -> int:
        """Return for how many seconds more a key is there."""
        if self.api == "etcdv3":
            lease = self.v3("kv/range", {"key": b64(key)})["kvs"][0]["lease"]
            return int(self.v3("lease/timetolive", {"ID": lease})["TTL"])
        return self._request("GET", key, "?quorum=true")["node"]["ttl"]

    def delete(self, key: str) -> None:
        """Delete a key, and all keys below it."""
        if self.api == "etcdv3":
            self.v3("kv/deleterange", {"key": b64(key)})
            self.v3("kv/deleterange", {"key": b64(f"{key}/"), "range_end": b64(f"{key}0")})
        else:
            self._request("DELETE", key, "?recursive=true")

    def tree(self, directory: str = "/calico") -> dict[str, str]:
        """Return the keys below a directory with their values."""
        if self.api == "etcdv3":
            found = self.v3("kv/range", {"key": b64(f"{directory}/"), "range_end": b64(f"{directory}0")}).get("kvs", [])
            return {b64decode(kv["key"]).decode(): b64decode(kv.get("value", "")).decode() for kv in found}
        answer = self._request("GET", directory, "?recursive=true&quorum=true")
        leaves, nodes = {}, [answer["node"]] if answer else []
        while nodes:
            node = nodes.pop()
            if node.get("dir"):
                nodes += node.get("nodes", [])
            else:
                leaves[node["key"]] = node["value"]
        return leaves


@contextlib.contextmanager
def not_installed(*patterns: str) -> Iterator[None]:
    """Hide the programs in /usr/sbin whose names match any of `patterns`, inside `with`."""
    over = Path("/run/over/usr-sbin")
    for name in ("new", "work"):
        (over / name).mkdir(parents=True)
    options = f"lowerdir=/usr/sbin,upperdir={over}/new,workdir={over}/work"
    run("mount", "-t", "overlay", "-o", options, "overlay", "/usr/sbin")
    try:
        for file in [file for pattern in patterns for file in Path("/usr/sbin").glob(pattern)]:
            file.unlink()
        yield
    finally:
        run("umount", "-l", "/usr/sbin")
        shutil.rmtree(over)


def links(namespace: str | None = None) -> dict[str, dict]:
    """Return the interfaces of the host, or of a namespace, by name, without loopback."""
    prefix = ["ip", "-n", namespace] if namespace else ["ip"]
    found = json.loads(run(*prefix, "-details", "-json", "address", "show").out or "[]")
    return {link["ifname"]: link for link in found if link.get("ifname") not in (None, "lo")}


def tables() -> list[str]:
    """Return the nftables ruleset as JSON texts, in an order that does not depend on its history."""
    text = run("nft", "-j", "list", "ruleset").out
    found = []
    for item in json.loads(text)["nftables"]:
        (kind, body), *_ = item.items()
        if kind == "metainfo":
            continue
        body.pop("handle", None)
        if body.get("table") == "calico-connections" or body.get("name") in ("drops", "sampling"):
            body.pop("elem", None)  # packets add them
        if kind == "counter":
            for changing in ("packets", "bytes", "comment"):
                body.pop(changing, None)
        if "elem" in body:
            body["elem"] = sorted(body["elem"], key=json.dumps)
        found.append(json.dumps({kind: body}, sort_keys=True))
    # rules of a chain keep their order, objects have none
    rules = [line for line in found if line.startswith('{"rule"')]
    others = sorted(line for line in found if not line.startswith('{"rule"'))
    return others + sorted(
        rules, key=lambda line: [json.loads(line)["rule"][part] for part in ("family", "table", "chain")]
    )


def without_what_packets_change(text: str) -> str:
    """Return what `nft --stateless` lists, without the sets and the table whose elements packets add."""
    return re.sub(
        r"^(table inet calico-connections {.*?^|\tset (drops|sampling) {.*?^\t)}", "", text, flags=re.M | re.S
    )


def calico_links() -> set[str]:
    """Return the names of the host's `cali…` interfaces."""
    return {name for name in links() if name.startswith("cali")}


def addresses(namespace: str, interface: str) -> set[str]:
    """Return the global addresses of an interface, as address/length."""
    info = links(namespace)[interface]["addr_info"]
    return {f"{a['local']}/{a['prefixlen']}" for a in info if a["scope"] == "global"}


def routes(namespace: str, version: int = 4) -> list[str]:
    """Return the routes of a namespace as text, without the flag `linkdown`, which comes and goes with the carrier."""
    lines = run("ip", "-n", namespace, f"-{version}", "route").out.splitlines()
    return [line.replace(" linkdown", "").strip() for line in lines]


@dataclass
class Host:
    """A host with an etcd: runs commands on it, and reads the results.

    Its commands are told which of etcd's APIs to use.
    """

    etcd: Etcd
    name: str = HOST
    endpoints: str = ""

    def environment(self, **extra: str) -> dict[str, str]:
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("ETCD_", "DOCKER_", "CALICO"))
        }
        kept["PATH"] = f"{Path(CALICOCTL).parent}:{kept['PATH']}"
        etcd = (
            {"ETCD_ENDPOINTS": self.endpoints} if self.endpoints else {"ETCD_AUTHORITY": f"127.0.0.1:{self.etcd.port}"}
        )
        cold = {"CALICO_COLD": "1"} if os.environ.get("TESTED_COLD") else {}
        return {**kept, "HOSTNAME": self.name, "DATASTORE_TYPE": self.etcd.api, **etcd, **cold, **extra}

    def ctl(self, *arguments: str, status: int | None = 0, env: dict[str, str] | None = None, **options) -> Result:
        """Run calicoctl; check its exit status (None: any), and that it printed no traceback."""
        command = options.pop("command", [CALICOCTL])
        result = run(*command, *arguments, check=False, env=self.environment(**(env or {})), **options)
        assert "Traceback" not in result.err, result.err
        assert "Internal error" not in result.err, result.err
        if status is not None:
            assert result.status == status, result
        return result

    def register(self, ipv4: str = HOST_IP, ipv6: str = "") -> None:
        """Write the keys that `calicoctl node` writes, without running it."""
        for key, value in {
            "/calico/v1/Ready": "true",
            "/calico/v1/ipam/v4/pool/192.168.0.0-16": {"cidr": "192.168.0.0/16"},
            "/calico/v1/ipam/v6/pool/fd80:24e2:f998:72d6::-64": {"cidr": "fd80:24e2:f998:72d6::/64"},
            f"/calico/v1/host/{self.name}/bird_ip": ipv4,
            f"/calico/v1/host/{self.name}/config/DefaultEndpointToHostAction": "RETURN",
            f"/calico/v1/host/{self.name}/config/marker": "created",
            f"/calico/bgp/v1/host/{self.name}/ip_addr_v4": ipv4,
            f"/calico/bgp/v1/host/{self.name}/ip_addr_v6": ipv6,
        }.items():
            self.etcd.put(key, value)

    def start(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            [CALICOCTL, *arguments],
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    # what etcd says

    def records(self) -> dict[str, dict]:
        """Return the endpoints of all hosts by key."""
        tree = self.etcd.tree("/calico/v1/host")
        return {key: json.loads(value) for key, value in tree.items() if "/endpoint/" in key}

    def record(self) -> dict:
        (record,) = self.records().values()
        return record

    def allocations(self) -> dict[str, dict]:
        """Return the assigned addresses: address -> {"handle_id", "secondary"}. Fails if a block is malformed."""
        import ipaddress

        found: dict[str, dict] = {}
        for key, value in self.etcd.tree("/calico/ipam/v2/assignment").items():
            block = json.loads(value)
            assert key.rpartition("/")[2] == block["cidr"].replace("/", "-")
            assert len(block["allocations"]) == 64
            used = {index for index in block["allocations"] if index is not None}
            assert used == set(range(len(block["attributes"]))), f"unused attributes in {value}"
            first = ipaddress.ip_network(block["cidr"])[0]
            for ordinal, index in enumerate(block["allocations"]):
                if index is not None:
                    found[str(first + ordinal)] = block["attributes"][index]
        return found

    def handles(self) -> dict[str, dict[str, int]]:
        tree = self.etcd.tree("/calico/ipam/v2/handle")
        return {key.rpartition("/")[2]: json.loads(value)["block"] for key, value in tree.items()}

    # what must be true whenever no command is under way

    def check_consistent(self) -> None:
        """Fail if addresses, endpoints, interfaces and handles are not consistent, or if an interface is down."""
        records = self.records()
        owned = {
            net.partition("/")[0] for record in records.values() for net in record["ipv4_nets"] + record["ipv6_nets"]
        }
        allocations = self.allocations()
        assert owned == set(allocations), "addresses in records and in blocks differ"
        ours = calico_links()
        assert {record["name"] for record in records.values()} == ours, "records and interfaces differ"
        assert all("UP" in links()[name]["flags"] for name in ours)
        counted: dict[str, int] = {}
        for attributes in allocations.values():
            if attributes["handle_id"] is not None:
                counted[attributes["handle_id"]] = counted.get(attributes["handle_id"], 0) + 1
        assert {handle: sum(blocks.values()) for handle, blocks in self.handles().items()} == counted

    def check_nothing_left(self, folders: bool = True) -> None:
        """Fail if any workload has left anything behind. Without `folders`, empty directories in etcd are ignored."""
        assert self.records() == {}
        assert self.allocations() == {}
        assert self.handles() == {}
        assert calico_links() == set()
        assert not list(Path("/run/calico").glob("*/*"))
        assert not list(Path("/var/lib/calico").glob("*/workloads/*/*"))
        if self.etcd.api == "etcdv3":
            return  # there are no folders
        leftover = self.etcd._request("GET", f"/calico/v1/host/{self.name}/workload", "?recursive=true")
        found = [node for top in (leftover or {"node": {}})["node"].get("nodes", []) for node in top.get("nodes", [])]
        assert not (folders and found), "a workload's folder is still there"


def start_docker(
    directory: Path, *options: str, host: str = "unix:///var/run/docker.sock", inside: Sequence[str] = ()
) -> subprocess.Popen:
    """Start a Docker Engine, and wait until it answers. Without `options`, it has no bridge and no firewall.

    `inside` is a prefix for its command line.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "log").open("ab") as log:
        engine = subprocess.Popen(
            [
                *(*inside, "dockerd", "--data-root", str(directory / "data"), "--exec-root", str(directory / "exec")),
                *("--pidfile", str(directory / "pid"), "--host", host),
                *(options or ("--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false")),
            ],
            stdout=log,
            stderr=log,
        )

    def up() -> bool:
        assert engine.poll() is None, (directory / "log").read_text()[-2000:]
        return run("docker", "--host", host, "info", check=False).status == 0

    wait_for(up, "Docker Engine", 60)
    return engine


def import_busybox(directory: Path, host: str = "unix:///var/run/docker.sock") -> None:
    """Create the image `busybox` from the host's busybox, and the libraries it is linked with, if any."""
    tools = directory / "bin"
    tools.mkdir(parents=True)
    busybox = shutil.which("busybox") or "/bin/busybox"
    shutil.copy(busybox, tools / "busybox")
    for library in re.findall(r"/\S+", run("ldd", busybox, check=False).out):
        (directory / library[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, directory / library[1:])
    for name in ("sh", "ip", "ping", "sleep", "cat", "nc", "netstat"):
        (tools / name).symlink_to("busybox")
    tar = subprocess.run(["tar", "-C", str(directory), "-c", "."], check=True, capture_output=True).stdout
    subprocess.run(
        ["docker", "--host", host, "import", "--change", 'CMD ["sh"]', "-", "busybox"],
        input=tar,
        check=True,
        capture_output=True,
    )


def in_process(host: Host, *arguments: str) -> tuple[int, str]:
    """Run calicoctl in this process; return its exit status and its output. Faster than a new process."""
    from calicoctl.cli.main import main

    said = io.StringIO()
    environment = mock.patch.dict(os.environ, host.environment(), clear=True)
    with environment, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        return main(list(arguments)), said.getvalue()
