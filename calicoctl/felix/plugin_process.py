"""Starts and supervises the process that serves Docker networks (plugins/), with `calicoctl node --libnetwork`.

That command starts the process, and the agent starts it again when it has ended. The process outlives the agent:
containers must be able to start and stop while no agent runs. Where systemd starts one instead, as
calico-docker.service, this module starts none.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

from calicoctl import environment, proc
from calicoctl.environment import DOCKER_TLS, STORE
from calicoctl.errors import CalicoError
from calicoctl.felix.daemon import Daemon, Process
from calicoctl.workloads.locks import DIRECTORY

log = logging.getLogger("calico.felix")

SOCKET = Path("/run/docker/plugins/calico.sock")
"""The socket of the network driver."""

ARGUMENT = "--plugins-of="
"""The beginning of the argument by which the process is found. The name of the host follows."""

START_PATIENCE = 30.0
"""Seconds to wait until the process serves."""

POLL = 5.0
"""Seconds between two checks whether another process still serves Docker networks.

No event says that a listener has ended: its socket's file may stay, and a connection would make systemd start its
process.
"""

SETTINGS = (*STORE, "DOCKER_HOST", *DOCKER_TLS)
"""The environment variables that must have the same values in the process as in the agent."""


def running(host: str) -> int | None:
    """Return the process id of a host's process, or None if it does not run, or if systemd has started it."""
    return _process(host).pid()


def stop(host: str) -> int | None:
    """End a host's process, unless systemd has started it. Return its process id, None if there was none to end.

    Raises CalicoError if it does not end.
    """
    pid = running(host)
    _process(host).stop()
    return pid


def is_of_other_version(host: str) -> bool:
    """Return whether a host's process runs, and belongs to another installed version of this program."""
    pid = running(host)
    try:
        return pid is not None and proc.arguments(pid)[:1] != [sys.executable]
    except OSError:
        return False


def served_elsewhere() -> bool:
    """Return whether Docker's calls reach another process than the one that this module starts, such as systemd's."""
    return proc.is_listened_at(SOCKET)


def has_other_settings(host: str) -> bool:
    """Return whether a host's process runs, and uses another store or Docker Engine than the process that calls this.

    Variables that the environment of the host's process does not set are taken from the settings file. Returns False if
    its environment or the settings file cannot be read.
    """
    pid = running(host)
    try:
        variables = dict(text.partition("=")[::2] for text in proc.strings(pid, "environ")) if pid is not None else {}
        environment.complete(variables)
    except (OSError, CalicoError):
        return False
    return pid is not None and any((variables.get(name) or "") != os.environ.get(name, "") for name in SETTINGS)


def await_replacement(host: str) -> None:
    """If a host's process is of another version, wait until the agent, which was just restarted, has ended it.

    Returns after START_PATIENCE in any case.
    """
    pid = running(host)
    if pid is not None and is_of_other_version(host):
        proc.await_end(pid, START_PATIENCE)


def _process(host: str) -> Process:
    return Process("the plugin for Docker networks", DIRECTORY / host / "plugins.pid", f"{ARGUMENT}{host}")


class PluginProcess:
    """Starts and supervises a host's process, which runs in the background."""

    def __init__(self, host: str, log_dir: str) -> None:
        """`log_dir` is the folder of the process's log."""
        self._host = host
        self._daemon = Daemon(
            _process(host),
            Path(log_dir) / "plugins.log",
            lock=DIRECTORY / host / "plugins.starting",
            is_ready=lambda: _listener() == running(host),
            start_patience=START_PATIENCE,
            environment=os.environ,
        )

    def start(self) -> bool:
        """Start the process unless it runs, and wait until it serves. Return whether it was started.

        A process of another version of this program is replaced. Raises CalicoError.
        """
        self._end_other_version()
        return self._daemon.start(self._command, lambda pid: None)

    def supervise(self) -> None:
        """Have a thread start the process if it does not run, and again whenever it ends. Returns at once.

        A process of another version, or one that uses another store or Docker Engine than the agent, since the settings
        file was changed, is replaced. While systemd's process serves Docker networks, no other is started, and one that
        runs is ended. The thread ends with the agent; the process does not.
        """
        self._daemon.supervise(self._launch)

    def _launch(self) -> None:
        if served_elsewhere():
            log.warning("--libnetwork has no effect: another process, such as systemd's, serves Docker networks")
            self._daemon.process.stop()  # which Docker does not reach any more, and which keeps that one from serving
            while served_elsewhere():
                time.sleep(POLL)
        self._end_other_version()
        if has_other_settings(self._host):
            self._daemon.process.stop()
        self._daemon.launch(self._command, lambda pid: None)

    def _end_other_version(self) -> None:
        DIRECTORY.joinpath(self._host).mkdir(mode=0o755, parents=True, exist_ok=True)
        if is_of_other_version(self._host):
            self._daemon.process.stop()

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "calicoctl.plugins", self._daemon.process.marker]


def _listener() -> int | None:
    """Return the id of the process that listens at SOCKET, None if nothing accepts connections there."""
    try:
        return proc.listener(str(SOCKET))
    except OSError:
        return None
