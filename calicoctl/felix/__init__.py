"""The host agent: drives the network of one host to the desired state in the store."""
