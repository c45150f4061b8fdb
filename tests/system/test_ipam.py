"""`ipam`: what it shows, and what `ipam check` finds and repairs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.system.support import HOST_IP, Host, run

A, B = "/var/run/netns/a", "/var/run/netns/b"
BLUE = "/var/run/netns/blue"
BLOCK = "/calico/ipam/v2/assignment/ipv4/block/192.168.0.0-26"


@pytest.fixture
def host(bare_host: Host) -> Iterator[Host]:
    """A host with two namespaces, a and b, that are connected."""
    bare_host.register(HOST_IP)
    for name, address in (("a", "192.168.0.1"), ("b", "192.168.0.2")):
        run("ip", "netns", "add", name)
        bare_host.ctl("container", "add", f"/var/run/netns/{name}", address)
    yield bare_host
    for name in "ab":
        bare_host.ctl("container", "remove", f"/var/run/netns/{name}", status=None)


def key_of(host: Host, name: str) -> str:
    (key,) = [key for key in host.records() if f"-netns-{name}/" in key]
    return key


def check(host: Host, *options: str, status: int | None = 1) -> list[dict]:
    return json.loads(host.ctl("ipam", "check", "--output=json", *options, status=status).out)


def change_block(host: Host, change) -> None:
    block = json.loads(host.etcd.get(BLOCK))
    change(block)
    host.etcd.put(BLOCK, block)


def test_info_names_the_owner_and_the_block(host: Host) -> None:
    told = json.loads(host.ctl("ipam", "info", "192.168.0.1", "--output=json").out)
    assert told == {
        "ip": "192.168.0.1",
        "assigned": True,
        "pool": "192.168.0.0/16",
        "block": "192.168.0.0/26",
        "affinity": "host1",
        "handle": "namespace.-var-run-netns-a",
        "host": "host1",
        "orchestrator": "namespace",
        "workload": "-var-run-netns-a",
        "endpoint": key_of(host, "a").rpartition("/")[2],
        "interface": "eth1",
        "namespace": A,
        "workload_name": None,
        "in_use": True,
    }
    text = host.ctl("ipam", "info", "192.168.0.1").out
    assert all(word in text for word in ("is in use", "192.168.0.0/26", "host1", told["endpoint"], A))
    free = host.ctl("ipam", "info", "192.168.0.3", "--output=json", status=1)
    assert json.loads(free.out)["assigned"] is False and "not assigned" in free.err
    assert "in no pool" in host.ctl("ipam", "info", "203.0.113.1", status=1).err
    assert "not a valid IP address" in host.ctl("ipam", "info", "192.168.0", status=1).err


def test_info_and_release_of_addresses_of_an_old_tool(host: Host) -> None:
    """Its addresses name nobody; the endpoint that lists one tells."""
    change_block(host, lambda block: block["attributes"].__setitem__(0, {"handle_id": None, "secondary": {}}))
    told = json.loads(host.ctl("ipam", "info", "192.168.0.1", "--output=json").out)
    assert told["handle"] is None and told["endpoint"] == key_of(host, "a").rpartition("/")[2]
    assert "is used by endpoint" in host.ctl("ipam", "release", "192.168.0.1", status=1).err


def test_release(host: Host) -> None:
    said = host.ctl("ipam", "release", "192.168.0.1", status=1)
    assert "is used by endpoint" in said.err and "192.168.0.1" in host.allocations()
    assert "not assigned" in host.ctl("ipam", "release", "192.168.0.9", status=1).err
    host.ctl("ipam", "release", "192.168.0.1", "--force")
    assert host.allocations().keys() == {"192.168.0.2"} and host.handles().keys() == {"namespace.-var-run-netns-b"}
    (found,) = check(host)
    assert found["subject"] == "192.168.0.1" and "not assigned" in found["problem"] and found["fixable"]
    (found,) = check(host, "--fix", status=0)
    assert found["fixed"]
    host.check_consistent()
    assert host.allocations()["192.168.0.1"]["secondary"]["endpoint"] == key_of(host, "a").rpartition("/")[2]


def test_show_counts_used_free_and_borrowed(host: Host) -> None:
    change_block(host, lambda block: block["attributes"][0]["secondary"].__setitem__("host", "host2"))
    host.etcd.put("/calico/v1/ipam/v4/pool/192.168.0.0-16", {"cidr": "192.168.0.0/25"})
    used = json.loads(host.ctl("ipam", "show", "--output=json").out)
    assert {"pool": "192.168.0.0/25", "addresses": 128, "used": 2, "free": 126, "borrowed": 1} in used
    assert "| 192.168.0.0/25" in host.ctl("ipam", "show").out


def test_check_finds_nothing_where_all_is_well(host: Host) -> None:
    assert check(host, status=0) == []
    assert "agree" in host.ctl("ipam", "check").out


def test_an_address_that_no_endpoint_has(host: Host) -> None:
    host.etcd.delete(key_of(host, "a"))
    (found,) = check(host)
    assert found["subject"] == "192.168.0.1" and "no endpoint has it" in found["problem"] and not found["fixed"]
    assert "192.168.0.1" in host.allocations(), "looking changes nothing"
    (found,) = check(host, "--fix", status=0)
    assert found["fixed"]
    host.check_consistent()


def test_an_address_beside_those_that_an_endpoint_has(host: Host) -> None:
    """What a command that was cut has left: the endpoint keeps what is its own."""

    def take_another(block: dict) -> None:
        block["allocations"][5] = block["allocations"][1]

    change_block(host, take_another)
    handle = "namespace.-var-run-netns-a"
    host.etcd.put(f"/calico/ipam/v2/handle/{handle}", {"id": handle, "block": {"192.168.0.0/26": 2}})
    (found,) = check(host, "--fix", status=0)
    assert found["subject"] == "192.168.0.5" and found["fixed"]
    assert host.allocations().keys() == {"192.168.0.1", "192.168.0.2"}
    host.check_consistent()


def test_what_is_not_this_hosts_is_left_alone(host: Host) -> None:
    def elsewhere(block: dict) -> None:
        for number, (handle, facts) in enumerate(
            [
                ("namespace.-x", {"host": "host2"}),
                ("docker.123", {"host": "host2"}),
                ("openstack.123", {"host": "host1"}),
                (None, {}),
            ]
        ):
            block["allocations"][10 + number] = len(block["attributes"])
            block["attributes"].append({"handle_id": handle, "secondary": facts})

    change_block(host, elsewhere)
    host.etcd.put("/calico/bgp/v1/host/host2/ip_addr_v4", "192.0.2.3")
    for handle in ("namespace.-x", "docker.123", "openstack.123"):
        host.etcd.put(f"/calico/ipam/v2/handle/{handle}", {"id": handle, "block": {"192.168.0.0/26": 1}})
    before = host.etcd.tree()
    found = check(host, "--fix")
    assert [one["subject"] for one in found] == [f"192.168.0.{number}" for number in (10, 11, 12, 13)]
    assert not any(one["fixed"] for one in found)
    assert "on host2" in found[0]["advice"] and "ipam release 192.168.0.13" in found[3]["advice"]
    assert host.etcd.tree() == before


def test_a_handle_that_miscounts(host: Host) -> None:
    handle = "/calico/ipam/v2/handle/namespace.-var-run-netns-a"
    host.etcd.put(
        handle, {"id": "namespace.-var-run-netns-a", "block": {"192.168.0.0/26": 3, "10.0.0.0/26": 1}, "x": 1}
    )
    host.etcd.put("/calico/ipam/v2/handle/docker.gone", {"id": "docker.gone", "block": {"192.168.0.0/26": 1}})
    host.etcd.delete("/calico/ipam/v2/handle/namespace.-var-run-netns-b")
    found = check(host)
    assert [(one["kind"], one["subject"]) for one in found] == [
        ("handle", "docker.gone"),
        ("handle", "namespace.-var-run-netns-a"),
        ("handle", "namespace.-var-run-netns-b"),
    ]
    assert "counts 4 addresses and holds 1" in found[1]["problem"]
    assert all(one["fixed"] for one in check(host, "--fix", status=0))
    host.check_consistent()
    assert json.loads(host.etcd.get(handle))["x"] == 1


def test_endpoints_that_claim_what_is_not_theirs(host: Host) -> None:
    key = key_of(host, "b")
    host.etcd.put(key, {**json.loads(host.etcd.get(key)), "ipv4_nets": ["192.168.0.2/32", "192.168.0.1/32"]})
    problems = [one["problem"] for one in check(host, "--fix")]
    assert any("both list it" in problem for problem in problems)
    host.etcd.delete(key_of(host, "a"))
    (found,) = check(host, "--fix")
    assert "assigned to namespace.-var-run-netns-a" in found["problem"] and not found["fixed"]


def test_hosts_that_are_not_registered_and_what_cannot_be_read(host: Host) -> None:
    host.etcd.put("/calico/v1/host/gone/workload/docker/x/endpoint/y", {"ipv4_nets": []})
    (found,) = check(host)
    assert (found["kind"], found["subject"]) == ("endpoint", "y") and "gone is not registered" in found["problem"]
    host.etcd.put("/calico/v1/host/gone/workload/docker/x/endpoint/y", "{")
    (found,) = check(host, "--fix")
    assert found["kind"] == "unreadable"
    host.etcd.delete("/calico/v1/host/gone")
    host.etcd.put("/calico/ipam/v2/assignment/ipv4/block/192.168.1.0-26", "{")
    (found,) = check(host, "--fix")
    assert found["kind"] == "unreadable" and "192.168.1.0-26" in found["subject"]


OWNER = ("host", "orchestrator", "workload", "endpoint", "interface", "namespace")


@pytest.mark.parametrize("handle", ["../../../v1/Ready", "..", "", "/", "a/b", "//"])
def test_an_address_whose_handle_is_no_name_of_one_is_released(host: Host, handle: str) -> None:
    block = {
        "cidr": "192.168.1.0/26",
        "affinity": "host:gone",
        "allocations": [0, 0, *[None] * 62],
        "attributes": [{"handle_id": handle, "secondary": dict.fromkeys(OWNER, "..")}],
    }
    host.etcd.put("/calico/ipam/v2/assignment/ipv4/block/192.168.1.0-26", block)
    host.ctl("ipam", "info", "192.168.1.1")
    before = (host.etcd.tree("/calico/v1"), host.handles())
    host.ctl("ipam", "release", "192.168.1.1")
    check(host, "--fix", status=None)
    assert "192.168.1.1" not in host.allocations()
    assert (host.etcd.tree("/calico/v1"), host.handles()) == before


def test_fields_of_newer_tools_in_a_block(host: Host) -> None:
    """Its list of free addresses, and strict affinity."""
    order = [9, *range(3, 9), *range(10, 64), 0]
    change_block(host, lambda block: block.update(unallocated=order, strict_affinity=True))
    assert check(host, status=0) == []
    host.ctl("container", A, "ip", "add", "ipv4")
    block = json.loads(host.etcd.get(BLOCK))
    assert "192.168.0.9" in host.allocations() and block["unallocated"] == order[1:] and block["strict_affinity"]
    host.ctl("container", A, "ip", "remove", "192.168.0.9")
    assert json.loads(host.etcd.get(BLOCK))["unallocated"] == [*order[1:], 9]
    # another host, which the block is not for
    other = Host(host.etcd, "host2")
    other.register("192.0.2.3")
    run("ip", "netns", "add", "c")
    refused = other.ctl("container", "add", "/var/run/netns/c", "192.168.0.20", status=1)
    assert "block 192.168.0.0/26 of host host1" in refused.err and "strict affinity" in refused.err
    other.ctl("container", "add", "/var/run/netns/c", "ipv4")
    assert "192.168.0.64" in host.allocations()
    # what somebody has written wrong
    facts = {"host": "host2", "orchestrator": "cni", "workload": "x"}

    def spoil(block: dict) -> None:
        block["allocations"][30] = len(block["attributes"])
        block["attributes"].append({"handle_id": None, "secondary": facts})

    change_block(host, spoil)
    host.ctl("ipam", "release", "192.168.0.1", "--force")
    found = [(one["kind"], one["subject"], one["problem"], one["fixable"]) for one in check(host)]
    assert ("block", "192.168.0.0/26") not in {one[:2] for one in found}, "the release has put the list right"
    change_block(host, lambda block: block.update(unallocated=[2]))
    found = {(one["kind"], one["problem"]): one["fixed"] for one in check(host, "--fix")}
    assert found["block", 'its "unallocated" lists 2, which is not free'] is True
    assert found["address", "it is used on host host2, but block 192.168.0.0/26 is reserved for host host1"] is False
    block = json.loads(host.etcd.get(BLOCK))
    assert set(block["unallocated"]) == {n for n, a in enumerate(block["allocations"]) if a is None}
    host.ctl("ipam", "release", "192.168.0.30", "--force")
    assert check(host, status=0) == []
    other.ctl("container", "remove", "/var/run/netns/c")


HOLDER = """
import fcntl, sys
file = open("/run/calico/host1/namespace.-var-run-netns-a", "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_command_under_way_is_not_disturbed(host: Host) -> None:
    """Its lock is held: what it has not finished yet is not taken for lost."""
    host.etcd.delete(key_of(host, "a"))
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        fixing = host.start("ipam", "check", "--fix")
        with pytest.raises(subprocess.TimeoutExpired):
            fixing.wait(4)
        assert "192.168.0.1" in host.allocations()
        process.stdin.close()
        fixing.communicate(timeout=20)
    assert fixing.returncode == 0
    host.check_consistent()


def test_an_address_of_a_record_that_cannot_be_read_is_not_given_away(host: Host) -> None:
    key = f"/calico/v1/host/host1/workload/docker/x/endpoint/{'a' * 32}"
    host.etcd.put(key, {"mac": "zz", "ipv4_nets": ["192.168.0.9/32"]})

    def take(block: dict) -> None:
        block["allocations"][9] = len(block["attributes"])
        block["attributes"].append({"handle_id": None, "secondary": {}})

    change_block(host, take)
    assert "is used by endpoint aaaa" in host.ctl("ipam", "release", "192.168.0.9", status=1).err
    assert "in use" in host.ctl("ipam", "info", "192.168.0.9").out
    # one that has nothing to read at all, but owns the address
    key, record = key_of(host, "a"), host.records()[key_of(host, "a")]
    host.etcd.put(key, '{"state": "act')
    assert "is used by endpoint" in host.ctl("ipam", "release", "192.168.0.1", status=1).err
    found = {one["subject"]: one for one in check(host)}
    assert "fix the unreadable keys first" in found["192.168.0.1"]["advice"] and not found["192.168.0.1"]["fixable"]
    host.etcd.put(key, record)
    host.ctl("ipam", "release", "192.168.0.9", "--force")


def test_an_old_tools_endpoint_with_a_new_address_is_in_order(bare_host: Host) -> None:
    bare_host.register(HOST_IP)
    run("ip", "netns", "add", "blue")
    bare_host.ctl("container", "add", BLUE, "192.168.0.1")
    ((key, record),) = bare_host.records().items()
    bare_host.etcd.delete(key)
    bare_host.etcd.put(key.replace("/namespace/", "/docker/"), record)
    assert check(bare_host, status=0) == []
    bare_host.ctl("container", "remove", BLUE)


def test_check_finds_hidden_keys(host: Host) -> None:
    etcd = host.etcd
    block = "/calico/ipam/v2/assignment/ipv4/block"
    # a host with settings alone is not registered
    key = f"/calico/v1/host/gone/workload/docker/{'c' * 64}/endpoint/{'c' * 32}"
    etcd.put(key, {"name": "caliccccccccccc"})
    etcd.put("/calico/bgp/v1/host/gone/loglevel", "info")
    # blocks that are none, one that cannot be read, and an orphan behind it
    for name in ("garbage", "10.0.0.0-24", "10.0.0.5-26"):
        etcd.put(f"{block}/{name}", "{}")
    etcd.put(f"{block}/10.0.0.64-26", "no JSON")
    far = {"cidr": "fd80:24e2:f998:72d6::/122", "affinity": None, "allocations": [0] + [None] * 63}
    orphan = {"handle_id": "docker.far", "secondary": {"host": "gone"}}
    etcd.put(f"{block.replace('v4', 'v6')}/fd80:24e2:f998:72d6::-122", {**far, "attributes": [orphan]})
    # handles that count nothing, that count what cannot be read, and one that can be no key
    etcd.put("/calico/ipam/v2/handle/docker.empty", {"id": "docker.empty", "block": {}})
    etcd.put("/calico/ipam/v2/handle/a/b", {"id": "a/b", "block": {"192.168.0.0/26": 1}})
    etcd.put("/calico/ipam/v2/handle/docker.unread", {"id": "docker.unread", "block": {"10.0.0.64/26": 1}})

    def take(block: dict) -> None:
        block["allocations"][20] = len(block["attributes"])
        block["attributes"].append({"handle_id": "docker.a/b", "secondary": {"host": "host1"}})

    change_block(host, take)
    # an endpoint of another host with an address that is this host's, twice
    twice = f"/calico/v1/host/host2/workload/namespace/-var-run-netns-a/endpoint/{'d' * 32}"
    etcd.put("/calico/bgp/v1/host/host2/ip_addr_v4", "192.0.2.3")
    mine = "192.168.0.1"
    etcd.put(twice, {"ipv4_nets": ["10.0.0.70/32", "10.0.0.70/32"]})

    found = {(one["kind"], one["subject"]): one for one in check(host)}
    assert set(found) == {
        ("endpoint", "c" * 32),
        *(("unreadable", f"{block}/{name}") for name in ("garbage", "10.0.0.0-24", "10.0.0.5-26", "10.0.0.64-26")),
        ("address", "fd80:24e2:f998:72d6::"),
        ("handle", "docker.far"),
        ("handle", "docker.empty"),
        ("unreadable", "/calico/ipam/v2/handle/a/b"),
        ("address", "192.168.0.20"),
    }
    assert "ipam release fd80:24e2:f998:72d6::" in found["address", "fd80:24e2:f998:72d6::"]["advice"]
    # what two hosts' namespaces of the same path would be taken for each other's
    (key,) = [key for key in host.records() if "-var-run-netns-a" in key and "/host1/" in key]
    record = host.records()[key]
    etcd.delete(key)
    etcd.put(twice, {**record, "name": "calidddddddddddd"[:15]})
    found = {(one["kind"], one["subject"]): one for one in check(host)}
    assert (
        "host host2 lists it, but it is assigned to namespace.-var-run-netns-a on host host1"
        in (found["address", mine]["problem"])
    )
    etcd.put(key, record)


def test_repairs_of_fix_take_effect_at_once(host: Host) -> None:
    """An orphan whose handle does not know of it."""

    def take(block: dict) -> None:
        block["allocations"][30] = len(block["attributes"])
        facts = {"host": "host1", "orchestrator": "docker", "workload": "f" * 64}
        block["attributes"].append({"handle_id": f"docker.{'f' * 64}", "secondary": facts})

    change_block(host, take)
    assert all(one["fixed"] for one in check(host, "--fix", status=0))
    assert check(host, status=0) == []


@pytest.mark.parametrize("has_affinity_key", [True, False])
def test_a_block_of_a_host_that_is_gone_is_found_and_removed_with_the_host(host: Host, has_affinity_key: bool) -> None:
    far = Host(host.etcd, "far")
    far.register("192.0.2.3")
    run("ip", "netns", "add", "blue")
    far.ctl("container", "add", BLUE, "ipv4")
    (block,) = [key for key in host.etcd.tree("/calico/ipam/v2/assignment") if key != BLOCK]
    (affinity,) = host.etcd.tree("/calico/ipam/v2/host/far")
    assert json.loads(host.etcd.get(block))["affinity"] == "host:far"
    assert check(host, status=0) == []
    # the machine is no more, and somebody has removed its keys by hand
    for key in ("/calico/bgp/v1/host/far", "/calico/v1/host/far"):
        host.etcd.delete(key)
    if not has_affinity_key:
        host.etcd.delete(affinity)
    (found,) = [one for one in check(host) if one["kind"] == "block"]
    cidr = block.rpartition("/")[2].replace("-", "/")
    assert found["subject"] == cidr and found["problem"] == "it has affinity to host far, which is not registered"
    assert "'calicoctl node remove --hostname=far'" in found["advice"]
    host.ctl("node", "remove", "--hostname=far")
    tree = host.etcd.tree()
    assert block not in tree and not any("far" in key for key in tree), "its addresses are released as well"
    assert check(host, status=0) == []
    assert "is not registered" in host.ctl("node", "remove", "--hostname=far", status=1).err
