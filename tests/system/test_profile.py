"""Every form of `profile`, and `pool show`, as a shell script uses them."""

from __future__ import annotations

import json

import pytest

from tests.system.support import AS_NOBODY, CALICOCTL, Host

RULES = "/calico/v1/policy/profile/web/rules"
TAGS = "/calico/v1/policy/profile/web/tags"


@pytest.fixture
def web(bare_host: Host) -> Host:
    bare_host.ctl("profile", "add", "web")
    return bare_host


def column(table: str, number: int = 0) -> list[str]:
    return [line.strip("|").split("|")[number].strip() for line in table.splitlines()[3:-1]]


def words(text: str) -> list[str]:
    return text.split()


def test_add_show_and_remove(bare_host: Host) -> None:
    host = bare_host
    assert host.ctl("profile", "show").out.splitlines()[1].strip("| ") == "Name"
    assert host.ctl("profile", "add", "web").out == "Created profile web\n"
    assert host.ctl("profile", "add", "web").out == "Profile web already exists.\n"
    host.ctl("profile", "add", "db")
    assert column(host.ctl("profile", "show").out) == ["db", "web"]
    assert json.loads(host.ctl("profile", "show", "--output=json").out) == [{"name": "db"}, {"name": "web"}]
    assert host.ctl("profile", "remove", "web").out == "Deleted profile web\n"
    assert host.ctl("profile", "remove", "web", status=1).err == "Profile web does not exist.\n"
    assert host.etcd.tree("/calico/v1/policy/profile/web") == {}
    assert column(host.ctl("profile", "show").out) == ["db"]


def test_a_profile_that_was_half_made_is_completed(web: Host) -> None:
    web.etcd.delete(RULES)
    assert web.ctl("profile", "add", "web").out == "Created profile web\n"
    assert web.etcd.get(RULES) is not None


def test_a_profile_in_use_is_not_removed(host: Host, blue: str) -> None:
    host.ctl("profile", "add", "web")
    host.ctl("container", "add", blue, "ipv4")
    host.ctl("container", blue, "profile", "append", "web")
    (key,) = host.records()
    refused = host.ctl("profile", "remove", "web", status=1)
    assert key.rpartition("/")[2] in refused.err and "--no-check" in refused.err
    detailed = host.ctl("profile", "show", "--detailed").out
    assert [column(detailed, number)[0] for number in range(6)] == [
        *("web", "host1", "namespace", "-var-run-netns-blue", key.rpartition("/")[2], "active"),
    ]
    (shown,) = json.loads(host.ctl("profile", "show", "--detailed", "--output=json").out)
    assert (shown["name"], shown["tags"], len(shown["endpoints"])) == ("web", ["web"], 1)
    host.ctl("profile", "remove", "web", "--no-check")
    assert host.record()["profile_ids"] == ["web"]


def test_tags(web: Host) -> None:
    assert web.ctl("profile", "web", "tag", "show").out == "web\n"
    assert web.ctl("profile", "web", "tag", "add", "t").out == "Tag t added to profile web\n"
    assert json.loads(web.etcd.get(TAGS)) == ["web", "t"]
    assert "already" in web.ctl("profile", "web", "tag", "add", "t").out
    assert json.loads(web.ctl("profile", "web", "tag", "show", "--output=json").out) == ["web", "t"]
    assert web.ctl("profile", "web", "tag", "remove", "web").out == "Tag web removed from profile web\n"
    assert web.ctl("profile", "web", "tag", "remove", "web", status=1).err == "Tag web is not on profile web.\n"
    assert json.loads(web.etcd.get(TAGS)) == ["t"]
    assert "profile add no" in web.ctl("profile", "no", "tag", "add", "t", status=1).err


def test_rules(web: Host) -> None:
    def rule(*words: str, status: int = 0) -> str:
        result = web.ctl("profile", "web", "rule", *words, status=status)
        return result.out + result.err

    web.ctl("profile", "web", "tag", "add", "lb")
    assert rule("show") == "Inbound rules:\n   1 allow from tag web\nOutbound rules:\n   1 allow\n"
    done = "Successfully updated rules on profile web\n"
    assert rule("add", "inbound", *words("allow tcp from tag lb to ports 80,8000-8010")) == done
    assert rule("add", "inbound", "--at=1", *words("deny icmp type 8 code 0 from cidr 10.0.0.0/8")) == done
    assert rule("add", "outbound", "--at=2", "deny", "udp") == done
    assert json.loads(web.etcd.get(RULES)) == {
        "id": "web",
        "inbound_rules": [
            {"action": "deny", "protocol": "icmp", "src_net": "10.0.0.0/8", "icmp_type": 8, "icmp_code": 0},
            {"action": "allow", "src_tag": "web"},
            {"action": "allow", "protocol": "tcp", "src_tag": "lb", "dst_ports": [80, "8000:8010"]},
        ],
        "outbound_rules": [{"action": "allow"}, {"action": "deny", "protocol": "udp"}],
    }
    shown = rule("show").splitlines()
    assert shown == [
        "Inbound rules:",
        "   1 deny icmp type 8 code 0 from cidr 10.0.0.0/8",
        "   2 allow from tag web",
        "   3 allow tcp from tag lb to ports 80,8000:8010",
        "Outbound rules:",
        "   1 allow",
        "   2 deny udp",
    ]
    assert rule("add", "outbound", "deny", "udp") == "Rule already present, skipping.\n"
    assert rule("remove", "inbound", *shown[1].split()[1:]) == done
    assert "no such inbound rule" in rule("remove", "inbound", *shown[1].split()[1:], status=1)
    assert rule("remove", "outbound", "--at=1") == done
    assert "out of range" in rule("remove", "outbound", "--at=2", status=1)
    assert "out of range" in rule("add", "outbound", "--at=9", "allow", status=1)
    assert json.loads(rule("json"))["outbound_rules"] == [{"action": "deny", "protocol": "udp"}]


def test_a_tag_that_no_profile_has_is_warned_of(web: Host) -> None:
    rule = ("profile", "web", "rule", "add", "inbound", "allow", "from", "tag")
    said = web.ctl(*rule, "nosuchtag")
    assert said.out == "Successfully updated rules on profile web\n"
    assert said.err.startswith("Warning: no profile has the tag nosuchtag,") and len(said.err.splitlines()) == 1
    assert json.loads(web.etcd.get(RULES))["inbound_rules"][-1] == {"action": "allow", "src_tag": "nosuchtag"}
    assert "no profile has the tag nosuchtag" in web.ctl(*rule, "nosuchtag").err, "also where the rule is there"
    web.ctl("profile", "web", "tag", "add", "nosuchtag")
    assert web.ctl(*rule, "nosuchtag", "to", "tag", "web").err == ""
    rules = {"id": "web", "inbound_rules": [], "outbound_rules": [{"action": "deny", "dst_tag": "b"}]}
    assert "the tag b," in web.ctl("profile", "web", "rule", "update", input=json.dumps(rules)).err
    web.etcd.put("/calico/v1/policy/profile/odd/tags", "[")
    assert web.ctl(*rule, "other").err == "", "it may be one of those that cannot be read"


def test_rules_from_json(web: Host) -> None:
    rules = json.loads(web.ctl("profile", "web", "rule", "json").out)
    rules["inbound_rules"] = [{"action": "log", "protocol": "udplite", "ip_version": 6}]
    updated = web.ctl("profile", "web", "rule", "update", input=json.dumps(rules))
    assert updated.out == "Successfully updated rules on profile web\n"
    assert json.loads(web.etcd.get(RULES)) == rules
    shown = web.ctl("profile", "web", "rule", "show").out.splitlines()[1]
    text = shown.split(maxsplit=1)[1]
    assert text == "log ipv6 protocol udplite"
    web.ctl("profile", "web", "rule", "remove", "inbound", *text.split())
    assert json.loads(web.etcd.get(RULES))["inbound_rules"] == []


def test_rules_by_hand_are_kept_as_they_are(web: Host) -> None:
    by_hand = {"inbound_rules": [{"src_tag": "web", "x": [1]}], "z": None}
    web.etcd.put(RULES, by_hand)
    web.ctl("profile", "web", "rule", "add", "outbound", "allow")
    assert json.loads(web.etcd.get(RULES)) == {
        "id": "web",
        "inbound_rules": [{"action": "allow", "src_tag": "web", "x": [1]}],
        "outbound_rules": [{"action": "allow"}],
        "z": None,
    }


def test_what_cannot_be_enforced_is_shown_without_json_and_removed_by_its_place(web: Host) -> None:
    rules = [{"action": "allow", "colour": "red\n"}, {"action": "deny", "src_ports": "80"}]
    web.etcd.put(RULES, {"inbound_rules": rules, "outbound_rules": []})
    shown = web.ctl("profile", "web", "rule", "show").out.splitlines()
    assert shown[1].startswith("   1 allow [cannot be enforced, so the profile denies: a rule has an unknown field")
    assert shown[2].startswith("   2 deny from ports 80 [cannot be enforced") and len(shown) == 4
    web.ctl("profile", "web", "rule", "remove", "inbound", "--at=1")
    assert json.loads(web.etcd.get(RULES))["inbound_rules"] == rules[1:]


def test_two_writers_do_not_lose_each_others_change(web: Host) -> None:
    commands = [web.start("profile", "web", "tag", "add", f"t{number}") for number in range(12)]
    assert [command.wait() for command in commands] == [0] * 12
    assert sorted(json.loads(web.etcd.get(TAGS))) == sorted(["web", *(f"t{number}" for number in range(12))])


def test_pool_show(host: Host) -> None:
    pool = {"cidr": "10.0.0.0/8", "ipip": "tunl0", "masquerade": True}
    host.etcd.put("/calico/v1/ipam/v4/pool/10.0.0.0-8", pool)
    shown = host.ctl("pool", "show").out
    assert [line.strip("|+- ") for line in shown.splitlines() if "|" in line] == [
        "IPv4 CIDR      | Options",
        "10.0.0.0/8     | ipip,nat-outgoing",
        "192.168.0.0/16",
        "IPv6 CIDR                | Options",
        "fd80:24e2:f998:72d6::/64",
    ]
    assert "IPv6" not in host.ctl("pool", "show", "--ipv4").out
    pool = {**pool, "vxlan_mode": "never"}
    plain = {"cidr": "192.168.0.0/16", "ipip": None, "masquerade": False, "vxlan_mode": "never"}
    assert json.loads(host.ctl("pool", "show", "--ipv4", "--output=json").out) == [pool, plain]


def test_profile_and_pool_need_no_root(web: Host) -> None:
    nobody = {"command": [*AS_NOBODY, CALICOCTL]}
    web.ctl("profile", "add", "by-nobody", **nobody)
    web.ctl("pool", "show", **nobody)
    for line in ("container add /x ipv4", "container remove x", "container x ip add ipv4", "node"):
        assert "must be run as root" in web.ctl(*words(line), status=2, **nobody).err
