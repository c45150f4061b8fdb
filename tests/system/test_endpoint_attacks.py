"""What root in a connected container tries against other containers and the host: with real packets.

Spoofed addresses, ARP and neighbour discovery are in test_policy.py.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from tests.system.agent import A4, A6, ALLOW, B4, B6, C4, C6, AgentHost, holds, outside_host
from tests.system.conftest import clear_host
from tests.system.support import Etcd, links, run, wait_for
from tests.system.traffic import (
    PATIENT,
    QUICK,
    checksum,
    family_of,
    inside,
    listener,
    mac_bytes,
    ping,
    reset_on_close,
    send_frame,
    udp,
    udp_frame,
)

OUTSIDE, OUTSIDE6 = "198.51.100.2", "2001:db8:1::2"
BEYOND, BEYOND6 = "203.0.113.9", "2001:db8:2::9"
"""Addresses behind the machine `outside`, which is a router on the way."""
HOST, HOST6 = "192.0.2.2", "2001:db8::2"
HOST_MAC = "ee:ee:ee:ee:ee:ee"


@pytest.fixture(scope="module")
def net(etcd: Etcd) -> Iterator[AgentHost]:
    """A host with the namespaces a and b, which may talk, c, which has no profile, and `outside` beyond the host."""
    etcd.delete("/calico")
    host = AgentHost(etcd)
    with outside_host():
        try:
            host.start_agent()
            host.profile("web", inbound=[ALLOW])
            for name, *addresses in (("a", A4, A6), ("b", B4, B6), ("c", C4, C6)):
                host.add(name, *addresses)
            for name in "ab":
                host.set_profiles(name, "web")
            host.set_profiles("c")
            run("ip", "route", "add", f"{BEYOND}/32", "via", OUTSIDE)
            run("ip", "-6", "route", "add", f"{BEYOND6}/128", "via", OUTSIDE6)
            host.sync()
            yield host
        finally:
            clear_host()


@contextlib.contextmanager
def udp_server(namespace: str | None, address: str, port: int) -> Iterator[socket.socket]:
    with inside(namespace, lambda: socket.socket(family_of(address), socket.SOCK_DGRAM)) as server:
        server.bind((address, port))
        yield server


@contextlib.contextmanager
def sniffer(namespace: str) -> Iterator[socket.socket]:
    """A socket that receives the frames that arrive at a namespace's interface."""
    with inside(namespace, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))) as raw:
        raw.bind(("eth1", 0))
        yield raw


def answered(server: socket.socket) -> None:
    """Answer the next datagram."""
    assert select.select([server], [], [], PATIENT)[0]
    server.sendto(b"answer", server.recvfrom(100)[1])


def is_refused(client: socket.socket, patience: float) -> bool:
    """Return whether a connected UDP socket is told within so many seconds that its packets are not wanted."""
    end = time.monotonic() + patience
    while select.select([client], [], [], max(0.0, end - time.monotonic()))[0]:
        try:
            client.recv(100)
        except ConnectionRefusedError:
            return True
    return False


def icmp_error(target_mac: str, sender_mac: str, sender: str, flow: Flow, mtu: int | None = None) -> bytes:
    """Return a frame with an ICMP error that quotes a datagram of a flow: a closed port or, with `mtu`, its size."""
    quoted = udp_frame(target_mac, sender_mac, flow.source, flow.target, flow.port, flow.source_port)[14:]
    if ":" in sender:
        kind, code, number = (1, 4, 0) if mtu is None else (2, 0, mtu)
        message = struct.pack("!BBHI", kind, code, 0, number) + quoted
        addresses = socket.inet_pton(socket.AF_INET6, sender) + socket.inet_pton(socket.AF_INET6, flow.source)
        check = checksum(addresses + struct.pack("!II", len(message), 58) + message)
        header = struct.pack("!IHBB", 0x60000000, len(message), 58, 64) + addresses
    else:
        message = struct.pack("!BBHI", 3, 3 if mtu is None else 4, 0, mtu or 0) + quoted
        check = checksum(message)
        addresses = socket.inet_aton(sender) + socket.inet_aton(flow.source)
        header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(message), 1, 0, 64, 1, 0) + addresses
        header = header[:10] + struct.pack("!H", checksum(header)) + header[12:]
    kind = struct.pack("!H", 0x86DD if ":" in sender else 0x0800)
    message = message[:2] + struct.pack("!H", check) + message[4:]
    return mac_bytes(target_mac) + mac_bytes(sender_mac) + kind + header + message


class Flow:
    """A UDP flow that has begun: a client in a namespace (None: on the host), and where it sends to."""

    def __init__(self, namespace: str | None, target: str, port: int) -> None:
        self.namespace, self.target, self.port = namespace, target, port
        self.client = inside(namespace, self._start)
        self.source, self.source_port = self.client.getsockname()[:2]

    def _start(self) -> socket.socket:
        client = socket.socket(family_of(self.target), socket.SOCK_DGRAM)
        client.connect((self.target, self.port))
        client.send(b"x")
        return client

    def is_refused(self, patience: float) -> bool:
        return is_refused(self.client, patience)

    def mtu(self) -> int | None:
        """Return the MTU that the client's system has learnt for the target."""
        prefix = ["ip", "-n", self.namespace] if self.namespace else ["ip"]
        (route,) = json.loads(run(*prefix, "-json", "route", "get", self.target).out)
        metrics = route.get("metrics") or [{}]
        return metrics[0].get("mtu")


def test_icmp_errors_pass_for_flows_of_their_sender_alone(net: AgentHost) -> None:
    with contextlib.ExitStack() as stack:
        servers = {address: stack.enter_context(udp_server("b", address, 5000)) for address in (B4, B6)}
        flows = [Flow(namespace, target, 5000) for namespace in ("a", None) for target in (B4, B6)]
        beyond = [Flow("a", target, 5000) for target in (BEYOND, BEYOND6)]
        for flow in (*flows, *beyond):
            stack.enter_context(flow.client)
            for mtu in (1280, None):
                sender = C6 if ":" in flow.target else C4
                send_frame("c", "eth1", icmp_error(HOST_MAC, net.mac("c"), sender, flow, mtu))
        assert holds(lambda: not any(flow.is_refused(0) for flow in (*flows, *beyond)), QUICK)
        assert [flow.mtu() for flow in (*flows, *beyond)] == [None] * 6

        # errors about the sender's own flows pass, also to the other end, and those of routers beyond
        for flow in flows:
            for mtu in (1280, None):
                send_frame("b", "eth1", icmp_error(HOST_MAC, net.mac("b"), flow.target, flow, mtu))
        uplink, router = links()["uplink"]["address"], links("outside")["eth0"]["address"]
        for flow in beyond:
            for mtu in (1280, None):
                sender = OUTSIDE6 if ":" in flow.target else OUTSIDE
                send_frame("outside", "eth0", icmp_error(uplink, router, sender, flow, mtu))
        assert all(flow.is_refused(PATIENT) for flow in (*flows, *beyond))
        assert [flow.mtu() for flow in (*flows, *beyond)] == [1280] * 6
        for flow in flows[:2]:
            server = servers[flow.target]
            server.connect((flow.source, flow.source_port))
            flow.client.close()
            server.send(b"x")
            assert is_refused(server, PATIENT)


def test_services_of_the_host_are_open_to_all_endpoints_unless_a_setting_closes_them(net: AgentHost) -> None:
    net.ctl("config", "node", "felix", "DefaultEndpointToHostAction", "DROP")
    net.sync()
    for address in (HOST, HOST6):
        assert udp("c", None, address, 53, patience=PATIENT) and not udp("c", None, address, 54)
    with udp_server(None, HOST, 53) as server, Flow("c", HOST, 53).client as client:
        assert select.select([server], [], [], PATIENT)[0]
        net.ctl("config", "felix", "EndpointToHostServices", "drop")
        net.sync()
        client.send(b"of an open flow")
        assert len(server.recv(100)) == 1 and not select.select([server], [], [], QUICK)[0]
    for address in (HOST, HOST6):
        assert not udp("c", None, address, 53)
    net.ctl("config", "node", "felix", "DefaultEndpointToHostAction", "RETURN")
    net.sync()
    for address, own in ((HOST, A4), (HOST6, A6)):
        assert udp("a", None, address, 53, patience=PATIENT)
        # without neighbour discovery
        assert ping("a", address, patience=PATIENT) and ping(None, own, patience=PATIENT)
        assert ping(None, C6 if ":" in own else C4, patience=PATIENT)
    net.ctl("config", "felix", "EndpointToHostServices", "--remove")
    net.sync()
    assert udp("c", None, HOST6, 53, patience=PATIENT)


def test_an_endpoint_cannot_fill_connection_tracking(net: AgentHost) -> None:
    net.ctl("config", "felix", "MaxConnections", "512")
    for name in "ab":
        net.profile(name, inbound=[ALLOW])
        net.set_profiles(name, name)
    net.sync()
    run("conntrack", "-F")  # those from before the change may be in lists that count no more

    def flood(namespace: str, target: str) -> None:
        with inside(namespace, lambda: socket.socket(family_of(target), socket.SOCK_DGRAM)) as sender:
            for port in range(10000, 11000):
                with contextlib.suppress(ConnectionRefusedError):
                    sender.sendto(b"x", (target, port))

    def held(address: str) -> int:
        version = "ipv6" if ":" in address else "ipv4"
        return len(run("conntrack", "-L", "-f", version, "-p", "udp", "--orig-src", address).out.splitlines())

    # to other endpoints, beyond, and to the host; before and after the agent is started again
    for target in (B4, BEYOND6, HOST6):
        flood("a", target)
    net.start_agent()
    for target in (B6, BEYOND, HOST):
        flood("a", target)
    assert 256 < held(A4) + held(A6) <= 512
    assert udp("b", "a", A4, 81, patience=PATIENT), "others go on"
    wait_for(lambda: f"({net.interface('a')}) are dropped" in net.ctl("status").out, "the report", 20)
    assert f"({net.interface('b')})" not in net.ctl("status").out

    # the kernel forgets connections that have ended
    wait_for(lambda: flood("a", BEYOND) or held(A4) + held(A6) == 512, "the limit", 10)
    assert not udp("a", "b", B4, 81)
    run("conntrack", "-F")
    wait_for(lambda: udp("a", "b", B4, 81), "room", 10)


@pytest.mark.parametrize("end, limit", [("fin", 256), ("reset", 272)])
def test_an_endpoint_cannot_fill_connection_tracking_with_closed_connections(
    net: AgentHost, end: str, limit: int
) -> None:
    """The kernel's count of an endpoint's connections leaves out those that are closed, but it tracks them for long."""
    rate = limit // 16
    for name in "ab":
        net.set_profiles(name, "web")
    net.ctl("config", "felix", "MaxConnections", str(limit))  # with it, an endpoint has a new burst
    net.sync()
    run("conntrack", "-F")
    stop = threading.Event()

    def close_all(server: socket.socket) -> None:
        server.settimeout(QUICK)
        while not stop.is_set():
            with contextlib.suppress(OSError):
                server.accept()[0].close()

    def flood() -> int:
        """Open and close connections one after the other; return how many were established."""
        made, until = 0, time.monotonic() + 2
        while made < 1500 and time.monotonic() < until:
            with socket.socket() as client:
                client.settimeout(0.05)
                with contextlib.suppress(OSError):
                    client.connect((B4, 5001))
                    made += 1
                    if end == "fin":
                        client.recv(1)
                    else:
                        reset_on_close(client)
        return made

    with listener("b", B4, 5001) as server, udp_server("b", B4, 5002) as receiver, Flow("a", B4, 5002).client as flow:
        assert select.select([receiver], [], [], PATIENT)[0] and len(receiver.recv(9)) == 1
        thread = threading.Thread(target=close_all, args=(server,))
        thread.start()
        try:
            began = time.monotonic()
            made = inside("a", flood)
            tracked = run("conntrack", "-L", "-p", "tcp", "--orig-src", A4).out.splitlines()
            most = limit + rate * (time.monotonic() - began) + 1
        finally:
            stop.set()
            thread.join()
        assert limit * 0.8 < made <= most and len(tracked) <= most
        assert sum("TIME_WAIT" in line or "CLOSE" in line for line in tracked) > limit / 2, "they were closed"
        flow.send(b"open")
        assert select.select([receiver], [], [], PATIENT)[0] and receiver.recv(9) == b"open", (
            "only new ones are dropped"
        )
    assert udp("b", "a", A4, 81, patience=PATIENT), "others go on"
    wait_for(lambda: f"({net.interface('a')}) are dropped" in net.ctl("status").out, "the report", 20)
    wait_for(lambda: udp("a", "b", B4, 81), "room", 10)


def test_a_source_route_leads_past_no_policy(net: AgentHost) -> None:
    """Rules see a packet with a source route before it has the address of its last stop."""
    run("sysctl", "-qw", "net.ipv4.conf.all.accept_source_route=1")
    try:
        with udp_server(None, HOST, 53) as server, Flow("c", HOST, 53).client as client, sniffer("b") as seen:
            answered(server)  # c may reach this service of the host, whose answer makes the flow an established one
            assert select.select([client], [], [], PATIENT)[0]
            option = bytes([1, 131, 7, 4]) + socket.inet_aton(B4)  # loose source and record route
            frame = udp_frame(net.mac("c"), HOST_MAC, C4, HOST, 53, client.getsockname()[1], b"past policy")
            header = bytes([frame[14] + len(option) // 4, 0]) + struct.pack("!H", len(frame) - 14 + len(option))
            header += frame[18:24] + b"\0\0" + frame[26:34] + option
            header = header[:10] + struct.pack("!H", checksum(header)) + header[12:]
            send_frame("c", "eth1", frame[:14] + header + frame[34:])
            send_frame("a", "eth1", udp_frame(net.mac("a"), HOST_MAC, A4, B4, 53, payload=b"allowed"))
            found = b""
            while b"allowed" not in found:
                assert select.select([seen], [], [], PATIENT)[0]
                found = seen.recv(2000)
                assert b"past policy" not in found
    finally:
        run("sysctl", "-qw", "net.ipv4.conf.all.accept_source_route=0")


@pytest.mark.parametrize("version", [4, 6])
def test_a_packet_from_an_interface_that_a_container_makes_on_the_host_is_dropped(net: AgentHost, version: int) -> None:
    """c makes a pair whose other end is on the host, through the id that its own pair has for the host's namespace.

    The other end is set up here; with a request that iproute2 cannot spell, or on a host that sets up what it finds, c
    needs nobody for that.
    """
    own, target, nobody = {4: (A4, B4, "203.0.113.77"), 6: (A6, B6, "2001:db8:2::77")}[version]
    (pair,) = json.loads(run("ip", "-n", "c", "-json", "link", "show", "eth1").out)
    host = str(pair["link_netnsid"])
    for name in ("evil", f"cali{'9' * 11}"):  # also one that looks like an endpoint's
        make = f"link add evil0 link-netnsid {host} type veth peer name {name}"
        run("ip", "-n", "c", *make.split())
        run("ip", "-n", "c", "link", "set", "evil0", "up")
        run("ip", "link", "set", name, "up")
        run("sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0", f"net.ipv4.conf.{name}.rp_filter=0")
        wait_for(lambda n=name: links()[n]["operstate"] == "UP", "the interface")
        with udp_server("b", target, 5000) as server, udp_server(None, HOST if version == 4 else HOST6, 5000) as here:
            for receiver in (server, here):
                address = receiver.getsockname()[0]
                for mac in (net.mac("a"), "02:00:00:00:00:66"):
                    frame = udp_frame(mac, links()[name]["address"], own, address, 5000)
                    send_frame("c", "evil0", frame)
                # what no endpoint has passes, so frames arrive
                foreign = udp_frame("02:00:00:00:00:66", links()[name]["address"], nobody, address, 5000)
                if name == "evil":
                    send_frame("c", "evil0", foreign)
                    assert select.select([receiver], [], [], PATIENT)[0] and receiver.recvfrom(9)[1][0] != own
                else:
                    assert not select.select([receiver], [], [], QUICK)[0]
        run("ip", "-n", "c", "link", "delete", "evil0")
