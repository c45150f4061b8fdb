"""The desired state of this host, computed from the store."""
