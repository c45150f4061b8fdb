"""A store that this user may only read: commands fail before they change anything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.system.agent import A4, AgentHost
from tests.system.support import Etcd, addresses, calico_links, run, tables, wait_for

A = "/var/run/netns/a"


ETCDCTL = {"ETCDCTL_API": "2"}


def forbid_writing(etcd: Etcd) -> None:
    etcdctl = ["etcdctl", "--endpoints", etcd.url]
    run(*etcdctl, "user", "add", "root:secret", env={**os.environ, **ETCDCTL})
    run(*etcdctl, "auth", "enable", env={**os.environ, **ETCDCTL})
    words = ("-u", "root:secret", "role", "revoke", "guest", "--path", "/*", "--write")
    run(*etcdctl, *words, env={**os.environ, **ETCDCTL})


@pytest.fixture
def guest(own_etcd: Etcd) -> AgentHost:
    """A host with an agent and a namespace with two addresses, which then may only read."""
    host = AgentHost(own_etcd)
    host.start_agent()
    host.add("a", A4, "ipv4")
    host.sync()
    forbid_writing(own_etcd)
    return host


def state(host: AgentHost) -> list[object]:
    """Return what a command could have changed."""
    tree = {key: value for key, value in host.etcd.tree().items() if "/felix/" not in key}
    files = sorted(str(path) for path in Path("/run/calico").rglob("unfinished*"))
    kernel = run("sh", "-c", "ip -br link; ip route; ip -n a -br link; ip -n a -br -4 address; ip -n a route").out
    return [tree, tables(), calico_links(), addresses("a", "eth1"), kernel, host.agent_runs(host.pid), files]


def test_a_write_that_is_refused_leaves_all_as_it_was(guest: AgentHost) -> None:
    run("ip", "netns", "add", "b")
    before = state(guest)
    for words in (
        ("container", "remove", A),
        ("container", A, "ip", "remove", A4),
        ("container", A, "ip", "add", "ipv4"),
        ("container", "add", "/var/run/netns/b", "ipv4"),
        ("node", "remove", "--remove-endpoints"),
        ("node", "--ip=192.0.2.3"),
        ("pool", "add", "10.9.0.0/16"),
        ("profile", "add", "db"),
    ):
        said = guest.ctl(*words, status=1)
        assert "does not permit this user" in said.err and "'guest'" in said.err, said
        assert said.err.count("\n") == 1 and said.out == "", said
        assert state(guest) == before, words


def test_a_user_of_the_v2_api_may_do_what_its_role_says(own_etcd: Etcd) -> None:
    host = AgentHost(own_etcd)
    own_etcd.put("/calico/v1/Ready", "true")
    forbid_writing(own_etcd)
    host.ctl("profile", "add", "db", status=1)
    root = {"ETCD_USERNAME": "root", "ETCD_PASSWORD": "secret"}
    for api in ("etcdv2", ""):
        host.ctl("profile", "add", f"db{api}", env={**root, "DATASTORE_TYPE": api})
        assert f"db{api}" in host.ctl("profile", "show", env={**root, "DATASTORE_TYPE": api}).out
    said = host.ctl("profile", "show", env={**root, "ETCD_PASSWORD": "wrong€"}, status=1).err
    assert "its user 'root' (if the password is right)" in said and said.count("\n") == 1


def test_an_interrupted_lock_is_not_removed_either(guest: AgentHost) -> None:
    """A pair that lost its record belongs to nobody; it goes only when another can be made."""
    run("ip", "link", "set", next(iter(calico_links())), "down")
    wait_for(lambda: "linkdown" in run("ip", "-n", "a", "route").out, "the kernel to notice that the pair is down", 5)
    before = state(guest)
    said = guest.ctl("container", "add", A, A4, status=1).err
    assert "does not permit this user" in said
    assert state(guest) == before


def test_an_agent_without_endpoints_is_not_ended_either(own_etcd: Etcd) -> None:
    host = AgentHost(own_etcd)
    host.start_agent()
    forbid_writing(own_etcd)
    before = tables(), own_etcd.tree("/calico/bgp")
    assert "does not permit this user" in host.ctl("node", "remove", status=1).err
    assert (tables(), own_etcd.tree("/calico/bgp")) == before and host.agent_runs(host.pid)
