"""Show and change the IP pools that addresses are assigned from.

Usage:
  calicoctl pool add <CIDRS>... [--ipip] [--vxlan=<MODE>] [--nat-outgoing]
  calicoctl pool remove <CIDRS>... [--force] [--ipip] [--vxlan=<MODE>]
      [--nat-outgoing]
  calicoctl pool range add <START_IP> <END_IP> [--ipip] [--vxlan=<MODE>]
      [--nat-outgoing]
  calicoctl pool show [--ipv4 | --ipv6] [--output=<FORMAT>]

Options:
  <CIDRS>                networks such as 10.1.0.0/16 or fd00:1::/64, of at
                         least one block of 64 addresses (/26 or /122)
  <START_IP>             the first address of a range, and of a block of 64
  <END_IP>               the last address of the range, and of a block
  --ipip                 store in the pool that agents of other tools are to
                         encapsulate packets between hosts in IP-in-IP (IPv4
                         only): this version does not, use --vxlan; default:
                         not stored
  --vxlan=<MODE>         encapsulate packets between hosts in VXLAN, for
                         networks that have no routes to the pool: always;
                         cross-subnet, only to hosts in other networks than
                         the sending host's; never; default: never
  --nat-outgoing         masquerade packets to destinations outside all pools
                         with the host's address; default: no masquerading
  --force                remove the pool even if addresses of it are in use;
                         they stay in use
  --ipv4                 show IPv4 pools only
  --ipv6                 show IPv6 pools only
  -o, --output=<FORMAT>  json or yaml: an array of the pools, with the fields
                         that they have in etcd; default: a table

Adding an existing pool replaces its options. Pools must not overlap. A range
is added as the fewest CIDRs that cover exactly the range. Nothing is changed
unless all arguments are valid. `remove` accepts the options of `add`, and
ignores them.

Choose pools that overlap no network that a host is connected to: a warning
names those of this host. An address in such a network is assigned only if it
is requested explicitly, and never if a host or a gateway has it.

Examples:
  calicoctl pool add 10.1.0.0/16 --nat-outgoing
  calicoctl pool add 10.3.0.0/16 fd00:3::/64 --vxlan=cross-subnet
  calicoctl pool range add 10.2.0.64 10.2.1.127
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from calicoctl.addresses import parse_address, parse_cidr, parse_pool_cidr
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.model import NEVER, VXLAN_MODES, Pool
from calicoctl.datastore.pools import check_new, refuse_overlap
from calicoctl.errors import CalicoError, NotFound, printable
from calicoctl.grammar import Prepared, parse
from calicoctl.output import data_format, first_few, print_data, print_table, quantity, warn, warn_of_each
from calicoctl.workloads import host_network

if TYPE_CHECKING:
    from netaddr import IPNetwork

NO_IPIP = "this version's agents do not encapsulate in IP-in-IP: use --vxlan=always, or --vxlan=cross-subnet, instead"


def prepare(argv: list[str]) -> Prepared:
    arguments = parse(str(__doc__), argv)
    if arguments["show"]:
        return partial(_show, arguments)
    if arguments["remove"]:
        return partial(_remove, [_known(text) for text in dict.fromkeys(arguments["<CIDRS>"])], arguments["--force"])
    if arguments["range"]:
        networks = _networks_of_range(arguments["<START_IP>"], arguments["<END_IP>"])
    else:
        networks = list(dict.fromkeys(map(_network, arguments["<CIDRS>"])))
    arguments["--vxlan"] = _checked_mode(arguments["--vxlan"] or NEVER)
    if arguments["--ipip"] and arguments["--vxlan"] != NEVER:
        raise CalicoError("--ipip and --vxlan exclude each other: packets of a pool are encapsulated in one way")
    check_new(networks, arguments["--ipip"])
    return partial(_add, networks, arguments)


def _checked_mode(mode: str) -> str:
    if mode not in VXLAN_MODES:
        from calicoctl.spelling import did_you_mean, nearest

        raise CalicoError(
            f"'{mode}' is not a mode of --vxlan: it must be one of {', '.join(VXLAN_MODES)}"
            + did_you_mean(nearest(mode, VXLAN_MODES))
        )
    return mode


def _add(networks: list[IPNetwork], arguments: dict[str, Any]) -> None:
    datastore = DatastoreClient.from_environment()
    entries = {version: datastore.pool_entries(version) for version in {network.version for network in networks}}
    known = [parse_cidr(pool.cidr) for version in entries for pool in datastore.pools(version, entries[version])]
    for network in networks:
        refuse_overlap(network, known)
    warn_of_overlaps(map(str, networks))
    if arguments["--ipip"]:
        warn(f"Warning: {NO_IPIP}.")
    for network in networks:
        pool = Pool(
            str(network), "tunl0" if arguments["--ipip"] else None, arguments["--nat-outgoing"], arguments["--vxlan"]
        )
        before = datastore.put_pool(pool, entries[network.version])
        if before is None:
            print(f"Added pool {network}")
        elif _options(before) == _options(pool):
            print(f"Pool {network} is there already.")
        else:
            old = _options(before)
            changes = [f"{name} from {old[name]} to {now}" for name, now in _options(pool).items() if now != old[name]]
            print(f"Pool {network} has new options: {', '.join(changes)}.")


def _shown(pool: Pool) -> dict[str, Any]:
    """Return a pool's fields for JSON, including those that the store omits because they are off."""
    options = {"ipip": pool.ipip, "masquerade": pool.masquerade, "vxlan_mode": pool.vxlan}
    return {"cidr": pool.cidr, **options, **pool.extra}


def _options(pool: Pool) -> dict[str, str]:
    """Return a pool's options by name. The values are "on" or "off"; for `vxlan`, the mode."""
    switches = {name: "on" if on else "off" for name, on in (("ipip", pool.ipip), ("nat-outgoing", pool.masquerade))}
    return {"ipip": switches["ipip"], "vxlan": pool.vxlan, "nat-outgoing": switches["nat-outgoing"]}


def _networks_of_range(start: str, end: str) -> list[IPNetwork]:
    """Return the fewest CIDRs that together contain exactly the addresses from `start` to `end`.

    Raises CalicoError unless these are the addresses of one or more whole IPAM blocks.
    """
    from netaddr.ip import IPAddress, iprange_to_cidrs

    from calicoctl.datastore.blocks import BLOCK_SIZE

    first, last = parse_address(start), parse_address(end)
    if first.version != last.version:
        raise CalicoError(f"{start} and {end} are of different IP versions")
    if first > last:
        raise CalicoError(f"The range ends before it begins: {end} is below {start}")
    wider = [int(first) // BLOCK_SIZE * BLOCK_SIZE, int(last) // BLOCK_SIZE * BLOCK_SIZE + BLOCK_SIZE - 1]
    if wider != [int(first), int(last)]:
        low, high = (IPAddress(value, first.version) for value in wider)
        raise CalicoError(f"The range is no whole number of blocks of {BLOCK_SIZE} addresses; {low} to {high} is")
    return list(iprange_to_cidrs(first, last))


def _network(text: str) -> IPNetwork:
    """Parse the CIDR of a pool. Raises CalicoError if it is invalid, has host bits set, or has no prefix length."""
    network = parse_pool_cidr(text)
    if "/" not in text:
        raise CalicoError(
            f"'{text}' is one address, and a pool is a network: add a prefix length, /26 at most (/122 in IPv6)"
        )
    return network


def _known(text: str) -> IPNetwork | str:
    """Parse the CIDR of a pool to remove. If `_network` refuses the text, return it unchanged.

    Such a text may be the last part of the key of an invalid pool, which can be removed, too.
    """
    try:
        return _network(text)
    except CalicoError:
        return text


def _remove(pools: list[IPNetwork | str], force: bool) -> None:
    datastore = DatastoreClient.from_environment()
    found = datastore.pool_keys(map(str, pools))
    for pool in pools:
        if not found[str(pool)]:
            _network(str(pool))  # raises for what cannot be a pool
            raise NotFound(f"Pool {pool} does not exist{'; nothing is removed' if pools[1:] else ''}.")
    networks = [] if force else [pool for pool in pools if not isinstance(pool, str)]
    for network, used in datastore.ipam.used_in(networks).items():
        if used:
            some = first_few(map(str, used))
            raise CalicoError(
                f"Pool {network} has {quantity(len(used), 'address', 'addresses')} in use ({some}). Remove what uses "
                "them first, or use --force."
            )
    for pool in pools:
        for key in found[str(pool)]:
            datastore.unset(key)
        print(f"Removed pool {printable(str(pool))}")


def _show(arguments: dict[str, Any]) -> None:
    form = data_format(arguments)
    datastore = DatastoreClient.from_environment()
    versions = [v for v, other in ((4, "--ipv6"), (6, "--ipv4")) if not arguments[other]]
    pools = {version: readable_pools(datastore, version) for version in versions}
    if form:
        print_data([_shown(pool) for version in versions for pool in pools[version]], form)
        return
    for version in versions:
        rows = []
        for pool in pools[version]:
            options = [
                name if value == "on" else f"{name}={value}"
                for name, value in _options(pool).items()
                if value not in ("off", NEVER)
            ]
            rows.append([pool.cidr, ",".join(options)])
        print_table([f"IPv{version} CIDR", "Options"], rows)


def warn_of_overlaps(cidrs: Iterable[str]) -> None:
    """Print a warning for each pool in `cidrs` that overlaps a network to which this host is connected.

    If these networks cannot be determined, prints a warning that says so.
    """
    try:
        own = host_network.read()
    except CalicoError as error:
        warn(f"Warning: it is unknown whether pools overlap this host's networks: {error}")
        return
    for overlap in filter(None, map(own.overlap, cidrs)):
        warn(f"Warning: {overlap}.")


def readable_pools(datastore: DatastoreClient, version: int) -> list[Pool]:
    """Return the valid pools of an IP version. Prints warnings about invalid pools."""
    pools, invalid = datastore.readable_pools(version)
    warn_of_each(invalid)
    return pools
