"""BGP: the configuration of BIRD, its process, and its sessions."""
