"""Checkpoints that other tools wrote: recognised and checked, never changed, without torch."""
