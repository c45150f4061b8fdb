"""Lets Calico's packets through the host's own iptables firewall, where that would drop them.

Docker Engine sets the policy of the chain FORWARD to DROP, and an accept in our own table does not override that. Our
tables have dropped what policy denies before, because they hook in earlier. Docker keeps its hands off DOCKER-USER,
which it asks first, so ours go there where it exists. Source: Docker's documentation, "Packet filtering and firewalls".

The host's `iptables` command is used, so that the rules go where the host's own are, be that nf_tables or legacy.
"""

from __future__ import annotations

import shlex
import subprocess
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from calicoctl.errors import CalicoError, DockerNotRunning
from calicoctl.workload import docker_engine

COMMANDS = ("iptables", "ip6tables")

_OLD_FELIX = "felix-"

PATIENCE = 15.0
"""Seconds to wait for iptables, which itself waits up to ten for somebody else who holds its lock."""

_COMMENT = "calico"
_RULES = (
    ("-i", "cali+", "-m", "comment", "--comment", _COMMENT, "-j", "ACCEPT"),
    ("-o", "cali+", "-m", "comment", "--comment", _COMMENT, "-j", "ACCEPT"),
)
_CHAINS = ("DOCKER-USER", "FORWARD")


class Filter:
    """What `iptables-save` says of the table `filter`: policies by chain, and rules by chain, as lists of words."""

    def __init__(self, text: str) -> None:
        self.policies: dict[str, str] = {}
        self.rules: dict[str, list[tuple[str, ...]]] = defaultdict(list)
        for line in text.splitlines():
            if line.startswith(":"):
                chain, policy = line[1:].split()[:2]
                self.policies[chain] = policy
            elif line.startswith("-A "):
                words = shlex.split(line)
                self.rules[words[1]].append(tuple(words[2:]))

    def wanted_chain(self) -> str | None:
        """Return the chain that our rules belong to, None where nothing would drop what is forwarded.

        That is DOCKER-USER where FORWARD asks it; after `iptables -F`, it does not.
        """
        if any(("-j", "DOCKER-USER") in zip(rule, rule[1:]) for rule in self.rules.get("FORWARD", ())):
            return "DOCKER-USER"
        return "FORWARD" if self.would_drop() else None

    def would_drop(self) -> bool:
        """Tell whether something that is forwarded may be dropped."""
        return self.policies.get("FORWARD") == "DROP" or self._drops("FORWARD", set())

    def _drops(self, chain: str, seen: set[str]) -> bool:
        """Tell whether a rule of a chain, but for ours, drops anything, or one of a chain that it jumps to."""
        seen.add(chain)
        for rule in self.rules.get(chain, ()):
            for flag, target in zip(rule, rule[1:]):
                if flag in ("-j", "-g") and (
                    target in ("DROP", "REJECT") or (target not in seen and self._drops(target, seen))
                ):
                    return True
        return False


def ensure() -> list[str]:
    """Put our rules where they belong, and take them away elsewhere; return a line for each change made.

    Raises CalicoError when iptables fails. A host without the command has no such firewall.
    """
    return [line for command in COMMANDS for line in _bring(command, remove=False)]


def remove() -> None:
    """Take our rules away; raise CalicoError."""
    for command in COMMANDS:
        _bring(command, remove=True)


def missing() -> list[str]:
    """Return the chains that would drop what is ours, and where nothing accepts it before.

    Raises CalicoError where that cannot be told.
    """
    found = []
    for command in COMMANDS:
        try:
            current = Filter(_run(f"{command}-save", "-t", "filter"))
        except FileNotFoundError:
            raise CalicoError(f"there is no {command}, so what it would drop cannot be told") from None
        chain = current.wanted_chain()
        if chain is not None and current.would_drop() and not set(_RULES) <= set(current.rules.get(chain, ())):
            found.append(f"{command} chain FORWARD")
    return found


def old_felix_chains() -> dict[str, list[str]]:
    """Return the chains that the Felix of 2015 has left, by the iptables command that shows them.

    They drop what comes from and goes to interfaces `cali…` that Felix does not know. Its image had an iptables of its
    own, so they may be where the host's does not look. Raises CalicoError where that cannot be told. Source: Felix's
    frules.py and dispatch.py.
    """
    found: dict[str, list[str]] = {}
    for command, tables in zip(COMMANDS, ("/proc/net/ip_tables_names", "/proc/net/ip6_tables_names")):
        with suppress(FileNotFoundError):
            _find_old_felix(command, found)
            # where there are no such tables, asking for them would load modules of the kernel
            if "nf_tables" in _run(command, "--version") and _read(tables).strip():
                _find_old_felix(f"{command}-legacy", found)
    return found


def _find_old_felix(command: str, found: dict[str, list[str]]) -> None:
    lines = _run(f"{command}-save").splitlines()
    chains = sorted({line[1:].split()[0] for line in lines if line.startswith(f":{_OLD_FELIX}")})
    if chains:
        found[command] = chains


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def sends_events() -> bool:
    """Tell whether changes of the host's iptables show as nftables events, which those of iptables-legacy do not."""
    try:
        return "nf_tables" in _run("iptables", "--version")
    except FileNotFoundError:
        return True


def _bring(command: str, remove: bool) -> list[str]:
    try:
        current = Filter(_run(f"{command}-save", "-t", "filter"))
    except FileNotFoundError:
        return []
    done = []
    wanted = None if remove else current.wanted_chain()
    for chain in _CHAINS:
        rules = current.rules.get(chain, [])
        ours = [rule for rule in rules if set(_RULES[0][2:]) <= set(rule) and "cali+" in rule]
        if chain == wanted:
            # behind a rule without conditions nothing is reached; otherwise the place is the operator's choice
            end = next((number for number, rule in enumerate(rules) if rule[:1] == ("-j",)), len(rules))
            if sorted(ours) == sorted(_RULES) and all(rules.index(rule) < end for rule in ours):
                continue
        elif not ours:
            continue
        for rule in ours:
            _run(command, "-w", "10", "-t", "filter", "-D", chain, *rule)
        if chain == wanted:
            for rule in reversed(_RULES):
                _run(command, "-w", "10", "-t", "filter", "-I", chain, "1", *rule)
            done.append(f"{command}: accepting cali+ in chain {chain}, which would drop it otherwise")
        else:
            done.append(f"{command}: no longer accepting cali+ in chain {chain}")
    return done


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise CalicoError(f"{command[0]} did not answer within {PATIENCE:.0f} s") from None
    if done.returncode != 0:
        raise CalicoError(f"'{' '.join(command)}' failed: {' '.join(done.stderr.split())[:200]}")
    return done.stdout


def engine_forwards(ipv6: bool) -> bool:
    """Tell whether a Docker Engine runs here that forwards for networks of its own.

    Raises DockerUnavailable where there is one that does not say.
    """
    try:
        with docker_engine("for its networks", timeout=5) as docker:
            networks = docker.networks()
    except DockerNotRunning:
        return False
    of_its_own = [network for network in networks if network.get("Driver") not in ("host", "null")]
    return any(network.get("EnableIPv6") for network in of_its_own) if ipv6 else bool(of_its_own)
