"""The changes of the store that wait for the agent's loop."""

from __future__ import annotations

import random
import threading
from queue import SimpleQueue
from typing import Any

import pytest

from calicoctl.datastore.store import Change, Entry
from calicoctl.felix import pending
from calicoctl.felix.events import StoreChanged, StorePending, StoreRead
from calicoctl.felix.pending import PendingChanges

ROOT = "/calico/v1"


class Waiting:
    """Pending changes, and the queue of the loop that takes them."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[StorePending] = SimpleQueue()
        self.pending = PendingChanges(ROOT, self.queue.put)

    def take(self) -> list[Any]:
        """Handle the events that are in the queue."""
        found: list[Any] = []
        while not self.queue.empty():
            found += self.queue.get().take()
        return [event.change if isinstance(event, StoreChanged) else event for event in found]


def put(key: str, value: str = "") -> Change:
    return Change(f"{ROOT}/{key}", Entry(f"{ROOT}/{key}", value, 1))


def deleted(key: str, alone: bool = False) -> Change:
    return Change(f"{ROOT}/{key}", None, alone)


def apply(state: dict[str, str], event: Any) -> None:
    """Apply a change, or a read, as Snapshot does."""
    if isinstance(event, StoreRead):
        state.clear()
        state.update({entry.key: entry.value for entry in event.entries})
    elif event.entry is not None:
        state[event.key] = event.entry.value
    elif state.pop(event.key, None) is None and not event.alone:
        for key in [key for key in state if key.startswith(event.key + "/")]:
            del state[key]


def random_change(state: dict[str, str], generator: random.Random, value: str) -> Change | None:
    """Return a change that a store with directories can have in this state, or None."""
    key = "/".join(generator.choice("ab") for _ in range(generator.randint(1, 4)))
    path = f"{ROOT}/{key}"
    is_directory = any(other.startswith(path + "/") for other in state)
    if generator.random() < 0.4:
        is_leaf = path in state
        return deleted(key, is_leaf and generator.random() < 0.5) if is_leaf or is_directory else None
    in_leaf = any(path.startswith(other + "/") for other in state)
    return None if is_directory or in_leaf else put(key, value)


@pytest.mark.parametrize("seed", range(300))
def test_what_is_taken_leads_to_the_state_to_which_all_changes_lead(seed: int) -> None:
    generator = random.Random(seed)
    waiting = Waiting()
    store: dict[str, str] = {}
    agent: dict[str, str] = {}
    for number in range(200):
        change = random_change(store, generator, str(number))
        if change is not None:
            apply(store, change)
            waiting.pending.put([change])
        if generator.random() < 0.02:
            waiting.pending.put_read([Entry(key, value, 1) for key, value in store.items()])
        if generator.random() < 0.05:
            for event in waiting.take():
                apply(agent, event)
            assert agent == store
    taken = waiting.take()
    for event in taken:
        apply(agent, event)
    assert agent == store


def test_only_the_last_change_of_each_key_waits_in_one_event() -> None:
    waiting = Waiting()
    for number in range(1000):
        waiting.pending.put([put("a", str(number)), put("b", str(number))])
    assert waiting.queue.qsize() == 1
    assert waiting.take() == [put("a", "999"), put("b", "999")]
    assert waiting.take() == []
    waiting.pending.put([put("a", "1000")])
    assert waiting.take() == [put("a", "1000")]


def test_what_was_written_before_a_directory_was_deleted_does_not_wait_and_what_was_written_after_it_does() -> None:
    waiting = Waiting()
    waiting.pending.put([put("d/x"), put("d/e/x"), put("dx"), deleted("d"), put("d/y"), deleted("z"), put("z")])
    assert waiting.take() == [put("dx"), deleted("d"), put("d/y"), deleted("z"), put("z")]
    waiting.pending.put([put("z"), deleted("z"), put("y"), deleted("y", alone=True)])
    assert waiting.take() == [deleted("z"), deleted("y", alone=True)]


def test_a_read_replaces_what_waits_and_comes_after_what_was_emitted_before_it() -> None:
    waiting = Waiting()
    read = [Entry(f"{ROOT}/a", "2", 2)]
    waiting.pending.put([put("a", "1"), put("b")])
    waiting.pending.put_read([])
    waiting.pending.put_read(read)
    waiting.pending.put([put("c")])
    assert waiting.queue.qsize() == 3
    assert waiting.queue.get().take() == [] == waiting.queue.get().take()
    assert waiting.take() == [StoreRead(ROOT, read), put("c")]


@pytest.mark.parametrize("bound", ["MOST_KEYS", "MOST_CHARACTERS"])
def test_the_source_waits_while_too_much_waits_to_be_taken(monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    monkeypatch.setattr(pending, bound, 2 if bound == "MOST_KEYS" else 2 * len(f"{ROOT}/a1"))
    waiting = Waiting()

    def source() -> None:
        waiting.pending.put([put("a", "1")])
        waiting.pending.put([put("a", "2")])  # in place of the one before
        waiting.pending.put([put("b", "1"), put("c", "1")])  # at once, although they exceed the bound together
        added.set()
        waiting.pending.put([put("d", "1")])

    added = threading.Event()
    blocked = threading.Thread(target=source, daemon=True)
    blocked.start()
    assert added.wait(10)
    blocked.join(0.1)
    assert blocked.is_alive()
    assert waiting.take()[:3] == [put("a", "2"), put("b", "1"), put("c", "1")]
    blocked.join(10)
    assert not blocked.is_alive()
    assert waiting.take() == [put("d", "1")]
