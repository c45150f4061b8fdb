"""Real packets between network namespaces: sockets that live in a namespace, whatever thread made them.

Nothing here uses the code under test.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from tests.system.support import run, wait_for

T = TypeVar("T")

QUICK = 0.4
"""Seconds in which a packet that passes has long been answered, but on a machine that stalls."""

PATIENT = 3.0
"""Seconds to wait for an answer to a packet that must pass. Only one is sent: nothing makes up for one that is lost."""


def inside(namespace: str | None, work: Callable[[], T]) -> T:
    """Call `work` in a thread that is in a namespace (None: the host's), and return its result."""
    if namespace is None:
        return work()
    outcome: dict = {}

    def body() -> None:
        try:
            fd = os.open(f"/var/run/netns/{namespace}", os.O_RDONLY)
            if ctypes.CDLL(None, use_errno=True).setns(fd, 0x40000000) != 0:
                raise OSError(ctypes.get_errno(), "setns")
            os.close(fd)
            outcome["result"] = work()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


def family_of(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@contextlib.contextmanager
def listener(namespace: str | None, address: str, port: int) -> Iterator[socket.socket]:
    """A TCP server's socket."""

    def make() -> socket.socket:
        server = socket.socket(family_of(address), socket.SOCK_STREAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        server.listen(64)
        return server

    with inside(namespace, make) as server:
        yield server


def connect(
    namespace: str | None, address: str, port: int, source_port: int = 0, patience: float = QUICK
) -> socket.socket | None:
    """Return a TCP connection from a namespace, or None when nothing came back."""

    def make() -> socket.socket | None:
        client = socket.socket(family_of(address), socket.SOCK_STREAM)
        client.settimeout(patience)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if source_port:
            client.bind(("", source_port))
        try:
            client.connect((address, port))
            return client
        except (TimeoutError, socket.timeout):
            client.close()
            return None

    return inside(namespace, make)


def tcp(
    source: str | None,
    target: str | None,
    address: str,
    port: int = 80,
    source_port: int = 0,
    patience: float = QUICK,
) -> bool:
    """Return whether a TCP connection from one namespace to an address of another can be made."""
    with listener(target, address, port):
        client = connect(source, address, port, source_port, patience)
        if client is None:
            return False
        reset_on_close(client)  # so that the port can be used again at once
        client.close()
        return True


def reset_on_close(connected: socket.socket) -> None:
    """Let a connection end without a farewell, which policy may drop, and which would keep its namespace alive."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def udp(
    source: str | None,
    target: str | None,
    address: str,
    port: int = 53,
    source_port: int = 0,
    patience: float = QUICK,
) -> bool:
    """Return whether a UDP packet gets there, and its answer back."""

    def make(bound: tuple[str, int] | None) -> socket.socket:
        made = socket.socket(family_of(address), socket.SOCK_DGRAM)
        if bound:
            made.bind(bound)
        return made

    any_address = "::" if ":" in address else "0.0.0.0"
    with (
        inside(target, lambda: make((address, port))) as server,
        inside(source, lambda: make((any_address, source_port))) as client,
    ):
        with contextlib.suppress(PermissionError):
            client.sendto(b"ping", (address, port))
        if not select.select([server], [], [], patience)[0]:
            return False
        _, sender = server.recvfrom(100)
        server.sendto(b"pong", sender)
        return bool(select.select([client], [], [], patience)[0])


def ping(source: str | None, address: str, patience: float = QUICK) -> bool:
    """Return whether an echo request is answered."""
    prefix = ["ip", "netns", "exec", source] if source else []
    return run(*prefix, "ping", "-n", "-c", "1", "-W", str(patience), address, check=False).status == 0


def flows(client: socket.socket, server: socket.socket, patience: float = QUICK) -> bool:
    """Return whether a connection still carries data, in both directions."""
    for one, other in ((client, server), (server, client)):
        try:
            one.send(b"x")
        except OSError:
            return False
        if not select.select([other], [], [], patience)[0]:
            return False
        try:
            if not other.recv(100):
                return False
        except OSError:
            return False
    return True


def ends(client: socket.socket, server: socket.socket) -> None:
    """Wait until a connection carries nothing any more."""
    wait_for(lambda: not flows(client, server), "the connection's end", 10)


@contextlib.contextmanager
def connection(
    source: str | None, target: str | None, address: str, port: int
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """An open TCP connection: the client's socket, and the server's."""
    with listener(target, address, port) as server:
        client = connect(source, address, port, patience=PATIENT)
        assert client is not None, "the connection could not be made"
        accepted, _ = server.accept()
        with client, accepted:
            yield client, accepted
            for end in (client, accepted):
                reset_on_close(end)


def fill_connection_table(count: int) -> None:
    """Create entries of connection tracking, of UDP flows between machines outside. 100,000 take two seconds."""
    entries = (
        f"-A -p udp -s 10.9.{number >> 8 & 255}.{number & 255} -d 203.0.113.9 --sport {1024 + (number >> 16)} "
        "--dport 53 --timeout 3600 --status SEEN_REPLY,ASSURED\n"
        for number in range(count)
    )
    run("conntrack", "--load-file", "/dev/stdin", input="".join(entries))


def checksum(data: bytes) -> int:
    """Return the internet checksum. Source: RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def udp_frame(
    source_mac: str,
    target_mac: str,
    source: str,
    destination: str,
    port: int,
    source_port: int = 4000,
    payload: bytes = b"spoofed",
) -> bytes:
    """Return an Ethernet frame with a UDP packet, of whatever sender one likes."""
    length = 8 + len(payload)
    if ":" in source:
        addresses = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, destination)
        pseudo = addresses + struct.pack("!IHBB", length, 0, 0, 17)
    else:
        addresses = socket.inet_aton(source) + socket.inet_aton(destination)
        pseudo = addresses + struct.pack("!BBH", 0, 17, length)
    ports = struct.pack("!HHH", source_port, port, length)
    check = checksum(pseudo + ports + b"\0\0" + payload) or 0xFFFF
    datagram = ports + struct.pack("!H", check) + payload
    if ":" in source:
        kind, header = 0x86DD, struct.pack("!IHBB", 0x60000000, length, 17, 64) + addresses
    else:
        kind = 0x0800
        header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 1, 0, 64, 17, 0) + addresses
        header = header[:10] + struct.pack("!H", checksum(header)) + header[12:]
    return mac_bytes(target_mac) + mac_bytes(source_mac) + struct.pack("!H", kind) + header + datagram


def vxlan_frame(source_mac: str, target_mac: str, source: str, destination: str, vni: int, inner: bytes) -> bytes:
    """Return an Ethernet frame with a VXLAN packet that carries the frame `inner`. Source: RFC 7348."""
    header = struct.pack("!II", 0x08000000, vni << 8)
    return udp_frame(source_mac, target_mac, source, destination, 4789, payload=header + inner)


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def send_frame(namespace: str, interface: str, frame: bytes) -> None:
    """Send a frame as it is."""

    def work() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind((interface, 0))
            raw.send(frame)

    inside(namespace, work)
