"""The configuration as a file: what is stored, what a file declares, and the difference."""
