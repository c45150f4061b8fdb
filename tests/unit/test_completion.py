"""Completion candidates that come from the grammars alone."""

from __future__ import annotations

import pytest

from calicoctl.cli import completion
from calicoctl.grammar import COMMANDS


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that would come from etcd and Docker; one that a shell must not see."""
    for kind, found in (
        ("<CONTAINER>", ["workload", "other"]),
        ("<PROFILE>", ["web", "db", "x; reboot"]),
        ("<PROFILES>", ["web", "db", "$(reboot)"]),
        ("<ENDPOINT_ID>", ["ffff0"]),
        ("<CIDRS>", ["192.168.0.0/16", "fd00::/64"]),
        ("<FROM>", ["workload"]),
        ("<IP>", ["192.168.0.1"]),
        ("<CONTAINERS>", ["workload", "other"]),
        ("--host", ["host1"]),
    ):
        monkeypatch.setitem(completion._SOURCES, kind, lambda words, found=found: found)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("calicoctl ch", "checksystem"),
        ("sudo /usr/local/bin/calicoctl ver", "version"),
        ("calicoctl --debug ver", "version"),
        ("calicoctl profile ", "add remove show trace web db"),
        ("calicoctl profile add ", "web db"),
        ("calicoctl profile web ", "rule tag"),
        ("calicoctl profile web rule add ", "inbound outbound"),
        ("calicoctl profile web rule remove inbound --", "--at= --help --quiet --debug"),
        ("calicoctl profile trace ", "workload"),
        ("calicoctl profile trace workload 192.168.0.1 u", "udp"),
        ("calicoctl container ", "add remove workload other"),
        ("calicoctl container add w", "workload"),
        ("calicoctl container workload p", "profile"),
        ("calicoctl container workload profile append w", "web"),
        ("calicoctl container workload profile append web d", "db"),
        ("calicoctl container workload endpoint ", "show"),
        ("calicoctl container add workload ipv4 --w", "--wait="),
        ("calicoctl pool show --output=", "--output=json --output=text --output=yaml"),
        ("calicoctl pool show --i", "--ipv4 --ipv6"),
        ("calicoctl pool show --ipv4 --o", "--output="),
        ("calicoctl pool remove 1", "192.168.0.0/16"),
        ("calicoctl endpoint ffff0 profile s", "set show"),
        ("calicoctl endpoint show --host=", "--host=host1"),
        ("calicoctl bgp node-mesh ", "off on"),
        ("calicoctl node bgp peer add 192.0.2.1 ", "as"),
        ("calicoctl config node ", "bgp felix"),
        ("calicoctl config felix Log", "LogFilePath LogSeverityFile LogSeverityScreen"),
        ("calicoctl completion ", "bash zsh"),
        ("calicoctl version ", ""),
        ("calicoctl version nonsense ", ""),
        ("calicoctl nonsense ", ""),
        ("calicoctl profile 'web ru", "rule"),
        ("calicoctl help cont", "container"),
        ("calicoctl help container a", "add"),
        ("sudo -E calicoctl container add workload 1", "192.168.0.1"),
        ("calicoctl container remove workload o", "other"),
        ("calicoctl profile web rule add inbound ", "allow deny log"),
        ("calicoctl profile web rule add inbound allow ", "from icmp icmpv6 ipv4 ipv6 protocol tcp to udp"),
        ("calicoctl profile web rule add inbound --at=1 allow tcp ", "from to"),
        ("calicoctl profile web rule add inbound allow tcp from ", "cidr ports tag to"),
        ("calicoctl profile web rule add outbound deny icmp ", "from to type"),
        ("calicoctl profile web rule add inbound allow udp to ports 53 ", "cidr tag"),
        ("calicoctl config felix loglevel w", "warning"),
        ("calicoctl config node felix DefaultEndpointToHostAction ", "ACCEPT DROP RETURN"),
        ("calicoctl status -o ", "json text yaml"),
        ("calicoctl status --output j", "json"),
        ("calicoctl batch ", ":files"),
        ("calicoctl batch some", ":files"),
        ("calicoctl diags --log-dir=/va", ":directories"),
        ("calicoctl diags --log-dir ", ":directories"),
        ("calicoctl container add /pro", ":files"),
        ("calicoctl container add workload /pro", ""),
        ("calicoctl pool show ", ""),
        ("calicoctl 'pro", ""),
        ("", " ".join([*COMMANDS, "help", "--help", "--version", "--quiet", "--debug"])),
    ],
)
def test_what_may_come_next(line: str, expected: str) -> None:
    assert completion.candidates(line or "calicoctl ") == sorted(expected.split())


def test_every_grammar_can_be_completed() -> None:
    for command in COMMANDS:
        assert "--help" in completion.candidates(f"calicoctl {command} --h")
