"""Register this host, so that workloads can be connected on it.

Usage:
  calicoctl node [--ip=<IP>] [--ip6=<IP6>] [--as=<AS_NUM>] [--log-dir=<DIR>] [--detach=<DETACH>]

Options:
  --ip=<IP>            the IPv4 address that other hosts reach this host under, and that its workloads use as next hop;
                       default: the one that the host's default route uses
  --ip6=<IP6>          the same for IPv6; default: none, and workloads here get no IPv6
  --as=<AS_NUM>        this host's AS number, as 64512 or as 0.64512, where it is not the global one
  --log-dir=<DIR>      for the host agent; has no effect as long as there is none
  --detach=<DETACH>    true or false; for the host agent, likewise

What is not given is unset, should it be set from an earlier call. The first host registered also gets the global
configuration and the default pools (192.168.0.0/16 and fd80:24e2:f998:72d6::/64) written. Must be run as root.

Examples:
  sudo calicoctl node --ip=192.0.2.2
  sudo calicoctl node --ip=192.0.2.2 --ip6=2001:db8::2 --as=64512
"""

from __future__ import annotations

import re

from calicoctl.addresses import parse_address
from calicoctl.cli import parse, require_root
from calicoctl.datastore.client import DatastoreClient
from calicoctl.errors import CalicoError
from calicoctl.output import warn


def run(argv: list[str]) -> None:
    arguments = parse(str(__doc__), argv)
    require_root()
    given = {
        version: _host_address(arguments[option], version, option) for version, option in ((4, "--ip"), (6, "--ip6"))
    }
    as_num = None if arguments["--as"] is None else parse_as_number(arguments["--as"])
    if arguments["--detach"] not in (None, "true", "false"):
        raise CalicoError(f"--detach={arguments['--detach']}: it must be true or false")
    datastore = DatastoreClient.from_environment()

    from calicoctl.netns import host_addresses

    detected, every = host_addresses()
    ipv4 = given[4] or detected[4]
    if ipv4 is None and given[6] is None:
        raise CalicoError("No IPv4 address of this host could be detected. Say which one to use with --ip.")
    datastore.register_host(ipv4, given[6], as_num)
    for address in filter(None, given.values()):
        if address not in every:
            warn(f"Warning: {address} is not an address of this host, as far as can be seen.")
    if ipv4 is not None and given[4] is None:
        print(f"Detected IPv4 address {ipv4}.")
    addresses = " and ".join(address for address in (ipv4, given[6]) if address)
    print(f"Host {datastore.host} is registered with {addresses}.")
    print(
        "The host agent is not part of this version: workloads get interfaces and addresses, but no packet is routed."
    )


def _host_address(text: str | None, version: int, option: str) -> str | None:
    """Return an option's address; raise CalicoError when it is none of that version that a host can have."""
    if text is None:
        return None
    try:
        address = parse_address(text)
    except CalicoError as error:
        raise CalicoError(f"{option}: {error}") from None
    if address.version != version:
        raise CalicoError(f"{option}: {text} is not an IPv{version} address")
    unusable = address.is_loopback() or address.is_multicast() or address.is_link_local() or int(address) == 0
    if unusable or address.is_ipv4_mapped() or (version == 4 and int(address) >> 24 in (0, *range(240, 256))):
        raise CalicoError(f"{option}: {text} is not an address that other hosts can reach this one under")
    return str(address)


def parse_as_number(text: str) -> str:
    """Return an AS number in decimal (asplain), from that notation or from asdot (RFC 5396); raise CalicoError."""
    match = re.fullmatch(r"(?:(\d{1,5})\.)?(\d{1,10})", text, re.ASCII)
    if match:
        high, low = (int(part or 0) for part in match.groups())
        if high < 65536 and low < (65536 if match[1] else 2**32) and high * 65536 + low > 0:
            return str(high * 65536 + low)
    raise CalicoError(f"'{text}' is not a valid AS number: it must be 1 to 4294967295, or like 1.10")
