"""The driver of the host's own iptables firewall: adds rules that accept endpoints' packets where it may drop them.

The Docker Engine sets the policy of the chain FORWARD to DROP, and an accept in our tables does not override a drop in
another table. Our tables are evaluated earlier, so they have already dropped what policy denies. If FORWARD jumps to
the chain DOCKER-USER, our rules are added to DOCKER-USER, since Docker does not change that chain. If it does not, they
are added to FORWARD, but only if FORWARD may drop packets. Source: Docker's documentation, "Packet filtering and
firewalls".

The host's `iptables` command is used, so that our rules are added to the backend of the host's own rules: nf_tables or
legacy. A host without that command may still have such a firewall.
"""

from __future__ import annotations

import shlex
from collections import defaultdict
from contextlib import suppress

from calicoctl import iptables
from calicoctl.datastore.keys import INTERFACE_PREFIX
from calicoctl.errors import CalicoError
from calicoctl.felix.dataplane.nft import Nft, NftError

_COMMENT = "calico"
_OURS = f"{INTERFACE_PREFIX}+"
"""The endpoints' interfaces, as iptables spells them."""
_RULES = (
    ("-i", _OURS, "-m", "comment", "--comment", _COMMENT, "-j", "ACCEPT"),
    ("-o", _OURS, "-m", "comment", "--comment", _COMMENT, "-j", "ACCEPT"),
)
_CHAINS = ("DOCKER-USER", "FORWARD")


class Filter:
    """The table `filter`: the policies of its chains, and their rules. `text` is the output of `iptables-save`.

    `policies` and `rules` are by chain. A rule is a tuple of the words that follow "-A CHAIN". See `from_nft` about the
    output of nft.
    """

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

    @classmethod
    def from_nft(cls, text: str) -> Filter:
        """Return the table `filter` of iptables-nft, parsed from nft's listing of the table.

        The result contains all policies, but only the rules that jump, drop or reject, each as ("-j", target).
        """
        found, chain = cls(""), ""
        for line in text.splitlines():
            words = shlex.split(line.partition(" # ")[0])
            if words[:1] == ["chain"]:
                chain = words[1]
            elif words[:1] == ["type"]:
                found.policies[chain] = words[-1].rstrip(";").upper()
            for word, following in zip(words, [*words[1:], ""]):
                if word in ("jump", "goto"):
                    found.rules[chain].append(("-j", following))
                elif word.upper() in ("DROP", "REJECT"):
                    found.rules[chain].append(("-j", word.upper()))
        return found

    def desired_chain(self) -> str | None:
        """Return the chain to which our rules are added, or None if they are not needed.

        This is DOCKER-USER if FORWARD jumps to it, even if nothing would drop packets. If FORWARD does not jump to it,
        this is FORWARD if FORWARD may drop packets, and None if it may not.
        """
        # after `iptables -F`, DOCKER-USER exists, but FORWARD does not jump to it
        if any(("-j", "DOCKER-USER") in zip(rule, rule[1:]) for rule in self.rules.get("FORWARD", ())):
            return "DOCKER-USER"
        return "FORWARD" if self.would_drop() else None

    def would_drop(self) -> bool:
        """Return whether the chain FORWARD, or a chain that it jumps to, may drop packets."""
        return self.policies.get("FORWARD") == "DROP" or self._drops("FORWARD", set())

    def _drops(self, chain: str, seen: set[str]) -> bool:
        """Return whether a rule of `chain`, or of a chain that it jumps to, drops packets.

        Chains in `seen` are skipped, and the chains that were searched are added to `seen`.
        """
        seen.add(chain)
        for rule in self.rules.get(chain, ()):
            for flag, target in zip(rule, rule[1:]):
                if flag in ("-j", "-g") and (
                    target in ("DROP", "REJECT") or (target not in seen and self._drops(target, seen))
                ):
                    return True
        return False


def ensure() -> list[str]:
    """Add our rules to the chains that need them, and remove them from other chains, for IPv4 and IPv6.

    Return a line of text for each change. Raises CalicoError if iptables fails, or is missing while a firewall may drop
    forwarded packets.
    """
    return [line for command in iptables.COMMANDS for line in _bring(command, remove=False)]


def remove() -> None:
    """Remove our rules. Raises CalicoError if iptables fails.

    If an iptables command is missing, its rules stay. They do no harm, since they only accept packets.
    """
    for command in iptables.COMMANDS:
        if iptables.is_there(command):
            _bring(command, remove=True)


def missing() -> list[str]:
    """Return a text for each firewall that would drop endpoints' packets because our rules are missing.

    The texts are "iptables chain FORWARD" and "ip6tables chain FORWARD". Raises CalicoError if it cannot be determined
    whether the rules are missing.
    """
    found = []
    for command in iptables.COMMANDS:
        current = _current(command)
        if current is None or not current.would_drop():
            continue
        if not set(_RULES) <= set(current.rules.get(str(current.desired_chain()), ())):
            found.append(f"{command} chain FORWARD")
    return found


def saved() -> str:
    """Return the rules of iptables and ip6tables in the table `filter`, ours included, as iptables-save prints them.

    If a command is missing, its rules are left out. Raises CalicoError if a command fails.
    """
    return "".join(
        iptables.run(f"{command}-save", "-t", "filter") for command in iptables.COMMANDS if iptables.is_there(command)
    )


def sends_events() -> bool:
    """Return whether the kernel emits nftables events when the host's iptables rules change.

    It emits none if iptables-legacy changes them. Return False if the command `iptables` is missing, too. Raises
    CalicoError if the command fails.
    """
    return iptables.is_there("iptables") and "nf_tables" in iptables.run("iptables", "--version")


def _bring(command: str, remove: bool) -> list[str]:
    current = _current(command)
    if current is None:
        return []
    done = []
    desired = None if remove else current.desired_chain()
    for chain in _CHAINS:
        rules = current.rules.get(chain, [])
        ours = [rule for rule in rules if set(_RULES[0][2:]) <= set(rule) and _OURS in rule]
        if chain == desired:
            # rules behind an unconditional jump are never reached; otherwise, the position is up to the operator
            end = next((number for number, rule in enumerate(rules) if rule[:1] == ("-j",)), len(rules))
            if sorted(ours) == sorted(_RULES) and all(rules.index(rule) < end for rule in ours):
                continue
        elif not ours:
            continue
        for rule in ours:
            iptables.run(command, "-w", "10", "-t", "filter", "-D", chain, *rule)
        if chain == desired:
            for rule in reversed(_RULES):
                iptables.run(command, "-w", "10", "-t", "filter", "-I", chain, "1", *rule)
            done.append(f"{command}: accepting {_OURS} in chain {chain}, which would drop it otherwise")
        else:
            done.append(f"{command}: no longer accepting {_OURS} in chain {chain}")
    return done


def _current(command: str) -> Filter | None:
    """Return the current table `filter` of `command`, which is iptables or ip6tables.

    Return None if `command` is missing and this host has no firewall that might drop forwarded packets. Raises
    CalicoError if `command` fails, or if it is missing and there is such a firewall.
    """
    if iptables.is_there(command):
        return Filter(iptables.run(f"{command}-save", "-t", "filter"))
    why = _may_drop(command)
    if why is not None:
        raise CalicoError(
            f"{why}, and there is no command {command} to have it accept what comes from containers, or goes to "
            "them: install the package iptables"
        )
    return None


def _may_drop(command: str) -> str | None:
    """Return a clause that says which firewall may drop forwarded packets; None if there is no such firewall.

    `command` is iptables or ip6tables. It is not run, so it need not be installed.
    """
    if "filter" in iptables.legacy_tables(command):
        return f"this host has an {command}-legacy firewall, which may drop what is forwarded"
    family = command.replace("tables", "")
    nft = Nft()
    with suppress(NftError):  # there is no such table
        if Filter.from_nft(nft.run(f"list table {family} filter")).would_drop():
            return f"this host's {command} chain FORWARD would drop what is forwarded"
    return None
