"""Connects containers to a Calico network: the command line and the host agent."""

__version__ = "0.1.0"
