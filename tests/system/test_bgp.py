"""Routes between hosts, by BGP: real BIRDs on several hosts."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from calicoctl.felix.bgp.bird import Refused
from calicoctl.felix.bgp.instance import Instance
from tests.system.agent import holds
from tests.system.fabric import FabricHost, await_recovery, fabric
from tests.system.support import AS_NOBODY, Etcd, Host, gone, run, wait_for

V6 = "fd80:24e2:f998:72d6::"
FOREIGN = "172.18.0.13"
FOREIGN_ROUTES = ("192.168.200.0/26", "10.9.0.0/16", "0.0.0.0/0")
CHANNEL = "ipv4 { import all; export all; };"
MARK = "203.0.113.99"
KERNEL = "proto kernel"
"""What is in a line about a route that the kernel has added itself, as for a link-local address, which may be late."""
PATIENCE = 20


@pytest.fixture
def one(open_etcd: Etcd) -> Iterator[FabricHost]:
    """A host without an agent."""
    with fabric(open_etcd, 0) as (host,):
        yield host


@pytest.fixture
def two(open_etcd: Etcd) -> Iterator[list[FabricHost]]:
    """Two hosts on one network, with running agents."""
    with fabric(open_etcd, 0, 0) as hosts:
        for host in hosts:
            host.start_agent()
        yield hosts


@pytest.fixture
def three(open_etcd: Etcd) -> Iterator[list[FabricHost]]:
    """Two hosts with running agents, and one more machine."""
    with fabric(open_etcd, 0, 0, 0) as hosts:
        for host in hosts[:2]:
            host.start_agent()
        yield hosts


def connect(one: FabricHost, other: FabricHost) -> None:
    """Connect a namespace on each of two hosts, which may reach each other: `a` and `b`."""
    one.add("a", "192.168.0.1", f"{V6}1")
    other.add("b", "192.168.1.1", f"{V6}41")
    one.ctl("profile", "add", "web")
    one.set_profiles("a", "web")
    other.set_profiles("b", "web")
    for host, name, address in ((one, "a", "192.168.0.1"), (other, "b", "192.168.1.1")):
        host.ctl("container", "add", f"/var/run/netns/{name}", address, "--exist-ok", "--wait=10")


def learned(host: FabricHost, version: int = 4) -> dict[str, str | None]:
    """Return the destinations of the routes that a host has by BGP, each with its gateway, None for a blackhole."""
    return {route["dst"]: route.get("gateway") for route in host.routes("proto", "bird", version=version)}


def await_routes(host: FabricHost, expected: dict[str, str | None], version: int = 4) -> None:
    wait_for(lambda: learned(host, version) == expected, f"{expected} and not {learned(host, version)}", PATIENCE)


def folder(host: FabricHost) -> Path:
    """Return the folder of a host's BIRD."""
    return host.home / "run" / host.name / "bird"


def ask(host: FabricHost, *words: str) -> str:
    """Return what a host's BIRD answers, nothing while it does not serve."""
    return run("birdc", "-s", str(folder(host) / "ctl"), *words, check=False).out


def sessions(host: FabricHost) -> dict[str, tuple[str, str]]:
    """Return the state and the time of the last change of each of a host's sessions, by its name, from BIRD itself."""
    lines = (line.split() for line in ask(host, "show", "protocols").splitlines())
    return {words[0]: (words[3], " ".join(words[4:6])) for words in lines if len(words) > 5 and words[1] == "BGP"}


def await_sessions(host: FabricHost, *names: str) -> None:
    """Wait until a host has these sessions, and all are up."""

    def are_up() -> bool:
        found = sessions(host)
        return set(found) == set(names) and all(state == "up" for state, _ in found.values())

    wait_for(are_up, f"the sessions {names}", PATIENCE)


def bird_of(host: FabricHost) -> int:
    return int((host.home / "run" / host.name / "bird.pid").read_text())


def status(host: FabricHost) -> dict:
    return json.loads(host.ctl("status", "--output=json", status=None).out)


def troubles(host: FabricHost) -> dict[str, str]:
    return {trouble["subject"]: trouble["error"] for trouble in status(host)["troubles"]}


@contextmanager
def steady_routes(host: FabricHost, peer: FabricHost) -> Iterator[None]:
    """Check that inside of `with` no route of the peer is added, changed or deleted, and no unicast route of the host.

    After a crash, BIRD writes all routes of IPv6 anew in its host's kernel, blackholes by deleting them first.
    """
    monitors = [subprocess.Popen(one.inside("ip", "monitor", "route"), stdout=subprocess.PIPE) for one in (host, peer)]
    for monitor, one in zip(monitors, (host, peer)):
        while not select.select([monitor.stdout], [], [], 0.05)[0]:  # until it listens
            for change in ("add", "delete"):
                one.run("ip", "route", change, "blackhole", MARK)
    before = one_by_one(host)
    try:
        yield
    finally:
        for monitor in monitors:
            monitor.terminate()
    here, there = (
        [line for line in monitor.communicate()[0].decode().splitlines() if MARK not in line and KERNEL not in line]
        for monitor in monitors
    )
    assert there == []
    assert [line for line in here if line.startswith("Deleted") and "blackhole" not in line] == []
    wait_for(lambda: one_by_one(host) == before, "the routes as before", PATIENCE)


def one_by_one(host: FabricHost) -> list[str]:
    return sorted(json.dumps(route) for version in (4, 6) for route in host.routes(version=version))


def foreign_router(host: FabricHost, text: str) -> None:
    """Run a BIRD of the test's own on a machine."""
    (host.home / "bird.conf").write_text(
        f"""
        router id {host.ip};
        protocol device {{ }}
        protocol static {{ ipv4; {" ".join(f'route {cidr} via "eth0";' for cidr in FOREIGN_ROUTES)} }}
        {text}
        """
    )
    run("ip", "netns", "exec", host.namespace, "bird", "-c", str(host.home / "bird.conf"), "-s", str(host.home / "ctl"))


def test_a_mesh(two: list[FabricHost]) -> None:
    one, other = two
    connect(one, other)
    await_routes(one, {"192.168.0.0/26": None, "192.168.1.0/26": other.ip})
    await_routes(one, {f"{V6}/122": None, f"{V6}40/122": other.ip6}, 6)
    await_routes(other, {"192.168.1.0/26": None, "192.168.0.0/26": one.ip})
    assert one.reaches("a", "192.168.1.1", 5) and one.reaches("a", f"{V6}41", 5)
    assert other.reaches("b", "192.168.0.1", 5) and other.reaches("b", f"{V6}1", 5)
    for version in (4, 6):
        (route,) = [route for route in one.routes("proto", "bird", version=version) if "gateway" in route]
        assert route["prefsrc"] == (one.ip if version == 4 else one.ip6), "what the host itself sends comes from there"
    names = {f"mesh4_{other.ip.replace('.', '_')}", f"mesh6_{other.ip6.replace(':', '_')}"}
    await_sessions(one, *names)
    established = ["Established"] * 2
    wait_for(lambda: [session["state"] for session in status(one)["bgp_sessions"]] == established, "reports", PATIENCE)
    assert troubles(one) == {}

    # what needs no reset resets no session
    before = sessions(one)
    other.add("c", "192.168.0.9")
    await_routes(one, {"192.168.0.0/26": None, "192.168.1.0/26": other.ip, "192.168.0.9": other.ip})
    one.ctl("pool", "add", "10.77.0.0/16")
    one.ctl("bgp", "peer", "add", "172.18.0.99", "as", "64999")
    other.add("d", "10.77.0.1")
    await_routes(
        one,
        {"192.168.0.0/26": None, "192.168.1.0/26": other.ip, "192.168.0.9": other.ip, "10.77.0.0/26": other.ip},
    )
    wait_for(lambda: "global4_172_18_0_99" in sessions(one), "the new peer", PATIENCE)
    assert {name: sessions(one)[name] for name in names} == before
    one.ctl("bgp", "peer", "remove", "172.18.0.99")
    other.ctl("container", "/var/run/netns/c", "ip", "remove", "192.168.0.9")
    await_routes(one, {"192.168.0.0/26": None, "192.168.1.0/26": other.ip, "10.77.0.0/26": other.ip})
    await_sessions(one, *names)
    assert sessions(one) == before
    one.ctl("pool", "add", "10.78.0.0/16", "--vxlan=always")
    one.ctl("container", "/var/run/netns/a", "ip", "add", "10.78.0.1")
    wait_for(lambda: "10.78.0.1" in json.dumps(one.routes()), "the address", PATIENCE)
    assert holds(lambda: not any(cidr.startswith("10.78") for cidr in (*learned(one), *learned(other))), 1)

    # an AS number of its own makes a session of two AS numbers
    other.ctl("node", f"--ip={other.ip}", f"--ip6={other.ip6}", "--as=64777")
    wait_for(lambda: "Neighbor AS:      64777" in ask(one, "show", "protocols", "all"), "the AS number", PATIENCE)
    await_sessions(one, *names)
    await_routes(one, {"192.168.0.0/26": None, "192.168.1.0/26": other.ip, "10.77.0.0/26": other.ip})
    one.ctl("config", "bgp", "HoldTime", "9")
    wait_for(lambda: "/9" in ask(one, "show", "protocols", "all"), "the hold time", PATIENCE)
    wait_for(lambda: "Restart time: 9" in ask(one, "show", "protocols", "all"), "the peer's restart time", PATIENCE)
    one.ctl("bgp", "node-mesh", "off")
    await_routes(one, {"192.168.0.0/26": None})
    await_routes(other, {"192.168.1.0/26": None, "10.77.0.0/26": None})
    wait_for(lambda: sessions(one) == {}, "the end of the sessions", PATIENCE)
    assert not one.reaches("a", "192.168.1.1")


def test_peers_that_are_no_hosts(three: list[FabricHost]) -> None:
    one, other, foreign = three
    connect(one, other)
    one.ctl("bgp", "node-mesh", "off")
    one.ctl("bgp", "peer", "add", FOREIGN, "as", "64511")
    for host in (one, other):
        wait_for(lambda h=host: list(sessions(h)) == ["global4_172_18_0_13"], "the configuration", PATIENCE)
    foreign_router(
        foreign,
        "\n".join(
            f"protocol bgp client{host.number} {{ local {FOREIGN} as 64511; neighbor {host.ip} as 64511; rr client; "
            f"{CHANNEL} }}"
            for host in (one, other)
        ),
    )
    # the reflector hands on next hops as they are; of its own routes, those in pools are taken
    await_routes(one, {"192.168.0.0/26": None, "192.168.1.0/26": other.ip, "192.168.200.0/26": FOREIGN})
    await_routes(other, {"192.168.1.0/26": None, "192.168.0.0/26": one.ip, "192.168.200.0/26": FOREIGN})
    assert one.reaches("a", "192.168.1.1", 5)
    (session,) = status(one)["bgp_sessions"]
    assert (session["peer"], session["kind"]) == (FOREIGN, "global")

    # a peer of one host, in another AS, in place of the one of all
    one.ctl("bgp", "peer", "remove", FOREIGN)
    one.ctl("node", "bgp", "peer", "add", FOREIGN, "as", "64900")
    wait_for(lambda: list(sessions(one)) == ["node4_172_18_0_13"] and sessions(other) == {}, "the peers", PATIENCE)
    await_routes(other, {"192.168.1.0/26": None})
    run("birdc", "-s", str(foreign.home / "ctl"), "down")
    foreign_router(
        foreign,
        f"protocol bgp host {{ local {FOREIGN} as 64900; neighbor {one.ip} as 64511; {CHANNEL} }}",
    )
    await_routes(one, {"192.168.0.0/26": None, "192.168.200.0/26": FOREIGN})
    wait_for(
        lambda: "192.168.0.0/26" in run("birdc", "-s", str(foreign.home / "ctl"), "show", "route").out,
        "the host's block at its peer",
        PATIENCE,
    )


def test_no_end_but_a_removal_changes_a_route(two: list[FabricHost]) -> None:
    one, other = two
    connect(one, other)
    expected = {"192.168.1.0/26": None, "192.168.0.0/26": one.ip}
    await_routes(one, {"192.168.0.0/26": None, "192.168.1.0/26": other.ip})
    await_routes(other, expected)
    await_routes(other, {f"{V6}40/122": None, f"{V6}/122": one.ip6}, 6)
    names = tuple(sessions(one))
    with steady_routes(one, other):
        # BIRD is killed
        killed = bird_of(one)
        os.kill(killed, 9)
        wait_for(lambda: gone(killed) and bird_of(one) != killed, "another BIRD", PATIENCE)
        await_sessions(one, *names)
        wait_for(lambda: status(one)["bird"]["restarts"] == 1, "the count", PATIENCE)
        await_recovery(one, other)  # of two crashes, the second one deletes the peer's routes
        # the agent is killed, perhaps before it has written down which process BIRD is
        running = bird_of(one)
        os.kill(one.pid, 9)
        one.start_agent()
        assert bird_of(one) == running
        os.kill(one.pid, 9)
        (one.home / "run" / one.name / "bird.pid").unlink()
        one.start_agent()
        assert bird_of(one) == running
        # an upgrade
        one.ctl("node", "restart")
        assert bird_of(one) == running
        # a stop, and a start
        said = one.ctl("node", "stop", "--force").out
        assert f"BIRD (process {running}) keeps running" in said
        one.start_agent()
        assert bird_of(one) == running
        # both are killed
        os.kill(one.pid, 9)
        os.kill(running, 9)
        one.start_agent()
        assert bird_of(one) != running
        await_sessions(one, *names)
        await_sessions(other, *(name for name in sessions(other)))
        await_recovery(one, other)
    assert one.reaches("a", "192.168.1.1", 5)

    # without BGP, BIRD ends, and its peers withdraw its routes at once
    one.ctl("node", "stop", "--force")
    running = bird_of(one)
    one.start_agent("--bgp=off")
    wait_for(lambda: gone(running) and not folder(one).exists(), "BIRD's end", PATIENCE)
    await_routes(other, {"192.168.1.0/26": None})
    assert learned(one) == {} and learned(one, 6) == {} and status(one)["bgp"] is False
    said = one.ctl("node", f"--ip={one.ip}", f"--ip6={one.ip6}")
    assert "--bgp=on has no effect" in said.err
    one.ctl("node", "stop", "--force")
    one.start_agent()
    await_routes(other, expected)
    running = bird_of(one)
    one.ctl("node", "remove", "--remove-endpoints")
    await_routes(other, {"192.168.1.0/26": None})
    assert gone(running) and learned(one) == {} and learned(one, 6) == {}
    wait_for(lambda: not list((one.home / "run").glob("*")), "the end of the command server")


def test_of_two_hosts_the_one_with_the_higher_address_connects_first(two: list[FabricHost]) -> None:
    """BIRD takes a second connection, just after a session is up on the first one, for another crash of its peer."""
    one, other = two
    connect(one, other)
    await_routes(one, {"192.168.0.0/26": None, "192.168.1.0/26": other.ip})
    await_routes(other, {"192.168.1.0/26": None, "192.168.0.0/26": one.ip})
    await_sessions(one, *sessions(one))

    def connections(host: FabricHost) -> list[str]:
        return host.run("ss", "-Htn", "state", "established", "dport = :179").out.splitlines()

    for host, peer in ((other, one), (one, other)):
        waiting, killed = bird_of(peer), bird_of(host)
        began = time.monotonic()
        os.kill(waiting, signal.SIGSTOP)  # the kernel accepts connections for it
        os.kill(killed, 9)
        wait_for(lambda h=host, k=killed: gone(k) and bird_of(h) != k, "another BIRD", PATIENCE)
        while host is one and time.monotonic() < began + 4:
            found = connections(host)
            assert not found or time.monotonic() > began + 4.4  # BIRD shortens its pause by up to a quarter
        wait_for(lambda h=host: len(connections(h)) == 2, "its connections", PATIENCE)
        os.kill(waiting, signal.SIGCONT)
        await_sessions(host, *sessions(host))
        await_sessions(peer, *sessions(peer))

    # a BIRD that an earlier version has started gets these pauses at its next start: they would reset its sessions
    await_recovery(one, other)
    one.ctl("node", "stop", "--force")
    conf = folder(one) / "conf"
    conf.write_text(re.sub(r"^(  neighbor .*;) connect delay time .*;", r"\1", conf.read_text(), flags=re.MULTILINE))
    before, text = sessions(one), conf.read_text()
    assert "Reconfiguration in progress" in ask(one, "configure")
    wait_for(lambda: not before.items() & sessions(one).items(), "the end of the sessions", PATIENCE)
    await_sessions(one, *before)
    before = sessions(one)
    one.start_agent()
    one.ctl("pool", "add", "10.77.0.0/16")
    one.add("c", "10.77.0.1")
    wait_for(lambda: "10.77.0.0/26" in ask(one, "show", "route"), "its configuration", PATIENCE)
    assert sessions(one) == before and "connect delay time 6" not in text + conf.read_text()
    os.kill(bird_of(one), 9)
    wait_for(lambda: conf.read_text().count("connect delay time 6") == 2, "another BIRD", PATIENCE)


def test_bird_without_the_store(two: list[FabricHost]) -> None:
    """A dead one is started again with the configuration that it had in this boot."""
    one, other = two
    connect(one, other)
    await_routes(other, {"192.168.1.0/26": None, "192.168.0.0/26": one.ip})
    await_routes(one, {"192.168.0.0/26": None, "192.168.1.0/26": other.ip})
    await_routes(other, {f"{V6}40/122": None, f"{V6}/122": one.ip6}, 6)
    names = tuple(sessions(one))
    running, agent = bird_of(one), one.pid
    command, environment = (
        Path(f"/proc/{agent}/{name}").read_text().split("\0")[:-1] for name in ("cmdline", "environ")
    )
    with steady_routes(one, other):
        one.etcd.stop(9)
        os.kill(agent, 9)
        os.kill(running, 9)
        started = subprocess.Popen(one.inside("env", "-i", *environment, *command))
        wait_for(lambda: bird_of(one) != running, "another BIRD", PATIENCE)
        await_sessions(one, *names)
        await_recovery(one, other)
        assert status(one)["bird"]["pid"] == bird_of(one)
    assert one.reaches("a", "192.168.1.1", 5)
    started.terminate()
    started.wait()


def test_where_bgp_cannot_run_the_host_works_without(one: FabricHost) -> None:
    # routes of another BIRD
    one.run("ip", "route", "add", "blackhole", "198.51.100.0/24", "proto", "bird")
    said = one.ctl("node", f"--ip={one.ip}", f"--ip6={one.ip6}")
    assert "Warning: BGP: there are routes of another BIRD" in said.err and "flush proto bird" in said.err
    assert troubles(one)["bgp"].startswith("BGP: there are routes of another BIRD")
    one.add("a", "192.168.0.1")
    ping = ("ping", "-n", "-c1", "-W1", "192.168.0.1")
    wait_for(lambda: one.run(*ping, check=False).status == 0, "its workload", PATIENCE)
    assert list(learned(one)) == ["198.51.100.0/24"]
    one.run("ip", "route", "flush", "proto", "bird")
    # another process at the port
    listener = subprocess.Popen(
        one.inside(
            "python3", "-c", "import socket; s = socket.create_server(('', 179)); print(1, flush=True); input()"
        ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert listener.stdout.readline() == b"1\n"
    one.ctl("node", "restart")
    assert "another process listens on port 179" in troubles(one)["bgp"]
    listener.communicate(b"\n")
    # another BIRD
    foreign_router(one, "")
    one.ctl("node", "restart")
    assert "another BIRD (process" in troubles(one)["bgp"] and learned(one) == {}
    run("birdc", "-s", str(one.home / "ctl"), "down")
    # no BIRD, one of another version, one that lacks its user
    programs = one.home / "programs"
    programs.mkdir()
    for text, why in (
        ("echo BIRD version 3.0.1 >&2", "is version 3.0.1, and version 2 is needed"),
        ("exit 3", "of no version"),
    ):
        (programs / "bird").write_text(f"#!/bin/sh\n{text}\n")
        (programs / "bird").chmod(0o755)
        one.ctl("node", "stop", "--force")
        said = one.ctl("node", f"--ip={one.ip}", env={"PATH": f"{programs}:{os.environ['PATH']}"})
        assert why in said.err
    one.ctl("node", "stop", "--force")
    one.ctl("node", f"--ip={one.ip}")
    assert troubles(one) == {}
    await_routes(one, {"192.168.0.0/26": None})


def test_a_users_process_that_is_named_bird_is_none(one: FabricHost) -> None:
    """It neither keeps BGP off, nor has the agent remove anything, whatever its arguments are."""
    victim = Path("/run/bird/of-another-program")  # what /run/calico/../bird would be
    victim.parent.mkdir(exist_ok=True)
    victim.touch()
    one.run("mkdir", "/run/calico/former")
    named = "import ctypes; ctypes.CDLL(None).prctl(15, b'bird'); print(1, flush=True); input()"
    program = ("/usr/bin/python3", "-c", named, "-c")
    fakes = [
        subprocess.Popen(one.inside(*AS_NOBODY, *command), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for command in (
            program,
            (*program, "/run/calico/../bird/conf"),
            (*program, "/run/calico/former/bird/conf"),
            (*program, f"/run/calico/{one.name}/bird/conf"),
            ("unshare", "--user", "--map-root-user", *program, "/run/calico/former/bird/conf"),
        )
    ]
    try:
        for fake in fakes:
            assert fake.stdout.readline() == b"1\n"
        one.start_agent()
        one.add("a", "192.168.0.1")
        await_routes(one, {"192.168.0.0/26": None})
        running = bird_of(one)
        os.kill(running, 9)
        wait_for(lambda: gone(running) and status(one)["bird"]["restarts"] == 1, "another BIRD", PATIENCE)
        await_routes(one, {"192.168.0.0/26": None})
        assert troubles(one) == {}
        one.ctl("node", "stop", "--force")
        one.ctl("node", "remove", "--remove-endpoints")
        assert learned(one) == {} and victim.exists()
        assert [fake.poll() for fake in fakes] == [None] * len(fakes)
    finally:
        for fake in fakes:
            fake.communicate(b"\n")
        victim.unlink()


def test_a_route_that_another_program_deletes_is_back_at_once(two: list[FabricHost]) -> None:
    """BIRD itself notices it only after 20 s. The address is a second one of its network, which is left."""
    one, other = two
    one.run("ip", "address", "add", "172.18.0.111/24", "dev", "eth0")
    one.run("ip", "-batch", "-", input=f"address del {one.ip}/24 dev eth0\naddress add {one.ip}/24 dev eth0")
    one.run("ip", "route", "replace", "default", "via", "172.18.0.1")
    connect(one, other)
    expected = {"192.168.0.0/26": None, "192.168.1.0/26": other.ip}
    expected6 = {f"{V6}/122": None, f"{V6}40/122": other.ip6}
    await_routes(one, expected)
    await_routes(one, expected6, 6)
    for words in (
        ("-4", "route", "del", "192.168.1.0/26"),
        ("-4", "route", "flush", "proto", "bird"),
        ("-6", "route", "flush", "proto", "bird"),
        ("address", "del", f"{one.ip}/24", "dev", "eth0"),
    ):
        one.run("ip", *words)
        if "address" in words:
            wait_for(lambda: "192.168.1.0/26" not in learned(one), "the loss", PATIENCE)
            one.run("ip", "address", "add", f"{one.ip}/24", "dev", "eth0")
        wait_for(lambda: (learned(one), learned(one, 6)) == (expected, expected6), f"all routes after {words}", 10)
    assert troubles(one) == {}
    os.kill(bird_of(one), signal.SIGSTOP)
    wait_for(lambda: "is suspended" in troubles(one).get("bgp", ""), "the suspension in the status", PATIENCE)
    os.kill(bird_of(one), signal.SIGCONT)
    wait_for(lambda: troubles(one) == {}, "its end", PATIENCE)


def test_what_is_left_from_a_former_name_ends_and_a_foreign_bird_keeps_its_routes(one: FabricHost) -> None:
    one.start_agent()
    one.add("a", "192.168.0.1")
    await_routes(one, {"192.168.0.0/26": None})
    # one that no file names, and that can be told nothing, since its folder is gone
    one.ctl("node", "stop", "--force")
    running = bird_of(one)
    run("rm", "-r", str(folder(one)), str(folder(one).parent / "bird.pid"), str(folder(one).parent / "bird.boot"))
    one.start_agent()
    wait_for(lambda: one.bird not in (None, running) and "BIRD" in ask(one, "show", "status"), "another", PATIENCE)
    assert gone(running) and troubles(one) == {}
    await_routes(one, {"192.168.0.0/26": None})
    # it is killed, and killed again while it starts; its folder goes while the agent runs
    running = one.bird
    os.kill(running, 9)
    following = wait_for(lambda: one.bird if one.bird != running else None, "the next one", PATIENCE)
    os.kill(following, 9)
    wait_for(lambda: "BIRD" in ask(one, "show", "status"), "one that serves", PATIENCE)
    running = one.bird
    run("rm", "-r", str(folder(one)))
    wait_for(lambda: one.bird not in (None, running) and "BIRD" in ask(one, "show", "status"), "another", PATIENCE)
    await_routes(one, {"192.168.0.0/26": None})
    one.ctl("node", "stop", "--force")
    running = bird_of(one)
    (folder(one).parent / "bird.pid").unlink()
    (folder(one).parent / "bird.boot").unlink()
    one.ctl("node", "remove", "--remove-endpoints")
    assert gone(running) and learned(one) == {}
    wait_for(lambda: not list((one.home / "run").glob("*")), "the end of the command server")

    # the longest name; then another one, whether the former is removed first or not
    former = "h" * 253
    for options in ((f"--hostname={former}",), ()):
        one.start_agent(HOSTNAME=former)
        running = one.bird
        shown = json.loads(one.ctl("status", "--output=json", env={"HOSTNAME": former}).out)
        assert shown["bird"]["pid"] == running and running is not None and shown["troubles"] == []
        one.ctl("node", "stop", "--force", env={"HOSTNAME": former})
        if options:
            one.ctl("node", "remove", *options)
            assert gone(running)
        one.ctl("node", f"--ip={one.ip}", "--force")
        assert gone(running) and one.bird == bird_of(one) and troubles(one) == {}
        one.ctl("node", "remove")
        assert one.bird is None
    one.ctl("node", "remove", f"--hostname={former}")

    # a foreign BIRD beside ours
    one.start_agent()
    foreign_router(one, "protocol kernel { ipv4 { export all; }; scan time 600; }")
    wait_for(lambda: "10.9.0.0/16" in learned(one), "its routes", PATIENCE)
    one.ctl("node", "stop", "--force")
    assert "another BIRD" in one.ctl("node", "remove").err
    assert gone(running) and "10.9.0.0/16" in learned(one)
    run("birdc", "-s", str(one.home / "ctl"), "down")
    one.run("ip", "route", "flush", "proto", "bird")

    # a host that is removed from elsewhere still has something to remove, once
    one.start_agent()
    one.ctl("node", "stop", "--force")
    one.ctl("node", "remove", "--hostname=host11", "--force", env={"HOSTNAME": "elsewhere"})
    assert "was not registered; what it had left here is removed" in one.ctl("node", "remove").out
    assert "is not registered" in one.ctl("node", "remove", status=1).err


def test_a_text_that_bird_refuses_replaces_nothing(bare_host: Host) -> None:
    """No way leads to one from the store, so BIRD is given one directly."""
    Path("/run/calico/host1").mkdir(parents=True)
    run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/run/calico/host1")
    instance, good = Instance("host1"), "router id 192.0.2.2; protocol device { }\n"
    with pytest.raises(Refused, match=r"in line 2 of /run/calico/host1/bird/conf.new"):
        instance.start(f"{good}protocol nonsense {{ }}\n")
    assert instance.pid() is None
    try:
        assert instance.start(good) is False
        with pytest.raises(Refused, match=r"in line 3 of /run/calico/host1/bird/conf.new") as refused:
            instance.configure(f"{good}\nprotocol nonsense {{ }}\n")
        assert refused.value.line == 3 and instance.configuration.read_text() == good
        instance.configure(good + "protocol direct { ipv4; }\n")
        found = instance.configuration.stat()
        assert (found.st_mode & 0o777, found.st_uid) == (0o640, 0)
        assert "Uid:\t0" not in Path(f"/proc/{instance.pid()}/status").read_text(), "it is not root"
        os.kill(instance.pid(), 9)
        wait_for(lambda: instance.pid() is None, "its end")
        with pytest.raises(Refused):
            instance.start("nonsense\n")
        assert "direct" in instance.configuration.read_text() and instance.pid() is not None
        # one that ends while the file system is full is started again
        with suppress(OSError), open("/run/calico/host1/full", "wb", buffering=0) as file:
            while True:
                file.write(bytes(2**16))
        killed = instance.pid()
        os.kill(killed, 9)
        wait_for(lambda: instance.pid() is None, "its end")
        assert instance.start(instance.configuration.read_text()) and instance.pid() not in (None, killed)
    finally:
        Path("/run/calico/host1/full").unlink(missing_ok=True)
        removed = instance.remove(pytest.fail)
        left = list(Path("/run/calico/host1").iterdir())
        run("umount", "/run/calico/host1")
    assert removed and instance.pid() is None and left == []


def test_a_block_from_before_that_overlaps_what_the_host_needs(two: list[FabricHost]) -> None:
    one, other = two
    connect(one, other)
    await_routes(other, {"192.168.1.0/26": None, "192.168.0.0/26": one.ip})
    # the host gets connected to a network in the middle of its own block
    one.run("ip", "link", "add", "lan", "type", "bridge")
    one.run("ip", "link", "set", "lan", "up")
    one.run("ip", "address", "add", "192.168.0.33/28", "dev", "lan")
    await_routes(other, {"192.168.1.0/26": None, "192.168.0.1": one.ip})
    await_routes(one, {"192.168.1.0/26": other.ip})
    assert one.reaches("a", "192.168.1.1", 5)
    assert "block 192.168.0.0/26 overlaps 192.168.0.32/28" in one.log()
    # another host's block there is not taken, but its single addresses are
    one.run("ip", "address", "add", "192.168.1.33/28", "dev", "lan")
    await_routes(one, {})
    other.ctl("container", "/var/run/netns/b", "ip", "add", "192.168.0.60")
    await_routes(one, {"192.168.0.60": other.ip})
    one.run("ip", "link", "delete", "lan")
    await_routes(one, {"192.168.0.0/26": None, "192.168.1.0/26": other.ip, "192.168.0.60": other.ip})
    # a route into a part of the pool
    one.run("ip", "route", "add", "192.168.0.0/24", "via", "172.18.0.254")
    await_routes(one, {"192.168.1.0/26": other.ip, "192.168.0.60": other.ip})
    one.run("ip", "route", "replace", "192.168.0.0/16", "via", "172.18.0.254")
    one.run("ip", "route", "delete", "192.168.0.0/24")
    await_routes(one, {"192.168.0.0/26": None, "192.168.1.0/26": other.ip, "192.168.0.60": other.ip})


def test_hosts_with_ipv6_alone(open_etcd: Etcd) -> None:
    with fabric(open_etcd, 0, 0) as (one, other):
        for host in (one, other):
            host.run("ip", "address", "flush", "dev", "eth0", "scope", "global")
            host.run("ip", "-6", "address", "add", f"{host.ip6}/64", "dev", "eth0", "nodad")
            host.endpoints = f"http://[fd00:18::1]:{open_etcd.port}"
            host.ctl("node", f"--ip6={host.ip6}")
        one.add("a", f"{V6}1")
        other.add("b", f"{V6}41")
        await_routes(one, {f"{V6}/122": None, f"{V6}40/122": other.ip6}, 6)
        await_routes(other, {f"{V6}40/122": None, f"{V6}/122": one.ip6}, 6)
        assert list(sessions(one)) == [f"mesh6_{other.ip6.replace(':', '_')}"] and troubles(one) == {}
        assert "no session with it" in one.ctl("node", "bgp", "peer", "add", "172.18.0.99", "as", "64999").err
        assert one.ctl("node", "bgp", "peer", "add", "fd00:18::99", "as", "64999").err == ""
