"""The text of `--help`: the module docstring of a command, or the parts of it that concern a subcommand."""

from __future__ import annotations

import re

from calicoctl.cli.usages import Usage, fits, positional, usages_of
from calicoctl.grammar import grammar_of


def help_of(words: list[str]) -> str:
    """Return the help text of the command `words[0]`.

    If the other words match only some usages of the command, or the beginnings of some, only the parts of the text that
    concern these usages are returned.
    """
    text = grammar_of(words[0]).strip()
    usages = usages_of(text)
    plain = positional(words, usages)
    chosen = [usage for usage, fit in zip(usages, fits(usages, plain)) if fit]
    if not chosen:  # the words are, for example, `profile rule add`, without the profile's name
        chosen = [usage for usage in usages if _in_order(plain, usage.commands())]
    if not chosen or len(chosen) == len(usages):
        return text
    return _part(text, chosen, [word for word in plain if any(word in usage.commands() for usage in chosen)])


def _in_order(words: list[str], commands: list[str]) -> bool:
    left = iter(commands)
    return all(word in left for word in words)


def _part(text: str, chosen: list[Usage], words: list[str]) -> str:
    """Return the parts of a help text that concern the `chosen` usages.

    Of the examples, only those that contain all `words` are returned.
    """
    names = {name for usage in chosen for name in usage.arguments()}
    names |= {name for usage in chosen for o in usage.options() for name in (o.long, o.short) if name}
    own = {word for usage in chosen for word in usage.commands()}
    blocks = []
    keep = True
    for block in text.split("\n\n"):
        if block.startswith("Usage:"):
            block = "\n".join(["Usage:", *(f"  {usage.text}" for usage in chosen)])
        elif block.startswith("Options:"):
            entries = re.findall(r"^  \S.*(?:\n    +.*)*", block, re.MULTILINE)
            wanted = [
                entry for entry in entries if names & set(re.findall(r"<[^>]+>|--?[a-z0-9-]+", entry.split("  ")[1]))
            ]
            block = "\n".join(["Options:", *wanted]) if wanted else ""
        elif block.startswith("Examples:"):
            lines = [line for line in block.splitlines()[1:] if set(words) <= set(line.split())]
            block = "\n".join(["Examples:", *lines]) if lines else ""
        else:
            # a paragraph that begins with words in backquotes concerns the usages with one of these words; so do the
            # indented paragraphs after it
            about = re.match(r"`([^`]+)`", block)
            if not block.startswith(" "):
                keep = about is None or bool(own & set(about[1].split()))
            block = block if keep else ""
        blocks.append(block)
    return "\n\n".join([*filter(None, blocks), f"Full help: calicoctl {words[0]} --help"])
