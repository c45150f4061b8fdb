"""Takes everything that the agent has put into the kernel out of it again, for `calicoctl node remove`.

Interfaces belong to the endpoints, and have gone with them; one that is left, its record gone, keeps nothing of ours.
"""

from __future__ import annotations

from calicoctl.felix import docker_firewall, process, sysctls
from calicoctl.felix.events import link_of
from calicoctl.felix.nft import Nft
from calicoctl.felix.routes import PREFIX, Routes
from calicoctl.felix.ruleset import remove_commands


def remove_all(host: str) -> None:
    """Remove routes, neighbours, firewall rules and tables, and put settings back; the agent must not run.

    The tables go last, so that nothing is forwarded that they would have dropped. Raises CalicoError.
    """
    with process.none_starts(host):
        _remove_from_kernel(host)
        for file in process.files(host):
            file.unlink(missing_ok=True)


def _remove_from_kernel(host: str) -> None:
    from pyroute2.iproute.linux import IPRoute

    with IPRoute() as netlink:
        links = [link for link in map(link_of, netlink.get_links()) if link.name.startswith(PREFIX)]
        routes = Routes(netlink)
        routes.read(links)
        for index in routes.indices():
            routes.clear(index)
    for link in links:
        sysctls.reset_interface(link.name)
    docker_firewall.remove()
    needed = set()
    if docker_firewall.engine_forwards(ipv6=False):
        needed.add(sysctls.IPV4_FORWARDING)
    if docker_firewall.engine_forwards(ipv6=True):
        needed.add(sysctls.IPV6_FORWARDING)
    sysctls.HostSettings(process.settings_file(host)).restore(lambda path: True, needed)
    Nft().run(remove_commands())
