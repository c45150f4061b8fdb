"""Creates the backends of the store, one for each API of etcd, and chooses between them.

A choice (detection.Choice) says which API is used, and whether its data is frozen, that is, must not be changed.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from calicoctl.datastore import keys
from calicoctl.datastore.chosen import ChosenStore, Found
from calicoctl.datastore.detection import Choice, Shown, ask_v2, ask_v3, detect, foreign
from calicoctl.datastore.settings import TYPE, V3, EtcdSettings
from calicoctl.datastore.store import FencedStore
from calicoctl.errors import NoSuchApi, StoreError, StoreUnavailable

if TYPE_CHECKING:
    from calicoctl.datastore.etcd2 import Etcd2Store
    from calicoctl.datastore.etcd3 import Etcd3Store

PATIENCE = 20.0
"""Seconds for which a request is retried while the cluster cannot serve it, for example during a leader election."""

TAKEN_OVER = 1.0
"""The maximum age, in seconds, of a choice that another client in this process uses without a request of its own. A
command of `calicoctl batch` begins with such a choice, and should end before the choice is chosen.FRESH seconds old."""

_latest: dict[EtcdSettings, Choice] = {}
"""Cluster -> the last choice in this process of an API whose data is not frozen. All clients share these choices."""


_shared = threading.local()
"""`backends`: (settings, patience) -> the backends that the clients of this thread share."""


def begin_command() -> None:
    """Have the next client in this thread take note of what others may have changed since the last one.

    It checks the last choice in this process by a request, however recent this choice is. It asks those members last
    that have kept a command of another process waiting.
    """
    for settings, choice in list(_latest.items()):
        _latest[settings] = replace(choice, at=-math.inf)
    for backends in _shared.__dict__.get("backends", {}).values():
        backends.recall_slow_members()


def connect(settings: EtcdSettings, patience: float = PATIENCE, shared: bool = False) -> ChosenStore:
    """Return the store of the cluster in `settings`. Sends no request.

    `patience` is for how many seconds a request is retried: see PATIENCE. If `shared` is true, the store shares its
    connections, and the order in which it asks the members, with the other shared stores of this thread that have the
    same `settings` and `patience`; no other thread may use it. So a process that runs commands one after another
    connects once, and waits only once for a member that does not answer.
    """
    backends = Backends(settings, patience)
    if shared:
        backends = _shared.__dict__.setdefault("backends", {}).setdefault((settings, patience), backends)
    return ChosenStore(backends.choose, backends.latest, backends.open, backends.choose_and_read)


class Backends:
    """The backends for one cluster, created when they are first used."""

    def __init__(self, settings: EtcdSettings, patience: float = PATIENCE) -> None:
        self._settings = settings
        self._patience = patience

    def open(self, api: str) -> FencedStore:
        """Return the backend for an API (V2 or V3)."""
        return self._v3 if api == V3 else self._v2

    def recall_slow_members(self) -> None:
        """Have the backends that were used ask those members last that another command has found slow since."""
        for backend in (self.__dict__.get("_v2"), self.__dict__.get("_v3")):
            if backend is not None:
                backend.recall_slow_members()

    @cached_property
    def _v2(self) -> Etcd2Store:
        from calicoctl.datastore.etcd2 import Etcd2Store

        return Etcd2Store(self._settings, self._patience, keys.implied_directories)

    @cached_property
    def _v3(self) -> Etcd3Store:
        from calicoctl.datastore import tokens
        from calicoctl.datastore.etcd3 import Etcd3Store

        return Etcd3Store(self._settings, self._patience, tokens.authorize(self._settings))

    def choose(self, before: Choice | None) -> Choice:
        """Return which API to use.

        `before` is the caller's previous choice, which is checked again by a request. If it is None, the choice that
        `latest` returns is used, and checked again only if it is more than TAKEN_OVER seconds old. If that is None,
        too, the API is the one that DATASTORE_TYPE names (without a request), or is determined by requests. Raises
        StoreError if no API may be used, and InvalidValue if the key Ready is neither `true` nor `false`.
        """
        began = time.monotonic()
        if before is None:
            before = self.latest()
            if before is not None and began - before.at <= TAKEN_OVER:
                return before
        choice = replace(self._current(before), at=began)
        if choice.frozen is False:
            _latest[self._settings] = choice
        return choice

    def choose_and_read(self, wanted: Sequence[str], directories: Sequence[str]) -> tuple[Choice, Found] | None:
        """Do what `choose` does if the caller has no choice yet, and what Store.read does, by one request for both.

        Returns None if that is not possible: if there is no last choice, or it is another API than v3; if etcd refuses
        the request; if the answer is too large, or does not confirm the choice. Raises StoreUnavailable if no member
        answers.
        """
        before, began = self.latest(), time.monotonic()
        if before is None or before.api != V3:
            return None
        try:
            found = self._v3.read_at_once([keys.READY, *wanted], directories, [keys.OTHER_CALICO])
        except StoreUnavailable:
            raise
        except StoreError:
            return None
        if found is None:
            return None
        (ready, *entries), trees, (foreign,) = found
        if ready is None or ready.value != "true" or foreign:
            return None
        choice = replace(before, is_new=False, revision=ready.revision, at=began)
        _latest[self._settings] = choice
        return choice, (entries, trees)

    def latest(self) -> Choice | None:
        """Return the last choice in this process of an API whose data was not frozen, None if there is none."""
        return _latest.get(self._settings)

    def _current(self, before: Choice | None) -> Choice:
        api = self._settings.api
        if api is not None and before is None:
            return Choice(api, None, f"{TYPE} says so", pinned=True)
        if api is not None:
            shown = self._shown(api)
            if shown.refused is not None:
                raise shown.refused
            if not shown.served:
                asked = f"its {api[-2:]} API, which {TYPE}={api} asks for: unset that, for all hosts alike"
                raise NoSuchApi(f"etcd at {self._settings.urls} does not serve {asked}")
            self._refuse_foreign(shown)
            return Choice(api, shown.ready == "false", f"{TYPE} says so", pinned=True, revision=shown.revision)
        if before is not None and before.frozen is False:
            shown = self._shown(before.api)
            if shown.ready == "true":
                self._refuse_foreign(shown)
                return replace(before, is_new=False, revision=shown.revision)
        choice = detect(self._settings, self._v3, self._patience)
        if choice.api != V3:
            del self._v3  # with its connection, which an agent would keep
        return choice

    def _shown(self, api: str) -> Shown:
        """Return the state of an API (V2 or V3). Raises StoreUnavailable if no member answers."""
        return ask_v3(self._v3) if api == V3 else ask_v2(self._v2)

    def _refuse_foreign(self, shown: Shown) -> None:
        """Raise StoreError if the API that is to be used holds data of Calico 3."""
        if shown.foreign:
            raise foreign(self._settings.urls)
