"""Register this host, and run the host agent.

Usage:
  calicoctl node [--ip=<IP>] [--ip6=<IP6>] [--as=<AS_NUM>] [--log-dir=<DIR>]
      [--detach=<DETACH>] [--bgp=<BGP>] [--local-etcd] [--docker-hook]
      [--libnetwork] [--metrics-port=<PORT>] [--force]
  calicoctl node restart
  calicoctl node stop [--force]
  calicoctl node remove [--hostname=<HOST>] [--remove-endpoints] [--force]
  calicoctl node remove --docker-hook
  calicoctl node show [--output=<FORMAT>]
  calicoctl node bgp peer add <PEER_IP> as <AS_NUM>
  calicoctl node bgp peer remove <PEER_IP>
  calicoctl node bgp peer show [--ipv4 | --ipv6] [--output=<FORMAT>]

Options:
  --ip=<IP>              the IPv4 address that other hosts reach this host
                         under, and that its workloads use as next hop;
                         default: the one that the host's default route uses
  --ip6=<IP6>            the same for IPv6; default: none, and workloads here
                         get no IPv6
  --as=<AS_NUM>          this host's AS number, as 64512 or as 0.64512, where
                         it is not the global one. A change resets its BGP
                         sessions, which have no routes for about a second
  --log-dir=<DIR>        where the agent logs to, in felix.log; default:
                         /var/log/calico, and standard error when it does not
                         detach
  --detach=<DETACH>      true: run the agent in the background, and return
                         when it has applied the desired state (the default);
                         false: run it in the foreground (for systemd)
  --bgp=<BGP>            on: run BIRD, which tells other hosts the routes to
                         this host's workloads, and learns theirs (the
                         default); off: do without, and end a BIRD that an
                         earlier agent has started
  --local-etcd           also run an etcd on this host's loopback interface,
                         with its data in /var/lib/calico/etcd, and write its
                         address to /etc/calico/node.env for all commands: for
                         a single host without an etcd. It listens on port
                         2379 or, if that is in use, on another one
  --docker-hook          have Docker connect containers with labels before
                         they run their first instruction, by a runtime of
                         ours in its configuration (daemon.json); for
                         `remove`: remove that again, and nothing else
  --libnetwork           also run the process that serves Docker networks, for
                         'docker network create --driver calico --ipam-driver
                         calico-ipam NAME'; calico-docker.socket of systemd
                         does that instead, from before Docker starts
  --metrics-port=<PORT>  serve metrics for Prometheus on this port of
                         127.0.0.1; default: none
  --force                register even if another host has the address or an
                         agent on another machine has this host's name, and
                         take over the name; stop even if endpoints are
                         active; remove even if an agent on another machine
                         has the name
  --hostname=<HOST>      remove that host, which no longer exists, instead of
                         this one
  <PEER_IP>              the address of a router
  <AS_NUM>               its AS number, as 64512 or as 0.64512
  --ipv4, --ipv6         show IPv4, or IPv6, peers only
  -o, --output=<FORMAT>  json or yaml: an array, of the peers as they stand
                         in etcd, or of the hosts; default: a table
  --remove-endpoints     remove the host's endpoints, too; without it, a host
                         that has some is not removed

An address or AS number that is not given is removed if an earlier call set
it. Registering the first host also writes the global configuration and the
default pools (192.168.0.0/16 and fd80:24e2:f998:72d6::/64). A warning names
pools that overlap a network of this host (see calicoctl pool --help).

A host's name and addresses are unique. An address of another registered host
is refused: if that is this host's former name, keep using it (HOSTNAME=OLD),
or remove it from etcd (node remove --hostname=OLD). A name whose agent is
alive on another machine is refused, too. If it is unknown which machine the
agent was on, for example after a reboot of this one, `node` waits until its
heartbeat expires, 35 s at most. --force takes over the name with its
endpoints: those whose workloads are not on this machine become inactive, and
containers' are removed a minute later. The other agent notices, and changes
neither records nor packets until `calicoctl node` on its machine takes the
name back.

`restart` replaces the agent in the background with one of this version, with
the options and the environment that it was started with.
`stop` stops the agent, the local etcd and the process for Docker networks;
the data plane and BIRD stay, and packets are routed and filtered as before.
`remove` stops the agent and BIRD, whose peers withdraw this host's routes,
and removes everything that they have set up from the kernel, the host from
etcd, and the local etcd's line from /etc/calico/node.env. `bgp peer` is about
peers of this host only; for global peers, and for passwords, see calicoctl
bgp --help. All commands but `bgp` and `show` must be run as root.

`show` lists all hosts that etcd knows, whether their agents are alive, and
how many endpoints they have. The agent of a host is `up`, `starting` until it
has applied the desired state, or `down`; then, the status of its endpoints is
unknown. JSON: name, ipv4, ipv6, as_num, agent, reported (when the status of
an agent that is alive was written; with etcd's v3 API, that is not renewed),
and endpoints, counted as up, down, error and unknown.

Examples:
  sudo calicoctl node --ip=192.0.2.2
  calicoctl node show
  sudo calicoctl node --ip=192.0.2.2 --local-etcd
  sudo calicoctl node remove --remove-endpoints
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from calicoctl import engine, netlink
from calicoctl.addresses import (
    FAMILIES,
    check_unicast,
    number_of,
    parse_address,
    parse_as_number,
    parse_port,
    version_of,
)
from calicoctl.commands import bgp
from calicoctl.commands.pool import readable_pools, warn_of_overlaps
from calicoctl.datastore import keys, last_api, last_known, recent_blocks, slow_members, tokens
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.hosts import hostname
from calicoctl.datastore.reserved import HostNetwork, Network
from calicoctl.datastore.store import Entry
from calicoctl.environment import EnvironmentFile
from calicoctl.errors import CalicoError, DockerUnavailable, Frozen, NotFound, StoreError, about, printable
from calicoctl.felix import heartbeat, kept_addresses, local_etcd, plugin_process, process
from calicoctl.felix.bgp.instance import Instance
from calicoctl.felix.dataplane.sysctls import HostSettings
from calicoctl.felix.local_etcd import LocalEtcd
from calicoctl.felix.plugin_process import PluginProcess
from calicoctl.grammar import Prepared, parse, require_root
from calicoctl.netlink import OUR_PROTOCOLS
from calicoctl.output import data_format, print_data, print_table, quantity, warn
from calicoctl.workloads import connected, docker_hook, docker_networks, libnetwork, locks, network_profiles

AT_ONCE = 8
"""How many workloads `node remove` disconnects at a time."""


def prepare(argv: list[str]) -> Prepared:
    arguments = parse(str(__doc__), argv)
    if arguments["bgp"]:
        return bgp.prepare_peers(arguments, of_this_host=True)
    if arguments["show"]:
        return partial(_show, data_format(arguments))
    require_root()
    if arguments["remove"] and arguments["--docker-hook"]:
        return _remove_hook
    if arguments["stop"]:
        return partial(_stop, arguments["--force"])
    if arguments["restart"]:
        return _restart
    if arguments["remove"]:
        other = arguments["--hostname"]
        if other is not None and not keys.can_be_part(other):  # other tools may have registered odd names
            raise NotFound(f"Host '{other}' is not registered: none can have this name.")
        return partial(_remove, arguments["--hostname"], arguments["--remove-endpoints"], arguments["--force"])
    given = {
        version: _host_address(arguments[option], version, option) for version, option in ((4, "--ip"), (6, "--ip6"))
    }
    with about("--as"):
        as_num = None if arguments["--as"] is None else parse_as_number(arguments["--as"])
    if arguments["--detach"] not in (None, "true", "false"):
        raise CalicoError(f"--detach={arguments['--detach']}: it must be true or false")
    if arguments["--bgp"] not in (None, "on", "off"):
        raise CalicoError(f"--bgp={arguments['--bgp']}: it must be on or off")
    text = arguments["--metrics-port"]
    port = None if text is None else parse_port(text, "--metrics-port")
    return partial(_start, given, as_num, port, arguments)


def _start(
    given: dict[int, str | None], as_num: str | None, metrics_port: int | None, arguments: dict[str, Any]
) -> None:
    in_background = arguments["--detach"] != "false"
    log_dir = _absolute(arguments["--log-dir"], process.DEFAULT_LOG_DIR if in_background else None)
    options = process.Options(
        log_dir, metrics_port, arguments["--local-etcd"], arguments["--bgp"] != "off", arguments["--libnetwork"]
    )
    host = DatastoreClient.from_environment().host

    from calicoctl.workloads import host_network

    detected, every = host_network.detect()
    ipv4 = given[4] or detected[4]
    if ipv4 is None and given[6] is None:
        raise CalicoError("No IPv4 address of this host could be detected. Say which one to use with --ip.")
    process.refuse_other(host)
    with ExitStack() as undo:
        announced: AbstractContextManager[bool] = nullcontext(False)
        if options.local_etcd:
            etcd, started = _started_etcd(host, log_dir or process.DEFAULT_LOG_DIR)
            if started or not in_background:
                undo.callback(_stop_local_etcd_without_agent, host)
            announced = etcd.announced()
        datastore = DatastoreClient.from_environment()
        _free_members(datastore)
        choice = datastore.choice()
        if choice is not None:
            last_api.refuse_other(host, datastore.members, choice)
            last_api.remember(host, datastore.members, choice)  # before anything else is kept of the host
        if not arguments["--force"]:
            _refuse_taken(datastore, ipv4, given[6])
        claimed = heartbeat.claim(datastore, arguments["--force"], _own_agent_writes(host), warn)
        with _claim_released_on_failure(datastore, claimed), announced as written:
            if log_dir is not None:
                _make(log_dir)
            if written:
                print(f"All commands find it through {EnvironmentFile().path}.")
            _register(datastore, ipv4, given, every, as_num)
            _refresh_hook(host)
            if arguments["--docker-hook"]:
                _set_hook_up(host)
            if options.libnetwork:
                _start_plugins(host, log_dir or process.DEFAULT_LOG_DIR)
            if in_background:
                _start_agent(host, options)
                undo.pop_all()
                for failure in process.troubles(host):
                    warn(f"Warning: {failure}.")
            else:
                from calicoctl.felix import agent

                agent.run(host, options)
    if not in_background:
        process.leave(0)


def _free_members(datastore: DatastoreClient) -> None:
    """Remove the routes and nftables map elements of an earlier agent that keep this host from reaching its etcd.

    Prints a warning for each removal. See lifeline.py.
    """
    from calicoctl.workloads import servers

    # a new agent needs etcd to start, so it could not remove them itself
    known = servers.current(datastore.members)
    freed = _free(HostNetwork().with_servers(known))
    if freed and known.unknown:  # now that DNS works again
        _free(HostNetwork().with_servers(servers.current(datastore.members)))


def _free(network: HostNetwork) -> bool:
    """Do what `_free_members` does, for the servers in `network`. Return whether anything was removed.

    Stops without an error if the kernel refuses a request.
    """
    from calicoctl.felix.dataplane.lifeline import let_members_pass, take_back_blocks, take_back_routes
    from calicoctl.felix.dataplane.nft import Nft

    removed: list[str] = []
    with suppress(CalicoError, OSError):  # the agent says later what is wrong with the kernel
        removed += let_members_pass(network, Nft())
        routed = [
            Network.of(route.destination, route.length)
            for family in FAMILIES.values()
            for protocol in OUR_PROTOCOLS
            for route in netlink.routes(family, protocol=protocol)
            if route.destination is not None
        ]
        if any(one.has(version_of(a), number_of(a)) for one in routed for a in network.servers.vital):
            from pyroute2.iproute.linux import IPRoute

            from calicoctl.felix.dataplane.routes import Routes
            from calicoctl.felix.dataplane.vxlan import Vxlan

            with IPRoute() as driver:
                routes, vxlan = Routes(driver), Vxlan(driver)
                routes.read(())
                vxlan.read()
                removed += take_back_routes(network, routes)
                removed += take_back_blocks(network, vxlan)
    for said in removed:
        warn(f"Warning: {said}.")
    return bool(removed)


def _refuse_taken(datastore: DatastoreClient, *addresses: str | None) -> None:
    """Raise CalicoError if another registered host has one of `addresses`; None in `addresses` is ignored."""
    hosts = datastore.hosts.addresses_of_others()
    for address in addresses:
        other = hosts.get(str(parse_address(address))) if address is not None else None
        if other is not None:
            raise CalicoError(
                f"{address} is the address of host {other}, which is registered, too. If that is this host's former "
                f"name, keep using it with 'HOSTNAME={other} calicoctl node', or remove it from etcd first with "
                f"'calicoctl node remove --hostname={other}'; --force registers {datastore.host} with that address "
                "nevertheless."
            )


def _own_agent_writes(host: str) -> bool:
    """Return whether the agent of `host` runs on this machine, and does not report that another one has replaced it."""
    return process.running(host) is not None and not (process.report(host) or {}).get("replaced")


@contextmanager
def _claim_released_on_failure(datastore: DatastoreClient, claimed: Entry | None) -> Iterator[None]:
    """If the body of `with` raises an exception, delete the host's status that heartbeat.claim has written, `claimed`.

    A status that was written since then is not deleted. If `claimed` is None, nothing is deleted.
    """
    try:
        yield
    except BaseException:
        with suppress(StoreError):  # the claim expires anyway
            if claimed is not None:
                datastore.statuses.remove_host(claimed)
        raise


def _register(
    datastore: DatastoreClient, ipv4: str | None, given: dict[int, str | None], every: set[str], as_num: str | None
) -> None:
    """Register this host, print its addresses, and warn about likely mistakes.

    `ipv4` is the IPv4 address to register, from the options or detected. `given` maps an IP version to the address in
    the options (None: not given). `every` contains all addresses of this host's interfaces. If the store is frozen and
    this host is already registered, its registration is not changed, and a warning is printed. If the store is frozen
    and this host is not registered, raises Frozen.
    """
    registered = datastore.hosts.is_registered()
    if not registered:  # no older version has connected a workload here: see learning.py
        connected.set_first(datastore.host)
    # a frozen store must not keep the agent, or a local etcd, from starting
    try:
        datastore.hosts.register(ipv4, given[6], as_num)
    except Frozen as error:
        if not registered:
            raise
        warn(f"Warning: {error}. Host {datastore.host} stays registered as it is.")
        return
    for address in filter(None, given.values()):
        if address not in every:
            warn(f"Warning: {address} is not an address of this host, as far as can be seen.")
    for address in filter(None, (ipv4, given[6])):
        if datastore.ipam.owner(parse_address(address)) is not None:
            warn(
                f"Warning: {address} is assigned to a container (see 'calicoctl ipam info {address}'), whose endpoint "
                "is in error until one of the two has another address."
            )
    warn_of_overlaps(pool.cidr for version in (4, 6) for pool in readable_pools(datastore, version))
    if ipv4 is not None and given[4] is None:
        print(f"Detected IPv4 address {ipv4}.")
    addresses = " and ".join(address for address in (ipv4, given[6]) if address)
    print(f"Host {datastore.host} is registered with {addresses}.", flush=True)


def _start_agent(host: str, options: process.Options) -> None:
    """Start the host's agent in the background, unless it is already running.

    If it is, prints a warning for each option that has no effect on the running agent, and raises CalicoError if that
    agent keeps reporting that another agent has replaced it. Also raises CalicoError if the agent cannot be started.
    """
    pid = process.running(host)
    if not pid:
        print(f"The host agent is running (process {process.start(host, options)}).")
        return
    print(f"The host agent is running already (process {pid}).")
    give_up = time.monotonic() + heartbeat.YIELD_PATIENCE
    while why := (process.report(host) or {}).get("replaced"):  # until it notices that the name has been claimed
        if time.monotonic() > give_up:
            raise CalicoError(str(why))
        time.sleep(heartbeat.POLL_INTERVAL)  # the agent replaces the file of its report whenever something changes
    older = process.without_bgp(process.report(host))
    if older is not None and options.bgp:
        warn(f"Warning: {older}.")
    if (process.report(host) or {}).get("bgp", options.bgp) != options.bgp:
        warn(
            f"Warning: --bgp={'on' if options.bgp else 'off'} has no effect on it. Stop it with 'calicoctl node stop "
            "--force', which interrupts no traffic, and repeat this."
        )
    if options.metrics_port not in (None, (process.report(host) or {}).get("metrics_port")):
        warn(
            "Warning: --metrics-port has no effect on it. Stop it with 'calicoctl node stop --force', which interrupts "
            "no traffic, and repeat this."
        )


def _started_etcd(host: str, log_dir: str) -> tuple[LocalEtcd, bool]:
    """Start the local etcd, unless it is running. Return the LocalEtcd, and whether this call has started it.

    Raises CalicoError if it cannot be started, if the settings file names another store, or if the running agent would
    not supervise it.
    """
    pid = process.running(host)
    if pid and (process.report(host) or {}).get("local_etcd") is False:
        raise CalicoError(
            f"The host agent (process {pid}) was started without --local-etcd, and would not supervise an etcd. "
            "Stop it with 'calicoctl node stop --force', which interrupts no traffic, and repeat this."
        )
    etcd = LocalEtcd(host, log_dir)
    etcd.refuse_other_settings()
    started = etcd.start(stay=pid is not None)
    if started:
        print(f"A local etcd is running at {etcd.url}.")
    return etcd, started


def _set_hook_up(host: str) -> None:
    done = docker_hook.set_up(host)
    print("Docker's hook is set up." if done else "Docker's hook is set up already.")


def _remove_hook() -> None:
    if docker_hook.settings() is None:
        raise NotFound("Docker's hook is not set up.")
    left = docker_hook.remove()
    print("Docker's hook is removed.")
    if left is not None:
        warn(f"Warning: {left}.")


def _start_plugins(host: str, log_dir: str) -> None:
    """Start this host's process for Docker networks, unless it runs.

    If another process serves them, prints a warning, and stops this host's process, if it runs, instead. Raises
    CalicoError if it cannot be started, or if the running agent would not supervise it.
    """
    if plugin_process.served_elsewhere():
        warn(
            "Warning: Docker networks are served by another process, such as calico-docker.service: --libnetwork has "
            "no effect while it is."
        )
        plugin_process.stop(host)  # Docker does not reach it any more, and it keeps that one from serving
        return
    pid = process.running(host)
    if pid and not (process.report(host) or {}).get("libnetwork"):
        raise CalicoError(
            f"The host agent (process {pid}) was started without --libnetwork, and would not supervise the process for "
            "Docker networks. Stop it with 'calicoctl node stop --force', which interrupts no traffic, and repeat this."
        )
    if PluginProcess(host, log_dir).start():
        print(f"Docker networks are served (process {plugin_process.running(host)}).")


def _refresh_hook(host: str) -> None:
    try:
        docker_hook.refresh(host)
    except CalicoError as error:  # which must not keep the agent from starting
        warn(f"Warning: {error}.")


def _restart() -> None:
    _refresh_hook(hostname())
    why = (process.report(hostname()) or {}).get("replaced")
    # a new agent would take over the name as soon as the other agent's heartbeat expires
    if why and process.running(hostname()):
        raise CalicoError(f"{why}. It is not restarted.")
    print(f"The host agent is restarted (process {process.restart(hostname())}).")
    if (process.report(hostname()) or {}).get("libnetwork"):
        plugin_process.await_replacement(hostname())


def _stop_local_etcd_without_agent(host: str) -> None:
    """Stop the local etcd, unless this host's agent runs in another process, since it may supervise the local etcd."""
    if process.running(host) in (None, os.getpid()):
        local_etcd.stop(host)


def _stop(force: bool) -> None:
    host = hostname()
    runs = process.running(host) or local_etcd.running(host) or plugin_process.running(host)
    if runs and not force:
        try:
            endpoints, _ = DatastoreClient.from_environment().readable_endpoints(host)
            active = [endpoint for endpoint in endpoints if endpoint.state == "active"]
        except StoreError as error:
            raise CalicoError(f"It is unknown whether endpoints are active; stop with --force. {error}") from None
        if active:
            there = "There is" if len(active) == 1 else "There are"
            raise CalicoError(
                f"{there} {quantity(len(active), 'active endpoint')} on {host}, which no agent would manage. Remove "
                "what is connected, or stop with --force: it stays connected as it is."
            )
    stopped = process.stop(host)
    plugins_stopped = plugin_process.stop(host)
    instance = Instance(host)
    bird = instance.find()
    etcd_stopped = local_etcd.stop(host)
    if stopped:
        print(f"The host agent (process {stopped}) has ended; the data plane stays.")
    if bird is not None and (stopped or etcd_stopped):
        print(f"BIRD (process {bird}) keeps running, with its routes; 'calicoctl node' takes it over.")
    if plugins_stopped:
        print(f"The process for Docker networks (process {plugins_stopped}) has ended.")
    if etcd_stopped:
        print("The local etcd has ended.")
    if not (stopped or plugins_stopped or etcd_stopped):
        raise NotFound("The host agent is not running.")


def _remove(other: str | None, remove_endpoints: bool, force: bool) -> None:
    host = hostname()
    this_one = other in (None, host)
    with ExitStack() as stack:
        if this_one:
            process.refuse_other(host)
            etcd = _local_etcd(host)
            reported = (process.report(host) or {}).get("local_etcd")
            had_local_etcd = reported is True or local_etcd.running(host) is not None
            # after a reboot there is no report, but the data may exist
            if etcd is not None and reported is not False:
                stack.enter_context(etcd.borrowed())
        datastore = DatastoreClient.from_environment().for_host(other or host)
        if not force:
            _refuse_alive(datastore, this_one)
        ids = datastore.endpoint_ids()
        if ids and not remove_endpoints:
            raise CalicoError(
                f"Host {datastore.host} has {quantity(len(ids), 'endpoint')}. Remove what is connected first, or "
                "use --remove-endpoints."
            )
        if this_one:
            datastore.hosts.check_writable()
            # raise for damaged files before anything is changed
            HostSettings(process.settings_file(host))
            docker_hook.settings()
        # some workloads may have no endpoint: interrupted commands have left their addresses or locks
        workloads = {(id.orchestrator, id.workload) for id in ids} | datastore.ipam.workloads()
        if this_one:
            for orchestrator in connected.ORCHESTRATORS:
                left = {*locks.interrupted(host, orchestrator), *connected.every(host, orchestrator)}
                workloads |= {(orchestrator, id) for id in left}
        if this_one:
            plugin_process.stop(host)
        disconnected = _disconnect(datastore.host, workloads)
        for handle in datastore.ipam.handles.names():
            if handle.startswith(libnetwork.requests_of(datastore.host)):
                datastore.ipam.release_by_handle(handle)
        from calicoctl.felix.removal import remove_all, remove_former_bird

        if this_one:
            process.stop(host)
            plugin_process.stop(host)  # the agent may have started it again
            ran = remove_all(host, warn)
        else:
            ran = remove_former_bird(datastore.host, warn)
        registered = datastore.hosts.unregister()
    if this_one:
        if docker_hook.settings() is not None:
            _remove_hook()
        local_etcd.stop(host)
        local_etcd.unannounce(had_local_etcd)
        tokens.forget()
        slow_members.forget()
        recent_blocks.forget()
    process.remove_directory(datastore.host, patience=1)
    last_known.forget(datastore.host)
    last_api.forget(datastore.host)
    kept_addresses.write(datastore.host, ())
    connected.forget_all(datastore.host)
    libnetwork.forget_networks(datastore.host)
    network_profiles.forget_all(datastore.host)
    if not registered and not disconnected and not ran:
        raise NotFound(f"Host {datastore.host} is not registered.")
    if registered:
        print(f"Host {datastore.host} is removed.")
    else:
        print(f"Host {datastore.host} was not registered; what it had left here is removed.")
    if this_one:
        _warn_of_networks()


def _warn_of_networks() -> None:
    """Print a warning if Docker still has networks with Calico's driver."""
    with suppress(DockerUnavailable):
        listed = engine.networks() if engine.may_be_there() else []
        names = sorted(network["Name"] for network in listed if network["Driver"] == docker_networks.DRIVER)
        if names:
            warn(
                f"Warning: Docker still has networks with Calico's driver, whose containers do not start any more: "
                f"{', '.join(names)}. 'docker network rm' removes a network while its driver is served: before this "
                "command, or after 'calicoctl node --libnetwork'."
            )


def _show(form: str | None) -> None:
    hosts = DatastoreClient.from_environment().hosts.summaries()
    if form:
        print_data([asdict(host) for host in hosts], form)
        return
    rows = [[h.name, h.ipv4, h.ipv6, h.as_num, h.agent, _counted(h.endpoints)] for h in hosts]
    print_table(["Host", "IPv4", "IPv6", "AS number", "Agent", "Endpoints"], rows)


def _counted(endpoints: dict[str, int]) -> str:
    """Return the table cell for `endpoints`, which maps a status to the number of endpoints that have it.

    The cell contains the total and, in parentheses, the number for each status except `up`, if it is not 0.
    """
    others = [f"{number} {state}" for state, number in endpoints.items() if number and state != "up"]
    total = str(sum(endpoints.values()))
    return f"{total} ({', '.join(others)})" if others else total


def _refuse_alive(datastore: DatastoreClient, this_one: bool) -> None:
    """Raise CalicoError if an agent of the host is alive.

    The host is that of `datastore`; `this_one` says that it is this machine's own. An agent on this machine is then
    ignored, since the command is about to stop it.
    """
    host = datastore.host
    pid = process.running(host)
    if pid is not None and not this_one:
        raise CalicoError(
            f"The agent of host {host} runs on this machine (process {pid}): 'HOSTNAME={host} calicoctl node remove' "
            "ends it and removes the host."
        )
    status = datastore.statuses.of_host()
    who = (
        heartbeat.other_writer(datastore, status, this_one and _own_agent_writes(host)) if status is not None else None
    )
    if who is not None:
        raise CalicoError(
            f"{who} reports for host {host}, so the host is not gone. End that agent first; its last report expires "
            f"within {heartbeat.TIME_TO_LIVE} s. --force removes the host nevertheless."
        )


def _disconnect(host: str, workloads: set[tuple[str, str]]) -> bool:
    """Disconnect workloads of a host, given as (orchestrator, id). Return whether any of them was connected."""
    from calicoctl.workloads.disconnecting import disconnect_all

    found: list[str] = []

    def report(id: str) -> None:
        found.append(id)
        print(f"Removed Calico from {printable(id)}")

    clients = [DatastoreClient.from_environment(shared=False).for_host(host) for _ in range(AT_ONCE)]
    disconnect_all(clients, workloads, report)
    return bool(found)


def _local_etcd(host: str) -> LocalEtcd | None:
    try:
        return LocalEtcd(host, process.DEFAULT_LOG_DIR)
    except CalicoError:
        return None  # the environment names another store


def _absolute(log_dir: str | None, default: str | None) -> str | None:
    """Return the absolute path of `log_dir` or, if that is None, of `default`. Return None if both are None.

    Raises CalicoError if `log_dir` is empty.
    """
    if log_dir is None:
        log_dir = default
    if log_dir is None:
        return None
    if not log_dir:
        raise CalicoError("--log-dir: it must be a directory, and is empty")
    return str(Path(log_dir).absolute())


def _make(log_dir: str) -> None:
    try:
        Path(log_dir).mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise CalicoError(f"--log-dir={log_dir}: it cannot be created: {error.strerror}") from None


def _host_address(text: str | None, version: int, option: str) -> str | None:
    """Return the address `text`, the value of an option, in canonical form; None if `text` is None.

    Raises CalicoError unless it is a unicast address of this IP version.
    """
    if text is None:
        return None
    with about(option):
        address = parse_address(text)
        if address.version != version:
            raise CalicoError(f"{text} is not an IPv{version} address")
        check_unicast(address)
    return str(address)
