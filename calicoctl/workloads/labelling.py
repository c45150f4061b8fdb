"""Connects a container as its labels ask (labels.py), once for each start of the container. Used by the agent.

It changes nothing for a container that is connected, or that a command has disconnected since it was started. It does
not decide when a container is connected: felix/workload_keeper.py does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from calicoctl import engine
from calicoctl.errors import (
    CalicoError,
    Conflict,
    DockerUnavailable,
    NoSuchContainer,
    NoSuchImage,
    StoreUnavailable,
    about,
)
from calicoctl.workloads import addressing, connected, labels, wiring
from calicoctl.workloads.addressing import AddressHeld, AddressRequest
from calicoctl.workloads.upkeep import CHANGED, Action
from calicoctl.workloads.workload import DOCKER, of_container, short_id

if TYPE_CHECKING:
    from typing import Any

    from calicoctl.datastore.client import DatastoreClient
    from calicoctl.datastore.keys import EndpointId
    from calicoctl.workloads.labels import Wanted


class LabelsRefused(CalicoError):
    """A container cannot be connected as its labels ask. `name` is the container's name.

    `holder` is the endpoint that has an address that they ask for; None if this is not the reason.
    """

    def __init__(self, name: str, why: str, holder: EndpointId | None = None) -> None:
        super().__init__(why)
        self.name = name
        self.holder = holder


@dataclass(frozen=True)
class Labelled:
    """The result of `connect`. `action` is what was done, None if nothing was.

    `asks` is False if the container's own labels do not ask for a connection; True if they do, or were not examined.
    """

    asks: bool
    action: Action | None = None


def connect(datastore: DatastoreClient, id: str) -> Labelled:
    """Connect a running container as its labels ask.

    Does nothing if it is connected already, or if a command has disconnected it since it was started.

    Raises LabelsRefused if it cannot be connected as they ask, after a rollback; StoreUnavailable; DockerUnavailable;
    and Conflict if another process holds the workload's lock.
    """
    # a connected container may have no endpoint, if etcd was restored: then it is connected anew when it starts
    if connected.get(datastore.host, DOCKER, id) is not None and datastore.workload_endpoint_ids(DOCKER, id):
        return Labelled(True)
    try:
        container = engine.inspect(id)
    except NoSuchContainer:
        return Labelled(True)  # it has just been removed
    workload = of_container(container, container["Name"].lstrip("/") or short_id(id))
    if workload.started_at is None:
        return Labelled(False)
    if workload.pid is None or connected.is_disconnected(datastore.host, id, workload.started_at):
        return Labelled(True)
    called = f"container {short_id(id)} ({workload.name})"
    try:
        wanted = labels.wanted(container, _image_of(container))
        if not wanted.addresses:
            text = f"{called} is not connected: {'; '.join(wanted.ignored)}"
            return Labelled(False, Action(CHANGED, text) if wanted.ignored else None)
        made = wiring.connect_started(datastore, workload, *checked(wanted), wanted.profiles)
    except (StoreUnavailable, DockerUnavailable, Conflict):
        raise
    except CalicoError as error:
        holder = error.holder if isinstance(error, AddressHeld) else None
        raise LabelsRefused(workload.name, str(error), holder) from error
    if made is None:
        return Labelled(True)
    addresses = ", ".join(map(str, (made.address, *made.others)))
    text = f"{called} is connected as its labels ask: interface {made.id.interface}, {addresses}"
    return Labelled(True, Action(CHANGED, "; ".join((text, *wanted.ignored))))


def checked(wanted: Wanted) -> tuple[list[AddressRequest], str | None]:
    """Return the requested addresses, and the name of the interface (None if no name is asked for).

    Raises CalicoError if one of them is invalid, or if an address is named twice, perhaps in two spellings.
    """
    with about(labels.IP):
        requests = [AddressRequest.parse(text) for text in wanted.addresses]
        addresses = [request.address for request in requests if request.address is not None]
        twice = next((address for address in addresses if addresses.count(address) > 1), None)
        if twice is not None:
            raise CalicoError(f"{twice} is named twice")
    if wanted.interface is not None:
        with about(labels.INTERFACE):
            addressing.check_interface_name(wanted.interface)
    return requests, wanted.interface


def _image_of(container: dict[str, Any]) -> dict[str, Any]:
    """Return the engine's description of a container's image.

    Raises CalicoError if the engine does not name the image, or if the image was removed; and DockerUnavailable.
    """
    image = container.get("Image")
    if not isinstance(image, str) or not image:
        raise CalicoError("Docker does not say which image it is of, and so not whether the labels are the image's own")
    try:
        return engine.inspect_image(image)
    except NoSuchImage:
        raise CalicoError(
            "its image was removed, so it is unknown whether the labels are the image's own. Connect it with "
            "'calicoctl container add'"
        ) from None
