"""Moves the data from etcd's v2 API to its v3 API, and back. What is read and written is the same as elsewhere.

Each step leaves a state that the table in detection.py has a line for, so whatever ends the process, one API is in use
or both are frozen, and the command can be repeated:

| step | Ready in v2 | in v3 | note in v3 | used is |
|---|---|---|---|---|
| before | true | none | none | v2 |
| the note is written | true | none | copying | v2 |
| v2 is frozen, the data is copied and compared | false | none | copying | v2, frozen |
| v3 is taken into use, in one transaction | false | true | none | v3 |

Back (`Migration.roll_back`), v3 is frozen with a note in one transaction; then v2 becomes `true`, and v3 keeps the
note. So the note (keys.UNUSED_COPY) is there exactly if what is in v3 may be overwritten. Each commit to v3 also
rewrites the note: if another process has taken it over, the commit fails, and this process must not change Ready any
more.
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
from calicoctl.datastore.copy_plan import copied, difference
from calicoctl.datastore.detection import foreign
from calicoctl.datastore.settings import TYPE, V2, V3
from calicoctl.datastore.statuses import AgentStore, parse_agent_store
from calicoctl.datastore.store import Create, Delete, Entry, Store, Update, Write, read_all
from calicoctl.errors import CalicoError, CompareFailed, KeyExists, NoSuchApi, StoreError
from calicoctl.output import first_few

SETTLE = FRESH + 1.0
"""Seconds after which no command writes any more that has begun before the data was frozen."""

AGENTS_PATIENCE = 45.0
"""Seconds to wait until all live agents have noticed something. The status of one that has died expires before."""

POLL = 0.5
"""Seconds between two reads of the agents' statuses."""

ROUNDS = 10
"""How often the data is copied if it keeps being written by programs that do not know what frozen is."""

_LEFT = "What is in v2 is frozen, and stays until 'calicoctl datastore migrate --finish'."

_COPYING, _ROLLING_BACK = "copying", "rolling back"


@dataclass(frozen=True)
class Agent:
    """An agent that is alive: how it uses the store, None if it does not say so, and the revision of its status."""

    store: AgentStore | None
    revision: int

    @property
    def is_frozen(self) -> bool:
        return self.store is not None and self.store.frozen


@dataclass(frozen=True)
class State:
    """What says how far a move has come: Ready in both APIs, and the note in v3."""

    v2: Entry | None
    v3: Entry | None
    note: Entry | None

    @property
    def v2_ready(self) -> str | None:
        return None if self.v2 is None else self.v2.value

    @property
    def v3_ready(self) -> str | None:
        return None if self.v3 is None else self.v3.value

    @property
    def step(self) -> str | None:
        """What this command does with the data at the moment, or did when it was interrupted."""
        if self.v2_ready != "false" or self.v3_ready == "true" or self.note is None:
            return None
        return _ROLLING_BACK if self.is_back else _COPYING

    @property
    def advice(self) -> str | None:
        """What there is to do, as a sentence, if the data is frozen, or is still in v2 although v3 is in use."""
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
            return _LEFT if self.v3_ready == "true" and self.v2_ready == "false" else None
        return (
            f"Somebody has set {keys.READY} to false: set it to true when the data is complete."
            if self.is_frozen
            else None
        )

    @property
    def is_frozen(self) -> bool:
        return "true" not in (self.v2_ready, self.v3_ready) and "false" in (self.v2_ready, self.v3_ready)

    @property
    def is_back(self) -> bool:
        """Whether the note says that the data is on its way back to v2."""
        return self.note is not None and f'"{_ROLLING_BACK}"' in self.note.value


@dataclass(frozen=True)
class Moved:
    """What was done, as a sentence, and what is left to be done, each as a clause."""

    text: str
    problems: tuple[str, ...] = ()


class Migration:
    """A move between the two APIs of one etcd."""

    def __init__(self, where: str, open: Callable[[], tuple[Store, Store]], tell: Callable[[str], None]) -> None:
        """Sends nothing. `open` returns new clients of v2 and v3; `tell` is called with what is done at the moment.

        `where` names the servers in messages.
        """
        self._where = where
        self._open = open
        self._tell = tell
        self._v2, self._v3 = open()
        self._run = secrets.token_hex(8)
        """Names this process in the note."""
        self._note: Entry | None = None
        self._is_live_sent = False
        """Whether what takes v3 into use may have been sent."""

    def state(self) -> State:
        """Read how far a move has come. Raises StoreError, also if another Calico uses v3.

        NoSuchApi is raised if v2 is not served and v3 has no Ready.
        """
        ready, note = self._v3.read([keys.READY, keys.UNUSED_COPY])[0]
        if self._v3.exists(keys.OTHER_CALICO):
            raise foreign(self._where)
        try:
            return State(self._v2.get(keys.READY), ready, note)
        except NoSuchApi:
            if ready is None:
                raise
            return State(None, ready, note)

    # From v2 to v3

    def move(self) -> Moved:
        """Move the data to v3, or go on with a move that was interrupted. Raises CalicoError; then v2 is in use again.

        If the data has moved already, returns what an old program has written to v2 since.
        """
        state = self.state()
        if state.v3_ready == "true":
            if state.v2_ready == "true":
                raise _both()
            late = self._written_late(state)
            left = f" {_LEFT}" if state.v2 is not None else ""
            return Moved(f"The data is in etcd's v3 API already.{left}", () if not late else (_late(late),))
        if state.v2 is None:
            raise CalicoError(f"There is no data to move: etcd's v2 API has no {keys.READY}.")
        if state.is_back and state.v2_ready == "false":
            self._take_back_v3(state)
            return Moved("The interrupted way back to v2 is undone: etcd's v3 API is in use again.")
        if state.note is None:
            self._refuse_used_target(state)
        resumed = state.v2_ready == "false"
        if not resumed:
            self._check_movable()
        self._take_note(state.note)
        with self._v2_in_use_on_failure():
            if resumed:
                self._check_movable()
            return self._moved(state.v2)

    def _refuse_used_target(self, state: State) -> None:
        """Raise CalicoError if v3 has data, or if v2 was frozen by somebody else."""
        entries = self._v3.list_for_watch(keys.ROOT)[0]
        found = sorted(entry.key for entry in entries if copy_plan.is_copied(entry) or entry.problem is not None)
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
        """Raise CalicoError if an agent could not follow, if a key cannot be copied, or if a user lacks permissions."""
        for store in (self._v2, self._v3):
            _check_agents(_agents(store))
        entries = self._data(self._v2)
        copy_plan.check_fits(entries)
        self._v2.check_writable(keys.READY)
        self._v3.check_writable(keys.READY, keys.UNUSED_COPY)

    def _moved(self, ready: Entry) -> Moved:
        hosts = set(_agents(self._v2))
        self._tell("Freezing etcd's v2 API")
        frozen = self._rewritten(ready)
        self._settle(hosts, {})
        entries = self._copied(frozen)
        before = _agents(self._v3)
        self._go_live()
        return self._followed(entries, self._await_agents(V3, hosts, before))

    def _rewritten(self, ready: Entry) -> Entry:
        """Set v2's Ready to `false`, even if it is that already: what has a later revision is written after that."""
        try:
            return self._v2.update(ready, "false")
        except CompareFailed:
            raise CalicoError(
                f"Another program has written {keys.READY} in etcd's v2 API: perhaps a 'calicoctl node' of 2015, "
                "which sets it to true. Nothing has moved."
            ) from None

    def _copied(self, ready: Entry) -> dict[str, Entry]:
        """Make v3 hold what v2 holds, and return that. Repeats it as long as old programs write to v2 meanwhile."""
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
            if not all(one.is_frozen for one in _agents(self._v2).values()):  # one that was just started
                self._settle(set(), {})
            elif _same(before, now_there):
                return before
        raise CalicoError(
            f"Old programs keep writing to etcd's v2 API ({difference(now_there, before)}): end them, and repeat this."
        )

    def _take_note(self, before: Entry | None) -> None:
        try:
            if before is None:
                self._note = self._v3.create(keys.UNUSED_COPY, self._text(_COPYING))
            else:
                self._note = self._v3.update(before, self._text(_COPYING))
        except (CompareFailed, KeyExists):
            raise _taken_over() from None

    def _text(self, what: str) -> str:
        return json.dumps({"state": what, "run": self._run, "time": now()})

    def _commit(self, writes: list[Write]) -> list[Entry]:
        """Make some writes in v3, provided that the note is still this process's. Raises CalicoError."""
        assert self._note is not None
        try:
            self._note, *entries = self._v3.commit([Update(self._note, self._note.value), *writes])
        except (CompareFailed, KeyExists):
            raise _taken_over() from None
        return entries

    def _go_live(self) -> None:
        """Take v3 into use. If the answer is lost, another attempt finds out what became of it."""
        self._tell("Taking etcd's v3 API into use")
        assert self._note is not None
        ready = self._v3.get(keys.READY)
        if ready is not None and ready.value == "true":
            raise _taken_over()
        live: Write = Create(keys.READY, "true") if ready is None else Update(ready, "true")
        self._is_live_sent = True
        try:
            self._v3.commit([live, Delete(self._note)])
        except (CompareFailed, KeyExists):
            raise _taken_over() from None

    @contextmanager
    def _v2_in_use_on_failure(self) -> Iterator[None]:
        """If the body of `with` fails, or is interrupted, before v3 is in use, take v2 into use again."""
        try:
            yield
        except BaseException:
            with self._repeatable("v2"):
                if self._fenced():
                    self._thaw_v2()
                    self._tell("etcd's v2 API is in use again")
            raise

    def _fenced(self) -> bool:
        """Make sure that nothing that this process has sent takes v3 into use; return False if that is not possible.

        Nothing is written unless it is necessary: etcd may have no space left.
        """
        self._v2, self._v3 = self._open()  # an interrupted request may have spoilt the others
        note = self._v3.get(keys.UNUSED_COPY)
        if note is None or self._run not in note.value:
            return False
        try:
            if self._is_live_sent:
                self._v3.update(note, note.value)
        except CompareFailed:
            return False
        return True

    def _thaw_v2(self) -> None:
        ready = self._v2.get(keys.READY)
        if ready is not None and ready.value == "false":
            self._v2.update(ready, "true")

    def _followed(self, entries: dict[str, Entry], missing: list[str]) -> Moved:
        """Compare once more. `missing` are the hosts whose agents do not use v3 yet."""
        problems = []
        ready = self._v2.get(keys.READY)
        if ready is not None and ready.value == "true":
            self._v2.update(ready, "false")
            problems.append(
                f"An old program has set {keys.READY} to true in etcd's v2 API, as a 'calicoctl node' of 2015 does. It "
                "is false again; end that program"
            )
        late = difference(self._data(self._v2), entries)
        if late:
            problems.append(_late(str(late)))
        if missing:
            problems.append(
                f"The agents of {first_few(missing)} are not seen in etcd's v3 API yet: see 'calicoctl status' there"
            )
        return Moved(f"{len(entries)} keys have moved: etcd's v3 API is in use. {_LEFT}", tuple(problems))

    def _written_late(self, state: State) -> str:
        """Return what was written to v2 since it was frozen and is not in v3, "" for nothing. Deletes leave no trace.

        What has been changed in v3 again counts as well.
        """
        if state.v2 is None:
            with suppress(NoSuchApi):
                return str(difference(self._data(self._v2), {}))
            return ""
        late = {key: entry for key, entry in self._data(self._v2).items() if entry.revision > state.v2.revision}
        there = read_all(self._v3, list(late))
        return str(difference(late, there))

    def _take_back_v3(self, state: State) -> None:
        assert state.v3 is not None and state.note is not None
        self._v3.commit([Update(state.v3, "true"), Delete(state.note)])

    # Back to v2

    def roll_back(self, discard: bool) -> Moved:
        """Take v2 into use again. Raises CalicoError; then v3 is in use again, if it was.

        What was written to v3 since the move is lost: unless `discard`, that is refused.
        """
        state, before = self.state(), dict[str, Agent]()
        if state.v2 is None:
            raise CalicoError("There is no data to go back to: etcd's v2 API has none.")
        if state.v3_ready == "true":
            if state.v2_ready == "true":
                raise _both()
            _check_agents(_agents(self._v3))
            self._refuse_loss(discard)
            before = _agents(self._v2)
            self._freeze_v3(state)
        elif state.v2_ready == "true":
            return Moved("etcd's v2 API is in use.")
        elif state.note is None:
            raise CalicoError(
                f"etcd's v2 API is frozen ({keys.READY} is {state.v2_ready}), and not by this command: set it to true, "
                "if the data is complete"
            )
        elif not state.is_back:
            self._take_note(state.note)
            self._thaw_v2()
            return Moved("The interrupted move is undone: etcd's v2 API is in use again.")
        with self._v3_in_use_on_failure():
            self._settle(set(_agents(self._v3)), before)
            self._refuse_loss(discard)
            self._tell("Taking etcd's v2 API into use")
            self._thaw_v2()
        missing = self._await_agents(V2, set(_agents(self._v2)), {})
        problem = f"The agents of {first_few(missing)} still wait: see 'calicoctl status' there"
        return Moved("etcd's v2 API is in use again.", (problem,) if missing else ())

    def _refuse_loss(self, discard: bool) -> None:
        lost = difference(self._data(self._v3), self._data(self._v2))
        if lost and not discard:
            raise CalicoError(
                f"What was written to etcd's v3 API since the data has moved would be lost: {lost}. Nothing is "
                "changed; with --discard, it is lost"
            )

    def _freeze_v3(self, state: State) -> None:
        self._tell("Freezing etcd's v3 API")
        assert state.v3 is not None
        try:
            self._v3.commit([Update(state.v3, "false"), Create(keys.UNUSED_COPY, self._text(_ROLLING_BACK))])
        except (CompareFailed, KeyExists):
            raise _taken_over() from None

    @contextmanager
    def _v3_in_use_on_failure(self) -> Iterator[None]:
        """If the body of `with` fails, or is interrupted, before v2 is in use, take v3 into use again."""
        try:
            yield
        except BaseException:
            with self._repeatable("v3"):
                self._v2, self._v3 = self._open()
                state = self.state()
                if state.v2 is not None and state.v2_ready == "false" and state.v3 is not None and state.is_back:
                    self._v2.update(state.v2, "false")  # so that nothing that is on its way sets it to true
                    self._take_back_v3(state)
                    self._tell("etcd's v3 API is in use again")
            raise

    @contextmanager
    def _repeatable(self, version: str) -> Iterator[None]:
        """If the body of `with`, which takes an API into use again, fails, say that this command can do it later."""
        try:
            yield
        except CalicoError as error:
            self._tell(
                f"etcd's {version} API cannot be taken into use again now ({error}): repeat this command, or the "
                f"opposite one; see 'calicoctl datastore show'"
            )

    # The end of v2

    def finish(self, discard: bool) -> Moved:
        """Delete the data in v2. Raises CalicoError if v3 is not in use, or if an agent still uses v2.

        Unless `discard`, also raises it if old programs have written to v2 since the move.
        """
        state = self.state()
        if state.v3_ready != "true":
            raise CalicoError("The data has not moved to etcd's v3 API: nothing is deleted.")
        if state.v2_ready == "true":
            raise _both()
        try:
            if state.v2 is None and not self._v2.exists(keys.ROOT):
                self._v2.remove_tree(keys.ROOT)  # directories may be left
                return Moved("etcd's v2 API has no data.")
        except NoSuchApi:
            return Moved("etcd does not serve its v2 API any more.")
        self._tell("Waiting for agents to leave etcd's v2 API")
        left = self._await(self._left_in_v2)
        if left:
            raise CalicoError(f"The agents of {first_few(left)} use etcd's v2 API: end them first. Nothing is deleted.")
        late = self._written_late(state)
        if late and not discard:
            raise CalicoError(f"{_late(late)}. Nothing is deleted; with --discard, it is")
        count = len(self._v2.tree(keys.ROOT))
        self._tell(f"Deleting {count} keys")
        self._v2.remove_tree(keys.ROOT)
        return Moved(f"{count} keys are deleted from etcd's v2 API.")

    def _left_in_v2(self) -> list[str]:
        """Return the hosts whose agents use v2. The last status of one that has gone over may still be there."""
        gone_over = _agents(self._v3).keys()
        return sorted(host for host, found in _agents(self._v2).items() if found.store is None or host not in gone_over)

    # Agents

    def _settle(self, hosts: set[str], before: dict[str, Agent]) -> None:
        """Wait until no command writes any more, and all live agents have noticed that the data is frozen.

        They say so in v2, whichever API was in use. `hosts` are those that were alive before; what is in `before` was
        said before that. Raises CalicoError.
        """
        until = time.monotonic() + SETTLE

        def pending() -> list[str]:
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
        time.sleep(max(0.0, until - time.monotonic()))

    def _await_agents(self, api: str, hosts: set[str], before: dict[str, Agent]) -> list[str]:
        """Wait until the agents of some hosts use an API that is not frozen; return the hosts of those that do not.

        What is in `before` was said before that.
        """
        self._tell(f"Waiting for agents to use etcd's {api[-2:]} API")

        def pending() -> list[str]:
            new = _new(_agents(self._v2 if api == V2 else self._v3), before)
            return sorted(host for host in hosts if host not in new or new[host].is_frozen)

        return self._await(pending)

    @staticmethod
    def _await(pending: Callable[[], list[str]]) -> list[str]:
        """Wait until `pending` returns nothing, and for AGENTS_PATIENCE at most; return what it returned last."""
        give_up = time.monotonic() + AGENTS_PATIENCE
        while (left := pending()) and time.monotonic() < give_up:
            time.sleep(POLL)
        return left

    @staticmethod
    def _data(store: Store) -> dict[str, Entry]:
        return copied(store.list_for_watch(keys.ROOT)[0])


def _agents(store: Store) -> dict[str, Agent]:
    """Return the agents that are alive, as far as they report to this store."""
    hosts = {keys.felix_status(host): host for host in store.names(keys.FELIX_HOSTS)}
    found = read_all(store, list(hosts))
    return {
        hosts[key]: Agent(parse_agent_store(entry.value), entry.revision)
        for key, entry in found.items()
        if entry.expires
    }


def _new(agents: dict[str, Agent], before: dict[str, Agent]) -> dict[str, Agent]:
    """Return those agents that have written their status since `before` was read."""
    return {host: found for host, found in agents.items() if found != before.get(host)}


def _check_agents(agents: dict[str, Agent]) -> None:
    """Raise CalicoError if there is an agent that cannot follow the data to the other API."""
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
    """Return whether two reads of a store show that nothing was written in between, except the same values again."""
    return not difference(one, other) and all(one[key].created == other[key].created for key in one)


def _late(what: str) -> str:
    return f"Old programs have written to etcd's v2 API since it was frozen, and v3 does not have that: {what}"


def _both() -> CalicoError:
    return CalicoError(
        f"{keys.READY} is true in both APIs of etcd, so it is not known which data is right. End old programs; then "
        f"set it to false in the other one: 'ETCDCTL_API=2 etcdctl set {keys.READY} false' for v2, 'etcdctl put "
        f"{keys.READY} false' for v3."
    )


def _taken_over() -> StoreError:
    return StoreError(
        "Another 'calicoctl datastore migrate' has taken over, or another program has written to etcd's v3 API: see "
        "'calicoctl datastore show'"
    )
