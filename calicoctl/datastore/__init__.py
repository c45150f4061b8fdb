"""Calico's data in etcd: use `DatastoreClient` from `client`."""
