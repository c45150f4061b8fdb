"""The layers of the package: imports point down, and no module imports itself through others."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent.parent / "calicoctl"

LAYERS = ("", "datastore", "policy", "desired workloads", "felix plugins", "configuration diagnose", "commands", "cli")
"""The folders, from the bottom; "" are the modules beside the folders. docs/architecture.md shows them as a drawing."""

UPWARDS = {
    ("calicoctl.__main__", "calicoctl.cli.command_client"),
    ("calicoctl.commands.batch", "calicoctl.cli.main"),
    ("calicoctl.commands.completion", "calicoctl.cli.completion"),
}
"""What starts a command line, or completes one."""


def imports() -> dict[str, set[str]]:
    """Return the modules of the package, each with those that it imports, wherever in its text."""
    files = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        files[".".join(parts).removesuffix(".__init__")] = path
    found: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names} & files.keys()
            elif isinstance(node, ast.ImportFrom) and node.module:
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                found[name] |= {one if one in files else node.module for one in full} & files.keys()
    return found


IMPORTS = imports()


def layer(module: str) -> int:
    folder = module.split(".")[1] if module.count(".") > 1 else ""
    return next(number for number, folders in enumerate(LAYERS) if folder in folders.split(" "))


def test_imports_point_down() -> None:
    found = {(name, other) for name, others in IMPORTS.items() for other in others}
    upwards = {(name, other) for name, other in found if layer(other) > layer(name)}
    assert upwards == UPWARDS
    beside = {
        (name, other) for name, other in found if {"desired", "workloads"} <= {*name.split("."), *other.split(".")}
    }
    assert not beside, "the store as this host sees it, and the workloads, know nothing of each other"


@pytest.mark.parametrize("module", sorted(IMPORTS))
def test_no_module_imports_itself_through_others(module: str) -> None:
    reached, new = set(), {module}
    while new:
        new = set().union(*(IMPORTS[name] for name in new)) - reached
        reached |= new
    assert module not in reached, f"{module} is in a circle of imports"


def test_commands_about_containers_start_without_the_agents_modules() -> None:
    """Every command pays for what the module of the command imports."""
    script = "import sys, calicoctl.commands.container; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert [name for name in loaded if name.startswith(("calicoctl.felix", "calicoctl.diagnose"))] == []
