"""Policy: drives our nftables tables to the state that follows from the snapshot, each change as one transaction.

ruleset.py renders the commands; this module runs them. If the kernel refuses a change, or another process has modified
the tables, this module reloads the tables as a whole. A reload that fails is retried after BACKOFF.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from calicoctl.desired.snapshot import Dirty
from calicoctl.errors import CalicoError
from calicoctl.felix.dataplane import drops
from calicoctl.felix.dataplane.drops import Counts
from calicoctl.felix.dataplane.host_rules import Ports
from calicoctl.felix.dataplane.lifeline import let_members_pass
from calicoctl.felix.dataplane.manager import Context, Manager
from calicoctl.felix.dataplane.ruleset import Ruleset
from calicoctl.felix.dataplane.vxlan import DEVICES
from calicoctl.felix.events import (
    DROPS_LOGGED,
    BgpChanged,
    Failure,
    LinkChanged,
    OverlayBlocked,
    TablesChanged,
    Tick,
)

if TYPE_CHECKING:
    from calicoctl.felix.dataplane.nft import Nft
    from calicoctl.policy.verdict import Party

log = logging.getLogger("calico.felix")

BACKOFF = 5.0
"""Seconds until a failed reload is retried."""


class PolicyManager(Manager):
    """Programs our tables from the snapshot, or restores them while the snapshot must not be applied."""

    def __init__(self, context: Context, nft: Nft, devices: Callable[[], Mapping[int, bool]] = dict) -> None:
        """`devices` returns the overlay's devices: the IP version of the underlay -> whether the device is up.

        A device that does not exist is left out. `devices` may raise CalicoError.
        """
        self._context = context
        self._nft = nft
        self._devices = devices
        self._dirty = Dirty()
        self._ports = Ports()
        self._retry_at = 0.0
        self._restore_due = False
        self._counts = Counts()
        """What the tables had counted when that was last read."""
        self._restored = False
        """Whether `restore` has loaded the tables. Then all connections must be verified, so the next `apply` reloads
        the tables.
        """
        self.ruleset = Ruleset()
        """The contents of the tables. If `in_sync` is False, the kernel's tables may differ."""
        self.in_sync = False
        """Whether the tables in the kernel match `ruleset`. If not, the next `apply` reloads them."""
        self.error: str | None = None
        """Why the last `apply` failed; None if it succeeded."""
        self.reloaded = False
        """Whether the last `apply` reloaded the tables as a whole."""
        self.affected: set[Party] = set()
        """The parties whose established connections the last `apply` may deny."""

    def on_event(self, event: Any) -> None:
        if isinstance(event, Dirty):
            self._dirty.merge(event)
        elif isinstance(event, TablesChanged):
            # an empty name means that notifications were lost; these may have been about our own changes
            if self.in_sync and ("calico" in event.names or ("" in event.names and not self._tables_exist())):
                log.warning("another process has modified our nftables tables; reloading them")
                self.in_sync, self._restore_due = False, True
        elif isinstance(event, Tick):
            self._restore_due = True
            self._read_devices()
            self._read_counts()
        elif isinstance(event, BgpChanged):
            self._set_ports(replace(self._ports, bgp=event.running))
        elif isinstance(event, OverlayBlocked):
            self._set_ports(replace(self._ports, blocked=event.blocked))
        elif isinstance(event, LinkChanged) and event.link.name in DEVICES.values():
            self._read_devices()

    def resync(self) -> None:
        self._read_devices()
        # the tables are reloaded when the kernel has got what it lacked
        if self.in_sync and not self.ruleset.logs and self._may_log():
            self.in_sync = False

    def _read_devices(self) -> None:
        with suppress(CalicoError):  # it is read again at the next Tick
            found = self._devices()
            up = frozenset(version for version, is_up in found.items() if is_up)
            self._set_ports(replace(self._ports, vxlan=frozenset(found), up=up))

    def _read_counts(self) -> Counts:
        """Read what the tables have counted, for the next reload, which continues from there, and return it.

        If the kernel's tables count nothing, since another process has removed the agent's, return what was last read.
        """
        with suppress(OSError):
            self._counts = drops.read(self._nft)
        return self._counts

    def _set_ports(self, ports: Ports) -> None:
        if ports != self._ports:
            self._ports, self._dirty.topology = ports, True

    def invalidate(self, backoff: float) -> None:
        """Mark the contents of the tables as unknown, so that the tables are reloaded after `backoff` seconds."""
        self.in_sync, self._retry_at = False, time.monotonic() + backoff

    @property
    def retry_at(self) -> float | None:
        """The time (monotonic) until which a reload of the tables waits; None if no reload waits.

        A reload waits after the last one has failed, or after `invalidate` was called.
        """
        return None if self.in_sync or not self._retry_at else self._retry_at

    @property
    def is_backing_off(self) -> bool:
        """Whether `retry_at` is in the future. While it is, the other managers must not program anything."""
        return self.retry_at is not None and time.monotonic() < self._retry_at

    @property
    def needs_apply(self) -> bool:
        return bool(self._dirty) or not self.in_sync or self._restored

    def apply(self) -> None:
        dirty, self._dirty = self._dirty, Dirty()
        self.reloaded = False
        if self.in_sync and not self._restored:
            self._update(dirty)
        if not self.in_sync or self._restored:
            self._reload()

    def _update(self, dirty: Dirty) -> None:
        self.in_sync = False
        try:
            update = self.ruleset.update(self._context.snapshot, dirty, self._context.pending_addresses(), self._ports)
            if update.commands:
                self._nft.run(update.commands)
            self._succeeded(update.affected)
        except CalicoError as error:
            log.warning("%s; reloading our nftables tables", error)

    def _may_log(self) -> bool:
        """Return whether the kernel can log dropped packets, and report a failure if it cannot."""
        why = drops.why_not_logged(self._nft)
        if why is not None:
            why = (
                "dropped packets are counted, but 'calicoctl drops' cannot show them, since the kernel cannot log "
                f"them; 'calicoctl checksystem --fix' loads what it lacks: {why}"
            )
        self._context.health.record(Failure(why, DROPS_LOGGED))
        return why is None

    def _reload(self) -> None:
        ruleset = Ruleset(self._may_log())
        try:
            counts = self._read_counts()
            update = ruleset.load(self._context.snapshot, self._context.pending_addresses(), self._ports, counts)
            proofs = ruleset.proofs(partial(self._nft.keys, "calico"))
            self._nft.run(update.commands)
        except CalicoError as error:
            self._retry_at = time.monotonic() + BACKOFF
            self.error, self.in_sync = str(error), False
            self._context.health.record(Failure(self.error, "tables"))
            return
        self.ruleset, self.reloaded, self._restored = ruleset, True, False
        if proofs:
            try:
                self._nft.run(proofs)
            except CalicoError as error:  # packets will add these elements again
                log.warning("%s", error)
        self._succeeded(update.affected)

    def _succeeded(self, affected: set[Party]) -> None:
        self.in_sync, self.error, self._retry_at = True, None, 0.0
        self.affected = affected
        self._context.health.record(Failure(None, "tables"))

    def restore(self) -> None:
        """Reload the tables with the contents of `ruleset` if the tables in the kernel may have other contents.

        That is so if another process has modified the tables, or if the last change or reload has failed. A failed
        reload is retried at each Tick. The reloaded tables lack the established fast path: see Ruleset.recreate.

        Before the agent's first update of the kernel, the tables are those of an earlier agent, and this agent does not
        know their contents. So they are not reloaded. Instead, packets from the servers that this host needs to reach
        etcd are let pass: see lifeline.let_members_pass.
        """
        if self.in_sync or not self._restore_due:
            return
        self._restore_due = False
        if not self._context.health.first_update:
            for said in let_members_pass(self._context.snapshot.network, self._nft):
                self._context.health.error(said)
            return
        try:
            self._nft.run(self.ruleset.recreate(self._read_counts()))
            self.in_sync, self._restored, self._retry_at = True, True, 0.0
        except CalicoError as error:
            self._context.health.error(str(error))

    def restore_established_fast_path(self) -> None:
        """Let packets of established connections pass again without an evaluation of the rules.

        Called when the connections of all affected parties have been verified. If this fails, the next `apply`
        reloads the tables.
        """
        try:
            self._nft.run(self.ruleset.restore_established_fast_path())
        except CalicoError as error:
            log.warning("%s; reloading our nftables tables", error)
            self.in_sync = False

    def _tables_exist(self) -> bool:
        try:
            return "drop" in self._nft.run("list chain inet calico inbound-forward")
        except CalicoError:
            return False
