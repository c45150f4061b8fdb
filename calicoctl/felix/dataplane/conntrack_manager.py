"""Ends connections that policy denies, and keeps an endpoint's new address pending until that is done for the address.

While an address is pending, nothing is programmed for it, so the endpoint cannot use it.

Packets of an established connection pass without evaluation of the rules (the established fast path). So after a change
of policy, the parties (verdict.Party) that the change affects are *unverified*. Their connections are listed
(conntrack.py, in a thread of its own) and *verified*: those that policy denies now are deleted. Until all parties are
verified, the tables evaluate the rules for all packets in a connection's first direction (ruleset.py).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from calicoctl.datastore.model import Rules
from calicoctl.desired.local_endpoint import LocalEndpoint
from calicoctl.desired.snapshot import Dirty, Snapshot
from calicoctl.errors import CalicoError
from calicoctl.felix.dataplane.conntrack import Listing
from calicoctl.felix.dataplane.manager import Context, Manager, PendingAddresses
from calicoctl.felix.events import Tick
from calicoctl.felix.health import Status
from calicoctl.policy.verdict import Packet, Party, TagContains, decide, either_party, is_from_host, is_host_service

if TYPE_CHECKING:
    from calicoctl.datastore.keys import EndpointId
    from calicoctl.felix.dataplane.conntrack import Conntrack
    from calicoctl.felix.dataplane.policy_manager import PolicyManager

log = logging.getLogger("calico.felix")


class ConntrackManager(Manager):
    """Verifies connections after each change of policy that the PolicyManager has programmed."""

    def __init__(self, context: Context, policy: PolicyManager, conntrack: Conntrack) -> None:
        self._context = context
        self._snapshot = context.snapshot
        self._policy = policy
        self._conntrack = conntrack
        self._pending = context.pending
        self._admitted: set[EndpointId] = set()
        """Endpoints whose pending addresses have been verified. The next `defer_new_addresses` adds them to `dirty`."""
        self._affected: set[Party] = set()
        """Unverified parties for which no listing has been requested yet."""
        self._unverified: dict[Party, int] = {}
        """Unverified party -> the number of the request whose listing must be verified; 0 before the request."""
        self._failed: set[Party] = set()
        """Parties whose connections are listed again at the next Tick, since listing, verifying or deleting them
        failed.
        """
        self._listings: list[Listing] = []

    def on_event(self, event: Any) -> None:
        if isinstance(event, Listing):
            self._listings.append(event)
        elif isinstance(event, Tick):
            number = self._conntrack.request(self._failed)
            self._unverified.update({party: number for party in self._failed if party in self._unverified})
            self._failed = set()

    def defer_new_addresses(self, dirty: Dirty) -> None:
        """Make the addresses that are new to this host's endpoints pending, and request a listing of their connections.

        Another endpoint may have had such an address before, and its connections would pass on the established fast
        path. The method changes `dirty`, so that the managers program no pending address:

        * An endpoint with such addresses that is not in the tables yet is removed from `dirty`, unless the tables are
          reloaded anyway.
        * One that is in the tables stays in `dirty`, and everything but its new addresses is programmed.
        * An endpoint whose pending addresses have been verified is added to `dirty`.

        Before the agent's first update of the kernel, this method does nothing.
        """
        if not self._context.health.first_update:  # at the start, all connections are verified before any route is set
            return
        for id in [id for id in dirty.endpoints if id.host == self._snapshot.host]:
            self._pending.pop(id, None)
            self._admitted.discard(id)
            endpoint = self._snapshot.local.get(id)
            new = set(endpoint.addresses if endpoint else ()).difference(self._policy.ruleset.addresses_of(id))
            if new:
                if self._policy.in_sync and not self._policy.ruleset.has(id):
                    dirty.endpoints.discard(id)
                self._pending[id] = PendingAddresses(new, self._conntrack.request(either_party(new), urgent=True))
        dirty.endpoints |= self._admitted
        self._admitted.clear()

    def mark_unverified(self) -> None:
        """Mark as unverified the parties that the PolicyManager's last `apply` has affected.

        Policy may deny open connections of these parties now. If that `apply` has reloaded the tables, all parties that
        are unverified, and all pending addresses, must be verified again, so they are marked, too.
        """
        affected = set(self._policy.affected)
        if self._policy.reloaded:  # what was being verified is verified again
            affected |= self._failed.union(self._unverified)
            affected |= either_party(chain.from_iterable(pending.addresses for pending in self._pending.values()))
            self._failed = set()
        self._unverified.update(dict.fromkeys(affected, 0))
        self._affected |= affected

    @property
    def needs_apply(self) -> bool:
        return bool(self._affected)

    def apply(self) -> None:
        """Request a listing of the connections of the parties marked as unverified since the last request.

        The Listing arrives as an event.
        """
        affected, self._affected = self._affected, set()
        self._unverified.update(dict.fromkeys(affected, self._conntrack.request(affected)))

    def verify_now(self) -> None:
        """List and verify the connections of the unverified parties at once, in this thread.

        Called at the agent's start, before the host forwards packets. A failure is reported, and the connections are
        listed again at the next Tick.
        """
        affected, self._affected = self._affected, set()
        self._end_denied_connections(self._conntrack.list(affected))

    def verify_listings(self) -> bool:
        """Verify the connections in the listings that have arrived. Return whether any listing had arrived."""
        listings, self._listings = self._listings, []
        for listing in listings:
            self._on_conntrack_listing(listing)
        return bool(listings)

    def discard_listings(self) -> None:
        """Discard the listings that have arrived. Called while the snapshot must not be applied.

        They cannot be verified then. The connections of their parties are listed again at the next Tick.
        """
        for listing in self._listings:
            self._failed.update(listing.parties)
        self._listings = []

    def _on_conntrack_listing(self, listing: Listing) -> None:
        if not self._policy.in_sync:
            self._failed.update(listing.parties)  # listed again when the tables are reloaded
            return
        why = self._end_denied_connections(listing)
        verified = [
            id
            for id, pending in self._pending.items()
            if pending.requested <= listing.number and either_party(pending.addresses) <= set(listing.parties)
        ]
        for id in verified:
            if why is None:
                del self._pending[id]
                self._admitted.add(id)
            elif id in self._snapshot.local:  # it stays pending: a connection of another endpoint may be left
                self._context.statuses.set(id, Status("error", self._snapshot.local[id].revision, why))

    def _end_denied_connections(self, listing: Listing) -> str | None:
        """Delete the listed connections that policy denies. Return None if that succeeds, or the reason if it fails.

        After a success, mark the listing's parties as verified. After a failure, report it, and have the connections
        of the same parties listed again at the next Tick.
        """
        try:
            if listing.error is not None:
                raise CalicoError(listing.error)
            tag_contains = self._policy.ruleset.tag_contains
            denied = [
                connection
                for connection in listing.connections
                if not allowed(connection.forwarded, self._snapshot, tag_contains, listing.host_addresses)
            ]
            self._conntrack.delete(denied)
        except CalicoError as error:
            self._context.health.error(str(error))
            self._failed.update(listing.parties)
            return str(error)
        if denied:
            log.info("ended %d open connections that policy denies now", len(denied))
        self._mark_verified(listing)
        return None

    def _mark_verified(self, listing: Listing) -> None:
        if not self._unverified or not self._policy.in_sync:
            return
        for party in listing.parties:
            if self._unverified.get(party, listing.number + 1) <= listing.number:
                del self._unverified[party]
        if not self._unverified:
            self._policy.restore_established_fast_path()


def allowed(packet: Packet, snapshot: Snapshot, tag_contains: TagContains, host_addresses: Collection[str]) -> bool:
    """Return whether this host's policy allows a packet. `host_addresses` are this host's own addresses.

    Each endpoint of this host that may send from the packet's source must allow the packet out. The endpoint of this
    host that has the packet's destination must allow the packet in. If there is no such endpoint, policy does not
    restrict that direction. As in the tables, there are three exceptions:

    * A packet to a service of this host (verdict.is_host_service) is allowed while Snapshot.host_services is true.
    * Any other packet from an endpoint to this host is denied if the host action is DROP.
    * A packet from this host, or from another host to an address in a pool, is allowed into every endpoint.
    """
    destination = snapshot.owner(packet.destination)
    to_host = packet.destination in host_addresses
    is_open = to_host and snapshot.host_services and is_host_service(packet)
    for source in snapshot.senders(packet.source) if not is_open else ():
        if to_host and snapshot.host_action == "DROP":
            return False
        rules = {name: rules.outbound for name, rules in _rules(source, snapshot)}
        if not decide(source.profiles, rules, packet, tag_contains).allowed:
            return False
    pools = (pool.cidr for pool in snapshot.pools.values())
    from_host = packet.source in host_addresses or is_from_host(packet, snapshot.topology.users, pools)
    if destination is not None and not from_host:
        rules = {name: rules.inbound for name, rules in _rules(destination, snapshot)}
        if not decide(destination.profiles, rules, packet, tag_contains).allowed:
            return False
    return True


def _rules(endpoint: LocalEndpoint, snapshot: Snapshot) -> Iterator[tuple[str, Rules]]:
    """Yield (name, rules) for each of an endpoint's profiles that exists and has valid rules."""
    for name in endpoint.profiles:
        profile = snapshot.profiles.get(name)
        if profile is not None and profile.rules is not None:
            yield name, profile.rules
