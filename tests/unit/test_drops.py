"""What the agent says of packets that the kernel has logged, and how it keeps and serves that."""

from __future__ import annotations

import errno
import json
import os
import resource
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from calicoctl import netlink
from calicoctl.commands import drops as command
from calicoctl.diagnose import counters, dropped
from calicoctl.felix import drop_log, process
from calicoctl.felix.dataplane import drops, packet_log
from calicoctl.felix.dataplane.changes import spelled
from calicoctl.felix.dataplane.drops import Counts, Header, Logged
from calicoctl.felix.dataplane.drops_manager import DropsManager
from calicoctl.felix.dataplane.nft import Count
from calicoctl.felix.dataplane.packet_log import header_of
from calicoctl.felix.dataplane.ruleset import rule_counters
from calicoctl.felix.drop_log import ALL, FOLLOW, MOST, PERIOD, DropLog, DropServer
from calicoctl.felix.events import DROPS_RECEIVED, Failure, PacketsLogged, Tick
from tests.unit.kernel import FakeNft
from tests.unit.snapshots import World
from tests.unit.waiting import wait_for

ROOT = Path(__file__).parent.parent.parent

A, B, A6 = "192.168.0.1", "192.168.0.2", "fd00::1"


def ipv4(protocol: int, rest: bytes, fragment: int = 0) -> bytes:
    addresses = socket.inet_aton(A) + socket.inet_aton(B)
    return struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(rest), 0, fragment, 64, protocol, 0) + addresses + rest


def ipv6(protocol: int, rest: bytes) -> bytes:
    addresses = socket.inet_pton(socket.AF_INET6, A6) + socket.inet_pton(socket.AF_INET6, "fd00::2")
    return struct.pack("!IHBB", 6 << 28, len(rest), protocol, 64) + addresses + rest


PORTS = struct.pack("!HHHH", 4000, 53, 8, 0)


@pytest.mark.parametrize(
    ("packet", "expected"),
    [
        (ipv4(17, PORTS), Header(A, B, 17, 4000, 53)),
        (ipv4(6, PORTS[:2]), Header(A, B, 6)),
        (ipv4(17, PORTS, fragment=5), Header(A, B, 17)),
        (ipv4(1, b"\x08\x00"), Header(A, B, 1, icmp_type=8, icmp_code=0)),
        (ipv4(47, PORTS), Header(A, B, 47)),
        (ipv6(17, PORTS), Header(A6, "fd00::2", 17, 4000, 53)),
        (ipv6(58, b"\x87\x00"), Header(A6, "fd00::2", 58, icmp_type=135, icmp_code=0)),
        (ipv6(0, bytes([43, 0]) + bytes(6) + bytes([17, 0]) + bytes(6) + PORTS), Header(A6, "fd00::2", 17, 4000, 53)),
        (ipv6(44, bytes([17, 0, 0, 1]) + bytes(4) + PORTS), Header(A6, "fd00::2", 17, 4000, 53)),
        (ipv6(44, bytes([17, 0, 0, 8]) + bytes(4) + PORTS), Header(A6, "fd00::2", 17)),
        (ipv4(17, PORTS)[:18], None),
        (ipv6(17, PORTS)[:30], None),
        (b"", None),
        (b"\x00\x01", None),
    ],
)
def test_the_header_of_a_packet(packet: bytes, expected: Header | None) -> None:
    assert header_of(packet) == expected


@given(st.binary(max_size=80), st.sampled_from([b"", b"\x45", b"\x4f", b"\x60"]))
def test_no_bytes_of_a_packet_break_its_decoding(rest: bytes, first: bytes) -> None:
    header_of(first + rest)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (errno.EBUSY, "another process receives them"),
        (errno.EINVAL, "the kernel has no nfnetlink_log"),
        (errno.EPERM, "another process receives them"),
        (errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_why_logged_packets_cannot_be_received(monkeypatch: pytest.MonkeyPatch, code: int, why: str) -> None:
    answer = netlink.message(netlink.ERROR, 0, 0, struct.pack("=i", -code) + bytes(16))
    monkeypatch.setattr(packet_log, "PAUSE", None)  # which no thread can sleep for
    monkeypatch.setattr(packet_log.PacketLog, "_follow", lambda self: packet_log._join(Group()))  # type: ignore[arg-type]

    class Group:
        def send(self, data: bytes) -> None: ...

        def recv(self, size: int) -> bytes:
            return answer

    events: list[Failure] = []
    with pytest.raises(TypeError):
        packet_log.PacketLog(events.append).run()
    assert events == [Failure(f"dropped packets cannot be shown by 'calicoctl drops': {why}", DROPS_RECEIVED)]


class Dropping(World):
    """Two endpoints of this host, one of another host, and the drops of these."""

    def __init__(self) -> None:
        super().__init__()
        self.nft, self.log = FakeNft([]), DropLog()
        self.manager = DropsManager(self.context, self.nft, self.log)  # type: ignore[arg-type]
        self.store.profile("web", {"action": "allow"}, {"action": "deny", "protocol": "tcp"})
        self.store.endpoint(1, A, workload_name="one")
        self.store.endpoint(2, B, workload_name="two")
        self.store.endpoint(3, "192.168.0.3", host="host2", workload_name="three")
        self.manager.on_event(self.snapshot.take_dirty())

    def drop(self, prefix: str, header: Header, incoming: str = "cali1", outgoing: str = "cali2") -> dict:
        self.manager.on_event(PacketsLogged(lambda: [Logged(1800000000.5, prefix, incoming, outgoing, header)]))
        drops = self.log.after(0)
        return drops[-1].values if drops else {}

    @property
    def deny(self) -> str:
        return str(rule_counters("web", "inbound", self.snapshot.profiles["web"].rules.inbound)[1])


def test_a_drop_names_workloads_and_the_rule() -> None:
    world = Dropping()
    drop = world.drop(f"inbound rule {world.deny}", Header(A, B, 6, 4000, 80))
    assert drop["why"] == "profile web, inbound rule 2: deny tcp" and (drop["profile"], drop["rule"]) == ("web", 2)
    assert drop["from"] == {"name": "one", "address": A, "endpoint": "e1", "host": "host1"}
    assert drop["to"]["name"] == "two" and drop["time"] == "2027-01-15T08:00:00Z"
    assert drop["trace"] == f"calicoctl profile trace {A} {B} tcp 80 --from-port=4000"
    assert command._line({**drop, "count": 3, "last": "2027-01-15T08:00:09Z"}) == (
        f"2027-01-15T08:00:00Z one ({A}) to two ({B}), tcp 80, inbound: profile web, inbound rule 2: deny tcp; "
        f"3 times until 2027-01-15T08:00:09Z; {drop['trace']}"
    )
    former = world.deny
    world.store.profile("web", {"action": "allow"})
    world.manager.on_event(world.snapshot.take_dirty())
    drop = world.drop(f"inbound rule {former}", Header(A, B, 6, 4000, 81))
    assert drop["why"] == "a rule of profile web that has been changed since" and drop["rule"] is None


def test_every_field_of_a_drop_is_documented() -> None:
    drop = {"id": 1, **Dropping().drop("inbound no-rule", Header(A, B, 47))}
    text = (ROOT / "docs" / "seeing.md").read_text()
    documented = text.partition("`--output=json` is a line")[2].partition("\n\n")[0]
    assert {name for name in (*drop, *drop["from"]) if f"`{name}`" not in documented} == set()


def test_a_drop_names_workloads_of_other_hosts_hosts_and_addresses() -> None:
    world = Dropping()
    world.store.put("/calico/bgp/v1/host/host2/ip_addr_v4", "172.18.0.12")
    world.manager.on_event(world.snapshot.take_dirty())
    for address, name, host in (
        ("192.168.0.3", "three", "host2"),
        ("172.18.0.12", "host2", "host2"),
        ("203.0.113.9", "203.0.113.9", None),
    ):
        end = world.drop("inbound no-rule", Header(address, B, 47), incoming="eth0")["from"]
        assert (end["name"], end["host"]) == (name, host)
    drop = world.drop("inbound no-rule", Header("203.0.113.9", B, 47), incoming="eth0")
    assert drop["trace"] is None, "trace knows no GRE"
    assert "203.0.113.9 to two" in command._line(drop) and "protocol 47, inbound" in command._line(drop)


def test_other_reasons_and_what_is_none_of_ours() -> None:
    world = Dropping()
    drop = world.drop("outbound spoofed", Header("10.0.0.1", B, 17, 1, 53))
    assert drop["from"]["name"] == "one" and "forged" in drop["why"]
    assert f" trace {A} {B} udp 53 " in drop["trace"], "of the address that the workload has"
    drop = world.drop("outbound profile gone", Header(A, B, 17, 1, 54))
    assert drop["profile"] == "gone" and "does not exist, or its rules are invalid" in drop["why"]
    drop = world.drop("inbound no-endpoint", Header("203.0.113.9", "10.1.1.2", 17, 1, 54), "eth0", "cali9")
    assert "has no endpoint" in drop["why"] and drop["trace"] is None, "trace knows neither end"
    count = len(world.log.after(0))
    for prefix in ("", "calico-packet: x", "inbound strange", "sideways rule x"):
        world.drop(prefix, Header(A, B, 17, 1, 55))
    assert len(world.log.after(0)) == count


@pytest.mark.parametrize(
    ("header", "traced"),
    [
        (Header(A, B, 6, 4000, 80), " tcp 80 --from-port=4000"),
        (Header(A, B, 6, 0, 80), None),
        (Header(A, B, 17, 4000, 0), None),
        (Header(A, B, 17), None),  # a fragment
        (Header(A, B, 132, 4000, 80), None),
        (Header(A, B, 1, icmp_type=8, icmp_code=0), " icmp"),
        (Header(A, B, 1, icmp_type=3, icmp_code=1), None),
        (Header(A6, "fd00::2", 58, icmp_type=128, icmp_code=0), " icmpv6"),
        (Header(A6, "fd00::2", 58, icmp_type=135, icmp_code=0), None),
    ],
)
def test_only_what_can_be_traced_is_offered(header: Header, traced: str | None) -> None:
    """`profile trace` is about echo requests and ports from 1 on."""
    expected = traced and f"calicoctl profile trace {header.source} {header.destination}{traced}"
    assert Dropping().drop("inbound no-rule", header)["trace"] == expected


def test_a_name_that_nftables_cannot_spell_is_known_all_the_same() -> None:
    world = Dropping()
    world.store.profile('a" b', {"action": "deny"})
    world.store.endpoint(2, B, profile_ids=['a" b'])
    world.manager.on_event(world.snapshot.take_dirty())
    (counter,) = rule_counters('a" b', "inbound", world.snapshot.profiles['a" b'].rules.inbound)
    assert world.drop(f"inbound rule {counter}", Header(A, B, 17, 1, 53))["profile"] == 'a" b'
    world.store.endpoint(2, B, profile_ids=['no" such'])
    world.manager.on_event(world.snapshot.take_dirty())
    prefix = "inbound profile " + spelled('no" such')
    assert world.drop(prefix, Header(A, B, 17, 1, 54))["profile"] == 'no" such'


def test_every_prefix_is_understood_and_fits() -> None:
    longest = f"outbound//{'0' * 32}/{'0' * 16}"
    for direction, reason in drops.KINDS.values():
        subject = longest if reason in (drops.RULE, drops.PROFILE) else ""
        _, log = drops.dropping(direction, reason, subject, "tcp dport 80", "counter")
        prefix = log.split('"')[1]
        assert len(prefix) < 128 and drops.parse_prefix(prefix) == (direction, reason, subject)


def test_counts_of_interfaces_that_are_gone_are_removed() -> None:
    world = Dropping()
    world.nft.dropped = [(struct.pack("=16sI", name, 9), Count(3)) for name in (b"cali1", b"cali9", b"lo", b'cali"')]
    assert [(one.endpoint, one.reason, one.packets) for one in world.manager.counted()] == [("e1", "no-rule", 3)]
    assert not world.manager.needs_apply
    world.manager.on_event(Tick())
    world.nft.objects["set inet calico drops"] = ['"cali9" . 9']
    world.manager.apply()
    assert world.nft.transactions == ['delete element inet calico drops { "cali9" . 9 }\n']


def test_metrics_never_go_back_when_the_tables_are_reloaded() -> None:
    world = Dropping()

    def counted(*packets: int) -> list[int]:
        world.nft.dropped = [(struct.pack("=16sI", b"cali1", 9), Count(number)) for number in packets]
        return [one.packets for one in world.manager.counted()]

    assert counted(5) == [5]
    assert counted(3) == [5], "which were read before two more were dropped"
    assert counted(6) == [6]
    assert counted() == [] and counted(1) == [1], "the endpoint is a new one"


def test_the_command_prints_each_drop_as_it_happens_and_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drop = {"id": 1, **Dropping().drop("inbound no-rule", Header(A, B, 47)), "count": 2}
    found: list[dict] = [drop]
    flushed: list[str] = []
    monkeypatch.setattr(dropped, "read", lambda host, follow: iter(found))
    monkeypatch.setattr(counters, "read", lambda: Counts({"dropped": Count(5, 0, "then")}))
    monkeypatch.setattr(process, "troubles", lambda host, subjects: ["the kernel cannot log them"])
    for form, parsed in (("json", json.loads), ("yaml", yaml.safe_load)):
        with monkeypatch.context() as patched:
            patched.setattr(sys.stdout, "flush", lambda: flushed.append(sys.stdout.getvalue()))  # type: ignore[attr-defined]
            command._drops(False, form)
        said = capsys.readouterr()
        assert parsed(said.out) == (drop if form == "json" else [drop]) and flushed.pop() == said.out
        assert said.err.splitlines()[0] == "Warning: the kernel cannot log them."
        assert "5 packets were dropped" in said.err and "since then; 3 of them are not shown." in said.err
    found.clear()
    command._drops(False, "yaml")
    assert yaml.safe_load(capsys.readouterr().out) == []


# What is kept


def test_repetitions_are_joined_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 1000.0
    monkeypatch.setattr(drop_log.time, "monotonic", lambda: clock)
    kept = DropLog()
    for moment in ("first", "second"):
        kept.add("key", {"time": moment})
    kept.add("other", {"time": "third"})
    assert [(one.values["count"], one.values["last"]) for one in kept.after(0)] == [(2, "second"), (1, "third")]
    clock += PERIOD
    kept.add("key", {"time": "fourth"})
    assert [one.values["count"] for one in kept.after(0)] == [2, 1, 1]
    assert [one.number for one in kept.after(1)] == [2, 3]


def test_no_more_than_the_last_are_kept() -> None:
    kept = DropLog()
    for number in range(MOST + 10):
        kept.add(number, {"time": ""})
    assert [one.number for one in kept.after(0)] == list(range(11, MOST + 11))
    kept.add(5, {"time": ""})
    assert kept.after(0)[-1].values["count"] == 1, "the former one is not kept any more"


def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: DropLog) -> Path:
    monkeypatch.setattr(process, "DIRECTORY", tmp_path)
    DropServer("host1", kept).start()
    path = tmp_path / "host1" / "drops.sock"
    wait_for(path.exists)
    return path


def asked(path: Path, what: bytes) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(10)
    client.connect(str(path))
    client.sendall(what)
    return client


def answer(path: Path) -> bytes:
    """Return the first bytes of the drops; b"" if the server has no room."""
    with suppress(ConnectionError), asked(path, ALL) as client:
        return client.recv(1000)
    return b""


def test_clients_get_all_and_followers_what_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drop_log, "PERIOD", 0.2)
    kept = DropLog()
    kept.add("a", {"time": "1"})
    path = served(tmp_path, monkeypatch, kept)
    assert path.stat().st_mode & 0o777 == 0o600
    with asked(path, ALL) as client, client.makefile() as lines:
        assert [json.loads(line)["id"] for line in lines] == [1]
    with asked(path, b"nonsense\n") as client, client.makefile() as lines:
        assert lines.readlines() == []
    with asked(path, FOLLOW) as client, client.makefile() as lines:
        assert json.loads(lines.readline())["count"] == 1
        kept.add("b", {"time": "2"})
        kept.add("b", {"time": "3"})
        found = [json.loads(lines.readline())]
        while found[-1]["count"] < 2:  # at once, and once more when its period is over
            found.append(json.loads(lines.readline()))
        assert {one["id"] for one in found} == {2} and len(found) <= 2


def test_followers_are_served_while_many_files_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = DropLog()
    kept.add("a", {"time": "1"})
    path = served(tmp_path, monkeypatch, kept)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(2000, before[0]), before[1]))
    opened: list[int] = []
    try:
        while not opened or opened[-1] < 1100:
            opened.append(os.open("/dev/null", os.O_RDONLY))
        assert answer(path), "which gets the descriptor that accept(2) has taken before"
        with asked(path, FOLLOW) as client, client.makefile() as lines:
            assert json.loads(lines.readline())["id"] == 1
            kept.add("b", {"time": "2"})
            assert json.loads(lines.readline())["id"] == 2
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_no_more_clients_are_served_than_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = DropLog()
    kept.add("a", {"time": "1"})
    path = served(tmp_path, monkeypatch, kept)
    followers = [asked(path, FOLLOW) for _ in range(drop_log.MOST_CLIENTS)]
    for client in followers:
        assert client.recv(1000)
    assert answer(path) == b""
    for client in followers:
        client.close()
    wait_for(lambda: answer(path))  # the server notices within a second that they have gone
