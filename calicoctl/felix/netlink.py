"""Messages to and from the kernel in its own words, for what pyroute2 cannot say, or takes too long to.

Source: the kernel's uapi/linux/netlink.h.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

REQUEST, ACK, DUMP, CREATE = 0x1, 0x4, 0x300, 0x400

NESTED = 0x8000

ERROR, _DONE = 2, 3
_KIND = 0x3FFF
"""The bits of an attribute's kind that are not flags."""

_PATIENCE = 60.0
"""Seconds to wait for the kernel."""


def message(kind: int, flags: int, number: int, body: bytes) -> bytes:
    """Return a message, which bears a number that the kernel names in its answer."""
    return struct.pack("=IHHII", 16 + len(body), kind, flags, number, 0) + body


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def attributes(data: bytes) -> dict[int, bytes]:
    """Return the attributes in a message, or in one of its attributes, by their kinds."""
    found = {}
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        found[kind & _KIND] = data[at + 4 : at + length]
        at += max(4, (length + 3) & ~3)
    return found


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Give the messages in a datagram, with their types."""
    at = 0
    while at + 16 <= len(data):
        length, kind = struct.unpack_from("=IH", data, at)
        yield kind, data[at : at + length]
        at += max(16, (length + 3) & ~3)


def refusal(message: bytes) -> tuple[int, int]:
    """Return which message one of type ERROR answers, and the errno, 0 for none."""
    return struct.unpack_from("=I", message, 8)[0], -struct.unpack_from("=i", message, 16)[0]


def dump(protocol: int, kind: int, body: bytes) -> Iterator[bytes]:
    """Give the bodies of all messages that the kernel answers a dump with. Raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as netlink:
        netlink.settimeout(_PATIENCE)
        netlink.bind((0, 0))
        netlink.send(message(kind, REQUEST | DUMP, 0, body))
        while True:
            for type, answer in messages(netlink.recv(2**18)):
                if type == _DONE and len(answer) >= 20 and (code := -struct.unpack_from("=i", answer, 16)[0]) > 0:
                    raise OSError(code, os.strerror(code))
                if type == _DONE:
                    return
                if type == ERROR:
                    code = refusal(answer)[1]
                    raise OSError(code, os.strerror(code))
                yield answer[16:]


def do(protocol: int, kind: int, flags: int, body: bytes) -> None:
    """Have the kernel do something; raise OSError when it refuses."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as netlink:
        netlink.settimeout(_PATIENCE)
        netlink.bind((0, 0))
        netlink.send(message(kind, REQUEST | ACK | flags, 0, body))
        for type, answer in messages(netlink.recv(2**16)):
            code = refusal(answer)[1] if type == ERROR else 0
            if code:
                raise OSError(code, os.strerror(code))
