"""transformers' Trainer and everything that inherits from it."""
