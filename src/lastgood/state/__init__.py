"""Torch objects to parts of a checkpoint and back. The only layer beside integrations that imports torch."""
