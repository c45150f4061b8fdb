"""Moves the data from etcd's v2 API to its v3 API, and says which steps all moves have; see also migration_after.py.

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

The steps of the way back (`roll_back` in migration_after.py) are:

| step | Ready in v2 | Ready in v3 | note | revision | API in use |
|---|---|---|---|---|---|
| v3 is frozen, in one transaction | false | false | rolling back | in the note | v2, frozen |
| v2 is taken into use | true | false | rolling back | in the note | v2 |

The steps of the end of v2 (`finish` in migration_after.py) are:

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

from collections.abc import Iterator
from contextlib import contextmanager

from calicoctl.datastore import copy_plan, keys
from calicoctl.datastore.copy_plan import difference
from calicoctl.datastore.migration_run import Run, late_clause, put, taken_over, thawed, written_since
from calicoctl.datastore.migration_state import COPYING, LEFT, ROLLING_BACK, Moved, State, check_agents, live_agents
from calicoctl.datastore.settings import TYPE, V3
from calicoctl.datastore.store import Delete, Entry, Update, Write
from calicoctl.errors import CalicoError, CompareFailed, NoSuchApi
from calicoctl.output import first_few

MOST_PARTS = 20
"""The maximum number of directories right below keys.ROOT where write access is checked before the freeze."""

ROUNDS = 10
"""The maximum number of times that the data is copied while old programs, which ignore the freeze, keep writing."""


def move(run: Run) -> Moved:
    """Move the data to v3, or continue an interrupted move.

    If the way back to v2 was interrupted, v3 is taken into use again instead. If v3 is in use already, nothing is
    changed, and the result's `problems` say what v2 has and v3 lacks, and which agents stay in v2.

    Raises CalicoError if the move fails. Then v2 is in use again, unless another process has taken over or etcd
    cannot be reached.
    """
    state = run.checked_state()
    run.refuse_other_calico()
    if state.v3_ready == "true":
        late = run.written_late(state)
        left = f" {state.left}" if state.left is not None else ""
        problems = (*(() if late is None else (late,)), *_staying(run))
        assert state.v3 is not None
        _refuse_change(run, state.v3)
        return Moved(f"The data is in etcd's v3 API already.{left}", problems)
    if state.v2 is None:
        raise CalicoError(f"There is no data to move: etcd's v2 API has no {keys.READY}.")
    if state.is_back and state.v2_ready == "false":
        run.take_note(state, ROLLING_BACK)
        run.take_back_v3(run.state())
        return Moved("The interrupted way back to v2 is undone: etcd's v3 API is in use again.")
    if state.note is None:
        _refuse_used_target(run, state)
    resumed = state.v2_ready == "false"
    if not resumed:
        _check_movable(run)
    run.take_note(state, COPYING)
    with _v2_in_use_on_failure(run):
        if resumed:
            _check_movable(run)
        return _moved(run, state.v2)


def _refuse_used_target(run: Run, state: State) -> None:
    """Raise CalicoError if v3 has data, or if Ready in v2 is not `true`.

    The caller has found no note. So if v3 has data, it is not from an interrupted move, and no interrupted move has
    frozen v2.
    """
    entries = run.v3.list_for_watch(keys.ROOT, lambda entry: entry if copy_plan.is_data(entry) else None)[0]
    found = sorted(entry.key for entry in entries)
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


def _check_movable(run: Run) -> None:
    """Raise CalicoError if an agent cannot follow the data, a key cannot be copied, or a permission is missing."""
    for store in (run.v2, run.v3):
        check_agents(live_agents(store))
    entries = run.data(run.v2)
    copy_plan.check_fits(entries)
    run.data(run.v3)
    run.v2.check_writable(keys.READY)
    # a role may be for a part of what is below keys.ROOT alone
    parts = {key.split("/")[2]: key for key in entries if key.startswith(keys.ROOT + "/")}
    written = [*list(parts.values())[:MOST_PARTS], keys.READY, keys.UNUSED_COPY, keys.COPIED_REVISION]
    run.v3.check_writable(*written)


def _moved(run: Run, ready: Entry) -> Moved:
    hosts = set(live_agents(run.v2))
    run.tell("Freezing etcd's v2 API")
    frozen = _rewritten(run, ready)
    run.settle(hosts, {})
    frozen, entries = _copied(run, frozen)
    before = live_agents(run.v3)
    live = _go_live(run, frozen.revision)
    return _followed(run, entries, live, run.await_agents(V3, hosts, before))


def _rewritten(run: Run, ready: Entry) -> Entry:
    """Write `false` to v2's Ready, even if its value is `false` already. Return the new entry.

    Keys of v2 that have a higher revision than this entry were written later. `ready` is the current entry. Raises
    CalicoError if another program has written Ready since `ready` was read.
    """
    try:
        return run.v2.update(ready, "false")
    except CompareFailed:
        run.refuse_loss_of_note()
        raise thawed() from None


def _copied(run: Run, ready: Entry) -> tuple[Entry, dict[str, Entry]]:
    """Copy the data in v2 to v3, and compare both. Return the entry of Ready in v2, and the copied entries by key.

    Ready in v2 is rewritten before each copy; the entry of the last time is returned. The copy is repeated while
    old programs write to v2: the data is copied ROUNDS times at most.

    Raises CalicoError if old programs keep writing to v2, if another program writes to v3, if another process takes
    over, or if the data cannot be copied.
    """
    run.tell("Copying")
    target = run.data(run.v3)
    before: dict[str, Entry] = {}
    for _ in range(ROUNDS):
        ready = _rewritten(run, ready)
        source = run.data(run.v2, before or target)
        copy_plan.check_fits(source)
        done = 0
        for commit in copy_plan.plan(source, before, target):
            for write, entry in zip(commit, _commit(run, commit)):
                if isinstance(write, Delete):
                    del target[write.key]
                else:
                    target[write.key] = entry
                    done += 1
            run.tell(f"Copying: {done} of {len(source)} keys" if done else "Removing an earlier copy")
        run.tell(f"Comparing {len(source)} keys")
        wrong = difference(run.data(run.v3, target), source)
        if wrong:
            raise CalicoError(f"Another program writes to etcd's v3 API below {keys.ROOT}: {wrong}")
        before, now_there = source, run.data(run.v2, source)
        agents = live_agents(run.v2)  # some may have been started just now
        check_agents(agents)
        if not all(one.is_frozen for one in agents.values()):
            run.settle(set(), {})
        elif _same(before, now_there):
            return ready, before
    raise CalicoError(
        f"Old programs keep writing to etcd's v2 API ({difference(now_there, before)}): end them, and repeat this."
    )


def _commit(run: Run, writes: list[Write]) -> list[Entry]:
    """Apply writes to v3, and rewrite the note, in one transaction. Return the entries of the writes.

    Raises StoreError if another process has taken over the note, or if another program has changed one of the keys.
    """
    assert run.note is not None
    run.note, *entries = run.commit([Update(run.note, run.note.value), *writes])
    return entries


def _go_live(run: Run, revision: int) -> Entry:
    """Take v3 into use, and record that v2 was frozen at `revision`. Return the entry of Ready in v3.

    Raises StoreError if another process has taken over. If etcd's answer to the commit is lost, Store.commit finds
    out whether the commit was applied.
    """
    run.tell("Taking etcd's v3 API into use")
    assert run.note is not None
    ready, copied = run.v3.read([keys.READY, keys.COPIED_REVISION])[0]
    if ready is not None and ready.value == "true":
        raise taken_over()
    live = put(keys.READY, ready, "true")
    run.is_live_sent = True
    return run.commit([live, put(keys.COPIED_REVISION, copied, str(revision)), Delete(run.note)])[0]


@contextmanager
def _v2_in_use_on_failure(run: Run) -> Iterator[None]:
    """Take v2 into use again if the body of `with` fails, or is interrupted, before v3 is in use."""
    try:
        yield
    except BaseException:
        with run.repeatable("v2"):
            if _fenced(run):
                run.thaw_v2()
                run.tell("etcd's v2 API is in use again")
        raise


def _fenced(run: Run) -> bool:
    """Make sure that no earlier request of this process can take v3 into use any more.

    Return True if that is sure. Return False if v3 is in use already, or if another process has taken over the
    note.

    etcd may receive such a request late. The request fails if the note has changed since it was sent, so the note
    is rewritten. If no such request was sent, the note is not rewritten, since etcd may have no space left.
    """
    run.reopen()
    note = run.v3.get(keys.UNUSED_COPY)
    if note is None or not run.is_own(note):
        return False
    try:
        if run.is_live_sent:
            run.v3.update(note, note.value)
    except CompareFailed:
        return False
    return True


def _followed(run: Run, entries: dict[str, Entry], live: Entry, missing: list[str]) -> Moved:
    """Check v2 and v3 once more after a move, and return the result of the move.

    `entries` were copied. `live` is the entry of Ready in v3. `missing` are the hosts whose agents do not use v3 yet.
    If an old program has set v2's Ready to `true`, it is set to `false` again. This, `missing`, and keys of v2 that
    differ from `entries` are `problems` of the result. Raises CalicoError if Ready in v3 was written since.
    """
    problems = []
    ready = run.v2.get(keys.READY)  # before v3's: while both are true, no command sets v3's to false
    _refuse_change(run, live)
    if ready is not None and ready.value == "true":
        try:
            run.v2.update(ready, "false")
        except CompareFailed:
            raise taken_over() from None
        problems.append(
            f"An old program has set {keys.READY} to true in etcd's v2 API, as a 'calicoctl node' of 2015 does. It "
            "is false again; end that program"
        )
    late = difference(run.data(run.v2, entries), entries)
    if late:
        problems.append(late_clause(late))
    problems.extend(_staying(run))
    if missing:
        problems.append(
            f"The agents of {first_few(missing)} are not seen in etcd's v3 API yet: see 'calicoctl status' there"
        )
    _refuse_change(run, live)  # else, this process may have been stopped: what it has read is of another time
    return Moved(f"{len(entries)} keys have moved: etcd's v3 API is in use. {LEFT}", tuple(problems))


def _refuse_change(run: Run, live: Entry) -> None:
    """Raise CalicoError if Ready in v3 was written since its entry `live`: the data may have moved again."""
    ready = run.v3.get(keys.READY)
    if ready is None or ready.revision != live.revision:
        raise written_since("The data had moved to etcd's v3 API")


def _staying(run: Run) -> list[str]:
    """Return a list with one problem, a clause, if v2 has agents that cannot follow the data; else an empty list."""
    try:
        agents = live_agents(run.v2)
    except NoSuchApi:
        return []
    hosts = sorted(host for host, found in agents.items() if not found.can_follow)
    if not hosts:
        return []
    return [
        f"The agents of {first_few(hosts)} stay in etcd's v2 API, since {TYPE} is in their environment, or they "
        "are of an older version: end them, and start them again without it"
    ]


def _same(one: copy_plan.Entries, other: copy_plan.Entries) -> bool:
    """Return whether two reads of a store return the same keys, values and order of creation."""
    return not difference(one, other) and all(one[key].created == other[key].created for key in one)
