"""Reads the passwords of BGP sessions (TCP MD5, RFC 2385) from a file on this host. They are not in the store.

A line is `PEER PASSWORD`, with the address of a peer, or `mesh PASSWORD`, for all hosts of the full mesh; the line of a
peer takes precedence. The password is the rest of the line, and may contain spaces. Empty lines, and lines that begin
with `#`, are ignored.

If one line is invalid, the whole file is refused, and the passwords of its last valid version stay in use. Error
messages never quote a line.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from calicoctl.addresses import canonical
from calicoctl.errors import CalicoError

PATH = Path("/etc/calico/bgp-passwords")

OWNER = 0
"""The user ID of the file's owner: root."""

MESH = "mesh"

LONGEST = 80
"""The maximum size of a password in bytes. Source: TCP_MD5SIG_MAXKEYLEN in linux/tcp.h."""

LARGEST = 2**20
"""The maximum size of the file in bytes."""

_Stamp = tuple[int, ...]


@dataclass(frozen=True)
class Passwords:
    """The passwords of the last valid version of the file, and what is wrong with the current version."""

    peers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Address of a peer (canonical) -> password."""
    mesh: str | None = field(default=None, repr=False)
    problem: str | None = None
    """A sentence that says why the current file is refused, and what to do; None for a valid or missing file."""
    known: bool = True
    """False if the file is refused and no earlier version was valid. Then the passwords of sessions are unknown."""
    stamp: _Stamp | None = None
    """Identifies the version of the file; None if the file is missing, or could not be read."""

    def of(self, peer: str, in_mesh: bool) -> str | None:
        """Return the password of the session with `peer`, a canonical address; None if the session has no password.

        `in_mesh` says whether the peer is a host of the full mesh.
        """
        return self.peers.get(peer, self.mesh if in_mesh else None)


def read(path: Path = PATH, before: Passwords | None = None) -> Passwords:
    """Return the passwords in a file. `before` is the result of the previous call, None in the first call.

    If the file has not changed, return `before`. If the file is missing, the result contains no passwords. If the file
    is invalid or cannot be read, the result contains the passwords in `before`, and `problem` says what is wrong; no
    exception is raised.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        if path.is_symlink():
            return _refused(before, f"{path} is a symbolic link to a file that does not exist", None)
        return before if before is not None and before.stamp is None and before.problem is None else Passwords()
    except OSError as error:
        return _refused(before, f"{path} cannot be read: {error.strerror}", None)
    if before is not None and before.stamp == _stamp(found):
        return before
    stamp = None
    try:
        # O_NONBLOCK: to open a named pipe must not block
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            opened = os.fstat(file.fileno())
            stamp = _stamp(opened)
            _check(path, opened)
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise CalicoError(f"{path} has more than {LARGEST} bytes")
        return replace(parse(content, str(path)), stamp=stamp)
    except OSError as error:
        return _refused(before, f"{path} cannot be read: {error.strerror}", None)  # None: try again next time
    except CalicoError as error:
        return _refused(before, str(error), stamp)


def _stamp(found: os.stat_result) -> _Stamp:
    return (
        *(found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size),
        *(found.st_mode, found.st_uid),
    )


def _refused(before: Passwords | None, why: str, stamp: _Stamp | None) -> Passwords:
    if before is None or not before.known:
        return Passwords(problem=f"{why}; until then, no BGP session is set up or changed", known=False, stamp=stamp)
    return replace(before, problem=f"{why}; until then, the passwords from before stay in use", stamp=stamp)


def _check(path: Path, found: os.stat_result) -> None:
    """Raise CalicoError unless the file is a regular file that only root can read or write. `found` is its status."""
    if not stat.S_ISREG(found.st_mode):
        raise CalicoError(f"{path} is not a regular file: replace it by one, of root and with mode 0600")
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid != OWNER or mode & 0o077:
        owner = "" if found.st_uid == OWNER else f"belongs to user {found.st_uid} and "
        raise CalicoError(
            f"{path} {owner}has mode {mode:04o}, so its passwords may be known to others: run 'chown root {path}; "
            f"chmod 600 {path}', and consider changing them"
        )


def parse(content: bytes, name: str) -> Passwords:
    """Return the passwords in a file's content. Raises CalicoError for the first invalid line.

    The error's text contains `name`, the file's name, but nothing of the content.
    """
    peers: dict[str, str] = {}
    mesh: str | None = None
    for number, line in enumerate(content.split(b"\n"), 1):
        where = f"{name}, line {number}"
        words = line.strip().split(None, 1)
        if not words or words[0].startswith(b"#"):
            continue
        if len(words) != 2:
            raise CalicoError(f"{where}: there is no password: write 'PEER PASSWORD' or 'mesh PASSWORD'")
        peer, password = _peer(words[0], where), _password(words[1], where)
        if peer in peers or (peer == MESH and mesh is not None):
            raise CalicoError(f"{where}: an earlier line is about the same peer: remove one of them")
        if peer == MESH:
            mesh = password
        else:
            peers[peer] = password
    return Passwords(peers, mesh)


def _peer(word: bytes, where: str) -> str:
    text = word.decode("ascii", "replace")
    if text == MESH:
        return MESH
    try:
        return canonical(text)
    except (OSError, ValueError):  # the word itself may be a password
        raise CalicoError(f"{where}: it begins neither with the address of a peer nor with 'mesh'") from None


def _password(word: bytes, where: str) -> str:
    """Decode a password. Raise CalicoError if TCP or BIRD's language does not allow it, or if it is not UTF-8.

    Source: the state STRING in BIRD's conf/cf-lex.l.
    """
    try:
        text = word.decode()
    except UnicodeDecodeError:
        raise CalicoError(f"{where}: the password is not UTF-8 text: choose another one") from None
    if '"' in text:
        raise CalicoError(
            f"{where}: the password contains a quotation mark, which BIRD cannot take: choose another one"
        )
    if not all(c.isprintable() for c in text):
        raise CalicoError(f"{where}: the password contains a control character: choose another one")
    if len(word) > LONGEST:
        raise CalicoError(
            f"{where}: the password has more than {LONGEST} bytes, which TCP cannot take: choose another one"
        )
    return text
