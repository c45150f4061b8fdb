"""Run many calicoctl commands, one a line, in one process.

Usage:
  calicoctl batch [<FILE>] [--keep-going]

Options:
  <FILE>        a text file, or - for standard input, which is the default
  --keep-going  go on after a line that fails; default: stop there

A line is what one would type after `calicoctl`, which it may begin with, with quotes as for a shell, but nothing else
of a shell's. What follows a # is a comment. All is read before the first line is run, and nothing is run when a line
cannot be one. An error names its line. The exit status is that of the first line that failed.

Examples:
  calicoctl batch commands.txt
  calicoctl batch --keep-going - <commands.txt
"""

from __future__ import annotations

import gc
import importlib
import io
import shlex
import sys
from contextlib import suppress

from calicoctl import cli
from calicoctl.errors import CalicoError, Failed
from calicoctl.output import with_progress


def run(argv: list[str]) -> None:
    arguments = cli.parse(str(__doc__), argv)
    file = arguments["<FILE>"]
    name = "standard input" if file in (None, "-") else file
    lines = _lines(_read(file), name)
    if file in (None, "-"):
        sys.stdin = io.StringIO()  # which has been read: no command of a line may wait for more
    gc.freeze()  # what is there stays, and need not be looked at for the garbage of each line, which may hold sockets
    gc.set_threshold(1000)
    first = done = failures = 0
    for number, words in with_progress(lines, "batch"):
        status = cli.main(words, f"{name}, line {number}: ")
        first = first or status
        done += 1
        failures += status != 0
        if status >= 128 or (status and not arguments["--keep-going"]):
            break
    if first:
        left = f", {len(lines) - done} not run" if done < len(lines) else ""
        raise Failed(f"Of {len(lines)} commands, {done - failures} done, {failures} failed{left}.", first)


def _read(file: str | None) -> str:
    try:
        if file in (None, "-"):
            return sys.stdin.read().removeprefix("\ufeff")
        with open(str(file), encoding="utf-8-sig") as stream:
            return stream.read()
    except UnicodeDecodeError:
        raise CalicoError(f"{file or 'standard input'} is not UTF-8 text") from None
    except OSError as error:
        raise CalicoError(f"{file}: {error.strerror}") from None


def _lines(text: str, name: str) -> list[tuple[int, list[str]]]:
    """Return the commands, as words, with the numbers of their lines; raise CalicoError for a line that is none."""
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            words = shlex.split(_without_comment(line))
        except ValueError as error:
            raise CalicoError(f"{name}, line {number}: {error}; nothing has been run") from None
        if words[:1] == ["calicoctl"]:
            del words[0]
        elif not words:
            continue
        why = _why_not(words)
        if why:
            raise CalicoError(f"{name}, line {number}: {why}; nothing has been run")
        lines.append((number, words))
    return lines


def _without_comment(line: str) -> str:
    """Return a line without what follows a # at the beginning of a word, where a shell sees a comment."""
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


def _why_not(words: list[str]) -> str:
    """Return why words cannot be a line of a batch, or an empty text."""
    words = [word for word in words if word not in cli.GLOBAL_OPTIONS]
    command = words[0] if words else "calicoctl"
    if command not in cli.COMMANDS:
        return f"'{command}' is not a calicoctl command"
    forbidden = command == "batch" or words[:2] == ["completion", "candidates"]
    if command == "node":
        grammar = str(importlib.import_module("calicoctl.commands.node").__doc__)
        with suppress(CalicoError):  # which running it will tell
            forbidden = cli.parse(grammar, words)["--detach"] == "false"
    return f"'{' '.join(words)}' cannot be part of a batch" if forbidden else ""
