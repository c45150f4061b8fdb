"""The only client of the Docker Engine: finds it as Docker's own tools do, and converts errors to CalicoErrors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from calicoctl.errors import DockerNotRunning, DockerUnavailable, NoSuchContainer, redact_userinfo

SOCKET = "unix:///var/run/docker.sock"

SCHEMES = ("unix", "http+unix", "tcp", "http", "https")
"""The URL schemes that DOCKER_HOST may have. Source: docker.utils.parse_host."""

TIMEOUT = 20
"""Seconds to wait for an answer of the Docker Engine."""


def may_be_there() -> bool:
    """Return whether a Docker Engine may be reachable: False only if its Unix socket does not exist."""
    where = os.environ.get("DOCKER_HOST") or SOCKET
    return not where.startswith("unix://") or os.path.exists(where[len("unix://") :])


def info() -> dict[str, Any]:
    """Return the engine's own description, as `docker info` shows it; raise DockerUnavailable."""
    with client("about itself") as docker:
        return docker.info()  # type: ignore[no-any-return]


def containers() -> list[dict[str, Any]]:
    """Return all containers, running or not, as the engine lists them; raise DockerUnavailable."""
    with client("for its containers") as docker:
        return docker.containers(all=True)  # type: ignore[no-any-return]


def forwards(ipv6: bool) -> bool:
    """Return whether the Docker Engine needs IP forwarding, because it has networks or, for `ipv6`, one with IPv6.

    Returns False if no engine is running. Raises DockerUnavailable if an engine is running, but does not answer.
    """
    try:
        with client("for its networks", timeout=5) as docker:
            networks = docker.networks()
    except DockerNotRunning:
        return False
    of_its_own = [network for network in networks if network.get("Driver") not in ("host", "null")]
    return any(network.get("EnableIPv6") for network in of_its_own) if ipv6 else bool(of_its_own)


@contextmanager
def client(what: str, timeout: int = TIMEOUT) -> Iterator[Any]:
    """Connect to the Docker Engine, and yield docker-py's APIClient; `what` completes the error "Cannot ask Docker …".

    Errors, including those in the body of `with`, are converted to NoSuchContainer or DockerUnavailable. `timeout` is
    in seconds.
    """
    scheme, _, rest = os.environ.get("DOCKER_HOST", "").partition("://")
    if rest and scheme.lower() not in SCHEMES:
        why = f"DOCKER_HOST begins with {scheme}://, and only unix:// and tcp:// are supported"
        if scheme.lower() == "ssh":
            why = "DOCKER_HOST names an engine behind ssh, and only containers of this host can be connected"
        advice = f"Unset it, or set it to this host's engine, usually {SOCKET}."
        raise DockerUnavailable(f"Cannot ask Docker {what}: {why}. {advice}")
    from docker.api.client import APIClient
    from docker.errors import APIError, DockerException, NotFound
    from docker.utils import kwargs_from_env
    from requests.exceptions import RequestException

    try:
        with APIClient(timeout=timeout, **kwargs_from_env()) as docker:
            yield docker
    except APIError as error:
        # not for every status 404: another server may answer instead of the engine
        if isinstance(error, NotFound) and "no such container" in str(error.explanation).lower():
            raise NoSuchContainer(f"No such container: {what.partition(' ')[2]}") from None
        raise DockerUnavailable(f"Docker refused the request {what}: {error.explanation or error}") from None
    except (DockerException, RequestException, OSError, ValueError) as error:  # ValueError: an invalid DOCKER_HOST
        where = os.environ.get("DOCKER_HOST") or SOCKET
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
