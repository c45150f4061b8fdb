"""The overlay: drives VXLAN devices, their entries, and the routes to other hosts' workloads to the desired state.

desired/overlay.py decides the desired state; the driver, vxlan.py, programs the difference. This manager also reports
the MTUs that follow from the host's interfaces.

While a pool gets or loses its overlay, there must always be routes to the pool's blocks on other hosts. A new overlay
route takes precedence over BIRD's route to the same CIDR. When a pool loses its overlay, an overlay route stays until
BIRD has programmed its route to the same CIDR, or until GIVE_UP_AFTER has passed. Other hosts may still send through
the tunnel then, so the devices stay for LINGER after the last pool has lost its overlay.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from calicoctl.addresses import version_of
from calicoctl.datastore.keys import INTERFACE_PREFIX
from calicoctl.desired.overlay import Hop, Overlay, tunnels
from calicoctl.desired.snapshot import Dirty
from calicoctl.errors import CalicoError
from calicoctl.felix.dataplane.manager import Context, Manager
from calicoctl.felix.dataplane.vxlan import DEVICES, Route
from calicoctl.felix.events import (
    AddressesChanged,
    Failure,
    KernelEventsLost,
    LinkChanged,
    OverlayBlocked,
    OverlayRouteLost,
    Tick,
)
from calicoctl.output import first_few
from calicoctl.workloads.mtu import HEADER, SMALLEST, Underlay, in_overlay

if TYPE_CHECKING:
    from calicoctl.felix.dataplane.vxlan import Vxlan

GIVE_UP_AFTER = 5.0
"""The maximum number of seconds for which an overlay route stays after its CIDR has left the overlay, if BIRD has no
route to the CIDR.
"""

LINGER = 10.0
"""Seconds for which devices stay after the last pool has lost its overlay: longer than other hosts keep their
routes.
"""

POLL = 0.2
"""Seconds between two checks for BIRD's routes, while routes of the overlay wait for them. The kernel's events are not
used instead: they would be those of all routes, of which BIRD changes thousands at a time.
"""


class VxlanManager(Manager):
    """Programs the overlay of this host."""

    def __init__(self, context: Context, vxlan: Vxlan, put: Callable[[Any], None] = lambda event: None) -> None:
        """`put` is called with OverlayBlocked events."""
        self._context = context
        self._snapshot = context.snapshot
        self._vxlan = vxlan
        self._put = put
        self._blocked = False
        """Whether devices are needed, but none exists, because none could be created."""
        self._absent: list[str] = []
        """The registered addresses of this host that tunnels use, but no interface has."""
        self._overlay = Overlay(context.snapshot)
        self._stale = True
        """Whether the kernel may have changed since the driver read it."""
        self._links_changed = False
        """Whether an interface that the overlay does not use, but may use now, has changed since the last `apply`."""
        self._dirty = True
        self._failed = False
        """Whether the last `apply` failed, at least in part. It is repeated at the next Tick."""
        self._leaving: dict[str, float] = {}
        """CIDR that has left the overlay -> until when our route to it stays if BIRD has set none (monotonic)."""
        self._devices_until: float | None = None
        """Until when devices stay although no pool has an overlay (monotonic).

        None while a pool has an overlay, and after that time.
        """
        self._poll_at: float | None = None
        """When to check for BIRD's routes again (monotonic); None while no route waits for them."""
        self._watched: set[int] = set()
        """The indices of the interfaces that the overlay uses."""

    def on_event(self, event: Any) -> None:
        if isinstance(event, Dirty):
            changed = self._overlay.update(event)
            self._dirty = self._dirty or changed or event.settings
        elif isinstance(event, LinkChanged):
            # with an interface, the kernel may remove its routes without a notification
            if event.link.index in self._watched or event.link.name in DEVICES.values():
                self._stale = True
            elif not event.link.name.startswith(INTERFACE_PREFIX):
                self._links_changed = True
        elif isinstance(event, (AddressesChanged, KernelEventsLost)):
            self._stale = True
        elif isinstance(event, OverlayRouteLost):
            self._stale = self._stale or any(route.cidr == event.cidr for route in self._vxlan.routes)
        elif isinstance(event, Tick):
            self._stale, self._failed = self._stale or self._failed, False

    def resync(self) -> None:
        self._stale = True

    @property
    def needs_apply(self) -> bool:
        due = self.due_at
        return self._dirty or self._stale or (due is not None and due <= time.monotonic())

    @property
    def due_at(self) -> float | None:
        return min((at for at in (self._poll_at, self._devices_until) if at is not None), default=None)

    def apply(self) -> None:
        if not (self.needs_apply or self._links_changed):
            return  # an endpoint's change concerns another manager, and to read the kernel takes some milliseconds
        self._dirty = self._links_changed = False
        failures: list[str] = []
        try:
            self._apply(failures)
        except CalicoError as error:
            failures.append(str(error))
        self._failed = bool(failures)
        if not failures:
            failures = [*self._without_address(), *self._out_of_reach()]
        self._context.health.record(Failure("; ".join(failures) or None, "overlay"))

    def _apply(self, failures: list[str]) -> None:
        if self._stale:
            self._vxlan.read()
            self._stale = False
        ends = tunnels(self._snapshot.topology)
        own = {version: self._snapshot.topology.own(version) for version in (4, 6)}
        underlays = {version: self._vxlan.underlay(address) for version, address in own.items() if address is not None}
        self._report_mtu(underlays)
        if not self._devices_stay():
            ends = {}
        for version, tunnel in ends.items():
            try:
                self._vxlan.apply_device(
                    tunnel, underlays[version].interface, self._device_mtu(underlays[version], version)
                )
            except CalicoError as error:
                failures.append(str(error))
        blocked = bool(ends) and not self._vxlan.versions()
        if blocked != self._blocked:
            self._blocked = blocked
            self._put(OverlayBlocked(blocked))
        self._absent = [tunnel.local for version, tunnel in ends.items() if not underlays[version].is_present]
        sources = {version: own[version] for version, underlay in underlays.items() if underlay.is_present}
        desired = {}
        for cidr, hop in self._overlay.routes().items():
            route = self._route(cidr, hop, sources.get(version_of(cidr)))
            if route is not None:
                desired[cidr] = route
        self._vxlan.apply_routes({*desired.values(), *self._kept(set(desired))})
        for version in self._vxlan.versions() - ends.keys():
            self._vxlan.remove_device(version)
        self._watched = {route.index for route in self._vxlan.routes if route.index is not None}
        self._watched |= {underlay.interface for underlay in underlays.values() if underlay.interface is not None}

    def _devices_stay(self) -> bool:
        """Return whether VXLAN devices must exist now.

        They must exist while a pool has an overlay. If any device exists when the last pool loses its overlay, they
        must exist for LINGER after that.
        """
        now = time.monotonic()
        if self._overlay.is_needed:
            self._devices_until = None
            return True
        if self._devices_until is None and self._vxlan.versions():
            self._devices_until = now + LINGER
        if self._devices_until is None or self._devices_until <= now:
            self._devices_until = None
            return False
        return True

    def _device_mtu(self, underlay: Underlay, version: int) -> int:
        largest = underlay.mtu - HEADER[version]
        if largest < SMALLEST and underlay.interface is not None:
            raise CalicoError(
                f"the MTU of the interface with {self._snapshot.topology.own(version)} is {underlay.mtu}, and must be "
                f"{SMALLEST + HEADER[version]} at least for an overlay"
            )
        return max(SMALLEST, min(largest, self._snapshot.mtu or largest))

    def _route(self, cidr: str, hop: Hop | None, source: str | None) -> Route | None:
        """Return the route to `cidr` through `hop`; a blackhole route if `hop` is None. For `source`, see Route.

        Return None if the hop's interface does not exist.
        """
        if hop is None:
            return Route(cidr)
        index = self._vxlan.index(hop.tunnel) if hop.tunnel is not None else self._vxlan.index_of(hop.interface)
        return None if index is None else Route(cidr, index, hop.gateway, source)

    def _kept(self, desired: set[str]) -> set[Route]:
        """Return the overlay's routes that are no longer desired, but stay until BIRD has a route to the same CIDR.

        `desired` are the CIDRs of the desired routes. Only routes to CIDRs in pools without an overlay stay, for
        GIVE_UP_AFTER at most.
        """
        leaving = {
            route for route in self._vxlan.routes if route.cidr not in desired and self._overlay.is_plain(route.cidr)
        }
        now = time.monotonic()
        waiting = {route.cidr for route in leaving} - (self._vxlan.routed_by_bird() if leaving else set())
        until = {cidr: self._leaving.get(cidr, now + GIVE_UP_AFTER) for cidr in waiting}
        self._leaving = {cidr: end for cidr, end in until.items() if now < end}
        self._poll_at = now + POLL if self._leaving else None
        return {route for route in leaving if route.cidr in self._leaving}

    # What is reported

    def _without_address(self) -> list[str]:
        return [
            f"this host is registered with {address}, which none of its interfaces has, so the overlay is dead: "
            "register it with an address of an interface that other hosts reach ('calicoctl node', with --ip or --ip6)"
            for address in self._absent
        ]

    def _out_of_reach(self) -> list[str]:
        hosts = self._overlay.out_of_reach() if self._overlay.is_needed else []
        if not hosts:
            return []
        return [f"no overlay leads to {first_few(hosts)}: no IP version in common with this host's address"]

    def _report_mtu(self, underlays: dict[int, Underlay]) -> None:
        plain = {version: underlay.mtu for version, underlay in underlays.items()}
        outer = 4 if 4 in plain else 6
        has_overlay = self._overlay.is_needed and outer in plain
        self._context.health.mtu = {
            "underlay": {f"ipv{version}": plain.get(version) for version in (4, 6)},
            "overlay": in_overlay(plain[outer], outer) if has_overlay else None,
            "configured": self._snapshot.mtu,
        }
