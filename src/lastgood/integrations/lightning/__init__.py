"""Lightning under lastgood: a callback in the place of ModelCheckpoint, and the CheckpointIO that goes with it."""
