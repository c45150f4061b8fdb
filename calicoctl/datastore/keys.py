"""Builds and parses the keys of the store.

The layout is that of the Calico programs of 2015: see docs/datamodel.md.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from calicoctl import limits

ROOT = "/calico"
POLICY_AND_HOSTS = "/calico/v1"
READY = "/calico/v1/Ready"
"""The key in each API of etcd whose value is `true` if the data there is current, `false` if the data must not be
changed."""
UNUSED_COPY = "/calico/v1/unused-copy"
"""A key that exists only in v3, and belongs to a move of the data between the APIs (see migration.py). If it exists and
Ready is not `true` in v3, the data in v3 is not in use. If it exists and Ready is `true` in v3, the data in v2 is being
deleted."""
COPIED_REVISION = "/calico/v1/copied-revision"
"""A key that exists only in v3, while v3 is in use and v2 still has the data that was copied from there. Its value is
the revision at which v2 was frozen. An old program has written the keys in v2 that have a later revision."""
OTHER_CALICO = "/calico/resources/v3"
"""The directory of Calico 3's resources. If it exists in etcd's v3 API, this program refuses to use that API, since
Calico 3 would assign the same addresses."""
CONFIG = "/calico/v1/config"
HOSTS = "/calico/v1/host"
PROFILES = "/calico/v1/policy/profile"
FELIX_HOSTS = "/calico/felix/v1/host"
BGP = "/calico/bgp/v1"
BGP_HOSTS = "/calico/bgp/v1/host"
BGP_GLOBAL = "/calico/bgp/v1/global"
IPAM_HOSTS = "/calico/ipam/v2/host"
AS_NUM, MACS = "as_num", "macs"
"""The last parts of keys: a host's AS number, and the source MACs of its packets to other hosts."""
BGP_AS_NUM = f"{BGP_GLOBAL}/{AS_NUM}"
BGP_NODE_MESH = f"{BGP_GLOBAL}/node_mesh"

DEEPEST = 10
"""The number of parts of the deepest key: the key of an endpoint's status."""

INTERFACE_PREFIX = "cali"
"""The prefix of the names of endpoints' interfaces on the host. No other interface may have such a name."""


@dataclass(frozen=True)
class EndpointId:
    """Identifies an endpoint by host, orchestrator (such as `docker` or `namespace`), workload id, and endpoint id.

    The endpoint id has 32 hex digits if this program created the endpoint.
    """

    host: str
    orchestrator: str
    workload: str
    endpoint: str

    @property
    def interface(self) -> str:
        """The name of the host's end of the endpoint's veth pair."""
        return INTERFACE_PREFIX + self.endpoint[:11]

    @property
    def is_valid(self) -> bool:
        """Whether the endpoint id is hexadecimal, so that `interface` can be the name of an interface."""
        # with other ids, the kernel might treat the name as a pattern (`%d`)
        return is_endpoint_id(self.endpoint)


def is_endpoint_id(text: str) -> bool:
    """Return whether a text can be an endpoint id: lower-case hexadecimal digits only."""
    return re.fullmatch("[0-9a-f]+", text) is not None


def config(name: str) -> str:
    return f"{CONFIG}/{name}"


def host(host: str) -> str:
    return f"{HOSTS}/{host}"


def host_of(key: str) -> str | None:
    """Return the name of the host that a key is about, None if its path names no host."""
    for directory in (HOSTS, BGP_HOSTS, IPAM_HOSTS):
        if key.startswith(directory + "/"):
            return key[len(directory) + 1 :].partition("/")[0]
    return None


def host_bird_ip(host: str) -> str:
    return f"{HOSTS}/{host}/bird_ip"


def parse_host_bird_ip(key: str) -> str | None:
    """Return the name of the host from the key of its `bird_ip` (its IPv4 address), None for any other key."""
    parts = key.split("/")
    return parts[4] if len(parts) == 6 and parts[5] == "bird_ip" and key.startswith(HOSTS + "/") else None


def host_config(host: str, name: str) -> str:
    return f"{HOSTS}/{host}/config/{name}"


def workloads(host: str, orchestrator: str) -> str:
    return f"{HOSTS}/{host}/workload/{orchestrator}"


def workload(host: str, orchestrator: str, workload: str) -> str:
    return f"{workloads(host, orchestrator)}/{workload}"


def endpoints(host: str, orchestrator: str, workload_id: str) -> str:
    return f"{workload(host, orchestrator, workload_id)}/endpoint"


def endpoint(id: EndpointId) -> str:
    return f"{endpoints(id.host, id.orchestrator, id.workload)}/{id.endpoint}"


def parse_endpoint(key: str) -> EndpointId | None:
    """Return the id of the endpoint from its key.

    Return None for any other key, and for a key with more than limits.KEY characters.
    """
    if not key.startswith(HOSTS + "/") or len(key) > limits.KEY:
        return None
    parts = key[len(HOSTS) + 1 :].split("/")
    if len(parts) == 6 and parts[1] == "workload" and parts[4] == "endpoint":
        # interned, since thousands of endpoints have the same ones
        return EndpointId(sys.intern(parts[0]), sys.intern(parts[2]), workload=parts[3], endpoint=parts[5])
    return None


def parse_felix_endpoint(key: str) -> EndpointId | None:
    """Return the id of the endpoint from the key of its status, None for any other key."""
    return parse_endpoint(key.replace(FELIX_HOSTS, HOSTS, 1)) if key.startswith(FELIX_HOSTS + "/") else None


def profile(name: str) -> str:
    return f"{PROFILES}/{name}"


def profile_tags(name: str) -> str:
    return f"{PROFILES}/{name}/tags"


def profile_rules(name: str) -> str:
    return f"{PROFILES}/{name}/rules"


def parse_profile(key: str) -> str | None:
    """Return the name of the profile from the key of its tags or rules, None for any other key."""
    parts = key.split("/")
    return parts[5] if len(parts) == 7 and parts[6] in ("tags", "rules") and key.startswith(PROFILES + "/") else None


def pools(version: int) -> str:
    return f"/calico/v1/ipam/v{version}/pool"


def pool(version: int, cidr: str) -> str:
    return f"{pools(version)}/{dashed(cidr)}"


def bgp_host(host: str) -> str:
    return f"{BGP_HOSTS}/{host}"


def bgp_peers(version: int, host: str | None = None) -> str:
    """Return the directory of the global BGP peers or, with `host`, of that host's peers."""
    return f"{BGP_GLOBAL if host is None else bgp_host(host)}/peer_v{version}"


def bgp_peer(version: int, ip: str, host: str | None = None) -> str:
    return f"{bgp_peers(version, host)}/{ip}"


def bgp_setting(name: str, host: str | None = None) -> str:
    return f"{BGP_GLOBAL if host is None else bgp_host(host)}/{name}"


def bgp_host_address(host: str, version: int) -> str:
    return f"{bgp_host(host)}/ip_addr_v{version}"


def parse_bgp_host_address(key: str) -> str | None:
    """Return the name of the host from the key of its BGP address, None for any other key."""
    parts = key.split("/")
    of_host = len(parts) == 7 and key.startswith(BGP_HOSTS + "/")
    return parts[5] if of_host and parts[6] in ("ip_addr_v4", "ip_addr_v6") else None


def bgp_host_as_num(host: str) -> str:
    return f"{bgp_host(host)}/{AS_NUM}"


def bgp_host_macs(host: str) -> str:
    return f"{bgp_host(host)}/{MACS}"


def parse_bgp_host_setting(key: str, name: str) -> str | None:
    """Return the name of the host from the key of its BGP setting `name`, None for any other key."""
    parts = key.split("/")
    return parts[5] if len(parts) == 7 and parts[6] == name and key.startswith(BGP_HOSTS + "/") else None


def ipam_blocks(version: int) -> str:
    return f"/calico/ipam/v2/assignment/ipv{version}/block"


def ipam_block(version: int, cidr: str) -> str:
    return f"{ipam_blocks(version)}/{dashed(cidr)}"


def ipam_host(host: str) -> str:
    return f"{IPAM_HOSTS}/{host}"


def ipam_affinities(host: str, version: int) -> str:
    return f"{ipam_host(host)}/ipv{version}/block"


def ipam_affinity(host: str, version: int, cidr: str) -> str:
    return f"{ipam_affinities(host, version)}/{dashed(cidr)}"


def parse_affinity(key: str) -> tuple[str, int, str] | None:
    """Return (host, IP version, CIDR of the block) from the key of an affinity, None for any other key."""
    if not key.startswith(IPAM_HOSTS + "/"):
        return None
    parts = key[len(IPAM_HOSTS) + 1 :].split("/")
    if len(parts) == 4 and parts[1] in ("ipv4", "ipv6") and parts[2] == "block":
        return parts[0], int(parts[1][-1]), undashed(parts[3])
    return None


def ipam_handles() -> str:
    return "/calico/ipam/v2/handle"


def is_handle(text: str) -> bool:
    """Return whether a text can be a handle: it is one part of a path, which etcd's v2 API does not change."""
    return "/" not in text and text not in ("", ".", "..")


def ipam_handle(handle: str) -> str:
    return f"{ipam_handles()}/{handle}"


def felix_host(host: str) -> str:
    """Return the directory of the statuses that a host's agent reports."""
    return f"{FELIX_HOSTS}/{host}"


def felix_status(host: str) -> str:
    return f"{felix_host(host)}/status"


def felix_endpoint(id: EndpointId) -> str:
    return endpoint(id).replace(HOSTS, FELIX_HOSTS, 1)


def implied_directories(key: str) -> list[str]:
    """Return the directories to remove after `key` was deleted, if they are empty then. The deepest comes first.

    For the key of an endpoint, these are the directories of the endpoint's workload. For the key of an endpoint's
    status, these are the directories of the workload's statuses, and that of the orchestrator's statuses. For a key of
    a profile, this is the profile's directory. For any other key, there are none. Only stores with directories (etcd's
    v2 API) need this.
    """
    if key.startswith(PROFILES + "/"):
        return [directory for directory in directories(key) if directory.startswith(PROFILES + "/")]
    # the programs of 2015 expect that all other directories remain
    id, levels = parse_endpoint(key), 2
    if id is None:
        id, levels = parse_felix_endpoint(key), 3  # of the statuses, the orchestrator's as well
    parts = key.split("/")
    return [] if id is None else ["/".join(parts[: len(parts) - level]) for level in range(1, levels + 1)]


def directories(key: str) -> Iterator[str]:
    """Yield the directories above a key, deepest first."""
    end = key.rfind("/")
    while end > 0:
        yield key[:end]
        end = key.rfind("/", 0, end)


def dashed(cidr: str) -> str:
    """Return a CIDR as part of a key: `192.168.0.0-26` for `192.168.0.0/26`."""
    return cidr.replace("/", "-")


def undashed(name: str) -> str:
    """Return the CIDR in a part of a key: the inverse of `dashed`."""
    address, _, prefix = name.rpartition("-")
    return f"{address}/{prefix}"


def can_be_part(name: str) -> bool:
    """Return whether a name can be one part of a key: it is not empty, `.` or `..`, and contains no slash."""
    # etcd's v2 API resolves `.` and `..` as in paths
    return name not in ("", ".", "..") and "/" not in name


def last(key: str) -> str:
    """Return the last part of a key."""
    return key.rpartition("/")[2]
