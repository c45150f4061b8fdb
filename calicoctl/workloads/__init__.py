"""Connects, disconnects and reconciles the workloads of this host: containers and network namespaces."""
