"""The agent as a process: starts it in the background, finds it, restarts it and stops it; its locks, log and files.

The folder /run/calico/HOST contains the pid file, a lock that the agent holds as long as it runs, its reports
(report.py), and the original values of sysctls (dataplane/sysctls.py). The pid file also contains the start time of the
process, so a stale pid file is recognised. A second lock, /run/calico/agent.<inode of the network namespace>, ensures
that only one agent runs in a network namespace, whatever its host name.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Callable, TextIO

from calicoctl import files, logs, proc
from calicoctl.errors import CalicoError, NotFound
from calicoctl.workloads.locks import DIRECTORY

DEFAULT_LOG_DIR = "/var/log/calico"

START_PATIENCE = 60.0
"""Seconds to wait until the agent is ready (see `start`), or until `node remove` releases the locks."""

STOP_PATIENCE = 25.0
"""Seconds to wait for the agent to end after SIGTERM."""

_IN_BACKGROUND = ["-m", "calicoctl.felix"]


@dataclass(frozen=True)
class Options:
    """The agent's options.

    `log_dir` is the folder of the log file; if it is None, the agent logs to standard error. `metrics_port` is a TCP
    port on loopback; if it is None, the agent serves no metrics. `local_etcd` says whether the agent supervises the
    local etcd, `bgp` whether it runs BIRD, and `libnetwork` whether it supervises the process for Docker networks.
    """

    log_dir: str | None = None
    metrics_port: int | None = None
    local_etcd: bool = False
    bgp: bool = True
    libnetwork: bool = False


def _file(host: str, name: str) -> Path:
    return DIRECTORY / host / name


def report_file(host: str) -> Path:
    return _file(host, "felix.json")


def private(path: Path) -> Path:
    """Return the path of the whole report, which only root may read.

    `path` is the path of the report that every user may read.
    """
    return path.with_name("felix.root.json")


def settings_file(host: str) -> Path:
    return _file(host, "felix.sysctls")


def drops_socket(host: str) -> Path:
    """Return the path of the socket at which root reads the packets that were dropped: see drop_log.py."""
    return _file(host, "drops.sock")


def leftovers(host: str) -> list[Path]:
    """Return the paths of the files that an agent may leave behind when it ends."""
    return [
        *(_file(host, "felix.pid"), _file(host, "felix.lock")),
        *(report_file(host), private(report_file(host)), settings_file(host), drops_socket(host)),
    ]


def remove_directory(host: str, patience: float = 0.0) -> None:
    """Remove the folder of a host's files, then its parent, DIRECTORY. A folder that is not empty is not removed.

    `patience` is how many seconds to wait for the folder to be empty: the command server of an agent that has ended
    removes its socket a little later.
    """
    give_up = time.monotonic() + patience
    while True:
        try:
            (DIRECTORY / host).rmdir()
            DIRECTORY.rmdir()
            return
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or not (DIRECTORY / host).exists() or time.monotonic() >= give_up:
                return
        time.sleep(0.01)  # nothing tells when the socket is gone


def running(host: str) -> int | None:
    """Return the process id of the host's agent, or None if none runs."""
    try:
        pid, started = _file(host, "felix.pid").read_text().split()
        return int(pid) if proc.running_since(int(pid)) == started else None
    except (OSError, ValueError):
        return None


def report(host: str) -> dict[str, object] | None:
    """Return the last report of the host's agent, or None if there is no valid report. The agent may have ended since.

    Users other than root get the report without texts that may quote the store: see Health.public.
    """
    file = report_file(host)
    found, whole = _read_report(file, host), _read_report(private(file), host)
    # an agent of an older version writes no private file, and leaves that of the agent before as it is
    return whole if whole is not None and (found is None or found.get("pid") == whole.get("pid")) else found


def _read_report(path: Path, host: str) -> dict[str, object] | None:
    value = None
    for _ in range(2):
        try:
            value = json.loads(path.read_text())
            break
        except (FileNotFoundError, PermissionError):
            return None
        except (OSError, ValueError):
            time.sleep(0.02)  # an agent that cannot open files overwrites its last report in place
    return value if isinstance(value, dict) and value.get("host") == host and "resyncs" in value else None


def troubles(host: str, subjects: Collection[str] | None = None) -> list[str]:
    """Return the agent's sentences about failures of the host as a whole, such as a firewall that drops packets.

    `subjects` are those of the failures; None stands for all. Return an empty list if there is no report.
    """
    found = (report(host) or {}).get("troubles")
    some = found if isinstance(found, list) else []
    return [str(failure["error"]) for failure in some if subjects is None or failure["subject"] in subjects]


def without_bgp(found: Mapping[str, object] | None) -> str | None:
    """Return a clause with advice if the agent is of an older version, which does no BGP.

    `found` is the result of `report`. Returns None if it is None, or if the agent is of a version that can do BGP.
    """
    if found is None or found.get("bgp") is not None:
        return None
    return (
        f"the agent is of an older version ({found.get('version')}), which does no BGP: 'calicoctl node restart' "
        "replaces it, and interrupts no traffic"
    )


@contextmanager
def only_one(host: str) -> Iterator[str | None]:
    """Hold the locks of the host's agent inside `with`, and write the id of this process to the pid file.

    The pid file is removed at the end of `with`. It stays if the body raises an exception, except a CalicoError, which
    is no crash.

    Yields the process id of the previous agent if that agent was killed or has crashed since the machine was booted,
    else None. Raises CalicoError if an agent runs already for this host name or in this network namespace, if `node
    remove` holds a lock for longer than START_PATIENCE, or if a file cannot be written. An OSError in the body of
    `with` becomes a CalicoError.
    """
    pid_file = _file(host, "felix.pid")
    with _held(host):
        left = None
        with suppress(OSError):
            left = pid_file.read_text().partition(" ")[0]
        with _explained(pid_file):
            files.replace(pid_file, f"{os.getpid()} {proc.running_since(os.getpid())}\n".encode(), 0o644).close()
        try:
            yield left
        except CalicoError:
            pid_file.unlink(missing_ok=True)
            raise
        pid_file.unlink(missing_ok=True)


@contextmanager
def none_starts(host: str) -> Iterator[None]:
    """Prevent agents of the host, and agents in this network namespace, from starting inside `with`.

    Raises CalicoError if such an agent runs, and in the other cases in which `only_one` raises it.
    """
    with _held(host):
        yield


def refuse_other(host: str) -> None:
    """Raise CalicoError if an agent runs in this network namespace under another host name than `host`."""
    try:
        with _namespace_file().open() as file:
            other = file.read().strip()
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return  # not locked: an agent that was killed has left the file
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
    """Hold the lock of the host's agent, and that of this network namespace, inside `with`.

    Raises CalicoError if another process does not release a lock in time (see `_refuse_running`), if an agent of
    another host name runs here, or if a file cannot be written. An OSError in the body of `with` becomes a CalicoError.
    """
    lock, namespace = _file(host, "felix.lock"), _namespace_file()
    with _explained(lock), ExitStack() as stack:
        lock.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        for folder in (DIRECTORY, lock.parent):
            folder.chmod(0o755)  # every user may read the report; the locks in here have mode 0600
        began = time.monotonic()
        stack.enter_context(_locked(lock, lambda: _refuse_running(host, began)))
        file = stack.enter_context(_locked(namespace, lambda: _refuse_running_here(host, began)))
        file.truncate(0)
        file.write(host)
        file.flush()
        stack.callback(namespace.unlink, missing_ok=True)
        yield


def _refuse_running(host: str, began: float) -> None:
    """Raise CalicoError if the caller has waited too long for a lock, since the time `began` (monotonic).

    Too long is more than 1 second while the host's agent runs, and more than START_PATIENCE while it does not run.
    """
    pid = running(host)
    # without a process id, `node remove` holds the lock
    if time.monotonic() - began > (1 if pid else START_PATIENCE):
        who = f"process {pid}" if pid else "or is being removed"
        raise CalicoError(f"the agent of host {host} runs already ({who})")


def _refuse_running_here(host: str, began: float) -> None:
    refuse_other(host)
    _refuse_running(host, began)


@contextmanager
def _locked(path: Path, refuse: Callable[[], None]) -> Iterator[TextIO]:
    """Lock a file inside `with`, and yield it. While another process holds the lock, `refuse` is called repeatedly.

    An exception of `refuse` ends the wait.
    """
    with open(files.lock(path, refuse), "r+") as file:
        yield file


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CalicoError(f"{error.filename or path}: {error.strerror}") from None


def leave(status: int) -> None:
    """End this agent process at once, with the exit status `status`."""
    # the interpreter's own exit could wait forever: a daemon thread may hold the import lock, or a lock of a library
    logging.shutdown()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def log_to(directory: str | None) -> None:
    """Log to the file felix.log in `directory`, with rotation, or to standard error if `directory` is None.

    Exceptions that end a thread, or that Python discards (in a finalizer, for example), are logged, too. Raises OSError
    if the file cannot be opened.
    """
    handler: logging.Handler = logging.StreamHandler()
    text = "%(levelname)s: %(message)s"
    if directory is not None:
        handler, text = logs.RotatingFile(Path(directory) / "felix.log"), logs.WITH_TIME
    handler.setFormatter(logs.OneLine(text))
    logging.raiseExceptions = False  # there is no place to report a log that cannot be written
    logger = logging.getLogger("calico")
    threading.excepthook = lambda died: logger.critical(
        "the thread %s has died", died.thread.name if died.thread else "?", exc_info=died.exc_value
    )
    sys.unraisablehook = lambda lost: logger.error("an exception was discarded", exc_info=lost.exc_value)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def start(host: str, options: Options, environment: Mapping[str, str] = os.environ) -> int:
    """Start the host's agent in the background, wait until it is ready, and return its process id.

    The agent is ready when its first update is in the kernel and BIRD is settled (see BgpManager.is_settled).
    `environment` contains the agent's environment variables. If another command has started the agent at the same time,
    that agent's process id is returned.

    Raises CalicoError if the agent ends before it is ready. Also raises CalicoError after START_PATIENCE, but then the
    agent keeps running. If the wait is interrupted, for example by Ctrl-C, the agent is ended.
    """
    assert options.log_dir is not None, "a process in the background needs a log file"
    DIRECTORY.mkdir(mode=0o755, parents=True, exist_ok=True)
    # the path of a socket must be short, which the default folder for temporary files may not be
    short = tempfile.TemporaryDirectory(dir=DIRECTORY, prefix="start-")
    with short as directory, tempfile.TemporaryFile("w+") as stderr:
        ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        ready.bind(f"{directory}/notify")
        ready.settimeout(0.1)  # then _await_ready looks for what sends nothing: an end, another agent's report
        process = subprocess.Popen(
            [sys.executable, *_IN_BACKGROUND, json.dumps(asdict(options))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
            cwd="/",
            env=_absolute(environment) | {"NOTIFY_SOCKET": f"{directory}/notify"},
        )
        try:
            pid = _await_ready(process, ready, host)
        except CalicoError:
            raise
        except BaseException:  # the command was interrupted
            process.terminate()
            process.wait()
            raise
        if pid is None:
            stderr.seek(0)
            why = " ".join(stderr.read().split())[-300:]
            raise CalicoError(f"The host agent did not start: {why or 'see ' + options.log_dir + '/felix.log'}")
        return pid


def _await_ready(process: subprocess.Popen[bytes], ready: socket.socket, host: str) -> int | None:
    """Wait until the host's agent is ready, and return its process id.

    The agent is `process`. But if `process` has ended and another process is the host's agent, wait for that one.
    Return None if `process` has ended and no agent runs. `ready` is the socket at which the sd_notify(3) message of
    `process` arrives. Raises CalicoError after START_PATIENCE.
    """
    give_up = time.monotonic() + START_PATIENCE
    while True:
        with suppress(socket.timeout):
            if b"READY=1" in ready.recv(4096):
                return process.pid
        ended = process.poll() is not None
        pid = running(host) if ended else process.pid
        if pid and ended:
            last = report(host) or {}
            if last.get("pid") == pid and last.get("first_update"):
                return pid
        elif ended:
            return None
        if time.monotonic() > give_up:
            waiting_for = (report(host) or {}).get("waiting_for")
            waits = f" waits for {waiting_for}" if waiting_for else " has not set everything up yet"
            raise CalicoError(
                f"The host agent (process {pid}) is running, but{waits} after {START_PATIENCE:.0f} s; "
                "see 'calicoctl status'."
            )


def _absolute(environment: Mapping[str, str]) -> dict[str, str]:
    """Return a copy of `environment` with absolute paths in the variables that name files."""
    # the agent's working directory is /
    files = ("ETCD_CA_CERT_FILE", "ETCD_CERT_FILE", "ETCD_KEY_FILE", "ETCD_PASSWORD_FILE", "CALICO_ENV_FILE")
    return {
        name: str(Path(value).absolute()) if name in files and value else value for name, value in environment.items()
    }


def restart(host: str) -> int:
    """Restart the host's agent with the code of this version, and return the new process id.

    The agent's options and environment stay the same. A local etcd keeps running. Raises NotFound if no agent runs.
    Raises CalicoError if the agent runs in another network namespace or in the foreground, or if it cannot be stopped
    or started.
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
    names = {field.name for field in fields(Options)}  # the agent may be of a version with other options
    options = Options(**{name: value for name, value in json.loads(arguments[-1]).items() if name in names})
    stop(host)
    return start(host, options, {**environment, "HOSTNAME": host})


def stop(host: str) -> int | None:
    """End the host's agent, and wait until it has ended. Return its process id, or None if none was running.

    Raises CalicoError if the agent belongs to another user, or does not end within STOP_PATIENCE.
    """
    pid = running(host)
    if not pid:
        return None
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return pid
    except PermissionError:
        raise CalicoError(f"the agent (process {pid}) cannot be ended: it is another user's") from None
    if not proc.await_end(pid, STOP_PATIENCE):
        raise CalicoError(f"the agent (process {pid}) does not end; 'kill -9 {pid}' does no harm to what it has set up")
    return pid
