"""A store that this user may only read: commands fail before they change anything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.system.agent import A4, AgentHost
from tests.system.support import Etcd, addresses, calico_links, run, tables, wait_for

A = "/var/run/netns/a"


class UserHost(AgentHost):
    """A host whose user may read, and write until that is forbidden.

    Through the v2 API, that is the user guest, as whom etcd takes everybody who names none.
    """

    def environment(self, **extra: str) -> dict[str, str]:
        user = {"ETCD_USERNAME": "host", "ETCD_PASSWORD": "secret"} if self.etcd.api == "etcdv3" else {}
        return super().environment(**user, **extra)

    def permit_writing(self) -> None:
        if self.etcd.api == "etcdv3":
            for name, permission in (("root", ()), ("host", ("readwrite", "/calico/", "/calico0"))):
                self.etcdctl("user", "add", f"{name}:secret")
                self.etcdctl("role", "add", name)
                if permission:
                    self.etcdctl("role", "grant-permission", name, *permission)
                self.etcdctl("user", "grant-role", name, name)
            self.etcdctl("auth", "enable")
            self.etcd.token = self.etcd.v3("auth/authenticate", {"name": "root", "password": "secret"})["token"]

    def forbid_writing(self) -> None:
        if self.etcd.api == "etcdv3":
            self.etcdctl("--user=root:secret", "role", "grant-permission", "host", "read", "/calico/", "/calico0")
            return
        self.etcdctl("user", "add", "root:secret")
        self.etcdctl("auth", "enable")
        self.etcdctl("-u", "root:secret", "role", "revoke", "guest", "--path", "/*", "--write")

    def etcdctl(self, *words: str) -> None:
        environment = {**os.environ, "ETCDCTL_API": self.etcd.api[-1]}
        run("etcdctl", f"--endpoints={self.etcd.url}", *words, env=environment)


@pytest.fixture
def user_host(own_etcd: Etcd) -> UserHost:
    """A host with an agent."""
    host = UserHost(own_etcd)
    host.permit_writing()
    host.start_agent()
    return host


@pytest.fixture
def guest(user_host: UserHost) -> UserHost:
    """A host with an agent and a namespace with two addresses, which then may only read."""
    user_host.add("a", A4, "ipv4")
    user_host.sync()
    user_host.forbid_writing()
    return user_host


def state(host: UserHost) -> list[object]:
    """Return what a command could have changed."""
    tree = {key: value for key, value in host.etcd.tree().items() if "/felix/" not in key}
    files = sorted(str(path) for path in Path("/run/calico").rglob("unfinished*"))
    kernel = run("sh", "-c", "ip -br link; ip route; ip -n a -br link; ip -n a -br -4 address; ip -n a route").out
    return [tree, tables(), calico_links(), addresses("a", "eth1"), kernel, host.agent_runs(host.pid), files]


def test_a_write_that_is_refused_leaves_all_as_it_was(guest: UserHost) -> None:
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
        assert "does not permit this user" in said.err, said
        assert ("'guest'" in said.err) == (guest.etcd.api == "etcdv2"), said
        assert said.err.count("\n") == 1 and said.out == "", said
        assert state(guest) == before, words


@pytest.mark.api("etcdv2")
def test_a_user_of_the_v2_api_may_do_what_its_role_says(own_etcd: Etcd) -> None:
    host = UserHost(own_etcd)
    own_etcd.put("/calico/v1/Ready", "true")
    host.forbid_writing()
    host.ctl("profile", "add", "db", status=1)
    root = {"ETCD_USERNAME": "root", "ETCD_PASSWORD": "secret"}
    for api in ("etcdv2", ""):
        host.ctl("profile", "add", f"db{api}", env={**root, "DATASTORE_TYPE": api})
        assert f"db{api}" in host.ctl("profile", "show", env={**root, "DATASTORE_TYPE": api}).out
    said = host.ctl("profile", "show", env={**root, "ETCD_PASSWORD": "wrong€"}, status=1).err
    assert "its user 'root' (if the password is right)" in said and said.count("\n") == 1


def test_an_interrupted_lock_is_not_removed_either(guest: UserHost) -> None:
    """A pair that lost its record belongs to nobody; it goes only when another can be made."""
    run("ip", "link", "set", next(iter(calico_links())), "down")
    wait_for(lambda: "linkdown" in run("ip", "-n", "a", "route").out, "the kernel to notice that the pair is down")
    before = state(guest)
    said = guest.ctl("container", "add", A, A4, status=1).err
    assert "does not permit this user" in said
    assert state(guest) == before


def test_an_agent_without_endpoints_is_not_ended_either(user_host: UserHost) -> None:
    user_host.forbid_writing()
    before = tables(), user_host.etcd.tree("/calico/bgp")
    assert "does not permit this user" in user_host.ctl("node", "remove", status=1).err
    assert (tables(), user_host.etcd.tree("/calico/bgp")) == before and user_host.agent_runs(user_host.pid)
