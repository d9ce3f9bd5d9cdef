"""Files: atomic writes, reads within limits, validation, locks, the cache and the hub."""

MANIFEST = "manifest.json"  # in the directory of a checkpoint: the checksums of its files
