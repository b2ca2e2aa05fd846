"""What is wrong with a run, and the proof that a resume goes on as if nothing had happened."""
