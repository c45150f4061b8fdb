"""Show address assignments, release addresses, and find leaked ones.

Usage:
  calicoctl ipam info <IP> [--output=<FORMAT>]
  calicoctl ipam release <IPS>... [--force]
  calicoctl ipam show [--output=<FORMAT>]
  calicoctl ipam check [--fix] [--output=<FORMAT>]

Options:
  <IP>, <IPS>            an IPv4 or IPv6 address, or several
  --force                release the address even if an endpoint uses it
  --fix                  repair what can be repaired safely, on this host (as
                         root)
  -o, --output=<FORMAT>  json or yaml; default: text, or a table

`info` shows the owner of an address and its block of 64; the exit status is 1
if the address is not assigned. `show` counts the addresses of each pool:
used, free and, among the used ones, those that a host has borrowed from
another host's block. `check` compares blocks, handles and endpoints of the
whole store, and lists addresses that no endpoint uses, addresses that an
endpoint uses but that are not assigned to it, handles with wrong counts,
blocks whose list of free addresses is wrong or whose strict affinity is
violated (newer tools rely on both), blocks that the wrong host announces, or
none, and blocks and endpoints whose host is not registered. `--fix` releases
the blocks of a host that is gone if it has no endpoints and no agent reports
for it. The exit status of `check` is 1 if a problem remains.

Examples:
  calicoctl ipam info 192.168.0.1
  calicoctl ipam check --output=json
"""

from __future__ import annotations

from dataclasses import asdict, astuple
from functools import partial
from typing import TYPE_CHECKING

from calicoctl.addresses import parse_address
from calicoctl.commands.pool import readable_pools
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.usage import counter, usages
from calicoctl.diagnose import audit
from calicoctl.errors import CalicoError, NotFound, for_each, one_line
from calicoctl.grammar import Prepared, parse
from calicoctl.output import data_format, first_few, print_data, print_table, quantity, warn, warn_of_each

if TYPE_CHECKING:
    from netaddr import IPAddress


def prepare(argv: list[str]) -> Prepared:
    arguments = parse(str(__doc__), argv)
    if arguments["info"]:
        return partial(_info, parse_address(arguments["<IP>"]), data_format(arguments))
    if arguments["release"]:
        addresses = [parse_address(text) for text in arguments["<IPS>"]]
        return partial(_release, list(dict.fromkeys(addresses)), arguments["--force"])
    if arguments["show"]:
        return partial(_show, data_format(arguments))
    return partial(_check, arguments["--fix"], data_format(arguments))


def _info(address: IPAddress, form: str | None) -> None:
    from netaddr.ip import IPNetwork

    datastore = DatastoreClient.from_environment()
    block = datastore.ipam.block_of(address)
    owner = None if block is None else block.owner(int(address) - block.first)
    users = datastore.endpoints_with(address, owner)
    pools = readable_pools(datastore, address.version)
    pool = next((pool.cidr for pool in pools if address in IPNetwork(pool.cidr)), None)
    facts = owner.secondary if owner is not None else {}
    user, record = next(iter(users.items()), (None, None))
    name = (None if record is None else record.workload_name) or facts.get("workload_name")
    shown = {
        "ip": str(address),
        "assigned": owner is not None,
        "pool": pool,
        "block": None if block is None else block.cidr,
        "affinity": None if block is None or block.affinity is None else block.affinity.partition(":")[2],
        "handle": None if owner is None else owner.handle,
        "host": user.host if user else facts.get("host"),
        "orchestrator": user.orchestrator if user else facts.get("orchestrator"),
        "workload": user.workload if user else facts.get("workload"),
        "workload_name": name,
        "endpoint": user.endpoint if user else facts.get("endpoint"),
        "interface": facts.get("interface"),
        "namespace": facts.get("namespace"),
        "in_use": user is not None,
    }
    if form:
        print_data(shown, form)
    elif owner is not None or user is not None:
        print(f"IP {address} is {'in use' if user else 'assigned, but no endpoint has it'}.")
        for name, value in (
            ("Pool", pool or "none"),
            (
                "Block",
                f"{shown['block'] or 'none'}{', of host ' + str(shown['affinity']) if shown['affinity'] else ''}",
            ),
            *((name.capitalize(), shown[name]) for name in ("handle", "host", "orchestrator", "workload")),
            ("Name", shown["workload_name"]),
            *((name.capitalize(), shown[name]) for name in ("endpoint", "interface", "namespace")),
        ):
            if value is not None:
                print(one_line(f"  {name + ':':13} {value}"))
    if owner is None:
        where = f"in pool {pool}" if pool else "in no pool"
        listed = f", although endpoint {user.endpoint} lists it: see 'calicoctl ipam check'" if user else ""
        raise NotFound(f"IP {address} is not assigned{listed}; it is {where}.")


def _release(addresses: list[IPAddress], force: bool) -> None:
    datastore = DatastoreClient.from_environment()
    for_each(addresses, lambda address: _release_one(datastore, address, force))


def _release_one(datastore: DatastoreClient, address: IPAddress, force: bool) -> None:
    holders: set[str | None] | None = None
    if not force:
        owner = datastore.ipam.owner(address)
        user = next(iter(datastore.endpoints_with(address, owner)), None)
        if user is not None:
            raise CalicoError(
                f"IP {address} is used by endpoint {user.endpoint} of {_named(user)}. Remove it from there with "
                "'calicoctl container', or use --force."
            )
        if owner is None:
            raise NotFound(f"IP {address} is not assigned.")
        holders = {owner.handle}  # not if it is assigned anew in the meantime
    if datastore.ipam.release([address], holders):
        raise NotFound(f"IP {address} is not assigned.")
    print(f"IP {address} is released")


def _named(id: EndpointId) -> str:
    from calicoctl.workloads.workload import short_id

    return f"{id.orchestrator} {short_id(id.workload)} on {id.host}"


def _show(form: str | None) -> None:
    datastore = DatastoreClient.from_environment()
    found = []
    for version in (4, 6):
        pools = readable_pools(datastore, version)
        counts, invalid = datastore.ipam.blocks(version, counter(pools))
        warn_of_each(sorted(invalid, key=lambda error: error.key))
        found += usages(pools, counts)
    if form:
        print_data([asdict(usage) for usage in found], form)
    else:
        rows = [[usage.pool or "(in no pool)", *astuple(usage)[1:]] for usage in found]
        print_table(["Pool", "Addresses", "Used", "Free", "Borrowed"], rows)


def _check(fix: bool, form: str | None) -> None:
    datastore = DatastoreClient.from_environment()
    findings, unread = audit.check(datastore)
    if unread:
        what = first_few(f"{entry.key} ({entry.problem})" for entry in unread)
        if fix:
            raise CalicoError(f"Nothing is repaired, since not everything can be read: {what}.")
        warn(f"Warning: what cannot be read counts as missing here: {what}.")
    left = 0
    shown = []
    for finding in findings:
        why_not = audit.repair(finding) if fix else finding.advice
        fixed = fix and why_not is None
        left += not fixed
        if form:
            shown.append({**finding.to_dict(), "fixed": fixed})
        else:
            if fixed:
                ending = "fixed"
            elif fix:
                ending = f"not fixed: {why_not}"
            else:
                ending = "--fix repairs it" if finding.fix else str(why_not)
            print(one_line(f"{finding.kind} {finding.subject}: {finding.problem} ({ending})"))
    if form:
        print_data(shown, form)
    elif not findings:
        print("Blocks, handles and endpoints agree.")
    if left:
        raise CalicoError(f"{left} of {quantity(len(findings), 'problem')} {'remains' if left == 1 else 'remain'}.")
