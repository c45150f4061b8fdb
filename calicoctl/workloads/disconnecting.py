"""Disconnects many workloads side by side, in threads. How one of them is disconnected is in wiring.py."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Callable

from calicoctl.errors import NotFound
from calicoctl.workloads import wiring
from calicoctl.workloads.workload import Workload

if TYPE_CHECKING:
    from calicoctl.datastore.client import DatastoreClient

PATIENCE = 10.0
"""Seconds to wait, after an interrupt, for the workloads that are just being disconnected."""


def disconnect_all(
    clients: Sequence[DatastoreClient], workloads: Collection[tuple[str, str]], report: Callable[[str], object]
) -> None:
    """Disconnect workloads, given as (orchestrator, id); at most as many at a time as there are `clients`.

    No two of the clients may share a connection. `report` is called in this thread with the id of each workload that
    has been disconnected, in the order of the sorted workloads; not with the ids of those that were not connected.

    If one cannot be disconnected, or this thread is interrupted by a signal, no other is begun, and those that are just
    being disconnected are completed; then the first error, in that order, or the exception of the signal is raised.
    After a signal, they are waited for at most PATIENCE seconds. Those that are not done then stay as after `kill -9`.
    """
    tasks = sorted(workloads)
    waiting = deque(range(len(tasks)))
    outcomes: dict[int, BaseException | None] = {}
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()

    def work(client: DatastoreClient) -> None:
        with suppress(IndexError):  # all have been begun
            while True:
                number = waiting.popleft()
                outcomes[number] = _disconnect(client, *tasks[number])
                if outcomes[number] is not None and not isinstance(outcomes[number], NotFound):
                    waiting.clear()
                ended.put(0)
        ended.put(1)

    def report_done(numbers: Iterable[int]) -> None:
        for number in numbers:
            if number in outcomes and outcomes[number] is None:
                report(tasks[number][1])

    threads = [threading.Thread(target=work, args=(client,), daemon=True) for client in clients[: len(tasks)]]
    reported, left = 0, len(threads)
    try:
        for thread in threads:
            thread.start()
        while left:
            left -= ended.get()
            while reported in outcomes:
                reported += 1
                report_done([reported - 1])
    except BaseException:
        waiting.clear()
        give_up = time.monotonic() + PATIENCE
        for thread in threads:
            if thread.ident is not None:  # it was started
                thread.join(max(0.0, give_up - time.monotonic()))
        raise
    finally:
        report_done(range(reported, len(tasks)))
    for number in sorted(outcomes):
        failure = outcomes[number]
        if failure is not None and not isinstance(failure, NotFound):
            raise failure


def _disconnect(client: DatastoreClient, orchestrator: str, id: str) -> BaseException | None:
    """Disconnect a workload; return the exception that was raised, None if there was none."""
    try:
        wiring.disconnect(client, Workload(orchestrator, id, id))
    except BaseException as error:
        return error
    return None
