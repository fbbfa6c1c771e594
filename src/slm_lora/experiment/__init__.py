"""A grid of runs, and what is said of them."""
