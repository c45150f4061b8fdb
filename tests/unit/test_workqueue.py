"""The work queue: one item per key, delays, backoff, and limited numbers of workers. The tests pass the time in."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import Any

import pytest

from calicoctl.felix.workqueue import WorkerPool, WorkQueue


def group_of(key: str) -> str:
    return key.partition("/")[0]


@pytest.fixture
def queue() -> WorkQueue[str]:
    return WorkQueue({"a": 2, "b": 1}, group_of)


def test_a_key_is_due_once_at_the_earliest_of_its_times(queue: WorkQueue[str]) -> None:
    queue.add("a/1", 5.0)
    queue.add("a/1", 3.0)
    queue.add("a/1", 9.0)
    assert queue.next_due() == 3.0
    assert queue.take(2.9) == []
    assert queue.take(3.0) == ["a/1"]
    assert "a/1" not in queue
    queue.done("a/1")
    assert queue.take(100.0) == []


def test_a_key_in_progress_is_not_handed_out_again_before_it_is_done(queue: WorkQueue[str]) -> None:
    queue.add("a/1", 0.0)
    assert queue.take(0.0) == ["a/1"]
    queue.add("a/1", 1.0)
    assert queue.is_in_progress("a/1")
    assert "a/1" in queue
    assert queue.take(2.0) == []
    assert queue.next_due() == float("inf"), "there is nothing to wake up for"
    queue.done("a/1")
    assert queue.next_due() == 1.0
    assert queue.take(2.0) == ["a/1"]


def test_each_group_has_its_own_number_of_workers(queue: WorkQueue[str]) -> None:
    for key in ("a/1", "b/1", "a/2", "a/3", "b/2"):
        queue.add(key, 0.0)
    assert queue.take(0.0) == ["a/1", "b/1", "a/2"]
    assert queue.take(0.0) == []
    queue.done("a/2")
    assert queue.take(0.0) == ["a/3"]
    queue.done("b/1")
    assert queue.take(0.0) == ["b/2"]
    for key in ("a/1", "a/3", "b/2"):
        assert queue.is_busy
        queue.done(key)
    assert not queue.is_busy


def test_a_key_in_backoff_waits_unless_something_new_asks_for_it(queue: WorkQueue[str]) -> None:
    queue.back_off("a/1", 10.0)
    queue.add_after_backoff("a/1", 1.0)
    assert queue.next_due() == 10.0
    queue.add("a/1", 2.0)
    assert queue.take(2.0) == ["a/1"]


def test_done_resets_the_backoff(queue: WorkQueue[str]) -> None:
    queue.back_off("a/1", 10.0)
    assert queue.take(10.0) == ["a/1"]
    queue.done("a/1")
    queue.add_after_backoff("a/1", 1.0)
    assert queue.take(1.0) == ["a/1"]


def test_a_backoff_can_be_reset(queue: WorkQueue[str]) -> None:
    queue.back_off("a/1", 10.0)
    queue.reset_backoff("a/1")
    queue.add_after_backoff("a/1", 1.0)
    assert queue.next_due() == 1.0


def test_keys_that_failed_do_not_keep_others_waiting(queue: WorkQueue[str]) -> None:
    queue.back_off("b/failed", 1.0)
    queue.add("b/new", 2.0)
    assert queue.take(3.0) == ["b/new"]
    queue.done("b/new")
    assert queue.take(3.0) == ["b/failed"]


def test_keys_added_as_last_come_after_those_that_failed_unless_they_were_added_otherwise(
    queue: WorkQueue[str],
) -> None:
    queue.add("a/1", 1.0, last=True)
    queue.add("a/2", 1.0, last=True)
    queue.add("a/2", 3.0)
    queue.add("a/2", 3.0, last=True)
    queue.back_off("a/3", 2.0)
    assert queue.take(3.0) == ["a/2", "a/3"]
    queue.done("a/2")
    queue.add("a/2", 4.0)
    assert queue.take(4.0) == ["a/2"]


def test_all_keys_of_a_group_in_backoff_can_be_retried_at_once(queue: WorkQueue[str]) -> None:
    queue.back_off("a/1", 10.0)
    queue.back_off("b/1", 10.0)
    queue.add("a/2", 20.0)
    queue.retry_now("a", 5.0)
    assert queue.take(5.0) == ["a/1"]
    assert queue.next_due() == 10.0


def test_a_paused_group_hands_out_nothing(queue: WorkQueue[str]) -> None:
    queue.pause("a")
    queue.add("a/1", 0.0)
    queue.add("b/1", 1.0)
    assert (queue.is_paused("a"), queue.is_paused("b")) == (True, False)
    assert queue.next_due() == 1.0
    assert queue.take(1.0) == ["b/1"]
    queue.resume("a")
    assert queue.take(1.0) == ["a/1"]


def test_the_workers_of_a_group_run_tasks_in_parallel_each_with_a_resource_of_its_own() -> None:
    results: SimpleQueue[Any] = SimpleQueue()
    resources = iter(range(10))
    pool: WorkerPool[int] = WorkerPool({"a": 2, "b": 1}, lambda: next(resources), results.put)
    both = threading.Barrier(2)

    def meet(resource: int) -> tuple[str, int]:
        both.wait(10)  # which one worker alone would never leave
        return "a", resource

    pool.submit("a", meet)
    pool.submit("a", meet)
    pool.submit("b", lambda resource: ("b", resource))
    pool.start()
    assert sorted(results.get(timeout=10) for _ in range(3)) == [("a", 0), ("a", 1), ("b", 2)]


def test_a_group_whose_workers_hang_does_not_hold_up_another() -> None:
    results: SimpleQueue[Any] = SimpleQueue()
    release = threading.Event()
    pool: WorkerPool[None] = WorkerPool({"a": 1, "b": 1}, lambda: None, results.put)
    pool.start()
    pool.submit("a", lambda _: (release.wait(10), "a")[1])
    pool.submit("b", lambda _: "b")
    assert results.get(timeout=10) == "b"
    release.set()
    assert results.get(timeout=10) == "a"
