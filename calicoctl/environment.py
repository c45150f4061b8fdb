"""The settings file that every command and the systemd unit read, and whose variables complete the environment.

Commands call `complete` when they start. `calicoctl node --local-etcd` writes its own lines into the file, between two
comments.

Source of the syntax: EnvironmentFile= in systemd.exec(5), and systemd's src/basic/env-file.c. A comment ends with its
line, even after a backslash, as in systemd since version 254. An invalid line is an error, unlike in systemd.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path

from calicoctl import files
from calicoctl.errors import CalicoError

DEFAULT_PATH = "/etc/calico/node.env"
PATH_VARIABLE = "CALICO_ENV_FILE"

STORE = (
    *("DATASTORE_TYPE", "ETCD_ENDPOINTS", "ETCD_AUTHORITY", "ETCD_SCHEME", "ETCD_CA_CERT_FILE", "ETCD_CERT_FILE"),
    *("ETCD_KEY_FILE", "ETCD_USERNAME", "ETCD_PASSWORD", "ETCD_PASSWORD_FILE"),
)
"""Variables that select the store. Those in the file are used only if the environment sets none of them."""

DOCKER_TLS = ("DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH")
"""Variables that belong to DOCKER_HOST. Those in the file are used only if the environment does not set DOCKER_HOST."""

SINGLE = ("HOSTNAME", "DOCKER_HOST", *DOCKER_TLS, "CALICO_DEBUG")
"""Variables in the file that are used if the environment does not set them. Those in DOCKER_TLS depend on
DOCKER_HOST, too."""

LARGEST = 2**20
"""The maximum size of a settings file, in bytes."""

_BEGIN = "# BEGIN calicoctl node --local-etcd"
_END = "# END calicoctl node --local-etcd"
_OWN_LINES = re.compile(rf"^{_BEGIN}(?P<made>.*)\n(?P<lines>(?:.*\n)*?){_END}[ \t\r]*(?:\n|\Z)", re.MULTILINE)

_MADE_FILE, _MADE_FOLDER = "and this file", "and this file and its folder"


def complete(environment: MutableMapping[str, str] = os.environ, file_first: bool = False) -> None:
    """Add variables of the settings file to `environment`, under the conditions at STORE, DOCKER_TLS and SINGLE.

    With `file_first`, the variables in STORE are first removed from `environment` if the file sets any of them, and
    HOSTNAME if the file sets it. So what the file says about the store and the host's name is used, in whichever
    environment a program is started.

    A variable with an empty value counts as not set. Raises CalicoError if the file is unreadable or invalid, or if it
    sets CALICO_ENV_FILE.
    """
    file = EnvironmentFile(environment)
    written = file.variables()
    if PATH_VARIABLE in written:
        raise CalicoError(f"{file.path} sets {PATH_VARIABLE}, which names this very file: remove that line")
    if file_first:
        for names in (STORE, ("HOSTNAME",)):
            if any(written.get(name) for name in names):
                for name in names:
                    environment.pop(name, None)
    store_is_set = any(environment.get(name) for name in STORE)
    engine_is_set = bool(environment.get("DOCKER_HOST"))
    for name, value in written.items():
        if name in STORE:
            taken = not store_is_set
        elif name in DOCKER_TLS and engine_is_set:
            taken = False
        else:
            taken = name in SINGLE and not environment.get(name)
        if taken and value:
            environment[name] = value


def engine_of(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the values of the variables that select the Docker Engine; "" for each that is not set."""
    return tuple(environment.get(name) or "" for name in ("DOCKER_HOST", *DOCKER_TLS))


class EnvironmentFile:
    """The settings file: the file named by CALICO_ENV_FILE, or DEFAULT_PATH. A missing file counts as empty."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self.path = Path(environment.get(PATH_VARIABLE) or DEFAULT_PATH).absolute()

    def variables(self) -> dict[str, str]:
        """Return the variables that the file sets. Raises CalicoError if the file is unreadable or invalid."""
        return parse(self._text(), str(self.path))

    def own(self) -> dict[str, str]:
        """Return the variables in the lines that calicoctl wrote.

        Raises CalicoError if the file is unreadable, or if those lines are invalid.
        """
        found = _OWN_LINES.search(self._text())
        return parse(found["lines"], str(self.path)) if found else {}

    def others(self) -> dict[str, str]:
        """Return the variables in the lines that calicoctl did not write.

        Raises CalicoError if the file is unreadable, or if those lines are invalid.
        """
        return parse(_OWN_LINES.sub("", self._text()), str(self.path))

    def set_own(self, variables: Mapping[str, str]) -> None:
        """Replace the lines that calicoctl wrote, if there are any, by lines for `variables`. Keep the other lines.

        Raises CalicoError if the file cannot be read or written.
        """
        text = self._text()
        found = _OWN_LINES.search(text)
        if found is not None:
            made = found["made"]
        else:
            removal = ""
            if not self.path.exists():
                removal = f", {_MADE_FILE if self.path.parent.exists() else _MADE_FOLDER}, if nothing else is left"
            made = f" ('calicoctl node remove' removes these lines{removal})"
        lines = "".join(f"{name}={value}\n" for name, value in variables.items())
        # at the beginning: at the end, they might continue an unfinished last line
        self._replace(f"{_BEGIN}{made}\n{lines}{_END}\n{_OWN_LINES.sub('', text)}")

    def remove_own(self) -> None:
        """Remove the lines that calicoctl wrote.

        If calicoctl created the file, and no other lines are left, the file is removed. If calicoctl created the file's
        directory, too, and the directory is then empty, the directory is removed. Raises CalicoError if the file cannot
        be read, written or removed.
        """
        text = self._text()
        found = _OWN_LINES.search(text)
        if found is None:
            return
        rest = _OWN_LINES.sub("", text)
        if rest.strip() or _MADE_FILE not in found["made"]:
            self._replace(rest)
            return
        try:
            self.path.unlink()
        except OSError as error:
            raise CalicoError(f"{self.path} cannot be removed: {error.strerror}") from None
        if _MADE_FOLDER in found["made"]:
            with suppress(OSError):  # it has other files
                self.path.parent.rmdir()

    def _text(self) -> str:
        if str(self.path) == os.devnull:
            return ""
        try:
            # O_NONBLOCK: a named pipe must not block
            with open(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise CalicoError(f"{self.path} cannot be read: it is not a regular file")
                content = file.read(LARGEST + 1)
            if len(content) > LARGEST:
                raise CalicoError(f"{self.path} cannot be read: it has more than {LARGEST} bytes")
            return content.decode()
        except FileNotFoundError as error:
            if not self.path.is_symlink():
                return ""
            why = f"{error.strerror} (it is a link)"
        except UnicodeDecodeError:
            why = "it is not UTF-8 text"
        except OSError as error:
            why = error.strerror or str(error)
            if isinstance(error, PermissionError) and os.geteuid() != 0:
                why += "; run this as root (with sudo, say), or let its readers include this user"
        raise CalicoError(f"{self.path}, which says which store and host name to use, cannot be read: {why}")

    def _replace(self, text: str) -> None:
        path = self.path.resolve()  # a symbolic link stays one
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            mode, owner = 0o644, (-1, -1)  # of a new file: commands of every user read it; it holds no secrets
            if path.exists():
                old = path.stat()
                mode, owner = stat.S_IMODE(old.st_mode), (old.st_uid, old.st_gid)
            files.replace(path, text.encode(), mode, owner, suffix=f".{os.getpid()}", durable=True).close()
        except OSError as error:
            raise CalicoError(
                f"{self.path} cannot be written: {error.strerror}; {PATH_VARIABLE} may name another file for it"
            ) from None


# The syntax

_BLANKS = re.compile(r"[ \t]*")
_GAP = re.compile(r"(?:[ \t\r\n]+|[#;][^\r\n]*)*")
_NAME = re.compile(r"[^=\r\n]*")
_QUOTED = re.compile(r"""'(?P<single>[^']*)'|"(?P<double>(?:\\[\s\S]|[^"\\])*)\"""")
_PLAIN = re.compile(r"(?:\\(?:[\s\S]|\Z)|[^\\\r\n])*?(?=[ \t]*(?:[\r\n]|\Z))")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def parse(text: str, name: str) -> dict[str, str]:
    """Return the variables that a text in systemd's syntax sets.

    Raises CalicoError if the text is invalid. `name` is the name of the file; the error's text begins with it.
    """
    found = {}
    place = _end(_GAP, text, 0)
    while place < len(text):
        where = f"{name}, line {text.count(chr(10), 0, place) + 1}"
        end = _end(_NAME, text, place)
        variable = text[place:end].rstrip(" \t")
        if text[end : end + 1] != "=":
            raise CalicoError(f"{where}: '{variable}' sets no variable: there is no '=' in it")
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", variable, re.ASCII):
            hint = "; the file is systemd's, and no shell's" if variable.startswith("export") else ""
            raise CalicoError(f"{where}: '{variable}' is not the name of a variable{hint}")
        value, place = _value(text, end + 1, where)
        if _CONTROL.search(value):
            raise CalicoError(f"{where}: the value of {variable} has a control character in it")
        found[variable] = value
        place = _end(_GAP, text, place)
    return found


def _value(text: str, place: int, where: str) -> tuple[str, int]:
    """Parse the value that begins at index `place` of `text`. Return the value, and the index of its end.

    Raises CalicoError if the value is invalid. `where` names the file and the line; the error's text begins with it.
    """
    pieces = []
    while True:
        place = _end(_BLANKS, text, place)
        if text[place : place + 1] not in ("'", '"'):
            break
        quoted = _QUOTED.match(text, place)
        if quoted is None:
            raise CalicoError(f"{where}: the quotation that begins with {text[place]} does not end")
        if quoted["single"] is not None:
            pieces.append(quoted["single"])
        else:
            pieces.append(re.sub(r'\\(?:\n|(["\\`$]))', lambda match: match[1] or "", quoted["double"]))
        place = quoted.end()
    end = _end(_PLAIN, text, place)
    pieces.append(re.sub(r"\\(?:[\r\n]|([\s\S]?))", lambda match: match[1] or "", text[place:end]))
    return "".join(pieces), end


def _end(pattern: re.Pattern[str], text: str, place: int) -> int:
    match = pattern.match(text, place)
    assert match is not None
    return match.end()
