"""The alert rules and the dashboard in `docs/monitoring` name metrics and labels that the agent serves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from wsgiref.util import setup_testing_defaults

import pytest
import yaml

from calicoctl.felix import metrics_server
from calicoctl.felix.dataplane.drops import REASONS
from calicoctl.felix.dataplane.drops_manager import Counted
from calicoctl.felix.health import Health
from calicoctl.felix.metrics import Metrics

FOLDER = Path(__file__).parent.parent.parent / "docs/monitoring"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The labels of the samples that a scrape shows, by metric; a metric may have none yet."""
    apps = []
    monkeypatch.setattr(metrics_server, "serve", lambda app, address, port: apps.append(app))
    Metrics(Health("host1", "1"), 9091, lambda: [Counted("e" * 32, "inbound", REASONS[0], 1)])
    environ: dict[str, object] = {}
    setup_testing_defaults(environ)
    found: dict[str, set[str]] = {}
    for line in b"".join(apps[0](environ, lambda *_: None)).decode().splitlines():
        name = line.split()[2] if line.startswith("# TYPE") else re.match(r"\w*", line).group()
        found.setdefault(name, set()).update(re.findall(r'[{,](\w+)="', line))
    return {name: labels for name, labels in found.items() if name and not name.endswith("_created")}


def alerts() -> list[dict[str, object]]:
    (group,) = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    return group["rules"]


def panels() -> list[dict[str, object]]:
    return json.loads((FOLDER / "dashboard.json").read_text())["panels"]


def expressions() -> list[str]:
    return [rule["expr"] for rule in alerts()] + [target["expr"] for one in panels() for target in one["targets"]]


def test_the_metrics_and_labels_exist(served: dict[str, set[str]]) -> None:
    found = expressions()
    assert len(found) > 20
    for expression in found:
        names = set(re.findall(r"\bcalico_\w+|\bup\b", expression))
        assert names, expression
        for name in names - {"up"}:
            assert name in served, expression
        known = set().union({"instance", "job"}, *(served.get(name, ()) for name in names))
        for reason in re.findall('reason="([^"]*)"', expression):
            assert reason in REASONS, expression
        matched = re.findall(r'(\w+)=~?"', expression)
        grouped = [label for labels in re.findall(r"by \(([^)]*)\)", expression) for label in labels.split(", ")]
        assert {*matched, *grouped} <= known, expression
        assert expression.count("(") == expression.count(")") and expression.count("{") == expression.count("}")


def kept_labels(expression: str, served: dict[str, set[str]]) -> set[str]:
    """Return the labels that the result of an expression has."""
    grouped = re.search(r"by \(([^)]*)\)", expression)
    if grouped:
        return set(grouped[1].split(", "))
    if re.match(r"(sum|count)\(", expression):
        return set()
    return {"instance"}.union(*(served.get(name, ()) for name in re.findall(r"\bcalico_\w+", expression)))


def test_legends_and_summaries_use_labels_that_are_left(served: dict[str, set[str]]) -> None:
    for one in panels():
        assert one["fieldConfig"]["defaults"]["unit"] in ("short", "pps", "s"), one["title"]
        for target in one["targets"]:
            used = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert used <= kept_labels(target["expr"], served), target["expr"]
        assert len({target["legendFormat"] for target in one["targets"]}) == len(one["targets"]), one["title"]
    for rule in alerts():
        used = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
        assert "instance" in used and used <= kept_labels(rule["expr"], served), rule["alert"]


def test_the_dashboard_shows_every_metric(served: dict[str, set[str]]) -> None:
    shown = "\n".join(target["expr"] for one in panels() for target in one["targets"])
    for name in served:
        family = re.sub("_(bucket|count|sum)$", "", name) if "apply" in name else name
        assert family in shown, f"{name} is in no panel of {FOLDER / 'dashboard.json'}"


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(set(names)) == len(names)
    for rule in alerts():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for one in panels():
        place = one["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, one["title"]
        taken |= cells
