"""Chooses the backend of the store. No other module names a backend."""

from __future__ import annotations

from calicoctl.datastore import keys
from calicoctl.datastore.settings import EtcdSettings
from calicoctl.datastore.store import Store

PATIENCE = 20.0
"""Seconds for which a request is retried while the cluster cannot serve it, for example while it elects a leader."""


def connect(settings: EtcdSettings, patience: float = PATIENCE) -> Store:
    """Return a client of the cluster in `settings`; nothing is sent yet. `patience`: see PATIENCE."""
    from calicoctl.datastore.etcd2 import Etcd2Store

    return Etcd2Store(settings, patience, keys.implied_directories)
