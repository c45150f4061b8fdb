"""The only client of the Docker Engine. Uses DOCKER_HOST and the variables for TLS, as Docker's own tools do.

Answers are bounded in time and size (answers.py). Redirects, answers with a content encoding, and answers without the
expected JSON shape raise DockerUnavailable.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Callable

from calicoctl import answers
from calicoctl.environment import DOCKER_TLS
from calicoctl.errors import DockerNotRunning, DockerUnavailable, NoSuchContainer, NoSuchImage, redact_userinfo

SOCKET = "unix:///var/run/docker.sock"

SCHEMES = ("unix", "http+unix", "tcp", "http", "https")
"""The URL schemes that DOCKER_HOST may have. Source: docker.utils.parse_host."""

TIMEOUT = 20
"""Seconds to wait for the beginning of an answer."""

LARGEST = 32 * answers.MiB
"""The maximum size of an answer, in bytes. The list of 10,000 containers takes about 25 MiB."""

LARGEST_EVENT = answers.MiB
"""The maximum size of an event, in bytes. An event contains the labels of its container."""

CHANGES = ("start", "die", "destroy", "rename")
"""The events of containers that `followed` requests."""

NETWORK_CHANGES = ("create", "connect", "destroy")
"""The events of networks that `followed_networks` requests."""


def may_be_there() -> bool:
    """Return False if the Docker Engine certainly does not run: if its Unix socket does not exist.

    The socket is that in DOCKER_HOST or, by default, SOCKET. Return True if the socket exists, or if DOCKER_HOST does
    not begin with `unix://`.
    """
    where = os.environ.get("DOCKER_HOST") or SOCKET
    return not where.startswith("unix://") or os.path.exists(where[len("unix://") :])


def info() -> dict[str, Any]:
    """Return the engine's own description, as `docker info` shows it. Raises DockerUnavailable."""
    with _client("about itself") as docker:
        return _checked(docker.info(), {})  # type: ignore[no-any-return]


def containers() -> list[dict[str, Any]]:
    """Return all containers, running or not, as the engine lists them. Raises DockerUnavailable.

    In each container, `Id` and `State` are strings; `Names` is a list of strings, null or missing.
    """
    with _client("for its containers") as docker:
        return _listed(docker)


def inspect(name: str) -> dict[str, Any]:
    """Return the engine's description of a container. Raises NoSuchContainer or DockerUnavailable.

    In the result, `Id`, `Name` and `HostConfig.NetworkMode` are strings, `State.Pid` is an integer, and `State.Running`
    a boolean. `name` is the container's name or id.
    """
    with _client(f"about {name}") as docker:
        shape = {"Id": _ID, "Name": str, "State": {"Running": bool, "Pid": int}, "HostConfig": {"NetworkMode": str}}
        return _checked(docker.inspect_container(name), shape)  # type: ignore[no-any-return]


def inspect_image(id: str) -> dict[str, Any]:
    """Return the engine's description of an image. Raises NoSuchImage or DockerUnavailable.

    No fields are checked: the result is a dictionary with any contents. `id` is the image's id or name.
    """
    with _client(f"about the image {id}") as docker:
        return _checked(docker.inspect_image(id), {})  # type: ignore[no-any-return]


def start(id: str) -> None:
    """Start a container. Raises NoSuchContainer, or DockerUnavailable if the engine does not start it."""
    with _client(f"to start {id}", timeout=60) as docker:
        docker.start(id)


def is_to_start(container: dict[str, Any], refusal: re.Pattern[str]) -> bool:
    """Return whether a container failed to start because of `refusal`, and has a restart policy that would start it.

    `container` is the result of `inspect`. It must not be running, `refusal` must match a part of the error of its last
    start, and its restart policy must be one that _is_restarted accepts.
    """
    state = container["State"]
    return refusal.search(str(state.get("Error"))) is not None and not state["Running"] and _is_restarted(container)


def _is_restarted(container: dict[str, Any]) -> bool:
    """Return whether the restart policy of a container has the engine start the container when the engine starts.

    `container` is the result of `inspect`. How the container ended, or whether a user stopped it, is not considered.

    Source: ShouldRestart in the engine's restartmanager/restartmanager.go.
    """
    policy = container["HostConfig"].get("RestartPolicy")
    if not isinstance(policy, dict):
        return False
    most = policy.get("MaximumRetryCount") or 0
    may_retry = not most or container.get("RestartCount", 0) < most
    return policy.get("Name") in ("always", "unless-stopped") or (policy.get("Name") == "on-failure" and may_retry)


@contextmanager
def followed(since: int) -> Iterator[tuple[list[dict[str, Any]], Iterator[Any]]]:
    """Yield the list of all containers (see `containers`), and an iterator over their events.

    The iterator yields the events in CHANGES since the time `since` (seconds since 1970), as JSON values of any shape.
    It blocks until the next event. If the iterator fails, for example because an event has more than LARGEST_EVENT
    bytes, the `with` statement raises DockerUnavailable.
    """
    with _followed("container", CHANGES, since, _listed) as found:
        yield found


@contextmanager
def followed_networks(since: int) -> Iterator[tuple[list[dict[str, Any]], Iterator[Any]]]:
    """Do what `followed` does, but for networks: see `networks`, and NETWORK_CHANGES."""
    with _followed("network", NETWORK_CHANGES, since, _listed_networks) as found:
        yield found


@contextmanager
def _followed(
    kind: str, changes: Iterable[str], since: int, read: Callable[[Any], list[dict[str, Any]]]
) -> Iterator[tuple[list[dict[str, Any]], Iterator[Any]]]:
    """Yield the result of `read`, called with docker-py's client, and an iterator over events, as `followed` does.

    The iterator yields the events `changes` of objects of the type `kind`: "container" or "network".
    """
    with _client("for its events") as docker, answers.bounded(LARGEST_EVENT) as bounds:
        parts = docker.events(since=since, filters={"type": kind, "event": list(changes)}, decode=False)
        try:
            with answers.bounded(LARGEST):
                listed = read(docker)
            yield listed, _events(parts, bounds)
        finally:
            with suppress(OSError):  # the engine may have ended it
                parts.close()


def networks() -> list[dict[str, Any]]:
    """Return all networks, as the engine lists them: without their containers. Raises DockerUnavailable.

    In each network, `Id`, `Name` and `Driver` are strings, and `Internal` is a boolean.
    """
    with _client("for its networks") as docker:
        return _listed_networks(docker)


def network(id: str) -> dict[str, Any]:
    """Return the engine's description of a network. Raises DockerUnavailable, also if there is no such network.

    In the result, `Containers` maps the id of each container that has an endpoint in the network to an object with the
    strings `EndpointID` and `Name`. For an endpoint without a container, the key is another text.
    """
    with _client(f"about the network {id}") as docker:
        found: dict[str, Any] = _checked(docker.inspect_network(id), {"Id": str, "Name": str})
        found["Containers"] = found.get("Containers") or {}
        for endpoint in _checked(found["Containers"], {}).values():
            _checked(endpoint, {"EndpointID": str, "Name": str})
        return found


def _events(parts: Iterable[bytes], bounds: answers.Bounds) -> Iterator[Any]:
    """Yield the events in an answer that arrives in `parts`, one event per line, each decoded from JSON.

    `bounds` are the bounds of the answer; they are set so that any time may pass between two parts. Raises ValueError
    if an event is not JSON, or has more than LARGEST_EVENT bytes.
    """
    bounds.renew(None)
    pending = bytearray()
    for part in parts:
        bounds.renew(None)
        pending += part
        if b"\n" in part:
            *whole, rest = bytes(pending).split(b"\n")
            pending = bytearray(rest)
            for event in whole:
                if event.strip():
                    yield json.loads(event)
        if len(pending) > LARGEST_EVENT:
            raise ValueError(f"an event of more than {LARGEST_EVENT} bytes")


def forwards(ipv6: bool) -> bool:
    """Return whether one of Docker's networks needs IPv4 forwarding or, if `ipv6` is true, IPv6 forwarding.

    The networks `host` and `none` do not need forwarding. Returns False if no engine is running. Raises
    DockerUnavailable if an engine is running, but does not answer.
    """
    try:
        with _client("for its networks", timeout=5) as docker:
            networks = _checked(docker.networks(), [{}])
    except DockerNotRunning:
        return False
    of_its_own = [network for network in networks if network.get("Driver") not in ("host", "null")]
    return any(network.get("EnableIPv6") for network in of_its_own) if ipv6 else bool(of_its_own)


_ID = re.compile("[0-9a-f]{1,64}")
"""The ids of containers. An id becomes a part of keys and paths."""


def is_id(value: Any) -> bool:
    """Return whether a JSON value can be the id of a container: 1 to 64 lower-case hexadecimal digits."""
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def _listed_networks(docker: Any) -> list[dict[str, Any]]:
    return _checked(docker.networks(), [{"Id": str, "Name": str, "Driver": str, "Internal": bool}])  # type: ignore[no-any-return]


def _listed(docker: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = _checked(docker.containers(all=True), [{"Id": _ID, "State": str}])
    for container in found:
        _checked(container.get("Names") or [], [str])
    return found


def _checked(value: Any, shape: Any) -> Any:
    """Return `value`, a JSON value. Raise ValueError if it does not match `shape`.

    A shape is a type, _ID, a list with one shape for all items, or a dictionary with the shapes of the required fields.
    """
    if isinstance(shape, type):
        fits = type(value) is shape
    elif shape is _ID:
        fits = is_id(value)
    else:
        fits = isinstance(value, type(shape))
    if not fits:
        raise ValueError(f"{str(value)[:80]} is not what was asked for")
    if isinstance(shape, list):
        for item in value:
            _checked(item, shape[0])
    elif isinstance(shape, dict):
        for key, part in shape.items():
            _checked(value.get(key), part)
    return value


@contextmanager
def _client(what: str, timeout: int | None = None) -> Iterator[Any]:
    """Connect to the Docker Engine, and yield docker-py's APIClient.

    `what` completes the error text "Cannot ask Docker …". `timeout` is in seconds; None means TIMEOUT.

    Exceptions of docker-py and of its libraries are converted to NoSuchContainer, NoSuchImage or DockerUnavailable, and
    so are the exceptions that the body of `with` raises because an answer has an unexpected shape.
    """
    scheme, _, rest = os.environ.get("DOCKER_HOST", "").partition("://")
    if rest and scheme.lower() not in SCHEMES:
        why = f"DOCKER_HOST begins with {scheme}://, and only unix:// and tcp:// are supported"
        if scheme.lower() == "ssh":
            why = "DOCKER_HOST names an engine behind ssh, and only containers of this host can be connected"
        advice = f"Unset it, or set it to this host's engine, usually {SOCKET}."
        raise DockerUnavailable(f"Cannot ask Docker {what}: {why}. {advice}")
    from docker.errors import APIError, DockerException, NotFound
    from requests.exceptions import RequestException
    from urllib3.exceptions import HTTPError

    host = os.environ.get("DOCKER_HOST")
    try:
        with answers.bounded(LARGEST), _kept_client(timeout or TIMEOUT) as docker:
            yield docker
    except APIError as error:
        # not for every status 404: another server may answer instead of the engine
        if isinstance(error, NotFound) and "no such container" in str(error.explanation).lower():
            raise NoSuchContainer(f"No such container: {what.rpartition(' ')[2]}") from None
        if isinstance(error, NotFound) and "no such image" in str(error.explanation).lower():
            raise NoSuchImage(f"No such image: {what.rpartition(' ')[2]}") from None
        raise DockerUnavailable(f"Docker refused the request {what}: {error.explanation or error}") from None
    except (
        *(DockerException, RequestException, HTTPError, http.client.HTTPException, OSError, MemoryError),
        ValueError,  # an invalid DOCKER_HOST, or another shape than was asked for
        *(AttributeError, LookupError, RecursionError, TypeError),  # docker-py itself relies on the shape of answers
    ) as error:
        where = host or SOCKET
        text = str(error)
        if "@" in where:
            text = where = redact_userinfo(where)  # it may contain a password
        if "Permission denied" in text:
            hint = f"no permission on {where}; run this as root or as a member of the docker group"
        elif "Connection refused" in text or "No such file" in text:
            hint = f"nothing listens at {where}; start Docker, or set DOCKER_HOST"
            raise DockerNotRunning(f"Cannot ask Docker {what}: {hint}.") from None
        else:
            answer = " ".join(text.split())[:160].rstrip(".")
            hint = f"the server at {where} does not answer like a Docker Engine ({answer})"
        raise DockerUnavailable(f"Cannot ask Docker {what}: {hint}.") from None


_kept = threading.local()
"""`client` is docker-py's client of this thread, which keeps its connection for the next request. `where` are the
values of the variables that it was made with."""


@contextmanager
def _kept_client(timeout: int) -> Iterator[Any]:
    from docker.utils import kwargs_from_env

    where = tuple(os.environ.get(name) for name in ("DOCKER_HOST", *DOCKER_TLS))
    try:
        if getattr(_kept, "where", None) != where:
            _kept.client = _api_client()(timeout=timeout, **kwargs_from_env())
            _kept.where = where
        _kept.client.timeout = timeout
        yield _kept.client
    except BaseException:  # also if the caller is interrupted: an answer may be left in the connection
        _kept.__dict__.clear()
        raise


def _api_client() -> type[Any]:
    """Return a subclass of docker-py's client that follows no redirects and requests no content encoding.

    It asks for the API's version by `_ping`, which takes the engine a fraction of the time of `version`.
    """
    from docker.api.client import APIClient
    from docker.errors import DockerException

    class Client(APIClient):  # type: ignore[misc]
        def request(self, method: str, url: str, **options: Any) -> Any:
            # no proxy is before a Unix socket, and a search of the environment for one takes longer than the request
            self.trust_env = not self.base_url.startswith("http+docker:")
            options["headers"] = {**(options.get("headers") or {}), "Accept-Encoding": "identity"}
            options["timeout"] = options.get("timeout") or self.timeout  # events have none; see _events
            answer = super().request(method, url, **{**options, "allow_redirects": False})
            answer.encoding = "utf-8"  # requests would guess it, which takes long for a large answer
            return answer

        def _retrieve_server_version(self) -> str:
            answer = self._get(self._url("/_ping", versioned_api=False))
            if answer.status_code != 200:
                raise DockerException(f"{answer.status_code} {answer.text}")
            return str(answer.headers["Api-Version"])

    return Client
