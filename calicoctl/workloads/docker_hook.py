"""Sets Docker's hook up, which connects containers with labels before their first instruction, and removes it.

The hook is called by the runtime of containers (OCI, createRuntime). Docker adds none by itself, so the engine gets a
runtime of ours, NAME, as default: the script `runtime` in FOLDER. It has oci_hook.py add the hook to containers that
may have labels of ours, and then runs the runtime that was the default before. The engine reads its configuration
file (daemon.json) when it gets SIGHUP.

A container keeps the name of the runtime that it was created with, and does not start without it. So if the hook is
removed while such containers exist, the runtime stays in the configuration, and its script only runs the former
default. hook.py stays, too, for containers that are just being started with the hook.

FOLDER contains `runtime`, a copy of oci_hook.py (hook.py), and settings.json, the Settings. Only Settings.command
depends on where calicoctl is installed.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
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

_PROC = Path("/proc")
_CONFIGURATION = "/etc/docker/daemon.json"
_OLDEST_PYTHON = (3, 9)
_MODES = {"settings.json": 0o600, "hook.py": 0o644, "runtime": 0o755}
"""The modes of our files. The variables in the first one may be secret."""

_RUNTIMES, _DEFAULT = "runtimes", "default-runtime"
_STOCK = "runc"
"""The engine's own runtime, which needs no entry in the configuration."""
_SHIM = "io.containerd."
"""The beginning of the names of containerd's shims, which the engine knows without an entry in the configuration."""

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
    `default` is the default runtime that the file named before, None if it named none. `runtime` is the command line of
    that runtime (program and arguments). `removed` says that the hook is removed, but that containers with the runtime
    may exist. `docker_host` is where the engine listens, as in DOCKER_HOST; it is empty if an older version has written
    the settings.
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
    docker_host: str = ""


def settings() -> Settings | None:
    """Return the settings of the hook, None if it was never set up, or was removed completely. Raises CalicoError."""
    path = FOLDER / "settings.json"
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(LARGEST))
        names = {field.name for field in fields(Settings)}
        return _checked(Settings(**{name: value for name, value in found.items() if name in names}))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CalicoError(f"{path} cannot be read: {error}. 'calicoctl node --docker-hook' writes it anew") from None


def _checked(found: Settings) -> Settings:
    """Return `found`, read from the file. Raises ValueError if a field has a wrong type, or if `runtime` is empty."""
    texts = [found.host, found.command, found.data_root, found.configuration, found.docker_host]
    if not isinstance(found.runtime, list) or not found.runtime or not isinstance(found.variables, dict):
        raise ValueError("it is damaged")
    if not all(isinstance(text, str) for text in (*texts, *found.runtime, *found.variables.values())):
        raise ValueError("it is damaged")
    if not isinstance(found.default, (str, type(None))) or {type(found.made), type(found.removed)} != {bool}:
        raise ValueError("it is damaged")
    return found


def set_up(host: str) -> bool:
    """Set the hook up, for the engine that DOCKER_HOST names; return False if it was set up already.

    `host` is this host's name in Calico. If the hook was set up already, its files are written anew. Raises
    CalicoError, and changes nothing, if it cannot be set up: for example if the engine does not run, or if the engine's
    command line says which runtimes there are.
    """
    with _changing():
        try:
            before = settings()
        except CalicoError:  # damaged
            before = None
        described = engine.info()
        daemon = _engine_process()
        path = _configuration_of(daemon)
        old, config = _read(path)
        is_ours = before is not None and before.configuration == str(path)
        _refuse_unsuitable(described, daemon, config)
        if before is not None:
            _refuse_second_engine(before, path, str(described["DockerRootDir"]))
        named = config.get(_DEFAULT) or None
        if named == NAME:
            named = _default_in_script(config) if before is None else before.default
        new = Settings(
            host,
            _command(),
            str(described["DockerRootDir"]),
            _variables(),
            str(path),
            old is None or (is_ours and before is not None and before.made),
            named,
            _words_of(named or _STOCK, config, described),
            docker_host=os.environ.get("DOCKER_HOST") or engine.SOCKET,
        )
        wanted = _with_ours(config)
        kept = _kept_files()
        try:
            _write_files(new)
            _refuse_other_root(daemon)
            if wanted == config and described.get("DefaultRuntime") == NAME:
                return False
            _apply(path, wanted, daemon)
        except BaseException:
            try:
                _take_back(new, None if described.get("DefaultRuntime") == NAME else daemon, config, old)
            except CalicoError:
                if proc.running_since(daemon) is not None:
                    raise  # it may use our files, so they stay
            _put_back(kept)
            raise
    return True


def remove() -> str | None:
    """Remove the hook. Return a sentence about what is left or lost, None if there is nothing to say, or no hook.

    If containers that were created with the hook exist, or if the engine does not answer, the runtime stays, and does
    nothing but run the former default. Raises CalicoError if the engine's configuration cannot be changed.
    """
    with _changing(), ExitStack() as stack:
        before = settings()
        if before is None:
            return None
        stack.enter_context(_asking(before.docker_host))
        path = Path(before.configuration)
        old, config = _read(path)
        try:
            daemon = _engine_process()
        except DockerUnavailable:
            daemon = None
        _write("runtime", _FORMER_DEFAULT.format(runtime=shlex.join(before.runtime)))
        _write_settings(Settings(**{**asdict(before), "removed": True}))
        said = []
        if config.get(_DEFAULT) == NAME and before.default is not None and _former(before, config) is None:
            said.append(
                f"{path} knows no runtime {before.default} any more, which was the default before, so it names none now"
            )
        using = None
        # first, or else a container that is created meanwhile would have our runtime, and nobody would know
        rest = _without_ours(config, before, keep_entry=True)
        with suppress(DockerUnavailable):
            _take_back(before, daemon, config, old if rest == config else _encoded(rest))
            using = None if daemon is None else _containers_of(NAME)
        if using == []:
            old, config = _read(path)
            rest = _without_ours(config, before, keep_entry=False)
            _put(path, None if not rest and before.made else old if rest == config else _encoded(rest))
            _remove_files()
    if using is None:
        said.append(
            f"Docker does not answer: its runtime {NAME} stays in {path}, for containers that were created with it. "
            "Run 'calicoctl node remove --docker-hook' when Docker runs"
        )
    elif using:
        said.append(
            f"The runtime {NAME} stays in {path}, since Docker would not start {quantity(len(using), 'container')} "
            f"without it ({', '.join(using[:3])}{', …' if len(using) > 3 else ''}). It only runs {before.runtime[0]}"
        )
    return ". ".join(said) or None


def refresh(host: str) -> None:
    """Write the files of the hook anew, if it is set up: this version of the program may have others.

    `host` is this host's name in Calico, which may have changed. Raises CalicoError.
    """
    if settings() is None:
        return
    with _changing():
        before = settings()
        if before is not None and not before.removed:
            _write_files(Settings(**{**asdict(before), "host": host, "command": _command()}))


def state_of_hook() -> tuple[bool, str] | None:
    """Return whether the hook works, as far as files tell, and a text about it; None if it is not set up.

    A hook that was removed, but whose runtime stays for old containers, counts as working. Does not ask the engine.
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
        try:
            pid = proc.listener(where[len("unix://") :])
        except OSError as error:
            raise DockerUnavailable(f"Docker cannot be reached at {where}: {error}") from None
        if _is_engine(pid):
            return pid
    else:
        raise CalicoError(f"the hook is for the Docker Engine of this host, and DOCKER_HOST is {where}")
    # those of containers (docker-in-docker) and of other users are no engine of this host
    engines = [int(process.name) for process in _PROC.glob("[0-9]*") if _is_engine(int(process.name))]
    here = [pid for pid in engines if _is_root_s(pid) and _shares(pid, "pid")]
    found = [pid for pid in here if _shares(pid, "mnt")] or here
    if len(found) != 1:
        raise CalicoError(
            f"it is unknown which process is the Docker Engine at {where}: {len(found)} processes here have the name "
            "dockerd"
        )
    return found[0]


def _is_engine(pid: int) -> bool:
    try:
        return (_PROC / str(pid) / "comm").read_text(errors="replace").strip() == "dockerd"
    except OSError:
        return False


def _is_root_s(pid: int) -> bool:
    try:
        return (_PROC / str(pid)).stat().st_uid == 0
    except OSError:
        return False


def _shares(pid: int, kind: str) -> bool:
    """Return whether a process is in the same namespace as this one; `kind` is a name in /proc/PID/ns."""
    try:
        return (_PROC / str(pid) / "ns" / kind).readlink() == (_PROC / "self/ns" / kind).readlink()
    except OSError:
        return False


def _configuration_of(daemon: int) -> Path:
    """Return the path of the engine's configuration file, which need not exist. `daemon` is the engine's process id.

    Raises CalicoError, also if the engine's command line names runtimes, or the default one: dockerd does not start if
    the file names them as well.
    """
    words = proc.arguments(daemon)[1:]
    path = _CONFIGURATION
    for word, following in zip(words, [*words[1:], ""]):
        if word == "--config-file":
            path = following
        elif word.startswith("--config-file="):
            path = word.partition("=")[2]
    for word in words:
        if word.partition("=")[0] in ("--add-runtime", "--default-runtime"):
            raise CalicoError(
                f"the command line of the Docker Engine (process {daemon}) has {word.partition('=')[0]}, so its "
                f"configuration file cannot name a runtime. Move that setting into {path}"
            )
    return (Path(f"/proc/{daemon}/cwd") / path).resolve()


def _refuse_unsuitable(described: dict[str, Any], daemon: int, config: dict[str, Any]) -> None:
    entry = (config.get(_RUNTIMES) or {}).get(NAME)
    if entry is not None and not _is_ours(entry):
        raise CalicoError(f"the configuration of Docker has a runtime {NAME} already, which is another program's")
    if "rootless" in str(described.get("SecurityOptions")) or os.stat(f"/proc/{daemon}").st_uid != 0:
        raise CalicoError("the Docker Engine does not run as root")
    if "io.containerd.snapshotter" in str(described.get("DriverStatus")):
        raise CalicoError(
            "the Docker Engine keeps its images in containerd, where the hook does not find the labels of an image"
        )


def _refuse_second_engine(before: Settings, path: Path, data_root: str) -> None:
    """Raise CalicoError if the hook is set up for another engine of this host, as its settings `before` say.

    `path` is the configuration file of the engine that the hook is now to be set up for, `data_root` that engine's data
    directory.
    """
    is_another = False
    if before.data_root == data_root:  # which belongs to one engine: its configuration is another file now
        return
    if before.configuration != str(path):
        _, config = _read(Path(before.configuration))
        is_another = _is_ours((config.get(_RUNTIMES) or {}).get(NAME))
    else:  # two engines may have one file; or this one's data was moved
        with _asking(before.docker_host), suppress(DockerUnavailable):
            is_another = engine.info().get("DockerRootDir") == before.data_root
    if is_another:
        raise CalicoError(
            f"it is set up for the Docker Engine with the data in {before.data_root}, whose configuration is "
            f"{before.configuration}, and one engine of a host can have it. Run 'calicoctl node remove --docker-hook' "
            f"first, and remove that engine's containers with the runtime {NAME}"
        )


def _refuse_other_root(daemon: int) -> None:
    """Raise CalicoError if the engine does not see the script of the runtime, or if the script does not run.

    Raises CalicoError also if the runtime says that it calls no createRuntime hooks. `daemon` is the engine's process
    id.
    """
    path = FOLDER / "runtime"
    try:
        if not path.samefile(f"/proc/{daemon}/root{path}"):
            raise CalicoError(f"the Docker Engine has another {path}")
        subprocess.run([path, "--version"], check=True, capture_output=True, timeout=PATIENCE)
        _refuse_without_hooks(path)
    except FileNotFoundError:
        raise CalicoError(f"the Docker Engine does not see {path}: is it in a container, or a snap?") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise CalicoError(f"the runtime {path} does not run: {error}") from None


def _refuse_without_hooks(path: Path) -> None:
    """Raise CalicoError if the runtime at `path` says that it calls no createRuntime hooks. It need not say anything.

    Raises OSError and SubprocessError if it does not run. Source: OCI runtime specification, "Features Structure".
    """
    done = subprocess.run([path, "features"], check=False, capture_output=True, timeout=PATIENCE)
    with suppress(ValueError, TypeError, AttributeError, RecursionError):
        hooks = json.loads(done.stdout).get("hooks")
        if done.returncode == 0 and hooks is not None and "createRuntime" not in hooks:
            raise CalicoError("the default runtime of Docker calls no hooks of the kind createRuntime")


def _words_of(name: str, config: dict[str, Any], described: dict[str, Any]) -> list[str]:
    """Return the command line (program and arguments) of the engine's runtime `name`.

    `config` is the engine's configuration, `described` the result of engine.info. Raises CalicoError if no script can
    run this runtime.
    """
    entry = (config.get(_RUNTIMES) or {}).get(name)
    if entry is None and name.startswith(_SHIM):  # named so, the engine crashes when it reads runtimes (20.10)
        raise CalicoError(f"the default runtime of Docker, {name}, is a shim of containerd. Name {_STOCK} instead")
    if entry is None:
        entry = (described.get("Runtimes") or {}).get(name) or ({"path": _STOCK} if name == _STOCK else None)
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or not entry["path"]:
        raise CalicoError(f"the default runtime of Docker, {name}, has no path that a hook could run")
    if entry.get("runtimeType") or entry.get("options"):
        raise CalicoError(f"the default runtime of Docker, {name}, is of a type that knows no hooks of programs")
    arguments = entry.get("runtimeArgs") or []
    if not isinstance(arguments, list) or not all(isinstance(argument, str) for argument in arguments):
        raise CalicoError(f"the arguments of the default runtime of Docker, {name}, are no list of texts")
    return [entry["path"], *arguments]


def _default_in_script(config: dict[str, Any]) -> str | None:
    """Return what Settings.default was, derived from the script `runtime`, since settings.json is lost.

    `config` is the engine's configuration. Raises CalicoError if the script runs none of the runtimes in it, nor runc.
    """
    words: list[str] = []
    with suppress(OSError, ValueError):
        command = (FOLDER / "runtime").read_text(errors="surrogateescape").splitlines()[-1:]
        words = [word for line in command if line.startswith("exec ") for word in shlex.split(line)[1:-1]]
    for name in config.get(_RUNTIMES) or {}:
        with suppress(CalicoError):
            if words == _words_of(name, config, {}):
                return str(name)
    if len(words) != 1 or Path(words[0]).name != _STOCK:
        raise CalicoError(
            f"the configuration of Docker names {NAME} as {_DEFAULT}, and what was the default before is unknown. "
            f"Delete {_DEFAULT} from it"
        )
    return None


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


def _apply(path: Path, config: dict[str, Any], daemon: int) -> None:
    """Write the engine's configuration file, which names its default runtime, and have the engine read it.

    An engine that reads a configuration with runtimes may forget containerd's shims (20.10), and does not start
    containers with these any more. So it then gets, for a moment, a configuration that names them. Raises
    CalicoError.
    """
    known = _runtimes(engine.info())
    _put(path, _encoded(config))
    _reload(daemon, config[_DEFAULT])
    forgotten = {name for name in known - _runtimes(engine.info()) if name.startswith(_SHIM)}
    if forgotten:
        try:
            shims = {name: {"path": _STOCK} for name in sorted(forgotten)}
            _put(path, _encoded({**config, _RUNTIMES: {**config[_RUNTIMES], **shims}}))
            _reload(daemon, config[_DEFAULT], forgotten)
        finally:
            _put(path, _encoded(config))


def _runtimes(described: dict[str, Any]) -> set[str]:
    return {*(described.get("Runtimes") or {})}


def _reload(daemon: int, default: str, names: Iterable[str] = ()) -> None:
    """Have the engine read its configuration.

    Waits until its default runtime is `default`, and it knows the runtimes `names`. Raises CalicoError if that is not
    so within PATIENCE seconds, or if the engine (process id `daemon`) has ended.
    """
    try:
        os.kill(daemon, signal.SIGHUP)
    except ProcessLookupError:
        raise DockerUnavailable(f"the Docker Engine (process {daemon}) has ended") from None
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        described = engine.info()
        if described.get("DefaultRuntime") == default and {default, *names} <= _runtimes(described):
            return
        time.sleep(0.05)  # its event of that would be a stream that needs a limit of time, too, for a wait this short
    raise CalicoError(
        f"the Docker Engine (process {daemon}) has not taken {default} as its default runtime: its log says why"
    )


# Its configuration


def _read(path: Path) -> tuple[bytes | None, dict[str, Any]]:
    """Return the content of the engine's configuration file, None if there is no file, and the JSON object in it.

    Raises CalicoError if the file cannot be read, is invalid, or could not be written again without changing something
    in it, such as a name that it has twice.
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
    """Return the engine's configuration `config` without the hook: with the former default runtime (_former) again.

    With `keep_entry`, our runtime is still defined in it, but not the default.
    """
    new = dict(config)
    if new.get(_DEFAULT) == NAME:
        del new[_DEFAULT]
        former = _former(before, config)
        if former is not None:
            new[_DEFAULT] = former
    if not keep_entry and _is_ours((new.get(_RUNTIMES) or {}).get(NAME)):
        new[_RUNTIMES] = {name: entry for name, entry in new[_RUNTIMES].items() if name != NAME}
        if not new[_RUNTIMES]:
            del new[_RUNTIMES]
    return new


def _former(before: Settings, config: dict[str, Any]) -> str | None:
    """Return the default runtime that the configuration named before; None if it named none, or knows it no more.

    With a default runtime that it does not know, the engine does not start.
    """
    return before.default if before.default in (_STOCK, *(config.get(_RUNTIMES) or {})) else None


def _take_back(before: Settings, daemon: int | None, config: dict[str, Any], content: bytes | None) -> None:
    """Make the former default runtime the engine's default again, and write `content` into its configuration file.

    If `content` is None, the file is removed. `config` is what the file says now, or has said before the hook was set
    up. If `daemon` is None, the engine does not run, or is not to be changed. Raises CalicoError, but always writes
    `content` first.

    An engine may crash (20.10) if it reads a configuration that has runtimes, but not its current default runtime, and
    it keeps its default if the configuration names none. So it first gets one that has both, and names the former.
    """
    path = Path(before.configuration)
    try:
        if daemon is not None and engine.info().get("DefaultRuntime") == NAME:
            _apply(path, {**_with_ours(config), _DEFAULT: _former(before, config) or _STOCK}, daemon)
    finally:
        _put(path, content)


def _encoded(config: dict[str, Any]) -> bytes:
    return json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"


def _put(path: Path, content: bytes | None) -> None:
    """Replace the engine's configuration file, or remove it if `content` is None. Raises CalicoError."""
    try:
        if content is None:
            path.unlink(missing_ok=True)
            return
        mode, owner = 0o644, (-1, -1)
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        files.sync_folder(path.parent.parent)
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
    # those that a settings file sets are read from it by the hook, too; it takes all of them from there, or none
    written = environment.EnvironmentFile().variables()
    found = {name: os.environ[name] for name in environment.STORE if os.environ.get(name)}
    if found == {name: written[name] for name in environment.STORE if written.get(name)}:
        found = {}
    if os.environ.get(environment.PATH_VARIABLE):
        found[environment.PATH_VARIABLE] = os.environ[environment.PATH_VARIABLE]
    return {name: str(Path(value).absolute()) if "FILE" in name else value for name, value in found.items()}


def _python() -> str:
    """Return the path of an interpreter for hook.py, which stays the same when calicoctl is upgraded."""
    system = "/usr/bin/python3"
    test = [system, "-I", "-S", "-c", f"import sys; sys.exit(sys.version_info < {_OLDEST_PYTHON})"]
    try:
        subprocess.run(test, check=True, capture_output=True, timeout=PATIENCE)
    except (OSError, subprocess.SubprocessError):
        return os.path.realpath(sys.executable)
    return system


def _write_files(new: Settings) -> None:
    hook = [_python(), "-I", "-S", str(FOLDER / "hook.py"), "prepare", new.host, new.command, "--"]
    script = _SCRIPT.format(
        containers=shlex.quote(f"{new.data_root}/containers"),
        hook=shlex.join(hook),
        runtime=shlex.join(new.runtime),
    )
    _write_settings(new)
    _write("hook.py", Path(oci_hook.__file__).read_text(encoding="utf-8"))
    _write("runtime", script)


def _write_settings(new: Settings) -> None:
    _write("settings.json", json.dumps(asdict(new), indent=2) + "\n")


def _write(name: str, text: str) -> None:
    try:
        if not FOLDER.exists():
            FOLDER.mkdir(mode=0o755, parents=True)
            for folder in (FOLDER.parent, FOLDER.parent.parent):  # the engine's file, which names it, is on disk later
                files.sync_folder(folder)
        files.replace(FOLDER / name, text.encode(errors="surrogateescape"), _MODES[name], durable=True).close()
    except OSError as error:
        raise CalicoError(f"{FOLDER / name} cannot be written: {error.strerror}") from None


def _kept_files() -> dict[str, str]:
    """Return the contents of our files, by name. Raises CalicoError."""
    try:
        paths = [FOLDER / name for name in _MODES]
        return {path.name: path.read_text(errors="surrogateescape") for path in paths if path.exists()}
    except OSError as error:
        raise CalicoError(f"{error.filename} cannot be read: {error.strerror}") from None


def _put_back(kept: dict[str, str]) -> None:
    """Write the result of `_kept_files` again, and remove all our other files. Raises CalicoError."""
    if not kept:
        _remove_files()
        return
    for name in _MODES:
        if name in kept:
            _write(name, kept[name])
        else:
            with suppress(OSError):
                (FOLDER / name).unlink()


def _remove_files() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)


@contextmanager
def _asking(docker_host: str) -> Iterator[None]:
    """Have `engine` ask the engine that listens at `docker_host`; if that is empty, the one that DOCKER_HOST names."""
    before = os.environ.get("DOCKER_HOST")
    if docker_host:
        os.environ["DOCKER_HOST"] = docker_host
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("DOCKER_HOST", None)
        else:
            os.environ["DOCKER_HOST"] = before


@contextmanager
def _changing() -> Iterator[None]:
    """Keep other commands from changing the hook during `with`; begin the texts of its CalicoErrors with what failed.

    Raises CalicoError if another command keeps the lock for PATIENCE seconds.
    """
    try:
        files.RUN.mkdir(mode=0o755, parents=True, exist_ok=True)
        held = CalicoError("another command is changing it")
        lock = files.lock_within(files.RUN / "docker-hook.lock", PATIENCE, held)
    except OSError as error:
        raise CalicoError(f"{error.filename}: {error.strerror}") from None
    try:
        yield
    except CalicoError as error:
        raise CalicoError(f"Docker's hook cannot be changed: {error}") from None
    finally:
        os.close(lock)
