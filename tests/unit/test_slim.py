"""Trimmed imports: which modules are not loaded, and that they are loaded on demand.

Each runs in a process of its own, since what is imported stays imported.
"""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(code: str) -> set[str]:
    before = "from calicoctl import slim; slim.install()\n"
    real = "[n for n, m in sys.modules.items() if type(m).__name__ != '_Placeholder']"
    return set(run(f"{before}{code}\nimport sys; print(*{real})").split())


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import etcd", {"dns", "dns.resolver", "importlib.metadata"}),
        ("import http.client, asyncio", {"ssl", "_ssl", "asyncio.sslproto"}),
        (
            "from pyroute2.iproute.linux import IPRoute; from pyroute2 import netns",
            {"pyroute2.ndb", "pyroute2.ndb.main", "pyroute2.ethtool", "pyroute2.netlink.nl80211", "sqlite3"},
        ),
        ("from netaddr.ip import IPAddress, IPNetwork", {"netaddr.eui", "importlib.resources"}),
        ("from docker.api.client import APIClient", {"docker.models", "docker.context", "charset_normalizer"}),
    ],
)
def test_unneeded_modules_are_not_loaded(code: str, absent: set[str]) -> None:
    assert not loaded_by(code) & absent
    plain = set(run("import etcd, pyroute2, netaddr, docker, sys; print(*sys.modules)").split())
    missing = {name for name in absent if name not in plain and not name.startswith(("sqlite3", "importlib"))}
    assert not missing, f"the libraries do not load {missing} any more: nothing is saved"


@pytest.mark.parametrize(
    ("command", "absent"),
    [
        ("profile", {"pyroute2", "docker", "netaddr", "requests", "prettytable", "ssl"}),
        ("version", {"etcd", "pyroute2", "docker", "netaddr", "json"}),
        ("pool", {"pyroute2", "docker"}),
        ("container", {"prettytable", "docker", "pyroute2", "etcd"}),
    ],
)
def test_a_command_loads_only_what_it_uses(command: str, absent: set[str]) -> None:
    assert not loaded_by(f"import calicoctl.cli.main, calicoctl.commands.{command}") & absent


@pytest.mark.parametrize(
    "use",
    [
        "import etcd; import dns.resolver; dns.resolver.Resolver",
        "import urllib3; from importlib import metadata as m; assert m.version('urllib3') == urllib3.__version__",
        "import urllib3.http2; assert urllib3.http2.version('urllib3')",
        "import requests; import charset_normalizer; charset_normalizer.from_bytes(b'abc').best()",
        "import http.client as c; assert isinstance(c.HTTPSConnection('x')._context, c.ssl.SSLContext)",
        "import asyncio.selector_events as a; import ssl; assert a.sslproto.SSLProtocol and a.sslproto.ssl is ssl",
        "import requests; r = requests.Response(); r._content = 'é'.encode(); assert r.text == 'é'",
    ],
)
def test_omitted_modules_are_loaded_on_demand(use: str) -> None:
    run(f"from calicoctl import slim; slim.install()\n{use}")


def test_the_libraries_load_without_a_word() -> None:
    code = (
        "from calicoctl import slim; slim.install(); import etcd, docker.api.client, pyroute2.iproute.linux, netaddr.ip"
    )
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, check=True)
    assert "requests" not in done.stderr
