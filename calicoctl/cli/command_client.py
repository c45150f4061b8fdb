"""The beginning of `calicoctl`: has the command run by the host's command server, or else runs it in this process.

A command server (command_server.py) has imported everything, and has connections to etcd and Docker, so that a command
takes a fraction of the time. This module imports next to nothing, since each command waits for it: `os` would take a
fifth of Python's own start, so its functions come from `posix`. What a client and a worker of the server say to each
other are messages of a Unix socket, with SEPARATOR between their parts:

1. The client: the folder of its program, which program it is (CALICOCTL or CNI), and its environment.
2. The server: a greeting. It closes the connection to a client that it does not serve: see command_fit.py. If nobody
   greets the client within GREETING seconds, the command is run in this process.
3. The client: the umask, the error handler of standard input, and the words of the command line; with these, as file
   descriptors, the standard streams and the working directory.
4. The worker to which the server has passed the connection: the exit status. Meanwhile the client sends the number of
   each signal that it receives, as one byte.

If the connection is lost after the third message, the command may have been done or not, so it is not run again.
"""

import _signal  # type: ignore[import-not-found]
import _socket
import io
import posix
import sys

TYPE_CHECKING = False  # that of `typing`, which would take as long to import as the start of Python
if TYPE_CHECKING:
    from typing import NoReturn

RUN = "/run/calico"
"""The directory of the sockets, which are RUN/HOST/SOCKET. The same as files.RUN."""

SOCKET = "commands.sock"

SEPARATOR = b"\0"

LARGEST = 1 << 20
"""The maximum size of a message, in bytes. The kernel sends less at once, by default: see net.core.wmem_default."""

GREETING = 0.05
"""Seconds to wait for the greeting."""

COMMANDS = frozenset(("batch", "bgp", "config", "container", "endpoint", "ipam", "pool", "profile", "status"))
"""The commands that a server runs. The others are about processes, or about the surroundings of the caller, or run for
long (`drops`), or read so much that the start of a process does not matter (`map`, `export`, `apply`)."""

OWN = ("/dev/fd/", "/dev/tty", "/proc/self/", "/proc/thread-self/")
"""Parts of paths that are other files in each process: `calicoctl batch <(…)` has such an argument."""

COLD = "CALICO_COLD"
"""If this variable is set, no server is asked."""

CALICOCTL, CNI = "calicoctl", "cni"
"""The programs that a server runs: commands, and the CNI plugin."""

SIGNALS = (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP)

LOST = (
    "The command server has ended, or was ended, while it ran this command: it may be done or not. Look, and repeat "
    "it; CALICO_COLD=1 runs it without the server."
)


def entry() -> "NoReturn":
    """Run the command line of this process, and end the process with the command's exit status."""
    if sys.stdin is not None and {"apply", "batch", "update"} & set(sys.argv) and not posix.get_blocking(0):
        posix.set_blocking(0, True)  # or a pause of who writes would be taken for the end
    if is_served(sys.argv[1:]):
        _try(CALICOCTL)
    _import_site()
    from calicoctl.cli.main import entry

    entry()


def cni() -> "NoReturn":
    """Carry out the operation of the CNI plugin that this process was started for, and end the process."""
    if not _names_own_file(_environment().get(b"CNI_NETNS", b"").decode(errors="replace")):
        _try(CNI)
    for number in SIGNALS:
        if _signal.getsignal(number) == _end:  # which would say that nothing is left half connected
            _signal.signal(number, _signal.SIG_DFL)
    _import_site()
    from calicoctl.plugins.cni import entry

    entry()


def _try(program: str) -> None:
    """Have a server run the command line of this process, and end the process. Return if no server serves it."""
    status = run(program, sys.argv[1:])
    if status is not None:
        posix._exit(status)


def is_served(arguments: list[str]) -> bool:
    """Return whether a command line is one that a server may run."""
    words = [word for word in arguments if word not in ("--debug", "--quiet")]
    if not words or words[0] not in COMMANDS or _names_own_file(*words):
        return False
    # while this process is in the background, the kernel would stop only this process, and the worker would read on
    return not ((words[0] == "batch" or "update" in words) and posix.isatty(0))


def _names_own_file(*words: str) -> bool:
    return any(place in word for place in OWN for word in words)


def _leads_to_own_file(path: str) -> bool:
    """Return whether a path, or a symbolic link that it names, leads to a file in OWN. Raises OSError."""
    folder = posix.getcwd()
    for _ in range(40):  # the kernel follows no more
        path = path if path.startswith("/") else f"{folder}/{path}"
        if _names_own_file(path):
            return True
        if posix.lstat(path).st_mode & 0o170000 != 0o120000:
            break
        folder, path = path.rpartition("/")[0], posix.readlink(path)
    return False


def _import_site() -> None:
    """Add the folders of libraries to sys.path, as Python's module `site` does, unless Python has done so at its start.

    An installed program is started without that module (`python -S`), which saves time.
    """
    if sys.flags.no_site:
        import site

        site.main()


def run(program: str, arguments: list[str]) -> "int | None":
    """Have a server run `program`, CALICOCTL or CNI, with `arguments`; return the exit status.

    Returns None, and nothing was run, if no server serves this process. No server is asked if the variable COLD is set,
    if the process is not root's, if a standard stream is closed, or if standard output is not in UTF-8. Otherwise, the
    handler of SIGNALS is `_end` or, once the command was sent, `_forward`; signals that are ignored stay so.
    """
    if _environment().get(COLD.encode()) or posix.geteuid() != 0:
        return None
    if sys.stdin is None or sys.stdout is None or sys.stderr is None or sys.stdout.encoding != "utf-8":
        return None
    for number in SIGNALS:
        if _signal.getsignal(number) != _signal.SIG_IGN:
            _signal.signal(number, _end)
    try:
        if program == CALICOCTL and _may_manage_agent(arguments):
            return None
        for host in posix.listdir(RUN):
            server = _greeted(f"{RUN}/{host}", program)
            if server is not None:
                return _have_run(server, arguments)
    except OSError:  # nothing is sent: no directory, too large a message, or too few file descriptors
        pass
    return None


def _may_manage_agent(arguments: list[str]) -> bool:
    """Return whether a command line is a batch that may start or stop the agent: its lines contain the word `node`.

    Returns True also for a batch from a file that a worker could not read as this process does. An agent that a worker
    started would belong to the server, and might end with it. A batch from standard input is read here, and standard
    input is replaced by a copy in memory. Raises OSError, but not after it has read.
    """
    assert sys.stdin is not None
    words = [word for word in arguments if not word.startswith("--")]
    if words[:1] != ["batch"]:
        return False
    if words[1:] and words[1] != "-":
        is_file = posix.stat(words[1]).st_mode & 0o170000 == 0o100000
        if not is_file or _leads_to_own_file(words[1]):  # it could be read only once, or not by the worker
            return True
        with open(words[1], "rb") as file:
            return b"node" in file.read()
    text = _standard_input()
    try:
        with open(posix.memfd_create("batch"), "wb") as copy:
            copy.write(text)
            copy.seek(0)
            posix.dup2(copy.fileno(), 0)
    except OSError:  # it is larger than a file of this process may be: no worker can read it
        sys.stdin = io.TextIOWrapper(io.BytesIO(text), "utf-8", sys.stdin.errors, "\n")
        return True
    return b"node" in text


def _standard_input() -> bytes:
    """Read standard input to its end. If that fails, end this process: what has been read cannot be read again."""
    pieces = []
    try:
        while piece := posix.read(0, 1 << 16):
            pieces.append(piece)
    except OSError as error:
        _tell(f"standard input: {error.strerror}")
        posix._exit(1)
    return b"".join(pieces)


def package() -> str:
    """Return the folder of this program's modules, without symbolic links. Raises OSError if it is gone."""
    descriptor = posix.open(f"{__file__.rpartition('/')[0]}/..", posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
    try:
        return posix.readlink(f"/proc/self/fd/{descriptor}")
    finally:
        posix.close(descriptor)


def _environment() -> "dict[bytes, bytes]":
    """Return the environment of this process: with what a module that `site` has imported has changed by `os`."""
    os = sys.modules.get("os")
    return posix.environ if os is None else os.environb


def _encoded(text: str) -> bytes:
    """Return a word of the command line, or a path, as the kernel has it."""
    return text.encode(sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())


def _greeted(folder: str, program: str) -> "_socket.socket | None":
    """Send the first message for `program` to the server in a folder; return the connection after its greeting.

    Returns None if the server does not greet, or does not listen, or may not be trusted (`_is_ours`).
    """
    server = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    server.settimeout(GREETING)
    variables = (name + b"=" + value for name, value in _environment().items())
    hello = SEPARATOR.join([_encoded(package()), program.encode(), *variables])
    try:
        connect(server, folder)
        if len(hello) > LARGEST or not _is_ours(server):
            raise OSError
        server.send(hello)
        if server.recv(LARGEST):
            return server
    except OSError:
        pass
    server.close()
    return None


def connect(client: _socket.socket, folder: str) -> None:
    """Connect to SOCKET in a folder, whose path may exceed 107 bytes, the kernel's limit. Raises OSError."""
    descriptor = posix.open(folder, posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
    try:
        client.connect(f"/proc/self/fd/{descriptor}/{SOCKET}")
    finally:
        posix.close(descriptor)


def _is_ours(server: _socket.socket) -> bool:
    """Return whether the server is root's, in this process's user and mount namespaces, and so may be sent secrets.

    Raises OSError if the server has ended.
    """
    credentials = server.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
    pid, user = (int.from_bytes(credentials[n : n + 4], sys.byteorder) for n in (0, 4))
    return user == 0 and all(
        posix.readlink(f"/proc/{pid}/ns/{name}") == posix.readlink(f"/proc/self/ns/{name}") for name in ("user", "mnt")
    )


def _have_run(server: _socket.socket, arguments: list[str]) -> int:
    """Have a server that has greeted run the command line `arguments`; return the exit status.

    If the connection is then lost, prints LOST, and returns 1. Raises OSError if the command could not be sent.
    """
    assert sys.stdin is not None
    umask = posix.umask(0o077)
    posix.umask(umask)
    here = posix.open(".", posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
    posix.fchdir(here)  # which the worker could not do, either, if this fails
    command = SEPARATOR.join([b"%o" % umask, str(sys.stdin.errors).encode(), *map(_encoded, arguments)])
    if len(command) > LARGEST:
        raise OSError
    descriptors = b"".join(number.to_bytes(4, sys.byteorder) for number in (0, 1, 2, here))
    server.sendmsg([command], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, descriptors)])
    server.settimeout(None)
    for number in SIGNALS:
        if _signal.getsignal(number) != _signal.SIG_IGN:
            _signal.signal(number, lambda number, frame: _forward(server, number))
    try:
        status = server.recv(LARGEST)
    except OSError:
        status = b""
    if not status:
        _tell(LOST)
    return int(status or 1)


def _end(number: int, frame: object) -> None:
    """Handle a signal before the command was sent: end this process as an interrupted command does.

    If the command was sent a moment ago, the end of the connection interrupts it.
    """
    _tell("Interrupted; no container is left half connected. Repeat the command to complete it.")
    posix._exit(128 + number)


def _tell(sentence: str) -> None:
    """Write a sentence to standard error. Errors are ignored: `run` would take them for a command that was not sent."""
    try:
        posix.write(2, sentence.encode() + b"\n")
    except OSError:
        pass


def _forward(server: _socket.socket, number: int) -> None:
    try:
        server.send(bytes([number]))
    except OSError:
        pass  # the server has ended, as `recv` tells
