"""A host that the Felix of 2015 has run on: its leftovers in iptables, and how they are found and removed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.system.agent import A4, B4, AgentHost
from tests.system.support import HOST_IP, run
from tests.system.traffic import PATIENT, ping

MOVING = Path(__file__).parent.parent.parent / "docs/migration.md"

LEFT_BEHIND = """
{0} -N felix-FORWARD
{0} -N felix-INPUT
{0} -N felix-FROM-ENDPOINT
{0} -N felix-TO-ENDPOINT
{0} -A felix-FORWARD -i cali+ -j felix-FROM-ENDPOINT
{0} -A felix-FORWARD -o cali+ -j felix-TO-ENDPOINT
{0} -A felix-FORWARD -i cali+ -j ACCEPT
{0} -A felix-FORWARD -o cali+ -j ACCEPT
{0} -A felix-INPUT -i cali+ -g felix-FROM-ENDPOINT
{0} -A felix-FROM-ENDPOINT -m comment --comment "From unknown endpoint" -j DROP
{0} -A felix-TO-ENDPOINT -m comment --comment "To unknown endpoint" -j DROP
{0} -I INPUT -j felix-INPUT
{0} -I FORWARD -j felix-FORWARD
{0} -A INPUT -s 192.0.2.99 -j DROP
"""
"""Source: frules.py and dispatch.py of projectcalico/felix. The last line is somebody else's."""


def old_felix(host: AgentHost) -> dict:
    found = json.loads(host.ctl("checksystem", "--output=json", status=None).out)
    (check,) = [check for check in found if check["name"] == "iptables chains of an old Felix"]
    return check


@pytest.mark.parametrize("command", ["iptables", "iptables-legacy"])
def test_chains_of_an_old_felix_are_named_and_can_be_removed(node: AgentHost, command: str) -> None:
    node.add("a", A4)
    node.add("b", B4)
    node.profile("web", inbound=[{"action": "allow"}])
    for name in ("a", "b"):
        node.set_profiles(name, "web")
    node.sync()
    assert old_felix(node)["ok"] and ping("a", HOST_IP, PATIENT)

    run("sh", "-ec", LEFT_BEHIND.format(command))
    try:
        assert not ping("a", HOST_IP)
        check = old_felix(node)
        assert not check["ok"] and not check["needed"]
        chains = "felix-FORWARD, felix-FROM-ENDPOINT, felix-INPUT, felix-TO-ENDPOINT"
        assert check["found"].startswith(f"{command}: {chains}. "), check
        assert "iptables chains of an old Felix" in node.ctl("checksystem", status=None).out

        advised = check["advice"].partition("as root: ")[2]
        assert advised == f"{command}-save | grep -v felix- | {command}-restore"
        assert command != "iptables" or f"'{advised}'" in MOVING.read_text()
        run("sh", "-ec", advised)
        assert ping("a", HOST_IP, PATIENT) and ping("a", B4, PATIENT)
        assert old_felix(node)["ok"]
        left = run(f"{command}-save").out
        assert "-A INPUT -s 192.0.2.99/32 -j DROP" in left and not re.search("felix", left)
    finally:
        run("sh", "-c", f"{command} -D INPUT -s 192.0.2.99 -j DROP")
