"""The driver of nftables: runs transactions in this process, with libnftables, and waits for changes of tables.

Contains nothing specific to Calico. Source: libnftables(3); include/uapi/linux/netfilter/nf_tables.h for the kernel's
notifications.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import stat
import struct
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from calicoctl import netlink
from calicoctl.errors import CalicoError
from calicoctl.netlink import NETLINK_NETFILTER, SO_RCVBUFFORCE, SOL_NETLINK

LIBRARY = "libnftables.so.1"

_LARGE = 64 * 1024
"""The size of commands, in characters, from which memory is returned to the system after their transaction."""

_FD_SETSIZE = 1024
_NETLINK_ADD_MEMBERSHIP = 1
_NFNLGRP_NFTABLES = 7
_SUBSYSTEM_NFTABLES = 10
_NEWGEN, _GETOBJ = 15, 19
_NFPROTO_INET = 1
_OBJ_TABLE, _OBJ_NAME, _OBJ_TYPE, _OBJ_DATA, _OBJ_USERDATA = 1, 2, 3, 4, 8
_GETSETELEM = 13
_ELEM_LIST_TABLE, _ELEM_LIST_SET, _ELEM_LIST_ELEMENTS, _LIST_ELEM, _ELEM_KEY, _DATA_VALUE = 1, 2, 3, 1, 1, 1
_ELEM_EXPR, _EXPR_NAME, _EXPR_DATA = 7, 1, 2
_OBJECT_COUNTER, _COUNTER_BYTES, _COUNTER_PACKETS = 1, 1, 2
_UDATA_COMMENT = 0


class Count(NamedTuple):
    """The value of a counter. `comment` is the comment of a named counter, "" if there is none."""

    packets: int = 0
    bytes: int = 0
    comment: str = ""


class NftError(CalicoError):
    """The kernel or libnftables refused a transaction, and no part of it was applied; or libnftables cannot be used."""


class Nft:
    """A handle of libnftables in this process's network namespace. Not thread-safe.

    The constructor raises NftError if libnftables cannot be used.
    """

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL(LIBRARY)
        except OSError:
            raise NftError(f"{LIBRARY} cannot be loaded: install the package nftables") from None
        library.nft_ctx_new.restype = ctypes.c_void_p
        library.nft_ctx_new.argtypes = [ctypes.c_uint32]
        library.nft_ctx_free.restype = None
        library.nft_ctx_free.argtypes = [ctypes.c_void_p]
        library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
            getattr(library, name).restype = ctypes.c_char_p
            getattr(library, name).argtypes = [ctypes.c_void_p]
        for name in ("nft_ctx_buffer_output", "nft_ctx_buffer_error"):
            getattr(library, name).argtypes = [ctypes.c_void_p]
        self._library = library
        with _low_descriptor():
            self._context = library.nft_ctx_new(0)
        if not self._context:
            raise NftError("libnftables cannot be used here: it needs root, and a kernel with nf_tables")
        weakref.finalize(self, library.nft_ctx_free, self._context)
        library.nft_ctx_buffer_output(self._context)
        library.nft_ctx_buffer_error(self._context)

    def run(self, commands: str) -> str:
        """Run commands in nft's syntax as one transaction. Return their output. Raises NftError."""
        failed = self._library.nft_run_cmd_from_buffer(self._context, commands.encode()) != 0
        if len(commands) > _LARGE:
            _return_memory()
        if failed:
            said = (self._library.nft_ctx_get_error_buffer(self._context) or b"").decode(errors="replace")
            raise NftError(f"nftables refused a change: {' '.join(said.split())[:300]}")
        return str((self._library.nft_ctx_get_output_buffer(self._context) or b"").decode(errors="replace"))

    def counters(self, table: str) -> dict[str, Count]:
        """Return the named counters of a table of the family inet, by name. Raises OSError."""
        # by netlink: libnftables lists a counter only together with all elements of all sets, which may take long
        request = struct.pack("=BBH", _NFPROTO_INET, 0, 0)
        request += netlink.attribute(_OBJ_TABLE, table.encode() + b"\0")
        request += netlink.attribute(_OBJ_TYPE, struct.pack("!I", _OBJECT_COUNTER))
        found = {}
        for body in netlink.dump(NETLINK_NETFILTER, _SUBSYSTEM_NFTABLES << 8 | _GETOBJ, request):
            object = netlink.attributes(body[4:])
            name = object[_OBJ_NAME].rstrip(b"\0").decode()
            found[name] = _count(object[_OBJ_DATA], _comment(object.get(_OBJ_USERDATA, b"")))
        return found

    def keys(self, table: str, set: str) -> list[bytes]:
        """Return the keys of the elements of a set or map in a table of the family inet, as the kernel's bytes.

        An address is in network byte order; an interface's name is followed by NULs.
        Raises OSError, for example if there is no such table or set.
        """
        return [_key(element) for element in self._elements(table, set)]

    def element_counts(self, table: str, set: str) -> list[tuple[bytes, Count]]:
        """Return (key, count) for each element of a set whose elements have counters. Otherwise like `keys`."""
        found = []
        for element in self._elements(table, set):
            expression = netlink.attributes(element.get(_ELEM_EXPR, b""))
            if expression.get(_EXPR_NAME, b"").rstrip(b"\0") == b"counter":
                found.append((_key(element), _count(expression[_EXPR_DATA])))
        return found

    @staticmethod
    def _elements(table: str, set: str) -> Iterator[dict[int, bytes]]:
        """Yield the attributes of each element of a set or map in a table of the family inet. Raises OSError."""
        request = struct.pack("=BBH", _NFPROTO_INET, 0, 0)
        request += netlink.attribute(_ELEM_LIST_TABLE, table.encode() + b"\0")
        request += netlink.attribute(_ELEM_LIST_SET, set.encode() + b"\0")
        for body in netlink.dump(NETLINK_NETFILTER, _SUBSYSTEM_NFTABLES << 8 | _GETSETELEM, request):
            elements = netlink.attributes(body[4:]).get(_ELEM_LIST_ELEMENTS, b"")
            at = 0
            while at + 4 <= len(elements):
                length, kind = struct.unpack_from("=HH", elements, at)
                if kind & 0x3FFF == _LIST_ELEM:
                    yield netlink.attributes(elements[at + 4 : at + length])
                at += max(4, (length + 3) & ~3)


def _key(element: dict[int, bytes]) -> bytes:
    return netlink.attributes(element[_ELEM_KEY])[_DATA_VALUE]


def _count(data: bytes, comment: str = "") -> Count:
    """Decode the attributes of a counter."""
    found = netlink.attributes(data)
    packets, size = (int.from_bytes(found.get(kind, b""), "big") for kind in (_COUNTER_PACKETS, _COUNTER_BYTES))
    return Count(packets, size, comment)


def _comment(userdata: bytes) -> str:
    """Return the comment that libnftables has stored with an object. Source: libnftnl's udata.h, of type and length."""
    at = 0
    while at + 2 <= len(userdata):
        kind, length = userdata[at], userdata[at + 1]
        if kind == _UDATA_COMMENT:
            return userdata[at + 2 : at + 2 + length].rstrip(b"\0").decode(errors="replace")
        at += 2 + length
    return ""


def _return_memory() -> None:
    """Have the C library return freed memory to the system.

    A large transaction takes libnftables many times its size. Without this, the C library would keep most of that for
    the life of the process: 10 MiB for a thousand endpoints.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(ctypes.c_size_t(0))


@contextmanager
def _low_descriptor() -> Iterator[None]:
    """Ensure that the first file descriptor that is opened inside `with` is below 1024.

    libnftables passes the descriptor of its socket to select(2), which aborts the process if the descriptor is 1024 or
    higher. If no lower number is free, a descriptor that this process has inherited is moved to a higher number. Raises
    NftError if there is no such descriptor, and in place of an OSError.
    """
    try:
        free = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        os.close(free)
        if free >= _FD_SETSIZE:
            inherited = next(fd for fd in reversed(range(3, _FD_SETSIZE)) if _is_inherited(fd))
            fcntl.fcntl(inherited, fcntl.F_DUPFD_CLOEXEC, _FD_SETSIZE)
            os.close(inherited)
        yield
    except StopIteration:
        raise NftError(f"this process has {_FD_SETSIZE} files open, which is too many for libnftables") from None
    except OSError as error:
        raise NftError(f"libnftables cannot be used: {error.strerror}") from None


def _is_inherited(fd: int) -> bool:
    """Return whether this process has inherited a descriptor from its parent. False if the descriptor is not open.

    An inherited descriptor is recognised by being inheritable: descriptors that Python opens are not (PEP 446). The
    netlink sockets of libnftables are inheritable, too, so netlink sockets do not count as inherited.
    """
    try:
        # the library's netlink sockets are inheritable, too
        return os.get_inheritable(fd) and str(Path(f"/proc/self/fd/{fd}").readlink()) not in _netlink_sockets()
    except OSError:
        return False


def _netlink_sockets() -> set[str]:
    """Return the names of all netlink sockets, in the form of the links in /proc/PID/fd: `socket:[INODE]`."""
    with open("/proc/net/netlink") as table:
        return {f"socket:[{line.split()[-1]}]" for line in table}


class OwnPorts:
    """The netlink ports of the sockets of a netlink protocol that this process has open.

    The kernel's notification of a change contains the port of the socket that requested the change. So the ports tell
    whether this process itself has requested it.
    """

    def __init__(self, protocol: int = NETLINK_NETFILTER) -> None:
        self._protocol = protocol
        self._found: dict[int, tuple[int, int]] = {}
        """Port -> the descriptor and the inode of its socket, when it was last looked for."""

    def __contains__(self, port: int) -> bool:
        """Return whether a port is that of a socket of this process. Raises OSError."""
        # each transaction brings us here, mostly with the same port, and a socket keeps its port while it is open
        if port in self._found and self._found[port] in _sockets([self._found[port][0]]):
            return True
        with open("/proc/net/netlink") as table:
            next(table)
            rows = [line.split() for line in table]
        ports = {int(row[-1]): int(row[2]) for row in rows if row[1] == str(self._protocol)}
        sockets = _sockets(int(file.name) for file in Path("/proc/self/fd").iterdir())
        self._found = {ports[inode]: (fd, inode) for fd, inode in sockets if inode in ports}
        return port in self._found


def _sockets(descriptors: Iterable[int]) -> list[tuple[int, int]]:
    """Return (descriptor, inode) for those of the descriptors that are open sockets."""
    found = []
    for fd in descriptors:
        with suppress(OSError):
            status = os.fstat(fd)  # to read the link takes much longer
            if stat.S_ISSOCK(status.st_mode):
                found.append((fd, status.st_ino))
    return found


class TableEvents:
    """Receives the kernel's notifications of changes of nftables tables, including the tables of iptables-nft.

    The kernel sends a series of notifications for each transaction, when the transaction has already taken effect.
    `wait` returns at the last notification of a series. Before that, it calls `urgent` at the first notification about
    the table `table`. It also calls `urgent` if the kernel has dropped notifications. The constructor raises OSError.
    """

    def __init__(self, table: str, urgent: Callable[[], None]) -> None:
        self._table, self._urgent = table, urgent
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        # a single transaction may bring a notification for each of thousands of elements
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 2**24)
        self._socket.bind((0, 0))
        self._socket.setsockopt(SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _NFNLGRP_NFTABLES)
        self._tables: set[str] = set()
        self._unread = b""

    def wait(self) -> tuple[set[str], int]:
        """Wait for the last notification of a transaction.

        Returns the names of the tables that the transaction has changed, and the netlink port of the socket that
        requested it. If the kernel has dropped notifications, returns ({""}, 0). Raises OSError.
        """
        while True:
            while len(self._unread) >= 20:
                length, kind, _, _, port = struct.unpack_from("=IHHII", self._unread)
                message, self._unread = self._unread[20:length], self._unread[max(20, (length + 3) & ~3) :]
                if kind == (_SUBSYSTEM_NFTABLES << 8) | _NEWGEN:
                    tables, self._tables = self._tables, set()
                    return tables, port
                name = _table(message)
                if name == self._table and name not in self._tables:
                    self._urgent()
                self._tables.add(name)
            try:
                self._unread = self._socket.recv(2**18)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._tables = set()
                self._urgent()
                return {""}, 0


def _table(attributes: bytes) -> str:
    """Return the name of the table that a notification is about; "" if the notification contains none.

    `attributes` are the notification's netlink attributes. In all kinds of notifications, the name is attribute 1.
    """
    # other attributes are not decoded: one change of the ruleset may bring thousands of messages
    at = 0
    while at + 4 <= len(attributes):
        length, kind = struct.unpack_from("=HH", attributes, at)
        if kind & 0x3FFF == 1:
            return attributes[at + 4 : at + length].rstrip(b"\0").decode(errors="replace")
        at += max(4, (length + 3) & ~3)
    return ""
