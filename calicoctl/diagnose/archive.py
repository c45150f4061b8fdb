"""Collects diagnostics of this host into one archive, without secrets. Writes nothing but the archive.

If the source of a file raises an exception, the file contains the error. The lists below name the environment
variables, the etcd keys and the fields of JSON values whose values are included; other values are left out. The
environment of Docker's containers is never included. Everything that looks like a secret is removed from every file.
"""

from __future__ import annotations

import json
import os
import platform
import pwd
import re
import stat
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Callable, Union

from calicoctl import __commit__, __version__, engine
from calicoctl.datastore import config, keys
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.hosts import hostname
from calicoctl.datastore.model import Endpoint, Peer, Pool, Rule
from calicoctl.datastore.store import Entry
from calicoctl.diagnose import checks, host_status
from calicoctl.errors import CalicoError, redact_userinfo
from calicoctl.felix.bgp import bird
from calicoctl.felix.bgp.instance import Instance
from calicoctl.felix.bgp.processes import USER

Source = Callable[[], Union[str, Iterable[str]]]
"""Returns the text of one file of the archive, or its parts, if the text can be long. No secret begins in one part and
ends in another. May raise any exception, also when the next part is requested.
"""

LOG_SIZE = 4 * 2**20
"""How many bytes at the end of each log are included."""

_COMMANDS = {
    "nftables.txt": ("nft", "list", "ruleset"),
    "iptables.txt": ("iptables-save",),
    "ip6tables.txt": ("ip6tables-save",),
    "routes-ipv4.txt": ("ip", "-4", "route", "show", "table", "all"),
    "routes-ipv6.txt": ("ip", "-6", "route", "show", "table", "all"),
    "routing-rules.txt": ("ip", "rule", "show"),
    "neighbours.txt": ("ip", "neighbour", "show", "nud", "all"),
    "neighbours-proxied.txt": ("ip", "neighbour", "show", "proxy"),
    "links.txt": ("ip", "-details", "-statistics", "link", "show"),
    "addresses.txt": ("ip", "address", "show"),
    "namespaces.txt": ("ip", "netns", "list"),
    "connections.txt": ("conntrack", "-L"),
    "vxlan.txt": ("ip", "-details", "link", "show", "type", "vxlan"),
    "forwarding.txt": ("bridge", "fdb", "show"),
}

_SETTINGS = ("net/ipv4/ip_forward", "net/ipv4/conf/*/*", "net/ipv6/conf/*/*", "net/netfilter/nf_conntrack_*")
_DOCKER_INFO = ("ServerVersion", "OperatingSystem", "KernelVersion", "Driver", "CgroupVersion", "Warnings", "Plugins")
_CONTAINER = ("Id", "Names", "Image", "State", "Status", "NetworkSettings")

_HIDDEN = "(left out)"

_VARIABLES = (
    *("ETCD_ENDPOINTS", "ETCD_AUTHORITY", "ETCD_SCHEME", "ETCD_CA_CERT_FILE", "ETCD_CERT_FILE", "ETCD_KEY_FILE"),
    *("DOCKER_HOST", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH", "HOSTNAME", "CALICO_DEBUG", "CALICO_ENV_FILE"),
    *("DATASTORE_TYPE", "ETCD_USERNAME"),
)
"""Variables that are included with their values, without userinfo in URLs. Of other ETCD_…, DOCKER_… and CALICO_…
variables, only the names are included."""

_FIELDS = {
    *(name for kind in (Endpoint, Rule, Pool, Peer) for name in kind.__dataclass_fields__ if name != "extra"),
    *("profile_id", "inbound_rules", "outbound_rules", "cidr", "affinity", "allocations", "attributes", "handle_id"),
    *("unallocated", "strict_affinity", "secondary", "host", "orchestrator", "workload", "endpoint", "interface"),
    *("namespace", "node", "block", "vxlan_mode", "disabled"),
    *("enabled", "time", "uptime", "first_update", "machine", "boot", "status", "index", "reason"),
    *("datastore", "api", "frozen", "pinned"),
}
"""The fields of JSON values in etcd that are included. The values of other fields are left out."""

_JSON_KEYS = re.compile(
    "/calico/v1/host/[^/]+/workload/|/calico/v1/policy/profile/[^/]+/(tags|rules)$|/calico/v1/ipam/v[46]/pool/"
    "|/calico/ipam/v2/|/calico/felix/v1/|/calico/bgp/v1/(global|host/[^/]+)/(peer_v[46]/|node_mesh$|macs$)"
)
"""The keys in etcd with JSON values."""

_PLAIN = {
    *("Ready", "marker", "bird_ip", "ip_addr_v4", "ip_addr_v6", "as_num"),
    *config.FELIX,
    *config.NODE_FELIX,
    *config.BGP,
}
"""The last parts of the keys in etcd with plain text values that are included."""

_WORDS = (
    r"(?:passw|passphrase|\bpass\b|_pass\b|pwd|\bpw\b|secret|token|credential|cookie|psk|pre-?shared|md5"
    r"|(?:private|api|access)[ _-]?key|\bauth\b)"
)
_NAMES = rf"(?<![\w.-])(?=[\w.-]*{_WORDS})[\w.-]+(?: key)?"  # a look ahead is not repeated: long texts take no time
_VALUE = r"(?:\\?\"[^\"\n]*\"|'[^'\n]*'|(?:[^\s\"',]|[\"',](?=[^\s\"',)\]}]))+)"
"""The value of an option: one word, or several in quotes. A comma or a quote ends it only where a word can end."""
_NEXT = r"\\?(?:[\"']?,?[ \t]+|[\"'],)"
"""The text between an option and its value, in a command line or in a list of its words."""
_SECRETS = (
    (re.compile(r"-----BEGIN [A-Z0-9 ]+-----.*?(?:-----END [A-Z0-9 ]+-----|\Z)", re.DOTALL), _HIDDEN),
    (re.compile(r"(://)[^\s\"']*@"), rf"\1{_HIDDEN}@"),
    (re.compile(r"(^|[\s\"'(=])[^\s\"'(=@:]*:[^\s\"'@]*@", re.MULTILINE), rf"\1{_HIDDEN}@"),
    (re.compile(r"(\bpassword\s+\").*?(\"|$)", re.IGNORECASE | re.MULTILINE), rf"\1{_HIDDEN}\2"),  # BIRD's
    (re.compile(r"(\bbearer\s+)\S+", re.IGNORECASE), rf"\1{_HIDDEN}"),
    (re.compile(r"(\bauthorization\b\\?[\"']?\s*[:=]).*", re.IGNORECASE), rf"\1 {_HIDDEN}"),
    (re.compile(rf"({_NAMES}\\?[\"']?\s*[:=][ \t]*\n?).*", re.IGNORECASE), rf"\1 {_HIDDEN}"),  # or on the next line
    (re.compile(rf"(\bprivate[ -]keys?[ \t]+(?:is[ \t]+)?){_VALUE}", re.IGNORECASE), rf"\1{_HIDDEN}"),
    (re.compile(rf"(\bredis-cli\b.{{0,200}}?[ \t]-a{_NEXT}){_VALUE}"), rf"\1{_HIDDEN}"),
    # options: --password x, of whatever name; -u user:x; -px, but not the id of a process's namespace (-proc-1-ns-net)
    (re.compile(rf"((?<![\w-])--?(?=[\w-]*{_WORDS})[\w-]+{_NEXT}){_VALUE}", re.IGNORECASE), rf"\1{_HIDDEN}"),
    (
        re.compile(
            rf"((?<![\w-])(?:-[a-zA-Z]{{0,8}}[uU]|--(?:proxy-)?user)(?:{_NEXT}|=)?)(?=\"[^\":\n]*:|'[^':\n]*:|[^\s\"':]*:){_VALUE}"
        ),
        rf"\1{_HIDDEN}",
    ),
    (re.compile(rf"((?<![\w-])-p)(?!roc-[0-9]){_VALUE}"), rf"\1{_HIDDEN}"),
    (re.compile(rf"(\b(?:login|sshpass)\b.{{0,200}}?[ \t]-p{_NEXT}){_VALUE}"), rf"\1{_HIDDEN}"),
    (
        re.compile(
            rf"((?<![\w-])[\w-]*user(?:name)?\\?[\"']?\s*[:=]\s*)(?=\\?[\"']?[^\s\"':]*:[^\s\"']){_VALUE}",
            re.IGNORECASE,
        ),
        rf"\1{_HIDDEN}",
    ),
    (
        re.compile(
            r"(\b(?:password|passwd|requirepass)[ \t]+(?:is[ \t]+)?)(?!is\b|of\b|for\b|and\b|or\b)"
            r"(?:'[^'\n]*'?|\\'[^'\n]+'?|\\\"[^\"\n]*\"?|\\.|[^\s\"('\\])+"
        ),
        rf"\1{_HIDDEN}",
    ),
    (re.compile(r"(?<![\w-])eyJ[\w-]{8,}\.[\w.-]+"), _HIDDEN),  # a JSON Web Token
)


def sources(log_dir: str) -> dict[str, Source]:
    """Return the functions that produce the texts of the archive's files, by file name.

    A function may raise any exception. `log_dir` is the directory of the logs of the agent and of the local etcd.
    """
    found: dict[str, Source] = {"versions.txt": _versions, "environment.txt": _environment}
    for name, command in _COMMANDS.items():
        found[name] = lambda command=command: _output(command)  # type: ignore[misc]
    found["settings.txt"] = _settings
    found["status.json"] = _status
    found["etcd.json"] = _store
    found["docker.json"] = _docker
    for log in ("felix.log", "felix.log.1", "etcd.log"):
        found[log] = lambda log=log: _end_of(Path(log_dir) / log)  # type: ignore[misc]
    for name, words in (("bird-protocols.txt", "show protocols all"), ("bird-routes.txt", "show route all")):
        found[name] = lambda words=words: _from_bird(words)  # type: ignore[misc]
    for name in ("conf", "log", "log.1"):
        found[f"bird.{name}"] = lambda name=name: _end_of(Instance(hostname()).directory / name)  # type: ignore[misc]
    found["bird.out"] = lambda: _end_of(Instance(hostname()).output)
    found["checksystem.json"] = _checks  # last: the libraries that it needs take the memory that others have released
    return found


def collect(found: Iterable[tuple[str, Source]]) -> Path:
    """Write an archive with one file for each (name, source), and return the archive's path.

    Only the owner can read the archive. Raises CalicoError if it cannot be written.
    """
    name = f"calico-diags-{time.strftime('%Y%m%d-%H%M%S')}-"
    path = None
    try:
        fd, file = tempfile.mkstemp(prefix=name, suffix=".tar.gz")
        path = Path(file)
        with os.fdopen(fd, "wb") as stream, tarfile.open(fileobj=stream, mode="w:gz") as archive:
            for member, source in found:
                info = tarfile.TarInfo(f"{name.rstrip('-')}/{member}")
                info.mtime, info.mode = int(time.time()), 0o600
                with tempfile.TemporaryFile() as text:  # the archive needs its size first
                    _write(source, text)
                    info.size = text.tell()
                    text.seek(0)
                    archive.addfile(info, text)
        return path
    except BaseException as error:
        if path is not None:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CalicoError(f"The archive cannot be written to {tempfile.gettempdir()}: {error.strerror}") from None
        raise


def without_secrets(text: str) -> str:
    """Return a text with `(left out)` instead of anything that looks like a password, a token or a key."""
    begin, end = text.find("-----BEGIN "), text.find("-----END ")
    if end >= 0 and not 0 <= begin < end:  # the included end of a log may begin inside a key
        text = _HIDDEN + text[end:]
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def _write(source: Source, file: IO[bytes]) -> None:
    """Write what a source returns, without secrets, to a file; if the source fails, also write why."""
    for part in _parts(source):
        file.write(without_secrets(part).encode(errors="backslashreplace"))


def _parts(source: Source) -> Iterator[str]:
    try:
        found = source()
        yield from [found] if isinstance(found, str) else found
    except Exception as error:  # of any kind: the other files are still useful
        yield f"This could not be collected: {error}\n"


def _output(command: tuple[str, ...]) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=60
    )
    return done.stdout if done.returncode == 0 else f"{done.stdout}(exit status {done.returncode})\n"


def _versions() -> str:
    lines = [
        f"calicoctl {__version__} {__commit__}".rstrip(),
        f"Python {platform.python_version()}",
        " ".join(platform.uname()),
    ]
    for package in ("docopt", "python-etcd", "urllib3", "netaddr", "pyroute2", "docker"):
        lines.append(f"{package} {metadata.version(package)}")
    return "\n".join([*lines, Path("/etc/os-release").read_text(encoding="utf-8", errors="replace")])


def _environment() -> str:
    lines = []
    for name in sorted(os.environ):
        if name in _VARIABLES:
            lines.append(f"{name}={redact_userinfo(os.environ[name])}\n")
        elif name.startswith(("ETCD_", "DOCKER_", "CALICO_")):
            lines.append(f"{name} is set\n")
    return "".join(lines)


def _checks() -> str:
    return json.dumps([check.to_dict() for check in checks.check()], indent=2)


def _settings() -> Iterator[str]:
    for pattern in _SETTINGS:
        folder, _, name = pattern.rpartition("/")
        for parent in sorted(Path("/proc/sys").glob(folder)):  # one for each interface
            yield "".join(map(_setting, sorted(parent.glob(name))))


def _setting(path: Path) -> str:
    name = path.relative_to("/proc/sys")
    try:
        return f"{name} = {path.read_text().strip()}\n"
    except OSError as error:
        return f"{name}: {error.strerror}\n"


def _status() -> str:
    return json.dumps(host_status.read(hostname()), indent=2)


def _store() -> Iterator[str]:
    datastore = DatastoreClient.from_environment()
    before = "{"
    for entry in datastore.everything():
        yield f"{before}\n {json.dumps(entry.key)}: " + json.dumps(_known_value(entry), indent=1).replace("\n", "\n ")
        before = ","
    yield "{}" if before == "{" else "\n}"


def _known_value(entry: Entry) -> Any:
    """Return the value of an entry if it may be included, otherwise `(left out)`.

    A plain text value is included if the last part of its key is in _PLAIN; an empty value is always included. Of a
    JSON object or list whose key matches _JSON_KEYS, only the known fields are included (see _known_fields).
    """
    if keys.last(entry.key) in _PLAIN or not entry.value:
        return entry.value
    try:
        value = json.loads(entry.value)
    except (ValueError, RecursionError):
        return _HIDDEN
    return _known_fields(value) if _JSON_KEYS.match(entry.key) and isinstance(value, (dict, list)) else _HIDDEN


def _known_fields(value: Any, objects: bool = False) -> Any:
    """Return a JSON value with `(left out)` instead of the values of unknown fields.

    The fields in _FIELDS, and fields whose names are CIDRs, are known. If `objects` is true and the value is a list,
    its items that are not objects are replaced by `(left out)`, too.
    """
    if isinstance(value, list):
        return [_known_fields(item) if isinstance(item, dict) or not objects else _HIDDEN for item in value]
    if not isinstance(value, dict):
        return value
    return {
        name: _known_fields(item, name in ("inbound_rules", "outbound_rules", "attributes"))
        if name in _FIELDS or re.fullmatch(r"[0-9a-f.:]+/[0-9]+", name)
        else _HIDDEN
        for name, item in value.items()
    }


def _docker() -> str:
    info = engine.info()
    known: dict[str, Any] = {name: info.get(name) for name in _DOCKER_INFO}
    known["Containers"] = [
        {name: container.get(name) for name in _CONTAINER}
        | {"NetworkMode": (container.get("HostConfig") or {}).get("NetworkMode")}
        for container in engine.containers()
    ]
    return json.dumps(known, indent=1)


def _from_bird(command: str) -> str:
    with bird.control(Instance(hostname()).control()) as control:
        return "".join(f"{line}\n" for _, line in control.command(command))


def _end_of(path: Path) -> str:
    """Return the end of a log of the agent, of the local etcd or of BIRD: its last LOG_SIZE bytes, decoded.

    Raises CalicoError unless `path` is a regular file that has no other hard link, and that belongs to root, to BIRD's
    user or to the user of this process. Raises OSError if `path` is a symbolic link or cannot be read.
    """
    # users other than root can write to some of the folders: a link may lead to a file that only root may read
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        owners = {0, os.geteuid()}
        with suppress(KeyError):
            owners.add(pwd.getpwnam(USER).pw_uid)
        if not stat.S_ISREG(found.st_mode) or found.st_uid not in owners or found.st_nlink != 1:
            raise CalicoError(f"{path} is not a regular file of root's or BIRD's")
        file.seek(max(0, found.st_size - LOG_SIZE))
        return file.read(LOG_SIZE).decode(errors="replace")
