"""What BIRD says on its control socket, and what is made of it."""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from calicoctl.errors import CalicoError
from calicoctl.felix.bgp import bird
from calicoctl.felix.bgp.bird import Refused, Session, control, refusal

GREETING = "0001 BIRD 2.0.12 ready.\n"
RESTRICTED = "0016 Access restricted\n"
CHANNEL = """\
   Channel ipv4
     State:          UP
     Table:          master4
     Preference:     100
     Input filter:   learned4
     Output filter:  (unnamed)
     Routes:         {}
     Route change stats:     received   rejected   filtered    ignored   accepted
       Import updates:              3          0          0          0          3
"""
PROTOCOLS = f"""\
2002-Name       Proto      Table      State  Since         Info
1002-device1    Device     ---        up     2026-11-26 04:50:49~~
1006-
1002-blocks4    Static     master4    up     2026-11-26 04:50:49~~
1006-  Channel ipv4
     Routes:         9 imported, 0 exported, 9 preferred
~
1002-mesh4_172_18_0_12 BGP        ---        up     2026-11-26 04:50:51  Established~~~
1006-  BGP state:          Established
     Neighbor address: 172.18.0.12
     Neighbor AS:      64511
     Local AS:         64512
     Neighbor ID:      172.18.0.12
     Hold timer:       21.333/30
{CHANNEL.format("3 imported, 2 filtered, 1 exported, 3 preferred")}~
1002-global6_fd00_18__fe BGP        ---        start  2026-11-26 04:50:49  Idle          BGP Error: Bad peer AS
1006-  BGP state:          Idle
     Neighbor address: fd00:18::fe
     Neighbor AS:      64600
     Error wait:       0.884/2
     Last error:       BGP Error: Bad peer AS: 64601
   Channel ipv6
     State:          DOWN
~
1002-node4_172_18_0_254 BGP        ---        up     2026-11-26 04:51:00  Established~~~
1006-  BGP state:          Established
     Neighbor address: 172.18.0.254
     Neighbor AS:      64600
{CHANNEL.format("4 imported, 5 exported, 4 preferred")}~
1002-theirs BGP        ---        start  2026-11-26 04:50:49  Connect
1006-  BGP state:          Connect
~
0000~
""".replace("~", " ")  # blanks at the ends of lines


@contextmanager
def serving(folder: Path, *answers: str) -> Iterator[tuple[Path, list[str]]]:
    """A control socket that gives these answers, one for each command; yields its path and the commands.

    An answer that is empty is never given.
    """
    path, commands = folder / "ctl", []
    server = socket.socket(socket.AF_UNIX)
    fd = os.open(folder, os.O_PATH)
    server.bind(f"/proc/self/fd/{fd}/ctl")  # the path itself may be too long
    os.close(fd)
    server.listen()

    def serve() -> None:
        try:
            connection, _ = server.accept()
        except OSError:
            return  # nobody connected
        with connection, connection.makefile("rw") as file:
            file.write(GREETING)
            file.flush()
            for answer in answers:
                command = file.readline().strip()
                if not command:
                    return
                commands.append(command)
                if not answer:
                    file.readline()
                    return
                for part in (answer[:7], answer[7:]):  # in pieces, as they may arrive
                    file.write(part)
                    file.flush()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield path, commands
    finally:
        server.shutdown(socket.SHUT_RDWR)  # ends a wait for a connection
        thread.join(timeout=10)
        server.close()


@pytest.fixture
def two_hours_east(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """BIRD gives local times."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "EAST-2")
        time.tzset()
        yield
    time.tzset()


def test_sessions(tmp_path: Path, two_hours_east: None) -> None:
    with serving(tmp_path, RESTRICTED, PROTOCOLS) as (path, commands), control(path) as one:
        assert one.sessions() == [
            Session(
                "mesh4_172_18_0_12", "mesh", "172.18.0.12", "64511", "Established", "2026-11-26T02:50:51Z", 3, 1, None
            ),
            Session(
                *("global6_fd00_18__fe", "global", "fd00:18::fe", "64600", "Idle", "2026-11-26T02:50:49Z", 0, 0),
                "BGP Error: Bad peer AS: 64601",
            ),
            Session("node4_172_18_0_254", "node", "172.18.0.254", "64600", "Established", "2026-11-26T02:51:00Z", 4, 5),
        ]
    assert commands == ["restrict", "show protocols all"], "it may change nothing"


def test_a_socket_with_a_long_path(tmp_path: Path) -> None:
    folder = tmp_path / ("h" * 253)
    folder.mkdir()
    with serving(folder, RESTRICTED, PROTOCOLS) as (path, _), control(path) as one:
        assert len(one.sessions()) == 3


def test_a_configuration_that_is_accepted(tmp_path: Path) -> None:
    checked = "0002-Reading configuration from /x/conf.new\n0020 Configuration OK\n"
    configured = "0002-Reading configuration from /x/conf\n0003 Reconfigured\n"
    with (
        serving(tmp_path, checked, configured, configured.replace("0003 Reconfigured", "0004 In progress")) as (
            path,
            commands,
        ),
        control(path, may_change=True) as one,
    ):
        one.check(Path("/x/conf.new"))
        one.configure()
        one.configure()
    assert commands == ['configure check "/x/conf.new"', "configure", "configure"]


def test_a_configuration_that_is_refused(tmp_path: Path) -> None:
    answer = "0002-Reading configuration from /x/conf.new\n8002 /x/conf.new:12:11 syntax error, unexpected ';'\n"
    with serving(tmp_path, answer, "8003 No configuration\n") as (path, _), control(path, may_change=True) as one:
        with pytest.raises(Refused) as refused:
            one.check(Path("/x/conf.new"))
        assert str(refused.value) == "syntax error, unexpected ';' in line 12 of /x/conf.new"
        assert refused.value.line == 12
        with pytest.raises(CalicoError, match="8003 No configuration") as error:
            one.configure()
        assert not isinstance(error.value, Refused)


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("bird: /run/b/conf:5:19 syntax error, unexpected ';'\n", 5),
        ("/run/b/conf: No such file or directory", None),
        ("bird: Unable to open configuration file x: 1:2", None),
    ],
)
def test_refusals_by_the_program_and_by_the_socket(said: str, line: int | None) -> None:
    assert refusal(said).line == line


def test_one_that_does_not_answer_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bird, "PATIENCE", 0.05)
    with serving(tmp_path, "") as (path, _), pytest.raises(CalicoError, match="does not answer"), control(path):
        pass
    path.unlink()
    with (
        serving(tmp_path, RESTRICTED, "1002-half of an answer", "") as (path, _),
        control(path) as one,
        pytest.raises(CalicoError, match="does not answer"),
    ):
        one.sessions()


@pytest.mark.parametrize("answer", ["1002-" + "x" * 5000, "1002-x\n" * 1000])
def test_an_endless_answer_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    monkeypatch.setattr(bird, "LARGEST_ANSWER", 500)
    with (
        serving(tmp_path, RESTRICTED, answer, "") as (path, _),
        control(path) as one,
        pytest.raises(CalicoError, match="too long"),
    ):
        one.sessions()


def test_one_that_does_not_serve(tmp_path: Path) -> None:
    with pytest.raises(CalicoError, match="does not serve: No such file"), control(tmp_path / "ctl"):
        pass
    with serving(tmp_path) as (path, _), pytest.raises(CalicoError, match=r"has closed|does not serve"), control(path):
        pass


def test_without_free_descriptors(tmp_path: Path) -> None:
    """The thread that runs BIRD goes on after a CalicoError alone."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serving(tmp_path) as (path, _):
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
        try:
            with pytest.raises(CalicoError, match="Too many open files"), control(path):
                pass
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
