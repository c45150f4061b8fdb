"""Every form of `container`, on Docker containers and namespaces: the result in the kernel and in etcd."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from calicoctl import limits
from tests.system.support import FAULTY, Host, addresses, calico_links, links, routes, run, wait_for

V6 = "fd80:24e2:f998:72d6::"


def inside(container: str, *command: str) -> str:
    return run("docker", "exec", container, *command).out


def test_the_four_lines_of_the_readme(host: Host, workload: str) -> None:
    added = host.ctl("container", "add", "workload", "192.168.0.1")
    assert (added.out, added.err) == ("IP 192.168.0.1 added to workload\n", "")
    assert host.ctl("profile", "add", "PROFILE").out == "Created profile PROFILE\n"
    assert host.ctl("container", "workload", "profile", "append", "PROFILE").out == "Profiles PROFILE appended\n"

    id = run("docker", "inspect", "-f", "{{.Id}}", "workload").out.strip()
    shown = inside("workload", "ip", "address", "show", "eth1")
    assert "inet 192.168.0.1/32 scope global eth1" in shown and ",UP" in shown
    assert sorted(line.strip() for line in inside("workload", "ip", "route").splitlines()) == [
        "192.0.2.2 dev eth1 scope link",
        "default via 192.0.2.2 dev eth1",
    ]
    ((key, record),) = host.records().items()
    match = re.fullmatch(rf"/calico/v1/host/host1/workload/docker/{id}/endpoint/([0-9a-f]{{32}})", key)
    assert match
    mac = re.search("link/ether (..:..:..:..:..:..)", shown)[1]
    assert record == {
        "state": "active",
        "name": "cali" + match[1][:11],
        "mac": mac,
        "profile_ids": ["PROFILE"],
        "ipv4_nets": ["192.168.0.1/32"],
        "ipv6_nets": [],
        "ipv4_gateway": "192.0.2.2",
        "ipv6_gateway": None,
        "workload_name": "workload",
    }
    assert "UP" in links()[record["name"]]["flags"]
    assert host.allocations() == {
        "192.168.0.1": {
            "handle_id": f"docker.{id}",
            "secondary": {
                "host": "host1",
                "orchestrator": "docker",
                "workload": id,
                "endpoint": match[1],
                "interface": "eth1",
                "namespace": None,
                "workload_name": "workload",
            },
        }
    }
    assert host.handles() == {f"docker.{id}": {"192.168.0.0/26": 1}}
    assert host.etcd.get("/calico/ipam/v2/host/host1/ipv4/block/192.168.0.0-26") == ""
    assert json.loads(host.etcd.get("/calico/v1/policy/profile/PROFILE/tags")) == ["PROFILE"]
    assert json.loads(host.etcd.get("/calico/v1/policy/profile/PROFILE/rules")) == {
        "id": "PROFILE",
        "inbound_rules": [{"action": "allow", "src_tag": "PROFILE"}],
        "outbound_rules": [{"action": "allow"}],
    }

    assert host.ctl("container", "remove", "workload").out == "Removed Calico from workload\n"
    host.check_nothing_left()
    assert "eth1" not in inside("workload", "ip", "link")


def test_a_docker_container_gets_ipv6_although_docker_switches_it_off(host: Host, workload: str) -> None:
    pid = run("docker", "inspect", "-f", "{{.State.Pid}}", "workload").out.strip()
    # what engines before Docker 26 do by themselves
    run("nsenter", "--net", "--target", pid, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
    assert inside("workload", "cat", "/proc/sys/net/ipv6/conf/default/disable_ipv6").strip() == "1"
    host.ctl("container", "add", "workload", f"{V6}1")
    shown = inside("workload", "ip", "address", "show", "eth1")
    assert f"inet6 {V6}1/128 scope global" in shown
    assert "tentative" not in next(line for line in shown.splitlines() if f"{V6}1" in line)
    assert "default via 2001:db8::2 dev eth1" in inside("workload", "ip", "-6", "route")
    record = host.record()
    assert (record["ipv4_nets"], record["ipv4_gateway"]) == ([], None)
    assert (record["ipv6_nets"], record["ipv6_gateway"]) == ([f"{V6}1/128"], "2001:db8::2")
    host.ctl("container", "workload", "ip", "add", "ipv4")
    assert "default via 192.0.2.2 dev eth1" in inside("workload", "ip", "route")
    assert host.record()["ipv4_gateway"] == "192.0.2.2"
    host.check_consistent()


def test_a_workload_reaches_itself(host: Host, workload: str, blue: str) -> None:
    host.ctl("container", "add", "workload", "ipv4")
    host.ctl("container", "workload", "ip", "add", f"{V6}1")
    for address in ("127.0.0.1", "::1", f"{V6}1"):
        inside("workload", "ping", "-c", "1", "-W", "2", address)
    assert "DOWN" in run("ip", "-n", "blue", "link", "show", "lo").out
    host.ctl("container", "add", blue, f"{V6}2")
    for address in ("127.0.0.1", "::1", f"{V6}2"):
        run("ip", "netns", "exec", "blue", "ping", "-c", "1", "-W", "2", address)
    host.ctl("container", "remove", blue)
    run("ip", "netns", "exec", "blue", "ping", "-c", "1", "-W", "2", "127.0.0.1")


@pytest.mark.parametrize("by", ["name", "id", "prefix"])
def test_a_container_can_be_called_by_name_id_and_prefix(host: Host, workload: str, by: str) -> None:
    id = run("docker", "inspect", "-f", "{{.Id}}", "workload").out.strip()
    called = {"name": "workload", "id": id, "prefix": id[:12]}[by]
    assert host.ctl("container", "add", called, "ipv4").out == f"IP 192.168.0.0 added to {called}\n"
    host.ctl("container", called, "endpoint", "show")
    host.ctl("container", "remove", called)
    host.check_nothing_left()


def test_a_restarted_container_is_reattached_as_it_was(host: Host, workload: str) -> None:
    host.ctl("profile", "add", "web")
    host.ctl("container", "add", "workload", "192.168.0.1", "--interface=net0")
    host.ctl("container", "workload", "ip", "add", f"{V6}1")
    host.ctl("container", "workload", "profile", "append", "web")
    before = host.records()
    run("docker", "restart", "-t", "0", "workload")
    refused = host.ctl("container", "add", "workload", "192.168.0.9", status=1)
    assert "ip add" in refused.err and "192.168.0.1" in refused.err
    assert host.ctl("container", "add", "workload", "192.168.0.1").out == "IP 192.168.0.1 added to workload\n"
    assert host.records() == before
    shown = inside("workload", "ip", "address", "show", "net0")
    assert "192.168.0.1/32" in shown and f"{V6}1/128" in shown and next(iter(before.values()))["mac"] in shown
    host.check_consistent()
    again = host.ctl("container", "add", "workload", "192.168.0.1", status=1)
    assert again.err == (
        f"workload has already been configured with Calico Networking. It has 192.168.0.1, {V6}1 on net0.\n"
    )


def test_a_container_unknown_to_docker_is_removed_by_its_name(host: Host, workload: str) -> None:
    host.ctl("container", "add", "workload", "ipv4")
    run("docker", "rm", "-f", "workload")
    host.ctl("container", "remove", "workload")
    host.check_nothing_left()
    gone = host.ctl("container", "remove", "workload", status=1)
    assert gone.err == "No such container: workload\n"


def test_a_container_is_found_by_its_name_while_the_engine_is_away(host: Host, workload: str) -> None:
    host.ctl("container", "add", "workload", "192.168.0.1")
    away = {"DOCKER_HOST": "unix:///run/nowhere.sock"}
    shown = json.loads(host.ctl("container", "workload", "endpoint", "show", "--output=json", env=away).out)
    assert shown[0]["workload_name"] == "workload"
    ((key, record),) = host.records().items()
    record.pop("workload_name")
    host.etcd.put(key, record)  # an old tool drops it; beside the address it stands still
    host.ctl("container", "workload", "endpoint", "show", env=away)
    assert "Cannot ask Docker" in host.ctl("container", "work", "endpoint", "show", status=1, env=away).err
    traced = host.ctl("profile", "trace", "workload", "192.0.2.9", "icmp", status=1, env=away)
    assert "it has no profile" in traced.err
    host.ctl("container", "remove", "workload", env=away)
    host.check_nothing_left()


def test_a_name_that_two_containers_have_is_refused_with_both(host: Host) -> None:
    """They were removed and made anew while no agent ran."""
    host.ctl("profile", "add", "p")
    ids = ["ab" * 32, "ab" * 10 + "cd" * 22]
    keys = [f"/calico/v1/host/host1/workload/docker/{id}/endpoint/{number * 32}" for id, number in zip(ids, "12")]
    for key in keys:
        host.etcd.put(key, {"ipv4_nets": [], "workload_name": "web", "profile_ids": ["p"]})
    elsewhere = f"/calico/v1/host/host2/workload/docker/{'ef' * 32}/endpoint/{'3' * 32}"
    host.etcd.put(elsewhere, {"workload_name": "web"})
    before = host.records()
    for words in ("remove web", "web endpoint show", "web profile set", "web ip remove 192.168.0.1"):
        said = host.ctl("container", *words.split(), status=1, env={"DOCKER_HOST": "unix:///run/nowhere.sock"})
        some = ", ".join(f"{id[:21]} on host1" for id in ids)
        assert (said.out, said.err) == ("", f"web can be several containers ({some}): say which by its id.\n")
    traced = host.ctl(
        *("profile", "trace", "web", "192.168.0.1", "icmp"), status=1, env={"DOCKER_HOST": "unix:///run/nowhere.sock"}
    )
    assert traced.err.startswith("web can be several containers (abab") and "on host1), " not in traced.err
    assert host.records() == before
    host.etcd.delete(keys[1])
    host.ctl("container", "web", "profile", "set", env={"DOCKER_HOST": "unix:///run/nowhere.sock"})
    assert host.records()[keys[0]]["profile_ids"] == []


@pytest.mark.parametrize("digits", [64, 12])
def test_a_container_unknown_to_docker_is_removed_by_its_id(host: Host, workload: str, digits: int) -> None:
    id = run("docker", "inspect", "-f", "{{.Id}}", "workload").out.strip()
    host.ctl("container", "add", "workload", "ipv4")
    run("docker", "rm", "-f", "workload")
    host.ctl("container", "remove", id[:digits])
    host.check_nothing_left()


def test_a_stopped_container_keeps_its_record_and_can_be_changed(host: Host, workload: str) -> None:
    host.ctl("profile", "add", "web")
    host.ctl("container", "add", "workload", "192.168.0.1")
    host.ctl("container", "workload", "ip", "add", "192.168.0.2")
    run("docker", "stop", "-t", "0", "workload")
    host.ctl("container", "workload", "profile", "set", "web")
    host.ctl("container", "workload", "ip", "remove", "192.168.0.2")
    assert (host.record()["profile_ids"], host.record()["ipv4_nets"]) == (["web"], ["192.168.0.1/32"])
    host.ctl("container", "remove", "workload")
    host.check_nothing_left()


def test_namespaces_by_path(host: Host, blue: str) -> None:
    sleeper = subprocess.Popen(["ip", "netns", "exec", "blue", "sleep", "1000"])
    try:
        host_netns = run("readlink", "/proc/self/ns/net").out
        wait_for(lambda: run("readlink", f"/proc/{sleeper.pid}/ns/net").out != host_netns, "sleeper in its namespace")
        by_process = f"/proc/{sleeper.pid}/ns/net"
        host.ctl(
            "container", "add", by_process, "192.168.0.7", "--interface=cali7", env={"DOCKER_HOST": "tcp://127.0.0.1:1"}
        )
        assert addresses("blue", "cali7") == {"192.168.0.7/32"}
        assert routes("blue") == [
            "default via 192.0.2.2 dev cali7 proto static",
            "192.0.2.2 dev cali7 proto static scope link",
        ]
        (key,) = host.records()
        assert f"/workload/namespace/-proc-{sleeper.pid}-ns-net/endpoint/" in key
        (attributes,) = host.allocations().values()
        assert attributes["secondary"]["namespace"] == by_process
    finally:
        sleeper.kill()
        sleeper.wait()
    run("ip", "netns", "delete", "blue")
    host.ctl("container", "remove", by_process)
    host.check_nothing_left()


def test_addresses_out_of_a_pool_that_is_named(host: Host, blue: str) -> None:
    host.etcd.put("/calico/v1/ipam/v4/pool/10.1.0.0-16", {"cidr": "10.1.0.0/16", "ipip": "tunl0"})
    assert host.ctl("container", "add", blue, "10.1.0.0/16").out == f"IP 10.1.0.0 added to {blue}\n"
    assert host.ctl("container", blue, "ip", "add", "192.168.0.0/16").out == f"IP 192.168.0.0 added to {blue}\n"
    refused = host.ctl("container", blue, "ip", "add", "10.1.0.0/17", status=1)
    assert refused.err == "10.1.0.0/17 is not the CIDR of a pool. IPv4 pools: 10.1.0.0/16, 192.168.0.0/16.\n"
    host.check_consistent()


def test_ip_add_and_remove(host: Host, blue: str) -> None:
    host.ctl("container", "add", blue, "192.168.0.1")
    assert host.ctl("container", blue, "ip", "add", "192.168.0.2").out == f"IP 192.168.0.2 added to {blue}\n"
    assert host.ctl("container", blue, "ip", "add", "192.168.0.2").out == f"{blue} has IP 192.168.0.2 already.\n"
    run("ip", "-n", "blue", "address", "del", "192.168.0.2/32", "dev", "eth1")
    host.ctl("container", blue, "ip", "add", "192.168.0.2")
    assert host.ctl("container", blue, "ip", "add", "ipv6").out == f"IP {V6} added to {blue}\n"
    assert addresses("blue", "eth1") == {"192.168.0.1/32", "192.168.0.2/32", f"{V6}/128"}
    assert any(route.startswith("default via 2001:db8::2 dev eth1") for route in routes("blue", 6))
    assert host.record()["ipv6_gateway"] == "2001:db8::2"
    host.check_consistent()
    assert host.ctl("container", blue, "ip", "remove", "192.168.0.1").out == f"IP 192.168.0.1 removed from {blue}\n"
    assert any(route.startswith("default via 192.0.2.2") for route in routes("blue"))
    host.ctl("container", blue, "ip", "remove", V6)
    assert host.record()["ipv6_gateway"] is None
    assert not [route for route in routes("blue", 6) if "2001:db8::2" in route]
    assert addresses("blue", "eth1") == {"192.168.0.2/32"}
    missing = host.ctl("container", blue, "ip", "remove", V6, status=1)
    assert missing.err == f"IP {V6} is not assigned to {blue}.\n"
    host.check_consistent()
    host.ctl("container", "remove", blue)
    host.check_nothing_left()


def test_an_invalid_block_is_passed_over_and_released_once_it_is_mended(host: Host, blue: str) -> None:
    block = "/calico/ipam/v2/assignment/ipv4/block/192.168.0.0-26"
    run("ip", "netns", "add", "other")
    other = "/var/run/netns/other"
    for words in (("add", other, "192.168.2.2"), ("remove", other), ("add", blue, "192.168.1.1")):
        host.ctl("container", *words)
    host.ctl("container", blue, "ip", "add", "192.168.0.1")  # the block that is tried first
    good = host.etcd.get(block)
    host.etcd.put(block, json.dumps({**json.loads(good), "x": "x" * limits.VALUE}))
    added = host.ctl("container", "add", other, "ipv4")
    assert added.out == f"IP 192.168.1.0 added to {other}\n"
    assert added.err.startswith(f"Warning: etcd key {block} has an invalid value: it has more than ")
    assert added.err.count("\n") == 1
    refused = host.ctl("container", other, "ip", "add", "192.168.0.5", status=1)
    assert refused.err.startswith(f"etcd key {block} has an invalid value")
    (record,) = [record for key, record in host.records().items() if "-netns-blue/" in key]
    host.etcd.put(block, "gar bage")
    for _ in range(2):  # the second time, nothing but the block is left
        removed = host.ctl("container", "remove", blue, status=1)
        assert removed.out == "" and removed.err == (
            f"{blue} is removed, but for its addresses in the block 192.168.0.0/26: etcd key {block} has an invalid "
            f"value: it holds no JSON but 'gar bage'; fix or delete it, then run 'calicoctl container remove {blue}' "
            "again.\n"
        )
        assert not [key for key in host.records() if "-netns-blue/" in key]
        assert record["name"] not in calico_links() and "eth1" not in links("blue")
        assert host.handles()["namespace.-var-run-netns-blue"] == {"192.168.0.0/26": 1}
    host.etcd.put(block, good)
    assert host.ctl("container", "remove", blue).out == f"Removed Calico from {blue}\n"
    host.check_consistent()
    host.ctl("container", "remove", other)
    host.check_nothing_left()


@pytest.mark.parametrize("left", [None, {"192.168.0.0/26": 1}], ids=["no handle", "one block of two"])
def test_addresses_whose_handle_does_not_name_their_block_are_released(
    host: Host, blue: str, left: dict[str, int] | None
) -> None:
    host.ctl("container", "add", blue, "192.168.0.1")
    host.ctl("container", blue, "ip", "add", "192.168.1.1")
    handle = "/calico/ipam/v2/handle/namespace.-var-run-netns-blue"
    host.etcd.put(handle, "gar bage")
    assert "fix or delete it" in host.ctl("container", "remove", blue, status=1).err
    host.etcd.delete(handle)
    if left is not None:
        host.etcd.put(handle, {"id": "namespace.-var-run-netns-blue", "block": left})
    host.ctl("container", "remove", blue)
    host.check_nothing_left()


def test_an_address_whose_handle_was_deleted_is_released_when_it_is_removed(host: Host, blue: str) -> None:
    host.ctl("container", "add", blue, "192.168.0.1")
    host.ctl("container", blue, "ip", "add", "192.168.1.1")
    host.etcd.delete("/calico/ipam/v2/handle/namespace.-var-run-netns-blue")
    host.ctl("container", blue, "ip", "remove", "192.168.1.1")
    assert set(host.allocations()) == {"192.168.0.1"}
    host.ctl("container", "remove", blue)
    host.check_nothing_left()


def test_profiles_of_a_container_keep_their_order(host: Host, blue: str) -> None:
    for name in ("a", "b", "c"):
        host.ctl("profile", "add", name)
    host.ctl("container", "add", blue, "ipv4")

    def change(*words: str, status: int = 0) -> str:
        result = host.ctl("container", blue, "profile", *words, status=status)
        return result.out + result.err

    assert change("append", "b", "a") == "Profiles b, a appended\n"
    assert host.record()["profile_ids"] == ["b", "a"]
    assert change("append", "a") == f"Profile a is in the list of {blue} already.\n"
    assert change("append", "a", "b") == f"Profiles a, b are in the list of {blue} already.\n"
    assert change("append", "a", "c") == "Profiles a, c appended\n"
    assert host.record()["profile_ids"] == ["b", "a", "c"]
    assert change("remove", "a") == "Profiles a removed.\n"
    assert "not in the list" in change("remove", "b", "a", status=1)
    assert host.record()["profile_ids"] == ["b", "c"]
    assert "does not exist" in change("append", "nosuch", status=1)
    assert change("set", "c", "a") == "Profiles c, a set.\n"
    assert host.record()["profile_ids"] == ["c", "a"]
    assert change("set") == "Profiles none set.\n"
    assert host.record()["profile_ids"] == []
    change("append", status=2)


def test_endpoint_show(host: Host, blue: str) -> None:
    host.ctl("container", "add", blue, "192.168.0.1")
    lines = host.ctl("container", blue, "endpoint", "show").out.splitlines()
    cells = [[cell.strip() for cell in lines[number].strip("|").split("|")] for number in (1, 3)]
    (key,), record = host.records(), host.record()
    assert cells[0] == [
        *("Hostname", "Orchestrator ID", "Workload ID", "Endpoint ID", "Addresses", "MAC", "Profiles", "State"),
    ]
    endpoint = key.rpartition("/")[2]
    workload = "-var-run-netns-blue"
    ids, state = ["host1", "namespace", workload, endpoint], "active (unknown)"  # no agent runs
    assert cells[1] == [*ids, "192.168.0.1/32", record["mac"], "", state]
    shown = json.loads(host.ctl("container", blue, "endpoint", "show", "--output=json").out)
    names = {"host": "host1", "orchestrator": "namespace", "workload": workload, "endpoint": endpoint}
    assert shown == [
        {**names, **record, "inactive_since": None, "workload_name": None, "status": "unknown", "reason": None}
    ]


def test_two_paths_with_the_same_workload_id_are_told_apart(host: Host, blue: str) -> None:
    run("mkdir", "-p", "/run/netns-x")
    run("touch", "/run/netns-x/y", "/run/netns-x-y")
    for path, space in (("/run/netns-x/y", "blue"), ("/run/netns-x-y", "blue")):
        run("mount", "--bind", f"/run/netns/{space}", path)
    host.ctl("container", "add", "/run/netns-x/y", "ipv4")
    before = host.records()
    for words in (("add", "/run/netns-x-y", "ipv4"), ("remove", "/run/netns-x-y")):
        assert "/run/netns-x/y" in host.ctl("container", *words, status=1).err
    assert host.records() == before
    host.ctl("container", "remove", "/run/netns-x/y")
    run("umount", "/run/netns-x/y", "/run/netns-x-y")
    host.check_nothing_left()


def test_what_an_old_tool_left_is_found_and_removed(host: Host, blue: str) -> None:
    """The 2015 tool: namespaces under `docker`, one `profile_id`, addresses with null handles."""
    endpoint = "8573cd44e78311f19d30c39e984a4bc1"
    folder = "/calico/v1/host/host1/workload/docker/-var-run-netns-blue"
    key = f"{folder}/endpoint/{endpoint}"
    old = {
        "state": "active",
        "name": "cali8573cd44e78",
        "mac": "aa:bb:cc:dd:ee:01",
        "profile_id": "old",
        "ipv4_nets": ["192.168.0.1/32"],
        "ipv6_nets": [],
        "ipv4_gateway": "192.0.2.2",
        "ipv6_gateway": None,
        "colour": "red",
    }
    host.etcd.put(key, old)
    block = {
        "cidr": "192.168.0.0/26",
        "affinity": "host:host1",
        "allocations": [None, 0, 0] + [None] * 61,
        "attributes": [{"handle_id": None, "secondary": {}}],
    }
    host.etcd.put("/calico/ipam/v2/assignment/ipv4/block/192.168.0.0-26", block)
    host.ctl("profile", "add", "web")
    host.ctl("container", blue, "profile", "append", "web")
    record = host.records()[key]
    assert (record["profile_ids"], record["colour"], "profile_id" in record) == (["old", "web"], "red", False)
    host.ctl("container", "add", blue, "ipv4")
    assert addresses("blue", "eth1") == {"192.168.0.1/32"}
    assert links("blue")["eth1"]["address"] == "aa:bb:cc:dd:ee:01"
    assert list(host.records()) == [key]
    host.ctl("container", blue, "ip", "add", "192.168.0.3")
    host.ctl("container", "remove", blue)
    assert host.records() == {} and calico_links() == set()
    assert host.allocations() == {"192.168.0.2": {"handle_id": None, "secondary": {}}}, "not ours, and kept"


def test_a_forged_record_deletes_no_foreign_interface(host: Host, blue: str) -> None:
    host.ctl("container", "add", blue, "192.168.0.1")
    run("ip", "link", "add", "precious", "type", "bridge")
    (key,) = host.records()
    host.etcd.put(key, {**host.record(), "name": "precious"})
    host.ctl("container", "remove", blue)
    assert "precious" in links()
    run("ip", "link", "delete", "precious")
    host.check_nothing_left()


def test_an_interrupt_rolls_back(host: Host, blue: str) -> None:
    """SIGTERM while the command waits for etcd, which hangs, in the middle of its work."""
    host.etcd.process.send_signal(19)
    command = host.start("container", "add", blue, "ipv4")
    try:
        wait_for(lambda: "namespace.-var-run-netns-blue" in run("ls", "/run/calico/host1", check=False).out, "lock")
        command.terminate()
        out, err = command.communicate(timeout=60)
    finally:
        host.etcd.process.send_signal(18)
    assert command.returncode == 128 + 15
    assert err == "Interrupted; no container is left half connected. Repeat the command to complete it.\n" and out == ""
    host.etcd.await_ready()
    host.check_nothing_left()


def test_hostile_attributes_beside_an_address_are_not_believed(host: Host, blue: str) -> None:
    """What wires a workload again is read from etcd: it must not become a path, or another's interface."""
    host.ctl("container", "add", blue, "192.168.0.1")
    (victim,) = calico_links()
    key = "/calico/ipam/v2/assignment/ipv4/block/192.168.0.0-26"
    run("ip", "netns", "add", "green")
    host.ctl("container", "add", "/var/run/netns/green", "192.168.0.2")
    block = json.loads(host.etcd.get(key))
    for attributes in block["attributes"]:
        if attributes["secondary"]["namespace"] == "/var/run/netns/green":
            attributes["secondary"].update({"interface": "../../../../../tmp/x", "endpoint": "../" + victim})
    host.etcd.put(key, block)
    run("ip", "netns", "delete", "green")
    run("ip", "netns", "add", "green")
    host.ctl("container", "add", "/var/run/netns/green", "192.168.0.2")
    assert addresses("green", "eth1") == {"192.168.0.2/32"}
    host.ctl("container", "remove", "/var/run/netns/green")
    assert calico_links() == {victim}


def test_a_connected_container_is_refused_whatever_is_asked_for(host: Host, blue: str) -> None:
    host.ctl("container", "add", blue, "192.168.0.1")
    for wish in ("192.168.0.1", "192.168.0.9", "ipv6", "203.0.113.1", "10.0.0.0/8"):
        refused = host.ctl("container", "add", blue, wish, status=1)
        said = f"{blue} has already been configured with Calico Networking. It has 192.168.0.1 on eth1.\n"
        assert refused.err == said
    before = host.etcd.tree()
    for words in (("192.168.0.1",), ("ipv4",), ("192.168.0.0/16",), ("192.168.0.1", "--interface=eth1")):
        again = host.ctl("container", "add", blue, *words, "--exist-ok")
        assert (again.out, again.err) == (f"{blue} has IP 192.168.0.1 on eth1 already.\n", "")
    for words in (("192.168.0.9",), ("ipv6",), ("192.168.0.1", "--interface=eth2")):
        assert host.ctl("container", "add", blue, *words, "--exist-ok", status=1).err == said
    assert host.etcd.tree() == before
    told = json.loads(host.ctl("container", "add", blue, "ipv4", "--exist-ok", "--output=json").out)
    assert (told["address"], told["mac"]) == ("192.168.0.1", links("blue")["eth1"]["address"])
    host.ctl("container", "remove", blue)
    assert host.ctl("container", "add", blue, "ipv4", "--exist-ok").out == f"IP 192.168.0.0 added to {blue}\n"


def test_a_renamed_container_is_not_taken_for_another(host: Host, workload: str) -> None:
    host.ctl("container", "add", "workload", "192.168.0.1")
    before = host.records()
    run("docker", "rename", "workload", "renamed")
    try:
        for words in ("remove workload", "workload profile set", "workload ip remove 192.168.0.1"):
            assert host.ctl("container", *words.split(), status=1).err == "No such container: workload\n"
        assert host.records() == before
        assert "eth1" in inside("renamed", "ip", "link")
        host.ctl("container", "remove", "renamed")
        host.check_nothing_left()
    finally:
        run("docker", "rm", "-f", "renamed", check=False)


def test_namespaces_of_the_same_path_on_two_hosts_are_two_workloads(host: Host) -> None:
    hosts = [host, Host(host.etcd, "host2")]
    hosts[1].register()
    run("touch", "/run/space")
    for number, one in enumerate(hosts):
        run("ip", "netns", "add", f"s{number}")
        run("mount", "--bind", f"/run/netns/s{number}", "/run/space")
        one.ctl("container", "add", "/run/space", "192.168.0.0/16")
        run("umount", "/run/space")
    host.check_consistent()
    assert host.handles() == {"namespace.-run-space": {"192.168.0.0/26": 1, "192.168.0.64/26": 1}}
    host.ctl("container", "remove", "/run/space")
    assert list(host.allocations()) == ["192.168.0.64"]
    host.check_consistent()
    host.ctl("container", "remove", "/run/space", status=1)
    hosts[1].ctl("container", "remove", "/run/space")
    hosts[1].check_nothing_left()


def test_the_same_namespace_by_another_path_is_refused(host: Host, blue: str) -> None:
    host.ctl("container", "add", blue, "ipv4")
    refused = host.ctl("container", "add", "/run/netns/blue", "ipv6", "--interface=eth2", status=1)
    assert "already been configured with Calico Networking" in refused.err
    host.check_consistent()


def test_run_and_var_run_are_one(host: Host, blue: str) -> None:
    assert blue == "/var/run/netns/blue"
    short = "/run/netns/blue"
    assert host.ctl("container", "add", short, "192.168.0.1").out == f"IP 192.168.0.1 added to {short}\n"
    (key,) = host.records()
    assert "/namespace/-var-run-netns-blue/" in key
    assert "It has 192.168.0.1 on eth1." in host.ctl("container", "add", blue, "ipv4", status=1).err
    host.ctl("container", blue, "ip", "add", "192.168.0.2")
    host.ctl("container", short, "ip", "remove", "192.168.0.1")
    shown = [host.ctl("container", path, "endpoint", "show", "--output=json").out for path in (blue, short)]
    assert shown[0] == shown[1] and "192.168.0.2/32" in shown[0]
    host.ctl("container", "remove", short)
    host.check_nothing_left()


@pytest.mark.parametrize("orchestrator", ["namespace", "docker"])
def test_a_namespace_that_is_stored_by_the_other_spelling_is_found(host: Host, blue: str, orchestrator: str) -> None:
    """An older version, and the tool of 2015, took /run/netns/blue as it was typed."""
    host.ctl("container", "add", blue, "192.168.0.1")
    ((key, record),) = host.records().items()
    host.ctl("container", "remove", blue)
    old = key.replace("/namespace/-var-run-netns-blue/", f"/{orchestrator}/-run-netns-blue/")
    host.etcd.put(old, record)
    for path in (blue, "/run/netns/blue"):
        assert "192.168.0.1" in host.ctl("container", path, "endpoint", "show").out
        host.ctl("container", "add", path, "192.168.0.1", "--exist-ok")
        host.ctl("container", path, "ip", "add", "192.168.0.2")
        host.ctl("container", path, "ip", "remove", "192.168.0.2")
        assert list(host.records()) == [old] and addresses("blue", "eth1") == {"192.168.0.1/32"}
    host.ctl("container", "remove", blue)
    host.check_nothing_left()


def test_profiles_of_another_path_with_the_same_id_are_not_changed(host: Host) -> None:
    run("ip", "netns", "add", "a-b")
    host.ctl("profile", "add", "web")
    host.ctl("container", "add", "/run/netns/a-b", "ipv4")
    for words in ("endpoint show", "profile append web"):
        assert "/run/netns/a-b" in host.ctl("container", "/run/netns/a/b", *words.split(), status=1).err
    host.ctl("container", "/run/netns/a-b", "ip", "remove", "192.168.0.0")
    assert "/run/netns/a-b" in host.ctl("container", "remove", "/run/netns/a/b", status=1).err
    assert host.record()["profile_ids"] == []


def test_a_workload_without_addresses_can_be_reattached(host: Host, blue: str) -> None:
    host.ctl("profile", "add", "web")
    host.ctl("container", "add", blue, "192.168.0.9")
    host.ctl("container", blue, "profile", "append", "web")
    host.ctl("container", blue, "ip", "remove", "192.168.0.9")
    run("ip", "netns", "delete", "blue")
    run("ip", "netns", "add", "blue")
    host.ctl("container", "add", blue, "192.168.0.10")
    assert addresses("blue", "eth1") == {"192.168.0.10/32"}
    assert (host.record()["ipv4_nets"], host.record()["profile_ids"]) == (["192.168.0.10/32"], ["web"])
    assert host.record()["ipv4_gateway"] == "192.0.2.2"
    host.check_consistent()


def test_a_restarted_workload_is_reattached_although_its_pool_has_gone(host: Host, blue: str) -> None:
    host.ctl("container", "add", blue, "192.168.0.9")
    host.etcd.delete("/calico/v1/ipam/v4/pool/192.168.0.0-16")
    run("ip", "netns", "delete", "blue")
    run("ip", "netns", "add", "blue")
    host.ctl("container", "add", blue, "192.168.0.9")
    host.check_consistent()


def test_a_new_next_hop_is_for_new_interfaces(host: Host, blue: str) -> None:
    host.ctl("container", "add", blue, "192.168.0.1")
    host.register("192.0.2.3")
    host.ctl("container", blue, "ip", "add", "192.168.0.2")
    assert host.record()["ipv4_gateway"] == "192.0.2.2", "that is what the container still has"
    assert "default via 192.0.2.2 dev eth1 proto static" in routes("blue")


def test_the_hosts_own_address_is_not_given_away(host: Host, blue: str) -> None:
    host.register("192.168.0.0")
    assert host.ctl("container", "add", blue, "ipv4").out == f"IP 192.168.0.1 added to {blue}\n"
    assert "this host's own address" in host.ctl("container", blue, "ip", "add", "192.168.0.0", status=1).err


def test_an_old_address_is_not_lost_when_ip_remove_is_killed(host: Host, blue: str, tmp_path: Path) -> None:
    host.ctl("container", "add", blue, "192.168.0.1")
    host.ctl("container", blue, "ip", "add", "192.168.0.2")
    key = "/calico/ipam/v2/assignment/ipv4/block/192.168.0.0-26"
    block = json.loads(host.etcd.get(key))
    block["attributes"].append({"handle_id": None, "secondary": {}})
    block["allocations"][2] = 1
    host.etcd.put(key, block)
    for number in range(2):
        fault = {"FAULT": f"kill:{number}", "FAULT_LOG": str(tmp_path / "log")}
        words = ("container", blue, "ip", "remove", "192.168.0.2")
        host.ctl(*words, status=-9, command=[sys.executable, FAULTY], env=fault)
    host.ctl("container", "remove", blue)
    host.check_nothing_left()
