"""Containers are started, stopped, killed, removed and created at random, while etcd, Docker and the agent fail, too.

SOAK_SECONDS and SOAK_CONTAINERS say how long, and with how many; SOAK_SEED repeats a run's choices.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.system.agent import ALLOW, AgentHost
from tests.system.conftest import HOME
from tests.system.support import CALICOCTL, Etcd, Host, calico_links, import_busybox, run, start_docker, wait_for

SECONDS = float(os.environ.get("SOAK_SECONDS", "20"))
CONTAINERS = int(os.environ.get("SOAK_CONTAINERS", "6"))
SEED = int(os.environ.get("SOAK_SEED") or random.randrange(10**6))

WITNESS = "witness"
"""A container that is made in the end, for the others to reach."""

SOCKET = f"unix://{HOME}/soak.sock"
DOCKER = ("docker", "--host", SOCKET)


class Soak:
    """A host with containers, and what happens to it."""

    def __init__(self, host: AgentHost, home: Path) -> None:
        self.host, self.home = host, home
        self.engine = start_docker(home, host=SOCKET)
        self.acts: dict[str, int] = {}

    # what happens to a container

    def docker(self, *words: str) -> None:
        run(*DOCKER, *words, check=False)

    def make_witness(self) -> None:
        docker = {"DOCKER_HOST": SOCKET}
        run(*DOCKER, "run", "--net=none", "--stop-signal=KILL", "--name", WITNESS, "-tid", "busybox")
        self.host.ctl("container", "add", WITNESS, "ipv4", env=docker)
        self.host.ctl("container", WITNESS, "profile", "set", "web", env=docker)
        self.host.sync()

    def make(self, name: str, chance: random.Random) -> None:
        policy = chance.choice(["no", "always"])
        self.docker("run", "--net=none", f"--restart={policy}", "--stop-signal=KILL", "--name", name, "-tid", "busybox")
        self.calicoctl(chance, "container", "add", name, "ipv4")
        self.calicoctl(chance, "container", name, "profile", "set", "web")

    def calicoctl(self, chance: random.Random, *words: str) -> None:
        """Run a command, and now and then kill it on the way."""
        process = subprocess.Popen(
            [CALICOCTL, *words],
            env=self.host.environment(DOCKER_HOST=SOCKET),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if chance.random() < 0.25:
            threading.Timer(chance.uniform(0.1, 0.6), process.kill).start()
        _, err = process.communicate(timeout=120)
        assert "Traceback" not in err, err
        assert "Internal error" not in err, err

    def act(self, name: str, chance: random.Random) -> None:
        """Do something to a container."""
        kind = chance.choices(
            ["stop", "start", "restart", "kill", "recreate", "remove", "disconnect", "connect", "ip add", "ip remove"],
            [2, 4, 4, 2, 3, 1, 1, 3, 2, 1],
        )[0]
        self.acts[kind] = self.acts.get(kind, 0) + 1
        if kind in ("stop", "restart"):
            self.docker(kind, "--time=0", name)
        elif kind in ("start", "kill"):
            self.docker(kind, name)
        elif kind == "recreate":
            self.docker("rm", "-f", name)
            self.make(name, chance)
        elif kind == "remove":
            self.docker("rm", "-f", name)
        elif kind == "disconnect":
            self.calicoctl(chance, "container", "remove", name)
        elif kind == "connect":
            self.calicoctl(chance, "container", "add", name, "ipv4")
            self.calicoctl(chance, "container", name, "profile", "set", "web")
        elif kind == "ip add":
            self.calicoctl(chance, "container", name, "ip", "add", chance.choice(["ipv4", "ipv6"]))
        else:
            self.calicoctl(chance, "container", name, "ip", "remove", f"192.168.0.{chance.randrange(1, 40)}")

    # what happens to the host

    def break_something(self, chance: random.Random) -> None:
        kind = chance.choice(["agent", "agent", "engine", "store"])
        self.acts[kind] = self.acts.get(kind, 0) + 1
        if kind == "agent":
            self.host.kill_agent()
            self.host.start_agent(DOCKER_HOST=SOCKET)
        elif kind == "engine":
            self.engine.send_signal(chance.choice([signal.SIGTERM, signal.SIGKILL]))
            self.engine.wait()
            self.engine = start_docker(self.home, host=SOCKET)
        else:
            self.host.etcd.stop(chance.choice([signal.SIGTERM, signal.SIGKILL]))
            time.sleep(chance.uniform(0, 2))
            self.host.etcd.start()
            self.host.etcd.await_ready()

    def run(self, names: list[str]) -> None:
        until = time.monotonic() + SECONDS

        def play(number: int) -> None:
            chance = random.Random(f"{SEED} {number}")
            mine = names[number::3]
            for name in mine:
                self.make(name, chance)
            while time.monotonic() < until:
                self.act(chance.choice(mine), chance)

        chance = random.Random(SEED)
        with ThreadPoolExecutor(3) as pool:
            players = [pool.submit(play, number) for number in range(3)]
            while time.monotonic() < until:
                time.sleep(chance.uniform(1, 5))
                self.break_something(chance)
            for player in players:
                player.result()

    # what must be true in the end

    def containers(self) -> dict[str, bool]:
        """Return which containers there are, and whether they run."""
        lines = run(*DOCKER, "ps", "-a", "--no-trunc", "--format", "{{.ID}} {{.State}}").out.splitlines()
        return {line.split()[0]: line.split()[1] == "running" for line in lines}

    def what_is_wrong(self) -> str:
        """Return what is not as it must be, or an empty text."""
        host, containers = self.host, self.containers()
        records = {key.split("/")[7]: record for key, record in host.records().items()}
        if strange := set(records) - set(containers):
            return f"endpoints of containers that are no more: {strange}"
        active = {id: record for id, record in records.items() if containers[id]}
        if any(record["state"] != ("active" if id in active else "inactive") for id, record in records.items()):
            return f"states: {records} {containers}"
        check = host.ctl("ipam", "check", status=None)
        if check.status != 0:
            return f"ipam check: {check}"
        addresses = {
            net.partition("/")[0] for record in records.values() for net in record["ipv4_nets"] + record["ipv6_nets"]
        }
        if addresses != set(host.allocations()):
            return f"addresses: {addresses} {set(host.allocations())}"
        if calico_links() != {record["name"] for record in active.values()}:
            return f"interfaces: {calico_links()} {active}"
        routed = {net.partition("/")[0] for r in active.values() for net in r["ipv4_nets"] + r["ipv6_nets"]}
        text = run("sh", "-c", "ip route show proto 80; ip -6 route show proto 80").out
        if {line.split()[0] for line in text.splitlines()} != routed:
            return f"routes: {text} {routed}"
        rules = run("nft", "list", "ruleset").out
        names = set(re.findall(r"cali[0-9a-f]{11}", rules))
        if names != {record["name"] for record in active.values()}:
            return f"interfaces in tables: {names} {active}"
        listed = set(re.findall(r"192\.168\.[0-9]+\.[0-9]+(?![0-9./])|fd80:[0-9a-f:]+(?![0-9a-f:/])", rules))
        if not listed <= addresses:  # those of stopped containers are in there, too: nobody else may send from them
            return f"addresses in tables: {listed - addresses}"
        statuses = host.etcd.tree(f"/calico/felix/v1/host/{host.name}/workload")
        ups = {key.split("/")[8] for key, value in statuses.items() if json.loads(value)["status"] == "up"}
        if {key.split("/")[8] for key in statuses} != set(records) or ups != set(active):
            return f"statuses: {statuses} {active}"
        files = [file.name for file in Path(f"/run/calico/{host.name}").glob("*docker.*")]
        if files:
            return f"locks of containers that nothing changes: {files}"
        return ""

    def unanswered(self) -> str:
        """Return which of the containers that run and are connected do not answer the others."""
        containers = self.containers()
        reachable = {
            key.split("/")[7]: record["ipv4_nets"][0].partition("/")[0]
            for key, record in self.host.records().items()
            if containers.get(key.split("/")[7]) and record["ipv4_nets"] and record["profile_ids"] == ["web"]
        }
        witness = run(*DOCKER, "inspect", "--format", "{{.Id}}", WITNESS).out.strip()
        ids = list(reachable)
        for number, id in enumerate(ids):
            for one, other in ((id, ids[number - 1]), (id, witness), (witness, id)):
                ping = run(*DOCKER, "exec", one, "ping", "-c", "1", "-W", "2", reachable[other], check=False)
                if ping.status != 0:
                    return f"{one} does not reach {other} at {reachable[other]}: {ping}"
        return ""


def test_whatever_happens_containers_keep_their_network(bare_host: Host, own_etcd: Etcd, tmp_path: Path) -> None:
    print(f"SOAK_SEED={SEED}")
    host = AgentHost(own_etcd)
    home = HOME / "soak"
    soak = Soak(host, home)
    try:
        import_busybox(home / "busybox", SOCKET)
        host.start_agent(DOCKER_HOST=SOCKET)
        host.ctl("config", "felix", "GraceTime", "5")
        host.profile("web", inbound=[ALLOW])
        soak.run([f"c{number}" for number in range(CONTAINERS)])
        print(soak.acts)
        try:
            wait_for(lambda: not soak.what_is_wrong(), "the end of all repairs", 90)
        except AssertionError:
            raise AssertionError(f"seed {SEED}: {soak.what_is_wrong()}\n{host.log()[-6000:]}") from None
        soak.make_witness()
        assert not soak.unanswered()
    finally:
        names = run(*DOCKER, "ps", "-aq", check=False).out.split()
        if names:
            run(*DOCKER, "rm", "-f", *names, check=False)
        soak.engine.terminate()
        soak.engine.wait()
