"""How far a move of the data between etcd's APIs has come, and which agents have followed. See migration.py."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass

from calicoctl.datastore import keys
from calicoctl.datastore.settings import TYPE
from calicoctl.datastore.statuses import AgentStore, parse_agent_store
from calicoctl.datastore.store import Entry, Store, read_all
from calicoctl.errors import CalicoError

LEFT = "What is in v2 is frozen, and stays until 'calicoctl datastore migrate --finish'."

DELETING = (
    "What is in v2 is being deleted, unless that was interrupted: then 'calicoctl datastore migrate --finish' goes on."
)

COPY_ALONE = (
    f"What is in v3 is a copy of v2, perhaps an unfinished one, and v2 has no {keys.READY}: if etcd does not serve v2 "
    "any more, start it with --enable-v2 (3.4 or 3.5), and repeat 'calicoctl datastore migrate'."
)

COPYING, ROLLING_BACK, FINISHING = "copying", "rolling back", "finishing"
"""What the value of the key keys.UNUSED_COPY, "the note" of a move, says is being done."""

COPIED = "copied"
"""The field of the note that keeps the value of keys.COPIED_REVISION while the data moves back to v2."""


@dataclass(frozen=True)
class State:
    """The entries of the keys that say how far a move has come; None for a key that does not exist.

    `v2` and `v3` are Ready in the two APIs, `note` is keys.UNUSED_COPY, and `copied` is keys.COPIED_REVISION.
    """

    v2: Entry | None
    v3: Entry | None
    note: Entry | None
    copied: Entry | None = None

    @property
    def v2_ready(self) -> str | None:
        return None if self.v2 is None else self.v2.value

    @property
    def v3_ready(self) -> str | None:
        return None if self.v3 is None else self.v3.value

    @property
    def step(self) -> str | None:
        """The direction of a move that has frozen the data, and is running or was interrupted.

        COPYING (to v3) or ROLLING_BACK (to v2). None if there is no such move.
        """
        if self.v2_ready != "false" or self.v3_ready == "true" or self.note is None or self.is_finishing:
            return None
        return ROLLING_BACK if self.is_back else COPYING

    @property
    def advice(self) -> str | None:
        """What the user should know about frozen data, and can do, as a sentence.

        None if v2 is in use, or if no data is frozen.
        """
        if self.is_copy_alone:
            return COPY_ALONE
        if self.step == COPYING:
            return (
                "The data is being moved to v3, unless that was interrupted: then 'calicoctl datastore migrate' goes "
                "on, and 'calicoctl datastore migrate --rollback' ends it."
            )
        if self.step == ROLLING_BACK:
            return (
                "The data is on its way back to v2, unless that was interrupted: then 'calicoctl datastore migrate "
                "--rollback' goes on, and 'calicoctl datastore migrate' ends it."
            )
        if self.v3_ready == "true" or self.v2_ready == "true":
            return self.left if self.v3_ready == "true" and self.v2_ready != "true" else None
        return (
            f"Somebody has set {keys.READY} to false: set it to true when the data is complete."
            if self.is_frozen
            else None
        )

    @property
    def is_frozen(self) -> bool:
        return "true" not in (self.v2_ready, self.v3_ready) and "false" in (self.v2_ready, self.v3_ready)

    @property
    def is_copy_alone(self) -> bool:
        """Whether v3 has a copy that is not in use, and v2 has no Ready."""
        unused = self.note is not None and not self.is_finishing and self.v3_ready != "true"
        return unused and self.v2 is None

    @property
    def left(self) -> str | None:
        """What becomes of the data in v2 while v3 is in use, as a sentence.

        None if v2 has no data, and none is being deleted.
        """
        if self.is_finishing:
            return DELETING
        return None if self.v2 is None else LEFT

    @property
    def is_back(self) -> bool:
        """Whether the note says that the data is on its way back to v2."""
        return self.note is not None and f'"{ROLLING_BACK}"' in self.note.value

    @property
    def is_finishing(self) -> bool:
        """Whether the note says that the data in v2 is being deleted."""
        return self.note is not None and f'"{FINISHING}"' in self.note.value

    @property
    def frozen_at(self) -> int | None:
        """The revision at which v2 was frozen: the value of keys.COPIED_REVISION, which the note keeps on the way back.

        None if it is missing, since this program has not moved the data, or has an invalid value.
        """
        if self.copied is not None:
            value: str | None = self.copied.value
        else:
            value = None if self.note is None else copied_in(self.note)
        if value is not None:
            with suppress(ValueError):
                return int(value)
        return None


@dataclass(frozen=True)
class Moved:
    """The result of moving the data to v3, of moving it back to v2, or of deleting it in v2.

    `text` is a sentence that says what was done. `problems` are clauses, one for each problem that is left to the user.
    """

    text: str
    problems: tuple[str, ...] = ()


def copied_in(note: Entry) -> str | None:
    """Return the field `copied` of a note, None if the field is missing, or is not text."""
    try:
        found = json.loads(note.value)[COPIED]
    except (LookupError, RecursionError, TypeError, ValueError):
        return None
    return found if isinstance(found, str) else None


# Agents


@dataclass(frozen=True)
class Agent:
    """A live agent, as its status describes it.

    `store` says how the agent uses the store. It is None if the status does not say that, since the agent is of an
    older version, or of 2015. `revision` is the revision of the status in the store.
    """

    store: AgentStore | None
    revision: int

    @property
    def is_frozen(self) -> bool:
        return self.store is not None and self.store.frozen

    @property
    def can_follow(self) -> bool:
        """Whether the agent goes over to the other API by itself: it knows both, and DATASTORE_TYPE names none."""
        return self.store is not None and not self.store.pinned


def live_agents(store: Store) -> dict[str, Agent]:
    """Return host -> live agent, for the agents that report to this store: their statuses have a time to live."""
    hosts = {keys.felix_status(host): host for host in store.names(keys.FELIX_HOSTS)}
    found = read_all(store, list(hosts))
    return {
        hosts[key]: Agent(parse_agent_store(entry.value), entry.revision)
        for key, entry in found.items()
        if entry.expires
    }


def reported_since(agents: dict[str, Agent], before: dict[str, Agent]) -> dict[str, Agent]:
    """Return those of `agents` that have written their status since `before` was read. Both are by host."""
    return {host: found for host, found in agents.items() if found != before.get(host)}


def check_agents(agents: dict[str, Agent]) -> None:
    """Raise CalicoError if one of `agents` cannot follow the data to the other API."""
    old = sorted(host for host, found in agents.items() if found.store is None)
    pinned = sorted(host for host, found in agents.items() if found.store is not None and found.store.pinned)
    if old:
        raise CalicoError(
            f"The agents of {', '.join(old)} are of an older version, or of 2015, and know etcd's v2 API alone: "
            "upgrade them first ('calicoctl node restart'), or end them. Nothing has moved."
        )
    if pinned:
        raise CalicoError(
            f"The agents of {', '.join(pinned)} have {TYPE} in their environment, and use that API whatever happens: "
            "remove it, from /etc/calico/node.env, too, and start them again ('calicoctl node stop --force', "
            "'calicoctl node'). Nothing has moved."
        )
