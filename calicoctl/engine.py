"""The only client of the Docker Engine: found as Docker's own tools find it, asked, and its errors made ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from calicoctl.errors import DockerNotRunning, DockerUnavailable, NoSuchContainer, redact_userinfo

SOCKET = "unix:///var/run/docker.sock"

SCHEMES = ("unix", "http+unix", "tcp", "http", "https")
"""What a DOCKER_HOST with a scheme may begin with. Source: docker.utils.parse_host."""

TIMEOUT = 20
"""Seconds to wait for an answer of the Docker Engine."""


def may_be_there() -> bool:
    """Tell whether it may make sense to ask the Docker Engine: a socket that does not exist takes no asking."""
    where = os.environ.get("DOCKER_HOST") or SOCKET
    return not where.startswith("unix://") or os.path.exists(where[len("unix://") :])


def info() -> dict[str, Any]:
    """Return what the Docker Engine says of itself; raise DockerUnavailable."""
    with client("about itself") as docker:
        return docker.info()  # type: ignore[no-any-return]


def containers() -> list[dict[str, Any]]:
    """Return what the Docker Engine lists of its containers, running or not; raise DockerUnavailable."""
    with client("for its containers") as docker:
        return docker.containers(all=True)  # type: ignore[no-any-return]


def forwards(ipv6: bool) -> bool:
    """Tell whether a Docker Engine runs here that forwards for networks of its own.

    Raises DockerUnavailable where there is one that does not say.
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
    """Give a client of the Docker Engine, found as its own tools find it, to ask it `what`.

    What it answers with instead becomes NoSuchContainer, or DockerUnavailable.
    """
    scheme, _, rest = os.environ.get("DOCKER_HOST", "").partition("://")
    if rest and scheme.lower() not in SCHEMES:
        why = f"DOCKER_HOST begins with {scheme}://, and an engine is asked by unix:// or tcp:// only"
        if scheme.lower() == "ssh":
            why = "DOCKER_HOST names an engine that ssh leads to, and only containers of this host can be connected"
        advice = f"Unset it, or set it to this host's engine, which is at {SOCKET} mostly."
        raise DockerUnavailable(f"Cannot ask Docker {what}: {why}. {advice}")
    from docker.api.client import APIClient
    from docker.errors import APIError, DockerException, NotFound
    from docker.utils import kwargs_from_env
    from requests.exceptions import RequestException

    try:
        with APIClient(timeout=timeout, **kwargs_from_env()) as docker:
            yield docker
    except APIError as error:
        # not whatever is not found: somebody else may answer in the engine's place
        if isinstance(error, NotFound) and "no such container" in str(error.explanation).lower():
            raise NoSuchContainer(f"No such container: {what.partition(' ')[2]}") from None
        raise DockerUnavailable(f"Docker refused to be asked {what}: {error.explanation or error}") from None
    except (DockerException, RequestException, OSError, ValueError) as error:  # the last for an odd DOCKER_HOST
        where = os.environ.get("DOCKER_HOST") or SOCKET
        text = str(error)
        if "@" in where:
            text = where = redact_userinfo(where)  # with a password, perhaps
        if "Permission denied" in text:
            hint = f"no permission on {where}; run this as root or as a member of the docker group"
        elif "Connection refused" in text or "No such file" in text:
            hint = f"nothing listens at {where}; start Docker, or set DOCKER_HOST"
            raise DockerNotRunning(f"Cannot ask Docker {what}: {hint}.") from None
        else:
            hint = f"what is at {where} does not answer as an engine does ({' '.join(text.split())[:160].rstrip('.')})"
        raise DockerUnavailable(f"Cannot ask Docker {what}: {hint}.") from None
