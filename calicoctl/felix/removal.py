"""Takes everything that the agent has put into the kernel out of it again, for `calicoctl node remove`.

Interfaces are not touched: they belong to the endpoints, and have gone with them.
"""

from __future__ import annotations

from calicoctl.errors import CalicoError
from calicoctl.felix import docker_firewall, process, sysctls
from calicoctl.felix.events import link_of
from calicoctl.felix.nft import Nft
from calicoctl.felix.routes import PREFIX, Routes
from calicoctl.felix.ruleset import remove_commands


def remove_all(host: str) -> None:
    """Remove routes, neighbours, firewall rules and tables, and put settings back; the agent must not run.

    The tables go last, so that nothing is forwarded that they would have dropped. Raises CalicoError.
    """
    from pyroute2.iproute.linux import IPRoute

    with IPRoute() as netlink:
        links = [link_of(message) for message in netlink.get_links()]
        routes = Routes(netlink)
        routes.read([link for link in links if link.name.startswith(PREFIX)])
        for index in routes.indices():
            routes.clear(index)
    docker_firewall.remove()
    needed = set()
    if _docker_needs(ipv6=False):
        needed.add(sysctls.IPV4_FORWARDING)
    if _docker_needs(ipv6=True):
        needed.add(sysctls.IPV6_FORWARDING)
    sysctls.HostSettings(process.settings_file(host)).restore(lambda path: True, needed)
    Nft().run(remove_commands())
    for file in process.files(host):
        file.unlink(missing_ok=True)


def _docker_needs(ipv6: bool) -> bool:
    """Tell whether a Docker Engine runs here that forwards for networks of its own."""
    from docker.api.client import APIClient
    from docker.errors import DockerException
    from docker.utils import kwargs_from_env
    from requests.exceptions import RequestException

    try:
        with APIClient(timeout=5, **kwargs_from_env()) as docker:
            networks = docker.networks()
    except (DockerException, RequestException, OSError, CalicoError):
        return False
    of_its_own = [network for network in networks if network.get("Driver") not in ("host", "null")]
    return any(network.get("EnableIPv6") for network in of_its_own) if ipv6 else bool(of_its_own)
