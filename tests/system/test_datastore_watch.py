"""The agent's watch of a store that is unreachable, compacted, restored from a backup, or answers nonsense."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.system.agent import ALLOW, B4, C4, AgentHost, holds, kernel
from tests.system.proxy import Answer, Proxy, proxy_before
from tests.system.support import Etcd, Host, run, tables, wait_for
from tests.system.traffic import PATIENT, ping


def test_etcd_away_and_back(own_etcd: Etcd) -> None:
    host = AgentHost(own_etcd)
    host.start_agent()
    host.add_pair()
    host.sync()
    own_etcd.stop()
    away = wait_for(lambda: not host.status()["etcd"]["reachable"] and host.status(), "the agent to notice")
    assert "cannot be reached" in away["etcd"]["error"]
    assert "etcd cannot be reached" in away["last_error"]["error"]
    wait_for(lambda: host.status()["etcd"]["writes"]["error"], "the agent to notice that it cannot write", 15)
    shown = host.ctl("status", status=1)
    assert shown.out.count(" fails since ") == 3 and "etcd cannot be read, written or followed since" in shown.out
    assert shown.err == "This host has problems: its agent cannot fully use etcd.\n"
    assert ping("a", B4, patience=PATIENT)
    # what it knows, it goes on to keep
    run("ip", "route", "delete", f"{B4}/32")
    wait_for(lambda: ping("a", B4), "the route")
    own_etcd.start()
    own_etcd.await_ready()
    host.profile("web", inbound=[])
    wait_for(lambda: not ping("a", B4), "the change")
    wait_for(lambda: host.status()["etcd"]["reachable"], "the agent to say so")
    wait_for(lambda: own_etcd.get("/calico/felix/v1/host/host1/status"), "the heartbeat")


def test_an_etcd_that_hangs_keeps_no_agent_from_ending(own_etcd: Etcd) -> None:
    host = AgentHost(own_etcd)
    host.start_agent()
    pid = host.pid
    own_etcd.process.send_signal(signal.SIGSTOP)
    assert f"(process {pid}) has ended" in host.ctl("node", "stop", "--force").out
    assert not host.agent_runs(pid)


@pytest.mark.api("etcdv3")
def test_changes_that_were_compacted(own_etcd: Etcd) -> None:
    """An agent whose watch ended meanwhile reads all anew."""
    host = AgentHost(own_etcd)
    host.start_agent()
    host.add_pair()
    host.sync()
    assert ping("a", B4, patience=PATIENT)
    os.kill(host.pid, signal.SIGSTOP)
    try:
        own_etcd.stop()
        own_etcd.start()
        own_etcd.await_ready()
        host.profile("web", inbound=[])
        own_etcd.put("/elsewhere", "1")
        own_etcd.v3("kv/compaction", {"revision": own_etcd.revision("/elsewhere")})
    finally:
        os.kill(host.pid, signal.SIGCONT)
    wait_for(lambda: not ping("a", B4), host.log())
    assert host.status()["resyncs"] > 0
    host.profile("web", inbound=[ALLOW])
    wait_for(lambda: ping("a", B4), host.log())


@pytest.mark.api("etcdv2")
def test_changes_that_etcd_no_longer_has(pair: AgentHost) -> None:
    """etcd's v2 API remembers 1,000 events: an agent that was held up for longer reads all anew."""
    pair.add("c", C4)
    pair.profile("c", inbound=[ALLOW])
    os.kill(pair.pid, signal.SIGSTOP)
    try:
        pair.profile("web", inbound=[])
        for number in range(1100):
            pair.etcd.put(f"/calico/v1/policy/profile/p{number % 50}/tags", [str(number)])
        pair.set_profiles("c", "c")
    finally:
        os.kill(pair.pid, signal.SIGCONT)
    wait_for(lambda: pair.status()["resyncs"] > 0, "reading anew")
    pair.sync()
    assert not ping("a", B4)
    assert ping("a", C4, patience=PATIENT)
    pair.kill_agent()
    for number in range(1100):
        pair.etcd.put(f"/calico/v1/policy/profile/p{number % 50}/tags", [str(number)])
    pair.profile("web", inbound=[ALLOW])
    pair.start_agent()
    assert ping("a", B4, patience=PATIENT)


def test_a_store_that_is_not_ready(bare_host: Host) -> None:
    host = AgentHost(bare_host.etcd)
    host.register("192.0.2.2")
    host.add_pair()
    host.etcd.put("/calico/v1/Ready", "false")

    def made() -> dict[str, str]:
        # the kernel's own routes come when it has checked an interface's address
        return {**kernel(), "routes": run("sh", "-c", "ip route show proto 80; ip -6 route show proto 80").out}

    before = made()
    agent = subprocess.Popen(
        [sys.executable, "-m", "calicoctl.felix", '{"log_dir": null}'], env=host.environment(), stderr=subprocess.PIPE
    )
    try:
        waiting = wait_for(lambda: "Ready" in str(host.status().get("waiting_for")) and host.status(), "the agent")
        assert not waiting["first_update"]
        assert holds(lambda: made() == before, 1)
        assert "initial sync pending" in host.ctl("status").out
        host.etcd.put("/calico/v1/Ready", "true")
        wait_for(lambda: ping("a", B4), "the network")
        # a store that is emptied takes nothing down
        host.etcd.delete("/calico")
        wait_for(lambda: host.status()["waiting_for"], "the agent to notice")
        assert ping("a", B4, patience=PATIENT)
        # nor does it open anything when the tables go meanwhile

        def listed() -> list[str]:
            """Return the tables, without the rules for established connections, which are verified again later."""
            lines = (line for line in tables() if '"table": "calico"' in line)
            return [line for line in lines if "established" not in line and "related" not in line]

        before = listed()
        run("nft", "flush", "ruleset")
        wait_for(lambda: listed() == before, "the tables, made anew")
        assert ping("a", B4, patience=PATIENT)
    finally:
        agent.terminate()
        agent.communicate()


def test_a_store_restored_from_a_backup(own_etcd: Etcd) -> None:
    """A store restored from a copy counts anew from a lower index: what the agent had seen since is no more."""
    host = AgentHost(own_etcd)
    host.start_agent()
    host.add_pair()
    host.sync()
    data = own_etcd.directory / "data"
    own_etcd.stop()
    shutil.copytree(data, f"{data}.copy")
    own_etcd.start()
    own_etcd.await_ready()
    for _ in range(20):
        host.set_profiles("b")
    wait_for(lambda: not ping("a", B4), "the change")
    own_etcd.stop()
    shutil.rmtree(data)
    shutil.copytree(f"{data}.copy", data)
    own_etcd.start()
    own_etcd.await_ready()
    wait_for(lambda: ping("a", B4), "what the copy says")
    host.set_profiles("b")
    wait_for(lambda: not ping("a", B4), "a change after it")


@pytest.mark.parametrize("how", ["away for long", "back at once"])
def test_another_store_that_has_counted_past_the_old_one(own_etcd: Etcd, how: str) -> None:
    """Its index alone does not tell that it is another."""
    host = AgentHost(own_etcd)
    host.start_agent()
    host.add_pair()
    host.sync()
    wanted = own_etcd.tree("/calico/v1") | own_etcd.tree("/calico/bgp")
    rules = "/calico/v1/policy/profile/web/rules"
    assert ping("a", B4, patience=PATIENT)
    if how == "back at once":
        os.kill(host.pid, signal.SIGSTOP)  # so that it does not see the store away
    own_etcd.stop()
    shutil.rmtree(own_etcd.directory / "data")
    if how == "away for long":
        wait_for(lambda: not host.status()["etcd"]["reachable"], "the agent to notice")
        os.kill(host.pid, signal.SIGSTOP)
    own_etcd.start()
    own_etcd.await_ready()
    for key, value in {**wanted, rules: json.dumps({**json.loads(wanted[rules]), "inbound_rules": []})}.items():
        own_etcd.put(key, value)
    for number in range(300):
        own_etcd.put("/calico/v1/other", str(number))
    os.kill(host.pid, signal.SIGCONT)
    wait_for(lambda: not ping("a", B4), host.log())
    wait_for(lambda: host.status()["etcd"]["reachable"], host.log())


@pytest.mark.api("etcdv2")
def test_a_directory_with_a_time_to_live(pair: AgentHost) -> None:
    """A new time to live changes nothing of what is in a directory; its end removes it."""
    key = pair.key("b")
    directory = key.rpartition("/endpoint/")[0]
    record = pair.etcd.get(key)

    def made_anew(seconds: int) -> None:
        pair.etcd.delete(directory)
        pair.etcd._request("PUT", directory, dir="true", ttl=str(seconds))
        pair.etcd.put(key, record)

    made_anew(1000)
    try:
        pair.etcd._request("PUT", directory, dir="true", prevExist="true", ttl="500")
    except urllib.error.HTTPError as error:  # etcd 3.5.16 can only make directories with a time to live
        assert "Not a file" in error.read().decode()
    pair.sync()
    assert ping("a", B4, patience=PATIENT)
    made_anew(4)
    wait_for(lambda: not pair.etcd.tree(directory), "its end")
    pair.sync()
    assert not ping("a", B4)
    assert B4 not in run("ip", "route", "show", "proto", "80").out


@pytest.mark.parametrize("order", ["new first", "old first"])
def test_a_record_that_moves_to_another_id(pair: AgentHost, order: str) -> None:
    """The interface of a running container goes over to another endpoint."""
    old = pair.key("b")
    new = old.rpartition("/")[0] + "/00000000000000000000000000000001"
    record = pair.etcd.get(old)
    if order == "new first":
        pair.etcd.put(new, record)
        pair.sync()
        assert pair.endpoint_status(new)["status"] == "error"
        pair.etcd.delete(old)
    else:
        pair.etcd.delete(old)
        pair.etcd.put(new, record)
    pair.sync()
    assert pair.endpoint_status(new)["status"] == "up" and pair.endpoint_status(old) is None
    assert ping("a", B4, patience=PATIENT)


@contextmanager
def behind_proxy(etcd: Etcd) -> Iterator[tuple[AgentHost, Proxy]]:
    """A host whose agent alone talks to etcd through a proxy, with two namespaces that may talk to each other."""
    host = AgentHost(etcd)
    with proxy_before(etcd.port) as proxy:
        host.start_agent(ETCD_AUTHORITY=f"127.0.0.1:{proxy.port}")
        host.add_pair()
        host.sync()
        yield host, proxy


@pytest.mark.api("etcdv2")
def test_an_answer_that_gets_stuck_loses_no_change(bare_host: Host) -> None:
    """The headers of a watch's answer come, and tell of a change that does not come: it is asked for again."""
    with behind_proxy(bare_host.etcd) as (host, proxy):
        proxy.hold.set()
        wait_for(proxy.held.is_set, "the next watch")
        host.set_profiles("b")
        proxy.passed.set()
        wait_for(lambda: not ping("a", B4), "the change", 40)
        assert not proxy.mended.is_set() and host.status()["resyncs"] == 0


def event(**node: object) -> str:
    return json.dumps({"action": "set", "node": node})


NONSENSE = {
    "no JSON": Answer(200, "garbage"),
    "nothing": Answer(200, ""),
    "a list": Answer(200, "[]"),
    "not permitted": Answer(401, "x"),
    "a web page": Answer(500, "<html>"),
}
OF_ITS_API = {
    "etcdv2": {
        "an index that is none": Answer(200, "{}", index="abc"),
        "no index": Answer(
            200, event(key="/calico/v1/Ready", value="true", modifiedIndex=5001, createdIndex=1), index=None
        ),
        "a value that is no text": Answer(
            200, event(key="/calico/v1/host/host1/workload/o/w/endpoint/e", value=5, modifiedIndex=5001, createdIndex=1)
        ),
        "a directory of numbers": Answer(
            200,
            event(
                key="/calico/v1",
                dir=True,
                modifiedIndex=1,
                createdIndex=1,
                nodes=[{"key": "/calico/v1/Ready", "value": 7, "modifiedIndex": 1, "createdIndex": 1}],
            ),
        ),
        "no directory, and no index": Answer(404, '{"errorCode": 100, "message": "Key not found", "cause": "/"}', None),
        "a history that is always gone": Answer(
            400, '{"errorCode": 401, "message": "cleared", "cause": "x", "index": 5}'
        ),
    },
    "etcdv3": {
        "a key that is none": Answer(200, '{"header": {"revision": "5"}, "kvs": [{"key": 5}], "count": "1"}'),
        "a history that is always gone": Answer(200, '{"result": {"canceled": true, "compact_revision": "9"}}\n'),
    },
}


def test_senseless_answers_are_no_fatal_errors(bare_host: Host) -> None:
    with behind_proxy(bare_host.etcd) as (host, proxy):
        pid = host.pid
        for what, answer in {**NONSENSE, **OF_ITS_API[host.etcd.api]}.items():
            proxy.instead, proxy.answered = answer, 0
            host.etcd.put("/calico/v1/wake", what)
            wait_for(lambda: proxy.answered > 2, f"questions, answered with {what}")
            assert ping("a", B4, patience=PATIENT) and host.agent_runs(pid), f"{what}\n{host.log()}"
            proxy.instead = None
            host.set_profiles("b")
            wait_for(lambda: not ping("a", B4), f"the change after {what}\n{host.log()}")
            host.set_profiles("b", "web")
            wait_for(lambda: ping("a", B4), "the change back")
        assert host.pid == pid and "Traceback" not in host.log()
