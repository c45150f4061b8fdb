"""Computes the completion candidates of a command line: keywords of the grammars, and names of existing objects.

The grammars are the module docstrings of commands/, and GRAMMAR in policy/rules.py.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Callable

from calicoctl import environment
from calicoctl.cli.usages import Usage, fits, positional, usages_of
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.config import Setting, settings_of
from calicoctl.datastore.model import VXLAN_MODES
from calicoctl.errors import CalicoError
from calicoctl.grammar import COMMANDS, FORMATS, GLOBAL_OPTIONS, grammar_of


class OutOfTime(BaseException):
    """Raised by a timer (commands/completion.py) if etcd or Docker takes too long to answer."""


FILES, DIRECTORIES = ":files", ":directories"
"""Candidates that make the shell's completion script complete names of files or directories."""

_HARMLESS = re.compile(r"[A-Za-z0-9_./:=@%+,-]+", re.ASCII)
"""Matches words without special characters of a shell. Other candidates are dropped."""


def candidates(line: str) -> list[str]:
    """Return the sorted candidates for the last word of `line`, the command line up to the cursor.

    FILES or DIRECTORIES is returned only if there is no other candidate.
    """
    words, partial = _split(line)
    if words[:1] == ["help"]:
        words = words[1:]
    if not words:
        found: Iterable[str] = (*COMMANDS, "help", "--help", "--version", *GLOBAL_OPTIONS)
    elif words[0] not in COMMANDS:
        found = ()
    else:
        found = _of_command(words, partial)
    fitting = sorted({word for word in found if word.startswith(partial) and _HARMLESS.fullmatch(word)})
    return fitting or sorted({FILES, DIRECTORIES} & set(found))


def _split(line: str) -> tuple[list[str], str]:
    """Return the complete words after `calicoctl`, without global options, and the partial word at the cursor."""
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
    for option in (option for usage in usages for option in usage.options()):
        if option.argcount and words[-1] in (option.long, option.short):
            return set(_values(option.long, plain, partial))
    fitting = [(usage, fit) for usage, fit in zip(usages, fits(usages, plain)) if fit]
    if partial.startswith("-"):
        return _options([usage for usage, _ in fitting], plain, partial)
    found = {name for _, fit in fitting for name in fit.commands()}
    for name in {name for _, fit in fitting for name in fit.arguments()}:
        found.update(_values(name, plain, partial))
    return found


def _options(usages: list[Usage], words: list[str], partial: str) -> set[str]:
    """Return the candidates for `partial`, the beginning of an option or of `--option=value`.

    `words` are the words before `partial`, without options. `usages` are the usages that begin with these words.
    """
    name, equals, _ = partial.partition("=")
    found = {"--help", *GLOBAL_OPTIONS}
    for option in (option for usage in usages for option in usage.options()):
        if equals and option.long == name:
            values = _values(name, words, partial.partition("=")[2])
            found.update(value if value in (FILES, DIRECTORIES) else f"{name}={value}" for value in values)
        else:
            found.add(f"{option.long}=" if option.argcount else option.long)
    return found


# Names of existing objects


def _values(name: str, words: list[str], partial: str) -> list[str]:
    """Return the candidates for the value of `name`: an argument such as `<IP>`, or an option such as `--host`.

    `words` are the words before the value, without options; `partial` is the beginning of the value. Candidates that
    cannot be determined, for example because etcd does not answer, are left out.
    """
    found: list[str] = []
    with suppress(CalicoError, OutOfTime):
        if name in _SOURCES:
            environment.complete()
            found = list(_SOURCES[name](words))
    if name in ("<FILE>", "<CONTAINER>", "<CONTAINERS>") and (name == "<FILE>" or partial.startswith("/")):
        found.append(FILES)
    elif name == "--log-dir":
        found.append(DIRECTORIES)
    return found


def _containers(words: list[str]) -> list[str]:
    from calicoctl import engine

    found = [f"/var/run/netns/{path.name}" for path in Path("/var/run/netns").glob("*")]
    with suppress(CalicoError, OutOfTime):
        with suppress(CalicoError):  # a host may have no Docker
            found += [name.lstrip("/") for container in engine.containers() for name in container.get("Names") or ()]
        if "add" not in words:  # what another runtime has attached is only looked at, changed and removed
            found += _attached()
    return found


def _attached() -> list[str]:
    """Return the names, or else the ids, of this host's containers that were attached through CNI."""
    datastore = DatastoreClient.from_environment()
    endpoints = datastore.readable_endpoints(datastore.host)[0]
    return [one.workload_name or one.id.workload for one in endpoints if one.id.orchestrator == "cni"]


def _addresses(words: list[str]) -> list[str]:
    if words[0] == "ipam":
        endpoints = DatastoreClient.from_environment().readable_endpoints()[0]
        return [address for endpoint in endpoints for address in endpoint.addresses]
    if "remove" not in words:
        return ["ipv4", "ipv6", *_pools(words)]
    from calicoctl.workloads.workload import endpoints_of, find_connected

    datastore = DatastoreClient.from_environment()
    endpoints = endpoints_of(datastore, find_connected(words[1], datastore))
    return [address for endpoint in endpoints for address in endpoint.addresses]


def _pools(words: list[str]) -> list[str]:
    datastore = DatastoreClient.from_environment()
    return [pool.cidr for version in (4, 6) for pool in datastore.pools(version)]


def _profiles(words: list[str]) -> list[str]:
    return DatastoreClient.from_environment().profile_names()


def _endpoints(words: list[str]) -> list[str]:
    return [endpoint.id.endpoint for endpoint in DatastoreClient.from_environment().readable_endpoints()[0]]


def _hosts(words: list[str]) -> list[str]:
    return DatastoreClient.from_environment().hosts.registered()


def _peers(words: list[str]) -> list[str]:
    datastore = DatastoreClient.from_environment()
    host = datastore.host if words[0] == "node" else None
    return [peer.ip for version in (4, 6) for peer in datastore.readable_bgp_peers(version, host)[0]]


def _tags(words: list[str]) -> list[str]:
    datastore = DatastoreClient.from_environment()
    return datastore.tags(words[1]) if "remove" in words else list(datastore.all_tags() or ())


def _rule_words(words: list[str]) -> list[str]:
    """Return the candidates for the next word of a rule.

    `words` are all words before it, without options. The rule begins after `inbound` or `outbound`.
    """
    from calicoctl.policy.rules import GRAMMAR

    direction = next(number for number, word in enumerate(words) if word in ("inbound", "outbound") and number > 2)
    fitting = fits(usages_of(GRAMMAR), words[direction + 1 :])
    found = {name for fit in fitting for name in fit.commands()}
    arguments = {name for fit in fitting for name in fit.arguments()}
    if "<TAG>" in arguments:
        found.update(DatastoreClient.from_environment().all_tags() or ())
    if "<CIDR>" in arguments:
        found.update(_pools(words))
    return sorted(found)


def _setting_values(words: list[str]) -> list[str]:
    setting = _settings_of(words).get(words[-1])
    return list(setting.values or ()) if setting is not None else []


def _settings(words: list[str]) -> list[str]:
    return list(_settings_of(words))


def _settings_of(words: list[str]) -> dict[str, Setting]:
    return settings_of("felix" if "felix" in words else "bgp", "node" in words)


def _fixed(*values: str) -> Callable[[list[str]], list[str]]:
    return lambda words: list(values)


_SOURCES: dict[str, Callable[[list[str]], Iterable[str]]] = {
    "<CONTAINER>": _containers,
    "<CONTAINERS>": _containers,
    "<FROM>": _containers,
    "<TO>": _containers,
    "<IP>": _addresses,
    "<IPS>": _addresses,
    "<RULE>": _rule_words,
    "<VALUE>": _setting_values,
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
    "--orchestrator": _fixed("docker", "namespace", "cni"),
    "--output": _fixed(*FORMATS),
    "--vxlan": _fixed(*VXLAN_MODES),
    "--detach": _fixed("true", "false"),
}
"""Argument or option -> function (words before the value) that returns candidates for the value."""
