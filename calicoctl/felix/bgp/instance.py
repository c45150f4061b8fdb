"""The BIRD process of this host: checks whether BIRD may run here, starts, configures and ends it, and cleans up.

The folder /run/calico/HOST/bird contains BIRD's configuration, control socket and log. It belongs to root and is
sticky, so BIRD, which runs as the user `bird`, can replace only its own files. A file beside the folder identifies the
boot and the network namespace in which BIRD last ran.

A BIRD that an agent has started is ours (see processes.py), even if its folder is that of another host name: only one
agent runs in a network namespace, so this host had that name before. Any other BIRD is foreign.

BIRD deletes routes with its protocol number that it does not know. So the agent does not start BIRD while a foreign
BIRD runs, or while routes of a foreign BIRD exist.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Callable

from calicoctl import files, netlink, proc
from calicoctl.addresses import FAMILIES
from calicoctl.errors import CalicoError, one_line
from calicoctl.felix.bgp import bird, config
from calicoctl.felix.bgp.processes import USER, birds
from calicoctl.felix.daemon import Daemon, Process
from calicoctl.workloads.locks import DIRECTORY

PORT = 179

START_PATIENCE = 10.0
"""Seconds to wait, after BIRD's start, until it answers on its control socket; also the limit for the check of its
configuration before the start.
"""

END_PATIENCE = 5.0
"""Seconds to wait for BIRD's end after SIGTERM. Then SIGKILL is sent."""

_RAN = "bird.boot"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_LISTENING = "0A"
"""The state of a listening socket in /proc/net/tcp. Source: TCP_LISTEN in the kernel's net/tcp_states.h."""


class Instance:
    """The BIRD of the agent of `host`. Methods may raise CalicoError or OSError."""

    def __init__(self, host: str) -> None:
        self._host = host
        self.directory = DIRECTORY / host / "bird"
        self.configuration = self.directory / "conf"
        self._control = self.directory / "ctl"
        self._ran = DIRECTORY / host / _RAN
        self.output = DIRECTORY / host / "bird.out"
        self.process = Process("BIRD", DIRECTORY / host / "bird.pid", str(self.configuration))
        self._daemon = Daemon(
            self.process,
            self.output,
            lock=DIRECTORY / host / "bird.lock",
            is_ready=self._serves,
            start_patience=START_PATIENCE,
            # BIRD prints local times, which the agent parses in its own time zone
            environment={name: os.environ[name] for name in ("PATH", "TZ") if name in os.environ},
            folder=self.directory,
        )

    def pid(self) -> int | None:
        """Return the process ID of the BIRD of `host`, or None if the pid file names no running BIRD."""
        return self.process.pid()

    def ran_here(self) -> bool:
        """Return whether the BIRD of `host` has run in this boot and in this network namespace."""
        return self._host in _hosts_that_ran()

    def is_here(self) -> bool:
        """Return whether the BIRD of `host` runs in this network namespace, or has run in it in this boot."""
        return self._host in _hosts_here()

    def control(self) -> Path:
        return self._control

    # Starting

    def start(self, text: str | None) -> bool:
        """Start BIRD with the configuration `text`. Return whether BIRD recovers from a crash (graceful restart).

        If `text` is None, or if BIRD refuses it, BIRD is started with the configuration of its last run in this boot.
        After a refusal, Refused is raised, although BIRD runs then. If there is no configuration of a last run, BIRD is
        not started, and NotReady (if `text` is None) or Refused is raised.

        Before the start, the BIRDs of this host's former names are removed. Raises CalicoError if BIRD may not run here
        (see refuse_missing and refuse_foreign), or if it does not start.
        """
        ran = self.ran_here()
        program = refuse_missing()
        self.refuse_foreign()
        for former in self._former():
            former._remove(lambda text: None)
        crashed = ran and self._control.exists()  # when BIRD ends regularly, it removes its socket
        self._make_folder()
        refused: bird.Refused | None = None
        if text is not None:
            try:
                self._check_before_start(program, text)
            except bird.Refused as error:
                refused = error
        if not (self.configuration.exists() and (ran or (text is not None and refused is None))):
            raise refused or NotReady("there is no configuration from before")
        self._note_place()
        self._daemon.start(lambda: self._command(program, recover=crashed), lambda pid: None)
        if refused is not None:
            raise refused
        return crashed

    def find(self) -> int | None:
        """Return the process ID of the BIRD of `host`, or None if it does not run.

        Unlike `pid`, this also finds a BIRD with a missing or outdated pid file.
        """
        pid = self.pid()
        return pid if pid is not None else next((pid for pid, host in birds().items() if host == self._host), None)

    def recognise(self) -> bool:
        """Return whether the BIRD of `host` runs. If it does, correct the pid file."""
        pid = self.find()
        if pid is None:
            return False
        if pid != self.pid():
            self.process.pid_file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            self.process.note(pid)
            self._note_place()
        return True

    def _note_place(self) -> None:
        if not self.ran_here():
            files.replace(self._ran, _place().encode(), 0o600).close()

    def _former(self) -> list[Instance]:
        """Return an Instance for each other host name whose BIRD runs here, or has run here in this boot."""
        return [Instance(host) for host in sorted(_hosts_here() - {self._host})]

    def _command(self, program: str, recover: bool) -> list[str]:
        # the socket's path is relative to the folder: with a long host name, an absolute one exceeds the kernel's limit
        command = [program, "-f", "-c", self.process.marker, "-s", self._control.name, "-u", USER, "-g", USER]
        return [*command, "-R"] if recover else command

    def _make_folder(self) -> None:
        group = _ids()[1]
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chown(self.directory, 0, group)
        self.directory.chmod(0o1770)

    def _write(self, text: str) -> Path:
        """Write a configuration to a file beside the one in use. Return the path."""
        path = self.directory / "conf.new"
        files.replace(path, text.encode(), 0o640, (0, _ids()[1])).close()
        return path

    def _check_before_start(self, program: str, text: str) -> None:
        # do not write the same text again: the file system may be full
        new = self.configuration if self._configured() == text else self._write(text)
        command = [program, "-p", "-c", str(new), "-u", USER, "-g", USER]  # without -u, it would create its log as root
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=START_PATIENCE)
        if done.returncode != 0:
            raise bird.refusal(done.stderr.decode(errors="replace"))
        new.rename(self.configuration)

    def _configured(self) -> str | None:
        try:
            return self.configuration.read_text()
        except OSError:
            return None

    def has_turns(self) -> bool:
        """Return whether BIRD's configuration has turns, or does not exist: see config.has_turns."""
        return config.has_turns(self._configured() or "")

    def configure(self, text: str) -> None:
        """Have the running BIRD use the configuration `text`.

        Raise Refused if BIRD refuses it. BIRD keeps the previous configuration then. Raise CalicoError if BIRD does not
        answer, and OSError if the configuration cannot be written.
        """
        new = self._write(text)
        with bird.control(self._control, may_change=True) as control:
            control.check(new)
            new.rename(self.configuration)
            control.configure()

    def sessions(self) -> list[bird.Session]:
        """Return BIRD's BGP sessions. Raise CalicoError if BIRD does not answer."""
        with bird.control(self._control) as control:
            return control.sessions()

    def wake(self) -> None:
        """Have BIRD process its pending work: see wakeups.py. Raise CalicoError if BIRD does not answer."""
        with bird.control(self._control, may_change=True):
            pass

    def rescan(self) -> None:
        """Have BIRD read the kernel's routes, and add its own routes that are missing in the kernel.

        Raise CalicoError if BIRD does not answer.
        """
        with bird.control(self._control, may_change=True) as control:
            control.rescan()

    def _serves(self) -> bool:
        try:
            with bird.control(self._control):
                return True
        except CalicoError:
            return False

    # The port of BGP, and foreign BIRDs

    def holds_port(self) -> bool:
        """Return whether BIRD listens on the port of BGP, as it does while at least one session is configured."""
        pid = self.pid()
        return pid is not None and bool(_listeners() & proc.sockets(pid))

    def refuse_foreign(self) -> None:
        """Raise CalicoError if BIRD must not be started here.

        That is so if a foreign BIRD runs here, if another process listens on the port of BGP, or if there are foreign
        routes. Routes with BIRD's protocol number are foreign if no BIRD of ours runs here or has run here in this
        boot.
        """
        self.refuse_other_bird()
        if _listeners().difference(*(proc.sockets(pid) for pid, host in birds().items() if host)):
            raise CalicoError(
                f"another process listens on port {PORT}, which BGP needs: end that one, or start the agent with "
                "--bgp=off"
            )
        if not _hosts_here() and _routes():
            raise CalicoError(
                "there are routes of another BIRD, which ours would delete (ip route show proto bird; ip -6 route show "
                "proto bird). If none is needed, delete them with 'ip route flush proto bird' and 'ip -6 route flush "
                "proto bird'; else start the agent with --bgp=off"
            )

    def refuse_other_bird(self) -> None:
        """Raise CalicoError if a foreign BIRD runs in this network namespace."""
        other = _foreign_bird()
        if other is not None:
            raise CalicoError(
                f"another BIRD (process {other}) runs here: two on one routing table delete each other's routes. End "
                "that one, or start the agent with --bgp=off"
            )

    # Ending BIRD

    def remove(self, warn: Callable[[str], None]) -> bool:
        """End BIRD, then delete its routes in the kernel, and its files. Do the same for this host's former names.

        If a foreign BIRD runs here, no routes are deleted, and `warn` is called with a sentence that says so. Returns
        whether any of these BIRDs was running, or had run here in this boot.
        """
        removed = [one._remove(warn) for one in (*self._former(), self)]
        return any(removed)

    def _remove(self, warn: Callable[[str], None]) -> bool:
        pid = self.find()
        ran = pid is not None or self.ran_here()
        if pid is not None:
            _end(pid)
        foreign = _foreign_bird() if ran else None
        if foreign is not None:
            warn(
                f"Warning: another BIRD (process {foreign}) runs here, so all routes with 'proto bird' are left to it, "
                "those of ours as well."
            )
        elif ran:
            for family, route in _routes():
                _delete(family, route)
        for path in (self._ran, self.output, self.process.pid_file):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)
        return ran

    def stop(self) -> None:
        """End BIRD, so that its peers withdraw its routes. The routes in this host's kernel stay."""
        pid = self.pid()
        if pid is not None:
            _end(pid)
            self.process.pid_file.unlink(missing_ok=True)


class NotReady(CalicoError):
    """BIRD cannot be started yet: no configuration was passed, and there is none of a last run."""


def refuse_missing() -> str:
    """Return the path of BIRD's program. Raise CalicoError if the program is missing, or not of version 2.

    Also raise CalicoError if BIRD's user or group is missing.
    """
    program = shutil.which("bird")
    if program is None:
        raise CalicoError("there is no BIRD here: install the package bird2, or start the agent with --bgp=off")
    try:
        done = subprocess.run([program, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CalicoError(f"{program} cannot be run: {error}") from None
    said = (done.stderr + done.stdout).decode(errors="replace")
    match = re.search(r"BIRD version ((\d+)\.\S*)", said, re.ASCII)
    if match is None or match[2] != "2":
        version = f"version {match[1]}" if match else one_line(said.strip())[:60] or "of no version"
        raise CalicoError(f"{program} is {version}, and version 2 is needed: install the package bird2")
    _ids()
    return program


def _ids() -> tuple[int, int]:
    """Return BIRD's user ID and group ID. Raise CalicoError if there is no such user or group."""
    import grp
    import pwd

    try:
        return pwd.getpwnam(USER).pw_uid, grp.getgrnam(USER).gr_gid
    except KeyError:
        raise CalicoError(
            f"there is no user, or no group, '{USER}', which BIRD runs as: install the package bird2"
        ) from None


def _end(pid: int) -> None:
    """End the BIRD process `pid`, by SIGKILL if it does not end within END_PATIENCE after SIGTERM."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        if not proc.await_end(pid, END_PATIENCE):
            os.kill(pid, signal.SIGKILL)
            proc.await_end(pid, END_PATIENCE)


def _foreign_bird() -> int | None:
    """Return the process ID of a foreign BIRD in this network namespace, or None if there is none."""
    return next((pid for pid, host in birds().items() if not host), None)


def _hosts_here() -> set[str]:
    """Return the hosts whose BIRD runs in this network namespace, or has run in it in this boot."""
    return ({*birds().values()} | _hosts_that_ran()) - {""}


def _hosts_that_ran() -> set[str]:
    """Return the hosts whose BIRD has run in this boot and in this network namespace."""
    found, place = set(), _place()
    for path in DIRECTORY.glob(f"*/{_RAN}"):
        with suppress(OSError):
            if path.read_text() == place:
                found.add(path.parent.name)
    return found


def _place() -> str:
    """Return a text that identifies this boot and this network namespace."""
    return f"{_BOOT_ID.read_text().strip()} {os.stat('/proc/self/ns/net').st_ino}\n"


def _listeners() -> set[str]:
    """Return the inodes of the sockets of this network namespace that listen on the port of BGP."""
    found = set()
    for name in ("tcp", "tcp6"):
        with suppress(OSError), open(f"/proc/self/net/{name}") as table:
            for line in table:
                words = line.split()
                if len(words) > 9 and words[3] == _LISTENING and words[1].endswith(f":{PORT:04X}"):
                    found.add(words[9])
    return found


def _routes() -> list[tuple[int, netlink.Route]]:
    """Return the routes of the main table that have BIRD's protocol number, each with its address family."""
    return [
        (family, route)
        for family in FAMILIES.values()
        for route in netlink.routes(family, protocol=netlink.PROTOCOL_BIRD)
    ]


def _delete(family: int, route: netlink.Route) -> None:
    """Delete a route. Do nothing if the route no longer exists."""
    import socket
    import struct

    packed = b"" if route.destination is None else socket.inet_pton(family, route.destination)
    # struct rtmsg: family, length of destination and of source, tos, table, protocol, scope (any), type, flags
    body = struct.pack("=8BI", family, route.length, 0, 0, netlink.TABLE_MAIN, netlink.PROTOCOL_BIRD, 255, 0, 0)
    body += netlink.attribute(netlink.RTA_PRIORITY, struct.pack("=I", route.metric))
    if packed:
        body += netlink.attribute(netlink.RTA_DST, packed)
    with suppress(ProcessLookupError):  # ESRCH
        netlink.do(socket.NETLINK_ROUTE, netlink.RTM_DELROUTE, 0, body)
