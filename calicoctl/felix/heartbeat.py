"""The agent's heartbeat: the host's status in the store, which the agent renews again and again.

If it is not renewed, the status expires. It names the machine on which the agent runs. The agent renews it by
compare-and-swap or, on a store with leases, by a touch (`Store.touch`). Both detect that another agent has written the
status, for example an agent on a second machine with the same host name. With leases, a status that has not changed is
not written again, so its `time` may be old while its agent is alive.

`claim` decides for `calicoctl node` whether this machine may use the host name, before that command writes anything
else. `Heartbeat` decides the same for a running agent. If another agent has written the status, and the id of that
agent's machine is known, this agent does not write the status again by itself, not even after it has expired. The other
machine may be rebooting, and if this agent reconciled the other machine's endpoints, it would remove them.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calicoctl.clock import now
from calicoctl.datastore.statuses import agent_store
from calicoctl.errors import CalicoError, CompareFailed, KeyExists, StoreError

if TYPE_CHECKING:
    from calicoctl.datastore.client import DatastoreClient
    from calicoctl.datastore.store import Entry

INTERVAL = 10.0
"""Seconds between two heartbeats."""

FROZEN_INTERVAL = 2.0
"""Seconds between two heartbeats while the data is frozen, because it is being moved to the other API of etcd: each
heartbeat finds out whether it has moved.
"""

TIME_TO_LIVE = 30
"""Seconds after which a status expires."""

EXPIRY_PATIENCE = 30.0
"""Seconds to wait until a status expires, or is renewed by a live agent. Felix of 2015 renews its status every 30 s,
with a time to live of 90 s.
"""

LEASE_PATIENCE = TIME_TO_LIVE + 5.0
"""Seconds after which a status on a store with leases has expired, unless its agent is alive. etcd needs up to a second
to delete it.
"""

YIELD_PATIENCE = INTERVAL + 2
"""Seconds within which an agent notices that another agent has written its status."""

POLL_INTERVAL = 0.5
"""Seconds between two reads of a status while waiting. A watch may expire, so it would need reads as well."""

TIMES = ("time", "uptime")
"""The fields of a status that always change. A status that differs only in these fields need not be written."""

_APPLICATION = uuid.UUID("b42e1f91-5bde-4911-a361-abec26e34313").bytes

_MACHINE_ID = Path("/etc/machine-id")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Identity:
    """A machine, and one boot of it. A field is None if it is unknown.

    `machine` is derived from the confidential machine id, as machine-id(5) demands. `systemd-id128 machine-id
    --app-specific=b42e1f915bde4911a361abec26e34313` prints the same value. `boot` is the kernel's id of the boot.
    """

    machine: str | None
    boot: str | None

    @classmethod
    def own(cls) -> Identity:
        """Return the identity of this machine and its current boot."""
        boot = _read(_BOOT_ID)
        try:
            id = bytes.fromhex(_read(_MACHINE_ID))
        except ValueError:  # for example "uninitialized"
            id = b""
        return cls(_derived(id) if len(id) == 16 and any(id) else None, boot or None)

    @classmethod
    def of(cls, status: Entry) -> Identity:
        """Return the identity that a host's status contains. Both fields are None if Felix or an old agent wrote it."""
        try:
            value = json.loads(status.value)
        except ValueError:
            value = None
        fields = value if isinstance(value, dict) else {}
        machine, boot = (fields.get(name) for name in ("machine", "boot"))
        return cls(*(part if isinstance(part, str) and part else None for part in (machine, boot)))

    def to_dict(self) -> dict[str, str]:
        fields = {"machine": self.machine, "boot": self.boot}
        return {name: value for name, value in fields.items() if value is not None}

    def is_other_machine(self, own: Identity) -> bool:
        """Return whether the machines of this identity and of `own` are both known, and differ."""
        return None not in (self.machine, own.machine) and self.machine != own.machine

    def describe(self, own: Identity) -> str:
        """Return a name for an agent with this identity, as the beginning of a sentence.

        `own` is the identity of this machine.
        """
        if self.machine is None and self.boot is not None:
            return "An agent on a machine without a machine id"
        if self.machine is None:
            return "An old agent (Felix, or an older version of this one)"
        if self.machine != own.machine:
            return "Another machine"
        if self.boot != own.boot:
            return "Another boot, or a copy, of this machine"
        return "Another agent on this machine"


def _is_claimed(status: Entry) -> bool:
    """Return whether `claim` has written a host's status: its `uptime` is 0 then, since no agent has written it."""
    with suppress(ValueError):
        value = json.loads(status.value)
        return isinstance(value, dict) and value.get("uptime") == 0.0
    return False


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _derived(machine_id: bytes) -> str:
    """Return the id of a machine for this application. It is derived from the machine id, but does not disclose it.

    Source: sd_id128_get_machine_app_specific(3).
    """
    digest = bytearray(hmac.new(machine_id, _APPLICATION, hashlib.sha256).digest()[:16])
    digest[6] = digest[6] & 0x0F | 0x40  # the form of a random UUID
    digest[8] = digest[8] & 0x3F | 0x80
    return digest.hex()


class Heartbeat:
    """Writes and renews the host's status in the store. Not thread-safe."""

    def __init__(self, datastore: DatastoreClient) -> None:
        self._datastore = datastore
        self._own = Identity.own()
        self._entry: Entry | None = None
        """The status that the next `beat` renews; None if there is none."""
        self._api: str | None = None
        """The API of etcd by which `_entry` was read or written. If the data moves to the other API, a status that this
        agent has written there before may still exist.
        """
        self._lasting: dict[str, Any] | None = None
        """The status without TIMES, if this agent has written `_entry`; else None."""
        self.has_begun = False
        """Whether the last `beat` wrote the status anew: for the first time, or after it had expired or was changed by
        another writer. The statuses of endpoints may then be gone, or be attached to another lease.
        """
        self._contested = False
        """Whether an agent of the same identity wrote the status between the last two heartbeats of this agent."""
        self._replaced_by: Identity | None = None
        """The identity of the other agent that writes the status; None while this agent writes it."""

    def beat(self, status: dict[str, Any]) -> Identity | None:
        """Write or renew the host's status, and return None.

        The status contains the fields in `status` and this machine's identity. If another agent writes the host's
        status, leave it as it is, and return that agent's identity. Raises StoreError.
        """
        contested = False
        if self._replaced_by is not None:
            self._try_to_regain(self._replaced_by)
        status = {**status, **self._own.to_dict()}
        lasting = {name: value for name, value in status.items() if name not in TIMES}
        while self._replaced_by is None:
            try:
                if self._entry is not None and self._lasting == lasting:
                    self._entry = self._datastore.statuses.renew_host(status, TIME_TO_LIVE, self._entry)
                else:
                    self._entry = self._datastore.statuses.write_host(status, TIME_TO_LIVE, self._entry)
                self._api = self._current_api()
                self.has_begun, self._lasting, self._contested = self._lasting is None, lasting, contested
                return None
            except (KeyExists, CompareFailed):
                had_it = self._entry is not None and self._api == self._current_api()
                self._contested = self._contested and had_it
                self._compare()
                contested = had_it and self._entry is not None
        return self._replaced_by

    def _current_api(self) -> str | None:
        choice = self._datastore.choice()
        return None if choice is None else choice.api

    def _compare(self) -> None:
        """After the store has refused a write, read the status again, and determine who has written it.

        If the status has expired, this agent creates it anew. If it has this agent's identity, the previous agent or
        `claim` has written it, and this agent renews it from now on. But if it was written with this agent's identity
        before each of two heartbeats in a row, and not by `claim` the second time, another agent on this machine writes
        it, for example in a container. In that case, and if the status has another identity, `_replaced_by` is set.
        """
        self._lasting = None
        self._entry, self._api = self._datastore.statuses.of_host(), self._current_api()
        writer = self._own if self._entry is None else Identity.of(self._entry)
        if writer != self._own or (self._contested and self._entry is not None and not _is_claimed(self._entry)):
            self._entry, self._replaced_by, self._contested = None, writer, False

    def _try_to_regain(self, writer: Identity) -> None:
        """Determine whether this agent may write the status again, after the agent `writer` has written it.

        It may if `claim` has written the status for this machine since then, or if the status has expired and the
        machine of `writer` is unknown. `_replaced_by` is then set to None. If the status has another identity than this
        agent's, `_replaced_by` is set to that identity. Raises StoreError.
        """
        entry = self._datastore.statuses.of_host()
        if entry is not None and Identity.of(entry) != self._own:
            self._replaced_by = Identity.of(entry)
        elif entry is not None and writer != self._own:
            self._entry, self._api = entry, self._current_api()  # `claim` has written it for this machine
            self._replaced_by = None
        elif entry is None and writer.machine is None:
            self._replaced_by = None

    def end(self) -> None:
        """Remove the status if this agent wrote it. Raises StoreError."""
        if self._entry is not None:
            self._datastore.statuses.remove_host(self._entry)


def claim(
    datastore: DatastoreClient, force: bool, own_agent_writes: bool, notify: Callable[[str], None]
) -> Entry | None:
    """Write the host's status with this machine's identity, if no other agent writes the status.

    `own_agent_writes` says whether the host's agent is running on this machine. If it is, a status that names neither a
    machine nor a boot counts as that agent's. If `force` is True, a status of another agent is overwritten. `notify` is
    called with a sentence before each wait. If `force` is False, and another agent's status does not name another
    machine, waits until it has expired, since that agent may have ended.

    Returns the written entry. Returns None if the host's agent on this machine writes the status. Raises StoreError. If
    another agent writes the status and `force` is False, raises CalicoError, and changes nothing. If `force` is True,
    raises CalicoError if the other agent writes the status again after it was overwritten.
    """
    own = Identity.own()
    while True:
        entry = datastore.statuses.of_host()
        writer = None if entry is None else Identity.of(entry)
        is_ours = writer is not None and _is_ours(writer, own, own_agent_writes)
        if is_ours and own_agent_writes:
            return None
        try:
            if entry is None or writer is None or is_ours:
                return _write(datastore, own, entry)
            if force:
                return _take_over(datastore, own, entry, notify)
            if writer.is_other_machine(own):
                raise CalicoError(_in_use(datastore, writer, own))
            return _write(datastore, own, _await_expiry(datastore, own, entry, notify))
        except (KeyExists, CompareFailed):
            pass  # it was written, or expired, concurrently


def _write(datastore: DatastoreClient, own: Identity, before: Entry | None) -> Entry:
    choice = datastore.current_choice()
    store = {} if choice is None else agent_store(choice)
    status = {"time": now(), "uptime": 0.0, "first_update": False, **store, **own.to_dict()}
    return datastore.statuses.write_host(status, TIME_TO_LIVE, before)


def _await_expiry(
    datastore: DatastoreClient, own: Identity, entry: Entry, notify: Callable[[str], None]
) -> Entry | None:
    """Wait until the status `entry` has expired, and return None.

    If another command on this host writes the status meanwhile, return the new entry. If the status neither expires nor
    is renewed within EXPIRY_PATIENCE, return `entry`. Raise CalicoError if another agent renews the status. On a store
    with leases, a renewal is not visible, so raise CalicoError if the status has not expired within LEASE_PATIENCE.
    """
    writer = Identity.of(entry)
    leases = datastore.statuses.hang_together
    patience = LEASE_PATIENCE if leases else EXPIRY_PATIENCE
    notify(
        f"Host {datastore.host} has a status in etcd that may be another agent's: waiting for it to expire, for "
        f"{patience:.0f} s at most."
    )
    give_up = time.monotonic() + patience
    while time.monotonic() < give_up:
        time.sleep(POLL_INTERVAL)
        found = datastore.statuses.of_host()
        if found is None:
            return None
        if found.revision != entry.revision:
            if _is_ours(Identity.of(found), own, False):
                return found  # another command on this host was faster
            raise CalicoError(_in_use(datastore, writer, own))
    if leases:
        raise CalicoError(_in_use(datastore, writer, own))
    return entry


def _take_over(datastore: DatastoreClient, own: Identity, entry: Entry, notify: Callable[[str], None]) -> Entry:
    """Overwrite another agent's status, wait for YIELD_PATIENCE, and write the status again.

    Returns the entry that was written last. Raises CalicoError if the other agent writes the status during the wait:
    agents of older versions do not notice that another agent has written it.
    """
    who = _with_addresses(datastore, Identity.of(entry).describe(own))
    notify(
        f"{who} reports for host {datastore.host}: taking over, and waiting {YIELD_PATIENCE:.0f} s for it to notice."
    )
    mine: Entry | None = _write(datastore, own, entry)
    until = time.monotonic() + YIELD_PATIENCE
    while time.monotonic() < until:
        time.sleep(POLL_INTERVAL)
        mine = datastore.statuses.of_host()
        if mine is not None and Identity.of(mine) != own:
            raise CalicoError(
                f"{who} goes on reporting for host {datastore.host}, and cannot be made to stop from here: end it first"
            )
    return _write(datastore, own, mine)


def _in_use(datastore: DatastoreClient, writer: Identity, own: Identity) -> str:
    return (
        f"{_with_addresses(datastore, writer.describe(own))} reports for host {datastore.host}: the name is in use. "
        "Give this host a name of its own (HOSTNAME=…), end that agent, or take the name over with --force, by which "
        "what is connected there loses its endpoints"
    )


def _with_addresses(datastore: DatastoreClient, who: str) -> str:
    addresses: set[str] = set()
    with suppress(StoreError):  # the sentence is useful without them
        addresses = datastore.hosts.own_addresses()
    return f"{who}, registered with {' and '.join(sorted(addresses))}," if addresses else who


def other_writer(datastore: DatastoreClient, status: Entry, own_agent_writes: bool) -> str | None:
    """Return a name for the agent that wrote a host's status, for the beginning of a sentence.

    Return None if an agent on this machine wrote it, that is, if the status names this machine and its current boot. If
    `own_agent_writes` is True, the host's agent is running on this machine. Then a status that names neither a machine
    nor a boot counts as that agent's. On a machine without a machine id, so does a status that names only the current
    boot.
    """
    writer, own = Identity.of(status), Identity.own()
    if _is_ours(writer, own, own_agent_writes):
        return None
    return _with_addresses(datastore, writer.describe(own))


def _is_ours(writer: Identity, own: Identity, own_agent_writes: bool) -> bool:
    if own_agent_writes:
        return writer in (own, Identity(None, None))
    return writer == own and own.machine is not None


def replaced(datastore: DatastoreClient, writer: Identity) -> str:
    """Return a sentence which says that the agent `writer` writes the host's status now, and this agent does not."""
    who = _with_addresses(datastore, writer.describe(Identity.own()))
    back = (
        "until that agent has ended"
        if writer.machine is None
        else "until 'calicoctl node' takes the name back, with --force while that agent is alive"
    )
    return (
        f"{who} reports for host {datastore.host} now. This agent changes nothing in etcd any more, and leaves what it "
        f"has set up as it is, {back}"
    )
