"""Everything Calico knows, in etcd: use `DatastoreClient` from `client`."""
