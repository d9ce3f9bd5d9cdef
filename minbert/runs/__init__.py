"""The run directory, its checkpoints and its records."""
