"""Connect containers to a Calico network: the command line and, later, the host agent."""

__version__ = "0.1.0"
