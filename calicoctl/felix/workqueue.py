"""A work queue with one item per key, with delays and backoff, and the worker threads that process its items.

The queue decides which item is due, and how many items of a group are processed at a time. The caller decides how long
to back off. Like the workqueue of Kubernetes' client-go, the queue never passes one key to two workers at once.
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
    """Keys to process, and when each is due. Not thread-safe.

    Times are seconds of any monotonic clock; the caller always passes them in. Each key belongs to a group, and each
    group has a number of workers.
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
        """Return whether a key waits to be processed. A key in progress counts only if it was added again meanwhile."""
        return key in self._due

    @property
    def is_busy(self) -> bool:
        """Whether any key is in progress."""
        return bool(self._in_progress)

    def is_in_progress(self, key: K) -> bool:
        return key in self._in_progress

    def add(self, key: K, at: float, last: bool = False) -> None:
        """Make a key due at the time `at`, even during its backoff. An earlier due time of the key stays.

        With `last`, `take` returns the key after all others, unless the key already waits without `last`.
        """
        if not last:
            self._last.discard(key)
        elif key not in self._due:
            self._last.add(key)
        self._due[key] = min(at, self._due.get(key, at))

    def add_after_backoff(self, key: K, at: float, last: bool = False) -> None:
        """Make a key due at the time `at`, or at the end of its backoff if that is later.

        An earlier due time of the key stays. For `last`, see `add`.
        """
        self.add(key, max(at, self._backoff.get(key, at)), last)

    def back_off(self, key: K, until: float, last: bool = False) -> None:
        """Mark a key as failed, and make it due at the time `until`. An earlier due time of the key stays.

        `take` returns failed keys after the others. For `last`, see `add`.
        """
        self._backoff[key] = until
        self.add(key, until, last)

    def reset_backoff(self, key: K) -> None:
        """Clear the failure mark of a key. The time at which the key is due does not change."""
        self._backoff.pop(key, None)

    def retry_now(self, group: str, now: float) -> None:
        """Make a group's failed keys that wait due at the time `now`. They stay marked as failed."""
        for key in self._due:
            if key in self._backoff and self._group_of(key) == group:
                self._due[key] = now

    def pause(self, group: str) -> None:
        """Make `take` return no keys of a group until `resume` is called. Keys in progress are not affected."""
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
        """Return the keys that are due and can be taken (see `next_due`), and mark them as in progress.

        Failed keys come after the others, and keys that were added as `last` after these.
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
        """Note that the processing of a key has ended. This frees its worker, and clears its failure mark.

        If the processing failed, call `back_off` afterwards.
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
    """A thread that takes tasks from a queue, calls each with `resource`, and calls `report` with the result."""

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
    """The workers of all groups. A task must not raise: that would end its worker."""

    def __init__(self, workers: Mapping[str, int], resource: Callable[[], R], report: Callable[[Any], None]) -> None:
        """`resource` creates the object that a worker passes to its tasks, such as a client of the store.

        `report` is called with the result of each task, in the worker's thread.
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
        """Have the next free worker of a group run a task."""
        self._tasks[group].put(task)
