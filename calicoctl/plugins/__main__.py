"""The process that serves Docker networks: `python -m calicoctl.plugins [--plugins-of=HOST]`.

`calicoctl node --libnetwork` starts it with the name of the host, systemd without. It is a process of its own:
containers start and stop while the agent does not run.

There is one such process on a machine. If systemd starts a second one, the engine's calls reach that one and not the
first, so it answers them: it says why, and serves when the first one has ended.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from calicoctl import programs, slim

slim.install()
programs.look_in_system_folders()

from calicoctl import environment, files, logs, proc  # noqa: E402
from calicoctl.datastore.hosts import hostname  # noqa: E402
from calicoctl.errors import CalicoError  # noqa: E402
from calicoctl.plugins import hook  # noqa: E402
from calicoctl.plugins.collection import Collection  # noqa: E402
from calicoctl.plugins.engine_events import EngineEvents  # noqa: E402
from calicoctl.plugins.ipam_driver import IpamDriver  # noqa: E402
from calicoctl.plugins.network_driver import NetworkDriver  # noqa: E402
from calicoctl.plugins.networks import Networks  # noqa: E402
from calicoctl.plugins.restarting import UNAVAILABLE  # noqa: E402
from calicoctl.plugins.server import (  # noqa: E402
    CALL,
    OTHER,
    Listening,
    passed_sockets,
    servers,
    wait_answered,
)
from calicoctl.plugins.stores import Stores, wait_idle  # noqa: E402

log = logging.getLogger("calico.plugins")

SOCKETS = Path("/run/docker/plugins")
"""Where the engine looks for plugins: a driver's socket has its name. Source: Docker's plugin discovery."""

LOCK = "plugins.lock"
"""The name of the file that this process locks: there is one such process on a machine."""

LOCK_PATIENCE = 10.0
"""Seconds to wait for the lock, while the process of another version ends."""

STORE_PATIENCE = 1.6
"""Seconds to wait for etcd before the first call is answered: at boot, an etcd of this host is later than Docker."""

LOCK_POLL = 0.5
"""Seconds between two attempts to get the lock, while this process refuses all calls: see files.lock."""


def main() -> None:
    """Serve until SIGTERM. Raises CalicoError if this process cannot serve."""
    variables = dict(os.environ)
    environment.complete(os.environ)
    if len(sys.argv) > 1:  # see felix/plugin_process.py
        os.environ["HOSTNAME"] = sys.argv[1].partition("=")[2]
    handler = logs.StandardError()
    handler.setFormatter(logs.OneLine(logs.WITH_TIME))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    passed = passed_sockets()
    try:
        _lock(LOCK_PATIENCE)
    except CalicoError as error:
        if not passed:
            raise
        log.error("%s", error)
        _refuse_until_locked(passed, str(error), ended)
    stores = Stores(hostname(), variables)
    with suppress(CalicoError):  # the first call is in time, also if this has to import much
        stores.require(STORE_PATIENCE)
    known = Networks(stores.host)
    events = EngineEvents(stores, known)
    driver = NetworkDriver(stores, known)
    serving = servers(
        [
            Listening(SOCKETS / "calico.sock", driver.routes(), failed=stores.note_failure, unavailable=UNAVAILABLE),
            Listening(
                SOCKETS / "calico-ipam.sock",
                IpamDriver(stores).routes(),
                failed=stores.note_failure,
                unavailable=UNAVAILABLE,
            ),
            *hook.listening(stores),
        ],
        passed,
    )
    for server in serving:
        server.start()
    events.start()
    Collection(stores, known, events, driver).start()
    log.info("serving Docker networks of host %s", stores.host)
    proc.notify_ready()
    ended.wait()
    for server in serving:
        server.stop()
    wait_answered(CALL)
    wait_idle(CALL)
    log.info("the end")
    (files.RUN / LOCK).unlink(missing_ok=True)
    os._exit(0)  # threads may be waiting for the engine


def _lock(patience: float) -> None:
    """Lock the file LOCK until this process ends.

    Raises CalicoError if another process keeps it locked for `patience` seconds.
    """
    path = files.RUN / LOCK
    held = CalicoError(
        f"{OTHER} ({path} is locked): either 'calicoctl node --libnetwork' has started it, or systemd, as "
        "calico-docker.service. Only one of them can be used: disable calico-docker.socket, or omit --libnetwork; then "
        "run 'calicoctl node stop --force' and 'calicoctl node' again"
    )
    try:
        files.RUN.mkdir(mode=0o755, parents=True, exist_ok=True)
        files.lock_within(path, patience, held)
    except OSError as error:
        raise CalicoError(f"{path}: {error.strerror}") from None


def _refuse_until_locked(passed: Mapping[str, socket.socket], why: str, ended: threading.Event) -> None:
    """Answer each call at the sockets `passed` with the error `why`, until this process has locked the file LOCK.

    Ends this process when `ended` is set.
    """
    serving = servers([Listening(Path(path), {}, refusal=why) for path in passed], passed)
    for server in serving:
        server.start()
    proc.notify_ready()
    while not ended.wait(LOCK_POLL):
        with suppress(CalicoError):
            _lock(0)
            break
    for server in serving:
        server.stop()
    wait_answered(CALL)
    if ended.is_set():
        os._exit(0)


try:
    main()
except CalicoError as error:
    print(error, file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)
