"""The encoder, its weights and the task heads."""
