"""Moves the data from etcd's v2 API to its v3 API, and back.

The process may be killed at any moment: after each step, one API is in use or the data is frozen (see
`detection.decide`), and the command can be repeated.

Two keys in v3 describe the move. "The note" is the key keys.UNUSED_COPY. It says what is being done, and by which
process. "The revision" is the key keys.COPIED_REVISION. Its value is the revision at which v2 was frozen, which shows
the keys that old programs have written to v2 since then.

The steps of a move are:

| step | Ready in v2 | Ready in v3 | note | revision | API in use |
|---|---|---|---|---|---|
| nothing is changed yet | true | none | none | none | v2 |
| the note is written, and Ready in v3, in one transaction | true | false | copying | none | v2 |
| v2 is frozen, the data is copied and compared | false | false | copying | none | v2, frozen |
| v3 is taken into use, in one transaction | false | true | none | written | v3 |

The steps of the way back (`Migration.roll_back`) are:

| step | Ready in v2 | Ready in v3 | note | revision | API in use |
|---|---|---|---|---|---|
| v3 is frozen, in one transaction | false | false | rolling back | in the note | v2, frozen |
| v2 is taken into use | true | false | rolling back | in the note | v2 |

The steps of the end of v2 (`Migration.finish`) are:

| step | Ready in v2 | Ready in v3 | note | revision | API in use |
|---|---|---|---|---|---|
| the way back is closed, in one transaction | false | true | finishing | written | v3 |
| the data in v2 is deleted | none | true | finishing | written | v3 |
| the note and the revision are deleted | none | true | none | none | v3 |

While the note exists, the data in v3 is not in use, unless the note says "finishing". While the note says "copying",
each commit to v3 rewrites it. A second process takes over by writing the note. Then the next commit of the first
process fails, and the first process does not change Ready any more.

Before a process sets Ready in v2 to `true`, it reads Ready in v2; after that, it checks that the note is its own. A
second process that takes over the note writes Ready in v2 afterwards. So if the first process then still writes Ready
in v2, this write fails, since its condition (Ready is unchanged) is not met.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Callable

from calicoctl.clock import now
from calicoctl.datastore import copy_plan, keys
from calicoctl.datastore.chosen import FRESH
from calicoctl.datastore.copy_plan import copied, difference, is_copied
from calicoctl.datastore.detection import check_ready, foreign
from calicoctl.datastore.settings import TYPE, V2, V3
from calicoctl.datastore.statuses import AgentStore, parse_agent_store
from calicoctl.datastore.store import Create, Delete, Entry, Store, Update, Write, read_all
from calicoctl.errors import CalicoError, CompareFailed, KeyExists, NoSuchApi, StoreError
from calicoctl.output import first_few

SETTLE = FRESH + 1.0
"""Seconds after the freeze, until when a command that was started before the freeze may still write."""

AGENTS_PATIENCE = 45.0
"""Seconds to wait for all live agents to react. The status of an agent that has died expires earlier."""

POLL = 0.5
"""Seconds between two reads of the agents' statuses."""

MOST_PARTS = 20
"""The maximum number of directories right below keys.ROOT of which a key is tried before the freeze."""

ROUNDS = 10
"""The maximum number of times that the data is copied while old programs, which ignore the freeze, keep writing."""

_LEFT = "What is in v2 is frozen, and stays until 'calicoctl datastore migrate --finish'."

_DELETING = (
    "What is in v2 is being deleted, unless that was interrupted: then 'calicoctl datastore migrate --finish' goes on."
)

_COPYING, _ROLLING_BACK, _FINISHING = "copying", "rolling back", "finishing"

_COPIED = "copied"
"""The field of the note that keeps the value of keys.COPIED_REVISION on the way back."""


@dataclass(frozen=True)
class Agent:
    """A live agent, as its status describes it.

    `store` says how the agent uses the store. It is None if the status does not say that, since the agent is of an
    older version, or of 2015. `revision` is the revision of the status in the store.
    """

    store: AgentStore | None
    revision: int

    @property
    def is_frozen(self) -> bool:
        return self.store is not None and self.store.frozen

    @property
    def can_follow(self) -> bool:
        """Whether the agent goes over to the other API by itself: it knows both, and DATASTORE_TYPE names none."""
        return self.store is not None and not self.store.pinned


@dataclass(frozen=True)
class State:
    """The entries of the keys that say how far a move has come; None for a key that does not exist.

    `v2` and `v3` are Ready in the two APIs, `note` is keys.UNUSED_COPY, and `copied` is keys.COPIED_REVISION.
    """

    v2: Entry | None
    v3: Entry | None
    note: Entry | None
    copied: Entry | None = None

    @property
    def v2_ready(self) -> str | None:
        return None if self.v2 is None else self.v2.value

    @property
    def v3_ready(self) -> str | None:
        return None if self.v3 is None else self.v3.value

    @property
    def step(self) -> str | None:
        """The direction of a move that is running or was interrupted: _COPYING (to v3) or _ROLLING_BACK (to v2).

        None if no move is running or was interrupted.
        """
        if self.v2_ready != "false" or self.v3_ready == "true" or self.note is None or self.is_finishing:
            return None
        return _ROLLING_BACK if self.is_back else _COPYING

    @property
    def advice(self) -> str | None:
        """What the user should know about frozen data, and can do, as a sentence.

        None if v2 is in use, or if no data is frozen.
        """
        if self.step == _COPYING:
            return (
                "The data is being moved to v3, unless that was interrupted: then 'calicoctl datastore migrate' goes "
                "on, and 'calicoctl datastore migrate --rollback' ends it."
            )
        if self.step == _ROLLING_BACK:
            return (
                "The data is on its way back to v2, unless that was interrupted: then 'calicoctl datastore migrate "
                "--rollback' goes on, and 'calicoctl datastore migrate' ends it."
            )
        if self.v3_ready == "true" or self.v2_ready == "true":
            return self.left if self.v3_ready == "true" and self.v2_ready != "true" else None
        return (
            f"Somebody has set {keys.READY} to false: set it to true when the data is complete."
            if self.is_frozen
            else None
        )

    @property
    def is_frozen(self) -> bool:
        return "true" not in (self.v2_ready, self.v3_ready) and "false" in (self.v2_ready, self.v3_ready)

    @property
    def left(self) -> str | None:
        """What becomes of the data in v2 while v3 is in use, as a sentence. None if v2 has no data."""
        if self.is_finishing:
            return _DELETING
        return None if self.v2 is None else _LEFT

    @property
    def is_back(self) -> bool:
        """Whether the note says that the data is on its way back to v2."""
        return self.note is not None and f'"{_ROLLING_BACK}"' in self.note.value

    @property
    def is_finishing(self) -> bool:
        """Whether the note says that the data in v2 is being deleted."""
        return self.note is not None and f'"{_FINISHING}"' in self.note.value

    @property
    def frozen_at(self) -> int | None:
        """The revision at which v2 was frozen.

        None if keys.COPIED_REVISION is missing, since this program has not moved the data, or has an invalid value.
        """
        if self.copied is not None:
            with suppress(ValueError):
                return int(self.copied.value)
        return None


@dataclass(frozen=True)
class Moved:
    """The result of a move, of the way back, or of the end of v2.

    `text` is a sentence that says what was done. `problems` are clauses, one for each problem that is left to the user.
    """

    text: str
    problems: tuple[str, ...] = ()


# more than 400 lines: the three commands share the note and the ways to undo a step; the way back and the end of v2
# should get modules of their own before it grows further
class Migration:
    """A move between the two APIs of one etcd."""

    def __init__(self, where: str, open: Callable[[], tuple[Store, Store]], tell: Callable[[str], None]) -> None:
        """`where` is the servers' URLs, for messages. `open` returns a new Store of v2, and one of v3.

        `tell` is called at the start of each step, with a text about the step, and as the copy proceeds. No request is
        sent.
        """
        self._where = where
        self._open = open
        self._tell = tell
        self._v2, self._v3 = open()
        self._run = secrets.token_hex(8)
        """Identifies this process in the note."""
        self._note: Entry | None = None
        self._is_live_sent = False
        """Whether this process may have sent the transaction that takes v3 into use."""

    def state(self) -> State:
        """Read how far a move has come. Raises StoreError.

        Raises NoSuchApi if etcd does not serve v3. If etcd does not serve v2, the result's `v2` is None if the key
        Ready exists in v3, whatever its value; if it does not exist, NoSuchApi is raised.
        """
        ready, note, copied = self._v3.read([keys.READY, keys.UNUSED_COPY, keys.COPIED_REVISION])[0]
        try:
            return State(self._v2.get(keys.READY), ready, note, copied)
        except NoSuchApi:
            if ready is None:
                raise
            return State(None, ready, note, copied)

    def _checked_state(self) -> State:
        """Do what `state` does, but raise CalicoError if the values of Ready do not tell which data is right."""
        state = self.state()
        check_ready(state.v3_ready, state.v2_ready)
        if state.v3_ready == state.v2_ready == "true":
            raise CalicoError(
                f"{keys.READY} is true in both APIs of etcd, so it is not known which data is right. End old programs; "
                f"then set it to false in the other one: 'ETCDCTL_API=2 etcdctl set {keys.READY} false' for v2, "
                f"'etcdctl put {keys.READY} false' for v3."
            )
        if state.is_finishing and state.v3_ready != "true":
            raise CalicoError(
                f"'calicoctl datastore migrate --finish' deletes what is in etcd's v2 API, but {keys.READY} is not "
                "true in v3: set it to true first, if the data there is complete"
            )
        return state

    def _refuse_other_calico(self) -> None:
        if self._v3.exists(keys.OTHER_CALICO):
            raise foreign(self._where)

    # From v2 to v3

    def move(self) -> Moved:
        """Move the data to v3, or continue an interrupted move.

        If the way back to v2 was interrupted, v3 is taken into use again instead. If v3 is in use already, nothing is
        changed, and the result's `problems` say what v2 has and v3 lacks.

        Raises CalicoError if the move fails. Then v2 is in use again, unless another process has taken over or etcd
        cannot be reached.
        """
        state = self._checked_state()
        self._refuse_other_calico()
        if state.v3_ready == "true":
            late = self._written_late(state)
            left = f" {state.left}" if state.left is not None else ""
            problems = () if late is None else (late,)
            return Moved(f"The data is in etcd's v3 API already.{left}", (*problems, *self._staying()))
        if state.v2 is None:
            raise CalicoError(f"There is no data to move: etcd's v2 API has no {keys.READY}.")
        if state.is_back and state.v2_ready == "false":
            self._take_note(state, _ROLLING_BACK)
            self._take_back_v3(self.state())
            return Moved("The interrupted way back to v2 is undone: etcd's v3 API is in use again.")
        if state.note is None:
            self._refuse_used_target(state)
        resumed = state.v2_ready == "false"
        if not resumed:
            self._check_movable()
        self._take_note(state, _COPYING)
        with self._v2_in_use_on_failure():
            if resumed:
                self._check_movable()
            return self._moved(state.v2)

    def _refuse_used_target(self, state: State) -> None:
        """Raise CalicoError if v3 has data, or if Ready in v2 is not `true`.

        The caller has found no note. So if v3 has data, it is not from an interrupted move, and no interrupted move has
        frozen v2.
        """
        entries = self._v3.list_for_watch(keys.ROOT)[0]
        found = sorted(entry.key for entry in entries if copy_plan.is_data(entry))
        if state.v3 is not None or found:
            what = f"{keys.READY} is {state.v3_ready}" if state.v3 is not None else f"for example {first_few(found)}"
            raise CalicoError(
                f"etcd's v3 API has data already, which is not from here ({what}): nothing is moved. If it is not "
                "needed, delete it first, with 'etcdctl del --prefix /calico/'"
            )
        if state.v2_ready != "true":
            raise CalicoError(
                f"etcd's v2 API is frozen ({keys.READY} is {state.v2_ready}), and not by this command: set it to true "
                "first, if the data is complete"
            )

    def _check_movable(self) -> None:
        """Raise CalicoError if an agent cannot follow the data, a key cannot be copied, or a permission is missing."""
        for store in (self._v2, self._v3):
            _check_agents(_agents(store))
        entries = self._data(self._v2)
        copy_plan.check_fits(entries)
        self._data(self._v3)
        self._v2.check_writable(keys.READY)
        # a role may be for a part of what is below keys.ROOT alone
        parts = {key.split("/")[2]: key for key in entries if key.startswith(keys.ROOT + "/")}
        written = [*list(parts.values())[:MOST_PARTS], keys.READY, keys.UNUSED_COPY, keys.COPIED_REVISION]
        self._v3.check_writable(*written)

    def _moved(self, ready: Entry) -> Moved:
        hosts = set(_agents(self._v2))
        self._tell("Freezing etcd's v2 API")
        frozen = self._rewritten(ready)
        self._settle(hosts, {})
        frozen, entries = self._copied(frozen)
        before = _agents(self._v3)
        self._go_live(frozen.revision)
        return self._followed(entries, self._await_agents(V3, hosts, before))

    def _rewritten(self, ready: Entry) -> Entry:
        """Write `false` to v2's Ready, even if its value is `false` already. Return the new entry.

        Keys of v2 that have a higher revision than this entry were written later. `ready` is the current entry. Raises
        CalicoError if another program has written Ready since `ready` was read.
        """
        try:
            return self._v2.update(ready, "false")
        except CompareFailed:
            self._refuse_loss_of_note()
            raise CalicoError(
                f"Another program has written {keys.READY} in etcd's v2 API: perhaps a 'calicoctl node' of 2015, "
                "which sets it to true. Nothing has moved."
            ) from None

    def _copied(self, ready: Entry) -> tuple[Entry, dict[str, Entry]]:
        """Copy the data in v2 to v3, and compare both. Return the entry of Ready in v2, and the copied entries by key.

        Ready in v2 is rewritten before each copy; the entry of the last time is returned. The copy is repeated while
        old programs write to v2: the data is copied ROUNDS times at most.

        Raises CalicoError if old programs keep writing to v2, if another program writes to v3, if another process takes
        over, or if the data cannot be copied.
        """
        self._tell("Copying")
        target = self._data(self._v3)
        before: dict[str, Entry] = {}
        for _ in range(ROUNDS):
            ready = self._rewritten(ready)
            source = self._data(self._v2)
            copy_plan.check_fits(source)
            done = 0
            for commit in copy_plan.plan(source, before, target):
                for write, entry in zip(commit, self._commit(commit)):
                    if isinstance(write, Delete):
                        del target[write.key]
                    else:
                        target[write.key] = entry
                        done += 1
                self._tell(f"Copying: {done} of {len(source)} keys" if done else "Removing an earlier copy")
            self._tell(f"Comparing {len(source)} keys")
            wrong = difference(self._data(self._v3), source)
            if wrong:
                raise CalicoError(f"Another program writes to etcd's v3 API below {keys.ROOT}: {wrong}")
            before, now_there = source, self._data(self._v2)
            agents = _agents(self._v2)  # some may have been started just now
            _check_agents(agents)
            if not all(one.is_frozen for one in agents.values()):
                self._settle(set(), {})
            elif _same(before, now_there):
                return ready, before
        raise CalicoError(
            f"Old programs keep writing to etcd's v2 API ({difference(now_there, before)}): end them, and repeat this."
        )

    def _take_note(self, state: State, what: str) -> None:
        """Write `false` to v3's Ready, and the note, which then belongs to this process.

        `what` is what the note says: _COPYING or _ROLLING_BACK. If it is _ROLLING_BACK, the field `copied` of the
        previous note is kept. Raises StoreError if one of these keys has changed since `state` was read.
        """
        revision = _copied_in(state.note) if state.note is not None and what == _ROLLING_BACK else None
        text = self._text(what) if revision is None else self._text(what, **{_COPIED: revision})
        writes = [_put(keys.UNUSED_COPY, state.note, text), _put(keys.READY, state.v3, "false")]
        try:
            self._note = self._v3.commit(writes)[0]
        except (CompareFailed, KeyExists):
            raise _taken_over() from None

    def _refuse_loss_of_note(self) -> None:
        """Raise StoreError if the note is not this process's, since another process has taken over."""
        if not self._is_own(self._v3.get(keys.UNUSED_COPY)):
            raise _taken_over()

    def _text(self, what: str, **more: str) -> str:
        """Return the value of a note that belongs to this process, and says `what`. `more` are additional fields."""
        return json.dumps({"state": what, "run": self._run, "time": now(), **more})

    def _commit(self, writes: list[Write]) -> list[Entry]:
        """Apply writes to v3, and rewrite the note, in one transaction. Return the entries of the writes.

        Raises StoreError if another process has taken over the note, or if another program has changed one of the keys.
        """
        assert self._note is not None
        try:
            self._note, *entries = self._v3.commit([Update(self._note, self._note.value), *writes])
        except (CompareFailed, KeyExists):
            raise _taken_over() from None
        return entries

    def _go_live(self, revision: int) -> None:
        """Take v3 into use, and record that v2 was frozen at `revision`.

        Raises StoreError if another process has taken over. If etcd's answer to the commit is lost, Store.commit finds
        out whether the commit was applied.
        """
        self._tell("Taking etcd's v3 API into use")
        assert self._note is not None
        ready, copied = self._v3.read([keys.READY, keys.COPIED_REVISION])[0]
        if ready is not None and ready.value == "true":
            raise _taken_over()
        live = _put(keys.READY, ready, "true")
        self._is_live_sent = True
        try:
            self._v3.commit([live, _put(keys.COPIED_REVISION, copied, str(revision)), Delete(self._note)])
        except (CompareFailed, KeyExists):
            raise _taken_over() from None

    @contextmanager
    def _v2_in_use_on_failure(self) -> Iterator[None]:
        """Take v2 into use again if the body of `with` fails, or is interrupted, before v3 is in use."""
        try:
            yield
        except BaseException:
            with self._repeatable("v2"):
                if self._fenced():
                    self._thaw_v2()
                    self._tell("etcd's v2 API is in use again")
            raise

    def _fenced(self) -> bool:
        """Make sure that no earlier request of this process can take v3 into use any more.

        Return True if that is sure. Return False if v3 is in use already, or if another process has taken over the
        note.

        etcd may receive such a request late. The request fails if the note has changed since it was sent, so the note
        is rewritten. If no such request was sent, the note is not rewritten, since etcd may have no space left.
        """
        self._v2, self._v3 = self._open()  # an interrupted request may have spoilt the others
        note = self._v3.get(keys.UNUSED_COPY)
        if note is None or not self._is_own(note):
            return False
        try:
            if self._is_live_sent:
                self._v3.update(note, note.value)
        except CompareFailed:
            return False
        return True

    def _is_own(self, note: Entry | None) -> bool:
        return note is not None and self._run in note.value

    def _thaw_v2(self) -> None:
        """Set v2's Ready to `true`, if it is `false`. Raises StoreError if another process has taken over the note."""
        ready = self._v2.get(keys.READY)  # before the note: whoever takes that over then writes Ready
        self._refuse_loss_of_note()
        try:
            if ready is not None and ready.value == "false":
                self._v2.update(ready, "true")
        except CompareFailed:
            raise _taken_over() from None

    def _followed(self, entries: dict[str, Entry], missing: list[str]) -> Moved:
        """Check v2 and v3 once more after a move, and return the result of the move.

        `entries` were copied. `missing` are the hosts whose agents do not use v3 yet. If an old program has set v2's
        Ready to `true`, it is set to `false` again. This, `missing`, and keys of v2 that differ from `entries` are
        `problems` of the result. Raises CalicoError if v3 is not in use any more.
        """
        problems = []
        ready = self._v2.get(keys.READY)  # before v3's: while both are true, no command sets v3's to false
        live = self._v3.get(keys.READY)
        if live is None or live.value != "true":
            raise CalicoError(
                f"The data had moved to etcd's v3 API, but another command has set {keys.READY} to false there since: "
                "see 'calicoctl datastore show'"
            )
        if ready is not None and ready.value == "true":
            try:
                self._v2.update(ready, "false")
            except CompareFailed:
                raise _taken_over() from None
            problems.append(
                f"An old program has set {keys.READY} to true in etcd's v2 API, as a 'calicoctl node' of 2015 does. It "
                "is false again; end that program"
            )
        late = difference(self._data(self._v2), entries)
        if late:
            problems.append(_late(late))
        problems.extend(self._staying())
        if missing:
            problems.append(
                f"The agents of {first_few(missing)} are not seen in etcd's v3 API yet: see 'calicoctl status' there"
            )
        return Moved(f"{len(entries)} keys have moved: etcd's v3 API is in use. {_LEFT}", tuple(problems))

    def _written_late(self, state: State) -> str | None:
        """Return a clause that lists the keys of v2 that v3 does not have with the same value.

        Only keys that were written to v2 after it was frozen are listed; but all keys are listed if `state.frozen_at`
        is None. Returns None if there are no such keys, or if etcd does not serve v2. Keys that were deleted in v2
        cannot be found.
        """
        try:
            entries = self._data(self._v2)
        except NoSuchApi:
            return None
        since = state.frozen_at
        late = {key: entry for key, entry in entries.items() if since is None or entry.revision > since}
        missing = difference(late, read_all(self._v3, list(late)))
        if not missing:
            return None
        if since is None:
            return f"What is in etcd's v2 API was not moved by this command, and v3 does not have all of it: {missing}"
        return _late(missing)

    def _take_back_v3(self, state: State) -> None:
        """Take v3 into use again, and restore keys.COPIED_REVISION from the note: that is, undo `_freeze_v3`.

        `state` has just been read. Raises StoreError if v2 is in use already, or if another process has taken over.
        """
        if state.v2 is None or state.v2_ready != "false" or state.note is None or not self._is_own(state.note):
            raise _taken_over()
        writes = [_put(keys.READY, state.v3, "true"), Delete(state.note)]
        revision = _copied_in(state.note)
        if revision is not None:
            writes.append(_put(keys.COPIED_REVISION, state.copied, revision))
        try:
            self._v2.update(state.v2, "false")  # so that nothing that is on its way sets it to true
            self._v3.commit(writes)
        except (CompareFailed, KeyExists):
            raise _taken_over() from None

    # Back to v2

    def roll_back(self, discard: bool) -> Moved:
        """Take v2 into use again, or undo an interrupted move to v3. What was written to v3 since the move is lost.

        Raises CalicoError if this fails, or if something would be lost and `discard` is false. Then v3 is in use again
        if it was in use before, unless another process has taken over or etcd cannot be reached.
        """
        state, before = self._checked_state(), dict[str, Agent]()
        if state.v2 is None:
            raise CalicoError("There is no data to go back to: etcd's v2 API has none.")
        if state.is_finishing:
            raise CalicoError(f"There is no way back to etcd's v2 API. {_DELETING}")
        if state.v3_ready == "true":
            _check_agents(_agents(self._v3))
            self._refuse_loss(discard)
            before = _agents(self._v2)
        elif state.v2_ready == "true":
            return Moved("etcd's v2 API is in use.")
        elif state.note is None:
            raise CalicoError(
                f"etcd's v2 API is frozen ({keys.READY} is {state.v2_ready}), and not by this command: set it to true, "
                "if the data is complete"
            )
        elif not state.is_back:
            self._take_note(state, _COPYING)
            self._thaw_v2()
            return Moved("The interrupted move is undone: etcd's v2 API is in use again.")
        with self._v3_in_use_on_failure():
            if state.v3_ready == "true":
                self._freeze_v3(state)
            else:
                self._take_note(state, _ROLLING_BACK)
            self._settle(set(_agents(self._v3)), before)
            self._refuse_loss(discard)
            self._tell("Taking etcd's v2 API into use")
            self._thaw_v2()
        missing = self._await_agents(V2, set(_agents(self._v2)), {})
        problem = f"The agents of {first_few(missing)} still wait: see 'calicoctl status' there"
        return Moved("etcd's v2 API is in use again.", (problem,) if missing else ())

    def _refuse_loss(self, discard: bool) -> None:
        theirs = keys.OTHER_CALICO + "/"
        entries = self._v3.list_for_watch(keys.ROOT)[0]  # those that cannot be read are lost as well
        ours = {entry.key: entry for entry in entries if is_copied(entry) and not entry.key.startswith(theirs)}
        lost = difference(ours, self._data(self._v2))
        if lost and not discard:
            raise CalicoError(
                f"What was written to etcd's v3 API since the data has moved would be lost: {lost}. Nothing is "
                "changed; with --discard, it is lost"
            )

    def _freeze_v3(self, state: State) -> None:
        self._tell("Freezing etcd's v3 API")
        assert state.v3 is not None
        ready = Update(state.v3, "false")
        if state.copied is None:
            writes: list[Write] = [ready, Create(keys.UNUSED_COPY, self._text(_ROLLING_BACK))]
        else:  # the note keeps the revision, in case that v3 is taken into use again
            note = self._text(_ROLLING_BACK, **{_COPIED: state.copied.value})
            writes = [ready, Create(keys.UNUSED_COPY, note), Delete(state.copied)]
        try:
            self._v3.commit(writes)
        except (CompareFailed, KeyExists):
            raise _taken_over() from None

    @contextmanager
    def _v3_in_use_on_failure(self) -> Iterator[None]:
        """Take v3 into use again if the body of `with` fails, or is interrupted, before v2 is in use."""
        try:
            yield
        except BaseException:
            with self._repeatable("v3"):
                self._v2, self._v3 = self._open()
                state = self.state()
                if state.v2_ready == "false" and self._is_own(state.note):
                    self._take_back_v3(state)
                    self._tell("etcd's v3 API is in use again")
            raise

    @contextmanager
    def _repeatable(self, version: str) -> Iterator[None]:
        """If the body of `with` raises a CalicoError, tell the user to repeat the command, and suppress the error.

        The body takes the API `version` ("v2" or "v3") into use again.
        """
        try:
            yield
        except CalicoError as error:
            self._tell(
                f"etcd's {version} API cannot be taken into use again now ({error}): repeat this command, or the "
                f"opposite one; see 'calicoctl datastore show'"
            )

    # The end of v2

    def finish(self, discard: bool) -> Moved:
        """Delete the data in v2. Raises CalicoError, and deletes nothing, in these cases among others:

        * v3 is not in use, or Ready is `true` in v2, too.
        * An agent still uses v2.
        * v2 has data that v3 lacks (see `_written_late`), and `discard` is false.

        If the deletion fails after it has begun, there is no way back to v2.
        """
        state = self._live_state()
        try:
            if state.v2 is None and not self._v2.exists(keys.ROOT):
                self._v2.remove_tree(keys.ROOT)  # directories may be left
                self._forget(state)
                return Moved("etcd's v2 API has no data.")
        except NoSuchApi:
            return Moved("etcd does not serve its v2 API any more.")
        self._tell("Waiting for agents to leave etcd's v2 API")
        left = self._await(self._left_in_v2)
        if left:
            raise CalicoError(f"The agents of {first_few(left)} use etcd's v2 API: end them first. Nothing is deleted.")
        state = self._live_state()  # the wait may have been long
        late = self._written_late(state)
        if late is not None and not discard:
            raise CalicoError(f"{late}. Nothing is deleted; with --discard, it is")
        count = len(self._v2.tree(keys.ROOT))
        self._v2.check_writable(keys.READY)
        self._close_way_back(state)
        self._tell(f"Deleting {count} keys")
        self._v2.remove_tree(keys.ROOT)
        self._forget(self.state())
        return Moved(f"{count} keys are deleted from etcd's v2 API.")

    def _live_state(self) -> State:
        """Return what `_checked_state` returns. Raise CalicoError if v3 is not in use, or has data of Calico 3."""
        state = self._checked_state()
        self._refuse_other_calico()
        if state.v3_ready != "true":
            raise CalicoError("The data has not moved to etcd's v3 API: nothing is deleted.")
        return state

    def _close_way_back(self, state: State) -> None:
        """Write the note "finishing", so that no process takes v2 into use again.

        Raises StoreError if Ready in v3 or the note has changed since `state` was read: another process may be about to
        take v2 into use.
        """
        assert state.v3 is not None
        note = _put(keys.UNUSED_COPY, state.note, self._text(_FINISHING))
        try:
            self._v3.commit([Update(state.v3, "true"), note])
        except (CompareFailed, KeyExists):
            raise _taken_over() from None

    def _forget(self, state: State) -> None:
        left = [entry for entry in (state.note, state.copied) if entry is not None]
        if left:
            with suppress(CompareFailed):  # another process has deleted it
                self._v3.commit([Delete(entry) for entry in left])

    def _left_in_v2(self) -> list[str]:
        """Return, sorted, the hosts whose agents use v2.

        These agents have a status in v2, but none in v3. An agent with a status in both uses v3: its last status in v2
        has not expired yet. But the host is always returned if the status in v2 says that DATASTORE_TYPE makes the
        agent use v2, or if it does not say how the agent uses the store: then the agent is of an older version that
        knows only v2.
        """
        gone_over = _agents(self._v3).keys()
        return sorted(
            host for host, found in _agents(self._v2).items() if not found.can_follow or host not in gone_over
        )

    def _staying(self) -> list[str]:
        """Return a problem, as a clause, if v2 has agents that cannot follow the data; else an empty list."""
        try:
            agents = _agents(self._v2)
        except NoSuchApi:
            return []
        hosts = sorted(host for host, found in agents.items() if not found.can_follow)
        if not hosts:
            return []
        return [
            f"The agents of {first_few(hosts)} stay in etcd's v2 API, since {TYPE} is in their environment, or they "
            "are of an older version: end them, and start them again without it"
        ]

    # Agents

    def _settle(self, hosts: set[str], before: dict[str, Agent]) -> None:
        """Wait until no command writes any more, and all live agents have reported that the data is frozen.

        Agents report this in v2, whichever API was in use. `hosts` are the hosts whose agents were alive before the
        freeze. `before` are the agents' statuses in v2 from before the freeze; they do not count as reports.

        Raises CalicoError if an agent has not reported for AGENTS_PATIENCE, or cannot follow the data.
        """
        until = time.monotonic() + SETTLE

        def pending() -> list[str]:
            self._refuse_loss_of_note()
            agents = _agents(self._v2)
            _check_agents(agents)
            alive = agents.keys() | (hosts & _agents(self._v3).keys())
            new = _new(agents, before)
            return sorted(host for host in alive if host not in new or not new[host].is_frozen)

        self._tell("Waiting for commands and agents to notice")
        left = self._await(pending)
        if left:
            raise CalicoError(
                f"The agents of {first_few(left)} do not say that they have noticed that the data is frozen, within "
                f"{AGENTS_PATIENCE:.0f} s: see 'calicoctl status' there. Nothing has moved."
            )
        # writes that have begun before the freeze show in nothing that could be awaited
        time.sleep(max(0.0, until - time.monotonic()))

    def _await_agents(self, api: str, hosts: set[str], before: dict[str, Agent]) -> list[str]:
        """Wait until the agents of `hosts` report that they use `api`, and that the data there is not frozen.

        After AGENTS_PATIENCE at most, return the hosts whose agents have not reported this. `before` are the agents'
        statuses in `api` from before `api` was taken into use; they do not count as reports. An agent whose status has
        expired in both APIs has died, and is not waited for.
        """
        self._tell(f"Waiting for agents to use etcd's {api[-2:]} API")

        def pending() -> list[str]:
            there, elsewhere = (_agents(store) for store in (self._v2, self._v3)[:: 1 if api == V2 else -1])
            new, alive = _new(there, before), there.keys() | elsewhere.keys()
            return sorted(host for host in hosts & alive if host not in new or new[host].is_frozen)

        return self._await(pending)

    @staticmethod
    def _await(pending: Callable[[], list[str]]) -> list[str]:
        """Call `pending` again and again until it returns an empty list, or AGENTS_PATIENCE is over.

        Return the last result of `pending`.
        """
        give_up = time.monotonic() + AGENTS_PATIENCE
        while (left := pending()) and time.monotonic() < give_up:
            time.sleep(POLL)  # a watch would have to follow two APIs, one of which may go meanwhile
        return left

    def _data(self, store: Store) -> dict[str, Entry]:
        return copied(store.list_for_watch(keys.ROOT)[0], "v2" if store is self._v2 else "v3")


def _agents(store: Store) -> dict[str, Agent]:
    """Return host -> live agent, for the agents that report to this store. An agent is live if its status expires."""
    hosts = {keys.felix_status(host): host for host in store.names(keys.FELIX_HOSTS)}
    found = read_all(store, list(hosts))
    return {
        hosts[key]: Agent(parse_agent_store(entry.value), entry.revision)
        for key, entry in found.items()
        if entry.expires
    }


def _new(agents: dict[str, Agent], before: dict[str, Agent]) -> dict[str, Agent]:
    """Return those of `agents` that have written their status since `before` was read. Both are by host."""
    return {host: found for host, found in agents.items() if found != before.get(host)}


def _check_agents(agents: dict[str, Agent]) -> None:
    """Raise CalicoError if one of `agents` cannot follow the data to the other API."""
    old = sorted(host for host, found in agents.items() if found.store is None)
    pinned = sorted(host for host, found in agents.items() if found.store is not None and found.store.pinned)
    if old:
        raise CalicoError(
            f"The agents of {', '.join(old)} are of an older version, or of 2015, and know etcd's v2 API alone: "
            "upgrade them first ('calicoctl node restart'), or end them. Nothing has moved."
        )
    if pinned:
        raise CalicoError(
            f"The agents of {', '.join(pinned)} have {TYPE} in their environment, and use that API whatever happens: "
            "remove it, from /etc/calico/node.env, too, and start them again ('calicoctl node stop --force', "
            "'calicoctl node'). Nothing has moved."
        )


def _same(one: copy_plan.Entries, other: copy_plan.Entries) -> bool:
    """Return whether two reads of a store return the same keys, values and order of creation."""
    return not difference(one, other) and all(one[key].created == other[key].created for key in one)


def _put(key: str, entry: Entry | None, value: str) -> Write:
    """Return a write of `value` to `key`. `entry` is the key's current entry, None if the key does not exist."""
    return Create(key, value) if entry is None else Update(entry, value)


def _copied_in(note: Entry) -> str | None:
    """Return the field `copied` of a note, None if the field is missing, or is not text."""
    try:
        found = json.loads(note.value)[_COPIED]
    except (LookupError, RecursionError, TypeError, ValueError):
        return None
    return found if isinstance(found, str) else None


def _late(what: copy_plan.Difference) -> str:
    return f"Old programs have written to etcd's v2 API since it was frozen, and v3 does not have that: {what}"


def _taken_over() -> StoreError:
    return StoreError(
        "Another 'calicoctl datastore migrate' has taken over, or another program has written to etcd's v3 API: see "
        "'calicoctl datastore show'"
    )
