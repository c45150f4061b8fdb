"""The desired state of this host, from the store."""
