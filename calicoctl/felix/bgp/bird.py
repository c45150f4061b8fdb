"""A client of BIRD's control socket: sends commands, and parses the answers.

Source of the protocol: the BIRD Programmer's Documentation, "Command line interface". Each line of an answer begins
with a code of four digits. In the last line of the answer, a space follows the code; in all others, a `-`. A line that
begins with a space has the same code as the previous line. Codes from 8000 on are errors.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from calicoctl import clock
from calicoctl.addresses import BITS
from calicoctl.errors import CalicoError, one_line

PATIENCE = 5.0
"""Seconds to wait for an answer. A suspended BIRD (SIGSTOP) never answers, although the kernel accepts connections for
it.
"""

LARGEST_ANSWER = 2**24
"""The maximum size of an answer in bytes. It suffices for thousands of sessions, with about 500 bytes each."""

UP = "Established"

_CONFIGURATION_OK, _RECONFIGURED, _IN_PROGRESS, _QUEUED = "0020", "0003", "0004", "0005"
_PROTOCOL, _DETAIL = "1002", "1006"
_FAILED = "8002"


class Refused(CalicoError):
    """BIRD has refused a configuration. `line` is the number of the wrong line, from 1 on; None if it is unknown."""

    def __init__(self, why: str, line: int | None) -> None:
        super().__init__(why)
        self.line = line


@dataclass(frozen=True)
class Session:
    """A BGP session, as BIRD reports it.

    `name` is the name of the session's protocol in BIRD. `kind` is "mesh", "node" or "global" (see config.py). `peer`
    is the peer's address, and `as_num` the peer's AS number as decimal text. `state` is a state of RFC 4271, such as
    "Established" or "Connect", or "Down" if BIRD has not started the session. `since` is when BIRD's protocol last
    changed its state (ISO 8601). `imported` counts the routes accepted from the peer, `exported` the routes announced
    to the peer. `error` is the last error, None if there was none. `suspicion` says what may keep the session down,
    None if nothing is known.
    """

    name: str
    kind: str
    peer: str
    as_num: str
    state: str
    since: str
    imported: int = 0
    exported: int = 0
    error: str | None = None
    suspicion: str | None = None

    @property
    def is_up(self) -> bool:
        return self.state == UP


class Control:
    """A connection to BIRD's control socket.

    All methods raise CalicoError if BIRD does not answer within PATIENCE, or closes the connection.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._rest = b""

    def command(self, command: str) -> list[tuple[str, str]]:
        """Send a command. Return the lines of the answer, each as (code, text).

        An error that BIRD reports is returned in the same form, not raised. Raises CalicoError if BIRD does not answer
        within PATIENCE, or closes the connection.
        """
        deadline = time.monotonic() + PATIENCE
        self._send(command)
        return self._answer(deadline)

    def check(self, file: Path) -> None:
        """Have BIRD check a configuration file without using it.

        Raise Refused if the file has an error, and CalicoError if BIRD gives no answer, or an unexpected one.
        """
        self._configure(f'configure check "{file}"', (_CONFIGURATION_OK,))

    def configure(self) -> None:
        """Have BIRD reload its configuration file; BIRD may not have finished when this returns.

        Raise Refused if the file has an error, and CalicoError if BIRD gives no answer, or an unexpected one.
        """
        self._configure("configure", (_RECONFIGURED, _IN_PROGRESS, _QUEUED))

    def sessions(self) -> list[Session]:
        """Return all BGP sessions, in the order of the configuration. Raises CalicoError if BIRD does not answer."""
        return list(parse_sessions(self.command("show protocols all")))

    def rescan(self) -> None:
        """Have BIRD read the kernel's routes, and add its own routes that are missing in the kernel.

        BIRD may not have finished when this returns. Raises CalicoError if BIRD does not answer.
        """
        # a protocol `kernel` with the option `learn` schedules a scan when it is reloaded
        # Source: krt_reload_routes in BIRD's sysdep/unix/krt.c
        for version in BITS:
            self.command(f"reload in kernel{version}")

    def _configure(self, command: str, good: Iterable[str]) -> None:
        answer = self.command(command)
        code, why = answer[-1]
        if code == _FAILED:
            raise refusal(why)
        if code not in good:
            raise CalicoError(f"BIRD answers to '{command}' with {code} {one_line(why)}")

    def _send(self, command: str) -> None:
        with _explained():
            self._socket.settimeout(PATIENCE)
            self._socket.sendall(command.encode() + b"\n")

    def _answer(self, deadline: float) -> list[tuple[str, str]]:
        lines: list[tuple[str, str]] = []
        length = 0
        while True:
            line = self._line(deadline)
            length += len(line)
            if length > LARGEST_ANSWER:
                raise CalicoError("BIRD's answer is too long")
            if re.match(r"\d{4}[ -]", line, re.ASCII):
                lines.append((line[:4], line[5:]))
                if line[4] == " ":
                    return lines
            elif line.startswith(" ") and lines:
                lines.append((lines[-1][0], line[1:]))
            # a line with + is a log message, and no part of an answer

    def _line(self, deadline: float) -> str:
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            with _explained():
                if left <= 0:
                    raise socket.timeout
                self._socket.settimeout(left)
                data = self._socket.recv(2**16)
            if not data:
                raise CalicoError("BIRD has closed the connection to its control socket")
            self._rest += data
            if len(self._rest) > LARGEST_ANSWER:
                raise CalicoError("BIRD's answer is too long")
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode(errors="replace")


@contextmanager
def control(path: Path, may_change: bool = False) -> Iterator[Control]:
    """Connect to BIRD's control socket `path`, and yield a Control. The connection is closed at the end of `with`.

    If `may_change` is false, BIRD accepts only commands that read. Raises CalicoError if BIRD does not serve or answer.
    """
    with _explained():
        opened = socket.socket(socket.AF_UNIX)
    with opened as connection:
        with _explained():
            connection.settimeout(PATIENCE)
            _connect(connection, path)
        bird = Control(connection)
        bird._answer(time.monotonic() + PATIENCE)  # the greeting
        if not may_change:
            bird.command("restrict")
        yield bird


def _connect(connection: socket.socket, path: Path) -> None:
    """Connect to a socket whose path may exceed 107 bytes, the kernel's limit. Raises OSError."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        connection.connect(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except socket.timeout:
        raise CalicoError(f"BIRD does not answer within {PATIENCE:.0f} s") from None
    except OSError as error:
        raise CalicoError(f"BIRD does not serve: {error.strerror or error}") from None


def refusal(text: str) -> Refused:
    """Return the exception for BIRD's error message about a configuration file: `FILE:LINE:COLUMN MESSAGE`.

    For a message of another form, the exception contains no line number.
    """
    match = re.fullmatch(r"(?:bird: )?(.*?):(\d+):\d+ (.*)", text.strip(), re.ASCII)
    if match is None:
        return Refused(one_line(text.strip()), None)
    return Refused(f"{one_line(match[3])} in line {match[2]} of {match[1]}", int(match[2]))


_NAME = re.compile("(mesh|node|global)[46]_[0-9a-f_]+", re.ASCII)
_COUNTS = re.compile(r"Routes:\s+(\d+) imported,(?: \d+ filtered,)? (\d+) exported", re.ASCII)


def parse_sessions(lines: Iterable[tuple[str, str]]) -> Iterator[Session]:
    """Yield the BGP sessions in `lines`, the answer to `show protocols all`, each line as (code, text).

    Protocols whose names do not have the form of config.Neighbour.name are skipped.
    """
    name, since = "", ""
    details: dict[str, str] = {}
    counts = (0, 0)
    for code, line in (*lines, (_PROTOCOL, "")):
        if code == _PROTOCOL:
            match = _NAME.fullmatch(name)
            if match is not None:
                yield Session(
                    name,
                    match[1],
                    details.get("Neighbor address", "").partition("%")[0],
                    details.get("Neighbor AS", ""),
                    details.get("BGP state", "Down"),
                    since,
                    *counts,
                    details.get("Last error"),
                )
            # name, protocol, table, state, date, time, information
            words = line.split(None, 6)
            name, since = (words[0], _in_utc(" ".join(words[4:6]))) if len(words) >= 6 else ("", "")
            details, counts = {}, (0, 0)
        elif code == _DETAIL:
            found = _COUNTS.search(line)
            if found is not None:
                counts = int(found[1]), int(found[2])
            key, _, value = line.strip().partition(":")
            details.setdefault(key, value.strip())


def _in_utc(local: str) -> str:
    """Convert a local time in BIRD's format `iso long` to the format of clock.now. Return any other text unchanged."""
    try:
        return clock.text(datetime.strptime(local, "%Y-%m-%d %H:%M:%S").astimezone(timezone.utc))
    except ValueError:
        return local
