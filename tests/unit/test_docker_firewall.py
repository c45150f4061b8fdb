"""Where the agent's rules belong in the host's own firewall, by the output of `iptables-save`."""

from __future__ import annotations

from pathlib import Path

import pytest

from calicoctl.errors import CalicoError
from calicoctl.felix.dataplane import docker_firewall
from calicoctl.felix.dataplane.docker_firewall import Filter

HEAD = ":INPUT ACCEPT [0:0]\n:FORWARD %s [0:0]\n:OUTPUT ACCEPT [0:0]\n"


@pytest.mark.parametrize(
    ("policy", "rest", "chain"),
    [
        ("ACCEPT", "", None),
        ("DROP", "", "FORWARD"),
        ("ACCEPT", ":DOCKER-USER - [0:0]\n-A FORWARD -j DOCKER-USER\n", "DOCKER-USER"),
        ("ACCEPT", "-A FORWARD -i x -j ACCEPT\n", None),
        ("ACCEPT", "-A FORWARD -j REJECT --reject-with icmp-host-prohibited\n", "FORWARD"),
        ("ACCEPT", ":ONE - [0:0]\n:TWO - [0:0]\n-A FORWARD -j ONE\n-A ONE -g TWO\n-A TWO -j DROP\n", "FORWARD"),
        ("ACCEPT", ":ONE - [0:0]\n-A ONE -j DROP\n-A INPUT -j ONE\n", None),
        ("ACCEPT", ":ONE - [0:0]\n-A FORWARD -j ONE\n-A ONE -j ONE\n", None),
        ("ACCEPT", '-A FORWARD -m comment --comment "we -j DROP nothing" -j ACCEPT\n', None),
    ],
)
def test_the_chain_that_our_rules_belong_to(policy: str, rest: str, chain: str | None) -> None:
    assert Filter(HEAD % policy + rest).desired_chain() == chain


def test_without_any_table_nothing_drops() -> None:
    assert Filter("").desired_chain() is None


@pytest.mark.parametrize(
    ("policy", "rule", "drops"),
    [
        ("accept", "", False),
        ("drop", "", True),
        ("accept", "counter packets 0 bytes 0 jump ONE", True),
        ("accept", 'oifname "docker0"  counter packets 0 bytes 0 reject with icmp type host-prohibited', True),
        ("accept", 'counter packets 0 bytes 0 xt target "REJECT"', True),
        ("accept", 'iifname "eth0" counter packets 0 bytes 0 accept comment "we drop, or reject, nothing"', False),
    ],
)
def test_what_nft_prints_of_it(policy: str, rule: str, drops: bool) -> None:
    table = f"""table ip filter {{
\tchain ONE {{
\t\tip saddr 10.0.0.0/8 counter packets 0 bytes 0 drop # handle 7
\t}}

\tchain FORWARD {{
\t\ttype filter hook forward priority filter; policy {policy};
\t\t{rule}
\t}}
}}
"""
    assert Filter.from_nft(table).would_drop() is drops


def test_an_iptables_that_fails_silently_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("iptables", "iptables-save"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 3\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CalicoError, match="failed: it ends with status 3"):
        docker_firewall.ensure()
