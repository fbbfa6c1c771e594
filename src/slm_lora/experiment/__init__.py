"""Running an experiment: jobs, cells, resuming, tracking."""
