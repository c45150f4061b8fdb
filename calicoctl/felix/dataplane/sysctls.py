"""The driver of sysctls (/proc/sys/net), both for endpoints' interfaces and for the whole host.

The original values of host-wide sysctls are written to a file before the agent changes them. Like the sysctls, the file
does not survive a reboot.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Collection
from pathlib import Path

from calicoctl import engine, files
from calicoctl.datastore.keys import INTERFACE_PREFIX
from calicoctl.errors import CalicoError, is_shortage
from calicoctl.workloads.netns import HOST_END_IPV6

ROOT = Path("/proc/sys/net")

IPV4_FORWARDING = "ipv4/ip_forward"
IPV6_FORWARDING = "ipv6/conf/all/forwarding"


_SETTING = re.compile(
    r"ipv4/ip_forward|ipv4/conf/all/accept_redirects|ipv[46]/conf/(?!\.\.?/)[^/]+/forwarding"
    r"|ipv6/conf/(?!\.\.?/)[^/]+/accept_ra"
)


def interface_settings(interface: str, ipv6: bool) -> dict[str, str]:
    """Return the sysctls for the host end of an endpoint's veth pair: values by path below /proc/sys/net.

    `ipv6` says whether the endpoint has an IPv6 address. Source: the kernel's Documentation/networking/ip-sysctl.rst.
    """
    settings = {
        f"ipv4/conf/{interface}/proxy_arp": "1",
        f"ipv4/neigh/{interface}/proxy_delay": "0",
        f"ipv4/conf/{interface}/route_localnet": "0",
        f"ipv4/conf/{interface}/rp_filter": "1",
        # the rules see such a packet with the address of its first stop, and those of the connection to that
        f"ipv4/conf/{interface}/accept_source_route": "0",
    }
    if ipv6:
        settings[f"ipv6/conf/{interface}/disable_ipv6"] = "0"
    if (ROOT / "ipv6/conf" / interface).exists():
        settings |= {
            **{f"ipv6/conf/{interface}/{name}": value for name, value in HOST_END_IPV6.items()},
            # a host answers a neighbour solicitation only for an address of the receiving interface; proxy_delay would
            # delay the answer by up to 0.8 s
            f"ipv6/conf/{interface}/proxy_ndp": "1",
            f"ipv6/neigh/{interface}/proxy_delay": "0",
        }
    return settings


def reset_interface(interface: str) -> None:
    """Set the sysctls of an interface to the kernel's defaults for new interfaces (`…/default/…`).

    Raises CalicoError.
    """
    for path in interface_settings(interface, True):
        default = read(path.replace(f"/{interface}/", "/default/"))
        if default is not None and read(path) is not None:
            write(path, default)


def read(path: str) -> str | None:
    """Return the value of the sysctl `path` (below /proc/sys/net); None if it does not exist or cannot be read.

    Raises CalicoError if this process lacks file descriptors or memory.
    """
    try:
        return (ROOT / path).read_text().strip()
    except OSError as error:
        if is_shortage(error):
            raise CalicoError(f"the kernel setting net/{path} cannot be read: {error.strerror}") from error
        return None


def write(path: str, value: str) -> None:
    """Write a sysctl, unless it has that value already. Raises CalicoError."""
    if read(path) == value:
        return
    try:
        (ROOT / path).write_text(value)
    except OSError as error:
        raise CalicoError(f"the kernel setting net/{path} cannot be set to {value}: {error.strerror}") from None


def _is_sound(found: object) -> bool:
    return isinstance(found, dict) and all(
        _SETTING.fullmatch(path) and isinstance(values, list) and list(map(type, values)) == [str, str]
        for path, values in found.items()
    )


class HostSettings:
    """The host-wide sysctls that the agent changes, and the file with their original values.

    The constructor raises CalicoError if the file exists, but is invalid or cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._found: dict[str, list[str]] = {}
        """Path -> two values: the original value, and the value that `restore` replaces by the original one. The second
        one is the value that the agent has set. For a path that changes with forwarding, it is the value that the
        kernel sets when forwarding is disabled.
        """
        self._kept = True
        """Whether all of `_found` is in the file."""
        try:
            self._found = json.loads(file.read_text())
            if not _is_sound(self._found):
                raise ValueError("it does not hold what an agent writes")
        except FileNotFoundError:
            pass
        except (OSError, ValueError, RecursionError) as error:
            raise CalicoError(f"{file} cannot be read: {error}; remove it") from None

    def forward(self, ipv6: bool) -> None:
        """Make this host forward IPv4 and, if `ipv6` is True, IPv6.

        The host keeps the routes that it has learned from router advertisements. If `ipv6` is False, and the agent has
        enabled IPv6 forwarding before, the original IPv6 settings are restored. But if the Docker Engine needs IPv6
        forwarding, forwarding stays enabled. Raises CalicoError, also if the Docker Engine does not answer.
        """
        self._switch_on(IPV4_FORWARDING)
        if not ipv6:
            if IPV6_FORWARDING in self._found:
                needed = {IPV6_FORWARDING} if engine.forwards(ipv6=True) else set()
                self.restore(lambda path: path.startswith("ipv6/"), needed)
        elif read(IPV6_FORWARDING) != "1" or IPV6_FORWARDING in self._found:
            # a host that forwards ignores router advertisements unless this is 2; interfaces are added later, too
            for _, name in socket.if_nameindex():
                path = f"ipv6/conf/{name}/accept_ra"
                if not name.startswith(INTERFACE_PREFIX) and read(path) == "1":
                    self._set(path, "2")
            self._switch_on(IPV6_FORWARDING)

    def restore(self, chosen: Callable[[str], bool], needed: Collection[str] = ()) -> None:
        """Restore the sysctls for whose path `chosen` returns True to their original values.

        A sysctl keeps its present value if its path is in `needed`, or if another process has changed it since the
        agent set it. If `needed` contains IPv6 forwarding, all paths of accept_ra are needed, too. The original values
        of all chosen sysctls are removed from the file, even of those that keep their present values. Raises
        CalicoError.
        """
        if (
            IPV6_FORWARDING in needed
        ):  # while this host forwards, they keep the routes learned from router advertisements
            needed = {*needed, *(path for path in self._found if path.endswith("/accept_ra"))}
        paths = [path for path in self._found if chosen(path)]
        # forwarding first: the kernel changes other settings along with it
        for path in sorted(paths, key=lambda path: path not in (IPV4_FORWARDING, IPV6_FORWARDING)):
            before, ours = self._found[path]
            if path not in needed and read(path) == ours:
                write(path, before)
            del self._found[path]
        if paths:
            self._keep()

    def _switch_on(self, path: str) -> None:
        """Enable forwarding. `path` is IPV4_FORWARDING or IPV6_FORWARDING. Raises CalicoError.

        When forwarding is disabled later, the kernel also changes other settings: `forwarding` of each interface and,
        for IPv4, accept_redirects. So the present values of these settings are stored first. Source:
        inet_forward_change in the kernel's net/ipv4/devinet.c, addrconf_fixup_forwarding in net/ipv6/addrconf.c.
        """
        if read(path) == "0" and path not in self._found:
            names = ["default", *(name for _, name in socket.if_nameindex() if not name.startswith(INTERFACE_PREFIX))]
            after = {f"{path[:4]}/conf/{name}/forwarding": "0" for name in names}
            if path == IPV4_FORWARDING:
                after["ipv4/conf/all/accept_redirects"] = "1"
            for other, value in after.items():
                now = read(other)
                if now not in (None, value):
                    self._found[other], self._kept = [str(now), value], False
        self._set(path, "1")

    def _set(self, path: str, value: str) -> None:
        now = read(path)
        if now == value:
            return
        if path not in self._found and now is not None:
            self._found[path], self._kept = [now, value], False
        if not self._kept:
            self._keep()
        write(path, value)

    def _keep(self) -> None:
        try:
            if not self._found:
                self._file.unlink(missing_ok=True)
                self._kept = True
                return
            files.replace(self._file, json.dumps(self._found).encode(), 0o600).close()
            self._kept = True
        except OSError as error:
            raise CalicoError(f"{self._file} cannot be written: {error.strerror}") from None
