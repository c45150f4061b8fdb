"""Removes what the agent has programmed into the kernel, and its files, for `calicoctl node remove`.

`calicoctl node remove` deletes endpoints and their interfaces before it calls `remove_all`. Other `cali…` interfaces
stay, but the agent's routes and neighbour entries on them are removed, and their sysctls are reset. Their packets stay
blocked, by the tables of workloads/guard.py.
"""

from __future__ import annotations

from collections.abc import Callable

from calicoctl import engine, iptables
from calicoctl.errors import DockerUnavailable
from calicoctl.felix import process
from calicoctl.felix.bgp.instance import Instance
from calicoctl.felix.dataplane import connection_limit, docker_firewall, sysctls
from calicoctl.felix.dataplane.links import list_links
from calicoctl.felix.dataplane.nft import Nft
from calicoctl.felix.dataplane.routes import Routes
from calicoctl.felix.dataplane.ruleset import remove_commands
from calicoctl.felix.dataplane.vxlan import Vxlan
from calicoctl.output import first_few
from calicoctl.workloads.guard import kept


def remove_all(host: str, warn: Callable[[str], None]) -> bool:
    """End BIRD, remove what the agent has programmed into the kernel, restore the original sysctls, and remove files.

    If the Docker Engine does not answer, forwarding stays enabled. `warn` is called with a sentence about that, and
    with a sentence if routes stay because of a foreign BIRD, that is, a BIRD that no agent here has started, or if
    `cali…` interfaces stay. Returns whether an agent of the host had left files below /run/calico, or if there were
    nftables tables to remove. Raises CalicoError, also if the host's agent, or another agent in this network namespace,
    runs.
    """
    with kept() as tables:
        found = tables.exists() or any(file.exists() for file in process.leftovers(host))
    with process.none_starts(host):
        Instance(host).remove(warn)
        _remove_from_kernel(host, warn)
        for file in process.leftovers(host):
            file.unlink(missing_ok=True)
    return found


def remove_former_bird(host: str, warn: Callable[[str], None]) -> bool:
    """End the BIRD of `host`, a former name of this host, and remove that BIRD's routes.

    Returns whether that BIRD was running in this network namespace, or had run in it in this boot. If routes stay
    because of a foreign BIRD (see `remove_all`), `warn` is called with a sentence about that. Raises CalicoError, also
    if an agent runs in this network namespace.
    """
    bird = Instance(host)
    if not bird.is_here():
        return False
    with process.none_starts(host):
        return bird.remove(warn)


def _remove_from_kernel(host: str, warn: Callable[[str], None]) -> None:
    from pyroute2.iproute.linux import IPRoute

    with IPRoute() as netlink:
        links = list(list_links())
        routes = Routes(netlink)
        routes.read(links)
        for index in routes.indices():
            routes.clear(index)
        vxlan = Vxlan(netlink)
        vxlan.read()
        vxlan.apply_routes(())
        for version in vxlan.versions():
            vxlan.remove_device(version)
    for link in links:
        sysctls.reset_interface(link.name)
    docker_firewall.remove()
    sysctls.HostSettings(process.settings_file(host)).restore(lambda path: True, _needed_by_engine(warn))
    # last, so that the tables drop what policy denies until then
    left = [link.name for link in list_links()]
    if not left or iptables.old_felix_chains():  # Felix of 2015 has rules of its own for its interfaces
        Nft().run(remove_commands() + connection_limit.REMOVE)
        return
    with kept() as tables:
        tables.replace()
    Nft().run(connection_limit.REMOVE)
    warn(
        f"Warning: there are interfaces without an endpoint ({first_few(sorted(left))}). They stay, and so do nftables "
        "tables that drop their packets. When they are gone, 'calicoctl node remove' removes these tables as well."
    )


def _needed_by_engine(warn: Callable[[str], None]) -> set[str]:
    """Return which of IPV4_FORWARDING and IPV6_FORWARDING (paths of sysctls) a Docker Engine on this host needs.

    Return an empty set if no engine runs. If an engine does not answer, return both, and call `warn` with a sentence
    about that.
    """
    settings = {sysctls.IPV4_FORWARDING: False, sysctls.IPV6_FORWARDING: True}
    try:
        return {path for path, ipv6 in settings.items() if engine.forwards(ipv6)}
    except DockerUnavailable as error:
        warn(f"Warning: {error} Forwarding stays enabled, since that engine may need it.")
        return set(settings)
