"""Who reaches whom: a process in each workload's network namespace that pings and connects to many addresses at once.

It also listens on TCP port 80. As a script, this module is that process, which takes one request a line; it uses
nothing but the standard library, and nothing of the code under test.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

PORT = 80
INTERVAL = 0.1
"""Seconds between two pings of `watch`."""

LATE = 1.0
"""Seconds after which the answer to a ping of `watch` does not count."""


class Prober:
    """The process in one namespace."""

    def __init__(self, command: list[str], *addresses: str) -> None:
        """`command` runs the command that follows it in the namespace; `addresses` are the namespace's own."""
        self.addresses = addresses
        self._process = subprocess.Popen(
            [*command, sys.executable, "-SE", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ask({"reach": [], "seconds": 0})  # it listens when it has answered

    @property
    def pid(self) -> int:
        """A process in the namespace."""
        return self._process.pid

    def await_answer(self, address: str, seconds: float) -> None:
        """Ping each millisecond until an address answers; fail when it does not."""
        assert self.ask({"await": address, "seconds": seconds})["answered"], f"no answer from {address}"

    def tell(self, request: dict) -> None:
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)

    def ask(self, request: dict) -> dict:
        assert self._process.stdout is not None
        self.tell(request)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class Crowd:
    """Workloads by name, each with its prober."""

    def __init__(self) -> None:
        self.probers: dict[str, Prober] = {}

    def add(self, name: str, prober: Prober) -> None:
        self.probers[name] = prober

    def remove(self, name: str) -> tuple[str, ...]:
        """End a workload's prober; return its addresses."""
        prober = self.probers.pop(name)
        prober.close()
        return prober.addresses

    def close(self) -> None:
        for name in list(self.probers):
            self.remove(name)

    def _targets(self, source: str) -> list[str]:
        return [address for name, prober in self.probers.items() if name != source for address in prober.addresses]

    def _ask_all(self, request) -> dict[str, dict]:
        """Ask all at once; `request` makes the request from a workload's name. Return the answers by name."""
        with ThreadPoolExecutor(len(self.probers)) as pool:
            answers = pool.map(lambda name: self.probers[name].ask(request(name)), self.probers)
            return dict(zip(self.probers, answers))

    def reached(self, seconds: float = 1.0) -> set[tuple[str, str, str]]:
        """Return (source, target, how) for all that is answered: `how` is ping4, ping6, tcp4 or tcp6."""
        answers = self._ask_all(lambda name: {"reach": self._targets(name), "seconds": seconds})
        owner = {address: name for name, prober in self.probers.items() for address in prober.addresses}
        return {
            (source, owner[address], f"{how}{6 if ':' in address else 4}")
            for source, answer in answers.items()
            for how, addresses in answer.items()
            for address in addresses
        }

    def watch(self, pairs: set[tuple[str, str]]) -> None:
        """Ping each INTERVAL from the first of each pair to all addresses of the second, until `longest_losses`."""
        for name, prober in self.probers.items():
            targets = [address for one, other in pairs if one == name for address in self.probers[other].addresses]
            prober.tell({"watch": targets})

    def longest_losses(self) -> dict[tuple[str, str], float]:
        """Stop the pings; return for each (source, address) the longest time in which none was answered, in seconds."""
        answers = self._ask_all(lambda name: {"stop": True})
        return {(name, address): lost for name, answer in answers.items() for address, lost in answer.items()}


# The process in the namespace


def _checksum(data: bytes) -> int:
    """Return the internet checksum of an even number of bytes. Source: RFC 1071."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


class _Pings:
    """Echo requests and their replies, of both IP versions."""

    def __init__(self) -> None:
        self._id = os.getpid() & 0xFFFF
        self.sockets = {
            4: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
            6: socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6),
        }
        for each in self.sockets.values():
            each.setblocking(False)

    def send(self, address: str, sequence: int) -> None:
        version = 6 if ":" in address else 4
        packet = struct.pack("!BBHHH", 128 if version == 6 else 8, 0, 0, self._id, sequence & 0xFFFF)
        if version == 4:
            packet = packet[:2] + struct.pack("!H", _checksum(packet)) + packet[4:]
        with contextlib.suppress(OSError):  # no route: it is lost
            self.sockets[version].sendto(packet, (address, 0))

    def replies(self) -> list[tuple[str, int]]:
        """Return the address and the sequence number of each reply that has arrived."""
        found = []
        for version, each in self.sockets.items():
            while True:
                try:
                    data, sender = each.recvfrom(2000)
                except OSError:
                    break
                if version == 4:
                    data = data[(data[0] & 15) * 4 :]
                kind, _, _, id, sequence = struct.unpack("!BBHHH", data[:8])
                if kind == (129 if version == 6 else 0) and id == self._id:
                    found.append((sender[0], sequence))
        return found


def _listen() -> list[socket.socket]:
    servers = []
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        server = socket.socket(family, socket.SOCK_STREAM)
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, PORT))
        server.listen(1024)  # the kernel completes handshakes: nobody has to accept them
        server.setblocking(False)
        servers.append(server)
    return servers


def _drain(servers: list[socket.socket]) -> None:
    for server in servers:
        with contextlib.suppress(BlockingIOError):
            while True:
                server.accept()[0].close()


def _reach(pings: _Pings, targets: list[str], seconds: float, round: int) -> dict[str, list[str]]:
    """Return the addresses that answer a ping, and those that accept a connection, within so many seconds."""
    clients, pinged, connected = {}, set(), set()
    for address in targets:
        pings.send(address, round)
        client = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        client.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if client.connect_ex((address, PORT)) in (0, errno.EINPROGRESS):
            clients[client] = address
    until = time.monotonic() + seconds
    while (clients or len(pinged) < len(targets)) and time.monotonic() < until:
        _, writable, _ = select.select(pings.sockets.values(), clients, [], max(0.0, until - time.monotonic()))
        for client in writable:
            address = clients.pop(client)
            if client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                connected.add(address)
            client.close()
        pinged |= {address for address, sequence in pings.replies() if sequence == round}
    for client in clients:
        client.close()
    return {"ping": sorted(pinged), "tcp": sorted(connected)}


def _await(pings: _Pings, address: str, seconds: float) -> bool:
    """Ping each millisecond; return whether there is an answer within so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pings.send(address, 0)
        select.select(pings.sockets.values(), [], [], 0.001)
        if any(sender == address for sender, _ in pings.replies()):
            return True
    return False


def _watch(pings: _Pings, targets: list[str], requests: io.RawIOBase) -> dict[str, float]:
    """Ping until a line comes; return by address the longest time of lost pings in a row, in seconds."""
    sent: list[float] = []
    answered: dict[str, set[int]] = {address: set() for address in targets}

    def take_in(seconds: float, *until_readable: io.RawIOBase) -> bool:
        """Take in replies for so many seconds; return early, with True, when there is something to read."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            readable, _, _ = select.select([*until_readable, *pings.sockets.values()], [], [], left)
            for address, sequence in pings.replies():
                if address in answered and time.monotonic() - sent[sequence] < LATE:
                    answered[address].add(sequence)
            if any(each in readable for each in until_readable):
                return True
        return False

    while True:
        sent.append(time.monotonic())
        for address in targets:
            pings.send(address, len(sent) - 1)
        if take_in(INTERVAL, requests):
            break
    end = time.monotonic()
    requests.readline()
    take_in(0.3)
    return {address: _longest_loss(sent, answered[address], end) for address in targets}


def _longest_loss(sent: list[float], answered: set[int], end: float) -> float:
    """Return the longest time from the first to after the last of pings that were lost in a row."""
    longest, since = 0.0, None
    for number, at in enumerate([*sent, end]):
        if number < len(sent) and number not in answered:
            since = at if since is None else since
        elif since is not None:
            longest, since = max(longest, at - since), None
    return longest


def main() -> None:
    servers, pings = _listen(), _Pings()
    round = 0
    with open(0, "rb", buffering=0) as requests:  # unbuffered, so that select sees whatever has not been read
        while line := requests.readline():
            request = json.loads(line)
            if "watch" in request:
                answer: dict = _watch(pings, request["watch"], requests)
            elif "await" in request:
                answer = {"answered": _await(pings, request["await"], request["seconds"])}
            else:
                _drain(servers)
                round += 1
                answer = _reach(pings, request["reach"], request["seconds"], round)
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
