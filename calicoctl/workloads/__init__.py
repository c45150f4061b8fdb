"""Containers and network namespaces of this host: connecting, disconnecting and reconciling them."""
