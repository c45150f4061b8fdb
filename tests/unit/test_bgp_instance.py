"""Which BIRDs, with which routes, are ended. The processes are shells, without root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from calicoctl import netlink, proc
from calicoctl.errors import CalicoError
from calicoctl.felix.bgp import instance, processes
from calicoctl.felix.bgp.instance import Instance

FOREIGN = "/etc/bird/bird.conf"


class Machine:
    """The folder of all hosts, the BIRDs of this network namespace, and whether it has routes of BIRD."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.birds: list[subprocess.Popen[bytes]] = []
        self.routes = True
        self.warnings: list[str] = []

    def run(self, conf: str | Path) -> subprocess.Popen[bytes]:
        bird = subprocess.Popen(
            ["sh", "-c", "echo; read wait", "-c", str(conf)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.birds.append(bird)
        assert bird.stdout is not None and bird.stdout.read(1) == b"\n"
        return bird

    def run_for(self, host: str) -> subprocess.Popen[bytes]:
        (self.directory / host).mkdir(exist_ok=True)
        return self.run(self.directory / host / "bird" / "conf")

    def found(self) -> dict[int, str]:
        alive = (bird.pid for bird in self.birds if bird.poll() is None)
        return {pid: processes.host_of(proc.arguments(pid)) for pid in alive}

    def delete(self, family: int, route: netlink.Route) -> None:
        self.routes = False

    def remove(self, host: str) -> bool:
        return Instance(host).remove(self.warnings.append)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    for module in (instance, processes):
        monkeypatch.setattr(module, "DIRECTORY", tmp_path)
    monkeypatch.setattr(processes, "ROOT", os.geteuid())
    monkeypatch.setattr(instance, "birds", machine.found)
    monkeypatch.setattr(instance, "_routes", lambda: [(2, None)] if machine.routes else [])
    monkeypatch.setattr(instance, "_delete", machine.delete)
    yield machine
    for bird in machine.birds:
        bird.kill()
        bird.communicate()


def test_one_that_no_file_names_is_ended_with_its_routes(machine: Machine) -> None:
    bird = machine.run_for("host1")
    assert machine.remove("host1")
    assert bird.wait(5) is not None and not machine.routes and machine.warnings == []
    assert not list((machine.directory / "host1").iterdir())


def test_one_of_a_former_name_is_ended_with_its_routes(machine: Machine) -> None:
    former = machine.run_for("former")
    assert not Instance("host1").recognise()
    Instance("host1").refuse_other_bird()
    assert machine.remove("host1")
    assert former.wait(5) is not None and not machine.routes
    assert not Instance("former").is_here()


def test_to_look_for_one_leaves_no_trace(machine: Machine) -> None:
    former, own = machine.run_for("former"), machine.run_for("host1")
    assert Instance("former").find() == former.pid and Instance("host1").find() == own.pid
    assert [*machine.directory.glob("*/*")] == []
    assert Instance("host1").recognise()
    assert {path.name for path in machine.directory.glob("*/*")} == {"bird.pid", "bird.boot"}


def test_one_of_a_former_name_goes_on_if_bird_may_not_run_here(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    former = machine.run_for("former")
    machine.run(FOREIGN)
    monkeypatch.setattr(instance, "refuse_missing", lambda: "bird")
    with pytest.raises(CalicoError, match="another BIRD"):
        Instance("host1").start("")
    assert former.poll() is None and machine.routes


def test_what_one_of_a_former_name_has_left_is_removed(machine: Machine) -> None:
    (machine.directory / "former").mkdir()
    Instance("former")._note_place()
    (machine.directory / "elsewhere").mkdir()
    (machine.directory / "elsewhere" / "bird.boot").write_text("another boot\n")
    assert machine.remove("host1") and not machine.routes
    assert [path.parent.name for path in machine.directory.glob("*/bird.boot")] == ["elsewhere"]


def test_nothing_of_a_foreign_one_is_touched(machine: Machine) -> None:
    foreign = machine.run(FOREIGN)
    assert not machine.remove("host1") and machine.routes and machine.warnings == []
    machine.run_for("host1")
    assert machine.remove("host1") and machine.routes
    (warning,) = machine.warnings
    assert f"another BIRD (process {foreign.pid}) runs here" in warning and foreign.poll() is None
