"""The checkpoints of one run directory: commit, read, verify, collect, lock. No torch."""
