"""How long a batch waits for an etcd that does not answer."""

from __future__ import annotations

import time
from typing import Callable

import pytest

from calicoctl.commands import batch
from calicoctl.commands.batch import Line
from calicoctl.datastore import reserved
from calicoctl.datastore.reserved import Reserved
from calicoctl.errors import CalicoError, Failed, Failures, StoreError, StoreUnavailable

AWAY = StoreUnavailable("etcd cannot do what was asked: no leader; try again later")


class Lines:
    """Lines of a batch, each of which takes some seconds and then succeeds or raises an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lines: list[Line] = []
        self.ran: list[int] = []
        self._now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self._now)
        monkeypatch.setattr(batch, "_lines", lambda text, name: self.lines)
        monkeypatch.setattr(batch, "_read", lambda file: "")

    def add(self, number: int, seconds: float, error: CalicoError | None = None) -> None:
        for _ in range(number):
            place = len(self.lines) + 1
            self.lines.append(Line(f"commands, line {place}: ", ["x"], self._command(place, seconds, error), "x"))

    def _command(self, place: int, seconds: float, error: CalicoError | None) -> Callable[[], None]:
        def run() -> None:
            self.ran.append(place)
            self._now += seconds
            if error is not None:
                raise error

        return run

    def failure(self, keep_going: bool = True) -> str:
        with pytest.raises(Failed) as failed:
            batch._batch("commands", keep_going)
        return str(failed.value)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Lines:
    return Lines(monkeypatch)


def test_the_rest_is_not_run_when_lines_have_waited_for_etcd_long_enough(lines: Lines) -> None:
    lines.add(100, 20.2, AWAY)
    assert lines.failure() == (
        "Of 100 commands, 0 done, 1 failed, 99 not run, from commands, line 2 on: "
        "etcd did not answer within 20 s in all."
    )
    assert lines.ran == [1]


def test_what_all_failed_lines_have_waited_counts_and_nothing_else(lines: Lines) -> None:
    lines.add(2, 8, AWAY)
    lines.add(3, 100)
    lines.add(3, 100, StoreError("not permitted"))
    lines.add(2, 5, Failures([CalicoError("x"), AWAY]))
    assert "3 done, 6 failed, 1 not run, from commands, line 10 on: etcd did not answer within 21 s" in lines.failure()
    assert lines.ran == list(range(1, 10))


def test_all_lines_are_run_if_they_fail_at_once(lines: Lines) -> None:
    lines.add(100, 0.1, AWAY)
    assert lines.failure() == "Of 100 commands, 0 done, 100 failed."


def test_the_last_line_leaves_nothing_to_run(lines: Lines) -> None:
    lines.add(1, 25, AWAY)
    assert lines.failure() == "Of 1 command, 0 done, 1 failed."


def test_a_batch_that_ends_at_its_first_failure_says_no_more_than_that(lines: Lines) -> None:
    lines.add(2, 25, AWAY)
    assert lines.failure(keep_going=False) == "Of 2 commands, 0 done, 1 failed, 1 not run."


def test_what_is_reserved_is_read_again_after_any_line_that_may_change_it(lines: Lines) -> None:
    found: list[tuple[str, str]] = []

    def read() -> Reserved:
        return Reserved(host=f"read in line {len(found) + 1}")

    def command(name: str, error: BaseException | None = None) -> Line:
        def run() -> None:
            found.append((name, reserved.recent_or_read(4, read).host))
            if error is not None:
                raise error

        return Line("", [name], run, name)

    lines.lines = [command(name) for name in ("container", "container", "node", "container", "container")]
    lines.lines.append(command("container", KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        batch._batch("commands", keep_going=True)
    assert [text for _, text in found] == [f"read in line {number}" for number in (1, 1, 3, 4, 4, 4)]
    assert reserved.recent_or_read(4, lambda: Reserved(host="after the batch")).host == "after the batch"
