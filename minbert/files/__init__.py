"""Files: atomic writes, reads within limits, validation, locks, the cache and the hub."""
