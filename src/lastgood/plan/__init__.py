"""What a run will write, keep and lose, told before it starts."""
