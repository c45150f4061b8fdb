"""The local etcd: an etcd for a single host, on loopback, started by `calicoctl node --local-etcd`.

This module chooses the port and the command line; daemon.py starts and supervises the process. Commands find the
address of the local etcd in the lines that calicoctl wrote into the settings file (environment.py).

A new local etcd serves only etcd's v3 API, unless the settings ask for v2. A local etcd with data of an older version
of this program also serves the v2 API, until the data has been migrated.
"""

from __future__ import annotations

import fcntl
import http.client
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

from calicoctl import answers, proc, state
from calicoctl.datastore.settings import V2, EtcdSettings
from calicoctl.environment import STORE, EnvironmentFile
from calicoctl.errors import CalicoError
from calicoctl.felix.daemon import Daemon, Process
from calicoctl.workloads.locks import DIRECTORY

DATA = state.DIRECTORY / "etcd"

V3_ALONE = "v3"
"""The name of a file in DATA which says that there is no data of the v2 API. etcd does not change the file."""

FIRST_WITHOUT_V2 = (3, 6)
"""The first version of etcd without a v2 API."""

START_PATIENCE = 60.0
"""Seconds to wait for etcd to serve."""

_PORTS = range(2379, 32768, 10)
"""Ports to try: etcd's default first, then others below the range that the kernel assigns to connections."""

_CLIENT_URL = "--listen-client-urls=http://127.0.0.1:"
_ENABLE_V2 = "--enable-v2"


def running(host: str) -> int | None:
    """Return the process id of a host's local etcd, or None if it does not run."""
    return _process(host).pid()


def serves_v2(host: str) -> bool:
    """Return whether a host's local etcd runs, and serves the v2 API."""
    pid = running(host)
    return pid is not None and _ENABLE_V2 in proc.arguments(pid)


def is_named(host: str, settings: EtcdSettings) -> bool:
    """Return whether a host's local etcd runs, and `settings` name it as the store."""
    pid = running(host)
    return pid is not None and _is_local(settings) and settings.members[0][1] in _ports(pid)


def serve_v3_alone() -> None:
    """Have the local etcd serve only the v3 API from its next start on. Raises CalicoError."""
    try:
        (DATA / V3_ALONE).touch(mode=0o600)
    except OSError as error:
        raise CalicoError(f"{error.filename}: {error.strerror}") from None


def stop(host: str) -> bool:
    """End a host's local etcd, whatever store the settings name. Return whether it was running.

    Raises CalicoError if it does not end.
    """
    return _process(host).stop()


def _ports(pid: int) -> list[int]:
    """Return the ports at which a local etcd serves clients, from its command line."""
    return [int(word[len(_CLIENT_URL) :]) for word in proc.arguments(pid) if word.startswith(_CLIENT_URL)]


def _process(host: str) -> Process:
    return Process("the local etcd", DIRECTORY / host / "etcd.pid", f"--data-dir={DATA}")


def unannounce(was_ours: bool) -> None:
    """Remove the lines that calicoctl has written into the settings file, to name the local etcd as the store.

    `was_ours` says whether this host had a local etcd. If it is False, the lines are removed only if the environment
    names the same store as the settings file. Raises CalicoError.
    """
    file = EnvironmentFile()
    if was_ours or _environment_matches(file):
        file.remove_own()


def _environment_matches(file: EnvironmentFile) -> bool:
    """Return whether the environment names the same store as the settings file. Raises CalicoError."""
    # systemd reads the file, too: its variables may be in the environment
    written = file.variables()
    return all(os.environ.get(name, "") == written.get(name, "") for name in STORE)


class LocalEtcd:
    """The local etcd of a host. Its port of 127.0.0.1 is the one that the settings name, 2379 if they name none.

    The port is fixed if the environment names it, or a line of the settings file that calicoctl did not write. A port
    that is not fixed is replaced by a free port if it is in use when etcd is started.
    """

    def __init__(self, host: str, log_dir: str) -> None:
        """`log_dir` is the folder of etcd's log.

        Raises CalicoError if the settings name a store that cannot be the local etcd: see `_is_local`.
        """
        settings = EtcdSettings.from_environment()
        name, self._port = settings.members[0]
        if not _is_local(settings):
            raise CalicoError(
                f"--local-etcd would run etcd at http://127.0.0.1, but the settings point to "
                f"{settings.url((name, self._port))}: remove ETCD_ENDPOINTS, ETCD_AUTHORITY and ETCD_SCHEME from the "
                f"environment and from {EnvironmentFile().path}, or omit --local-etcd"
            )
        self._file = EnvironmentFile()
        self._asked_for_v2 = settings.api == V2
        self._may_move = settings.is_default or self._named_by_own_lines()
        self._daemon = Daemon(
            _process(host),
            Path(log_dir) / "etcd.log",
            lock=DATA.with_name("etcd.lock"),
            is_ready=self._healthy,
            start_patience=START_PATIENCE,
            # etcd reads settings from its environment that would clash with its options
            environment={name: value for name, value in os.environ.items() if not name.startswith("ETCD_")},
        )

    def _named_by_own_lines(self) -> bool:
        """Return whether the local etcd is named only by the lines that calicoctl wrote into the settings file."""
        own = self._file.own()
        its_lines_alone = bool(own) and EtcdSettings.from_environment(self._file.others()).is_default
        return its_lines_alone and _environment_matches(self._file)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def _variables(self) -> dict[str, str]:
        return {"ETCD_AUTHORITY": f"127.0.0.1:{self._port}"}

    def running(self) -> int | None:
        """Return the process id of this etcd, or None if it does not run."""
        return self._daemon.process.pid()

    def refuse_other_settings(self) -> None:
        """Raise CalicoError if the user's lines in the settings file name another store than this etcd."""
        others = EtcdSettings.from_environment(self._file.others())
        if not others.is_default and not (_is_local(others) and others.members[0][1] == self._port):
            raise CalicoError(
                f"--local-etcd would run etcd at {self.url}, but {self._file.path} points to "
                f"{others.url(others.members[0])}: remove that line, or omit --local-etcd"
            )

    def resolve_port(self, stay: bool = False) -> None:
        """Determine the port, and so `url`.

        If etcd runs, the port is the one that it uses. If etcd does not run, the port is the one that the settings name
        (2379 if they name none) or, if another program uses that one, a free port.

        Raises CalicoError if this would change a port that is fixed: the environment names it, or a line of the
        settings file that calicoctl did not write. While etcd does not run, also raises CalicoError if no port is free,
        or if the port would change although `stay` is True: a running agent would not find etcd at another port.
        """
        pid = self.running()
        if pid is not None:
            self._adopt(pid)
        else:
            self._choose_port(stay)

    def _choose_port(self, stay: bool) -> None:
        if not _is_free(self._port):
            if stay or not self._may_move:
                raise self._taken()
            self._port = _free_port(_PORTS)

    def _adopt(self, pid: int) -> None:
        """Set the port to that of the running etcd `pid`.

        Raise CalicoError if the port would change, but is fixed (see `resolve_port`).
        """
        ports = _ports(pid)
        if ports and ports[0] != self._port:
            if not self._may_move:
                raise CalicoError(
                    f"The local etcd (process {pid}) is running at http://127.0.0.1:{ports[0]}, and ETCD_AUTHORITY, or "
                    f"ETCD_ENDPOINTS, says {self.url}: use one, or end it first with 'calicoctl node stop --force'"
                )
            self._port = ports[0]

    def _taken(self) -> CalicoError:
        way = f"name no store, in the environment and {self._file.path}, to have it at a free port"
        if self._may_move:
            way = "end the host agent with 'calicoctl node stop --force' and repeat this, to have it at another port"
        if not self._healthy():
            return CalicoError(f"port {self._port} of 127.0.0.1 is in use by another program: end that one, or {way}")
        return CalicoError(f"an etcd answers at {self.url} already: omit --local-etcd to use that one, or {way}")

    def start(self, stay: bool = False) -> bool:
        """Start etcd if it does not run, and wait until it serves. Return whether it was started. Raises CalicoError.

        If the port is not fixed, the environment variables of this process are set to name this etcd. For `stay`, and
        which port is fixed, see `resolve_port`.
        """
        self._make_data_folder()
        started = self._daemon.start(partial(self._command, stay), self._adopt)
        if self._may_move:
            os.environ.update(self._variables)
        return started

    def supervise(self) -> None:
        """Have a thread start etcd if it does not run, and again whenever it ends. Returns at once.

        The thread ends with this process; etcd does not.
        """
        self._daemon.supervise(self._launch)

    def _launch(self) -> None:
        self._make_data_folder()
        self._daemon.launch(partial(self._command, True), self._adopt)

    @contextmanager
    def announced(self) -> Iterator[bool]:
        """Write lines that name this etcd into the settings file. Yield whether the file was changed.

        The file is not changed if it already contains these lines, or if the user's lines name a store. If the body of
        `with` raises, the lines that calicoctl had written before are restored. Raises CalicoError.
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

    def _make_data_folder(self) -> None:
        try:
            DATA.mkdir(mode=0o700, parents=True, exist_ok=True)
            DATA.chmod(0o700)
            if not self._asked_for_v2 and not (DATA / "member").exists():
                (DATA / V3_ALONE).touch(mode=0o600)
        except OSError as error:
            raise CalicoError(f"--local-etcd: {error.filename}: {error.strerror}") from None

    def _command(self, stay: bool) -> list[str]:
        """Choose the port, and return etcd's command line. Raises CalicoError. For `stay`, see `resolve_port`."""
        from shutil import which

        self._choose_port(stay)
        if which("etcd") is None:
            raise CalicoError("--local-etcd: there is no etcd here: install the package etcd-server")
        v2 = self._asked_for_v2 or not (DATA / V3_ALONE).exists()
        if v2:
            _refuse_etcd_without_v2()
        # there are no other members, but it must listen for them
        peer_url = f"http://127.0.0.1:{_free_port(range(self._port + 1, 65536))}"
        self._refuse_shared_data()
        return [
            "etcd",
            "--name=local",
            self._daemon.process.marker,
            *((_ENABLE_V2,) if v2 else ()),
            # the agents' statuses alone would fill the store with their history
            "--auto-compaction-mode=periodic",
            "--auto-compaction-retention=1h",
            f"{_CLIENT_URL}{self._port}",
            f"--advertise-client-urls={self.url}",
            f"--listen-peer-urls={peer_url}",
            f"--initial-advertise-peer-urls={peer_url}",
            f"--initial-cluster=local={peer_url}",
            "--log-outputs=stderr",
        ]

    @staticmethod
    def _refuse_shared_data() -> None:
        """Raise CalicoError if another etcd uses the data: etcd holds an exclusive flock(2) on its database."""
        with suppress(FileNotFoundError), (DATA / "member/snap/db").open("rb") as database:
            try:
                fcntl.flock(database, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CalicoError(
                    f"--local-etcd: another etcd uses {DATA}; end that one, or omit --local-etcd and say with "
                    "ETCD_AUTHORITY where it is"
                ) from None

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """If the local etcd is this host's store but does not run, run it inside `with`. Raises CalicoError.

        The local etcd counts as the host's store if its data exists, and one of two conditions holds: lines that
        calicoctl wrote name it, or no etcd serves at its port.
        """
        is_named = self._may_move and bool(self._file.own())
        needed = (DATA / "member").exists() and self.running() is None and (is_named or not self._healthy())
        started = needed and self.start()
        try:
            yield
        finally:
            if started:
                self._daemon.process.stop()

    def _healthy(self) -> bool:
        return b'"health":"true"' in (self._answers("/health") or b"").replace(b" ", b"")

    def _answers(self, path: str) -> bytes | None:
        """Return the body of the response to a GET request for `path`.

        Return None if the request fails, or if the status of the response is not 200.
        """
        import urllib3
        import urllib3.exceptions

        try:
            with answers.bounded(answers.MiB), urllib3.PoolManager(retries=False) as pool:
                answer = pool.request("GET", f"{self.url}{path}", timeout=2, redirect=False)
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError):
            return None
        return answer.data if answer.status == 200 else None


def _refuse_etcd_without_v2() -> None:
    with suppress(OSError, subprocess.SubprocessError):  # then it says itself what is wrong
        said = subprocess.run(["etcd", "--version"], stdout=subprocess.PIPE, timeout=10).stdout
        found = re.search(r"etcd Version: (\d+)\.(\d+)", said.decode(errors="replace"))
        if found is not None and (int(found[1]), int(found[2])) >= FIRST_WITHOUT_V2:
            raise CalicoError(
                f"--local-etcd: what is in {DATA} is of etcd's v2 API, which etcd {found[1]}.{found[2]} does not have: "
                "install etcd 3.4 or 3.5; before an upgrade of etcd, 'calicoctl datastore migrate' moves the data"
            )


def _is_local(settings: EtcdSettings) -> bool:
    """Return whether the settings name a single member of etcd, on loopback and without TLS, as the local etcd is."""
    (name, _), *others = settings.members
    return not others and settings.scheme == "http" and name in ("127.0.0.1", "localhost")


def _is_free(port: int) -> bool:
    with closing(socket.socket()) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as etcd does
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _free_port(ports: range) -> int:
    """Return the first of `ports` that is free on 127.0.0.1. Raise CalicoError if none is free."""
    for port in ports:
        if _is_free(port):
            return port
    raise CalicoError(f"--local-etcd: no port of 127.0.0.1 from {ports[0]} to {ports[-1]} is free")
