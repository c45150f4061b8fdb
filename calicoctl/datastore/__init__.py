"""Calico's data in etcd: use the class `DatastoreClient` of client.py."""
