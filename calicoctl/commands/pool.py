"""Show the ranges (pools) that addresses come from.

Usage:
  calicoctl pool show [--ipv4 | --ipv6] [--output=<FORMAT>]

Options:
  --ipv4             show IPv4 pools only
  --ipv6             show IPv6 pools only
  --output=<FORMAT>  json: an array of the pools as they stand in etcd

Examples:
  calicoctl pool show
  calicoctl pool show --ipv4 --output=json
"""

from __future__ import annotations

from calicoctl.cli import parse
from calicoctl.datastore.client import DatastoreClient
from calicoctl.output import print_json, print_table, wants_json


def run(argv: list[str]) -> None:
    arguments = parse(str(__doc__), argv)
    as_json = wants_json(arguments)
    datastore = DatastoreClient.from_environment()
    versions = [v for v, other in ((4, "--ipv6"), (6, "--ipv4")) if not arguments[other]]
    pools = {version: datastore.pools(version) for version in versions}
    if as_json:
        print_json([pool.to_dict() for version in versions for pool in pools[version]])
        return
    for version in versions:
        rows = []
        for pool in pools[version]:
            options = (["ipip"] if pool.ipip else []) + (["nat-outgoing"] if pool.masquerade else [])
            rows.append([pool.cidr, ",".join(options)])
        print_table([f"IPv{version} CIDR", "Options"], rows)
