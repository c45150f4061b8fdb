"""The documentation agrees with the code: help texts, modules, and the tables of the kernel."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from wsgiref.util import setup_testing_defaults

import pytest

from calicoctl.cli.main import USAGE
from calicoctl.desired.snapshot import Snapshot
from calicoctl.felix import metrics_server
from calicoctl.felix.dataplane.ruleset import Ruleset
from calicoctl.felix.health import Health
from calicoctl.felix.metrics import Metrics
from calicoctl.grammar import COMMANDS

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "calicoctl"


def section(page: str, heading: str) -> str:
    """Return the part of a page of `docs` below a heading."""
    text = (ROOT / "docs" / page).read_text()
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_the_pages_are_up_to_date(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    generate.main(tmp_path)
    for made in [*tmp_path.glob("commands/*.md"), tmp_path / "calicoctl.1"]:
        kept = ROOT / "docs" / made.relative_to(tmp_path)
        assert kept.read_text() == made.read_text(), f"{kept.name} is out of date: run 'make docs'"
    assert {page.stem for page in (ROOT / "docs/commands").glob("*.md")} == set(COMMANDS)


def test_every_command_is_listed_and_has_its_help() -> None:
    for command in COMMANDS:
        assert f"\n  {command} " in USAGE
        text = importlib.import_module(f"calicoctl.commands.{command}").__doc__
        assert "\nUsage:\n" in text
        examples = text.partition("\nExamples:\n")[2].strip().splitlines()
        assert len(examples) >= 2, f"{command} has no two examples"
        options = text.partition("\nOptions:\n")[2].partition("\n\n")[0]
        for option in {word.strip("[]|()=") for word in text.split("Options:")[0].split() if word.startswith("[--")}:
            assert option.partition("=")[0] in options, f"{command} does not explain {option}"


def test_the_man_page_tells_of_environment_files_and_exit_status() -> None:
    page = (ROOT / "docs/calicoctl.1").read_text()
    for heading, entry in (("ENVIRONMENT", "ETCD_ENDPOINTS"), ("FILES", "/etc/calico/node.env"), ("EXIT STATUS", "2")):
        entries = page.partition(f".SH {heading}\n")[2].partition(".SH ")[0]
        assert f".TP\n\\fB{entry}\\fR\n" in entries.replace("\\-", "-")


def test_every_module_is_in_the_table_of_its_folder() -> None:
    listed: dict[str, set[str]] = {}
    folder = ""
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("\n### Every module\n")[2].partition("\n## ")[0]
    for line in re.findall(r"^\| (.*)$", table, re.MULTILINE):
        names, _, _ = line.partition(" | ")
        if names.startswith("**"):
            folder = names.strip("*`/") if "`" in names else ""
        else:
            listed.setdefault(folder, set()).update(re.findall(r"`(\w+\.py)`", names))
    modules: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        folder = str(path.parent.relative_to(PACKAGE)).strip(".")
        if not path.name.startswith("__") and folder != "commands":
            modules.setdefault(folder, set()).add(path.name)
    assert listed == modules


def test_every_chain_set_and_map_of_the_tables_is_explained() -> None:
    commands = Ruleset().load(Snapshot("host1")).commands
    named = set(re.findall(r"^add (?:chain|set|map) (?:inet|arp) calico (\S+)", commands, re.MULTILINE))
    assert {"outbound-to-host", "host-services"} <= named
    unexplained = {name for name in named if f"`{name}`" not in section("agent.md", "The tables")}
    assert not unexplained


def test_every_metric_is_listed_with_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    monkeypatch.setattr(metrics_server, "serve", lambda app, address, port: served.append(app))
    Metrics(Health("host1", "1"), 9091)
    environ: dict[str, object] = {}
    setup_testing_defaults(environ)
    text = b"".join(served[0](environ, lambda *_: None)).decode()
    exported = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    listed = dict(re.findall(r"^\| `(calico_\S+)` \| (\w+) \|", section("agent.md", "Metrics"), re.MULTILINE))
    assert {name: kind for name, kind in exported.items() if not name.endswith("_created")} == listed
