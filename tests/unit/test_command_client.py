"""What the client of the command server does when a server behaves badly, or does not fit."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from calicoctl import __version__
from calicoctl.cli import command_client
from tests.unit.waiting import wait_for

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def nobody_reads_errors() -> Iterator[None]:
    """Standard error is a pipe that nobody reads."""
    kept = os.dup(2)
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(reader)
    os.close(writer)
    yield
    os.dup2(kept, 2)
    os.close(kept)


def test_a_loss_that_cannot_be_told_is_a_failure_too(
    nobody_reads_errors: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_client, "SIGNALS", ())
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        theirs.settimeout(0)
        theirs.shutdown(socket.SHUT_WR)  # it ends without a status, but takes the command
        assert command_client._have_run(ours, ["profile", "show"]) == 1
        assert theirs.recv(1000).endswith(b"profile\0show")
    theirs.close()


def test_a_server_of_another_process_namespace_is_not_ours() -> None:
    class Foreign:
        """A connection to a server that has ended, or that this process's namespace does not have."""

        def getsockopt(self, *_: int) -> bytes:
            return bytes(12)

    with pytest.raises(OSError):
        command_client._is_ours(Foreign())  # type: ignore[arg-type]


def test_a_server_of_another_user_is_not_ours() -> None:
    class Foreign:
        def getsockopt(self, *_: int) -> bytes:
            return b"".join(number.to_bytes(4, sys.byteorder) for number in (os.getpid(), 1000, 1000))

    assert not command_client._is_ours(Foreign())  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["/dev/fd/63", "/dev/tty", "/proc/self/fd/3", "--file=/proc/thread-self/ns/net"])
def test_a_file_of_the_callers_process_is_read_by_it(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posix.isatty", lambda descriptor: False)
    assert command_client.is_served(["batch", "lines"]) and command_client.is_served(["--debug", "profile", "show"])
    assert not command_client.is_served(["batch", path]) and not command_client.is_served(["node", "show"])
    monkeypatch.setattr("posix.isatty", lambda descriptor: True)
    assert not command_client.is_served(["batch"]) and command_client.is_served(["profile", "show"])


def test_a_batch_that_may_start_an_agent_or_that_only_the_caller_can_read_is_run_by_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, pipe = tmp_path / "lines", tmp_path / "pipe"
    os.mkfifo(pipe)
    for text, expected in (("profile add web\n", False), ("profile add web\ncalicoctl node --ip=192.0.2.2\n", True)):
        file.write_text(text)
        assert command_client._may_manage_agent(["batch", "--keep-going", str(file)]) == expected
        assert not command_client._may_manage_agent(["profile", "add", str(file)])
    file.write_text("profile show")
    (tmp_path / "link").symlink_to("other")
    (tmp_path / "other").symlink_to(file)
    assert not command_client._may_manage_agent(["batch", str(tmp_path / "link")])
    with file.open() as opened:
        (tmp_path / "other").unlink()
        (tmp_path / "other").symlink_to(f"/proc/self/fd/{opened.fileno()}")
        assert command_client._may_manage_agent(["batch", str(tmp_path / "link")]), "a file of this process"
        monkeypatch.chdir("/dev")
        assert command_client._may_manage_agent(["batch", f"fd/{opened.fileno()}"])
    assert command_client._may_manage_agent(["batch", str(pipe)]), "a pipe can be read only once"
    with pytest.raises(OSError):
        command_client._may_manage_agent(["batch", str(tmp_path / "none")])


def test_next_to_nothing_is_imported_before_a_server_is_asked() -> None:
    def imported(statement: str) -> set[str]:
        script = f"import sys; sys.path.append({str(ROOT)!r}); import _signal, _socket, io, posix; {statement}"
        script += "; print(*sys.modules)"
        command = [sys.executable, "-IS", "-c", script]
        return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())

    more = imported("import calicoctl.cli.command_client") - imported("pass")
    assert more == {"calicoctl", "calicoctl.cli", "calicoctl.cli.command_client"}


def test_what_other_modules_have_changed_in_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETCD_AUTHORITY", "192.0.2.9:2379")
    assert command_client._environment()[b"ETCD_AUTHORITY"] == b"192.0.2.9:2379"
    script = f"import sys; sys.path.append({str(ROOT)!r}); from calicoctl.cli import command_client"
    script += "; print(command_client._environment()[b'ETCD_AUTHORITY'], 'os' in sys.modules)"
    said = subprocess.run([sys.executable, "-IS", "-c", script], capture_output=True, check=True).stdout
    assert said == b"b'192.0.2.9:2379' False\n"


def test_the_text_of_a_batch_from_standard_input_can_be_read_again() -> None:
    script = (
        "import resource, sys; from calicoctl.cli import command_client;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), -1));"
        "print(command_client._may_manage_agent(['batch']), sys.stdin.read())"
    )
    lines = b"profile add web\r \n" * 10000
    for text, limit, expected in ((lines, -1, b"False"), (lines, 1000, b"True"), (b"calicoctl node", -1, b"True")):
        command = [sys.executable, "-c", script, str(limit)]
        said = subprocess.run(command, input=text, capture_output=True, check=True)
        assert said.stdout == b"%b %b\n" % (expected, text)


@pytest.mark.parametrize(
    ("words", "texts", "said"),
    [
        (["batch"], (b"version\n", b"version\n"), f"{__version__}\n" * 2),
        (["apply", "-"], (b"pools: {}\n", b"pool: {}\n"), "standard input:2: the file has no 'pool'"),
    ],
)
def test_standard_input_that_does_not_block_is_read_to_its_end(words: list, texts: tuple, said: str) -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    command = [sys.executable, "-m", "calicoctl", *words]
    pipes = {"stdin": reader, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, **pipes, text=True) as process:
        os.write(writer, texts[0])
        wait_for(lambda: not select.select([reader], [], [], 0)[0], "what was written to be read")
        os.write(writer, texts[1])
        os.close(writer)
        assert process.communicate()[0].startswith(said)
    os.close(reader)


def test_a_command_that_a_worker_would_read_in_part_is_not_sent() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, 32, 2 * command_client.LARGEST)  # SO_SNDBUFFORCE, as net.core.wmem_default
        with pytest.raises(OSError):
            command_client._have_run(ours, ["profile", "add", "x" * command_client.LARGEST])
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(1)


@pytest.mark.parametrize("cold", ["", "1"])
def test_standard_input_that_cannot_be_read_is_an_error(cold: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "calicoctl", "batch", "-"]
    environment = {**os.environ, "CALICO_COLD": cold}
    with (tmp_path / "file").open("w") as file:
        done = subprocess.run(command, stdin=file, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 1 and done.stderr == "standard input: Bad file descriptor\n"
