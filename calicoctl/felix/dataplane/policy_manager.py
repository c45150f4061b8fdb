"""Policy: drives our nftables tables to the snapshot, each change as one transaction.

ruleset.py renders what the tables must hold; this module runs those commands, reloads the tables as a whole where a
change is refused or another process has modified the tables, and backs off when the reload fails as well.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from calicoctl.desired.snapshot import Dirty
from calicoctl.errors import CalicoError
from calicoctl.felix.dataplane.manager import Context, Manager
from calicoctl.felix.dataplane.ruleset import Ruleset
from calicoctl.felix.events import Failure, TablesChanged, Tick

if TYPE_CHECKING:
    from calicoctl.felix.dataplane.nft import Nft

log = logging.getLogger("calico.felix")

BACKOFF = 5.0
"""Seconds until a reload that failed is tried again."""


class PolicyManager(Manager):
    """Keeps the tables as the snapshot demands and, while the store must not be used, as they were."""

    def __init__(self, context: Context, nft: Nft) -> None:
        self._context = context
        self._nft = nft
        self._dirty = Dirty()
        self._retry_at = 0.0
        self._restore_due = False
        self.ruleset = Ruleset()
        """What the tables hold; while they are not `in_sync`, what they held, or were to hold, last."""
        self.in_sync = False
        """Whether the tables hold what `ruleset` says. If not, the next `apply` reloads them."""
        self.error: str | None = None
        """Why the last `apply` failed."""
        self.reloaded = False
        """Whether the last `apply` has reloaded the tables as a whole."""
        self.affected: set[str] = set()
        """Addresses whose connections the last `apply` may deny."""

    def on_event(self, event: Any) -> None:
        if isinstance(event, Dirty):
            self._dirty.merge(event)
        elif isinstance(event, TablesChanged):
            # where notifications were lost (the empty name), they may have been those of our own changes
            if self.in_sync and ("calico" in event.names or ("" in event.names and not self._tables_exist())):
                log.warning("another process has modified our nftables tables; reloading them")
                self.in_sync, self._restore_due = False, True
        elif isinstance(event, Tick):
            self._restore_due = True

    def invalidate(self, backoff: float) -> None:
        """Assume nothing about what the tables hold; have them reloaded in `backoff` seconds."""
        self.in_sync, self._retry_at = False, time.monotonic() + backoff

    @property
    def retry_at(self) -> float | None:
        """The time (monotonic) at which a failed reload is due again; None if none has failed."""
        return None if self.in_sync or not self._retry_at else self._retry_at

    @property
    def is_backing_off(self) -> bool:
        """Whether a failed reload is not due again yet: until then, nothing else may be programmed either."""
        return self.retry_at is not None and time.monotonic() < self._retry_at

    @property
    def needs_apply(self) -> bool:
        return bool(self._dirty) or not self.in_sync

    def apply(self) -> None:
        dirty, self._dirty = self._dirty, Dirty()
        self.reloaded = False
        if self.in_sync:
            self._update(dirty)
        if not self.in_sync:
            self._reload()

    def _update(self, dirty: Dirty) -> None:
        self.in_sync = False
        try:
            update = self.ruleset.update(self._context.snapshot, dirty, self._context.pending_addresses())
            if update.commands:
                self._nft.run(update.commands)
            self._succeeded(update.affected)
        except CalicoError as error:
            log.warning("%s; reloading our nftables tables", error)

    def _reload(self) -> None:
        ruleset = Ruleset()
        try:
            update = ruleset.load(self._context.snapshot, self._context.pending_addresses())
            self._nft.run(update.commands)
        except CalicoError as error:
            self._retry_at = time.monotonic() + BACKOFF
            self.error = str(error)
            self._context.health.record(Failure(self.error, "tables"))
            return
        self.ruleset, self.reloaded = ruleset, True
        self._succeeded(update.affected)

    def _succeeded(self, affected: set[str]) -> None:
        self.in_sync, self.error, self._retry_at = True, None, 0.0
        self.affected = affected
        self._context.health.record(Failure(None, "tables"))

    def restore(self) -> None:
        """Reload the tables with what they held, where another process has modified them.

        For the time in which the store must not be used: the snapshot may be wrong. Retried at each Tick.
        """
        if self.in_sync or not self._restore_due or not self._context.health.first_update:
            return
        self._restore_due = False
        try:
            self._nft.run(self.ruleset.recreate())
            self.in_sync, self._retry_at = True, 0.0
        except CalicoError as error:
            self._context.health.error(str(error))

    def restore_established_fast_path(self) -> None:
        """Let packets of established connections pass unevaluated again, now that all connections are verified."""
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
