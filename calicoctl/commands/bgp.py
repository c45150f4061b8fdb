"""Show and change the global BGP configuration: peers, node mesh, AS number.

Usage:
  calicoctl bgp peer add <PEER_IP> as <AS_NUM>
  calicoctl bgp peer remove <PEER_IP>
  calicoctl bgp peer show [--ipv4 | --ipv6] [--output=<FORMAT>]
  calicoctl bgp node-mesh [on | off] [--output=<FORMAT>]
  calicoctl bgp default-node-as [<AS_NUM>] [--output=<FORMAT>]

Options:
  <PEER_IP>              the address of a router that every host peers with
  <AS_NUM>               an AS number, 1 to 4294967295, as 64512 or as
                         0.64512; it is stored as 64512
  --ipv4, --ipv6         show IPv4, or IPv6, peers only
  -o, --output=<FORMAT>  json or yaml; default: a table, or the value alone

`node-mesh` and `default-node-as` without a value print the current one; the
defaults are on and 64511. For the peers of a single host, see 'calicoctl node
--help'. The agent of each host runs BIRD with these settings, and a change
takes effect within a second; 'calicoctl status' shows this host's sessions.
A new AS number or password resets the sessions that it is for: they have no
routes for about a second, or until both ends have the same.
Passwords of sessions are in /etc/calico/bgp-passwords on each host, not in
etcd. With the mesh off, hosts learn routes from their peers alone, such as a
route reflector.

Examples:
  calicoctl bgp peer add 192.0.2.254 as 64512
  calicoctl bgp node-mesh off
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from calicoctl.addresses import check_unicast, parse_address, parse_as_number
from calicoctl.datastore import keys
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.hosts import DEFAULT_AS_NUMBER, hostname
from calicoctl.datastore.model import Peer
from calicoctl.errors import CalicoError, NotFound, printable
from calicoctl.grammar import Prepared, parse
from calicoctl.output import data_format, print_data, print_table, warn, warn_of_each

if TYPE_CHECKING:
    from netaddr import IPAddress


def prepare(argv: list[str]) -> Prepared:
    arguments = parse(str(__doc__), argv)
    if arguments["peer"]:
        return prepare_peers(arguments, of_this_host=False)
    if arguments["node-mesh"]:
        return partial(_node_mesh, arguments)
    as_num = None if arguments["<AS_NUM>"] is None else parse_as_number(arguments["<AS_NUM>"])
    return partial(_default_node_as, as_num, data_format(arguments))


def prepare_peers(arguments: dict[str, Any], of_this_host: bool) -> Prepared:
    """Check a command about BGP peers, and return the function that runs the command.

    `arguments` are the result of grammar.parse. If `of_this_host` is true, the command is about the peers of this host,
    if not, about the global peers. Raises CalicoError if an argument is invalid.
    """
    if arguments["show"]:
        return partial(_show, arguments, of_this_host)
    if arguments["remove"]:
        return partial(_remove_peer, arguments["<PEER_IP>"], of_this_host)
    address = parse_address(arguments["<PEER_IP>"])
    check_unicast(address)
    return partial(_add_peer, address, parse_as_number(arguments["<AS_NUM>"]), of_this_host)


def _remove_peer(name: str, of_this_host: bool) -> None:
    """Remove a BGP peer. `name` is the peer's address, or the last part of the peer's key.

    If there is no such peer, raises NotFound, or CalicoError if `name` is not an address.
    """
    host = hostname() if of_this_host else None
    datastore = DatastoreClient.from_environment()
    # by key first: another tool may have written a key with an invalid value
    found = datastore.bgp_peer_keys(name, host)
    if not found:
        name = str(parse_address(name))
        found = datastore.bgp_peer_keys(name, host)
    if not found:
        raise NotFound(f"There is no BGP peer {name}{f' of host {host}' if host else ''}.")
    for key in found:
        datastore.unset(key)
    print(f"Removed BGP peer {printable(name)}")


def _add_peer(address: IPAddress, as_num: str, of_this_host: bool) -> None:
    host = hostname() if of_this_host else None
    datastore = DatastoreClient.from_environment()
    own = datastore.hosts.own_addresses() if of_this_host else set()
    if str(address) in own:
        raise CalicoError(f"{address} is an address of this host, which cannot have a BGP session with itself.")
    before = datastore.put_bgp_peer(Peer(str(address), as_num), host)
    if before is None:
        print(f"BGP peer {address} with AS number {as_num} is set")
    elif before.as_num == as_num:
        print(f"BGP peer {address} with AS number {as_num} is there already.")
    else:
        print(f"BGP peer {address} has a new AS number: from {before.as_num} to {as_num}.")
    if own:
        try:
            datastore.hosts.next_hop(address.version)
        except CalicoError as error:
            warn(f"Warning: there is no session with it before this host has an IPv{address.version} address. {error}")


def _show(arguments: dict[str, Any], of_this_host: bool) -> None:
    form = data_format(arguments)
    host = hostname() if of_this_host else None
    datastore = DatastoreClient.from_environment()
    versions = [v for v, other in ((4, "--ipv6"), (6, "--ipv4")) if not arguments[other]]
    found: list[Peer] = []
    for version in versions:
        peers, invalid = datastore.readable_bgp_peers(version, host)
        found += peers
        warn_of_each(invalid)
    if form:
        print_data([peer.to_dict() for peer in found], form)
    else:
        print_table(["Current BGP peers' address", "AS number"], [[peer.ip, peer.as_num] for peer in found])


def _node_mesh(arguments: dict[str, Any]) -> None:
    form = data_format(arguments)
    datastore = DatastoreClient.from_environment()
    if arguments["on"] or arguments["off"]:
        datastore.set_node_mesh(arguments["on"])
        enabled = arguments["on"]
    else:
        enabled = datastore.node_mesh()
    if form:
        print_data({"enabled": enabled}, form)
    else:
        print("on" if enabled else "off")


def _default_node_as(as_num: str | None, form: str | None) -> None:
    datastore = DatastoreClient.from_environment()
    if as_num is not None:
        datastore.set(keys.BGP_AS_NUM, as_num)
    stored = as_num or datastore.setting(keys.BGP_AS_NUM)
    try:
        now = DEFAULT_AS_NUMBER if stored is None else parse_as_number(stored)
    except CalicoError as error:
        now = DEFAULT_AS_NUMBER
        warn(f"Warning: the stored value is invalid, and agents use {now}: {printable(str(error))}")
    if form:
        print_data({"as_num": now}, form)
    else:
        print(printable(now))
