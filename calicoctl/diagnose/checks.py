"""Checks this host's prerequisites: kernel, tools, settings, Docker, etcd.

Kernel features are tested by using them, in a temporary network namespace. Only `load_modules` changes the host.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable

from calicoctl import engine, iptables, netlink
from calicoctl.addresses import FAMILIES
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.hosts import hostname
from calicoctl.datastore.keys import INTERFACE_PREFIX, READY
from calicoctl.errors import CalicoError, DockerUnavailable
from calicoctl.felix import process
from calicoctl.felix.bgp import instance, passwords
from calicoctl.felix.dataplane import connection_limit, docker_firewall, drops, vxlan
from calicoctl.felix.dataplane.nft import Nft
from calicoctl.felix.local_etcd import LocalEtcd
from calicoctl.output import first_few
from calicoctl.workloads import docker_hook, host_network, netns

MODULES = (
    *("veth", "nf_tables", "nf_conntrack", "nft_ct", "nft_nat", "nft_masq"),
    *("nft_limit", "nft_log", "nfnetlink_log", "nft_connlimit", "nft_hash", "vxlan"),
)
"""The modules that `--fix` loads, for kernels that do not load them on demand."""

OLDEST_DOCKER = (1, 9)
"""The first version of the Docker Engine whose networks support the libnetwork plugin."""

# permanent entries, for its addresses and its next hop, do not count since Linux 5.0
_SHORT_LIVED = {4: 1, 6: 6}
"""How many temporary neighbour entries an endpoint may cause: for its loopback interface and, in IPv6, for multicast
groups at both ends and its link-local address."""

_ROOMY = 4096
"""A limit of the neighbour table that suffices, except on a host with very many endpoints or neighbours."""

_TABLES = """
add table inet check
add chain inet check forward { type filter hook forward priority filter - 10; }
add map inet check from { type ifname : verdict; }
add rule inet check forward ct state established,related accept
add rule inet check forward iifname vmap @from
add chain inet check outgoing { type nat hook postrouting priority srcnat; }
add rule inet check outgoing masquerade
add table arp check
add chain arp check input { type filter hook input priority filter; }
"""


@dataclass(frozen=True)
class Check:
    """The result of one check. `found` describes what was found.

    If `ok` is false, `advice` says what to do. The failure is an error if `needed` is true, and a warning if it is
    false.
    """

    name: str
    ok: bool
    found: str
    needed: bool = True
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "ok": self.ok,
            "needed": self.needed,
            "found": self.found,
            "advice": "" if self.ok else self.advice,
        }


def check(libnetwork: bool = False) -> Iterator[Check]:
    """Run all checks, and yield each result. If a check fails, the others still run.

    If `libnetwork` is true, it is an error if no Docker Engine answers, or if its version is below OLDEST_DOCKER. If
    `libnetwork` is false, it is only a warning if none answers, and every version is accepted.
    """
    yield _root()
    yield from _kernel()
    yield from _settings()
    yield from _neighbours()
    docker = _docker(libnetwork)
    yield from _tools(docker.ok)
    yield docker
    yield _hook(docker.ok)
    yield _firewall(docker.ok)
    yield nftables_service()
    yield _old_felix()
    yield from _bird()
    yield _passwords()
    reported: dict[str, Any] = {}
    with suppress(CalicoError):  # the check of the host name says why
        reported = process.report(hostname()) or {}
    yield _ports(reported.get("bgp_sessions"))
    yield _mtu(reported.get("mtu"))
    yield from _etcd()
    yield _pools()
    yield _ipip()
    yield from _host()


def load_modules() -> list[str]:
    """Load the kernel modules in MODULES. Return an error text for each that could not be loaded. Needs root.

    If the program `modprobe` is missing, return only an error text that says so.
    """
    failed = []
    for module in MODULES:
        try:
            done = subprocess.run(["modprobe", module], capture_output=True, text=True, timeout=30)
        except FileNotFoundError:
            return ["there is no modprobe: install the package kmod"]
        except subprocess.TimeoutExpired:
            failed.append(f"{module}: modprobe takes too long")
            continue
        if done.returncode != 0:
            failed.append(f"{module}: {' '.join(done.stderr.split())[:120]}")
    return failed


def _root() -> Check:
    is_root = os.geteuid() == 0
    return Check(
        "root", is_root, "yes" if is_root else "no", advice="run this, and commands that change containers, with sudo"
    )


def _kernel() -> Iterator[Check]:
    release = platform.release()
    yield Check("kernel", platform.system() == "Linux", f"{platform.system()} {release}", advice="use a Linux host")
    advice = "run 'calicoctl checksystem --fix' to load what is missing, or use a kernel that has it"
    limit = connection_limit.commands(connection_limit.LIST)
    for name, work, needed in (
        ("network namespaces", lambda: None, True),
        ("veth", partial(_try_link, kind="veth", peer={"ifname": "check1"}), True),
        ("nftables: policy, connection tracking, NAT, ARP", lambda: Nft().run(_TABLES), True),
        ("nftables: limits of connections", lambda: Nft().run(limit), False),
        ("nftables: logging of dropped packets", lambda: Nft().run(drops.trial()), False),
        ("VXLAN (for pools with --vxlan)", partial(_try_link, kind="vxlan", vxlan_id=1, vxlan_port=vxlan.PORT), False),
    ):
        if os.geteuid() != 0:
            yield Check(name, False, "not tried: that needs root", False, "run this as root, to find out")
            continue
        why = _in_new_namespace(work)
        yield Check(name, why is None, why or "works", needed, advice)


def _try_link(**options: Any) -> None:
    from pyroute2.iproute.linux import IPRoute

    with IPRoute() as netlink:
        netlink.link("add", ifname="check0", **options)


def _in_new_namespace(work: Callable[[], object]) -> str | None:
    """Call `work` in a new network namespace. Return None if it succeeds, or the error as a text."""
    failed: list[str] = []

    def body() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            if libc.unshare(netns.CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            work()
        except Exception as error:  # the library's, of several kinds
            failed.append(str(error) or type(error).__name__)

    thread = threading.Thread(target=body, name="trying")
    thread.start()
    thread.join()
    return failed[0] if failed else None


def _settings() -> Iterator[Check]:
    path = Path("/proc/sys/net/ipv4/ip_forward")
    writable = os.access(path, os.W_OK)
    value = _read(path)
    yield Check(
        "setting net.ipv4.ip_forward",
        value == "1" or writable,
        f"{value}, {'which the agent sets to 1' if value != '1' else 'as it must be'}",
        needed=os.geteuid() == 0,  # unknown for other users than root
        advice="set it to 1, or let this run where /proc/sys can be written",
    )
    off = _read(Path("/proc/sys/net/ipv6/conf/all/disable_ipv6"))
    yield Check(
        "IPv6",
        off == "0",
        {"0": "on", "1": "switched off"}.get(off, "not in this kernel"),
        needed=False,
        advice="for IPv6, set net.ipv6.conf.all.disable_ipv6 to 0",
    )
    limit, count = (_read(Path(f"/proc/sys/net/netfilter/nf_conntrack_{word}")) for word in ("max", "count"))
    full = limit.isdigit() and count.isdigit() and int(count) > 0.9 * int(limit)
    yield Check(
        "connection tracking",
        not full,
        f"{count} of {limit} entries are used" if limit.isdigit() else "not in use yet",
        needed=False,
        advice="raise net.netfilter.nf_conntrack_max, or new connections will be dropped",
    )


def _neighbours() -> Iterator[Check]:
    """Check whether this host's endpoints fit into the neighbour tables. All namespaces share the tables' limits."""
    endpoints = sum(name.startswith(INTERFACE_PREFIX) for _, name in socket.if_nameindex())
    counts_permanent = tuple(map(int, re.findall(r"\d+", platform.release())[:2])) < (5, 0)
    for version, family in FAMILIES.items():
        name = f"neighbour table of IPv{version}"
        try:
            table = netlink.neighbour_limit(family)
        except OSError as error:
            yield Check(name, False, str(error.strerror or error), False, "use a kernel that has it")
            continue
        each = _SHORT_LIVED[version] + (2 if counts_permanent else 0)
        room, wanted = table.limit // each, max(_ROOMY, 2 * endpoints * each)
        found = f"room for {room} endpoints (each may take {each} of gc_thresh3's {table.limit}); here are {endpoints}"
        found += f"; it was full {table.overflows} times since the machine was booted" if table.overflows else ""
        yield Check(
            name,
            endpoints <= room and not (table.overflows and table.limit < wanted),
            found,
            needed=False,
            advice=f"set net.ipv{version}.neigh.default.gc_thresh2 to {wanted // 2} and gc_thresh3 to {wanted} in a "
            "file of /etc/sysctl.d, and run 'sysctl --system'",
        )


def _tools(docker_runs: bool) -> Iterator[Check]:
    for command, package, needed, use in (
        ("nft", "nftables", False, "to show the tables"),
        ("ip", "iproute2", True, ""),
        ("conntrack", "conntrack", False, "to show connections"),
        ("iptables", "iptables", docker_runs, "needed beside Docker's firewall"),
        ("ip6tables", "iptables", docker_runs, "needed beside Docker's firewall"),
        ("etcd", "etcd-server", False, "for 'calicoctl node --local-etcd'"),
    ):
        version = _version(command)
        found = version or f"not there{f' ({use})' if use else ''}"
        yield Check(command, version is not None, found, needed, f"install the package {package}")


def _version(command: str) -> str | None:
    """Return the version that a command prints, "there" if it prints none, None if the command is not installed."""
    if shutil.which(command) is None:
        return None
    with suppress(OSError, subprocess.SubprocessError):
        option = "-V" if command == "ip" else "--version"
        done = subprocess.run([command, option], capture_output=True, text=True, timeout=10, errors="replace")
        line = next(iter((done.stdout + done.stderr).splitlines()), "")
        match = re.search(r"v?\d+\.\d+\S*.*", line)
        return match[0][:60] if match else "there"
    return "there"


def _docker(libnetwork: bool) -> Check:
    advice = "start Docker, or set DOCKER_HOST; network namespaces can be connected without it"
    try:
        version = str(engine.info()["ServerVersion"])
    except (DockerUnavailable, KeyError) as error:
        return Check("Docker Engine", False, str(error), libnetwork, advice)
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    return Check(
        "Docker Engine",
        not libnetwork or numbers >= OLDEST_DOCKER,
        f"version {version}",
        libnetwork,
        f"use Docker {'.'.join(map(str, OLDEST_DOCKER))} or later",
    )


def _hook(docker_runs: bool) -> Check:
    name = "Docker's hook"
    if os.geteuid() != 0:
        return _needs_root(name)
    works, found = docker_hook.state_of_hook() or (True, "not set up (see 'calicoctl node --help')")
    with suppress(DockerUnavailable):
        described = engine.info() if works and docker_runs else None
        settings = docker_hook.settings() if described else None
        if described is None or (settings is not None and settings.removed):
            pass
        elif settings is None:
            if described.get("DefaultRuntime") == docker_hook.NAME:
                works, found = False, f"Docker's default runtime is {docker_hook.NAME}, and its settings are lost"
        elif described.get("DefaultRuntime") != docker_hook.NAME:
            works, found = False, "Docker has not read its configuration since the hook was set up"
        elif described.get("DockerRootDir") != settings.data_root:
            works = False
            found = f"Docker's data is in {described.get('DockerRootDir')}, not in {settings.data_root}"
    return Check(name, works, found, False, "run 'calicoctl node --docker-hook'")


def _needs_root(name: str) -> Check:
    """Return the result, "not known", of a check that only root can do and that another user has requested."""
    return Check(name, False, "not known", False, "run this as root, to find out")


def _firewall(docker_runs: bool) -> Check:
    name = "Docker's firewall"
    if os.geteuid() != 0:
        return _needs_root(name)
    try:
        missing = docker_firewall.missing()
    except CalicoError as error:
        return Check(name, False, str(error), docker_runs, "repair the host's iptables")
    if not missing:
        return Check(name, True, "nothing drops packets from or to containers", False)
    running = _agent() is not None
    agent = "should accept it there, and does not" if running else "will accept it there"
    return Check(
        name,
        not running,
        f"{', '.join(missing)} would drop forwarded packets; the agent {agent}",
        running,
        "see the agent's last error in 'calicoctl status'",
    )


def nftables_service(etc: Path = Path("/etc")) -> Check:
    """Check whether Debian's nftables.service deletes all tables, the agent's included, when it starts or stops.

    When it starts, it runs /etc/nftables.conf, which begins with `flush ruleset` by default. When it stops, it runs
    `nft flush ruleset`, unless a drop-in changes that. `etc` is the directory /etc.
    """
    name = "nftables.service and the agent's tables"
    units = etc / "systemd/system"
    try:
        flushes = re.search(r"^\s*flush\s+ruleset\b", (etc / "nftables.conf").read_text(errors="replace"), re.MULTILINE)
        settings = "".join(file.read_text(errors="replace") for file in units.glob("nftables.service.d/*.conf"))
        enabled = any(units.glob("*.wants/nftables.service"))
    except FileNotFoundError:
        return Check(name, True, "there is no /etc/nftables.conf", False)
    except OSError as error:
        return Check(name, False, f"not known: {error.strerror or error}", False, "run this as root, to find out")
    how = ["starts, by 'flush ruleset' in /etc/nftables.conf"] if flushes else []
    if not re.search(r"^ExecStop=\s*$", settings, re.MULTILINE):
        how.append("ends, by its ExecStop")
    if not enabled or not how:
        return Check(name, True, "does not delete them" if enabled else "it is not enabled", False)
    return Check(
        name,
        False,
        f"it deletes them when it {' and when it '.join(how)}",
        False,
        "have it delete only its own tables: see 'Services that flush nftables' in docs/agent.md",
    )


def _old_felix() -> Check:
    name = "iptables chains of an old Felix"
    if os.geteuid() != 0:
        return _needs_root(name)
    try:
        found = iptables.old_felix_chains()
    except CalicoError as error:
        return Check(name, False, str(error), False, "repair the host's iptables")
    chains = "; ".join(
        f"{command}: {', '.join(some[:6])}{f' and {len(some) - 6} more' if some[6:] else ''}"
        for command, some in found.items()
    )
    commands = "; ".join(f"{command}-save | grep -v felix- | {command}-restore" for command in found)
    return Check(
        name,
        not found,
        f"{chains}. They drop packets of new containers" if found else "none",
        False,
        f"end the old agent if it runs, then, as root: {commands}",
    )


def _bird() -> Iterator[Check]:
    """Check what `calicoctl node` needs to exchange routes with other hosts. A single host needs none of it."""
    name = "BIRD 2 (for several hosts)"
    try:
        instance.refuse_missing()
    except CalicoError as error:
        advice = "after installing the package, run 'systemctl disable --now bird'; 'make install' does both"
        yield Check(name, False, str(error), False, advice)
        return
    yield Check(name, True, _version("bird") or "", False)
    name = f"no other BIRD, port {instance.PORT} is free"
    if os.geteuid() != 0:
        yield _needs_root(name)
        return
    try:
        own = instance.Instance(hostname())
        pid = own.pid()
        if pid is None:
            own.refuse_foreign()
        else:
            own.refuse_other_bird()
    except (CalicoError, OSError) as error:
        yield Check(name, False, str(error), False, "see 'Found'")
        return
    yield Check(name, True, f"BIRD runs for the host agent (process {pid})" if pid else "yes", False)


def _passwords() -> Check:
    name = "BGP passwords"
    if os.geteuid() != 0:
        return _needs_root(name)
    found = passwords.read()
    if found.problem is not None:
        return Check(name, False, found.problem, False, "see 'Found'")
    count = len(found.peers)
    peers = [f"{count} peer{'s' if count > 1 else ''}"] if count else []
    whose = " and ".join([*peers, *(["the mesh"] if found.mesh is not None else [])])
    return Check(name, True, f"{f'for {whose}' if whose else 'none'}, in {passwords.PATH}", False)


def _ports(sessions: Any) -> Check:
    """Check whether the host's firewall may drop packets of BGP or VXLAN to or from other hosts.

    The check fails if the firewall drops packets by default, and no rule mentions the port of BGP, or no rule mentions
    the port of VXLAN. It also fails if a rule drops packets of BGP or VXLAN, and a BGP session is not up. `sessions`
    are the BGP sessions in the agent's report, None if there is no report.
    """
    name = "firewall and other hosts"
    if os.geteuid() != 0:
        return _needs_root(name)
    try:
        rules = Nft().run("list ruleset") + docker_firewall.saved()
    except CalicoError as error:
        return Check(name, False, f"not known: {error}", False, "repair the host's iptables")
    missing, dropping = ports_not_mentioned(rules), dropping_rules(rules)
    found = "nothing drops packets to the ports of BGP and VXLAN, as far as can be seen"
    if missing:
        found = f"it drops packets to or from this host, and no rule mentions {' or '.join(missing)}"
    elif dropping:
        found = f"rules that drop, perhaps not what other hosts send: {'; '.join(dropping[:3])}"
    is_any_down = isinstance(sessions, list) and not all(session["up"] for session in sessions)
    return Check(
        name,
        not missing and not (dropping and is_any_down),
        found,
        False,
        "for several hosts, accept TCP port 179 (BGP) and, for pools with --vxlan, UDP port 4789 from the other hosts",
    )


_PORTS = {f"TCP port {instance.PORT}": f"{instance.PORT}|bgp", f"UDP port {vxlan.PORT}": str(vxlan.PORT)}
"""The ports of BGP and VXLAN, each with a regular expression that matches it in a rule."""


def ports_not_mentioned(rules: str) -> list[str]:
    """Return the keys of _PORTS whose ports no rule of the host's firewall mentions.

    If the firewall passes packets to and from this host by default, return an empty list. `rules` is the output of `nft
    list ruleset` and of iptables-save. The agent's own tables in it are ignored.
    """
    rules = _of_others(rules)
    drops = re.search(
        r"^:(IN|OUT)PUT DROP|^-A (IN|OUT)PUT -j (DROP|REJECT)|type filter hook (in|out)put [^;]*; policy drop;",
        rules,
        re.MULTILINE,
    )
    if not drops:
        return []
    # not a part of an address
    return [
        port
        for port, words in _PORTS.items()
        if not re.search(rf"(dport|elements).*(?<![\w.])({words})(?![\w.])", rules)
    ]


def dropping_rules(rules: str) -> list[str]:
    """Return the rules of the host's firewall that drop packets from or to a port in _PORTS, each as one line.

    `rules` is as in ports_not_mentioned.
    """
    words = "|".join(_PORTS.values())
    pattern = re.compile(rf"[ds]ports?\b.*(?<![\w.])({words})(?![\w.]).*\b(drop|reject)\b", re.IGNORECASE)
    return [" ".join(line.split()) for line in _of_others(rules).splitlines() if pattern.search(line)]


def _of_others(rules: str) -> str:
    rules = re.sub(r"^table \w+ calico {.*?^}", "", rules, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"packets \d+ bytes \d+", "", rules)


def _etcd() -> Iterator[Check]:
    name = "use of etcd"
    try:
        datastore = DatastoreClient.from_environment()
        found, choice = f"version {datastore.store_version()}", datastore.choice()
        if choice is not None:
            found += f", its {choice.version} API: {choice.why}"
        frozen = datastore.setting(READY) == "false"
        found += "; its data is frozen" if frozen else ""
        yield Check(name, not frozen, found, advice="see 'Frozen' in docs/etcd.md")
    except CalicoError as error:
        yield Check(name, False, str(error), advice="see 'Found'")
    yield _local_etcd()


def _local_etcd() -> Check:
    name, agent = "local etcd", _agent()
    try:
        etcd = LocalEtcd(hostname(), process.DEFAULT_LOG_DIR)
        etcd.refuse_other_settings()
    except CalicoError:
        return Check(name, True, "none, for this host's store is another", False)
    if agent is not None and (process.report(hostname()) or {}).get("local_etcd") is False:
        return Check(name, True, "none, for the host agent runs without one", False)
    try:
        etcd.resolve_port(stay=agent is not None)
    except CalicoError as error:
        return Check(name, False, str(error), False, "for 'calicoctl node --local-etcd', see 'Found'")
    pid = etcd.running()
    if pid is not None:
        return Check(name, True, f"runs at {etcd.url} (process {pid})", False)
    return Check(name, True, f"does not run; 'calicoctl node --local-etcd' would start it at {etcd.url}", False)


def _pools() -> Check:
    name = "pools and this host's networks"
    try:
        datastore = DatastoreClient.from_environment()
        pools = [pool.cidr for version in (4, 6) for pool in datastore.readable_pools(version)[0]]
        overlaps = [overlap for overlap in map(host_network.read().overlap, pools) if overlap is not None]
    except CalicoError as error:
        return Check(name, False, f"not known: {error}", False, "fix that first")
    return Check(
        name,
        not overlaps,
        "; ".join(overlaps) or "nothing overlaps",
        False,
        "add a pool that overlaps nothing, and remove the other ('calicoctl pool')",
    )


def _ipip() -> Check:
    name = "pools with IP-in-IP"
    try:
        datastore = DatastoreClient.from_environment()
        found = [pool.cidr for version in (4, 6) for pool in datastore.readable_pools(version)[0] if pool.ipip]
    except CalicoError as error:
        return Check(name, False, f"not known: {error}", False, "fix that first")
    return Check(
        name,
        not found,
        f"{', '.join(found)}: this version's agents do not encapsulate in IP-in-IP" if found else "none",
        False,
        f"'calicoctl pool add {found[0] if found else 'CIDR'} --vxlan=cross-subnet' (or always) replaces it by VXLAN, "
        "without it, the network must have routes to the hosts' blocks",
    )


def _agent() -> int | None:
    with suppress(CalicoError):
        return process.running(hostname())
    return None


def _host() -> Iterator[Check]:
    try:
        host = hostname()
    except CalicoError as error:
        yield Check("host name", False, str(error), advice="set HOSTNAME")
        return
    yield Check("host name", True, host)
    pid = _agent()
    found = f"runs (process {pid})" if pid else "does not run"
    yield Check("host agent", pid is not None, found, False, "start it with 'calicoctl node'")
    if pid is not None:
        troubles = process.troubles(host)
        found = "; ".join(troubles) or "nothing"
        yield Check("what fails, says the host agent", not troubles, found, False, "see 'calicoctl status'")


def _mtu(reported: Any) -> Check:
    """Check the MTUs of endpoints' interfaces.

    `reported` is the field `mtu` of the agent's report. It is None if there is no report; then the check passes.
    """
    name = "MTU of containers' interfaces"
    if not isinstance(reported, dict):
        return Check(name, True, "not known: there is no report of a host agent", False)
    found = {link: _read(Path(f"/sys/class/net/{link}/mtu")) for _, link in socket.if_nameindex()}
    links = {link: int(mtu) for link, mtu in found.items() if link.startswith(INTERFACE_PREFIX) and mtu.isdigit()}
    return mtu_check(name, reported, links)


def mtu_check(name: str, reported: dict[str, Any], links: dict[str, int]) -> Check:
    """Check whether the host's network can carry packets as large as the MTUs of endpoints' interfaces.

    The configured MTU, if any, must not exceed the MTU of the underlay or of the overlay. The MTU of no interface may
    exceed the largest MTU of the underlay. `name` is the name of the check, `reported` the field `mtu` of the agent's
    report (see Health.mtu). `links` maps the names of the endpoints' interfaces to their MTUs.
    """
    underlay = [mtu for mtu in reported["underlay"].values() if mtu is not None]
    carried = [*underlay, *filter(None, [reported["overlay"]])]
    configured = reported["configured"]
    if not carried:
        return Check(name, True, "not known: this host is registered with no address of its interfaces", False)
    if configured is not None and configured > min(carried):
        text = f"new ones get {configured}, as configured, and {min(carried)} bytes can be carried to other hosts"
        return Check(name, False, text, False, f"'calicoctl config felix MTU {min(carried)}', or --remove")
    large = [link for link, mtu in links.items() if mtu > max(underlay)]
    if large:
        text = f"{first_few(sorted(large))}: larger than {max(underlay)}, which can be carried to other hosts"
        return Check(name, False, text, False, "restart these containers, so that they get new interfaces")
    return Check(name, True, f"at most {max(underlay)}, which can be carried to other hosts", False)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "not there"
