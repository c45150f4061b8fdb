"""Tells a shell what may come next on a command line: words of the grammars, and the names of what is there.

The grammars are the commands' docstrings, read by docopt; no list of words is kept anywhere else.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable

from calicoctl import environment
from calicoctl.datastore.client import DatastoreClient
from calicoctl.errors import CalicoError
from calicoctl.grammar import COMMANDS, GLOBAL_OPTIONS, grammar_of


class OutOfTime(BaseException):
    """Who presses the tab key has waited long enough for the one that is being asked."""


Node = Any
"""A node of docopt's tree of a grammar: it has `name`, or `children`, or both options' names."""

_HARMLESS = re.compile(r"[A-Za-z0-9_./:=@%+,-]+", re.ASCII)
"""What a shell takes for a plain word. Names come from etcd and Docker, and end on somebody's command line."""


def candidates(line: str) -> list[str]:
    """Return what the last word of a command line may become; the line ends where the cursor is."""
    words, partial = _split(line)
    if not words:
        found: Iterable[str] = (*COMMANDS, "--help", "--version", *GLOBAL_OPTIONS)
    elif words[0] not in COMMANDS:
        found = ()
    else:
        found = _of_command(words, partial)
    return sorted({word for word in found if word.startswith(partial) and _HARMLESS.fullmatch(word)})


def _split(line: str) -> tuple[list[str], str]:
    """Return the words behind `calicoctl`, and the one that is being typed."""
    try:
        words = shlex.split(line)
    except ValueError:  # an open quote
        words = line.split()
    if not line or line[-1].isspace():
        words.append("")
    start = next((number for number, word in enumerate(words) if word.rpartition("/")[2] == "calicoctl"), 0)
    words = words[start + 1 :]
    partial = words.pop() if words else ""
    return [word for word in words if word not in GLOBAL_OPTIONS], partial


def _of_command(words: list[str], partial: str) -> set[str]:
    usages = _usages(words[0])
    if partial.startswith("-"):
        return _options(usages, _positional(words, usages), partial)
    found: set[str] = set()
    expected: set[Node] = set()
    positional = _positional(words, usages)
    taken = _taken(usages, positional)
    for usage in usages:
        _walk(usage, positional, {0}, expected, taken)
    for leaf in expected:
        if type(leaf).__name__ == "Command":
            found.add(leaf.name)
        else:
            found.update(_values(leaf.name, positional))
    return found


def _usages(command: str) -> list[Node]:
    """Return docopt's trees of a command's usages, one each."""
    import docopt

    doc = grammar_of(command)
    options = docopt.parse_defaults(doc)
    pattern = docopt.parse_pattern(docopt.formal_usage(docopt.printable_usage(doc)), options).fix()
    (child,) = pattern.children
    return list(child.children) if type(child).__name__ == "Either" else [child]


def _positional(words: list[str], usages: list[Node]) -> list[str]:
    """Return the words that are neither options nor their values."""
    with_value = {o.long for usage in usages for o in _leaves(usage) if type(o).__name__ == "Option" and o.argcount}
    found = []
    skip = False
    for word in words:
        if not skip and not word.startswith("--"):
            found.append(word)
        skip = word in with_value
    return found


def _taken(usages: list[Node], words: list[str]) -> list[bool]:
    """Tell of each word whether it is one of the grammar's own, which no argument may be taken for."""
    taken: list[bool] = []
    for number, word in enumerate(words):
        expected: set[Node] = set()
        for usage in usages:
            _walk(usage, words[:number], {0}, expected, taken)
        taken.append(any(type(leaf).__name__ == "Command" and leaf.name == word for leaf in expected))
    return taken


def _walk(node: Node, words: list[str], starts: set[int], expected: set[Node], taken: list[bool]) -> set[int]:
    """Return how many words are used up behind a node, by how many were before; collect what may come behind all."""
    kind = type(node).__name__
    if kind in ("Command", "Argument"):
        if len(words) in starts:
            expected.add(node)
        if kind == "Command":
            return {start + 1 for start in starts if words[start : start + 1] == [node.name]}
        return {start + 1 for start in starts if start < len(words) and not taken[start]}
    if kind == "Either":
        return set().union(*(_walk(child, words, starts, expected, taken) for child in node.children))
    if kind in ("Required", "Optional", "OneOrMore"):
        ends = set(starts)
        for child in node.children:
            after = _walk(child, words, ends, expected, taken)
            ends = ends | after if kind == "Optional" else after
        if kind == "OneOrMore" and ends - starts:
            ends |= _walk(node, words, ends - starts, expected, taken)
        return ends
    return set(starts)  # an option, which may stand anywhere


def _options(usages: list[Node], words: list[str], partial: str) -> set[str]:
    """Return the options of those usages that the words fit."""
    taken = _taken(usages, words)
    name, equals, _ = partial.partition("=")
    found = {"--help", *GLOBAL_OPTIONS}
    for usage in usages:
        reached: set[Node] = set()
        ends = _walk(usage, words, {0}, reached, taken)
        if not reached and len(words) not in ends:
            continue
        for leaf in _leaves(usage):
            if type(leaf).__name__ != "Option":
                continue
            if equals and leaf.long == name:
                found.update(f"{name}={value}" for value in _values(name, words))
            else:
                found.add(f"{leaf.long}=" if leaf.argcount else leaf.long)
    return found


def _leaves(node: Node) -> list[Node]:
    if not hasattr(node, "children"):
        return [node]
    return [leaf for child in node.children for leaf in _leaves(child)]


# The names of what is there


def _values(name: str, words: list[str]) -> Iterable[str]:
    """Return what an argument, or an option, may be; nothing where that cannot be told."""
    try:
        if name in _SOURCES:
            environment.complete()
        return _SOURCES[name](words) if name in _SOURCES else ()
    except (CalicoError, OutOfTime):
        return ()


def _containers(words: list[str]) -> list[str]:
    from calicoctl.workload import docker_containers

    found = [f"/var/run/netns/{path.name}" for path in Path("/var/run/netns").glob("*")]
    with suppress(CalicoError, OutOfTime):  # a host may have no Docker
        found += [name.lstrip("/") for container in docker_containers() for name in container.get("Names") or ()]
    return found


def _addresses(words: list[str]) -> list[str]:
    return ["ipv4", "ipv6", *_pools(words)] if words[0] == "container" and "add" in words else []


def _pools(words: list[str]) -> list[str]:
    datastore = DatastoreClient.from_environment()
    return [pool.cidr for version in (4, 6) for pool in datastore.pools(version)]


def _profiles(words: list[str]) -> list[str]:
    return DatastoreClient.from_environment().profile_names()


def _endpoints(words: list[str]) -> list[str]:
    return [endpoint.id.endpoint for endpoint in DatastoreClient.from_environment().readable_endpoints()[0]]


def _hosts(words: list[str]) -> list[str]:
    return DatastoreClient.from_environment().registered_hosts()


def _peers(words: list[str]) -> list[str]:
    datastore = DatastoreClient.from_environment()
    host = datastore.host if words[0] == "node" else None
    return [peer.ip for version in (4, 6) for peer in datastore.readable_bgp_peers(version, host)[0]]


def _tags(words: list[str]) -> list[str]:
    return DatastoreClient.from_environment().tags(words[1])


def _settings(words: list[str]) -> list[str]:
    from calicoctl.commands.config import known

    return list(known("node" in words, "felix" in words))


def _fixed(*values: str) -> Callable[[list[str]], list[str]]:
    return lambda words: list(values)


_SOURCES: dict[str, Callable[[list[str]], Iterable[str]]] = {
    "<CONTAINER>": _containers,
    "<CONTAINERS>": _containers,
    "<FROM>": _containers,
    "<TO>": _containers,
    "<IP>": _addresses,
    "<CIDRS>": _pools,
    "<PROFILE>": _profiles,
    "<PROFILES>": _profiles,
    "<TAGS>": _tags,
    "<ENDPOINT_ID>": _endpoints,
    "<PEER_IP>": _peers,
    "<NAME>": _settings,
    "--endpoint": _endpoints,
    "--host": _hosts,
    "--hostname": _hosts,
    "--orchestrator": _fixed("docker", "namespace"),
    "--output": _fixed("json"),
    "--detach": _fixed("true", "false"),
}
