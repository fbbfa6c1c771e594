"""Cost of an experiment before it runs: time, memory, steps."""
