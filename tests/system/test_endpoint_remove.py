"""`endpoint ID remove`: endpoints whose workload no longer exists, of any orchestrator, and the refusal of others."""

from __future__ import annotations

from tests.system.agent import A4, ALLOW, B4, AgentHost
from tests.system.support import CALICOCTL, HOST_IP, Host, calico_links, links, run, wait_for
from tests.system.traffic import PATIENT, ping

ID = "0123456789ab" * 5 + "cdef"
OLD_PLUGINS = f"/calico/v1/host/host1/workload/libnetwork/libnetwork/endpoint/{ID}"
NAME = f"cali{ID[:11]}"


def old_endpoint(host: Host) -> None:
    """Connect the namespace `a` as the libnetwork plugin of 2015 did: all its containers are one workload."""
    run("ip", "netns", "add", "a")
    run("ip", "link", "add", NAME, "type", "veth", "peer", "name", "tmp0")
    run("ip", "link", "set", "tmp0", "netns", "a", "name", "cali0", "address", "ee:ee:ee:ee:ee:ee")
    run("ip", "link", "set", NAME, "up")
    for command in (
        *(("link", "set", "cali0", "up"), ("address", "add", f"{A4}/32", "dev", "cali0")),
        *(("route", "add", HOST_IP, "dev", "cali0"), ("route", "add", "default", "via", HOST_IP, "dev", "cali0")),
    ):
        run("ip", "-n", "a", *command)
    record = {
        "state": "active",
        "name": NAME,
        "mac": "EE:EE:EE:EE:EE:EE",
        "profile_ids": ["f" * 64],
        "ipv4_nets": [f"{A4}/32"],
        "ipv6_nets": [],
        "ipv4_gateway": HOST_IP,
        "ipv6_gateway": None,
    }
    host.etcd.put(OLD_PLUGINS, record)
    block = {
        "cidr": "192.168.0.0/26",
        "affinity": "host:host1",
        "strict_affinity": False,
        "allocations": [None, 0] + [None] * 62,
        "attributes": [{"handle_id": None, "secondary": {}}],
    }
    host.etcd.put("/calico/ipam/v2/assignment/ipv4/block/192.168.0.0-26", block)
    host.etcd.put("/calico/ipam/v2/host/host1/ipv4/block/192.168.0.0-26", "")


def test_an_endpoint_of_the_plugin_of_2015_is_enforced_and_can_be_removed(node: AgentHost, engine: None) -> None:
    node.profile("f" * 64, inbound=[ALLOW])
    old_endpoint(node)
    node.add("b", B4)
    node.set_profiles("b", "f" * 64)
    node.sync()
    assert node.endpoint_status(OLD_PLUGINS)["status"] == "up"
    assert ping("b", A4, PATIENT) and ping("a", B4, PATIENT)
    node.profile("f" * 64)
    node.sync()
    assert not ping("b", A4)

    shown = node.ctl("endpoint", "show", "--detailed", "--orchestrator=libnetwork").out
    assert ID in shown and A4 in shown
    said = node.ctl("endpoint", ID, "remove", status=1)
    assert f"has its interface {NAME} in a container, which the Docker Engine does not know" in said.err
    assert NAME in links() and OLD_PLUGINS in node.records()
    run("ip", "link", "delete", NAME)  # with its container
    assert node.ctl("endpoint", ID[:12], "remove").out == f"Removed endpoint {ID}, released {A4}\n"
    assert OLD_PLUGINS not in node.records() and list(node.allocations()) == [B4] and NAME not in links()
    wait_for(lambda: A4 not in run("ip", "route").out, f"the route's end\n{node.log()}")
    node.ctl("ipam", "check")
    said = node.ctl("endpoint", ID, "remove", status=1)
    assert (said.out, said.err) == ("", f"Endpoint {ID} does not exist.\n")


def test_without_docker_what_has_an_interface_is_refused(host: Host) -> None:
    old_endpoint(host)
    away = {"DOCKER_HOST": "unix:///run/nowhere.sock"}
    said = host.ctl("endpoint", ID, "remove", status=1, env=away)
    assert "Cannot ask Docker" in said.err and f"has its interface {NAME}" in said.err and list(host.records())
    run("ip", "link", "delete", NAME)
    assert host.ctl("endpoint", ID, "remove", env=away).out == f"Removed endpoint {ID}, released {A4}\n"
    host.check_nothing_left()


def test_an_endpoint_whose_workload_exists_is_refused(host: Host, workload: str, blue: str) -> None:
    container = run("docker", "inspect", "-f", "{{.Id}}", "workload").out.strip()
    host.ctl("container", "add", "workload", A4)
    host.ctl("container", "add", blue, B4)
    before = host.records(), host.allocations(), calico_links()
    ids = {key.split("/")[-4]: key.rpartition("/")[2] for key in host.records()}
    for name, orchestrator, what in ((container[:12], "docker", "container"), (blue, "namespace", "namespace")):
        said = host.ctl("endpoint", ids[orchestrator], "remove", status=1)
        assert (said.out, said.err) == (
            "",
            f"Endpoint {ids[orchestrator]} is that of a {what} that exists: disconnect it with 'calicoctl container "
            f"remove {name}'.\n",
        )
    assert (host.records(), host.allocations(), calico_links()) == before

    run("docker", "rm", "-f", "workload")
    run("ip", "netns", "delete", "blue")
    assert host.ctl("endpoint", ids["docker"], "remove").out == f"Removed endpoint {ids['docker']}, released {A4}\n"
    assert host.ctl("endpoint", ids["namespace"], "remove").out.endswith(f", released {B4}\n")
    host.check_nothing_left()


def test_what_else_is_refused(host: Host) -> None:
    elsewhere = f"/calico/v1/host/host2/workload/k8s/pod/endpoint/{ID}"
    host.etcd.put(elsewhere, {"ipv4_nets": ["192.168.1.1/32"]})
    said = host.ctl("endpoint", ID, "remove", status=1)
    assert "is on host2, not on this host (host1)" in said.err and "--hostname=host2 --remove-endpoints" in said.err
    host.etcd.put(elsewhere.replace("host2", "host1"), "{")  # an invalid one
    assert "matches several endpoints" in host.ctl("endpoint", "0123", "remove", status=1).err
    assert host.ctl("endpoint", "0123", "remove", "--host=host1").out == f"Removed endpoint {ID}\n"
    assert list(host.records()) == [elsewhere]
    assert "does not exist" in host.ctl("endpoint", "0123", "remove", "--orchestrator=docker", status=1).err
    assert "Say which endpoint" in host.ctl("endpoint", "", "remove", status=2).err
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", CALICOCTL]
    assert "must be run as root" in host.ctl("endpoint", ID, "remove", status=2, command=nobody).err
