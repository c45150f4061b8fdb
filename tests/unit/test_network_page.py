"""The file of `map`: what is in it, and that nothing of the store can become markup.

What a browser shows of it is tested in tests/system/test_map.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from calicoctl.commands.map import _drops as drops_on
from calicoctl.diagnose.network_page import page
from calicoctl.diagnose.reachability import Decisions
from calicoctl.errors import CalicoError
from tests.unit.test_reachability import ALLOW, TCP, WORLD, World, made, network, pairs  # noqa: F401 a fixture of all


def parts(text: str, name: str, attributes: str = "") -> str:
    (found,) = re.findall(f"<{name}{attributes}>(.*?)</{name}>", text, re.DOTALL)
    return str(found)


def data(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(parts(text, "script", ' type="application/json" id="data"'))
    return found


def test_names_are_data_and_never_markup() -> None:
    name = "</script><!--<b>&\u202e\u2028@SCRIPT@"
    world = World()
    world.profile("odd<b>", [ALLOW], tags=[name])
    world.endpoint(1, "10.65.0.1", profile_ids=["odd<b>"], workload_name=name)
    text = page(world.map(), "now").decode()
    assert data(text)["nodes"][0]["name"] == "</script><!--<b>&\\u202e\\u2028@SCRIPT@"
    assert data(text)["profiles"][0]["name"] == "odd<b>"
    assert text.count("</script>") == 2 and "<!--" not in text and "\u202e" not in text


def test_only_the_scripts_and_styles_of_the_page_are_allowed() -> None:
    text = page(World().map(), "now").decode()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="(.*?)"', text)
    for kind, source in (("style", parts(text, "style")), ("script", parts(text, "script"))):
        hashed = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{hashed}';" in policy
    assert policy.startswith("default-src 'none';")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\bon[a-z]+=|style=", text)
    addresses = set(re.findall(r"https?://[^\"' ]*", text))
    assert addresses == {"http://www.w3.org/2000/svg"}, "a name, which nobody requests"


def test_drops_are_named_by_their_addresses() -> None:
    ends = {"from": {"name": "a", "address": "10.65.0.1"}, "to": {"name": "b", "address": "10.65.0.2"}}
    said = {"time": "now", "direction": "inbound", "why": "<b>", "count": 2, "id": 7, **ends}
    packets: list[dict[str, Any]] = [
        {"protocol": "tcp", "port": 80, "icmp_type": None},
        {"protocol": "icmp", "port": None, "icmp_type": 0},
        {"protocol": 47, "port": None, "icmp_type": None},
    ]
    found = data(page(World().map(), "now", [{**said, **packet} for packet in packets]).decode())
    assert [drop["what"] for drop in found["drops"]] == ["tcp 80", "icmp type 0", "protocol 47"]
    assert found["drops"][0] == {
        "from": "10.65.0.1",
        "to": "10.65.0.2",
        "what": "tcp 80",
        "time": "now",
        "direction": "inbound",
        "why": "<b>",
        "count": 2,
    }
    assert found["dropsOf"] == "host1"


def test_drops_that_the_agent_does_not_tell_are_missed_aloud(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(host: str, follow: bool) -> None:
        raise CalicoError("The host agent does not answer: timed out.")

    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("calicoctl.diagnose.dropped.read", read)
    for pid, said in ((None, ""), (7, "Warning: the map shows no dropped packets: The host agent does not answer")):
        monkeypatch.setattr("calicoctl.felix.process.running", lambda host, pid=pid: pid)
        assert drops_on("host1") == []
        error = capsys.readouterr().err
        assert error.startswith(said) and bool(error) == bool(said)


def test_pairs_take_no_space() -> None:
    """Endpoints that no rule tells apart share their decisions, so a file grows with the number of endpoints only."""
    sizes = []
    for count in (50, 100):
        world = World()
        world.profile("web", [{**TCP, "dst_ports": [80], "src_tag": "web"}], tags=["web"])
        for number in range(1, count + 1):
            world.endpoint(number, f"10.65.0.{number}", profile_ids=["web"])
        sizes.append(len(json.dumps(data(page(world.map(), "now").decode()))))
    assert sizes[1] < 2 * sizes[0] + 200


def looked_up(shown: dict[str, Any], source: dict[str, Any], destination: dict[str, Any]) -> dict[int, list[Any]]:
    """Return by IP version the decisions at both ends, found in the file's tables as its script finds them.

    This is what `decisionsOf` does there. None stands for the end that is a host.
    """
    found: dict[int, list[Any]] = {}
    one, other = (shown["groups"][node["group"]] for node in (source, destination))
    is_near = source["host"] == destination["host"]
    for version in one["traits"].keys() & other["traits"].keys():
        seen, ends = one["traits"][version], found.setdefault(int(version), [None, None])
        if not is_near and version in one.get("sent", {}) and 0 not in other["traits"][version]:
            seen = one["sent"][version]
        if "id" in source:
            tables = one["toOwn"][other["action"]] if is_near and "id" not in destination else one["out"]
            ends[0] = looked_at(shown, tables[version], other["traits"][version])
        if "id" in destination:
            tables = other["in" if "id" in source else "fromOwn" if is_near else "fromHost"]
            ends[1] = looked_at(shown, tables[version], seen)
    return found


def looked_at(shown: dict[str, Any], number: int, traits: list[int]) -> Any:
    table = shown["tables"][number]
    parts = shown["decisions"][table["by"][",".join(str(trait) for trait in table["looks"] if trait in traits)]]
    return {(protocol, first, *shown["rulings"][ruling]) for protocol, first, ruling in parts}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(WORLD)
def test_the_tables_of_the_file_have_the_decisions_about_all_pairs(drawn: dict[str, Any]) -> None:
    found = made(drawn).map()
    shown = data(page(found, "now").decode())
    numbers = {node: number for number, node in enumerate(found.reach.nodes)}

    def said(direction: str, decisions: Decisions | None) -> Any:
        if decisions is None:
            return None
        return {
            (protocol, first, ruling.allowed, found.reason(ruling, direction))
            for protocol, parts in decisions
            for first, ruling in parts
        }

    for source, destination in pairs(found.reach):
        ends = looked_up(shown, *(shown["nodes"][numbers[node]] for node in (source, destination)))
        assert ends == {
            version: [said("outbound", one), said("inbound", other)]
            for version, (one, other) in found.reach.decisions(source, destination).items()
        }


def test_endpoints_with_the_same_id_are_told_apart() -> None:
    world = World()
    record = {"name": "cali1", "mac": "02:00:00:00:00:01", "ipv4_nets": ["10.65.0.1/32", "172.20.0.1/32"]}
    for workload in ("w1", "w2"):
        world.put(f"/calico/v1/host/host1/workload/docker/{workload}/endpoint/{1:032x}", record)
    nodes = data(page(world.map(), "now").decode())["nodes"]
    assert [node.get("endpoint") for node in nodes] == [0, 0, 1, 1, None, None]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrasts_are_those_that_wcag_asks_for(scheme: int) -> None:
    """Text has a contrast of 4.5 to what is behind it; lines that tell what something is, 3. Source: WCAG 2.2."""
    colors = dict(re.findall(r"--(\w+): (#\w{6})", re.findall(r":root \{(.*?)\}", style(), re.DOTALL)[scheme]))

    def luminance(color: str) -> float:
        parts = (int(colors[color][place : place + 2], 16) / 255 for place in (1, 3, 5))
        linear = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))

    def contrast(one: str, other: str) -> float:
        darker, lighter = sorted(map(luminance, (one, other)))
        return (lighter + 0.05) / (darker + 0.05)

    texts = ["text ground", "text sheet", "text faint", "soft ground", "soft sheet", "mark sheet"]
    texts += ["bad ground", "bad sheet", "good sheet", "ink all"]
    lines = ["control ground", "control sheet", "all sheet", "thin sheet"]
    assert {pair: contrast(*pair.split()) for pair in texts if contrast(*pair.split()) < 4.5} == {}
    assert {pair: contrast(*pair.split()) for pair in lines if contrast(*pair.split()) < 3} == {}


def style() -> str:
    return parts(page(World().map(), "now").decode(), "style")
