"""The data plane: managers, which drive parts of the kernel to the desired state, and their drivers."""
