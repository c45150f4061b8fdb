"""Supervision of a daemon, with real processes: it is started once, adopted, restarted when it ends, and stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from calicoctl import files, logs, proc
from calicoctl.errors import CalicoError
from calicoctl.felix import daemon
from calicoctl.felix.daemon import Daemon, NotServing, Process
from tests.unit.waiting import PATIENCE, wait_for


class Sandbox:
    """A folder for one daemon: a shell script that appends its pid to a file, and creates another when it is ready."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pids = folder / "pids"
        self.ready = folder / "ready"
        self.log = folder / "logs" / "daemon.log"
        self.process = Process("the daemon", folder / "run" / "daemon.pid", f"--folder={folder}")
        self.adopted: list[int] = []
        self.launching = threading.Lock()

    def daemon(self, patience: float = PATIENCE) -> Daemon:
        return Daemon(
            self.process,
            self.log,
            lock=self.folder / "lock",
            is_ready=self.ready.exists,
            start_patience=patience,
            environment={"PATH": os.environ["PATH"], "WORD": "hello"},
        )

    def command(self, script: str = "") -> list[str]:
        script = script or f"touch {self.ready}; while :; do sleep 0.05; done"
        return ["sh", "-c", f"echo $$ >>{self.pids}; echo $WORD; {script}", "sh", self.process.marker]

    def start(self, one: Daemon, script: str = "") -> bool:
        return one.start(lambda: self.command(script), self.adopted.append)

    def supervise(self, one: Daemon, failures: Sequence[Exception] = (), script: str = "") -> None:
        """Supervise it until the end of the test; the first launches fail with `failures`."""
        left = list(failures)

        def launch() -> None:
            with self.launching:
                if left:
                    raise left.pop()
                one.launch(lambda: self.command(script), self.adopted.append)

        one.supervise(launch)

    def started(self) -> list[int]:
        return [int(line) for line in self.pids.read_text().split()] if self.pids.exists() else []


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    made = Sandbox(tmp_path)
    yield made
    made.launching.acquire()  # never released: threads that still supervise start nothing
    for pid in filter(None, {*made.started(), made.process.pid()}):  # it may not have written its own yet
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.mark.parametrize("becomes_ready", [True, False])
def test_the_log_of_a_supervised_daemon_does_not_grow_for_ever(
    becomes_ready: bool, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "LARGEST", 10_000)
    monkeypatch.setattr(daemon, "LOG_INTERVAL", 0.01)
    for name in ("FIRST_PAUSE", "LONGEST_PAUSE"):
        monkeypatch.setattr(daemon, name, 0.01)
    first = f"touch {sandbox.ready}; " if becomes_ready else ""
    script = f"{first}while :; do seq 100000 101000; touch {sandbox.folder}/written; sleep 0.05; done"
    sandbox.supervise(sandbox.daemon(PATIENCE if becomes_ready else 0.01), script=script)
    for _ in range(3):  # it goes on writing at the end of what is left
        (sandbox.folder / "written").unlink(missing_ok=True)
        wait_for((sandbox.folder / "written").exists)
        wait_for(lambda: sandbox.log.stat().st_size <= 5_000)
        assert b"\0" not in sandbox.log.read_bytes()


def test_the_log_of_a_daemon_that_ends_again_and_again_does_not_grow_for_ever(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "LARGEST", 10_000)
    sandbox.log.parent.mkdir()
    sandbox.log.write_text("of before\n" * 2_000)
    sandbox.start(sandbox.daemon())
    assert sandbox.log.stat().st_size <= 5_010 and sandbox.log.read_text().endswith("of before\nhello\n")


def test_a_daemon_is_started_and_its_output_is_logged(sandbox: Sandbox) -> None:
    assert sandbox.process.pid() is None
    assert sandbox.start(sandbox.daemon())
    assert [sandbox.process.pid()] == sandbox.started()
    assert sandbox.log.read_text() == "hello\n"
    assert os.getsid(sandbox.started()[0]) == sandbox.started()[0], "signals to our process group do not reach it"


def test_a_running_daemon_is_adopted(sandbox: Sandbox) -> None:
    sandbox.start(sandbox.daemon())
    assert not sandbox.start(sandbox.daemon())
    assert sandbox.adopted == sandbox.started() == [sandbox.process.pid()]


def test_a_stale_pid_file_names_no_daemon(sandbox: Sandbox) -> None:
    sandbox.process.pid_file.parent.mkdir()
    with subprocess.Popen(["sleep", "60"]) as other:
        for text in (str(other.pid), "1", "999999999", "no number", ""):
            sandbox.process.pid_file.write_text(text)
            assert sandbox.process.pid() is None, text
            assert not sandbox.process.stop()
        assert other.poll() is None
        sandbox.process.pid_file.write_text(str(other.pid))
        assert sandbox.start(sandbox.daemon())
        assert other.poll() is None
        other.kill()


def test_concurrent_starts_start_one_process(sandbox: Sandbox) -> None:
    started: list[bool] = []
    begin = threading.Barrier(8)

    def start() -> None:
        begin.wait(PATIENCE)
        started.append(sandbox.start(sandbox.daemon()))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(started) == [False] * 7 + [True]
    assert len(sandbox.started()) == 1


def test_a_daemon_is_stopped(sandbox: Sandbox) -> None:
    sandbox.start(sandbox.daemon())
    (pid,) = sandbox.started()
    assert sandbox.process.stop()
    assert proc.running_since(pid) is None
    assert not sandbox.process.pid_file.exists()
    assert not sandbox.process.stop()


def test_one_that_ignores_sigterm_is_reported(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "END_PATIENCE", 0.05)
    sandbox.start(sandbox.daemon(), f"trap '' TERM; touch {sandbox.ready}; while :; do sleep 0.05; done")
    with pytest.raises(CalicoError, match=rf"the daemon \(process {sandbox.started()[0]}\) does not end"):
        sandbox.process.stop()


def test_a_daemon_that_ends_before_it_is_ready_is_an_error_with_the_last_line_of_its_log(sandbox: Sandbox) -> None:
    with pytest.raises(CalicoError, match=r"the daemon does not serve; .*daemon.log ends with: no such option$"):
        sandbox.start(sandbox.daemon(patience=3600), "echo no such option; exit 1")
    assert not sandbox.process.pid_file.exists()


@pytest.mark.parametrize("trap", ["", "trap '' TERM;"])
def test_a_daemon_that_does_not_become_ready_is_ended(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, trap: str
) -> None:
    monkeypatch.setattr(daemon, "END_PATIENCE", 0.5)
    with pytest.raises(CalicoError, match="does not serve"):
        sandbox.start(sandbox.daemon(patience=0.3), f"{trap} while :; do sleep 0.05; done")
    (pid,) = sandbox.started()
    assert proc.running_since(pid) is None
    assert not sandbox.process.pid_file.exists()


def test_an_adopted_daemon_that_is_not_ready_is_not_ended(sandbox: Sandbox) -> None:
    sandbox.start(sandbox.daemon())
    sandbox.ready.unlink()
    with pytest.raises(CalicoError, match="does not serve"):
        sandbox.start(sandbox.daemon(patience=0.1))
    assert sandbox.process.pid() == sandbox.started()[0]


def test_a_daemon_that_ends_without_a_word_is_an_error(sandbox: Sandbox) -> None:
    script = f": >{sandbox.log}; exit 1"
    with pytest.raises(NotServing, match=r"the daemon does not serve; .*daemon.log is empty$"):
        sandbox.start(sandbox.daemon(patience=3600), script)


def test_a_missing_program_is_an_error(sandbox: Sandbox) -> None:
    with pytest.raises(CalicoError, match="the daemon: no-such-program: No such file or directory"):
        sandbox.daemon().start(lambda: ["no-such-program"], sandbox.adopted.append)


def test_the_lock_is_released_when_there_is_no_command(sandbox: Sandbox) -> None:
    def refuse() -> list[str]:
        raise CalicoError("no port is free")

    one = sandbox.daemon()
    with pytest.raises(CalicoError, match="no port is free"):
        one.start(refuse, sandbox.adopted.append)
    assert sandbox.start(one)


def test_a_daemon_that_ends_is_restarted_with_exponential_backoff(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    real_sleep = time.sleep

    def sleep(seconds: float) -> None:
        if seconds >= 1:
            pauses.append(seconds)
        real_sleep(0.001)

    monkeypatch.setattr(daemon.time, "sleep", sleep)
    sandbox.supervise(sandbox.daemon())
    for count in range(1, 9):
        wait_for(lambda count=count: len(sandbox.started()) == count, f"start number {count}")  # type: ignore[misc]
        wait_for(lambda: sandbox.process.pid() == sandbox.started()[-1], "its pid file")
        os.kill(sandbox.started()[-1], signal.SIGKILL)
    wait_for(lambda: len(sandbox.started()) == 9, "the last start")
    assert pauses[:8] == [1, 2, 4, 8, 16, 30, 30, 30]


def test_an_adopted_daemon_is_restarted_when_it_ends(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "FIRST_PAUSE", 0.0)
    sandbox.start(sandbox.daemon())
    sandbox.supervise(sandbox.daemon())
    (pid,) = sandbox.started()
    wait_for(lambda: sandbox.adopted == [pid], "its adoption")
    os.kill(pid, signal.SIGKILL)
    with suppress(ChildProcessError):  # a later Popen of this process may have reaped it already
        os.waitpid(pid, 0)
    wait_for(lambda: len(sandbox.started()) == 2, "another one")


def test_supervision_continues_after_any_failure(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "FIRST_PAUSE", 0.0)
    sandbox.supervise(sandbox.daemon(), [CalicoError("no port is free"), OSError("no memory"), KeyError("a defect")])
    wait_for(lambda: sandbox.process.pid() is not None, "the daemon")


def test_a_daemon_that_another_process_starts_is_waited_for_but_not_for_ever(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "LOCK_PATIENCE", 0.05)
    lock = files.try_lock(sandbox.folder / "lock")
    assert lock is not None
    with pytest.raises(CalicoError, match="is not started: another process has kept"):
        sandbox.start(sandbox.daemon())
    os.close(lock)
    assert sandbox.start(sandbox.daemon())
    assert not (sandbox.folder / "lock").exists()
