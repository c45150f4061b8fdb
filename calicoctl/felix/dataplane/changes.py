"""Collects related changes to our nftables tables, and renders them as the commands of one transaction.

ruleset.py and host_rules.py determine the changes.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Callable

from calicoctl.policy.rules import LONGEST_NEW_NAME

_SAFE = re.compile(rf"[A-Za-z0-9_.-]{{1,{LONGEST_NEW_NAME}}}", re.ASCII)
"""Matches the names that become part of names of chains and sets unchanged, such as all names of new profiles and
tags.
"""

_PROFILE_CHAINS = ("inbound/", "outbound/")


class Change:
    """Collects the changes of one transaction, and renders their commands in an order that nftables accepts.

    Changes that cancel each other are not rendered.
    """

    def __init__(
        self,
        elements: dict[tuple[str, str], Counter[str]],
        chains: dict[str, tuple[str, ...]],
        base_chains: Mapping[str, str],
    ) -> None:
        """`elements` and `chains` are the contents of the tables. The methods of this object update them in place.

        `elements` maps each set or map, as (family, name), to its elements with their reference counts. `chains` maps
        the names of chains to their rules. `base_chains` maps the names of base chains to their definitions (type,
        hook, priority).
        """
        self._elements = elements
        self._chains = chains
        self._base_chains = base_chains
        self._old_chains: dict[str, tuple[str, ...] | None] = {}
        self._added: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
        self._removed: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
        self._created: dict[str, str] = {}
        self._deleted: set[str] = set()
        self._new_counters: list[str] = []
        self._unused_counters: list[str] = []

    def add(self, where: tuple[str, str], element: str) -> None:
        """Add one reference to an element of the set or map `where`, which is (family, name).

        `element` is in nftables' syntax: "KEY" in a set, "KEY : VALUE" in a map. It is added to the tables with its
        first reference, and `remove` removes it with its last.
        """
        self._elements[where][element] += 1
        if self._elements[where][element] > 1:
            return
        if element in self._removed[where]:
            del self._removed[where][element]
        else:
            self._added[where][element] = None

    def remove(self, where: tuple[str, str], element: str) -> None:
        self._elements[where][element] -= 1
        if self._elements[where][element] > 0:
            return
        del self._elements[where][element]
        if element in self._added[where]:
            del self._added[where][element]
        else:
            self._removed[where][element] = None

    def replace(self, where: tuple[str, str], elements: Iterable[str]) -> None:
        """Make `elements` the only elements of the set `where`, which is (family, name)."""
        desired = set(elements)
        for element in sorted(self._elements[where].keys() - desired):
            self.remove(where, element)
        for element in sorted(desired - self._elements[where].keys()):
            self.add(where, element)

    def create_set(self, name: str, type: str) -> None:
        if name in self._deleted:
            self._deleted.discard(name)
        else:
            self._created[name] = type

    def delete_set(self, name: str) -> None:
        where = ("inet", name)
        for element in list(self._elements[where]):
            self.remove(where, element)
        if name in self._created:
            del self._created[name]
        else:
            self._deleted.add(name)
        self._elements.pop(where, None)

    def create_counter(self, command: str) -> None:
        """Run `command`, which creates a counter, before the rules that name the counter are added."""
        self._new_counters.append(command)

    def delete_counter(self, name: str) -> None:
        """Delete a counter that no rule names any more."""
        self._unused_counters.append(name)

    def set_chain(self, name: str, rules: tuple[str, ...] | None) -> None:
        """Set the rules of a chain; None deletes the chain."""
        self._old_chains.setdefault(name, self._chains.get(name))
        if rules is None:
            self._chains.pop(name, None)
        else:
            self._chains[name] = rules

    def commands(self) -> str:
        # unused chains and sets are deleted last, after all that referred to them
        lines = []
        changed = {name for name, old in self._old_chains.items() if old != self._chains.get(name)}
        for name, type in self._created.items():
            lines.append(f"add set inet calico {name} {{ type {type}; }}")
        kept = sorted(name for name in changed if name in self._chains)
        lines += [f"add chain inet calico {name} {self._base_chains.get(name, '')}" for name in kept]
        lines += [f"flush chain inet calico {name}" for name in sorted(changed) if self._old_chains[name] is not None]
        # an element of a map is deleted by its key
        lines += self._element_lines("delete", self._removed, lambda element: element.partition(" : ")[0])
        lines += self._element_lines("add", self._added, str)
        for name in kept:
            lines += [f"add rule inet calico {name} {rule}" for rule in self._chains[name]]
        # first the chains of lists of profiles, which jump to the chains of profiles
        gone = sorted(
            (name for name in changed if name not in self._chains), key=lambda n: n.startswith(_PROFILE_CHAINS)
        )
        lines += [f"delete chain inet calico {name}" for name in gone]
        lines += [f"delete set inet calico {name}" for name in sorted(self._deleted)]
        lines += [f"delete counter inet calico {name}" for name in self._unused_counters]
        return "".join(self._new_counters) + "".join(line + "\n" for line in lines)

    @staticmethod
    def _element_lines(
        verb: str, changes: dict[tuple[str, str], dict[str, None]], spell: Callable[[str], str]
    ) -> list[str]:
        return [
            f"{verb} element {family} calico {name} {{ {', '.join(map(spell, elements))} }}"
            for (family, name), elements in changes.items()
            if elements
        ]


def spelled(name: str) -> str:
    """Return the text that stands for a profile, tag or host of this name in the names of chains and sets.

    This is the name itself if it matches _SAFE, or else a slash and a digest of the name. No name that matches _SAFE
    contains a slash.
    """
    return name if _SAFE.fullmatch(name) else "/" + hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:32]
