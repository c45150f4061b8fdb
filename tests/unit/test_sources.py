"""The translation of the Docker Engine's events."""

from __future__ import annotations

from calicoctl.felix.events import ContainerChanged
from calicoctl.felix.sources import container_changed

ID = "ab" * 32


def test_events_of_old_and_of_current_engines() -> None:
    """From API version 1.52 on, the fields beside `Actor` that older ones have, too, are missing."""
    current = {"Type": "container", "Action": "start", "Actor": {"ID": ID, "Attributes": {}}, "scope": "local"}
    renamed = {**current, "Action": "rename", "Actor": {"ID": ID, "Attributes": {"name": "b", "oldName": "/a"}}}
    assert container_changed(renamed) == ContainerChanged(ID, removed=False)
    older = {**current, "Action": "destroy", "status": "destroy", "id": ID, "from": "busybox"}
    assert container_changed(current) == ContainerChanged(ID, removed=False)
    assert container_changed(older) == ContainerChanged(ID, removed=True)
