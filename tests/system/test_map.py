"""The map as a file: how it is written, and what a browser shows of it."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.system.agent import B4, AgentHost
from tests.system.browser import Browser, chromium
from tests.system.support import CALICOCTL, Host, run, wait_for
from tests.system.traffic import ping

HOSTILE = [
    "<script>document.title = 'taken'</script>",
    "</script><script>document.title = 'taken'</script>",
    "<!--<script>",
    "<img src=x onerror=\"document.title='taken'\">",
    "\"'><svg onload=alert(1)>",
    "]]>&lt;b&gt;&#60;",
    "\u202eevil\u2066 \u2028\u0000 \U0001f980 ${document.title} @DATA@ @SCRIPT@",
]
"""Names that are markup in one way or another, or that change how the text around them is shown."""


def put_endpoint(host: Host, number: int, on: str, profiles: list[str], **fields: Any) -> None:
    record = {
        "state": "active",
        "name": f"cali{number}",
        "mac": f"02:00:00:00:00:{number:02x}",
        "profile_ids": profiles,
        "ipv4_nets": [f"192.168.0.{number}/32"],
        "ipv6_nets": [f"fd80:24e2:f998:72d6::{number:x}/128"] if number % 2 else [],
        **fields,
    }
    host.etcd.put(f"/calico/v1/host/{on}/workload/docker/w{number}/endpoint/{number:032x}", json.dumps(record))


def put_profile(host: Host, name: str, tags: list[str], inbound: list[Any], outbound: list[Any]) -> None:
    rules = {"id": name, "inbound_rules": inbound, "outbound_rules": outbound}
    host.etcd.put(f"/calico/v1/policy/profile/{name}/tags", json.dumps(tags))
    host.etcd.put(f"/calico/v1/policy/profile/{name}/rules", json.dumps(rules))


@pytest.fixture
def network(host: Host) -> Host:
    """Ten endpoints on two hosts, and one that cannot be read.

    Some have both IP versions. One is in no pool, so that it is reached from the other host by masqueraded packets.
    """
    host.etcd.put("/calico/bgp/v1/host/host2/ip_addr_v4", "192.0.2.77")
    host.etcd.put("/calico/v1/host/host2/config/DefaultEndpointToHostAction", "DROP")
    host.ctl("pool", "add", "192.168.0.0/16", "fd80:24e2:f998:72d6::/64", "--nat-outgoing")
    allow = {"action": "allow"}
    tcp = {"action": "allow", "protocol": "tcp", "dst_ports": [80, "8000:8010"], "src_tag": "web"}
    put_profile(host, "web", ["web"], [allow], [{"action": "deny", "protocol": "udp", "dst_ports": [53]}, allow])
    put_profile(host, "db", ["db"], [tcp, {"action": "allow", "protocol": "icmp", "icmp_type": 8}], [allow])
    put_profile(host, "v6", [], [{"action": "allow", "src_net": "fd80::/16"}], [])
    for number in range(1, 10):
        profiles = [["web"], ["db"], ["v6"], ["db", "web"], ["missing"], []][number % 6]
        put_endpoint(host, number, f"host{1 + number % 2}", profiles, workload_name=f"{'-'.join(profiles)}{number}")
    put_profile(host, "nat", [], [{"action": "allow", "protocol": "tcp", "src_net": "192.0.2.77/32"}], [allow])
    put_endpoint(host, 12, "host1", ["nat"], ipv4_nets=["172.31.0.12/32"], workload_name="nat12")
    host.etcd.put(f"/calico/v1/host/host2/workload/docker/w10/endpoint/{10:032x}", "{")
    return host


def test_the_file_is_written_whole_or_not_at_all(network: Host, tmp_path: Path) -> None:
    def write(name: str, umask: int, status: int = 0) -> str:
        command = ["/bin/sh", "-c", f'umask {umask:03o}; cd {tmp_path}; exec "$0" "$@"', CALICOCTL]
        said = network.ctl("map", name, status=status, command=command)
        return said.out + said.err

    assert write("map.html", 0o027) == "Map of 10 endpoints on 2 hosts written to map.html\n"
    file = tmp_path / "map.html"
    assert file.stat().st_mode & 0o777 == 0o640
    first = file.stat().st_ino
    file.chmod(0o777)
    write("map.html", 0o077)
    assert file.stat().st_mode & 0o777 == 0o600 and file.stat().st_ino != first, "replaced, not written into"
    (tmp_path / "link").symlink_to("map.html")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo", ".", "/dev/null"):
        assert "is not a regular file" in write(name, 0o022, status=1)
    assert "no/map.html" in write("no/map.html", 0o022, status=1)
    network.ctl("map", str(tmp_path / "new.html"), status=1, env={"ETCD_ENDPOINTS": "http://127.0.0.1:1"})
    assert write("-", 0o022).startswith("<!DOCTYPE html>"), "- is standard output, as of export"
    ascii = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    assert "from ↓" in network.ctl("map", "-", env=ascii).out, "in UTF-8, whatever the locale says"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "link", "map.html"]


def opened(browser: Browser, host: Host, file: Path) -> None:
    """Write the map and open it; nothing but the file itself may be requested, and no error may be reported."""
    host.ctl("map", str(file))
    browser.open(file)


def choose(browser: Browser, field: str, value: str) -> None:
    """Set a filter; texts take effect a moment later."""
    browser.evaluate(
        f"(field => {{ field.value = '{value}'; field.dispatchEvent(new Event('input', {{bubbles: true}})) }})"
        f"(document.getElementById('{field}'))"
    )


def refuse_trouble(browser: Browser, file: Path) -> None:
    requested = {e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"}
    assert requested <= {file.as_uri()}
    trouble = [event for event in browser.events if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert trouble == []


def test_a_browser_shows_what_the_map_says(network: Host, tmp_path: Path) -> None:
    file = tmp_path / "map.html"
    with chromium(tmp_path / "chromium") as browser:
        opened(browser, network, file)
        text = browser.evaluate("document.body.innerText")
        assert (
            "10 endpoints on 2 hosts, 5 profiles" in text
            and "2 objects in etcd cannot be used, or only in part" in text
        )

        # each pair as in the JSON
        said = json.loads(network.ctl("map", "--output=json").out)
        shown = browser.evaluate(
            "((all, said) => all.map(a => all.map(b => a.isHost && b.isHost ? '' : said(a, b).text)))"
            "(calicoMap.nodes, calicoMap.verdict)"
        )
        groups = [(node["host"], node["group"]) for node in [*said["endpoints"], *said["hosts"]]]
        count = len(said["endpoints"])
        own = {(one["group"], one["host_group"]): one for one in said["own_hosts"]}
        different = 0
        for a, (host, group) in enumerate(groups):
            for b, (other_host, other) in enumerate(groups):
                number = said["reach"][group][other]
                if host == other_host and (a < count) != (b < count):
                    one = own[min(group, other), max(group, other)]
                    number = one["to_host"] if a < count else one["from_host"]
                if number is not None and a != b:
                    assert shown[a][b] == said["pairs"][number]["allowed"], (a, b)
                    different += shown[a][b] not in ("all", "-")
        assert different > 10

        between_hosts = "[aria-label='host1 to host2: no profile decides between hosts']"
        assert browser.evaluate(f'document.querySelector("{between_hosts}") !== null')

        # a click, the keyboard, and what `profile trace` says
        browser.click("[data-row='0'][data-column='1']")
        pair = browser.evaluate("document.querySelector('#panel').innerText")
        command = re.search("calicoctl (profile trace .*)", pair)
        assert command is not None
        traced = network.ctl(*command[1].split(), status=None)
        reasons = re.findall(r"\((.*)\)$", "\n".join(traced.out.splitlines()[:2]), re.MULTILINE)
        assert len(reasons) == 2 and all(f"({reason})" in pair for reason in reasons), (pair, traced)
        browser.press("ArrowDown")
        browser.press("ArrowRight")
        before = browser.evaluate("document.querySelector('#panel h2').innerText")
        browser.press("Enter")
        where = browser.evaluate("document.activeElement.getAttribute('aria-label')")
        names = browser.evaluate("document.querySelector('#panel h2').innerText")
        assert names != before and where.startswith(names.replace(" → ", " to ") + ": ")
        browser.press("End")
        assert browser.evaluate("+document.activeElement.dataset.column") == 11

        def rows() -> list[str]:
            return list(browser.evaluate("[...document.querySelectorAll('#rows .head')].map(head => head.innerText)"))

        def fill(field: str, value: str) -> None:
            choose(browser, field, value)

        fill("name", "192.168.0.4")
        wait_for(lambda: rows() == ["missing4"], "filtering by an address")
        fill("name", "")
        fill("host", "host2")
        wait_for(lambda: len(rows()) == 6 and "host2" in rows(), "filtering by a host")
        fill("profile", "v6")
        wait_for(lambda: rows() == [], "filtering by a profile, too")
        fill("host", "")
        wait_for(lambda: rows() == ["v62", "v68"], "filtering by a profile")
        fill("profile", "")
        fill("port", "tcp 8005")
        states = (
            "[...document.querySelectorAll('[role=gridcell]')].filter(cell => cell.classList.contains('some')).length"
        )
        wait_for(lambda: browser.evaluate(states) == 0, "asking for a port, which passes or does not")
        refuse_trouble(browser, file)


def test_the_map_is_usable_by_keyboard(network: Host, tmp_path: Path) -> None:
    file = tmp_path / "map.html"
    with chromium(tmp_path / "chromium") as browser:
        opened(browser, network, file)
        focus = "document.activeElement.getAttribute('aria-label')"
        browser.call("Emulation.setDeviceMetricsOverride", width=1500, height=420, deviceScaleFactor=1, mobile=False)
        browser.evaluate("document.querySelector('[role=gridcell][tabindex=\"0\"]').focus()")
        browser.press("ArrowRight")
        browser.press("Enter")
        where = browser.evaluate(focus)
        browser.evaluate("document.getElementById('body').scrollTo(0, 1000)")
        wait_for(lambda: browser.evaluate("document.querySelector('[data-row=\"11\"]') !== null"), "the last row")
        assert browser.evaluate(focus) == where, "the cell with the focus exists even out of view"
        browser.press("ArrowDown")
        assert browser.evaluate("+document.activeElement.dataset.row") == 1

        browser.evaluate("document.querySelector('#panel button').focus()")
        browser.press("Enter")
        assert browser.evaluate("document.activeElement.id") == "panel", "not the start of the page"
        shown = browser.evaluate("document.querySelector('#panel').innerText")

        choose(browser, "name", "nobody")
        wait_for(lambda: "Nothing fits" in browser.evaluate("document.body.innerText"), "an empty matrix")
        browser.evaluate("(body => { body.tabIndex = 0; body.focus(); })(document.getElementById('body'))")
        browser.press("Enter")
        assert browser.evaluate("document.querySelector('#panel').innerText") == shown
        refuse_trouble(browser, file)


def test_the_graph_is_usable_by_keyboard(network: Host, tmp_path: Path) -> None:
    for number in range(31, 43):
        put_endpoint(network, number, "host1", ["web"], workload_name=f"a-long-name-{number}")
    file = tmp_path / "map.html"
    with chromium(tmp_path / "chromium") as browser:
        opened(browser, network, file)
        browser.click("[value=graph]")
        nodes = "[...document.querySelectorAll('#graph g[role=button]')]"
        wait_for(lambda: browser.evaluate(f"{nodes}.length") == 24, "the graph")
        overlaps = browser.evaluate(
            "((boxes) => boxes.filter((a, n) => boxes.slice(n + 1).some(b => a.left < b.right && b.left < a.right"
            f" && a.top < b.bottom && b.top < a.bottom)).length)({nodes}.map(node => node.getBoundingClientRect()))"
        )
        assert overlaps == 0, "names cover each other, or another node"
        browser.press("Tab")
        where = "document.activeElement.textContent"
        first = browser.evaluate(where)
        browser.press("ArrowDown")
        second = browser.evaluate(where)
        assert second != first
        browser.press("Enter")
        assert browser.evaluate("document.querySelector('#panel h2').innerText") in second
        assert browser.evaluate(where) == second, "the focus stays"
        browser.press("End")
        assert browser.evaluate(where) not in (first, second)
        browser.press("Tab")
        assert browser.evaluate("document.activeElement.id") == "panel", "the graph is one stop"
        refuse_trouble(browser, file)


def test_a_narrow_window_shows_the_matrix(network: Host, tmp_path: Path) -> None:
    file = tmp_path / "map.html"
    with chromium(tmp_path / "chromium") as browser:
        opened(browser, network, file)
        browser.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=False)
        wait_for(lambda: browser.evaluate("document.querySelectorAll('[data-row=\"11\"]').length"), "the last row")
        assert browser.evaluate("document.getElementById('body').clientHeight") > 300
        browser.click("[data-row='0'][data-column='1']")
        assert " → " in browser.evaluate("document.querySelector('#panel h2').innerText")
        refuse_trouble(browser, file)


def test_names_that_are_not_unique_are_told_apart(network: Host, tmp_path: Path) -> None:
    for number, on in ((21, "host1"), (22, "host2")):
        put_endpoint(network, number, on, ["web"], workload_name="twin")
    put_endpoint(network, 23, "host1", ["db"], ipv4_nets=["192.168.0.23/32", "172.31.0.23/32"], ipv6_nets=[])
    file = tmp_path / "map.html"
    with chromium(tmp_path / "chromium") as browser:
        opened(browser, network, file)
        heads = "[...document.querySelectorAll('#rows .head')]"
        shown = browser.evaluate(f"{heads}.map(head => head.innerText)")
        assert {"twin on host1", "twin on host2", "w23 (192.168.0.23)", "w23 (172.31.0.23)"} <= set(shown)
        problems = browser.evaluate(f"{heads}.filter(head => head.classList.contains('problem')).map(h => h.innerText)")
        assert set(problems) == {"nat12", "w23 (192.168.0.23)", "w23 (172.31.0.23)"}
        refuse_trouble(browser, file)


def test_no_name_becomes_markup(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "map.html"
    for number, name in enumerate(HOSTILE, start=1):
        safe = name.replace("/", "|").replace("\u0000", "")
        put_profile(host, safe, [name], [{"action": "allow", "src_tag": name}], [{"action": "allow"}])
        put_endpoint(host, number, safe, [safe], workload_name=name)  # the host has that name, too
    with chromium(tmp_path / "chromium") as browser:
        opened(browser, host, file)
        shown = browser.evaluate("[...document.querySelectorAll('#rows .head')].map(head => head.textContent)")
        for name in HOSTILE[:6]:
            assert name in shown
        assert not set("\u202e\u2066\u2028") & set(file.read_text())
        for row in range(3):
            browser.click(f"[data-row='{row}'][data-column='{row + 1}']")
        browser.click("[value=graph]")
        nodes = "document.querySelectorAll('#graph g[role=button]').length"
        wait_for(lambda: browser.evaluate(nodes) == 2 * len(HOSTILE) + 1, "the graph")
        browser.click("#graph g[role=button]")
        counts = browser.evaluate(
            "['script', 'img', 'svg', 'b'].map(name => document.getElementsByTagName(name).length)"
        )
        assert counts == [2, 0, 1, 0]
        assert browser.evaluate("document.title") == "Calico network map"
        refuse_trouble(browser, file)


def test_drops_of_late_are_on_the_map(pair: AgentHost, tmp_path: Path) -> None:
    file = tmp_path / "map.html"
    pair.profile("closed")
    pair.set_profiles("b", "closed")
    pair.sync()
    assert not ping("a", B4)
    wait_for(lambda: B4 in pair.ctl("drops").out, "the drop")
    with chromium(tmp_path / "chromium") as browser:
        opened(browser, pair, file)
        assert "1 drop lately, as the agent of host1 reports" in browser.evaluate("document.body.innerText")
        browser.click(".cell.dropped[role=gridcell]")
        details = browser.evaluate("document.querySelector('#panel').innerText")
        assert "icmp type 8, inbound" in details and "no rule of closed matches" in details
        choose(browser, "order", "name")  # the row becomes the column, and the other way round
        for drops in (False, True):
            browser.click("#panel p button:last-child")
            details = browser.evaluate("document.querySelector('#panel').innerText")
            assert ("icmp type 8, inbound" in details) == drops
        refuse_trouble(browser, file)


def test_the_picture_in_the_readme_can_be_made_again(tmp_path: Path) -> None:
    picture = tmp_path / "map.png"
    run(sys.executable, "-m", "docs.picture", str(picture), cwd=Path(__file__).parent.parent.parent)
    assert picture.read_bytes().startswith(b"\x89PNG")
