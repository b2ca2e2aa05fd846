"""What is wrong with a run, its settings or its log, what it means, and how to mend it."""
