"""The part of Docker's hook that the runtime runs for each container with labels: it must be fast, and imports little.

`calicoctl node --docker-hook` copies this file to docker_hook.FOLDER, where it stays when calicoctl is upgraded or
uninstalled. So it imports no other module of this package. It is run with `python3 -I -S`, in two ways:

* `prepare HOST COMMAND -- ARGUMENTS…`: before a container is created, by the runtime `runtime` in the same folder.
  ARGUMENTS are those of `runc create`. If the container has the label or the variable that may ask for a connection,
  the hook is added to the bundle's config.json.
* `connect HOST COMMAND ID`: as that hook (createRuntime), when the container's namespaces exist, and its process does
  not run yet. The state that the runtime writes to standard input is sent to the process that serves the socket
  /run/calico/HOST/hook.sock. If nobody listens, or if that process ends without an answer, the container is connected
  by a new process (starting.py).

HOST is this host's name in Calico, COMMAND the path of calicoctl, ID the container's id. If the container cannot be
connected, one sentence is written to standard error, which Docker shows, and the exit status is 1: the container does
not start. If it may be connected later, as when etcd is away, a file that says so is written for the host's agent.

Source: https://github.com/opencontainers/runtime-spec/blob/main/config.md#posix-platform-hooks
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any, NoReturn

RUN = "/run/calico"
"""The directory of the socket, and of the files for the agent: files.RUN."""

SECONDS = 5.0
"""How long the server may take to connect a container, in seconds."""

PROCESS_SECONDS = 12.0
"""How long a new process may take for it, in seconds: it waits for the processors while many containers start."""

KILL_AFTER = 1.0
"""How long a process that connects a container may take to roll back what it has done, in seconds."""

TEMPORARY = 75
"""The exit status of starting.py if the container may be connected later. Source: sysexits.h, EX_TEMPFAIL."""

START_AGAIN = "start-again."
"""The prefix of the name of the file, below /run/calico/HOST, of a container that may be connected later."""

PREFIX = "Calico: "
"""The beginning of the sentence that says why a container does not start."""

PROGRAM = "from calicoctl import slim; slim.install(); from calicoctl.workloads import starting; starting.main()"
"""What the new process runs, in Python."""

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where the new process finds programs."""

LARGEST = 1 << 20
"""The maximum size of the state, and of an answer, in bytes."""


def prepare(host: str, command: str, arguments: list[str]) -> None:
    """Add the hook to the bundle of the container that `runc ARGUMENTS` is to create, if the container may need it."""
    options = dict(zip(arguments, arguments[1:]))
    bundle, id = options.get("--bundle") or options.get("-b") or os.getcwd(), arguments[-1]
    if not _may_ask(id):
        return
    path = os.path.join(bundle, "config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
        mode = os.fstat(file.fileno()).st_mode & 0o777
    hooks = config["hooks"] = config.get("hooks") or {}
    words = [sys.executable, "-I", "-S", os.path.abspath(__file__), "connect", host, command, id]
    hook = {"path": sys.executable, "args": words, "timeout": int(SECONDS + PROCESS_SECONDS + KILL_AFTER) + 4}
    hooks["createRuntime"] = [*(hooks.get("createRuntime") or []), hook]
    new = f"{path}.calico"
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode), "w", encoding="utf-8") as file:
        json.dump(config, file)
    os.replace(new, path)


def _may_ask(id: str) -> bool:
    """Return whether the engine's file of a container has a label or a variable that may ask for a connection."""
    with open(os.path.join(_folder_of_containers(), id, "config.v2.json"), encoding="utf-8") as file:
        config = json.load(file).get("Config") or {}
    variables = [variable.partition("=") for variable in config.get("Env") or []]
    values = [(config.get("Labels") or {}).get("calico.ip"), *(v for name, _, v in variables if name == "CALICO_IP")]
    return any(value and value.strip() for value in values)


def _folder_of_containers() -> str:
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "settings.json")
    try:
        with open(path, encoding="utf-8") as file:
            return os.path.join(json.load(file)["data_root"], "containers")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RuntimeError(f"{path} is damaged ({error}). Run 'calicoctl node --docker-hook' again") from None


def connect(host: str, command: str, id: str) -> None:
    """Have the container connected whose state is on standard input. Ends this process if that fails."""
    give_up = time.monotonic() + SECONDS
    state = sys.stdin.buffer.read(LARGEST)
    with socket.socket(socket.AF_UNIX) as server:
        server.settimeout(SECONDS)
        try:
            server.connect(f"{RUN}/{host}/hook.sock")
            answer = _answer(server, state, give_up)
        except socket.timeout:
            why: str | None = f"it was not connected within {SECONDS:.0f} s"
        except OSError:  # nobody listens, or has answered; or the name of the host is too long for a socket's
            why = _connect_in_new_process(command, state)
        else:
            why = _understood(answer)
    if why is not None:
        _note(host, id)
        if why:
            _fail(why)
        sys.exit(1)


def _answer(server: socket.socket, state: bytes, give_up: float) -> bytes:
    """Send the state to the server, and return its answer.

    Raises socket.timeout if the answer is not complete at the time `give_up` (time.monotonic), ConnectionError if the
    server ends without an answer, and OSError.
    """
    answer = b""
    server.sendall(b"POST /connect HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(state) + state)
    while len(answer) <= LARGEST:
        server.settimeout(max(0.001, give_up - time.monotonic()))
        part = server.recv(65536)
        if not part:
            break
        answer += part
    if not answer:
        raise ConnectionResetError
    return answer


def _understood(answer: bytes) -> str | None:
    """Return, from the server's answer, why the container is not connected, but may be later; None if it is connected.

    Ends this process if the container cannot be connected.
    """
    head, _, body = answer.partition(b"\r\n\r\n")
    try:
        said: Any = json.loads(body)
        why = said.get("Err")
        status = int(head.split()[1])
    except (ValueError, IndexError, AttributeError):
        return "the server of the hook has given an invalid answer"
    if status == 200 and not why:
        return None
    if said.get("Again"):
        return str(why)
    _fail(str(why or "the server of the hook has refused the request"))


def _connect_in_new_process(command: str, state: bytes) -> str | None:
    """Run starting.py; return why the container is not connected, but may be later; None if it is connected.

    `state` is the standard input of the new process. An empty text in the result says that this process has written the
    reason to standard error. Ends the calling process if the container cannot be connected.
    """
    python = os.path.join(os.path.dirname(os.path.realpath(command)), "python")
    if not os.access(python, os.X_OK):
        _fail(f"calicoctl is not installed as {command} any more. Run 'calicoctl node --docker-hook' again")
    file = os.memfd_create("state")
    os.write(file, state)
    os.lseek(file, 0, os.SEEK_SET)
    actions = [(os.POSIX_SPAWN_DUP2, file, 0)]
    pid = os.posix_spawn(python, [python, "-I", "-c", PROGRAM], {"PATH": PATH}, file_actions=actions)
    process = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(process, select.POLLIN)
    for number, seconds in ((signal.SIGTERM, PROCESS_SECONDS), (signal.SIGKILL, KILL_AFTER)):
        if poll.poll(seconds * 1000):
            break
        os.kill(pid, number)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return f"it was not connected within {PROCESS_SECONDS:.0f} s"
    code = os.WEXITSTATUS(status)
    if code not in (0, TEMPORARY):
        sys.exit(1)  # it has said why
    return "" if code == TEMPORARY else None


def _note(host: str, id: str) -> None:
    """Write the file that has the agent start the container again, if its restart policy says so."""
    folder = f"{RUN}/{host}"
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(f"{folder}/{START_AGAIN}{id}", flags, 0o600)
        os.utime(file)  # the agent must see that it is written anew
        os.close(file)
    except OSError as error:
        print(f"{folder} cannot be written: {error.strerror}.", file=sys.stderr)


def _fail(why: str) -> NoReturn:
    print(f"{PREFIX}{why.rstrip('.')}.", file=sys.stderr)
    sys.exit(1)


def _log(arguments: list[str], why: str) -> None:
    """Write an error where the caller of the runtime looks for it: to the file of `--log`, as JSON."""
    path = dict(zip(arguments, arguments[1:])).get("--log")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"level": "error", "msg": why}) + "\n")


def main() -> None:
    what, host, command, *rest = sys.argv[1:]
    if what == "connect":
        connect(host, command, rest[0])
        return
    arguments = rest[1:]
    try:
        prepare(host, command, arguments)
    except Exception as error:  # whatever the files contain, the user is told
        why = f"{PREFIX}the hook could not be added to the container: {type(error).__name__}: {error}"
        _log(arguments, why)
        print(why, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
