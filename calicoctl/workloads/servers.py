"""Determines the addresses of the servers that this host depends on: the members of its etcd, and its DNS servers.

Workloads must not have these addresses (datastore/reserved.py).
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from contextlib import suppress

from calicoctl.addresses import canonical
from calicoctl.datastore import last_known
from calicoctl.datastore.reserved import Servers

RESOLV_CONF = ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf")
"""The first file may name only a local resolver; the second names the servers that systemd-resolved queries."""


def current(members: Iterable[str]) -> Servers:
    """Return the servers that this host depends on now; `members` are the names, or addresses, of etcd's members.

    If a member's name cannot be resolved, the result contains its last known addresses (last_known.py). If none are
    known, the name is in the field `unknown` of the result. The call blocks until the resolver answers or gives up.
    """
    found = {member: resolved(member) or last_known.addresses(member) for member in members}
    unknown = frozenset(member for member, addresses in found.items() if not addresses)
    return Servers(frozenset().union(*found.values()), dns_servers(), unknown)


def resolved(name: str) -> frozenset[str]:
    """Return the canonical addresses of a host name; an empty set if the name cannot be resolved.

    `name` may also be an IP address, which the result then contains. An IPv6 address may be in brackets.
    """
    with suppress(OSError, UnicodeError):  # of an invalid or unknown name
        found = socket.getaddrinfo(name.strip("[]"), None, type=socket.SOCK_STREAM)
        return _canonical(str(address[0]) for *_, address in found)
    return frozenset()


def dns_servers(paths: Iterable[str] = RESOLV_CONF) -> frozenset[str]:
    """Return the canonical addresses of the DNS servers that are named in the files at `paths`.

    The files have the format of resolv.conf(5). Files that cannot be read are skipped. Source, for the second file of
    RESOLV_CONF: systemd-resolved.service(8).
    """
    lines = []
    for path in paths:
        with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
            lines += [line.split() for line in file]
    return _canonical(words[1] for words in lines if len(words) > 1 and words[0] == "nameserver")


def _canonical(texts: Iterable[str]) -> frozenset[str]:
    found = set()
    for text in texts:
        with suppress(OSError, ValueError):  # such as fe80::1%eth0, which no workload can have
            found.add(canonical(text))
    return frozenset(found)
