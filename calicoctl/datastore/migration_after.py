"""What may follow a move of the data to etcd's v3 API: the way back to v2, and the end of v2. See migration.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from calicoctl.datastore import keys
from calicoctl.datastore.copy_plan import difference, is_copied
from calicoctl.datastore.migration_run import Run, put, written_since
from calicoctl.datastore.migration_state import (
    COPIED,
    COPYING,
    DELETING,
    FINISHING,
    ROLLING_BACK,
    Agent,
    Moved,
    State,
    check_agents,
    live_agents,
)
from calicoctl.datastore.settings import V2
from calicoctl.datastore.store import Create, Delete, Entry, Update, Write
from calicoctl.errors import CalicoError, CompareFailed, NoSuchApi
from calicoctl.output import first_few

# The way back


def roll_back(run: Run, discard: bool) -> Moved:
    """Take v2 into use again, or undo an interrupted move to v3. What was written to v3 since the move is lost.

    Raises CalicoError if this fails, or if something would be lost and `discard` is false. Then v3 is in use again
    if it was in use before, unless another process has taken over or etcd cannot be reached.
    """
    state, before = run.checked_state(), dict[str, Agent]()
    if state.v2 is None:
        raise CalicoError("There is no data to go back to: etcd's v2 API has none.")
    if state.is_finishing:
        raise CalicoError(f"There is no way back to etcd's v2 API. {DELETING}")
    if state.v3_ready == "true":
        check_agents(live_agents(run.v3))
        _refuse_loss(run, discard, state.frozen_at)
        before = live_agents(run.v2)
    elif state.v2_ready == "true":
        return Moved("etcd's v2 API is in use.")
    elif state.note is None:
        raise CalicoError(
            f"etcd's v2 API is frozen ({keys.READY} is {state.v2_ready}), and not by this command: set it to true, "
            "if the data is complete"
        )
    elif not state.is_back:
        run.take_note(state, COPYING)
        run.thaw_v2()
        return Moved("The interrupted move is undone: etcd's v2 API is in use again.")
    with _v3_in_use_on_failure(run):
        if state.v3_ready == "true":
            _freeze_v3(run, state)
        else:
            run.take_note(state, ROLLING_BACK)
        run.settle(set(live_agents(run.v3)), before)
        _refuse_loss(run, discard, state.frozen_at)
        run.tell("Taking etcd's v2 API into use")
        run.thaw_v2()
    missing = run.await_agents(V2, set(live_agents(run.v2)), {})
    ready = run.v2.get(keys.READY)  # this process may have been stopped since
    if ready is None or ready.value != "true":
        raise written_since("etcd's v2 API was in use again")
    problem = f"The agents of {first_few(missing)} still wait: see 'calicoctl status' there"
    return Moved("etcd's v2 API is in use again.", (problem,) if missing else ())


def _refuse_loss(run: Run, discard: bool, since: int | None) -> None:
    """Raise CalicoError if v3 has data that v2 lacks, or lacks data that was in v2 when it was frozen.

    `since` is the revision at which v2 was frozen, None if it is not known. What old programs have created in v2 later
    is not lost. Raises nothing if `discard` is true.
    """
    theirs = keys.OTHER_CALICO + "/"

    def written(entry: Entry) -> Entry | None:  # those that cannot be read are lost as well
        return entry if is_copied(entry) and not entry.key.startswith(theirs) else None

    ours = {entry.key: entry for entry in run.v3.list_for_watch(keys.ROOT, written)[0]}
    entries = run.data(run.v2, ours).items()
    there = {key: entry for key, entry in entries if key in ours or since is None or entry.revision <= since}
    lost = difference(ours, there)
    if lost and not discard:
        raise CalicoError(
            f"What was written to etcd's v3 API since the data has moved would be lost: {lost}. Nothing is "
            "changed; with --discard, it is lost"
        )


def _freeze_v3(run: Run, state: State) -> None:
    run.tell("Freezing etcd's v3 API")
    assert state.v3 is not None
    ready = Update(state.v3, "false")
    if state.copied is None:
        writes: list[Write] = [ready, Create(keys.UNUSED_COPY, run.note_text(ROLLING_BACK))]
    else:  # the note keeps the revision, in case that v3 is taken into use again
        note = run.note_text(ROLLING_BACK, **{COPIED: state.copied.value})
        writes = [ready, Create(keys.UNUSED_COPY, note), Delete(state.copied)]
    run.commit(writes)


@contextmanager
def _v3_in_use_on_failure(run: Run) -> Iterator[None]:
    """Take v3 into use again if the body of `with` fails, or is interrupted, before v2 is in use."""
    try:
        yield
    except BaseException:
        with run.repeatable("v3"):
            run.reopen()
            state = run.state()
            if state.v2_ready == "false" and run.is_own(state.note):
                run.take_back_v3(state)
                run.tell("etcd's v3 API is in use again")
        raise


# The end of v2


def finish(run: Run, discard: bool) -> Moved:
    """Delete the data in v2. Raises CalicoError, and deletes nothing, in these cases among others:

    * v3 is not in use, or Ready is `true` in v2, too.
    * An agent still uses v2.
    * v2 has data that v3 lacks (see Run.written_late), and `discard` is false.

    If the deletion fails after it has begun, there is no way back to v2.
    """
    state = _live_state(run)
    try:
        if state.v2 is None and not run.v2.exists(keys.ROOT):
            run.v2.remove_tree(keys.ROOT)  # directories may be left
            _forget(run, state)
            return Moved("etcd's v2 API has no data.")
    except NoSuchApi:
        return Moved("etcd does not serve its v2 API any more.")
    left = run.wait_for_none("Waiting for agents to leave etcd's v2 API", lambda: _left_in_v2(run))
    if left:
        raise CalicoError(f"The agents of {first_few(left)} use etcd's v2 API: end them first. Nothing is deleted.")
    state = _live_state(run)  # the wait may have been long
    late = run.written_late(state)
    if late is not None and not discard:
        raise CalicoError(f"{late}. Nothing is deleted; with --discard, it is")
    count = len(run.v2.tree(keys.ROOT))
    run.v2.check_writable(keys.READY)
    _close_way_back(run, state)
    run.tell(f"Deleting {count} keys")
    run.v2.remove_tree(keys.ROOT)
    _forget(run, run.state())
    return Moved(f"{count} keys are deleted from etcd's v2 API.")


def _live_state(run: Run) -> State:
    """Read how far a move has come. Raise CalicoError if v3 is not in use or has data of Calico 3, among others."""
    state = run.checked_state()
    run.refuse_other_calico()
    if state.v3_ready != "true":
        raise CalicoError("The data has not moved to etcd's v3 API: nothing is deleted.")
    return state


def _close_way_back(run: Run, state: State) -> None:
    """Write the note "finishing", so that no process takes v2 into use again.

    Raises StoreError if Ready in v3 or the note has changed since `state` was read: another process may be about to
    take v2 into use.
    """
    assert state.v3 is not None
    note = put(keys.UNUSED_COPY, state.note, run.note_text(FINISHING))
    run.commit([Update(state.v3, "true"), note])


def _forget(run: Run, state: State) -> None:
    left = [entry for entry in (state.note, state.copied) if entry is not None]
    if left:
        with suppress(CompareFailed):  # another process has deleted it
            run.v3.commit([Delete(entry) for entry in left])


def _left_in_v2(run: Run) -> list[str]:
    """Return, sorted, the hosts whose agents use v2.

    These agents have a status in v2, but none in v3. An agent with a status in both uses v3: its last status in v2
    has not expired yet. But the host is always returned if the status in v2 says that DATASTORE_TYPE makes the
    agent use v2, or if it does not say how the agent uses the store: then the agent is of an older version that
    knows only v2.
    """
    gone_over = live_agents(run.v3).keys()
    return sorted(host for host, found in live_agents(run.v2).items() if not found.can_follow or host not in gone_over)
