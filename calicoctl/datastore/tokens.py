"""Logs in to etcd's v3 API as the user in the environment, and stores the token in a file for later commands.

A login takes etcd longer than most commands. The file is in /run/calico for root, and in the runtime directory for
other users; only the caller can read it. If etcd refuses a token, the token of another thread or of another command is
used, if there is one. If etcd refuses this token as well, a login yields a new one. No message contains a password or a
token.

Source: https://github.com/etcd-io/etcd/blob/release-3.4/Documentation/op-guide/authentication.md
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
import threading
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from calicoctl import files
from calicoctl.datastore.etcd3_http import FAILED_PRECONDITION, Authorize, Connection, ErrorAnswer
from calicoctl.datastore.settings import EtcdSettings
from calicoctl.errors import StoreError

_NAME = ".etcd-token"
"""The name of the file. It differs from those of all folders in /run/calico, which are names of hosts."""

_MOST_REFUSED = 3
"""The number of refused tokens after which a login is made for the next one. Until then, the token of another thread or
of another command is used, if etcd has not refused it yet."""

_lock = threading.Lock()
_tokens: dict[EtcdSettings, str | None] = {}
"""Cluster and user -> the last token in this process, None if etcd does not require tokens."""


def authorize(settings: EtcdSettings) -> Authorize | None:
    """Return a function that returns a token of the user in `settings`: see Authorize. None if no user is set."""
    if settings.username is None:
        return None

    def token(member: Connection, refused: Collection[str]) -> tuple[str | None, bool]:
        with _lock:  # the agent has many connections, of which only one needs to log in
            if len(refused) < _MOST_REFUSED:
                if settings in _tokens and (_tokens[settings] or "") not in refused:
                    return _tokens[settings], False
                stored = _read(settings)
                if stored is not None and stored not in refused:
                    _tokens[settings] = stored
                    return stored, False
            found = _tokens[settings] = _logged_in(member, settings)
            _keep(settings, found)
            # users may be switched on just now, so that a token is needed after all
            return found, found is not None or "" in refused

    return token


def forget() -> None:
    """Remove the file with the caller's token, if there is one."""
    path = _path(create=False)
    if path is not None:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _logged_in(member: Connection, settings: EtcdSettings) -> str | None:
    """Log in; return the token, None if authentication is disabled in etcd.

    Raises StoreError if etcd refuses the login, and what Connection.exchange raises.
    """
    member.token = None  # etcd refuses a password that comes with a token that it does not know
    user = {"name": settings.username, "password": settings.password}
    try:
        token = member.exchange("POST", "/v3/auth/authenticate", user).get("token")
    except ErrorAnswer as error:
        if error.code == FAILED_PRECONDITION:  # users are not switched on
            return None
        raise StoreError(
            f"etcd at {member.url} does not let user '{settings.username}' in ({error.message}): see ETCD_USERNAME and "
            "ETCD_PASSWORD, or ETCD_PASSWORD_FILE"
        ) from None
    if not isinstance(token, str) or not token.isprintable():
        raise member.no_etcd("there is no token in the answer to a password")
    return token


def _read(settings: EtcdSettings) -> str | None:
    """Return the token in the file, None if no token for the user and the cluster in `settings` can be read there."""
    path = _path(create=False)
    try:
        if path is None:
            return None
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
                return None
            salt, whose, token = json.loads(file.read(2**16) or b"")
        own = hmac.compare_digest(whose, _digest(settings, salt))
        return str(token) if own and str(token).isprintable() else None
    except (OSError, RecursionError, TypeError, ValueError):
        return None


def _keep(settings: EtcdSettings, token: str | None) -> None:
    path = _path(create=True) if token is not None else None
    if path is not None:
        salt = secrets.token_hex(16)
        content = json.dumps([salt, _digest(settings, salt), token]).encode()
        with suppress(OSError):  # the next command logs in, too
            files.replace(path, content, 0o600, suffix=f".{os.getpid()}").close()


def _digest(settings: EtcdSettings, salt: str) -> str:
    """Return a salted hash of the user, password and cluster in `settings`."""
    whose = [salt, settings.scheme, sorted(settings.members), settings.ca_cert, settings.username, settings.password]
    return hashlib.sha256(json.dumps(whose).encode()).hexdigest()


def _path(create: bool) -> Path | None:
    """Return the path of the file with the caller's token, None if its folder does not exist or is not safe.

    A folder is safe if it belongs to the caller, and nobody else can write to it or, unless the caller is root, read
    it. If `create` is true, and the caller is root, a missing folder is created.
    """
    user = os.geteuid()
    folder = files.RUN if user == 0 else Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{user}")
    try:
        if create and user == 0:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    others = 0o022 if user == 0 else 0o077
    usable = stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & others
    return folder / _NAME if usable else None
