"""The process that serves the Docker Engine's plugin calls: networks whose driver and IPAM driver are Calico's."""
