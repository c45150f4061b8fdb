"""What all moves of the data between etcd's APIs share: the note, the ways to undo a step, and waiting for agents.

migration.py describes the steps, and says why a second process can take over.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Callable

from calicoctl.clock import now
from calicoctl.datastore import keys
from calicoctl.datastore.chosen import FRESH
from calicoctl.datastore.copy_plan import Difference, Entries, copied, difference, is_copied
from calicoctl.datastore.detection import check_ready, foreign
from calicoctl.datastore.migration_state import (
    COPIED,
    COPY_ALONE,
    ROLLING_BACK,
    Agent,
    State,
    check_agents,
    copied_in,
    live_agents,
    reported_since,
)
from calicoctl.datastore.settings import V2
from calicoctl.datastore.store import Create, Delete, Entry, Store, Update, Write, read_all
from calicoctl.errors import CalicoError, CompareFailed, KeyExists, NoSuchApi, StoreError
from calicoctl.output import first_few

SETTLE = FRESH + 1.0
"""Seconds after the freeze, until when a command that was started before the freeze may still write."""

AGENTS_PATIENCE = 45.0
"""Seconds to wait for all live agents to react. The status of an agent that has died expires earlier."""

POLL = 0.5
"""Seconds between two reads of the agents' statuses."""


class Run:
    """One run of a command that moves the data between the two APIs of one etcd: `v2` and `v3`."""

    def __init__(self, where: str, open: Callable[[], tuple[Store, Store]], tell: Callable[[str], None]) -> None:
        """`where` is the servers' URLs, for messages. `open` returns a new Store of v2, and one of v3.

        `tell` is called at the start of each step, with a text about the step, and as the copy proceeds. No request is
        sent.
        """
        self._where = where
        self._open = open
        self.tell = tell
        self.v2, self.v3 = open()
        self._id = secrets.token_hex(8)
        """Identifies this process in the note."""
        self.note: Entry | None = None
        """The note as this process has written it last; None if it has not."""
        self.is_live_sent = False
        """Whether this process may have sent the transaction that takes v3 into use."""

    def reopen(self) -> None:
        """Use new connections: an interrupted request may have spoilt the others."""
        self.v2, self.v3 = self._open()

    def state(self) -> State:
        """Read how far a move has come. Raises StoreError.

        Raises NoSuchApi if etcd does not serve v3. If etcd does not serve v2, the result's `v2` is None if the key
        Ready exists in v3, whatever its value; if it does not exist, NoSuchApi is raised.
        """
        ready, note, copied = self.v3.read([keys.READY, keys.UNUSED_COPY, keys.COPIED_REVISION])[0]
        try:
            return State(self.v2.get(keys.READY), ready, note, copied)
        except NoSuchApi:
            if ready is None:
                raise
            return State(None, ready, note, copied)

    def checked_state(self) -> State:
        """Read how far a move has come; raise CalicoError if the values of Ready do not tell which data is right.

        This is so as well if Ready is missing in v2, and v3 has a copy that is not in use.

        Raises NoSuchApi as `state` does.
        """
        state = self.state()
        if state.v3_ready == state.v2_ready == "true":
            state = self.state()  # the data may have moved back after v3 was read, and before v2 was
        check_ready(state.v3_ready, state.v2_ready)
        if state.v3_ready == state.v2_ready == "true":
            raise CalicoError(
                f"{keys.READY} is true in both APIs of etcd, so it is not known which data is right. End old programs; "
                f"then set it to false in the other one: 'ETCDCTL_API=2 etcdctl set {keys.READY} false' for v2, "
                f"'etcdctl put {keys.READY} false' for v3."
            )
        if state.is_copy_alone:
            raise CalicoError(COPY_ALONE)
        if state.is_finishing and state.v3_ready != "true":
            raise CalicoError(
                f"'calicoctl datastore migrate --finish' deletes what is in etcd's v2 API, but {keys.READY} is not "
                "true in v3: set it to true first, if the data there is complete"
            )
        return state

    def refuse_other_calico(self) -> None:
        """Raise CalicoError if v3 has data of Calico 3."""
        if self.v3.exists(keys.OTHER_CALICO):
            raise foreign(self._where)

    # The note

    def take_note(self, state: State, what: str) -> None:
        """Write `false` to v3's Ready, and the note, which then belongs to this process.

        `what` is what the note says: COPYING or ROLLING_BACK. If it is ROLLING_BACK, the field `copied` of the
        previous note is kept. Raises StoreError if one of these keys has changed since `state` was read.
        """
        revision = copied_in(state.note) if state.note is not None and what == ROLLING_BACK else None
        text = self.note_text(what) if revision is None else self.note_text(what, **{COPIED: revision})
        writes = [put(keys.UNUSED_COPY, state.note, text), put(keys.READY, state.v3, "false")]
        self.note = self.commit(writes)[0]

    def is_own(self, note: Entry | None) -> bool:
        """Return whether a note is this process's."""
        return note is not None and self._id in note.value

    def refuse_loss_of_note(self) -> None:
        """Raise StoreError if the note is not this process's, since another process has taken over."""
        if not self.is_own(self.v3.get(keys.UNUSED_COPY)):
            raise taken_over()

    def note_text(self, what: str, **more: str) -> str:
        """Return the value of a note that belongs to this process, and says `what`. `more` are additional fields."""
        return json.dumps({"state": what, "run": self._id, "time": now(), **more})

    def commit(self, writes: list[Write]) -> list[Entry]:
        """Apply writes to v3 in one transaction, and return their entries.

        Raises StoreError if one of the keys has changed: another process has taken over, or another program writes.
        """
        try:
            return self.v3.commit(writes)
        except (CompareFailed, KeyExists):
            raise taken_over() from None

    # Undoing a step

    def thaw_v2(self) -> None:
        """Set v2's Ready to `true`, if it is `false`. Raises StoreError if another process has taken over the note."""
        ready = self.v2.get(keys.READY)  # before the note: whoever takes that over then writes Ready
        self.refuse_loss_of_note()
        try:
            if ready is not None and ready.value == "false":
                self.v2.update(ready, "true")
        except CompareFailed:
            raise taken_over() from None

    def take_back_v3(self, state: State) -> None:
        """Undo the beginning of the way back: take v3 into use again, and restore keys.COPIED_REVISION.

        `state` has just been read, and its note has the value to restore. Raises StoreError if v2 is in use already, or
        if another process has taken over.
        """
        if state.v2 is None or state.v2_ready != "false" or state.note is None or not self.is_own(state.note):
            raise taken_over()
        writes = [put(keys.READY, state.v3, "true"), Delete(state.note)]
        revision = copied_in(state.note)
        if revision is not None:
            writes.append(put(keys.COPIED_REVISION, state.copied, revision))
        try:
            self.v2.update(state.v2, "false")  # so that nothing that is on its way sets it to true
        except CompareFailed:
            raise taken_over() from None
        self.commit(writes)

    @contextmanager
    def repeatable(self, version: str) -> Iterator[None]:
        """If the body of `with` raises a CalicoError, tell the user to repeat the command, and suppress the error.

        The body takes the API `version` ("v2" or "v3") into use again.
        """
        try:
            yield
        except CalicoError as error:
            self.tell(
                f"etcd's {version} API cannot be taken into use again now ({error}): repeat this command, or the "
                f"opposite one; see 'calicoctl datastore show'"
            )

    # The data

    def data(self, store: Store, known: Entries = MappingProxyType({})) -> dict[str, Entry]:
        """Return the entries of `store`, which is v2 or v3, that a move copies, by key. Raises CalicoError.

        `known` are entries that were read or written before: what is equal to them shares their memory.
        """

        def kept(entry: Entry) -> Entry | None:
            before = known.get(entry.key)
            if before is not None and before.value == entry.value:
                entry = before if before == entry else replace(entry, key=before.key, value=before.value)
            return entry if is_copied(entry) else None

        return copied(store.list_for_watch(keys.ROOT, kept)[0], "v2" if store is self.v2 else "v3")

    def written_late(self, state: State) -> str | None:
        """Return a clause that lists the keys of v2 that v3 does not have with the same value.

        Only keys that were written to v2 after it was frozen are listed; but all keys are listed if `state.frozen_at`
        is None. Returns None if there are no such keys, or if etcd does not serve v2. Keys that were deleted in v2
        cannot be found.
        """
        try:
            entries = self.data(self.v2)
        except NoSuchApi:
            return None
        since = state.frozen_at
        late = {key: entry for key, entry in entries.items() if since is None or entry.revision > since}
        missing = difference(late, read_all(self.v3, list(late)))
        if not missing:
            return None
        if since is None:
            return f"What is in etcd's v2 API was not moved by this command, and v3 does not have all of it: {missing}"
        return late_clause(missing)

    # Agents

    def settle(self, hosts: set[str], before: dict[str, Agent]) -> None:
        """Wait until no command writes any more, and all live agents have reported that the data is frozen.

        Agents report this in v2, whichever API was in use. `hosts` are the hosts whose agents were alive before the
        freeze. `before` are the agents' statuses in v2 from before the freeze; they do not count as reports.

        Raises CalicoError if an agent has not reported for AGENTS_PATIENCE, or cannot follow the data, or if another
        program sets Ready in v2 to `true`.
        """
        until = time.monotonic() + SETTLE

        def pending() -> list[str]:
            ready = self.v2.get(keys.READY)  # before the note: whoever takes that over then writes Ready
            self.refuse_loss_of_note()
            if ready is None or ready.value != "false":
                raise thawed()
            agents = live_agents(self.v2)
            check_agents(agents)
            alive = agents.keys() | (hosts & live_agents(self.v3).keys())
            new = reported_since(agents, before)
            return sorted(host for host in alive if host not in new or not new[host].is_frozen)

        left = self.wait_for_none("Waiting for commands and agents to notice", pending)
        if left:
            raise CalicoError(
                f"The agents of {first_few(left)} do not say that they have noticed that the data is frozen, within "
                f"{AGENTS_PATIENCE:.0f} s: see 'calicoctl status' there. Nothing has moved."
            )
        # writes that have begun before the freeze show in nothing that could be awaited
        time.sleep(max(0.0, until - time.monotonic()))

    def await_agents(self, api: str, hosts: set[str], before: dict[str, Agent]) -> list[str]:
        """Wait until the agents of `hosts` report that they use `api`, and that the data there is not frozen.

        After AGENTS_PATIENCE at most, return the hosts whose agents have not reported this. `before` are the agents'
        statuses in `api` from before `api` was taken into use; they do not count as reports. An agent whose status has
        expired in both APIs has died, and is not waited for.
        """

        def pending() -> list[str]:
            there, elsewhere = (live_agents(store) for store in (self.v2, self.v3)[:: 1 if api == V2 else -1])
            new, alive = reported_since(there, before), there.keys() | elsewhere.keys()
            return sorted(host for host in hosts & alive if host not in new or new[host].is_frozen)

        return self.wait_for_none(f"Waiting for agents to use etcd's {api[-2:]} API", pending)

    def wait_for_none(self, what: str, pending: Callable[[], list[str]]) -> list[str]:
        """Call `pending` again and again until it returns an empty list, or AGENTS_PATIENCE is over.

        Return the last result of `pending`: hosts whose agents are waited for. `what` is the step that is told, with
        these hosts.
        """
        self.tell(what)
        give_up = time.monotonic() + AGENTS_PATIENCE
        while (left := pending()) and time.monotonic() < give_up:
            self.tell(f"{what}: {first_few(left)}")
            time.sleep(POLL)  # a watch would have to follow two APIs, one of which may go meanwhile
        self.tell(what)
        return left


def put(key: str, entry: Entry | None, value: str) -> Write:
    """Return a write of `value` to `key`. `entry` is the key's current entry, None if the key does not exist."""
    return Create(key, value) if entry is None else Update(entry, value)


def late_clause(what: Difference) -> str:
    """Return a clause that says what old programs have written to v2 since it was frozen."""
    return f"Old programs have written to etcd's v2 API since it was frozen, and v3 does not have that: {what}"


def thawed() -> CalicoError:
    """Return the error for a Ready in v2 that another program has written while the data moves."""
    return CalicoError(
        f"Another program has written {keys.READY} in etcd's v2 API: perhaps a 'calicoctl node' of 2015, which sets it "
        "to true. End it, and repeat this"
    )


def written_since(what: str) -> CalicoError:
    """Return the error for a value of Ready that another command has written after `what`, a clause, was so."""
    return CalicoError(
        f"{what}, but another command has written {keys.READY} there since: see 'calicoctl datastore show'"
    )


def taken_over() -> StoreError:
    """Return the error for a note, or a value of Ready, that another process has changed."""
    return StoreError(
        "Another 'calicoctl datastore migrate' has taken over, or another program has written to etcd's v3 API: see "
        "'calicoctl datastore show'"
    )
