"""What the store wants of this host."""
