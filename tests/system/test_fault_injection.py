"""Nothing leaks: each step of connecting and disconnecting fails, is interrupted by kill -9, or gets no answer.

The steps are counted by a run without fault, so a step that is added later is tested, too.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.system.support import FAULTY, Host, Result, addresses, calico_links, in_process, links, routes, run, wait_for

SPACE = "blue"
PATH = "/var/run/netns/blue"


@dataclass
class Scenario:
    """A command to break; what is done before it, and what must be true when it has been done."""

    arguments: tuple[str, ...]
    before: Callable[[Host], None]
    after: Callable[[Host], None]
    said_when_done: str | None = None
    """What the same command says, with status 1, when it is given again and all is done already; None for no error."""


def renew_namespace() -> None:
    run("ip", "netns", "delete", SPACE, check=False)
    wait_for(lambda: not calico_links(), "namespace")
    run("ip", "netns", "add", SPACE)


def prepared(host: Host, *arguments: str) -> None:
    status, said = in_process(host, *arguments)
    assert status == 0, (arguments, said)


def nothing(host: Host) -> None:
    pass


def connected(host: Host) -> None:
    # as in a Docker container, where IPv6 is off for every new interface
    for name in ("default", "lo"):
        run("ip", "netns", "exec", SPACE, "sysctl", "-qw", f"net.ipv6.conf.{name}.disable_ipv6=1")
    prepared(host, "container", "add", PATH, "192.168.0.1")
    prepared(host, "container", PATH, "profile", "append", "web")


def connected_twice(host: Host) -> None:
    connected(host)
    prepared(host, "container", PATH, "ip", "add", "fd80:24e2:f998:72d6::1")


def restarted(host: Host) -> None:
    connected_twice(host)
    renew_namespace()


def is_connected(*nets: str) -> Callable[[Host], None]:
    def check(host: Host) -> None:
        host.check_consistent()
        record = host.record()
        assert set(record["ipv4_nets"] + record["ipv6_nets"]) == set(nets)
        assert addresses(SPACE, "eth1") == set(nets)
        assert links(SPACE)["eth1"]["address"] == record["mac"]
        known = run("ip", "-n", SPACE, "neigh", "show", "nud", "permanent").out
        for version, hop, gateway in ((4, "192.0.2.2", "ipv4_gateway"), (6, "2001:db8::2", "ipv6_gateway")):
            has = any((":" in net) == (version == 6) for net in nets)
            assert any(route.startswith(f"default via {hop} dev eth1") for route in routes(SPACE, version)) == has
            assert record[gateway] == (hop if has else None)
            assert (f"{hop} dev eth1 lladdr {links()[record['name']]['address']} PERMANENT" in known) == has

    return check


def is_gone(host: Host) -> None:
    host.check_nothing_left(folders=False)  # a crash between deleting a key and its folders leaves these, empty
    assert links(SPACE) == {}


TWICE = "has already been configured with Calico Networking"
V4, V6 = "192.168.0.1/32", "fd80:24e2:f998:72d6::1/128"

SCENARIOS = {
    "add": Scenario(("add", PATH, "192.168.0.1"), nothing, is_connected(V4), TWICE),
    "add any": Scenario(("add", PATH, "ipv6"), nothing, is_connected("fd80:24e2:f998:72d6::/128"), TWICE),
    "add again": Scenario(("add", PATH, "192.168.0.1"), restarted, is_connected(V4, V6), TWICE),
    "ip add": Scenario((PATH, "ip", "add", "fd80:24e2:f998:72d6::1"), connected, is_connected(V4, V6)),
    "ip remove": Scenario(
        (PATH, "ip", "remove", "fd80:24e2:f998:72d6::1"), connected_twice, is_connected(V4), "is not assigned"
    ),
    "remove": Scenario(("remove", PATH), connected_twice, is_gone, "is not connected"),
}


class Stage:
    """Plays a scenario again and again on a host that is as new each time."""

    def __init__(self, host: Host, scenario: Scenario, log: Path) -> None:
        self.host, self.scenario, self.log = host, scenario, log

    def prepare(self) -> None:
        renew_namespace()
        self.host.etcd.delete(f"/calico/v1/host/{self.host.name}/workload")
        self.host.etcd.delete("/calico/ipam")
        shutil.rmtree("/run/calico", ignore_errors=True)
        shutil.rmtree("/var/lib/calico", ignore_errors=True)
        self.scenario.before(self.host)

    def play(self, fault: str) -> Result:
        self.log.write_text("")
        return self.host.ctl(
            "container",
            *self.scenario.arguments,
            status=None,
            command=[sys.executable, FAULTY],
            env={"FAULT": fault, "FAULT_LOG": str(self.log)},
        )

    def steps(self) -> list[str]:
        """Return the changes the command makes when nothing fails."""
        self.prepare()
        assert self.play("none:0").status == 0
        self.scenario.after(self.host)
        if self.scenario.after is is_gone:
            self.host.check_nothing_left()
        return self.log.read_text().splitlines()

    def again(self) -> None:
        """Give the command once more, and find everything as it should be."""
        result = self.host.ctl("container", *self.scenario.arguments, status=None)
        done = self.scenario.said_when_done
        assert result.status == 0 or (result.status == 1 and done is not None and done in result.err), result
        self.scenario.after(self.host)

    def remove(self) -> None:
        self.host.ctl("container", "remove", PATH, status=None)
        is_gone(self.host)

    def clear(self) -> None:
        """Disconnect, and find that it could be done."""
        in_process(self.host, "container", "remove", PATH)
        is_gone(self.host)


@pytest.fixture(params=SCENARIOS, ids=lambda name: name.replace(" ", "-"))
def any_stage(request: pytest.FixtureRequest, host: Host, tmp_path: Path) -> Stage:
    return made_stage(host, request.param, tmp_path)


@pytest.fixture(params=[name for name in SCENARIOS if name != "add any"], ids=lambda name: name.replace(" ", "-"))
def stage(request: pytest.FixtureRequest, host: Host, tmp_path: Path) -> Stage:
    """Without the scenario whose steps are those of another."""
    return made_stage(host, request.param, tmp_path)


def made_stage(host: Host, scenario: str, tmp_path: Path) -> Stage:
    host.ctl("profile", "add", "web")
    return Stage(host, SCENARIOS[scenario], tmp_path / "steps")


def snapshot(host: Host) -> tuple:
    """All that a command may change: records, addresses, handles, interfaces on both sides, routes, neighbours."""
    inside = {name: (link["address"], sorted(addresses(SPACE, name))) for name, link in links(SPACE).items()}
    return (
        host.records(),
        host.allocations(),
        host.handles(),
        sorted(links()),
        inside,
        [
            run("ip", "netns", "exec", SPACE, "sysctl", "-n", f"net.ipv6.conf.{name}.disable_ipv6").out
            for name in ("lo", *inside)
        ],
        "UP" in run("ip", "-n", SPACE, "link", "show", "lo").out,
        run("ip", "-n", SPACE, "neigh", "show", "nud", "permanent").out,
        sorted(route for version in (4, 6) for route in routes(SPACE, version) if "fe80" not in route),
    )


def without_fresh_names(state: tuple) -> str:
    """A snapshot with what is new at each connection (endpoint ids, interface names, MACs) left out."""
    records, allocations, handles, host_links, inside, *others = json.loads(json.dumps(state))
    return json.dumps(
        [
            [
                [r["ipv4_nets"], r["ipv6_nets"], r["ipv4_gateway"], r["ipv6_gateway"], r["profile_ids"]]
                for r in records.values()
            ],
            sorted(allocations),
            handles,
            len(host_links),
            {name: value[1] for name, value in inside.items()},
            *others,
        ],
        sort_keys=True,
    )


def test_a_step_that_fails_leaves_nothing_behind(any_stage: Stage) -> None:
    stage = any_stage
    steps = stage.steps()
    removing = "remove" in stage.scenario.arguments
    for number, step in enumerate(steps):
        stage.prepare()
        before = without_fresh_names(snapshot(stage.host))
        result = stage.play(f"fail:{number}")
        where = f"step {number} of {len(steps)}: {step}: {result}"
        if result.status == 0:
            assert "delete" in step, where  # of an empty folder: no reason to fail
            stage.scenario.after(stage.host)
            continue
        assert result.status == 1, where
        assert result.err.count("\n") == 1 and result.out == "", where
        # what is being removed is not put back: the command is to be given again
        assert removing or without_fresh_names(snapshot(stage.host)) == before, where
        stage.again()
        stage.clear()


@pytest.mark.parametrize("command", [Stage.again, Stage.remove], ids=["repeated", "remove"])
def test_one_command_repairs_everything_after_kill_9(stage: Stage, command: Callable[[Stage], None]) -> None:
    for number, step in enumerate(stage.steps()):
        stage.prepare()
        result = stage.play(f"kill:{number}")
        assert result.status == -9, f"step {number}: {step}: {result}"
        command(stage)


def test_an_interrupt_at_any_step_leaves_nothing_behind(stage: Stage) -> None:
    removing = "remove" in stage.scenario.arguments
    for number, step in enumerate(stage.steps()):
        stage.prepare()
        before = without_fresh_names(snapshot(stage.host))
        result = stage.play(f"term:{number}")
        where = f"step {number}: {step}: {result}"
        if result.status == 0:
            stage.scenario.after(stage.host)  # it had been done already
            continue
        assert result.status == 128 + 15 and result.err.startswith("Interrupted"), where
        assert removing or without_fresh_names(snapshot(stage.host)) == before, where
        stage.again()
        stage.clear()


def test_a_lost_answer_is_recognised_as_ones_own(any_stage: Stage) -> None:
    stage = any_stage
    for number, step in enumerate(stage.steps()):
        stage.prepare()
        result = stage.play(f"lost:{number}")
        assert result.status == 0, f"step {number}: {step}: {result}"
        stage.scenario.after(stage.host)


def test_when_etcd_dies_on_the_way_the_command_says_so_and_can_be_repeated(stage: Stage) -> None:
    for number, step in enumerate(stage.steps()):
        stage.prepare()
        result = stage.play(f"dead:{number}")
        if "delete" in step and result.status == 0:
            continue
        assert result.status == 1, f"step {number}: {step}: {result}"
        assert "etcd cannot be reached" in result.err
        stage.again()
        stage.clear()


def test_a_docker_container_that_is_gone_after_kill_9_is_removed_by_its_name(
    host: Host, engine: None, tmp_path: Path
) -> None:
    log = tmp_path / "steps"
    number, steps = 0, 1
    while number < steps:
        run("docker", "run", "--net=none", "--name", "workload", "-tid", "busybox")
        try:
            log.write_text("")
            fault = {"FAULT": f"kill:{number}", "FAULT_LOG": str(log)}
            host.etcd.delete("/calico/ipam")
            words = ("container", "add", "workload", "192.168.0.1")
            result = host.ctl(*words, status=-9, command=[sys.executable, FAULTY], env=fault)
            assert result.out == ""
        finally:
            run("docker", "rm", "-f", "workload")
        host.ctl("container", "remove", "workload", status=None)  # after the first step, there is nothing to remove
        host.check_nothing_left()
        # the record is the last step: there is one more as long as it is not there
        number += 1
        steps = number if "/endpoint/" in log.read_text() else number + 1
    assert number > 6
