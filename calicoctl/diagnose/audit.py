"""Checks whether blocks, handles and endpoints in the whole store are consistent, and repairs some inconsistencies.

A running command makes the store inconsistent for a moment, so an inconsistency is reported only if a second check
finds it again.

Affinities, counts of handles and lists of free addresses are repaired for all hosts. Addresses are repaired only for
workloads of this host, since the repair holds the workload's lock, and locks are local to a host.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Callable, NamedTuple

from calicoctl.addresses import parse_address
from calicoctl.datastore import keys
from calicoctl.datastore.handles import counts_of, handle_of
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Endpoint
from calicoctl.datastore.store import Entry
from calicoctl.desired.local_endpoint import usable_addresses
from calicoctl.errors import CalicoError, InvalidValue
from calicoctl.output import quantity
from calicoctl.workloads.connected import ORCHESTRATORS
from calicoctl.workloads.libnetwork import LIBNETWORK
from calicoctl.workloads.workload import Workload, workload_of

if TYPE_CHECKING:
    from calicoctl.datastore.blocks import Block, Owner
    from calicoctl.datastore.client import DatastoreClient

_COPIED = tuple(f"{directory}/" for directory in (*map(keys.ipam_blocks, (4, 6)), keys.IPAM_HOSTS, keys.BGP_HOSTS))
"""The beginnings of the keys of blocks, affinities and registrations."""

RECHECK_DELAY = 1.0
"""Seconds between the two checks: longer than a command takes from one of its writes to the next."""


@dataclass(frozen=True)
class Finding:
    """An inconsistency. `problem` describes it.

    `subject` is what is inconsistent, and `kind` says what it is: "address", "block" (`subject` is the CIDR), "handle",
    "endpoint" (`subject` is the endpoint's id), or "unreadable" (`subject` is a key with an invalid value). `advice` is
    what the user can do if `fix` is None, or instead of the repair; it is empty if only the repair helps.
    """

    kind: str
    subject: str
    problem: str
    advice: str = ""
    fix: Callable[[], bool] | None = None
    """Repairs the inconsistency; returns whether it was repaired; raises CalicoError. None if there is no repair."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "subject": self.subject,
            "problem": self.problem,
            "advice": self.advice,
            "fixable": self.fix is not None,
        }


def check(datastore: DatastoreClient) -> tuple[list[Finding], list[Entry]]:
    """Return the inconsistencies that are found now, and again after RECHECK_DELAY, and the unread entries.

    An unread entry names a key or a directory that cannot be read (see `Entry.problem`); its contents count as missing.
    If there are unread entries, the caller must not repair anything: the repair would release the addresses of
    endpoints that could not be read. Raises CalicoError if the store does not answer.
    """
    facts = _Facts.read(datastore)
    found, unread = list(_compare(datastore, facts)), facts.unread
    del facts  # its memory is needed for the next ones
    if found:
        time.sleep(RECHECK_DELAY)
        again = _Facts.read(datastore)
        still = {(finding.kind, finding.subject) for finding in _compare(datastore, again)}
        found = [finding for finding in found if (finding.kind, finding.subject) in still]
        unread += [entry for entry in again.unread if entry.key not in {one.key for one in unread}]
    return sorted(found, key=_order), unread


def _order(finding: Finding) -> tuple[object, ...]:
    number = int(parse_address(finding.subject)) if finding.kind == "address" else 0
    return finding.kind, ":" in finding.subject, number, finding.subject, finding.problem


class _Listing(NamedTuple):
    """An endpoint that lists `addresses`. Those in `unusable` are no addresses that an endpoint can have."""

    id: EndpointId
    addresses: tuple[str, ...]
    unusable: tuple[str, ...]

    @classmethod
    def of(cls, endpoint: Endpoint) -> _Listing:
        addresses, usable = tuple(dict.fromkeys(endpoint.addresses)), usable_addresses(endpoint)
        return cls(endpoint.id, addresses, tuple(address for address in addresses if address not in usable))


class _Counts(NamedTuple):
    """The numbers of addresses in a handle: `counts` are pairs (CIDR of a block, number)."""

    handle: str
    counts: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class _Facts:
    """What is compared. Of endpoints and handles, which are many, only what is needed is kept.

    `handles` maps a handle to its counts (see _Counts). `copy` is a copy of the blocks, affinities and registrations in
    the store. `invalid` has an error for each invalid endpoint and handle. `unread`: see `check`.
    """

    endpoints: list[_Listing]
    handles: dict[str, tuple[tuple[str, int], ...]]
    invalid: list[InvalidValue]
    copy: DatastoreClient
    unread: list[Entry]

    @classmethod
    def read(cls, datastore: DatastoreClient) -> _Facts:
        found = datastore.collect(keys.ROOT, _fact)
        copy, unread = datastore.copy_of(fact for fact in found if isinstance(fact, Entry))
        return cls(
            [fact for fact in found if isinstance(fact, _Listing)],
            dict(fact for fact in found if isinstance(fact, _Counts)),
            [fact for fact in found if isinstance(fact, InvalidValue)],
            copy,
            unread,
        )


def _fact(entry: Entry) -> _Listing | _Counts | InvalidValue | Entry | None:
    """Return what is compared of an entry; None if nothing of it is compared.

    Of blocks, affinities, registrations, and what cannot be read, this is the entry itself. If an endpoint or a handle
    is invalid, the result is the error that says so.
    """
    if entry.problem is not None or entry.key.startswith(_COPIED):
        return entry
    try:
        if entry.key.startswith(keys.ipam_handles() + "/"):
            handle = handle_of(entry)
            return _Counts(handle, tuple((sys.intern(cidr), count) for cidr, count in counts_of(entry).items()))
        id = keys.parse_endpoint(entry.key)
        return None if id is None else _Listing.of(Endpoint.from_json(id, entry.value, entry.key))
    except InvalidValue as error:
        return error


def _compare(datastore: DatastoreClient, facts: _Facts) -> Iterator[Finding]:
    """Yield the inconsistencies in `facts`.

    The repairs of the findings read and write the store itself, by `datastore`.
    """
    invalid = list(facts.invalid)
    registered = set(facts.copy.hosts.registered())
    listed: dict[str, list[_Listing]] = defaultdict(list)
    for listing in facts.endpoints:
        for address in listing.addresses:
            listed[address].append(listing)
        host = listing.id.host
        if host not in registered:
            yield Finding(
                "endpoint",
                listing.id.endpoint,
                f"its host {host} is not registered",
                f"run 'calicoctl node' there, or 'calicoctl node remove --hostname={host} --remove-endpoints'",
            )
    # else an address may belong to an unreadable endpoint
    sound = all(keys.parse_endpoint(error.key) is None for error in invalid)
    unseen = set(listed)
    unread: set[str] = set()
    affine: dict[tuple[int, str], str] = {}
    counted: dict[str, dict[str, int]] = defaultdict(dict)

    def inspect(block: Block) -> tuple[str, str, list[tuple[str, str | None]], list[Finding]]:
        """Return the block's CIDR, the host that it has affinity to, its addresses with their handles, and findings."""
        cidr = block.cidr
        holders = [(str(block.address(ordinal)), owner) for ordinal, owner in block.held()]
        findings = list(_of_block(datastore, block))
        for address, owner in holders:
            listing = [one.id for one in listed.get(address, ())]
            findings += _of_address(datastore, cidr, address, owner, listing, sound, registered)
        return (
            cidr,
            (block.affinity or "").partition(":")[2],
            [(address, owner.handle) for address, owner in holders],
            findings,
        )

    for version in (4, 6):
        blocks, unreadable = facts.copy.ipam.blocks(version, inspect)
        invalid += unreadable
        unread.update(keys.undashed(keys.last(error.key)) for error in unreadable)
        for cidr, host, held, findings in blocks:
            yield from findings
            affine[version, cidr] = host
            unseen.difference_update(address for address, _ in held)
            for _, handle in held:
                if handle is not None:
                    counted[handle][cidr] = counted[handle].get(cidr, 0) + 1
    affinities, misnamed = facts.copy.ipam.affinities()
    invalid += misnamed

    @cache  # a host that is gone may have left many blocks
    def release(host: str) -> Callable[[], bool] | None:
        there = datastore.for_host(host)
        return cache(partial(_release_affinities, there)) if _is_gone(there) else None

    for version, cidr in sorted(affinities.keys() | affine.keys()):
        hosts = affinities.get((version, cidr), set())
        if cidr not in unread:
            yield from _of_affinities(datastore, version, cidr, affine.get((version, cidr)), hosts, registered, release)
    for address in sorted(unseen):
        if datastore.ipam.cidr_of(parse_address(address)) not in unread:
            for listing in listed[address]:
                alone = len(listed[address]) == 1 and address not in listing.unusable
                yield _unassigned(datastore, address, listing.id, alone)
    strange = {keys.last(error.key) for error in invalid if error.key.startswith(keys.ipam_handles() + "/")}
    for handle in sorted(facts.handles.keys() | {handle for handle in counted if _is_key(handle)}):
        says, holds = dict(facts.handles.get(handle, ())), counted.get(handle, {})
        if handle in strange or not unread.isdisjoint(says) or (says == holds and says):
            continue
        much, little = sum(says.values()), sum(holds.values())
        what = "it counts other blocks' addresses"
        if much != little:
            what = f"it counts {quantity(much, 'address', 'addresses')} and holds {little}"
        yield Finding("handle", handle, what, fix=partial(_recount, datastore, handle, list(holds)))
    for error in invalid:
        yield Finding("unreadable", error.key, error.why, "fix or delete it")


def _is_key(handle: str) -> bool:
    """Return whether a handle can be the last part of a key. etcd's v2 API hides keys that begin with an underscore."""
    return bool(handle) and "/" not in handle and not handle.startswith("_")


def _of_affinities(
    datastore: DatastoreClient,
    version: int,
    cidr: str,
    affine: str | None,
    hosts: set[str],
    registered: set[str],
    release: Callable[[str], Callable[[], bool] | None],
) -> Iterator[Finding]:
    """Yield the contradictions between the affinity in a block and the hosts' affinity keys.

    A host announces the blocks for which it has an affinity key. `affine` is the host to which the block `cidr` has
    affinity, empty if it has none; None if the block does not exist. `hosts` are the hosts with an affinity key for
    this block. `registered` are the names of the registered hosts. `release` returns a repair that releases all blocks
    of a host that is gone, and None for any other host.
    """
    for host in sorted(hosts | ({affine} if affine else set())):
        repair = partial(_repair_affinity, datastore.for_host(host), version, cidr)
        if host not in registered:
            yield Finding(
                "block",
                cidr,
                f"it has affinity to host {host}, which is not registered",
                f"run 'calicoctl node' there, or 'calicoctl node remove --hostname={host}'",
                release(host),
            )
        elif affine is None:
            yield Finding("block", cidr, f"host {host} has affinity to it, but the block does not exist", fix=repair)
        elif host != affine:
            whose = f"is of host {affine}" if affine else "has no affinity"
            yield Finding("block", cidr, f"host {host} has affinity to it, but the block {whose}", fix=repair)
        elif host not in hosts:
            problem = f"it has affinity to host {host}, but that host's key is missing, so {host} does not announce it"
            yield Finding("block", cidr, problem, fix=repair)


def _is_gone(there: DatastoreClient) -> bool:
    """Return whether a host has no registration, no endpoint, and no status of its agent.

    `there` is the datastore client for that host.
    """
    return not (there.host in there.hosts.registered() or there.statuses.of_host() or there.endpoint_ids())


def _release_affinities(there: DatastoreClient) -> bool:
    if not _is_gone(there):
        return False
    there.ipam.release_affinities()
    return True


def _repair_affinity(there: DatastoreClient, version: int, cidr: str) -> bool:
    there.ipam.repair_affinity(version, cidr)
    return True


def _of_block(datastore: DatastoreClient, block: Block) -> Iterator[Finding]:
    """Yield the problems of a block's list of free addresses and of its field `strict_affinity`.

    If the block has strict affinity, also yield a finding for each of its addresses that is used on another host.
    """
    problem = block.free_list_problem()
    if problem is not None:
        fix = partial(_repair_free_list, datastore, block.version, block.cidr)
        yield Finding("block", block.cidr, problem, fix=fix)
    strict = block.extra.get("strict_affinity")
    if not isinstance(strict, (bool, type(None))):
        yield Finding("block", block.cidr, 'its "strict_affinity" is neither true nor false', "set it to one of them")
    for ordinal, owner in block.held() if block.is_strict else ():
        host = owner.secondary.get("host")
        if isinstance(host, str) and block.affinity not in (None, f"host:{host}"):
            yield Finding(
                "address",
                str(block.address(ordinal)),
                f"it is used on host {host}, but block {block.cidr} is reserved for {block.affinity.replace(':', ' ')}",
                "reconnect its workload with another address",
            )


def _of_address(
    datastore: DatastoreClient,
    block: str,
    address: str,
    owner: Owner,
    listing: list[EndpointId],
    sound: bool,
    registered: set[str],
) -> Iterator[Finding]:
    """Yield the contradictions between the owner of an assigned address and the endpoints that list the address.

    `block` is the CIDR of the address's block. `listing` are the ids of the endpoints that list the address. `sound`
    says whether all endpoints in the store could be read; if not, no repair is offered, since an unread endpoint may
    list the address. `registered` are the names of the registered hosts.
    """
    release = f"'calicoctl ipam release {address}' releases it"
    if owner.handle is not None and not _is_key(owner.handle):
        yield Finding("address", address, f"it is assigned to '{owner.handle}', which is not a valid handle", release)
        return
    for other in listing[1:]:
        yield Finding(
            "address",
            address,
            f"endpoints {listing[0].endpoint} and {other.endpoint} both list it",
            "remove one of the two containers from the network",
        )
    host = owner.secondary.get("host")
    whose = f"{owner.handle or 'an owner without a handle'}{f' on host {host}' if isinstance(host, str) else ''}"
    if listing:
        if owner.handle is not None and not any(_holds(owner, id) for id in listing):
            id = listing[0]
            yield Finding(
                "address",
                address,
                f"endpoint {id.endpoint} of host {id.host} lists it, but it is assigned to {whose}",
                "remove that endpoint's container from the network, and connect it again",
            )
        return
    problem = f"it is assigned to {whose}, and no endpoint has it"
    orchestrator, _, workload = (owner.handle or "").partition(".")
    if not sound:
        yield Finding("address", address, problem, "fix the unreadable keys first: it may be an endpoint's")
    elif orchestrator == LIBNETWORK and isinstance(host, str):
        soon = f"the process for Docker networks on {host} releases it within about two minutes, or else {release}"
        yield Finding("address", address, problem, soon)
    elif orchestrator not in ORCHESTRATORS or not workload:
        yield Finding("address", address, problem, release)
    elif host != datastore.host:
        advice = release
        if isinstance(host, str):
            known = f"run 'calicoctl ipam check --fix' on {host}"
            all_of_it = f"{release}, and 'calicoctl node remove --hostname={host}' all of that host"
            advice = known if host in registered else all_of_it
        yield Finding("address", address, problem, advice)
    else:
        fix = partial(_release_leaked, datastore, orchestrator, workload, block, address)
        yield Finding("address", address, problem, release, fix)


def _holds(owner: Owner, id: EndpointId) -> bool:
    """Return whether the owner of an address is the workload of an endpoint, on the endpoint's host.

    An owner that names no host is taken to be on the endpoint's host. If an old tool stored a namespace's endpoint
    under the orchestrator `docker`, the owner may have the handle of either orchestrator.
    """
    its = owner.handle in (f"{id.orchestrator}.{id.workload}", ".".join(workload_of(id)))
    return its and owner.secondary.get("host", id.host) == id.host


def _unassigned(datastore: DatastoreClient, address: str, id: EndpointId, alone: bool) -> Finding:
    """Return the finding for an address that an endpoint lists, but that is not assigned.

    `alone` says whether the endpoint lists the address as a single address, not as a network, and no other endpoint
    lists it. The address is repaired only then.
    """
    problem = f"endpoint {id.endpoint} of host {id.host} lists it, but it is not assigned"
    if id.host != datastore.host:
        return Finding("address", address, problem, f"run 'calicoctl ipam check --fix' on {id.host}")
    if not alone:
        return Finding(
            "address", address, problem, "others list it, too, or it is not a single address: reconnect the workload"
        )
    return Finding("address", address, problem, fix=partial(_restore, datastore, id, address))


def _release_leaked(datastore: DatastoreClient, orchestrator: str, workload: str, block: str, address: str) -> bool:
    from calicoctl.workloads import upkeep

    datastore.ipam.handles.recount(f"{orchestrator}.{workload}", [block])  # its count may lack the address
    upkeep.release_leaked(datastore, Workload(orchestrator, workload, workload))
    return datastore.ipam.owner(parse_address(address)) is None


def _restore(datastore: DatastoreClient, id: EndpointId, address: str) -> bool:
    from calicoctl.workloads import upkeep

    return upkeep.restore_address(datastore, id, address)


def _repair_free_list(datastore: DatastoreClient, version: int, block: str) -> bool:
    datastore.ipam.repair_free_list(version, block)
    return True


def _recount(datastore: DatastoreClient, handle: str, blocks: list[str]) -> bool:
    datastore.ipam.handles.recount(handle, blocks)
    return True


def repair(finding: Finding) -> str | None:
    """Repair an inconsistency. Return None if it was repaired, or the reason if it was not.

    If the finding has no `fix`, return its advice.
    """
    if finding.fix is None:
        return finding.advice
    try:
        return None if finding.fix() else "it was modified concurrently: check again"
    except CalicoError as error:
        return str(error)
