"""How long a request for changes may wait, and what it proves; the requests themselves are tested with a real etcd."""

from __future__ import annotations

import itertools
import json

import pytest

from calicoctl.datastore import etcd2, etcd2_watch
from calicoctl.datastore.etcd2_watch import SHORTEST, OpenWatch, Progress
from tests.unit.rogue_server import OK, Client, answer, serving

KEPT = 1000
"""Writes that etcd keeps."""


@pytest.mark.parametrize("per_second", [0, 1, 20, 150, 400, 1500, 3000])
def test_requests_keep_up_with_what_is_written(per_second: int) -> None:
    """Each lags behind by what is written during the two before it: the next one asks from `searched` on."""
    progress, now, waits = Progress(1, 0, 0.0), 0.01, []
    for _ in range(200):
        reached = int(now * per_second)
        assert reached - progress.searched < KEPT / 2 + per_second * SHORTEST
        wait = min(4.0, etcd2_watch._wait(progress, reached, now))
        waits.append(wait)
        after = Progress(max(progress.revision, progress.searched + 1), reached, now, wait)
        now += wait
        assert int(now * per_second) - after.revision < KEPT
        progress = after
    assert waits[0] == SHORTEST, "how fast it goes is not known yet"
    requests = len(waits) / sum(waits)
    assert requests < max(0.3, per_second / etcd2_watch.ROOM * 3.5)


def test_a_burst_after_a_pause_finds_short_waits() -> None:
    """The wait at most doubles, so a store that was busy a moment ago is not waited for at length."""
    progress, reached = Progress(1, 1000, 10.0, wait=SHORTEST), 1000
    assert etcd2_watch._wait(progress, reached, 10.1) == 2 * SHORTEST
    assert etcd2_watch._wait(progress, reached + 900, 10.1) == SHORTEST


def test_two_requests_must_be_silent_about_a_revision() -> None:
    """What the first one was not told may only have been delayed."""
    import etcd

    index = itertools.chain([10, 15, 20], itertools.repeat(25))
    asked = []

    def silent(client: Client, line: str) -> None:
        asked.append(int(line.rpartition("=")[2]))
        client.send(OK.replace(b"Index: 5", b"Index: %d" % next(index)) + b"Transfer-Encoding: chunked\r\n\r\n")
        client.hold()

    with serving(silent) as server:
        client = etcd.Client(port=server.port)
        watch = OpenWatch(6)
        for _ in range(4):
            assert watch.changes(client, "/calico", 0.0, 5.0) == []
    assert asked == [6, 6, 11, 16]


def test_what_a_stream_has_missed_is_requested_while_the_next_one_is_open() -> None:
    """After a change from its history, 6, etcd sends nothing more over the stream that begins there."""
    import etcd

    asked = []

    def chunks(*revisions: int) -> bytes:
        return b"".join(b"%x\r\n%s\r\n" % (len(event(number)), event(number)) for number in revisions)

    def events(client: Client, line: str) -> None:
        _, _, parameters = line.partition("?wait=true&recursive=true")
        asked.append(parameters)
        reached, revisions = {
            "&stream=true&waitIndex=6": (8, [6]),
            "&stream=true": (10, [11, 12]),
            "&waitIndex=7": (10, [9]),
            "&waitIndex=10": (10, [11]),
        }[parameters]
        client.send(OK.replace(b"Index: 5", b"Index: %d" % reached) + b"Transfer-Encoding: chunked\r\n\r\n")
        client.send(chunks(*revisions))
        if "stream" in parameters:
            client.hold()
        client.send(b"0\r\n\r\n")

    with serving(events) as server:
        client, watch = etcd.Client(port=server.port), OpenWatch(6)
        found = [watch.changes(client, "/calico", 0.0, 5.0) for _ in range(5)]
        watch.close()
    revisions = [change.entry and change.entry.revision for changes in found for change in changes]
    assert revisions == [6, 9, 11, 12]
    assert asked == ["&stream=true&waitIndex=6", "&stream=true", "&waitIndex=7", "&waitIndex=10"]


def event(revision: int) -> bytes:
    node = {"key": "/calico/a", "value": "", "modifiedIndex": revision, "createdIndex": revision}
    return json.dumps({"action": "set", "node": node}).encode() + b"\n"


def test_a_change_that_begins_to_arrive_is_no_silence() -> None:
    import etcd

    def stuck(client: Client, line: str) -> None:
        client.send(OK + b"Transfer-Encoding: chunked\r\n\r\n4")
        client.hold()

    with serving(stuck) as server, pytest.raises(etcd.EtcdConnectionFailed):
        OpenWatch(6).changes(etcd.Client(port=server.port), "/calico", 0.0, 0.3)


def test_a_change_is_not_taken_twice() -> None:
    import etcd

    with (
        serving(lambda client, line: client.send(answer(event(5)))) as server,
        pytest.raises(TypeError, match="before"),
    ):
        OpenWatch(6).changes(etcd.Client(port=server.port), "/calico", 0.0, 5.0)


def test_a_quorum_is_confirmed_by_a_key_that_nobody_can_have_written() -> None:
    """A large value there would end every wait."""
    import etcd

    asked = []

    def missing(client: Client, line: str) -> None:
        asked.append(line)
        body = b'{"errorCode":100,"message":"Key not found","index":5}'
        client.send(answer(body, OK.replace(b"200 OK", b"404 Not Found")))

    with serving(missing) as server:
        for _ in range(2):
            etcd2._confirm_quorum(etcd.Client(port=server.port), "/calico/v1")
    assert len(set(asked)) == 2 and all("/calico/v1/" in line and "quorum=true" in line for line in asked)
