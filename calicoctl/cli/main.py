"""The entry point: finds the command, runs it, and converts errors into one line and an exit status."""

from __future__ import annotations

import gc
import importlib
import io
import os
import signal
import sys
from contextlib import nullcontext, redirect_stdout, suppress
from functools import partial
from types import FrameType
from typing import Any, NoReturn, cast

from calicoctl import __version__, environment, programs, slim
from calicoctl.errors import CalicoError, Failures, UsageError, printable
from calicoctl.grammar import COMMANDS, GLOBAL_OPTIONS, GrammarMismatch, Prepared
from calicoctl.limits import LINE, shortened
from calicoctl.output import report_discarded

USAGE = """Connect containers to a Calico network.

Usage:
  calicoctl [--debug] [--quiet] <command> [<args>...]
  calicoctl help <command> [<args>...]
  calicoctl <command> [<args>...] --help
  calicoctl --help
  calicoctl --version

Commands:
  apply        make the configuration as a file says
  batch        run many commands, one per line, in one process
  bgp          show and change the global BGP configuration
  checksystem  check this host's prerequisites
  completion   print a completion script for a shell
  config       show and change settings of host agents and routing daemons
  container    connect Docker containers and network namespaces
  datastore    show which store is used, move the data to etcd's v3 API
  diags        collect diagnostics of this host into an archive
  drops        show which packets policy has dropped on this host
  endpoint     show the endpoints of all hosts, change or remove them
  export       write the configuration as one file
  ipam         show address assignments, release addresses, find leaked ones
  map          show who may reach whom, on which protocols and ports
  node         register this host, and run its agent
  pool         show and change the IP pools
  profile      show and change profiles: network policy as tags and rules
  status       show the status of this host's agent and endpoints
  version      show the version

Options:
  --quiet      print errors, but no results, for scripts that only check the
               exit status
  --debug      print a traceback for errors (also: CALICO_DEBUG=1)

The addresses of etcd and Docker come from the environment (ETCD_AUTHORITY,
ETCD_ENDPOINTS, DOCKER_HOST and others) and, where it does not set them, from
/etc/calico/node.env.
"""

WITHOUT_SETTINGS = ("completion", "version")
"""Commands that run even if the settings file is invalid. `completion` reads the file only to query etcd or Docker."""


class Interrupted(KeyboardInterrupt):
    """Raised when a signal (`number`) asks the process to end. Changes are rolled back while it propagates.

    Python discards an exception that is raised in a finalizer, for example. If this one is discarded, the signal is
    handled again a moment later, unless whoever caught it has set `handled`. The base class is KeyboardInterrupt since
    asyncio, which pyroute2 uses, lets a KeyboardInterrupt out of a callback, and only logs an ordinary exception.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.handled = False

    def __del__(self) -> None:
        if not self.handled:
            _interrupt_soon(self.number)


class _Output(io.FileIO):
    """A standard stream that ignores a closed pipe, so that a command completes even if nobody reads its output."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            return len(data)

    @classmethod
    def over(cls, stream: Any) -> io.TextIOWrapper:
        """Return a text stream that writes to the file descriptor of `stream`, in the encoding of `stream`.

        Characters that the encoding lacks are escaped.
        """
        binary = io.BufferedWriter(cls(stream.fileno(), "w", closefd=False))
        lines = stream is sys.stderr or stream.isatty()
        return io.TextIOWrapper(binary, stream.encoding, "backslashreplace", line_buffering=lines)


class _ErrorOutput(_Output):
    """Standard error. Errors on writing to it are ignored, since there is no other place to report them."""

    def write(self, data: Any) -> int:
        with suppress(OSError):
            return super().write(data)
        return len(data)


def entry() -> NoReturn:
    """Run the command line of this process, and end the process with the command's exit status."""
    _open_standard_streams()
    slim.install()
    programs.look_in_system_folders()
    gc.set_threshold(50_000)  # imports create many objects, and no garbage
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    os._exit(
        run(sys.argv[1:], "in this process")
    )  # skips the shutdown of the interpreter, which takes longer than many a command


def run(argv: list[str], where: str) -> int:
    """Run the command line `argv` with this process's standard streams; return the exit status.

    `where`, such as "in this process", is printed to standard error if the user asks for details (is_debugged).
    """
    sys.stdout, sys.stderr = _Output.over(sys.stdout), _ErrorOutput.over(sys.stderr)
    report_discarded(is_debugged(argv))
    if is_debugged(argv):
        print(f"The command runs {where}.", file=sys.stderr)
    status = main(argv)
    try:
        sys.stdout.flush()
    except OSError as error:
        print(f"cannot write the output: {error.strerror}", file=sys.stderr)
        status = status or 1
    sys.stderr.flush()
    return status


def _open_standard_streams() -> None:
    """Open /dev/null for each closed standard stream, so that no other file uses its descriptor."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            fd = os.open(os.devnull, os.O_RDWR)
            if fd != number:
                os.dup2(fd, number)
                os.close(fd)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def is_debugged(argv: list[str]) -> bool:
    """Return whether the user asks for details of errors: by --debug in `argv`, or by the variable CALICO_DEBUG."""
    return "--debug" in argv or os.environ.get("CALICO_DEBUG", "") not in ("", "0")


def main(argv: list[str], where: str = "", prepared: Prepared | None = None) -> int:
    """Run the command line `argv`; return the exit status. Errors are printed to standard error.

    `where` is a prefix for error messages, such as a line number. `prepared` is the result of `prepare` for this
    command line. If it is None, `prepare` is called here.
    """
    given = argv
    quiet = "--quiet" in given
    argv = [word for word in given if word not in GLOBAL_OPTIONS]

    def report(sentence: str) -> None:
        _report(where + sentence, is_debugged(given))  # now: the settings file may have set the variable

    try:
        with redirect_stdout(io.StringIO()) if quiet else nullcontext():
            (prepared or prepare(argv))()
        return 0
    except CalicoError as error:
        for one in error.errors if isinstance(error, Failures) else [error]:
            report(str(one))
        if isinstance(error, UsageError) and error.usage:
            print(error.usage, file=sys.stderr)
        return error.exit_status
    except Interrupted as interrupted:
        interrupted.handled = True
        report("Interrupted; no container is left half connected. Repeat the command to complete it.")
        return 128 + interrupted.number
    except OSError as error:
        report(f"Operating system error: {error}.")
        return 1
    except MemoryError:
        report("Out of memory.")
        return 1
    except Exception as error:
        report(f"Internal error ({type(error).__name__}: {error}); run again with --debug to see where.")
        return 1


def prepare(argv: list[str]) -> Prepared:
    """Check the command line `argv`, which must contain no global options; return the function that runs it.

    Also adds the variables of the settings file to the environment, except for help, `--version`, and the commands in
    WITHOUT_SETTINGS. Raises CalicoError if the command line or the settings file is invalid.
    """
    for word in argv:
        if "\0" in word or any("\ud800" <= c <= "\udfff" for c in word):
            raise CalicoError(f"{word!a} cannot be used: it is not UTF-8 text")
    if not argv:
        raise UsageError("Which command?", USAGE.partition("\n\n")[2].partition("\n\nOptions")[0])
    asks_help = "--help" in argv or "-h" in argv or argv[0] == "help"
    words = [word for word in argv if word not in ("--help", "-h")]
    if asks_help and words[:1] == ["help"]:
        del words[0]
    if asks_help and not words:
        return partial(print, USAGE, end="")
    if words == ["--version"]:
        return partial(print, __version__)
    if words[0] not in COMMANDS:
        from calicoctl.cli.suggest import no_command

        raise no_command(words)
    if asks_help:
        from calicoctl.cli.help import help_of

        return partial(print, help_of(words))
    try:
        prepared = cast(Prepared, importlib.import_module(f"calicoctl.commands.{words[0]}").prepare(argv))
    except GrammarMismatch as mismatch:
        from calicoctl.cli.suggest import usage_error_for

        raise usage_error_for(mismatch) from None
    if words[0] not in WITHOUT_SETTINGS:
        environment.complete()
    return prepared


def interrupt(number: int, frame: FrameType | None) -> None:
    if _imports(frame):
        _interrupt_soon(number)
        return
    for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)  # the rollback must not be interrupted
    raise Interrupted(number)


def _imports(frame: FrameType | None) -> bool:
    """Return whether `frame`, or a frame that called it, is importing a module.

    If so, a signal must not raise Interrupted now: it would leave the module half initialized, and the command may need
    the module to undo its changes.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _interrupt_soon(number: int) -> None:
    signal.signal(signal.SIGALRM, lambda _, frame: interrupt(number, frame))
    signal.setitimer(signal.ITIMER_REAL, 0.0005)


def _report(sentence: str, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exc()
    print(shortened(printable(" ".join(sentence.split())), LINE), file=sys.stderr)
