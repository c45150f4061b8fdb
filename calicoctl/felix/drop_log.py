"""The last drops of this host, in memory, and the socket on which root reads them: `calicoctl drops`.

A client sends ALL or FOLLOW, and gets each drop as a line of JSON. With FOLLOW, it also gets the drops that come later,
and a drop that was repeated once more, with their number, PERIOD after its beginning.
"""

from __future__ import annotations

import json
import logging
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterable
from contextlib import suppress
from typing import Any

from calicoctl import sockets
from calicoctl.felix import process, shortage

log = logging.getLogger("calico.felix")

MOST = 1000
"""How many drops are kept."""

PERIOD = 10.0
"""Seconds from the beginning of a drop in which the same drop counts as its repetition."""

ALL, FOLLOW = b"all\n", b"follow\n"

MOST_CLIENTS = 8
"""How many clients are served at a time."""

_PATIENCE = 5.0
"""Seconds within which a client must ask, and take what it gets."""
_PAUSE = 5.0
"""Seconds until it is tried again to listen."""
_INTERVAL = 1.0
"""Seconds after which it is found out at the latest whether a client that follows has gone."""


class Drop:
    """A drop, and how often it was repeated. `number` counts all drops from 1."""

    def __init__(self, number: int, key: Hashable, values: dict[str, Any]) -> None:
        self.number, self.key, self.values = number, key, values
        self.began = time.monotonic()

    @property
    def is_repeated(self) -> bool:
        return int(self.values["count"]) > 1

    @property
    def is_over(self) -> bool:
        """Whether no more repetitions are counted."""
        return time.monotonic() >= self.began + PERIOD

    def line(self) -> bytes:
        return json.dumps({"id": self.number, **self.values}).encode() + b"\n"


class DropLog:
    """The last drops. One thread adds drops, others read them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._drops: deque[Drop] = deque()
        self._last: dict[Hashable, Drop] = {}
        """Key -> the last of `_drops` with that key."""
        self._count = 0

    def add(self, key: Hashable, values: dict[str, Any]) -> None:
        """Add a drop, or count it as a repetition of the last one with the same `key`.

        `values` has the field `time`. The drop gets the fields `count`, and `last`: the time of the last repetition.
        """
        with self._changed:
            drop = self._last.get(key)
            if drop is not None and not drop.is_over:
                drop.values["count"] += 1
                drop.values["last"] = values["time"]
                return
            if len(self._drops) == MOST:
                oldest = self._drops.popleft()
                if self._last.get(oldest.key) is oldest:
                    del self._last[oldest.key]
            self._count += 1
            drop = Drop(self._count, key, {**values, "last": values["time"], "count": 1})
            self._drops.append(drop)
            self._last[key] = drop
            self._changed.notify_all()

    def after(self, number: int) -> list[Drop]:
        """Return the drops with higher numbers, the oldest first."""
        with self._changed:
            found = []
            for drop in reversed(self._drops):
                if drop.number <= number:
                    break
                found.append(drop)
            return found[::-1]

    def lines(self, drops: Iterable[Drop]) -> bytes:
        with self._changed:
            return b"".join(drop.line() for drop in drops)

    def wait(self, number: int, seconds: float) -> None:
        """Wait until there is a drop with a higher number, `seconds` at most."""
        with self._changed:
            self._changed.wait_for(lambda: self._count > number, seconds)


class DropServer(threading.Thread):
    """Serves a DropLog at the socket of a host."""

    def __init__(self, host: str, drops: DropLog) -> None:
        super().__init__(name="serving dropped packets", daemon=True)
        self._path = process.drops_socket(host)
        self._drops = drops
        self._room = threading.Semaphore(MOST_CLIENTS)

    def run(self) -> None:
        said = ""
        while True:
            try:
                listening = sockets.listen(self._path, socket.SOCK_STREAM, MOST_CLIENTS)
                break
            except OSError as error:  # the file system may be full
                if str(error) != said:
                    log.warning("dropped packets cannot be shown, since nobody can listen at %s: %s", self._path, error)
                said = str(error)
                time.sleep(_PAUSE)  # nothing tells when there is room again
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:  # no file descriptor is free
                time.sleep(shortage.PAUSE)  # nothing tells when one is
                continue
            if not self._room.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), name="serving drops", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, suppress(OSError):  # it has gone, or does not take what it gets
                connection.settimeout(_PATIENCE)
                if sockets.is_of_root(connection):
                    asked = connection.recv(100)
                    if asked in (ALL, FOLLOW):
                        self._send(connection, follows=asked == FOLLOW)
        finally:
            self._room.release()

    def _send(self, connection: socket.socket, follows: bool) -> None:
        sent, open_drops = 0, list[Drop]()
        client = select.poll()  # select.select takes no descriptor from 1,024 on
        client.register(connection, select.POLLIN)
        while True:
            new = self._drops.after(sent)
            over = [drop for drop in open_drops if drop.is_over]
            connection.sendall(self._drops.lines([*(drop for drop in over if drop.is_repeated), *new]))
            if not follows or client.poll(0):  # it has gone: it has nothing more to say
                return
            sent = new[-1].number if new else sent
            open_drops = [drop for drop in (*open_drops, *new) if not drop.is_over]
            self._drops.wait(sent, _INTERVAL)
