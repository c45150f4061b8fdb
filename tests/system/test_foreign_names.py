"""Names that other tools have chosen: longer ones work like others, and invalid ones can be removed."""

from __future__ import annotations

import json

import pytest

from tests.system.agent import A4, ALLOW, B4, AgentHost
from tests.system.support import Host
from tests.system.traffic import PATIENT, ping

LONG = "profile-of-the-old-tool_" + "x" * 100
TAG, OTHER_TAG = "tag." + "y" * 80 + "1", "tag." + "y" * 80 + "2"
PROFILES = "/calico/v1/policy/profile"


def test_names_of_forty_characters_and_more_are_enforced_shown_and_changed(node: AgentHost) -> None:
    node.add("a", A4)
    node.add("b", B4)
    node.profile(LONG, inbound=[{**ALLOW, "src_tag": TAG}], tags=[TAG])
    node.profile(LONG + "y", inbound=[{**ALLOW, "src_tag": TAG}], tags=[OTHER_TAG])
    a, b = "/var/run/netns/a", "/var/run/netns/b"

    assert node.ctl("container", a, "profile", "append", LONG).out == f"Profiles {LONG} appended\n"
    node.ctl("container", b, "profile", "set", LONG)
    node.sync()
    assert ping("a", B4, PATIENT)
    node.ctl("container", a, "profile", "set", LONG + "y")
    node.sync()
    assert not ping("a", B4), "of names that begin alike, each is its own"

    assert f"| {LONG} " in node.ctl("profile", "show").out
    assert node.ctl("profile", LONG, "tag", "show").out == f"{TAG}\n"
    rule = f"allow from tag {OTHER_TAG}"
    node.ctl("profile", LONG, "rule", "add", "inbound", *rule.split())
    assert f"   2 {rule}\n" in node.ctl("profile", LONG, "rule", "show").out
    node.sync()
    assert ping("a", B4, PATIENT)
    node.ctl("profile", LONG, "rule", "remove", "inbound", *rule.split())
    node.sync()
    assert not ping("a", B4)
    node.ctl("profile", LONG, "rule", "update", input=node.ctl("profile", LONG, "rule", "json").out)
    node.ctl("profile", LONG + "y", "tag", "add", "short")
    assert node.status()["problems"] == []

    assert "is in use by 1 endpoint" in node.ctl("profile", "remove", LONG, status=1).err
    node.ctl("container", b, "profile", "remove", LONG)
    node.ctl("profile", LONG, "tag", "remove", TAG)
    node.ctl("profile", "remove", LONG)
    assert node.ctl("profile", "show").out.count(LONG) == 1
    for words in (["profile", "add", "n" * 40], ["profile", LONG + "y", "tag", "add", "n" * 40]):
        assert "1 to 39 letters" in node.ctl(*words, status=1).err, "new names are short"


def test_objects_with_odd_names_can_be_removed(host: Host) -> None:
    host.etcd.put(f"{PROFILES}/web/tags", ["web", "bad/tag", "", "a b\n", "x" * 50])
    host.etcd.put(f"{PROFILES}/web/rules", {"id": "web", "inbound_rules": [], "outbound_rules": []})
    for tag in ("bad/tag", "", "a b\n", "x" * 50):
        host.ctl("profile", "web", "tag", "remove", tag)
    assert json.loads(host.etcd.get(f"{PROFILES}/web/tags")) == ["web"]

    rules = [{"action": "allow", "src_tag": "bad/tag"}, {"action": "deny", "src_tag": "a b", "dst_tag": "web"}]
    rules += [{"action": "allow", "protocol": "icmp", "src_net": "2001:db8::/32"}, {"action": "allow"}]
    host.etcd.put(f"{PROFILES}/web/rules", {"id": "web", "inbound_rules": rules, "outbound_rules": []})
    for words in (["allow", "from", "tag", "bad/tag"], ["deny", "from", "tag", "a b", "to", "tag", "web"]):
        assert "is not a valid tag name" in host.ctl("profile", "web", "rule", "add", "inbound", *words, status=1).err
        host.ctl("profile", "web", "rule", "remove", "inbound", *words)
        assert "has no such" in host.ctl("profile", "web", "rule", "remove", "inbound", *words, status=1).err
    host.ctl("profile", "web", "rule", "remove", "inbound", "allow", "icmp", "from", "cidr", "2001:db8::/32")
    assert json.loads(host.etcd.get(f"{PROFILES}/web/rules"))["inbound_rules"] == [{"action": "allow"}]

    odd = ["my profile?", "50%", "_hidden", "-dash", "\u00fcber", "y" * 200]
    for name in odd:
        host.etcd.put(f"{PROFILES}/{name}/tags", [name])
    host.etcd.put(f"{PROFILES}/deep/down/tags", ["deep/down"])
    host.etcd.put(f"{PROFILES}/leaf", "no folder")
    directories = ["empty"] if host.etcd.api == "etcdv2" else []
    for name in directories:
        host.etcd._request("PUT", f"{PROFILES}/{name}", dir="true")
    for name in ("", ".", "..", "web/rules", "web/", "nosuch"):
        refused = host.ctl("profile", "remove", "--", name, status=1)
        assert refused.out == ""
        assert "There is no such profile" in refused.err or "Profile nosuch does not exist" in refused.err
    assert "web" in host.ctl("profile", "show").out
    host.ctl("profile", "remove", "--", *odd, "deep", "leaf", *directories)
    assert set(host.etcd.tree(PROFILES)) == {f"{PROFILES}/web/tags", f"{PROFILES}/web/rules"}
    assert json.loads(host.ctl("profile", "show", "--output=json").out) == [{"name": "web"}]

    pools = {
        "v4/pool/fd00:1::-64": {"cidr": "fd00:1::/64"},
        "v4/pool/odd name": {"cidr": "10.1.0.0/16"},
        "v4/pool/10.2.0.0-16": "{",
        "v6/pool/garbage": "garbage",
    }
    for key, value in pools.items():
        host.etcd.put(f"/calico/v1/ipam/{key}", value)
    assert "does not exist" in host.ctl("pool", "remove", "10.9.0.0/16", "garbage", status=1).err
    assert "is one address, and a pool is a network" in host.ctl("pool", "remove", "10.1.0.0", status=1).err
    assert len(host.etcd.tree("/calico/v1/ipam")) == 6
    host.ctl("pool", "remove", "fd00:1::/64", "10.1.0.0/16", "10.2.0.0/16", "garbage")
    left = {"/calico/v1/ipam/v4/pool/192.168.0.0-16", "/calico/v1/ipam/v6/pool/fd80:24e2:f998:72d6::-64"}
    assert set(host.etcd.tree("/calico/v1/ipam")) == left

    host.etcd.put("/calico/bgp/v1/global/peer_v4/2001:db8::9", {"ip": "2001:db8::9", "as_num": "1"})
    host.etcd.put("/calico/bgp/v1/global/peer_v4/router 1", "?")
    for peer in ("2001:DB8::9", "router 1"):
        host.ctl("bgp", "peer", "remove", peer)
    assert host.etcd.tree("/calico/bgp/v1/global") == {}
    assert "'router 1' is not a valid IP address" in host.ctl("bgp", "peer", "remove", "router 1", status=1).err

    host.etcd.put("/calico/bgp/v1/host/old host!/ip_addr_v4", "192.0.2.77")
    host.ctl("node", "remove", "--hostname=old host!")
    assert "/calico/bgp/v1/host/old host!/ip_addr_v4" not in host.etcd.tree()
    for name in ("", "..", "host1/config"):
        assert "is not registered" in host.ctl("node", "remove", f"--hostname={name}", status=1).err
    assert host.etcd.get("/calico/v1/host/host1/config/marker") == "created"


def test_no_name_reaches_the_terminal_as_it_is(host: Host) -> None:
    key = f"/calico/v1/host/{host.name}/workload/docker/\x1b[31m\u202e/endpoint/{'1' * 32}"
    host.etcd.put(key, {"state": "active", "name": "cali11111111111", "mac": "02:00:00:00:00:01"})
    said = host.ctl("node", "remove", "--remove-endpoints").out
    assert "Removed Calico from \\x1b[31m\\u202e\n" in said
    assert host.records() == {}


@pytest.mark.parametrize("word", ["append", "set"])
def test_a_list_of_profiles_with_one_twice_is_refused(host: Host, blue: str, word: str) -> None:
    for name in ("web", "db"):
        host.ctl("profile", "add", name)
    host.ctl("container", "add", blue, "ipv4")
    id = next(iter(host.records())).rpartition("/")[2]
    for command in (["container", blue], ["endpoint", id]):
        refused = host.ctl(*command, "profile", word, "web", "db", "web", status=1)
        assert refused.out == "" and "Profile web is named twice" in refused.err
    assert host.record()["profile_ids"] == []
    host.ctl("container", blue, "profile", word, "web")
    host.ctl("container", blue, "profile", "append", "web")  # it is there already
    assert host.record()["profile_ids"] == ["web"]
