"""`export` and `apply`, as a script uses them, through each of etcd's APIs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.system.support import AS_NOBODY, CALICOCTL, Host

PROFILES = "/calico/v1/policy/profile"


@pytest.fixture
def filled(bare_host: Host) -> Host:
    """A registered host with a pool, a profile and an endpoint, whose workload does not exist."""
    bare_host.register()
    bare_host.ctl("profile", "add", "web")
    bare_host.ctl("bgp", "peer", "add", "192.0.2.9", "as", "64512")
    bare_host.etcd.put(
        f"/calico/v1/host/{bare_host.name}/workload/docker/{'a' * 64}/endpoint/{'b' * 32}",
        {"state": "active", "profile_ids": ["web"], "workload_name": "blue", "colour": "green"},
    )
    return bare_host


def test_a_file_is_exported_changed_and_applied(filled: Host, tmp_path: Path) -> None:
    host, file = filled, tmp_path / "network.yaml"
    assert host.ctl("export", str(file)).out == f"The configuration is in {file}\n"
    assert host.ctl("export").out == host.ctl("export", "-").out == file.read_text()
    assert host.ctl("apply", str(file), "--prune").out == "No difference.\n"
    document = yaml.safe_load(file.read_text())
    assert document["endpoints"] == {f"{host.name}/docker/blue": ["web"]}
    document["profiles"]["web"]["inbound"].insert(0, "deny udp to ports 53")
    document["profiles"]["no"] = {}
    document["endpoints"][f"{host.name}/docker/blue"] = ["no"]
    del document["bgp"]["peers"]["192.0.2.9"], document["pools"]["fd80:24e2:f998:72d6::/64"]
    file.write_text(yaml.safe_dump(document))
    said = host.ctl("apply", str(file), "--prune", "--dry-run", status=3)
    assert said.out.splitlines() == [
        "- pool fd80:24e2:f998:72d6::/64",
        "+ profile no",
        "+ profile no: tag no",
        "+ profile no: inbound rule 1: allow from tag no",
        "+ profile no: outbound rule 1: allow",
        "~ profile web: + inbound rule 1: deny udp to ports 53",
        "- bgp peer 192.0.2.9",
        f"~ endpoint {host.name}/docker/blue: profiles from web to no",
    ]
    assert said.err == "8 differences; nothing was changed.\n"
    found = yaml.safe_load(host.ctl("apply", str(file), "--prune", "-o", "yaml").out)
    assert found["changed"] and len(found["differences"]) == 8
    assert json.loads(host.etcd.get(f"{PROFILES}/web/rules"))["inbound_rules"][0]["action"] == "deny"
    (record,) = host.records().values()
    assert record["profile_ids"] == ["no"] and record["colour"] == "green"
    assert "192.0.2.9" not in host.ctl("bgp", "peer", "show").out
    assert host.ctl("apply", "-", "--prune", "--dry-run", input=host.ctl("export").out).out == "No difference.\n"
    # a profile goes with its directory
    host.ctl("apply", "-", "--prune", input="profiles: {no: {}}")
    assert host.ctl("profile", "show", "-o", "yaml").out == "- name: 'no'\n"


def test_what_fails_changes_nothing(filled: Host, tmp_path: Path) -> None:
    host, file = filled, tmp_path / "network.yaml"
    before = host.etcd.tree("/calico")
    file.write_text("profiles:\n  db: {}\n  lb:\n    inbound:\n    - alow\n")
    said = host.ctl("apply", str(file), status=1)
    assert said.out == "" and said.err.startswith(f"{file}:5: a rule begins with 'allow', 'deny' or 'log', not 'alow'")
    assert "1 endpoint has it (blue)" in host.ctl("apply", "-", "--prune", input="profiles: {db: {}}", status=1).err
    host.ctl("apply", str(file), "--bad", status=2)
    file.write_bytes(b"x\xff")
    assert "is not UTF-8 text" in host.ctl("apply", str(file), status=1).err
    assert host.etcd.tree("/calico") == before
    nobody = host.ctl("export", command=[*AS_NOBODY, CALICOCTL])  # needs no root
    assert nobody.out == host.ctl("export").out


def test_several_at_once_lose_nothing(filled: Host, tmp_path: Path) -> None:
    """Each declares profiles and a pool of its own, and others that all declare alike."""
    host, names = filled, ("a", "b", "c")
    for number, name in enumerate(names, start=1):
        pools: dict[str, dict] = {f"10.{number}.0.0/16": {}, "10.9.0.0/16": {"masquerade": True}}
        profiles = {f"{name}{number}": {} for number in range(30)}
        shared = {"shared": {"tags": ["t"], "inbound": ["allow"]}, "web": {"tags": ["web", "t"]}}
        (tmp_path / name).write_text(yaml.safe_dump({"pools": pools, "profiles": {**profiles, **shared}}))
    started = [host.start("apply", str(tmp_path / name)) for name in names]
    for process in started:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and out and not err, err
    there = {one["name"] for one in json.loads(host.ctl("profile", "show", "-o", "json").out)}
    assert there == {"web", "shared", *(f"{name}{number}" for name in names for number in range(30))}
    assert json.loads(host.etcd.get(f"{PROFILES}/shared/tags")) == ["t"]
    assert json.loads(host.etcd.get(f"{PROFILES}/web/tags")) == ["web", "t"]
    found = {one["cidr"]: one["masquerade"] for one in json.loads(host.ctl("pool", "show", "--ipv4", "-o", "json").out)}
    own = {f"10.{number}.0.0/16": False for number in range(1, len(names) + 1)}
    assert {cidr: on for cidr, on in found.items() if cidr.startswith("10.")} == {**own, "10.9.0.0/16": True}
