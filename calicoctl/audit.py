"""Compares what the whole store says of addresses: blocks, handles, and endpoints. Puts right what is safe to.

What a command is just changing looks wrong for a moment; so it is looked at twice, and what is put right is looked at
once more under the lock of its workload. Locks are a host's own, so that is done for this host's workloads alone.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Callable

from calicoctl.addresses import parse_address
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Endpoint
from calicoctl.errors import CalicoError, InvalidValue
from calicoctl.workload import DOCKER, NAMESPACE, Workload

if TYPE_CHECKING:
    from calicoctl.datastore.client import DatastoreClient
    from calicoctl.datastore.ipam import Owner

SECOND_LOOK = 1.0
"""Seconds between the two looks: longer than a command takes from one of its writes to the next."""


@dataclass(frozen=True)
class Finding:
    """Something that does not fit together. `advice` is what to do about it where `--fix` does nothing."""

    kind: str
    subject: str
    problem: str
    advice: str = ""
    fix: Callable[[], bool] | None = None
    """Puts it right, and tells whether it did; raises CalicoError."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "subject": self.subject,
            "problem": self.problem,
            "advice": self.advice,
            "fixable": self.fix is not None,
        }


def check(datastore: DatastoreClient) -> list[Finding]:
    """Return all that does not fit together, now and a moment later. Raises CalicoError."""
    found = list(_look(datastore))
    if found:
        time.sleep(SECOND_LOOK)
        still = {(finding.kind, finding.subject) for finding in _look(datastore)}
        found = [finding for finding in found if (finding.kind, finding.subject) in still]
    return found


def _look(datastore: DatastoreClient) -> Iterator[Finding]:
    endpoints, problems = datastore.readable_endpoints()
    for problem in problems:
        yield Finding("unreadable", problem.key, problem.why, "put it right or remove it")
    registered = set(datastore.registered_hosts())
    listed: dict[str, list[Endpoint]] = defaultdict(list)
    for endpoint in endpoints:
        for address in endpoint.addresses:
            listed[address].append(endpoint)
        host = endpoint.id.host
        if host not in registered:
            yield Finding(
                "endpoint",
                endpoint.id.endpoint,
                f"its host {host} is not registered",
                f"run 'calicoctl node' there, or 'calicoctl node remove --hostname={host} --remove-endpoints'",
            )
    unseen = set(listed)
    counted: dict[str, Counter[str]] = defaultdict(Counter)
    sound = not problems
    for version in (4, 6):
        try:
            for block in datastore.ipam.blocks(version):
                for ordinal, owner in block.held():
                    address = str(block.address(ordinal))
                    unseen.discard(address)
                    if owner.handle is not None:
                        counted[owner.handle][block.cidr] += 1
                    yield from _of_address(datastore, address, owner, listed.get(address, []), sound)
        except InvalidValue as problem:
            yield Finding("unreadable", problem.key, problem.why, "put it right or remove it")
            return  # what would be said of the others might be wrong
    for address in sorted(unseen):
        for endpoint in listed[address]:
            yield _unassigned(datastore, address, endpoint.id)
    try:
        handles = datastore.ipam.handle_counts()
    except InvalidValue as problem:
        yield Finding("unreadable", problem.key, problem.why, "put it right or remove it")
        return
    for handle in sorted(handles.keys() | counted.keys()):
        if handles.get(handle) != dict(counted[handle]):
            says, holds = sum(handles.get(handle, {}).values()), sum(counted[handle].values())
            what = (
                f"it counts {says} addresses and holds {holds}"
                if says != holds
                else "it counts other blocks' addresses"
            )
            blocks = list(counted[handle])
            yield Finding("handle", handle, what, fix=partial(_recount, datastore, handle, blocks))


def _of_address(
    datastore: DatastoreClient, address: str, owner: Owner, listing: list[Endpoint], sound: bool
) -> Iterator[Finding]:
    """Look at an address that is assigned, with the endpoints that list it."""
    for endpoint in listing[1:]:
        yield Finding(
            "address",
            address,
            f"endpoints {listing[0].id.endpoint} and {endpoint.id.endpoint} both list it",
            "remove one of the two containers from the network",
        )
    orchestrator, _, workload = (owner.handle or "").partition(".")
    if listing:
        ids = {endpoint.id for endpoint in listing}
        if owner.handle is not None and not any(
            (id.orchestrator, id.workload) == (orchestrator, workload) for id in ids
        ):
            yield Finding(
                "address",
                address,
                f"endpoint {listing[0].id.endpoint} lists it, but it is assigned to {owner.handle}",
                "remove that endpoint's container from the network, and connect it again",
            )
        return
    host = owner.secondary.get("host")
    whose = f"it is assigned to {owner.handle or 'nobody that is named'}, and no endpoint has it"
    release = f"'calicoctl ipam release {address}' gives it back"
    if orchestrator not in (DOCKER, NAMESPACE) or not workload:
        yield Finding("address", address, whose, release)
    elif host != datastore.host:
        advice = f"run 'calicoctl ipam check --fix' on {host}" if isinstance(host, str) else release
        yield Finding("address", address, whose, advice)
    else:
        fix = partial(_tidy, datastore, orchestrator, workload, address) if sound else None
        yield Finding("address", address, whose, release, fix)


def _unassigned(datastore: DatastoreClient, address: str, id: EndpointId) -> Finding:
    problem = f"endpoint {id.endpoint} of host {id.host} lists it, but it is not assigned"
    if id.host != datastore.host:
        return Finding("address", address, problem, f"run 'calicoctl ipam check --fix' on {id.host}")
    return Finding("address", address, problem, fix=partial(_restore, datastore, id, address))


def _tidy(datastore: DatastoreClient, orchestrator: str, workload: str, address: str) -> bool:
    from calicoctl import upkeep

    upkeep.tidy(datastore, Workload(orchestrator, workload, workload))
    return datastore.ipam.owner(parse_address(address)) is None


def _restore(datastore: DatastoreClient, id: EndpointId, address: str) -> bool:
    from calicoctl import upkeep

    return upkeep.restore_address(datastore, id, address)


def _recount(datastore: DatastoreClient, handle: str, blocks: list[str]) -> bool:
    datastore.ipam.recount(handle, blocks)
    return True


def put_right(finding: Finding) -> str | None:
    """Put a finding right; return why that could not be done, None where it was."""
    if finding.fix is None:
        return finding.advice
    try:
        return None if finding.fix() else "somebody else has changed it meanwhile: check again"
    except CalicoError as error:
        return str(error)
