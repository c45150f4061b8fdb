"""Addresses of workloads: which ones are asked for, which may be given, and whose they are; and names of interfaces.

Reads the store, and assigns addresses. What else happens when a workload is connected is in wiring.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from calicoctl.addresses import parse_address, parse_pool_cidr
from calicoctl.datastore.keys import EndpointId, is_endpoint_id
from calicoctl.datastore.model import Pool
from calicoctl.errors import AddressTaken, CalicoError
from calicoctl.output import warn
from calicoctl.workloads.workload import Workload, short_id

if TYPE_CHECKING:
    from netaddr import IPAddress

    from calicoctl.datastore.blocks import Owner
    from calicoctl.datastore.client import DatastoreClient
    from calicoctl.datastore.handles import KnownHandle
    from calicoctl.datastore.reserved import Network, Reserved
    from calicoctl.datastore.store import Entry

DEFAULT_INTERFACE = "eth1"
"""The name of an interface inside a workload, unless another one is given."""


class AddressHeld(AddressTaken):
    """A requested address is assigned to another workload. `holder` is the id of its endpoint, None if unknown."""

    def __init__(self, why: str, holder: EndpointId | None) -> None:
        super().__init__(why)
        self.holder = holder


@dataclass(frozen=True)
class AddressRequest:
    """A request for an address: for `address` if it is set, or for any address of the pool `cidr` if that is set.

    If neither is set, any address of the IP version `version` is requested; if `subnet` is set, any address of this
    CIDR, which must be a pool or a part of one. `version` is always set. `any_other` says, in the advice to request
    another address, how the user gets any free one, such as "omit --ip"; if it is empty, the advice names `ipv4` or
    `ipv6`.
    """

    version: int
    address: IPAddress | None = None
    cidr: str | None = None
    subnet: str | None = None
    any_other: str = ""

    @classmethod
    def parse(cls, text: str) -> AddressRequest:
        """Parse `text`: an address, `ipv4`, `ipv6`, or a CIDR. Raises CalicoError if the text is none of these.

        Whether there is a pool with this CIDR is not checked.
        """
        if text.lower() in ("ipv4", "ipv6"):
            return cls(int(text[-1]))
        if "/" in text:
            network = parse_pool_cidr(text)
            return cls(network.version, cidr=str(network))
        try:
            address = parse_address(text)
        except CalicoError:
            raise CalicoError(
                f"'{text}' is not a valid IP address; give an address, 'ipv4', 'ipv6', or the CIDR of a pool"
            ) from None
        return cls(address.version, address=address)

    @property
    def advice(self) -> str:
        """The end of the advice `Give …` in an error about an address that cannot be assigned: see `any_other`."""
        any_other = self.any_other or f"'ipv{self.version}'"
        return f"another, or {any_other} for any."

    def pools(self, datastore: DatastoreClient, entries: list[Entry] | None = None) -> list[Pool]:
        """Return the pools from which an address may be assigned for this request; raise CalicoError if there is none.

        With `subnet`, the pools in the result have this CIDR instead of their own. `entries` are the store's entries of
        the pools of this IP version, if the caller has just read them. If `entries` is None, they are read.
        """
        from netaddr.ip import IPNetwork

        pools, invalid = datastore.readable_pools(self.version, entries)
        if self.cidr is not None:
            chosen = [pool for pool in pools if pool.cidr == self.cidr]
            missing = f"{self.cidr} is not the CIDR of a pool"
        elif self.address is not None:
            chosen = [pool for pool in pools if self.address in IPNetwork(pool.cidr)]
            missing = f"IP {self.address} is in no pool"
        elif self.subnet is not None:
            part = IPNetwork(self.subnet)
            chosen = [replace(pool, cidr=self.subnet) for pool in pools if part in IPNetwork(pool.cidr)]
            missing = f"{self.subnet} is neither a pool nor a part of one"
        else:
            chosen = pools
            missing = f"There is no IPv{self.version} pool"
        if not chosen and invalid:  # an invalid pool may be the requested one
            raise invalid[0]
        if not chosen:
            known = ", ".join(pool.cidr for pool in pools) or "none"
            raise CalicoError(f"{missing}. IPv{self.version} pools: {known}.")
        return chosen

    def fits(self, address: IPAddress) -> bool:
        """Return whether `address` satisfies the request; `subnet` is not checked."""
        from netaddr.ip import IPNetwork

        if self.address is not None:
            return bool(address == self.address)
        if self.cidr is not None:
            return address in IPNetwork(self.cidr)
        return bool(address.version == self.version)


@dataclass(frozen=True)
class Terms:
    """The data that is needed to assign a new address for a request, and to configure it.

    `next_hop` is the gateway of the workload's default route. `reserved` are the addresses that workloads on this host
    must not have. The address may be from any of `pools`. `mtu` is the value of the setting MTU, None if it is not set.
    `affine` are the names of the blocks with affinity to this host, None if they were not read. `recent` is the block
    in which this host has last assigned an address, None if it was not read.
    """

    next_hop: str
    reserved: Reserved
    pools: list[Pool]
    mtu: str | None
    affine: list[str] | None
    recent: Entry | None

    @classmethod
    def read(cls, datastore: DatastoreClient, request: AddressRequest, next_hop: str | None = None) -> Terms:
        """Read this data for a request from the store and the kernel.

        `next_hop` is the gateway, if the caller knows it; None means that it is read from the store. Raises CalicoError
        if there is no gateway or no pool, or if no workload may have the requested address.
        """
        facts = datastore.read_for_address(request.version, automatic=request.address is None)
        next_hop = next_hop or datastore.hosts.next_hop(request.version, facts.hosts)
        reserved = reserved_addresses(datastore, request.version, facts.hosts)
        _refuse_reserved(request, reserved)
        pools = request.pools(datastore, facts.pools)
        return cls(next_hop, reserved, pools, facts.mtu, facts.affine, facts.recent)


def assign(
    datastore: DatastoreClient, owner: Owner, request: AddressRequest, terms: Terms, handle: KnownHandle | None = None
) -> IPAddress:
    """Assign an address that satisfies `request` to `owner`; return the address.

    `terms` is the result of Terms.read for the request. `handle` is the owner's handle, if the caller has just read it,
    or assumes that it does not exist; None means that it is read. The user is warned of invalid blocks. Raises
    HandleExists, and assigns nothing, if the handle is assumed not to exist, and does; AddressHeld if the requested
    address has another owner; and CalicoError if no address is free.
    """
    pools = terms.pools
    if handle is not None and terms.recent is not None:
        handle = replace(handle, blocks=[*handle.blocks, terms.recent])
    if request.address is None:
        taken = datastore.ipam.auto_assign(
            1, pools, owner, terms.reserved, terms.affine, handle, lambda invalid: warn(f"Warning: {invalid}")
        )
        if not taken:
            networks = {network for pool in pools for network in terms.reserved.network.overlapping(pool.cidr)}
            raise CalicoError(
                f"There is no free IP address in {', '.join(pool.cidr for pool in pools)}{_except_text(networks)}."
            )
        return taken[0]
    try:
        datastore.ipam.assign(request.address, owner, handle)
    except AddressTaken as error:
        holder = datastore.ipam.owner(request.address)
        why = f"{error}{_holder_text(datastore, holder)}. Give it {request.advice}"
        raise AddressHeld(why, None if holder is None else _endpoint_id_of(holder)) from None
    return request.address


def _except_text(networks: Collection[Network]) -> str:
    """Return the end of a message, which names the networks from which no address is assigned automatically.

    Returns an empty string if `networks` is empty.
    """
    named = ", ".join(sorted(f"{network.cidr} (on {network.interface})" for network in networks))
    return f", but for the networks that this host is connected to: {named}" if named else ""


def _refuse_reserved(request: AddressRequest, reserved: Reserved) -> None:
    why = None if request.address is None else reserved.refusal(str(request.address))
    if why is not None:
        raise CalicoError(f"IP {request.address} is {why}. Give {request.advice}")


def usable(request: AddressRequest, address: IPAddress, reserved: Reserved) -> bool:
    """Return whether an address that the workload's handle holds already can be used for a request.

    It must satisfy the request. If the request is for any address, it must also be one that may be assigned without an
    explicit request (Reserved.is_free_for_any).
    """
    if request.address is not None:
        return request.fits(address)
    return request.fits(address) and reserved.is_free_for_any(address.version, int(address))


def reserved_addresses(datastore: DatastoreClient, version: int, hosts: list[Entry] | None = None) -> Reserved:
    """Return the addresses of an IP version that this host's workloads must not have. Raises CalicoError.

    `hosts` are the store's entries below keys.BGP_HOSTS, if the caller has just read them; if None, they are read. In a
    batch, the result may be up to reserved.MAX_AGE seconds old.
    """
    # 'container remove' does without these
    from calicoctl.datastore.reserved import Reserved, recent_or_read
    from calicoctl.workloads import host_network, servers

    def read() -> Reserved:
        network = host_network.read_for(version).with_servers(servers.current(datastore.members))
        return Reserved(network, datastore.hosts.addresses(version, hosts), datastore.host)

    return recent_or_read(version, read)


# Owners


def owner_of(workload: Workload, id: EndpointId, interface: str) -> Owner:
    """Return the Owner that addresses of the endpoint `id` are to be assigned to. Reads nothing from the store.

    Its attributes identify the endpoint, and contain what is needed to re-attach the workload. `interface` is the
    interface's name inside the workload. If is_interface_name returns False for it, DEFAULT_INTERFACE is stored
    instead.
    """
    from calicoctl.datastore.blocks import Owner

    return Owner(
        workload.handle,
        {
            "host": id.host,
            "orchestrator": id.orchestrator,
            "workload": id.workload,
            "endpoint": id.endpoint,
            "interface": interface if is_interface_name(interface) else DEFAULT_INTERFACE,
            "namespace": workload.path,
            **({"workload_name": workload.docker_name} if workload.docker_name else {}),
        },
    )


def endpoint_of(owner: Owner) -> str | None:
    """Return the endpoint id in an address's attributes, None if there is none that is valid."""
    id = owner.secondary.get("endpoint")
    # those of Docker's networks have the engine's ids
    return id if isinstance(id, str) and len(id) in (32, 64) and is_endpoint_id(id) else None


def _endpoint_id_of(owner: Owner) -> EndpointId | None:
    """Return the id of an owner's endpoint, as it is stored, even if it is invalid. None if it has none."""
    facts = owner.secondary
    if not facts.get("endpoint"):
        return None
    return EndpointId(*(str(facts.get(part)) for part in ("host", "orchestrator", "workload", "endpoint")))


def _holder_text(datastore: DatastoreClient, owner: Owner | None) -> str:
    """Do what `owner_text` does. If the owner's attributes lack the container's name, take it from the endpoint."""
    facts = owner.secondary if owner is not None else {}
    id = None if owner is None else _endpoint_id_of(owner)
    if owner is not None and id is not None and not facts.get("workload_name"):
        endpoint = datastore.readable(id)
        if endpoint is not None and endpoint.workload_name:
            owner = replace(owner, secondary={**facts, "workload_name": endpoint.workload_name})
    return owner_text(owner)


def owner_text(owner: Owner | None) -> str:
    """Return the end of a sentence that says whose an address is: ` (NAME on host HOST)`; empty if it is not known."""
    facts = owner.secondary if owner is not None else {}
    name = facts.get("workload_name") or facts.get("namespace") or short_id(str(facts.get("workload") or ""))
    return f" ({name} on host {facts.get('host')})" if name else ""


def interfaces_of(owners: Iterable[Owner]) -> set[str]:
    """Return the names of the host ends of the veth pairs that were created for the addresses of these owners.

    The names are derived from the endpoint ids in the addresses' attributes.
    """
    ids = {endpoint_of(owner) for owner in owners} - {None}
    return {EndpointId("", "", "", str(id)).interface for id in ids}


def paths_of(owners: Iterable[Owner]) -> list[object]:
    """Return the path of the namespace of each owner, from its address's attributes; None for a container.

    The values are returned as they are stored, even if they are not strings.
    """
    return [owner.secondary.get("namespace") for owner in owners]


# Names of interfaces


def is_interface_name(name: object) -> bool:
    """Return whether `name` is a string that the kernel accepts as the name of an interface.

    Returns False also for a name with '%', from which the kernel would make another name, and for a name with
    characters that are not printable. Source: dev_valid_name() in the kernel's net/core/dev.c.
    """
    if not isinstance(name, str) or not name.isprintable() or name in (".", ".."):
        return False
    return 0 < len(name.encode()) <= 15 and not any(c in "/:%" or c.isspace() for c in name)


def check_interface_name(name: str) -> None:
    """Raise CalicoError if is_interface_name returns False for `name`."""
    if not is_interface_name(name):
        raise CalicoError(
            f"'{name}' is not a valid interface name: it must have 1 to 15 bytes, and no '/', ':', '%' or blanks"
        )
