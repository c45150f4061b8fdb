"""Compose runs the examples of docs/docker.md, with containers connected by labels, and in a Docker network."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.agent import AgentHost
from tests.system.support import run, wait_for
from tests.system.test_docker_networks import await_clean, reaches
from tests.system.test_docker_networks import served as served

PAGE = Path(__file__).parent.parent.parent / "docs/docker.md"


class Project:
    """A project of Compose, with one of the page's examples."""

    def __init__(self, folder: Path, example: str) -> None:
        (folder / "docker-compose.yml").write_text(example)
        self._folder = folder

    def compose(self, *words: str) -> None:
        # nobody asks for a version of the file's format, which Compose 1 warns of
        command = ["docker-compose", "--project-name", "tests", *words]
        done = subprocess.run(command, cwd=self._folder, capture_output=True, text=True, timeout=60, env={**os.environ})
        assert done.returncode == 0, done

    def container(self, service: str) -> dict:
        """Return the description of the service's container."""
        filters = ("--filter", f"label=com.docker.compose.service={service}")
        (id,) = run("docker", "ps", "--quiet", "--no-trunc", *filters).out.split()
        return json.loads(run("docker", "inspect", id).out)[0]


@pytest.fixture
def project(served: AgentHost, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Project]:
    """The example of the page whose number is the parameter."""
    examples = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(examples) == 2
    project = Project(tmp_path, examples[request.param])
    yield project
    project.compose("down", "--timeout=0")
    await_clean(served, 40)


@pytest.mark.parametrize("project", [0], indirect=True)
def test_containers_with_labels(served: AgentHost, project: Project) -> None:
    host = served
    host.ctl("profile", "add", "web")
    host.ctl("pool", "add", "10.1.0.0/24")
    project.compose("up", "--detach")
    wait_for(lambda: len(host.records()) == 2, f"the endpoints\n{host.log()}")
    web, worker = project.container("web"), project.container("worker")
    wait_for(lambda: reaches(worker["Id"], "10.1.0.1"), f"an answer\n{host.log()}")
    project.compose("up", "--detach", "--force-recreate", "--timeout=0")
    assert project.container("web")["Id"] != web["Id"]
    again = project.container("worker")["Id"]
    wait_for(lambda: reaches(again, "10.1.0.1"), f"an answer\n{host.log()}")


@pytest.mark.parametrize("project", [1], indirect=True)
def test_containers_in_a_network(served: AgentHost, project: Project) -> None:
    host = served
    project.compose("up", "--detach")
    web, worker = project.container("web"), project.container("worker")
    assert web["NetworkSettings"]["Networks"]["shop"]["IPAddress"] == "192.168.7.1"
    wait_for(lambda: reaches(worker["Id"], "web"), f"an answer\n{host.log()}")
    assert {tuple(record["profile_ids"]) for record in host.records().values()} == {("shop",)}
    project.compose("restart", "--timeout=0")
    wait_for(lambda: reaches(worker["Id"], "192.168.7.1"), f"an answer\n{host.log()}")
    project.compose("up", "--detach", "--force-recreate", "--timeout=0")
    assert project.container("web")["Id"] != web["Id"]
    assert project.container("web")["NetworkSettings"]["Networks"]["shop"]["IPAddress"] == "192.168.7.1"
    again = project.container("worker")["Id"]
    wait_for(lambda: reaches(again, "web"), f"an answer\n{host.log()}")
