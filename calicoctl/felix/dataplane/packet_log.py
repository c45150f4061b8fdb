"""Receives the packets that our tables log (drops.py), from the kernel. Runs in a thread of its own.

Source: the kernel's uapi/linux/netfilter/nfnetlink_log.h.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from calicoctl import netlink
from calicoctl.addresses import unpack
from calicoctl.felix.dataplane import drops
from calicoctl.felix.dataplane.drops import Header, Logged
from calicoctl.felix.events import DROPS_RECEIVED, Failure, PacketsLogged
from calicoctl.policy.rules import ICMP, ICMPV6, WITH_PORTS

log = logging.getLogger("calico.felix")

PAUSE = 5.0
"""Seconds until the group is joined again after a failure."""

MOST = 1000
"""How many packets wait for the agent's loop at most. Older ones are discarded."""

_SUBSYSTEM = 4 << 8
_PACKET, _CONFIG = _SUBSYSTEM | 0, _SUBSYSTEM | 1
_CONFIG_COMMAND, _CONFIG_MODE, _CONFIG_TIMEOUT = 1, 2, 4
_BIND, _COPY_PACKET = 1, 2
_COPIED = 256
"""How many bytes of a packet the kernel copies at most. The tables ask for fewer."""
_TIMEOUT = 10
"""How long the kernel collects packets for one message, in hundredths of a second. By default, it is a second."""
_IN, _OUT, _PAYLOAD, _PREFIX = 4, 5, 9, 10
_FRAGMENTED = 0x1FFF
_BUFFER = 2**20

_OTHER = "another process receives them"
_WHY = {errno.EBUSY: _OTHER, errno.EPERM: _OTHER, errno.EINVAL: "the kernel has no nfnetlink_log"}
"""Why the kernel lets nobody join the group."""

_EXTENSIONS = {0, 43, 60, 135}
"""Extension headers of IPv6 that have a length in units of 8 bytes: hop-by-hop, routing, destination, mobility."""


class PacketLog(threading.Thread):
    """Emits a PacketsLogged when packets were logged, and a Failure if they cannot be received."""

    def __init__(self, put: Callable[[Any], object]) -> None:
        super().__init__(name="receiving dropped packets", daemon=True)
        self._put = put
        self._lock = threading.Lock()
        self._waiting: deque[Logged] = deque(maxlen=MOST)

    def run(self) -> None:
        while True:
            try:
                self._follow()
            except OSError as error:
                why = _WHY.get(error.errno or 0, error.strerror)
                self._put(Failure(f"dropped packets cannot be shown by 'calicoctl drops': {why}", DROPS_RECEIVED))
            except Exception:  # of any kind: an end of this thread would end what `drops` shows
                log.exception("%s failed", self.name)
            time.sleep(PAUSE)  # nothing tells when the group can be joined

    def take(self) -> list[Logged]:
        """Return, and remove, the packets that wait."""
        with self._lock:
            waiting = list(self._waiting)
            self._waiting.clear()
            return waiting

    def _follow(self) -> None:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETLINK_NETFILTER) as group:
            group.setsockopt(socket.SOL_SOCKET, netlink.SO_RCVBUFFORCE, _BUFFER)
            group.bind((0, 0))
            _join(group)
            self._put(Failure(None, DROPS_RECEIVED))
            while True:
                try:
                    data = group.recv(2**18)
                except OSError as error:
                    if error.errno != errno.ENOBUFS:  # else the kernel has discarded some
                        raise
                    continue
                self._add([_decoded(body) for kind, body in netlink.messages(data) if kind == _PACKET])

    def _add(self, packets: list[Logged]) -> None:
        with self._lock:
            announced = bool(self._waiting)
            self._waiting.extend(packets)
        if packets and not announced:
            self._put(PacketsLogged(self.take))


def _join(group: socket.socket) -> None:
    """Have the kernel send the packets of drops.GROUP to a socket. Raises OSError: EPERM if another one gets them."""
    for attribute in (
        netlink.attribute(_CONFIG_COMMAND, bytes([_BIND])),
        netlink.attribute(_CONFIG_MODE, struct.pack("!IBx", _COPIED, _COPY_PACKET)),
        netlink.attribute(_CONFIG_TIMEOUT, struct.pack("!I", _TIMEOUT)),
    ):
        body = struct.pack("!BBH", socket.AF_UNSPEC, 0, drops.GROUP) + attribute
        group.send(netlink.message(_CONFIG, netlink.REQUEST | netlink.ACK, 0, body))
        answered = False
        while not answered:
            for kind, message in netlink.messages(group.recv(2**16)):
                if kind == netlink.ERROR:
                    answered, code = True, netlink.refusal(message)[1]
                    if code:
                        raise OSError(code, os.strerror(code))


def _decoded(message: bytes) -> Logged:
    """Decode a message with its header of 16 bytes, which struct nfgenmsg follows: family, version, group."""
    found = netlink.attributes(message[20:])
    return Logged(
        time.time(),
        found.get(_PREFIX, b"").rstrip(b"\0").decode(errors="replace"),
        _name(found.get(_IN)),
        _name(found.get(_OUT)),
        header_of(found.get(_PAYLOAD, b"")),
    )


def _name(index: bytes | None) -> str:
    if index is not None:
        with suppress(OSError):
            return socket.if_indextoname(int.from_bytes(index, "big"))
    return ""


def header_of(packet: bytes) -> Header | None:
    """Decode the first bytes of an IP packet; return None if they are too few, or of no IP packet."""
    try:
        if packet[0] >> 4 == 4:
            source, destination, protocol = packet[12:16], packet[16:20], packet[9]
            first = struct.unpack_from("!H", packet, 6)[0] & _FRAGMENTED == 0
            rest = packet[(packet[0] & 15) * 4 :] if first else b""
            if len(destination) < 4:
                return None
        elif packet[0] >> 4 == 6:
            source, destination = packet[8:24], packet[24:40]
            if len(destination) < 16:
                return None
            protocol, rest = _after_extensions(packet[6], packet[40:])
        else:
            return None
    except (IndexError, struct.error):
        return None
    ports: tuple[int | None, int | None] = (None, None)
    icmp: tuple[int | None, int | None] = (None, None)
    if protocol in WITH_PORTS and len(rest) >= 4:
        ports = struct.unpack_from("!HH", rest)
    elif protocol in (ICMP, ICMPV6) and len(rest) >= 2:
        icmp = rest[0], rest[1]
    return Header(unpack(source), unpack(destination), protocol, *ports, *icmp)


def _after_extensions(protocol: int, rest: bytes) -> tuple[int, bytes]:
    """Return the protocol and the bytes after the extension headers of IPv6; b"" if they are not there."""
    while protocol in _EXTENSIONS and len(rest) >= 2:
        protocol, rest = rest[0], rest[(rest[1] + 1) * 8 :]
    if protocol == 44 and len(rest) >= 8:  # a fragment, whose header is 8 bytes
        first = struct.unpack_from("!H", rest, 2)[0] & 0xFFF8 == 0
        return rest[0], rest[8:] if first else b""
    return protocol, rest
