"""The agent as a process: starting it in the background or in the foreground, finding it, ending it.

Its files are under /run/calico/<host name>/: the pid file, which anybody may read, and which says when the process was
started, so that a stale one fools nobody; a lock that the agent holds as long as it lives; what it reports (report.py);
and what it remembers (dataplane/sysctls.py). Another lock, of the network namespace, keeps agents of two names from one
kernel.
"""

from __future__ import annotations

import fcntl
import json
import logging
import logging.handlers
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Callable, TextIO

from calicoctl import files, proc
from calicoctl.errors import CalicoError, NotFound, one_line
from calicoctl.workloads.locks import DIRECTORY

DEFAULT_LOG_DIR = "/var/log/calico"

START_PATIENCE = 60.0
"""Seconds to wait for the agent's first snapshot to be in the kernel."""

STOP_PATIENCE = 25.0
"""Seconds to wait for the agent to end by itself."""

_IN_BACKGROUND = ["-m", "calicoctl.felix"]

_LOG_SIZE = 10 * 2**20


@dataclass(frozen=True)
class Options:
    """How the agent is to run. `log_dir` is None for standard error."""

    log_dir: str | None = None
    metrics_port: int | None = None
    local_etcd: bool = False


def _file(host: str, name: str) -> Path:
    return DIRECTORY / host / name


def report_file(host: str) -> Path:
    return _file(host, "felix.json")


def settings_file(host: str) -> Path:
    return _file(host, "felix.sysctls")


def leftovers(host: str) -> list[Path]:
    """Return the files that an agent leaves when it has ended."""
    return [_file(host, "felix.pid"), _file(host, "felix.lock"), report_file(host), settings_file(host)]


def remove_directory(host: str) -> None:
    """Remove the folder of a host's files, and that of all hosts, if they are empty."""
    with suppress(OSError):
        (DIRECTORY / host).rmdir()
        DIRECTORY.rmdir()


def running(host: str) -> int | None:
    """Return the process id of the host's agent, None while none runs."""
    try:
        pid, started = _file(host, "felix.pid").read_text().split()
        return int(pid) if proc.running_since(int(pid)) == started else None
    except (OSError, ValueError):
        return None


def report(host: str) -> dict[str, object] | None:
    """Return what the host's agent has reported last, whether it still runs or not; None for nothing."""
    value = None
    for _ in range(2):
        try:
            value = json.loads(report_file(host).read_text())
            break
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            time.sleep(0.02)  # an agent that can open no files writes over its last report
    return value if isinstance(value, dict) and value.get("host") == host and "resyncs" in value else None


@contextmanager
def only_one(host: str) -> Iterator[None]:
    """Be the host's agent: hold its locks. Raises CalicoError when there is one already."""
    pid_file = _file(host, "felix.pid")
    with _held(host):
        with _explained(pid_file):
            files.replace(pid_file, f"{os.getpid()} {proc.running_since(os.getpid())}\n".encode(), 0o644).close()
        yield
        pid_file.unlink(missing_ok=True)


@contextmanager
def none_starts(host: str) -> Iterator[None]:
    """See to it that no agent of the host's runs, or begins to, inside `with`. Raises CalicoError."""
    with _held(host):
        yield


def refuse_other(host: str) -> None:
    """Raise CalicoError when an agent under another host name runs in this network namespace."""
    try:
        with _namespace_file().open() as file:
            other = file.read().strip()
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return  # nobody holds it: it was left by an agent that was killed
    except BlockingIOError:
        pass
    except OSError:
        return
    if other != host and running(other):
        raise CalicoError(
            f"An agent runs here already, for the host name {other} (process {running(other)}), and HOSTNAME, or the "
            f"system, says {host}: use one name, or end that agent first with 'HOSTNAME={other} calicoctl node stop'"
        )


def _namespace_file() -> Path:
    return DIRECTORY / f"agent.{os.stat('/proc/self/ns/net').st_ino}"


@contextmanager
def _held(host: str) -> Iterator[None]:
    """Hold the locks of the host's agent, and of this network namespace's; raise CalicoError."""
    lock, namespace = _file(host, "felix.lock"), _namespace_file()
    with _explained(lock), ExitStack() as stack:
        lock.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        for folder in (DIRECTORY, lock.parent):
            folder.chmod(0o755)  # the report is for everybody; locks in here are files of mode 0600
        began = time.monotonic()
        stack.enter_context(_locked(lock, lambda: _refuse_running(host, began)))
        file = stack.enter_context(_locked(namespace, lambda: _refuse_running_here(host, began)))
        file.truncate(0)
        file.write(host)
        file.flush()
        stack.callback(namespace.unlink, missing_ok=True)
        yield


def _refuse_running(host: str, began: float) -> None:
    """Raise CalicoError unless whoever holds the lock, since `began` at least, may be about to let go of it."""
    pid = running(host)
    # without a process id, somebody is removing what an agent has set up
    if time.monotonic() - began > (1 if pid else START_PATIENCE):
        who = f"process {pid}" if pid else "or somebody is removing it"
        raise CalicoError(f"the agent of host {host} runs already ({who})")


def _refuse_running_here(host: str, began: float) -> None:
    refuse_other(host)
    _refuse_running(host, began)


@contextmanager
def _locked(path: Path, refuse: Callable[[], None]) -> Iterator[TextIO]:
    """Hold the lock of a file, and give the file; while somebody else has it, `refuse` may raise."""
    while True:
        fd = files.try_lock(path)
        if fd is not None:
            with open(fd, "r+") as file:
                yield file
            return
        refuse()
        time.sleep(0.02)  # flock(2) waits for ever or not at all


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CalicoError(f"{error.filename or path}: {error.strerror}") from None


def leave(status: int) -> None:
    """End this process, which has been an agent, at once.

    Its threads may be anywhere, at an import even, with a lock that the interpreter's own way out would wait for.
    """
    logging.shutdown()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def tell_ready() -> None:
    """Tell who started this process that it is ready. Source: sd_notify(3)."""
    import sdnotify

    sdnotify.SystemdNotifier().notify("READY=1")


class _OneLine(logging.Formatter):
    """Keeps each event on its line, whatever names from etcd are in it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record))


def log_to(directory: str | None) -> None:
    """Log to a file in a directory, which is kept from growing without end, or to standard error."""
    handler: logging.Handler = logging.StreamHandler()
    text = "%(levelname)s: %(message)s"
    if directory is not None:
        handler = logging.handlers.RotatingFileHandler(Path(directory) / "felix.log", maxBytes=_LOG_SIZE, backupCount=4)
        text = "%(asctime)s %(levelname)s: %(message)s"
    handler.setFormatter(_OneLine(text))
    logging.raiseExceptions = False  # nobody reads what it says of a log that cannot be written
    logger = logging.getLogger("calico")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def start(host: str, options: Options, environment: Mapping[str, str] = os.environ) -> int:
    """Start the host's agent in the background, wait until its first snapshot is in the kernel; return its process id.

    That of another process, where somebody else was quicker. Raises CalicoError when it ends before; one that is only
    slow goes on.
    """
    assert options.log_dir is not None, "nobody reads the standard error of a process in the background"
    DIRECTORY.mkdir(mode=0o755, parents=True, exist_ok=True)
    # the path of a socket must be short, as that of a folder for temporary files may not be
    short = tempfile.TemporaryDirectory(dir=DIRECTORY, prefix="start-")
    with short as directory, tempfile.TemporaryFile("w+") as complaints:
        told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        told.bind(f"{directory}/notify")
        told.settimeout(0.1)
        process = subprocess.Popen(
            [sys.executable, *_IN_BACKGROUND, json.dumps(asdict(options))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=complaints,
            start_new_session=True,
            cwd="/",
            env=_absolute(environment) | {"NOTIFY_SOCKET": f"{directory}/notify"},
        )
        try:
            pid = _await_ready(process, told, host)
        except CalicoError:
            raise
        except BaseException:  # the user has thought better of it
            process.terminate()
            process.wait()
            raise
        if pid is None:
            complaints.seek(0)
            why = " ".join(complaints.read().split())[-300:]
            raise CalicoError(f"The host agent did not start: {why or 'see ' + options.log_dir + '/felix.log'}")
        return pid


def _await_ready(process: subprocess.Popen[bytes], told: socket.socket, host: str) -> int | None:
    """Wait until the host's agent is ready, and return its process id; None when `process` ends and none is there.

    Raises CalicoError when it takes too long.
    """
    give_up = time.monotonic() + START_PATIENCE
    while True:
        with suppress(socket.timeout):
            if b"READY=1" in told.recv(4096):
                return process.pid
        ended = process.poll() is not None
        pid = running(host) if ended else process.pid
        if pid and ended:
            told_by = report(host) or {}
            if told_by.get("pid") == pid and told_by.get("first_update"):
                return pid
        elif ended:
            return None
        if time.monotonic() > give_up:
            waiting_for = (report(host) or {}).get("waiting_for")
            waits = f" waits for {waiting_for}" if waiting_for else " has not set everything up yet"
            raise CalicoError(
                f"The host agent (process {pid}) is running, but{waits} after {START_PATIENCE:.0f} s; "
                "'calicoctl status' tells more."
            )


def _absolute(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for a process of another working directory."""
    files = ("ETCD_CA_CERT_FILE", "ETCD_CERT_FILE", "ETCD_KEY_FILE", "CALICO_ENV_FILE")
    return {
        name: str(Path(value).absolute()) if name in files and value else value for name, value in environment.items()
    }


def restart(host: str) -> int:
    """Replace the host's agent by one of this program, with its options and environment; return the new process id.

    A local etcd goes on meanwhile. Raises NotFound when no agent runs, CalicoError when this cannot restart it.
    """
    pid = running(host)
    if not pid:
        raise NotFound("The host agent is not running.")
    try:
        _, *arguments = proc.arguments(pid)
        environment = dict(text.split("=", 1) for text in proc.strings(pid, "environ") if "=" in text)
        elsewhere = os.stat(f"/proc/{pid}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino
    except (OSError, ValueError) as error:
        raise CalicoError(f"The host agent (process {pid}) cannot be restarted: {error}") from None
    if elsewhere:
        raise CalicoError(
            f"The host agent (process {pid}) runs in another network namespace: restart it from there, with "
            f"'nsenter --net=/proc/{pid}/ns/net calicoctl node restart'."
        )
    if arguments[:-1] != _IN_BACKGROUND:
        raise CalicoError(
            f"The host agent (process {pid}) runs in the foreground: what started it must restart it. For systemd: "
            "'systemctl restart calico-node'."
        )
    names = {field.name for field in fields(Options)}  # the agent may be of another version
    options = Options(**{name: value for name, value in json.loads(arguments[-1]).items() if name in names})
    stop(host)
    return start(host, options, {**environment, "HOSTNAME": host})


def stop(host: str) -> int | None:
    """End the host's agent, and wait until it has; return the process id it had, None where none was running."""
    pid = running(host)
    if not pid:
        return None
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return pid
    except PermissionError:
        raise CalicoError(f"the agent (process {pid}) cannot be ended: it is another user's") from None
    give_up = time.monotonic() + STOP_PATIENCE
    while running(host) == pid:
        if time.monotonic() > give_up:
            raise CalicoError(
                f"the agent (process {pid}) does not end; 'kill -9 {pid}' does no harm to what it has set up"
            )
        time.sleep(0.05)
    return pid
