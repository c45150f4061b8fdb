"""The CNI plugin `calico`: a container runtime, such as podman or containerd, calls it to attach a container.

The runtime runs the plugin once for each operation. The operation and the container are in environment variables, the
network's configuration is a JSON object on standard input, and the plugin answers with a JSON object on standard
output. Source: CNI's SPEC.md, versions 0.3.0 to 1.1.0.

This module reads the request and writes the answer. Workloads are connected, checked and disconnected by
workloads/wiring.py, as for commands.
"""

from __future__ import annotations

import gc
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, Callable, NoReturn

from calicoctl import environment, programs, slim
from calicoctl.addresses import host_net
from calicoctl.errors import CalicoError, Conflict, Failures, Frozen, NotFound, StoreUnavailable, printable
from calicoctl.output import report_discarded

if TYPE_CHECKING:
    from calicoctl.datastore.client import DatastoreClient
    from calicoctl.workloads.addressing import AddressRequest
    from calicoctl.workloads.wiring import Attachment
    from calicoctl.workloads.workload import Workload

VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
"""The versions of the specification that the plugin implements, in ascending order."""

SINCE = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}
"""Operations that not all VERSIONS have -> the first version with the operation."""

VARIABLES = {
    "ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "CHECK": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "DEL": ("CNI_CONTAINERID", "CNI_IFNAME"),
    "GC": (),
    "STATUS": (),
    "VERSION": (),
}
"""Operation -> the variables that must be set for it, beside CNI_COMMAND."""

LARGEST = 2**24
"""The maximum size of a network's configuration, in bytes. For GC, it lists all containers of the runtime."""

FIELDS = {
    *("cniVersion", "cniVersions", "name", "type", "args", "capabilities", "runtimeConfig", "prevResult"),
    *("disableCheck", "disableGC", "dns", "ipam", "ipMasq", "profile", "pool"),
}
"""The fields that a network's configuration may have. Those that begin with `cni.dev/` are allowed, too."""

DEFAULT_ROUTES = {4: "0.0.0.0/0", 6: "::/0"}
"""IP version -> the destination of default routes."""

# Source: SPEC.md, "Error"; codes from 100 on are the plugin's own
INCOMPATIBLE, UNSUPPORTED_FIELD, INVALID_VARIABLE, IO_FAILURE, UNDECODABLE, INVALID_CONFIG = 1, 2, 4, 5, 6, 7
TRY_AGAIN, UNAVAILABLE, FAILED = 11, 50, 100

_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"


class CniError(CalicoError):
    """An error with a `code` of the specification. `details` is an optional second sentence."""

    def __init__(self, code: int, why: str, details: str = "") -> None:
        super().__init__(why)
        self.code = code
        self.details = details


@dataclass(frozen=True)
class Request:
    """What the runtime asks for: the operation, the container, and the network's configuration.

    `command` is the operation, and `version` the version of the specification that the configuration asks for. `id` is
    the container's id, `path` that of its network namespace, and `interface` the name that the interface has, or is to
    have, inside the container. These three are empty for an operation that does not need them; `path` may also be empty
    in a DEL. `arguments` are the pairs in CNI_ARGS, for an ADD. `config` is the JSON object on standard input, and
    `network` the name in it.
    """

    command: str
    version: str
    network: str
    config: Mapping[str, Any]
    id: str = ""
    path: str = ""
    interface: str = ""
    arguments: Mapping[str, str] = field(default_factory=dict)


def entry() -> NoReturn:
    """Carry out the operation that this process was started for, and end the process with its exit status."""
    slim.install()
    programs.look_in_system_folders()
    gc.set_threshold(50_000)  # imports create many objects, and no garbage
    os._exit(main())  # skips the shutdown of the interpreter, which takes longer than many an operation


def main() -> int:
    """Carry out the operation in this process's environment and streams; return the exit status."""
    report_discarded(_is_debugged(os.environ))
    # Python has no such stream if the runtime has closed it
    status, answer = run(os.environ, io.BytesIO() if sys.stdin is None else sys.stdin.buffer)
    try:
        if answer is not None:
            print(json.dumps(answer), flush=True)
    except OSError as error:
        print(f"cannot write the answer: {error.strerror}", file=sys.stderr)
        status = 1
    return status


def run(variables: Mapping[str, str], stdin: IO[bytes]) -> tuple[int, dict[str, Any] | None]:
    """Carry out an operation; return the exit status of the plugin, and what it is to print (None: nothing)."""
    version = VERSIONS[-1]
    try:
        command = _command(variables)
        config = _config(stdin, command)
        if config.get("cniVersion") in VERSIONS:
            version = config["cniVersion"]
        if command == "VERSION":
            return 0, {"cniVersion": version, "supportedVersions": list(VERSIONS)}
        request = _request(command, variables, config)
        # DEL may have another environment than ADD, such as that of podman's process that awaits a container's end
        environment.complete(file_first=True)
        return 0, _OPERATIONS[command](request)
    except CalicoError as error:
        return 1, _failure(version, error)
    except OSError as error:
        return 1, _failure(version, CniError(IO_FAILURE, f"Operating system error: {error}"))
    except Exception as error:
        if _is_debugged(variables):
            import traceback

            traceback.print_exc()
        return 1, _failure(version, CniError(FAILED, f"Internal error ({type(error).__name__}: {error})"))


def _is_debugged(variables: Mapping[str, str]) -> bool:
    return variables.get("CALICO_DEBUG", "") not in ("", "0")


def _failure(version: str, error: CalicoError) -> dict[str, Any]:
    """Return the answer for an error, in a version of the specification."""
    code, details = FAILED, ""
    if isinstance(error, CniError):
        code, details = error.code, error.details
    elif _is_temporary(error):
        code = TRY_AGAIN
    answer = {"cniVersion": version, "code": code, "msg": printable(" ".join(str(error).split()))}
    return {**answer, "details": printable(details)} if details else answer


def _is_temporary(error: BaseException | None) -> bool:
    """Return whether a later attempt may succeed: because of the error itself, or of one that has caused it."""
    if isinstance(error, Failures):
        return any(map(_is_temporary, error.errors))
    if isinstance(error, (StoreUnavailable, Conflict, Frozen)):
        return True
    return error is not None and _is_temporary(error.__cause__)


# The request


def _command(variables: Mapping[str, str]) -> str:
    command = variables.get("CNI_COMMAND", "")
    if command not in VARIABLES:
        raise CniError(
            INVALID_VARIABLE,
            f"CNI_COMMAND is '{command}': it must be {', '.join(VARIABLES)}. A container runtime starts this program",
        )
    return command


def _config(stdin: IO[bytes], command: str) -> dict[str, Any]:
    try:
        text = stdin.read(LARGEST + 1)
    except OSError as error:
        raise CniError(IO_FAILURE, f"the configuration cannot be read: {error.strerror}") from None
    if len(text) > LARGEST:
        raise CniError(UNDECODABLE, f"the configuration has more than {LARGEST} bytes")
    if command == "VERSION" and not text.strip():
        return {}  # some runtimes ask before they have a network
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CniError(UNDECODABLE, f"the configuration is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CniError(UNDECODABLE, "the configuration is not a JSON object")
    return config


def _request(command: str, variables: Mapping[str, str], config: Mapping[str, Any]) -> Request:
    """Return the request for an operation, from its variables and configuration. Raises CniError if one is invalid."""
    version = config.get("cniVersion", "0.1.0")
    if version not in VERSIONS:
        raise CniError(INCOMPATIBLE, f"cniVersion {version!r} is not supported", f"supported: {', '.join(VERSIONS)}")
    if VERSIONS.index(version) < VERSIONS.index(SINCE.get(command, VERSIONS[0])):
        raise CniError(
            INCOMPATIBLE, f"{command} needs cniVersion {SINCE[command]}, and the configuration has {version}"
        )
    network = config.get("name")
    if not isinstance(network, str) or not re.fullmatch(_NAME, network, re.ASCII):
        raise CniError(INVALID_CONFIG, f"'name' is {network!r}: it must be the name of a network")
    values = {name: variables.get(name, "") for name in VARIABLES[command]}
    unset = [name for name, value in values.items() if not value]
    if unset:
        raise CniError(INVALID_VARIABLE, f"{', '.join(unset)} must be set for {command}")
    request = Request(
        command,
        version,
        network,
        config,
        values.get("CNI_CONTAINERID", ""),
        values.get("CNI_NETNS", ""),
        values.get("CNI_IFNAME", ""),
        _arguments(variables.get("CNI_ARGS", "")) if command == "ADD" else {},
    )
    _check_container(request)
    return request


def _arguments(text: str) -> dict[str, str]:
    """Parse CNI_ARGS: pairs such as `IP=192.0.2.1`, separated by semicolons. Raises CniError."""
    found = {}
    for pair in filter(None, text.split(";")):
        name, equals, value = pair.partition("=")
        if not equals:
            raise CniError(INVALID_VARIABLE, f"CNI_ARGS is '{text}': it must consist of pairs NAME=VALUE")
        found[name] = value
    return found


def _check_container(request: Request) -> None:
    """Raise CniError if a variable that names the container, its namespace or its interface is invalid."""
    from calicoctl.workloads.addressing import is_interface_name
    from calicoctl.workloads.workload import is_attachable

    is_id = is_attachable(request.id) or (request.command == "DEL" and re.fullmatch(_NAME, request.id, re.ASCII))
    if "CNI_CONTAINERID" in VARIABLES[request.command] and not is_id:
        raise CniError(
            INVALID_VARIABLE,
            f"CNI_CONTAINERID is '{request.id}': it must have 1 to 190 letters, digits, '_', '.' and '-'",
        )
    if "CNI_IFNAME" in VARIABLES[request.command] and not is_interface_name(request.interface):
        raise CniError(INVALID_VARIABLE, f"CNI_IFNAME is '{request.interface}': it cannot be the name of an interface")
    if "CNI_NETNS" in VARIABLES[request.command]:
        path = request.path
        if not path.startswith("/") or not path.isprintable():
            raise CniError(INVALID_VARIABLE, f"CNI_NETNS is '{path}': it must be an absolute path")


def _workload(request: Request, name: str = "") -> Workload:
    from calicoctl.workloads.workload import CNI, Workload, short_id

    return Workload(
        CNI,
        request.id,
        short_id(request.id),
        path=request.path or None,
        docker_name=name,
        network=request.network,
        interface=request.interface,
    )


def _datastore() -> DatastoreClient:
    from calicoctl.datastore.client import DatastoreClient

    return DatastoreClient.from_environment()


# ADD


def _add(request: Request) -> dict[str, Any]:
    """Attach a container; return the result for the runtime."""
    from calicoctl.workloads import netns, wiring
    from calicoctl.workloads.workload import namespace_at

    requests = _address_requests(request)
    profiles = _profiles(request)
    mac = _mac(request)
    dns = _dns(request)
    _refuse_others(request)
    namespace = namespace_at(request.path)
    if namespace is None:
        raise CniError(INVALID_VARIABLE, f"CNI_NETNS is '{request.path}': there is no network namespace")
    if namespace == namespace_at("/proc/self/ns/net"):
        raise CniError(INVALID_VARIABLE, f"CNI_NETNS is '{request.path}': this is the host's own network namespace")
    datastore = _datastore()
    name = request.arguments.get("K8S_POD_NAME", "")
    name = name if len(name) <= 253 and re.fullmatch(_NAME, name, re.ASCII) else ""
    attachment = wiring.connect_container(datastore, _workload(request, name), requests, profiles, mac)
    return result(request, attachment, netns.HOST_MAC, dns)


def result(request: Request, attachment: Attachment, host_mac: str, dns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result of an ADD, in the version of the specification that the configuration asks for.

    `host_mac` is the MAC of the host end of the veth pair, and `dns` the object with this name in the configuration.
    """
    ips, hops = [], sorted(attachment.next_hops.items())
    for address in (attachment.address, *attachment.others):
        ip = {"address": host_net(address), "gateway": attachment.next_hops[address.version], "interface": 1}
        if VERSIONS.index(request.version) < VERSIONS.index("1.0.0"):
            ip["version"] = str(address.version)
        ips.append(ip)
    return {
        "cniVersion": request.version,
        "interfaces": [
            {"name": attachment.id.interface, "mac": host_mac},
            {"name": attachment.interface, "mac": attachment.mac, "sandbox": request.path},
        ],
        "ips": ips,
        "routes": [{"dst": DEFAULT_ROUTES[version], "gw": hop} for version, hop in hops],
        "dns": dict(dns),
    }


def _refuse_others(request: Request) -> None:
    """Raise CniError if the configuration asks for something that the plugin cannot do."""
    if request.config.get("prevResult") is not None:
        raise CniError(INVALID_CONFIG, f"'calico' must be the first of the plugins of network {request.network}")
    for key, value in request.config.items():
        if (key not in FIELDS and not key.startswith("cni.dev/")) or (key == "ipMasq" and value):
            raise _unsupported(request, key, value, "the fields of this plugin are 'profile', 'pool' and 'dns'")
    ipam = request.config.get("ipam") or {}
    why = "Calico assigns addresses itself, from the pools in 'pool', so remove it"
    if not isinstance(ipam, dict):
        raise _unsupported(request, "ipam", ipam, why)
    for key, value in ipam.items():
        if key != "type" or value not in (None, "", "calico", "calico-ipam"):
            raise _unsupported(request, f"ipam.{key}", value, why)


def _unsupported(request: Request, key: str, value: object, why: str) -> CniError:
    text = json.dumps(value)
    text = text if len(text) <= 200 else f"{text[:199]}…"
    return CniError(UNSUPPORTED_FIELD, f"network {request.network} has '{key}', with the value {text}: {why}")


def _runtime_config(request: Request) -> Mapping[str, Any]:
    given = request.config.get("runtimeConfig") or {}
    if not isinstance(given, dict):
        raise CniError(INVALID_CONFIG, "'runtimeConfig' must be an object")
    return given


def _texts(request: Request, key: str) -> list[str] | None:
    """Return the strings in a field of the configuration that is a string or a list of strings; None if it is missing.

    Raises CniError if it is something else, or an empty list.
    """
    value = request.config.get(key)
    if value is None:
        return None
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(text and isinstance(text, str) for text in texts):
        raise CniError(INVALID_CONFIG, f"'{key}' of network {request.network} must be a string, or a list of strings")
    return list(dict.fromkeys(texts))


def _address_requests(request: Request) -> list[AddressRequest]:
    """Return a request for each address that the user asks for, and one for any address of each item of `pool`.

    Left out are the items of `pool` of the IP versions of the addresses that the user asks for. Raises CniError.
    """
    from calicoctl.addresses import parse_address
    from calicoctl.workloads.addressing import AddressRequest

    with _coded(INVALID_CONFIG, f"'pool' of network {request.network}: "):
        pools = [AddressRequest.parse(text) for text in _texts(request, "pool") or ["ipv4"]]
        if any(pool.address is not None for pool in pools):
            raise CalicoError("it must be 'ipv4', 'ipv6' or the CIDR of a pool, or a list of these")
    asked = [text for text in request.arguments.get("IP", "").split(",") if text]
    ips = _runtime_config(request).get("ips") or []
    if not isinstance(ips, list) or not all(isinstance(text, str) for text in ips):
        raise CniError(INVALID_CONFIG, "'ips' in 'runtimeConfig' must be a list of strings")
    with _coded(INVALID_VARIABLE, "the address that the user asks for: "):
        fixed = list(dict.fromkeys(parse_address(text.partition("/")[0]) for text in (*asked, *ips)))
    for address in fixed:
        allowed = [pool for pool in pools if pool.version == address.version and pool.cidr is not None]
        if allowed and not any(pool.fits(address) for pool in allowed):
            named = ", ".join(str(pool.cidr) for pool in allowed)
            raise CniError(FAILED, f"IP {address} is not in the pool of network {request.network}, {named}")
    versions = {address.version for address in fixed}
    others = [pool for pool in pools if pool.version not in versions]
    any_other = "no address"
    return [AddressRequest(address.version, address=address, any_other=any_other) for address in fixed] + others


def _profiles(request: Request) -> list[str] | None:
    """Return the names of the profiles in the configuration. Raises CniError.

    Returns None if it names none: then the network has a profile of its own, with its name.
    """
    from calicoctl import limits
    from calicoctl.policy.rules import check_name

    names = _texts(request, "profile")
    if names is not None and len(names) > limits.PROFILES:
        raise CniError(INVALID_CONFIG, f"'profile' of network {request.network} has more than {limits.PROFILES} names")
    for name in names or ():
        with _coded(INVALID_CONFIG):
            check_name(name, "profile")
    if names is None:
        with _coded(INVALID_CONFIG, "the network's configuration should name a 'profile': "):
            check_name(request.network, "profile")
    return names


def _mac(request: Request) -> str | None:
    """Return the MAC that the user asks for; None if the kernel is to choose one. Raises CniError if it is invalid."""
    from calicoctl.workloads.netns import HOST_MAC

    asked = request.arguments.get("MAC") or _runtime_config(request).get("mac")
    if not asked:
        return None
    mac = str(asked).lower()
    is_mac = re.fullmatch("([0-9a-f]{2}:){5}[0-9a-f]{2}", mac) is not None
    # the lowest bit of the first byte says that a MAC is one of several interfaces
    if not is_mac or int(mac[:2], 16) & 1 or mac in ("00:00:00:00:00:00", HOST_MAC):
        raise CniError(
            INVALID_VARIABLE,
            f"the MAC that the user asks for is '{asked}': it must be one of a single interface, as 02:00:00:00:00:01",
        )
    return mac


def _dns(request: Request) -> Mapping[str, Any]:
    dns = request.config.get("dns") or {}
    if not isinstance(dns, dict):
        raise CniError(INVALID_CONFIG, "'dns' must be an object")
    return dns


# The other operations


def _del(request: Request) -> None:
    """Detach a container. Succeeds if it is not attached as `request` says, or if its namespace no longer exists.

    An attachment to another network, or with another interface, stays: the one that the runtime means was refused.
    """
    from calicoctl.workloads import wiring
    from calicoctl.workloads.workload import is_attachable

    if not is_attachable(request.id):
        return  # its id is too long: ADD has refused it
    with suppress(NotFound):
        wiring.disconnect(_datastore(), _workload(request))


def _check(request: Request) -> None:
    """Raise CalicoError unless the container is attached as `prevResult` says."""
    from calicoctl.workloads import wiring

    mac, nets, default_routes = attached_as(request)
    wiring.verify(_datastore(), _workload(request), nets, mac, default_routes)


def attached_as(request: Request) -> tuple[str, list[str], list[int]]:
    """Return the MAC and the addresses that the container's interface has according to `prevResult`.

    The third item are the IP versions of the default routes to gateways of this interface. The MAC is empty if
    `prevResult` has none. The addresses are such as `address/32`. What other plugins have added for other interfaces is
    left out. Raises CniError if `prevResult` is missing or invalid.
    """
    before = request.config.get("prevResult")
    if not isinstance(before, dict):
        raise CniError(INVALID_CONFIG, f"'prevResult' of network {request.network} is missing")
    try:
        own = {
            number: str(interface.get("mac") or "")
            for number, interface in enumerate(before.get("interfaces") or ())
            if interface["name"] == request.interface and interface.get("sandbox")
        }
        ips = [ip for ip in before.get("ips") or () if ip.get("interface") in own]
        nets = [str(ip["address"]) for ip in ips]
        gateways = {str(ip["gateway"]) for ip in ips if ip.get("gateway")}
        routes = {str(route["dst"]) for route in before.get("routes") or () if route.get("gw") in gateways}
    except (TypeError, KeyError, AttributeError):
        raise CniError(INVALID_CONFIG, f"'prevResult' of network {request.network} is not a result of ADD") from None
    if len(own) != 1:
        raise CniError(
            INVALID_CONFIG, f"'prevResult' of network {request.network} has no interface {request.interface}"
        )
    return next(iter(own.values())), nets, [version for version, dst in DEFAULT_ROUTES.items() if dst in routes]


def _gc(request: Request) -> None:
    """Detach the containers of the network that the runtime does not list. Raises Failures if it fails for some."""
    from calicoctl.errors import for_each
    from calicoctl.workloads import connected, wiring
    from calicoctl.workloads.workload import CNI, attached_container

    valid = valid_attachments(request)
    datastore = _datastore()
    known = connected.every(datastore.host, CNI)
    stale = [id for id, one in known.items() if one.network == request.network and (id, one.interface) not in valid]

    def remove(id: str) -> None:
        with suppress(NotFound):
            wiring.disconnect(datastore, attached_container(id, known[id]))

    datastore.store_version()  # else its absence would be noticed only if there is something to remove
    for_each(stale, remove)


def valid_attachments(request: Request) -> set[tuple[str, str]]:
    """Return the attachments that the runtime still has, which GC must keep, as (container id, interface).

    CNI calls them valid. Raises CniError if the runtime does not list them.
    """
    key = "cni.dev/valid-attachments"
    if key not in request.config:  # an empty list would remove all
        raise CniError(INVALID_CONFIG, f"'{key}' of network {request.network} is missing")
    try:
        return {(str(one["containerID"]), str(one["ifname"])) for one in request.config[key] or ()}
    except (TypeError, KeyError):
        raise CniError(
            INVALID_CONFIG,
            f"'{key}' of network {request.network} must be a list of objects with containerID and ifname",
        ) from None


def _status(request: Request) -> None:
    """Raise CniError unless containers can be attached on this host."""
    from calicoctl.felix import process

    requests = _address_requests(request)
    profiles = _profiles(request)
    _refuse_others(request)
    with _coded(UNAVAILABLE):
        datastore = _datastore()
        for one in requests:
            datastore.hosts.next_hop(one.version)
            one.pools(datastore)
        for profile in profiles or ():
            datastore.require_profile(profile)
        if process.running(datastore.host) is None:
            raise CalicoError("the agent of this host is not running. Start it with 'calicoctl node'")


@contextmanager
def _coded(code: int, what: str = "") -> Iterator[None]:
    """Convert a CalicoError from the body of `with` into a CniError with this code; its text begins with `what`.

    A CniError is raised unchanged.
    """
    try:
        yield
    except CniError:
        raise
    except CalicoError as error:
        raise CniError(code, f"{what}{error}") from None


_OPERATIONS: Mapping[str, Callable[[Request], dict[str, Any] | None]] = {
    "ADD": _add,
    "DEL": _del,
    "CHECK": _check,
    "GC": _gc,
    "STATUS": _status,
}

if __name__ == "__main__":
    entry()
