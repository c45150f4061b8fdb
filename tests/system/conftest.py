"""Real parts for the system tests: etcd, and a Docker Engine, one a session, on a host of their own (tests/sandbox).

A test of what one of etcd's APIs alone has, or whose commands find the API by themselves, has the mark `api` with the
name of that API; its etcd is another one if the tests run with the other API.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from tests.system.agent import LOG_DIR, AgentHost
from tests.system.support import (
    HOST_IP,
    HOST_IP6,
    Etcd,
    Host,
    calico_links,
    end_agents,
    import_busybox,
    run,
    start_docker,
    wait_for,
)

HOME = Path("/run/calico-tests")
PROGRAMS = (
    *("etcd", "etcdctl", "dockerd", "docker", "busybox", "ip", "ss", "ping", "nft", "iptables"),
    *("conntrack", "openssl", "sysctl", "ps", "curl", "setpriv", "nsenter", "flock", "bash", "zsh", "tar", "bird"),
    *("containerd", "ctr", "make", "jq"),
)
"""What the tests run, beside calicoctl, and beside what they do not run on all releases (TEST_HERE in the Makefile)."""


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("dist", "no") != "no":
        return  # this process only hands the tests out, to others on hosts of their own
    # where the shell has started us in the background, it is ignored, and commands would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not Path("/run/over").exists():  # tests/sandbox makes it
        pytest.exit("system tests need a host of their own: run them with 'make system'", returncode=3)
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        pytest.exit(f"system tests need {', '.join(missing)}: 'make packages' installs them", returncode=3)


@pytest.fixture(scope="session")
def etcd() -> Iterator[Etcd]:
    server = Etcd(HOME / "etcd", port=2379)
    server.start()
    server.await_ready()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def other_etcd() -> Iterator[Etcd]:
    """An etcd with the API that is not the one of most tests of this run."""
    with using(OTHER[Etcd.api]):
        server = Etcd(HOME / "other-etcd")
    server.start()
    server.await_ready()
    yield server
    server.stop()


OTHER = {"etcdv2": "etcdv3", "etcdv3": "etcdv2"}


@contextlib.contextmanager
def using(api: str) -> Iterator[None]:
    """Let new servers have this API."""
    before, Etcd.api = Etcd.api, api
    try:
        yield
    finally:
        Etcd.api = before


@pytest.fixture
def bare_host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """A host that is not registered, in an empty store. Whatever a test leaves behind is removed, and fails it."""
    mark = request.node.get_closest_marker("api")
    api = mark.args[0] if mark else Etcd.api
    etcd: Etcd = request.getfixturevalue("etcd" if api == Etcd.api else "other_etcd")
    etcd.delete("/calico")
    with using(api):
        yield Host(etcd)
        clear_host()


def clear_host() -> None:
    """Remove what agents, namespaces and interfaces are left; fail for an interface that no namespace took along."""
    end_agents()
    for family in ("inet", "arp"):
        run("nft", f"add table {family} calico; delete table {family} calico")
    run("nft", "add table inet calico-connections; delete table inet calico-connections")
    for version, proto in product(("-4", "-6"), ("80", "81", "bird")):
        command = ("ip", version, "route", "flush", "proto", proto)
        # fails for a route that goes away by itself meanwhile
        wait_for(lambda c=command: run(*c, check=False).status == 0, "flushing")
    spaces = [line.split()[0] for line in run("ip", "netns", "list").out.splitlines()]
    for space in spaces:
        run("ip", "netns", "delete", space)
    with contextlib.suppress(AssertionError):  # the kernel takes a while to tear a namespace down
        wait_for(lambda: not calico_links(), "namespaces")
    left = calico_links()
    for name in left:
        run("ip", "link", "delete", name)
    shutil.rmtree("/run/calico", ignore_errors=True)
    for file in Path("/var/lib/calico").glob("*/api"):
        file.unlink()
    for folder in Path("/var/lib/calico").glob("*/workloads"):
        shutil.rmtree(folder)
        with contextlib.suppress(OSError):  # what others keep there
            folder.parent.rmdir()
    shutil.rmtree(LOG_DIR, ignore_errors=True)
    shutil.rmtree("/etc/calico", ignore_errors=True)
    assert not left, f"interfaces without a namespace: {left}"


@pytest.fixture
def host(bare_host: Host) -> Host:
    """A host that is registered with an IPv4 and an IPv6 address."""
    bare_host.register(HOST_IP, HOST_IP6)
    return bare_host


@pytest.fixture
def node(bare_host: Host) -> Iterator[AgentHost]:
    """A host with a running agent."""
    host = AgentHost(bare_host.etcd)
    host.start_agent()
    yield host


@pytest.fixture
def pair(node: AgentHost) -> AgentHost:
    """A host with the namespaces a and b, which may talk to each other."""
    node.add_pair()
    node.sync()
    return node


@pytest.fixture
def own_etcd(bare_host: Host, tmp_path: Path) -> Iterator[Etcd]:
    """An etcd that a test may stop and start."""
    etcd = Etcd(tmp_path / "etcd")
    etcd.start()
    etcd.await_ready()
    yield etcd
    end_agents()
    etcd.stop(9)


@pytest.fixture
def open_etcd(bare_host: Host, tmp_path: Path) -> Iterator[Etcd]:
    """An etcd that listens on all addresses."""
    etcd = Etcd(tmp_path / "etcd")
    urls = (f"--listen-client-urls=http://0.0.0.0:{etcd.port}", f"--advertise-client-urls={etcd.url}")
    etcd.start(None, *urls)
    etcd.await_ready()
    yield etcd
    etcd.stop(9)


@pytest.fixture
def blue(bare_host: Host) -> str:
    """The path of a network namespace."""
    run("ip", "netns", "add", "blue")
    return "/var/run/netns/blue"


@pytest.fixture(scope="session")
def engine() -> Iterator[None]:
    """A Docker Engine with an image `busybox`."""
    process = start_docker(HOME / "docker")
    import_busybox(HOME / "busybox")
    yield
    process.terminate()
    process.wait()


@pytest.fixture
def workload(engine: None) -> Iterator[str]:
    """The name of a container that runs without a network."""
    run("docker", "run", "--net=none", "--name", "workload", "-tid", "busybox")
    yield "workload"
    run("docker", "rm", "-f", "workload", check=False)
