"""The grammar of the command line: the list of commands, and the parser of command lines.

The grammar of a command is the docstring of its module in calicoctl/commands. Of the functions here, only `grammar_of`
imports a command's module.
"""

from __future__ import annotations

import importlib
import os
from copy import copy
from functools import cache
from typing import Any, Callable

from calicoctl.errors import NotRoot, UsageError

COMMANDS = (
    "apply",
    "batch",
    "bgp",
    "checksystem",
    "completion",
    "config",
    "container",
    "datastore",
    "diags",
    "drops",
    "endpoint",
    "export",
    "ipam",
    "map",
    "node",
    "pool",
    "profile",
    "status",
    "version",
)

GLOBAL_OPTIONS = ("--debug", "--quiet")
"""Options that are allowed anywhere on the command line."""

FORMATS = ("text", "json", "yaml")
"""The values of --output."""

Prepared = Callable[[], None]
"""A function that executes a command. The function `prepare(argv)` of the command's module checks `argv`, and returns
such a function."""


class GrammarMismatch(UsageError):
    """`argv` does not match a command's `grammar`. The error's text is docopt's message, which may be empty."""

    def __init__(self, grammar: str, argv: list[str], why: str) -> None:
        super().__init__(why)
        self.grammar = grammar
        self.argv = argv


def grammar_of(command: str) -> str:
    """Return the docstring of a command's module, which is both the command's grammar and its help text."""
    return str(importlib.import_module(f"calicoctl.commands.{command}").__doc__)


def parse(grammar: str, argv: list[str]) -> dict[str, Any]:
    """Parse `argv` with a command's grammar; return docopt's dictionary, such as `{"<IP>": "192.0.2.1"}`.

    The word `--` is removed from the lists in the dictionary. Raises GrammarMismatch if `argv` does not match the
    grammar. Raises UsageError if nothing follows `--`, or if the value of --output is not in FORMATS.
    """
    import docopt

    try:
        arguments = _matched(grammar, argv)
    except docopt.DocoptExit as error:
        raise GrammarMismatch(grammar, argv, str(error).replace(error.usage.strip(), "").strip()) from None
    if "--" in argv:  # words after it may begin with a dash; docopt leaves the '--' in the list
        for words in (value for value in arguments.values() if isinstance(value, list) and "--" in value):
            words.remove("--")
            if not words:
                raise UsageError("Nothing follows '--'")
    if arguments.get("--output") is not None:
        arguments["--output"] = wanted = arguments["--output"].removeprefix("=")  # of -o=json
        if wanted not in FORMATS:
            raise UsageError(f"--output={wanted}: it must be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    return arguments


def _matched(grammar: str, argv: list[str]) -> dict[str, Any]:
    """Return what docopt.docopt() returns, or raise what it raises; compile each grammar only once for a process."""
    import docopt

    usage, options, pattern = compiled(grammar)
    docopt.DocoptExit.usage = usage  # it is the text of a DocoptExit
    words = docopt.parse_argv(docopt.TokenStream(argv, docopt.DocoptExit), list(options))
    matched, left, collected = pattern.match(words)
    if not matched or left:
        raise docopt.DocoptExit()
    return {leaf.name: copy(leaf.value) for leaf in pattern.flat() + collected}


@cache
def compiled(grammar: str) -> tuple[str, list[Any], Any]:
    """Return a grammar's usage section, its options, and its tree, as docopt.docopt() makes them.

    The tree and the list are shared, and must not be changed.
    """
    import docopt

    usage = docopt.printable_usage(grammar)
    options = docopt.parse_defaults(grammar)
    return usage, options, docopt.parse_pattern(docopt.formal_usage(usage), options).fix()


def require_root() -> None:
    """Raise NotRoot unless the process runs as root."""
    if os.geteuid() != 0:
        raise NotRoot("This command must be run as root (with sudo, say).")
