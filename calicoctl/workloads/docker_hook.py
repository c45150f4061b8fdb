"""Sets Docker's hook up, which connects containers with labels before their first instruction, and removes it.

The hook is called by the runtime of containers (OCI, createRuntime). Docker adds none by itself, so the engine gets a
runtime of ours, NAME, as default: the script `runtime` in FOLDER. It has oci_hook.py add the hook to containers that
may have labels of ours, and then runs the runtime that was the default before. The engine reads its configuration
file (daemon.json) when it gets SIGHUP.

A container keeps the name of the runtime that it was created with, and does not start without it. So if the hook is
removed while such containers exist, the runtime stays in the configuration, and its script only runs the former
default.

FOLDER contains `runtime`, a copy of oci_hook.py (hook.py), and settings.json, the Settings. Only Settings.command
depends on where calicoctl is installed.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from calicoctl import engine, environment, files, proc, state
from calicoctl.errors import CalicoError, DockerUnavailable
from calicoctl.output import quantity
from calicoctl.workloads import oci_hook
from calicoctl.workloads.workload import short_id

FOLDER = state.DIRECTORY / "docker-hook"

NAME = "calico"
"""The name of the runtime in the engine's configuration."""

LARGEST = 1 << 20
"""The maximum size of the engine's configuration file, and of settings.json, in bytes."""

PATIENCE = 10.0
"""Seconds to wait until the engine has applied its configuration."""

_CONFIGURATION = "/etc/docker/daemon.json"
_RUNTIMES, _DEFAULT = "runtimes", "default-runtime"
_STOCK = "runc"
"""The engine's own runtime, which needs no entry in the configuration."""

_SCRIPT = """\
#!/bin/sh
# The default runtime of the Docker Engine, written by 'calicoctl node --docker-hook'. It has the hook called for a
# container that may have labels of Calico's; then it runs the runtime that was the default before.
case " $* " in
*" create "*)
    for id; do :; done # the last word
    if grep -qsE 'calico\\.ip|CALICO_IP' {containers}/"$id"/config.v2.json; then
        {hook} "$@" || exit 1
    fi
    ;;
esac
exec {runtime} "$@"
"""

_FORMER_DEFAULT = """\
#!/bin/sh
# Docker's hook of calicoctl is removed. Containers that were created with it are started by this runtime as before.
exec {runtime} "$@"
"""


@dataclass(frozen=True)
class Settings:
    """What the hook must know.

    `host` is this host's name in Calico; `command` the path of calicoctl; `data_root` the engine's data directory;
    `variables` are the variables that select the store, from the environment of the command that has set the hook up.

    `configuration` is the path of the engine's configuration file, and `made` says whether that command has created it.
    `default` is the default runtime that the file named before, None if it named none. `runtime` are the words that
    run that runtime. `removed` says that the hook is removed, but that containers with the runtime exist.
    """

    host: str
    command: str
    data_root: str
    variables: dict[str, str]
    configuration: str
    made: bool
    default: str | None
    runtime: list[str]
    removed: bool = False


def settings() -> Settings | None:
    """Return the settings of the hook, None if it was never set up, or was removed completely. Raises CalicoError."""
    path = FOLDER / "settings.json"
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(LARGEST))
        names = {field.name for field in fields(Settings)}
        return Settings(**{name: value for name, value in found.items() if name in names})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CalicoError(f"{path} cannot be read: {error}") from None


def is_set_up() -> bool:
    """Return whether the hook is set up, and not removed. Raises CalicoError."""
    found = settings()
    return found is not None and not found.removed


def set_up(host: str) -> bool:
    """Set the hook up, for the engine that DOCKER_HOST names; return False if it was set up already.

    If it was set up already, its files are written anew. Raises CalicoError, and changes nothing, if it cannot be set
    up: for example if the engine does not run, or if its command line says which runtimes there are.
    """
    before = settings()
    with _changing():
        described = engine.info()
        daemon = _engine_process()
        path = _configuration_of(daemon)
        old, config = _read(path)
        is_ours = before is not None and before.configuration == str(path)
        _refuse_unsuitable(described, daemon, config, is_ours)
        named = config.get(_DEFAULT)
        if named == NAME and before is not None:
            named = before.default
        new = Settings(
            host,
            _command(),
            str(described["DockerRootDir"]),
            _variables(),
            str(path),
            old is None or (is_ours and before is not None and before.made),
            named,
            _words_of(named or _STOCK, config, described),
        )
        wanted = _with_ours(config)
        try:
            _write_files(new)
            _refuse_other_root(daemon)
            if wanted == config and described.get("DefaultRuntime") == NAME:
                return False
            _replace(path, wanted)
            _reload(daemon, NAME)
        except BaseException:
            _take_back(new, daemon, config, old)
            if before is None:
                _remove_files()
            raise
    return True


def remove() -> str | None:
    """Remove the hook. Return a sentence about what is left, None if nothing is, or if there was no hook.

    If containers that were created with the hook exist, or if the engine does not answer, the runtime stays, and does
    nothing but run the former default. Raises CalicoError if the engine's configuration cannot be changed.
    """
    before = settings()
    if before is None:
        return None
    with _changing():
        path = Path(before.configuration)
        old, config = _read(path)
        _write(FOLDER / "runtime", _FORMER_DEFAULT.format(runtime=shlex.join(before.runtime)), 0o755)
        _write_settings(Settings(**{**asdict(before), "removed": True}))
        (FOLDER / "hook.py").unlink(missing_ok=True)
        try:
            using, daemon = _containers_of(NAME), _engine_process()
        except DockerUnavailable:
            using, daemon = None, None
        rest = _without_ours(config, before, keep_entry=using != [])
        content = None if not rest and before.made else old if rest == config else _encoded(rest)
        _take_back(before, daemon, config, content)
        if using == []:
            _remove_files()
            return None
    if using is None:
        return (
            f"Docker does not answer: its runtime {NAME} stays in {path}, for containers that were created with it. "
            "Run 'calicoctl node remove --docker-hook' when Docker runs"
        )
    return (
        f"The runtime {NAME} stays in {path}, since Docker would not start {quantity(len(using), 'container')} without "
        f"it ({', '.join(using[:3])}{', …' if len(using) > 3 else ''}). It only runs {before.runtime[0]}"
    )


def refresh() -> None:
    """Write the files of the hook anew, if it is set up: this version of the program may have others.

    Raises CalicoError.
    """
    before = settings()
    if before is not None and not before.removed:
        with _changing():
            _write_files(Settings(**{**asdict(before), "command": _command()}))


def state_of_hook() -> tuple[bool, str] | None:
    """Return whether the hook works, as far as files tell, and a text about it; None if it is not set up.

    Does not ask the engine.
    """
    try:
        found = settings()
        if found is None:
            return None
        if found.removed:
            return True, f"removed; the runtime {NAME} stays for containers that were created with it"
        _, config = _read(Path(found.configuration))
        if config.get(_DEFAULT) != NAME or not _is_ours((config.get(_RUNTIMES) or {}).get(NAME)):
            return False, f"{found.configuration} does not name the runtime {NAME} as default any more"
        if not os.access(found.command, os.X_OK):
            return False, f"calicoctl is not installed as {found.command} any more"
    except CalicoError as error:
        return False, str(error)
    return True, f"set up in {found.configuration}"


# The engine


def _engine_process() -> int:
    """Return the process id of the engine that DOCKER_HOST names. Raises CalicoError if it cannot be determined."""
    where = os.environ.get("DOCKER_HOST") or engine.SOCKET
    if where.startswith("unix://"):
        # Source: unix(7), SO_PEERCRED: who called listen, which may be systemd
        try:
            with socket.socket(socket.AF_UNIX) as channel:
                channel.settimeout(5)
                channel.connect(where[len("unix://") :])
                pid, _, _ = struct.unpack("3i", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        except OSError as error:
            raise DockerUnavailable(f"Docker cannot be reached at {where}: {error}") from None
        if _is_engine(pid):
            return int(pid)
    else:
        raise CalicoError(f"the hook is for the Docker Engine of this host, and DOCKER_HOST is {where}")
    found = [int(process.name) for process in Path("/proc").glob("[0-9]*") if _is_engine(int(process.name))]
    if len(found) != 1:
        raise CalicoError(
            f"it is unknown which process is the Docker Engine at {where}: {quantity(len(found), 'process')} of the "
            "name dockerd run here"
        )
    return found[0]


def _is_engine(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "comm").read_text().strip() == "dockerd"
    except OSError:
        return False


def _configuration_of(daemon: int) -> Path:
    """Return the path of the engine's configuration file, which need not exist. Raises CalicoError.

    Raises CalicoError also if the command line of the engine says which runtimes there are: then the file must not.
    """
    words = proc.arguments(daemon)[1:]
    for word in words:
        if word.partition("=")[0] in ("--add-runtime", "--default-runtime"):
            raise CalicoError(
                f"the command line of the Docker Engine (process {daemon}) has {word.partition('=')[0]}, so its "
                "configuration file cannot name a runtime. Move that setting into the file"
            )
    path = _CONFIGURATION
    for word, following in zip(words, [*words[1:], ""]):
        if word == "--config-file":
            path = following
        elif word.startswith("--config-file="):
            path = word.partition("=")[2]
    return (Path(f"/proc/{daemon}/cwd") / path).resolve()


def _refuse_unsuitable(described: dict[str, Any], daemon: int, config: dict[str, Any], is_ours: bool) -> None:
    entry = (config.get(_RUNTIMES) or {}).get(NAME)
    if entry is not None and not _is_ours(entry):
        raise CalicoError(f"the configuration of Docker has a runtime {NAME} already, which is another program's")
    if config.get(_DEFAULT) == NAME and not is_ours:
        raise CalicoError(
            f"the configuration of Docker names {NAME} as {_DEFAULT}, and what was the default before is unknown. "
            f"Delete {_DEFAULT} from it"
        )
    if "rootless" in str(described.get("SecurityOptions")) or os.stat(f"/proc/{daemon}").st_uid != 0:
        raise CalicoError("the Docker Engine does not run as root")
    if "io.containerd.snapshotter" in str(described.get("DriverStatus")):
        raise CalicoError(
            "the Docker Engine keeps its images in containerd, where the hook does not find the labels of an image"
        )


def _refuse_other_root(daemon: int) -> None:
    """Raise CalicoError if the engine does not see the script of the runtime, or if the script does not run."""
    path = FOLDER / "runtime"
    try:
        if not path.samefile(f"/proc/{daemon}/root{path}"):
            raise CalicoError(f"the Docker Engine has another {path}")
        subprocess.run([path, "--version"], check=True, capture_output=True, timeout=PATIENCE)
    except FileNotFoundError:
        raise CalicoError(f"the Docker Engine does not see {path}: is it in a container, or a snap?") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise CalicoError(f"the runtime {path} does not run: {error}") from None


def _words_of(name: str, config: dict[str, Any], described: dict[str, Any]) -> list[str]:
    """Return the words that run a runtime of the engine. Raises CalicoError if it is none that a script can run."""
    entry = (config.get(_RUNTIMES) or {}).get(name) or (described.get("Runtimes") or {}).get(name)
    if entry is None and name in (_STOCK, "io.containerd.runc.v2"):
        entry = {"path": _STOCK}
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or not entry["path"]:
        raise CalicoError(f"the default runtime of Docker, {name}, has no path that a hook could run")
    if entry.get("runtimeType") or entry.get("options"):
        raise CalicoError(f"the default runtime of Docker, {name}, is of a type that knows no hooks of programs")
    return [entry["path"], *map(str, entry.get("runtimeArgs") or [])]


def _containers_of(runtime: str) -> list[str]:
    """Return the short ids of the containers that were created with a runtime. Raises DockerUnavailable."""
    found = []
    for container in engine.containers():
        try:
            described = engine.inspect(container["Id"])
        except CalicoError as error:
            if isinstance(error, DockerUnavailable):
                raise
            continue  # it was just removed
        if described["HostConfig"].get("Runtime") == runtime:
            found.append(short_id(container["Id"]))
    return found


def _reload(daemon: int, default: str) -> None:
    """Have the engine read its configuration. Raises CalicoError if its default runtime is not `default` then."""
    os.kill(daemon, signal.SIGHUP)
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        described = engine.info()
        if described.get("DefaultRuntime") == default and default in (described.get("Runtimes") or {default}):
            return
        time.sleep(0.05)  # it says nowhere that it has read it
    raise CalicoError(
        f"the Docker Engine (process {daemon}) has not taken {default} as its default runtime: its log says why"
    )


# Its configuration


def _read(path: Path) -> tuple[bytes | None, dict[str, Any]]:
    """Return the content of the engine's configuration file, None if there is none, and what it says.

    Raises CalicoError if the file cannot be read, or is none that can be changed without losing something.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CalicoError(f"{path} is not a regular file")
            content = file.read(LARGEST + 1)
    except FileNotFoundError:
        return None, {}
    except OSError as error:
        raise CalicoError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > LARGEST:
        raise CalicoError(f"{path} has more than {LARGEST} bytes")
    if not content.strip():
        return content, {}
    try:
        config = json.loads(content.decode(), object_pairs_hook=_unique, parse_float=_exact, parse_constant=_exact)
    except (ValueError, RecursionError) as error:
        raise CalicoError(f"{path}, the configuration of Docker, is invalid, and is not changed: {error}") from None
    runtimes = config.get(_RUNTIMES) if isinstance(config, dict) else None
    if (
        not isinstance(config, dict)
        or not isinstance(runtimes, (dict, type(None)))
        or not isinstance(config.get(_DEFAULT), (str, type(None)))
    ):
        raise CalicoError(f"{path}, the configuration of Docker, is not what Docker expects, and is not changed")
    return content, config


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is in it twice")
    return found


def _exact(text: str) -> float:
    if repr(float(text)) != text:
        raise ValueError(f"the number {text}")  # it would be written in another way
    return float(text)


def _with_ours(config: dict[str, Any]) -> dict[str, Any]:
    runtimes = {**(config.get(_RUNTIMES) or {}), NAME: {"path": str(FOLDER / "runtime")}}
    return {**config, _RUNTIMES: runtimes, _DEFAULT: NAME}


def _is_ours(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.get("path") == str(FOLDER / "runtime")


def _without_ours(config: dict[str, Any], before: Settings, keep_entry: bool) -> dict[str, Any]:
    """Return the configuration without the hook. With `keep_entry`, the runtime stays, but not as default."""
    new = dict(config)
    if new.get(_DEFAULT) == NAME:
        del new[_DEFAULT]
        if before.default is not None:
            new[_DEFAULT] = before.default
    if not keep_entry and _is_ours((new.get(_RUNTIMES) or {}).get(NAME)):
        new[_RUNTIMES] = {name: entry for name, entry in new[_RUNTIMES].items() if name != NAME}
        if not new[_RUNTIMES]:
            del new[_RUNTIMES]
    return new


def _take_back(before: Settings, daemon: int | None, config: dict[str, Any], content: bytes | None) -> None:
    """Make the former default runtime the engine's default again, and write `content` into its configuration file.

    If `content` is None, the file is removed. `config` is what the file says now, or has said before the hook was set
    up. If `daemon` is None, the engine does not run.

    An engine may crash (20.10) if it reads a configuration that has runtimes, but not its current default runtime, and
    it keeps its default if the configuration names none. So it first gets one that has both, and names the former.
    """
    path = Path(before.configuration)
    if daemon is not None and engine.info().get("DefaultRuntime") == NAME:
        both = _with_ours(config)
        default = before.default if before.default in both[_RUNTIMES] else _STOCK
        _replace(path, {**both, _DEFAULT: default})
        _reload(daemon, str(default))
    if content is None:
        path.unlink(missing_ok=True)
    else:
        _put(path, content)


def _replace(path: Path, config: dict[str, Any]) -> None:
    _put(path, _encoded(config))


def _encoded(config: dict[str, Any]) -> bytes:
    return json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"


def _put(path: Path, content: bytes) -> None:
    try:
        mode, owner = 0o644, (-1, -1)
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if path.exists():
            old = path.stat()
            mode, owner = stat.S_IMODE(old.st_mode), (old.st_uid, old.st_gid)
            if path.read_bytes() == content:
                return
        files.replace(path, content, mode, owner, suffix=".calico", durable=True).close()
    except OSError as error:
        raise CalicoError(f"{path} cannot be written: {error.strerror}") from None


# Our files


def _command() -> str:
    """Return the path of calicoctl that stays the same when calicoctl is upgraded."""
    own = Path(sys.executable).parent / "calicoctl"
    called = Path(sys.argv[0]).absolute()
    return str(called if called.is_symlink() and called.resolve() == own.resolve() else own)


def _variables() -> dict[str, str]:
    # those that a settings file sets are read from it by the hook, too
    written = environment.EnvironmentFile().variables()
    names = (*environment.STORE, environment.PATH_VARIABLE)
    found = {name: os.environ[name] for name in names if os.environ.get(name)}
    return {name: value for name, value in found.items() if written.get(name) != value}


def _python() -> str:
    return "/usr/bin/python3" if os.access("/usr/bin/python3", os.X_OK) else os.path.realpath(sys.executable)


def _write_files(new: Settings) -> None:
    hook = [_python(), "-I", "-S", str(FOLDER / "hook.py"), "prepare", new.host, new.command, "--"]
    script = _SCRIPT.format(
        containers=shlex.quote(f"{new.data_root}/containers"),
        hook=shlex.join(hook),
        runtime=shlex.join(new.runtime),
    )
    _write_settings(new)
    _write(FOLDER / "hook.py", Path(oci_hook.__file__).read_text(), 0o644)
    _write(FOLDER / "runtime", script, 0o755)


def _write_settings(new: Settings) -> None:
    _write(FOLDER / "settings.json", json.dumps(asdict(new), indent=2) + "\n", 0o600)  # variables may be secret


def _write(path: Path, text: str, mode: int) -> None:
    try:
        FOLDER.mkdir(mode=0o755, parents=True, exist_ok=True)
        files.replace(path, text.encode(), mode, durable=True).close()
    except OSError as error:
        raise CalicoError(f"{path} cannot be written: {error.strerror}") from None


def _remove_files() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)


@contextmanager
def _changing() -> Iterator[None]:
    """Hold the lock of the engine's configuration; have all errors say what failed."""
    give_up = time.monotonic() + PATIENCE

    def refuse() -> None:
        if time.monotonic() > give_up:
            raise CalicoError("another command is changing it")

    try:
        files.RUN.mkdir(mode=0o755, parents=True, exist_ok=True)
        lock = files.lock(files.RUN / "docker-hook.lock", refuse)
    except OSError as error:
        raise CalicoError(f"{error.filename}: {error.strerror}") from None
    try:
        yield
    except CalicoError as error:
        raise CalicoError(f"Docker's hook cannot be changed: {error}") from None
    finally:
        os.close(lock)
