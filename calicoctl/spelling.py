"""Finds the known word that a user probably meant by an unknown word, for "did you mean …?"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SYNONYMS = {
    "ls": "show",
    "list": "show",
    "ps": "show",
    "get": "show",
    "describe": "show",
    "inspect": "show",
    "rm": "remove",
    "del": "remove",
    "delete": "remove",
    "create": "add",
    "new": "add",
    "connect": "add",
    "disconnect": "remove",
    "ingress": "inbound",
    "in": "inbound",
    "egress": "outbound",
    "out": "outbound",
    "rules": "rule",
    "tags": "tag",
    "profiles": "profile",
    "port": "ports",
    "net": "cidr",
    "subnet": "cidr",
    "add": "append",
    "append": "add",
    "permit": "allow",
    "accept": "allow",
    "drop": "deny",
    "reject": "deny",
    "src": "from",
    "dst": "to",
    "-v": "--version",
    "-V": "--version",
    "-q": "--quiet",
    "-d": "--debug",
}
"""Words of other tools and other commands -> the words of calicoctl with the same meaning."""


def nearest(word: str, names: Iterable[str]) -> str | None:
    """Return the name in `names` that a user probably meant by `word`, which is not in `names`.

    This is the name that SYNONYMS has for `word`, or the name that differs from it only in case or in leading dashes,
    or the only name that begins with it, or the most similar name. Returns None if no name is similar. An option, which
    begins with a dash, is suggested only for an option.
    """
    meant = SYNONYMS.get(word, word)
    alike = [name for name in sorted(set(names)) if name.startswith("-") == meant.startswith("-")]
    known = {name.lower().lstrip("-"): name for name in alike}  # dashes would make all options look alike
    word, meant = (text.lower().lstrip("-") for text in (word, meant))
    for text in (meant, word):
        if text in known:
            return known[text]
    longer = [name for name in known if len(word) > 1 and name.startswith(word)]
    close = longer[:1] if len(longer) == 1 else difflib.get_close_matches(word, known, 1, 0.6)
    return known[close[0]] if close else None


def did_you_mean(suggestion: str | None) -> str:
    """Return `; did you mean SUGGESTION?`, the end of an error's text; "" if `suggestion` is None or empty."""
    return f"; did you mean {suggestion}?" if suggestion else ""
