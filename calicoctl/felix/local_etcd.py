"""An etcd for a host that is alone: the distribution's, on loopback, started by `calicoctl node --local-etcd`.

It is a process of its own, so that it goes on when the agent is killed; the agent starts it again when it ends. Which
process it is, a pid file tells, and the data folder among that process's arguments confirms it.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import logging
import os
import select
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from calicoctl.datastore.store import EtcdSettings
from calicoctl.errors import CalicoError
from calicoctl.locks import DIRECTORY

log = logging.getLogger("calico.felix")

DATA = Path("/var/lib/calico/etcd")

START_PATIENCE = 60.0
"""Seconds to wait for etcd to serve."""

END_PATIENCE = 30.0
"""Seconds to wait for it to end."""

LONGEST_PAUSE = 30.0
"""Seconds between two starts of an etcd that keeps ending, at most."""


class LocalEtcd:
    """The host's own etcd, at the loopback address and port that the environment names (127.0.0.1:2379 by default)."""

    def __init__(self, host: str, log_dir: str) -> None:
        """Raises CalicoError when the environment names another store."""
        settings = EtcdSettings.from_environment()
        name, port = settings.hosts[0]
        if len(settings.hosts) != 1 or settings.scheme != "http" or name not in ("127.0.0.1", "localhost"):
            raise CalicoError(
                f"--local-etcd is an etcd at http://127.0.0.1, and the environment names {settings.url((name, port))}: "
                "unset ETCD_ENDPOINTS, ETCD_AUTHORITY and ETCD_SCHEME, or leave --local-etcd out"
            )
        self.url = f"http://127.0.0.1:{port}"
        self._peer_url = f"http://127.0.0.1:{port + 1}"
        self._pid_file = DIRECTORY / host / "etcd.pid"
        self._log_file = Path(log_dir) / "etcd.log"
        self._child: subprocess.Popen[bytes] | None = None

    def running(self) -> int | None:
        """Return the process id of this etcd, None while it does not run."""
        try:
            pid = int(self._pid_file.read_text())
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return None
        return pid if f"--data-dir={DATA}".encode() in arguments else None

    def start(self) -> bool:
        """Start it unless it runs, and wait until it serves; tell whether it was started. Raises CalicoError.

        One that does not come to serve is ended: it might do so later, when nobody looks after it.
        """
        try:
            started = self._launch()
            self._await_health()
        except BaseException:  # also when the command is interrupted
            self._end_child()
            raise
        return started

    def _launch(self) -> bool:
        """Start it unless it runs; tell whether it was started. Raises CalicoError."""
        if self.running() is None and self._healthy():
            raise CalicoError(f"an etcd answers at {self.url} already: leave --local-etcd out to use that one")
        try:
            DATA.mkdir(mode=0o700, parents=True, exist_ok=True)
            DATA.chmod(0o700)
            folder = os.open(DATA, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise CalicoError(f"--local-etcd: {error.filename}: {error.strerror}") from None
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # not two at once
            if self.running() is not None:
                return False
            self._launch_alone()
            return True
        finally:
            os.close(folder)

    def _launch_alone(self) -> None:
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
                        f"--listen-client-urls={self.url}",
                        f"--advertise-client-urls={self.url}",
                        f"--listen-peer-urls={self._peer_url}",
                        f"--initial-advertise-peer-urls={self._peer_url}",
                        f"--initial-cluster=local={self._peer_url}",
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

    def stop(self) -> bool:
        """End it, and wait until it has; tell whether it ran. Raises CalicoError."""
        pid = self.running()
        if pid is None:
            return False
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        give_up = time.monotonic() + END_PATIENCE
        while self.running() is not None and not self._reaped():
            if time.monotonic() > give_up:
                raise CalicoError(f"the local etcd (process {pid}) does not end")
            time.sleep(0.05)
        self._pid_file.unlink(missing_ok=True)
        return True

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Have it run for a while, if it is what this host's store is: its data is there, and nobody else serves."""
        started = (DATA / "member").exists() and not self._healthy() and self.start()
        try:
            yield
        finally:
            if started:
                self.stop()

    def supervise(self) -> None:
        """Start it again whenever it ends, from a thread of its own, as long as this process lives."""
        threading.Thread(target=self._supervise, name="supervising etcd", daemon=True).start()

    def _supervise(self) -> None:
        pause = 1.0
        while True:
            try:
                self._launch()
                self._await_health()  # one that takes long goes on
                pid, since = self.running(), time.monotonic()
                if pid is not None:
                    self._await_end(pid)
                    log.warning("the local etcd has ended; starting it again")
                    if time.monotonic() - since > LONGEST_PAUSE:
                        pause = 1.0
            except Exception as error:  # whatever it is: nobody else would start it again
                log.error("the local etcd: %s", error)
            time.sleep(pause)
            pause = min(LONGEST_PAUSE, pause * 2)

    def _await_end(self, pid: int) -> None:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll()
        finally:
            os.close(fd)
        self._reaped()

    def _reaped(self) -> bool:
        return self._child is not None and self._child.poll() is not None

    def _healthy(self) -> bool:
        try:
            # not by way of a proxy that the environment may name
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(f"{self.url}/health", timeout=2) as answer:
                return bool(json.load(answer).get("health") == "true")
        except (OSError, http.client.HTTPException, ValueError, AttributeError):
            return False

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
