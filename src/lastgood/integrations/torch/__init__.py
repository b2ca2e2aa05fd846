"""Training loops that people write themselves: `lastgood.CheckpointManager`."""
