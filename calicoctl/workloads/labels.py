"""Reads, from the Docker Engine's description of a container, how its labels ask for it to be connected.

`docker run --net=none --label calico.ip=ipv4 --label calico.profile=web …` asks for an address and a profile. The
variables CALICO_IP and CALICO_PROFILE of Calico's tools of 2015 ask for the same, in a container with --net=none. A
label or variable that has the same value in the container's image is ignored: who builds an image does not choose
addresses. Addresses and names of interfaces are checked by labelling.py, which connects the containers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from calicoctl import limits
from calicoctl.datastore.keys import can_be_part
from calicoctl.errors import CalicoError

IP, PROFILE, INTERFACE = "calico.ip", "calico.profile", "calico.interface"
"""The labels. Only a container with the first one is connected."""

_VARIABLES = {IP: "CALICO_IP", PROFILE: "CALICO_PROFILE"}
"""The variables that have the meaning of a label."""

_LONGEST = 16 * 1024
"""The maximum length of a label's or a variable's value, in characters."""


@dataclass(frozen=True)
class Wanted:
    """How a container asks to be connected.

    `addresses` are texts for AddressRequest.parse; if it is empty, the container does not ask to be connected.
    `interface` is None if no name is asked for. `ignored` are sentences, without a period, about labels and variables
    that are ignored, such as "label calico.ip is ignored, since it is the image's own".
    """

    addresses: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()
    interface: str | None = None
    ignored: tuple[str, ...] = ()


def is_labelled(container: Mapping[str, Any]) -> bool:
    """Return whether a container has a label or a variable that asks for it to be connected, even if it is ignored.

    `container` is the engine's description (engine.inspect).
    """
    return any((value or "").strip() for _, value, _ in _places(container, {}, IP))


def wanted(container: Mapping[str, Any], image: Mapping[str, Any]) -> Wanted:
    """Return how a container asks to be connected. Both arguments are the engine's descriptions.

    Raises CalicoError if a value is too long, contains too many addresses or profiles, a profile twice, or an invalid
    profile name.
    """
    ignored: list[str] = []
    source, text = _chosen(container, image, IP, ignored)
    if not text:
        return Wanted(ignored=tuple(ignored))
    addresses = _listed(source, text.lower(), limits.ADDRESSES)
    if source == f"variable {_VARIABLES[IP]}":
        addresses = ["ipv4" if one == "auto" else one for one in addresses]
    source, text = _chosen(container, image, PROFILE, ignored)
    profiles = _listed(source, text, limits.PROFILES)
    twice = next((profile for profile in profiles if profiles.count(profile) > 1), None)
    if twice is not None:
        raise CalicoError(f"{source}: {limits.shortened(twice, limits.NAME)} is named twice")
    invalid = next((name for name in profiles if not can_be_part(name)), None)
    if invalid is not None:
        raise CalicoError(f"{source}: '{invalid}' is not a valid profile name")
    source, text = _chosen(container, image, INTERFACE, ignored)
    return Wanted(tuple(addresses), tuple(profiles), text or None, tuple(ignored))


def _chosen(container: Mapping[str, Any], image: Mapping[str, Any], label: str, ignored: list[str]) -> tuple[str, str]:
    """Return where the value of a label is from, such as "label calico.ip", and the value; an empty value if unset.

    A label wins over its variable, even if it is empty. For what is added to `ignored`, see Wanted.
    """
    host_config = container.get("HostConfig")
    has_network = not isinstance(host_config, dict) or host_config.get("NetworkMode") != "none"
    for source, value, inherited in _places(container, image, label):
        if value is None:
            continue
        if value == inherited:
            why = "it is the image's own"
        elif has_network and source.startswith("variable"):
            # the engine's list of containers has no variables, so only those with --net=none are looked at
            why = "the container does not run with --net=none"
        else:
            return source, value.strip()
        if value.strip():
            ignored.append(f"{source} is ignored, since {why}")
    return "", ""


def _places(
    container: Mapping[str, Any], image: Mapping[str, Any], label: str
) -> list[tuple[str, str | None, str | None]]:
    """Return the label, and its variable if it has one, each with its value, and its value in the image."""
    own, images = _config(container), _config(image)
    places = [(f"label {label}", _labels(own).get(label), _labels(images).get(label))]
    variable = _VARIABLES.get(label)
    if variable is not None:
        places.append((f"variable {variable}", _variables(own).get(variable), _variables(images).get(variable)))
    return places


def _config(described: Mapping[str, Any]) -> Mapping[str, Any]:
    config = described.get("Config")
    return config if isinstance(config, dict) else {}


def _labels(config: Mapping[str, Any]) -> dict[str, str]:
    found = config.get("Labels")
    return {n: v for n, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


def _variables(config: Mapping[str, Any]) -> dict[str, str]:
    found = config.get("Env")
    pairs = (item.partition("=") for item in found if isinstance(item, str)) if isinstance(found, list) else ()
    return {name: value for name, equals, value in pairs if equals}


def _listed(source: str, text: str, most: int) -> list[str]:
    """Return the parts of `text`, a comma-separated list.

    Raises CalicoError if the text is longer than _LONGEST, or if it has more than `most` parts. `source`, such as
    "label calico.ip", says in the error where the text is from.
    """
    if len(text) > _LONGEST:
        raise CalicoError(f"{source}: it has more than {_LONGEST // 1024} KiB")
    found = [part.strip() for part in text.split(",") if part.strip()]
    if len(found) > most:
        raise CalicoError(f"{source}: it has {len(found)} items, and an endpoint can have {most}")
    return found
