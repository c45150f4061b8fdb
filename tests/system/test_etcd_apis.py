"""Which of etcd's two APIs a host uses, what is refused while data moves between them, and users of the v3 API."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import signal
import tarfile
from pathlib import Path

import pytest

from tests.system.agent import A4, B4, LOG_DIR, FreeHost
from tests.system.proxy import proxy_before
from tests.system.support import (
    AS_NOBODY,
    CALICOCTL,
    HOST_IP,
    Etcd,
    Host,
    Result,
    addresses,
    calico_links,
    links,
    run,
    tables,
    wait_for,
)
from tests.system.traffic import PATIENT, ping

pytestmark = pytest.mark.api("etcdv2")
"""So etcd serves both."""

READY = "/calico/v1/Ready"
OTHER_CALICO = "/calico/resources/v3/projectcalico.org/felixconfigurations/default"
PASSWORD = "hunter2"
NODE = ("node", f"--ip={HOST_IP}", f"--log-dir={LOG_DIR}")


class Chooser(FreeHost):
    """A host that finds the API by itself, unless a command is told which to use."""

    def profiles(self, **env: str) -> list[str]:
        return [one["name"] for one in json.loads(self.ctl("profile", "show", "--output=json", env=env).out)]


@pytest.fixture
def free(own_etcd: Etcd) -> Chooser:
    return Chooser(own_etcd)


def coded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def set_v3(etcd: Etcd, key: str, value: str | None) -> None:
    """Write or delete a key in v3."""
    if value is None:
        etcd.v3("kv/deleterange", {"key": coded(key)})
    else:
        etcd.v3("kv/put", {"key": coded(key), "value": coded(value)})


def get_v3(etcd: Etcd, key: str) -> str | None:
    found = etcd.v3("kv/range", {"key": coded(key)}).get("kvs")
    return base64.b64decode(found[0]["value"]).decode() if found else None


def set_ready(etcd: Etcd, v3: str | None, v2: str | None) -> None:
    set_v3(etcd, READY, v3)
    etcd.delete(READY)
    if v2 is not None:
        etcd.put(READY, v2)


def everything(etcd: Etcd) -> tuple[dict[str, str], object]:
    """Return all that is below /calico in both APIs, but for what agents report."""
    v3 = etcd.v3("kv/range", {"key": coded("/calico/"), "range_end": coded("/calico0")}).get("kvs", [])
    v2 = {key: value for key, value in etcd.tree().items() if "/felix/" not in key}
    return v2, [entry for entry in v3 if b"/felix/" not in base64.b64decode(entry["key"])]


def keys_v3(etcd: Etcd) -> list[str]:
    found = etcd.v3("kv/range", {"key": coded("/calico/"), "range_end": coded("/calico0"), "keys_only": True})
    return [base64.b64decode(entry["key"]).decode() for entry in found.get("kvs", [])]


def refused(host: Host, *words: str, says: str, **env: str) -> Result:
    """Run a command that must fail with one line, and change nothing in etcd."""
    before = everything(host.etcd)
    said = host.ctl(*words, status=1, env=env)
    assert says in said.err and said.err.count("\n") == 1 and said.out == "", said
    assert everything(host.etcd) == before
    return said


def test_ready_says_which_api_is_used_and_whether_it_may_be_changed(free: Chooser) -> None:
    for name, api in (("two", "etcdv2"), ("three", "etcdv3")):
        free.ctl("profile", "add", name, env={"DATASTORE_TYPE": api})
    for v3, v2, used, frozen in (
        ("true", None, "three", False),
        ("true", "false", "three", False),
        (None, "true", "two", False),
        ("false", "true", "two", False),
        (None, "false", "two", True),
        ("false", "false", "two", True),
        ("false", None, "three", True),
        (None, None, "three", False),
    ):
        set_ready(free.etcd, v3, v2)
        assert free.profiles() == [used], (v3, v2)
        if frozen:
            refused(free, "profile", "add", "new", says=f"etcd's data is frozen, since {READY} is false")
        else:
            free.ctl("profile", "add", "new")
            assert sorted(free.profiles()) == sorted(["new", used]), (v3, v2)
            free.ctl("profile", "remove", "new")
    checked = {row["name"]: row["found"] for row in json.loads(free.ctl("checksystem", "--output=json").out)}
    assert "its v3 API: there is no data yet" in checked["use of etcd"]
    set_ready(free.etcd, "true", "true")
    for words in (("profile", "show"), ("profile", "add", "new"), NODE):
        refused(free, *words, says="Set DATASTORE_TYPE to etcdv3 or etcdv2")
    for api, used in (("etcdv2", "two"), ("etcdv3", "three")):
        assert free.profiles(DATASTORE_TYPE=api) == [used]
        free.ctl("profile", "add", used, env={"DATASTORE_TYPE": api})


def test_data_of_another_calico_is_refused_in_v3_alone(free: Chooser) -> None:
    set_v3(free.etcd, OTHER_CALICO, "{}")
    for words in (("profile", "show"), ("profile", "add", "new"), NODE):
        refused(free, *words, says="the data of another Calico in its v3 API")
    refused(free, "profile", "add", "new", says="the data of another Calico", DATASTORE_TYPE="etcdv3")
    set_ready(free.etcd, None, "true")
    free.ctl("profile", "add", "new")
    assert free.profiles() == ["new"] and free.etcd.get("/calico/v1/policy/profile/new/tags") == '["new"]'


def test_an_etcd_without_its_gateway_or_without_the_v2_api(free: Chooser) -> None:
    """And a host that finds its data gone does not begin anew by itself, with what is connected to it."""
    etcd = free.etcd

    def restart(*options: str) -> None:
        etcd.stop()
        etcd.start(None, *options)
        etcd.await_ready()

    restart("--enable-grpc-gateway=false")
    free.start_agent()
    free.add("a", A4)
    assert etcd.get(READY) == "true"
    restart("--enable-grpc-gateway=false", "--enable-v2=false")
    for words in (("profile", "show"), ("profile", "add", "new"), NODE):
        said = free.ctl(*words, status=1).err
        assert "neither its v2 API nor the HTTP gateway of its v3 API" in said and "--enable-grpc-gateway" in said
    restart("--enable-v2=false")
    shown = json.loads(free.ctl("datastore", "show", "-o", "json", env={"DATASTORE_TYPE": "etcdv2"}, status=1).out)
    assert shown["used"] is None and "API, which DATASTORE_TYPE=etcdv2 asks for: unset that" in shown["error"]
    said = free.ctl(*NODE, status=1).err
    assert "The data of host host1 was in etcd's v2 API, and there is none now" in said and said.count("\n") == 1
    assert get_v3(etcd, READY) is None and len(calico_links()) == 1
    restart()
    wait_for(lambda: free.status()["etcd"]["watch"]["works"], "the agent to read v2 again")
    free.ctl(*NODE)
    free.ctl("node", "remove", "--remove-endpoints")


def test_a_frozen_host_stays_as_it_is(free: Chooser) -> None:
    etcd, path = free.etcd, "/var/run/netns/a"
    free.start_agent()
    free.add("a", A4)
    free.ctl("profile", "add", "web")
    assert get_v3(etcd, READY) == "true" and etcd.tree() == {}
    run("ip", "netns", "add", "b")
    set_ready(etcd, "false", None)
    wait_for(lambda: free.status()["waiting_for"], "the agent to notice")

    def state() -> list[object]:
        files = sorted(path for path in Path("/run/calico").rglob("*") if "namespace" in path.name)
        return [tables(), calico_links(), addresses("a", "eth1"), files]

    before = state()
    for words in (
        ("container", "add", "/var/run/netns/b", "ipv4"),
        ("container", "remove", path),
        ("container", path, "ip", "add", "ipv4"),
        ("container", path, "profile", "append", "web"),
        ("pool", "add", "10.9.0.0/16"),
        ("config", "felix", "LogSeverityScreen", "debug"),
        ("bgp", "node-mesh", "off"),
        ("ipam", "release", A4, "--force"),
        ("node", "remove", "--remove-endpoints"),
    ):
        refused(free, *words, says="etcd's data is frozen")
    assert state() == before and links("b") == {}
    for api in ("", "etcdv3"):
        checked = json.loads(free.ctl("checksystem", "--output=json", status=1, env={"DATASTORE_TYPE": api}).out)
        (row,) = [row for row in checked if row["name"] == "use of etcd"]
        assert row["found"].endswith("; its data is frozen") and not row["ok"]
    for words in (("container", path, "endpoint", "show"), ("pool", "show"), ("node", "show"), ("status",)):
        assert free.ctl(*words).out
    # the agent tells that it lives, and may be started again; a host that is not registered must wait
    pid = free.pid
    free.kill_agent()
    stored = everything(etcd)
    agent = free.start(*NODE, "--detach=false")
    try:
        wait_for(lambda: free.pid != pid and free.status()["waiting_for"], "the agent")
        said = free.ctl(*NODE).err
        assert "etcd's data is frozen" in said and "Host host1 stays registered as it is." in said
        assert "up" in free.ctl("node", "show").out or "starting" in free.ctl("node", "show").out
        assert everything(etcd) == stored and get_v3(etcd, READY) == "false"
        set_ready(etcd, "true", None)
        wait_for(lambda: free.status()["first_update"], "the agent")
    finally:
        agent.terminate()
        agent.communicate()
    free.ctl("node", "remove", "--remove-endpoints")
    set_ready(etcd, "false", None)
    refused(free, *NODE, says="etcd's data is frozen")


def test_a_running_agent_goes_over_to_the_api_that_has_the_data(free: Chooser) -> None:
    etcd = free.etcd
    set_ready(etcd, None, "true")
    free.start_agent()
    free.add("a", A4)
    wait_for(lambda: ping(None, A4), "the network")
    pid = free.pid
    set_ready(etcd, None, "false")
    wait_for(lambda: free.status()["waiting_for"], "the agent to notice")
    for key, value in etcd.tree().items():
        if "/felix/" not in key and key != READY:
            set_v3(etcd, key, value)
    set_ready(etcd, "true", "false")
    answered = []
    wait_for(lambda: answered.append(ping(None, A4)) or not free.status()["waiting_for"], "the agent", 30)
    run("ip", "netns", "add", "b")
    free.ctl("container", "add", "/var/run/netns/b", B4, "--wait=20")
    answered += [ping(None, A4), ping(None, B4, PATIENT)]
    assert all(answered) and free.pid == pid
    # the host's status, and one of each endpoint
    wait_for(lambda: sum(key.startswith("/calico/felix/") for key in keys_v3(etcd)) == 3, "the statuses")
    assert "Problems:   none" in free.ctl("status").out
    free.ctl("node", "remove", "--remove-endpoints")


def test_an_agent_that_was_cut_off_does_not_follow_the_deletion_of_data_that_has_moved(free: Chooser) -> None:
    etcd = free.etcd
    set_ready(etcd, None, "true")
    free.start_agent()
    os.kill(free.pid, signal.SIGSTOP)
    for key, value in etcd.tree().items():
        if "/felix/" not in key and key != READY:
            set_v3(etcd, key, value)
    set_ready(etcd, "true", "false")
    etcd.delete("/calico")
    os.kill(free.pid, signal.SIGCONT)
    wait_for(lambda: free.log().count("resynced with the store") == 3, f"the agent\n{free.log()}")
    assert "is not registered any more" not in free.log()
    free.ctl("node", "remove")


def documented() -> list[str]:
    """Return the four commands that make a user."""
    text = (Path(__file__).parent.parent.parent / "docs/etcd.md").read_text()
    commands = re.findall(r"^    (etcdctl .*)$", text, re.MULTILINE)
    assert len(commands) == 4
    return commands


def with_users(etcd: Etcd) -> None:
    """Make the user for hosts as the documentation says, and one for what is outside; switch users on."""
    environment = {**os.environ, "ETCDCTL_API": "3", "ETCDCTL_ENDPOINTS": etcd.url}
    for command in documented():
        words = shlex.split(command)
        words = [*words[:-1], f"calico:{PASSWORD}"] if words[1:3] == ["user", "add"] else words
        run(*words, env=environment)
    for words in (["user", "add", "root:root"], ["user", "grant-role", "root", "root"], ["auth", "enable"]):
        run("etcdctl", *words, env=environment)


def test_a_user_whose_role_is_for_calico_alone_suffices(free: Chooser, tmp_path: Path) -> None:
    etcd, token_file = free.etcd, Path("/run/calico/.etcd-token")
    with_users(etcd)
    password = tmp_path / "password"
    password.touch(0o600)
    password.write_text(f"{PASSWORD}\n")
    with proxy_before(etcd.port) as proxy:

        class UserHost(Chooser):
            def environment(self, **extra: str) -> dict[str, str]:
                user = {"ETCD_USERNAME": "calico", "ETCD_PASSWORD_FILE": str(password)}
                return super().environment(**{"ETCD_AUTHORITY": f"127.0.0.1:{proxy.port}", **user, **extra})

        def logins() -> int:
            return sum("authenticate" in path for path in proxy.asked)

        host = UserHost(etcd)
        host.ctl("profile", "add", "web")
        assert host.profiles() == ["web"] and logins() == 1
        assert token_file.stat().st_mode & 0o7777 == 0o600
        tokens = {token_file.read_text().split('"')[-2]}

        # another user of the host has a token of their own, if there is a place for it
        runtime = Path("/run/nobody")
        runtime.mkdir(mode=0o700)
        os.chown(runtime, 65534, 65534)
        for folder, count in ((runtime, 1), (Path("/run/none"), 2)):
            before = logins()
            env = {"ETCD_PASSWORD_FILE": "", "ETCD_PASSWORD": PASSWORD, "XDG_RUNTIME_DIR": str(folder)}
            for _ in range(2):
                host.ctl("pool", "show", env=env, command=[*AS_NOBODY, CALICOCTL])
            assert logins() - before == count
        (file,) = runtime.iterdir()
        assert (file.name, file.stat().st_mode & 0o7777, file.stat().st_uid) == (".etcd-token", 0o600, 65534)
        shutil.rmtree(runtime)

        # etcd forgets all tokens when it is restarted: nobody notices, neither commands nor an agent
        host.start_agent()
        host.add("a", A4)
        tokens.add(token_file.read_text().split('"')[-2])
        etcd.stop()
        etcd.start()
        etcd.await_ready()
        wait_for(lambda: logins() >= 2 and host.status()["etcd"]["watch"]["works"], "the agent")
        said = host.ctl("profile", "add", "db")
        assert said.err == "" and sorted(host.profiles()) == ["db", "web"]
        tokens.add(token_file.read_text().split('"')[-2])
        wait_for(lambda: all(host.status()["etcd"][what]["works"] for what in ("reads", "writes", "watch")), host.log())

        # what must be told to nobody
        environment = {"TMPDIR": str(tmp_path), "ETCD_PASSWORD_FILE": "", "ETCD_PASSWORD": PASSWORD}
        said = host.ctl("diags", f"--log-dir={LOG_DIR}", "--output=json", env=environment)
        with tarfile.open(json.loads(said.out)["file"]) as archive:
            texts = [archive.extractfile(member).read().decode() for member in archive]
        assert any("ETCD_USERNAME=calico\n" in text and "ETCD_PASSWORD is set\n" in text for text in texts)
        lines = [path.read_bytes().decode(errors="replace") for path in Path("/proc").glob("[0-9]*/cmdline")]
        texts += [*lines, host.log(), json.dumps(host.status()), host.ctl("checksystem", status=None).out]
        for env, says in (
            ({"ETCD_PASSWORD_FILE": "", "ETCD_PASSWORD": "swordfish"}, "does not let user 'calico' in"),
            ({"ETCD_PASSWORD_FILE": "", "ETCD_USERNAME": ""}, "asks for a user: set ETCD_USERNAME"),
        ):
            said = run(CALICOCTL, "profile", "show", "--debug", check=False, env=host.environment(**env))
            assert "Traceback" in said.err and says in said.err and said.status == 1
            texts.append(said.err)
        assert len(tokens) > 1
        for secret in (PASSWORD, "swordfish", *tokens):
            assert not [text for text in texts if secret in text], secret
        host.ctl("node", "remove", "--remove-endpoints")
        assert not token_file.exists() and not Path("/run/calico").exists()
