"""The settings for access to etcd: members, API, TLS files and user, read from environment variables."""

from __future__ import annotations

import os
import stat
from base64 import b64encode
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Mapping
from urllib.parse import urlsplit

from calicoctl.environment import EnvironmentFile
from calicoctl.errors import CalicoError, StoreError, redact_userinfo

Member = tuple[str, int]
"""A member of the cluster: host name or address (an IPv6 address in brackets), and port."""

DEFAULT_MEMBERS: tuple[Member, ...] = (("127.0.0.1", 2379),)

TYPE = "DATASTORE_TYPE"
"""The environment variable that selects the API of etcd. If it is not set, detection.py determines the API."""

V2, V3 = "etcdv2", "etcdv3"
"""The values of the variable TYPE."""

LONGEST_PASSWORD = 4096
"""The maximum size of a file with a password, in bytes."""

_USER_ELSEWHERE = "the name and the password of a user are set by ETCD_USERNAME and ETCD_PASSWORD"


@dataclass(frozen=True)
class EtcdSettings:
    """The settings for access to etcd: members, TLS files, API and user.

    `scheme` is "http" or "https". `ca_cert`, `cert` and `key` are the paths of the TLS files (PEM), None for a file
    that is not set. If `is_default` is true, none of the variables ETCD_ENDPOINTS, ETCD_AUTHORITY and ETCD_SCHEME is
    set, so port 2379 of this host is used. `api` is V2 or V3, None if the environment does not select an API.
    `username` and `password` are both set or both None. `password_file` is the path of the file that `password` was
    read from, None if it was not in a file.
    """

    scheme: str
    members: tuple[Member, ...]
    ca_cert: str | None = None
    cert: str | None = None
    key: str | None = None
    is_default: bool = field(default=False, compare=False)
    api: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    password_file: str | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> EtcdSettings:
        """Read the settings from environment variables, and check that the files can be used.

        ETCD_AUTHORITY and ETCD_SCHEME are used only if ETCD_ENDPOINTS is not set. Raises StoreError if a variable is
        invalid, or if a file cannot be used.
        """
        api = environment.get(TYPE) or None
        if api not in (None, V2, V3):
            raise StoreError(f"{TYPE} is '{api}': it must be {V2} or {V3}, or unset, to use the one with the data")
        if environment.get("ETCD_ENDPOINTS"):
            scheme, members = _parse_endpoints(environment["ETCD_ENDPOINTS"])
            source = "ETCD_ENDPOINTS"
        else:
            scheme = environment.get("ETCD_SCHEME") or "http"
            if scheme not in ("http", "https"):
                raise StoreError(f"ETCD_SCHEME is '{scheme}': it must be http or https")
            authority = environment.get("ETCD_AUTHORITY") or "127.0.0.1:2379"
            members = (_parse_authority("ETCD_AUTHORITY", authority),)
            source = "ETCD_SCHEME"
        files = {}
        for name in ("ETCD_CA_CERT_FILE", "ETCD_CERT_FILE", "ETCD_KEY_FILE"):
            path = files[name] = environment.get(name) or None
            if path is None:
                continue
            if scheme == "http":
                raise StoreError(f"{name} is set, but {source} says http: TLS files go with https")
            try:
                with open(path, "rb"):
                    pass
            except OSError as error:
                raise StoreError(f"{name}: cannot read {path}: {error.strerror}") from None
        for one, other in (("ETCD_CERT_FILE", "ETCD_KEY_FILE"), ("ETCD_KEY_FILE", "ETCD_CERT_FILE")):
            if files[one] and not files[other]:
                raise StoreError(f"{one} is set without {other}: a client certificate needs both")
        if scheme == "https":
            _check_tls_files(files["ETCD_CA_CERT_FILE"], files["ETCD_CERT_FILE"], files["ETCD_KEY_FILE"])
        is_default = not any(environment.get(name) for name in ("ETCD_ENDPOINTS", "ETCD_AUTHORITY", "ETCD_SCHEME"))
        return cls(
            scheme,
            members,
            files["ETCD_CA_CERT_FILE"],
            files["ETCD_CERT_FILE"],
            files["ETCD_KEY_FILE"],
            is_default,
            api,
            *_user(environment),
        )

    def url(self, member: Member) -> str:
        return f"{self.scheme}://{member[0]}:{member[1]}"

    @property
    def urls(self) -> str:
        """The URLs of all members, for messages."""
        return ", ".join(map(self.url, self.members))

    def current_password(self) -> str | None:
        """Return the user's password, which is read again if it is in a file. Raises StoreError if it is unusable."""
        return self.password if self.password_file is None else _password_in(self.password_file)

    @property
    def basic(self) -> str | None:
        """The value of the header `Authorization` in requests to the v2 API; None if no user is set."""
        if self.username is None:
            return None
        return f"Basic {b64encode(f'{self.username}:{self.password}'.encode()).decode()}"

    def local_etcd_hint(self, one: str, local: str, would_do: bool = False) -> str:
        """Return a clause for an error message that suggests `calicoctl node --local-etcd`.

        Returns "" if that command would be refused. In the clause, the text `one` stands for an etcd that the command
        would start for the first time, and the text `local` for an etcd that the command would start again. If
        `would_do` is true, the command would start an etcd for the first time although the environment names a member.
        """
        command = "'calicoctl node --local-etcd'"
        if self.is_default or would_do:
            return f"for a host that is alone, {command} starts {one}"
        with suppress(CalicoError):
            if EnvironmentFile().own().get("ETCD_AUTHORITY") in {f"{name}:{port}" for name, port in self.members}:
                return f"{command}, which has written this address into {EnvironmentFile().path}, starts {local} again"
        return ""


def _user(environment: Mapping[str, str]) -> tuple[str | None, str | None, str | None]:
    """Return the name of etcd's user, the password, and the path of the file that has it; None for each not set.

    Raises StoreError if a variable is missing or invalid, or if the file with the password cannot be used. The error
    messages contain no password.
    """
    username = environment.get("ETCD_USERNAME") or None
    password, path = (environment.get(name) or None for name in ("ETCD_PASSWORD", "ETCD_PASSWORD_FILE"))
    if password is not None and path is not None:
        raise StoreError("ETCD_PASSWORD and ETCD_PASSWORD_FILE are both set: set one")
    if username is None and (password or path):
        raise StoreError(f"{'ETCD_PASSWORD' if password else 'ETCD_PASSWORD_FILE'} is set without ETCD_USERNAME")
    if username is not None and not (password or path):
        raise StoreError("ETCD_USERNAME is set without ETCD_PASSWORD or ETCD_PASSWORD_FILE: a user needs a password")
    if username is not None and not username.isprintable():
        raise StoreError("ETCD_USERNAME must be printable UTF-8 text, and is not: set it to the name of a user of etcd")
    if password is not None and not _is_utf8(password):
        raise StoreError("ETCD_PASSWORD is not UTF-8 text, as etcd's passwords are: set it in a terminal with UTF-8")
    return username, password if path is None else _password_in(path), path


def _is_utf8(text: str) -> bool:
    """Return whether the value of an environment variable is UTF-8 text.

    In `text`, Python has replaced each byte that is not UTF-8 by a surrogate.
    """
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _password_in(path: str) -> str:
    try:
        # O_NONBLOCK: a named pipe must not block
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            content = file.read(LONGEST_PASSWORD + 1) or b""
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        password = content.decode().rstrip("\r\n")
    except OSError as error:
        raise StoreError(f"ETCD_PASSWORD_FILE: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise StoreError(f"ETCD_PASSWORD_FILE: {path} is not UTF-8 text") from None
    if not password or len(content) > LONGEST_PASSWORD or not password.isprintable():
        raise StoreError(f"ETCD_PASSWORD_FILE: {path} must hold a password, in one line, and nothing else")
    if mode & 0o077:
        raise StoreError(
            f"ETCD_PASSWORD_FILE: {path} has mode {mode:04o}, so the password may be known to others than its owner: "
            f"run 'chmod 600 {path}', and consider changing the password"
        )
    return password


def _check_tls_files(ca_cert: str | None, cert: str | None, key: str | None) -> None:
    """Raise StoreError if a TLS file cannot be used. None stands for a file that is not set.

    All files must be in PEM format. The client's key must have no password, and must belong to the client's
    certificate.
    """
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if ca_cert is not None:
        try:
            context.load_verify_locations(ca_cert)
        except (OSError, ValueError):
            raise StoreError(f"ETCD_CA_CERT_FILE: {ca_cert} holds no certificate in PEM format") from None
    if cert is not None:
        try:
            context.load_cert_chain(cert, key, password=lambda: b"")
        except (OSError, ValueError):
            raise StoreError(
                f"ETCD_CERT_FILE and ETCD_KEY_FILE: {cert} and {key} are not a certificate and its key, without a "
                "password, in PEM format"
            ) from None


def _parse_endpoints(text: str) -> tuple[str, tuple[Member, ...]]:
    if "@" in text:  # checked before splitting at commas and colons, which a password may contain
        raise StoreError(f"ETCD_ENDPOINTS: '{redact_userinfo(text)}': {_USER_ELSEWHERE}")
    scheme = ""
    members = []
    for url in (part.strip() for part in text.split(",")):
        url_scheme, separator, rest = url.partition("://")
        if not separator or url_scheme not in ("http", "https"):
            raise StoreError(f"ETCD_ENDPOINTS: '{redact_userinfo(url)}' is not a URL such as http://192.0.2.1:2379")
        if scheme and url_scheme != scheme:
            raise StoreError("ETCD_ENDPOINTS mixes http and https: all endpoints must have the same scheme")
        scheme = url_scheme
        members.append(_parse_authority("ETCD_ENDPOINTS", rest.rstrip("/")))
    return scheme, tuple(members)


def _parse_authority(variable: str, text: str) -> Member:
    try:
        parts = urlsplit("//" + text)
        if parts.hostname and parts.port and parts.netloc == text and "@" not in text and not set(text) & set(" \t%"):
            return (f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname, parts.port)
    except ValueError:
        pass
    why = f"; {_USER_ELSEWHERE}" if "@" in text else ""
    raise StoreError(
        f"{variable}: '{redact_userinfo(text)}' is not an address such as 192.0.2.1:2379 (host and port){why}"
    )
