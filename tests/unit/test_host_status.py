"""How `status` assesses an agent's report: one shape, problems worst first, its age."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from calicoctl import proc, state
from calicoctl.commands import status as command
from calicoctl.datastore.keys import EndpointId
from calicoctl.desired.snapshot import INACTIVE, Snapshot
from calicoctl.diagnose import host_status
from calicoctl.errors import CalicoError
from calicoctl.felix import events, plugin_process, process
from calicoctl.felix.bgp.bird import Session
from calicoctl.felix.health import Health, Status
from calicoctl.felix.report import ReportFile
from calicoctl.workloads import libnetwork
from tests.unit.snapshots import Store

HOST = "host1"


@pytest.fixture
def health(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Health:
    """A healthy agent, which is this process, on a host of its own."""
    monkeypatch.setattr(process, "DIRECTORY", tmp_path)
    monkeypatch.setenv("HOSTNAME", HOST)
    options = {"log_dir": None, "metrics_port": None, "local_etcd": False, "bgp": True, "libnetwork": False}
    health = Health(HOST, "1", options, frozenset(["/a", "/b"]), first_update=True)
    for ability in (health.store.reads, health.store.watch):
        ability.succeeded("/a")
        ability.succeeded("/b")
    health.store.writes.succeeded("statuses")
    (tmp_path / HOST).mkdir()
    (tmp_path / HOST / "felix.pid").write_text(f"{os.getpid()} {proc.running_since(os.getpid())}\n")
    return health


def write(health: Health) -> None:
    ReportFile(process.report_file(HOST)).write(health)


def shape(value: Any) -> Any:
    return {name: shape(value[name]) for name in value} if isinstance(value, dict) else None


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    """Return what `status` prints, and the sentence that it fails with, empty where it does not."""
    why = ""
    try:
        command.prepare(["status", *arguments])()
    except CalicoError as error:
        why = str(error)
    return capsys.readouterr().out, why


def test_the_shape_is_the_same_whatever_runs(health: Health, capsys: pytest.CaptureFixture[str]) -> None:
    without = json.loads(told(capsys, "--output=json")[0])
    write(health)
    there = json.loads(told(capsys, "--output=json")[0])
    assert {**shape(without), "last_error": None} == {**shape(there), "last_error": None}
    assert there["report"]["current"] and not without["report"]["current"]
    (process.report_file(HOST)).write_text(json.dumps({"host": HOST, "resyncs": 3, "etcd": {"reachable": True}}))
    of_another_version = json.loads(told(capsys, "--output=json")[0])
    assert shape(of_another_version) == shape(without)
    assert "another version" in told(capsys)[1]


def test_the_process_for_docker_networks_does_not_run(
    health: Health, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(health)
    assert "Docker networks" not in told(capsys)[0]
    health.options["libnetwork"] = True
    write(health)
    assert "the process for Docker networks does not run: their containers" in told(capsys)[0]
    monkeypatch.setattr(plugin_process, "running", {HOST: 5}.get)
    assert "Docker networks" not in told(capsys)[0]


def test_nothing_serves_docker_networks_that_exist(
    health: Health, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(health)
    state.write(HOST, libnetwork.NETWORKS, "a" * 64, content=b"{}")
    assert "nothing serves this host's 1 Docker network, so containers there do not start" in told(capsys)[0]
    monkeypatch.setattr(plugin_process, "served_elsewhere", lambda: True)
    assert "Docker network" not in told(capsys)[0]


@pytest.mark.parametrize(
    ("theirs", "is_other"),
    [
        (["ETCD_ENDPOINTS=http://192.0.2.2:2379"], False),
        ([], False),  # it took those of the settings file
        (["ETCD_AUTHORITY=192.0.2.3:2379"], True),
        (["ETCD_AUTHORITY=192.0.2.2:2379", "ETCD_USERNAME=a", "ETCD_PASSWORD=b"], True),
        (["ETCD_AUTHORITY=192.0.2.2:2379", "DOCKER_HOST=unix:///other.sock"], True),
    ],
)
def test_an_agent_with_other_settings_than_the_command(
    theirs: list[str],
    is_other: bool,
    health: Health,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    write(health)
    file = tmp_path / "node.env"
    file.write_text("ETCD_AUTHORITY=192.0.2.2:2379\n")
    monkeypatch.setenv("ETCD_AUTHORITY", "192.0.2.2:2379")
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.setattr(proc, "strings", lambda pid, name: [f"CALICO_ENV_FILE={file}", *theirs])
    out, why = told(capsys)
    assert ("were started with other settings of etcd or Docker than this command's; " in out) == is_other and not why


def test_problems_are_listed_worst_first_in_ten_lines(health: Health, capsys: pytest.CaptureFixture[str]) -> None:
    def endpoint(name: str) -> EndpointId:
        return EndpointId(HOST, "docker", "w", name)

    health.endpoints = {endpoint(f"up{number}"): Status("up", 1, "profile x denies") for number in range(20)}
    health.endpoints |= {endpoint("stopped"): Status("down", 1, INACTIVE)}
    health.problems = {"/calico/v1/policy/profile/x/rules": "it is nonsense"}
    write(health)
    out, why = told(capsys)
    assert "Endpoints:  20 up, 1 down (1 of them stopped), 0 in error\n" in out and not why
    assert "endpoint stopped" not in out and "profile/x/rules" not in out
    assert "Problems:   21\n" in out and out.count("\n  endpoint up") == 9 and "  … and 12 more" in out
    health.endpoints |= {endpoint("bad"): Status("error", 1, "no MAC"), endpoint("off"): Status("down", 1, "no link")}
    health.problems |= {f"/calico/v1/host/{HOST}/workload/docker/w/endpoint/bad": "no MAC"}
    health.record(events.Failure("there is no iptables", "the host's firewall"))
    write(health)
    out, why = told(capsys)
    assert why == "This host has problems: 1 endpoint is in error."
    shown = out.partition("Problems:   24\n")[2].splitlines()
    assert [line.split()[1] for line in shown[:1] + shown[2:4]] == ["bad", "off", "up0"]
    assert "there is no iptables (since" in shown[1] and len(shown) == 10
    health.store.writes.failed("statuses", "etcd is full", "2026-01-01T00:00:00Z")
    write(health)
    out, why = told(capsys)
    assert "etcd cannot be written since 2026-01-01T00:00:00Z: etcd is full" in out and "etcd, and 1 endpoint" in why
    assert len(json.loads(told(capsys, "--output=json")[0])["issues"]) == 25


def test_a_container_is_called_by_its_name(health: Health, capsys: pytest.CaptureFixture[str]) -> None:
    health.endpoints = {
        EndpointId(HOST, "docker", "1" * 64, "2" * 32): Status("error", 1, "no MAC", "web"),
        EndpointId(HOST, "docker", "3" * 64, "4" * 32): Status("down", 1, "no link"),
        EndpointId(HOST, "namespace", "-run-netns-a", "5" * 32): Status("down", 1, "no link"),
    }
    write(health)
    out, _ = told(capsys)
    assert out.partition("Problems:   3\n")[2].splitlines() == [
        f"  endpoint {'2' * 12} of docker web is error: no MAC",
        f"  endpoint {'4' * 12} of docker {'3' * 12} is down: no link",
        f"  endpoint {'5' * 12} of namespace -run-netns-a is down: no link",
    ]
    first = json.loads(told(capsys, "-o", "json")[0])["endpoints_in_trouble"][0]
    assert first["workload"] == "1" * 64 and first["workload_name"] == "web" and first["endpoint"] == "2" * 32


def test_containers_that_cannot_be_connected_are_named_and_fail(
    health: Health, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    id, why = "1" * 64, "IP 192.168.0.1 is already assigned"
    health.record_labels(events.LabelsFailed(id, "web", why))
    write(health)
    out, summary = told(capsys)
    since = health.labels_failed[id]["since"]
    assert f"  container web cannot be connected as its labels ask (since {since}): {why}\n" in out
    assert summary == "This host has problems: 1 container cannot be connected as its labels ask."
    expected = [{"workload": id, "workload_name": "web", "reason": why, "since": since}]
    assert json.loads(told(capsys, "-o", "json")[0])["containers_not_connected"] == expected
    assert host_status.containers_not_connected(HOST) == expected
    (process.private(process.report_file(HOST))).unlink()
    (public,) = host_status.containers_not_connected(HOST)
    assert public["workload_name"] is None and why not in public["reason"]
    health.record_labels(events.LabelsFailed(id, "", None))
    write(health)
    assert told(capsys)[1] == ""
    health.record_labels(events.LabelsFailed(id, "web", why))
    write(health)
    monkeypatch.setattr(process, "running", lambda host: None)
    assert host_status.containers_not_connected(HOST) == [], "the agent may have died long ago"


def test_a_directory_that_is_too_large_to_be_read_is_named_first_and_fails(
    health: Health, capsys: pytest.CaptureFixture[str]
) -> None:
    health.problems = {f"/calico/v1/a{number}": "it is no JSON" for number in range(200)}
    health.skipped, health.unread = {"/calico/v1/host": "it is too large"}, {"/calico/v1/host"}
    write(health)
    out, why = told(capsys)
    assert "/calico/v1/host: " in out and why == "This host has problems: its agent cannot read a part of etcd."
    health.skipped, health.unread = {}, set()
    write(health)
    assert told(capsys)[1] == "", "invalid values are nobody else's problem"


def test_a_key_is_named_once(health: Health) -> None:
    health.problems = {"/calico/x": "etcd key /calico/x has an invalid value", "/calico/y": "its rules key is missing"}
    write(health)
    texts = [issue.text for issue in host_status.issues(host_status.read(HOST))]
    assert texts == ["etcd key /calico/x has an invalid value", "/calico/y: its rules key is missing"]


def test_one_reason_for_all_that_the_store_does_not_do_is_one_line(health: Health) -> None:
    for ability in (health.store.reads, health.store.watch):
        ability.failed("/a", "no etcd answers", "2026-01-01T00:00:00Z")
    write(health)
    (issue,) = host_status.issues(host_status.read(HOST))
    assert issue.text == "etcd cannot be read or followed since 2026-01-01T00:00:00Z: no etcd answers" and issue.fails
    health.store.reads.succeeded("/a")
    assert health.store.reads.works and not health.store.watch.works


def test_a_report_that_is_too_old_vouches_for_nothing(
    health: Health, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(health)
    clock = host_status.time.clock_gettime
    monkeypatch.setattr(host_status.time, "clock_gettime", lambda which: clock(which) + 29)
    out, why = told(capsys)
    assert "reported 29 s ago" in out and "Problems:   none" in out and not why
    monkeypatch.setattr(host_status.time, "clock_gettime", lambda which: clock(which) + 31)
    out, why = told(capsys)
    assert "has not reported for 31 s" in why and f"kill -9 {os.getpid()}" in why
    monkeypatch.setattr(host_status.time, "clock_gettime", clock)
    health.pid += 1  # another process, which has been the agent before
    write(health)
    assert "has not reported yet" in told(capsys)[1]


def test_a_report_that_cannot_be_written_does_not_make_the_agent_hang(
    health: Health, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def why() -> str:
        write(health)
        with monkeypatch.context() as later:
            clock = host_status.time.clock_gettime
            later.setattr(host_status.time, "clock_gettime", lambda which: clock(which) + 36)
            return told(capsys)[1]

    folder = process.report_file(HOST).parent
    space = os.statvfs(folder)
    for blocks, inodes, full in ((0, 99, True), (1, 99, True), (99, 0, True), (99, 99, False)):
        fields = [4096, 512, 99, blocks, blocks, 99, inodes, inodes, *space[8:]]
        monkeypatch.setattr(host_status.os, "statvfs", lambda _, fields=fields: os.statvfs_result(fields))
        said = why()
        assert "has not reported for 36 s: " in said and ("it hangs" in said, "kill" in said) == (not full, not full)
        assert (f"the file system of {folder} is full" in said) == full
        health.pid += 1  # it has been started while it was full
        said = why()
        assert "has not reported yet" in said and ("is full" in said) == full
        health.pid -= 1


def test_the_file_is_written_anew_although_nothing_has_changed(health: Health) -> None:
    file = ReportFile(process.report_file(HOST))
    file.write(health)
    first = process.report_file(HOST).read_text()
    file.write(health)
    assert process.report_file(HOST).read_text() == first and not file.is_due
    file._written_at -= 10
    assert file.is_due
    file.write(health)
    assert process.report_file(HOST).read_text() != first


SESSIONS = (
    Session("mesh4_172_18_0_12", "mesh", "172.18.0.12", "64511", "Established", "2026-01-01T00:00:00Z", 3, 2),
    Session("mesh4_172_18_0_9", "mesh", "172.18.0.9", "64511", "Established", "2026-01-01T00:00:01Z", 1, 2),
    Session("node4_192_0_2_1", "node", "192.0.2.1", "64512", "Active", "2026-01-01T00:00:02Z", error="Socket: reset"),
    Session("mesh6_fd00__9", "mesh", "fd00::9", "64511", "Connect", "2026-01-01T00:00:03Z", suspicion="no password"),
    Session("global6_fd00__fe", "global", "fd00::fe", "1", "Idle", "2026-01-01T00:00:04Z", suspicion="no password"),
)


def test_bgp_sessions_are_told_one_a_line_and_do_not_fail(health: Health, capsys: pytest.CaptureFixture[str]) -> None:
    health.bgp = events.BgpChanged(True, 7, True, SESSIONS, restarts=2, refusals=1)
    health.users = {"172.18.0.12": "host12", "172.18.0.9": "host9", "fd00::9": "host9"}
    write(health)
    out, why = told(capsys)
    assert not why
    assert out.partition("BGP:")[2].splitlines() == [
        "        2 of 5 sessions up",
        "  peer         host    kind    state        since                 in  out  last error",
        "  172.18.0.9   host9   mesh    Established  2026-01-01T00:00:01Z  1   2    -",
        "  172.18.0.12  host12  mesh    Established  2026-01-01T00:00:00Z  3   2    -",
        "  192.0.2.1    -       node    Active       2026-01-01T00:00:02Z  0   0    Socket: reset",
        "  fd00::9      host9   mesh    Connect      2026-01-01T00:00:03Z  0   0    -",
        "  fd00::fe     -       global  Idle         2026-01-01T00:00:04Z  0   0    -",
        "Problems:   2",
        "  3 of 5 BGP sessions are not up: with 192.0.2.1, fd00::9 (host9), fd00::fe; 'calicoctl node show' says which "
        "hosts' agents are alive, 'calicoctl checksystem' names rules of this host's firewall that may drop them",
        "  BGP sessions with fd00::9 (host9), fd00::fe: no password; compare the passwords of "
        "both ends (here: /etc/calico/bgp-passwords)",
    ]
    found = json.loads(told(capsys, "--output=json")[0])
    assert found["bird"] == {"pid": 7, "listens": True, "restarts": 2, "refused_configurations": 1}
    assert [session["peer"] for session in found["bgp_sessions"]] == [
        *("172.18.0.9", "172.18.0.12", "192.0.2.1", "fd00::9", "fd00::fe")
    ]
    assert found["bgp_sessions"][2] == {
        "peer": "192.0.2.1",
        "host": None,
        "kind": "node",
        "as_num": "64512",
        "state": "Active",
        "up": False,
        "since": "2026-01-01T00:00:02Z",
        "routes_in": 0,
        "routes_out": 0,
        "last_error": "Socket: reset",
        "suspicion": None,
    }


def test_a_password_that_the_kernel_has_no_room_for_is_told(health: Health, capsys: pytest.CaptureFixture[str]) -> None:
    session = Session("mesh4_10_0_0_1", "mesh", "10.0.0.1", "1", "Active", "x", error="Socket: Kernel MD5 auth failed")
    health.bgp = events.BgpChanged(True, 7, True, (session,))
    write(health)
    assert "with 10.0.0.1; set net.core.optmem_max" in told(capsys)[0]


def test_what_keeps_bgp_from_running_is_told(health: Health, capsys: pytest.CaptureFixture[str]) -> None:
    def line() -> str:
        write(health)
        out, why = told(capsys)
        assert not why
        return out.partition("\nBGP:        ")[2].partition("\n")[0]

    assert line() == "BIRD has not been started yet"
    health.bgp = events.BgpChanged(True, 7)
    assert line() == "no sessions; BIRD has no peers"
    health.record(events.Failure("BGP: there is no BIRD here: install it", "bgp"))
    assert line() == "there is no BIRD here: install it"
    health.record(events.Failure(None, "bgp"))
    health.record(events.Failure("BIRD refuses a new configuration: it says why", "bgp configuration"))
    assert line() == "no sessions; BIRD has no peers; BIRD refuses the newest configuration (see below)"
    health.bgp = events.BgpChanged()
    health.record(events.Failure("the file is refused", "bgp passwords"))
    assert line() == "the file is refused"
    health.options["bgp"] = False
    assert line() == "off (--bgp=off)"


def test_the_report_of_an_agent_without_bgp_is_readable(health: Health, capsys: pytest.CaptureFixture[str]) -> None:
    del health.options["bgp"]
    write(health)
    file = process.report_file(HOST)
    report = json.loads(file.read_text())
    del report["bird"], report["mtu"]
    file.write_text(json.dumps(report))
    process.private(file).unlink()
    out, why = told(capsys)
    assert not why and "BGP:        none; the agent is of an older version\nProblems:   1\n" in out
    assert "does no BGP: 'calicoctl node restart' replaces it, and interrupts no traffic" in out
    assert json.loads(told(capsys, "--output=json")[0])["bird"]["pid"] is None


SECRET = "hunter2"
VALUES: tuple[tuple[str, Any], ...] = (
    ("/calico/v1/policy/profile/a/rules", {"inbound_rules": [{"action": SECRET}], "outbound_rules": []}),
    ("/calico/v1/policy/profile/b/rules", SECRET),
    ("/calico/v1/policy/profile/c/rules", {"inbound_rules": [{"action": "allow", "src_net": SECRET}]}),
    ("/calico/v1/policy/profile/d/tags", {"x": SECRET}),
    ("/calico/v1/policy/profile/f/tags", [SECRET, 1]),
    ("/calico/v1/ipam/v4/pool/192.168.0.0-16", {"cidr": SECRET}),
    ("/calico/v1/config/GraceTime", SECRET),
    ("/calico/v1/config/MTU", SECRET),
    ("/calico/v1/config/CheckSenders", SECRET),
    (f"/calico/v1/host/{HOST}/config/DefaultEndpointToHostAction", SECRET),
    ("/calico/bgp/v1/global/peer_v4/192.0.2.9", {"ip": SECRET, "as_num": SECRET}),
    ("/calico/bgp/v1/global/as_num", SECRET),
    ("/calico/bgp/v1/global/node_mesh", SECRET),
    ("/calico/bgp/v1/global/HoldTime", SECRET),
    ("/calico/bgp/v1/host/other/ip_addr_v4", SECRET),
    ("/calico/bgp/v1/host/other/macs", [SECRET]),
)
ENDPOINTS = (
    {"state": SECRET},
    {"mac": SECRET},
    {"name": SECRET},
    {"ipv4_nets": [SECRET]},
    {"ipv6_gateway": SECRET},
    {"profile_ids": SECRET},
    {"workload_name": SECRET},
)


def test_what_everybody_may_read_quotes_no_values(
    health: Health, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(Snapshot(HOST))
    for key, value in VALUES:
        store.put(key, value)
    for number, fields in enumerate(ENDPOINTS):
        store.snapshot.change(store.endpoint_change(number, f"192.168.0.{number}/32", **fields))
    health.problems = store.snapshot.problems
    assert len(health.problems) >= len(VALUES) + len(ENDPOINTS) - 2
    for id, (revision, reason) in store.snapshot.unusable.items():
        health.endpoints[id] = Status("error", revision, reason, SECRET)
        health.error(f"endpoint {id.endpoint} is error: {reason}")
    write(health)
    file = process.report_file(HOST)
    assert SECRET not in file.read_text() and file.stat().st_mode & 0o777 == 0o644
    assert SECRET in process.private(file).read_text() and process.private(file).stat().st_mode & 0o077 == 0
    assert SECRET in told(capsys)[0], "root is told"

    read = Path.read_text

    def as_another(path: Path, *arguments: Any, **others: Any) -> str:
        if path.name == "felix.root.json":
            raise PermissionError
        return read(path, *arguments, **others)

    monkeypatch.setattr(Path, "read_text", as_another)
    out, why = told(capsys)
    assert SECRET not in out + why and "endpoints are in error" in why
    assert "is error: root alone is told what (sudo calicoctl status)" in out
    report = json.loads(told(capsys, "--output=json")[0])
    assert {problem["key"] for problem in report["problems"]} == set(health.problems)
