"""Docker networks with Calico's drivers: `docker network create --driver calico --ipam-driver calico-ipam`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from calicoctl.plugins import stores
from tests.system.agent import ALLOW, LOG_DIR, AgentHost, holds
from tests.system.support import (
    CALICOCTL,
    HOST_IP,
    HOST_IP6,
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
)

CREATE = ("docker", "network", "create", "--driver", "calico", "--ipam-driver", "calico-ipam")
FOLDER = Path("/run/calico-tests/networks")
SOCKET = f"unix://{FOLDER}/docker.sock"
PLUGINS = Path("/run/docker/plugins")
OLD = "5f" * 32


def create(name: str, *options: str, status: int = 0) -> Result:
    done = run(*CREATE, *options, name, check=False)
    assert done.status == status, done
    return done


def start(name: str, network: str, *options: str, status: int = 0, words: tuple[str, ...] = ()) -> Result:
    command = ("docker", "run", "--stop-signal=KILL", "--net", network, "--name", name, *options, "-tid", "busybox")
    done = run(*command, *words, check=False)
    assert (done.status == 0) == (status == 0), done
    return done


def inspected(name: str) -> dict:
    return json.loads(run("docker", "inspect", name).out)[0]


def address(name: str, network: str = "net1", version: int = 4) -> str:
    found = inspected(name)["NetworkSettings"]["Networks"][network]
    return found["IPAddress" if version == 4 else "GlobalIPv6Address"]


def endpoint(name: str, network: str = "net1") -> str:
    return inspected(name)["NetworkSettings"]["Networks"][network]["EndpointID"]


def record(host: Host, name: str, network: str = "net1") -> dict:
    id = endpoint(name, network)
    return json.loads(host.etcd.get(f"/calico/v1/host/{host.name}/workload/libnetwork/{id}/endpoint/{id}"))


def reaches(name: str, target: str) -> bool:
    return run("docker", "exec", name, "ping", "-c", "1", "-W", "1", target, check=False).status == 0


def plugin_log() -> str:
    return (LOG_DIR / "plugins.log").read_text()


def plugin_pid(host: Host) -> int:
    return int(Path(f"/run/calico/{host.name}/plugins.pid").read_text())


def await_reach(name: str, target: str) -> None:
    wait_for(lambda: reaches(name, target), f"an answer from {target}\n{plugin_log()}", 15)


def files(host: Host) -> list[Path]:
    """Return the files of this host's networks."""
    return list(Path(f"/var/lib/calico/{host.name}").glob("networks/*"))


def endpoints(host: Host) -> dict[str, dict]:
    """Return the records of Docker networks' endpoints, by endpoint id."""
    return {key.rpartition("/")[2]: value for key, value in host.records().items() if "/libnetwork/" in key}


def is_clean(host: Host) -> bool:
    return host.records() == {} and host.allocations() == {} and host.handles() == {} and not calico_links()


def await_clean(host: Host, seconds: float = 10) -> None:
    def state() -> str:
        return f"{endpoints(host)} {host.allocations()} {host.handles()} {calico_links()}\n{plugin_log()}"

    try:
        wait_for(lambda: is_clean(host), "nothing left", seconds)
    except AssertionError:
        raise AssertionError(state()) from None


def remove(*names: str) -> None:
    run("docker", "rm", "-f", *names)


def restart(name: str) -> None:
    run("docker", "restart", "--time=0", name)


def refused(text: str, done: Result) -> None:
    assert done.status != 0 and text in done.err, done


@contextlib.contextmanager
def serving(bare_host: Host, *options: str, **env: str) -> Iterator[AgentHost]:
    """Start an agent with the process for Docker networks; remove everything at the end."""
    host = AgentHost(bare_host.etcd)
    host.start_agent("--libnetwork", *options, **env)
    try:
        yield host
    finally:
        run("sh", "-c", "docker ps -aq | xargs -r docker rm -f", check=False)
        run("sh", "-c", "docker network ls -q --filter driver=calico | xargs -r docker network rm", check=False)
        end_agents()  # which would start it again
        for file in Path("/run/calico").glob("*/plugins.pid"):
            end_process(file)
        shutil.rmtree(f"/var/lib/calico/{host.name}/networks", ignore_errors=True)


@pytest.fixture
def served(bare_host: Host, engine: None) -> Iterator[AgentHost]:
    """A host with an agent, the session's engine, and the process for Docker networks."""
    with serving(bare_host) as host:
        yield host


class Engine:
    """An engine that a test may kill and start again."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.process: subprocess.Popen | None = None

    def start(self) -> float:
        """Start the engine, and wait until it answers. Return how many seconds that took."""
        began = time.monotonic()
        self.process = start_docker(self._directory, host=SOCKET)
        return time.monotonic() - began

    def end(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait()


@pytest.fixture
def own_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine of the test's own, at SOCKET, with the image busybox."""
    monkeypatch.setenv("DOCKER_HOST", SOCKET)
    engine = Engine(FOLDER / "engine")
    engine.start()
    import_busybox(tmp_path / "busybox", SOCKET)
    yield engine
    with contextlib.suppress(ProcessLookupError):
        engine.end(signal.SIGTERM)
    for pid in run("pgrep", "-f", f"{FOLDER}/engine", check=False).out.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    run("sh", "-c", f"grep -o '{FOLDER}[^ ]*' /proc/self/mounts | sort -r | xargs -r umount -l", check=False)
    shutil.rmtree(FOLDER, ignore_errors=True)


def test_containers_in_a_network(served: AgentHost) -> None:
    host = served
    create("net1")
    wait_for(lambda: host.etcd.get("/calico/v1/policy/profile/net1/tags") == '["net1"]', "the profile")
    start("web", "net1")
    start("db", "net1")
    start("app", "net1")
    found = record(host, "web")
    assert found["ipv4_nets"] == [f"{address('web')}/32"] and found["profile_ids"] == ["net1"]
    assert found["ipv6_nets"] == [] and found["docker_network"]["name"] == "net1"
    wait_for(lambda: record(host, "web").get("workload_name") == "web", "the container's name")
    assert record(host, "web")["docker_container"] == inspected("web")["Id"]
    for one, other in (("web", "db"), ("db", "app"), ("app", "web")):
        await_reach(one, address(other))
        assert reaches(one, other), "Docker's DNS knows the names of the network"
    host.check_consistent()
    assert "libnetwork" in host.ctl("endpoint", "show", "--detailed").out
    # stopped in each way, and started again with a new endpoint
    for words in (("stop", "--time=0"), ("kill",)):
        before = endpoint("web")
        run("docker", *words, "web")
        wait_for(lambda: len(endpoints(host)) == 2, "the end of web's endpoint")
        host.check_consistent()
        run("docker", "start", "web")
        assert endpoint("web") != before
        await_reach("db", "web")
    restart("web")
    await_reach("db", "web")
    host.check_consistent()
    refused("has active endpoints", run("docker", "network", "rm", "net1", check=False))
    remove("web", "db", "app")
    await_clean(host)
    assert len(files(host)) == 1
    run("docker", "network", "rm", "net1")
    assert files(host) == [] and host.etcd.get("/calico/v1/policy/profile/net1/tags") is not None
    assert "agree" in host.ctl("ipam", "check").out


def test_addresses_of_both_versions(served: AgentHost) -> None:
    host = served
    create("net1", "--ipv6", "--subnet=192.168.7.0/24", "--subnet=fd80:24e2:f998:72d6::/64")
    given, given6 = "192.168.7.9", "fd80:24e2:f998:72d6::99"
    start("web", "net1", "--ip", given, "--ip6", given6)
    start("db", "net1")
    assert record(host, "web")["ipv6_nets"] == [f"{given6}/128"] and address("db").startswith("192.168.7.")
    for target in (given, given6):
        await_reach("db", target)
    for target in (address("db"), address("db", version=6)):
        await_reach("web", target)
    restart("web")
    assert (address("web"), address("web", version=6)) == (given, given6)
    await_reach("db", given6)
    host.check_consistent()
    wait_for(lambda: record(host, "web").get("workload_name"), "the container's name")
    taken = start("app", "net1", "--ip", given, status=1)
    refused(f"IP {given} is already assigned (web on host {host.name}). Give it another, or omit --ip for any.", taken)
    remove("app")
    host.check_consistent()
    remove("web")
    start("app", "net1", "--ip", given)  # it is free at once
    await_reach("db", given)
    # of a part of the subnet, whatever else the pool has
    create("net2", "--subnet=192.168.0.0/16", "--ip-range=192.168.9.0/26")
    start("web", "net2")
    assert address("web", "net2").startswith("192.168.9.")
    remove("web", "db", "app")
    await_clean(host)


def test_what_is_refused_is_told_by_docker(served: AgentHost) -> None:
    host = served
    create("net1", "--subnet=192.168.0.0/16")
    create("net2")
    driver_alone = run("docker", "network", "create", "--driver", "calico", "other", check=False)
    refused("create it with --ipam-driver=calico-ipam, too", driver_alone)
    refused("10.1.0.0/16 is neither a pool nor a part of one", create("other", "--subnet=10.1.0.0/16", status=1))
    refused("omit --gateway", create("other", "--subnet=192.168.0.0/16", "--gateway=192.168.0.1", status=1))
    refused("--aux-address", create("other", "--subnet=192.168.0.0/16", "--aux-address=x=192.168.0.9", status=1))
    refused("there is no option calico.x", create("other", "-o", "calico.x=1", status=1))
    refused("is not a valid profile name", create("other", "-o", "calico.profile=a/b", status=1))
    for option in ("--publish=80:80", "--publish-all"):
        done = start("web", "net1", option, "--expose=80", status=1)
        refused("-p and -P have no effect in a Calico network", done)
        remove("web")
    create("nowhere", "-o", "calico.profile=nowhere")
    refused("Profile nowhere does not exist", start("web", "nowhere", status=1))
    remove("web")
    create("n" * 40)  # which is too long for a profile
    refused("-o calico.profile=NAME", start("web", "n" * 40, status=1))
    remove("web")
    await_clean(host)

    # a second one
    start("web", "net1")
    refused("can have no second interface of Calico's", run("docker", "network", "connect", "net2", "web", check=False))
    assert len(endpoints(host)) == 1 and len(calico_links()) == 1
    run("docker", "stop", "--time=0", "web")
    run("docker", "network", "disconnect", "net2", "web", check=False)  # Docker 28 has undone that by itself
    run("docker", "start", "web")
    remove("web")
    run("docker", "create", "--net=net1", "--name=web", "-ti", "busybox")
    run("docker", "network", "connect", "net2", "web")
    refused("can have no second interface of Calico's", run("docker", "start", "web", check=False))
    remove("web")
    run("docker", "run", "--net=none", "--name=web", "-tid", "busybox")
    host.ctl("container", "add", "web", "192.168.0.77")
    run("docker", "network", "disconnect", "none", "web")
    refused("can have no second interface of Calico's", run("docker", "network", "connect", "net1", "web", check=False))
    remove("web")
    await_clean(host, 20)
    assert "agree" in host.ctl("ipam", "check").out


def test_ipv6_needs_a_host_with_ipv6(bare_host: Host, engine: None) -> None:
    host = AgentHost(bare_host.etcd)
    host.ctl("node", f"--ip={HOST_IP}", f"--log-dir={LOG_DIR}", "--libnetwork")
    refused("This node is not configured for IPv6", create("net1", "--ipv6", status=1))
    assert files(host) == []
    host.ctl("node", "stop")
    assert not (PLUGINS / "calico.sock").exists()


def test_connected_and_disconnected_while_it_runs(served: AgentHost) -> None:
    host = served
    create("net1")
    run("docker", "network", "create", "--driver=bridge", "--subnet=172.30.0.0/24", "bridge1")
    try:
        start("db", "net1")
        # through the bridge goes the default route, and to the pools a route of ours
        start("web", "bridge1")
        run("docker", "network", "connect", "net1", "web")
        await_reach("web", address("db"))
        await_reach("db", address("web"))
        assert reaches("web", "172.30.0.1")
        host.check_consistent()
        run("docker", "network", "disconnect", "net1", "web")
        wait_for(lambda: len(endpoints(host)) == 1, "the end of web's endpoint")
        assert not reaches("web", address("db")) and reaches("web", "172.30.0.1")
        run("docker", "network", "connect", "net1", "web")
        restart("web")
        await_reach("web", address("db"))
        assert reaches("web", "172.30.0.1")
        remove("web", "db")
        await_clean(host)
    finally:
        run("docker", "rm", "-f", "web", "db", check=False)
        run("docker", "network", "rm", "bridge1")


def test_an_internal_network_reaches_workloads_alone(served: AgentHost) -> None:
    host = served
    create("net1", "--internal")
    start("web", "net1")
    start("db", "net1")
    await_reach("web", address("db"))
    table = run("docker", "exec", "web", "ip", "route").out
    assert "default" not in table and f"192.168.0.0/16 via {HOST_IP}" in table
    remove("web", "db")
    await_clean(host)


def test_policy_is_that_of_the_networks_profile(served: AgentHost) -> None:
    host = served
    host.profile("closed")
    host.profile("open", inbound=[ALLOW])
    create("net1")
    create("net2")
    create("net3", "-o", "calico.profile=closed,open")
    start("web", "net1")
    start("db", "net2")
    start("app", "net3")
    start("late", "net1")
    assert record(host, "app", "net3")["profile_ids"] == ["closed", "open"]
    await_reach("late", address("web"))
    await_reach("web", address("app", "net3"))
    assert not reaches("db", address("web")), "another network's tag"
    host.ctl("profile", "net1", "rule", "add", "inbound", "allow", "from", "tag", "net2")
    await_reach("db", address("web"))
    # an endpoint's own option
    remove("late")
    run("docker", "network", "disconnect", "net2", "db")
    run("docker", "network", "connect", "--driver-opt", "calico.profile=closed", "net1", "db")
    assert record(host, "db")["profile_ids"] == ["closed"]
    await_reach("db", address("app", "net3"))
    assert not reaches("db", address("web"))
    # the profile of the name is made once: what the user has changed, or removed, stays
    remove("web", "db", "app")
    host.ctl("profile", "remove", "net1", "--no-check")
    start("web", "net1")
    assert host.etcd.get("/calico/v1/policy/profile/net1/tags") is None
    remove("web")
    await_clean(host)


def test_containers_start_and_stop_while_no_agent_runs(served: AgentHost) -> None:
    host = served
    create("net1")
    start("web", "net1")
    start("db", "net1")
    await_reach("web", "db")
    host.kill_agent()
    restart("web")
    remove("db")
    start("app", "net1")
    assert len(endpoints(host)) == 2 and len(calico_links()) == 2
    assert not reaches("app", address("web")), "nothing passes before the agent enforces policy"
    host.start_agent("--libnetwork")
    await_reach("app", "web")
    host.check_consistent()
    remove("web", "app")
    await_clean(host)


def test_nothing_is_left_after_kills(bare_host: Host, own_engine: Engine) -> None:
    with serving(bare_host, DOCKER_HOST=SOCKET) as host:
        create("net1")
        start("web", "net1")
        start("db", "net1", "--restart=always")
        await_reach("web", "db")

        # this process: the agent starts it again
        before = plugin_pid(host)
        os.kill(before, signal.SIGKILL)
        wait_for(lambda: plugin_pid(host) != before and "serving" in plugin_log(), "a new process")
        wait_for(lambda: start_succeeds("app"), "a container", 30)
        await_reach("app", "db")
        host.check_consistent()

        # the engine: it releases the addresses when it starts, and starts what is to be restarted
        own_engine.end(signal.SIGKILL)
        own_engine.start()
        wait_for(lambda: inspected("db")["State"]["Running"] and address("db"), "db's restart")
        wait_for(lambda: set(endpoints(host)) == {endpoint("db")}, "the records of the others to go", 40)
        host.check_consistent()
        run("docker", "start", "web")
        await_reach("web", "db")

        # all of it at once, while a container is being started
        late = subprocess.Popen(["docker", "run", "--rm", "--net=net1", "-d", "busybox", "sleep", "60"])
        host.kill_agent()
        os.kill(plugin_pid(host), signal.SIGKILL)
        own_engine.end(signal.SIGKILL)
        late.wait()
        host.start_agent("--libnetwork", DOCKER_HOST=SOCKET)
        own_engine.start()
        remove(*run("docker", "ps", "-aq").out.split())
        await_clean(host, 120)
        assert "agree" in host.ctl("ipam", "check").out


def start_succeeds(name: str) -> bool:
    run("docker", "rm", "-f", name, check=False)
    return run("docker", "run", "--net=net1", "--name", name, "-tid", "busybox", check=False).status == 0


def test_the_engine_starts_without_etcd(bare_host: Host, own_etcd: Etcd, own_engine: Engine) -> None:
    bare_host.etcd = own_etcd
    with serving(bare_host, DOCKER_HOST=SOCKET) as host:
        create("net1")
        start("web", "net1")
        start("db", "net1")
        own_engine.end(signal.SIGTERM)
        plain = own_engine.start()
        run("docker", "start", "web", "db")
        own_engine.end(signal.SIGKILL)
        # it hangs, which is worse than that it does not run
        assert own_etcd.process is not None
        own_etcd.process.send_signal(signal.SIGSTOP)
        took = own_engine.start()
        assert took < plain + 4, f"{took} s, and {plain} s with etcd and without containers"
        refused("", start("late", "net1", status=1))
        own_etcd.process.send_signal(signal.SIGCONT)
        remove("web", "db", "late")
        await_clean(host, 60)
        start("web", "net1")
        remove("web")
        await_clean(host)


@pytest.mark.parametrize("hangs", [True, False], ids=["hangs", "refuses"])
def test_containers_that_are_restarted_wait_for_etcd(
    bare_host: Host, own_etcd: Etcd, own_engine: Engine, hangs: bool
) -> None:
    bare_host.etcd = own_etcd
    with serving(bare_host, DOCKER_HOST=SOCKET) as host:
        create("net1")
        names = ("web", "db", "app")
        for name in names:
            start(name, "net1", "--restart=always")
        own_engine.end(signal.SIGTERM)
        plain = own_engine.start()
        wait_for(lambda: all(running(name) for name in names), "all containers")
        own_engine.end(signal.SIGTERM)
        assert own_etcd.process is not None
        if hangs:
            own_etcd.process.send_signal(signal.SIGSTOP)
            time.sleep(stores.FRESH)  # for so long, a call relies on an answer from before, and nothing tells
        else:
            own_etcd.stop(signal.SIGKILL)
        took = own_engine.start()
        assert took < plain + 2, f"{took} s, and {plain} s with etcd\n{plugin_log()}"
        for name in names:
            assert not running(name) and "Calico cannot reach etcd" in inspected(name)["State"]["Error"]
        if hangs:
            own_etcd.process.send_signal(signal.SIGCONT)
        else:
            own_etcd.start()
        wait_for(lambda: all(running(name) for name in names), f"all containers\n{plugin_log()}", 60)
        await_reach("web", "db")
        remove(*names)
        await_clean(host, 60)
        assert len(plugin_log().splitlines()) < 200


@pytest.mark.api("etcdv2")
def test_a_container_that_is_restarted_while_the_data_moves_to_v3_is_started_afterwards(
    bare_host: Host, own_etcd: Etcd, engine: None
) -> None:
    ready, free = "/calico/v1/Ready", {"DATASTORE_TYPE": ""}
    bare_host.etcd = own_etcd
    own_etcd.put(ready, "true")
    with serving(bare_host, **free) as host:
        create("net1")
        start("web", "net1", "--restart=always")
        start("db", "net1")

        def refused() -> bool:
            state = inspected("web")["State"]
            if state["Pid"]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(state["Pid"], signal.SIGKILL)
            return state["Status"] == "exited" and "etcd's data is frozen" in state["Error"]

        with subprocess.Popen([CALICOCTL, "datastore", "migrate"], env=host.environment(**free)) as move:
            wait_for(lambda: own_etcd.get(ready) == "false", "the freeze")
            move.send_signal(signal.SIGSTOP)
            try:
                # until the process has read Ready again, after five seconds at most, the container is started again
                wait_for(refused, f"the refusal\n{plugin_log()}")
            finally:
                move.send_signal(signal.SIGCONT)
        assert move.returncode == 0
        own_etcd.api = "etcdv3"
        wait_for(lambda: running("web"), f"the container\n{plugin_log()}")
        assert record(host, "web")["ipv4_nets"] == [f"{address('web')}/32"]
        await_reach("db", "web")


def running(name: str) -> bool:
    return bool(inspected(name)["State"]["Running"])


def test_an_endpoint_of_the_old_plugin_is_enforced(served: AgentHost) -> None:
    host = served
    create("net1")
    start("web", "net1")
    run("ip", "link", "add", f"cali{OLD[:11]}", "type", "veth", "peer", "name", "old0")
    run("ip", "link", "set", f"cali{OLD[:11]}", "up")
    try:
        old = f"/calico/v1/host/{host.name}/workload/libnetwork/libnetwork/endpoint/{OLD}"
        host.etcd.put(
            old,
            {
                "state": "active",
                "name": f"cali{OLD[:11]}",
                "mac": "EE:EE:EE:EE:EE:EE",
                "profile_ids": ["f0" * 32],
                "ipv4_nets": ["192.168.0.200/32"],
                "ipv6_nets": [],
            },
        )
        wait_for(lambda: (host.endpoint_status(old) or {}).get("status") == "up", host.log())
        assert f"192.168.0.200 dev cali{OLD[:11]}" in run("ip", "route").out
        assert holds(lambda: host.etcd.get(old) is not None, 2), "it is not this process's to remove"
    finally:
        run("ip", "link", "delete", "old0")
        host.etcd.delete(old)
    remove("web")


def test_node_remove_takes_all_of_it(served: AgentHost) -> None:
    host = served
    create("net1")
    start("web", "net1")
    host.ctl("node", "remove", "--remove-endpoints")
    assert is_clean(host) and files(host) == [] and not (PLUGINS / "calico.sock").exists()
    assert not list(Path("/run/calico").glob("*/*"))
    host.start_agent("--libnetwork")  # the network is learned from the engine
    wait_for(lambda: files(host), plugin_log())
    restart("web")
    start("db", "net1")
    await_reach("db", "web")
    remove("web", "db")
    await_clean(host)


@contextlib.contextmanager
def sockets_of_systemd(host: Host, tmp_path: Path) -> Iterator[None]:
    """Have systemd's tool listen at the sockets, and start the process at the first call."""
    sockets = [PLUGINS / "calico.sock", PLUGINS / "calico-ipam.sock"]
    listen = [word for path in sockets for word in ("--listen", str(path))]
    module = (str(Path(CALICOCTL).parent / "python"), "-I", "-m", "calicoctl.plugins")
    environment = [f"--setenv={name}={value}" for name, value in host.environment().items()]
    PLUGINS.mkdir(parents=True, exist_ok=True)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(["systemd-socket-activate", *listen, *environment, *module], stdout=log, stderr=log)
        try:
            wait_for(lambda: "Listening" in (tmp_path / "log").read_text(), "the sockets")
            yield
        finally:
            run("sh", "-c", "docker ps -aq | xargs -r docker rm -f", check=False)
            run("docker", "network", "rm", "net1", check=False)
            end_agents()
            process.terminate()
            process.wait()
            shutil.rmtree(f"/var/lib/calico/{host.name}/networks", ignore_errors=True)
            for path in sockets:
                path.unlink(missing_ok=True)


def test_systemd_passes_the_sockets(bare_host: Host, engine: None, tmp_path: Path) -> None:
    bare_host.register(HOST_IP, HOST_IP6)
    with sockets_of_systemd(bare_host, tmp_path):
        create("net1")
        start("web", "net1")
        assert len(endpoints(bare_host)) == 1
        # the agent starts no other one, and says why
        done = bare_host.ctl("node", f"--ip={HOST_IP}", f"--log-dir={LOG_DIR}", "--libnetwork")
        assert "Docker networks are served by another process" in done.err
        assert not Path(f"/run/calico/{bare_host.name}/plugins.pid").exists()
        start("db", "net1")
        wait_for(lambda: reaches("db", "web"), "an answer from web", 15)
        bare_host.ctl("node", "stop", "--force")
        remove("web", "db")
        wait_for(lambda: bare_host.records() == {} and bare_host.allocations() == {}, "nothing left")
        run("docker", "network", "rm", "net1")


def test_from_libnetwork_to_systemd(served: AgentHost, tmp_path: Path) -> None:
    host = served
    create("net1")
    start("web", "net1")
    with sockets_of_systemd(host, tmp_path):
        # the engine reaches the new one, while the old one still runs
        refused("another process serves Docker networks already", start("db", "net1", status=1))
        remove("db")
        old = plugin_pid(host)
        assert "--libnetwork has no effect" in host.ctl("node", f"--ip={HOST_IP}", "--libnetwork").err
        wait_for(lambda: not Path(f"/proc/{old}").exists(), "the end of the old one")
        wait_for(lambda: start_succeeds("db"), (tmp_path / "log").read_text(), 15)
        await_reach("db", "web")
        remove("web", "db")
        wait_for(lambda: endpoints(host) == {} and host.allocations() == {}, "nothing left", 30)
