"""Chooses the backend of the store. No other module names a backend."""

from __future__ import annotations

import os

from calicoctl.datastore import keys
from calicoctl.datastore.settings import EtcdSettings
from calicoctl.datastore.store import Store
from calicoctl.errors import StoreError

PATIENCE = 20.0
"""Seconds for which a request is retried while the cluster cannot serve it, for example while it elects a leader."""


def connect(settings: EtcdSettings, patience: float = PATIENCE) -> Store:
    """Return a client of the cluster in `settings`; nothing is sent yet. `patience`: see PATIENCE.

    The environment variable DATASTORE_TYPE says which API of etcd is used: etcdv2, the default, or etcdv3. Raises
    StoreError for another one.
    """
    kind = os.environ.get("DATASTORE_TYPE") or "etcdv2"
    if kind == "etcdv3":
        from calicoctl.datastore.etcd3 import Etcd3Store

        return Etcd3Store(settings, patience)
    if kind != "etcdv2":
        raise StoreError(f"DATASTORE_TYPE is '{kind}': it must be etcdv2 or etcdv3")
    from calicoctl.datastore.etcd2 import Etcd2Store

    return Etcd2Store(settings, patience, keys.implied_directories)
