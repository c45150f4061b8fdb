"""Runs the host's iptables commands, and finds the chains of Felix of 2015, the agent of the Calico of that time."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from calicoctl.errors import CalicoError

COMMANDS = ("iptables", "ip6tables")

_OLD_FELIX = "felix-"

PATIENCE = 15.0
"""Seconds to wait for an iptables command, which may itself wait ten seconds for its lock."""


def old_felix_chains() -> dict[str, list[str]]:
    """Return the names of the chains of Felix of 2015: a list for each iptables command that shows any.

    Possible commands are those in COMMANDS, and each of them with the suffix `-legacy`. The result lacks commands that
    are not installed, or that show no such chain. The chains drop packets of `cali…` interfaces that Felix of 2015 does
    not know. Raises CalicoError if the chains cannot be listed. Source: frules.py and dispatch.py of Felix, 2015.
    """
    found: dict[str, list[str]] = {}
    for command in COMMANDS:
        # Felix ran in an image with its own iptables, so its chains may be in the legacy tables
        legacy = f"{command}-legacy"
        if is_there(command):
            _find_old_felix(command, found)
            # if there are no such tables, listing them would load kernel modules
            if "nf_tables" in run(command, "--version") and legacy_tables(command) and is_there(legacy):
                _find_old_felix(legacy, found)
    return found


def _find_old_felix(command: str, found: dict[str, list[str]]) -> None:
    lines = run(f"{command}-save").splitlines()
    chains = sorted({line[1:].split()[0] for line in lines if line.startswith(f":{_OLD_FELIX}")})
    if chains:
        found[command] = chains


def legacy_tables(command: str) -> list[str]:
    """Return the names of the kernel's legacy tables for `command`, which is iptables or ip6tables.

    The result is empty if the kernel does not support legacy tables, or if the names cannot be read.
    """
    try:
        return (Path("/proc/net") / f"{command.replace('tables', '')}_tables_names").read_text().split()
    except OSError:  # a kernel without them
        return []


def is_there(command: str) -> bool:
    """Return whether `command` and `command`-save are installed; `command` is iptables, for example."""
    return all(shutil.which(name) is not None for name in (command, f"{command}-save"))


def run(*command: str) -> str:
    """Run a command; return its standard output.

    Raises CalicoError if the command cannot be run, ends with another status than 0, or runs for longer than PATIENCE.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise CalicoError(f"{command[0]} did not answer within {PATIENCE:.0f} s") from None
    except OSError as error:
        raise CalicoError(f"{command[0]} cannot be run: {error.strerror}") from None
    if done.returncode != 0:
        why = " ".join(done.stderr.split())[:200] or f"it ends with status {done.returncode}"
        raise CalicoError(f"'{' '.join(command)}' failed: {why}")
    return done.stdout
