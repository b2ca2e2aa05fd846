"""Checkpoints of one tool made into those of another. Reads weights and plain data, never executes a pickle."""
