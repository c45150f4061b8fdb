"""An etcd for a host that is alone: the distribution's, on loopback, started by `calicoctl node --local-etcd`.

It is a process of its own, so that it goes on when the agent is killed; the agent starts it again when it ends. Which
process it is, a pid file tells, and the data folder among that process's arguments confirms it. Where it is, lines of
its own in the file of settings tell every command (../environment.py), also the one that starts it after a reboot.
"""

from __future__ import annotations

import fcntl
import http.client
import logging
import os
import select
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from calicoctl.datastore.settings import EtcdSettings
from calicoctl.environment import STORE, EnvironmentFile
from calicoctl.errors import CalicoError
from calicoctl.workloads.locks import DIRECTORY

log = logging.getLogger("calico.felix")

DATA = Path("/var/lib/calico/etcd")

START_PATIENCE = 60.0
"""Seconds to wait for etcd to serve."""

END_PATIENCE = 30.0
"""Seconds to wait for it to end."""

LONGEST_PAUSE = 30.0
"""Seconds between two starts of an etcd that keeps ending, at most."""

_PORTS = range(2379, 32768, 10)
"""Ports to try: etcd's own first, then others below those that the kernel gives to connections."""

_CLIENT_URL = "--listen-client-urls=http://127.0.0.1:"


def running(host: str) -> int | None:
    """Return the process id of a host's own etcd, None while it does not run."""
    try:
        pid = int(_pid_file(host).read_text())
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    return pid if f"--data-dir={DATA}".encode() in arguments else None


def stop(host: str) -> bool:
    """End a host's own etcd, whatever store is named meanwhile, and wait until it has; tell whether it ran.

    Raises CalicoError.
    """
    pid = running(host)
    if pid is None:
        return False
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    if not _await_end(pid, END_PATIENCE):
        raise CalicoError(f"the local etcd (process {pid}) does not end")
    _pid_file(host).unlink(missing_ok=True)
    return True


def unannounce(was_ours: bool) -> None:
    """Take the lines of a local etcd out of the file of settings. Raises CalicoError.

    Where the environment names another store than the file, they stay, unless they were this host's (`was_ours`).
    """
    file = EnvironmentFile()
    if was_ours or _is_as_written(file):
        file.remove_own()


def _await_end(pid: int, seconds: float | None = None) -> bool:
    """Wait until all threads of a process have ended, and its port and data are free; tell whether they have."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(None if seconds is None else seconds * 1000))
    finally:
        os.close(fd)


def _pid_file(host: str) -> Path:
    return DIRECTORY / host / "etcd.pid"


def _is_as_written(file: EnvironmentFile) -> bool:
    """Tell whether the environment names the store of the file of settings. Raises CalicoError."""
    # systemd reads the file, too: what it says may stand in the environment
    written = file.variables()
    return all(os.environ.get(name, "") == written.get(name, "") for name in STORE)


class LocalEtcd:
    """The host's own etcd: at the port of 127.0.0.1 that is named, else at 2379, or another one that is free.

    Its port stays what it is when the environment, or what somebody has written into the file of settings, names it;
    when its own lines do, or nobody does, it may be another where that one is taken.
    """

    def __init__(self, host: str, log_dir: str) -> None:
        """Raises CalicoError when another store is named."""
        settings = EtcdSettings.from_environment()
        name, self._port = settings.hosts[0]
        if not _is_local(settings):
            raise CalicoError(
                f"--local-etcd is an etcd at http://127.0.0.1, and the store of this host is "
                f"{settings.url((name, self._port))}: take ETCD_ENDPOINTS, ETCD_AUTHORITY and ETCD_SCHEME out of the "
                f"environment and of {EnvironmentFile().path}, or leave --local-etcd out"
            )
        self._host = host
        self._file = EnvironmentFile()
        self._may_move = settings.is_default or self._named_by_own_lines()
        self._pid_file = _pid_file(host)
        self._log_file = Path(log_dir) / "etcd.log"
        self._child: subprocess.Popen[bytes] | None = None

    def _named_by_own_lines(self) -> bool:
        """Tell whether nothing but this etcd's own lines in the file of settings names it."""
        own = self._file.own()
        its_lines_alone = bool(own) and EtcdSettings.from_environment(self._file.others()).is_default
        return its_lines_alone and _is_as_written(self._file)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def _variables(self) -> dict[str, str]:
        return {"ETCD_AUTHORITY": f"127.0.0.1:{self._port}"}

    def running(self) -> int | None:
        """Return the process id of this etcd, None while it does not run."""
        return running(self._host)

    def refuse_other_settings(self) -> None:
        """Raise CalicoError when somebody has written another store into the file of settings."""
        others = EtcdSettings.from_environment(self._file.others())
        if not others.is_default and not (_is_local(others) and others.hosts[0][1] == self._port):
            raise CalicoError(
                f"--local-etcd is an etcd at {self.url}, and {self._file.path} names the store "
                f"{others.url(others.hosts[0])}: take that out of the file, or leave --local-etcd out"
            )

    def find_place(self, stay: bool = False) -> None:
        """Make `url` the one that it has, or would be started at. Raises CalicoError where it can be at none.

        With `stay`, it is not moved: an agent that runs knows no other place of it.
        """
        pid = self.running()
        if pid is not None:
            self._adopt(pid)
        elif not _is_free(self._port):
            if stay or not self._may_move:
                raise self._taken()
            self._port = _free_port(_PORTS)

    def _adopt(self, pid: int) -> None:
        """Take the port of the process that runs for its port; raise CalicoError when another is named."""
        arguments = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
        ports = [int(a[len(_CLIENT_URL) :]) for a in arguments if a.startswith(_CLIENT_URL)]
        if ports and ports[0] != self._port:
            if not self._may_move:
                raise CalicoError(
                    f"The local etcd (process {pid}) is running at http://127.0.0.1:{ports[0]}, and ETCD_AUTHORITY, or "
                    f"ETCD_ENDPOINTS, says {self.url}: use one, or end it first with 'calicoctl node stop --force'"
                )
            self._port = ports[0]

    def _taken(self) -> CalicoError:
        """Return what to say of a port that it cannot have."""
        way = f"name no store, in the environment and {self._file.path}, to have it at a free port"
        if self._may_move:
            way = "end the host agent with 'calicoctl node stop --force' and repeat this, to have it at another port"
        if not self._healthy():
            return CalicoError(f"port {self._port} of 127.0.0.1 is in use by another program: end that one, or {way}")
        if self._answers("/v2/keys"):
            return CalicoError(
                f"an etcd answers at {self.url} already: leave --local-etcd out to use that one, or {way}"
            )
        return CalicoError(f"an etcd answers at {self.url} already, and does not serve its v2 API: {way}")

    def start(self, stay: bool = False) -> bool:
        """Start it unless it runs, and wait until it serves; tell whether it was started. Raises CalicoError.

        From then on, this process's environment names it. One that does not come to serve is ended: it might do so
        later, when nobody looks after it. For `stay`, see `find_place`.
        """
        try:
            started = self._launch(stay)
            self._await_health()
        except BaseException:  # also when the command is interrupted
            self._end_child()
            raise
        if self._may_move:
            os.environ.update(self._variables)
        return started

    @contextmanager
    def announced(self) -> Iterator[bool]:
        """Have its own lines in the file of settings say where it is; give whether they had to be written.

        When what is inside `with` fails, they are again as they were. Raises CalicoError.
        """
        before = self._file.own()
        if before == self._variables or not EtcdSettings.from_environment(self._file.others()).is_default:
            yield False
            return
        self._file.set_own(self._variables)
        try:
            yield True
        except BaseException:
            if before:
                self._file.set_own(before)
            else:
                self._file.remove_own()
            raise

    def _launch(self, stay: bool) -> bool:
        """Start it unless it runs; tell whether it was started. Raises CalicoError."""
        try:
            DATA.mkdir(mode=0o700, parents=True, exist_ok=True)
            DATA.chmod(0o700)
            folder = os.open(DATA, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise CalicoError(f"--local-etcd: {error.filename}: {error.strerror}") from None
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # not two at once
            self.find_place(stay)
            if self.running() is not None:
                return False
            self._launch_alone()
            return True
        finally:
            os.close(folder)

    def _launch_alone(self) -> None:
        # nobody speaks with it as a member, but it must listen to such
        peer_url = f"http://127.0.0.1:{_free_port(range(self._port + 1, 65536))}"
        try:
            self._refuse_shared_data()
            self._pid_file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._log_file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            with self._log_file.open("ab") as output:
                self._child = subprocess.Popen(
                    [
                        "etcd",
                        "--name=local",
                        f"--data-dir={DATA}",
                        "--enable-v2",
                        f"{_CLIENT_URL}{self._port}",
                        f"--advertise-client-urls={self.url}",
                        f"--listen-peer-urls={peer_url}",
                        f"--initial-advertise-peer-urls={peer_url}",
                        f"--initial-cluster=local={peer_url}",
                        "--log-outputs=stderr",
                    ],
                    # etcd reads settings from its environment that would clash with these
                    env={name: value for name, value in os.environ.items() if not name.startswith("ETCD_")},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    cwd="/",
                )
            self._pid_file.write_text(f"{self._child.pid}\n")
            while self.running() is None and not self._reaped():
                time.sleep(0.001)  # its arguments are to be seen a moment after it has begun
        except OSError as error:
            if error.filename == "etcd":
                raise CalicoError("--local-etcd: there is no etcd here: install the package etcd-server") from None
            raise CalicoError(f"--local-etcd: {error.filename}: {error.strerror}") from None

    @staticmethod
    def _refuse_shared_data() -> None:
        """Raise CalicoError where another etcd uses the data: that has an exclusive flock(2) on its database."""
        with suppress(FileNotFoundError), (DATA / "member/snap/db").open("rb") as database:
            try:
                fcntl.flock(database, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CalicoError(
                    f"--local-etcd: another etcd uses {DATA}; end that one, or leave --local-etcd out and say with "
                    "ETCD_AUTHORITY where it is"
                ) from None

    def _end_child(self) -> None:
        """End what was started here, and nothing that somebody else has started meanwhile."""
        if self._child is None:
            return
        runs_as = self.running()
        self._child.terminate()
        try:
            self._child.wait(END_PATIENCE)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        if runs_as in (None, self._child.pid):
            self._pid_file.unlink(missing_ok=True)

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Have it run for a while, if it is what this host's store is: its data is there, and nobody else serves."""
        its_own = self._may_move and bool(self._file.own())
        wanted = (DATA / "member").exists() and self.running() is None and (its_own or not self._healthy())
        started = wanted and self.start()
        try:
            yield
        finally:
            if started:
                stop(self._host)

    def supervise(self) -> None:
        """Start it again whenever it ends, from a thread of its own, as long as this process lives."""
        threading.Thread(target=self._supervise, name="supervising etcd", daemon=True).start()

    def _supervise(self) -> None:
        pause = 1.0
        while True:
            try:
                self._launch(stay=True)
                self._await_health()  # one that takes long goes on
                pid, since = self.running(), time.monotonic()
                if pid is not None:
                    _await_end(pid)
                    self._reaped()
                    log.warning("the local etcd has ended; starting it again")
                    if time.monotonic() - since > LONGEST_PAUSE:
                        pause = 1.0
            except Exception as error:  # whatever it is: nobody else would start it again
                log.error("the local etcd: %s", error)
            time.sleep(pause)
            pause = min(LONGEST_PAUSE, pause * 2)

    def _reaped(self) -> bool:
        return self._child is not None and self._child.poll() is not None

    def _healthy(self) -> bool:
        return b'"health":"true"' in (self._answers("/health") or b"").replace(b" ", b"")

    def _answers(self, path: str) -> bytes | None:
        """Return what is served at a path, None where nothing is."""
        try:
            # not by way of a proxy that the environment may name
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(f"{self.url}{path}", timeout=2) as answer:
                return bytes(answer.read(2**16))
        except (OSError, http.client.HTTPException, ValueError):
            return None

    def _await_health(self) -> None:
        give_up = time.monotonic() + START_PATIENCE
        while not self._healthy():
            if self._reaped() or self.running() is None or time.monotonic() > give_up:
                raise CalicoError(f"the local etcd does not serve; {self._log_file} ends with: {self._log_end()}")
            time.sleep(0.05)

    def _log_end(self) -> str:
        try:
            return self._log_file.read_text(errors="replace").strip().rpartition("\n")[2][-300:]
        except OSError:
            return ""


def _is_local(settings: EtcdSettings) -> bool:
    """Tell whether a store is at a place where the local etcd could be."""
    (name, _), *others = settings.hosts
    return not others and settings.scheme == "http" and name in ("127.0.0.1", "localhost")


def _is_free(port: int) -> bool:
    """Tell whether a server could listen at a port of 127.0.0.1."""
    with closing(socket.socket()) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as etcd does
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _free_port(ports: range) -> int:
    """Return the first port that is free; raise CalicoError when none is."""
    for port in ports:
        if _is_free(port):
            return port
    raise CalicoError(f"--local-etcd: no port of 127.0.0.1 from {ports[0]} to {ports[-1]} is free")
