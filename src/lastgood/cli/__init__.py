"""The command line: git's verbs on the checkpoints of any run. Thin: it translates and shows, and decides nothing."""
