"""The requirements that `make install` installs: pinned, with hashes, and what setup.py allows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent.parent
PYTHONS = ("3.9", "3.10", "3.11", "3.12", "3.13")


def pinned(name: str, python: str) -> dict[str, str]:
    """Return the versions by package that a file in `setup` pins for a version of Python on Linux."""
    environment = {"python_version": python, "python_full_version": f"{python}.2", "sys_platform": "linux"}
    found: dict[str, str] = {}
    for line in (ROOT / "setup" / name).read_text().replace("\\\n", "").splitlines():
        if line.startswith("#"):
            continue
        text, *hashes = line.split("--hash=")
        assert hashes and all(re.fullmatch("sha256:[0-9a-f]{64}", hash.strip()) for hash in hashes), line
        requirement = Requirement(text.strip())
        (one,) = requirement.specifier
        assert one.operator == "==" and requirement.url is None
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert requirement.name not in found
            found[requirement.name] = one.version
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_they_are_what_setup_allows(python: str) -> None:
    text = (ROOT / "setup.py").read_text().partition("install_requires=[")[2].partition("]")[0]
    allowed = [Requirement(line) for line in re.findall(r'"(.+)",', text)]
    assert len(allowed) >= 10
    versions = pinned("requirements.txt", python)
    environment = {"python_version": python, "python_full_version": f"{python}.2"}
    for one in allowed:
        if one.marker is None or one.marker.evaluate(environment):
            version = versions[one.name.replace("_", "-")]
            assert one.specifier.contains(version), f"{one} is not {version}: run 'make lock'"
    assert {"setuptools", "wheel"} <= set(pinned("build-requirements.txt", python))


def test_the_debian_package_has_the_same_libraries_for_each_of_its_pythons() -> None:
    minors = re.search(r'^PYTHONS="([\d ]+)"', (ROOT / "setup/deb").read_text(), re.MULTILINE)[1].split()
    first, *others = (pinned("requirements.txt", f"3.{minor}") for minor in minors)
    assert others and all(other == first for other in others)
    depends = (ROOT / "setup/debian/control").read_text()
    assert f"Depends: python3 (>= 3.{minors[0]}), python3 (<< 3.{int(minors[-1]) + 1}), " in depends


@pytest.mark.parametrize("name", ["requirements.txt", "build-requirements.txt"])
def test_they_name_no_place(name: str) -> None:
    assert not re.search(r"https?:|file:|://|^-|/", (ROOT / "setup" / name).read_text(), re.MULTILINE)
