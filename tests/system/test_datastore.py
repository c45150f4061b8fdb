"""Moving the data from etcd's v2 API to v3, with agents and traffic, and whatever goes wrong; what `show` says."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from calicoctl.datastore import migration_run
from calicoctl.datastore.etcd2 import Etcd2Store
from calicoctl.datastore.store import Keep
from tests.system.agent import LOG_DIR, FreeHost
from tests.system.fabric import FabricHost, fabric
from tests.system.proxy import proxy_before
from tests.system.support import (
    CALICOCTL,
    FAULTY,
    Etcd,
    Host,
    Result,
    free_port,
    in_process,
    run,
    wait_for,
    without_what_packets_change,
)
from tests.system.test_cluster import HOME, cluster_of, running
from tests.system.test_etcd_apis import OTHER_CALICO, PASSWORD, READY, with_users
from tests.unit.memory_store import Lost

pytestmark = pytest.mark.api("etcdv2")
"""So etcd serves both."""

COPIED_REVISION = "/calico/v1/copied-revision"
OLD_STATUS = "/calico/felix/v1/host/old/status"
BLUE = "/var/run/netns/blue"
LOSS = 0.3
"""Seconds without an answer that a loaded machine has by itself."""


class MovingHost(FreeHost):
    """A host whose data is moved."""

    @property
    def two(self) -> dict[str, str]:
        """All that v2 holds, but for what agents report."""
        return {key: value for key, value in by("etcdv2", self.etcd).tree().items() if "/felix/" not in key}

    @property
    def three(self) -> dict[str, str]:
        """All that v3 holds, but for what agents report, and for the revision that was copied."""
        found = by("etcdv3", self.etcd).tree()
        return {key: value for key, value in found.items() if "/felix/" not in key and key != COPIED_REVISION}

    def shown(self) -> dict:
        return json.loads(self.ctl("datastore", "show", "--output=json").out)

    def used(self) -> tuple[str, bool]:
        found = self.shown()
        return found["used"], found["frozen"]

    def migrate(self, *options: str, status: int = 0) -> str:
        """Run `datastore migrate` without its pauses; return what it says."""
        found, said = in_process(self, "datastore", "migrate", *options)
        assert found == status and "Internal error" not in said, said
        return said


def by(api: str, etcd: Etcd) -> Etcd:
    """Return a client of one of the APIs of an etcd."""
    client = copy.copy(etcd)
    client.api = api
    return client


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands in this process do not wait for others that do not exist."""
    monkeypatch.setattr(migration_run, "SETTLE", 0.05)


@pytest.fixture
def bare(own_etcd: Etcd, quick: None) -> MovingHost:
    """A host without an agent; data is in v2."""
    two = by("etcdv2", own_etcd)
    two.put(READY, "true")
    for number in range(150):
        two.put(f"/calico/v1/policy/profile/p{number}/tags", [f"p{number}"])
    return MovingHost(own_etcd)


def reset(host: MovingHost) -> None:
    """Put everything as it was before a move."""
    by("etcdv3", host.etcd).delete("/calico")
    by("etcdv2", host.etcd).put(READY, "true")


def without_ready(data: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in data.items() if key != READY}


def as_user(host: MovingHost) -> None:
    """Run the host's commands from now on as etcd's user for hosts."""
    user, environment = {"ETCD_USERNAME": "calico", "ETCD_PASSWORD": PASSWORD}, host.environment
    host.environment = lambda **extra: environment(**{**user, **extra})  # type: ignore[method-assign]


def faulty(host: MovingHost, fault: str, log: Path, *options: str, status: int) -> Result:
    env = {"FAULT": fault, "FAULT_LOG": str(log), "SETTLE": "0.05"}
    words = ("datastore", "migrate", *options)
    return host.ctl(*words, status=status, command=[sys.executable, FAULTY], env=env)


@pytest.mark.parametrize("options", [(), ("--rollback",)])
def test_after_a_kill_at_any_step_the_data_is_in_use_or_the_command_can_be_repeated(
    bare: MovingHost, tmp_path: Path, options: tuple[str, ...]
) -> None:
    before, log = bare.two, tmp_path / "log"
    if options:
        bare.migrate()
    faulty(bare, "none:0", log, *options, status=0)
    steps = log.read_text().splitlines()
    assert len(steps) == (2 if options else 6)
    for number in range(len(steps)):
        reset(bare)
        if options:
            bare.migrate()
        faulty(bare, f"kill:{number}", log, *options, status=-9)
        used = bare.used()
        assert used in (("v2", False), ("v2", True), ("v3", False)), (steps, number)
        last = len(steps) - 1
        assert used == ("v2", False) or number != last or not options
        if number == last and not options:
            assert used == ("v3", False)
        if used[1]:
            assert bare.shown()["move"] == ("rolling back" if options else "copying")
            said = bare.ctl("profile", "add", "new", status=1).err
            assert "etcd's data is frozen" in said and "'calicoctl datastore show'" in said
        if number % 2 or options:
            bare.migrate("--rollback")
            assert bare.two == before and bare.used() == ("v2", False)
        bare.migrate()
        assert bare.three == before and bare.used() == ("v3", False)
        assert bare.two == {**before, READY: "false"}


def test_what_is_refused_changes_nothing(bare: MovingHost) -> None:
    etcd = bare.etcd
    two, three = by("etcdv2", etcd), by("etcdv3", etcd)

    def refused(says: str, *options: str, **env: str) -> None:
        before = bare.two, bare.three
        said = bare.ctl("datastore", "migrate", *options, status=1, env=env)
        assert says in said.err and said.err.count("\n") == 1 and said.out == "", said
        assert (bare.two, bare.three) == before

    refused("DATASTORE_TYPE is set to etcdv2", DATASTORE_TYPE="etcdv2")
    refused("The data has not moved to etcd's v3 API", "--finish")
    three.put("/calico/v1/policy/profile/x/tags", "[]")
    refused("v3 API has data already, which is not from here (for example /calico/v1/policy/profile/x/tags)")
    three.delete("/calico")
    three.put(OTHER_CALICO, "{}")
    refused("the data of another Calico in its v3 API")
    three.delete("/calico")
    two.put("/calico/v1/large", "x" * 1_500_000)
    refused("/calico/v1/large cannot be copied: it has 1500016 bytes")
    two.delete("/calico/v1/large")
    etcd._request("PUT", OLD_STATUS, value='{"time": "2016-01-01T00:00:00Z", "uptime": 1}', ttl="90")
    refused("The agents of old are of an older version, or of 2015")
    two.delete("/calico/felix")
    two.put(READY, "false")
    refused("v2 API is frozen (/calico/v1/Ready is false), and not by this command")
    refused("v2 API is frozen (/calico/v1/Ready is false), and not by this command", "--rollback")
    two.put(READY, "true")
    three.put(READY, "true")
    for options in ((), ("--rollback",), ("--finish", "--discard")):
        refused("Ready is true in both APIs of etcd", *options)
    said = bare.ctl("datastore", "show", status=1)
    assert "Used: none: etcd at" in said.out and "No API of etcd can be used" in said.err


def test_a_signal_before_v3_is_in_use_takes_v2_into_use_again(bare: MovingHost) -> None:
    two = by("etcdv2", bare.etcd)
    status = {"datastore": {"api": "etcdv2", "frozen": False, "pinned": False}}
    bare.etcd._request("PUT", OLD_STATUS, value=json.dumps(status), ttl="90")
    for number in (signal.SIGINT, signal.SIGTERM):
        command = [CALICOCTL, "datastore", "migrate"]
        process = subprocess.Popen(command, env=bare.environment(), stderr=subprocess.PIPE, text=True)
        wait_for(lambda: two.get(READY) == "false", "the freeze")
        for words in (("profile", "add", "pinned"), ("node", "--ip=192.0.2.2", f"--log-dir={LOG_DIR}")):
            refused = bare.ctl(*words, status=1, env={"DATASTORE_TYPE": "etcdv3"})
            assert "etcd's data is frozen" in refused.err, refused
        process.send_signal(number)
        said = process.communicate()[1]
        assert process.returncode == 128 + number and "etcd's v2 API is in use again" in said, said
        assert bare.used() == ("v2", False)
        bare.ctl("profile", "add", f"after{number}")
    two.delete("/calico/felix")
    bare.migrate()
    assert "/calico/v1/policy/profile/after15/tags" in bare.three


@pytest.mark.parametrize("env", [{}, {"DATASTORE_TYPE": "etcdv3"}], ids=["found", "named"])
def test_a_write_that_etcd_gets_after_a_freeze_of_v3_is_not_made(bare: MovingHost, env: dict[str, str]) -> None:
    three = by("etcdv3", bare.etcd)
    bare.migrate()
    with proxy_before(bare.etcd.port) as proxy:
        env = {**env, "ETCD_AUTHORITY": f"127.0.0.1:{proxy.port}"}
        proxy.before_write = lambda: three.put(READY, "false")
        said = bare.ctl("profile", "add", "late", status=1, env=env)
        assert said.err.count("\n") == 1 and "Nothing can be changed: etcd's data is frozen" in said.err, said
        assert "/calico/v1/policy/profile/late/tags" not in bare.three
        three.put(READY, "true")
        proxy.before_write = lambda: three.put(READY, "true")  # as after a move that was given up
        assert bare.ctl("profile", "add", "late", env=env).err == ""
    assert "/calico/v1/policy/profile/late/tags" in bare.three


def test_a_write_that_is_sent_again_after_a_freeze_is_not_made(bare: MovingHost) -> None:
    """If etcd got it before the freeze, it is made, and counts as made."""
    for api in ("etcdv2", "etcdv3"):
        etcd, tags = by(api, bare.etcd), "/calico/v1/policy/profile/p1/tags"
        with proxy_before(etcd.port) as proxy:
            env = {"ETCD_AUTHORITY": f"127.0.0.1:{proxy.port}"}
            for applied, words, status in (
                (False, ("profile", "p1", "tag", "add", "late"), 1),
                (False, ("profile", "remove", "p1"), 1),
                (True, ("profile", "p1", "tag", "add", "late"), 0),
                (True, ("profile", "remove", "p1"), 0),
            ):
                before = etcd.get(tags)
                proxy.lost = Lost(applied, lambda etcd=etcd: etcd.put(READY, "false"))
                said = bare.ctl(*words, status=status, env=env)
                assert proxy.lost is None and said.err.count("\n") == (0 if applied else 1), said
                assert ("Nothing can be changed: etcd's data is frozen" in said.err) == (not applied), said
                assert (etcd.get(tags) == before) == (not applied)
                etcd.put(READY, "true")
        if api == "etcdv2":
            etcd.put(tags, ["p1"])
            bare.migrate()


def frozen_at_write(host: MovingHost, api: str, pauses: list[float], *words: str, status: int) -> Result:
    """Run a command whose first writes are held up for these seconds; freeze the data when the last of them begins."""

    def hold_up() -> None:
        pause = pauses.pop(0)
        if pauses:
            proxy.before_write = hold_up
        else:
            by(api, host.etcd).put(READY, "false")
        time.sleep(pause)  # what is tested is a write that takes this long

    with proxy_before(host.etcd.port) as proxy:
        proxy.before_write = hold_up
        said = host.ctl(*words, status=status, env={"ETCD_AUTHORITY": f"127.0.0.1:{proxy.port}"})
    assert by(api, host.etcd).get(READY) == "false"
    return said


def test_a_command_of_a_batch_that_has_begun_ends_although_v2_is_frozen(own_etcd: Etcd, tmp_path: Path) -> None:
    host, file = MovingHost(own_etcd), tmp_path / "batch"
    host.register()
    run("ip", "netns", "add", "blue")
    file.write_text(f"profile add a\ncontainer add {BLUE} 192.168.0.1\n")
    frozen_at_write(host, "etcdv2", [2, 2, 1], "batch", str(file), status=0)
    host.check_consistent()
    assert len(host.records()) == 1


def test_what_a_freeze_of_v3_leaves_of_a_container_is_named(own_etcd: Etcd) -> None:
    host = MovingHost(by("etcdv3", own_etcd))
    host.register()
    run("ip", "netns", "add", "blue")
    said = frozen_at_write(host, "etcdv3", [0, 0, 0], "container", "add", BLUE, "192.168.0.1", status=1)
    undone = f"Not all of it could be undone: run 'calicoctl container remove {BLUE}' when that works again."
    assert said.err.count("etcd's data is frozen") == 1 and said.err.endswith(f"'. {undone}\n"), said
    assert list(host.allocations()) == ["192.168.0.1"] and host.records() == {}
    host.etcd.put(READY, "true")
    host.ctl("container", "remove", BLUE)
    host.check_nothing_left()


def test_what_old_programs_write_is_copied_or_reported(bare: FreeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    two, numbers, read = by("etcdv2", bare.etcd), itertools.count(), Etcd2Store.list_for_watch

    def read_after_a_write(store: Etcd2Store, directory: str, keep: Keep) -> object:
        two.put("/calico/v1/old", str(next(numbers)))
        return read(store, directory, keep)

    with monkeypatch.context() as writing:
        writing.setattr(Etcd2Store, "list_for_watch", read_after_a_write)
        said = bare.migrate(status=1)
    assert "Old programs keep writing to etcd's v2 API" in said and "/calico/v1/old" in said
    assert bare.used() == ("v2", False)
    bare.migrate()
    assert bare.three["/calico/v1/old"] == two.get("/calico/v1/old")

    two.put("/calico/v1/policy/profile/late/tags", "[]")
    for value in ("true", "false"):  # does not make it look older than the freeze
        two.put(READY, value)
    for options, done in (((), "The data is in etcd's v3 API already."), (("--finish",), "Nothing is deleted")):
        said = bare.migrate(*options, status=1)
        assert done in said and "1 new (/calico/v1/policy/profile/late/tags)" in said
    # what is new in v3 is not lost either, unless that is asked for
    bare.ctl("profile", "add", "new")
    assert "would be lost: 2 new (/calico/v1/policy/profile/new/rules" in bare.migrate("--rollback", status=1)
    assert bare.used() == ("v3", False) and len(bare.three) > 150
    bare.migrate("--rollback", "--discard")
    assert bare.used() == ("v2", False) and "/calico/v1/policy/profile/late/tags" in bare.two
    bare.migrate()
    assert bare.three == {**bare.two, READY: "true"}, "what was discarded is overwritten"
    assert COPIED_REVISION in by("etcdv3", bare.etcd).tree()
    assert re.search(r"1\d\d keys are deleted from etcd's v2 API", bare.migrate("--finish"))
    assert COPIED_REVISION not in by("etcdv3", bare.etcd).tree()
    assert bare.two == {} and bare.migrate("--finish").endswith("etcd's v2 API has no data.\n")
    assert "There is no data to go back to" in bare.migrate("--rollback", "--discard", status=1)


def test_show_for_a_user_with_a_member_down_and_while_frozen(bare: MovingHost) -> None:
    """And moving, for that user."""
    etcd = bare.etcd
    with_users(etcd)
    bare.endpoints = f"http://127.0.0.1:{free_port()},{etcd.url}"
    as_user(bare)
    found = bare.shown()
    assert found["used"] == "v2" and found["frozen"] is False and "Ready is true in v2 alone" in found["why"]
    two, three = found["apis"]["v2"], found["apis"]["v3"]
    assert (two["ready"], two["keys"], two["users"]) == ("true", 151, False) and two["bytes"] > 1500
    assert (three["ready"], three["keys"], three["users"]) == (None, 0, True)
    down, up = found["members"]
    assert not down["healthy"] and "connection refused" in down["error"] and down["version"] is None
    assert up["healthy"] and up["leader"] and up["version"].count(".") == 2 and up["size"] > 0 and up["quota"] > 2**30
    text = bare.ctl("datastore", "show").out
    assert "Used: etcd's v2 API" in text and "Frozen: no" in text and PASSWORD not in text
    by("etcdv2", etcd).put(READY, "false")
    assert bare.shown()["frozen"] is True and "Frozen: yes" in bare.ctl("datastore", "show").out
    by("etcdv2", etcd).put(READY, "true")
    bare.migrate()
    found = bare.shown()
    assert found["used"] == "v3" and found["apis"]["v3"]["keys"] == 152  # and the revision that was copied


def test_members_that_do_not_serve_v2_are_passed_over(bare_host: Host, quick: None) -> None:
    """As during a restart of all members, one after the other."""
    names = ("/calico/v1/policy/profile/old/tags", "/calico/v1/policy/profile/new/tags")
    with running([Etcd(HOME / name, name) for name in ("a", "b")]) as members:
        a, b = members
        two = by("etcdv2", a)
        two.put(READY, "true")
        two.put(names[0], "[]")
        b.stop()
        b.start(cluster_of(members), "--enable-v2=false")
        b.await_ready()
        host = MovingHost(a, endpoints=f"{b.url},{a.url}")
        found = host.shown()
        assert (found["used"], found["apis"]["v2"]["served"], found["apis"]["v2"]["keys"]) == ("v2", True, 2)
        host.ctl("profile", "add", "new")
        assert all(two.get(name) for name in names) and host.three == {}

        # the member that serves it is down
        dead = f"http://127.0.0.1:{free_port()}"
        host.endpoints = f"{b.url},{dead}"
        for words in (("profile", "show"), ("profile", "add", "lost"), ("datastore", "migrate")):
            said = host.ctl(*words, status=1).err
            assert f"etcd at {b.url} does not serve its v2 API" in said and f"be reached at {dead}" in said
        assert host.three == {}

        host.endpoints = f"{b.url},{a.url}"
        host.migrate()
        assert host.used() == ("v3", False)
        host.migrate("--rollback")
        assert host.used() == ("v2", False) and two.get(READY) == "true"
        host.migrate()
        host.endpoints = f"{b.url},{dead}"
        found = host.shown()
        assert (found["used"], found["apis"]["v2"]["served"], found["apis"]["v2"]["error"]) == ("v3", False, None)
        assert f"be reached at {dead}" in host.migrate("--finish", status=1)
        host.endpoints = f"{b.url},{a.url}"
        assert "keys are deleted from etcd's v2 API" in host.migrate("--finish") and two.tree() == {}
        host.endpoints = b.url
        assert host.migrate("--finish").endswith("etcd does not serve its v2 API any more.\n")


def test_the_role_of_a_v2_user_suffices_to_move(bare: MovingHost) -> None:
    """It is made as the documentation says."""
    text = (Path(__file__).parent.parent.parent / "docs/security.md").read_text().partition("ETCDCTL_API=2")[2]
    commands = [shlex.split(command) for command in re.findall(r"^    \$etcdctl (.*)$", text, re.MULTILINE)]
    assert len(commands) == 8
    as_root = ["etcdctl", f"--endpoints={bare.etcd.url}", f"--username=root:{PASSWORD}"]
    for words in commands:
        words[2:] = [f"{words[2]}:{PASSWORD}"] if words[:2] == ["user", "add"] else words[2:]
        run(*as_root, *words, env={**os.environ, "ETCDCTL_API": "2"})
    assert "does not let this user read" in bare.ctl("profile", "add", "new", status=1).err
    as_user(bare)
    bare.ctl("profile", "add", "new")
    assert bare.shown()["apis"]["v2"]["keys"] == 153
    for options in ((), ("--rollback",), (), ("--finish",)):
        bare.migrate(*options)
    assert len(bare.three) == 153 and bare.shown()["apis"]["v2"]["keys"] == 0


def test_an_agent_that_is_pinned_is_named(own_etcd: Etcd, quick: None) -> None:
    host = MovingHost(own_etcd)
    by("etcdv2", own_etcd).put(READY, "true")
    host.start_agent(DATASTORE_TYPE="etcdv2")
    said = host.migrate(status=1)
    assert "The agents of host1 have DATASTORE_TYPE in their environment" in said and host.used() == ("v2", False)
    host.ctl("node", "stop", "--force")
    host.start_agent()
    said = host.migrate()
    assert "etcd's v3 API is in use." in said and "Waiting for agents to use etcd's v3 API" in said
    assert "The agents of" not in said
    # its last status in v2 does not keep v2 from being deleted
    assert by("etcdv2", own_etcd).get("/calico/felix/v1/host/host1/status")
    host.migrate("--finish")
    assert by("etcdv2", own_etcd).tree("/") == {}
    wait_for(lambda: host.status()["waiting_for"] is None, "the agent")
    host.ctl("node", "remove")


class FreeFabricHost(FabricHost, MovingHost):
    """A host of a fabric whose environment does not say which API to use."""


@contextmanager
def moving_fabric(etcd: Etcd, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FreeFabricHost]]:
    monkeypatch.setattr("tests.system.fabric.FabricHost", FreeFabricHost)
    with fabric(etcd, 0, 0) as hosts:
        yield hosts  # type: ignore[misc]


def kernel(host: FabricHost) -> list[object]:
    """Return what the agent has programmed, in an order of its own."""
    text = without_what_packets_change(host.run("nft", "-s", "list", "table", "inet", "calico").out)
    routes = [route for version in (4, 6) for route in host.routes("table", "all", version=version)]
    ours = [route for route in routes if route.get("protocol") != "kernel"]  # link-local addresses bring theirs late
    return [text, sorted(json.dumps(route, sort_keys=True) for route in ours), host.bird]


def test_two_hosts_move_under_traffic(open_etcd: Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    """And back; nobody loses a packet, and the kernel stays as it is."""
    three = by("etcdv3", open_etcd)
    by("etcdv2", open_etcd).put(READY, "true")
    with moving_fabric(open_etcd, monkeypatch) as (one, other):
        for host in (one, other):
            host.start_agent()
        one.add("a", "192.168.0.1")
        other.add("b", "192.168.1.1")
        one.ctl("profile", "add", "web")
        one.set_profiles("a", "web")
        other.set_profiles("b", "web")
        prober = one.prober("a", "192.168.0.1")
        prober.await_answer("192.168.1.1", 20)
        wait_for(lambda: one.sessions == other.sessions == 2, "BGP")
        data, pids, before = one.two, [one.pid, other.pid], [kernel(host) for host in (one, other)]
        assert three.tree() == {}

        def await_kernels() -> None:
            # after a resync, established connections are checked for a moment, by rules of their own
            wait_for(lambda: [kernel(host) for host in (one, other)] == before, "the kernels as before")

        prober.tell({"watch": ["192.168.1.1"]})
        said = one.ctl("datastore", "migrate").err
        await_kernels()
        assert one.three == data
        assert [line.partition(":")[0] for line in said.splitlines()][:2] == [
            "Freezing etcd's v2 API …",
            "Waiting for commands and agents to notice …",
        ]
        for host in (one, other):
            status = json.loads(three.tree()[f"/calico/felix/v1/host/{host.name}/status"])
            assert status["datastore"] == {"api": "etcdv3", "frozen": False, "pinned": False}
            wait_for(lambda h=host: h.log().count("resynced with the store") == 3, f"the agent\n{host.log()}")
        one.ctl("datastore", "migrate", "--rollback")
        lost = prober.ask({})
        assert max(lost.values()) < LOSS, lost
        await_kernels()
        assert one.two == data and one.used() == ("v2", False)
        # and what is changed takes effect
        other.set_profiles("b")
        wait_for(lambda: not one.reaches("a", "192.168.1.1"), "the change of policy")
        assert [one.pid, other.pid] == pids
        for host in (one, other):
            wait_for(lambda h=host: "Problems:   none" in h.ctl("status").out, f"the agent of {host.name}")
        prober.close()
