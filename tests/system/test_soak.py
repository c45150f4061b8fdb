"""Containers are started, stopped, killed, removed and created at random, while etcd, Docker and the agent fail, too.

They are connected in all ways: by commands, by labels, by a Docker network, and through CNI.

SOAK_SECONDS and SOAK_CONTAINERS say how long, and with how many; SOAK_SEED repeats a run's choices.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from tests.system.agent import ALLOW, AgentHost
from tests.system.conftest import HOME
from tests.system.support import (
    CALICOCTL,
    Etcd,
    Host,
    Result,
    calico_links,
    end_agents,
    end_process,
    import_busybox,
    run,
    start_docker,
    wait_for,
    without_what_packets_change,
)

SECONDS = float(os.environ.get("SOAK_SECONDS", "20"))
CONTAINERS = int(os.environ.get("SOAK_CONTAINERS", "6"))
SEED = int(os.environ.get("SOAK_SEED") or random.randrange(10**6))

PLAYERS = 3
"""How many threads let things happen to containers, each to its own."""

WITNESS = "witness"
"""A container that is made in the end, for the others to reach."""

SOCKET = f"unix://{HOME}/soak.sock"
DOCKER = ("docker", "--host", SOCKET)
NETWORK = "soak"
CNI_PLUGIN = (sys.executable, "-I", "-c", "from calicoctl.cli.command_client import cni; cni()")
CNI_NETWORK = json.dumps({"cniVersion": "1.0.0", "name": "pods", "type": "calico", "profile": "web"})

WAYS = ("command", "label", "network", "cni")
"""How containers are connected. A container's name begins with its way."""

RUN = {
    "command": ("--net=none",),
    "label": ("--net=none", "--label", "calico.ip=ipv4", "--label", "calico.profile=web"),
    "network": ("--net", NETWORK),
}
"""What `docker run` is told for each way of Docker's."""

ENGINE = {"stop": 2, "start": 4, "restart": 4, "kill": 2, "recreate": 3, "remove": 1}
ACTS = {
    "command": {**ENGINE, "disconnect": 1, "connect": 3, "ip add": 2, "ip remove": 1},
    "label": ENGINE,
    "network": {**ENGINE, "leave": 1, "join": 2},
    "cni": {"recreate": 3, "remove": 1},
}
"""What happens to containers of each way, and how often."""


def way_of(name: str) -> str:
    return next(way for way in WAYS if name.startswith(way))


class Soak:
    """A host with containers, and what happens to it."""

    def __init__(self, host: AgentHost, home: Path) -> None:
        self.host, self.home = host, home
        self.engine = start_docker(home, host=SOCKET)
        self.acts: dict[str, int] = {}
        self.pods: dict[str, str] = {}
        """Names of containers of CNI -> their ids, which are also the names of their namespaces."""

    def start_agent(self) -> None:
        self.host.start_agent("--libnetwork", DOCKER_HOST=SOCKET)

    @property
    def plugins(self) -> Path:
        """The file with the id of the process that serves Docker networks."""
        return Path(f"/run/calico/{self.host.name}/plugins.pid")

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
        way = way_of(name)
        if way == "cni":
            self.make_pod(name, chance)
            return
        policy = chance.choice(["no", "always"])
        self.docker("run", *RUN[way], f"--restart={policy}", "--stop-signal=KILL", "--name", name, "-tid", "busybox")
        if way == "command":
            self.connect(name, chance)

    def connect(self, name: str, chance: random.Random) -> None:
        self.calicoctl(chance, "container", "add", name, "ipv4")
        self.calicoctl(chance, "container", name, "profile", "set", "web")

    def calicoctl(self, chance: random.Random, *words: str) -> None:
        """Run a command, and now and then kill it on the way."""
        self.call(chance, (CALICOCTL, *words))

    def call(self, chance: random.Random, command: tuple[str, ...], text: str = "", **variables: str) -> bool:
        """Run a program with `text` as its input, and now and then kill it on the way. Return whether it succeeded."""
        process = subprocess.Popen(
            command,
            env=self.host.environment(DOCKER_HOST=SOCKET, **variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if chance.random() < 0.25:
            threading.Timer(chance.uniform(0.1, 0.6), process.kill).start()
        out, err = process.communicate(text, timeout=120)
        assert "Traceback" not in err, err
        assert "Internal error" not in out + err, out + err
        return process.returncode == 0

    def make_pod(self, name: str, chance: random.Random) -> None:
        """Make a namespace, and attach it as a runtime does, which undoes an attachment that has failed."""
        id = f"{name}-{chance.getrandbits(32):08x}"
        run("ip", "netns", "add", id)
        self.pods[name] = id
        if not self.cni(chance, "ADD", id):
            self.remove_pod(name, chance)

    def remove_pod(self, name: str, chance: random.Random) -> None:
        """Detach a container, perhaps not to the end, and remove its namespace."""
        id = self.pods.pop(name, None)
        if id is not None:
            if chance.random() < 0.8:
                self.cni(chance, "DEL", id)
            run("ip", "netns", "delete", id)

    def cni(self, chance: random.Random, command: str, id: str) -> bool:
        return self.call(
            chance,
            CNI_PLUGIN,
            CNI_NETWORK,
            CNI_COMMAND=command,
            CNI_CONTAINERID=id,
            CNI_NETNS=f"/var/run/netns/{id}",
            CNI_IFNAME="eth0",
            CNI_PATH="/opt/cni/bin",
        )

    def act(self, name: str, chance: random.Random) -> None:
        """Do something to a container."""
        acts = ACTS[way_of(name)]
        kind = chance.choices([*acts], [*acts.values()])[0]
        self.acts[kind] = self.acts.get(kind, 0) + 1
        if way_of(name) == "cni":
            self.remove_pod(name, chance)
            if kind == "recreate":
                self.make_pod(name, chance)
            time.sleep(chance.uniform(0, 1))
            return
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
            self.connect(name, chance)
        elif kind in ("leave", "join"):
            self.docker("network", "disconnect" if kind == "leave" else "connect", NETWORK, name)
        elif kind == "ip add":
            self.calicoctl(chance, "container", name, "ip", "add", chance.choice(["ipv4", "ipv6"]))
        else:
            self.calicoctl(chance, "container", name, "ip", "remove", f"192.168.0.{chance.randrange(1, 40)}")

    # what happens to the host

    def break_something(self, chance: random.Random) -> None:
        kind = chance.choice(["agent", "agent", "engine", "store", "plugins"])
        self.acts[kind] = self.acts.get(kind, 0) + 1
        if kind == "agent":
            self.host.kill_agent()
            self.start_agent()
        elif kind == "plugins":
            with suppress(OSError, ValueError):  # it is just being started
                os.kill(int(self.plugins.read_text()), signal.SIGKILL)
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
            mine = names[number::PLAYERS]
            for name in mine:
                self.make(name, chance)
            while time.monotonic() < until:
                self.act(chance.choice(mine), chance)

        chance = random.Random(SEED)
        with ThreadPoolExecutor(PLAYERS) as pool:
            players = [pool.submit(play, number) for number in range(PLAYERS)]
            while time.monotonic() < until:
                time.sleep(chance.uniform(1, 5))
                self.break_something(chance)
            for player in players:
                player.result()

    # what must be true in the end

    def containers(self) -> dict[str, bool]:
        """Return which workloads there may be in the store, by their ids, and whether they run.

        These are the containers of Docker, the endpoints that they have in its network, and those of CNI.
        """
        lines = run(*DOCKER, "ps", "-a", "--no-trunc", "--format", "{{.ID}} {{.State}}").out.splitlines()
        found = {line.split()[0]: line.split()[1] == "running" for line in lines}
        return {**found, **dict.fromkeys(self.joined(), True), **dict.fromkeys(self.pods.values(), True)}

    def joined(self) -> dict[str, str]:
        """Return the endpoints in Docker's network, each with its container's id."""
        (network,) = json.loads(run(*DOCKER, "network", "inspect", NETWORK).out)
        return {endpoint["EndpointID"]: id for id, endpoint in network["Containers"].items()}

    def connected_by_docker(self) -> set[str]:
        """Return the ids of the workloads that must be in the store, since Docker has said so."""
        labelled = run(*DOCKER, "ps", "-q", "--no-trunc", "--filter", "label=calico.ip").out.split()
        return {*labelled, *self.joined()}

    def what_is_wrong(self) -> str:
        """Return what is not as it must be, or an empty text."""
        host, containers = self.host, self.containers()
        records = {key.split("/")[7]: record for key, record in host.records().items()}
        if strange := set(records) - set(containers):
            return f"endpoints of containers that are no more: {strange}"
        if missing := self.connected_by_docker() - set(records):
            return f"containers without an endpoint: {missing}"
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
        rules = without_what_packets_change(run("nft", "--stateless", "list", "ruleset").out)
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
        kinds = re.compile(r"(docker|libnetwork|cni)\.[0-9a-z]")
        files = [file.name for file in Path(f"/run/calico/{host.name}").iterdir() if kinds.search(file.name)]
        if files:
            return f"locks of containers that nothing changes: {files}"
        return ""

    def inside(self, id: str, record: dict, *command: str) -> Result:
        """Run a command in the network namespace of a workload, whose id and record these are."""
        if id in self.pods.values():
            return run("ip", "netns", "exec", id, *command, check=False)
        return run(*DOCKER, "exec", record.get("docker_container") or id, *command, check=False)

    def unanswered(self) -> str:
        """Return which of the containers that run and are connected do not answer the others."""
        containers = self.containers()
        records = {key.split("/")[7]: record for key, record in self.host.records().items()}
        reachable = {
            id: record
            for id, record in records.items()
            if containers.get(id) and record["ipv4_nets"] and record["profile_ids"] == ["web"]
        }
        witness = run(*DOCKER, "inspect", "--format", "{{.Id}}", WITNESS).out.strip()
        ids = list(reachable)
        for number, id in enumerate(ids):
            for one, other in ((id, ids[number - 1]), (id, witness), (witness, id)):
                address = reachable[other]["ipv4_nets"][0].partition("/")[0]
                ping = self.inside(one, reachable[one], "ping", "-c", "1", "-W", "2", address)
                if ping.status != 0:
                    return f"{one} does not reach {other} at {address}: {ping}"
        return ""


def test_whatever_happens_containers_keep_their_network(bare_host: Host, own_etcd: Etcd, tmp_path: Path) -> None:
    print(f"SOAK_SEED={SEED}")
    host = AgentHost(own_etcd)
    home = HOME / "soak"
    soak = Soak(host, home)
    try:
        import_busybox(home / "busybox", SOCKET)
        soak.start_agent()
        host.ctl("config", "felix", "GraceTime", "5")
        host.profile("web", inbound=[ALLOW])
        drivers = ("--driver=calico", "--ipam-driver=calico-ipam", "--opt=calico.profile=web")
        run(*DOCKER, "network", "create", *drivers, NETWORK)
        # each thread has some of every way
        soak.run([f"{way}{number}" for number in range(-(-CONTAINERS // len(WAYS))) for way in WAYS][:CONTAINERS])
        print(soak.acts)
        try:
            wait_for(lambda: not soak.what_is_wrong(), "the end of all repairs", 120)
        except AssertionError:
            raise AssertionError(f"seed {SEED}: {soak.what_is_wrong()}\n{host.log()[-6000:]}") from None
        soak.make_witness()
        assert not soak.unanswered()
    finally:
        names = run(*DOCKER, "ps", "-aq", check=False).out.split()
        if names:
            run(*DOCKER, "rm", "-f", *names, check=False)
        run(*DOCKER, "network", "rm", NETWORK, check=False)
        for id in soak.pods.values():
            run("ip", "netns", "delete", id)
        end_agents()  # which would start the process for Docker networks again
        if soak.plugins.exists():
            end_process(soak.plugins)
        soak.engine.terminate()
        soak.engine.wait()
