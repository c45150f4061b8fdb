"""The host agent: makes the network of one host what the store says it is."""
