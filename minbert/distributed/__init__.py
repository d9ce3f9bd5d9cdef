"""Training by several processes: the process group, and parameters that they share out."""
