"""What the agent sets up in the kernel, and the drivers that do it."""
