"""Connects containers to a Calico network: the command line and the host agent."""

__version__ = "0.1.0"

__commit__ = ""
"""The commit that this copy was built from, with `-dirty` if files differed from it. setup.py writes it into what it
builds; it is empty in a checkout."""
