"""The command line's words: the list of commands, and the grammars, which are the commands' docstrings.

Every command imports this; it imports no command but to read a docstring, and neither etcd, Docker nor the kernel.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, Callable

from calicoctl.errors import NotRoot, UsageError

COMMANDS = (
    "batch",
    "bgp",
    "checksystem",
    "completion",
    "config",
    "container",
    "diags",
    "endpoint",
    "ipam",
    "node",
    "pool",
    "profile",
    "status",
    "version",
)

GLOBAL_OPTIONS = ("--debug", "--quiet")
"""Those that may stand anywhere."""

FORMATS = ("text", "json")
"""What --output takes."""

Prepared = Callable[[], None]
"""What a command's `prepare(argv)` returns: all that was typed has been checked, and nothing has been done yet."""


class Misfit(UsageError):
    """Words that do not fit the grammar of a command; its text is what docopt says, which may be nothing."""

    def __init__(self, grammar: str, argv: list[str], why: str) -> None:
        super().__init__(why)
        self.grammar = grammar
        self.argv = argv


def grammar_of(command: str) -> str:
    """Return the docstring of a command's module, which is its grammar and its help."""
    return str(importlib.import_module(f"calicoctl.commands.{command}").__doc__)


def parse(grammar: str, argv: list[str]) -> dict[str, Any]:
    """Return what docopt makes of `argv` by a command's docstring; raise Misfit, or UsageError."""
    import docopt

    try:
        arguments = dict(docopt.docopt(grammar, argv, help=False))
    except docopt.DocoptExit as error:
        raise Misfit(grammar, argv, str(error).replace(error.usage.strip(), "").strip()) from None
    if "--" in argv:  # what follows may begin with a dash; docopt leaves the mark in the list
        for words in (value for value in arguments.values() if isinstance(value, list) and "--" in value):
            words.remove("--")
            if not words:
                raise UsageError("Nothing follows '--'")
    if arguments.get("--output") is not None:
        arguments["--output"] = wanted = arguments["--output"].removeprefix("=")  # of -o=json
        if wanted not in FORMATS:
            raise UsageError(f"--output={wanted}: it must be {' or '.join(FORMATS)}")
    return arguments


def require_root() -> None:
    """Raise NotRoot unless the process may do anything to the kernel's network."""
    if os.geteuid() != 0:
        raise NotRoot("This command must be run as root (with sudo, say).")
