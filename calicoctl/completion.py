"""Tells a shell what may come next on a command line: words of the grammars, and the names of what is there.

The grammars are the commands' docstrings, read by docopt; no list of words is kept anywhere else.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Callable

from calicoctl import environment
from calicoctl.datastore.client import DatastoreClient
from calicoctl.errors import CalicoError
from calicoctl.grammar import COMMANDS, GLOBAL_OPTIONS, grammar_of
from calicoctl.usages import Usage, fits, positional, usages_of


class OutOfTime(BaseException):
    """Who presses the tab key has waited long enough for the one that is being asked."""


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
    usages = usages_of(grammar_of(words[0]))
    plain = positional(words, usages)
    fitting = [(usage, fit) for usage, fit in zip(usages, fits(usages, plain)) if fit]
    if partial.startswith("-"):
        return _options([usage for usage, _ in fitting], plain, partial)
    found: set[str] = set()
    for _, fit in fitting:
        found |= fit.commands()
        for name in fit.arguments():
            found.update(_values(name, plain))
    return found


def _options(usages: list[Usage], words: list[str], partial: str) -> set[str]:
    """Return the options of those usages that the words fit."""
    name, equals, _ = partial.partition("=")
    found = {"--help", *GLOBAL_OPTIONS}
    for option in (option for usage in usages for option in usage.options()):
        if equals and option.long == name:
            found.update(f"{name}={value}" for value in _values(name, words))
        else:
            found.add(f"{option.long}=" if option.argcount else option.long)
    return found


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
