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
import secrets
import threading
from collections.abc import Collection

from calicoctl import files
from calicoctl.datastore.etcd3_http import FAILED_PRECONDITION, Authorize, Connection, ErrorAnswer
from calicoctl.datastore.settings import EtcdSettings
from calicoctl.errors import StoreError

_NAME = ".etcd-token"
"""The name of the file: see files.leave."""

_MOST_REFUSED = 3
"""The number of refused tokens after which a login is made for the next one. Until then, the token of another thread or
of another command is used, if etcd has not refused it yet."""

_lock = threading.Lock()
_tokens: dict[EtcdSettings, str | None] = {}
"""Cluster and user -> the last token in this process, None if etcd does not require tokens."""


def authorize(settings: EtcdSettings) -> Authorize | None:
    """Return a function that finds the token to send for the user in `settings`, and logs in if need be.

    etcd3_http.Authorize describes its arguments and its result. None is returned if no user is set.
    """
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
    files.remove_left(_NAME)


def _logged_in(member: Connection, settings: EtcdSettings) -> str | None:
    """Log in; return the token, None if authentication is disabled in etcd.

    Raises StoreError if etcd refuses the login or if the password cannot be read, and what Connection.exchange raises.
    """
    member.token = None  # etcd refuses a password that comes with a token that it does not know
    # an agent may have been started before the password was changed
    user = {"name": settings.username, "password": settings.current_password()}
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
    try:
        salt, whose, token = json.loads(files.read_left(_NAME) or b"")
        own = hmac.compare_digest(whose, _digest(settings, salt))
        return str(token) if own and str(token).isprintable() else None
    except (RecursionError, TypeError, ValueError):
        return None


def _keep(settings: EtcdSettings, token: str | None) -> None:
    if token is not None:
        salt = secrets.token_hex(16)
        files.leave(_NAME, json.dumps([salt, _digest(settings, salt), token]).encode())


def _digest(settings: EtcdSettings, salt: str) -> str:
    """Return a salted hash of the user, password and cluster in `settings`."""
    whose = [salt, settings.scheme, sorted(settings.members), settings.ca_cert, settings.username, settings.password]
    return hashlib.sha256(json.dumps(whose).encode()).hexdigest()
