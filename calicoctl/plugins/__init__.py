"""What container engines call: Docker's networks, served by a process, and the plugin for CNI."""
