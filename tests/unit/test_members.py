"""Failover over the members of a cluster, and writes whose outcome is unknown, on connections that a test scripts."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Callable

import pytest

from calicoctl.datastore import members as module
from calicoctl.datastore.members import (
    ConnectionLost,
    Members,
    NotSent,
    NotServed,
    RequestFailed,
    Unanswered,
    created,
    deleted,
    updated,
)
from calicoctl.datastore.settings import EtcdSettings, Member
from calicoctl.datastore.store import Entry
from calicoctl.errors import CompareFailed, Fenced, KeyExists, NoSuchApi, StoreError, StoreUnavailable

MEMBERS: tuple[Member, ...] = (("a", 1), ("b", 2), ("c", 3))
ONE = Entry("/k", "1", 5, 5)
TWO = Entry("/k", "2", 6, 5)


class Cluster:
    """What each member does when it is asked, by name: raise the exception, or answer. `asked` has the names."""

    def __init__(self, members: tuple[Member, ...] = MEMBERS, patience: float = 20, scheme: str = "http") -> None:
        self.does: dict[str, Exception | str] = {}
        self.asked: list[str] = []
        self.connected: list[str] = []
        self.members = Members(EtcdSettings(scheme, members), self._connect, patience)

    def _connect(self, member: tuple[str, int]) -> str:
        self.connected.append(member[0])
        return member[0]

    def send(self, name: str) -> str:
        self.asked.append(name)
        does = self.does.get(name, f"{name} answers")
        if isinstance(does, Exception):
            raise does
        return does


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time passes while a request backs off, and only then; the pauses."""
    pauses: list[float] = []
    monkeypatch.setattr(module.time, "monotonic", lambda: sum(pauses))
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    return pauses


def test_the_first_member_that_can_be_reached_answers_and_is_asked_first_from_then_on() -> None:
    cluster = Cluster()
    cluster.does = {"a": NotSent("a is dead")}
    assert cluster.members.ask(cluster.send) == "b answers"
    assert cluster.members.ask(cluster.send) == "b answers"
    assert cluster.asked == ["a", "b", "b"]
    assert cluster.connected == ["a", "b"], "a connection is made once, and where it is needed"


def test_a_request_that_may_have_arrived_goes_to_no_other_member() -> None:
    cluster = Cluster()
    for name, failure in (("a", Unanswered("slow")), ("b", ConnectionLost("lost"))):
        cluster.does[name] = failure
        with pytest.raises(type(failure)):
            cluster.members.ask(cluster.send)
    assert cluster.asked == ["a", "b"], "each is asked after the others then"
    assert cluster.members.ask(cluster.send) == "c answers"


def test_an_answer_that_is_an_error_goes_to_the_caller() -> None:
    cluster = Cluster()
    for error in (KeyExists("/k"), StoreError("not permitted"), ValueError("the backend's own")):
        cluster.does["a"] = error
        with pytest.raises(type(error)):
            cluster.members.ask(cluster.send)
    assert cluster.asked == ["a"] * 3, "and the member stays the first"


def test_all_members_that_could_not_be_reached_are_named() -> None:
    cluster = Cluster()
    cluster.does = {name: NotSent(f"http://{name} (refused)") for name, _ in MEMBERS}
    with pytest.raises(StoreUnavailable) as raised:
        cluster.members.retry(cluster.send)
    said = str(raised.value)
    assert "etcd cannot be reached at http://a (refused), http://b (refused), http://c (refused): start it" in said
    assert cluster.asked == ["a", "b", "c"]


def test_an_api_is_not_served_only_if_all_members_say_so() -> None:
    cluster = Cluster()
    cluster.does = {"a": NotServed("a serves no v2"), "b": NotServed("b serves no v2")}
    assert cluster.members.retry(cluster.send) == "c answers"
    assert cluster.members.retry(cluster.send) == "c answers"
    assert cluster.asked == ["a", "b", "c", "c"], "the one that serves it is asked first from then on"
    cluster.does["c"] = NotSent("http://c (refused)")
    with pytest.raises(StoreUnavailable, match=r"a serves no v2; b serves no v2; etcd cannot be reached at http://c"):
        cluster.members.retry(cluster.send)
    cluster.does["c"] = NotServed("c serves no v2")
    with pytest.raises(NoSuchApi, match="serves no v2"):
        cluster.members.retry(cluster.send)


def test_a_request_without_an_answer_is_sent_again_until_patience_ends(clock: list[float]) -> None:
    cluster = Cluster(patience=3)
    cluster.does = {"a": Unanswered("a elects"), "b": ConnectionLost("b was lost")}
    assert cluster.members.retry(cluster.send) == "c answers"
    assert len(clock) == 2 and all(0.1 <= pause <= 0.3 for pause in clock)
    cluster.does["c"] = Unanswered("c elects")
    with pytest.raises(StoreUnavailable, match=r"etcd cannot do what was asked: . .*; try again later"):
        cluster.members.retry(cluster.send)
    assert 3 < sum(clock[2:]) < 3.6


@contextmanager
def server(answer: bytes) -> Iterator[int]:
    """A server on loopback that sends the same to everybody; its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            with connection:
                connection.recv(1000)
                connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def test_a_server_of_another_protocol_is_passed_over_and_named() -> None:
    grpc = b"\0\0\6\4\0\0\0\0\0\0\5\0\0\100\0"  # a SETTINGS frame of HTTP/2
    with server(grpc) as port:
        cluster = Cluster((("127.0.0.1", port), ("b", 2)))
        cluster.does = {"127.0.0.1": ConnectionLost("it was lost", garbled=True)}
        assert cluster.members.ask(cluster.send) == "b answers"
        cluster = Cluster((("127.0.0.1", port),))
        cluster.does = {"127.0.0.1": ConnectionLost("it was lost", garbled=True)}
        with pytest.raises(StoreUnavailable, match=f"etcd cannot be used at http://127.0.0.1:{port}: it speaks gRPC"):
            cluster.members.ask(cluster.send)


def test_a_member_that_has_answered_before_is_not_suspected() -> None:
    with server(b"\0\0\6\4\0\0\0\0\0\0\5\0\0\100\0") as port:
        cluster = Cluster((("127.0.0.1", port),))
        cluster.members.ask(cluster.send)
        cluster.does = {"127.0.0.1": ConnectionLost("it was lost", garbled=True)}
        with pytest.raises(ConnectionLost):
            cluster.members.ask(cluster.send)


class Writes:
    """A write whose attempts go as scripted, and what its key holds when it is read after each."""

    def __init__(self, attempts: list[Entry | Exception], found: list[Entry | None]) -> None:
        self.attempts, self.found = attempts, found
        self.members: Members[str] = Members(EtcdSettings("http", MEMBERS), lambda member: "", 20)
        self.is_lost = False

    def send(self, _: str, doubtful: bool) -> Entry:
        assert doubtful == self.is_lost
        outcome = self.attempts.pop(0)
        self.is_lost = self.is_lost or outcome is LOST
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def outcome(self, verdict: Callable[[Entry | None], Entry | None]) -> Entry | str:
        """Return the entry that the write returns, or the name of what it raises, with + where it may be applied."""
        try:
            return self.members.write(self.send, lambda: self.found.pop(0), verdict)
        except KeyExists:
            return "KeyExists"
        except CompareFailed as failed:
            return "CompareFailed+" if failed.maybe_applied else "CompareFailed"
        except Fenced:
            return "Fenced"
        finally:
            assert not self.attempts and not self.found, "it was sent again although its outcome was known, or not read"


LOST: RequestFailed = Unanswered("no answer")
EXISTS = KeyExists("/k")
FAILED = CompareFailed("/k")
FENCED = Fenced("/ready")


@pytest.mark.parametrize(
    ("attempts", "found", "outcome"),
    [
        ([ONE], [], ONE),
        ([EXISTS], [], "KeyExists"),
        ([LOST], [ONE], ONE),
        ([LOST, ONE], [None], ONE),
        ([LOST, LOST], [None, ONE], ONE),
        ([LOST], [TWO], "KeyExists"),
        ([LOST, EXISTS], [None, ONE], ONE),  # the first attempt was only late
        ([LOST, EXISTS], [None, TWO], "KeyExists"),
        ([LOST, EXISTS], [None, None], "KeyExists"),  # it was there, and is gone again
        ([FENCED], [], "Fenced"),
        ([LOST, FENCED], [None, None], "Fenced"),
        ([LOST, FENCED], [None, ONE], ONE),
        ([LOST, FENCED], [None, TWO], "KeyExists"),
        ([NotSent("dead"), FENCED], [], "Fenced"),
        ([NotSent("dead"), EXISTS], [], "KeyExists"),
        ([NotSent("dead"), ONE], [], ONE),
    ],
)
def test_a_create_of_unknown_outcome(
    clock: list[float], attempts: list[Entry | Exception], found: list[Entry | None], outcome: Entry | str
) -> None:
    assert Writes(list(attempts), list(found)).outcome(created("/k", "1")) == outcome


LATER = Entry("/k", "3", 9, 5)
SAME_VALUE = Entry("/k", "2", 9, 5)


@pytest.mark.parametrize(
    ("attempts", "found", "outcome"),
    [
        ([TWO], [], TWO),
        ([FAILED], [], "CompareFailed"),
        ([LOST], [TWO], TWO),
        ([LOST, TWO], [ONE], TWO),
        ([LOST, FAILED], [ONE, TWO], TWO),  # the first attempt was only late
        ([LOST], [LATER], "CompareFailed+"),
        ([LOST], [None], "CompareFailed+"),
        ([LOST], [SAME_VALUE], SAME_VALUE),
        ([LOST, FAILED], [ONE, LATER], "CompareFailed+"),
    ],
)
def test_an_update_of_unknown_outcome(
    clock: list[float], attempts: list[Entry | Exception], found: list[Entry | None], outcome: Entry | str
) -> None:
    assert Writes(list(attempts), list(found)).outcome(updated(ONE, "2")) == outcome


@pytest.mark.parametrize(
    ("attempts", "found", "outcome"),
    [
        ([ONE], [], ONE),
        ([FAILED], [], "CompareFailed"),
        ([LOST], [None], ONE),
        ([LOST, ONE], [ONE], ONE),
        ([LOST, FAILED], [ONE, None], ONE),
        ([LOST], [LATER], "CompareFailed+"),
        ([LOST, FAILED], [ONE, LATER], "CompareFailed+"),
    ],
)
def test_a_delete_of_unknown_outcome(
    clock: list[float], attempts: list[Entry | Exception], found: list[Entry | None], outcome: Entry | str
) -> None:
    assert Writes(list(attempts), list(found)).outcome(deleted(ONE)) == outcome


def test_a_write_is_given_up_when_patience_ends(clock: list[float]) -> None:
    writes = Writes([LOST] * 1000, [None] * 1000)
    with pytest.raises(StoreUnavailable):
        writes.members.write(writes.send, lambda: writes.found.pop(0), created("/k", "1"))
    assert 20 < sum(clock) < 20.6
