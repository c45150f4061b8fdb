"""Matches words against the usages of a command, for completion, the help of a subcommand, and error messages.

docopt parses the grammars into trees of `Command` (a keyword, such as `add`), `Argument` (a placeholder, such as
`<IP>`), `Option`, `Either`, `Required`, `Optional` and `OneOrMore`; this module walks these trees.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from calicoctl.grammar import compiled

Node = Any
"""A node of docopt's tree: a leaf with `name` (an option: with `short` and `long`), or a branch with `children`."""


@dataclass(frozen=True)
class Usage:
    """One usage of a command: its text, including continuation lines, and the tree into which docopt parses it."""

    text: str
    tree: Node

    def commands(self) -> list[str]:
        """Return the usage's keywords, in order."""
        return [leaf.name for leaf in leaves(self.tree) if kind(leaf) == "Command"]

    def arguments(self) -> list[str]:
        """Return the names of the usage's arguments, such as `<IP>`."""
        return [leaf.name for leaf in leaves(self.tree) if kind(leaf) == "Argument"]

    def options(self) -> list[Node]:
        return [leaf for leaf in leaves(self.tree) if kind(leaf) == "Option"]


def usages_of(grammar: str) -> list[Usage]:
    """Parse a grammar in docopt's syntax; return its usages in order."""
    section, _, tree = compiled(grammar)
    (child,) = tree.children
    trees = child.children if kind(child) == "Either" else [child]
    texts = re.findall(r"^(?:Usage:)? *(calicoctl .*(?:\n(?! *calicoctl ).*)*)", section, re.MULTILINE)
    return [Usage(text, tree) for text, tree in zip(texts, trees)]


def kind(node: Node) -> str:
    return type(node).__name__


def leaves(node: Node) -> list[Node]:
    if not hasattr(node, "children"):
        return [node]
    return [leaf for child in node.children for leaf in leaves(child)]


@dataclass(frozen=True)
class Fit:
    """The result of matching words against one usage.

    `complete` says whether the words match the whole usage, apart from options. `expected` are the keywords and
    arguments that may follow the words; it is empty if nothing may follow, or if the words do not match.
    """

    expected: frozenset[Node]
    complete: bool

    def __bool__(self) -> bool:
        """Return whether the words match the usage, or the beginning of it."""
        return self.complete or bool(self.expected)

    def commands(self) -> set[str]:
        return {leaf.name for leaf in self.expected if kind(leaf) == "Command"}

    def arguments(self) -> set[str]:
        return {leaf.name for leaf in self.expected if kind(leaf) == "Argument"}


def fits(usages: list[Usage], words: list[str]) -> list[Fit]:
    """Match `words`, which contain no options, against each usage; return a Fit for each.

    If a word is a keyword at its position in any of the usages, no usage may take it as an argument.
    """
    own: list[bool] = []
    for number, word in enumerate(words):
        found = [_fit(usage, words[:number], own) for usage in usages]
        own.append(any(word in fit.commands() for fit in found))
    return [_fit(usage, words, own) for usage in usages]


def _fit(usage: Usage, words: list[str], own: list[bool]) -> Fit:
    expected: set[Node] = set()
    ends = _walk(usage.tree, words, {0}, expected, own)
    return Fit(frozenset(expected), len(words) in ends)


def _walk(node: Node, words: list[str], starts: set[int], expected: set[Node], own: list[bool]) -> set[int]:
    """Match words against a node; return each number of words that can be consumed when the node ends.

    `starts` has each number of words that can be consumed when the node begins. `own[i]` is true if `words[i]` is a
    keyword. The keywords and arguments of the node that may follow the last word are added to `expected`.
    """
    name = kind(node)
    if name in ("Command", "Argument"):
        if len(words) in starts:
            expected.add(node)
        if name == "Command":
            return {start + 1 for start in starts if words[start : start + 1] == [node.name]}
        return {start + 1 for start in starts if start < len(words) and not own[start]}
    if name == "Either":
        return set().union(*(_walk(child, words, starts, expected, own) for child in node.children))
    if name in ("Required", "Optional", "OneOrMore"):
        ends = set(starts)
        for child in node.children:
            after = _walk(child, words, ends, expected, own)
            ends = ends | after if name == "Optional" else after
        if name == "OneOrMore" and ends - starts:
            ends |= _walk(node, words, ends - starts, expected, own)
        return ends
    return set(starts)  # an option, which is allowed anywhere


def positional(words: list[str], usages: list[Usage]) -> list[str]:
    """Return those of `words` that are neither options nor values of options.

    `usages` are all usages of the command: they say which options take a value.
    """
    with_value = {name for usage in usages for o in usage.options() if o.argcount for name in (o.long, o.short)}
    found = []
    skip = False
    for word in words:
        if not skip and (not word.startswith("-") or word == "-"):
            found.append(word)
        skip = word in with_value
    return found
