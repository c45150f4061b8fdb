"""Errors for wrong command lines: the wrong word, the nearest right one, and the closest usage."""

from __future__ import annotations

import pytest

from calicoctl.cli.main import main
from calicoctl.grammar import COMMANDS


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("contaner add", "'contaner' is not a calicoctl command; did you mean 'container'?"),
        ("frobnicate", "'frobnicate' is not a calicoctl command; the commands are apply, batch,"),
        ("help frobnicate", "'frobnicate' is not a calicoctl command"),
        ("container ls", "did you mean 'calicoctl endpoint show --detailed'?"),
        ("pool list", "'list' does not fit after 'calicoctl pool'; did you mean 'show'?"),
        ("pool show 10.0.0.0/8", "'10.0.0.0/8' does not fit after 'calicoctl pool show', which takes no more words"),
        ("container web append web", "did you mean 'calicoctl container web profile append web'?"),
        ("container ad web ipv4", "did you mean 'calicoctl container add web ipv4'?"),
        ("container add web", "After 'calicoctl container add web', <IP> is missing"),
        ("container web ip", "After 'calicoctl container web ip', 'add' or 'remove' is missing"),
        (
            "profile show web",
            "'web' does not fit after 'calicoctl profile show'; did you mean 'calicoctl profile web rule show' or "
            "'calicoctl profile web tag show'?",
        ),
        ("profile web rule add ingress allow", "'ingress' does not fit after 'calicoctl profile web rule add'; did"),
        ("profile web rule add ingress allow", "did you mean 'inbound'?"),
        (
            "profile web rule add inbound allow tcp to port 80",
            "'port' is out of place in a rule; did you mean 'ports'?",
        ),
        ("profile web rule add inbound alow", "not 'alow'; did you mean 'allow'?"),
        ("profile web rule remove inbound", "After 'calicoctl profile web rule remove inbound', <RULE> is missing"),
        ("node bgp peer add 192.0.2.1 64512", "did you mean 'calicoctl node bgp peer add 192.0.2.1 as 64512'?"),
        ("bgp node-mesh of", "did you mean 'off'?"),
        ("-v", "'-v' is not a calicoctl option; did you mean '--version'?"),
        ("--output=json status", "'--output=json' stands before the command; did you mean 'calicoctl status --output"),
        ("profile remove web --no-chek", "is no option of 'calicoctl profile'; did you mean '--no-check'?"),
        ("container add web ipv4 --waitt=3", "did you mean '--wait=3'?"),
        ("container add web ipv4 --wait", "--wait needs a value: --wait=VALUE"),
        ("profile remove web --no-check=1", "--no-check takes no value"),
        ("profile show --help=1", "--help takes no value"),
        ("container remove web --wait=3", "'--wait' does not go with 'calicoctl container remove'"),
        ("status now", "'now' does not fit after 'calicoctl status', which takes no more words"),
        ("profile 'web", "After"),
        ("version -o xml", "--output=xml: it must be text, json or yaml"),
        ("--verbose status", "'--verbose' is not a calicoctl option"),
        ("--version status", "'status' does not fit after 'calicoctl --version', which takes no more words"),
        ("node start", "did you mean 'calicoctl node'?"),
        ("node --ipv4=192.0.2.2", "'--ipv4' does not go with 'calicoctl node'; did you mean '--ip'?"),
        ("pool show --ipv4 --ipv6", "'--ipv4' and '--ipv6' do not go together"),
        ("container add web ipv4 --wait=1 --wait=2", "'--wait' is given twice"),
        ("profile web rule remove inbound allow --at=1", "'--at' does not go with the words that are given"),
        ("profile trace web db 80", "did you mean 'calicoctl profile trace web db tcp 80' or 'calicoctl profile trace"),
        ("container web profile add db", "'add' does not fit after 'calicoctl container web profile'; did you mean '"),
        ("container web profile add db", "did you mean 'append'?"),
        ("profile web tag append db", "did you mean 'add'?"),
    ],
)
def test_words_that_do_not_match_are_named(
    line: str, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert main(line.split()) == 2
    said = capsys.readouterr()
    assert said.out == "" and expected in said.err.splitlines()[0]


@pytest.mark.parametrize(
    ("line", "usage"),
    [
        ("profile web rule add ingress allow", "calicoctl profile <PROFILE> rule add (inbound|outbound)"),
        ("container web ip", "calicoctl container <CONTAINER> ip (add|remove) <IP>"),
        ("profile show web", "calicoctl profile show "),
        ("endpoint ff profile append --nonsense", "calicoctl endpoint <ENDPOINT_ID> profile (append|remove|set)"),
        ("pool list", "calicoctl pool show "),
        ("pool delete 10.0.0.0/8", "calicoctl pool remove "),
        ("container rm web", "calicoctl container remove "),
        ("endpoint list", "calicoctl endpoint show "),
        ("profile create web", "calicoctl profile add "),
        ("bgp default_node_as", "calicoctl bgp default-node-as "),
    ],
)
def test_the_usage_that_comes_closest_is_shown(line: str, usage: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(line.split())
    shown = capsys.readouterr().err.splitlines()
    assert shown[1] == "Usage:" and shown[2].strip().startswith(usage)
    assert sum("calicoctl" in other for other in shown[2:]) == 1


@pytest.mark.parametrize(
    ("line", "there", "not_there"),
    [
        ("container add --help", ["<IP>", "--wait=", "--interface="], ["container remove", "endpoint show"]),
        ("help container add", ["container add <CONTAINER> <IP>"], ["container remove"]),
        (
            "profile rule add --help",
            ["rule add (inbound|outbound)", "A rule is one of", "--at="],
            ["trace", "--no-check"],
        ),
        ("profile web rule add --help", ["rule add (inbound|outbound)"], ["profile remove"]),
        ("pool show -h", ["--ipv4"], ["<START_IP>", "--force"]),
        ("container --help", ["container add", "container remove", "Examples:"], ["Full help"]),
        ("help", ["Commands:", "container", "status"], []),
        ("--help", ["Commands:"], []),
    ],
)
def test_help_is_about_what_the_words_say(
    line: str, there: list[str], not_there: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 0
    shown = capsys.readouterr().out
    assert [text for text in there if text not in shown] == []
    usage = shown.partition("Options:")[0] if "container add" in line else shown
    assert [text for text in not_there if text in usage] == []


@pytest.mark.parametrize(
    ("rule", "usage"),
    [
        ("allow tcp to port 80", "(allow|deny|log) [ipv4|ipv6] (tcp|udp)"),
        ("allow icmp typ 8", "(allow|deny|log) [ipv4|ipv6] (icmp|icmpv6) [type N [code N]]"),
        ("allow protocol 47 form tag a", "(allow|deny|log) [ipv4|ipv6] protocol N"),
    ],
)
def test_the_form_of_a_rule_that_comes_closest_is_shown(
    rule: str, usage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "web", "rule", "add", "inbound", *rule.split()]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert shown[1] == "Usage:" and "profile <PROFILE> rule" in shown[2] and shown[3].strip().startswith(usage)
    assert max(map(len, shown)) < 80 and "SIDE" not in "".join(shown)


@pytest.mark.parametrize(
    "line",
    ["--verbose status", "container add web --ip=192.0.2.1", "profile add --foo", "profile web rule remove 1"],
)
def test_nothing_is_suggested_that_would_be_refused(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize("command", [*COMMANDS, ""])
def test_help_fits_80_columns(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"] if command else ["--help"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 78] == []
