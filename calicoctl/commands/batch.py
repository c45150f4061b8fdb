"""Run many calicoctl commands, one per line, in one process.

Usage:
  calicoctl batch [<FILE>] [--keep-going]

Options:
  <FILE>        a text file, or - for standard input, which is the default
  --keep-going  continue after a line that fails; default: stop there

A line holds the words of one command; `calicoctl` itself may be left out.
Quotes work as in a shell, and # begins a comment; nothing else of a shell's
syntax is supported. All lines are checked before the first one runs: if one
is invalid, none is run. Errors name the line. If lines fail since etcd does
not answer, and have waited for it for 20 s in all, the rest is not run. The
exit status is that of the first line that failed.

Examples:
  calicoctl batch commands.txt
  calicoctl batch --keep-going - <commands.txt
"""

from __future__ import annotations

import gc
import io
import shlex
import sys
import time
from dataclasses import dataclass
from functools import partial

from calicoctl.cli import main as cli
from calicoctl.datastore import reserved
from calicoctl.datastore.backends import PATIENCE
from calicoctl.errors import CalicoError, Failed, Failures, StoreUnavailable, UsageError
from calicoctl.grammar import GLOBAL_OPTIONS, Prepared, grammar_of, parse
from calicoctl.output import quantity, with_progress


def prepare(argv: list[str]) -> Prepared:
    arguments = parse(str(__doc__), argv)
    return partial(_batch, arguments["<FILE>"], arguments["--keep-going"])


def _batch(file: str | None, keep_going: bool) -> None:
    lines = _lines(_read(file), _name(file))
    if _is_input(file):
        sys.stdin = io.StringIO()  # it has been read: no command may wait for more
    gc.freeze()  # objects that exist now stay; the garbage of each line, which may hold sockets, is collected early
    gc.set_threshold(1000)
    try:
        _run(lines, keep_going)
    finally:
        reserved.reuse(False)


def _run(lines: list[Line], keep_going: bool) -> None:
    """Run the commands of a batch. Raises Failed if any of them fails."""
    first = done = failures = 0
    waited = 0.0
    for line in with_progress(lines, "batch"):
        began = time.monotonic()
        errors: list[CalicoError] = []
        reserved.reuse(line.command == "container")  # any other may change the addresses of hosts
        status = cli.main(line.words, line.place, partial(_noting, line.prepared, errors))
        first = first or status
        done += 1
        failures += status != 0
        if any(isinstance(error, StoreUnavailable) for error in errors):
            waited += time.monotonic() - began
        if status >= 128 or (status and not keep_going) or waited >= PATIENCE:
            break
    if first:
        left = f", {len(lines) - done} not run" if done < len(lines) else ""
        if left and keep_going and waited >= PATIENCE:
            left += f", from {lines[done].place.rstrip(': ')} on: etcd did not answer within {waited:.0f} s in all"
        raise Failed(f"Of {quantity(len(lines), 'command')}, {done - failures} done, {failures} failed{left}.", first)


def _noting(prepared: Prepared, errors: list[CalicoError]) -> None:
    """Run a command; add its error, or its errors if it does several things, to `errors`, and raise it."""
    try:
        prepared()
    except CalicoError as error:
        errors += error.errors if isinstance(error, Failures) else [error]
        raise


def _is_input(file: str | None) -> bool:
    return file in (None, "-")


def _name(file: str | None) -> str:
    """Return the name of the file in messages."""
    return "standard input" if _is_input(file) else str(file)


def _read(file: str | None) -> str:
    try:
        if _is_input(file):
            return sys.stdin.read().removeprefix("\ufeff")
        with open(str(file), encoding="utf-8-sig") as stream:
            return stream.read()
    except UnicodeDecodeError:
        raise CalicoError(f"{_name(file)} is not UTF-8 text") from None
    except OSError as error:
        raise CalicoError(f"{_name(file)}: {error.strerror}") from None


@dataclass(frozen=True)
class Line:
    """A command of a batch: its `words`, and the function that runs it, `prepared`.

    `command` is the first word that is no global option. `place` is the prefix of its error messages: the name of the
    file, and the number of the line.
    """

    place: str
    words: list[str]
    prepared: Prepared
    command: str


def _lines(text: str, name: str) -> list[Line]:
    """Parse and check the commands of a batch: the lines of `text`. Raises CalicoError for an invalid line.

    `name` is the name of the file in error messages.
    """
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):
        place = f"{name}, line {number}: "
        try:
            words = shlex.split(_without_comment(line))
            if words[:1] == ["calicoctl"]:
                del words[0]
            elif not words:
                continue
            command = [word for word in words if word not in GLOBAL_OPTIONS]
            lines.append(Line(place, words, _prepared(command), command[0]))
        except UsageError as error:
            raise UsageError(f"{place}{_nothing_run(error)}", error.usage) from None
        except (CalicoError, ValueError) as error:
            status = error.exit_status if isinstance(error, CalicoError) else 2
            raise Failed(f"{place}{_nothing_run(error)}", status) from None
    return lines


def _nothing_run(error: Exception) -> str:
    sentence = str(error)
    return f"{sentence} Nothing has been run." if sentence.endswith((".", "?")) else f"{sentence}; nothing has been run"


def _prepared(words: list[str]) -> Prepared:
    """Check one command, `words` without global options, and return the function that runs it.

    Raises CalicoError if the command is invalid, or not allowed in a batch.
    """
    prepared = cli.prepare(words)
    endless = words[0] == "node" and parse(grammar_of("node"), words)["--detach"] == "false"
    if endless or words[0] == "batch" or words[:2] == ["completion", "candidates"]:
        raise CalicoError(f"'{' '.join(words)}' cannot be part of a batch")
    return prepared


def _without_comment(line: str) -> str:
    """Return a line without its comment, which begins with a # at the start of a word, as in a shell."""
    quote = ""
    before = " "
    for place, c in enumerate(line):
        if before == "\\" and quote != "'":
            before = ""
            continue
        if quote:
            quote = "" if c == quote else quote
        elif c == "#" and before.isspace():
            return line[:place]
        elif c in "\"'":
            quote = c
        before = c
    return line
