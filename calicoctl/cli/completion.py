"""Computes the completion candidates of a command line: keywords of the grammars, and names of existing objects.

The grammars are the module docstrings of commands/, and GRAMMAR in policy/rules.py.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

from calicoctl import environment
from calicoctl.cli.usages import Usage, fits, positional, usages_of
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.config import Setting, settings_of
from calicoctl.datastore.hosts import check_hostname
from calicoctl.datastore.model import VXLAN_MODES, Endpoint
from calicoctl.errors import CalicoError
from calicoctl.grammar import COMMANDS, FORMATS, GLOBAL_OPTIONS, grammar_of


class OutOfTime(BaseException):
    """Raised by a timer (commands/completion.py) if etcd or Docker takes too long to answer."""


FILES, DIRECTORIES = ":files", ":directories"
"""Candidates that make the shell's completion script complete names of files or directories."""


@dataclass(frozen=True)
class Line:
    """What is typed before the value that is completed: the words without options, and the value of --host, if any.

    `partial` is the beginning of the value itself.
    """

    words: list[str]
    partial: str
    host: str | None = None


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
    host = _host(words)
    for option in (option for usage in usages for option in usage.options()):
        if option.argcount and words[-1] in (option.long, option.short):
            return set(_values(option.long, Line(plain, partial, host)))
    fitting = [(usage, fit) for usage, fit in zip(usages, fits(usages, plain)) if fit]
    if partial.startswith("-"):
        return _options([usage for usage, _ in fitting], Line(plain, partial, host))
    found = {name for _, fit in fitting for name in fit.commands()}
    for name in {name for _, fit in fitting for name in fit.arguments()}:
        found.update(_values(name, Line(plain, partial, host)))
    return found


def _host(words: list[str]) -> str | None:
    """Return the value of the option --host in a command line, None if it has none that is valid."""
    following = [*words[1:], ""]
    for word, value in zip(words, following):
        name, equals, own_value = word.partition("=")
        if name == "--host":
            host = own_value if equals else value
            with suppress(CalicoError):
                check_hostname(host)
                return host
    return None


def _options(usages: list[Usage], line: Line) -> set[str]:
    """Return the candidates for `line.partial`, the beginning of an option or of `--option=value`.

    `usages` are the usages that begin with `line.words`.
    """
    name, equals, value = line.partial.partition("=")
    found = {"--help", *GLOBAL_OPTIONS}
    for option in (option for usage in usages for option in usage.options()):
        if equals and option.long == name:
            values = _values(name, replace(line, partial=value))
            found.update(one if one in (FILES, DIRECTORIES) else f"{name}={one}" for one in values)
        else:
            found.add(f"{option.long}=" if option.argcount else option.long)
    return found


# Names of existing objects


def _values(name: str, line: Line) -> list[str]:
    """Return the candidates for the value of `name`: an argument such as `<IP>`, or an option such as `--host`.

    Candidates that cannot be determined, for example because etcd does not answer, are left out.
    """
    found: list[str] = []
    with suppress(CalicoError, OutOfTime):
        if name in _SOURCES:
            environment.complete()
            found = list(_SOURCES[name](line))
    if name in ("<FILE>", "<CONTAINER>", "<CONTAINERS>") and (name == "<FILE>" or line.partial.startswith("/")):
        found.append(FILES)
    elif name == "--log-dir":
        found.append(DIRECTORIES)
    return found


def _containers(line: Line) -> list[str]:
    from calicoctl import engine

    found = [f"/var/run/netns/{path.name}" for path in Path("/var/run/netns").glob("*")]
    with suppress(CalicoError, OutOfTime):
        with suppress(CalicoError):  # a host may have no Docker
            found += [name.lstrip("/") for container in engine.containers() for name in container.get("Names") or ()]
        if "add" not in line.words:  # what another runtime has attached is only looked at, changed and removed
            found += _attached()
    return found


def _attached() -> list[str]:
    """Return the names, or else the ids, of this host's containers that were attached through CNI."""
    datastore = DatastoreClient.from_environment()
    endpoints = datastore.readable_endpoints(datastore.host, "cni")[0]
    return [one.workload_name or one.id.workload for one in endpoints]


def _addresses(line: Line) -> list[str]:
    if line.words[0] == "ipam":

        def fits_partial(endpoint: Endpoint) -> bool:
            return any(address.startswith(line.partial) for address in endpoint.addresses)

        endpoints = DatastoreClient.from_environment().readable_endpoints(wanted=fits_partial)[0]
        return [address for endpoint in endpoints for address in endpoint.addresses]
    if "remove" not in line.words:
        return ["ipv4", "ipv6", *_pools(line)]
    from calicoctl.workloads.workload import find_connected

    _, endpoints = find_connected(line.words[1], DatastoreClient.from_environment())
    return [address for endpoint in endpoints for address in endpoint.addresses]


def _pools(line: Line) -> list[str]:
    datastore = DatastoreClient.from_environment()
    return [pool.cidr for version in (4, 6) for pool in datastore.pools(version)]


def _profiles(line: Line) -> list[str]:
    return DatastoreClient.from_environment().profile_names()


def _endpoints(line: Line) -> list[str]:
    return [id.endpoint for id in DatastoreClient.from_environment().all_endpoint_ids(line.host)]


def _hosts(line: Line) -> list[str]:
    return DatastoreClient.from_environment().hosts.registered()


def _peers(line: Line) -> list[str]:
    datastore = DatastoreClient.from_environment()
    host = datastore.host if line.words[0] == "node" else None
    return [peer.ip for version in (4, 6) for peer in datastore.readable_bgp_peers(version, host)[0]]


def _tags(line: Line) -> list[str]:
    datastore = DatastoreClient.from_environment()
    return datastore.tags(line.words[1]) if "remove" in line.words else list(datastore.all_tags() or ())


def _rule_words(line: Line) -> list[str]:
    """Return the candidates for the next word of a rule.

    The rule begins after `inbound` or `outbound`.
    """
    from calicoctl.policy.rules import GRAMMAR

    direction = next(number for number, word in enumerate(line.words) if word in ("inbound", "outbound") and number > 2)
    fitting = fits(usages_of(GRAMMAR), line.words[direction + 1 :])
    found = {name for fit in fitting for name in fit.commands()}
    arguments = {name for fit in fitting for name in fit.arguments()}
    if "<TAG>" in arguments:
        found.update(DatastoreClient.from_environment().all_tags() or ())
    if "<CIDR>" in arguments:
        found.update(_pools(line))
    return sorted(found)


def _setting_values(line: Line) -> list[str]:
    setting = _settings_of(line).get(line.words[-1])
    return list(setting.values or ()) if setting is not None else []


def _settings(line: Line) -> list[str]:
    return list(_settings_of(line))


def _settings_of(line: Line) -> dict[str, Setting]:
    return settings_of("felix" if "felix" in line.words else "bgp", "node" in line.words)


def _fixed(*values: str) -> Callable[[Line], list[str]]:
    return lambda line: list(values)


_SOURCES: dict[str, Callable[[Line], Iterable[str]]] = {
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
"""Argument or option -> function that returns candidates for its value, from the Line before this value."""
