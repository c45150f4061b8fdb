"""What is told of BGP sessions, in `status`, in metrics and in `diags`, and that passwords are told nowhere.

Two hosts with real BIRDs, which all tests of this file share; host11 has a router as its peer that does not exist.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.fabric import FabricHost, fabric
from tests.system.support import Etcd, wait_for

SECRETS = ("correct horse", "battery#staple")
ROUTER = "172.18.0.99"
PORT = 9091
DIR = "/run/calico"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[FabricHost]]:
    etcd = Etcd(tmp_path_factory.mktemp("etcd"))
    etcd.start(None, f"--listen-client-urls=http://0.0.0.0:{etcd.port}", f"--advertise-client-urls={etcd.url}")
    etcd.await_ready()
    with fabric(etcd, 0, 0) as hosts:
        for host in hosts:
            host.start_agent(f"--metrics-port={PORT}")
        hosts[0].add("a", "192.168.0.1", "fd80:24e2:f998:72d6::1")
        hosts[1].add("b", "192.168.0.65")
        hosts[0].ctl("node", "bgp", "peer", "add", ROUTER, "as", "64999")
        yield hosts
    etcd.stop(9)


def status(host: FabricHost) -> dict:
    return json.loads(host.ctl("status", "--output=json").out)


def session(host: FabricHost, peer: str) -> dict:
    return next((found for found in status(host)["bgp_sessions"] if found["peer"] == peer), {})


def await_sessions(hosts: list[FabricHost], state: bool) -> None:
    """Wait until all sessions between the two hosts are up, or until none is."""

    def reached() -> bool:
        sessions = [one for host in hosts for one in status(host)["bgp_sessions"] if one["peer"] != ROUTER]
        return len(sessions) == 4 and all(one["up"] is state for one in sessions)

    wait_for(reached, f"sessions {'up' if state else 'down'}", 30)


def set_passwords(host: FabricHost, *lines: str, mode: int = 0o600) -> None:
    file = host.home / "etc/bgp-passwords"
    file.touch(0o600)
    file.write_text("".join(f"{line}\n" for line in lines))
    file.chmod(mode)


def problems(host: FabricHost) -> str:
    return host.ctl("status").out.partition("\nProblems:")[2]


def test_status_shows_each_session_and_one_that_is_down_is_no_failure(two: list[FabricHost]) -> None:
    one, other = two
    await_sessions(two, True)
    wait_for(lambda: session(one, other.ip)["routes_in"], "routes")
    up = {"host": "host12", "kind": "mesh", "as_num": "64511", "state": "Established", "up": True, "last_error": None}
    found = status(one)
    assert [(one["peer"], one["up"]) for one in found["bgp_sessions"]] == [
        *((other.ip, True), (ROUTER, False), (other.ip6, True))
    ]
    first, router, third = found["bgp_sessions"]
    assert first == {**first, **up, "routes_in": 1, "routes_out": 1, "suspicion": None}
    assert third == {**third, **up, "routes_in": 0, "routes_out": 1}
    assert router["kind"] == "node" and router["host"] is None and router["as_num"] == "64999"
    assert first.keys() == router.keys() and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first["since"])
    assert found["bird"]["pid"] == int((one.home / "run/host11/bird.pid").read_text()) and found["bird"]["listens"]
    text = one.ctl("status").out
    assert "\nBGP:        2 of 3 sessions up\n" in text
    assert re.search(rf"\n  {other.ip}  +host12  mesh  +Established  +{first['since']}  1   1    -\n", text), text
    assert re.search(rf"\n  {ROUTER}  +-  +node  +(Connect|Active|Idle)  +\S+  0   0 ", text), text
    assert f"1 of 3 BGP sessions is not up: with {ROUTER}" in problems(one)
    assert "\nProblems:   none" in other.ctl("status").out

    scraped = one.run("curl", "-s", f"http://127.0.0.1:{PORT}/metrics").out
    for line in (
        *("sessions_configured 3.0", "sessions_up 2.0", 'routes{direction="in"} 1.0', 'routes{direction="out"} 2.0'),
        *("bird_restarts_total 0.0", "refused_configurations_total 0.0"),
    ):
        assert f"\ncalico_felix_bgp_{line}\n" in scraped, line


def test_sessions_need_the_same_password_at_both_ends_and_what_may_be_wrong_is_told(two: list[FabricHost]) -> None:
    one, other = two
    set_passwords(one, f"mesh {SECRETS[0]}")
    await_sessions(two, False)
    wait_for(lambda: "may have no password for this host" in problems(one), "what the end with a password says")
    wait_for(lambda: "this host has none for it" in problems(other), "what the end without one says")
    assert f"with {other.ip} (host12), {other.ip6} (host12): the peer may have no" in problems(one)
    assert ROUTER not in problems(one).partition("may have no password")[0].rpartition("\n")[2], "it has none either"

    set_passwords(other, f"mesh {SECRETS[1]}")
    wait_for(lambda: "may have another password" in problems(one) and "another" in problems(other), "what both say")

    set_passwords(other, "# changed", "mesh wrong", f"{one.ip} {SECRETS[0]}", f"{one.ip6} {SECRETS[0]}")
    await_sessions(two, True)
    wait_for(lambda: "password" not in problems(one) + problems(other), "the end of the suspicion", 10)

    # what is refused changes nothing
    since = session(other, one.ip)["since"]
    set_passwords(other, f"mesh {SECRETS[1]}", mode=0o640)
    wait_for(lambda: "bgp-passwords has mode 0640" in problems(other), "the refusal of the mode")
    set_passwords(other, "", f"mesh {SECRETS[1]}", f'{one.ip} {SECRETS[1]}"')
    wait_for(lambda: "bgp-passwords, line 3: the password contains a quotation" in problems(other), "of a line")
    assert "chown" not in problems(other) and SECRETS[1] not in problems(other)
    set_passwords(other, f"mesh {SECRETS[0]}")
    wait_for(lambda: "\nProblems:   none" in other.ctl("status").out, "the end of the problem")
    assert session(other, one.ip)["up"] and session(other, one.ip)["since"] == since


def test_a_password_is_in_no_process_log_report_or_archive(two: list[FabricHost], tmp_path: Path) -> None:
    one, _ = two
    set_passwords(one, f"mesh {SECRETS[0]}", f"{ROUTER} {SECRETS[1]}")
    configuration = one.home / "run/host11/bird/conf"
    wait_for(lambda: all(f'password "{secret}"' in configuration.read_text() for secret in SECRETS), "configuration")
    await_sessions(two, True)
    assert configuration.stat().st_mode & 0o777 == 0o640 and configuration.stat().st_uid == 0
    file = Path(json.loads(one.ctl("diags", "--output=json", env={"TMPDIR": str(tmp_path)}).out)["file"])
    with tarfile.open(file) as archive:
        texts = {member.name.rpartition("/")[2]: archive.extractfile(member).read().decode() for member in archive}
    for name, words in (
        ("bird.conf", 'password "(left out)";'),
        ("bird.log", ""),
        ("bird.out", ""),
        ("bird-protocols.txt", "BGP state:          Established"),
        ("bird-routes.txt", "192.168.0.64/26"),
        ("vxlan.txt", ""),
        ("forwarding.txt", "33:33:00:00:00:01"),
        ("checksystem.json", "BIRD runs for the host agent"),
        ("status.json", '"bgp_sessions": ['),
    ):
        assert words in texts[name] and "could not be collected" not in texts[name], name
    texts["ps"] = one.run("ps", "-eo", "args").out
    texts["log"] = one.log()
    texts["metrics"] = one.run("curl", "-s", f"http://127.0.0.1:{PORT}/metrics").out
    texts["report"] = (one.home / "run/host11/felix.json").read_text()
    texts["BIRD's log"] = (one.home / "run/host11/bird/log").read_text()
    texts["etcd"] = json.dumps(one.etcd.tree("/calico"))
    for secret in SECRETS:
        assert [name for name, text in texts.items() if secret in text or secret.split()[-1] in text] == []
