"""Explains why a command line does not match the grammar, and suggests a valid one: "did you mean …"."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Sequence

from calicoctl.cli.usages import Fit, Usage, fits, leaves, positional, usages_of
from calicoctl.errors import CalicoError, NotRoot, UsageError
from calicoctl.grammar import COMMANDS, GLOBAL_OPTIONS, GrammarMismatch
from calicoctl.spelling import SYNONYMS, did_you_mean, nearest

_ELSEWHERE = {
    ("container", "show"): "calicoctl endpoint show --detailed",
    ("node", "start"): "calicoctl node",
    ("ipam", "add"): "calicoctl pool add",
}
"""(Command, subcommand) that does not exist -> existing command for the same purpose."""

MOST = 2
"""The maximum number of command lines to suggest."""


def no_command(words: list[str]) -> UsageError:
    """Return the error for a command line that does not begin with a command."""
    first = words[0]
    command = next((number for number, word in enumerate(words) if word in COMMANDS), None)
    if first == "--version":
        return UsageError(f"'{words[1]}' does not fit after 'calicoctl --version', which takes no more words")
    if first.startswith("-") and command is not None:
        behind = [*words[command:], *words[:command]]
        if _is_accepted(behind):
            return UsageError(f"'{first}' stands before the command{did_you_mean(repr(_line(behind)))}")
    near = nearest(first, [*COMMANDS, *GLOBAL_OPTIONS, "--help", "--version"])
    known = did_you_mean(repr(near)) if near else f"; the commands are {', '.join(COMMANDS)}"
    return UsageError(f"'{first}' is not a calicoctl {'option' if first.startswith('-') else 'command'}{known}")


def usage_error_for(mismatch: GrammarMismatch) -> UsageError:
    """Return the error to show for words that do not match a command's grammar.

    It contains the closest usage and, if there is one, a suggestion.
    """
    argv, why = mismatch.argv, str(mismatch)
    usages = usages_of(mismatch.grammar)
    words = positional(argv, usages)
    reach, found = _reach(usages, words)
    meant = words  # our guess at the intended words: their usage is shown
    sentence = _unknown_option(usages, argv)
    if sentence is None and reach < len(words):
        sentence, meant = _word_mismatch(usages, words, reach, found)
    if sentence is None:
        sentence = _option_out_of_place(usages, found, argv) or _option_value(why) or _options_clash(found, argv)
    if sentence is None:
        sentence, meant = _missing(usages, words, found)
    closest = _closest(usages, _reach(usages, meant)[1], meant)
    return UsageError(sentence, f"Usage:\n  {closest.text}")


def _reach(usages: list[Usage], words: list[str]) -> tuple[int, list[Fit]]:
    """Return how many of `words`, from the first one on, match a usage or the beginning of one. Also return the Fits.

    There is a Fit for each usage: the result of matching only that number of words. The number is 0 if the first word
    matches no usage.
    """
    for count in range(len(words), 0, -1):
        found = fits(usages, words[:count])
        if any(found):
            return count, found
    return 0, fits(usages, [])


def _closest(usages: list[Usage], found: list[Fit], words: list[str]) -> Usage:
    """Return, of the usages whose Fit in `found` is true, the one with the most of `words` among its keywords.

    If no Fit is true, choose from all usages. `found` are the Fits that `_reach` returns for `words`.
    """

    def score(number: int) -> tuple[bool, int]:
        return bool(found[number]), len(set(words) & set(usages[number].commands()))

    return usages[max(range(len(usages)), key=score)]


def _line(words: Sequence[str]) -> str:
    return shlex.join(["calicoctl", *words])


# Options


def _unknown_option(usages: list[Usage], argv: list[str]) -> str | None:
    """Return the message about the first option in `argv` that no usage contains, None if there is no such option.

    A global option that has a value, such as `--quiet=x`, is such an option, too.
    """
    known = {name: o for usage in usages for o in usage.options() for name in (o.long, o.short) if name}
    for word in argv:
        name = word.partition("=")[0] if word.startswith("--") else word[:2]
        if len(word) < 2 or not word.startswith("-") or word == "--":
            continue
        if any(full.startswith(name) for full in known):  # docopt accepts a unique prefix
            continue
        near = nearest(name, [*(full for full in known if full.startswith("--")), "--help", "--quiet", "--debug"])
        if near == name:
            return f"{name} takes no value"
        takes = known[near].argcount if near in known else 0
        value = word.partition("=")[2] or (leaves(known[near])[0].value if takes else "")
        spelled = f"{near}={value or 'VALUE'}" if takes else near
        return f"'{name}' is no option of 'calicoctl {argv[0]}'{did_you_mean(spelled and repr(str(spelled)))}"
    return None


def _option_value(why: str) -> str | None:
    """Return the message about an option whose value is missing, or that takes no value but has one.

    `why` is docopt's message. Returns None if it says neither.
    """
    if "requires argument" in why:
        name = why.split()[0]
        return f"{name} needs a value: {name}=VALUE"
    if "must not have an argument" in why:
        return f"{why.split()[0]} takes no value"
    return None


def _option_out_of_place(usages: list[Usage], found: list[Fit], argv: list[str]) -> str | None:
    """Return the message about an option of the command that does not go with the words.

    It is the first option in `argv` that some usage contains, but none of the usages that the words match completely.
    Returns None if there is no such option, or if the words match no usage completely. `found` are the words' Fits.
    """
    fitting = [usage for usage, fit in zip(usages, found) if fit.complete]
    if not fitting:
        return None
    allowed = {name for usage in fitting for o in usage.options() for name in (o.long, o.short) if name}
    known = {name for usage in usages for o in usage.options() for name in (o.long, o.short) if name}
    for name in _options(argv):
        if name in known - allowed:
            own = " ".join(["calicoctl", *fitting[0].commands()])
            near = nearest(name, allowed)
            return f"'{name}' does not go with '{own}'{did_you_mean(near and repr(near))}"
    return None


def _options_clash(found: list[Fit], argv: list[str]) -> str | None:
    """Return the message about an option that is given twice or, if none is, about options that cannot be combined.

    A single option is reported as not allowed with the words. Returns None if there are no options, or if no Fit in
    `found` is complete.
    """
    options = _options(argv)
    if not options or not any(fit.complete for fit in found):
        return None
    twice = next((name for name in options if options.count(name) > 1), None)
    if twice is not None:
        return f"'{twice}' is given twice"
    some = " and ".join(f"'{name}'" for name in options)
    return f"{some} do not go together" if options[1:] else f"{some} does not go with the words that are given"


def _options(argv: list[str]) -> list[str]:
    """Return the names of the options in `argv` before the word `--`."""
    before = argv[: argv.index("--")] if "--" in argv else argv
    words = [word for word in before if word.startswith("-") and word != "-"]
    return [word.partition("=")[0] if word.startswith("--") else word[:2] for word in words]


# Words


def _word_mismatch(usages: list[Usage], words: list[str], reach: int, found: list[Fit]) -> tuple[str, list[str]]:
    """Return the message about `words[reach]`, the first word that does not match, and the words probably meant.

    Without a single best guess, the latter are `words` themselves. `reach` and `found` are the results of `_reach`.
    """
    bad, before = words[reach], words[:reach]
    commands = set().union(*(fit.commands() for fit in found))
    arguments = set().union(*(fit.arguments() for fit in found))
    sentence = f"'{bad}' does not fit after '{_line(before)}'"
    elsewhere = _elsewhere(words, reach)
    near = None if elsewhere else nearest(bad, commands)
    if near:
        return f"{sentence}{did_you_mean(repr(near))}", [*before, near, *words[reach + 1 :]]
    repaired = [] if elsewhere else _repaired(usages, words, reach)
    suggestion = " or ".join(f"'{line}'" for line in [*map(_line, repaired), elsewhere] if line)
    if suggestion:
        return sentence + did_you_mean(suggestion), repaired[0] if len(repaired) == 1 else words
    if commands or arguments:
        return f"{sentence}, where {_one_of(commands, arguments)} belongs", words
    return f"{sentence}, which takes no more words", words


def _elsewhere(words: list[str], place: int) -> str | None:
    """Return an existing command line for the purpose of the command `words[0]` with the subcommand `words[1]`.

    The command has no such subcommand. A synonym of a subcommand counts as the subcommand. `place` is the index of the
    word that does not fit. Returns None if `place` is not 1, or if _ELSEWHERE has no such command line.
    """
    if place != 1:
        return None
    return _ELSEWHERE.get((words[0], words[1])) or _ELSEWHERE.get((words[0], SYNONYMS.get(words[1], words[1])))


def _repaired(usages: list[Usage], words: list[str], reach: int) -> list[list[str]]:
    """Return up to MOST valid command lines that the user may have meant by `words`.

    Tries these repairs one after another, until one yields a valid command line: correct a misspelt word; insert a
    word; swap `words[reach]` with the word before it; swap these two, and insert a word.
    """
    own = {name for usage in usages for name in usage.commands()}

    def expected(line: list[str], place: int) -> list[str]:
        return sorted(set().union(*(fit.commands() for fit in fits(usages, line[:place]))))

    def inserted(line: list[str]) -> list[list[str]]:
        return [
            [*line[:place], name, *line[place:]] for place in range(1, len(line) + 1) for name in expected(line, place)
        ]

    def misspelt() -> list[list[str]]:
        found = []
        for place in range(1, reach + 1):
            names = expected(words, place)
            near = None if words[place] in names else nearest(words[place], names)
            if near:
                found.append([*words[:place], near, *words[place + 1 :]])
        return found

    swapped = [*words[: reach - 1], words[reach], words[reach - 1], *words[reach + 1 :]]
    for candidates in (misspelt(), inserted(words), [swapped], inserted(swapped)):
        whole = [line for line in candidates if _is_whole(usages, line, own) and _is_accepted(line)]
        if whole:
            return whole[:MOST]
    return []


def _is_whole(usages: list[Usage], line: list[str], own: set[str]) -> bool:
    """Return whether a command line matches one of `usages` completely, without taking a keyword for an argument.

    `own` are the keywords of all usages.
    """
    return any(
        fit.complete
        and all(word in fits([usage], line[:place])[0].commands() for place, word in enumerate(line) if word in own)
        for usage, fit in zip(usages, fits(usages, line))
    )


def _is_accepted(line: list[str]) -> bool:
    """Return whether the command line `line` is valid, at least if root runs it."""
    try:
        importlib.import_module(f"calicoctl.commands.{line[0]}").prepare(line)
    except NotRoot:
        return True
    except CalicoError:
        return False
    return True


def _missing(usages: list[Usage], words: list[str], found: list[Fit]) -> tuple[str, list[str]]:
    """Return the message about a command line that is incomplete, and the words probably meant.

    `words` match only the beginning of a usage, or an option is missing. If the last word is similar to a keyword that
    could be in its place, the words probably meant have that keyword instead; if not, they are `words` themselves.
    `found` are the Fits of `words`.
    """
    commands = set().union(*(fit.commands() for fit in found))
    arguments = set().union(*(fit.arguments() for fit in found))
    last, before = words[-1], words[:-1]
    # a word that was taken for an argument may be a misspelt keyword
    own = set().union(*(fit.commands() for fit in fits(usages, before))) if before else set()
    near = None if last in own else nearest(last, own)
    meant = [*before, near] if near else words
    suggestion = f"'{_line(meant)}'" if near else None
    if not near and len(words) == 2 and (elsewhere := _elsewhere(words, 1)):
        suggestion = f"'{elsewhere}'"
    if not commands and not arguments:  # the words are complete: options are missing
        return f"'{_line(words)}' lacks something; see below", words
    return f"After '{_line(words)}', {_one_of(commands, arguments)} is missing{did_you_mean(suggestion)}", meant


def _one_of(commands: set[str], arguments: set[str]) -> str:
    names = [*(f"'{name}'" for name in sorted(commands)), *sorted(arguments)]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
