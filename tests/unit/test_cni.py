"""The CNI plugin: what it accepts from a runtime, and the form of its answers."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from netaddr import IPAddress

from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Endpoint
from calicoctl.errors import CalicoError, Conflict, Failures, NotFound, StoreUnavailable
from calicoctl.plugins import cni
from calicoctl.workloads import connected, locks, wiring
from calicoctl.workloads.connected import Connected
from calicoctl.workloads.upkeep import is_managed
from calicoctl.workloads.wiring import Attachment
from calicoctl.workloads.workload import (
    CNI,
    Workload,
    WorkloadState,
    attached_container,
    find_state,
    namespace_identity,
    process_started,
)
from tests.unit.memory_store import MemoryStore

CONFIG = {"cniVersion": "1.1.0", "name": "net1", "type": "calico"}
VARIABLES = {"CNI_CONTAINERID": "c1", "CNI_NETNS": "/run/netns/c1", "CNI_IFNAME": "eth0"}


def run(command: str, text: object = None, **variables: str) -> tuple[int, dict]:
    """Run an operation; return the exit status and the answer."""
    given = CONFIG if text is None else text
    stdin = io.BytesIO(given if isinstance(given, bytes) else json.dumps(given).encode())
    status, answer = cni.run({"CNI_COMMAND": command, **VARIABLES, **variables}, stdin)
    assert answer is not None
    json.dumps(answer)
    return status, answer


def request(command: str = "ADD", arguments: str = "", **config: object) -> cni.Request:
    return cni._request(command, {**VARIABLES, "CNI_ARGS": arguments}, {**CONFIG, **config})


def wanted(arguments: str = "", **config: object) -> list[str]:
    """Return the requests for addresses, as texts."""
    found = cni._address_requests(request(arguments=arguments, **config))
    return [str(one.address or one.cidr or f"ipv{one.version}") for one in found]


@pytest.mark.parametrize("version", ["0.3.0", "0.4.0", "1.1.0", "9.9.9", None])
def test_the_versions_are_told_whatever_is_asked(version: str | None) -> None:
    status, answer = run("VERSION", {"cniVersion": version}, CNI_CONTAINERID="dummy", CNI_NETNS="dummy")
    assert status == 0 and answer["supportedVersions"] == ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]
    assert answer["cniVersion"] == (version if version in cni.VERSIONS else "1.1.0")


def test_the_versions_are_told_without_a_network() -> None:
    assert run("VERSION", b"\n")[1]["supportedVersions"] == [*cni.VERSIONS]
    words = [sys.executable, "-I", "-m", "calicoctl.plugins.cni"]

    def close() -> None:
        os.close(0)

    done = subprocess.run(words, env={"CNI_COMMAND": "VERSION"}, capture_output=True, preexec_fn=close, check=True)
    assert json.loads(done.stdout)["cniVersion"] == "1.1.0" and not done.stderr


@pytest.mark.parametrize(
    ("command", "text", "variables", "code", "why"),
    [
        ("", None, {}, 4, "CNI_COMMAND"),
        ("add", None, {}, 4, "CNI_COMMAND"),
        ("ADD", b"{", {}, 6, "not JSON"),
        ("ADD", b"[" * 100_000, {}, 6, "not JSON"),
        ("ADD", b"\xff", {}, 6, "not JSON"),
        ("ADD", b"[]", {}, 6, "not a JSON object"),
        ("ADD", b" " * (cni.LARGEST + 1), {}, 6, "bytes"),
        ("ADD", {"name": "net1"}, {}, 1, "'0.1.0'"),
        ("ADD", {**CONFIG, "cniVersion": ["1.1.0"]}, {}, 1, "not supported"),
        ("CHECK", {**CONFIG, "cniVersion": "0.3.1"}, {}, 1, "needs cniVersion 0.4.0"),
        ("GC", {**CONFIG, "cniVersion": "1.0.0"}, {}, 1, "needs cniVersion 1.1.0"),
        ("STATUS", {**CONFIG, "cniVersion": "1.0.0"}, {}, 1, "needs cniVersion 1.1.0"),
        ("ADD", {**CONFIG, "name": "../net"}, {}, 7, "'name'"),
        ("ADD", None, {"CNI_NETNS": "", "CNI_IFNAME": ""}, 4, "CNI_NETNS, CNI_IFNAME must be set"),
        ("DEL", None, {"CNI_CONTAINERID": "a/" * 191}, 4, "CNI_CONTAINERID"),
        ("DEL", None, {"CNI_CONTAINERID": ""}, 4, "CNI_CONTAINERID must be set"),
        ("ADD", None, {"CNI_CONTAINERID": "../../etc"}, 4, "CNI_CONTAINERID"),
        ("ADD", None, {"CNI_CONTAINERID": "a" * 191}, 4, "CNI_CONTAINERID"),
        ("ADD", None, {"CNI_CONTAINERID": "a\n"}, 4, "CNI_CONTAINERID"),
        ("ADD", None, {"CNI_IFNAME": "eth0/../x"}, 4, "CNI_IFNAME"),
        ("ADD", None, {"CNI_IFNAME": "cali%d"}, 4, "CNI_IFNAME"),
        ("ADD", None, {"CNI_NETNS": "run/netns/c1"}, 4, "absolute"),
        ("ADD", None, {"CNI_NETNS": "/run/netns/\udcff"}, 4, "absolute"),
        ("ADD", None, {"CNI_NETNS": "/run/netns/none"}, 4, "no network namespace"),
        ("ADD", None, {"CNI_ARGS": "IP"}, 4, "NAME=VALUE"),
        ("ADD", None, {"CNI_ARGS": "IP=10.0.0"}, 4, "'10.0.0' is not a valid IP address"),
        ("ADD", None, {"CNI_ARGS": "MAC=02:00:00:00:00"}, 4, "MAC that the user asks for is '02:00:00:00:00'"),
        ("ADD", None, {"CNI_ARGS": "MAC=03:00:00:00:00:01"}, 4, "of a single interface"),
        ("ADD", None, {"CNI_ARGS": "MAC=00:00:00:00:00:00"}, 4, "MAC"),
        ("ADD", None, {"CNI_ARGS": "MAC=EE:EE:EE:EE:EE:EE"}, 4, "MAC"),
        ("ADD", {**CONFIG, "prevResult": {}}, {}, 7, "first of the plugins"),
        ("ADD", {**CONFIG, "ipam": {"type": "host-local"}}, {}, 2, "'ipam.type', with the value \"host-local\""),
        ("ADD", {**CONFIG, "ipam": {"type": "calico-ipam", "ipv4_pools": ["x"]}}, {}, 2, "'ipam.ipv4_pools'"),
        ("ADD", {**CONFIG, "profiles": ["web"]}, {}, 2, "'profiles', with the value [\"web\"]"),
        ("STATUS", {**CONFIG, "pools": "ipv6"}, {}, 2, "'pools', with the value \"ipv6\""),
        ("ADD", {**CONFIG, "policy": {"type": "k8s", "x": "y" * 999}}, {}, 2, "…"),
        ("ADD", {**CONFIG, "ipMasq": True}, {}, 2, "'ipMasq', with the value true"),
        ("ADD", {**CONFIG, "ipMasq": False, "ipam": {}, "cni.dev/x": 1, "args": {}}, {}, 4, "no network namespace"),
        ("ADD", None, {"CNI_NETNS": "/proc/self/ns/net"}, 4, "the host's own"),
        ("ADD", {**CONFIG, "name": "n" * 65}, {}, 7, "should name a 'profile'"),
        ("ADD", {**CONFIG, "ipam": [1]}, {}, 2, "'ipam'"),
        ("ADD", {**CONFIG, "dns": []}, {"CNI_ARGS": ""}, 4, "no network namespace"),
        ("ADD", {**CONFIG, "dns": [1]}, {}, 7, "'dns'"),
        ("ADD", {**CONFIG, "profile": ["a", 1]}, {}, 7, "'profile'"),
        ("ADD", {**CONFIG, "profile": "a/b"}, {}, 7, "'a/b' is not a valid profile name"),
        ("ADD", {**CONFIG, "profile": [f"p{n}" for n in range(65)]}, {}, 7, "more than 64"),
        ("ADD", {**CONFIG, "pool": "10.0.0.1"}, {}, 7, "'pool'"),
        ("ADD", {**CONFIG, "pool": "10.0.0.1/24"}, {}, 7, "host bits"),
        ("ADD", {**CONFIG, "pool": {}}, {}, 7, "'pool'"),
        ("ADD", {**CONFIG, "runtimeConfig": 1}, {}, 7, "'runtimeConfig'"),
        ("ADD", {**CONFIG, "runtimeConfig": {"ips": "10.0.0.1"}}, {}, 7, "'ips'"),
        ("ADD", {**CONFIG, "runtimeConfig": {"mac": ["02:00:00:00:00:01"]}}, {}, 4, "MAC"),
        ("CHECK", None, {}, 7, "'prevResult' of network net1 is missing"),
        ("CHECK", {**CONFIG, "prevResult": {"interfaces": [{}]}}, {}, 7, "not a result"),
        ("CHECK", {**CONFIG, "prevResult": {"interfaces": 1}}, {}, 7, "not a result"),
        ("CHECK", {**CONFIG, "prevResult": {"ips": ["x"]}}, {}, 7, "not a result"),
        ("CHECK", {**CONFIG, "prevResult": {}}, {}, 7, "no interface eth0"),
        ("GC", None, {}, 7, "is missing"),
        ("GC", {**CONFIG, "cni.dev/valid-attachments": [1]}, {}, 7, "objects"),
        ("GC", {**CONFIG, "cni.dev/valid-attachments": {"a": 1}}, {}, 7, "objects"),
    ],
)
def test_invalid_requests_have_the_codes_of_the_specification(
    command: str, text: object, variables: dict[str, str], code: int, why: str
) -> None:
    status, answer = run(command, text, **variables)
    assert (status, answer["code"]) == (1, code) and why in answer["msg"], answer
    assert answer["cniVersion"] in cni.VERSIONS and answer["msg"].isprintable()


def test_an_error_is_in_the_version_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**CONFIG, "cniVersion": "0.3.1", "name": ""}
    assert run("ADD", config)[1]["cniVersion"] == "0.3.1"
    rolled_back = CalicoError("not all could be undone")
    rolled_back.__cause__ = StoreUnavailable("gone")
    for error, code in (
        (StoreUnavailable("gone"), 11),
        (Conflict("locked"), 11),
        (rolled_back, 11),
        (Failures([CalicoError("no"), Conflict("locked")]), 11),
        (Failures([CalicoError("no")]), 100),
        (RuntimeError("oops"), 100),
    ):

        def fails(_: cni.Request, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(cni, "_OPERATIONS", {"DEL": fails})
        assert run("DEL")[1]["code"] == code


def test_the_user_may_choose_the_mac() -> None:
    assert cni._mac(request()) is None
    assert cni._mac(request(arguments="MAC=02:00:00:00:00:0A")) == "02:00:00:00:00:0a"
    assert cni._mac(request(runtimeConfig={"mac": "02:00:00:00:00:01"})) == "02:00:00:00:00:01"


def test_a_container_with_an_id_that_is_too_long_is_not_attached() -> None:
    stdin = io.BytesIO(json.dumps(CONFIG).encode())
    assert cni.run({"CNI_COMMAND": "DEL", **VARIABLES, "CNI_CONTAINERID": "a" * 191}, stdin) == (0, None)


@pytest.mark.parametrize(("network", "interface"), [("net2", "eth0"), ("net1", "eth1")])
def test_an_attachment_stays_when_another_ends(
    network: str, interface: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also if it was made only while the lock of the container was awaited."""
    monkeypatch.setattr(locks, "DIRECTORY", tmp_path)
    datastore = DatastoreClient(MemoryStore(), "vm")
    id = EndpointId("vm", CNI, "c1", "e" * 32)
    taken = wiring.WorkloadLock.__enter__

    def attach(lock: locks.WorkloadLock) -> object:
        if not datastore.endpoint_ids():
            datastore.create_endpoint(Endpoint(id))
            connected.put("vm", CNI, "c1", "/none", "1:2:3", network="net1", interface="eth0")
        return taken(lock)

    monkeypatch.setattr(wiring.WorkloadLock, "__enter__", attach)
    with pytest.raises(NotFound, match=f"c1 is not attached to {network} through {interface}"):
        wiring.disconnect(datastore, Workload(CNI, "c1", "c1", network=network, interface=interface))
    assert datastore.endpoint_ids() == [id]
    wiring.disconnect(datastore, Workload(CNI, "c1", "c1", network="net1", interface="eth0"))
    assert not datastore.endpoint_ids() and not connected.every("vm", CNI)


def test_addresses_are_requested_of_each_pool_and_as_the_user_asks() -> None:
    assert wanted() == ["ipv4"]
    assert wanted(pool="ipv6") == ["ipv6"]
    assert wanted(pool=["10.0.0.0/24", "ipv6", "ipv6"]) == ["10.0.0.0/24", "ipv6"]
    assert wanted("IgnoreUnknown=1;IP=10.0.0.7;K8S_POD_NAME=web") == ["10.0.0.7"]
    assert wanted("IP=10.0.0.7", pool=["10.0.0.0/24", "ipv6"]) == ["10.0.0.7", "ipv6"]
    assert wanted("IP=10.0.0.7", runtimeConfig={"ips": ["10.0.0.7/24", "fd00::1/64"]}) == ["10.0.0.7", "fd00::1"]
    with pytest.raises(cni.CniError, match=r"10.1.0.7 is not in the pool of network net1, 10.0.0.0/24"):
        wanted("IP=10.1.0.7", pool="10.0.0.0/24")


@pytest.mark.parametrize("version", cni.VERSIONS)
def test_a_result_has_the_form_of_its_version(version: str) -> None:
    id = EndpointId("vm", CNI, "c1", "0123456789ab" + "0" * 20)
    attachment = Attachment(
        id,
        IPAddress("10.0.0.7"),
        "eth0",
        "02:00:00:00:00:07",
        others=(IPAddress("fd00::7"),),
        next_hops={6: "2001:db8::2", 4: "192.0.2.2"},
    )
    result = cni.result(request(cniVersion=version), attachment, "ee:ee:ee:ee:ee:ee", {"search": ["example.com"]})
    versions = [{"version": "4"}, {"version": "6"}] if version in ("0.3.0", "0.3.1", "0.4.0") else [{}, {}]
    assert result == {
        "cniVersion": version,
        "interfaces": [
            {"name": "cali0123456789a", "mac": "ee:ee:ee:ee:ee:ee"},
            {"name": "eth0", "mac": "02:00:00:00:00:07", "sandbox": "/run/netns/c1"},
        ],
        "ips": [
            {"address": "10.0.0.7/32", "gateway": "192.0.2.2", "interface": 1, **versions[0]},
            {"address": "fd00::7/128", "gateway": "2001:db8::2", "interface": 1, **versions[1]},
        ],
        "routes": [{"dst": "0.0.0.0/0", "gw": "192.0.2.2"}, {"dst": "::/0", "gw": "2001:db8::2"}],
        "dns": {"search": ["example.com"]},
    }
    nets = ["10.0.0.7/32", "fd00::7/128"]
    assert cni.attached_as(request("DEL", prevResult=result)) == ("02:00:00:00:00:07", nets, [4, 6])
    moved = {**result, "routes": [{"dst": "::/0", "gw": "2001:db8::2"}, {"dst": "0.0.0.0/0", "gw": "192.0.2.9"}]}
    assert cni.attached_as(request("DEL", prevResult=moved))[2] == [6]


def test_what_other_plugins_have_added_to_a_result_is_not_compared() -> None:
    interfaces = [{"name": "eth0"}, {"name": "eth1", "sandbox": "/x"}, {"name": "eth0", "sandbox": "/x"}]
    ips = [{"address": f"10.0.0.{number}/32", "interface": number} for number in range(3)]
    result = {"interfaces": interfaces, "ips": [*ips, {"address": "10.0.0.9/32"}]}
    assert cni.attached_as(request("DEL", prevResult=result)) == ("", ["10.0.0.2/32"], [])


def test_valid_attachments() -> None:
    key = "cni.dev/valid-attachments"
    listed = [{"containerID": "c1", "ifname": "eth0", "other": 1}]
    assert cni.valid_attachments(request("GC", **{key: listed})) == {("c1", "eth0")}
    assert cni.valid_attachments(request("GC", **{key: None})) == set()


# How such a container is known on its host


@pytest.fixture
def here() -> Iterator[str]:
    """The path of a namespace that is held open: a time of creation is kept while it is in use, as by a mount."""
    path = "/proc/self/ns/net"
    with open(path, "rb"):
        yield path


def test_a_container_is_known_by_its_namespace_network_and_interface(here: str) -> None:
    identity = namespace_identity(here)
    assert identity is not None and namespace_identity("/none") is None
    found = os.stat(here)
    assert identity == f"{found.st_dev}:{found.st_ino}:{found.st_mtime_ns}"
    of_process = namespace_identity(f"/proc/{os.getpid()}/ns/net")
    assert of_process == f"{found.st_dev}:{found.st_ino}:{process_started(f'/proc/{os.getpid()}')}"
    connected.put("vm", CNI, "c1", here, identity, network="net1", interface="eth0")
    known = connected.get("vm", CNI, "c1")
    assert known == Connected(here, identity, network="net1", interface="eth0")
    assert connected.every("vm", CNI) == {"c1": known}
    state, workload = find_state(CNI, "c1", known)
    assert state is WorkloadState.RUNNING and workload == attached_container("c1", known)
    assert (workload.path, workload.network, workload.interface) == (here, "net1", "eth0")


@pytest.mark.parametrize(
    "known",
    [
        None,
        Connected("/none", "1:2", network="net1", interface="eth0"),
        Connected("/proc/self/ns/net", "1:2:3", network="net1", interface="eth0"),
        Connected("/proc/self/ns/net", None, network="net1", interface="eth0"),
    ],
)
def test_a_container_without_its_own_namespace_is_gone(known: Connected | None) -> None:
    assert find_state(CNI, "c1", known)[0] is WorkloadState.GONE


def test_no_namespace_survives_a_reboot(here: str, monkeypatch: pytest.MonkeyPatch) -> None:
    connected.put("vm", CNI, "c1", here, namespace_identity(here), network="net1", interface="eth0")
    monkeypatch.setattr(connected, "_boot", lambda: "another")
    assert find_state(CNI, "c1", connected.get("vm", CNI, "c1"))[0] is WorkloadState.GONE


@pytest.mark.parametrize(("id", "managed"), [("default-web", True), ("a" * 190, True), ("-x", False), ("a/b", False)])
def test_ids_that_no_runtime_gives_are_left_alone(id: str, managed: bool) -> None:
    assert is_managed(CNI, id) is managed


def test_the_plugin_reports_what_python_discards(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(cni, "report_discarded", asked.append)
    monkeypatch.setattr(cni, "run", lambda variables, stdin: (0, None))
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setenv("CALICO_DEBUG", "1")
    assert cni.main() == 0 and asked == [True]
