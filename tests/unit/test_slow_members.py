"""Members that have kept a command waiting: the caller's next commands ask them last, for a minute."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from calicoctl import files
from calicoctl.datastore import members as module
from calicoctl.datastore import slow_members
from calicoctl.datastore.members import ConnectionLost, NotSent, RequestFailed, Unanswered
from calicoctl.datastore.settings import Member
from tests.unit.test_members import MEMBERS, Cluster

A, B, C = MEMBERS


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the caller, who is root or another user."""
    monkeypatch.setattr(files, "RUN", tmp_path / "run")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "user"))
    (tmp_path / "user").mkdir(mode=0o700)
    return tmp_path / ("run" if os.geteuid() == 0 else "user") / ".etcd-slow-members"


def slow(monkeypatch: pytest.MonkeyPatch, failure: RequestFailed, seconds: float = 4) -> Cluster:
    """Return a cluster whose first member lets the first request fail after `seconds`."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    cluster = Cluster()
    cluster.does = {"a": failure}

    def send(name: str) -> str:
        now[0] += seconds if name == "a" else 0
        return cluster.send(name)

    assert cluster.members.retry(send) == "b answers"
    return cluster


@pytest.mark.parametrize("failure", [Unanswered("it hangs"), NotSent("timed out")])
def test_the_next_command_asks_a_member_that_hung_last(
    monkeypatch: pytest.MonkeyPatch, file: Path, failure: RequestFailed
) -> None:
    slow(monkeypatch, failure)
    assert file.stat().st_mode & 0o7777 == 0o600
    following = Cluster()
    assert following.members.retry(following.send) == "b answers"
    assert following.asked == ["b"]
    following.does = {"b": NotSent("b is dead"), "c": NotSent("c is dead")}
    assert following.members.retry(following.send) == "a answers", "it is asked if no other one is left"


def test_a_member_that_hung_is_asked_in_its_turn_after_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, Unanswered("it hangs"))
    monkeypatch.setattr(module.time, "monotonic", lambda: 104 + slow_members.REMEMBERED)
    assert slow_members.last(MEMBERS) == [A, B, C]


def test_a_failure_that_kept_nobody_waiting_is_not_remembered(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    slow(monkeypatch, NotSent("refused"), 0.01)
    slow(monkeypatch, Unanswered("a elects"), 0.01)
    slow(monkeypatch, ConnectionLost("a watch has ended"), 15)
    assert not file.exists()


def test_the_only_member_is_not_remembered(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    now = itertools.count(0, 5)  # without an end, since threads of other tests may ask for the time, too
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    cluster = Cluster((A,))
    cluster.does = {"a": Unanswered("it hangs")}
    with pytest.raises(Unanswered):
        cluster.members.ask(cluster.send)
    assert not file.exists()


def test_the_order_of_the_others_stays() -> None:
    slow_members.remember(B)
    assert slow_members.last(MEMBERS) == [A, C, B]
    slow_members.remember(A)
    assert slow_members.last(MEMBERS) == [C, A, B], "the order among those that hung, too"
    slow_members.remember(C)
    assert slow_members.last(MEMBERS) == [A, B, C]
    slow_members.forget()
    assert slow_members.last(MEMBERS) == [A, B, C]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '["b:2"]', "1", "null", '{"b:2": null}', '{"b:2": "1"}', '{"b:2": []}', '{"b:2": NaN}', "[" * 9000]
    + ['{"b:2": 1e300}', '{"b:2": -1e300}', '{"b:2": 1' + "0" * 400 + "}"]
    + ['{"b:2": Infinity, "evil:1": 0}', '{"b:2": {"x": 1}}', '{"x": 1, ' + " " * 2**16 + "}"],
)
def test_a_file_with_any_other_content_changes_nothing(file: Path, content: str) -> None:
    slow_members.remember(A)
    file.write_text(content)
    assert slow_members.last(MEMBERS) == [A, B, C]
    slow_members.remember(B)
    assert slow_members.last(MEMBERS) == [A, C, B], "it is replaced"


@pytest.mark.parametrize("age", [-5000, 100])
def test_a_time_of_another_clock_changes_nothing(file: Path, age: float) -> None:
    slow_members.remember(A)
    file.write_text(json.dumps({"b:2": time.monotonic() - age}))
    assert slow_members.last(MEMBERS) == [A, B, C]


def test_no_member_comes_from_the_file(file: Path) -> None:
    slow_members.remember(("elsewhere", 1))
    slow_members.remember(A)
    assert slow_members.last(MEMBERS) == [B, C, A]


def _opened(file: Path) -> None:
    file.chmod(0o640)


def _linked(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def _replaced_by_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _replaced_by_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o600)


def _in_an_open_folder(file: Path) -> None:
    file.parent.chmod(0o777)


def _without_a_folder(file: Path) -> None:
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("")


@pytest.mark.parametrize(
    "spoil", [_opened, _linked, _replaced_by_a_folder, _replaced_by_a_pipe, _in_an_open_folder, _without_a_folder]
)
def test_a_file_that_others_may_have_made_is_ignored_and_nothing_fails(
    file: Path, spoil: Callable[[Path], None]
) -> None:
    slow_members.remember(A)
    assert slow_members.last(MEMBERS) == [B, C, A]
    spoil(file)
    assert slow_members.last(MEMBERS) == [A, B, C]
    slow_members.remember(B)
    slow_members.forget()


def test_members_of_all_kinds_of_names() -> None:
    members: list[Member] = [("::1", 2379), ("etcd-0.example", 2379), ("192.0.2.1", 2379)]
    slow_members.remember(members[0])
    assert slow_members.last(members) == [*members[1:], members[0]]
