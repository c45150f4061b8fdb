"""Containers and namespaces of this host: what connects, disconnects and repairs them."""
