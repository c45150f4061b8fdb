"""Creates nftables tables that drop all packets of workloads, on a host without the agent's tables.

The tables drop all IP packets from and to `cali…` interfaces, and ARP packets from these. They have the names of the
agent's tables, `inet calico` and `arp calico`, so the agent replaces them, and `node remove` removes them, unless
`cali…` interfaces are left. `Guard.create` replaces a table of such a name only if it has no rules. The agent's rules,
which enforce policy, are in felix/dataplane/ruleset.py.

Source: include/uapi/linux/netfilter/nf_tables.h and nfnetlink.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from calicoctl.datastore.keys import INTERFACE_PREFIX
from calicoctl.errors import CalicoError
from calicoctl.netlink import (
    ACK,
    CREATE,
    ERROR,
    EXCLUSIVE,
    NESTED,
    NETLINK_NETFILTER,
    REQUEST,
    attribute,
    attributes,
    message,
    messages,
    refusal,
)

_TABLE = "calico"
_FIRST_CHAIN = "anti-spoofing"
"""The chain that is the first to see a packet from a `cali…` interface. The agent's tables have this chain, too."""

_INET, _ARP = 1, 3
_PREROUTING, _FORWARD, _OUTPUT, _ARP_INPUT = 0, 2, 3, 0
_RAW, _FILTER = -300, 0
_IIFNAME, _OIFNAME = 6, 7

_CHAINS = {
    _INET: (
        (_FIRST_CHAIN, _PREROUTING, _RAW, _IIFNAME),
        ("no-agent-forward", _FORWARD, _FILTER, _OIFNAME),
        ("no-agent-output", _OUTPUT, _FILTER, _OIFNAME),
    ),
    _ARP: ((_FIRST_CHAIN, _ARP_INPUT, _FILTER, _IIFNAME),),
}
"""By nftables family, the base chains: name, hook, priority, and the `meta` key that is compared with `cali*`."""

_SUBSYSTEM = 10 << 8
_NEWTABLE, _DELTABLE, _NEWCHAIN, _GETCHAIN, _NEWRULE = 0, 2, 3, 4, 6
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_APPEND = 0x800
_NAME = 1
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY, _CHAIN_USE, _CHAIN_TYPE = 1, 3, 4, 5, 6, 7
_HOOK_NUMBER, _HOOK_PRIORITY = 1, 2
_RULE_TABLE, _RULE_CHAIN, _RULE_EXPRESSIONS = 1, 2, 4
_ELEMENT, _EXPRESSION_NAME, _EXPRESSION_DATA = 1, 1, 2
_ACCEPT, _DROP, _EQUAL, _VERDICT_REGISTER, _REGISTER = 1, 0, 0, 0, 1

_TIMEOUT = 60.0
"""Seconds to wait for an answer of the kernel."""


class Guard:
    """Finds and creates the two tables through a netlink connection to the kernel's nftables. Not thread-safe."""

    def __init__(self) -> None:
        """Open the connection. Raises CalicoError."""
        with _explained():
            self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
            self._netlink.settimeout(_TIMEOUT)
            self._netlink.bind((0, 0))

    def close(self) -> None:
        self._netlink.close()

    def exists(self) -> bool:
        """Return whether both tables exist, this module's or the agent's, and have rules. Raises CalicoError.

        A table counts as having rules if its chain _FIRST_CHAIN has any.
        """
        with _explained():
            return not self._missing()

    def create(self) -> None:
        """Create each table that does not exist, and replace each table that has no rules (see `exists`).

        If CalicoError is raised, no table was changed.
        """
        with _explained():
            for replace in (False, True):
                missing = self._missing()
                try:
                    if missing:
                        _transact(self._netlink, [part for family in missing for part in _table(family, replace)])
                    return
                except OSError as error:
                    # there is such a table: the agent has just created it, or it has no rules
                    if error.errno != errno.EEXIST or replace:
                        raise

    def replace(self) -> None:
        """Replace both tables, whatever rules they have. If CalicoError is raised, no table was changed."""
        with _explained():
            _transact(self._netlink, [part for family in _CHAINS for part in _table(family, replace=True)])

    def _missing(self) -> list[int]:
        return [family for family in _CHAINS if not _has_rules(self._netlink, family)]


_kept: list[Guard] = []
"""A connection that nobody uses now. The kernel lets its closing wait for the end of any transaction, and of what the
last one has deleted, up to some 20 ms."""


@contextmanager
def kept() -> Iterator[Guard]:
    """Yield a connection in the network namespace of this process, which is kept open for the next use.

    Raises CalicoError. Thread-safe.
    """
    try:
        guard = _kept.pop()
    except IndexError:
        guard = Guard()
    try:
        yield guard
    except BaseException:  # an answer may be left in it
        guard.close()
        raise
    if _kept:
        guard.close()
    else:
        _kept.append(guard)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CalicoError(
            f"nftables cannot be used here ({error.strerror or error}), and without it nothing would restrain a "
            "workload until the agent runs. 'calicoctl checksystem' says what is missing."
        ) from None


def _has_rules(netlink: socket.socket, family: int) -> bool:
    body = _header(family) + _text(_CHAIN_TABLE, _TABLE) + _text(_CHAIN_NAME, _FIRST_CHAIN)
    netlink.send(message(_SUBSYSTEM | _GETCHAIN, REQUEST, 0, body))
    for kind, answer in messages(netlink.recv(2**16)):
        if kind == ERROR:
            code = refusal(answer)[1]
            if code != errno.ENOENT:
                raise OSError(code, os.strerror(code))
            return False
        # the number of its rules, and of the jumps to it
        return any(attributes(answer[20:])[_CHAIN_USE])
    return False


def _transact(netlink: socket.socket, requests: list[tuple[int, int, bytes]]) -> None:
    """Send requests (type, flags, body) as one transaction. If OSError is raised, nothing was changed."""
    # struct nfgenmsg: family, version, and for the begin and end of a batch the subsystem
    bounds = struct.pack("!BBH", socket.AF_UNSPEC, 0, _SUBSYSTEM >> 8)
    batch = message(_BATCH_BEGIN, REQUEST, 0, bounds)
    for number, (kind, flags, body) in enumerate(requests, 1):
        batch += message(_SUBSYSTEM | kind, REQUEST | ACK | flags, number, body)
    batch += message(_BATCH_END, REQUEST, len(requests) + 1, bounds)
    netlink.send(batch)
    answers: list[int] = []
    while len(answers) < len(requests):  # all are read, or a later call would take the rest for its own answers
        for kind, answer in messages(netlink.recv(2**16)):
            number, code = refusal(answer) if kind == ERROR else (0, 0)
            if code and not number:  # the whole batch is refused
                raise OSError(code, os.strerror(code))
            answers += [code] if number else []
    code = next(filter(None, answers), 0)
    if code:
        raise OSError(code, os.strerror(code))


def _table(family: int, replace: bool) -> Iterator[tuple[int, int, bytes]]:
    """Yield the requests that create the table of an nftables family, each as (type, flags, body).

    With `replace`, the requests first delete the table if it exists. Without `replace`, the kernel refuses the requests
    with EEXIST if the table exists.
    """
    table = _header(family) + _text(_NAME, _TABLE)
    if replace:
        yield _NEWTABLE, CREATE, table  # the next request would be refused for a table that does not exist
        yield _DELTABLE, 0, table
    yield _NEWTABLE, CREATE | EXCLUSIVE, table
    for chain, hook, priority, interface in _CHAINS[family]:
        where = attribute(_HOOK_NUMBER, struct.pack("!I", hook)) + attribute(
            _HOOK_PRIORITY, struct.pack("!i", priority)
        )
        yield (
            _NEWCHAIN,
            CREATE,
            _header(family)
            + _text(_CHAIN_TABLE, _TABLE)
            + _text(_CHAIN_NAME, chain)
            + attribute(_CHAIN_HOOK | NESTED, where)
            + _number(_CHAIN_POLICY, _ACCEPT)
            + _text(_CHAIN_TYPE, "filter"),
        )
        yield (
            _NEWRULE,
            CREATE | _APPEND,
            _header(family)
            + _text(_RULE_TABLE, _TABLE)
            + _text(_RULE_CHAIN, chain)
            + attribute(_RULE_EXPRESSIONS | NESTED, b"".join(_drop_if(interface))),
        )


def _drop_if(interface: int) -> Iterator[bytes]:
    """Yield the expressions of the rule `iifname "cali*" drop` if `interface` is _IIFNAME.

    If `interface` is _OIFNAME, the rule is `oifname "cali*" drop`.
    """
    # struct nft_data: a value, or a verdict
    prefix = attribute(1, INTERFACE_PREFIX.encode())
    verdict = attribute(2 | NESTED, _number(1, _DROP))
    yield _expression("meta", _number(1, _REGISTER) + _number(2, interface))
    yield _expression("cmp", _number(1, _REGISTER) + _number(2, _EQUAL) + attribute(3 | NESTED, prefix))
    yield _expression("immediate", _number(1, _VERDICT_REGISTER) + attribute(2 | NESTED, verdict))


def _expression(name: str, data: bytes) -> bytes:
    content = _text(_EXPRESSION_NAME, name) + attribute(_EXPRESSION_DATA | NESTED, data)
    return attribute(_ELEMENT | NESTED, content)


def _header(family: int) -> bytes:
    return struct.pack("=BBH", family, 0, 0)


def _text(kind: int, text: str) -> bytes:
    return attribute(kind, text.encode() + b"\0")


def _number(kind: int, number: int) -> bytes:
    return attribute(kind, struct.pack("!I", number))
