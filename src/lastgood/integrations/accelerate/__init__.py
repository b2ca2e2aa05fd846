"""Accelerate: what an Accelerator prepared and registered, as parts of a checkpoint."""
