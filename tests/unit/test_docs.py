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


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def anchors(page: Path) -> set[str]:
    """Return what a link to a page can name in it, as GitHub makes it of the headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[tuple[Path, str]]:
    """Return the files that a page links to, and the anchors in them, or ""."""
    found = re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text().replace("\n", " "))
    return [((page.parent / name).resolve() if name else page, anchor) for name, anchor in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in links(page):
        assert target.exists(), target
        assert not anchor or anchor in anchors(target), f"{target.name} has no heading #{anchor}"


def test_every_page_is_found_by_the_question_that_it_answers() -> None:
    linked = {target for target, _ in links(ROOT / "docs/README.md")}
    assert set(PAGES) - linked == {ROOT / "docs/README.md"}


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_a_page_begins_with_whom_it_is_for(page: Path) -> None:
    heading, begin = page.read_text().split("\n\n")[:2]
    assert heading.startswith("# ") and begin.startswith("For ")


def test_the_picture_of_the_map_is_small() -> None:
    assert (ROOT / "docs/map.png", "") in links(ROOT / "README.md")
    assert (ROOT / "docs/map.png").stat().st_size < 150_000


ELSEWHERE = {
    "test_demo.py": ["make demo", "make demo-hosts"],
    "test_install.py": [
        "make install",
        "make install DESTDIR=/tmp/package PREFIX=/usr",
    ],
    "test_deb.py": [
        "make deb",
        "apt-get install ./dist/calicoctl_*.deb",
        "systemctl restart etcd",
        "systemctl enable --now calico-node",
        "sudo systemctl enable --now calico-docker.socket",
    ],
    "test_cni.py": ["make install-cni"],
    "test_cni_podman.py": [
        "podman run --net=net1 --name web -d docker.io/library/nginx",
        "podman run --net=net1 --ip=192.168.0.77 --name db -d docker.io/library/postgres",
        "calicoctl container db profile set backend",
    ],
    "test_docker_hook.py": ["sudo calicoctl node --docker-hook"],
    "test_etcd_apis.py": [
        "etcdctl role add calico",
        "etcdctl role grant-permission calico --prefix=true readwrite /calico/",
        "etcdctl user add calico",
        "etcdctl user grant-role calico calico",
        "$etcdctl user add root",
        "$etcdctl user grant-role root root",
        "$etcdctl auth enable",
    ],
    "test_datastore.py": [
        "calicoctl datastore migrate --rollback",
        "$etcdctl role add calico",
        "$etcdctl role grant calico --path '/calico' --readwrite",
        "$etcdctl role grant calico --path '/calico/*' --readwrite",
        "$etcdctl user add calico",
        "$etcdctl user grant calico --roles calico",
        "$etcdctl role revoke guest --path '/*' --readwrite",
    ],
}
"""System test -> the command lines outside of `sh` blocks that do what it tests: they need more than a bare host."""

PROGRAM = re.compile(
    r"(sudo )?(make|calicoctl|docker|docker-compose|podman|systemctl|\$?etcdctl|openssl|apt-get|ip|nft|birdc|jq) "
)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_commands_in_the_text_exist_with_their_options(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for command, rest in re.findall(r"`(?:sudo )?calicoctl\s+([a-z]+)\b([^`]*)`", text):
        assert command in COMMANDS, command
        known = str(importlib.import_module(f"calicoctl.commands.{command}").__doc__)
        unknown = {name for name in re.findall(r"--[a-z0-9-]+", rest) if name not in known} - {"--help"}
        assert not unknown, (command, unknown)


def test_every_command_line_is_run_by_a_test() -> None:
    run, shown = set(), set()
    for page in PAGES:
        if page.name in ("CONTRIBUTING.md", "CHANGELOG.md"):
            continue
        text = page.read_text()
        blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        run |= {line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()}
        indented = re.findall(r"^    (\S.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
        shown |= {line for line in indented if PROGRAM.match(line + " ")}
    run |= {line.removeprefix("sudo ") for line in run}
    assert shown - run == {line for lines in ELSEWHERE.values() for line in lines}
    assert all((ROOT / "tests/system" / name).exists() for name in ELSEWHERE)
