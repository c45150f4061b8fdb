"""BGP: runs BIRD, which announces this host's routes to other hosts, and learns their routes.

The manager derives BIRD's configuration from the snapshot, and passes it to a thread. The thread starts, supervises and
configures BIRD, polls its sessions, and reports to the manager by events, so the agent's loop never waits for BIRD. If
BIRD already runs, the thread adopts it. If BIRD crashes while the store cannot be read, the thread restarts it with its
last configuration.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from calicoctl import proc
from calicoctl.desired.snapshot import Dirty
from calicoctl.errors import CalicoError
from calicoctl.felix.bgp import bird, config, passwords
from calicoctl.felix.bgp.instance import Instance, NotReady
from calicoctl.felix.bgp.rescans import Rescans
from calicoctl.felix.bgp.signatures import Signatures
from calicoctl.felix.bgp.wakeups import Wakeups
from calicoctl.felix.daemon import NotServing
from calicoctl.felix.dataplane.manager import Context, Manager
from calicoctl.felix.events import (
    BGP,
    BGP_CONFIGURATION,
    BGP_PASSWORDS,
    AddressesChanged,
    BgpChanged,
    BirdRouteLost,
    Failure,
    KernelEventsLost,
)

if TYPE_CHECKING:
    from calicoctl.felix.bgp.config import Config

log = logging.getLogger("calico.felix")

SHORT_POLL, LONG_POLL = 1.0, 10.0
"""The minimum number of seconds between two polls of the sessions: while any is down, and while all are up."""

LOG_PAUSE, LOG_POLL = 0.01, 0.2
"""Seconds from a change of BIRD's log until BIRD is woken, and from then until its sessions are polled."""

PORT_POLL = 0.1
"""Seconds between two polls soon after BIRD's start, while it does not listen on the port of BGP yet."""

PASSWORDS_POLL = 2.0
"""Seconds between two checks whether the file with the passwords has changed, and whether BIRD is suspended, which no
event says.
"""

BESIDE_POLL = 10.0
"""The minimum number of seconds between two searches for a foreign BIRD beside ours."""

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0
"""The first and the maximum pause in seconds until BIRD is restarted after it has ended within SHORT_LIFE, or has not
become ready. The pause is doubled each time. After other failures, it is the maximum.
"""

SHORT_LIFE = 10.0
"""If BIRD has run for more than this many seconds when it ends, it is restarted at once."""

SETTLING = 10.0
"""The maximum number of seconds for which the agent's start waits for BIRD."""

_ENDED = "BIRD has ended, and is started again in a moment"


class BgpManager(Manager):
    """Derives BIRD's configuration from the snapshot, and passes it to the BgpThread."""

    def __init__(self, context: Context, thread: BgpThread) -> None:
        self._context = context
        self._snapshot = context.snapshot
        self._thread = thread
        self._dirty = True
        self._config: Config | None = None
        self._split: dict[str, str] = {}
        """CIDR of a block that is not announced as a whole -> a description of what the block overlaps."""
        self._settled_by: float | None = None
        """Until when the agent's start waits for BIRD (monotonic); None before the first `apply`."""
        self._settled = False
        self._here: set[str] = set()
        """This host's registered addresses that its interfaces have, or had since the agent's start: if an address is
        absent for a short time, its sessions must not be reset.
        """

    def on_event(self, event: Any) -> None:
        if isinstance(event, Dirty):
            local = any(id.host == self._snapshot.host for id in event.endpoints)
            self._dirty = self._dirty or event.topology or event.pools or local
        elif isinstance(event, BgpChanged):
            self._context.health.bgp = event
            self._settled = self._settled or event.settled
        elif isinstance(event, (BirdRouteLost, AddressesChanged, KernelEventsLost)):
            self._thread.rescan()

    def resync(self) -> None:
        """Start the thread if it does not run yet."""
        self._thread.start_once()

    @property
    def needs_apply(self) -> bool:
        return self._dirty

    @property
    def is_settled(self) -> bool:
        """Whether the agent's start no longer waits for BIRD.

        That is so if BIRD is settled (see BgpChanged), or if SETTLING has passed since the first `apply`.
        """
        late = self._settled_by is not None and time.monotonic() > self._settled_by
        return self._settled or late

    @property
    def due_at(self) -> float | None:
        return None if self.is_settled else self._settled_by

    def apply(self) -> None:
        if not self._dirty:
            return
        self._dirty = False
        if self._settled_by is None:
            self._settled_by = time.monotonic() + SETTLING
        if not self._thread.enabled:
            return
        own = filter(None, map(self._snapshot.topology.own, (4, 6)))
        self._here |= {address for address in own if self._snapshot.network.has(address) is not None}
        derived = config.derive(self._snapshot, self._here)
        if derived != self._config:
            self._config = derived
            self._log_split(derived)
            self._thread.want(derived)

    def _log_split(self, derived: Config) -> None:
        split = dict(one for family in derived.families for one in family.split)
        for block, overlapped in split.items():
            if self._split.get(block) != overlapped:
                log.warning(
                    "block %s overlaps %s: its used addresses are announced one by one, and not the block",
                    block,
                    overlapped,
                )
        self._split = split


@dataclass
class _Beside:
    """The search for a foreign BIRD (see instance.py) that runs beside ours.

    `error` is a sentence about the foreign BIRD that the last search found; None if it found none.
    """

    error: str | None = None
    look_at: float = 0.0
    """When to search next (monotonic)."""

    def look(self, instance: Instance) -> None:
        """Search for a foreign BIRD, if that is due, and update `error`."""
        began = time.monotonic()
        if began >= self.look_at:
            try:
                instance.refuse_other_bird()
                self.error = None
            except CalicoError as error:
                self.error = str(error)
            self.look_at = began + max(BESIDE_POLL, 200 * (time.monotonic() - began))


class BgpThread(threading.Thread):
    """Runs BIRD with the latest configuration passed to `want`. Emits BgpChanged and Failure."""

    def __init__(self, instance: Instance, enabled: bool, put: Callable[[Any], None]) -> None:
        """`put` is called with each event that the thread emits.

        If `enabled` is False, the thread only ends BIRD, and removes BIRD's routes and files.
        """
        super().__init__(name="running BIRD", daemon=True)
        self.enabled = enabled
        self._instance = instance
        self._put = put
        self._wanted: Config | None = None
        self._passwords: passwords.Passwords | None = None
        self._turns = True
        """Whether to render the configuration with turns. False while BIRD uses one without: see config.has_turns."""
        self._rendered: tuple[Config | None, passwords.Passwords | None, bool, str | None] = (None, None, True, None)
        """The arguments with which a configuration was last rendered, and the resulting text."""
        self._beside = _Beside()
        self._failures: dict[str, str | None] = {}
        """Subject -> the reason of the last Failure that was emitted; None if the failure has ended."""
        self._wakeups = Wakeups()
        self._rescans = Rescans()
        self._signatures = Signatures()
        self._state = self._reported = BgpChanged()
        self._in_use: str | None = None
        """The text of the configuration that BIRD uses; None while it is unknown."""
        self._refused: str | None = None
        """The text of the configuration that BIRD has refused; None if BIRD has accepted the last one."""
        self._began: float | None = None
        """When BIRD was started (monotonic) or, if BIRD was adopted, SHORT_LIFE before that. None before either."""
        self._start_at = self._poll_at = 0.0
        """When to start BIRD next, and when to poll its sessions next (monotonic)."""
        self._not_running: str | None = None
        """Why BIRD is not started before `_start_at`. None if the only reason is that its configuration is unknown. Not
        updated while BIRD runs.
        """
        self._tried: str | None = None
        """The text of the configuration with which the last start of BIRD was attempted, None if it was unknown. With
        another text, the next attempt is made at once.
        """
        self._pause = FIRST_PAUSE

    def start_once(self) -> None:
        if self.ident is None:
            self.start()

    def want(self, config: Config) -> None:
        """Set the configuration that BIRD should use. Does not wait for the thread."""
        self._wanted = config
        self._wakeups.request()

    def rescan(self) -> None:
        """Request that BIRD compare the kernel's routes with its own (rescans.py). Does not wait for the thread."""
        if self._rescans.request():
            self._wakeups.request()

    def run(self) -> None:
        if not self.enabled:
            self._end()
            return
        while True:
            wanted, failed = self._wanted, False
            try:
                self.round(wanted)
                self._fail(BGP, None)
            except Exception as error:  # of any kind: the thread must go on, since nothing else runs BIRD
                failed = True
                log.debug("traceback:", exc_info=True)
                self._fail(BGP, f"BGP: {_words(error)}")
            self._state = replace(self._state, settled=wanted is not None)
            if self._state != self._reported:
                self._reported = self._state
                self._put(self._state)
            self._wait(failed)

    def _end(self) -> None:
        try:
            if self._instance.remove(log.warning):
                log.info("BGP is off: BIRD has ended")
        except Exception as error:  # of any kind: an exception in a thread would be lost
            self._fail(BGP, f"BGP is off, but BIRD cannot be ended: {_words(error)}")
        self._put(BgpChanged(settled=True))

    def _fail(self, subject: str, why: str | None) -> None:
        """Emit a Failure about `subject`, unless the last Failure about `subject` had the same reason.

        `why` is the reason, None if the failure has ended.
        """
        if self._failures.get(subject) != why:
            self._failures[subject] = why
            self._put(Failure(why, subject))

    def _wait(self, failed: bool) -> None:
        """Wait until BIRD ends, its log changes, `want` or `rescan` is called, or the next action is due.

        `failed` says whether the last round has failed. If it has, and BIRD runs, the next action is due after
        SHORT_POLL at the earliest. If the log has changed, wake BIRD, and schedule a poll of its sessions.
        """
        now, pid = time.monotonic(), self._state.pid
        due = now + PASSWORDS_POLL
        if pid is not None:
            rescan_at = self._rescans.due_at
            due = min(due, self._poll_at, due if rescan_at is None else rescan_at)
            due = max(due, now + SHORT_POLL) if failed else due
        elif self._instance.pid() is not None:
            return  # it has just been recognised: the next round adopts it
        elif self._start_at > now:
            due = min(due, self._start_at)
        if self._wakeups.wait(pid, due - now):
            time.sleep(LOG_PAUSE)  # BIRD usually writes several lines
            with suppress(CalicoError):  # the next poll reports the error
                self._instance.wake()
            self._poll_at = min(self._poll_at, time.monotonic() + LOG_POLL)

    def round(self, wanted: Config | None) -> None:
        """Start, configure and poll BIRD, and have it rescan: each of these only if it is due.

        May raise any exception, for example if BIRD is suspended or a foreign BIRD runs. The next call tries again.
        """
        self._follow_process(self._instance.pid())
        text = self._text(wanted)
        if self._state.pid is not None and text is not None and not self._instance.control().exists():
            log.warning("the folder of BIRD is gone, so it can be told nothing: it is ended, and started again")
            self._instance.stop()
            self._follow_process(None)
        if self._state.pid is not None and proc.is_suspended(self._state.pid):
            self._poll_at = time.monotonic()  # its sessions may have ended meanwhile
            raise CalicoError(
                f"BIRD (process {self._state.pid}) is suspended: its peers delete this host's routes after the hold "
                f"time. Continue it with 'kill -CONT {self._state.pid}'"
            )
        if self._state.pid is None:
            if time.monotonic() >= self._start_at or text not in (None, self._tried):
                self._start(text)
            elif self._not_running is not None:
                raise CalicoError(self._not_running)
        elif text is not None and text == self._in_use:
            self._accepted()
        elif text is not None and text != self._refused:
            self._configure(text)
        if self._state.pid is not None and time.monotonic() >= self._poll_at:
            self._poll()
        if self._state.pid is not None:
            if self._rescans.take():
                self._instance.rescan()
            self._beside.look(self._instance)
            if self._beside.error is not None:
                raise CalicoError(self._beside.error)

    def _text(self, wanted: Config | None) -> str | None:
        """Return the text of the configuration for `wanted`; None while the configuration or the passwords are unknown.

        Before that, read the file with the passwords if it has changed, and report a failure while the file is refused.
        """
        self._passwords = passwords.read(before=self._passwords)
        self._fail(BGP_PASSWORDS, self._passwords.problem)
        if wanted is None or not self._passwords.known:
            return None
        if self._rendered[0] is not wanted or self._rendered[1:3] != (self._passwords, self._turns):
            text = config.text(wanted, self._passwords, self._instance.directory, self._turns)
            self._rendered = wanted, self._passwords, self._turns, text
        return self._rendered[3]

    def _follow_process(self, pid: int | None) -> None:
        """Update the state if BIRD has ended, or if a new BIRD process runs.

        `pid` is BIRD's current process ID, None if BIRD does not run.
        """
        before, now = self._state.pid, time.monotonic()
        if pid == before:
            return
        self._in_use, self._beside, self._poll_at = None, _Beside(), now
        self._turns = pid is None or self._instance.has_turns()
        self._state = replace(self._state, pid=pid, running=False, sessions=())
        if pid is not None:
            self._wakeups.follow(self._instance.directory)
            self._began = now - SHORT_LIFE
            log.info("BIRD runs (process %d)", pid)
            return
        log.warning("BIRD (process %s) has ended", before)
        if self._began is not None and now - self._began < SHORT_LIFE:
            self._start_at, self._not_running = self._after_pause(), _ENDED
        else:
            self._start_at, self._pause = now, FIRST_PAUSE

    def _after_pause(self) -> float:
        """Return the time (monotonic) at which a pause that begins now ends, and double the next pause."""
        pause, self._pause = self._pause, min(LONGEST_PAUSE, self._pause * 2)
        return time.monotonic() + pause

    def _start(self, text: str | None) -> None:
        again, self._tried = self._began is not None, text
        if self._instance.recognise():
            return  # the next round adopts it
        served = False
        try:
            recovered = self._instance.start(None if text == self._refused else text)
        except NotReady:
            # the store has not been read yet, or the passwords are unknown: when both are known, it is tried at once
            self._start_at, self._not_running = time.monotonic() + LONGEST_PAUSE, None
            return
        except bird.Refused as error:
            self._was_refused(text, error)
        except NotServing as error:
            self._start_at, self._not_running = self._after_pause(), str(error)
            raise
        except Exception as error:
            self._start_at, self._not_running = time.monotonic() + LONGEST_PAUSE, _words(error)
            raise
        else:
            again, served = again or recovered, True
            if text is not None and text != self._refused:
                self._accepted()
        self._follow_process(self._instance.pid())
        if self._state.pid is None:
            if served:  # it was killed just after that
                self._start_at, self._not_running = self._after_pause(), _ENDED
            else:
                self._start_at, self._not_running = time.monotonic() + LONGEST_PAUSE, "BIRD does not run"
            raise CalicoError(self._not_running)
        self._began = time.monotonic()
        self._state = replace(self._state, restarts=self._state.restarts + again)
        if self._refused is None:
            self._in_use = text

    def _configure(self, text: str) -> None:
        try:
            self._instance.configure(text)
        except bird.Refused as error:
            self._was_refused(text, error)
            return
        log.info("BIRD has a new configuration")
        self._in_use, self._poll_at = text, time.monotonic()
        self._accepted()

    def _was_refused(self, text: str | None, error: bird.Refused) -> None:
        self._refused = text
        self._state = replace(self._state, refusals=self._state.refusals + 1)
        lines = (text or "").splitlines()
        line = "" if error.line is None or error.line > len(lines) else lines[error.line - 1].strip()
        shown = re.sub('password ".*?"', 'password "…"', line)
        what = f"BIRD refuses a new configuration, and keeps the one before: {error}"
        self._fail(BGP_CONFIGURATION, f"{what}: {shown}" if shown else what)

    def _accepted(self) -> None:
        self._refused = None
        self._fail(BGP_CONFIGURATION, None)

    def _poll(self) -> None:
        began = time.monotonic()
        self._poll_at = began + SHORT_POLL
        self._signatures.update()
        sessions = tuple(map(self._with_suspicion, self._instance.sessions()))
        running = self._instance.holds_port()
        self._state = replace(self._state, sessions=sessions, running=running)
        now = time.monotonic()
        if sessions and not running and now - (self._began or now) < SHORT_LIFE:
            self._poll_at = now + PORT_POLL
        elif all(session.is_up for session in sessions):
            self._poll_at = now + max(LONG_POLL, 200 * (now - began))
        else:
            self._poll_at = now + max(SHORT_POLL, 50 * (now - began))  # polls take at most 2 % of the time

    def _with_suspicion(self, session: bird.Session) -> bird.Session:
        if session.is_up or self._passwords is None or not self._passwords.known:
            return session
        password = self._passwords.of(session.peer, session.kind == config.MESH)
        return replace(session, suspicion=self._signatures.suspicion(password is not None))


def _words(error: Exception) -> str:
    if isinstance(error, CalicoError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {error}"
