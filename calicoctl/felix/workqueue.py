"""A queue of keys to process, each with the time at which it is due, and the worker threads that process them.

The queue decides which keys are processed next, and how many keys of a group are processed at a time. The caller
decides how long to wait before a failed key is processed again. Like the workqueue of Kubernetes' client-go, the queue
never gives one key to two workers at once.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Hashable, Mapping
from queue import SimpleQueue
from typing import Any, Callable, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")


class WorkQueue(Generic[K]):
    """Keys to process, each with the time at which it is due. Not thread-safe.

    A key waits from the time it is added until `take` returns it. Then it is in progress until `done` is called. It may
    be added again while it is in progress.

    `back_off` marks a key as failed, and sets the time at which the key's backoff ends. The mark and the backoff stay
    until `done` or `reset_backoff` is called. Only `add_after_backoff` respects the backoff.

    Each key belongs to a group, and each group has a number of workers: at most that many keys of the group are in
    progress. Times are seconds of any monotonic clock, which the caller reads.
    """

    def __init__(self, workers: Mapping[str, int], group_of: Callable[[K], str]) -> None:
        """`workers` is the number of workers of each group; `group_of` returns the group of a key."""
        self._workers = workers
        self._group_of = group_of
        self._due: dict[K, float] = {}
        self._backoff: dict[K, float] = {}
        """Keys that failed at their last attempt, and when to retry each."""
        self._last: set[K] = set()
        """Keys that `take` returns after all others, failed ones included."""
        self._in_progress: set[K] = set()
        self._paused: set[str] = set()

    def __contains__(self, key: K) -> bool:
        """Return whether a key waits; True for a key in progress only if it was added again meanwhile."""
        return key in self._due

    @property
    def is_busy(self) -> bool:
        """Whether any key is in progress."""
        return bool(self._in_progress)

    def is_in_progress(self, key: K) -> bool:
        return key in self._in_progress

    def add(self, key: K, at: float, last: bool = False) -> None:
        """Add a key that is due at the time `at`, even if its backoff ends later.

        If the key already waits, the earlier of its two due times counts. `take` returns a key that was added with
        `last` after all other keys. A key that is added several times while it waits counts as added with `last` only
        if each of these calls had `last`.
        """
        if not last:
            self._last.discard(key)
        elif key not in self._due:
            self._last.add(key)
        self._due[key] = min(at, self._due.get(key, at))

    def add_after_backoff(self, key: K, at: float, last: bool = False) -> None:
        """Add a key that is due at the time `at`, or at the end of the key's backoff if that is later.

        If the key already waits, the earlier due time counts. With `last`, it is taken after all others (see `add`).
        """
        self.add(key, max(at, self._backoff.get(key, at)), last)

    def back_off(self, key: K, until: float, last: bool = False) -> None:
        """Mark a key as failed, with a backoff that ends at the time `until`, and add the key as due at that time.

        If the key already waits, the earlier due time counts. With `last`, it is taken after all others (see `add`).
        """
        self._backoff[key] = until
        self.add(key, until, last)

    def reset_backoff(self, key: K) -> None:
        """Remove the mark as failed, and so the backoff, from a key. The key's due time does not change."""
        self._backoff.pop(key, None)

    def retry_now(self, group: str, now: float) -> None:
        """Make each waiting key of a group that is marked as failed due at the time `now`. The marks stay."""
        for key in self._due:
            if key in self._backoff and self._group_of(key) == group:
                self._due[key] = now

    def pause(self, group: str) -> None:
        """Make `take` return no keys of a group until `resume` is called. Keys in progress stay in progress."""
        self._paused.add(group)

    def resume(self, group: str) -> None:
        self._paused.discard(group)

    def is_paused(self, group: str) -> bool:
        return group in self._paused

    def next_due(self) -> float:
        """Return the earliest time at which a key that can be taken is due; infinity if no key can be taken.

        A key can be taken if it is not in progress, and if its group has a free worker and is not paused.
        """
        free = self._free()
        return min((at for key, at in self._due.items() if self._can_be_taken(key, free)), default=float("inf"))

    def take(self, now: float) -> list[K]:
        """Return the keys that are due at the time `now` and can be taken (see `next_due`); they are then in progress.

        At most as many keys of a group are returned as the group has free workers. Keys that are marked as failed come
        after keys that are not, and keys that were added with `last` come at the end. Apart from that, the keys that
        have been due for longest come first.
        """
        taken: list[K] = []
        free = self._free()
        # many keys may wait, and few of them can be taken
        found = [key for key, at in self._due.items() if at <= now and self._can_be_taken(key, free)]
        for key in sorted(found, key=lambda key: (key in self._last, key in self._backoff, self._due[key])):
            if self._can_be_taken(key, free):
                free[self._group_of(key)] -= 1
                del self._due[key]
                self._last.discard(key)
                self._in_progress.add(key)
                taken.append(key)
        return taken

    def done(self, key: K) -> None:
        """Note that a key is no longer in progress: a worker of its group is free again.

        Removes the key's mark as failed. If the processing has failed, the caller must call `back_off` afterwards.
        """
        self._in_progress.discard(key)
        self._backoff.pop(key, None)

    def _free(self) -> dict[str, int]:
        """Return the number of free workers by group; 0 for a paused group."""
        busy = Counter(self._group_of(key) for key in self._in_progress)
        return {group: 0 if group in self._paused else count - busy[group] for group, count in self._workers.items()}

    def _can_be_taken(self, key: K, free: Mapping[str, int]) -> bool:
        return free[self._group_of(key)] > 0 and key not in self._in_progress


class Worker(threading.Thread, Generic[R]):
    """A thread that takes tasks from a queue, calls each task with `resource`, and calls `report` with its result."""

    def __init__(
        self, name: str, tasks: SimpleQueue[Callable[[R], Any]], resource: R, report: Callable[[Any], None]
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._tasks = tasks
        self._resource = resource
        self._report = report

    def run(self) -> None:
        while True:
            self._report(self._tasks.get()(self._resource))


class WorkerPool(Generic[R]):
    """The workers of all groups. A task must not raise an exception, which would end the worker that runs it."""

    def __init__(self, workers: Mapping[str, int], resource: Callable[[], R], report: Callable[[Any], None]) -> None:
        """`workers` is the number of workers of each group.

        `resource` is called once for each worker; it returns the object that the worker passes to its tasks, such as a
        client of the store. `report` is called with the result of each task, in the worker's thread.
        """
        self._tasks: dict[str, SimpleQueue[Callable[[R], Any]]] = {group: SimpleQueue() for group in workers}
        self._workers = [
            Worker(f"{group} worker {number}", self._tasks[group], resource(), report)
            for group, count in workers.items()
            for number in range(count)
        ]

    def start(self) -> None:
        for worker in self._workers:
            worker.start()

    def submit(self, group: str, task: Callable[[R], Any]) -> None:
        """Put a task into a group's queue. A worker calls it, with its resource, after the tasks submitted before."""
        self._tasks[group].put(task)
