"""An etcd for a host that is alone: the distribution's, on loopback, started by `calicoctl node --local-etcd`.

It is a process of its own, so that it goes on when the agent is killed; the agent starts it again when it ends. Which
process it is, a pid file tells, and the data folder among that process's arguments confirms it. Where it is, lines of
its own in the file of settings tell every command (../environment.py), also the one that starts it after a reboot.
"""

from __future__ import annotations

import fcntl
import http.client
import os
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

from calicoctl import proc
from calicoctl.datastore.settings import EtcdSettings
from calicoctl.environment import STORE, EnvironmentFile
from calicoctl.errors import CalicoError
from calicoctl.felix.daemon import Daemon, Process
from calicoctl.workloads.locks import DIRECTORY

DATA = Path("/var/lib/calico/etcd")

START_PATIENCE = 60.0
"""Seconds to wait for etcd to serve."""

_PORTS = range(2379, 32768, 10)
"""Ports to try: etcd's own first, then others below those that the kernel gives to connections."""

_CLIENT_URL = "--listen-client-urls=http://127.0.0.1:"


def running(host: str) -> int | None:
    """Return the process id of a host's own etcd, None while it does not run."""
    return _process(host).pid()


def stop(host: str) -> bool:
    """End a host's own etcd, whatever store is named meanwhile, wait until it has ended, and return whether it ran.

    Raises CalicoError.
    """
    return _process(host).stop()


def _process(host: str) -> Process:
    return Process("the local etcd", DIRECTORY / host / "etcd.pid", f"--data-dir={DATA}")


def unannounce(was_ours: bool) -> None:
    """Take the lines of a local etcd out of the file of settings. Raises CalicoError.

    Where the environment names another store than the file, they stay, unless they were this host's (`was_ours`).
    """
    file = EnvironmentFile()
    if was_ours or _is_as_written(file):
        file.remove_own()


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
        self._file = EnvironmentFile()
        self._may_move = settings.is_default or self._named_by_own_lines()
        self._daemon = Daemon(
            _process(host),
            Path(log_dir) / "etcd.log",
            lock=DATA,
            is_ready=self._healthy,
            start_patience=START_PATIENCE,
            # etcd reads settings from its environment that would clash with its options
            environment={name: value for name, value in os.environ.items() if not name.startswith("ETCD_")},
        )

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
        return self._daemon.process.pid()

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
        else:
            self._choose_port(stay)

    def _choose_port(self, stay: bool) -> None:
        if not _is_free(self._port):
            if stay or not self._may_move:
                raise self._taken()
            self._port = _free_port(_PORTS)

    def _adopt(self, pid: int) -> None:
        """Take the port of the process that runs for its port; raise CalicoError when another is named."""
        ports = [int(word[len(_CLIENT_URL) :]) for word in proc.arguments(pid) if word.startswith(_CLIENT_URL)]
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
        """Start it unless it runs, and wait until it serves; return whether it was started. Raises CalicoError.

        From then on, this process's environment names it. For `stay`, see `find_place`.
        """
        self._make_data_folder()
        started = self._daemon.start(partial(self._command, stay), self._adopt)
        if self._may_move:
            os.environ.update(self._variables)
        return started

    def supervise(self) -> None:
        """Start it again whenever it ends, as long as this process lives."""
        self._daemon.supervise(self._launch)

    def _launch(self) -> None:
        self._make_data_folder()
        self._daemon.launch(partial(self._command, True), self._adopt)

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

    @staticmethod
    def _make_data_folder() -> None:
        try:
            DATA.mkdir(mode=0o700, parents=True, exist_ok=True)
            DATA.chmod(0o700)
        except OSError as error:
            raise CalicoError(f"--local-etcd: {error.filename}: {error.strerror}") from None

    def _command(self, stay: bool) -> list[str]:
        """Choose its port, and return its command line. Raises CalicoError; for `stay`, see `find_place`."""
        from shutil import which

        self._choose_port(stay)
        if which("etcd") is None:
            raise CalicoError("--local-etcd: there is no etcd here: install the package etcd-server")
        # there is no other member, but it must listen for some
        peer_url = f"http://127.0.0.1:{_free_port(range(self._port + 1, 65536))}"
        self._refuse_shared_data()
        return [
            "etcd",
            "--name=local",
            self._daemon.process.marker,
            "--enable-v2",
            f"{_CLIENT_URL}{self._port}",
            f"--advertise-client-urls={self.url}",
            f"--listen-peer-urls={peer_url}",
            f"--initial-advertise-peer-urls={peer_url}",
            f"--initial-cluster=local={peer_url}",
            "--log-outputs=stderr",
        ]

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
                self._daemon.process.stop()

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
