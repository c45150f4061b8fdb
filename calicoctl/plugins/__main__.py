"""The process that serves Docker networks: `python -m calicoctl.plugins [--plugins-of=HOST]`.

`calicoctl node --libnetwork` starts it with the name of the host, systemd without. It is a process of its own:
containers start and stop while the agent does not run.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

from calicoctl import programs, slim

slim.install()
programs.look_in_system_folders()

from calicoctl import environment, files  # noqa: E402
from calicoctl.datastore.hosts import hostname  # noqa: E402
from calicoctl.errors import CalicoError, one_line  # noqa: E402
from calicoctl.plugins import hook  # noqa: E402
from calicoctl.plugins.collection import Collection  # noqa: E402
from calicoctl.plugins.engine_events import EngineEvents  # noqa: E402
from calicoctl.plugins.ipam_driver import IpamDriver  # noqa: E402
from calicoctl.plugins.network_driver import NetworkDriver  # noqa: E402
from calicoctl.plugins.networks import Networks  # noqa: E402
from calicoctl.plugins.server import CALL, Listening, servers  # noqa: E402
from calicoctl.plugins.stores import Stores, wait_idle  # noqa: E402

log = logging.getLogger("calico.plugins")

SOCKETS = Path("/run/docker/plugins")
"""Where the engine looks for plugins: a driver's socket has its name. Source: Docker's plugin discovery."""

LOCK = "plugins.lock"
"""The name of the file that this process locks: there is one such process on a machine."""

LOCK_PATIENCE = 10.0
"""Seconds to wait for the lock, while the process of another version ends."""


class _OneLine(logging.Formatter):
    """Writes each log record, except for a traceback, as one line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record))


def main() -> None:
    """Serve until SIGTERM. Raises CalicoError if this process cannot serve."""
    variables = dict(os.environ)
    environment.complete(os.environ)
    if len(sys.argv) > 1:  # see felix/plugin_process.py
        os.environ["HOSTNAME"] = sys.argv[1].partition("=")[2]
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    _lock()
    stores = Stores(hostname(), variables)
    known = Networks(stores.host)
    events = EngineEvents(stores, known)
    driver = NetworkDriver(stores, known)
    serving = servers(
        [
            Listening(SOCKETS / "calico.sock", driver.routes()),
            Listening(SOCKETS / "calico-ipam.sock", IpamDriver(stores).routes()),
            Listening(files.RUN / stores.host / hook.SOCKET, hook.routes(stores), hook.SECONDS),
        ]
    )
    for server in serving:
        server.start()
    events.start()
    Collection(stores, known, events, driver).start()
    log.info("serving Docker networks of host %s", stores.host)
    _notify_ready()
    ended.wait()
    for server in serving:
        server.stop()
    wait_idle(CALL)
    log.info("the end")
    os._exit(0)  # threads may be waiting for the engine


def _lock() -> None:
    """Lock the file LOCK until this process ends. Raises CalicoError if another process keeps it locked."""
    give_up = time.monotonic() + LOCK_PATIENCE
    path = files.RUN / LOCK

    def refuse() -> None:
        if time.monotonic() > give_up:
            raise CalicoError(
                f"another process serves Docker networks already ({path} is locked): either 'calicoctl node "
                "--libnetwork' has started it, or systemd, as calico-docker.service"
            )

    try:
        files.RUN.mkdir(mode=0o755, parents=True, exist_ok=True)
        files.lock(path, refuse)
    except OSError as error:
        raise CalicoError(f"{path}: {error.strerror}") from None


def _notify_ready() -> None:
    """Notify systemd that this process serves. See sd_notify(3)."""
    import sdnotify

    sdnotify.SystemdNotifier().notify("READY=1")


try:
    main()
except CalicoError as error:
    print(error, file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)
