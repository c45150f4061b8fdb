"""Commands that the host's command server runs: they do what they do in a process of their own, and nothing else."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from calicoctl.cli import command_client
from calicoctl.felix.agent import PRIORITY
from tests.system.agent import A4, AgentHost
from tests.system.support import CALICOCTL, Result, gone, run, wait_for
from tests.system.test_cni import PLUGIN, Network, namespaces

SOCKET = Path("/run/calico/host1/commands.sock")
COLD = {"CALICO_COLD": "1"}


@pytest.fixture
def served(node: AgentHost) -> Iterator[AgentHost]:
    """A host whose command server waits for clients."""
    wait_for(lambda: worker(node) is not None, "the command server")
    yield node


def where(result: Result) -> int | None:
    """Return the process id of the worker that has run a command, None if it ran in a process of its own."""
    said = re.search(
        r"^The command runs (?:in this process|in process (\d+), of the command server)\.$", result.err, re.M
    )
    assert said, result
    return int(said[1]) if said[1] else None


def worker(node: AgentHost, *command: str, **env: str) -> int | None:
    words = (*command, CALICOCTL, "--debug", "profile", "show")
    return where(run(*words, check=False, env=node.environment(**env)))


def server() -> int:
    """Return the process id of the server, which listens at the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(str(SOCKET))
        return int.from_bytes(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4), sys.byteorder)


def workers(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    "line",
    [
        "profile show",
        "profile show --output=json",
        "profile show --no-such-option",
        "profile web rule show",
        "profile no-such rule show",
        "pool show --quiet",
        "endpoint show --detailed",
        "container no-such endpoint show",
        "container add /no/such/path 192.168.0.1",
        "config felix LogSeverityScreen",
        "ipam check",
        "bgp peer show",
        "status --output=json --quiet",
        "profile add web",
    ],
)
def test_output_and_exit_status_are_the_same(served: AgentHost, line: str) -> None:
    served.ctl("profile", "add", "web", env=COLD)
    served.add("a", A4)
    served.sync()
    warm, cold = (served.ctl(*line.split(), status=None, env=env) for env in ({}, COLD))
    assert warm == cold


def test_standard_input_reaches_the_command(served: AgentHost) -> None:
    served.ctl("profile", "add", "web")
    rules = '{"id": "web", "inbound_rules": [{"action": "deny"}], "outbound_rules": []}'
    assert served.ctl("--debug", "profile", "web", "rule", "update", input=rules).out
    assert (
        served.ctl("profile", "web", "rule", "show").out == served.ctl("profile", "web", "rule", "show", env=COLD).out
    )
    assert '"deny"' in served.etcd.get("/calico/v1/policy/profile/web/rules")
    done = served.ctl("--debug", "batch", "-", input="profile add one\nprofile add two\n")
    assert where(done) and "Created profile two" in done.out
    carriage_return = b"profile show\rpool show"  # which ends no line
    for env in ({}, COLD):
        command = [CALICOCTL, "batch"]
        said = subprocess.run(command, input=carriage_return, env=served.environment(**env), capture_output=True)
        assert said.returncode == 2 and b"standard input, line 1: 'pool' does not fit" in said.stderr
    done = served.ctl("--debug", "batch", input="node show --output=json\nprofile show\n")
    assert where(done) is None and '"name": "host1"' in done.out and "two" in done.out, "an agent is not a worker's"
    script = 'exec "$0" batch <(echo profile add three)'
    assert run("bash", "-c", script, CALICOCTL, env=served.environment()).out == "Created profile three\n"
    for env in ({"LC_ALL": "C.UTF-8"}, {"LC_ALL": "C"}):
        broken = [
            served.ctl(
                "batch", input="profile add \udcff\n", status=None, env={**env, **more}, errors="surrogateescape"
            )
            for more in ({}, COLD)
        ]
        assert broken[0] == broken[1] and "UTF-8" in broken[0].err


def test_the_cni_plugin_runs_there_as_well(served: AgentHost) -> None:
    namespaces("c1")
    said = []
    for env in ({"CALICO_DEBUG": "1"}, COLD):
        answers, where_it_ran = [], set()
        for command in ("ADD", "CHECK", "ADD", "DEL", "DEL"):
            variables = Network(served).environment(command, **env)
            config = {"cniVersion": "1.1.0", "name": "net1", "type": "calico", "pool": ["ipv4"]}
            if command == "CHECK":
                config["prevResult"] = json.loads(answers[0].out)
            done = run(*PLUGIN, input=json.dumps(config), check=False, env=variables)
            where_it_ran.add("The plugin runs in process" in done.err)
            answers.append(done)
        assert (True in where_it_ran) == (env != COLD)  # not each one, since a busy server may greet too late
        said.append([(done.status, done.out) for done in answers])
    warm, cold = said
    assert [status for status, _ in warm] == [0, 0, 1, 0, 0]
    random = re.compile("cali[0-9a-f]+|(?:[0-9a-f]{2}:){5}[0-9a-f]{2}")  # names and MAC addresses of interfaces
    assert random.sub("", str(warm)) == random.sub("", str(cold))


def test_nothing_is_left_of_one_that_ends_after_its_host_was_removed(served: AgentHost) -> None:
    pid = server()
    os.kill(pid, signal.SIGSTOP)
    try:
        served.ctl("node", "stop")
        served.ctl("node", "remove")
        assert SOCKET.is_socket()
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: not SOCKET.parent.exists(), "the removal of the folder", 10)


def test_paths_are_those_of_the_callers_directory(served: AgentHost, tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("profile add web\n")
    done = served.ctl("--debug", "batch", "lines", cwd=tmp_path)
    assert where(done) and done.out == "Created profile web\n"
    assert worker(served, CALICO_ENV_FILE="node.env") is None, "its path is relative to the caller's directory"


def test_the_priority_is_the_callers_and_the_agents_is_higher(served: AgentHost) -> None:
    priorities = {os.getpriority(os.PRIO_PROCESS, pid) for pid in (served.pid, server(), *workers(server()))}
    assert priorities == {PRIORITY}
    served.ctl("profile", "add", "web")
    command = ("nice", "-n", "7", CALICOCTL, "profile", "web", "rule", "update")
    with subprocess.Popen(command, env=served.environment(), stdin=subprocess.PIPE, text=True) as process:
        wait_for(lambda: any(busy(one) for one in workers(server())), "a worker that runs it")
        (one,) = filter(busy, workers(server()))
        wait_for(lambda: os.getpriority(os.PRIO_PROCESS, one) == 7, "the caller's priority")
        process.communicate('{"id": "web", "inbound_rules": [], "outbound_rules": []}')
    assert process.returncode == 0
    wait_for(lambda: os.getpriority(os.PRIO_PROCESS, one) == PRIORITY, "its own priority")


def test_a_terminal_is_the_callers(served: AgentHost) -> None:
    served.add("a", A4)
    served.sync()
    warm, cold = (on_a_terminal(served, "endpoint", "show", "--detailed", **env) for env in ({}, COLD))
    assert warm == cold and {len(line) for line in warm.splitlines() if "|" in line} == {60}


def on_a_terminal(host: AgentHost, *words: str, **env: str) -> str:
    """Return what a command writes to a terminal with 60 columns, which is its standard output and error."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 60, 0, 0))
    environment = host.environment(**env)
    environment.pop("COLUMNS", None)
    shown = b""
    with subprocess.Popen([CALICOCTL, *words], stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as command:
        os.close(theirs)
        with contextlib.suppress(OSError):  # the terminal's other end is closed
            while more := os.read(ours, 10000):
                shown += more
        assert command.wait() == 0, shown
    os.close(ours)
    return shown.decode()


def test_nobody_need_read_the_output(served: AgentHost) -> None:
    for env in ({}, COLD):
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w") as out:
            done = subprocess.run([CALICOCTL, "profile", "show"], env=served.environment(**env), stdout=out)
        assert done.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_interrupts_the_command(served: AgentHost, number: int) -> None:
    with hanging(served) as process:
        process.send_signal(number)
        process.send_signal(signal.SIGHUP)  # the rollback is not interrupted
        status, err = finish(served, process)
    assert status in (128 + number, 128 + signal.SIGHUP) and "Interrupted" in err  # the kernel orders them by number
    assert not served.records() and served.ctl("ipam", "check").out
    wait_for(lambda: worker(served), "another worker")


def test_a_client_that_is_killed_interrupts_the_command(served: AgentHost) -> None:
    with hanging(served) as process:
        process.kill()
        finish(served, process)
    wait_for(lambda: served.ctl("ipam", "check", status=None, env=COLD).status == 0, "the rollback")
    assert not served.records() and worker(served)


def test_a_command_whose_worker_is_killed_is_not_run_again(served: AgentHost) -> None:
    with hanging(served) as process:
        for one in workers(server()):
            os.kill(one, signal.SIGKILL)
        status, err = finish(served, process)
    assert status == 1 and "it may be done or not" in err and not served.records()
    wait_for(lambda: worker(served), "new workers")


class hanging:
    """A command that waits for etcd, which is stopped: it connects the namespace a."""

    def __init__(self, node: AgentHost) -> None:
        self._node = node

    def __enter__(self) -> subprocess.Popen:
        run("ip", "netns", "add", "a")
        idle = {one: busy(one) for one in workers(server())}
        self._node.etcd.process.send_signal(signal.SIGSTOP)
        self._process = self._node.start("container", "add", "/var/run/netns/a", A4)
        wait_for(lambda: any(busy(one) > cpu for one, cpu in idle.items()), "a worker that runs it")
        return self._process

    def __exit__(self, *_: object) -> None:
        self._node.etcd.process.send_signal(signal.SIGCONT)
        self._process.kill()
        self._process.wait()


def finish(node: AgentHost, process: subprocess.Popen) -> tuple[int, str]:
    node.etcd.process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def busy(pid: int) -> bool:
    """Return whether a worker has a client's standard output."""
    with contextlib.suppress(FileNotFoundError):  # it has just ended
        return str(Path(f"/proc/{pid}/fd/1").readlink()) != os.devnull
    return False


def test_who_does_not_fit_runs_the_command_in_a_process_of_its_own(served: AgentHost) -> None:
    assert worker(served)
    assert worker(served, **COLD) is None
    assert worker(served, ETCD_AUTHORITY="127.0.0.1:1") is None
    assert worker(served, DOCKER_HOST="unix:///none") is None
    assert worker(served, HOSTNAME="host2") is None
    assert worker(served, PYTHONIOENCODING="latin-1") is None
    for command in (
        ("unshare", "--mount"),
        ("unshare", "--net"),
        ("unshare", "--pid", "--fork"),
        ("unshare", "--uts"),
        ("chroot", "/"),
        ("setpriv", "--bounding-set", "-sys_admin"),
        ("setpriv", "--no-new-privs"),
        ("setpriv", "--reuid", "65534", "--clear-groups"),
    ):
        expected = command[0] == "chroot"  # the same root
        assert (worker(served, *command) is not None) == expected, command
    variables = encoded(served.environment())
    assert is_greeted(*variables) and not is_greeted(*variables, b"=x"), "a name that no process can set"
    with hanging_server(server()):
        assert worker(served) is None
    assert worker(served)


def encoded(environment: dict[str, str]) -> list[bytes]:
    return [f"{name}={value}".encode() for name, value in environment.items()]


def hello(client: socket.socket, *variables: bytes) -> None:
    """Send what a client with these variables sends first."""
    client.settimeout(5)
    client.connect(str(SOCKET))
    client.send(b"\0".join([os.fsencode(command_client.package()), b"calicoctl", *variables]))


def is_greeted(*variables: bytes) -> bool:
    """Return whether the server greets a client with these variables."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        hello(client, *variables)
        try:
            return client.recv(100) != b""
        except ConnectionResetError:  # the server has closed the connection, and read nothing before
            return False


class hanging_server:
    """A server whose workers are all stopped."""

    def __init__(self, pid: int) -> None:
        self._pids = [pid, *workers(pid)]

    def __enter__(self) -> None:
        for pid in self._pids:
            os.kill(pid, signal.SIGSTOP)

    def __exit__(self, *_: object) -> None:
        for pid in reversed(self._pids):
            os.kill(pid, signal.SIGCONT)


def test_another_user_is_refused_by_what_the_kernel_says_of_it(served: AgentHost) -> None:
    assert SOCKET.stat().st_mode & 0o777 == 0o600
    SOCKET.chmod(0o666)
    script = (
        "import socket, sys; client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); client.settimeout(5);"
        f"client.connect('{SOCKET}'); client.send(sys.argv[1].encode()); print(client.recv(100))"
    )
    hello = command_client.package()
    other = ("setpriv", "--reuid", "65534", "--clear-groups")
    said = run(*other, sys.executable, "-c", script, hello, check=False)
    assert said.out in ("", "b''\n") and (said.out or "ConnectionResetError" in said.err), said


@pytest.mark.parametrize("other", [("setpriv", "--reuid", "65534", "--clear-groups"), ("unshare", "--mount")])
def test_a_server_of_anybody_else_gets_nothing(served: AgentHost, other: tuple[str, ...], tmp_path: Path) -> None:
    folder, received = Path("/run/calico/impostor"), tmp_path / "received"
    folder.mkdir()
    folder.chmod(0o777)
    received.touch()
    received.chmod(0o666)
    script = (
        "import os, socket, sys; server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET);"
        "server.bind(sys.argv[1] + '.new'); server.listen(); os.rename(sys.argv[1] + '.new', sys.argv[1]);"
        "client = server.accept()[0];"
        f"open({str(received)!r}, 'wb').write(client.recv(1000000)); client.send(b'1'); client.recv(1000000)"
    )
    tmp_path.chmod(0o755)
    path = folder / command_client.SOCKET
    with hanging_server(server()), subprocess.Popen([*other, sys.executable, "-c", script, str(path)]) as impostor:
        try:
            wait_for(path.exists, "the impostor")
            assert worker(served) is None
            impostor.wait(10)
        finally:
            impostor.kill()
            path.unlink(missing_ok=True)
            folder.rmdir()
    assert not received.read_bytes()


def test_after_an_upgrade_commands_run_cold_until_the_server_has_replaced_itself(served: AgentHost) -> None:
    before, changed = server(), Path(command_client.package(), "__init__.py")
    changed.touch()
    assert worker(served) is None
    wait_for(lambda: worker(served), "the new server")
    assert not set(workers(server())) & {before}


def test_a_server_that_is_told_to_end_does_not_run_the_new_program(served: AgentHost) -> None:
    before, changed = server(), Path(command_client.package(), "__init__.py")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        hello(client, *encoded(served.environment()))
        assert client.recv(100)  # and it sends no command: the server waits for it a while
        changed.touch()
        assert worker(served) is None
        os.kill(before, signal.SIGTERM)
        wait_for(lambda: gone(before), "the server's end")


def test_the_server_ends_with_the_agent_and_is_started_again_when_it_ends(served: AgentHost) -> None:
    first = server()
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: worker(served) and server() != first, "the next server")
    second = server()
    served.kill_agent()
    wait_for(lambda: gone(second) and not SOCKET.exists(), "the server's end")
    assert worker(served) is None
    served.start_agent()
    wait_for(lambda: worker(served), "the server of the next agent")


def test_one_that_outlives_its_agent_leaves_the_next_ones_socket_alone(served: AgentHost) -> None:
    served.ctl("profile", "add", "web")
    before, changed = server(), Path(command_client.package(), "__init__.py")
    command = (CALICOCTL, "profile", "web", "rule", "update")
    with subprocess.Popen(command, env=served.environment(), stdin=subprocess.PIPE, text=True) as process:
        wait_for(lambda: any(busy(one) for one in workers(before)), "a worker that runs it")
        changed.touch()
        assert worker(served) is None
        served.kill_agent()
        served.start_agent()
        wait_for(lambda: worker(served), "the server of the next agent")
        process.communicate('{"id": "web", "inbound_rules": [], "outbound_rules": []}')
    assert process.returncode == 0
    wait_for(lambda: gone(before), "the end of the server before")
    wait_for(lambda: worker(served), "the server of the next agent")


def test_many_clients_at_once_are_all_served_and_nothing_is_left_of_them(served: AgentHost) -> None:
    def descriptors() -> dict[int, int]:
        counts = {}
        for one in workers(server()):
            with contextlib.suppress(FileNotFoundError):  # one of too many, which has ended meanwhile
                counts[one] = len([*Path(f"/proc/{one}/fd").iterdir()])
        return counts

    with ThreadPoolExecutor(30) as pool:
        done = list(pool.map(lambda n: served.ctl("profile", "add", f"p{n}"), range(60)))
    assert {one.status for one in done} == {0} and len(served.ctl("profile", "show", env=COLD).out.split()) > 60
    wait_for(lambda: len(workers(server())) <= 2, "the workers that are too many to end")
    used: set[int | None] = set()

    def all_have_been_used() -> bool:  # each has its connection to etcd then
        with ThreadPoolExecutor(2) as pool:
            used.update(pool.map(lambda _: worker(served), range(2)))
        return used >= set(workers(server()))

    wait_for(all_have_been_used, "each worker to run a command")
    wait_for(lambda: len(workers(server())) <= 2, "the workers that are too many to end")
    samples = [descriptors() for _ in range(100)]  # in some, a client's connection may be open yet
    before = {one: min(sample[one] for sample in samples if one in sample) for one in samples[-1]}
    for _ in range(20):
        served.ctl("profile", "show")

    def is_as_before() -> bool:
        now = descriptors()
        stayed = before.keys() & now.keys()
        return (
            bool(stayed)
            and all(now[one] == before[one] for one in stayed)
            and max(now.values()) <= max(before.values())
        )

    wait_for(is_as_before, f"what {before} were before")
    wait_for(lambda: len(workers(server())) <= 2, "the workers that are too many to end")


def test_a_server_whose_workers_cannot_start_ends_and_says_why(node: AgentHost) -> None:
    done = run(
        *("timeout", "10", sys.executable, "-m", "calicoctl.cli.command_server"),
        check=False,
        env=node.environment(HOSTNAME="host2", ETCD_AUTHORITY="127.0.0.1:none"),
    )
    assert done.status == 1 and "ETCD_AUTHORITY" in done.err
