"""Starts, adopts and supervises a daemon, which is a process that outlives the agent.

The daemons are the local etcd, BIRD, and the process for Docker networks. The caller provides the command line and the
configuration of the daemon. `supervise` restarts the daemon when it has ended; for BIRD, bgp/manager.py does that.

The next agent, and every command, find the daemon by its pid file. A pid file may be stale, so a process counts as the
daemon only if `marker` is among its arguments: an argument that no other process has, such as the daemon's data folder.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from calicoctl import files, logs, proc
from calicoctl.errors import CalicoError

log = logging.getLogger("calico.felix")

END_PATIENCE = 30.0
"""Seconds to wait for a daemon to end."""

LOCK_PATIENCE = 30.0
"""Seconds to wait while another process holds the lock, which it holds while it starts the daemon."""

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""The first and the longest pause in seconds until a daemon that ended is started again. The pause doubles each time.
It is reset if the daemon has run for longer than the longest pause.
"""

LOG_INTERVAL = 60.0
"""Seconds between two checks of the size of a supervised daemon's log, which only the daemon itself writes to."""


@dataclass(frozen=True)
class Process:
    """A daemon's process, identified by a pid file and by `marker`, an argument that no other process has.

    `name` is the daemon's name in messages.
    """

    name: str
    pid_file: Path
    marker: str

    def pid(self) -> int | None:
        """Return the daemon's process id, or None if it does not run."""
        try:
            pid = int(self.pid_file.read_text())
            return pid if self.marker in proc.arguments(pid) else None
        except (OSError, ValueError):
            return None

    def note(self, pid: int) -> None:
        """Write `pid` into the pid file. Raises OSError."""
        # overwritten in place: that works even if the file system is full
        with open(os.open(self.pid_file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644), "w") as file:
            file.write(f"{pid}\n")
            file.truncate()

    def stop(self) -> bool:
        """End the daemon, and wait until it has ended. Return whether it was running.

        Raises CalicoError if the daemon does not end within END_PATIENCE.
        """
        pid = self.pid()
        if pid is None:
            return False
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        if not proc.await_end(pid, END_PATIENCE):
            raise CalicoError(f"{self.name} (process {pid}) does not end")
        self.pid_file.unlink(missing_ok=True)
        return True


class NotServing(CalicoError):
    """The daemon has ended, or has not become ready in time."""


class Daemon:
    """Starts a daemon's process, and supervises it. All methods but `supervise` may raise CalicoError."""

    def __init__(
        self,
        process: Process,
        log_file: Path,
        lock: Path,
        is_ready: Callable[[], bool],
        start_patience: float,
        environment: Mapping[str, str],
        folder: Path = Path("/"),
    ) -> None:
        """`lock` is a file that is locked only while the daemon's process is being launched.

        The directory that contains `lock` must exist and belong to root, and only root may write to it. The daemon's
        output is appended to `log_file`. `environment` is the daemon's whole environment, and `folder` is its working
        directory. `is_ready` is called until it returns True, for `start_patience` seconds at most.
        """
        self.process = process
        self._log_file = log_file
        self._lock = lock
        self._is_ready = is_ready
        self._start_patience = start_patience
        self._environment = environment
        self._folder = folder
        self._child: subprocess.Popen[bytes] | None = None

    def start(self, command: Callable[[], list[str]], adopt: Callable[[int], None]) -> bool:
        """Start the daemon if it does not run, and wait until it is ready. Return False if it was running before.

        The arguments are those of `launch`. If this method fails or is interrupted after it has started the daemon, the
        daemon is ended. Raises CalicoError if the daemon cannot be started, NotServing if it does not become ready.
        """
        try:
            started = self.launch(command, adopt)
            self.await_ready()
            return started
        except BaseException:  # also when the command is interrupted
            self._end_child()
            raise

    def launch(self, command: Callable[[], list[str]], adopt: Callable[[int], None]) -> bool:
        """Start the daemon's process if it does not run. Return True if it was started, False if it was running before.

        `command` returns the command line; its first word is looked up in PATH. `adopt` is called with the daemon's
        process id if the daemon was running before. Both are called while the lock is held.

        Does not wait until the daemon is ready. Raises CalicoError if the daemon cannot be started, if another process
        holds the lock for longer than LOCK_PATIENCE, or if `command` or `adopt` raises it.
        """
        try:
            with self._locked():
                pid = self.process.pid()
                if pid is not None:
                    adopt(pid)
                    return False
                self._spawn(command())
                return True
        except OSError as error:
            raise CalicoError(f"{self.process.name}: {error.filename}: {error.strerror}") from None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        held = CalicoError(
            f"{self.process.name} is not started: another process has kept {self._lock} locked for "
            f"{LOCK_PATIENCE:.0f} s"
        )
        fd = files.lock_within(self._lock, LOCK_PATIENCE, held)
        try:
            yield
        finally:
            self._lock.unlink(missing_ok=True)
            os.close(fd)

    def _spawn(self, command: list[str]) -> None:
        self.process.pid_file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._log_file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        # not for everybody: it may quote the configuration
        with open(
            os.open(self._log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640), "ab"
        ) as output:
            # this bounds also the log of a daemon that ends again and again, or that nobody supervises
            with suppress(OSError):
                logs.shorten(output.fileno())
            self._child = subprocess.Popen(
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd=self._folder,
            )
        self.process.note(self._child.pid)
        while self.process.pid() is None and not self._child_has_ended():
            time.sleep(0.001)  # the arguments of a new process can be read only a moment later

    def await_ready(self) -> None:
        """Wait until the daemon is ready.

        Raise NotServing if the daemon ends before that, or is not ready after `start_patience` seconds.
        """
        give_up = time.monotonic() + self._start_patience
        while not self._is_ready():
            if self._child_has_ended() or self.process.pid() is None or time.monotonic() > give_up:
                last = self._last_log_line()
                said = f"{self._log_file} ends with: {last}" if last else f"{self._log_file} is empty"
                raise NotServing(f"{self.process.name} does not serve; {said}")
            time.sleep(0.05)  # nothing announces that a daemon is ready which another process has started

    def _end_child(self) -> None:
        """End the process that this object has started, if any. Remove the pid file unless it names another process."""
        if self._child is None:
            return
        runs_as = self.process.pid()
        self._child.terminate()
        if not (self._child_has_ended() or proc.await_end(self._child.pid, END_PATIENCE)):
            self._child.kill()
        self._child.wait()
        if runs_as in (None, self._child.pid):
            self.process.pid_file.unlink(missing_ok=True)

    def supervise(self, launch: Callable[[], object]) -> None:
        """Start a thread that calls `launch` now, and again whenever the daemon has ended.

        `launch` must start the daemon if it does not run. If `launch` raises an exception, the thread logs it, pauses,
        and then calls `launch` again. The thread ends with this process, but the daemon does not.
        """
        threading.Thread(
            target=self._supervise, args=(launch,), name=f"supervising {self.process.name}", daemon=True
        ).start()

    def _supervise(self, launch: Callable[[], object]) -> None:
        pause = FIRST_PAUSE
        while True:
            self._bound_log()  # also while the daemon runs, but does not become ready
            try:
                launch()
                self.await_ready()  # a daemon that takes longer goes on, and is waited for again
                pid, since = self.process.pid(), time.monotonic()
                if pid is not None:
                    while not proc.await_end(pid, LOG_INTERVAL):
                        self._bound_log()
                    self._child_has_ended()
                    log.warning("%s has ended; starting it again", self.process.name)
                    if time.monotonic() - since > LONGEST_PAUSE:
                        pause = FIRST_PAUSE
            except Exception as error:  # of whatever kind: nothing else would start it again
                log.error("%s: %s", self.process.name, error)
            time.sleep(pause)
            pause = min(LONGEST_PAUSE, pause * 2)

    def _child_has_ended(self) -> bool:
        """Return whether the process that this object has started has ended. Return False if it has started none."""
        return self._child is not None and self._child.poll() is not None

    def _bound_log(self) -> None:
        """Cut the older half off a log that has grown too large: the daemon has it open, so it cannot be renamed."""
        with suppress(OSError), open(self._log_file, "rb") as file:
            logs.shorten(file.fileno())

    def _last_log_line(self) -> str:
        try:
            return self._log_file.read_text(errors="replace").strip().rpartition("\n")[2][-300:]
        except OSError:
            return ""
